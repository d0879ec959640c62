"""The NumPy reference, which kernels are held to, by evidence that needs no other library.

The forward pass is compared with the chapter's equation written out number by number, the backward
passes with finite differences; the rest are properties that follow from the equation.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from cases import ACTIVATIONS, CASES, DTYPES, EMPTY, SMALL, Case, Draw, draw, draw_off_kink
from gradcheck import check_gradients
from numpy.typing import DTypeLike, NDArray
from tolerance import (
    CONCATENATION,
    KINK_MARGIN,
    STANDARD_ERRORS,
    assert_close,
    assert_same_bits,
    standard_errors_off,
)

from gpurnn import activations, reference
from gpurnn import functional as F

Array = NDArray[Any]

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_small_case = pytest.mark.parametrize("case", SMALL, ids=str)
each_input = pytest.mark.parametrize("by_id", [False, True], ids=["floats", "ids"])
each_variant = pytest.mark.parametrize(
    "variant",
    [
        {"by_id": by_id, "h_0": h_0, "bias": bias}
        for by_id in (False, True)
        for h_0, bias in ((True, True), (True, False), (False, True), (False, False))
    ],
    ids=lambda v: "-".join(
        ("ids" if v["by_id"] else "floats", *(name for name in ("h_0", "bias") if v[name]))
    ),
)

PRIME = next(case for case in SMALL if case.name == "prime")
ODD = next(case for case in SMALL if case.name == "odd")


def draw_for(
    activation: str, case: Case, dtype: DTypeLike = np.float64, seed: int = 0, **variant: bool
) -> Draw:
    """Draw a case, away from relu's kink where that is the activation."""
    if activation == "relu":
        return draw_off_kink(case, KINK_MARGIN[np.dtype(dtype)], seed, dtype, **variant)
    return draw(case, seed, dtype)


def one_hot(ids: Array, d: int, dtype: DTypeLike) -> Array:
    return (ids[..., None] == np.arange(d)).astype(dtype)


# ---------------------------------------------------------------------------------------
# Every operation at once: what holds for all of them is tested for all of them.
# ---------------------------------------------------------------------------------------


def arguments_of_all(drawn: Draw) -> dict[str, Array]:
    """Name what the OPERATIONS take: the draw, targets in [0, h) and factors xi."""
    arrays = dict(vars(drawn))
    rng = np.random.default_rng(drawn.dH.shape)
    arrays["targets"] = rng.integers(0, len(drawn.W_hh), drawn.ids.shape)
    arrays["xi"] = rng.uniform(0.5, 1.5, len(drawn.dH)).astype(np.float32).astype(drawn.dH.dtype)
    return arrays


def run_rnn(X: str, a: dict[str, Array], activation: str) -> dict[str, Array | None]:
    H, residuals = F.rnn_forward(
        a[X], a["h_0"], a["W_xh"], a["W_hh"], a["b_h"], activation=activation
    )
    dX, dh_0, dW_xh, dW_hh, db_h = F.rnn_backward(a["dH"], residuals, xi=a["xi"])
    return {"H": H, "dX": dX, "dh_0": dh_0, "dW_xh": dW_xh, "dW_hh": dW_hh, "db_h": db_h}


def run_hidden_layer(a: dict[str, Array], activation: str) -> dict[str, Array | None]:
    H, residuals = F.hidden_layer(a["X"], a["W_xh"], a["b_h"], activation=activation)
    dX, dW_xh, db_h = F.hidden_layer_backward(a["dH"], residuals)
    return {"H": H, "dX": dX, "dW_xh": dW_xh, "db_h": db_h}


def run_linear(a: dict[str, Array], _: str) -> dict[str, Array | None]:
    O = F.linear(a["X"], a["W_xh"], a["b_h"])
    dX, dW, db = F.linear_backward(a["dH"], a["X"], a["W_xh"])
    return {"O": O, "dX": dX, "dW": dW, "db": db}


def run_embedding(a: dict[str, Array], _: str) -> dict[str, Array | None]:
    E = a["W_xh"]
    return {"X": F.embedding(a["ids"], E), "dE": F.embedding_backward(a["dH"], a["ids"], len(E))}


def run_cross_entropy(a: dict[str, Array], _: str) -> dict[str, Array | None]:
    loss, dO = F.cross_entropy(a["dH"], a["targets"])
    return {
        "loss": np.array(loss),
        "dO": dO,
        "nll": F.negative_log_likelihood(a["dH"], a["targets"]),
    }


OPERATIONS: dict[str, Callable[[dict[str, Array], str], dict[str, Array | None]]] = {
    "rnn-floats": lambda a, activation: run_rnn("X", a, activation),
    "rnn-ids": lambda a, activation: run_rnn("ids", a, activation),
    "hidden_layer": run_hidden_layer,
    "linear": run_linear,
    "embedding": run_embedding,
    "cross_entropy": run_cross_entropy,
}
TAKES_AN_ACTIVATION = ("rnn-floats", "rnn-ids", "hidden_layer")

each_operation = pytest.mark.parametrize("operation", OPERATIONS)
each_operation_and_activation = pytest.mark.parametrize(
    ("operation", "activation"),
    [
        (operation, activation)
        for operation in OPERATIONS
        for activation in (ACTIVATIONS if operation in TAKES_AN_ACTIVATION else ("tanh",))
    ],
)


def test_there_are_the_activations_that_are_tested_here() -> None:
    assert sorted(activations.ACTIVATIONS) == sorted(ACTIVATIONS)


@each_dtype
@each_case
@each_operation_and_activation
def test_results_have_the_dtype_of_the_arguments(
    operation: str, activation: str, case: Case, dtype: type
) -> None:
    results = OPERATIONS[operation](arguments_of_all(draw(case, dtype=dtype)), activation)
    for name, result in results.items():
        assert result is None or name == "loss" or result.dtype == dtype, name


@each_case
@each_operation_and_activation
def test_float32_is_within_rounding_of_float64(operation: str, activation: str, case: Case) -> None:
    by_id = operation == "rnn-ids"
    results, truths = [], []
    for seed in case.seeds:
        drawn = draw_for(activation, case, np.float32, seed, by_id=by_id)
        results.append(OPERATIONS[operation](arguments_of_all(drawn), activation))
        exact = drawn.astype(np.float64)
        truths.append(OPERATIONS[operation](arguments_of_all(exact), activation))
    for name in truths[0]:
        if truths[0][name] is None:
            assert all(result[name] is None for result in results), name
        else:
            assert_close(
                name,
                np.stack([result[name] for result in results]),
                np.stack([truth[name] for truth in truths]),
                length=case.length,
                dtype=np.float32,
            )


def spread_out(a: Array) -> Array:
    """Every second element, along every axis, of a larger array."""
    view = np.full([2 * size for size in a.shape], 7, a.dtype)[(slice(None, None, 2),) * a.ndim]
    view[...] = a
    return view


def backwards(a: Array) -> Array:
    """Negative strides along every axis."""
    flip = (slice(None, None, -1),) * a.ndim
    return np.ascontiguousarray(a[flip])[flip]


def read_only(a: Array) -> Array:
    a = a.copy()
    a.setflags(write=False)
    return a


def misaligned(a: Array) -> Array:
    """Start one byte past an address that the dtype may start at."""
    view = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


LAYOUTS = {
    "contiguous": np.array,
    "spread-out": spread_out,
    "fortran": lambda a: np.array(a, order="F"),
    "backwards": backwards,
    "read-only": read_only,
    "misaligned": misaligned,
}


def owned_bytes(a: Array) -> bytes:
    """All memory that ``a`` is a view of: its gaps too."""
    while isinstance(a.base, np.ndarray):
        a = a.base
    return a.tobytes()


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [ODD, PRIME], ids=str)
@each_operation
def test_layout_changes_no_bit_and_arguments_are_never_written(
    operation: str, case: Case, layout: str, dtype: type
) -> None:
    for activation in ACTIVATIONS:
        plain = arguments_of_all(draw(case, dtype=dtype))
        expected = OPERATIONS[operation](plain, activation)
        laid_out = {name: LAYOUTS[layout](a) for name, a in plain.items()}
        before = {name: owned_bytes(a) for name, a in laid_out.items()}
        results = OPERATIONS[operation](laid_out, activation)
        for name, result in results.items():
            if result is not None:
                assert_same_bits(f"{activation} {name}", result, expected[name])
                for argument, a in laid_out.items():
                    assert not np.shares_memory(result, a), f"{name} is a view of {argument}"
        for name, a in laid_out.items():
            assert owned_bytes(a) == before[name], f"{name} was written"


def test_the_layouts_are_what_they_say() -> None:
    a = draw(ODD).X
    laid_out = {name: layout(a) for name, layout in LAYOUTS.items()}
    for view in laid_out.values():
        np.testing.assert_array_equal(view, a)
    assert not laid_out["spread-out"].flags.forc
    assert laid_out["fortran"].flags.f_contiguous and not laid_out["fortran"].flags.c_contiguous
    assert max(laid_out["backwards"].strides) < 0
    assert not laid_out["read-only"].flags.writeable
    assert not laid_out["misaligned"].flags.aligned


class PoisonedNumPy:
    """NumPy, except that memory which nothing has written holds NaN."""

    def __init__(self) -> None:
        self.poisoned = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, *args: Any, **kwargs: Any) -> Array:
        return self._poison(np.empty(*args, **kwargs))

    def empty_like(self, *args: Any, **kwargs: Any) -> Array:
        return self._poison(np.empty_like(*args, **kwargs))

    def _poison(self, a: Array) -> Array:
        if a.dtype.kind == "f":
            a.fill(np.nan)
            self.poisoned += 1
        return a


@each_case
@each_operation_and_activation
def test_every_element_is_written(
    operation: str, activation: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = arguments_of_all(draw(case))
    expected = OPERATIONS[operation](arguments, activation)
    poisoned = PoisonedNumPy()
    monkeypatch.setattr(reference, "np", poisoned)
    results = OPERATIONS[operation](arguments, activation)
    if operation in TAKES_AN_ACTIVATION:
        assert poisoned.poisoned, "no np.empty was poisoned: this test sees nothing"
    for name, result in results.items():
        if result is not None:
            assert_same_bits(name, result, expected[name])


@each_dtype
@each_operation_and_activation
def test_finite_arguments_overflow_without_a_warning(
    operation: str, activation: str, dtype: type
) -> None:
    # Half of the largest number: sums of three and products of any two are out of range.
    arguments = arguments_of_all(draw(PRIME, dtype=dtype))
    huge = np.finfo(dtype).max / 2
    for name, a in arguments.items():
        if a.dtype.kind == "f":
            arguments[name] = np.copysign(huge, a).astype(dtype)
    with np.errstate(all="warn"):  # and warnings are errors
        before = np.geterr()
        OPERATIONS[operation](arguments, activation)
        assert np.geterr() == before


# ---------------------------------------------------------------------------------------
# The recurrence
# ---------------------------------------------------------------------------------------

PHI: dict[str, Callable[[float], float]] = {
    "tanh": math.tanh,
    "relu": lambda z: max(z, 0.0),
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "softplus": lambda z: math.log1p(math.exp(z)),
    "identity": lambda z: z,
}


def forward_by_hand(
    X: Array,
    h_0: Array | None,
    W_xh: Array,
    W_hh: Array,
    b_h: Array | None,
    phi: Callable[[float], float],
) -> Array:
    """Equation (9.4.5), one number after the other, each sum exact."""
    (T, n), (d, h) = X.shape[:2], W_xh.shape
    H = np.zeros((T, n, h))
    for t, i, j in np.ndindex(T, n, h):
        row = one_hot(X[t, i], d, np.float64) if X.ndim == 2 else X[t, i]
        terms = [row[k] * W_xh[k, j] for k in range(d)]
        if t > 0:
            terms += [H[t - 1, i, k] * W_hh[k, j] for k in range(h)]
        elif h_0 is not None:
            terms += [h_0[i, k] * W_hh[k, j] for k in range(h)]
        if b_h is not None:
            terms.append(b_h[j])
        H[t, i, j] = phi(math.fsum(terms))
    return H


@each_variant
@each_activation
@each_small_case
def test_forward_is_the_equation(case: Case, activation: str, variant: dict[str, bool]) -> None:
    states, expected = [], []
    for seed in case.seeds:
        arguments = draw(case, seed).arguments(**variant)
        states.append(F.rnn_forward(*arguments, activation=activation)[0])
        expected.append(forward_by_hand(*arguments, PHI[activation]))
    assert_close("H", np.stack(states), np.stack(expected), length=case.length)


def test_activation_is_tanh_unless_said() -> None:
    arguments = draw(ODD).arguments()
    assert_same_bits(
        "H", F.rnn_forward(*arguments)[0], F.rnn_forward(*arguments, activation="tanh")[0]
    )


@each_variant
@each_activation
@each_small_case
def test_every_gradient_equals_finite_differences(
    case: Case, activation: str, variant: dict[str, bool]
) -> None:
    drawn = draw_for(activation, case, **variant)
    X, h_0, W_xh, W_hh, b_h = drawn.arguments(**variant)
    _, residuals = F.rnn_forward(X, h_0, W_xh, W_hh, b_h, activation=activation)
    dX, dh_0, dW_xh, dW_hh, db_h = F.rnn_backward(drawn.dH, residuals)

    # h_0 = None is a state of zeros, whose gradient is there all the same.
    arguments = {
        "h_0": np.zeros_like(drawn.h_0) if h_0 is None else h_0,
        "W_xh": W_xh,
        "W_hh": W_hh,
    }
    gradients: dict[str, Array | None] = {"h_0": dh_0, "W_xh": dW_xh, "W_hh": dW_hh}
    if variant["bias"]:
        arguments["b_h"], gradients["b_h"] = drawn.b_h, db_h
    else:
        assert db_h is None
    if variant["by_id"]:
        assert dX is None
    else:
        arguments["X"], gradients["X"] = X, dX

    def loss(**a: Array) -> float:
        H, _ = F.rnn_forward(
            a.get("X", X), a["h_0"], a["W_xh"], a["W_hh"], a.get("b_h"), activation=activation
        )
        return float(np.vdot(H, drawn.dH))

    check_gradients(loss, arguments, gradients)


def chunks(T: int, size: int) -> Iterator[slice]:
    """Cut T steps into slices of ``size``, the last of which may be shorter."""
    return (slice(start, min(start + size, T)) for start in range(0, T, size))


@each_dtype
@each_input
@each_activation
@each_case
def test_steps_and_chunks_give_the_bits_of_the_whole(
    case: Case, activation: str, by_id: bool, dtype: type
) -> None:
    X, h_0, *parameters = draw(case, dtype=dtype).arguments(by_id=by_id)
    whole, _ = F.rnn_forward(X, h_0, *parameters, activation=activation)
    for size in (1, 2, 3, 16):
        state, parts = h_0, []
        for chunk in chunks(case.T, size):
            H, _ = F.rnn_forward(X[chunk], state, *parameters, activation=activation)
            parts.append(H)
            state = H[-1]
        assert_same_bits(f"chunks of {size}", np.concatenate(parts), whole)


@each_dtype
@each_input
@each_case
def test_no_initial_state_is_a_state_of_zeros(case: Case, by_id: bool, dtype: type) -> None:
    drawn = draw(case, dtype=dtype)
    X, _, *parameters = drawn.arguments(by_id=by_id)
    without, residuals_without = F.rnn_forward(X, None, *parameters)
    zeros, residuals_zeros = F.rnn_forward(X, np.zeros_like(drawn.h_0), *parameters)
    assert_same_bits("H", without, zeros)
    for a, b in zip(
        F.rnn_backward(drawn.dH, residuals_without),
        F.rnn_backward(drawn.dH, residuals_zeros),
        strict=True,
    ):
        if a is not None and b is not None:
            assert_same_bits("gradient", a, b)


@each_dtype
@each_activation
@each_case
def test_without_recurrent_weights_it_is_the_hidden_layer(
    case: Case, activation: str, dtype: type
) -> None:
    drawn = draw(case, dtype=dtype)
    X, h_0, W_xh, W_hh, b_h = drawn.arguments()
    H, residuals = F.rnn_forward(X, h_0, W_xh, np.zeros_like(W_hh), b_h, activation=activation)
    layer, layer_residuals = F.hidden_layer(X, W_xh, b_h, activation=activation)
    truth, _ = F.hidden_layer(
        *(a.astype(np.float64) for a in (X, W_xh, b_h)), activation=activation
    )
    assert_close("H", H, truth, length=case.length, baseline=layer)
    dX, _, dW_xh, _, db_h = F.rnn_backward(drawn.dH, residuals)
    for name, of_rnn, of_layer in zip(
        ("dX", "dW_xh", "db_h"),
        (dX, dW_xh, db_h),
        F.hidden_layer_backward(drawn.dH, layer_residuals),
        strict=True,
    ):
        assert_close(name, of_rnn, of_layer.astype(np.float64), length=case.length)


@each_dtype
@each_activation
@each_case
def test_ids_are_one_hot_rows(case: Case, activation: str, dtype: type) -> None:
    drawn = draw(case, dtype=dtype)
    ids, *rest = drawn.arguments(by_id=True)
    H, residuals = F.rnn_forward(ids, *rest, activation=activation)
    rows = one_hot(ids, case.d, dtype)
    H_rows, residuals_rows = F.rnn_forward(rows, *rest, activation=activation)
    assert np.array_equal(H, H_rows)  # 1 · w and sums of zeros are exact

    dX, *gradients = F.rnn_backward(drawn.dH, residuals)
    dX_rows, *gradients_rows = F.rnn_backward(drawn.dH, residuals_rows)
    assert dX is None and dX_rows is not None
    for name, a, b in zip(
        ("dh_0", "dW_xh", "dW_hh", "db_h"), gradients, gradients_rows, strict=True
    ):
        assert_close(name, a, b.astype(np.float64), length=case.length)


@pytest.mark.parametrize(
    "ids_dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64, ">i4"]
)
def test_ids_may_be_integers_of_any_kind(ids_dtype: DTypeLike) -> None:
    drawn = draw(PRIME)
    ids, *rest = drawn.arguments(by_id=True)
    expected, residuals = F.rnn_forward(ids, *rest)
    H, residuals_narrow = F.rnn_forward(ids.astype(ids_dtype), *rest)
    assert_same_bits("H", H, expected)
    dW_xh = F.rnn_backward(drawn.dH, residuals)[2]
    assert_same_bits("dW_xh", F.rnn_backward(drawn.dH, residuals_narrow)[2], dW_xh)
    narrow = drawn.ids.astype(ids_dtype)
    assert_same_bits("E[ids]", F.embedding(narrow, drawn.W_xh), F.embedding(drawn.ids, drawn.W_xh))


@each_dtype
def test_the_largest_id_and_no_other_selects_the_last_row(dtype: type) -> None:
    # Past 2¹⁶ rows, where ids no longer fit the 16 bits that the scatter sorts by.
    for rows in (255, 256, 257, 65535, 65536, 65537):
        ids = np.array([rows - 1, 0, rows - 1])
        E = np.arange(rows, dtype=dtype)[:, None]
        np.testing.assert_array_equal(F.embedding(ids, E)[:, 0], [rows - 1, 0, rows - 1])
        dE = F.embedding_backward(np.array([[1], [2], [4]], dtype), ids, rows)
        assert (dE[-1], dE[0], np.count_nonzero(dE)) == (5, 2, 2), rows


@each_activation
def test_weight_gradients_are_sums_over_the_steps(activation: str) -> None:
    """∂L/∂W = Σ_t (what step t alone contributes), the seed chapter's shared parameters."""
    case = PRIME
    drawn = draw(case)
    X, h_0, W_xh, W_hh, b_h = drawn.arguments()
    H, residuals = F.rnn_forward(X, h_0, W_xh, W_hh, b_h, activation=activation)
    _, _, dW_xh, dW_hh, db_h = F.rnn_backward(drawn.dH, residuals)
    assert (dW_xh.shape, dW_hh.shape, db_h.shape) == (W_xh.shape, W_hh.shape, b_h.shape)

    states = np.concatenate([h_0[None], H])
    dh = np.zeros_like(h_0)  # by the state after step t, from all later steps
    sums = [np.zeros_like(W_xh), np.zeros_like(W_hh), np.zeros_like(b_h)]
    for t in reversed(range(case.T)):
        _, step = F.rnn_forward(X[t : t + 1], states[t], W_xh, W_hh, b_h, activation=activation)
        _, dh, *contributions = F.rnn_backward(drawn.dH[t : t + 1] + dh, step)
        for total, contribution in zip(sums, contributions, strict=True):
            total += contribution
    for name, whole, total in zip(
        ("dW_xh", "dW_hh", "db_h"), (dW_xh, dW_hh, db_h), sums, strict=True
    ):
        assert_close(name, whole, total, length=case.length)


@each_input
@each_case
@each_activation
def test_permuting_the_batch_permutes_the_results(activation: str, case: Case, by_id: bool) -> None:
    drawn = draw(case)
    X, h_0, *parameters = drawn.arguments(by_id=by_id)
    order = np.random.default_rng(1).permutation(case.n)
    H, residuals = F.rnn_forward(X, h_0, *parameters, activation=activation)
    H_permuted, residuals_permuted = F.rnn_forward(
        X[:, order], h_0[order], *parameters, activation=activation
    )
    assert_close("H", H_permuted, H[:, order], length=case.length)
    dX, dh_0, *gradients = F.rnn_backward(drawn.dH, residuals)
    dX_permuted, dh_0_permuted, *gradients_permuted = F.rnn_backward(
        drawn.dH[:, order], residuals_permuted
    )
    if not by_id:
        assert_close("dX", dX_permuted, dX[:, order], length=case.length)
    assert_close("dh_0", dh_0_permuted, dh_0[order], length=case.length)
    for name, a, b in zip(("dW_xh", "dW_hh", "db_h"), gradients_permuted, gradients, strict=True):
        assert_close(name, a, b, length=case.length)


@each_input
@each_activation
def test_permuting_time_changes_the_final_state(activation: str, by_id: bool) -> None:
    X, *rest = draw(PRIME).arguments(by_id=by_id)
    H, _ = F.rnn_forward(X, *rest, activation=activation)
    H_reversed, _ = F.rnn_forward(X[::-1], *rest, activation=activation)
    assert np.abs(H[-1] - H_reversed[-1]).max() > 0.1


@each_activation
def test_an_input_changes_its_own_and_later_outputs_only(activation: str) -> None:
    """The three-step figure: x_2 leaves O_1 alone and reaches O_2 and O_3."""
    drawn = draw(Case("three-steps", T=3, n=2, d=4, h=5))
    W_hq, b_q = drawn.W_xh.T, drawn.W_xh[:, 0]

    def outputs(X: Array) -> Array:
        _, *rest = drawn.arguments()
        return F.linear(F.rnn_forward(X, *rest, activation=activation)[0], W_hq, b_q)

    O = outputs(drawn.X)
    perturbed = drawn.X.copy()
    perturbed[1] += 1
    changed = np.abs(outputs(perturbed) - O).max(axis=(1, 2))
    assert changed[0] == 0
    assert (changed[1:] > 0.01).all()


def test_the_chapters_concatenation_example() -> None:
    """(3, 1)(1, 4) + (3, 4)(4, 4) = (3, 5)(5, 4), and one linear step of the network is that."""
    rng = np.random.default_rng(9)
    shapes = ((3, 1), (1, 4), (3, 4), (4, 4))
    for dtype in DTYPES:
        X, W_xh, H, W_hh = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
        joined, stacked = np.concatenate([X, H], axis=1), np.concatenate([W_xh, W_hh], axis=0)
        assert (joined.shape, stacked.shape) == ((3, 5), (5, 4))
        one_product = F.linear(joined, stacked)
        two_products = F.linear(X, W_xh) + F.linear(H, W_hh)
        step, _ = F.rnn_forward(X[None], H, W_xh, W_hh, None, activation="identity")
        limit = CONCATENATION[np.dtype(dtype)]
        assert np.abs(one_product - two_products).max() <= limit
        assert np.abs(one_product - step[0]).max() <= limit
        assert np.abs(one_product).max() > 1  # there was something to compare


# ---------------------------------------------------------------------------------------
# Backpropagation through time: chunks and xi
# ---------------------------------------------------------------------------------------

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


# ---------------------------------------------------------------------------------------
# No steps, no rows
# ---------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------
# The layers around the recurrence
# ---------------------------------------------------------------------------------------

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


# ---------------------------------------------------------------------------------------
# Cross-entropy
# ---------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------
# The activations themselves
# ---------------------------------------------------------------------------------------

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
