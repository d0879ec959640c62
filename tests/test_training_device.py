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
from training_setup import CORPUS, prepared, state_of, tiny, trained

import gpurnn
from gpurnn.batches import SequentialPartition
from gpurnn.doctor.device import why_no_gpu
from gpurnn.training import Trainer, TrainingDiverged, prepare
from gpurnn.training import device as device_module
from gpurnn.training.config import TrainingConfig
from gpurnn.training.device import DeviceSteps
from gpurnn.training.run import Run

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
def test_a_run_that_diverges_says_so_and_keeps_what_it_had(
    optimizer: str, chunks_of_two: None
) -> None:
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
    assert ours.arrays.keys() == theirs.arrays.keys()
    for name, a in theirs.arrays.items():
        np.testing.assert_allclose(ours.arrays[name], a, rtol=1e-9, err_msg=name)


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

    def again(key: Any, queue: Any) -> None:
        inner(key, queue)
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
    inner, calls = steps._put, [0]

    def put(name: str, a: Any) -> None:
        calls[0] += 1
        if calls[0] == 6:  # in the second epoch, whose batches nobody has begun
            raise KeyboardInterrupt
        inner(name, a)

    monkeypatch.setattr(steps, "_put", put)
    with pytest.raises(KeyboardInterrupt):
        run.trainer.run()
    step = run.trainer.progress.step
    assert run.trainer.contents().document["progress"]["step"] == step
    assert run.trainer.run()
    assert run.trainer.progress.step == whole.trainer.progress.step
