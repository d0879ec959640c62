"""``LanguageModel``: the chapter's examples, gradients, evaluation, generation, and its file."""

import dataclasses
import math
import random
import re
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradcheck import check_gradients
from numpy.typing import NDArray
from timemachine import require_time_machine
from tolerance import STANDARD_ERRORS, assert_close, assert_same_bits, standard_errors_off

import gpurnn
from gpurnn import (
    CheckpointError,
    Evaluation,
    LanguageModel,
    Tokenizer,
    Vocabulary,
    checkpoint,
    language_model,
)
from gpurnn.batches import Windows, shifted
from gpurnn.optimizers import AdamW
from gpurnn.sampling import TokenSampler
from gpurnn.validate import NonFiniteError

Array = NDArray[Any]

ALPHABET = "abcdefghijklmnopqrstuvwxyz "
WELLS = "the time machine by h. g. wells"

# What a model can be made of, as keyword arguments.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "embedding": {"embedding_size": 3},
    "two-layers": {"num_layers": 2},
    "relu": {"activation": "relu"},
    "dropout": {"dropout": 0.4},
    "everything": {"embedding_size": 3, "num_layers": 2, "dropout": 0.4, "activation": "sigmoid"},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def language(tokens: Any = "abcde", tokenizer: Tokenizer | None = None, **options: Any) -> Any:
    """Build a small float64 model whose logits differ enough to tell tokens apart."""
    settings = {"hidden_size": 6, "dtype": np.float64, "seed": 3, **options}
    model = LanguageModel(Vocabulary(tokens), tokenizer, **settings)
    for p in model.params.values():
        p *= 2
    return model


def some_ids(model: LanguageModel, shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, len(model.vocabulary), shape)


def some_text(length: int, alphabet: str = "abcde", seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=length))


def spelled(options: dict[str, Any]) -> str:
    """Name keyword arguments in a test's id."""
    return "-".join(f"{k}={v}" for k, v in options.items()) or "default"


def set_params(model: LanguageModel, **values: Any) -> None:
    """Set these parameters, and all others to zero."""
    assert set(values) <= set(model.params)
    for name, p in model.params.items():
        p[...] = values.get(name, 0)


def bits_of(model: LanguageModel) -> dict[str, bytes]:
    return {name: p.tobytes() for name, p in model.params.items()}


def minus_log_softmax(O: Array, target: int) -> float:
    """−log softmax(O)[target] of one row, with an exact sum."""
    largest = float(O.max())
    return math.log(math.fsum(math.exp(o - largest) for o in O)) + largest - float(O[target])


# ---------------------------------------------------------------------------------------
# Parameters: 9.4.2, "does not grow as the number of time steps increases"
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 32, 500])
def test_2876_parameters_whatever_the_number_of_steps(T: int) -> None:
    model = LanguageModel(Vocabulary(ALPHABET), hidden_size=32)
    assert len(model.vocabulary) == 28
    assert model.num_parameters() == 28 * 32 + 32 * 32 + 32 + 32 * 28 + 28 == 2876
    X, Y = some_ids(model, (T, 2)), some_ids(model, (T, 2), seed=1)
    _, gradients, _ = model.loss_and_gradients(X, Y)
    assert sum(g.size for g in gradients.values()) == 2876
    assert model.num_parameters() == sum(p.size for p in model.params.values()) == 2876


def test_parameters_have_the_chapters_names_and_shapes() -> None:
    q = 6

    def shapes(**options: Any) -> dict[str, tuple[int, ...]]:
        model = LanguageModel(Vocabulary("abcde"), hidden_size=4, **options)
        X = some_ids(model, (3, 2))
        _, gradients, _ = model.loss_and_gradients(X, X)
        found = {name: p.shape for name, p in model.params.items()}
        assert {name: g.shape for name, g in gradients.items()} == found
        assert model.num_parameters() == sum(map(math.prod, found.values()))
        return found

    one_hot = {"W_xh": (q, 4), "W_hh": (4, 4), "b_h": (4,), "W_hq": (4, q), "b_q": (q,)}
    assert shapes() == one_hot
    assert shapes(bias=False) == {k: v for k, v in one_hot.items() if not k.startswith("b_")}
    assert shapes(embedding_size=3) == {**one_hot, "W_xh": (3, 4), "E": (q, 3)}
    assert shapes(num_layers=2) == {
        **one_hot,
        "W_xh.1": (4, 4),
        "W_hh.1": (4, 4),
        "b_h.1": (4,),
    }


@each_dtype
@each_variant
def test_shapes_and_dtypes(variant: dict[str, Any], dtype: type) -> None:
    """9.4.5, exercise 1: the dimension of an output is the size of the vocabulary."""
    model = language(dtype=dtype, **variant)
    X, Y, q = some_ids(model, (7, 3)), some_ids(model, (7, 3), seed=1), len(model.vocabulary)
    zero = model.init_state(3)
    assert (zero.dtype, zero.any()) == (dtype, False)
    O, state = model.forward(X)
    assert (O.shape, O.dtype) == ((7, 3, q), dtype)
    assert (state.shape, state.dtype) == (zero.shape, dtype)
    nll, state_too = model.negative_log_likelihood(X, Y)
    assert (nll.shape, nll.dtype) == ((7, 3), dtype)
    assert_same_bits("state", state_too, state)
    next_state, O_t = model.step(X[0], zero)
    assert (next_state.shape, O_t.shape) == (zero.shape, (3, q))
    loss, gradients, state_too = model.loss_and_gradients(X, Y)
    assert loss == pytest.approx(float(nll.mean(dtype=np.float64)), rel=1e-6)
    assert all(g.dtype == dtype for g in gradients.values())
    assert_same_bits("state", state_too, state)


def test_parameters_change_in_place_and_cannot_be_replaced() -> None:
    model = language(embedding_size=3)
    X = some_ids(model, (4, 2))
    for name, p in model.params.items():
        before, _ = model.forward(X)
        with pytest.raises(TypeError, match="does not support item assignment"):
            model.params[name] = p.copy()
        p += 0.25
        assert (model.forward(X)[0] != before).any(), name


@pytest.mark.parametrize("init", ["uniform", "normal"])
def test_initialisation(init: Any) -> None:
    def weights(seed: Any) -> Mapping[str, Array]:
        vocabulary = Vocabulary(map(str, range(200)))
        return LanguageModel(
            vocabulary, hidden_size=50, embedding_size=30, init=init, seed=seed
        ).params

    first = weights(5)
    for seed in (5, np.random.default_rng(5)):
        for name, p in weights(seed).items():
            assert_same_bits(name, p, first[name])
    assert (weights(6)["E"] != first["E"]).all() and (weights(6)["W_hq"] != first["W_hq"]).all()
    # Rows of the embedding have the length of a one-hot vector.
    squares = np.square(first["E"], dtype=np.float64).sum(axis=1)
    assert standard_errors_off(squares, np.array(1.0)) < STANDARD_ERRORS
    W_hq, b_q = first["W_hq"], first["b_q"]
    if init == "uniform":
        for p in (W_hq, b_q):
            assert 0.9 < np.abs(p).max() * math.sqrt(50) <= 1
    else:
        assert not b_q.any()
        squares = np.square(W_hq.ravel(), dtype=np.float64)
        assert standard_errors_off(squares, np.array(1e-4)) < STANDARD_ERRORS


# ---------------------------------------------------------------------------------------
# The chapter's examples
# ---------------------------------------------------------------------------------------


def test_machine() -> None:
    """9.4.3: "machin" → "achine"; O_3 is determined by m, a and c, and its target is h."""
    model = language("machine")
    X, Y = (a[:, None] for a in shifted(model.encode("machine")))
    assert "".join(model.vocabulary.decode(X[:, 0])) == "machin"
    assert "".join(model.vocabulary.decode(Y[:, 0])) == "achine"
    assert model.vocabulary.tokens[Y[2, 0]] == "h"
    O, _ = model.forward(X)
    nll, _ = model.negative_log_likelihood(X, Y)
    expected = minus_log_softmax(O[2, 0], model.vocabulary["h"])
    assert_close("loss of step 3", nll[2, 0], np.array(expected), length=8)

    for s in range(6):
        for token in set(range(len(model.vocabulary))) - {int(X[s, 0])}:
            changed = X.copy()
            changed[s] = token
            differs = (model.forward(changed)[0][2] != O[2]).any()
            assert differs == (s < 3), f"character {s + 1} became {token}"


def test_the_time_machine_by_h_g_wells() -> None:
    """The 2019 edition's figure, word by word: each word predicts the next."""
    model = language(WELLS.split(), Tokenizer("word"))
    X, Y = shifted(model.encode("The Time Machine, by H. G. Wells"))
    tokens = model.vocabulary.tokens
    assert [(tokens[x], tokens[y]) for x, y in zip(X, Y, strict=True)] == [
        ("the", "time"),
        ("time", "machine"),
        ("machine", "by"),
        ("by", "h."),
        ("h.", "g."),
        ("g.", "wells"),
    ]
    assert tokens[Y[2]] == "by"
    O, _ = model.forward(X[:, None])
    for s in range(6):
        changed = X.copy()
        changed[s] = 0
        differs = (model.forward(changed[:, None])[0][2] != O[2]).any()
        assert differs == (s < 3)


def test_words_of_a_whole_book_can_be_learned() -> None:
    """|V| = 4,580 with ``<unk>``: the loss begins at log |V| and falls, on other windows too."""
    tokenizer = Tokenizer("word", "book")
    words = tokenizer.tokens(require_time_machine())
    model = LanguageModel(Vocabulary(words), tokenizer, hidden_size=32, init="normal")
    q = len(model.vocabulary)
    assert (len(words), q) == (32_775, 4_580)
    assert model.num_parameters() == q * 32 + 32 * 32 + 32 + 32 * q + q
    ids = model.vocabulary.encode(words)
    train, held_out = ids[:16_000], ids[16_000:18_000].reshape(4, 500).T
    X, Y = held_out[:-1], held_out[1:]

    def held_out_loss() -> float:
        return float(model.negative_log_likelihood(X, Y)[0].mean())

    assert held_out_loss() == pytest.approx(math.log(q), rel=1e-3)
    optimizer = AdamW(model.params)
    batches = Windows(train, T=16, n=32).epoch(np.random.default_rng(0))
    losses = []
    for X_batch, Y_batch in batches[:20]:
        loss, gradients, _ = model.loss_and_gradients(X_batch, Y_batch)
        optimizer.step(model.params, gradients, 0.03)
        losses.append(loss)
    assert losses[0] == pytest.approx(math.log(q), rel=1e-3)
    assert np.mean(losses[-5:]) < losses[0] - 1
    assert held_out_loss() < math.log(q) - 0.5


def test_one_state_update() -> None:
    """Golden numbers: H_t = tanh(X_t W_xh + H_{t−1} W_hh + b_h), O_t = H_t W_hq + b_q."""
    model = LanguageModel(Vocabulary("ab"), hidden_size=2, dtype=np.float64)
    assert model.vocabulary.tokens == ("<unk>", "a", "b")
    set_params(
        model,
        W_xh=[[9, 9], [0.5, -1], [1.5, 0.25]],
        W_hh=[[0.1, 0.2], [-0.3, 0.4]],
        b_h=[0.05, -0.1],
        W_hq=[[1, -1, 0.5], [2, 0, -0.25]],
        b_q=[0.1, 0, -0.2],
    )
    # Row 1 is an "a" after the state (½, −½), row 2 a "b" after none.
    H, O = model.step(np.array([1, 2]), np.array([[0.5, -0.5], [0, 0]]))
    by_hand = [
        [
            math.tanh(0.5 + 0.5 * 0.1 + -0.5 * -0.3 + 0.05),  # tanh 0.75
            math.tanh(-1 + 0.5 * 0.2 + -0.5 * 0.4 - 0.1),  # tanh −1.2
        ],
        [math.tanh(1.5 + 0.05), math.tanh(0.25 - 0.1)],
    ]
    golden_H = [
        [0.6351489523872873, -0.8336546070121552],
        [0.9137854901178277, 0.14888503362331798],
    ]
    golden_O = [
        [-0.9321602616370231, -0.6351489523872873, 0.32598812794668247],
        [1.3115555573644637, -0.9137854901178277, 0.21967148665308434],
    ]
    assert_close("by hand", by_hand, np.array(golden_H), length=4)
    assert_close("H", H, np.array(golden_H), length=4)
    assert_close("O", O, np.array(golden_O), length=8)


@each_dtype
@pytest.mark.parametrize("n", [1, 2, 5])
@each_variant
def test_steps_are_the_sequence_to_the_bit(variant: dict[str, Any], n: int, dtype: type) -> None:
    model = language(ALPHABET, hidden_size=37, dtype=dtype, **variant)
    X = some_ids(model, (40, n))
    O, final = model.forward(X)
    state = model.init_state(n)
    for t, X_t in enumerate(X):
        state, O_t = model.step(X_t, state)
        assert_same_bits(f"O at step {t}", O_t, O[t])
    assert_same_bits("state", state, final)
    _, half = model.forward(X[:13])
    O_rest, final_too = model.forward(X[13:], half)
    assert_same_bits("state in chunks", final_too, final)
    assert_same_bits("O in chunks", O_rest, O[13:])


@each_variant
def test_no_state_is_the_zero_state(variant: dict[str, Any]) -> None:
    model = language(**variant)
    X = some_ids(model, (4, 2))
    for a, b in zip(model.forward(X), model.forward(X, model.init_state(2)), strict=True):
        assert_same_bits("O or state", a, b)


@each_dtype
@pytest.mark.parametrize("num_layers", [1, 2])
def test_token_ids_are_an_embedding_that_is_the_identity(num_layers: int, dtype: type) -> None:
    """Ids pick rows of W_xh, which is what multiplying a one-hot vector by it comes to."""
    by_id = language(dtype=dtype, num_layers=num_layers)
    q = len(by_id.vocabulary)
    embedded = language(dtype=dtype, num_layers=num_layers, embedding_size=q)
    embedded.load_params({**by_id.params, "E": np.eye(q, dtype=dtype)})
    X, Y = some_ids(by_id, (7, 3)), some_ids(by_id, (7, 3), seed=1)
    one_hot = np.eye(q, dtype=dtype)[X]
    (O, state), (O_embedded, state_embedded) = by_id.forward(X), embedded.forward(X)
    H, state_one_hot = by_id.rnn(one_hot)
    assert np.array_equal(O_embedded, O)
    assert np.array_equal(state_embedded, state)
    assert np.array_equal(state_one_hot, state)
    assert np.array_equal(by_id.rnn(X)[0], H)
    loss, gradients, _ = by_id.loss_and_gradients(X, Y)
    loss_embedded, gradients_embedded, _ = embedded.loss_and_gradients(X, Y)
    assert loss_embedded == loss
    assert set(gradients_embedded) - set(gradients) == {"E"}
    for name, gradient in gradients.items():
        truth = gradient.astype(np.float64)
        assert_close(name, gradients_embedded[name], truth, length=100)


@each_variant
def test_permuting_the_batch_changes_nothing_but_the_order(variant: dict[str, Any]) -> None:
    model = language(**variant)
    X, Y = some_ids(model, (7, 5)), some_ids(model, (7, 5), seed=1)
    order = np.array([3, 0, 4, 2, 1])
    (O, state), (O_permuted, state_permuted) = model.forward(X), model.forward(X[:, order])
    assert_close("O", O_permuted, O[:, order], length=100)
    assert_close("state", state_permuted, state[..., order, :], length=100)
    loss, gradients, _ = model.loss_and_gradients(X, Y)
    loss_permuted, permuted, _ = model.loss_and_gradients(X[:, order], Y[:, order])
    assert loss_permuted == pytest.approx(loss, rel=1e-14)
    for name, gradient in gradients.items():
        assert_close(name, permuted[name], gradient, length=400)


@each_variant
def test_permuting_time_changes_the_outputs(variant: dict[str, Any]) -> None:
    """The same pairs of tokens in another order are another text."""
    model = language(**variant)
    X, Y = some_ids(model, (7, 5)), some_ids(model, (7, 5), seed=1)
    order = np.array([3, 0, 6, 4, 2, 5, 1])
    O, O_permuted = model.forward(X)[0], model.forward(X[order])[0]
    assert np.abs(O_permuted - O[order]).max() > 0.01
    loss, loss_permuted = (
        model.loss_and_gradients(a, b)[0] for a, b in ((X, Y), (X[order], Y[order]))
    )
    assert abs(loss_permuted - loss) > 1e-4


# ---------------------------------------------------------------------------------------
# Loss and gradients
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_state", [False, True], ids=["no-state", "state"])
@each_variant
def test_every_gradient_equals_finite_differences(
    variant: dict[str, Any], with_state: bool
) -> None:
    model = language(**variant)
    X, Y = some_ids(model, (5, 2)), some_ids(model, (5, 2), seed=1)
    state = None
    if with_state:
        state = 0.5 * np.random.default_rng(2).standard_normal(model.init_state(2).shape)

    def mask_rng() -> np.random.Generator | None:
        return np.random.default_rng(7) if model.dropout else None  # one mask throughout

    loss, gradients, _ = model.loss_and_gradients(X, Y, state, rng=mask_rng())
    arguments = {name: p.copy() for name, p in model.params.items()}
    assert sorted(gradients) == sorted(arguments)

    def f(**a: Array) -> float:
        model.load_params(a)
        return float(model.loss_and_gradients(X, Y, state, rng=mask_rng())[0])

    assert loss == f(**arguments)
    check_gradients(f, arguments, gradients)


@pytest.mark.parametrize("variant", [{}, {"num_layers": 2, "embedding_size": 3}], ids=spelled)
def test_factors_of_zero_let_no_gradient_through_time(variant: dict[str, Any]) -> None:
    """ξ = 0 at every step leaves the mean of what each step contributes on its own."""
    model = language(**variant)
    X, Y = some_ids(model, (5, 2)), some_ids(model, (5, 2), seed=1)
    loss, cut, _ = model.loss_and_gradients(X, Y, xi=np.zeros(5))
    full_loss, full, _ = model.loss_and_gradients(X, Y)
    assert loss == full_loss
    state, sums = model.init_state(2), {name: np.zeros_like(p) for name, p in full.items()}
    for t in range(5):
        _, contributions, state = model.loss_and_gradients(X[t : t + 1], Y[t : t + 1], state)
        for name, contribution in contributions.items():
            sums[name] += contribution / 5
    for name, gradient in cut.items():
        assert_close(name, gradient, sums[name], length=100)
    assert np.abs(cut["W_hh"] - full["W_hh"]).max() > 1e-4
    _, ones, _ = model.loss_and_gradients(X, Y, xi=np.ones(5))
    for name, gradient in ones.items():
        assert_same_bits(name, gradient, full[name])


@pytest.mark.parametrize("constant", [1.0, -100.0, 1e4])
def test_a_constant_added_to_the_output_bias_changes_no_loss(constant: float) -> None:
    """9.4.5, exercise 1: |V| logits hold |V| − 1 numbers' worth of a distribution."""
    model = language()
    X, Y = some_ids(model, (7, 3)), some_ids(model, (7, 3), seed=1)
    for p in model.params.values():  # in multiples of 1/8 the shift itself rounds little
        np.rint(8 * p, out=p)
        p /= 8
    loss, gradients, _ = model.loss_and_gradients(X, Y)
    assert gradients["b_q"].sum() == pytest.approx(0, abs=1e-15)
    model.params["b_q"][...] += constant
    moved, moved_gradients, _ = model.loss_and_gradients(X, Y)
    # A logit of that size is that much coarser, and so is what comes of it.
    eps = float(np.finfo(np.float64).eps)
    assert moved == pytest.approx(loss, abs=8 * eps * (1 + abs(constant)))
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            moved_gradients[name], gradient, rtol=0, atol=8 * eps * (1 + abs(constant))
        )
    model.params["b_q"][0] += 1  # not a constant: this one is felt
    assert abs(model.loss_and_gradients(X, Y)[0] - moved) > 1e-3


# ---------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------


def masks(dropout: float, steps: int, draws: int) -> Array:
    """Return what the inputs of the output layer are multiplied by, summed over steps: (draws, h).

    All states are 1 and all logits 0, so that dO is −⅔ at the target, ⅓ elsewhere, over the number
    of steps: column 1 of dW_hq holds a third of the mask.
    """
    model = language("ab", hidden_size=64, dropout=dropout)
    set_params(model, b_h=50)
    rng = np.random.default_rng(9)
    X = np.zeros((steps, 1), int)
    found = [
        3 * steps * model.loss_and_gradients(X, X, rng=rng)[1]["W_hq"][:, 1] for _ in range(draws)
    ]
    return np.array(found)


@pytest.mark.parametrize("dropout", [0.1, 0.3, 0.75])
def test_dropout_zeroes_its_share_and_keeps_the_mean(dropout: float) -> None:
    found = masks(dropout, steps=1, draws=1000)
    kept = np.abs(found - 1 / (1 - dropout)) < 1e-12
    assert ((found == 0) | kept).all()
    assert standard_errors_off((~kept).astype(float), np.full(64, dropout)) < STANDARD_ERRORS
    assert standard_errors_off(found, np.ones(64)) < STANDARD_ERRORS
    # Without the factor 1/(1 − p) the mean would be off, and the test would see it.
    assert standard_errors_off(kept.astype(float), np.ones(64)) > 1.5 * STANDARD_ERRORS


def test_every_step_has_a_mask_of_its_own() -> None:
    once = np.abs(masks(0.5, steps=2, draws=1000) - 2) < 1e-12  # kept in one step, not in the other
    assert standard_errors_off(once.astype(float), np.full(64, 0.5)) < STANDARD_ERRORS


def test_dropout_does_not_reach_the_state() -> None:
    model = language(dropout=0.5, num_layers=2)
    X = some_ids(model, (6, 2))
    _, plain, state = model.loss_and_gradients(X, X)
    _, dropped, state_dropped = model.loss_and_gradients(X, X, rng=np.random.default_rng(0))
    assert_same_bits("state", state_dropped, state)
    assert all((dropped[name] != plain[name]).any() for name in plain)


def test_there_is_no_dropout_outside_training() -> None:
    with_dropout, without = language(dropout=0.5), language()
    X, text = some_ids(without, (6, 2)), some_text(50)
    for model in (with_dropout, without):
        assert model.evaluate(text) == without.evaluate(text)
        assert model.generate("ab", 30, seed=1) == without.generate("ab", 30, seed=1)
    for a, b in zip(with_dropout.forward(X), without.forward(X), strict=True):
        assert_same_bits("O or state", a, b)
    loss, gradients, _ = with_dropout.loss_and_gradients(X, X)  # no generator, no mask
    loss_without, gradients_without, _ = without.loss_and_gradients(X, X)
    assert loss == loss_without
    for name, gradient in gradients.items():
        assert_same_bits(name, gradient, gradients_without[name])


def test_a_model_without_dropout_draws_no_mask() -> None:
    model, rng = language(), np.random.default_rng(0)
    X = some_ids(model, (6, 2))
    assert model.loss_and_gradients(X, X, rng=rng)[0] == model.loss_and_gradients(X, X)[0]
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


# ---------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------


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

    def recorded(X: Array, state: Array | None = None) -> tuple[Array, Array]:
        held.append(len(X))
        return forward(X, state)

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


def alphabet_in_a_circle(certainty: float) -> LanguageModel:
    """Build a model that expects b after a, c after b, …, a after e."""
    model = language(hidden_size=6, activation="identity")
    after = np.zeros((6, 6))
    for token, following in zip("abcde", "bcdea", strict=True):
        after[model.vocabulary[token], model.vocabulary[following]] = certainty
    set_params(model, W_xh=np.eye(6), W_hq=after)
    return model


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

    losses, tokens = model.batch_losses(Windows(ids, T, n, shuffle=False))
    assert losses == pytest.approx(means, rel=1e-13)
    assert tokens == (20 * T, 20 * T, 12 * T)
    # Of batches of one size: by Jensen's inequality, and above it here, where batches differ.
    exact = math.exp(math.fsum(per_window[:40]) / 40)
    assert model.book_perplexity(text[: 40 + T], num_steps=T, batch_size=n) > exact * (1 + 1e-6)


def test_the_books_figure_needs_a_window() -> None:
    with pytest.raises(ValueError, match="ids"):
        language().book_perplexity("abcde", num_steps=5)
    assert language().book_perplexity("abcdea", num_steps=5) > 1


# ---------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------
# Files and parameters
# ---------------------------------------------------------------------------------------


@each_dtype
@each_variant
def test_a_file_brings_back_the_same_bits(
    variant: dict[str, Any], dtype: type, tmp_path: Path
) -> None:
    model = language(dtype=dtype, **variant)
    model.save(tmp_path / "model.safetensors")
    loaded = LanguageModel.load(tmp_path / "model.safetensors")
    assert loaded.config() == model.config()
    assert bits_of(loaded) == bits_of(model)
    assert loaded.vocabulary == model.vocabulary and loaded.tokenizer == model.tokenizer
    assert (loaded.dropout, loaded.about) == (model.dropout, {})
    X = some_ids(model, (6, 2))
    for a, b in zip(loaded.forward(X), model.forward(X), strict=True):
        assert_same_bits("O or state", a, b)
    rngs = [np.random.default_rng(1) for _ in range(2)]
    (loss, gradients, _), (loss_loaded, gradients_loaded, _) = (
        m.loss_and_gradients(X, X, rng=rng) for m, rng in zip((model, loaded), rngs, strict=True)
    )
    assert loss_loaded == loss
    for name, gradient in gradients.items():
        assert_same_bits(name, gradients_loaded[name], gradient)
    assert loaded.evaluate(some_text(30)) == model.evaluate(some_text(30))
    assert loaded.generate("ab", 20, seed=0) == model.generate("ab", 20, seed=0)
    for p in loaded.params.values():
        p += 1  # its own, and writable: training goes on from here
    assert bits_of(loaded) != bits_of(model)


def test_a_file_brings_back_tokenizer_reserved_tokens_and_origin(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["té", "a.", "a."], reserved=["<bos>"])
    model = LanguageModel(vocabulary, Tokenizer("word", "raw"), hidden_size=3)
    about = {"corpus": "none", "nested": {"epoch": 3, "losses": [1.5, None]}}
    model.save(tmp_path / "model", about=about)
    loaded = LanguageModel.load(tmp_path / "model")
    assert loaded.about == about
    assert loaded.tokenizer == Tokenizer("word", "raw")
    assert loaded.vocabulary.tokens == ("<unk>", "<bos>", "a.", "té")
    assert loaded.vocabulary.reserved_ids == (0, 1)


def test_other_parameters_can_be_saved_in_place_of_the_current_ones(tmp_path: Path) -> None:
    model, best = language(), {name: p + 1 for name, p in language().params.items()}
    before = bits_of(model)
    model.save(tmp_path / "model", params=best)
    assert bits_of(model) == before
    for name, p in LanguageModel.load(tmp_path / "model").params.items():
        assert_same_bits(name, p, best[name])


def test_sizes_that_are_numpy_integers_are_saved_like_others(tmp_path: Path) -> None:
    sizes = {"hidden_size": np.int64(4), "num_layers": np.int32(2), "embedding_size": np.int64(3)}
    model = language(**sizes)
    model.save(tmp_path / "model")
    assert LanguageModel.load(tmp_path / "model").config() == model.config()


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda arrays, config: arrays.pop("W_hh"), "parameters"),
        (lambda arrays, config: arrays.update(W_hh=np.zeros((6, 5))), "W_hh has shape (6, 5)"),
        (lambda arrays, config: arrays["b_q"].fill(np.nan), "b_q holds nan"),
        (lambda arrays, config: config.pop("tokens"), "tokens"),
        (lambda arrays, config: config.update(hidden_size=0), "hidden_size is 0"),
        (lambda arrays, config: config.update(colour="red"), "colour"),
        (lambda arrays, config: config.update(tokenizer={"unit": "char"}), "tokenizer"),
        (lambda arrays, config: config.update(tokens=["a"]), "<unk>"),
        (lambda arrays, config: config.update(dtype="float32"), "dtype float64"),
    ],
    ids=["names", "shape", "nan", "no-tokens", "size", "setting", "tokenizer", "tokens", "dtype"],
)
def test_a_file_that_holds_no_model_is_refused(
    break_it: Callable[[dict[str, Array], dict[str, Any]], Any], why: str, tmp_path: Path
) -> None:
    model = language()
    arrays = {name: p.copy() for name, p in model.params.items()}
    config = model.config()
    break_it(arrays, config)
    path = tmp_path / "model"
    checkpoint.write(path, checkpoint.Contents("model", arrays, {"model": config, "about": {}}))
    with pytest.raises(CheckpointError, match=re.escape(why)) as caught:
        LanguageModel.load(path)
    assert str(caught.value).startswith(f"{path} holds no usable model: ")


def test_parameters_are_copied_in() -> None:
    model, other = language(), language(seed=8)
    arrays = dict(model.params)
    source = {name: p.copy() for name, p in other.params.items()}
    model.load_params(source)
    assert bits_of(model) == bits_of(other)
    for p in source.values():
        p += 1
    assert bits_of(model) == bits_of(other)
    assert all(model.params[name] is p for name, p in arrays.items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: p.pop("b_q"), ValueError, "parameters ['W_hh', 'W_hq', 'W_xh', 'b_h']: expect"),
        (lambda p: p.update(E=np.zeros((6, 6))), ValueError, "parameters ['E', 'W_hh', 'W_hq', "),
        (
            lambda p: p.update(W_hq=p["W_hq"].T.copy()),
            ValueError,
            "W_hq has shape (7, 6): expected W_hq's shape = (6, 7)",
        ),
        (lambda p: p.update(b_q=p["b_q"][None]), ValueError, "b_q has shape (1, 7)"),
        (
            lambda p: p.update(b_q=p["b_q"].astype(np.float32)),
            TypeError,
            "b_q has dtype float32 but b_q has float64",
        ),
        (lambda p: p.update(b_q=p["b_q"].tolist()), TypeError, "b_q is a builtins.list"),
        (lambda p: p["b_q"].put(2, np.nan), NonFiniteError, "b_q holds nan at index (2,)"),
        (lambda p: p["W_xh"].put(8, -np.inf), NonFiniteError, "W_xh holds -inf at index (1, 2)"),
    ],
    ids=["missing", "extra", "transposed", "axes", "dtype", "list", "nan", "infinity"],
)
def test_parameters_that_do_not_fit_are_refused_and_leave_the_model_untouched(
    change: Callable[[dict[str, Any]], Any], error: type[Exception], message: str
) -> None:
    model = language("abcdef")
    before = bits_of(model)
    params = {name: p + 1 for name, p in model.params.items()}
    change(params)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        model.load_params(params)
    assert bits_of(model) == before


# ---------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size is 0: expected at least 1"),
        ({"num_layers": True}, TypeError, "num_layers is True: expected an integer"),
        ({"embedding_size": 0}, ValueError, "embedding_size is 0: expected at least 1"),
        ({"embedding_size": 1.5}, TypeError, "embedding_size is 1.5: expected an integer"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu': expected one of tanh"),
        ({"init": "xavier"}, ValueError, "init is 'xavier': expected one of uniform, normal"),
        ({"dtype": np.float16}, TypeError, "dtype is float16: expected float32 or float64"),
        (
            {"dtype": np.float16, "embedding_size": 3},
            TypeError,
            "dtype is float16: expected float32 or float64",
        ),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0: expected a probability in [0, 1)"),
        ({"dropout": -0.1}, ValueError, "dropout is -0.1: expected a probability in [0, 1)"),
        ({"dropout": math.nan}, ValueError, "dropout is nan: expected a probability in [0, 1)"),
        ({"dropout": True}, TypeError, "dropout is True: expected a probability in [0, 1)"),
        ({"seed": -1}, ValueError, "seed is -1: expected at least 0"),
        ({"vocabulary": "ab"}, TypeError, "vocabulary is 'ab': expected a gpurnn.Vocabulary"),
    ],
    ids=[
        "hidden_size",
        "num_layers",
        "embedding_size-0",
        "embedding_size-float",
        "activation",
        "init",
        "float16",
        "float16-embedding",
        "dropout-1",
        "dropout-negative",
        "dropout-nan",
        "dropout-bool",
        "seed",
        "vocabulary",
    ],
)
def test_options_are_refused(option: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        LanguageModel(**{"vocabulary": Vocabulary("ab"), **option})


@each_variant
def test_ids_and_states_are_refused(variant: dict[str, Any]) -> None:
    model = language(**variant)
    for bad in (-1, 6):
        X = np.array([[0, 1], [2, bad]])
        with pytest.raises(ValueError, match=re.escape(f"holds the id {bad} at index (1, 1)")):
            model.forward(X)
        with pytest.raises(ValueError, match=re.escape(f"holds the id {bad} at index (1, 1)")):
            model.loss_and_gradients(np.zeros((2, 2), int), X)
    X = some_ids(model, (3, 2))
    with pytest.raises(ValueError, match=re.escape("h_0 has shape")):
        model.forward(X, model.init_state(3))
    with pytest.raises(ValueError, match=re.escape("targets has shape (2, 2)")):
        model.loss_and_gradients(X, X[1:])
    with pytest.raises(TypeError, match="dtype float64: expected"):
        model.loss_and_gradients(X, X * 1.0)
