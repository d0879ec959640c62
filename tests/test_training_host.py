"""What the host does to train on a GPU, without one: CuPy is a stand-in, graphs are replayed."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cupy
import numpy as np
import pytest
from fake_cupy import FakeCuPy
from training_setup import CORPUS, state_of, tiny, trained
from typer.testing import CliRunner

from gpurnn import language_model
from gpurnn.batches import RandomPartition
from gpurnn.cli import app
from gpurnn.doctor import language_model as doctor
from gpurnn.training import device as device_module
from gpurnn.training import prepare
from gpurnn.training.config import TrainingConfig
from gpurnn.training.run import Run


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuPy]:
    monkeypatch.setattr(device_module, "CHUNK", 2)
    yield fake_cupy.install(monkeypatch)
    fake_cupy.clear()


def small(**changes: Any) -> TrainingConfig:
    options = {"epochs": 2, "dtype": "float64", "num_steps": 3, "batch_size": 3, "hidden_size": 3}
    return tiny(**({"max_tokens": 52, "valid_fraction": 0.0} | options | changes))


def on_device(config: TrainingConfig, device: str = "cuda") -> Run:
    return prepare(config, CORPUS, device=device)


RUNS: dict[str, dict[str, Any]] = {
    "windows, the last batch smaller": {"sampling": "windows", "batch_size": 15},
    "a carried state, of two layers": {"sampling": "sequential", "num_layers": 2},
    "all there is": {
        "sampling": "sequential",
        "embedding_size": 2,
        "dropout": 0.3,
        "bptt": "randomized",
        "tau": 2,
        "optimizer": "adamw",
        "lr": 0.01,
        "activation": "softplus",
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_by_graphs_is_that_of_numpy(cupy: FakeCuPy, name: str) -> None:
    config = small(**RUNS[name])
    expected = trained(config)
    run = on_device(config, "cuda:1")
    assert run.model.device == "cuda:1"
    assert run.trainer.run()
    for record, other in zip(run.trainer.history, expected.trainer.history, strict=True):
        assert record["train_loss"] == pytest.approx(other["train_loss"], rel=1e-9)
        assert record["largest_gradient_norm"] == pytest.approx(
            other["largest_gradient_norm"], rel=1e-9
        )
    for key, a in run.model.to("cpu").params.items():
        np.testing.assert_allclose(a, expected.model.params[key], rtol=1e-8, atol=1e-10)
    shapes = 2 if name.startswith("windows") else 1
    assert len(cupy.graphs) == shapes
    assert len(cupy.replays) == run.trainer.progress.step
    assert {device for _, device in cupy.launches} == {1}


def test_the_card_has_the_next_steps_before_the_host_waits(cupy: FakeCuPy) -> None:
    run = on_device(small(sampling="sequential", epochs=1))
    seen: list[tuple[int, int]] = []

    def on_step() -> bool:
        seen.append((run.trainer.progress.step, len(cupy.replays)))
        return True

    run.trainer.run(on_step=on_step)
    steps = run.trainer.progress.step
    assert steps >= 5
    for told, replayed in seen[:-2]:
        assert replayed == min(told + 2, steps)  # two told of, two more on their way


@pytest.mark.parametrize("said", [1, None], ids=["nobody knew of", "some have"])
def test_a_longer_epoch_finds_room(
    cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch, said: int | None
) -> None:
    """Random offsets make some epochs longer: if tables have to move, what was captured goes."""
    if said is not None:
        monkeypatch.setattr(RandomPartition, "num_batches", said)
    config = small(sampling="random", epochs=4, max_tokens=46, seed=0)
    run = on_device(config)
    lengths: list[int] = []
    set_out = run.trainer._steps._set_out  # type: ignore[attr-defined]

    def begun(plan: Any) -> None:
        lengths.append(len(plan.batches))
        set_out(plan)

    run.trainer._steps._set_out = begun  # type: ignore[attr-defined]
    assert run.trainer.run()
    assert max(lengths) > lengths[0], f"no epoch is longer than the first, {lengths}: another seed"
    assert len(cupy.graphs) == (1 if said is None else 2)
    expected = trained(config)
    for record, other in zip(run.trainer.history, expected.trainer.history, strict=True):
        assert record["train_loss"] == pytest.approx(other["train_loss"], rel=1e-9)


def test_what_validates_is_put_there_once(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"train_windows": 12, "valid_windows": 9, "batch_size": 4, "epochs": 3}
    config = small(sampling="windows", **sizes)
    expected, put = trained(config), []
    inner = cupy.array
    monkeypatch.setattr(cupy, "array", lambda a: put.append(np.shape(a)) or inner(a))
    run = on_device(config)
    run.trainer.run()
    for record, other in zip(run.trainer.history, expected.trainer.history, strict=True):
        assert record["valid_loss"] == pytest.approx(other["valid_loss"], rel=1e-9)
        assert record["valid_perplexity_book"] == pytest.approx(
            other["valid_perplexity_book"], rel=1e-9
        )
    assert put.count((3, 4)) == 4 and put.count((3, 1)) == 2  # X and Y of three batches
    assert len(cupy.graphs) == 2  # a step, and validation
    means = [spec for spec, _ in cupy.launches if spec.kind == "stop_unless_finite"]
    assert len(means) == 1 + 3  # and a rehearsal


def test_a_validation_of_too_many_kernels_is_no_graph(
    cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"train_windows": 12, "valid_windows": 9, "batch_size": 4}
    config = small(sampling="windows", **sizes)
    expected, run = trained(config), on_device(config)
    nodes = run.trainer._steps._queued_validation.nodes  # type: ignore[attr-defined]
    assert 3 * 5 <= nodes <= 3 * 20  # three batches
    monkeypatch.setattr(device_module, "MOST_NODES", nodes - 1)
    run.trainer.run()
    assert len(cupy.graphs) == 1
    for record, other in zip(run.trainer.history, expected.trainer.history, strict=True):
        assert record["valid_loss"] == pytest.approx(other["valid_loss"], rel=1e-9)


@pytest.mark.parametrize(
    "validates",
    [{"train_windows": 14, "valid_windows": 9}, {"valid_fraction": 0.3}, {}],
    ids=["windows", "a stream", "nothing"],
)
def test_the_card_has_the_next_epoch_before_the_host_waits(
    cupy: FakeCuPy, validates: dict[str, Any]
) -> None:
    """And it is waited for at the beginning and where the results of older steps are read."""
    settled = []
    for epochs in (2, 4):
        config = small(sampling="windows", batch_size=4, epochs=epochs, max_tokens=30, **validates)
        run = on_device(config)
        p, steps, seen = run.trainer.progress, run.trainer._steps, []
        queued, settles = [], []
        recorder = steps._recorder  # type: ignore[attr-defined]
        again, settle = recorder.again, recorder.settle
        recorder.again = lambda key, *a, again=again, to=queued: (to.append(key), again(key, *a))
        recorder.settle = lambda settle=settle, to=settles: (to.append(1), settle())

        def on_step(p: Any = p, seen: Any = seen, queued: Any = queued) -> bool:
            seen.append((p.step, sum(isinstance(key, int) for key in queued)))
            return True

        assert run.trainer.run(on_step)
        total = p.step
        assert seen[-1] == (total, total)
        assert all(queued > told for told, queued in seen if told < total)
        assert queued.count("validation") == (epochs if validates else 0)
        assert all(record["seconds"] > 0 for record in run.trainer.history)
        settled.append(len(settles))
    assert settled[0] == settled[1]


def test_a_stream_is_validated_in_a_graph(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretch by stretch, each from the state before: here three of them."""
    monkeypatch.setattr(language_model, "EVALUATION_CHUNK", 3)
    monkeypatch.setattr(language_model, "NUMBERS_ON_GPU", 3)
    config = small(sampling="sequential", valid_fraction=0.2, epochs=3)
    expected, run = trained(config), on_device(config)
    run.trainer.run()
    assert len(run.trainer._steps._queued_validation.means) == 3  # type: ignore[attr-defined]
    for record, other in zip(run.trainer.history, expected.trainer.history, strict=True):
        assert record["valid_loss"] == pytest.approx(other["valid_loss"], rel=1e-9)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_on_a_gpu_that_is_not_the_current_one(cupy: FakeCuPy, layers: int) -> None:
    sizes = {"train_windows": 12, "valid_windows": 9, "batch_size": 4}
    config = small(sampling="windows", num_layers=layers, embedding_size=2, **sizes)
    expected, run = trained(config), on_device(config, "cuda:2")
    run.trainer.run()
    run.trainer.keep_best()
    expected.trainer.keep_best()
    text = CORPUS.text[:30]
    assert run.model.perplexity(text) == pytest.approx(expected.model.perplexity(text), rel=1e-8)
    book = expected.model.book_perplexity(text, num_steps=3, batch_size=7)
    found = run.model.book_perplexity(text, num_steps=3, batch_size=7)
    assert found == pytest.approx(book, rel=1e-8)
    assert run.model.generate("ab", 5, seed=1) == expected.model.generate("ab", 5, seed=1)
    state, _ = run.model.step(np.array([1, 2]), run.model.init_state(2))
    assert state.device.id == 2
    run.model.load_params(expected.model.params)
    assert run.model.device == "cuda:2"
    assert cupy.current.id == 0


def test_runs_one_after_the_other(cupy: FakeCuPy) -> None:
    """What the first leaves to the next, constants for one, must not go with the first's pool."""
    config = small(sampling="sequential", dropout=0.2)
    first = on_device(config)
    first.trainer.run()
    expected = state_of(first)
    del first
    gc.collect()
    second = on_device(config)
    second.trainer.run()
    assert state_of(second) == expected


def test_a_last_batch_of_another_size_keeps_its_constants(cupy: FakeCuPy) -> None:
    """The first step of it comes when a graph is free to write to all of the pool."""
    config = small(sampling="windows", batch_size=40, epochs=3)  # 40 and 9 windows
    expected, run = trained(config), on_device(config)
    run.trainer.run()
    for record, other in zip(run.trainer.history, expected.trainer.history, strict=True):
        assert record["train_loss"] == pytest.approx(other["train_loss"], rel=1e-9)


def test_paused_and_resumed_by_graphs(cupy: FakeCuPy) -> None:
    config = small(sampling="sequential", optimizer="adamw", lr=0.01, dropout=0.2)
    whole = on_device(config)
    whole.trainer.run()
    first = on_device(config)
    assert first.trainer.run(on_step=lambda: False) is False
    second = on_device(config)
    second.trainer.restore(first.trainer.contents())
    second.trainer.run()
    assert state_of(second) == state_of(whole)


def test_devices_by_name(cupy: FakeCuPy) -> None:
    model = on_device(small()).model
    assert model.device == "cuda:0"
    assert model.to("cpu").device == "cpu"
    assert all(type(p) is np.ndarray for p in model.params.values())
    assert model.to("cuda:3").device == "cuda:3"
    with pytest.raises(ValueError, match="CUDA device 9 cannot be used"):
        model.to("cuda:9")
    assert model.device == "cuda:3"


def test_doctor_trains_and_generates(cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "why_no_gpu", lambda: None)
    assert max(doctor.SIZES) == ("float64", 9) and ("float32", 300) in doctor.SIZES
    monkeypatch.setattr(doctor, "SIZES", doctor.SIZES[:2])
    found = {finding.name: finding for finding in doctor.gpu_checks()}
    assert set(found) == {
        f"GPU, {what}, {dtype}, h 9"
        for what in ("training", "generation")
        for dtype in ("float32", "float64")
    }
    assert {finding.status for finding in found.values()} == {"ok"}, found


def test_doctor_finds_a_run_that_is_another(
    cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "why_no_gpu", lambda: None)
    inner = device_module.update.update

    def forgets_the_gradients(*arguments: Any) -> None:
        arguments[2].grads.fill(0)
        inner(*arguments)

    monkeypatch.setattr(device_module.update, "update", forgets_the_gradients)
    monkeypatch.setattr(doctor, "SIZES", (("float64", 9),))
    found = {finding.name: finding for finding in doctor.gpu_checks()}
    assert found["GPU, training, float64, h 9"].status == "failed"
    assert "wrong numbers" in found["GPU, training, float64, h 9"].detail


BAD_IDS: dict[str, Any] = {
    "a mask": np.ma.masked_equal(np.array([[0, 1], [2, 3]]), 3),
    "a list": [[0, 1], [2, 3]],
    "objects": np.array([[0, 1], [2, 3]], object),
    "too large": np.array([[0, 1], [2, 77]]),
    "negative": np.array([[0, -1], [2, 3]]),
}


@pytest.mark.parametrize("what", BAD_IDS)
def test_ids_that_are_none_are_refused_as_on_numpy(cupy: FakeCuPy, what: str) -> None:
    good, bad = np.array([[0, 1], [2, 3]]), BAD_IDS[what]
    on_numpy, there = prepare(small(), CORPUS).model, on_device(small()).model
    calls = [
        lambda model: model.forward(bad),
        lambda model: model.loss_and_gradients(bad, good),
        lambda model: model.loss_and_gradients(good, bad),
        lambda model: model.negative_log_likelihood(good, bad),
    ]
    for call in calls:
        told = []
        for model in (on_numpy, there):
            with pytest.raises((TypeError, ValueError)) as caught:
                call(model)
            told.append(str(caught.value).split(":")[0])
        assert told[0] == told[1]


def test_commands_on_a_gpu(cupy: FakeCuPy, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "model.safetensors"
    text.write_text("abcde fghij " * 12, encoding="utf-8")
    options = "--hidden-size 3 --num-steps 3 --batch-size 4 --epochs 2 --dtype float64 --lr 0.01"
    told = []
    for device in ("cpu", "cuda"):
        arguments = ["train", str(text), "--out", str(out), "--overwrite", *options.split()]
        ended = CliRunner().invoke(app, [*arguments, "--json", "--device", device])
        assert ended.exit_code == 0, ended.output
        told.append(json.loads(ended.stdout))
    assert told[1]["valid_loss"] == pytest.approx(told[0]["valid_loss"], rel=1e-8)
    assert told[1]["sample"] == told[0]["sample"]
    assert cupy.replays
    launches = len(cupy.launches)
    for command in (["eval", str(out), str(text)], ["generate", str(out), "--prefix", "ab", "-n"]):
        found = []
        for device in ("cpu", "cuda"):
            more = ["9", "--seed", "1"] if command[-1] == "-n" else []
            ended = CliRunner().invoke(app, [*command, *more, "--device", device])
            assert ended.exit_code == 0, ended.output
            found.append(ended.stdout)
        assert found[0] == found[1]
        assert len(cupy.launches) > launches
        launches = len(cupy.launches)
