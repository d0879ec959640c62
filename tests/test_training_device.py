"""Training by kernels, under the emulator, against training on NumPy."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from group_setup import SMALL_CARD
from tolerance import assert_same_bits
from training_setup import (
    CORPUS,
    SHORTEST,
    assert_same_params,
    params_of,
    prepared,
    state_of,
    tiny,
    trained,
)

import gpurnn
from gpurnn.batches import SequentialPartition
from gpurnn.doctor.device import why_no_gpu
from gpurnn.training import Losses, Trainer, TrainingDiverged, device_validation, prepare
from gpurnn.training import device as device_module
from gpurnn.training.config import TrainingConfig
from gpurnn.training.device import DeviceSteps
from gpurnn.training.run import Run
from gpurnn.training.steps import Plan
from gpurnn.training.tables import Tables

# float64: every difference between the two is one of rounding, and stays one for a few updates
CLOSE = 1e-9


@pytest.fixture
def emulated() -> Iterator[None]:
    with gpurnn.emulated(SMALL_CARD):
        yield


@pytest.fixture
def chunks_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "CHUNK", 2)


def small(**changes: Any) -> TrainingConfig:
    options = {"epochs": 2, "dtype": "float64", "num_steps": 4, "batch_size": 7, "max_tokens": 140}
    return tiny(**(options | changes))


def assert_same_run(found: Run, expected: Run, rel: float = CLOSE) -> None:
    for record, other in zip(found.trainer.history, expected.trainer.history, strict=True):
        for name, value in other.items():
            if name not in ("seconds", "tokens_per_second"):
                assert record[name] == pytest.approx(value, rel=rel), name
    for name, a in expected.model.params.items():
        np.testing.assert_allclose(found.model.params[name], a, rtol=rel, atol=rel)
    ours, theirs = found.trainer.contents(), expected.trainer.contents()
    assert ours.arrays.keys() == theirs.arrays.keys()
    for name, a in theirs.arrays.items():
        assert ours.arrays[name].dtype == a.dtype, name
        np.testing.assert_allclose(ours.arrays[name], a, rtol=rel, atol=rel, err_msg=name)


RUNS: dict[str, dict[str, Any]] = {
    "windows, the last batch smaller": {"sampling": "windows", "batch_size": 20, "max_tokens": 60},
    "random partitions": {"sampling": "random", "optimizer": "momentum", "lr": 0.1},
    "a carried state": {"sampling": "sequential", "optimizer": "adamw", "lr": 0.01},
    "a carried state of two layers": {"sampling": "sequential", "num_layers": 2, "hidden_size": 3},
    "an embedding": {"embedding_size": 3, "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "dropout": {"dropout": 0.3},
    "truncated": {"bptt": "truncated", "tau": 2},
    "randomized truncation": {"bptt": "randomized", "tau": 2},
    "clipping and a schedule": {"clip": 0.05, "schedule": "cosine", "warmup": 3},
    "never clipped": {"clip": None, "activation": "relu"},
    "pre-activations": {"activation": "softplus"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_numpy(name: str) -> None:
    config = small(**RUNS[name])
    expected = trained(config)
    with gpurnn.emulated(SMALL_CARD):
        found = trained(config)
        assert isinstance(found.trainer._steps, DeviceSteps)
    assert_same_run(found, expected)


def test_a_run_in_float32(emulated: None) -> None:
    found = trained(small(dtype="float32", epochs=1))
    assert found.model.params["W_hh"].dtype == np.float32
    exact = trained(small(epochs=1))
    for record, other in zip(found.trainer.history, exact.trainer.history, strict=True):
        assert record["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


@pytest.mark.parametrize("sampling", ["windows", "sequential"])
def test_a_run_that_is_paused_and_resumed_has_the_same_bits(
    sampling: str, emulated: None, chunks_of_two: None
) -> None:
    options = {"dropout": 0.2, "bptt": "randomized", "tau": 3, "optimizer": "adamw", "lr": 0.01}
    shape = {"windows": (9, 40), "sequential": (3, 90)}[sampling]
    config = small(sampling=sampling, batch_size=shape[0], max_tokens=shape[1], **options)
    whole = trained(config)
    first = prepared(config)
    assert first.trainer.run(on_step=lambda: False) is False
    done = first.trainer.progress.step
    assert 2 <= done <= 4  # two were told of, and two more were on their way
    second = prepared(config)
    second.trainer.restore(first.trainer.contents())
    assert second.trainer.progress.step == done
    assert second.trainer.run()
    assert state_of(second) == state_of(whole)
    assert first.trainer.run()  # as if it had not been paused
    assert state_of(first) == state_of(whole)


def test_a_checkpoint_goes_from_one_device_to_the_other() -> None:
    config = small(sampling="sequential", optimizer="adamw", lr=0.01, batch_size=3)
    whole = trained(config)
    half = prepared(dataclasses.replace(config, epochs=1))
    half.trainer.run()
    with gpurnn.emulated(SMALL_CARD):
        found = prepared(config)
        found.trainer.restore(half.trainer.contents())
        found.trainer.run()
    back = prepared(config)
    back.trainer.restore(found.trainer.contents())
    assert_same_run(back, whole)


def test_reading_the_state_in_the_middle_changes_nothing(
    emulated: None, chunks_of_two: None
) -> None:
    config = small(sampling="sequential", batch_size=3, max_tokens=90, epochs=1)
    whole, looked_at = trained(config), prepared(config)
    assert looked_at.trainer.run(on_step=lambda: bool(looked_at.trainer.contents()))
    assert state_of(looked_at) == state_of(whole)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("chunk", [2, 16])
def test_a_run_that_diverges_says_so_and_keeps_what_it_had(
    optimizer: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "CHUNK", chunk)
    lr = {"sgd": 1e200, "adamw": 1e290}[optimizer]
    config = small(activation="relu", clip=None, optimizer=optimizer, lr=lr, sampling="sequential")
    numpy = prepared(config)
    with pytest.raises(TrainingDiverged) as expected:
        numpy.trainer.run()
    with gpurnn.emulated(SMALL_CARD):
        run = prepared(config)
        with pytest.raises(TrainingDiverged) as caught:
            run.trainer.run()
    when = re.compile(r"training diverged at update \d+ \(epoch \d+\)")
    told = [when.match(str(e.value)) for e in (caught, expected)]
    assert told[0] is not None and told[1] is not None
    assert told[0][0] == told[1][0]
    assert run.trainer.progress.step == numpy.trainer.progress.step
    ours, theirs = run.trainer.contents(), numpy.trainer.contents()
    assert "state.hidden" in theirs.arrays
    assert ours.arrays.keys() == theirs.arrays.keys()
    for name, a in theirs.arrays.items():
        np.testing.assert_allclose(ours.arrays[name], a, rtol=1e-9, err_msg=name)
    with gpurnn.emulated(SMALL_CARD), pytest.raises(TrainingDiverged, match=re.escape(told[0][0])):
        run.trainer.run()  # nothing has become better


def test_parameters_are_views_of_one_array_and_the_model_still_saves(
    emulated: None, tmp_path: Any
) -> None:
    run = trained(small())
    assert len({id(p.base) for p in run.model.params.values()}) == 1
    path = tmp_path / "model.safetensors"
    run.model.save(path)
    loaded = gpurnn.LanguageModel.load(path)
    for name, a in run.model.params.items():
        assert_same_bits(name, loaded.params[name], a)


def test_a_device_that_is_not_there_is_refused() -> None:
    if why_no_gpu() is None:
        pytest.skip("there is a GPU")
    with pytest.raises((ImportError, ValueError), match=r"CuPy|GPU|cuda"):
        prepare(small(), CORPUS, device="cuda")
    with pytest.raises(ValueError, match=r"device is 'gpu': expected 'cpu', 'cuda' or 'cuda:N'"):
        prepare(small(), CORPUS, device="gpu")


def test_ids_outside_the_vocabulary_are_refused_before_anything_runs() -> None:
    for bad in (77, -1, (1 << 32) + 1):
        run = prepared(small())
        ids = np.array(run.train_ids, np.int64)
        ids[5] = bad
        sampler = SequentialPartition(ids, 4, 3)
        with (
            gpurnn.emulated(SMALL_CARD),
            pytest.raises(ValueError, match=rf"ids holds the id {bad} at index \(5,\)"),
        ):
            Trainer(run.model, sampler, run.config)


def test_what_interrupts_leaves_the_count_right(emulated: None, chunks_of_two: None) -> None:
    """Ctrl-C where the host waits, an exception of on_step: the run goes on to the same bits."""
    config = small(sampling="sequential", batch_size=3, max_tokens=60, epochs=3)
    whole, run = trained(config), prepared(config)
    steps = run.trainer._steps
    assert isinstance(steps, DeviceSteps)
    inner, calls = steps._recorder.read, [0]

    def interrupted(a: Any) -> Any:
        read = inner(a)

        def wait() -> Any:
            calls[0] += 1
            if calls[0] == 2:
                raise KeyboardInterrupt
            return read()

        return wait

    steps._recorder.read = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.trainer.run()
    made = run.trainer.progress.step
    counted = prepared(config)
    counted.trainer.restore(run.trainer.contents())
    assert counted.trainer.progress.step > made

    def fails() -> bool:
        raise OSError("nobody to tell")

    with pytest.raises(OSError, match="nobody"):
        run.trainer.run(on_step=fails)
    for one in (run, counted):
        assert one.trainer.run()
        assert state_of(one) == state_of(whole)


def test_a_step_queued_but_not_noted_is_counted(emulated: None, chunks_of_two: None) -> None:
    config = small(sampling="sequential", batch_size=3, max_tokens=90, epochs=1)
    whole, run = trained(config), prepared(config)
    steps = run.trainer._steps
    assert isinstance(steps, DeviceSteps)
    inner, calls = steps._recorder.again, [0]

    def again(key: Any, *queue: Any) -> None:
        inner(key, *queue)
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt

    steps._recorder.again = again  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.trainer.run()
    assert run.trainer.contents().document["progress"]["step"] == 2
    assert run.trainer.run()
    assert state_of(run) == state_of(whole)


def test_parameters_that_are_replaced_are_trained(emulated: None) -> None:
    config = small(epochs=1)
    expected, run = trained(config), prepared(config)
    run.model.use_params({name: p.copy() for name, p in run.model.params.items()})
    run.trainer.run()
    for name, a in expected.model.params.items():
        assert_same_bits(name, run.model.params[name], a)
    with pytest.raises(ValueError, match="expected"):
        run.model.use_params({"W_hq": run.model.params["W_hq"]})


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_the_optimizer_s_own_arrays_are_those_that_are_updated(
    optimizer: str, emulated: None
) -> None:
    run = trained(small(optimizer=optimizer, lr=0.01, epochs=1))
    assert np.abs(run.trainer.optimizer.state["v.W_hh"]).max() > 0
    if optimizer == "adamw":
        assert run.trainer.optimizer.state["updates"] == run.trainer.progress.step


def test_the_logits_are_held_once(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than one array of (T · n, q): their gradient is written over them."""
    run = prepared(small(epochs=1, sampling="sequential", batch_size=3, max_tokens=30))
    q, made = len(run.model.vocabulary), []
    engine = run.trainer._steps._engine  # type: ignore[attr-defined]
    inner = type(engine.xp).empty

    def counted(self: Any, shape: Any, dtype: Any) -> Any:
        if np.prod(shape) == 4 * 3 * q:
            made.append(shape)
        return inner(self, shape, dtype)

    monkeypatch.setattr(type(engine.xp), "empty", counted)
    steps = run.trainer.progress
    run.trainer.run()
    assert len(made) == steps.step > 0


@pytest.mark.slow
def test_a_hundred_losses_are_those_of_numpy() -> None:
    config = tiny(
        sampling="windows",
        num_steps=2,
        batch_size=2,
        hidden_size=2,
        epochs=1,
        max_tokens=204,
        valid_fraction=0.0,
        dtype="float64",
        optimizer="adamw",
        lr=0.01,
    )
    losses = []
    for context in (nullcontext(), gpurnn.emulated(SMALL_CARD, check_races=False)):
        with context:
            run = prepared(config)
            told: list[float] = []

            def on_step(run: Run = run, told: list[float] = told) -> bool:
                told[:] = run.trainer.progress.losses
                return True

            run.trainer.run(on_step)
            losses.append(told)
    assert len(losses[0]) == 101
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-9)


def test_an_interruption_while_an_epoch_is_set_up_counts_nothing(
    emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(sampling="sequential", batch_size=3, max_tokens=60)
    whole, run = trained(config), prepared(config)
    steps = run.trainer._steps
    assert isinstance(steps, DeviceSteps)
    inner, calls = Tables.write, [0]

    def write(self: Tables, plan: Plan, *rest: Any) -> None:
        calls[0] += plan.first == 0 and plan.update > 0
        if calls[0] == 1:  # in the second epoch, whose batches nobody has begun
            raise KeyboardInterrupt
        inner(self, plan, *rest)

    monkeypatch.setattr(Tables, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run.trainer.run()
    counted = run.trainer.contents().document["progress"]
    assert counted["epoch"] == 1 and counted["batch"] == 0
    calls[0] = 2
    assert run.trainer.run()
    assert state_of(run) == state_of(whole)


class Interrupting:
    """A recorder at which somebody presses Ctrl-C: at a call, before it does anything or after."""

    def __init__(self, inner: Any, at: int, *, after: bool) -> None:
        self.inner, self.at, self.after, self.calls = inner, at, after, 0

    def _called(self, call: Any, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.at and not self.after:
            raise KeyboardInterrupt
        found = call(*arguments)
        if self.calls == self.at:
            raise KeyboardInterrupt
        return found

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.inner, name)
        return lambda *arguments: self._called(call, *arguments)

    def read(self, a: Any) -> Any:
        read = self._called(self.inner.read, a)
        return lambda: self._called(read)


def to_the_end(run: Run, *, paused: bool) -> None:
    """Train; ``paused``: with a pause and a checkpoint wherever there can be one."""
    while not run.trainer.run(on_step=lambda: not paused):
        run.trainer.contents()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "paused"),
    [(False, False), (True, False), (True, True)],
    ids=["before", "after", "after, in pauses"],
)
def test_wherever_it_is_interrupted_it_goes_on_to_the_same_bits(
    chunks_of_two: None, *, after: bool, paused: bool
) -> None:
    """At each call of the recorder that training makes: where it queues, copies or waits."""
    config = dataclasses.replace(SHORTEST, dtype="float64")
    with gpurnn.emulated(SMALL_CARD, check_races=False):
        whole = state_of(trained(config))
        at, interrupted = 0, True
        while interrupted:
            at, interrupted = at + 1, False
            run = prepared(config)
            steps = run.trainer._steps
            recorder = Interrupting(steps._recorder, at, after=after)  # type: ignore[attr-defined]
            steps._recorder = recorder  # type: ignore[attr-defined]
            try:
                to_the_end(run, paused=paused)
            except KeyboardInterrupt:
                interrupted = True
                if at % 3 == 0:
                    other = prepared(config)
                    other.trainer.restore(run.trainer.contents())
                    to_the_end(other, paused=False)
                    assert state_of(other) == whole, at
                to_the_end(run, paused=False)
            recorder.at = 0
            assert state_of(run) == whole, at
    assert at > 20


def test_on_epoch_finds_the_parameters_of_the_epoch_s_end(
    emulated: None, chunks_of_two: None
) -> None:
    config = small(sampling="sequential", batch_size=3, max_tokens=90, epochs=3)
    run, found = prepared(config), []
    run.trainer.run(on_epoch=lambda _: found.append(params_of(run)))
    assert len(found) == 3
    for epochs, ours in enumerate(found, start=1):  # a run that ends there cannot have gone on
        alone = trained(dataclasses.replace(config, epochs=epochs))
        assert_same_params(ours, params_of(alone))


def test_ahead_of_on_epoch_the_best_is_known_and_a_checkpoint_can_be_made(
    emulated: None, chunks_of_two: None
) -> None:
    config = small(sampling="sequential", batch_size=3, max_tokens=90, epochs=4, valid_fraction=0.3)
    whole, run = trained(config), prepared(config)
    p, best, contents, steps = run.trainer.progress, [], [], []

    def on_epoch(record: dict[str, Any]) -> None:
        steps.append((record["step"], p.step))
        best.append({name: a.copy() for name, a in run.trainer.best.items()})
        contents.append(run.trainer.contents())

    assert run.trainer.run(on_epoch=on_epoch, ahead=True)
    assert state_of(run) == state_of(whole)
    assert [record["step"] for record in run.trainer.history] == [step for step, _ in steps]
    losses = [record["valid_loss"] for record in run.trainer.history]
    again = prepared(config)
    kept = {}
    again.trainer.run(on_epoch=lambda r: kept.update({r["epoch"]: params_of(again)}))
    for i, found in enumerate(best):
        assert_same_params(found, kept[1 + int(np.argmin(losses[: i + 1]))])
    for one in contents[:3]:
        other = prepared(config)
        other.trainer.restore(one)
        assert other.trainer.run()
        assert state_of(other) == state_of(whole)


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_ends_a_run_where_it_does_on_numpy(patience: int, chunks_of_two: None) -> None:
    """No epoch is begun that might not be: the parameters are those of the last one's end."""
    config = small(
        sampling="sequential",
        batch_size=3,
        max_tokens=70,
        epochs=30,
        lr=30.0,
        clip=None,
        patience=patience,
        valid_fraction=0.3,
    )
    expected = trained(config)
    assert patience < len(expected.trainer.history) < 30
    with gpurnn.emulated(SMALL_CARD):
        found = trained(config)
    assert len(found.trainer.history) == len(expected.trainer.history)
    assert found.trainer.progress.best_epoch == expected.trainer.progress.best_epoch
    assert_same_run(found, expected, rel=1e-6)


@pytest.mark.parametrize("sampling", ["windows", "sequential"])
def test_what_validation_spoils_stops_where_the_epoch_ended(
    sampling: str, emulated: None, chunks_of_two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"windows": (9, 60), "sequential": (3, 90)}[sampling]
    sizes: dict[str, Any] = {"batch_size": shape[0], "max_tokens": shape[1], "valid_fraction": 0.3}
    config = small(sampling=sampling, epochs=4, **sizes)
    half = trained(dataclasses.replace(config, epochs=2))
    run = prepared(config)
    inner, calls = device_validation.losses.mean, [0]

    def spoilt(engine: Any, nll: Any, out: Any) -> None:
        calls[0] += 1
        inner(engine, nll, out)
        if calls[0] == 2:
            out[...] = np.nan

    monkeypatch.setattr(device_validation.losses, "mean", spoilt)
    step = half.trainer.progress.step
    told = rf"diverged at update {step} \(epoch 2\): in validation, the loss is nan\. Try a lower"
    with pytest.raises(TrainingDiverged, match=told):
        run.trainer.run()
    assert calls[0] >= 2
    assert run.trainer.progress.step == step
    assert len(run.trainer.history) == 1
    ours, theirs = run.trainer.contents().arrays, half.trainer.contents().arrays
    for name, a in theirs.items():
        if name.startswith(("model.", "optimizer.")):
            assert_same_bits(name, ours[name], a)
    assert run.trainer.run()  # where it had stopped, validated anew
    assert len(run.trainer.history) == 4


class LooksAtTheModel:
    """A validation that is none in batches; it fails once, and so does its record."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.calls, self.records = 0, 0

    def __call__(self, model: gpurnn.LanguageModel) -> Losses:
        self.calls += 1
        if self.calls == 2:
            raise OSError("no such text")
        self.seen.append({name: a.copy() for name, a in model.params.items()})
        return Losses((model.evaluate("abcab").nats,), (4,))

    def record(self, losses: Losses) -> dict[str, float | None]:
        self.records += 1
        if self.records == 2:
            raise OSError("no such name")
        return {"valid_mine": losses.mean}


def test_a_validation_of_one_s_own_sees_the_model_at_the_epoch_s_end(
    emulated: None, chunks_of_two: None
) -> None:
    config = small(sampling="sequential", batch_size=3, max_tokens=90, epochs=3)
    expected, kept = prepared(config), []
    expected.trainer.run(on_epoch=lambda _: kept.append(params_of(expected)))
    model, mine = prepared(config).model, LooksAtTheModel()
    trainer = Trainer(model, expected.trainer.sampler, config, mine)
    with pytest.raises(OSError, match="no such text"):
        trainer.run()
    step = trainer.progress.step
    assert trainer.contents().document["progress"]["step"] == step
    assert trainer.progress.epoch == 1 and trainer.progress.batch > 0
    with pytest.raises(OSError, match="no such name"):
        trainer.run()
    assert trainer.progress.epoch == len(trainer.history) == 1
    assert trainer.run()
    assert trainer.history[-1]["step"] == trainer.progress.step == 3 * step // 2
    assert ["valid_mine" in record for record in trainer.history] == [True] * 3
    assert len(mine.seen) == 3
    for theirs, ours in zip(kept, mine.seen, strict=True):
        assert_same_params(ours, theirs)


def test_restored_after_an_exception_nothing_of_before_is_counted(
    emulated: None, chunks_of_two: None
) -> None:
    config = small(sampling="sequential", batch_size=3, max_tokens=60, epochs=3)
    whole, run = trained(config), prepared(config)
    first = run.trainer.contents()

    def fails() -> bool:
        raise OSError("nobody to tell")

    with pytest.raises(OSError, match="nobody"):
        run.trainer.run(on_step=fails)
    run.trainer.restore(first)
    assert run.trainer.run()
    assert state_of(run) == state_of(whole)
