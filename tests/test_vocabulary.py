"""Vocabulary: order of ids, counts, round trips, figures, errors."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timemachine import require_time_machine

from gpurnn.text import UNK, Tokenizer, Vocabulary

TOKENS = list("banana bread")


def test_ids_go_by_falling_frequency_then_code_point() -> None:
    vocabulary = Vocabulary(TOKENS)
    assert vocabulary.tokens == ("<unk>", "a", "b", "n", " ", "d", "e", "r")
    assert vocabulary.counts == (0, 4, 2, 2, 1, 1, 1, 1)
    assert Vocabulary(["é", "z", "Z", "10", "9"]).tokens == ("<unk>", "10", "9", "Z", "z", "é")


def test_order_of_the_text_does_not_matter() -> None:
    assert Vocabulary(TOKENS[::-1]) == Vocabulary(TOKENS)


def test_reserved_tokens_follow_unk_in_the_order_given() -> None:
    vocabulary = Vocabulary("aab", reserved=("<z>", "<a>"))
    assert vocabulary.tokens == ("<unk>", "<z>", "<a>", "a", "b")
    assert vocabulary.reserved_ids == (0, 1, 2)
    assert vocabulary.num_reserved == 2
    assert Vocabulary("aab").reserved_ids == (0,)


def test_special_tokens_in_the_text_keep_their_ids_and_are_counted() -> None:
    vocabulary = Vocabulary(["a", "<bos>", "<unk>", "<bos>"], reserved=["<bos>"])
    assert vocabulary.tokens == ("<unk>", "<bos>", "a")
    assert vocabulary.counts == (1, 2, 1)


def test_min_freq_drops_rare_tokens_and_counts_them_as_unk() -> None:
    vocabulary = Vocabulary(TOKENS, min_freq=2)
    assert vocabulary.tokens == ("<unk>", "a", "b", "n")
    assert vocabulary.counts == (4, 4, 2, 2)
    assert "d" not in vocabulary and vocabulary["d"] == 0
    assert vocabulary.encode("bad").tolist() == [2, 1, 0]


def test_min_freq_does_not_drop_reserved_tokens() -> None:
    assert Vocabulary("aab", min_freq=2, reserved=["<pad>"]).tokens == ("<unk>", "<pad>", "a")


def test_lookup() -> None:
    vocabulary = Vocabulary(TOKENS)
    assert len(vocabulary) == 8
    assert vocabulary.unk == 0 and vocabulary["<unk>"] == 0
    assert "a" in vocabulary and UNK in vocabulary and "x" not in vocabulary
    assert list(vocabulary) == list(vocabulary.tokens)
    assert [vocabulary[token] for token in vocabulary] == list(range(8))


def test_encode_gives_int64() -> None:
    vocabulary = Vocabulary(TOKENS)
    ids = vocabulary.encode(["a", "x", "b"])
    assert ids.dtype == np.int64 and ids.tolist() == [1, 0, 2]
    assert vocabulary.encode(iter("ab")).tolist() == [1, 2]
    assert vocabulary.encode([]).shape == (0,) and vocabulary.encode([]).dtype == np.int64


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.uint64])
def test_decode_takes_any_integers(dtype) -> None:
    vocabulary = Vocabulary(TOKENS)
    assert vocabulary.decode(np.array([2, 1, 0], dtype=dtype)) == ["b", "a", "<unk>"]
    assert vocabulary.decode([2, 1]) == ["b", "a"]
    assert vocabulary.decode([]) == []
    assert vocabulary.decode(range(7, 8)) == ["r"]


@settings(deadline=None)
@given(tokens=st.lists(st.text(max_size=3), min_size=1))
def test_round_trip_and_invariants(tokens: list[str]) -> None:
    vocabulary = Vocabulary(tokens)
    assert vocabulary.decode(vocabulary.encode(tokens)) == tokens
    assert sum(vocabulary.counts) == len(tokens)
    ranks = [(-count, token) for count, token in zip(vocabulary.counts, vocabulary, strict=True)]
    assert ranks[1:] == sorted(ranks[1:])
    assert Vocabulary.from_tokens_in_order(vocabulary.tokens) == vocabulary


@settings(deadline=None)
@given(text=st.text(alphabet="abcd", min_size=9), min_freq=st.integers(1, 3))
def test_counts_are_the_counts_of_the_encoded_text(text: str, min_freq: int) -> None:
    vocabulary = Vocabulary(text, min_freq=min_freq)
    counts = np.bincount(vocabulary.encode(text), minlength=len(vocabulary))
    assert counts.tolist() == list(vocabulary.counts)


@pytest.mark.parametrize(
    ("unit", "edition", "size"), [("char", "book", 28), ("word", "book", 4_580)]
)
def test_size_on_the_time_machine(unit: str, edition: str, size: int) -> None:
    tokens = Tokenizer(unit, edition).tokens(require_time_machine())
    vocabulary = Vocabulary(tokens)
    assert len(vocabulary) == size
    assert vocabulary.decode(vocabulary.encode(tokens)) == tokens


def test_most_frequent_words_of_the_time_machine_are_those_of_the_book() -> None:
    vocabulary = Vocabulary(Tokenizer("word", "book").tokens(require_time_machine()))
    assert dict(zip(vocabulary.tokens[1:8], vocabulary.counts[1:8], strict=True)) == {
        "the": 2_261, "i": 1_267, "and": 1_245, "of": 1_155, "a": 816, "to": 695, "was": 552,
    }  # fmt: skip


def test_from_tokens_in_order() -> None:
    vocabulary = Vocabulary.from_tokens_in_order(["<unk>", "<pad>", "z", "a"], num_reserved=1)
    assert vocabulary.tokens == ("<unk>", "<pad>", "z", "a")
    assert vocabulary.reserved_ids == (0, 1)
    assert vocabulary.counts is None
    assert vocabulary.encode("az?").tolist() == [3, 2, 0]


def test_equality_is_that_of_the_tokens() -> None:
    assert Vocabulary("aab") == Vocabulary("aaaab")
    assert hash(Vocabulary("aab")) == hash(Vocabulary("aaaab"))
    assert Vocabulary("aab") != Vocabulary("abb")
    assert Vocabulary("a") != ("<unk>", "a")


def test_copies_are_equal() -> None:
    vocabulary = Vocabulary("aab", reserved=["<pad>"])
    for twin in (copy.deepcopy(vocabulary), pickle.loads(pickle.dumps(vocabulary))):
        assert twin == vocabulary
        assert (twin.counts, twin.reserved_ids) == (vocabulary.counts, vocabulary.reserved_ids)


def test_repr() -> None:
    assert repr(Vocabulary("ab", reserved=["<pad>"])) == "<Vocabulary of 4 tokens, 1 reserved>"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": []}, ValueError, "tokens is empty: a vocabulary needs .* non-empty text"),
        ({"tokens": ""}, ValueError, "tokens is empty"),
        ({"tokens": ["a", 7]}, TypeError, r"tokens must be strings, got 7 \(int\) at position 1"),
        ({"min_freq": 0}, ValueError, "min_freq is 0: expected at least 1"),
        ({"min_freq": -3}, ValueError, "min_freq is -3: expected at least 1"),
        ({"min_freq": 1.5}, TypeError, "min_freq is 1.5: expected an integer"),
        ({"min_freq": True}, TypeError, "min_freq is True: expected an integer"),
        ({"min_freq": 3}, ValueError, "min_freq=3 leaves no token: .* 'a', occurs 2 times"),
        ({"reserved": "<pad>"}, TypeError, "reserved must be a sequence .* string '<pad>'"),
        ({"reserved": [1]}, TypeError, r"reserved must be strings, got 1 \(int\) at position 0"),
        ({"reserved": ["p", "p"]}, ValueError, "reserved must not repeat a token, got 'p' 2 times"),
        ({"reserved": ["<unk>"]}, ValueError, "reserved must not name '<unk>', which is always"),
    ],
)
def test_refused(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Vocabulary(**{"tokens": "aab", **arguments})


def test_text_of_special_tokens_only_is_no_error() -> None:
    assert Vocabulary(["<unk>", "<pad>"], min_freq=9, reserved=["<pad>"]).counts == (1, 1)


@pytest.mark.parametrize(
    ("tokens", "num_reserved", "error", "message"),
    [
        (["a", "<unk>"], 0, ValueError, "tokens must start with '<unk>', which has id 0; got 'a'"),
        ([], 0, ValueError, "tokens must start with '<unk>', .* got no token at all"),
        (["<unk>", "a", "a"], 0, ValueError, "tokens must not repeat a token, got 'a' 2 times"),
        (["<unk>", None], 0, TypeError, r"tokens must be strings, got None \(NoneType\)"),
        ("<unk>", 0, TypeError, "tokens must be a sequence of tokens, got the string '<unk>'"),
        (["<unk>", "a"], 2, ValueError, "num_reserved must be from 0 to 1 for 2 tokens .* got 2"),
        (["<unk>", "a"], -1, ValueError, "num_reserved is -1: expected at least 0"),
        (["<unk>", "a"], 0.5, TypeError, "num_reserved is 0.5: expected an integer"),
    ],
)
def test_tokens_in_order_refused(tokens, num_reserved, error, message: str) -> None:
    with pytest.raises(error, match=message):
        Vocabulary.from_tokens_in_order(tokens, num_reserved=num_reserved)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 8], ValueError, "ids must be from 0 to 7 .* 8 tokens; got 8 at position 1"),
        ([1, 2, -1], ValueError, "ids must be from 0 to 7 .* 8 tokens; got -1 at position 2"),
        (np.array([2**64 - 1], np.uint64), ValueError, "got 18446744073709551615 at position 0"),
        ([1.0], TypeError, "ids must be integers, got dtype float64"),
        ([True], TypeError, "ids must be integers, got dtype bool"),
        ([[1]], ValueError, r"ids must have one dimension, got shape \(1, 1\)"),
        (3, ValueError, r"ids must have one dimension, got shape \(\)"),
    ],
)
def test_ids_refused(ids, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Vocabulary(TOKENS).decode(ids)


def test_ids_are_not_tokens() -> None:
    vocabulary = Vocabulary(TOKENS)
    with pytest.raises(TypeError, match=r"tokens must be strings, got 1 \(int\) at position 0"):
        vocabulary.encode([1, 2])
    with pytest.raises(TypeError, match=r"a token must be a str, got 1 \(int\)"):
        vocabulary[1]
