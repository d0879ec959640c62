"""The group kernel on a GPU against the reference: every exchange, large shapes, a whole book."""

from typing import Any

import numpy as np
import pytest
from cases import CASES, Case, draw
from gpu_setup import GPU, assert_as_reference, cp, gpu, reference, results
from tolerance import assert_close, assert_same_bits

from gpurnn import functional as F
from gpurnn import tuned
from gpurnn.bench.probe import measure_probes
from gpurnn.bench.soak import run_soak
from gpurnn.cuda import reports
from gpurnn.cuda.engines import GPUEngine, limits_of
from gpurnn.cuda.specs import KernelSpec
from gpurnn.planning import Group, plan

__all__ = ["cp", "gpu"]  # fixtures

pytestmark = pytest.mark.gpu

EXCHANGES = ("cluster", "flags", "counter")
each_exchange = pytest.mark.parametrize("exchange", EXCHANGES)

LARGE = [
    Case(f"h={h}-n={n}", T=T, n=n, d=7, h=h)
    for h, n, T in (
        (257, 1, 50),
        (300, 33, 9),
        (512, 1, 100),
        (512, 64, 20),
        (640, 8, 20),
        (1000, 5, 12),
        (1024, 32, 12),
        (1536, 3, 8),
        (2000, 1, 8),
    )
]


@pytest.fixture(autouse=True)
def nobody_gave_up(gpu: GPU) -> Any:
    yield
    gpu.cp.cuda.get_current_stream().synchronize()
    reports.check(gpu.cp.cuda.Device().id)


def has(gpu: GPU, exchange: str) -> None:
    if exchange == "cluster" and not limits_of(gpu.cp.cuda.Device().id).largest_cluster:
        pytest.skip("this GPU has no clusters")


def group_results(gpu: GPU, drawn: Any, kernel: Any, **more: Any) -> dict[str, Any]:
    arguments = [gpu.put(a) for a in drawn.arguments()]
    H, residuals = F.rnn_forward(*arguments, kernel=kernel, **more)
    assert residuals.plan is not None and residuals.plan.kernel == "group"
    names = ("H", "dX", "dh_0", "dW_xh", "dW_hh", "db_h")
    found = (H, *F.rnn_backward(gpu.put(drawn.dH), residuals))
    return {name: gpu.get(a) for name, a in zip(names, found, strict=True)}


def assert_group(gpu: GPU, case: Case, kernel: Any) -> None:
    drawn = draw(case, dtype=np.float32)
    found = group_results(gpu, drawn, kernel)
    truth = reference(drawn, "tanh", np.float64)
    baseline = reference(drawn, "tanh", np.float32)
    for name, a in found.items():
        lost = baseline[name]
        assert_close(f"{kernel} {name}", a, truth[name], length=case.length, baseline=lost)


@pytest.mark.parametrize("case", CASES, ids=str)
@each_exchange
def test_small_cases(gpu: GPU, exchange: str, case: Case) -> None:
    has(gpu, exchange)
    assert_group(gpu, case, Group(2, exchange))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_as_planned(gpu: GPU, case: Case) -> None:
    assert_as_reference(gpu, case, draw(case, dtype=np.float32), kernel="group")


@pytest.mark.parametrize("blocks", [4, 8, 16, 24, 64, 132])
@each_exchange
def test_sizes_of_groups(gpu: GPU, exchange: str, blocks: int) -> None:
    has(gpu, exchange)
    limits = limits_of(gpu.cp.cuda.Device().id)
    case = Case("", T=9, n=6, d=3, h=512)
    kernel = Group(blocks, exchange)
    try:
        plan(T=9, n=6, d=3, h=512, device=limits, kernel=kernel)
    except ValueError as e:
        pytest.skip(str(e))
    assert_group(gpu, case, kernel)


def test_bits_do_not_depend_on_blocks_exchange_or_rows(gpu: GPU) -> None:
    drawn = draw(Case("", T=20, n=6, d=3, h=520), dtype=np.float32)
    arguments = [gpu.put(a) for a in drawn.arguments()]
    expected = None
    kernels = [Group(blocks, e) for e in ("flags", "counter") for blocks in (8, 20, 64)]
    if limits_of(gpu.cp.cuda.Device().id).largest_cluster:
        kernels += [Group(8, "cluster"), Group(16, "cluster")]
    kernels += [Group(16, "flags", rows) for rows in (2, 4, 6)]
    for kernel in kernels:
        H = gpu.get(F.rnn_forward(*arguments, kernel=kernel)[0])
        expected = H if expected is None else expected
        assert_same_bits(str(kernel), H, expected)


@each_exchange
def test_the_same_bits_every_time(gpu: GPU, exchange: str) -> None:
    has(gpu, exchange)
    drawn = draw(Case("", T=200, n=5, d=3, h=384), dtype=np.float32)
    first = group_results(gpu, drawn, Group(8, exchange))
    for _ in range(20):
        for name, a in group_results(gpu, drawn, Group(8, exchange)).items():
            assert_same_bits(name, a, first[name])


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "tf32"])
@pytest.mark.parametrize(("h", "n"), [(300, 3), (512, 32), (1024, 8), (1024, 64), (2048, 8)])
def test_tensor_cores(gpu: GPU, kind: str, h: int, n: int) -> None:
    dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    dtype = {"float16": np.float16, "bfloat16": dtypes.bfloat16, "tf32": np.float32}[kind]
    u = 2.0**-11 if kind == "tf32" else float(dtypes.finfo(dtype).eps) / 2
    case = Case("", T=9, n=n, d=7, h=h)
    drawn = draw(case).astype(dtype)
    precision = "tf32" if kind == "tf32" else "ieee"
    found = group_results(gpu, drawn, "group", precision=precision)
    truth = reference(drawn, "tanh", np.float64)
    for name, a in found.items():
        error = np.abs(a.astype(np.float64) - truth[name]).max()
        limit = 4 * case.T**0.5 * u * np.abs(truth[name]).max()
        assert error <= limit, f"{kind} {name}: {error:.3g} > {limit:.3g}"


def test_a_whole_book_in_one_launch_each_way(gpu: GPU) -> None:
    """T = 200,000 at n = 1, h = 512: finite, and the first steps are the reference's."""
    T, h, d = 200_000, 512, 28
    rng = np.random.default_rng(0)
    ids = rng.integers(0, d, (T, 1))
    W_xh = (rng.standard_normal((d, h)) / d**0.5).astype(np.float32)
    W_hh = (0.9 * rng.standard_normal((h, h)) / h**0.5).astype(np.float32)
    b_h = np.zeros(h, np.float32)
    arguments = [gpu.put(a) for a in (ids, None, W_xh, W_hh, b_h)]
    H, residuals = F.rnn_forward(*arguments, kernel="group")
    assert residuals.plan is not None and residuals.plan.launches == 1
    expected, _ = F.rnn_forward(ids[:200], None, W_xh, W_hh, b_h)
    np.testing.assert_allclose(gpu.get(H[:200]), expected, atol=1e-4)
    dH = gpu.cp.zeros_like(H)
    dH[-1] = 1
    _, dh_0, dW_xh, dW_hh, db_h = F.rnn_backward(dH, residuals)
    for a in (H, dh_0, dW_xh, dW_hh, db_h):
        assert bool(gpu.cp.isfinite(a).all())


def test_more_elements_than_32_bits_count(gpu: GPU) -> None:
    T, n, h = 2_200_000, 2, 512
    if gpu.free() < 14 * T * n * h:
        pytest.skip("not enough memory")
    cp = gpu.cp
    ids = cp.zeros((T, n), np.int32)
    ids[-3:] = 1
    W_xh = cp.stack([cp.zeros(h), cp.linspace(-1, 1, h)]).astype(np.float32)
    W_hh = (0.5 * cp.eye(h)).astype(np.float32)
    H, _ = F.rnn_forward(ids, None, W_xh, W_hh, None, kernel="group")
    assert float(cp.abs(H[: T - 3]).max()) == 0
    expected, _ = F.rnn_forward(gpu.get(ids[-5:]), None, gpu.get(W_xh), gpu.get(W_hh), None)
    np.testing.assert_allclose(gpu.get(H[-5:]), expected, atol=1e-5)


def test_a_launch_that_cannot_be_resident_is_refused(gpu: GPU) -> None:
    """What plan() would not offer: CUDA says no, instead of hanging."""
    index = gpu.cp.cuda.Device().id
    engine, limits = GPUEngine(index), limits_of(index)
    found = plan(T=2, n=1, d=1, h=512, device=limits, kernel=Group(8, "flags"))
    spec = KernelSpec("group_forward", found.tile, "tanh", "float32", False, "flags")
    zeros = gpu.cp.zeros
    arrays = [zeros(2 * 512, np.float32), zeros(3 * 512, np.float32), zeros((512, 512), np.float32)]
    arrays += [zeros(512, np.float32), engine.scratch((1 << 22,)), engine.report(1)]
    with pytest.raises(RuntimeError, match="COOPERATIVE_LAUNCH_TOO_LARGE"):
        engine.launch(
            spec,
            (8 * 40 * limits.multiprocessors, 1, 1),
            found.block,
            arrays,
            [(2, 1, 0, 1000)],
            found.shared,
            cooperative=True,
        )


def test_a_block_that_never_comes_is_reported(gpu: GPU) -> None:
    """A grid that lacks a block: the others give up, and the next call says so."""
    index = gpu.cp.cuda.Device().id
    engine = GPUEngine(index)
    found = plan(T=4, n=1, d=1, h=512, device=limits_of(index), kernel=Group(8, "flags"))
    spec = KernelSpec("group_forward", found.tile, "tanh", "float32", False, "flags")
    zeros = gpu.cp.zeros
    states = zeros(5 * 512, np.float32)
    arrays = [zeros(4 * 512, np.float32), states, zeros((512, 512), np.float32)]
    arrays += [zeros(512, np.float32), engine.scratch((1 << 16,)), engine.report(7)]
    engine.launch(
        spec, (7, 1, 1), found.block, arrays, [(4, 1, 0, 1000)], found.shared, cooperative=True
    )
    engine.settle()
    with pytest.raises(RuntimeError, match="block 0 waited in vain"):
        engine.check_reports()
    engine.check_reports()
    assert bool(gpu.cp.isnan(states[2 * 512 : 2 * 512 + 400]).all())


def test_within_a_capture_of_the_caller(gpu: GPU) -> None:
    drawn = draw(Case("", T=5, n=3, d=4, h=300), dtype=np.float32)
    expected = results(gpu, drawn, "tanh", "group")["H"]
    arguments = [gpu.put(a) for a in drawn.arguments()]
    pool = gpu.cp.cuda.MemoryPool()
    stream = gpu.cp.cuda.Stream(non_blocking=True)
    gpu.cp.cuda.Device().synchronize()
    with stream, gpu.cp.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        H, _ = F.rnn_forward(*arguments, kernel="group")
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch()
        stream.synchronize()
    assert_same_bits("H", gpu.get(H), expected)


def test_probes(gpu: GPU) -> None:
    """Each does what it is timed for, and all that this GPU can do is measured."""
    limits = limits_of(gpu.cp.cuda.Device().id)
    found = measure_probes(seconds=0.02).latencies
    assert found.measured
    assert [size for size, _ in found.cluster] == [
        size for size in tuned.CLUSTERS if size <= limits.largest_cluster
    ]


def test_a_short_soak(gpu: GPU) -> None:
    outcomes = list(run_soak(40, kernel="group", limit=30.0))
    assert any(outcome.checked for outcome in outcomes)
