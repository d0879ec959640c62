"""Backpropagation through time: chunks, xi, and sequences without steps or rows."""

import numpy as np
import pytest
from cases import EMPTY, Case, Draw, draw
from reference_setup import (
    PRIME,
    Array,
    arguments_of_all,
    chunks,
    each_activation,
    each_case,
    each_dtype,
    each_input,
    each_variant,
    run_embedding,
    run_hidden_layer,
    run_linear,
)
from tolerance import (
    STANDARD_ERRORS,
    assert_close,
    assert_same_bits,
    standard_errors_off,
)

from gpurnn import functional as F

# Backpropagation through time: chunks and xi


NAMES = ("dX", "dh_0", "dW_xh", "dW_hh", "db_h")


def backward_by_chunks(
    drawn: Draw, activation: str, size: int, xi: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """Run forward in chunks, the state carried; then backward, chunk by chunk, without ``xi``.

    What a chunk that starts at step t hands to the state before it is scaled by ``xi[t]`` here.
    """
    X, state, *parameters = drawn.arguments()
    residuals = []
    cuts = list(chunks(len(X), size))
    for chunk in cuts:
        H, r = F.rnn_forward(X[chunk], state, *parameters, activation=activation)
        residuals.append(r)
        state = H[-1]
    dh = np.zeros_like(drawn.h_0)
    dX, sums = np.full_like(X, np.nan), [np.zeros_like(a) for a in parameters]
    for chunk, r in zip(reversed(cuts), reversed(residuals), strict=True):
        dH = drawn.dH[chunk].copy()
        dH[-1] += dh
        dX[chunk], dh, *gradients = F.rnn_backward(dH, r)
        dh *= xi[chunk.start]
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
    return dX, dh, *sums


@each_activation
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_chained_chunks_give_the_whole_gradient(activation: str, size: int) -> None:
    drawn = draw(PRIME)
    _, residuals = F.rnn_forward(*drawn.arguments(), activation=activation)
    whole = F.rnn_backward(drawn.dH, residuals)
    parts = backward_by_chunks(drawn, activation, size, np.ones(PRIME.T))
    for name, a, b in zip(NAMES, parts, whole, strict=True):
        assert_close(name, a, b, length=PRIME.length)


@each_activation
def test_xi_scales_what_flows_from_its_step_to_the_state_before(activation: str) -> None:
    drawn = draw(PRIME)
    _, residuals = F.rnn_forward(*drawn.arguments(), activation=activation)
    xi = np.random.default_rng(7).uniform(-2, 2, PRIME.T)
    scaled = F.rnn_backward(drawn.dH, residuals, xi=xi)
    steps = backward_by_chunks(drawn, activation, 1, xi)
    for name, a, b in zip(NAMES, scaled, steps, strict=True):
        assert_close(name, a, b, length=PRIME.length)


@each_activation
@pytest.mark.parametrize("tau", [1, 2, 3, 6, 7])
def test_zeros_in_xi_truncate_like_detached_chunks(activation: str, tau: int) -> None:
    drawn = draw(PRIME)
    _, residuals = F.rnn_forward(*drawn.arguments(), activation=activation)
    xi = np.ones(PRIME.T)
    xi[tau::tau] = 0  # between steps τ − 1 and τ, 2τ − 1 and 2τ, …
    truncated = F.rnn_backward(drawn.dH, residuals, xi=xi)
    detached = backward_by_chunks(drawn, activation, tau, xi)
    for name, a, b in zip(NAMES, truncated, detached, strict=True):
        assert_close(name, a, b, length=PRIME.length)

    full = F.rnn_backward(drawn.dH, residuals)
    changed = any((a != b).any() for a, b in zip(truncated, full, strict=True))
    assert changed == (tau < PRIME.T)  # τ = T is the full gradient


@each_dtype
@each_input
@each_case
def test_ones_in_xi_are_the_full_gradient_to_the_bit(case: Case, by_id: bool, dtype: type) -> None:
    drawn = draw(case, dtype=dtype)
    _, residuals = F.rnn_forward(*drawn.arguments(by_id=by_id))
    full = F.rnn_backward(drawn.dH, residuals)
    with_ones = F.rnn_backward(drawn.dH, residuals, xi=np.ones(case.T, dtype))
    for name, a, b in zip(NAMES, with_ones, full, strict=True):
        if by_id and name == "dX":
            assert a is None and b is None
        else:
            assert_same_bits(name, a, b)


def test_the_first_factor_touches_only_the_initial_state() -> None:
    drawn = draw(PRIME)
    _, residuals = F.rnn_forward(*drawn.arguments())
    xi = np.ones(PRIME.T)
    xi[0] = 0
    dX, dh_0, *gradients = F.rnn_backward(drawn.dH, residuals, xi=xi)
    full_dX, full_dh_0, *full_gradients = F.rnn_backward(drawn.dH, residuals)
    assert (dh_0 == 0).all() and (full_dh_0 != 0).any()
    for a, b in zip((dX, *gradients), (full_dX, *full_gradients), strict=True):
        assert_same_bits("gradient", a, b)


def test_randomized_truncation_is_unbiased() -> None:
    """The mean over Bernoulli(π)/π is the full gradient; without 1/π it is not (9.7.1.3)."""
    case = Case("six-steps", T=6, n=2, d=3, h=4)
    pi, draws = 0.7, 4000
    drawn = draw(case)
    _, residuals = F.rnn_forward(*drawn.arguments())

    def flat(gradients: tuple[Array | None, ...]) -> Array:
        return np.concatenate([g.ravel() for g in gradients if g is not None])

    full = flat(F.rnn_backward(drawn.dH, residuals))
    kept = np.random.default_rng(97).random((draws, case.T)) < pi
    reweighted = np.array([flat(F.rnn_backward(drawn.dH, residuals, xi=k / pi)) for k in kept])
    plain = np.array([flat(F.rnn_backward(drawn.dH, residuals, xi=k * 1.0)) for k in kept])
    assert standard_errors_off(reweighted, full) < STANDARD_ERRORS
    assert standard_errors_off(plain, full) > 2 * STANDARD_ERRORS


# No steps, no rows


@each_dtype
@each_variant
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_no_step_or_no_row_gives_empty_states_and_zero_gradients(
    case: Case, variant: dict[str, bool], dtype: type
) -> None:
    drawn = draw(case, dtype=dtype)
    H, residuals = F.rnn_forward(*drawn.arguments(**variant))
    assert (H.shape, H.dtype) == ((case.T, case.n, case.h), dtype)
    dX, dh_0, dW_xh, dW_hh, db_h = F.rnn_backward(drawn.dH, residuals)
    if variant["by_id"]:
        assert dX is None
    else:
        assert_same_bits("dX", dX, np.zeros_like(drawn.X))
    assert_same_bits("dh_0", dh_0, np.zeros_like(drawn.h_0))
    assert_same_bits("dW_xh", dW_xh, np.zeros_like(drawn.W_xh))
    assert_same_bits("dW_hh", dW_hh, np.zeros_like(drawn.W_hh))
    if variant["bias"]:
        assert_same_bits("db_h", db_h, np.zeros_like(drawn.b_h))
    else:
        assert db_h is None


@each_dtype
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_layers_without_rows_give_empty_outputs_and_zero_gradients(case: Case, dtype: type) -> None:
    arguments = arguments_of_all(draw(case, dtype=dtype))
    layer = run_hidden_layer(arguments, "tanh")
    outputs = run_linear(arguments, "")
    looked_up = run_embedding(arguments, "")
    for name, result, like in (
        ("H", layer["H"], "dH"),
        ("dX", layer["dX"], "X"),
        ("dW_xh", layer["dW_xh"], "W_xh"),
        ("db_h", layer["db_h"], "b_h"),
        ("O", outputs["O"], "dH"),
        ("linear's dX", outputs["dX"], "X"),
        ("linear's dW", outputs["dW"], "W_xh"),
        ("linear's db", outputs["db"], "b_h"),
        ("E[ids]", looked_up["X"], "dH"),
        ("dE", looked_up["dE"], "W_xh"),
    ):
        assert_same_bits(name, result, np.zeros_like(arguments[like]))
