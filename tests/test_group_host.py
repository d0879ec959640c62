"""Group kernels from the host's side, without a GPU: what is launched, and what is reported."""

from collections.abc import Iterator
from typing import Any

import fake_cupy
import numpy as np
import pytest
from cases import SMALL, draw
from cuda.bindings import driver
from group_setup import EXCHANGES
from kernel_setup import NAMES, exact, results
from tolerance import assert_close, assert_same_bits

import gpurnn
from gpurnn import functional as F
from gpurnn.cuda import engines, launching, reports
from gpurnn.cuda.specs import KernelSpec
from gpurnn.planning import Group

ODD = next(case for case in SMALL if case.name == "odd")

each_exchange = pytest.mark.parametrize("exchange", EXCHANGES)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cupy.FakeCuPy]:
    yield fake_cupy.install(monkeypatch)
    fake_cupy.clear()


def run(cupy: fake_cupy.FakeCuPy, drawn: Any, kernel: Any, xi: Any = None) -> dict[str, Any]:
    arguments = [cupy.new(a) for a in drawn.arguments()]
    H, residuals = F.rnn_forward(*arguments, kernel=kernel)
    gradients = F.rnn_backward(cupy.new(drawn.dH), residuals, xi=xi)
    return dict(zip(NAMES, (H, *gradients), strict=True))


def forward(cupy: fake_cupy.FakeCuPy, drawn: Any, kernel: Any) -> Any:
    return F.rnn_forward(*(cupy.new(a) for a in drawn.arguments()), kernel=kernel)[0]


@each_exchange
def test_as_the_reference(cupy: fake_cupy.FakeCuPy, exchange: str) -> None:
    """Packed arguments, scratch, report and configuration are what the kernels take."""
    drawn = draw(ODD, dtype=np.float32)
    cupy.stream_stack.append(fake_cupy.Stream(cupy, ptr=7))
    found = run(cupy, drawn, Group(2, exchange, rows=1))
    truth, baseline = exact(drawn), results(drawn)
    for name, a in found.items():
        assert isinstance(a, fake_cupy.Array)
        assert_close(name, a, truth[name], length=ODD.length, baseline=baseline[name])
    plan = gpurnn.plan(
        **{k: getattr(ODD, k) for k in "Tndh"}, device=0, kernel=Group(2, exchange, rows=1)
    )
    wanted = {"cluster": 2} if exchange == "cluster" else {"cooperative": 1}
    launched = fake_cupy.Extended(plan.grid, plan.block, plan.shared, 7, wanted)
    assert cupy.extended == [launched, launched]
    assert [spec.exchange for spec, _ in cupy.launches] == [exchange, exchange, None]
    assert cupy.launches[-1][0].kind == "column_sums"  # db_h


@each_exchange
def test_the_same_bits_as_under_the_emulator(cupy: fake_cupy.FakeCuPy, exchange: str) -> None:
    drawn = draw(ODD, dtype=np.float32)
    xi = np.array([2, 0, 1, 0.5, 1.5], np.float32)
    with gpurnn.emulated():
        expected = results(drawn, kernel=Group(2, exchange, 3), xi=xi)  # type: ignore[arg-type]
    found = run(cupy, drawn, Group(2, exchange, 3), cupy.new(xi))
    for name, a in found.items():
        assert_same_bits(name, a.view(np.ndarray), expected[name])


def test_rows_that_no_launch_owns_at_once_are_launched_again(
    cupy: fake_cupy.FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group of 3 blocks runs at once on 4 multiprocessors: 2 rows take two launches."""
    monkeypatch.setitem(fake_cupy.ATTRIBUTES, 16, 4)
    arguments = [cupy.new(np.ones(shape, np.float32)) for shape in ((2, 2, 1), (2, 4), (1, 4))]
    W_hh = cupy.new(np.eye(4, dtype=np.float32))
    H, _ = F.rnn_forward(*arguments, W_hh, None, kernel=Group(3, "flags", rows=1))
    np.testing.assert_allclose(H[1], np.tanh(1 + np.tanh(2)), rtol=1e-6)
    assert [launched.grid for launched in cupy.extended] == [(3, 1, 1)] * 2


def test_a_large_cluster_is_asked_for(cupy: fake_cupy.FakeCuPy) -> None:
    for blocks in (8, 16):
        plan = gpurnn.plan(T=1, n=1, d=1, h=512, device=0, kernel=Group(blocks, "cluster"))
        spec = KernelSpec("group_forward", plan.tile, "tanh", "float32", False, "cluster")
        function = engines._function(spec, 0, plan.shared, plan.cluster)
        assert cupy.large_clusters == ([function.ptr] if blocks > 8 else [])
        assert cupy.allowed[function.ptr] == plan.shared


@each_exchange
def test_a_refusal_says_what_was_asked(cupy: fake_cupy.FakeCuPy, exchange: str) -> None:
    drawn = draw(ODD, dtype=np.float32)
    cupy.result = driver.CUresult.CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
    how = "clusters of 2" if exchange == "cluster" else "all at once"
    with pytest.raises(
        RuntimeError,
        match=rf"^CUDA refuses a launch of \d+ blocks \({how}\) of \d+ threads, [\d,]+ bytes of "
        "dynamic shared memory: CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE$",
    ):
        run(cupy, drawn, Group(2, exchange))
    with pytest.raises(RuntimeError, match=r"^CUDA refuses leave for clusters of 16 blocks: CUDA_"):
        launching.allow_clusters(1234, 16)


def test_a_cluster_that_does_not_divide_the_grid() -> None:
    with pytest.raises(ValueError, match=r"^cluster is 4 and grid \(6, 1, 1\): expected a cluster"):
        launching.launch(1, (6, 1, 1), (32, 1, 1), (), shared=0, stream=0, cluster=4)


def test_without_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.driver", None)
    advice = r"cuda-bindings, and cuda\.bindings\.driver could .*pip install 'gpurnn\[cuda13\]'"
    with pytest.raises(ImportError, match=advice):
        launching.launch(1, (1, 1, 1), (32, 1, 1), (), shared=0, stream=0)


def test_a_block_that_gave_up_makes_the_next_call_raise_once(
    cupy: fake_cupy.FakeCuPy,
) -> None:
    drawn = draw(ODD, dtype=np.float32)
    kernel = Group(2, "flags", 3)
    expected = forward(cupy, drawn, kernel)
    assert len(cupy.pinned) == 1, "one report for each device"
    assert not any(cupy.pinned[0]), "the host clears it, the kernel says nothing"
    words = np.frombuffer(cupy.pinned[0], np.uint32)
    words[[0, 1]] = 7, 6
    with pytest.raises(
        RuntimeError,
        match=r"^a group kernel on CUDA device 0 gave up: block 0 waited in vain for the others at "
        r"exchange 7 of its sequence, and so did 1 more",
    ):
        forward(cupy, drawn, kernel)
    assert not words.any()
    assert_same_bits("H", forward(cupy, drawn, kernel), expected)


def test_a_kernel_reports_where_the_host_looks(
    cupy: fake_cupy.FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block of the grid is left out: its group gives up in its first exchange."""
    drawn = draw(ODD, dtype=np.float32)
    kernel = Group(3, "flags")
    monkeypatch.setattr(reports, "PATIENCE", 20)
    whole = fake_cupy.Function.run

    def without_the_last(self: Any, grid: Any, *rest: Any) -> None:
        whole(self, (grid[0] - 1, 1, 1), *rest)

    arguments = [cupy.new(a) for a in drawn.arguments()]
    with monkeypatch.context() as missing:
        missing.setattr(fake_cupy.Function, "run", without_the_last)
        H, _ = F.rnn_forward(*arguments, kernel=kernel)
    assert np.isnan(H[1:, -1, :4]).all(), "the columns of a block that waited"
    blocks = cupy.extended[0].grid[0]
    with pytest.raises(RuntimeError, match=rf"block {blocks - 3} waited .* exchange 1 .* 1 more"):
        F.rnn_forward(*arguments, kernel=kernel)
    H, _ = F.rnn_forward(*arguments, kernel=kernel)
    assert np.isfinite(H).all()


def test_each_device_has_its_own_report(cupy: fake_cupy.FakeCuPy) -> None:
    drawn = draw(ODD, dtype=np.float32)
    for device in (0, 3):
        with cupy.cuda.Device(device):
            forward(cupy, drawn, Group(2, "counter", 3))
    np.frombuffer(cupy.pinned[1], np.uint32)[0] = 2
    forward(cupy, drawn, Group(2, "counter", 3))
    with cupy.cuda.Device(3), pytest.raises(RuntimeError, match="on CUDA device 3 gave up: block"):
        forward(cupy, drawn, Group(2, "counter", 3))


def test_a_grid_larger_than_the_report(cupy: fake_cupy.FakeCuPy) -> None:
    report = reports.mapped(cupy, 0)
    assert report.array(66).shape == (66,)
    with pytest.raises(ValueError, match=r"^a grid of 65,537 blocks: expected at most 65,536"):
        report.array(reports.MOST_BLOCKS + 1)
