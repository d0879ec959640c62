"""The kernel "gemm" from the host's side: graphs, cuBLAS, streams. Both libraries are stand-ins."""

import gc
import threading
from collections.abc import Iterator
from typing import Any

import fake_cupy
import ml_dtypes
import numpy as np
import pytest
from cases import Case, draw
from hypothesis import given
from hypothesis import strategies as st
from kernel_setup import NAMES, Array, results
from tolerance import assert_same_bits

import gpurnn
from gpurnn import functional as F
from gpurnn import planning
from gpurnn.cuda import cublas, engines, gemm, graphs, operations
from gpurnn.cuda.cublas import CuBLASError

n, d, h = 3, 2, 5
CHUNK = 8


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cupy.FakeCuPy]:
    """The stand-in, with short chunks and small blocks: what is emulated takes time."""
    monkeypatch.setattr(planning.gemm, "CHUNK", CHUNK)
    for module in (planning.choose, planning.gemm, planning.plans, operations):
        monkeypatch.setattr(module, "SIDE", 4)
    planning.choose._plan.cache_clear()
    yield fake_cupy.install(monkeypatch)
    fake_cupy.clear()
    planning.choose._plan.cache_clear()


def case(T: int) -> Case:
    return Case("", T=T, n=n, d=d, h=h)


def both(T: int, *, seed: int = 0, kernel: str = "gemm") -> tuple[dict[str, Array], Any]:
    """Return what a pass gives under the emulator, and a pass on the stand-in."""
    drawn = draw(case(T), seed=seed, dtype=np.float32)
    with gpurnn.emulated(check_races=False):
        expected = results(drawn, kernel=kernel)

    def run(cupy: fake_cupy.FakeCuPy) -> dict[str, Any]:
        H, residuals = F.rnn_forward(*(cupy.new(a) for a in drawn.arguments()), kernel=kernel)
        found = (H, *F.rnn_backward(cupy.new(drawn.dH), residuals))
        return {name: a for name, a in zip(NAMES, found, strict=True) if a is not None}

    return expected, run


def assert_right(cupy: fake_cupy.FakeCuPy, T: int, *, seed: int = 0) -> None:
    expected, run = both(T, seed=seed)
    found = run(cupy)
    gc.collect()  # what a call was given may be gone when the next one comes
    for name, a in found.items():
        assert_same_bits(name, a.view(np.ndarray), expected[name])
    assert not cupy.cublas.faults


# ---------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------


@given(steps=st.integers(0, 5000), most=st.sampled_from([4, 8, 16, 32]))
def test_chunks(steps: int, most: int) -> None:
    found = list(gemm.chunks(steps, most))
    sizes = [size for _, size in found]
    assert [start for start, _ in found] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert sum(sizes) == steps
    assert sizes == sorted(sizes, reverse=True)
    assert all(size <= most and size.bit_count() == 1 for size in sizes)
    assert len(set(sizes)) + max(0, steps // most - 1) == len(sizes)  # each smaller one once


def test_captured_once_and_replayed_with_other_arrays_and_other_lengths(
    cupy: fake_cupy.FakeCuPy,
) -> None:
    assert_right(cupy, 5)
    # forward 4 + 1 steps, backward 4, and dh_0 as it comes; each a product and a kernel
    assert cupy.replays == [8, 2, 8]
    assert len(cupy.graphs) == 3
    assert_right(cupy, 5, seed=1)
    assert len(cupy.graphs) == 3
    del cupy.replays[:]
    assert_right(cupy, 15, seed=2)  # 8 + 4 + 2 + 1 and 8 + 4 + 2
    assert cupy.replays == [16, 8, 4, 2, 16, 8, 4]
    assert len(cupy.graphs) == 3 + 4
    for seed, T in enumerate((15, 5, 22, 9, 4)):
        assert_right(cupy, T, seed=seed)
    assert len(cupy.graphs) == 3 + 4 + 1  # 22 − 1 = 2 · 8 + 4 + 1 backward
    of_steps = [spec for spec, _ in cupy.loads if not spec.kind.startswith(("column", "scatter"))]
    assert len(of_steps) == 3, "kernels are loaded once"


def test_a_launch_of_the_plan_is_one_of_a_graph(cupy: fake_cupy.FakeCuPy) -> None:
    for T in (4, 15, 40):
        arguments = [cupy.new(a) for a in draw(case(T), dtype=np.float32).arguments()]
        before = len(cupy.replays)
        _, residuals = F.rnn_forward(*arguments, kernel="gemm")
        assert residuals.plan is not None
        assert len(cupy.replays) - before == residuals.plan.launches


@pytest.mark.parametrize("T", [1, 3])
def test_few_steps_are_not_captured(cupy: fake_cupy.FakeCuPy, T: int) -> None:
    assert_right(cupy, T)
    assert not cupy.graphs


def test_steps_too_large_for_a_graph(
    cupy: fake_cupy.FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the same bits as those of graphs."""
    for limit in ("CHUNK_BYTES", "COPIED_WEIGHTS"):
        expected, run = both(9)
        with monkeypatch.context() as patch:
            patch.setattr(planning.gemm, limit, 0)
            planning.choose._plan.cache_clear()
            for name, a in run(cupy).items():
                assert_same_bits(name, a.view(np.ndarray), expected[name])
            with gpurnn.emulated():
                eager = results(draw(case(9), dtype=np.float32), kernel="gemm")
        planning.choose._plan.cache_clear()
        for name, a in eager.items():
            assert_same_bits(name, a, expected[name])
    assert not cupy.graphs


def test_nan_of_one_call_does_not_reach_the_next(cupy: fake_cupy.FakeCuPy) -> None:
    drawn = draw(case(15), dtype=np.float32)
    spoilt = [np.full_like(a, np.nan) for a in drawn.arguments() if a is not None]
    H, residuals = F.rnn_forward(*(cupy.new(a) for a in spoilt), kernel="gemm")
    dX = F.rnn_backward(cupy.new(np.full_like(drawn.dH, np.nan)), residuals)[0]
    assert dX is not None and np.isnan(H).all() and np.isnan(dX).all()
    for T in (15, 6, 9):
        assert_right(cupy, T)


@pytest.mark.parametrize("of_output", [False, True])
def test_activations_and_factors_are_graphs_of_their_own(
    cupy: fake_cupy.FakeCuPy, of_output: bool
) -> None:
    def square(z: float) -> float:
        return z * abs(z)

    own = gpurnn.Activation(square, lambda z: 2.0 * abs(z))
    if of_output:
        own = gpurnn.Activation(lambda z: 0.5 * z, lambda h: 0.5, of_output=True)
    drawn = draw(case(6), dtype=np.float32)
    for activation in ("tanh", own):
        for xi in (None, np.array([2, 0, 1, 0.5, 1.5, 3], np.float32)):
            with gpurnn.emulated(check_races=False):
                expected = results(drawn, activation, kernel="gemm", xi=xi)
            arguments = [cupy.new(a) for a in drawn.arguments()]
            H, residuals = F.rnn_forward(*arguments, activation=activation, kernel="gemm")
            factors = None if xi is None else cupy.new(xi)
            found = (H, *F.rnn_backward(cupy.new(drawn.dH), residuals, xi=factors))
            for name, a in zip(NAMES, found, strict=True):
                assert_same_bits(name, a.view(np.ndarray), expected[name])
    assert len(graphs._kept) == 2 + 4


def test_kept_graphs_are_bounded_by_number(
    cupy: fake_cupy.FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    assert_right(cupy, 5)
    assert len(graphs._kept) == 2
    drawn = draw(Case("", T=5, n=n + 1, d=d, h=h), dtype=np.float32)
    arguments = [cupy.new(a) for a in drawn.arguments()]
    _, residuals = F.rnn_forward(*arguments, kernel="gemm")
    assert len(graphs._kept) == 3
    assert all(graph() is not None for graph in cupy.graphs)
    del cupy.order[:]
    F.rnn_backward(cupy.new(drawn.dH), residuals)
    assert len(graphs._kept) == 3
    gc.collect()
    alive = [graph() is not None for graph in cupy.graphs]
    assert alive == [False, False, True, True, True, True], "the first shape's forward graphs"
    assert cupy.order[0][0] == "synchronize", "its memory is free when its last use is over"
    assert_right(cupy, 5)


def test_kept_graphs_are_bounded_by_their_memory(
    cupy: fake_cupy.FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_BYTES", cublas.WORKSPACE)
    for _ in range(2):
        assert_right(cupy, 5)
        assert len(graphs._kept) == 1, "the one used last"
    graphs.forget()
    gc.collect()
    assert not graphs._kept
    assert all(graph() is None for graph in cupy.graphs)
    assert_right(cupy, 5)


def test_a_graph_keeps_its_kernel_loaded(cupy: fake_cupy.FakeCuPy) -> None:
    expected, run = both(5)
    run(cupy)
    engines._function.cache_clear()  # others came
    gc.collect()
    for name, a in run(cupy).items():
        assert_same_bits(name, a.view(np.ndarray), expected[name])


def test_devices_have_graphs_and_handles_of_their_own(cupy: fake_cupy.FakeCuPy) -> None:
    drawn = draw(case(5), dtype=np.float32)
    for device in (0, 3, 0):
        with cupy.cuda.Device(device):
            arguments = [cupy.new(a) for a in drawn.arguments()]
            dH = cupy.new(drawn.dH)
        H, residuals = F.rnn_forward(*arguments, kernel="gemm")
        found = [a for a in (H, *F.rnn_backward(dH, residuals)) if a is not None]
        assert {a.device.id for a in found} == {device}  # type: ignore[attr-defined]
    assert len(graphs._kept) == 4
    assert sorted(cupy.cublas.devices.values()) == [0, 3]
    assert not cupy.cublas.faults


# ---------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------


def test_uses_on_two_streams_take_turns(cupy: fake_cupy.FakeCuPy) -> None:
    first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    arguments = [cupy.new(a) for a in draw(case(5), dtype=np.float32).arguments()]
    F.rnn_forward(*arguments, kernel="gemm")
    del cupy.order[:]
    for stream in (first, second):
        with stream:
            F.rnn_forward(*arguments, kernel="gemm")
    (what, where, events) = zip(*cupy.order, strict=True)
    assert what == ("wait", "record") * 2
    assert where == (first.ptr, first.ptr, second.ptr, second.ptr)
    assert len(set(map(id, events))) == 1
    assert len(cupy.graphs) == 2, "one graph serves all streams"


def test_the_first_use_waits_until_what_it_may_overwrite_is_done(
    cupy: fake_cupy.FakeCuPy,
) -> None:
    arguments = [cupy.new(a) for a in draw(case(5), dtype=np.float32).arguments()]
    F.rnn_forward(*arguments, kernel="gemm")
    # the current stream; a step on zeros, on another stream; and that
    assert cupy.streams[:3] == ["wait", "kernel", "wait"]
    F.rnn_forward(*arguments, kernel="gemm")
    assert "wait" not in cupy.streams[3:]


def captured(cupy: fake_cupy.FakeCuPy, run: Any) -> tuple[Any, dict[str, Any]]:
    """Capture a pass as a caller does, who gives the graph a memory pool of its own."""
    cupy.pool = []
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        found = run(cupy)
        return stream.end_capture(), found


def test_within_a_capture_of_the_caller(cupy: fake_cupy.FakeCuPy) -> None:
    """Steps go into that capture, one by one, with products before and after: no graph in it."""
    expected, run = both(9)
    run(cupy)
    before, replayed = len(cupy.graphs), len(cupy.replays)
    del cupy.cublas.calls[:], cupy.streams[:]
    graph, found = captured(cupy, run)
    assert "wait" not in cupy.streams
    assert len(cupy.graphs) == before + 1
    assert len(cupy.replays) == replayed
    names = [name for name, _ in cupy.cublas.calls]
    assert "cublasSetWorkspace_v2" not in names, "whoever keeps the graph has the workspace"
    assert names.count("cublasGemmEx") == 9 + 9 + 1 + 3  # X W_xh; dW_hh, dW_xh, dX
    for _ in range(2):
        for name in ("dX", "dW_xh", "dW_hh", "db_h"):
            found[name].fill(np.nan)
        graph.launch()
        for name, a in found.items():
            assert_same_bits(name, a.view(np.ndarray), expected[name])
    assert not cupy.cublas.faults


@pytest.mark.parametrize("kernel", ["resident", "step"])
def test_other_kernels_within_a_capture_of_the_caller(
    cupy: fake_cupy.FakeCuPy, kernel: str
) -> None:
    """Their products are made by cuBLAS without CuPy, too."""
    expected, run = both(4, kernel=kernel)
    run(cupy)
    graph, found = captured(cupy, run)
    graph.launch()
    for name, a in found.items():
        assert_same_bits(name, a.view(np.ndarray), expected[name])


def test_one_thread_at_a_time(cupy: fake_cupy.FakeCuPy) -> None:
    def use() -> Any:
        def make() -> Any:
            return gemm._Forward(*(cupy.zeros(1, np.float32) for _ in range(5)), None)

        return graphs.replayed(cupy.cuda, "key", make, lambda arrays, steps: None)

    entered = threading.Event()

    def other() -> None:
        with use():
            entered.set()

    thread = threading.Thread(target=other)
    with use():
        thread.start()
        assert not entered.wait(0.1)
    thread.join(10)
    assert entered.is_set()


# ---------------------------------------------------------------------------------------
# What goes wrong
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "status", "message"),
    [
        ("cublasCreate_v2", 1, r"cublasCreate_v2: CUBLAS_STATUS_NOT_INITIALIZED \(1\)"),
        ("cublasSetMathMode", 7, r"cublasSetMathMode: CUBLAS_STATUS_INVALID_VALUE \(7\)"),
        ("cublasSetStream_v2", 1, r"cublasSetStream_v2: CUBLAS_STATUS_NOT_INITIALIZED \(1\)"),
        ("cublasSetWorkspace_v2", 7, r"cublasSetWorkspace_v2: CUBLAS_STATUS_INVALID_VALUE \(7\)"),
        ("cublasGemmEx", 13, r"cublasGemmEx: CUBLAS_STATUS_EXECUTION_FAILED \(13\)"),
        ("cublasGemmEx", 99, r"cublasGemmEx: unknown status \(99\)"),
    ],
)
def test_a_status_is_an_error(
    cupy: fake_cupy.FakeCuPy, function: str, status: int, message: str
) -> None:
    cupy.cublas.statuses[function] = status
    expected, run = both(5)
    with pytest.raises(CuBLASError, match=f"^{message}$"):
        run(cupy)
    assert not graphs._kept and not cupy.graphs
    assert cupy.cuda.Device().id == 0 and cupy.stream.ptr == 0
    cupy.cublas.statuses.clear()
    for name, a in run(cupy).items():
        assert_same_bits(name, a.view(np.ndarray), expected[name])


@pytest.mark.parametrize("invalid", [False, True])
def test_an_error_within_a_capture(cupy: fake_cupy.FakeCuPy, invalid: bool) -> None:
    """It is the one that is seen, though to end the capture may fail as well."""
    assert_right(cupy, 4)
    cupy.cublas.statuses["cublasGemmEx"], cupy.invalid = 14, invalid
    _, run = both(6)
    del cupy.order[:]
    with pytest.raises(CuBLASError, match="CUBLAS_STATUS_INTERNAL_ERROR"):
        run(cupy)
    assert [what for what, *_ in cupy.order] == ["wait", "record"], "the next use waits for it"
    cupy.cublas.statuses.clear()
    cupy.invalid = False
    assert_right(cupy, 6)


def test_a_capture_that_comes_to_nothing(cupy: fake_cupy.FakeCuPy) -> None:
    cupy.invalid = True
    _, run = both(5)
    with pytest.raises(fake_cupy.CUDARuntimeError, match="cudaErrorStreamCaptureInvalidated"):
        run(cupy)
    cupy.invalid = False
    assert_right(cupy, 5)


def test_without_memory_for_a_graph(cupy: fake_cupy.FakeCuPy) -> None:
    _, run = both(5)
    for left in range(7):  # the states, and what the graph works on
        cupy.allocations_left = left
        with pytest.raises(MemoryError, match="out of memory"):
            run(cupy)
        assert not graphs._kept
    cupy.allocations_left = None
    assert_right(cupy, 5)


def test_without_cublas(cupy: fake_cupy.FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        assert name == "cublas"
        raise RuntimeError("libcublas.so.13 was not found")

    monkeypatch.undo()
    pathfinder = pytest.importorskip("cuda.pathfinder")
    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", missing)
    with pytest.raises(
        RuntimeError, match=r"^cuBLAS could not be loaded \(libcublas.so.13 was not found\): inst"
    ):
        cublas._functions()


# ---------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------

WRITTEN = [
    (np.float32, np.float32),
    (np.float64, np.float64),
    (np.float16, np.float16),
    (np.float16, np.float32),
    (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
    (ml_dtypes.bfloat16, np.float32),
]


@pytest.mark.parametrize(("dtype", "written"), WRITTEN)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 3), (5, 1, 2), (2, 3, 1), (3, 7, 5)])
def test_products(
    cupy: fake_cupy.FakeCuPy, shape: tuple[int, int, int], dtype: Any, written: Any
) -> None:
    """Of matrices and their transposes; small integers, which every type has exactly."""
    m, k, q = shape
    rng = np.random.default_rng(0)
    a, b = rng.integers(-3, 4, (m, k)), rng.integers(-3, 4, (k, q))
    for A in (cupy.new(a.astype(dtype)), cupy.new(a.T.astype(dtype)).T):
        for B in (cupy.new(b.astype(dtype)), cupy.new(b.T.astype(dtype)).T):
            out = cupy.new(np.full((m, q), np.nan, written))
            workspace = cupy.empty(cublas.WORKSPACE, np.uint8)
            cublas.product(0, 0, A, B, out, workspace=workspace)
            assert not cupy.cublas.faults
            assert_same_bits("product", out.view(np.ndarray), (a @ b).astype(written))


def test_what_a_product_is_computed_with(cupy: fake_cupy.FakeCuPy) -> None:
    computed = []
    for dtype, precision in (
        (np.float32, "ieee"),
        (np.float32, "tf32"),
        (np.float64, "ieee"),
        (np.float16, "ieee"),
    ):
        A = cupy.new(np.ones((2, 2), dtype))
        cublas.product(0, 0, A, A, cupy.new(np.ones((2, 2), dtype)), precision=precision)
        name, arguments = cupy.cublas.calls[-1]
        assert name == "cublasGemmEx"
        computed.append(arguments[-2])
    assert computed == [68, 77, 70, 68]
    assert not cupy.cublas.faults


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": np.ones((2, 3), np.int32)}, "A has dtype int32: expected one of float32, float64"),
        ({"precision": "fast"}, "precision is 'fast': expected one of ieee, tf32"),
        ({"A": np.ones((2, 4), np.float32)}, r"\(2, 4\) and \(3, 4\) into \(2, 4\): shapes do not"),
        ({"out": np.ones((2, 5), np.float32)}, r"into \(2, 5\): shapes do not fit"),
        ({"B": np.ones((3, 4))}, "of float32 and float64 into float32: expected one dtype"),
        ({"out": np.ones((2, 4))}, "of float32 and float32 into float64: expected one dtype"),
        ({"out": np.ones((4, 2), np.float32).T}, "out is not C-contiguous"),
        ({"A": np.ones((2, 6), np.float32)[:, ::2]}, "A is neither C-contiguous nor the transpose"),
        ({"B": np.ones((6, 4), np.float32)[::2]}, "B is neither C-contiguous nor the transpose"),
        (
            {"A": np.ones((2, 0), np.float32), "B": np.ones((0, 4), np.float32)},
            r"expected sizes from 1 to 2³¹ − 1",
        ),
    ],
)
def test_products_that_are_refused(
    cupy: fake_cupy.FakeCuPy, change: dict[str, Any], message: str
) -> None:
    ones = {"A": (2, 3), "B": (3, 4), "out": (2, 4)}
    given: dict[str, Any] = {name: np.ones(shape, np.float32) for name, shape in ones.items()}
    given.update(change)
    precision = given.pop("precision", "ieee")
    with pytest.raises(ValueError, match=message):
        cublas.product(0, 0, *given.values(), precision=precision)
    assert not cupy.cublas.calls


def test_tf32_is_for_float32(cupy: fake_cupy.FakeCuPy) -> None:
    A = cupy.new(np.ones((2, 2)))
    with pytest.raises(ValueError, match="'tf32' and A has dtype float64: expected float32"):
        cublas.product(0, 0, A, A, A, precision="tf32")
