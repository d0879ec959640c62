"""``gpurnn bench --probe``, with the emulator for a GPU and a clock that counts steps."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_cupy
import numpy as np
import pytest
from group_setup import SMALL_CARD
from typer.testing import CliRunner

from gpurnn import bench, emulated, tuned
from gpurnn.bench import __main__ as bench_module
from gpurnn.bench import common, probe, soak
from gpurnn.bench.probe import Probed, measure_probes, write_probes
from gpurnn.cli import app
from gpurnn.cuda import engines, operations
from gpurnn.cuda.engines import Engine, current_emulation
from gpurnn.planning import Group

pytest.importorskip("greenlet", reason="the emulator needs greenlet")

CARD = dataclasses.replace(SMALL_CARD, name="NVIDIA Small", multiprocessors=4)
FEW, MANY = 3, 5


class SteppingClock:
    """Says that a pass takes 10 µs, and one more for each repetition of a probe."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def device(self, run: Callable[[], object], seconds: float) -> dict[str, Any]:
        self.engine.steps = 0
        run()
        taken = 10.0 + self.engine.steps
        return common.figure([taken - 0.1, taken, taken + 0.1], 3)

    wall = host = graph = device


class Counting:
    """An engine that remembers the repetitions asked for, and every launch."""

    def __init__(self, inner: Engine) -> None:
        self.inner, self.steps = inner, 0
        self.launches: list[tuple[str, int, int, int, bool]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def launch(
        self, spec: Any, grid: Any, block: Any, arrays: Any, integers: Any = ((),), **how: Any
    ) -> None:
        self.steps = next(iter(integers), (0,))[0] if integers != ((),) else 0
        cluster, cooperative = how.get("cluster", 1), how.get("cooperative", False)
        self.launches.append((spec.kind, grid[0], block[0], cluster, cooperative))
        self.inner.launch(spec, grid, block, arrays, integers, **how)


@pytest.fixture
def engine() -> Iterator[Counting]:
    with emulated(CARD, check_races=False):
        found = current_emulation()
        assert found is not None
        yield Counting(found)


def probed(engine: Any, **options: Any) -> Probed:
    return measure_probes(
        engine=engine, clock=SteppingClock(engine), few=FEW, many=MANY, threads=33, **options
    )


def test_latencies_are_those_of_a_repetition(engine: Counting) -> None:
    found = probed(engine)
    assert found.name == "NVIDIA Small"
    latencies = found.latencies
    assert latencies.measured
    assert latencies.launch == pytest.approx(10_000)
    assert latencies.l2 == latencies.remote_shared == pytest.approx(1000)
    assert latencies.flag == pytest.approx(500), "one way"
    assert [blocks for blocks, _ in latencies.counter] == [2, 4]
    assert [size for size, _ in latencies.cluster] == [2, 4, 8, 16]
    assert all(ns == pytest.approx(1000) for _, ns in latencies.counter + latencies.cluster)
    low, high = found.figures["l2"]["quartiles"]
    assert low < 1000 < high


def test_what_is_launched(engine: Counting) -> None:
    probed(engine)
    assert set(engine.launches) == {
        ("probe_launch", 1, 32, 1, False),
        ("probe_l2", 1, 1, 1, False),
        ("probe_flag", 2, 1, 1, True),
        *(("probe_counter", blocks, 33, 1, True) for blocks in (2, 4)),
        *(("probe_cluster", size, 33, size, False) for size in (2, 4, 8, 16)),
        *(("probe_cluster_stores", size, 33, size, False) for size in (2, 4, 8, 16)),
        ("probe_remote", 2, 32, 2, False),
    }


def test_without_clusters() -> None:
    old = dataclasses.replace(CARD, compute_capability=(8, 0))
    with emulated(old, check_races=False):
        engine = Counting(current_emulation())  # type: ignore[arg-type]
        found = probed(engine)
    assert found.latencies.cluster == ()
    assert found.figures["cluster_8"] == {"left_out": "NVIDIA Small has no clusters of 8"}
    estimate = tuned.latencies(CARD.name, CARD.clock_ghz)
    assert found.latencies.remote_shared == estimate.remote_shared
    kinds = {kind for kind, *_ in engine.launches}
    assert kinds == {"probe_launch", "probe_l2", "probe_flag", "probe_counter"}


def test_clusters_that_the_gpu_refuses(engine: Counting) -> None:
    """16 it may; 8 are portable, so that is an error."""
    launch, refused, told = engine.launch, 16, []

    def refuses(*rest: Any, **how: Any) -> None:
        if how.get("cluster") == refused:
            raise RuntimeError("CUDA refuses leave for clusters")
        launch(*rest, **how)

    engine.launch = refuses  # type: ignore[method-assign]
    found = probed(engine, note=told.append)
    assert [size for size, _ in found.latencies.cluster] == [2, 4, 8]
    assert found.figures["cluster_16"] == {"failed": "CUDA refuses leave for clusters"}
    assert told == ["no clusters of 16: CUDA refuses leave for clusters"]
    refused = 8
    with pytest.raises(RuntimeError, match="leave for clusters"):
        probed(engine)


def test_a_probe_that_does_something_else_is_not_timed(engine: Counting) -> None:
    engine.launch = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match=r"^probe_l2 wrote \[0\]: expected \d+; it is not timed"):
        probed(engine)


def test_repetitions_that_take_no_time() -> None:
    same = common.figure([5.0, 5.0], 2)
    with pytest.raises(RuntimeError, match=r"^100 more repetitions of a probe take 0 ns: expected"):
        probe._difference(same, same, 100)


def test_table(engine: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.json"
    write_probes(probed(engine), path, {"gpu": {"driver": "600.1"}})
    monkeypatch.setenv("GPURNN_TUNED", str(path))
    tuned._users.cache_clear()
    try:
        found = tuned.latencies("NVIDIA Small", 1.0)
    finally:
        tuned._users.cache_clear()
    assert found.measured and found.flag == pytest.approx(500)
    kept = json.loads(path.read_text())["gpus"]["NVIDIA Small"]
    assert kept["clock_ghz"] == CARD.clock_ghz
    assert kept["about"]["environment"] == {"gpu": {"driver": "600.1"}}
    assert kept["about"]["figures"]["l2"]["ns"] == pytest.approx(1000)


def test_as_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with CuPy's stand-in: packed arguments, cooperative launches and clusters."""
    fake = fake_cupy.install(monkeypatch)
    monkeypatch.setitem(fake_cupy.ATTRIBUTES, 16, 3)
    asarray = fake.asarray

    def from_host(a: Any, *rest: Any, **options: Any) -> Any:
        return asarray(a if isinstance(a, fake_cupy.Array) else fake.new(a), *rest, **options)

    monkeypatch.setattr(fake, "asarray", from_host)
    engine = Counting(engines.GPUEngine(0))
    found = probed(engine)
    assert found.name == "a GPU that is none" and found.latencies.l2 == pytest.approx(1000)
    clusters = [launched.attributes.get("cluster") for launched in fake.extended]
    assert set(clusters) == {None, 2, 4, 8, 16}
    cooperative = {
        launched.grid[0] for launched in fake.extended if not launched.attributes.get("cluster")
    }
    assert cooperative == {2, 3}
    outcomes = list(
        soak.run_soak(
            3,
            engine=engines.GPUEngine(0),
            sizes=soak.SMALL,
            every=1,
            pool=[soak.Configuration(2, 5, "float32", "ieee", "tanh", Group(3, "flags"))],
        )
    )
    assert [outcome.checked for outcome in outcomes] == [True] * 3
    for cached in (engines.cupy, engines.limits_of, engines._function, operations._kept):
        cached.cache_clear()


@pytest.fixture
def command(engine: Counting, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command line, on a machine that seems to have a GPU."""
    found = probed(engine)
    monkeypatch.setattr("gpurnn.doctor.device.why_no_gpu", lambda: None)
    monkeypatch.setattr(bench, "gpu_environment", lambda: {"gpu": {"driver": "600.1"}})
    monkeypatch.setattr(bench, "measure_probes", lambda **_: found)
    return lambda *options: CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *options])


def test_command(command: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "tuned.json"
    done = command("--probe", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "flag" in done.stdout and "500" in done.stdout and "cluster_16" in done.stdout
    assert set(json.loads(out.read_text())["gpus"]) == {"NVIDIA Small"}
    out.write_text("[]")
    done = command("--probe", "--out", str(out))
    assert done.exit_code == 2
    assert "tuned.json: the whole is []: expected an object" in done.stderr
    done = command("--probe", "--json")
    assert json.loads(done.stdout)["figures"]["l2"]["ns"] == pytest.approx(1000)


def test_module(command: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "tuned.json"
    assert bench_module.main(["--probe", "--out", str(out)]) == 0
    assert np.isclose(
        json.loads(out.read_text())["gpus"]["NVIDIA Small"]["latencies_ns"]["l2"], 1e3
    )


def test_command_fails(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> Any:
        raise RuntimeError("probe_l2 wrote [0]")

    monkeypatch.setattr(bench, "measure_probes", fails)
    done = command("--probe")
    assert (done.exit_code, "error: probe_l2 wrote [0]" in done.stderr) == (1, True)
    assert bench_module.main(["--probe"]) == 1


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpurnn.doctor.device.why_no_gpu", lambda: "the driver sees no device")
    for options in (["--probe"], ["--probe", "--device", "cuda"]):
        done = CliRunner().invoke(app, ["bench", *options])
        assert done.exit_code == 2
        told = "device is 'cuda' but there is no GPU to use: the driver sees no device"
        assert told in done.stderr
    done = CliRunner().invoke(app, ["bench", "--probe", "--device", "cpu"])
    assert "device is 'cpu': expected 'cuda' or 'auto' with --probe" in done.stderr
    assert done.exit_code == 2
