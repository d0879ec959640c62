"""One seed, one run; pausing anywhere changes nothing."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_setup import TINY, assert_same_params, pause_at, prepared, state_of, tiny, trained

from gpurnn import checkpoint
from gpurnn.checkpoint import CheckpointError
from gpurnn.training.config import TrainingConfig
from gpurnn.training.run import Run

RUNS = {
    "windows-sgd": tiny(sampling="windows", batch_size=64),
    "counted-windows-momentum": tiny(
        sampling="windows",
        train_windows=21,
        valid_windows=9,
        optimizer="momentum",
        momentum=0.8,
        lr=0.1,
    ),
    "random-momentum-linear": tiny(optimizer="momentum", lr=0.1, schedule="linear", clip=None),
    "random-without-validation": tiny(valid_fraction=0.0),
    "sequential-adamw-cosine": tiny(
        sampling="sequential",
        optimizer="adamw",
        lr=0.05,
        weight_decay=0.1,
        schedule="cosine",
        warmup=3,
    ),
    "sequential-deep": tiny(
        sampling="sequential", num_layers=2, embedding_size=3, optimizer="adamw", lr=0.05
    ),
    "dropout": tiny(dropout=0.5, optimizer="adamw", lr=0.05),
    "truncated": tiny(bptt="truncated", tau=4),
    "randomized": tiny(bptt="randomized", tau=2),
    "randomized-dropout-sequential": tiny(
        sampling="sequential", bptt="randomized", tau=3, dropout=0.3, optimizer="momentum", lr=0.1
    ),
    "float64-relu": tiny(dtype="float64", activation="relu"),
    "words": tiny(unit="word", batch_size=3, num_steps=2),
    "early-stop": tiny(lr=30.0, epochs=50, patience=2),
}


def taken_up(run: Run, path: Path) -> Run:
    """Write a run to a file, and read it into one that was prepared anew."""
    checkpoint.write(path, run.trainer.contents())
    again = prepared(run.config)
    again.trainer.restore(checkpoint.read(path, "training"))
    return again


@pytest.mark.parametrize("config", RUNS.values(), ids=RUNS)
def test_same_seed_same_bits(config: TrainingConfig) -> None:
    run = trained(config)
    assert state_of(run) == state_of(trained(config))
    other = trained(dataclasses.replace(config, seed=config.seed + 1))
    assert state_of(run)[0] != state_of(other)[0]


@pytest.mark.parametrize("config", RUNS.values(), ids=RUNS)
def test_pausing_after_any_update_changes_nothing(config: TrainingConfig, tmp_path: Path) -> None:
    whole = trained(config)
    expected = state_of(whole)
    updates, paused_at = whole.trainer.progress.step, set[int]()
    for step in range(1, updates + 1):
        run = prepared(config)
        pause_at(run, step)
        paused_at.add(run.trainer.progress.batch)
        again = taken_up(run, tmp_path / "run")
        assert state_of(again) == state_of(run)
        assert again.trainer.run()
        assert state_of(again) == expected, f"paused after update {step} of {updates}"
    batches = len(whole.trainer.sampler.epoch(np.random.default_rng(0)))
    assert paused_at >= {1, batches // 2, batches}  # the first, in the middle, the last


@pytest.mark.parametrize("config", RUNS.values(), ids=RUNS)
def test_pausing_after_every_update_changes_nothing(config: TrainingConfig, tmp_path: Path) -> None:
    expected = state_of(trained(config))
    run, pauses = prepared(config), 0
    while not run.trainer.run(on_step=lambda: False):
        run = taken_up(run, tmp_path / "run")
        pauses += 1
    assert pauses == run.trainer.progress.step
    assert state_of(run) == expected


@pytest.mark.parametrize("config", RUNS.values(), ids=RUNS)
def test_pausing_and_going_on_in_the_same_process(config: TrainingConfig) -> None:
    run = prepared(config)
    while not run.trainer.run(on_step=lambda: False):
        pass
    assert state_of(run) == state_of(trained(config))


def test_runs_above_use_what_they_are_named_for() -> None:
    """Or they could all end alike."""
    arrays, document = state_of(trained(RUNS["early-stop"]))
    assert document["progress"]["epoch"] < RUNS["early-stop"].epochs
    arrays, _ = state_of(trained(RUNS["sequential-adamw-cosine"]))
    assert {"state.hidden", "optimizer.m.W_hh", "optimizer.updates", "best.W_hh"} <= set(arrays)
    arrays, _ = state_of(trained(RUNS["random-momentum-linear"]))
    assert "state.hidden" not in arrays and "optimizer.v.W_hh" in arrays
    dropped = trained(RUNS["dropout"]).trainer.history
    whole = trained(dataclasses.replace(RUNS["dropout"], dropout=0.0)).trainer.history
    assert dropped[0]["train_loss"] != whole[0]["train_loss"]
    cut = trained(RUNS["randomized"]).trainer.history
    whole = trained(dataclasses.replace(RUNS["randomized"], bptt="full", tau=None)).trainer.history
    assert cut[-1]["train_loss"] != whole[-1]["train_loss"]


def test_finished_run_stays_finished(tmp_path: Path) -> None:
    run = trained(TINY)
    again = taken_up(run, tmp_path / "run")
    calls: list[object] = []
    assert again.trainer.finished
    assert again.trainer.run(on_step=lambda: bool(calls.append(1)), on_epoch=calls.append)
    assert calls == []
    assert state_of(again) == state_of(run)


@pytest.mark.parametrize("sampling", ["windows", "random", "sequential"])
def test_more_epochs_are_those_of_a_longer_run(sampling: str, tmp_path: Path) -> None:
    config = tiny(sampling=sampling, batch_size=16, optimizer="adamw", lr=0.05)
    short = trained(config)
    longer = dataclasses.replace(config, epochs=5)
    checkpoint.write(tmp_path / "run", short.trainer.contents())
    again = prepared(longer)
    again.trainer.restore(checkpoint.read(tmp_path / "run", "training"))
    assert not again.trainer.finished
    assert again.trainer.run()
    assert state_of(again) == state_of(trained(longer))


def test_contents_are_a_copy() -> None:
    run = prepared(RUNS["sequential-adamw-cosine"])
    pause_at(run, 2)
    contents = run.trainer.contents()
    before = {k: a.copy() for k, a in contents.arrays.items()}
    document = json.dumps(contents.document)
    run.trainer.run()
    assert_same_params(contents.arrays, before)
    assert json.dumps(contents.document) == document


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 6}, "model.*hidden_size"),
        ({"num_layers": 2}, "model.*num_layers"),
        ({"dropout": 0.5}, "model.*dropout"),
        ({"dtype": "float64"}, "model.*dtype"),
        ({"batch_size": 4}, r"sampler.*\bn\b"),
        ({"num_steps": 4}, r"sampler.*\bT\b"),
        ({"sampling": "sequential"}, "sampler.*kind"),
        ({"optimizer": "momentum"}, "optimizer"),
        ({"optimizer": "adamw"}, "optimizer"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_checkpoint_of_another_run(changes: dict[str, Any], message: str) -> None:
    run = prepared(TINY)
    with pytest.raises(CheckpointError, match=message):
        run.trainer.restore(prepared(tiny(**changes)).trainer.contents())


@pytest.mark.parametrize("batch", [0, 2])
def test_older_files_also_tell_the_state_after_the_draw(batch: int) -> None:
    """Then the one before it is called "epoch", and only in the middle of an epoch is it needed."""
    config = tiny(epochs=3)
    whole, run = trained(config), prepared(config)
    batches = len(prepared(config).trainer.sampler.epoch(np.random.default_rng(0)))
    kept: list[Any] = []

    def on_epoch(record: dict[str, Any]) -> None:
        kept.append(run.trainer.contents())

    progress = run.trainer.progress
    run.trainer.run(lambda: progress.step < batches + batch or not batch, on_epoch)
    contents = run.trainer.contents() if batch else kept[0]
    assert contents.document["progress"]["batch"] == batch
    random = contents.document["random"]
    other = np.random.default_rng(7).bit_generator.state
    if batch:
        random["epoch"], random["batches"] = random["batches"], other
    else:
        random["epoch"] = other
    again = prepared(config)
    again.trainer.restore(contents)
    assert again.trainer.run()
    assert state_of(again) == state_of(whole)


def test_a_checkpoint_of_a_longer_text_is_refused_before_anything_is_done() -> None:
    run = prepared(tiny(batch_size=4))
    pause_at(run, 5)
    other = prepared(tiny(batch_size=4, max_tokens=100))
    other.trainer.restore(run.trainer.contents())
    with pytest.raises(CheckpointError, match=r"has done 5 batches of an epoch that has 3: it was"):
        other.trainer.run()


def test_contents_can_be_restored_twice() -> None:
    run = prepared(tiny(epochs=3))
    run.trainer.run()
    contents = trained(tiny(epochs=2)).trainer.contents()
    for _ in range(2):
        again = prepared(tiny(epochs=3))
        again.trainer.restore(contents)
        again.trainer.run()
        assert state_of(again) == state_of(run)
