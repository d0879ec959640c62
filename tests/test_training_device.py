"""Training by kernels, under the emulator, against training on NumPy."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from group_setup import SMALL_CARD
from tolerance import assert_same_bits
from training_setup import CORPUS, prepared, state_of, tiny, trained

import gpurnn
from gpurnn.training import TrainingDiverged, prepare
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
    with pytest.raises((ImportError, ValueError), match=r"CuPy|GPU|cuda"):
        prepare(small(), CORPUS, device="cuda")
    with pytest.raises(ValueError, match=r"device is 'gpu': expected 'cpu', 'cuda' or 'cuda:N'"):
        prepare(small(), CORPUS, device="gpu")
