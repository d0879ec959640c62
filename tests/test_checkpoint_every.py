"""``checkpoint_every``: every k-th state is kept, the others are computed again."""

import gc
import math
import tracemalloc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import ACTIVATIONS, CASES, DTYPES, EMPTY, SMALL, Case, Draw, draw
from gradcheck import check_gradients
from hypothesis import given
from hypothesis import strategies as st
from kernel_setup import NAMES
from numpy.typing import DTypeLike, NDArray
from tolerance import assert_close, assert_same_bits

import gpurnn
from gpurnn import Activation, planning, reference, segments, validate
from gpurnn import functional as F
from gpurnn.cuda import operations

Array = NDArray[Any]

ODD = next(case for case in SMALL if case.name == "odd")
PRIME = next(case for case in SMALL if case.name == "prime")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
each_input = pytest.mark.parametrize("by_id", [False, True], ids=["floats", "ids"])

LEAKY = Activation(
    lambda z: 0.9 * math.tanh(z) + 0.1 * z, lambda z: 1 - 0.9 * math.tanh(z) ** 2, name="leaky"
)  # φ′ is a function of the pre-activation


def every(T: int) -> list[int]:
    """1, 2, 3, one less than T, T, more than T: without doubles, and none below 1."""
    return sorted({k for k in (1, 2, 3, T - 1, T, T + 5) if k >= 1})


def results(
    drawn: Draw,
    activation: Any = "tanh",
    *,
    k: int | None,
    kernel: str | None = None,
    xi: Array | None = None,
    **variant: bool,
) -> dict[str, Array]:
    """Return H and all gradients, H overwritten before the backward pass if only parts are kept."""
    H, residuals = F.rnn_forward(
        *drawn.arguments(**variant), activation=activation, kernel=kernel, checkpoint_every=k
    )
    kept = H.copy()
    if k is not None:
        H[...] = np.nan
    found = (kept, *F.rnn_backward(drawn.dH, residuals, xi=xi))
    return {name: a for name, a in zip(NAMES, found, strict=True) if a is not None}


def assert_all_close(
    found: dict[str, Array],
    truth: dict[str, Array],
    baseline: dict[str, Array] | None,
    length: int,
) -> None:
    assert found.keys() == truth.keys()
    for name, a in found.items():
        lost = None if baseline is None else baseline[name]
        assert_close(name, a, truth[name], length=length, baseline=lost)


def with_kernels() -> None:
    pytest.importorskip("greenlet", reason="the emulator needs greenlet")
    pytest.importorskip("numba.cuda", reason="the kernels need numba-cuda")


# ---------------------------------------------------------------------------------------
# NumPy
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, LEAKY], ids=str)
@each_dtype
def test_the_gradients_are_those_of_all_states(
    dtype: DTypeLike, activation: Any, case: Case
) -> None:
    exact, drawn = draw(case), draw(case, dtype=dtype)
    truth = results(exact, activation, k=None)
    whole = results(drawn, activation, k=None)
    for k in every(case.T):
        found = results(drawn, activation, k=k)
        assert_same_bits("H", found["H"], whole["H"])
        assert np.array_equal(found["dh_0"], whole["dh_0"])  # each step's gradient is the same
        assert_all_close(found, truth, whole if dtype == np.float32 else None, case.length)


@pytest.mark.parametrize("h_0", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@each_input
def test_ids_no_state_and_no_bias(by_id: bool, bias: bool, h_0: bool) -> None:
    drawn = draw(PRIME)
    variant = {"by_id": by_id, "bias": bias, "h_0": h_0}
    truth = results(drawn, LEAKY, k=None, **variant)
    for k in every(PRIME.T):
        assert_all_close(results(drawn, LEAKY, k=k, **variant), truth, None, PRIME.length)


@pytest.mark.parametrize("case", EMPTY, ids=str)
@each_input
@each_dtype
def test_without_steps_or_rows(dtype: DTypeLike, by_id: bool, case: Case) -> None:
    drawn = draw(case, dtype=dtype)
    truth = results(drawn, LEAKY, k=None, by_id=by_id)
    for k in every(case.T):
        for name, a in results(drawn, LEAKY, k=k, by_id=by_id).items():
            assert_same_bits(name, a, truth[name])


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_truncation(k: int) -> None:
    """Factors ξ, 0 among them, at the first and last steps of segments and within."""
    drawn = draw(PRIME)
    for xi in ([0, 1, 0, 0.5, 1.5, 1, 2.0], [1, 1, 2, 0, 1, 1, 0.0], [0.0] * 7, [3.0] * 7):
        factors = np.array(xi)
        truth = results(drawn, k=None, xi=factors)
        found = results(drawn, k=k, xi=factors)
        assert np.array_equal(found["dh_0"], truth["dh_0"])
        assert_all_close(found, truth, None, PRIME.length)


def test_a_gradient_cut_at_a_boundary_does_not_reach_the_segment_before() -> None:
    drawn = draw(PRIME)
    drawn.dH[:3] = 0
    _, residuals = F.rnn_forward(*drawn.arguments(), checkpoint_every=3)
    xi = np.array([1, 1, 1, 0, 1, 1, 1.0])
    dX, dh_0, *_ = F.rnn_backward(drawn.dH, residuals, xi=xi)
    assert dX is not None
    assert not dX[:3].any() and not dh_0.any() and dX[3:].all()


@each_input
def test_finite_differences(by_id: bool) -> None:
    case = Case("differences", T=5, n=2, d=3, h=4)
    drawn = draw(case)
    names = ("X", "h_0", "W_xh", "W_hh", "b_h")
    arguments = dict(zip(names, drawn.arguments(by_id=by_id), strict=True))

    def loss(**a: Array) -> float:
        return float(np.sum(F.rnn_forward(**a, activation=LEAKY)[0] * drawn.dH))

    for k in (1, 2, 3, 5):
        _, residuals = F.rnn_forward(**arguments, activation=LEAKY, checkpoint_every=k)
        found = F.rnn_backward(drawn.dH, residuals)
        gradients = {name: a for name, a in zip(names, found, strict=True) if a is not None}
        assert by_id == ("X" not in gradients)
        check_gradients(loss, arguments, gradients)


@pytest.mark.parametrize("activation", ["tanh", "softplus", LEAKY], ids=str)
@each_input
@each_dtype
def test_the_states_have_the_same_bits_again(
    monkeypatch: pytest.MonkeyPatch, dtype: DTypeLike, by_id: bool, activation: Any
) -> None:
    drawn = draw(PRIME, dtype=dtype)
    whole, Z = reference.rnn_forward(*drawn.arguments(by_id=by_id), validate.activation(activation))
    for k in every(PRIME.T):
        _, residuals = F.rnn_forward(
            *drawn.arguments(by_id=by_id), activation=activation, checkpoint_every=k
        )
        again: list[tuple[Array, Array | None]] = []
        compute = reference.rnn_forward

        def recording(*arguments: Any, again: Any = again, compute: Any = compute) -> Any:
            again.append(compute(*arguments))
            return tuple(None if a is None else a.copy() for a in again[-1])

        with monkeypatch.context() as patch:
            patch.setattr(reference, "rnn_forward", recording)
            F.rnn_backward(drawn.dH, residuals)
        assert len(again) == -(-PRIME.T // k)
        again.reverse()
        joined = np.concatenate([again[0][0][:1], *(states[1:] for states, _ in again)])
        assert_same_bits("states", joined, whole)
        for i, (states, _) in enumerate(again):
            assert_same_bits("checkpoint", states[0], whole[i * k])
        if Z is not None:
            assert_same_bits("Z", np.concatenate([z for _, z in again if z is not None]), Z)


@given(st.data())
def test_any_shape_and_any_k(data: st.DataObject) -> None:
    case = Case(
        "any",
        T=data.draw(st.integers(0, 12), "T"),
        n=data.draw(st.integers(0, 3), "n"),
        d=data.draw(st.integers(1, 4), "d"),
        h=data.draw(st.integers(1, 5), "h"),
    )
    k = data.draw(st.integers(1, 15) | st.just(10**30), "k")
    variant = {name: data.draw(st.booleans(), name) for name in ("by_id", "h_0", "bias")}
    activation = data.draw(st.sampled_from(["tanh", "relu", LEAKY]), "activation")
    xi = data.draw(
        st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=12, max_size=12), "xi"
    )
    factors = None if xi is None else np.array(xi)[: case.T]
    drawn = draw(case, seed=data.draw(st.integers(0, 5), "seed"))
    truth = results(drawn, activation, k=None, xi=factors, **variant)
    found = results(drawn, activation, k=k, xi=factors, **variant)
    for name, a in found.items():  # by float32's rounding: some draws cancel to almost nothing
        assert_close(name, a, truth[name], length=case.length, dtype=np.float32)


def test_arguments_are_not_written() -> None:
    drawn = draw(PRIME)
    for a in vars(drawn).values():
        a.flags.writeable = False
    xi = np.ones(PRIME.T)
    xi.flags.writeable = False
    _, residuals = F.rnn_forward(*drawn.arguments(), checkpoint_every=2)
    F.rnn_backward(drawn.dH, residuals, xi=xi)
    F.rnn_backward(drawn.dH, residuals, xi=xi)  # nor are the residuals used up


def test_any_memory_order() -> None:
    drawn = draw(PRIME)

    def spread(a: Array) -> Array:
        """The same numbers, every second one of an array in Fortran's order."""
        wide = np.full([2 * size for size in a.shape], 10**6, a.dtype, order="F")
        there = wide[tuple(slice(None, None, 2) for _ in a.shape)]
        there[...] = a
        return there

    for by_id in (False, True):
        arguments = [None if a is None else spread(a) for a in drawn.arguments(by_id=by_id)]
        _, residuals = F.rnn_forward(*arguments, checkpoint_every=3)  # type: ignore[arg-type]
        found = F.rnn_backward(spread(drawn.dH), residuals, xi=spread(np.ones(PRIME.T)))
        truth = results(drawn, k=3, by_id=by_id)
        for name, a in zip(NAMES[1:], found, strict=True):
            if a is not None:
                assert_same_bits(name, a, truth[name])


# ---------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", LEAKY], ids=str)
@pytest.mark.parametrize("T", [0, 1, 12, 13])
def test_the_residuals_keep_every_kth_state(T: int, activation: Any) -> None:
    drawn = draw(Case("kept", T=T, n=2, d=3, h=4))
    H, whole = F.rnn_forward(*drawn.arguments(), activation=activation)
    for k in (1, 2, 3, 12, 13, 50):
        H, residuals = F.rnn_forward(*drawn.arguments(), activation=activation, checkpoint_every=k)
        assert (whole.Z is None) == (activation == "tanh") and residuals.Z is None
        assert residuals.states.nbytes == max(1, -(-T // k)) * 2 * 4 * 8
        assert residuals.states.base is None, "it would hold the array that it is a part of"
        starts = list(range(0, max(T, 1), k))
        assert_same_bits("states", residuals.states, whole.states[starts])
        held = [getattr(residuals, name) for name in F.RNNResiduals.__slots__]
        assert not any(np.shares_memory(a, H) for a in held if isinstance(a, np.ndarray))


def test_H_can_be_freed() -> None:
    for k in (None, 3):
        H, residuals = F.rnn_forward(*draw(PRIME).arguments(), checkpoint_every=k)
        all_states = weakref.ref(H.base)
        del H
        gc.collect()
        assert (all_states() is None) == (k is not None)
        del residuals


def test_the_backward_pass_holds_little() -> None:
    """Of a long sequence: two arrays of the size of its checkpoints' and a few segments'."""
    T, n, d, h, k = 20_000, 1, 7, 16, 141
    drawn = draw(Case("long", T=T, n=n, d=d, h=h), dtype=np.float32)
    peaks = {}
    for every_ in (None, k):
        tracemalloc.start()
        residuals = F.rnn_forward(
            *drawn.arguments(by_id=True), activation=LEAKY, checkpoint_every=every_
        )[1]
        tracemalloc.reset_peak()
        F.rnn_backward(drawn.dH, residuals)
        peaks[every_] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        del residuals
    state = n * h * 4
    assert peaks[None] > 3 * T * state  # states, pre-activations, and dZ
    assert peaks[k] < (T // k + 8 * k) * state + 2**16
    assert peaks[k] < peaks[None] / 10


# ---------------------------------------------------------------------------------------
# Kernels, emulated
# ---------------------------------------------------------------------------------------

KERNELS = [("resident", False), ("resident", True), ("step", False), ("step", True)]
KERNELS += [("concatenated", False)]

each_kernel = pytest.mark.parametrize(
    ("kernel", "by_id"),
    KERNELS,
    ids=lambda v: v if isinstance(v, str) else "ids" if v else "floats",
)


@each_kernel
@pytest.mark.parametrize("activation", ["tanh", LEAKY], ids=str)
@each_dtype
def test_kernels(dtype: DTypeLike, activation: Any, kernel: str, by_id: bool) -> None:
    """Races looked for, schedules shuffled, what no kernel wrote is NaN."""
    with_kernels()
    drawn = draw(ODD, dtype=dtype)
    truth = results(draw(ODD), activation, k=None, by_id=by_id)
    with gpurnn.emulated():
        whole = results(drawn, activation, k=None, kernel=kernel, by_id=by_id)
    for k in (1, 2, 4, 9) if kernel == "resident" else (2,):  # the others take seconds
        with gpurnn.emulated(seed=k):
            found = results(drawn, activation, k=k, kernel=kernel, by_id=by_id)
        assert_same_bits("H", found["H"], whole["H"])
        if by_id or kernel == "concatenated":  # X W_xh is not the library's product
            assert np.array_equal(found["dh_0"], whole["dh_0"])
        assert_all_close(found, truth, whole if dtype == np.float32 else None, ODD.length)


@each_kernel
def test_kernels_with_truncation_and_neither_state_nor_bias(kernel: str, by_id: bool) -> None:
    with_kernels()
    drawn = draw(ODD)
    xi = np.array([1.5, 0, 2, 0.5, 0])
    for bias in (False, True):
        variant = {"by_id": by_id, "h_0": False, "bias": bias}
        truth = results(drawn, k=None, xi=xi, **variant)
        for k in (1, 3, 4) if kernel == "resident" else (3,):
            with gpurnn.emulated(seed=1):
                found = results(drawn, k=k, kernel=kernel, xi=xi, **variant)
            assert_all_close(found, truth, None, ODD.length)


@each_kernel
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_kernels_without_steps_or_rows(case: Case, kernel: str, by_id: bool) -> None:
    with_kernels()
    drawn = draw(case)
    truth = results(drawn, k=None, by_id=by_id)
    with gpurnn.emulated():
        for k in (1, 2, 5):
            for name, a in results(drawn, k=k, kernel=kernel, by_id=by_id).items():
                assert_same_bits(name, a, truth[name])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@each_kernel
def test_half_types(kernel: str, by_id: bool, dtype: Any) -> None:
    """A segment rounds each of its gradients once, and what it passes on twice."""
    with_kernels()
    drawn = draw(ODD).astype(dtype)
    truth = results(drawn.astype(np.float64), k=None, by_id=by_id)
    u = float(ml_dtypes.finfo(dtype).eps) / 2
    for k in (1, 2, 5) if kernel == "resident" else (2,):
        with gpurnn.emulated():
            found = results(drawn, k=k, kernel=kernel, by_id=by_id)
        for name, a in found.items():
            assert a.dtype == dtype
            error = np.abs(a.astype(np.float64) - truth[name]).max()
            assert error <= 4 * ODD.T**0.5 * u * np.abs(truth[name]).max(), (name, k)


def test_sums_of_half_types_are_kept_in_float32() -> None:
    """Added up as halves, 4,096 ones would stop at 2,048."""
    T = 4096
    X = dH = np.zeros((T, 1, 1), np.float16)
    ones = [np.ones((1, 1), np.float16)] * 3
    total = segments.backward(
        dH,
        X,
        np.zeros((T, 1, 1), np.float16),
        1,
        None,
        lambda X, h_0: (h_0, None),
        lambda dH, X, states, Z, xi: (X, states, *ones),
        np.empty_like(X),
    )
    assert [a.dtype for a in total if a is not None] == [np.float16] * 5
    assert [float(a.item()) for a in total[2:]] == [T] * 3


@pytest.mark.parametrize(("kernel", "by_id"), [("resident", True), ("concatenated", False)])
def test_states_of_kernels_have_the_same_bits_again(
    monkeypatch: pytest.MonkeyPatch, kernel: str, by_id: bool
) -> None:
    with_kernels()
    drawn = draw(ODD, dtype=np.float32)
    with gpurnn.emulated():
        H, residuals = F.rnn_forward(
            *drawn.arguments(by_id=by_id), kernel=kernel, checkpoint_every=2
        )
        again = []
        compute = operations._rnn_states

        def recording(engine: Any, plan: Any, *arguments: Any) -> Any:
            assert plan is residuals.plan and plan.kernel == kernel
            again.append(compute(engine, plan, *arguments))
            return again[-1]

        monkeypatch.setattr(operations, "_rnn_states", recording)
        F.rnn_backward(drawn.dH, residuals)
    assert [len(states) - 1 for states, _ in again] == [1, 2, 2]
    assert_same_bits("H", np.concatenate([states[1:] for states, _ in reversed(again)]), H)


# ---------------------------------------------------------------------------------------
# RNN
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@each_input
def test_layers(by_id: bool, layers: int) -> None:
    drawn = draw(PRIME)
    rnn = gpurnn.RNN(PRIME.d, PRIME.h, layers, dtype=np.float64, activation=LEAKY)
    X = drawn.ids if by_id else drawn.X
    h_0 = drawn.h_0 if layers == 1 else np.stack([drawn.h_0, -drawn.h_0])
    H, h_T, residuals = rnn.forward(X, h_0)
    dX, dh_0, grads = rnn.backward(drawn.dH, residuals)
    for k in (1, 3, 7, 12):
        H_k, h_T_k, residuals = rnn.forward(X, h_0, checkpoint_every=k)
        assert [r.checkpoint_every for r in residuals] == [k] * layers
        assert [len(r.states) for r in residuals] == [-(-PRIME.T // k)] * layers
        assert_same_bits("H", H_k, H)
        assert_same_bits("h_T", h_T_k, h_T)
        for a, b in zip(rnn(X, h_0, checkpoint_every=k), (H, h_T), strict=True):
            assert_same_bits("call", a, b)
        dX_k, dh_0_k, grads_k = rnn.backward(drawn.dH, residuals)
        assert grads_k.keys() == grads.keys()
        for name in grads:
            assert_close(name, grads_k[name], grads[name], length=2 * PRIME.length)
        assert_close("dh_0", dh_0_k, dh_0, length=2 * PRIME.length)
        if dX is None:
            assert dX_k is None
        else:
            assert dX_k is not None
            assert_close("dX", dX_k, dX, length=2 * PRIME.length)


@pytest.mark.parametrize("k", [None, 1, 4])
def test_the_final_state_of_no_step_is_the_initial_one(k: int | None) -> None:
    rnn = gpurnn.RNN(4, 5, 2)
    h_0 = np.arange(30, dtype=np.float32).reshape(2, 3, 5)
    X = np.empty((0, 3), np.int64)
    h_T = rnn(X, h_0, checkpoint_every=k)[1]
    assert_same_bits("h_T", h_T, h_0)
    assert not np.shares_memory(h_T, h_0)
    assert_same_bits("zeros", rnn(X, checkpoint_every=k)[1], np.zeros_like(h_0))


# ---------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "checkpoint_every is 0: expected at least 1"),
        (-3, ValueError, "checkpoint_every is -3: expected at least 1"),
        (2.0, TypeError, "checkpoint_every is 2.0: expected an integer"),
        (True, TypeError, "checkpoint_every is True: expected an integer"),
        ("2", TypeError, "checkpoint_every is '2': expected an integer"),
    ],
)
def test_what_k_must_be(k: Any, error: type[Exception], message: str) -> None:
    drawn = draw(ODD)
    rnn = gpurnn.RNN(ODD.d, ODD.h, dtype=np.float64)
    for call in (
        lambda: F.rnn_forward(*drawn.arguments(), checkpoint_every=k),
        lambda: rnn.forward(drawn.X, checkpoint_every=k),
        lambda: rnn(drawn.X, checkpoint_every=k),
    ):
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value) == message


def test_k_may_be_one_of_numpys_integers() -> None:
    _, residuals = F.rnn_forward(*draw(ODD).arguments(), checkpoint_every=np.int64(2))
    assert residuals.checkpoint_every == 2 and type(residuals.checkpoint_every) is int


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["X", "h_0", "W_xh", "W_hh", "b_h", "dH", "xi"])
def test_what_is_not_finite_is_refused_as_without_checkpoints(name: str, bad: float) -> None:
    said = []
    for k in (None, 1, 3, 7):
        drawn = draw(PRIME)
        xi = np.ones(PRIME.T)
        a = xi if name == "xi" else getattr(drawn, name)
        a[(2,) if name == "xi" else (0,) * a.ndim] = bad
        if bad == np.inf and name in ("X", "h_0", "W_xh", "W_hh", "b_h"):
            activation = "identity"  # tanh would take an infinity to 1
        else:
            activation = "tanh"
        with pytest.raises(validate.NonFiniteError) as raised:
            results(drawn, activation, k=k, xi=xi)
        said.append(str(raised.value))
    assert said[0].startswith(f"{name} holds {bad} at index")
    assert set(said) == {said[0]}


def test_gradients_of_another_shape_or_dtype() -> None:
    drawn = draw(PRIME)
    T, n, h = drawn.dH.shape
    for k in (None, 2):
        _, residuals = F.rnn_forward(*drawn.arguments(), checkpoint_every=k)
        for dH, xi, error, message in (
            (drawn.dH[1:], None, ValueError, f"dH has shape {(T - 1, n, h)}: expected H's shape"),
            (drawn.dH[0], None, ValueError, f"dH has shape {(n, h)}: expected H's shape"),
            (drawn.dH.astype(np.float32), None, TypeError, "dH has dtype float32 but H has"),
            (drawn.dH, np.ones(T + 1), ValueError, f"xi has shape {(T + 1,)}: expected (T,)"),
            (drawn.dH, np.ones(T, np.float32), TypeError, "xi has dtype float32 but H has"),
        ):
            with pytest.raises(error) as raised:
                F.rnn_backward(dH, residuals, xi=xi)
            assert str(raised.value).startswith(message)


# ---------------------------------------------------------------------------------------
# Long sequences
# ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_book_without_truncation() -> None:
    """200,000 characters at once; with checkpoints as exact as with all states."""
    T, k = 200_000, 1000
    case = Case("book", T=T, n=1, d=28, h=32)
    drawn = draw(case, dtype=np.float32)
    whole = results(drawn, k=None, by_id=True)
    found = results(drawn, k=k, by_id=True)
    assert all(np.isfinite(a).all() for a in found.values())
    assert_same_bits("H", found["H"], whole["H"])
    assert np.array_equal(found["dh_0"], whole["dh_0"])
    truth = results(drawn.astype(np.float64), k=None, by_id=True)
    assert_all_close(found, truth, whole, case.length)


def test_lengths_beyond_32_bits() -> None:
    """No step is left out or taken twice where T and the offsets exceed 2³¹: no rows, no memory."""
    T, k = 2**40 + 5, 2**37
    seen = []

    def forward_pass(X: Array, h_0: Array) -> tuple[Array, None]:
        return np.empty((len(X) + 1, 0, 2)), None

    def backward_pass(dH: Array, X: Array, states: Array, Z: None, xi: Array | None) -> Any:
        assert xi is not None
        seen.append((len(dH), len(X), len(states) - 1, len(xi)))
        sums = [np.full((1,), len(dH), np.float64)] * 3
        return X, np.empty((0, 2)), *sums

    states = np.empty((T + 1, 0, 2))
    kept = segments.checkpoints(states, k)
    assert kept.shape == (9, 0, 2)
    xi = np.broadcast_to(np.float64(1), (T,))
    dH, X = np.empty((T, 0, 2)), np.empty((T, 0, 3))
    dX, _, *sums = segments.backward(
        dH, X, kept, k, xi, forward_pass, backward_pass, np.empty_like(X)
    )
    assert dX is not None and dX.shape == X.shape
    assert seen == [(5,) * 4] + [(k,) * 4] * 8
    assert [a.item() for a in sums] == [T] * 3


def test_as_many_steps_as_kernels_count() -> None:
    with_kernels()
    T, h = 2**31 - 1, 3
    W = np.ones((h, h), np.float32)
    X = np.empty((T, 0, h), np.float32)
    with gpurnn.emulated():
        H, residuals = F.rnn_forward(X, None, W, W, None, checkpoint_every=2**29)
        assert H.shape == (T, 0, h) and residuals.states.shape == (4, 0, h)
        dX, *_ = F.rnn_backward(H, residuals)
        assert dX is not None and dX.shape == X.shape
        with pytest.raises(ValueError, match=r"^T is 2147483648: expected .* less than 2³¹$"):
            F.rnn_forward(np.empty((T + 1, 0, h), np.float32), None, W, W, None)


def test_a_sequence_of_more_elements_than_32_bits_count_is_planned() -> None:
    for n, h in ((64, 256), (1024, 128), (10_000, 4096)):
        plan = planning.plan(T=200_000, n=n, d=1, h=h, device=planning.DEVICES["H100"])
        assert 200_000 * n * h > 2**31
        assert plan.grid[0] >= n / 16


def test_more_rows_than_a_product_has() -> None:
    """Layers without a state refuse what cuBLAS's sizes and the kernels' indices cannot count."""
    with_kernels()
    H, W = np.empty((2**20, 2**11, 0), np.float32), np.empty((0, 2), np.float32)
    message = (
        "H has shape (1048576, 2048, 0): expected less than 2³¹ rows, those of one matrix product"
    )
    with gpurnn.emulated():
        for call in (
            lambda: F.linear(H, W),
            lambda: F.linear_backward(np.empty((0, 2), np.float32), H, W),
        ):
            with pytest.raises(ValueError) as raised:
                call()
            assert str(raised.value) == message
        with pytest.raises(ValueError, match=r"^X has shape .*: expected less than 2³¹ rows"):
            F.hidden_layer(H, W, None)
