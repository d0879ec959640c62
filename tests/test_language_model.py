"""The language model: parameters, the chapter's examples, loss, gradients, dropout."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from gradcheck import check_gradients
from language_model_setup import (
    ALPHABET,
    WELLS,
    Array,
    each_dtype,
    each_variant,
    language,
    minus_log_softmax,
    set_params,
    some_ids,
    some_text,
    spelled,
)
from timemachine import require_time_machine
from tolerance import STANDARD_ERRORS, assert_close, assert_same_bits, standard_errors_off

from gpurnn import (
    LanguageModel,
    Tokenizer,
    Vocabulary,
)
from gpurnn.batches import Windows, shifted
from gpurnn.optimizers import AdamW

# Parameters: 9.4.2, "does not grow as the number of time steps increases"


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


# The chapter's examples


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


# Loss and gradients


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

    noise = 7, 3  # one mask throughout
    loss, gradients, _ = model.loss_and_gradients(X, Y, state, noise=noise)
    arguments = {name: p.copy() for name, p in model.params.items()}
    assert sorted(gradients) == sorted(arguments)

    def f(**a: Array) -> float:
        model.load_params(a)
        return float(model.loss_and_gradients(X, Y, state, noise=noise)[0])

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


# Dropout


def masks(dropout: float, steps: int, draws: int) -> Array:
    """Return what the inputs of the output layer are multiplied by, summed over steps: (draws, h).

    All states are 1 and all logits 0, so that dO is −⅔ at the target, ⅓ elsewhere, over the number
    of steps: column 1 of dW_hq holds a third of the mask.
    """
    model = language("ab", hidden_size=64, dropout=dropout)
    set_params(model, b_h=50)
    X = np.zeros((steps, 1), int)
    found = [
        3 * steps * model.loss_and_gradients(X, X, noise=(9, update))[1]["W_hq"][:, 1]
        for update in range(draws)
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
    _, dropped, state_dropped = model.loss_and_gradients(X, X, noise=(0, 0))
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
    loss, gradients, _ = with_dropout.loss_and_gradients(X, X)  # no noise, no mask
    loss_without, gradients_without, _ = without.loss_and_gradients(X, X)
    assert loss == loss_without
    for name, gradient in gradients.items():
        assert_same_bits(name, gradient, gradients_without[name])


def test_a_model_without_dropout_draws_no_mask() -> None:
    model = language()
    X = some_ids(model, (6, 2))
    assert model.loss_and_gradients(X, X, noise=(0, 0))[0] == model.loss_and_gradients(X, X)[0]


def test_the_mask_is_that_of_seed_and_update() -> None:
    model = language(dropout=0.5)
    X = some_ids(model, (6, 2))
    losses = [model.loss_and_gradients(X, X, noise=n)[0] for n in ((1, 2), (1, 2), (1, 3), (2, 2))]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
