"""The layers around the recurrence, cross-entropy, and the activations themselves."""

import math
from itertools import pairwise

import numpy as np
import pytest
from cases import DTYPES, Case, draw
from gradcheck import check_gradients
from reference_setup import (
    PHI,
    PRIME,
    Array,
    arguments_of_all,
    chunks,
    each_activation,
    each_case,
    each_dtype,
    one_hot,
)
from tolerance import (
    KINK_MARGIN,
    assert_close,
    assert_same_bits,
)

from gpurnn import functional as F

# The layers around the recurrence


each_leading_shape = pytest.mark.parametrize(
    "leading", [(), (1,), (5,), (3, 2), (2, 3, 2)], ids=lambda shape: f"leading{shape}"
)


each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


@each_leading_shape
@each_bias
@each_activation
def test_hidden_layer_gradients_equal_finite_differences(
    activation: str, bias: bool, leading: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(len(leading))
    while True:
        X, W_xh, b_h = (rng.standard_normal(s) for s in ((*leading, 4), (4, 3), (3,)))
        Z = np.einsum("...i,ij->...j", X, W_xh) + (b_h if bias else 0)
        if activation != "relu" or np.abs(Z).min() > KINK_MARGIN[np.dtype(np.float64)]:
            break
    H, residuals = F.hidden_layer(X, W_xh, b_h if bias else None, activation=activation)
    assert_close("H", H, np.vectorize(PHI[activation])(Z), length=5)
    dH = rng.standard_normal(H.shape)
    dX, dW_xh, db_h = F.hidden_layer_backward(dH, residuals)

    def loss(X: Array, W_xh: Array, b_h: Array | None = None) -> float:
        return float(np.vdot(F.hidden_layer(X, W_xh, b_h, activation=activation)[0], dH))

    arguments = {"X": X, "W_xh": W_xh}
    gradients: dict[str, Array | None] = {"X": dX, "W_xh": dW_xh}
    if bias:
        arguments["b_h"], gradients["b_h"] = b_h, db_h
    else:
        assert db_h is None
    check_gradients(loss, arguments, gradients)


@each_leading_shape
@each_bias
def test_linear_gradients_equal_finite_differences(leading: tuple[int, ...], bias: bool) -> None:
    rng = np.random.default_rng(len(leading))
    H, W_hq, b_q = (rng.standard_normal(s) for s in ((*leading, 4), (4, 3), (3,)))
    O = F.linear(H, W_hq, b_q if bias else None)
    expected = np.einsum("...i,ij->...j", H, W_hq) + (b_q if bias else 0)
    assert_close("O", O, expected, length=5)
    dO = rng.standard_normal(O.shape)
    dH, dW_hq, db_q = F.linear_backward(dO, H, W_hq)

    def loss(H: Array, W_hq: Array, b_q: Array | None = None) -> float:
        return float(np.vdot(F.linear(H, W_hq, b_q), dO))

    arguments = {"H": H, "W_hq": W_hq} | ({"b_q": b_q} if bias else {})
    gradients = {"H": dH, "W_hq": dW_hq} | ({"b_q": db_q} if bias else {})
    check_gradients(loss, arguments, gradients)


@each_leading_shape
def test_embedding_gathers_rows_and_its_gradient_equals_finite_differences(
    leading: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(len(leading))
    E = rng.standard_normal((7, 3))
    ids = np.array(rng.integers(0, 5, leading))  # rows 5 and 6 are never looked up
    X = F.embedding(ids, E)
    assert_same_bits("E[ids]", X, E[ids])
    dX = rng.standard_normal(X.shape)
    dE = F.embedding_backward(dX, ids, len(E))
    assert (dE[5:] == 0).all()
    check_gradients(lambda E: float(np.vdot(F.embedding(ids, E), dX)), {"E": E}, {"E": dE})


@each_dtype
@pytest.mark.parametrize("d", [1, 2, 3, 17])
def test_embedding_gradients_add_up_many_rows_of_one_id(d: int, dtype: type) -> None:
    rng = np.random.default_rng(d)
    dX = rng.standard_normal((300, d)).astype(dtype)
    ids = rng.integers(0, 4, 300)
    expected = [[math.fsum(column) for column in dX[ids == i].T] for i in range(4)]
    dE = F.embedding_backward(dX, ids, 4)
    assert_close("dE", dE, np.array(expected), length=300)
    # Sums of small integers are exact in any order: no row is lost, none is added twice.
    whole = np.rint(8 * dX)
    expected = [whole[ids == i].sum(axis=0) for i in range(4)]
    np.testing.assert_array_equal(F.embedding_backward(whole, ids, 4), expected)


@each_dtype
@each_activation
def test_an_identity_embedding_one_hot_rows_and_ids_are_the_same(
    activation: str, dtype: type
) -> None:
    drawn = draw(PRIME, dtype=dtype)
    ids, *rest = drawn.arguments(by_id=True)
    embedded = F.embedding(ids, np.eye(PRIME.d, dtype=dtype))
    assert_same_bits("I[ids]", embedded, one_hot(ids, PRIME.d, dtype))
    H, residuals = F.rnn_forward(embedded, *rest, activation=activation)
    H_ids, residuals_ids = F.rnn_forward(ids, *rest, activation=activation)
    assert np.array_equal(H, H_ids)

    # ids index the rows of P = E W_xh: by the chain rule ∂L/∂E = ∂L/∂P W_xhᵀ, and ∂L/∂P is what
    # the ids' dW_xh is while E = I.
    dX, _, dW_xh, _, _ = F.rnn_backward(drawn.dH, residuals)
    _, _, dW_xh_ids, _, _ = F.rnn_backward(drawn.dH, residuals_ids)
    truth = dW_xh_ids.astype(np.float64)
    assert_close("dW_xh", dW_xh, truth, length=PRIME.length)
    dE = F.embedding_backward(dX, ids, PRIME.d)
    assert_close(
        "dE", dE, truth @ drawn.W_xh.astype(np.float64).T, length=PRIME.length, dtype=dtype
    )


# Cross-entropy


def cross_entropy_by_hand(O: Array, targets: Array) -> tuple[float, Array]:
    """Mean negative log-likelihood and each row's own, number by number."""
    rows = O.reshape(-1, O.shape[-1])
    nll = [
        math.log(math.fsum(math.exp(o - row[i]) for o in row))
        for row, i in zip(rows, targets.ravel(), strict=True)
    ]
    return math.fsum(nll) / len(nll), np.reshape(nll, targets.shape)


@pytest.mark.parametrize("shape", [(5,), (1, 1), (1, 7), (6, 1), (4, 3, 5), (2, 2, 2, 3)], ids=str)
def test_cross_entropy_and_its_gradient_equal_hand_and_finite_differences(
    shape: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(shape)
    O, targets = 2 * rng.standard_normal(shape), np.array(rng.integers(0, shape[-1], shape[:-1]))
    loss, dO = F.cross_entropy(O, targets)
    expected, nll = cross_entropy_by_hand(O, targets)
    assert isinstance(loss, float)
    # Where q = 1 every loss is 0: rounding is that of the logits.
    largest = 1 + np.abs(O).max()
    assert_close("loss", loss + largest, np.array(expected + largest), length=O.size)
    assert_close(
        "nll", F.negative_log_likelihood(O, targets) + largest, nll + largest, length=shape[-1]
    )
    check_gradients(lambda O: F.cross_entropy(O, targets)[0], {"O": O}, {"O": dO})


@each_dtype
@each_case
def test_the_mean_negative_log_likelihood_is_the_loss(case: Case, dtype: type) -> None:
    a = arguments_of_all(draw(case, dtype=dtype))
    loss, _ = F.cross_entropy(a["dH"], a["targets"])
    nll = F.negative_log_likelihood(a["dH"], a["targets"])
    assert (nll.shape, nll.dtype) == (a["targets"].shape, dtype)
    assert (nll >= 0).all()
    truth = np.array(math.fsum(nll.ravel()) / nll.size)
    assert_close("loss", loss, truth, length=nll.size, dtype=np.float64)


def test_losses_are_added_in_float64() -> None:
    # A float32 sum that holds the 2²⁵ of row 0 loses every ½ that is added to it.
    O = np.zeros((4097, 2), np.float32)
    O[:, 1] = np.log(np.expm1(0.5))
    O[0, 1] = 2.0**25
    targets = np.zeros(len(O), int)
    loss, _ = F.cross_entropy(O, targets)
    nll = F.negative_log_likelihood(O, targets)
    truth = np.array(math.fsum(nll) / len(nll))
    assert_close("loss", loss, truth, length=len(O), dtype=np.float64)


@each_dtype
@pytest.mark.parametrize("q", [1, 2, 3, 28, 4580])
def test_uniform_logits_cost_log_q(q: int, dtype: type) -> None:
    for logit in (0.0, 1.0, -1e4, 1e4):
        O = np.full((3, q), logit, dtype)
        loss, dO = F.cross_entropy(O, np.array([0, q // 2, q - 1]))
        assert_close("loss", loss, np.array(math.log(q)), length=1, dtype=dtype)
        assert_close("p", 3 * dO[0, 1:], np.full(q - 1, 1 / q), length=1)


@each_dtype
def test_enormous_logits_stay_finite(dtype: type) -> None:
    O = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 1e4], [-1e4, -1e4, -1e4]], dtype)
    targets = np.array([1, 1, 2])
    loss, dO = F.cross_entropy(O, targets)
    nll = F.negative_log_likelihood(O, targets)
    assert_close("nll", nll, np.array([2e4, math.log(2), math.log(3)]), length=3)
    assert_close("loss", loss, np.array((2e4 + math.log(6)) / 3), length=3, dtype=dtype)
    expected = np.array([[1, -1, 0], [0, -1 / 2, 1 / 2], [1 / 3, 1 / 3, -2 / 3]]) / 3
    assert_close("dO", dO, expected, length=3)


def test_an_impossible_target_costs_infinity() -> None:
    loss, dO = F.cross_entropy(np.array([[-np.inf, 0.0, 0.0]]), np.array([0]))
    assert loss == np.inf
    np.testing.assert_array_equal(dO, [[-1, 0.5, 0.5]])


@each_dtype
@each_case
def test_rows_of_the_gradient_sum_to_zero(case: Case, dtype: type) -> None:
    a = arguments_of_all(draw(case, dtype=dtype))
    for scale in (1, 1e4):
        _, dO = F.cross_entropy((scale * a["dH"]).astype(dtype), a["targets"])
        largest = np.abs(dO).max(axis=-1).astype(np.float64)
        sums = dO.sum(axis=-1)
        # q terms of at most `largest`, so compare next to it rather than next to 0.
        assert_close("row sums", sums + largest, largest, length=case.h, dtype=dtype)


@each_dtype
def test_a_constant_added_to_the_output_bias_changes_nothing(dtype: type) -> None:
    # In multiples of 1/8 the output layer rounds nothing, so that the same bits must come out.
    drawn = draw(PRIME, dtype=dtype)
    H, W_hq, b_q = (np.rint(8 * a) / dtype(8) for a in (drawn.X, drawn.W_xh, drawn.b_h))
    targets = arguments_of_all(drawn)["targets"]
    loss, dO = F.cross_entropy(F.linear(H, W_hq, b_q), targets)
    assert np.abs(dO).max() > 0
    for constant in (1, -8, 64):
        moved_loss, moved_dO = F.cross_entropy(F.linear(H, W_hq, b_q + dtype(constant)), targets)
        assert moved_loss == loss
        assert_same_bits("dO", moved_dO, dO)


# The activations themselves


LIMITS = {  # φ(−1e4), φ(1e4), φ′(−1e4), φ′(1e4)
    "tanh": (-1, 1, 0, 0),
    "relu": (0, 1e4, 0, 1),
    "sigmoid": (0, 1, 0, 0),
    "softplus": (0, 1e4, 0, 1),
    "identity": (-1e4, 1e4, 1, 1),
}


@each_dtype
@each_activation
def test_saturation_reaches_the_limits(activation: str, dtype: type) -> None:
    below, above, slope_below, slope_above = LIMITS[activation]
    one, Z = np.ones((1, 1), dtype), np.array([[-1e4], [1e4]], dtype)
    H, residuals = F.hidden_layer(Z, one, None, activation=activation)
    dX, _, _ = F.hidden_layer_backward(np.ones_like(H), residuals)
    np.testing.assert_array_equal(H[:, 0], [below, above])
    np.testing.assert_array_equal(dX[:, 0], [slope_below, slope_above])

    # The same through the recurrence, which here only carries the input on.
    H, rnn_residuals = F.rnn_forward(Z[None], None, one, 0 * one, None, activation=activation)
    dX, dh_0, *_ = F.rnn_backward(np.ones_like(H), rnn_residuals)
    np.testing.assert_array_equal(H[0, :, 0], [below, above])
    np.testing.assert_array_equal(dX[0, :, 0], [slope_below, slope_above])
    assert np.isfinite(dh_0).all()


@each_dtype
@each_activation
def test_activations_are_as_exact_as_their_dtype(activation: str, dtype: type) -> None:
    # Relative to each value, so that the tails of sigmoid and softplus count.
    Z = np.linspace(-80, 80, 3201).astype(dtype)[:, None]
    H, _ = F.hidden_layer(Z, np.ones((1, 1), dtype), None, activation=activation)
    expected = np.vectorize(PHI[activation], otypes=[float])(Z.astype(np.float64))
    zero = expected == 0
    assert (H[zero] == 0).all()
    ratio = H[~zero].astype(np.float64) / expected[~zero]
    assert_close("φ(z) / expected", ratio, np.ones_like(ratio), length=4, dtype=dtype)


@each_activation
def test_derivatives_never_leave_their_range(activation: str) -> None:
    largest = {"sigmoid": 0.25}.get(activation, 1)
    for dtype in DTYPES:
        Z = np.concatenate([-np.geomspace(1e-30, 1e30, 400), np.geomspace(1e-30, 1e30, 400)])
        H, residuals = F.hidden_layer(
            Z.astype(dtype)[:, None], np.ones((1, 1), dtype), None, activation=activation
        )
        slope, _, _ = F.hidden_layer_backward(np.ones_like(H), residuals)
        assert (slope >= 0).all() and (slope <= largest).all()


def test_relu_has_no_gradient_at_and_below_zero() -> None:
    Z = np.array([[-1.0], [-0.0], [0.0], [1.0]])
    H, residuals = F.hidden_layer(Z, np.ones((1, 1)), None, activation="relu")
    slope, _, _ = F.hidden_layer_backward(np.ones_like(H), residuals)
    np.testing.assert_array_equal(slope[:, 0], [0, 0, 0, 1])


def test_chunks_cover_every_step_once() -> None:
    for T in (1, 5, 6):
        for size in (1, 2, 3, 7):
            cuts = list(chunks(T, size))
            assert (cuts[0].start, cuts[-1].stop) == (0, T)
            assert all(a.stop == b.start for a, b in pairwise(cuts))
