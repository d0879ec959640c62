"""How well a language model predicts a text."""

import dataclasses
import math
import random
import re
from itertools import pairwise
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
    minus_log_softmax,
    set_params,
    some_ids,
    some_text,
)
from tolerance import assert_close

import gpurnn
from gpurnn import (
    Evaluation,
    Tokenizer,
    language_model,
)
from gpurnn.batches import Windows
from gpurnn.validate import NonFiniteError


@each_variant
def test_evaluation_is_token_by_token(variant: dict[str, Any]) -> None:
    """Each token but the first, from all before it, the state carried from end to end."""
    model, text = language(**variant), some_text(40)
    ids = model.encode(text)
    state, nats = model.init_state(), []
    for token, target in pairwise(ids):
        state, O = model.step(np.array([token]), state)
        nats.append(minus_log_softmax(O[0], target))
    found = model.evaluate(text)
    assert_close("nats", found.nats, np.array(math.fsum(nats)), length=40 * 20)
    assert (found.tokens, found.characters, found.unknown) == (39, 39, 0)
    assert found.perplexity == pytest.approx(math.exp(found.nats / 39), rel=1e-14)
    assert model.perplexity(text) == found.perplexity
    assert model.bits_per_character(text) == found.bits_per_character
    assert found.bits_per_character == pytest.approx(math.log2(found.perplexity), rel=1e-14)
    assert model.evaluate_ids(ids) == dataclasses.replace(found, characters=None)


def test_ids_alone_do_not_tell_bits_per_character() -> None:
    found = language().evaluate_ids(np.array([1, 2, 3]))
    assert found.bits_per_token == pytest.approx(math.log2(found.perplexity), rel=1e-14)
    with pytest.raises(ValueError, match=r"^characters is None: evaluate a text, not ids"):
        _ = found.bits_per_character


@pytest.mark.parametrize("chunk", [1, 2, 7, 38, 39, 40, 10**6])
def test_chunks_of_the_evaluation_do_not_matter(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = language(num_layers=2), some_text(40)
    whole = model.evaluate(text)
    monkeypatch.setattr(language_model, "EVALUATION_CHUNK", chunk)
    found = model.evaluate(text)
    assert_close("nats", found.nats, np.array(whole.nats), length=40 * 20)
    assert (found.tokens, found.characters, found.unknown) == (39, 39, 0)


def test_evaluation_holds_no_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chunk = language(), language_model.EVALUATION_CHUNK
    ids = some_ids(model, (2 * chunk + 100,))
    held = []
    forward = model.forward

    def recorded(X: Array, state: Array | None = None, **options: Any) -> tuple[Array, Array]:
        held.append(len(X))
        return forward(X, state, **options)

    monkeypatch.setattr(model, "forward", recorded)
    found = model.evaluate_ids(ids)
    assert held == [chunk, chunk, 99]
    monkeypatch.undo()
    nll, _ = model.negative_log_likelihood(ids[:-1, None], ids[1:, None])
    assert_close("nats", found.nats, np.array(math.fsum(nll.ravel())), length=20 * len(ids))


def test_a_uniform_model_has_as_many_choices_as_tokens() -> None:
    model = language(ALPHABET)
    set_params(model)
    found = model.evaluate(some_text(1000, ALPHABET))
    assert found.perplexity == pytest.approx(28, rel=1e-13)
    assert found.bits_per_token == pytest.approx(math.log2(28), rel=1e-13)


def test_a_perfect_model_has_perplexity_1() -> None:
    model = alphabet_in_a_circle(certainty=1e4)
    found = model.evaluate("abcde" * 20)
    assert (found.nats, found.perplexity, found.bits_per_character) == (0, 1, 0)
    assert model.generate("c", 12, temperature=0) == "c" + "deabcdeabcde"


def test_an_impossible_token_makes_it_infinite_without_a_warning() -> None:
    model = alphabet_in_a_circle(certainty=1e300)
    assert model.perplexity("abcdeabd") == math.inf
    assert alphabet_in_a_circle(certainty=1e4).perplexity("ae" * 10) == math.inf  # e^10,000


def test_parameters_that_are_not_finite_are_named() -> None:
    model = language()
    model.params["W_hq"][2, 1] = np.nan
    with pytest.raises(NonFiniteError, match=re.escape("W_hq holds nan at index (2, 1)")):
        model.evaluate("abc")


def test_what_an_evaluation_says() -> None:
    found = Evaluation(nats=10 * math.log(2), tokens=5, characters=20, unknown=1)
    assert found.perplexity == pytest.approx(4, rel=1e-15)
    assert found.bits_per_token == pytest.approx(2, rel=1e-15)
    assert found.bits_per_character == pytest.approx(0.5, rel=1e-15)
    assert gpurnn.Evaluation is Evaluation


def test_words_and_characters_are_measured_on_one_scale() -> None:
    """Two perfect models of one source, one by words and one by characters.

    Words are "ab" or "cd", by the toss of a coin: one bit a word, which the first model finds in
    the word and the second in its first character. Per token they differ threefold; per character
    they are the same but for the first token, which neither predicts.
    """
    words = random.Random(1).choices(["ab", "cd"], k=400)
    text = " ".join(words)
    bits = len(words) - 1

    by_word = language(words, Tokenizer("word"))
    set_params(by_word, b_q=[-1e4, 0, 0])
    found = by_word.evaluate(text)
    assert (found.tokens, found.characters) == (399, len(text) - 2)
    assert found.nats / math.log(2) == pytest.approx(bits, rel=1e-13)
    assert found.bits_per_token == pytest.approx(1, rel=1e-13)

    by_character = language(text, hidden_size=6, activation="identity")
    after = np.full((6, 6), -1e4)
    for token, following in ("ab", "b ", "cd", "d ", " a", " c"):
        after[by_character.vocabulary[token], by_character.vocabulary[following]] = 0
    set_params(by_character, W_xh=np.eye(6), W_hq=after)
    found_too = by_character.evaluate(text)
    assert (found_too.tokens, found_too.characters) == (len(text) - 1, len(text) - 1)
    assert found_too.nats / math.log(2) == pytest.approx(bits, rel=1e-13)
    assert found_too.bits_per_token == pytest.approx(1 / 3, rel=0.01)

    assert found.bits_per_character == pytest.approx(bits / (len(text) - 2), rel=1e-13)
    assert found_too.bits_per_character == pytest.approx(bits / (len(text) - 1), rel=1e-13)


def test_texts_are_preprocessed_like_the_training_text() -> None:
    model = language(ALPHABET, Tokenizer(edition="book"))
    assert model.evaluate("The  Time-Machine, 1895") == model.evaluate("the time machine ")
    words = language(WELLS.split(), Tokenizer("word"))
    assert words.evaluate("The TIME … Machine!") == words.evaluate("the time machine")


def test_unknown_tokens_are_counted_where_they_are_predicted() -> None:
    model = language()
    assert model.evaluate("abcde").unknown == 0
    assert model.evaluate("?abc").unknown == 0  # the first token is given, not predicted
    assert model.evaluate("??ab!c?").unknown == 3
    ids = model.encode("?a?")
    assert ids.tolist() == [0, model.vocabulary["a"], 0]
    assert model.evaluate_ids(ids).unknown == 1


def test_an_unknown_token_is_as_long_as_the_text_it_stands_for() -> None:
    """Else bits per character would depend on how ``<unk>`` is spelled: five characters."""
    assert language().evaluate("a?b").characters == 2
    words = language(WELLS.split(), Tokenizer("word"))
    assert words.evaluate("the extraordinary time").characters == len(" extraordinary time")
    assert words.evaluate("the x time").characters == len(" x time")


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_without_a_token_to_predict_is_refused(text: str) -> None:
    message = f"text has {len(text)} tokens after preprocessing: evaluation needs at least 2"
    for measure in (language().evaluate, language().perplexity, language().bits_per_character):
        with pytest.raises(ValueError, match=f"^{message}$"):
            measure(text)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (np.zeros(0, int), ValueError, "ids has shape (0,): expected at least 2 tokens"),
        (np.zeros(1, int), ValueError, "ids has shape (1,): expected at least 2 tokens"),
        (np.zeros((3, 1), int), ValueError, "ids has shape (3, 1), 2 axes: expected (N,) ids"),
        (np.zeros(3), TypeError, "ids has dtype float64: expected integer token ids"),
        ([0, 1, 2], TypeError, "ids is a builtins.list: expected a numpy.ndarray"),
    ],
    ids=["none", "one", "axes", "floats", "list"],
)
def test_ids_that_are_no_text_are_refused(ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        language().evaluate_ids(ids)


def test_the_books_figure_is_a_mean_over_batches_of_windows() -> None:
    """exp of each batch's mean loss, and the mean of these: never below the windows' perplexity."""
    model, text, T, n = language(), some_text(60), 8, 20
    ids = model.encode(text)
    windows = [ids[start : start + T + 1] for start in range(60 - T)]  # 52: two batches and 12
    per_window = []
    for window in windows:
        state, nats = model.init_state(), []
        for token, target in pairwise(window):
            state, O = model.step(np.array([token]), state)
            nats.append(minus_log_softmax(O[0], target))
        per_window.append(math.fsum(nats) / T)
    batches = [per_window[i : i + n] for i in range(0, len(windows), n)]
    assert [len(batch) for batch in batches] == [20, 20, 12]
    means = [math.fsum(batch) / len(batch) for batch in batches]
    found = model.book_perplexity(text, num_steps=T, batch_size=n)
    assert found == pytest.approx(sum(map(math.exp, means)) / len(means), rel=1e-13)

    losses, tokens = model.batch_losses(
        Windows(ids, T, n, shuffle=False).epoch(np.random.default_rng(0))
    )
    assert losses == pytest.approx(means, rel=1e-13)
    assert tokens == (20 * T, 20 * T, 12 * T)
    # Of batches of one size: by Jensen's inequality, and above it here, where batches differ.
    exact = math.exp(math.fsum(per_window[:40]) / 40)
    assert model.book_perplexity(text[: 40 + T], num_steps=T, batch_size=n) > exact * (1 + 1e-6)


def test_the_books_figure_needs_a_window() -> None:
    with pytest.raises(ValueError, match="ids"):
        language().book_perplexity("abcde", num_steps=5)
    assert language().book_perplexity("abcdea", num_steps=5) > 1
