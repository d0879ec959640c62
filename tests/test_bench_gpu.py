"""The GPU's benchmark, with the emulator for a GPU and a clock that is none."""

import dataclasses
import json
import math
import os
import signal
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from group_setup import SMALL_CARD
from typer.testing import CliRunner

from gpurnn import emulated, planning, validate
from gpurnn.bench import (
    GPU_RUNS,
    GRIDS,
    GROUP_RUNS,
    Run,
    Shape,
    ahead,
    clocks,
    common,
    floors,
    gpu_environment,
    gpu_summary,
    measure_gpu,
    measure_overhead,
    peers,
    plot,
)
from gpurnn.bench import __main__ as bench_module
from gpurnn.bench.launches import RecordingEngine
from gpurnn.cli import app
from gpurnn.cli.bench import COLUMNS
from gpurnn.cuda import operations
from gpurnn.cuda.engines import Engine, current_emulation
from gpurnn.cuda.specs import KernelSpec
from gpurnn.planning import Group

pytest.importorskip("greenlet", reason="the emulator needs greenlet")
pytest.importorskip("numba.cuda", reason="the kernels need numba-cuda")

H100 = planning.DEVICES["H100"]
TINY = Run("grid", Shape(5, 3, 4, 8))


class FakeClock:
    """Runs a pass once and says what it was told to: 10 µs more for each figure."""

    def __init__(self, captures: bool = True) -> None:
        self.asked: list[str] = []
        self.captures = captures

    def _figure(self, kind: str, run: Callable[[], object]) -> dict[str, Any]:
        run()
        self.asked.append(kind)
        return common.figure([10.0 * len(self.asked)] * 3, 3)

    def device(self, run: Callable[[], object], seconds: float) -> dict[str, Any]:
        return self._figure("device", run)

    def wall(self, run: Callable[[], object], seconds: float) -> dict[str, Any]:
        return self._figure("wall", run)

    def host(self, run: Callable[[], object], seconds: float) -> dict[str, Any]:
        return self._figure("host", run)

    def graph(self, run: Callable[[], object], seconds: float) -> dict[str, Any]:
        if not self.captures:
            raise clocks.NotCapturedError("cannot be captured: NotImplementedError: cuBLAS")
        return self._figure("graph", run)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with emulated(check_races=False):
        found = current_emulation()
        assert found is not None
        yield found


def measured(engine: Engine, *runs: Run, **options: Any) -> list[dict[str, Any]]:
    options.setdefault("clock", FakeClock())
    return list(measure_gpu(runs=runs, engine=engine, **options))


def test_record(engine: Engine) -> None:
    clock = FakeClock()
    (record,) = measured(engine, TINY, clock=clock)
    assert clock.asked[:7] == ["device"] * 4 + ["wall"] * 2 + ["host"]
    assert record["shape"] == vars(TINY.shape)
    assert record["kernel"] == "resident"
    assert record["launches"] == {"forward": 1, "backward": 1}
    assert 0 < record["error"] < 1e-5
    assert record["checked_steps"] == 5
    figures = {name: f["median"] for name, f in record["times_us"].items()}
    assert figures == {
        "recurrence_forward": 10.0,
        "recurrence_backward": 20.0,
        "forward": 30.0,
        "forward_backward": 40.0,
        "forward_wall": 50.0,
        "forward_backward_wall": 60.0,
        "forward_host": 70.0,
    }
    assert record["us_per_step"] == {name: us / 5 for name, us in figures.items()}
    floor = record["floor"]["us_per_step"]
    assert floor == floors.floor(3, 8, "float32", H100).us_per_step
    assert record["over_floor"]["recurrence_backward"] == pytest.approx(20 / 5 / floor)
    loop = record["peers"]["cupy_loop"]
    assert record["ratios"]["cupy_loop"] == {"forward": loop["forward"]["median"] / 30.0}
    json.dumps(record, allow_nan=False)


def test_torch_is_compared_in_both_precisions(engine: Engine) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    (record,) = measured(engine, TINY)
    for name in ("torch_ieee", "torch_tf32"):
        peer = record["peers"][name]
        assert peer["error"] < 1e-5  # every gradient is matched; without a GPU there is no TF32
        for what, ours in (("forward", 30.0), ("forward_backward", 40.0)):
            assert record["ratios"][name][what] == peer[what]["median"] / ours


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(engine: Engine, dtype: str) -> None:
    (record,) = measured(engine, Run("dtypes", Shape(5, 3, 4, 8), dtype=dtype))
    assert record["error"] < common.ERROR_LIMITS[dtype]
    for name, peer in record["peers"].items():
        assert "failed" not in peer, (name, peer)


def test_ids(engine: Engine) -> None:
    run = Run("book", Shape(4, 5, 6, 8), ids=True)
    (record,) = measured(engine, run, clock=FakeClock(captures=False))
    assert record["error"] < 1e-5
    assert record["times_us"]["forward_backward_graph"] == {
        "failed": "cannot be captured: NotImplementedError: cuBLAS"
    }
    assert "forward_backward_graph" not in record["us_per_step"]
    assert not [peer for peer in record["peers"].values() if "failed" in peer]
    for peer in record["peers"].values():
        assert "one-hot floats" in peer["input"]


@pytest.mark.parametrize("ids", [False, True])
def test_peers_compute_the_gradients_that_we_compute(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, ids: bool
) -> None:
    """For ids there is no gradient of X, so theirs of the one-hot matrix is not timed either."""
    pytest.importorskip("torch", reason="torch is not installed")
    made: list[peers.TorchRNN] = []

    def torch_rnn(arguments: Any, dH: Any, wants_dX: bool) -> Any:
        made.append(peers.TorchRNN(arguments, dH, wants_dX, "ieee"))
        return made[-1]

    monkeypatch.setattr("gpurnn.bench.gpu.peers_for", lambda _: {"torch_ieee": torch_rnn})
    (record,) = measured(engine, Run("book", Shape(4, 5, 6, 8), ids=ids))
    assert record["peers"]["torch_ieee"]["error"] < 1e-5
    assert [(peer.X.grad is None, len(peer.results())) for peer in made] == [
        (ids, 5 if ids else 6)
    ] * 2


@pytest.mark.parametrize("exchange", planning.EXCHANGES)
def test_group_kernel_is_replayed_with_its_scratch_cleared(exchange: str) -> None:
    """Else a replay finds all blocks there already, and does not wait for them: a race."""
    with emulated(SMALL_CARD):
        engine = current_emulation()
        run = Run("group", Shape(3, 2, 4, 7), kernel=Group(2, exchange), peers=False)
        (record,) = measured(engine, run)  # type: ignore[arg-type]
    assert record["kernel"] == "group" and record["kernel_asked"].startswith("Group(blocks=2")
    assert record["error"] < 1e-5
    assert record["launches"] == {"forward": 1, "backward": 1}
    json.dumps(record, allow_nan=False)


def test_step_kernel_is_also_replayed_as_a_graph(engine: Engine) -> None:
    clock = FakeClock()
    (record,) = measured(engine, Run("wide", Shape(3, 2, 4, 5), kernel="step"), clock=clock)
    assert record["launches"] == {"forward": 3, "backward": 4}
    assert clock.asked[7:9] == ["graph", "graph"]
    assert "recurrence_backward_graph" in record["us_per_step"]


def test_long_problem_is_checked_on_its_first_steps(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpurnn.bench.gpu.MOST_CHECKED_STEPS", 4)
    shapes = []
    right = operations.rnn_forward

    def watched(*arguments: Any) -> Any:
        shapes.append(arguments[2].shape)
        return right(*arguments)

    monkeypatch.setattr(operations, "rnn_forward", watched)
    (record,) = measured(engine, Run("grid", Shape(10, 2, 3, 8), peers=False))
    assert record["checked_steps"] == 4
    assert shapes[0] == (4, 2, 3)
    assert set(shapes[1:]) == {(10, 2, 3)}


@pytest.mark.parametrize("spoil", [1.001, math.nan])
@pytest.mark.parametrize("place", range(5))
def test_wrong_result_is_not_timed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, spoil: float, place: int
) -> None:
    right = operations.rnn_backward

    def spoilt(*arguments: Any) -> Any:
        found = list(right(*arguments))
        found[place] = found[place] * np.float32(spoil)
        return tuple(found)

    monkeypatch.setattr(operations, "rnn_backward", spoilt)
    clock = FakeClock()
    (record,) = measured(engine, TINY, clock=clock)
    assert clock.asked == []
    assert "times_us" not in record
    assert "ArithmeticError: Shape(T=5, n=3, d=4, h=8), float32: relative" in record["failed"]
    assert gpu_summary([record])["failed"] == 1


def test_peer_that_is_wrong_or_fails_is_named(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(peers.CuPyLoop):
        def results(self) -> list[Any]:
            return [1.01 * a for a in super().results()]

    def broken(arguments: Any, dH: Any, wants_dX: bool) -> Any:
        raise RuntimeError("no kernel image")

    made = {"wrong": lambda a, dH, dX: Wrong(a), "broken": broken}
    monkeypatch.setattr("gpurnn.bench.gpu.peers_for", lambda _: made)
    (record,) = measured(engine, TINY)
    assert "ArithmeticError: wrong: relative error 1.00e-02" in record["peers"]["wrong"]["failed"]
    assert record["peers"]["broken"] == {"failed": "RuntimeError: no kernel image"}
    assert record["ratios"] == {}
    assert gpu_summary([record])["peers_failed"] == {"wrong": 1, "broken": 1}


def test_peer_that_waits_is_compared_with_our_waiting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waiting(peers.CuPyLoop):
        on_stream = False

    made = {"waiting": lambda a, dH, dX: Waiting(a)}
    monkeypatch.setattr("gpurnn.bench.gpu.peers_for", lambda _: made)
    clock = FakeClock()
    (record,) = measured(engine, TINY, clock=clock)
    assert clock.asked[-1] == "wall"
    peer = record["peers"]["waiting"]["forward"]["median"]
    assert record["ratios"]["waiting"] == {"forward": peer / 50.0}


def test_limit_leaves_the_rest_out(engine: Engine) -> None:
    records = measured(engine, TINY, TINY, limit=1e-9)
    assert ["left_out" in r for r in records] == [True, True]
    assert gpu_summary(records)["left_out"] == 2


def test_limit_within_a_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our figures stay; the peers, and a graph, that would come after the limit are left out."""
    now = [0.0]
    fake = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("gpurnn.bench.due.time", fake)

    class Slow(FakeClock):
        def _figure(self, kind: str, run: Callable[[], object]) -> dict[str, Any]:
            now[0] += 1.0
            return super()._figure(kind, run)

    run = Run("wide", Shape(3, 2, 4, 5), kernel="step")
    (record,) = measured(engine, run, clock=Slow(), limit=7.5)
    told = {"left_out": "the time limit was reached"}
    assert record["times_us"]["recurrence_backward_graph"] == told
    assert record["peers"]["cupy_loop"] == told
    assert record["ratios"] == {}
    assert gpu_summary([record])["peers_left_out"]["cupy_loop"] == 1
    now[0] = 0.0
    (record,) = measured(engine, run, clock=Slow(), limit=3.5)
    assert record == {**run.about(), **told}


def test_overhead(engine: Engine) -> None:
    clock = FakeClock()
    found = measure_overhead(engine=engine, clock=clock)
    assert clock.asked == ["device", "host", "host"]
    assert {name: f["median"] for name, f in found.items()} == {
        "launch_device": 10.0,
        "launch_host": 20.0,
        "rnn_forward_host": 30.0,
    }


def test_summary() -> None:
    def record(ratio: float) -> dict[str, Any]:
        return {"group": "grid", "ratios": {"torch_ieee": {"forward": ratio}}}

    def form(kernel: str, us: float) -> dict[str, Any]:
        times = {"forward": {"median": us}}
        shape = vars(Shape(1, 2, 3, 4))
        return {"group": "forms", "kernel": kernel, "shape": shape, "times_us": times}

    found = gpu_summary([record(2.0), record(8.0), form("step", 4.0), form("concatenated", 6.0)])
    assert found["ratios"]["torch_ieee"]["forward"] == {
        "geometric_mean": pytest.approx(4.0),
        "least": 2.0,
        "runs": 2,
    }
    assert found["concatenated_over_split"] == [{"shape": [1, 2, 3, 4], "forward": 1.5}]
    rounded = {**record(100.0), "group": "group-tf32", "precision": "tf32"}
    found = gpu_summary([record(2.0), record(8.0), rounded])
    assert found["ratios"]["torch_ieee"]["forward"]["runs"] == 2, "like with like"
    by_group = found["ratios_by_group"]
    assert set(by_group) == {"grid", "group-tf32"}
    assert by_group["group-tf32"]["torch_ieee"]["forward"]["least"] == 100.0


def test_runs_are_the_shapes_that_were_promised() -> None:
    grid = [run.shape for run in GPU_RUNS if run.group == "grid"]
    assert {(s.n, s.h) for s in grid} == {
        (n, h) for n in (1, 32, 128, 512) for h in (32, 64, 128, 192, 224, 256)
    }
    assert {s.T for s in grid} == {1024, 512, 585, 682}
    (book,) = (run for run in GPU_RUNS if run.group == "book")
    assert (book.shape, book.ids) == (Shape(32, 1024, 28, 32), True)
    assert {run.kernel for run in GPU_RUNS if run.group == "forms"} == {"step", "concatenated"}
    assert {run.shape.h for run in GPU_RUNS if run.group == "wide"} == {512, 1024}
    for run in GPU_RUNS:
        planning.plan(**vars(run.shape), dtype=run.dtype, device=H100, kernel=run.kernel)


def test_runs_of_the_group_kernel() -> None:
    """The issue's grid: h = 128 … 2048, n = 1 … 128, in three arithmetics, and a whole book."""
    whole, *grid = GROUP_RUNS
    assert (whole.shape.T, whole.shape.n, whole.shape.h) == (200_000, 1, 512)
    assert (whole.kernel, whole.peers) == ("group", False)
    kinds = {"group": ("float32", "ieee"), "group-tf32": ("float32", "tf32")}
    for group, kind in kinds.items():
        runs = [run for run in grid if run.group == group]
        assert {(run.dtype, run.precision) for run in runs} == {kind}
        assert {run.shape.h for run in runs} == {128, 256, 512, 1024, 2048}
        assert {run.shape.n for run in runs} == {1, 8, 32, 128}
    halves = [run for run in grid if run.group == "group-half"]
    assert {run.dtype for run in halves} == {"float16", "bfloat16"}
    assert len(grid) == 60 and all(run.peers and run.shape.d % 128 == 0 for run in grid)
    assert GRIDS["default"] is GPU_RUNS and GRIDS["all"] == (*GPU_RUNS, *GROUP_RUNS)
    for run in GROUP_RUNS:
        planning.plan(
            **vars(run.shape),
            dtype=run.dtype,
            device=H100,
            kernel=run.kernel,
            precision=run.precision,
        )


class Watching(RecordingEngine):
    """Remembers the kernels that are launched."""

    seen: set[KernelSpec]

    def launch(self, spec: KernelSpec, *rest: Any, **more: Any) -> None:
        self.seen.add(spec)
        super().launch(spec, *rest, **more)


@pytest.mark.parametrize(
    "kernel", ["step", "concatenated", "resident", "gemm", Group(2, "counter", 3)]
)
def test_kernels_compiled_ahead_are_those_that_run(engine: Engine, kernel: Any) -> None:
    watching = Watching(engine)
    watching.seen = set()
    X, h_0, W_xh, W_hh, b_h = common.Problem(TINY.shape).arguments(np.float32)
    phi = validate.activation("tanh")
    states, Z, plan = operations.rnn_forward(watching, kernel, X, h_0, W_xh, W_hh, b_h, phi)
    operations.rnn_backward(watching, plan, states[1:], X, states, Z, W_xh, W_hh, phi, None)
    assert watching.seen == set(ahead.specs_of(TINY.shape, "float32", kernel, H100))


@pytest.mark.parametrize(("T", "forward", "backward"), [(9, 2, 4), (3, 6, 7)])
def test_graphs_and_products_are_recorded(
    engine: Engine, T: int, forward: int, backward: int
) -> None:
    """Of 9 steps those of 8 + 1 and of 8, the last step's φ′ and dh_0 apart; of 3 each."""
    ahead, back = RecordingEngine(engine), RecordingEngine(engine)
    X, h_0, W_xh, W_hh, b_h = common.Problem(Shape(T, 2, 4, 5)).arguments(np.float32)
    phi = validate.activation("tanh")
    states, Z, plan = operations.rnn_forward(ahead, "gemm", X, h_0, W_xh, W_hh, b_h, phi)
    operations.rnn_backward(back, plan, states[1:], X, states, Z, W_xh, W_hh, phi, None)
    for recorded, count in ((ahead, forward), (back, backward)):
        assert recorded.count == len(recorded.launches) == count
        recorded.replay()
        assert recorded.count == len(recorded.launches) == count


def test_compiling_in_processes_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPURNN_CACHE", str(tmp_path))
    specs = ahead.specs_of(TINY.shape, "float32", "step", H100)
    assert ahead.compile_ahead(specs, (9, 0), processes=1) == []
    assert not (tmp_path / "kernels").exists()
    cut = ahead.compile_ahead(specs, (9, 0), processes=2, limit=0.0)
    assert len(cut) <= 1  # what was begun is waited for
    wrong = dataclasses.replace(specs[0], dtype="float8")
    (failure,) = ahead.compile_ahead([*specs, *specs, wrong], (9, 0), processes=2)
    assert failure == "step_forward 16 float8: KeyError: 'float8'"
    assert len(list((tmp_path / "kernels").glob("*.cubin"))) == 3


def test_floor_by_hand() -> None:
    assert floors.floor(1, 32, "float32", H100) == floors.Floor(250 / 1755, "latency", 1)
    rows = math.ceil(512 / 132)
    resident = rows * 128**2 / 128 / 1755
    found = floors.floor(512, 128, "float32", H100)
    assert (found.bound, found.group) == ("multiply-adds", 1)
    assert found.us_per_step == pytest.approx(resident)
    assert floors.floor(512, 128, "float64", H100).us_per_step >= 1.9 * resident
    wide = floors.floor(32, 1024, "float32", H100)
    assert wide.group > 10  # W_hh takes 4 MiB
    assert 0.9 < wide.us_per_step < 1.7  # the estimate by hand counts the exchange on top
    tensor = floors.floor(32, 1024, "float16", H100, tensor=True)
    assert tensor.us_per_step < wide.us_per_step
    pair = floors.floor(1, 256, "float32", H100)
    if pair.group > 1:  # a cluster's blocks are nearer to one another than to L2
        assert pair.us_per_step <= (planning.LATENCY + 180) / 1755 + 1e-9
    assert floors.estimate(32, 1024, "float32", H100) == (1.7, 1.7)
    assert floors.estimate(1, 100, "float32", H100) == (0.2, 0.4)
    assert floors.estimate(1, 4096, "float32", H100) is None


def test_estimate_by_hand_is_of_one_device_and_dtype() -> None:
    other = dataclasses.replace(H100, name="NVIDIA A100")
    assert floors.estimate(1, 100, "float32", other) is None
    assert floors.estimate(1, 100, "float16", H100) is None


@pytest.mark.parametrize(
    ("kernel", "dtype", "precision", "assumed"),
    [
        ("gemm", "float16", "ieee", "tensor cores"),
        ("gemm", "float32", "tf32", "tensor cores"),
        ("gemm", "float32", "ieee", "no tensor cores"),
        ("resident", "float16", "ieee", "no tensor cores"),
    ],
)
def test_floor_is_that_of_the_arithmetic(
    engine: Engine, kernel: str, dtype: str, precision: str, assumed: str
) -> None:
    run = Run("", Shape(3, 2, 4, 5), dtype, kernel, peers=False, precision=precision)
    (record,) = measured(engine, run)
    assert record["floor"]["assumes"] == assumed
    assert record["precision"] == precision


def test_concatenated_kernel_is_held_to_no_floor_of_the_recurrence(engine: Engine) -> None:
    shape = Shape(3, 2, 4, 5)
    runs = [Run("forms", shape, kernel=k, peers=False) for k in ("step", "concatenated")]
    step, concatenated = measured(engine, *runs)
    assert set(step["over_floor"]) == {
        "recurrence_forward",
        "recurrence_backward",
        "recurrence_forward_graph",
        "recurrence_backward_graph",
    }
    assert step["floor"]["assumes"] == "no tensor cores"
    assert "over_floor" not in concatenated


def test_samples_fill_their_time() -> None:
    assert clocks.plan_samples(100.0, 1.0) == (500, 20)
    assert clocks.plan_samples(1e6, 0.1) == (clocks.LEAST_SAMPLES, 1)
    samples, passes = clocks.plan_samples(0.0, 0.1)
    assert samples >= clocks.LEAST_SAMPLES and passes == 20_000


class FakeStream:
    """A stream that captures, or fails at it."""

    def __init__(self, ends: Any) -> None:
        self.ends, self.begun = ends, 0

    def begin_capture(self) -> None:
        self.begun += 1

    def end_capture(self) -> Any:
        if isinstance(self.ends, Exception):
            raise self.ends
        return self.ends


def test_capture() -> None:
    stream = FakeStream("graph")
    assert clocks._captured(stream, lambda: None) == "graph"

    def refuses() -> None:
        raise NotImplementedError("cuBLAS")

    with pytest.raises(clocks.NotCapturedError, match=r"NotImplementedError: cuBLAS$"):
        clocks._captured(stream, refuses)
    invalid = FakeStream(RuntimeError("invalidated"))
    with pytest.raises(clocks.NotCapturedError, match=r"cuBLAS \(ending it: invalidated\)"):
        clocks._captured(invalid, refuses)
    with pytest.raises(clocks.NotCapturedError, match="RuntimeError: invalidated"):
        clocks._captured(invalid, lambda: None)


class FakeEvents:
    """CUDA events and streams over a time that each pass moves on by 100 µs."""

    now = 0.0

    def __init__(self) -> None:
        outer = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = outer.now

            def synchronize(self) -> None:
                pass

        class Stream(FakeStream):
            def __init__(self, non_blocking: bool) -> None:
                assert non_blocking, "the default stream cannot be captured"
                super().__init__(self)
                self.launches = 0

            def __enter__(self) -> None:
                pass

            def __exit__(self, *_: object) -> None:
                pass

            def synchronize(self) -> None:
                pass

            def launch(self) -> None:
                outer.run()

        self.cuda = self
        self.Event, self.Stream = Event, Stream

    def run(self) -> None:
        self.now += 0.1  # milliseconds

    def Device(self) -> "FakeEvents":
        return self

    def synchronize(self) -> None:
        pass

    def get_elapsed_time(self, start: Any, stop: Any) -> float:
        return float(stop.at - start.at)


def test_clock_on_events(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEvents()
    monkeypatch.setattr(clocks, "cupy", lambda: fake)
    for found in (
        clocks.GPUClock().device(fake.run, 0.01),
        clocks.GPUClock().graph(fake.run, 0.01),
    ):
        assert found["median"] == pytest.approx(100.0)
        assert found["by"] in (clocks.EVENTS, clocks.GRAPH)
        assert found["passes"] // clocks.LEAST_SAMPLES in (20, 21)
    for found in (
        clocks.GPUClock().wall(fake.run, 0.001),
        clocks.GPUClock().host(fake.run, 0.001),
    ):
        low, high = found["quartiles"]
        assert 0 < low <= found["median"] <= high


def test_torch_precision_is_set_and_restored() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not hasattr(torch.backends.cudnn, "rnn"):
        pytest.skip("this version of torch has allow_tf32 only")
    places = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    for precision in ("ieee", "tf32"):
        with peers.torch_precision(precision):
            assert [place.fp32_precision for place in places] == [precision] * 2
        assert [place.fp32_precision for place in places] == before
    with pytest.raises(KeyError), peers.torch_precision("ieee"):
        raise KeyError
    assert [place.fp32_precision for place in places] == before


def result() -> dict[str, Any]:
    """What a benchmark might have found."""
    records = []
    for n in (1, 32):
        for h in (32, 64):

            def times(us: float) -> dict[str, Any]:
                return {"forward": {"median": us}, "forward_backward": {"median": 2 * us}}

            records.append(
                {
                    "group": "grid",
                    "dtype": "float32",
                    "kernel": "resident",
                    "error": 1e-7,
                    "shape": vars(Shape(100, n, 32, h)),
                    "times_us": times(h),
                    "us_per_step": dict.fromkeys(COLUMNS, 1.0),
                    "over_floor": {"recurrence_forward": 3.0},
                    "floor": {"us_per_step": 0.2},
                    "peers": {
                        "torch_ieee": times(3 * h),
                        "cupy_loop": {"forward": {"median": 50.0 * h}},
                        "jax_scan": {"failed": "ImportError"},
                    },
                    "ratios": {
                        "torch_ieee": {"forward": 3.0, "forward_backward": 3.0},
                        "cupy_loop": {"forward": 50.0},
                    },
                }
            )
    environment = {"gpu": {"name": "a GPU"}, "versions": {"gpurnn": "0", "torch": "2"}}
    overhead = {"launch_host": {"median": 5.0}}
    return {
        "environment": environment,
        "overhead_us": overhead,
        "records": records,
        "summary": gpu_summary(records),
    }


def test_plot(tmp_path: Path) -> None:
    plot(result(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no timed record of the group 'grid'"):
        plot({"records": [{"group": "grid", "failed": "?"}]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_plot_of_the_group_kernel_alone(tmp_path: Path) -> None:
    found = result()
    for record in found["records"]:
        record["group"] = "group"
    plot(found, tmp_path / "figures.png")
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
    for record in found["records"]:
        record["group"] = "group-tf32"
    with pytest.raises(ValueError, match="no timed record of the group 'grid' or 'group'"):
        plot(found, tmp_path / "figures.png")


def test_lines_of_the_plot() -> None:
    from gpurnn.bench import plots

    records = [r for r in result()["records"] if r["shape"]["n"] == 1]
    lines = {label: points for label, _, points in plots._lines(records, "forward")}
    assert lines == {
        "gpurnn": [(32, 0.32), (64, 0.64)],
        "PyTorch, ieee": [(32, 0.96), (64, 1.92)],
        "CuPy loop": [(32, 16.0), (64, 32.0)],
        "floor without tensor cores": [(32, 0.2), (64, 0.2)],
    }


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command line, on a machine that seems to have a GPU."""
    found = result()
    monkeypatch.setattr("gpurnn.doctor.device.why_no_gpu", lambda: None)
    monkeypatch.setattr("gpurnn.bench.gpu_environment", lambda: found["environment"])
    monkeypatch.setattr("gpurnn.bench.measure_overhead", lambda **_: found["overhead_us"])
    monkeypatch.setattr("gpurnn.bench.compile_runs", lambda runs, **_: [])

    def run(*options: str, records: list[dict[str, Any]] = found["records"]) -> Any:
        monkeypatch.setattr("gpurnn.bench.measure_gpu", lambda **_: iter(records))
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *options])

    return run


def test_command(command: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = command("--device", "auto", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "3.0 / 3.0" in done.stdout and "50.0 / –" in done.stdout
    assert "torch_ieee forward: geometric mean 3.00, least 3.00, 4 runs" in done.stdout
    assert "jax_scan failed: ImportError" in done.stderr
    assert len(json.loads(out.read_text())["records"]) == 4
    assert out.with_suffix(".png").exists()
    out.with_suffix(".png").unlink()
    done = command("--plot", str(out))
    assert done.exit_code == 0, done.output
    assert out.with_suffix(".png").exists()


def test_command_fails_after_it_has_written_what_there_is(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "figures.json"
    good, *_ = result()["records"]
    bad = {**TINY.about(), "failed": "ArithmeticError: relative error 1, not timed"}
    rest = {**TINY.about(), "left_out": "the limit of 9 seconds was reached"}
    done = command("--device", "cuda", "--out", str(out), records=[good, bad, rest])
    assert done.exit_code == 1
    assert "1 of 3 runs failed" in done.stderr and "left out: grid" in done.stderr
    assert json.loads(out.read_text())["summary"]["failed"] == 1


def test_result_is_kept_after_every_record(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each time whole, and known to be incomplete until the end."""
    out = tmp_path / "figures.json"
    found = result()["records"]
    seen: list[tuple[bool, int]] = []

    def records() -> Iterator[dict[str, Any]]:
        for record in found:
            yield record
            kept = json.loads(out.read_text())
            seen.append((kept["complete"], len(kept["records"])))

    done = command("--device", "cuda", "--out", str(out), records=records())
    assert done.exit_code == 0, done.output
    assert seen == [(False, n + 1) for n in range(len(found))]
    assert json.loads(out.read_text())["complete"] is True


def test_sigterm_leaves_what_there_is(command: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    before = signal.getsignal(signal.SIGTERM)

    def records() -> Iterator[dict[str, Any]]:
        yield result()["records"][0]
        os.kill(os.getpid(), signal.SIGTERM)
        yield pytest.fail("it goes on")

    done = command("--device", "cuda", "--out", str(out), records=records())
    assert done.exit_code == 128 + signal.SIGTERM
    kept = json.loads(out.read_text())
    assert (kept["complete"], len(kept["records"])) == (False, 1)
    assert kept["summary"]["ratios"]["torch_ieee"]["forward"]["runs"] == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_module_without_the_command_line(
    command: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("--device", "cuda")  # a machine that seems to have a GPU
    found = result()["records"]
    out = tmp_path / "figures.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpurnn.bench.measure_gpu", lambda **_: iter(found))
        assert bench_module.main(["--device", "cuda", "--out", str(out)]) == 0
        assert out.with_suffix(".png").exists()
        failed = {**TINY.about(), "failed": "ArithmeticError"}
        patch.setattr("gpurnn.bench.measure_gpu", lambda **_: iter([failed]))
        assert bench_module.main(["--device", "cuda", "--json"]) == 1
    told = capsys.readouterr()
    assert json.loads(told.out)["summary"]["failed"] == 1
    assert "error: 1 of 1 runs failed" in told.err
    with pytest.raises(SystemExit, match="2"):
        bench_module.main(["--device", "gpu"])
    assert "device is 'gpu'" in capsys.readouterr().err


def test_overhead_that_fails_loses_nothing_else(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(**_: object) -> Any:
        raise RuntimeError("illegal address")

    monkeypatch.setattr("gpurnn.bench.measure_overhead", fails)
    done = command("--device", "cuda", "--out", str(tmp_path / "figures.json"))
    assert done.exit_code == 0, done.output
    assert "FAILED: overhead: RuntimeError: illegal address" in done.stderr
    assert len(json.loads((tmp_path / "figures.json").read_text())["records"]) == 4


def test_plot_of_what_is_no_result(command: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "no.json"
    for text, told in (("{", "is not JSON"), ("{}", "no timed record")):
        path.write_text(text)
        done = command("--plot", str(path))
        assert (done.exit_code, told in done.stderr) == (2, True), done.output


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpurnn.doctor.device.why_no_gpu", lambda: "the driver sees no device")
    monkeypatch.setattr("gpurnn.bench.measure_cpu", lambda **_: iter(()))
    done = CliRunner().invoke(app, ["bench", "--device", "cuda"])
    assert done.exit_code == 2
    assert "there is no GPU to use: the driver sees no device" in done.stderr
    done = CliRunner().invoke(app, ["bench"])
    assert done.exit_code == 0
    assert "no GPU to use (the driver sees no device): measuring on cpu" in done.stderr


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpurnn.doctor.device.describe", lambda _: {"name": "a GPU"})
    monkeypatch.setattr("gpurnn.doctor.device.nvidia_smi", lambda: None)
    found = gpu_environment()
    assert found["gpu"]["name"] == "a GPU"
    assert "no_grad" in found["notes"]["torch_forward"]
    assert found["versions"]["numpy"] == np.__version__
    assert found["date"].endswith("+00:00")
    json.dumps(found, allow_nan=False)
