"""The reference: what holds for every operation, and the recurrence."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import ACTIVATIONS, DTYPES, SMALL, Case, Draw, draw, draw_off_kink
from gradcheck import check_gradients
from numpy.typing import DTypeLike
from reference_setup import (
    PHI,
    PRIME,
    Array,
    arguments_of_all,
    chunks,
    each_activation,
    each_case,
    each_dtype,
    each_input,
    each_variant,
    one_hot,
    run_embedding,
    run_hidden_layer,
    run_linear,
)
from tolerance import (
    CONCATENATION,
    KINK_MARGIN,
    assert_close,
    assert_same_bits,
)

from gpurnn import activations, reference
from gpurnn import functional as F

each_small_case = pytest.mark.parametrize("case", SMALL, ids=str)


ODD = next(case for case in SMALL if case.name == "odd")


def draw_for(
    activation: str, case: Case, dtype: DTypeLike = np.float64, seed: int = 0, **variant: bool
) -> Draw:
    """Draw a case, away from relu's kink where that is the activation."""
    if activation == "relu":
        return draw_off_kink(case, KINK_MARGIN[np.dtype(dtype)], seed, dtype, **variant)
    return draw(case, seed, dtype)


# Every operation at once: what holds for all of them is tested for all of them.


def run_rnn(X: str, a: dict[str, Array], activation: str) -> dict[str, Array | None]:
    H, residuals = F.rnn_forward(
        a[X], a["h_0"], a["W_xh"], a["W_hh"], a["b_h"], activation=activation
    )
    dX, dh_0, dW_xh, dW_hh, db_h = F.rnn_backward(a["dH"], residuals, xi=a["xi"])
    return {"H": H, "dX": dX, "dh_0": dh_0, "dW_xh": dW_xh, "dW_hh": dW_hh, "db_h": db_h}


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


# The recurrence


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
