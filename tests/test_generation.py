"""What a language model makes up, and from what prefix."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from language_model_setup import (
    ALPHABET,
    WELLS,
    Array,
    alphabet_in_a_circle,
    each_variant,
    language,
    set_params,
    spelled,
)
from tolerance import assert_same_bits

from gpurnn import (
    LanguageModel,
    Tokenizer,
    Vocabulary,
)
from gpurnn.sampling import TokenSampler


def continue_by_hand(
    model: LanguageModel, prefix: str, n: int, pick: Callable[[Array], int]
) -> list[str]:
    """Return n tokens: the prefix warms up the state, then each token is the next input."""
    state = model.init_state()
    for token in model.encode(prefix):
        state, O = model.step(np.array([token]), state)
    drawn = []
    for _ in range(n):
        drawn.append(pick(O[0]))
        state, O = model.step(np.array([drawn[-1]]), state)
    return model.vocabulary.decode(drawn)


def likeliest(O: Array) -> int:
    return 1 + max(range(len(O) - 1), key=lambda i: (O[i + 1], -i))  # all but <unk>


@each_variant
def test_greedy_generation_is_step_by_step(variant: dict[str, Any]) -> None:
    model = language(ALPHABET, hidden_size=16, **variant)
    for p in model.params.values():  # every state its own likeliest token
        p *= 0 if p.ndim == 1 else 2
    for prefix in ("t", "the time"):
        expected = continue_by_hand(model, prefix, 30, likeliest)
        assert model.generate(prefix, 30, temperature=0) == prefix + "".join(expected)
        assert len(set(expected)) > 1, "no loop of a single letter: this compares something"


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"temperature": 2, "top_k": 5}, {"top_p": 0.6, "top_k": 9}],
    ids=spelled,
)
def test_sampled_generation_is_step_by_step(settings: dict[str, Any]) -> None:
    model = language(ALPHABET)
    sampler = TokenSampler(**settings, never=(0,), seed=11)
    expected = continue_by_hand(model, "the", 60, sampler.draw)
    assert model.generate("the", 60, seed=11, **settings) == "the" + "".join(expected)
    ids = model.generate_ids(model.encode("the"), 60, TokenSampler(**settings, never=(0,), seed=11))
    assert model.vocabulary.decode(list(ids)) == expected


def test_the_whole_prefix_counts() -> None:
    model = alphabet_in_a_circle(certainty=1e4)
    model.params["W_hh"][...] = 0
    assert model.generate("eeb", 4, temperature=0) == "eebcdea"
    lively = language(ALPHABET, hidden_size=16)
    texts = {lively.generate(f"{c}he", 40, temperature=0)[3:] for c in "tsw"}
    assert len(texts) > 1


def test_one_seed_gives_one_text() -> None:
    model = language(ALPHABET)
    assert model.generate("a", 50, seed=1) == model.generate("a", 50, seed=1)
    assert model.generate("a", 50, seed=1) != model.generate("a", 50, seed=2)
    assert model.generate("a", 50) != model.generate("a", 50)  # no seed: by chance once in 10⁴⁰


def test_top_k_1_is_greedy() -> None:
    model = language(ALPHABET, hidden_size=16)
    greedy = model.generate("the", 40, temperature=0)
    for seed in range(3):
        assert model.generate("the", 40, top_k=1, temperature=5, seed=seed) == greedy
    assert model.generate("the", 40, top_p=1e-9, seed=0) == greedy


def test_generation_uses_the_models_distribution() -> None:
    """From a state that does not change, 3,000 tokens are 3,000 draws from softmax(b_q)."""
    model = language("abcd")
    p = np.array([0, 0.1, 0.2, 0.3, 0.4])
    set_params(model, b_q=np.log(np.maximum(p, 1e-300)))
    text = model.generate("a", 3000, seed=0)[1:]
    tokens = model.vocabulary.tokens
    observed = np.array([text.count(token) for token in tokens[1:]])
    chi_squared = float((np.square(observed - 3000 * p[1:]) / (3000 * p[1:])).sum())
    assert chi_squared < 16.27  # 3 degrees of freedom: exceeded once in a thousand times


@pytest.mark.parametrize(
    "settings",
    [{"temperature": t, **more} for t in (0, 1, 50) for more in ({}, {"top_k": 1}, {"top_p": 0.3})],
    ids=spelled,
)
def test_unknown_and_reserved_tokens_are_never_generated(settings: dict[str, Any]) -> None:
    reserved = ["<bos>", "<eos>"]
    model = LanguageModel(
        Vocabulary(["a", "b"], reserved=reserved), Tokenizer("word"), dtype=np.float64
    )
    model.params["b_q"][:3] = 1e6  # nearly all there is, were it allowed
    words = model.generate("a", 40, seed=0, **settings).split()
    assert len(words) == 41
    assert set(words) <= {"a", "b"}


def test_words_are_joined_by_spaces() -> None:
    model = language(WELLS.split(), Tokenizer("word"))
    text = model.generate("The  time", 5, seed=0)
    assert text.startswith("The  time ")
    continuation = text.removeprefix("The  time ").split(" ")
    assert len(continuation) == 5
    assert set(continuation) <= set(WELLS.split())
    for blank in (" ", "\n"):  # one that is there already is enough
        expected = f"The  time{blank}" + " ".join(continuation)
        assert model.generate(f"The  time{blank}", 5, seed=0) == expected


def test_the_prefix_is_preprocessed_but_returned_as_given() -> None:
    model = language(ALPHABET, Tokenizer(edition="book"))
    text = model.generate("The—TIME\n 42", 30, seed=4)
    assert text.startswith("The—TIME\n 42")
    assert text.removeprefix("The—TIME\n 42") == model.generate("the time ", 30, seed=4)[9:]
    assert text.removeprefix("The—TIME\n 42") != model.generate("the time", 30, seed=4)[8:]


@pytest.mark.parametrize("edition", ["raw", "book", "book-2017", "book-2019"])
def test_a_blank_at_the_end_of_the_prefix_counts(edition: str) -> None:
    """Also where the edition strips lines: what follows "the " is another word."""
    model = language(ALPHABET, Tokenizer(edition=edition))
    ids = Vocabulary.encode(model.vocabulary, "the ")
    assert_same_bits("ids", model.encode_prefix("the "), ids)
    sampler = TokenSampler(never=(0,), seed=4)
    expected = "".join(model.vocabulary.decode(list(model.generate_ids(ids, 30, sampler))))
    assert model.generate("the ", 30, seed=4) == "the " + expected


def test_characters_outside_the_vocabulary_are_named_in_a_warning() -> None:
    model = language()
    message = "not in the vocabulary, read as <unk>: '!', '?', 'Ä'"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as caught:
        text = model.generate("a?Ä!?b", 20, seed=0)
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning is the caller's"
    sampler = TokenSampler(never=(0,), seed=0)
    b, a = model.vocabulary["b"], model.vocabulary["a"]
    ids = list(model.generate_ids(np.array([a, 0, 0, 0, 0, b]), 20, sampler))
    assert text == "a?Ä!?b" + "".join(model.vocabulary.decode(ids))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate("abcde", 1, seed=0)


def test_nothing_to_generate_is_the_prefix() -> None:
    assert language().generate("abc", 0) == "abc"
    for prefix in ("the time", "the time "):
        assert language(WELLS.split(), Tokenizer("word")).generate(prefix, 0) == prefix


@pytest.mark.parametrize(
    ("tokenizer", "prefix"),
    [(Tokenizer(), ""), (Tokenizer("word"), " … !"), (Tokenizer(edition="book-2017"), "1895")],
    ids=["characters", "words", "edition"],
)
def test_a_prefix_without_a_token_is_refused(tokenizer: Tokenizer, prefix: str) -> None:
    message = f"prefix {prefix!r} holds no token after preprocessing: expected at least one"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        language(tokenizer=tokenizer).generate(prefix, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": -1}, "n is -1: expected at least 0"),
        ({"n": 1, "temperature": -1}, "temperature is -1: expected a finite number, 0 or more"),
        ({"n": 1, "top_k": 0}, "top_k is 0: expected at least 1"),
        ({"n": 1, "top_p": 2}, "top_p is 2: expected a number in (0, 1]"),
    ],
    ids=["n", "temperature", "top_k", "top_p"],
)
def test_settings_of_a_generation_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        language().generate("a", **arguments)
