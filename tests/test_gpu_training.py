"""Training and evaluation on a GPU against NumPy, and where the book's own run arrives there."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from gpu_setup import GPU, cp, gpu
from test_published import BOOK, DEEP, assert_arrived, last_epochs
from timemachine import require_time_machine
from training_setup import CORPUS, TEXT, prepared, state_of, tiny, trained

import gpurnn
from gpurnn.optimizers import OPTIMIZERS, clip_global_norm, make_optimizer
from gpurnn.training import PRESETS, TrainingDiverged, prepare
from gpurnn.training.config import TrainingConfig
from gpurnn.training.device import DeviceSteps
from gpurnn.training.run import Run
from gpurnn.validate import NonFiniteError

__all__ = ["cp", "gpu"]  # fixtures

pytestmark = pytest.mark.gpu

RUNS: dict[str, dict[str, Any]] = {
    "windows, the last batch smaller": {"sampling": "windows", "batch_size": 50},
    "random partitions": {"sampling": "random", "optimizer": "momentum", "lr": 0.1},
    "a carried state of two layers": {"sampling": "sequential", "num_layers": 2},
    "an embedding": {"embedding_size": 3, "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "dropout and truncation": {"dropout": 0.3, "bptt": "randomized", "tau": 3},
    "groups": {"hidden_size": 300, "sampling": "sequential"},
}


def on_gpu(config: TrainingConfig) -> Run:
    run = prepare(config, CORPUS, device="cuda")
    assert isinstance(run.trainer._steps, DeviceSteps)
    return run


def finished(run: Run) -> Run:
    assert run.trainer.run()
    return run


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_run_is_that_of_numpy(gpu: GPU, name: str, dtype: str) -> None:
    config = tiny(**RUNS[name], dtype=dtype, epochs=4)
    expected, found = trained(config), finished(on_gpu(config))
    rel = 1e-3 if dtype == "float32" else 1e-9
    for record, other in zip(found.trainer.history, expected.trainer.history, strict=True):
        for key in ("step", "tokens", "lr"):
            assert record[key] == other[key]
        for key in ("train_loss", "valid_loss", "largest_gradient_norm"):
            assert record[key] == pytest.approx(other[key], rel=rel), key
    assert found.model.perplexity(TEXT) == pytest.approx(expected.model.perplexity(TEXT), rel=rel)


def test_the_first_hundred_losses_of_the_book_are_those_of_numpy(gpu: GPU) -> None:
    require_time_machine()
    config = dataclasses.replace(PRESETS["book"], epochs=10)
    losses = []
    for device in ("cpu", "cuda"):
        run = prepare(config, device=device)
        by_epoch: dict[int, list[float]] = {}

        def on_step(run: Run = run, by_epoch: dict[int, list[float]] = by_epoch) -> bool:
            progress = run.trainer.progress
            by_epoch[progress.epoch] = list(progress.losses)
            return True

        run.trainer.run(on_step)
        losses.append([loss for epoch in range(10) for loss in by_epoch[epoch]])
    assert len(losses[0]) == 100
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.parametrize(("preset", "window"), [("book", BOOK), ("book-deep", DEEP)])
def test_published_runs(gpu: GPU, preset: str, window: Any) -> None:
    require_time_machine()
    run = finished(prepare(PRESETS[preset], device="cuda"))
    assert_arrived(run, window)


def test_published_run_of_2022(gpu: GPU) -> None:
    require_time_machine()
    run = finished(prepare(PRESETS["book-2022"], device="cuda"))
    assert 1.0 <= run.trainer.history[-1]["train_perplexity"] <= 1.2
    assert 1.0 <= last_epochs(run) <= 1.1


def test_the_same_run_has_the_same_bits_paused_or_not(gpu: GPU) -> None:
    config = tiny(sampling="sequential", dropout=0.2, optimizer="adamw", lr=0.01, epochs=20)
    whole, again = finished(on_gpu(config)), finished(on_gpu(config))
    assert state_of(again) == state_of(whole)
    first = on_gpu(config)
    assert first.trainer.run(on_step=lambda: False) is False
    second = on_gpu(config)
    second.trainer.restore(first.trainer.contents())
    assert state_of(finished(second)) == state_of(whole)


def test_a_checkpoint_goes_on_elsewhere(gpu: GPU) -> None:
    config = tiny(sampling="sequential", optimizer="adamw", lr=0.01, dtype="float64")
    whole = trained(config)
    half = prepared(dataclasses.replace(config, epochs=1))
    half.trainer.run()
    run = on_gpu(config)
    run.trainer.restore(half.trainer.contents())
    for name, a in finished(run).model.to("cpu").params.items():
        np.testing.assert_allclose(a, whole.model.params[name], rtol=1e-8, atol=1e-10)


def test_a_run_that_diverges_says_so(gpu: GPU) -> None:
    config = tiny(activation="relu", clip=None, lr=1e30)
    with pytest.raises(TrainingDiverged) as expected:
        prepared(config).trainer.run()
    run = on_gpu(config)
    with pytest.raises(TrainingDiverged) as caught:
        run.trainer.run()
    assert str(caught.value).split(":")[0] == str(expected.value).split(":")[0]
    for name, a in run.model.to("cpu").params.items():
        assert np.isfinite(a).all(), name


def test_a_model_moves_and_evaluates_where_it_lies(gpu: GPU, tmp_path: Any) -> None:
    model = prepared(tiny(num_layers=2, embedding_size=4)).model
    expected = model.evaluate(TEXT)
    book = model.book_perplexity(TEXT, num_steps=5, batch_size=20)
    assert model.to("cuda").device.startswith("cuda:")
    assert model.evaluate(TEXT).nats == pytest.approx(expected.nats, rel=1e-5)
    assert model.book_perplexity(TEXT, num_steps=5, batch_size=20) == pytest.approx(book, rel=1e-5)
    X = np.zeros((3, 2), np.int64)
    O, state = model.forward(X)
    assert type(O) is gpu.cp.ndarray and type(state) is gpu.cp.ndarray
    path = tmp_path / "model.safetensors"
    model.save(path)
    loaded = gpurnn.LanguageModel.load(path)
    assert loaded.device == "cpu"
    np.testing.assert_allclose(gpu.get(O), loaded.forward(X)[0], rtol=1e-4, atol=1e-5)
    assert model.to("cpu").device == "cpu"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(gpu: GPU, name: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"W": (70, 30), "b": (30,)}
    params = {k: rng.standard_normal(s) for k, s in shapes.items()}
    there = {k: gpu.put(p) for k, p in params.items()}
    ours, theirs = make_optimizer(name, there), make_optimizer(name, params)
    for _ in range(3):
        grads = {k: rng.standard_normal(s) for k, s in shapes.items()}
        put = {k: gpu.put(g) for k, g in grads.items()}
        assert clip_global_norm(put, 1.0) == pytest.approx(clip_global_norm(grads, 1.0), rel=1e-12)
        ours.step(there, put, 0.1)
        theirs.step(params, grads, 0.1)
    for key, p in params.items():
        np.testing.assert_allclose(gpu.get(there[key]), p, rtol=1e-11, atol=1e-13)
    put["W"][1, 2] = np.inf
    before = gpu.get(there["W"])
    with pytest.raises(NonFiniteError, match="W holds inf at index"):
        ours.step(there, put, 0.1)
    np.testing.assert_array_equal(gpu.get(there["W"]), before)
