"""The language model's benchmark: checked before it is timed, in turn, summed up rightly."""

import dataclasses
import functools
import importlib.util
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
from typer.testing import CliRunner

from gpurnn import Vocabulary, emulated, planning
from gpurnn.bench import __main__ as bench_module
from gpurnn.bench.due import Due, LateError
from gpurnn.bench.lm import (
    GenerateRun,
    Peers,
    Setting,
    Text,
    TrainRun,
    benchmark_text,
    blocks,
    capture,
    checks,
    command,
    lm_runs,
    measure,
    measure_lm,
    ours,
    peers_generate,
    peers_train,
    report,
    synthetic,
    torch_peers,
)
from gpurnn.bench.lm.ahead import specs_of_training
from gpurnn.bench.lm.blocks import Block
from gpurnn.cli import app
from gpurnn.cuda.engines import EmulatedEngine
from gpurnn.cuda.specs import KernelSpec
from gpurnn.text import CorpusError
from gpurnn.training.device import DeviceSteps

TRAIN = TrainRun(6, 4, 8)
GENERATE = GenerateRun(3, 8, 12)
TEXT = Text.of(synthetic(3000))
NOBODY = Peers({}, {}, {})
PEER = "torch_eager_ieee"

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PAUSE", 0.0)
    monkeypatch.setattr(blocks, "BLOCKS", 2)


def measured(*runs: Any, peers: Peers | None = None, **options: Any) -> list[dict[str, Any]]:
    peers = torch_peers("cpu", compiled=False) if peers is None else peers
    return list(measure_lm(Setting("cpu", 0.001, TEXT, peers), runs, **options))


# Records


@needs_torch
def test_record_of_training() -> None:
    (record,) = measured(TRAIN)
    assert record["group"] == "train" and record["unit"] == "tokens"
    assert record["shape"] == {"T": 6, "n": 4, "h": 8}
    assert record["settings"] == {
        "q": 28,
        "dtype": "float32",
        "optimizer": "Adam",
        "lr": ours.LR,
        "clip": 1.0,
        "updates_in_an_epoch": 256,
        "torch_reads_losses_every": 1,
    }
    assert len(record["first_losses"]) == checks.UPDATES
    (peer,) = record["peers"].values()
    assert list(record["peers"]) == list(record["ratios"]) == [PEER]
    assert 0 <= peer["error"] < 1e-6 and 0 <= peer["error_later"] < 1e-5
    assert peer["precision"] == "ieee" and peer["updates_compared"] == checks.UPDATES
    for figure in (record["per_second"], peer["per_second"]):
        low, high = figure["quartiles"]
        assert 0 < figure["least"] <= low <= figure["median"] <= high <= figure["most"]
        assert figure["blocks"] == 2
        assert figure["items"] % (TRAIN.T * TRAIN.n) == 0
    ratio = record["per_second"]["median"] / peer["per_second"]["median"]
    assert record["ratios"][PEER] == {"train": ratio}
    json.dumps(record, allow_nan=False)


@needs_torch
@pytest.mark.parametrize("n", [1, 3])
def test_record_of_generation(n: int) -> None:
    (record,) = measured(GenerateRun(n, 8, 12))
    assert record["group"] == "generate" and record["unit"] == "characters"
    assert record["shape"] == {"n": n, "h": 8} and record["characters"] == 12
    (peer,) = record["peers"].values()
    assert peer["greedy"]["characters"] == 12
    assert peer["greedy"]["equal"] == peer["greedy"]["rows"] == n
    assert peer["greedy"]["part_at"] is None
    for figure in (record["per_second"], peer["per_second"]):
        assert figure["items"] % (n * 12) == 0
    ratio = record["per_second"]["median"] / peer["per_second"]["median"]
    assert record["ratios"] == {PEER: {"generate": ratio}}
    json.dumps(record, allow_nan=False)


def test_without_peers_ours_is_measured_alone() -> None:
    for record in measured(TRAIN, GENERATE, peers=NOBODY):
        assert record["per_second"]["median"] > 0
        assert record["peers"] == record["ratios"] == {}


def test_text_that_is_too_short() -> None:
    short = dataclasses.replace(TEXT, tokens=20)
    (record,) = measure_lm(Setting("cpu", 0.001, short, NOBODY), [TRAIN])
    assert record["failed"] == (
        "ValueError: the text has 20 tokens: expected at least 22, for 4 batches of n=4 windows "
        "of T=6"
    )


def test_batches_are_full() -> None:
    """So that every update is as long, and one graph is enough for PyTorch."""
    run = ours.prepared(TrainRun(5, 7, 3), TEXT, "cpu")
    batches = run.trainer.sampler.epoch(np.random.default_rng(0))
    assert len(batches) == 256
    assert {X.shape for X, _ in batches} == {(5, 7)}


def test_our_training_counts_whole_updates_after_the_first() -> None:
    run = ours.prepared(TRAIN, TEXT, "cpu")
    side = ours.OurTraining(run)
    for _ in range(3):
        before = run.trainer.progress.step
        found = side.block(0.003)
        updates = run.trainer.progress.step - before
        assert updates >= 2
        assert found.items == (updates - 1) * TRAIN.T * TRAIN.n
        assert found.seconds >= 0.003 or updates == 2


def test_our_training_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its losses are the same, and its kernels are those that are compiled ahead."""
    pytest.importorskip("greenlet", reason="the emulator needs greenlet")
    pytest.importorskip("numba.cuda", reason="the kernels need numba-cuda")
    shape = TrainRun(3, 2, 4)
    launched = set()
    launch = EmulatedEngine.launch

    def watched(self: EmulatedEngine, spec: KernelSpec, *rest: Any, **more: Any) -> None:
        launched.add(spec)
        launch(self, spec, *rest, **more)

    expected = ours.first_losses(ours.prepared(shape, TEXT, "cpu"))
    monkeypatch.setattr(EmulatedEngine, "launch", watched)
    with emulated(check_races=False):
        found = ours.first_losses(run := ours.prepared(shape, TEXT, "cpu"))
        assert isinstance(run.trainer._steps, DeviceSteps)
    checks.check_losses(found, expected, "ieee")
    assert launched == set(specs_of_training(shape, 28, planning.DEVICES["H100"]))


# What is wrong is not timed


class Sham:
    """A side that must not be timed, whatever it says of the first updates and logits."""

    def __init__(self, task: Any, losses: Any = None, logits: Any = None) -> None:
        self.losses, self.logits = losses, logits

    def first_losses(self, count: int) -> list[float]:
        return [float(x) for x in self.losses]

    def logits_along(self, ids: Any) -> Any:
        return self.logits(ids)

    def block(self, seconds: float) -> Block:
        pytest.fail("timed a wrong result")


def sham(**what: Any) -> Peers:
    make = functools.partial(Sham, **what)
    return Peers({"sham": make}, {"sham": make}, {"sham": "ieee"})


@pytest.mark.parametrize("place", range(checks.UPDATES))
@pytest.mark.parametrize("spoil", [1.001, math.nan])
def test_wrong_loss_is_refused(place: int, spoil: float) -> None:
    losses = ours.first_losses(ours.prepared(TRAIN, TEXT, "cpu"))
    losses[place] *= spoil
    (record,) = measured(TRAIN, peers=sham(losses=losses))
    failed = record["peers"]["sham"]["failed"]
    assert failed.startswith("ArithmeticError: losses of the first updates ")
    assert record["ratios"] == {} and record["per_second"]["median"] > 0


@needs_torch
@pytest.mark.parametrize(
    "change", [{"lr": 2 * ours.LR}, {"clip": 1e-6}, {"weights": "b_h"}, {"weights": "W_hq"}]
)
def test_other_training_is_refused(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    """Another learning rate, no gradient to speak of, or weights that are a little off."""

    def other(task: peers_train.TrainTask) -> Any:
        given = dict(change)
        if "weights" in given:
            name = given["weights"]
            given["weights"] = {**task.weights, name: task.weights[name] * 1.01 + 0.01}
        peer = peers_train.TorchTraining(dataclasses.replace(task, **given), "eager", "ieee")
        monkeypatch.setattr(peer, "block", lambda _: pytest.fail("timed a wrong result"))
        return peer

    (record,) = measured(TrainRun(6, 32, 32), peers=Peers({"other": other}, {}, {"other": "ieee"}))
    assert "ArithmeticError: losses of the first" in record["peers"]["other"]["failed"]


def test_other_logits_are_refused() -> None:
    def off(ids: Any) -> Any:
        O = np.zeros((*ids.shape, 28))
        np.put_along_axis(O, ids[:, :, None], 1.0, axis=2)
        O[5, 1] = -1.0
        O[5, 1, 3 + (ids[5, 1] == 3)] = 1.0
        return O

    (record,) = measured(GENERATE, peers=sham(logits=off))
    assert record["peers"]["sham"]["failed"].startswith(
        "ArithmeticError: greedy output differs at character 5 of row 1: the logit of ours is 2.0"
    )


@needs_torch
def test_other_network_does_not_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(task: peers_generate.GenerateTask) -> Any:
        weights = {**task.weights, "W_hq": task.weights["W_hq"][:, ::-1]}
        return peers_generate.TorchGeneration(
            dataclasses.replace(task, weights=weights), "eager", "ieee"
        )

    (record,) = measured(GENERATE, peers=Peers({}, {"other": other}, {"other": "ieee"}))
    assert "greedy output differs" in record["peers"]["other"]["failed"]


def test_texts_part_where_rounding_decides() -> None:
    ids = np.array([[1, 2], [2, 2], [1, 1]])
    O = np.zeros((3, 2, 4))
    np.put_along_axis(O, ids[:, :, None], 1.0, axis=2)
    O[:, :, 0] = 9.0  # which is never drawn
    O[1, 0, 3] = 1.0 + 5e-5
    found = checks.check_greedy(O, ids, [0], "ieee")
    assert found == {
        "characters": 3,
        "rows": 2,
        "equal": 1,
        "part_at": 1,
        "gap": pytest.approx(5e-5, rel=1e-3),
        "gap_limit": checks.LOGITS["ieee"],
    }
    O[1, 0, 3] = 1.001
    with pytest.raises(ArithmeticError, match="differs at character 1 of row 0"):
        checks.check_greedy(O, ids, [0], "ieee")
    checks.check_greedy(O, ids, [0], "tf32")
    O[2, 1, 2] = np.nan
    with pytest.raises(ArithmeticError, match="differs at character 2 of row 1"):
        checks.check_greedy(O, ids, [0], "tf32")


# Blocks


class Scripted:
    """A side that says how fast it was, block by block."""

    def __init__(self, name: str, calls: list[str], *rates: int) -> None:
        self.name, self.calls, self.rates = name, calls, list(rates)

    def block(self, seconds: float) -> Block:
        self.calls.append(self.name)
        rate = self.rates.pop(0)
        if rate == 0:
            raise RuntimeError("out of memory")
        return Block(2 * rate, 2.0)


def test_sides_take_turns_and_one_that_fails_is_left_out() -> None:
    calls: list[str] = []
    sides = {
        "gpurnn": Scripted("gpurnn", calls, 10, 30),
        "broken": Scripted("broken", calls, 5, 0),
        "torch": Scripted("torch", calls, 4, 8),
    }
    figures, failed = blocks.in_turn(sides, "gpurnn", 1.0, 0.0, Due(None))
    assert calls == ["gpurnn", "broken", "torch"] * 2
    assert failed == {"broken": "RuntimeError: out of memory"}
    assert figures["torch"]["median"] == 6.0
    assert figures["gpurnn"] == {
        "median": 20.0,
        "quartiles": [15.0, 25.0],
        "least": 10.0,
        "most": 30.0,
        "blocks": 2,
        "items": 80,
        "seconds": 4.0,
    }


def test_our_own_failure_is_told() -> None:
    sides = {"gpurnn": Scripted("gpurnn", [], 0)}
    with pytest.raises(RuntimeError, match="out of memory"):
        blocks.in_turn(sides, "gpurnn", 1.0, 0.0, Due(None))


def test_blocks_stop_when_the_time_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    due = Due(10.0)
    now = due.begun

    class Slow(Scripted):
        def block(self, seconds: float) -> Block:
            nonlocal now
            now += 6.0
            return super().block(seconds)

    monkeypatch.setattr("gpurnn.bench.due.time.perf_counter", lambda: now)
    sides = {name: Slow(name, [], 1, 1) for name in ("gpurnn", "torch")}
    figures, failed = blocks.in_turn(sides, "gpurnn", 1.0, 0.0, due)
    assert {name: f["blocks"] for name, f in figures.items()} == {"gpurnn": 1, "torch": 1}
    assert failed == {}
    with pytest.raises(LateError, match="the time limit was reached"):
        blocks.in_turn(sides, "gpurnn", 1.0, 0.0, due)


def test_nothing_is_begun_after_the_limit() -> None:
    told = {"left_out": "the time limit was reached"}
    records = measured(TRAIN, GENERATE, limit=1e-9)
    assert records == [{**run.about(), **told} for run in (TRAIN, GENERATE)]


@needs_torch
def test_peer_that_is_late_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = iter([None, LateError("the time limit was reached")])

    def check(self: Due) -> None:
        if (outcome := next(checked, None)) is not None:
            raise outcome

    monkeypatch.setattr(Due, "check", check)
    (record,) = measured(TRAIN)
    assert record["peers"] == {PEER: {"left_out": "the time limit was reached"}}
    assert record["ratios"] == {} and record["per_second"]["blocks"] == 2


# Peers


def test_peers_of_a_device() -> None:
    if importlib.util.find_spec("torch") is None:
        assert torch_peers("cuda", compiled=True) == NOBODY
        return
    ways = {p: [f"torch_{how}_{p}" for how in ("eager", "graph")] for p in ("ieee", "tf32")}
    found = torch_peers("cuda", compiled=True)
    assert set(found.generate) == {*ways["ieee"], *ways["tf32"]}
    assert set(found.train) == {*found.generate, "torch_compile_ieee", "torch_compile_tf32"}
    assert all(name.endswith(precision) for name, precision in found.precisions.items())
    assert list(torch_peers("cpu", compiled=False).train) == [PEER]
    assert list(torch_peers("cpu", compiled=True).train) == [PEER, "torch_compile_ieee"]


def test_no_peers_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    assert torch_peers("cuda", compiled=True) == NOBODY


@needs_torch
def test_compiler_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fails(network: Any) -> Any:
        raise RuntimeError("no working C compiler " + "x" * 5000)

    monkeypatch.setattr(torch, "compile", fails)
    (record,) = measured(TRAIN, peers=torch_peers("cpu", compiled=True))
    failed = record["peers"]["torch_compile_ieee"]["failed"]
    assert failed.startswith("RuntimeError: no working C compiler") and len(failed) == 1000
    assert list(record["ratios"]) == [PEER]


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of CUDA graphs: what was captured is run again. Adam is as it is without them."""
    import torch

    def captured(run: Callable[[], object]) -> Any:
        for _ in range(capture.WARM_UPS):
            run()
        return types.SimpleNamespace(replay=run)

    monkeypatch.setattr(peers_train, "captured", captured)
    monkeypatch.setattr(peers_generate, "captured", captured)
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda params, lr, capturable: adam(params, lr))


@needs_torch
@pytest.mark.usefixtures("replayed")
def test_graphs_compute_the_same() -> None:
    """From static arrays, and as if the runs before the capture had not been."""
    peers = Peers(
        {"graph": lambda t: peers_train.TorchTraining(t, "graph", "ieee")},
        {"graph": lambda t: peers_generate.TorchGeneration(t, "graph", "ieee")},
        {"graph": "ieee"},
    )
    trained, generated = measured(TRAIN, GENERATE, peers=peers)
    assert trained["peers"]["graph"]["error_later"] < 1e-5
    assert generated["peers"]["graph"]["greedy"]["equal"] == 3
    for record in (trained, generated):
        assert list(record["ratios"]) == ["graph"]


def generation_task(characters: int, finished: list[Any]) -> peers_generate.GenerateTask:
    run = ours.prepared(TRAIN, TEXT, "cpu")
    return peers_generate.GenerateTask(
        prefix=run.train_ids[:20].reshape(10, 2),
        characters=characters,
        weights=ours.weights_of(run.model),
        never=(0, 5),
        device="cpu",
        finish=lambda ids: finished.append(ids.copy()),  # a CPU's would be replaced
    )


@needs_torch
@pytest.mark.parametrize("how", ["eager", "graph"])
@pytest.mark.usefixtures("replayed")
def test_torch_draws_every_character_from_its_distribution(how: str) -> None:
    """Not those that never are; the text starts with the first draw and ends with the last."""
    import torch

    torch.manual_seed(0)
    found: list[Any] = []
    peer = peers_generate.TorchGeneration(generation_task(200, found), how, "ieee")
    peer.block(0.0)
    assert [ids.shape for ids in found] == [(200, 2)] * 2
    ids = found[0]
    assert not np.isin(ids, (0, 5)).any() and not (found[1] == ids).all()
    logits = peer.logits_along(ids)
    p = np.exp(logits - logits.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    expected, counts = p.sum(axis=(0, 1)), np.bincount(ids.reshape(-1), minlength=28)
    assert expected[[0, 5]].tolist() == [0.0, 0.0]
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all()


@needs_torch
def test_torch_program_learns_from_whole_epochs() -> None:
    """Each window once in an epoch, both biases trained, the mean of the losses read."""
    run = ours.prepared(TRAIN, TEXT, "cpu")
    task = peers_train.TrainTask(
        ids=run.train_ids[: 12 + TRAIN.T],
        T=TRAIN.T,
        n=TRAIN.n,
        lr=1e-2,
        clip=1.0,
        weights=ours.weights_of(run.model),
        device="cpu",
        every=3,
    )
    program = peers_train._Program(task, "eager", one_bias=False)
    seen: list[int] = []
    step = program.step
    program.step = lambda chosen: (seen.extend(chosen.tolist()), step(chosen))  # type: ignore[assignment,func-returns-value]
    losses = [program.chunk() for _ in range(20)]
    for epoch in range(20):
        assert sorted(seen[12 * epoch : 12 * (epoch + 1)]) == list(range(12))
    assert losses[-1] < losses[0] - 0.5
    assert program.network.rnn.bias_hh_l0.detach().abs().sum() > 0
    assert peers_train.TorchTraining(task, "eager", "ieee").block(0.0).items == 3 * 24


# The text


def test_synthetic_text() -> None:
    corpus = synthetic(3000)
    assert corpus == synthetic(3000)
    assert len(corpus.text) == 3000 and "  " not in corpus.text
    assert len(Vocabulary(corpus.text)) == 28
    assert TEXT.tokens == 3000


def test_default_text(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    text = benchmark_text(told.append)
    assert text.corpus.name == "python-docs" and text.tokens > 100_000 and told == []

    def missing(name: str) -> Any:
        raise CorpusError("this Python lacks it")

    monkeypatch.setattr("gpurnn.bench.lm.text.load_corpus", missing)
    text = benchmark_text(told.append)
    assert text.corpus.name == "synthetic" and text.tokens == 300_000
    assert told == ["a synthetic text is used: this Python lacks it"]


def test_runs() -> None:
    for device, characters in (("cpu", 100), ("cuda", 1000)):
        runs = lm_runs(device)
        sizes = [(r.T, r.n, r.h) for r in runs if isinstance(r, TrainRun)]
        assert sizes == [(32, 1024, 32), (35, 32, 512), (128, 64, 1024)]
        assert [r for r in runs if isinstance(r, GenerateRun)] == [
            GenerateRun(n, h, characters, 0 if device == "cpu" else {1: 100_000, 64: 10_000}[n])
            for h in (32, 512, 1024)
            for n in (1, 64)
        ]
        assert GenerateRun(1, 2, characters).ours == characters


# The command


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    monkeypatch.setattr(command, "lm_runs", lambda device: (TRAIN, GENERATE))
    monkeypatch.setattr(command, "benchmark_text", lambda note: TEXT)


def invoke(*options: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *options])


COMMAND = ("lm", "--device", "cpu", "--seconds", "0.001", "--threads", "1")


@pytest.mark.usefixtures("small")
def test_command(tmp_path: Path) -> None:
    out = tmp_path / "lm.json"
    done = invoke(*COMMAND, "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "done: train T 6, n 4, h 8, " in done.stderr
    assert "done: generate n 3, h 8, " in done.stderr
    assert "tokens or characters a second" in done.stdout
    found = json.loads(out.read_text())
    assert found["benchmark"] == "lm" and found["complete"] is True and found["runs"] == 2
    assert found["device"] == "cpu" and found["seconds_for_a_figure"] == 0.001
    assert found["text"]["sha256"] == TEXT.corpus.sha256 and found["text"]["tokens"] == 3000
    about = found["environment"]
    assert {"processor", "versions", "commit", "threads", "date", "notes"} <= set(about)
    assert about["versions"]["numpy"] == np.__version__
    assert [record["group"] for record in found["records"]] == ["train", "generate"]
    assert found["summary"] == report.lm_summary(found["records"])
    if importlib.util.find_spec("torch") is None:
        assert "torch is not installed: no comparison" in done.stderr
        return
    assert f"{PEER} train: geometric mean " in done.stdout
    for record in found["records"]:
        summed = found["summary"]["ratios"][PEER][record["group"]]
        ratio = pytest.approx(record["ratios"][PEER][record["group"]])
        assert summed == {"geometric_mean": ratio, "least": ratio, "runs": 1}


@pytest.mark.usefixtures("small")
def test_limit_of_the_command(tmp_path: Path) -> None:
    out = tmp_path / "lm.json"
    done = invoke(*COMMAND, "--limit", "1e-9", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "left out: train T 6, n 4, h 8: the time limit was reached" in done.stderr
    found = json.loads(out.read_text())
    assert found["complete"] is True and found["summary"]["left_out"] == 2


@pytest.mark.usefixtures("small")
def test_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lm.json"
    assert bench_module.main([*COMMAND, "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert told.out == "" and "done: train" in told.err
    kept = json.loads(out.read_text())
    assert kept["complete"] is True
    assert bench_module.main([*COMMAND, "--limit", "1e-9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["left_out"] == 2


@pytest.mark.usefixtures("small")
def test_failed_run_is_told_at_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def records(*_: object, **__: object) -> Iterator[dict[str, Any]]:
        yield {**TRAIN.about(), "failed": "RuntimeError: no"}
        yield {
            **GENERATE.about(),
            "per_second": {"median": 2.0, "least": 1.0, "most": 3.0},
            "peers": {"torch_graph_ieee": {"failed": "RuntimeError: capture"}},
            "ratios": {},
        }

    monkeypatch.setattr(command, "measure_lm", records)
    out = tmp_path / "lm.json"
    done = invoke(*COMMAND, "--out", str(out))
    assert done.exit_code == 1
    assert "FAILED: train T 6, n 4, h 8: RuntimeError: no" in done.stderr
    assert "torch_graph_ieee failed: RuntimeError: capture" in done.stderr
    assert "1 of 2 runs failed" in done.stderr
    assert json.loads(out.read_text())["summary"] == {
        "ratios": {},
        "peers_failed": {"torch_graph_ieee": 1},
        "peers_left_out": {},
        "left_out": 0,
        "failed": 1,
    }
    assert bench_module.main([*COMMAND, "--out", str(out)]) == 1


@pytest.mark.usefixtures("small")
def test_sigterm_leaves_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def records(*_: object, **__: object) -> Iterator[dict[str, Any]]:
        yield {**TRAIN.about(), "left_out": "?"}
        os.kill(os.getpid(), signal.SIGTERM)
        yield pytest.fail("it goes on")

    monkeypatch.setattr(command, "measure_lm", records)
    out = tmp_path / "lm.json"
    assert invoke(*COMMAND, "--out", str(out)).exit_code == 128 + signal.SIGTERM
    kept = json.loads(out.read_text())
    assert (kept["complete"], len(kept["records"])) == (False, 1)


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is asked of a GPU: kernels ahead, all peers, its environment; nothing of threads."""
    seen: dict[str, Any] = {}

    def records(setting: Setting, runs: Any, limit: Any) -> Iterator[dict[str, Any]]:
        seen.update(setting=setting, runs=runs, limit=limit)
        return iter(())

    def compiled(runs: Any, q: int, limit: Any) -> list[str]:
        assert q == 28
        return ["group_forward: no"]

    monkeypatch.setattr("gpurnn.doctor.device.why_no_gpu", lambda: None)
    monkeypatch.setattr(report, "gpu_environment", lambda: {"gpu": {"name": "X"}, "floor": "?"})
    monkeypatch.setattr(command, "measure_lm", records)
    monkeypatch.setattr(command, "compile_lm", compiled)
    monkeypatch.setattr(command, "benchmark_text", lambda note: TEXT)
    out = tmp_path / "lm.json"
    done = invoke("lm", "--limit", "50", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "could not be compiled ahead: group_forward: no" in done.stderr
    assert seen["setting"].device == "cuda" and seen["setting"].seconds == 0.5
    assert seen["setting"].pause == 0.0 and seen["runs"] == lm_runs("cuda")
    assert 49 < seen["limit"] <= 50
    if importlib.util.find_spec("torch") is not None:
        assert "torch_compile_tf32" in seen["setting"].peers.train
    about = json.loads(out.read_text())["environment"]
    assert about["gpu"] == {"name": "X"} and "floor" not in about
    assert about["notes"] == report.NOTES


MISTAKES = [
    (("all",), "what is 'all': expected one of rnn, lm"),
    (("--compile",), "compile is given: expected it beside lm alone"),
    (("lm", "--grid", "all"), "grid is all: expected nothing, beside lm"),
    (("lm", "--probe"), "probe is True: expected nothing, beside lm"),
    (("lm", "--soak", "3"), "soak is 3: expected nothing, beside lm"),
    (("lm", "--seed", "3"), "seed is 3: expected nothing, beside lm"),
    (("lm", "--kernel", "step"), "kernel is step: expected nothing, beside lm"),
    (("lm", "--device", "gpu"), "device is 'gpu': expected one of auto, cpu, cuda"),
    (("lm", "--device", "cpu", "--seconds", "0"), "seconds is 0.0: expected a finite number"),
    (("lm", "--device", "cpu", "--limit", "-1"), "limit is -1.0: expected a finite number"),
    (("lm", "--device", "cpu", "--threads", "0"), "threads is 0: expected at least 1"),
    (("lm", "--device", "cpu", "--out", "no/where.json"), "no is not a folder"),
]


@pytest.mark.parametrize(("options", "told"), MISTAKES, ids=lambda x: str(x))
def test_mistake_is_named(
    options: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpurnn.bench.lm.command.measure", "gpurnn.bench.command.measure"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("measures"))
    done = invoke(*options)
    assert done.exit_code == 2 and told in done.stderr
    with pytest.raises(SystemExit, match="2"):
        bench_module.main(list(options))
    assert told in " ".join(capsys.readouterr().err.split())


def test_plot_is_not_of_the_language_model(tmp_path: Path) -> None:
    done = invoke("lm", "--plot", str(tmp_path / "lm.json"))
    assert done.exit_code == 2
    assert "lm.json: expected nothing, beside lm" in done.stderr
