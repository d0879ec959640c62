"""The language model's own arithmetic by kernels, under the emulator, against NumPy."""

import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from group_setup import SMALL_CARD
from numpy.typing import NDArray

import gpurnn
from gpurnn import LanguageModel, Tokenizer, Vocabulary, loss
from gpurnn import functional as F

Array = NDArray[Any]

TEXT = "the time machine by h g wells "
CLOSE = 1e-10


@pytest.fixture
def emulated() -> Iterator[None]:
    with gpurnn.emulated(SMALL_CARD):
        yield


def model(**options: Any) -> LanguageModel:
    tokenizer = Tokenizer(unit=options.pop("unit", "char"))
    vocabulary = Vocabulary(tokenizer.tokens(TEXT))
    defaults = {"hidden_size": 5, "dtype": np.float64, "seed": 3}
    return LanguageModel(vocabulary, tokenizer, **(defaults | options))


MODELS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "an embedding": {"embedding_size": 3},
    "no bias": {"bias": False},
    "relu": {"activation": "relu"},
}
each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_logits_and_states(name: str) -> None:
    lm = model(**MODELS[name])
    rng = np.random.default_rng(0)
    X = rng.integers(len(lm.vocabulary), size=(4, 3))
    state = rng.standard_normal(lm.init_state(3).shape)
    expected_O, expected_after = lm.forward(X, state)
    with gpurnn.emulated(SMALL_CARD):
        O, after = lm.forward(X, state)
        _, O_0 = lm.step(X[0], state)
    np.testing.assert_allclose(O, expected_O, rtol=CLOSE, atol=CLOSE)
    np.testing.assert_allclose(after, expected_after, rtol=CLOSE, atol=CLOSE)
    np.testing.assert_allclose(O_0, expected_O[0], rtol=CLOSE, atol=CLOSE)


@each_model
def test_loss_and_gradients(name: str) -> None:
    lm = model(**MODELS[name])
    rng = np.random.default_rng(0)
    X, Y = (rng.integers(len(lm.vocabulary), size=(4, 3)) for _ in range(2))
    xi = np.array([1.0, 0.0, 2.0, 1.0])
    expected = lm.loss_and_gradients(X, Y, xi=xi)
    with gpurnn.emulated(SMALL_CARD):
        found = lm.loss_and_gradients(X, Y, xi=xi)
        out = {key: np.full_like(p, np.nan) for key, p in lm.params.items()}
        into = lm.loss_and_gradients(X, Y, xi=xi, out=out)
    assert found[0] == pytest.approx(expected[0], rel=CLOSE)
    assert found[1].keys() == expected[1].keys() == lm.params.keys()
    for key, g in expected[1].items():
        np.testing.assert_allclose(found[1][key], g, rtol=CLOSE, atol=CLOSE, err_msg=key)
        np.testing.assert_array_equal(out[key], found[1][key], err_msg=key)
        assert np.shares_memory(into[1][key], out[key])


@pytest.mark.parametrize("unit", ["char", "word"])
def test_evaluation_is_that_of_numpy(unit: str) -> None:
    lm = model(unit=unit)
    expected = lm.evaluate(TEXT)
    book = lm.book_perplexity(TEXT, num_steps=3, batch_size=4)
    with gpurnn.emulated(SMALL_CARD):
        found = lm.evaluate(TEXT)
        assert lm.book_perplexity(TEXT, num_steps=3, batch_size=4) == pytest.approx(book, rel=CLOSE)
    assert found.nats == pytest.approx(expected.nats, rel=CLOSE)
    assert (found.tokens, found.characters) == (expected.tokens, expected.characters)


def test_perplexities_that_are_known(emulated: None) -> None:
    """SPEC 31: perfect 1, impossible ∞, uniform |V|."""
    targets = np.array([2, 0, 3])
    perfect = np.full((3, 5), -1e4, np.float32)
    perfect[np.arange(3), targets] = 1e4
    assert loss.perplexity(F.negative_log_likelihood(perfect, targets)) == 1
    impossible = perfect.copy()
    impossible[1] = [-np.inf, 0, 0, 0, 0]
    assert loss.perplexity(F.negative_log_likelihood(impossible, targets)) == math.inf
    lm = model()
    for p in lm.params.values():
        p[...] = 0
    assert lm.perplexity(TEXT) == pytest.approx(len(lm.vocabulary), rel=1e-12)


def test_one_hot_vectors_an_identity_embedding_and_ids_are_one(emulated: None) -> None:
    """SPEC 18, and permuting the batch changes nothing but the order, permuting time does."""
    lm = model()
    q = len(lm.vocabulary)
    X = np.random.default_rng(1).integers(q, size=(3, 4))
    W_xh, W_hh, b_h = (lm.params[name] for name in ("W_xh", "W_hh", "b_h"))
    by_id, _ = F.rnn_forward(X, None, W_xh, W_hh, b_h)
    one_hot, _ = F.rnn_forward(np.eye(q)[X], None, W_xh, W_hh, b_h)
    embedded, _ = F.rnn_forward(F.embedding(X, np.eye(q)), None, W_xh, W_hh, b_h)
    np.testing.assert_allclose(by_id, one_hot, rtol=1e-12)
    np.testing.assert_allclose(by_id, embedded, rtol=1e-12)
    order = np.array([2, 0, 3, 1])
    permuted, _ = F.rnn_forward(X[:, order], None, W_xh, W_hh, b_h)
    np.testing.assert_array_equal(permuted, by_id[:, order])
    reversed_, _ = F.rnn_forward(X[::-1].copy(), None, W_xh, W_hh, b_h)
    assert not np.allclose(reversed_[-1], by_id[-1])


SMOOTHED = {"plain": {}, "smoothed": {"label_smoothing": 0.2}, "ignored": {"ignore_index": 1}}


@pytest.mark.parametrize("name", SMOOTHED)
@pytest.mark.parametrize("bias", [True, False])
def test_output_layer_and_loss_at_once(name: str, bias: bool) -> None:
    rng = np.random.default_rng(0)
    H, W_hq = rng.standard_normal((3, 2, 4)), rng.standard_normal((4, 6))
    b_q = rng.standard_normal(6) if bias else None
    targets = np.array([[0, 1], [5, 1], [2, 3]])
    O = F.linear(H, W_hq, b_q)
    expected_loss, dO = F.cross_entropy(O, targets, **SMOOTHED[name])
    expected = F.linear_backward(dO, H, W_hq)
    found = F.linear_cross_entropy(H, W_hq, b_q, targets, **SMOOTHED[name])
    assert found[0] == expected_loss
    for a, b in zip(found[1:], expected, strict=True):
        np.testing.assert_array_equal(a, b)
    with gpurnn.emulated():
        loss_, *gradients = F.linear_cross_entropy(H, W_hq, b_q, targets, **SMOOTHED[name])
    assert loss_ == pytest.approx(expected_loss, rel=1e-14)
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_targets_that_are_none_are_refused_alike() -> None:
    H, W_hq = np.ones((2, 3)), np.ones((3, 4))
    for targets in (np.array([0, 4]), np.zeros(0, int), np.zeros((2, 1), int), np.zeros(2)):
        messages = []
        for context in (nullcontext(), gpurnn.emulated()):
            with context, pytest.raises((TypeError, ValueError)) as caught:
                F.linear_cross_entropy(H, W_hq, None, targets)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_a_word_model_of_many_words(emulated: None) -> None:
    """SPEC 23's size of vocabulary: a gradient for each of 4,580 words, zero for those not met."""
    words = [f"w{i}" for i in range(4579)]
    lm = LanguageModel(Vocabulary(words), Tokenizer(unit="word"), hidden_size=3, seed=0)
    assert len(lm.vocabulary) == 4580
    X, Y = np.array([[5, 4579], [7, 0]]), np.array([[7, 0], [4579, 5]])
    mean, grads, _ = lm.loss_and_gradients(X, Y)
    assert mean == pytest.approx(math.log(4580), rel=0.05)
    met = np.flatnonzero(np.abs(grads["W_xh"]).sum(axis=1))
    assert met.tolist() == [0, 5, 7, 4579]
    assert abs(float(grads["b_q"].sum(dtype=np.float64))) < 1e-6  # rows of p − onehot sum to 0


def test_every_way_to_cut_a_sequence_adds_up_to_the_full_gradient(emulated: None) -> None:
    """SPEC 22: the mean of randomized truncation, over all of its draws."""
    lm, pi = model(), 0.5
    X, Y = np.array([[1, 2], [3, 4], [5, 6]]), np.array([[3, 4], [5, 6], [7, 1]])
    _, full, _ = lm.loss_and_gradients(X, Y)
    mean = {name: np.zeros_like(g) for name, g in full.items()}
    for cuts in itertools.product((0, 1), repeat=2):  # what flows from step 0 reaches no parameter
        _, grads, _ = lm.loss_and_gradients(X, Y, xi=np.array([1.0, *(c / pi for c in cuts)]))
        for name, g in grads.items():
            mean[name] += g / 4
    for name, g in full.items():
        np.testing.assert_allclose(mean[name], g, rtol=1e-11, atol=1e-14, err_msg=name)
    _, cut, _ = lm.loss_and_gradients(X, Y, xi=np.array([1.0, 0.0, 0.0]))
    assert np.abs(cut["W_hh"] - full["W_hh"]).max() > 1e-6
