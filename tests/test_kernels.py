"""Every kernel under the emulator, races looked for, against the reference."""

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import CASES, EMPTY, PAST_A_TILE, SMALL, Case, Draw, draw, draw_off_kink
from kernel_setup import (
    KERNELS,
    NAMES,
    Array,
    assert_as_reference,
    each_activation,
    each_kernel,
    exact,
    results,
)
from numpy.typing import DTypeLike
from tolerance import CONCATENATION, KINK_MARGIN, assert_close, assert_same_bits

import gpurnn
from gpurnn import functional as F
from gpurnn.cuda import operations

ODD = next(case for case in SMALL if case.name == "odd")
PRIME = next(case for case in SMALL if case.name == "prime")

# The tiled kernels take a thread for each number: what is large takes them seconds.
QUICK = [
    pytest.param(
        kernel,
        case,
        marks=[] if kernel in ("resident", "gemm") or case in SMALL else pytest.mark.slow,
    )
    for kernel in KERNELS
    for case in CASES
]


@pytest.mark.parametrize(("kernel", "case"), QUICK, ids=str)
def test_float32(kernel: str, case: Case) -> None:
    assert_as_reference(case, draw(case, dtype=np.float32), kernel=kernel)


@pytest.mark.parametrize("case", SMALL, ids=str)
@each_kernel
def test_float64(kernel: str, case: Case) -> None:
    assert_as_reference(case, draw(case), kernel=kernel)


@pytest.mark.parametrize("case", PAST_A_TILE, ids=str)
def test_float64_past_a_tile(case: Case) -> None:
    assert_as_reference(case, draw(case), kernel="resident")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@each_kernel
def test_half_types_are_summed_as_float32(kernel: str, dtype: DTypeLike) -> None:
    """Each number is rounded to half once or twice on its way, and nothing in between."""
    for case in (ODD, PRIME):
        drawn = draw(case).astype(dtype)
        with gpurnn.emulated():
            found = results(drawn, kernel=kernel)
        truth = exact(drawn)
        u = float(ml_dtypes.finfo(dtype).eps) / 2
        for name, a in found.items():
            assert a.dtype == dtype
            error = np.abs(a.astype(np.float64) - truth[name]).max()
            # a state's rounding goes through W_hh and φ′ at every step, and fades
            limit = 4 * u * np.abs(truth[name]).max()
            assert error <= limit, f"{name}: {error:.3g} beyond {limit:.3g}"


@each_activation
@each_kernel
def test_activations(kernel: str, activation: str) -> None:
    margin = KINK_MARGIN[np.dtype(np.float32)]
    drawn = draw_off_kink(PRIME, margin, dtype=np.float32)
    assert_as_reference(PRIME, drawn, activation, kernel=kernel)


@pytest.mark.parametrize("of_output", [False, True], ids=["of-z", "of-h"])
@each_kernel
def test_an_activation_of_ones_own(kernel: str, of_output: bool) -> None:
    if of_output:
        own = gpurnn.Activation(
            lambda z: 2.0 * math.tanh(z), lambda h: 2.0 - h * h / 2.0, of_output=True
        )
    else:
        own = gpurnn.Activation(
            lambda z: 0.9 * math.tanh(z) + 0.1 * z,
            lambda z: 0.9 * (1.0 - math.tanh(z) ** 2) + 0.1,
        )
    assert_as_reference(PRIME, draw(PRIME, dtype=np.float32), own, kernel=kernel)


@pytest.mark.parametrize(
    "variant",
    [
        {"by_id": True},
        {"by_id": True, "h_0": False},
        {"by_id": True, "bias": False},
        {"h_0": False},
        {"bias": False},
    ],
    ids=lambda v: "-".join(f"{name}={value}" for name, value in v.items()),
)
@each_kernel
def test_ids_and_what_may_be_left_out(kernel: str, variant: dict[str, bool]) -> None:
    if kernel == "concatenated" and variant.get("by_id"):
        pytest.skip("this kernel takes floats")
    assert_as_reference(ODD, draw(ODD, dtype=np.float32), kernel=kernel, **variant)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@each_kernel
def test_truncated_gradients(kernel: str, dtype: DTypeLike) -> None:
    xi = np.array([2, 0, 1, 0.5, 1.5], dtype)
    assert_as_reference(ODD, draw(ODD, dtype=dtype), kernel=kernel, xi=xi)


def test_a_truncated_gradient_of_halves() -> None:
    drawn = draw(ODD).astype(np.float16)
    xi = np.array([1, 0, 1, 0.5, 1.5], np.float16)
    with gpurnn.emulated():
        found = results(drawn, kernel="resident", xi=xi)
    truth = exact(drawn, xi=xi)
    for name, a in found.items():
        assert_close(name, a, truth[name], length=ODD.length)


@pytest.mark.parametrize("case", EMPTY, ids=str)
@each_kernel
def test_no_step_or_no_row(kernel: str, case: Case) -> None:
    drawn = draw(case, dtype=np.float32)
    with gpurnn.emulated():
        found = results(drawn, kernel=kernel)
    for name, a in results(drawn).items():
        assert_same_bits(name, found[name], a)


@each_kernel
def test_each_schedule_gives_the_same_bits(kernel: str) -> None:
    drawn = draw(ODD, dtype=np.float32)
    with gpurnn.emulated():
        first = results(drawn, kernel=kernel)
    for seed in range(5):
        with gpurnn.emulated(seed=seed):
            again = results(drawn, kernel=kernel)
        for name in NAMES:
            assert_same_bits(f"{name}, seed {seed}", again[name], first[name])


@each_kernel
def test_a_row_does_not_depend_on_the_others(kernel: str) -> None:
    """Neither on what they hold, nor, but for those of gemm, on how many there are."""
    drawn = draw(PRIME, dtype=np.float32)
    X, h_0, *weights = drawn.arguments()
    assert h_0 is not None
    other_X, other_h_0 = X.copy(), h_0.copy()
    other_X[:, 1:], other_h_0[1:] = 100, np.nan
    with gpurnn.emulated():
        H, residuals = F.rnn_forward(X, h_0, *weights, kernel=kernel)
        dh_0 = F.rnn_backward(drawn.dH, residuals)[1]
        H_other, _ = F.rnn_forward(other_X, other_h_0, *weights, kernel=kernel)
        assert_same_bits("row 0 beside other rows", H_other[:, 0], H[:, 0])
        assert np.isfinite(dh_0).all()
        if kernel == "gemm":  # whose sums a library orders as it likes for each number of rows
            return
        states = _recurrence_alone(X[:, :1], h_0[:1], weights, kernel)
        assert_same_bits(
            "row 0 alone", states[:, 0], _recurrence_alone(X, h_0, weights, kernel)[:, 0]
        )


def _recurrence_alone(X: Array, h_0: Array, weights: list[Any], kernel: str) -> Array:
    """Run with the identity as input weights: then no GEMM's shape can make a difference."""
    _, W_hh, b_h = weights
    h = len(W_hh)
    Z = np.ascontiguousarray(
        X[..., :h] if X.shape[-1] >= h else np.pad(X, ((0, 0), (0, 0), (0, h - X.shape[-1])))
    )
    H, _ = F.rnn_forward(Z, h_0, np.eye(h, dtype=Z.dtype), W_hh, b_h, kernel=kernel)
    return H


# ---------------------------------------------------------------------------------------
# Statements of the chapter, on the kernels
# ---------------------------------------------------------------------------------------


@each_kernel
def test_a_later_input_changes_no_earlier_output(kernel: str) -> None:
    rng = np.random.default_rng(1)
    X = rng.standard_normal((3, 2, 4), np.float32)
    W_xh, W_hh, W_hq = (rng.standard_normal(s, np.float32) for s in ((4, 5), (5, 5), (5, 3)))
    changed = X.copy()
    changed[1] += 1
    with gpurnn.emulated():
        O, O_changed = (
            F.linear(F.rnn_forward(x, None, W_xh, W_hh, None, kernel=kernel)[0], W_hq)
            for x in (X, changed)
        )
    assert_same_bits("O_1", O_changed[0], O[0])
    assert (O_changed[1] != O[1]).all() and (O_changed[2] != O[2]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_concatenation_is_the_sum_of_two_products(dtype: DTypeLike) -> None:
    """The chapter's shapes, (3, 1)(1, 4) + (3, 4)(4, 4) against (3, 5)(5, 4)."""
    rng = np.random.default_rng(2)
    X, W_xh, H, W_hh = (
        rng.standard_normal(shape).astype(dtype) for shape in ((3, 1), (1, 4), (3, 4), (4, 4))
    )
    with gpurnn.emulated():
        split, concatenated = (
            F.rnn_forward(X[None], H, W_xh, W_hh, None, activation="identity", kernel=kernel)[0][0]
            for kernel in ("step", "concatenated")
        )
    whole = np.concatenate((X, H), 1) @ np.concatenate((W_xh, W_hh), 0)
    for found in (split, concatenated):
        assert np.abs(found - whole).max() <= CONCATENATION[np.dtype(dtype)]


@each_kernel
def test_the_2019_chapter_s_cell(kernel: str) -> None:
    """relu without a bias, and relu on the outputs: net(X, H) with (2, 3), (3, 5), …"""
    rng = np.random.default_rng(3)
    X, H = rng.standard_normal((3, 4), np.float32), rng.standard_normal((3, 5), np.float32)
    W_xh, W_hh, W_hq = (rng.standard_normal(s, np.float32) for s in ((4, 5), (5, 5), (5, 2)))
    with gpurnn.emulated():
        H_1, _ = F.rnn_forward(X[None], H, W_xh, W_hh, None, activation="relu", kernel=kernel)
        O, _ = F.hidden_layer(H_1[0], W_hq, None, activation="relu")
    assert O.shape == (3, 2) and H_1[0].shape == (3, 5)
    assert (O >= 0).all() and (H_1 >= 0).all()
    expected = np.maximum(X.astype(float) @ W_xh + H.astype(float) @ W_hh, 0)
    assert_close("H", H_1[0], expected, length=9)
    assert_close("O", O, np.maximum(expected @ W_hq, 0), length=14)


# ---------------------------------------------------------------------------------------
# Layers without a state
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@each_activation
def test_a_hidden_layer(activation: str, dtype: DTypeLike) -> None:
    drawn = draw_off_kink(ODD, KINK_MARGIN[np.dtype(np.float32)], dtype=dtype, h_0=False)

    def run(a: Any) -> list[Array]:
        H, residuals = F.hidden_layer(a.X, a.W_xh, a.b_h, activation=activation)
        return [H, *F.hidden_layer_backward(a.dH, residuals)]

    with gpurnn.emulated():
        found = run(drawn)
    truth = run(drawn.astype(np.float64))
    baseline = run(drawn) if dtype == np.float32 else [None] * 4
    for name, a, b, c in zip(("H", "dX", "dW_xh", "db_h"), found, truth, baseline, strict=True):
        assert_close(name, a, b, length=ODD.length, baseline=c)


def test_an_output_layer() -> None:
    drawn = draw(ODD, dtype=np.float32)

    def run(a: Any) -> list[Array]:
        O = F.linear(a.X, a.W_xh, a.b_h)
        return [O, *F.linear_backward(a.dH, a.X, a.W_xh)]

    with gpurnn.emulated():
        found = run(drawn)
    names = ("O", "dX", "dW_xh", "db_h")
    for name, a, b, c in zip(names, found, run(drawn.astype(np.float64)), run(drawn), strict=True):
        assert_close(name, a, b, length=ODD.length, baseline=c)


def test_the_layers_of_an_rnn() -> None:
    rnn = gpurnn.RNN(3, 5, num_layers=2, seed=1)
    X = np.random.default_rng(0).standard_normal((4, 2, 3), np.float32)
    H, h_T = rnn(X)
    with gpurnn.emulated():
        found, final = rnn(X)
        dX, dh_0, grads = rnn.backward(np.ones_like(H), rnn.forward(X)[2])
    assert_close("H", found, H.astype(float), length=200)
    assert_close("h_T", final, h_T.astype(float), length=200)
    expected = rnn.backward(np.ones_like(H), rnn.forward(X)[2])
    assert dX is not None and expected[0] is not None
    assert_close("dX", dX, expected[0].astype(float), length=200)
    assert_close("dh_0", dh_0, expected[1].astype(float), length=200)
    for name, grad in grads.items():
        assert_close(name, grad, expected[2][name].astype(float), length=200)


# ---------------------------------------------------------------------------------------
# What halves are rounded to, and when
# ---------------------------------------------------------------------------------------

HALVES = pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"]
)


def assert_rounded_once(name: str, found: Array, truth: Array) -> None:
    """Each number is the nearest of its type, but for what float32 lost before."""
    u = float(ml_dtypes.finfo(found.dtype).eps) / 2
    error = np.abs(found.astype(np.float64) - truth)
    limit = 1.02 * u * np.abs(truth) + 1e-5 * np.abs(truth).max()
    assert (error <= limit).all(), f"{name}: {(error - limit).max():.3g} too far off"


@HALVES
@each_kernel
def test_a_step_of_halves_rounds_once(kernel: str, dtype: DTypeLike) -> None:
    case = Case("", T=1, n=9, d=1, h=33)
    drawn = draw(case).astype(dtype)
    drawn.W_xh[:] = 0  # the input's product is a number of the type too, and rounded before
    with gpurnn.emulated():
        found = results(drawn, kernel=kernel)
    truth = exact(drawn)
    assert_rounded_once("H", found["H"], truth["H"])


@HALVES
def test_the_state_of_halves_is_the_one_that_is_stored(dtype: DTypeLike) -> None:
    """So a sequence gives the same whole and in chunks."""
    drawn = draw(PRIME).astype(dtype)
    X, h_0, *weights = drawn.arguments()
    with gpurnn.emulated():
        H, _ = F.rnn_forward(X, h_0, *weights, kernel="resident")
        first, _ = F.rnn_forward(X[:3], h_0, *weights, kernel="resident")
        last, _ = F.rnn_forward(X[3:], first[-1], *weights, kernel="resident")
    chunks = np.concatenate((first, last))
    assert_same_bits("H", chunks.view(np.uint16), H.view(np.uint16))


@HALVES
def test_gradients_of_halves_flow_back_unrounded(dtype: DTypeLike) -> None:
    """From the last step to h_0 through 40 others: one rounding at the end."""
    T, h = 40, 8
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((h, h)))[0].astype(dtype)
    zeros = np.zeros((T, 3, 1)).astype(dtype)
    dH = np.zeros((T, 3, h)).astype(dtype)
    dH[-1] = np.random.default_rng(1).standard_normal((3, h)).astype(dtype)
    with gpurnn.emulated():
        _, residuals = F.rnn_forward(
            zeros, None, np.zeros((1, h)).astype(dtype), rotation, None, activation="identity"
        )
        dh_0 = F.rnn_backward(dH, residuals)[1]
    exact_rotation = rotation.astype(np.float64)
    truth = dH[-1].astype(np.float64) @ np.linalg.matrix_power(exact_rotation.T, T)
    assert_rounded_once("dh_0", dh_0, truth)


# ---------------------------------------------------------------------------------------
# Constants beyond those that are kept, sizes of 0
# ---------------------------------------------------------------------------------------


def test_constants_too_large_to_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "LARGEST_KEPT", 0)
    for variant in ({"by_id": True}, {"bias": False}):
        assert_as_reference(ODD, draw(ODD, dtype=np.float32), kernel="resident", **variant)


@pytest.mark.parametrize("shape", [(0, 4), (3, 4), (3, 0, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("d", [0, 4])
def test_layers_of_no_size(shape: tuple[int, ...], d: int) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((*shape[:-1], d), np.float32)
    W, b = rng.standard_normal((d, 5), np.float32), rng.standard_normal(5, np.float32)
    dH = rng.standard_normal((*shape[:-1], 5), np.float32)

    def run() -> list[Array]:
        H, residuals = F.hidden_layer(X, W, b)
        layer = F.hidden_layer_backward(dH, residuals)
        return [H, *layer, F.linear(X, W, b), *F.linear_backward(dH, X, W)]

    with gpurnn.emulated():
        found = run()
    for a, expected in zip(found, run(), strict=True):
        assert_close("layer", a, expected.astype(np.float64), length=20)


@each_kernel
def test_a_sequence_without_inputs(kernel: str) -> None:
    case = Case("", T=3, n=2, d=0, h=5)
    assert_as_reference(case, draw_without_inputs(case), kernel=kernel)


def draw_without_inputs(case: Case) -> Draw:
    one = draw(Case("", T=case.T, n=case.n, d=1, h=case.h), dtype=np.float32)
    return dataclasses.replace(one, X=one.X[..., :0].copy(), W_xh=one.W_xh[:0].copy())
