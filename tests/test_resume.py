"""What a session must not do to its own run, and to the files of another."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpurnn import checkpoint
from gpurnn.training import SaveError, Session, TrainingConfig, TrainingDiverged, resume, start
from gpurnn.training.interrupts import noticed_interrupts

TEXT = "the cat sat on the mat and the rat sat on the cat " * 8


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    corpus = tmp_path / "text.txt"
    corpus.write_text(TEXT)
    return TrainingConfig(
        corpus=str(corpus),
        sampling="random",
        num_steps=5,
        batch_size=4,
        hidden_size=6,
        epochs=3,
        lr=0.05,
        schedule="constant",
        warmup=0,
        dropout=0.3,
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def stop_at(session: Session, step: int) -> None:
    """Train until the update ``step``, as by Ctrl-C."""

    def interrupt() -> None:
        if session.run.trainer.progress.step == step:
            signal.raise_signal(signal.SIGINT)

    assert session.train(interrupt) == signal.SIGINT


def test_training_a_finished_session_again_changes_nothing(
    config: TrainingConfig, out: Path
) -> None:
    for seed in range(20):  # so wild that the last is not best, with some of them on any machine
        wild = dataclasses.replace(config, lr=3.0, epochs=6, seed=seed)
        session = start(wild, out.with_name(f"{seed}.safetensors"))
        assert session.train() is None
        progress = session.run.trainer.progress
        if progress.best_epoch < progress.epoch:
            break
    assert progress.best_epoch < progress.epoch
    files = {path: path.read_bytes() for path in session.files}
    assert session.train() is None
    assert {path: path.read_bytes() for path in session.files} == files


def test_without_validation_the_model_is_that_of_the_last_whole_epoch(
    config: TrainingConfig, out: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, valid_fraction=0.0)
    other = tmp_path / "other.safetensors"
    start(dataclasses.replace(config, epochs=1), other).train()
    session = start(config, out)
    per_epoch = len(session.run.trainer.sampler.epoch(np.random.default_rng(0)))
    stop_at(session, per_epoch + 3)
    assert session.run.trainer.progress.epoch == 1
    interrupted = checkpoint.read(out, "model").arrays
    for name, a in checkpoint.read(other, "model").arrays.items():
        assert np.array_equal(interrupted[name], a), name


def test_failed_update_draws_nothing(config: TrainingConfig, out: Path) -> None:
    session = start(dataclasses.replace(config, bptt="randomized", tau=2), out)
    trainer = session.run.trainer
    inner = session.run.model.loss_and_gradients
    noise: list[Any] = []
    masks: list[Any] = []

    def diverges(*args: Any, **options: Any) -> Any:
        noise.append(trainer._noise_rng.bit_generator.state)
        masks.append(options["noise"])
        mean, grads, state = inner(*args, **options)
        return (mean if len(noise) < 3 else np.nan), grads, state

    session.run.model.loss_and_gradients = diverges  # type: ignore[method-assign]
    with pytest.raises(TrainingDiverged, match="update 3"):
        session.train()
    assert noise[0] != noise[1]  # truncation draws, before the update is tried
    assert trainer._noise_rng.bit_generator.state == noise[1]
    assert masks == [(masks[0][0], step) for step in range(3)]
    assert trainer.progress.step == 2


def test_divergence_is_told_even_if_it_cannot_be_saved(config: TrainingConfig, out: Path) -> None:
    session = start(config, out)

    def diverges(*args: Any, **options: Any) -> Any:
        session.files.training.unlink()
        session.files.training.mkdir()
        raise TrainingDiverged("gone")

    session.run.trainer._update = diverges  # type: ignore[method-assign]
    with pytest.raises(TrainingDiverged, match="gone") as caught:
        session.train()
    assert isinstance(caught.value.__cause__, SaveError)


def test_overwriting_follows_a_link(config: TrainingConfig, out: Path, tmp_path: Path) -> None:
    real = tmp_path / "store" / "real.safetensors"
    real.parent.mkdir()
    real.write_bytes(b"an earlier model")
    out.symlink_to(real)
    start(config, out, overwrite=True).train()
    assert out.is_symlink()
    assert checkpoint.read(real, "model").kind == "model"


def test_a_folder_in_the_place_of_a_file_is_refused(config: TrainingConfig, out: Path) -> None:
    out.with_suffix(".history.jsonl").mkdir()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"history\.jsonl exists and is not a file"):
            start(config, out, overwrite=overwrite)
    assert not out.with_suffix(".training.safetensors").exists()


def test_resuming_a_resumed_run(config: TrainingConfig, out: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    start(config, whole).train()
    stop_at(start(config, out), 4)
    stop_at(resume(out), 9)
    assert resume(out).train() is None
    assert out.read_bytes() == whole.read_bytes()


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with noticed_interrupts() as noticed:
            signal.raise_signal(signal.SIGINT)
            assert noticed.signal is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_put_back_after_the_first_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with noticed_interrupts() as noticed:
        signal.raise_signal(signal.SIGTERM)
        assert noticed.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before
