"""Training: settings, one seed one run, pausing anywhere, validation, divergence, learning."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tolerance import STANDARD_ERRORS, assert_same_bits, standard_errors_off

from gpurnn import checkpoint, loss
from gpurnn.checkpoint import CheckpointError
from gpurnn.language_model import LanguageModel
from gpurnn.optimizers import scheduled
from gpurnn.text import Corpus
from gpurnn.training.config import PRESETS, TrainingConfig
from gpurnn.training.run import Run, ngram_perplexities, prepare
from gpurnn.training.trainer import TrainingDiverged
from gpurnn.training.validation import Losses, StreamValidation, WindowValidation

Array = np.ndarray[Any, Any]


def text_of(size: int, letters: str = "abcdef ", seed: int = 0) -> str:
    """Return a text that leans on its last letter, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    steps = rng.choice(
        len(letters), size, p=[0.5, 0.3, *[0.2 / (len(letters) - 2)] * (len(letters) - 2)]
    )
    return "".join(letters[i] for i in np.cumsum(steps) % len(letters))


TEXT = text_of(260)
CORPUS = Corpus("a text", TEXT, "made for the test")

# Nothing here hangs on the defaults: they are chosen for long runs.
TINY = TrainingConfig(
    corpus="a text",
    sampling="random",
    num_steps=6,
    batch_size=8,
    valid_fraction=0.2,
    hidden_size=5,
    activation="tanh",
    init="uniform",
    epochs=3,
    optimizer="sgd",
    lr=0.5,
    schedule="constant",
    warmup=0,
    clip=1.0,
    seed=1,
)


def tiny(**changes: Any) -> TrainingConfig:
    return dataclasses.replace(TINY, **changes)


def prepared(config: TrainingConfig) -> Run:
    return prepare(config, CORPUS)


def trained(config: TrainingConfig) -> Run:
    run = prepared(config)
    assert run.trainer.run()
    return run


def params_of(run: Run) -> dict[str, Array]:
    return {name: a.copy() for name, a in run.model.params.items()}


def assert_same_params(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    for name, a in expected.items():
        assert_same_bits(name, found[name], a)


def gradients_of_first_update(run: Run, **options: Any) -> tuple[float, dict[str, Array]]:
    """Return loss and gradients of a run's first batch, drawn without disturbing the run."""
    twin = prepared(run.config)
    X, Y = twin.trainer.sampler.epoch(twin.trainer._batch_rng)[0]
    mean, grads, _ = twin.model.loss_and_gradients(X, Y, **options)
    return mean, grads


def norm_of(arrays: Any) -> float:
    return math.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in arrays.values()))


# Settings

COUNTS = ("min_freq", "num_steps", "batch_size", "hidden_size", "num_layers", "epochs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edition": "third"}, r"edition is 'third': expected one of raw, book, book-2017, book-"),
        ({"unit": "byte"}, r"unit is 'byte': expected one of char, word"),
        ({"sampling": "all"}, r"sampling is 'all': expected one of windows, random, sequential"),
        ({"init": "zero"}, r"init is 'zero': expected one of uniform, normal"),
        ({"optimizer": "adam"}, r"optimizer is 'adam': expected one of sgd, momentum, adamw"),
        ({"schedule": "step"}, r"schedule is 'step': expected one of constant, linear, cosine"),
        ({"bptt": "half"}, r"bptt is 'half': expected one of full, truncated, randomized"),
        ({"activation": "gelu"}, r"activation is 'gelu': expected one of tanh, relu"),
        ({"optimizer": None}, r"optimizer is None: expected one of sgd"),
        ({"dtype": "float16"}, r"dtype is '?float16'?: expected (one of )?float32(, | or )float64"),
        ({"dtype": "int32"}, r"dtype is '?int32'?: expected (one of )?float32(, | or )float64"),
        ({"dtype": "double precision"}, r"dtype is '?double precision'?: expected .*float32"),
        ({"dtype": None}, r"dtype is None: expected .*float32"),
        *(
            ({name: value}, rf"{name} is {value!r}: expected")
            for name in COUNTS
            for value in (0, -1, 1.5, "4", True, None)
        ),
        *(
            ({name: value}, rf"{name} is {value!r}: expected")
            for name in ("max_tokens", "embedding_size", "patience")
            for value in (0, -1, 1.5, "4", True)
        ),
        *(
            ({"sampling": "windows", name: value, other: 4}, rf"{name} is {value!r}: expected")
            for name, other in itertools.permutations(("train_windows", "valid_windows"))
            for value in (0, -1, 1.5)
        ),
        *(
            ({name: value}, rf"{name} is {value!r}: expected a finite number above 0")
            for name in ("lr", "clip")
            for value in (0, 0.0, -0.1, math.inf, -math.inf, math.nan)
        ),
        ({"lr": None}, r"lr is None: expected"),
        ({"lr": "fast"}, r"lr is '?fast'?: expected"),
        ({"clip": "often"}, r"clip is '?often'?: expected"),
        *(
            ({name: value}, rf"{name} is {value!r}: expected a number in \[0, 1\)")
            for name in ("dropout", "valid_fraction", "momentum")
            for value in (-0.1, 1, 1.0, 1.5, math.nan, math.inf)
        ),
        ({"dropout": "some"}, r"dropout is '?some'?: expected"),
        *(
            ({name: value}, rf"{name} is {value!r}: expected (0 or more|at least 0)")
            for name in ("warmup", "seed")
            for value in (-1, -10)
        ),
        *(
            ({name: value}, rf"{name} is {value!r}: expected")
            for name in ("warmup", "seed")
            for value in (1.5, "1", True, math.nan)
        ),
        ({"seed": None}, r"seed is None: expected"),
        *(
            ({"optimizer": "adamw", "weight_decay": value}, rf"weight_decay is {value!r}: expected")
            for value in (-0.1, math.nan, math.inf)
        ),
        # What does not go together
        ({"weight_decay": 0.1}, r"weight_decay is 0.1: only adamw has it, not sgd"),
        (
            {"weight_decay": 0.1, "optimizer": "momentum"},
            r"weight_decay is 0.1: only adamw has it, not momentum",
        ),
        ({"tau": 3}, r"tau is 3: bptt 'full' does not truncate"),
        ({"bptt": "truncated"}, r"tau is None: bptt 'truncated' needs a number of steps from 1"),
        ({"bptt": "randomized"}, r"tau is None: bptt 'randomized' needs a number of steps from 2"),
        *(
            ({"bptt": "truncated", "tau": tau}, rf"tau is {tau!r}: ")
            for tau in (0, -1, 2.5, "2", True)
        ),
        *(
            ({"bptt": "randomized", "tau": tau}, rf"tau is {tau!r}: ")
            for tau in (1, 0, -1, 2.5, "2", math.nan)
        ),
        ({"train_windows": 9}, r"train_windows needs sampling 'windows', not 'random'"),
        (
            {"valid_windows": 9, "sampling": "sequential"},
            r"valid_windows needs sampling 'windows', not 'sequential'",
        ),
        ({"patience": 1, "valid_fraction": 0}, r"patience is 1: nothing is validated to wait for"),
        (
            {"train_windows": 9, "sampling": "windows"},
            r"train_windows and valid_windows are given together or not at all",
        ),
        (
            {"valid_windows": 9, "sampling": "windows"},
            r"train_windows and valid_windows are given together or not at all",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        tiny(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_freq": 1, "num_steps": 1, "batch_size": 1, "hidden_size": 1, "epochs": 1},
        {"lr": 1e-30, "clip": 1e-30},
        {"lr": 1, "clip": None},
        {"dropout": 0, "valid_fraction": 0, "momentum": 0},
        {"dropout": 0.999, "valid_fraction": 0.999, "momentum": 0.999},
        {"seed": 0, "warmup": 0},
        {"patience": 1, "valid_fraction": 0.0, "sampling": "windows"}
        | {"train_windows": 1, "valid_windows": 1},
        {"seed": 2**128},
        {"optimizer": "adamw", "weight_decay": 10.0},
        {"bptt": "truncated", "tau": 1},
        {"bptt": "truncated", "tau": 10**9},
        {"bptt": "randomized", "tau": 2},
        {"sampling": "windows", "train_windows": 1, "valid_windows": 1},
        {"sampling": "windows", "train_windows": None, "valid_windows": None},
        {"max_tokens": None, "embedding_size": None, "patience": None, "warmup": None},
    ],
    ids=str,
)
def test_settings_at_the_edge_are_accepted(changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    assert {name: getattr(config, name) for name in changes} == changes


def test_settings_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.lr = 1.0  # type: ignore[misc]


EVERY_SETTING = TrainingConfig(
    corpus="some/path é.txt",
    edition="book",
    unit="word",
    min_freq=2,
    max_tokens=12_345,
    sampling="windows",
    num_steps=7,
    batch_size=9,
    train_windows=11,
    valid_windows=13,
    valid_fraction=0.25,
    hidden_size=17,
    num_layers=3,
    activation="softplus",
    embedding_size=19,
    dropout=0.1,
    dtype="float64",
    init="normal",
    epochs=23,
    optimizer="adamw",
    lr=1 / 3,
    momentum=0.8,
    weight_decay=1e-5,
    schedule="linear",
    warmup=29,
    clip=None,
    bptt="randomized",
    tau=31,
    patience=37,
    seed=2**70,
)


@pytest.mark.parametrize("config", [*PRESETS.values(), TINY, EVERY_SETTING])
def test_settings_through_json(config: TrainingConfig) -> None:
    document = json.loads(json.dumps(config.as_json(), allow_nan=False))
    assert TrainingConfig.from_json(document) == config
    assert list(document) == [field.name for field in dataclasses.fields(TrainingConfig)]


def test_every_setting_above_differs_somewhere_from_its_default() -> None:
    """Or one that JSON loses would come back unnoticed."""
    for name, default in TrainingConfig().as_json().items():
        assert {repr(getattr(c, name)) for c in (EVERY_SETTING, TINY)} != {repr(default)}, name


@pytest.mark.parametrize(
    "changes",
    [
        {"corpus": Path("a", "path")},
        {"hidden_size": np.int64(5)},
        {"lr": np.float32(0.5)},
        {"seed": np.int64(5)},
        {"dtype": np.float32},
        {"dtype": np.dtype("float64")},
    ],
    ids=str,
)
def test_what_is_accepted_can_be_saved(changes: dict[str, Any]) -> None:
    try:
        config = tiny(**changes)
    except TypeError as e:
        assert str(e).startswith(f"{next(iter(changes))} is ")  # noqa: PT017
    else:
        again = TrainingConfig.from_json(json.loads(json.dumps(config.as_json())))
        assert again == config


def test_settings_of_another_version() -> None:
    with pytest.raises(TypeError, match="colour"):
        TrainingConfig.from_json({**TINY.as_json(), "colour": "red"})
    with pytest.raises(ValueError, match="epochs is 0"):
        TrainingConfig.from_json({**TINY.as_json(), "epochs": 0})


def test_presets_hold_the_published_settings() -> None:
    book = {
        "corpus": "time-machine",
        "edition": "book",
        "unit": "char",
        "sampling": "windows",
        "train_windows": 10_000,
        "valid_windows": 5_000,
        "num_steps": 32,
        "batch_size": 1024,
        "hidden_size": 32,
        "num_layers": 1,
        "activation": "tanh",
        "embedding_size": None,
        "dropout": 0.0,
        "init": "normal",
        "dtype": "float32",
        "epochs": 100,
        "optimizer": "sgd",
        "lr": 1.0,
        "schedule": "constant",
        "warmup": 0,
        "clip": 1.0,
        "bptt": "full",
        "patience": None,
        "max_tokens": None,
        "min_freq": 1,
    }
    book_2022 = {
        **book,
        "edition": "book-2017",
        "sampling": "sequential",
        "train_windows": None,
        "valid_windows": None,
        "valid_fraction": 0.0,
        "max_tokens": 10_000,
        "num_steps": 35,
        "batch_size": 32,
        "hidden_size": 512,
        "epochs": 500,
    }
    expected = {
        "default": {},
        "book": book,
        "book-deep": {**book, "num_layers": 2, "lr": 2.0},
        "book-2022": book_2022,
        "book-2022-random": {**book_2022, "sampling": "random"},
    }
    assert set(PRESETS) == set(expected)
    for preset, settings in expected.items():
        found = PRESETS[preset].as_json()
        assert {name: found[name] for name in settings} == settings, preset
    assert PRESETS["default"] == TrainingConfig()


# From settings to a run


def test_split_by_position() -> None:
    run = prepared(tiny(valid_fraction=0.2))
    ids = run.model.encode(TEXT)
    assert run.train_ids.tolist() == ids[:208].tolist()
    assert run.valid_ids.tolist() == ids[208:].tolist()
    assert isinstance(run.trainer.validation, StreamValidation)
    assert run.trainer.validation.ids.tolist() == run.valid_ids.tolist()


def test_split_by_windows() -> None:
    config = tiny(sampling="windows", train_windows=20, valid_windows=9)
    run = prepared(config)
    ids, T = run.model.encode(TEXT), config.num_steps
    X, Y = zip(*run.trainer.sampler.epoch(np.random.default_rng(0)), strict=True)
    rows = np.concatenate([*X], axis=1).T
    assert sorted(map(tuple, rows)) == sorted(tuple(ids[j : j + T]) for j in range(20))
    assert np.concatenate([*Y], axis=1).shape == (T, 20)
    held_out = run.trainer.validation.windows  # type: ignore[union-attr]
    assert held_out.X.tolist() == [ids[j : j + T].tolist() for j in range(20, 29)]
    assert held_out.Y.tolist() == [ids[j + 1 : j + 1 + T].tolist() for j in range(20, 29)]
    assert run.train_ids.tolist() == ids[: 19 + T].tolist()
    assert run.valid_ids.tolist() == ids[20 : 28 + T].tolist()


def test_no_validation() -> None:
    run = prepared(tiny(valid_fraction=0.0))
    assert run.trainer.validation is None
    assert len(run.train_ids) == len(TEXT)
    assert len(run.valid_ids) == 0


def test_max_tokens_cuts_the_text_but_not_the_vocabulary() -> None:
    run = prepared(tiny(max_tokens=100, num_steps=3, batch_size=4))
    assert len(run.train_ids) + len(run.valid_ids) == 100
    assert len(run.model.vocabulary) == len(prepared(TINY).model.vocabulary)


def test_model_has_the_settings() -> None:
    config = tiny(num_layers=2, embedding_size=4, dropout=0.25, dtype="float64", activation="relu")
    model = prepared(config).model
    assert model.params["W_xh"].shape == (4, 5)
    assert model.params["W_hh.1"].shape == (5, 5)
    assert all(a.dtype == np.float64 for a in model.params.values())
    assert (model.dropout, model.rnn.activation) == (0.25, "relu")


@pytest.mark.parametrize("sampling", ["windows", "random", "sequential"])
def test_text_too_short_for_a_batch(sampling: str) -> None:
    with pytest.raises(ValueError, match=r"\d+ tokens.*need"):
        prepared(tiny(sampling=sampling, num_steps=400))


def test_text_too_short_to_validate() -> None:
    with pytest.raises(ValueError, match=r"valid_fraction 0\.005 of 260 tokens leaves 1 to"):
        prepared(tiny(valid_fraction=0.005))
    with pytest.raises(ValueError, match="windows that do not exist"):
        prepared(tiny(sampling="windows", train_windows=200, valid_windows=100))


def test_words_of_an_edition_that_has_none() -> None:
    with pytest.raises(ValueError, match="unit='word' cannot be had with edition='book-2017'"):
        prepared(tiny(unit="word", edition="book-2017"))


def test_text_without_a_token() -> None:
    with pytest.raises(ValueError, match="corpus 'dots' holds no token after preprocessing"):
        prepare(tiny(unit="word"), Corpus("dots", "... --- ...", "made for the test"))


def test_origin_of_a_model_holds_no_times() -> None:
    run = trained(TINY)
    about = json.loads(json.dumps(run.about()))
    assert about["sha256"] == CORPUS.sha256
    assert TrainingConfig.from_json(about["config"]) == TINY
    assert "second" not in json.dumps(about)
    assert about == json.loads(json.dumps(trained(TINY).about()))


# One seed, one run; pausing changes nothing

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


def state_of(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all that a checkpoint holds, but not how long it took."""
    contents = run.trainer.contents()
    arrays = {k: (a.dtype.str, a.shape, a.tobytes()) for k, a in contents.arrays.items()}
    document = json.loads(json.dumps(contents.document))
    progress = document["progress"]
    for timed in (progress, *progress["history"]):
        for name in ("seconds", "epoch_seconds", "tokens_per_second"):
            timed.pop(name, None)
    return arrays, document


def pause_at(run: Run, step: int) -> None:
    progress = run.trainer.progress
    assert progress.step < step
    assert run.trainer.run(on_step=lambda: progress.step < step) is False
    assert progress.step == step


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
    noise = [
        state_of(trained(RUNS[name]))[1]["random"]["noise"]
        for name in ("windows-sgd", "dropout", "randomized")
    ]
    assert noise[0] == state_of(prepared(TINY))[1]["random"]["noise"]  # draws none
    assert noise[0] != noise[1] != noise[2]


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


# What one update is made of


@pytest.mark.parametrize("clip", [None, 1e-3, 1e3])
def test_largest_norm_is_that_before_clipping(clip: float | None) -> None:
    config = tiny(clip=clip, lr=0.125, dtype="float64")
    run = prepared(config)
    mean, grads = gradients_of_first_update(run)
    before = params_of(run)
    pause_at(run, 1)
    moved = {name: before[name] - a for name, a in run.model.params.items()}
    norm = norm_of(grads)
    assert run.trainer.progress.largest_norm == pytest.approx(norm, rel=1e-12)
    assert run.trainer.progress.losses == [mean]
    length = norm if clip is None else min(norm, clip)
    assert norm_of(moved) == pytest.approx(0.125 * length, rel=1e-9)
    for name, g in grads.items():
        np.testing.assert_allclose(moved[name], 0.125 * g * length / norm, rtol=1e-6, atol=1e-15)


def test_record_of_an_epoch() -> None:
    config = tiny(sampling="windows", batch_size=60, schedule="cosine", warmup=3, clip=0.05)
    run = prepared(config)
    losses: list[float] = []
    norms: list[float] = []
    inner = run.model.loss_and_gradients

    def spied(*args: Any, **options: Any) -> Any:
        mean, grads, state = inner(*args, **options)
        losses.append(mean)
        norms.append(norm_of(grads))
        return mean, grads, state

    run.model.loss_and_gradients = spied  # type: ignore[method-assign]
    records: list[dict[str, Any]] = []
    run.trainer.run(on_epoch=records.append)
    assert records == run.trainer.history
    assert len(records) == 3
    rows = [60, 60, 60, 22]  # 202 windows; the last batch is smaller and weighs less
    for epoch, record in enumerate(records, start=1):
        means = losses[4 * epoch - 4 : 4 * epoch]
        assert record["epoch"] == epoch
        assert record["step"] == 4 * epoch
        assert record["tokens"] == 202 * 6
        mean = sum(r * m for r, m in zip(rows, means, strict=True)) / 202
        assert record["train_loss"] == pytest.approx(mean, rel=1e-12)
        assert record["train_perplexity"] == pytest.approx(math.exp(mean), rel=1e-12)
        book = sum(map(math.exp, means)) / 4
        assert record["train_perplexity_book"] == pytest.approx(book, rel=1e-12)
        assert record["largest_gradient_norm"] == max(norms[4 * epoch - 4 : 4 * epoch]) > 0.05
        assert record["lr"] == scheduled(0.5, "cosine", 4 * epoch - 1, 12, 3)
        assert record["tokens_per_second"] > 0
    assert "valid_perplexity_book" not in records[0]  # a stream has no batches
    assert 0 < records[0]["seconds"] < records[1]["seconds"] < records[2]["seconds"]


def rates_of(run: Run, updates: int | None = None) -> list[float]:
    """Train and return the learning rate of every update."""
    found: list[float] = []
    inner = run.trainer.optimizer.step

    def spied(params: Any, grads: Any, lr: float) -> None:
        found.append(lr)
        inner(params, grads, lr)

    run.trainer.optimizer.step = spied  # type: ignore[method-assign]
    run.trainer.run(on_step=lambda: len(found) != updates)
    return found


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (0, [0.5] * 20),
        (4, [0.125, 0.25, 0.375] + [0.5] * 17),
        (None, [0.25] + [0.5] * 19),  # a tenth of all
    ],
)
def test_warmup(warmup: int | None, expected: list[float]) -> None:
    run = prepared(tiny(sampling="windows", batch_size=1000, epochs=20, warmup=warmup))
    assert rates_of(run) == pytest.approx(expected)
    assert [record["lr"] for record in run.trainer.history] == pytest.approx(expected)


def test_warmup_of_a_long_run_is_100_updates() -> None:
    run = prepared(tiny(sampling="windows", batch_size=1000, epochs=10_000, warmup=None))
    assert rates_of(run, 3) == pytest.approx([0.005, 0.01, 0.015])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_of_every_update(schedule: str) -> None:
    run = prepared(tiny(sampling="sequential", epochs=6, schedule=schedule, warmup=2))
    assert rates_of(run) == [scheduled(0.5, schedule, step, 24, 2) for step in range(24)]


def xi_of(run: Run) -> list[Any]:
    """Train and return the truncation factors of every update."""
    found: list[Any] = []
    inner = run.model.loss_and_gradients

    def spied(*args: Any, xi: Any = None, **options: Any) -> Any:
        found.append(xi)
        return inner(*args, xi=xi, **options)

    run.model.loss_and_gradients = spied  # type: ignore[method-assign]
    run.trainer.run()
    return found


def test_full_backpropagation_cuts_nothing() -> None:
    assert set(xi_of(prepared(TINY))) == {None}


@pytest.mark.parametrize(
    ("tau", "xi"),
    [
        (1, [0, 0, 0, 0, 0, 0]),
        (2, [0, 1, 0, 1, 0, 1]),
        (4, [0, 1, 1, 1, 0, 1]),
        (6, [0, 1, 1, 1, 1, 1]),
        (99, [0, 1, 1, 1, 1, 1]),
    ],
)
def test_truncated_backpropagation_cuts_every_tau_steps(tau: int, xi: list[int]) -> None:
    run = prepared(tiny(bptt="truncated", tau=tau))
    found = xi_of(run)
    assert len(found) == run.trainer.progress.step
    for factors in found:
        assert_same_bits("xi", factors, np.array(xi, np.float32))


@pytest.mark.parametrize("tau", [1, 2, 4])
def test_update_is_that_of_the_truncated_gradient(tau: int) -> None:
    config = tiny(bptt="truncated", tau=tau, lr=1.0, clip=None)
    run = prepared(config)
    xi = np.array([step % tau != 0 for step in range(6)], np.float32)
    _, truncated = gradients_of_first_update(run, xi=xi)
    _, full = gradients_of_first_update(run)
    assert norm_of({k: truncated[k] - full[k] for k in full}) > 1e-3 * norm_of(full)
    expected = {name: a - truncated[name] for name, a in params_of(run).items()}
    pause_at(run, 1)
    assert_same_params(run.model.params, expected)


@pytest.mark.parametrize("sampling", ["windows", "random", "sequential"])
def test_truncation_at_tau_T_is_full(sampling: str) -> None:
    config = tiny(sampling=sampling, batch_size=16)
    full = trained(config)
    same = trained(dataclasses.replace(config, bptt="truncated", tau=6))
    cut = trained(dataclasses.replace(config, bptt="truncated", tau=5))
    assert_same_params(same.model.params, full.model.params)
    assert state_of(same)[0] == state_of(full)[0] != state_of(cut)[0]


@pytest.mark.parametrize("tau", [2, 3, 10])
def test_randomized_truncation_draws_unbiased_factors(tau: int) -> None:
    found = xi_of(prepared(tiny(bptt="randomized", tau=tau, dtype="float64", epochs=100)))
    draws = np.stack(found)
    pi = 1 - 1 / tau
    assert draws.shape == (100 * 4, 6)
    assert set(np.unique(draws)) == {0.0, 1 / pi}
    assert standard_errors_off(draws, np.ones(6)) < STANDARD_ERRORS
    assert len({row.tobytes() for row in draws}) > 10  # drawn anew for every update


def test_first_update_of_randomized_truncation_is_that_of_its_factors() -> None:
    config = tiny(bptt="randomized", tau=2, lr=1.0, clip=None)
    xi = xi_of(prepared(config))[0]
    run = prepared(config)
    _, grads = gradients_of_first_update(run, xi=xi)
    expected = {name: a - grads[name] for name, a in params_of(run).items()}
    pause_at(run, 1)
    assert_same_params(run.model.params, expected)


def states_of(run: Run) -> list[Any]:
    """Train, and return the state before and after each update."""
    found: list[Any] = []
    inner = run.model.loss_and_gradients

    def spied(X: Any, Y: Any, state: Any = None, **options: Any) -> Any:
        mean, grads, final = inner(X, Y, state, **options)
        found.append((state, final))
        return mean, grads, final

    run.model.loss_and_gradients = spied  # type: ignore[method-assign]
    run.trainer.run()
    return found


def test_state_is_carried_through_an_epoch_of_streams() -> None:
    found = states_of(prepared(tiny(sampling="sequential", epochs=2)))
    assert len(found) == 8
    for epoch in (found[:4], found[4:]):
        assert epoch[0][0] is None
        for (_, final), (state, _) in itertools.pairwise(epoch):
            assert_same_bits("state", state, final)
            assert np.abs(state).max() > 0


@pytest.mark.parametrize("sampling", ["windows", "random"])
def test_no_state_is_carried_between_windows_and_random_partitions(sampling: str) -> None:
    found = states_of(prepared(tiny(sampling=sampling, batch_size=16)))
    assert len(found) > 3
    assert all(state is None for state, _ in found)


# Dropout


def test_dropout_only_in_training() -> None:
    run = trained(tiny(dropout=0.5))
    without = LanguageModel(run.model.vocabulary, hidden_size=5)
    without.load_params(run.model.params)
    noise = state_of(run)[1]["random"]["noise"]
    validation = run.trainer.validation
    assert validation is not None
    assert validation(run.model) == validation(run.model) == validation(without)
    assert state_of(run)[1]["random"]["noise"] == noise
    assert trained(TINY).trainer.history[0]["train_loss"] != run.trainer.history[0]["train_loss"]


def test_dropout_draws_another_mask_for_every_update() -> None:
    run = prepared(tiny(dropout=0.5, lr=1e-30))
    run.trainer.run()
    same = prepared(tiny(dropout=0.0, lr=1e-30))
    same.trainer.run()
    # The weights stay, the batches are the same: what differs is the mask.
    differ = [a != b for a, b in zip(run.trainer.history, same.trainer.history, strict=True)]
    assert all(differ)
    dropped = [record["train_loss"] for record in run.trainer.history]
    assert len(set(dropped)) == len(dropped)


# Validation


def test_stream_validation_is_evaluation() -> None:
    for config in (TINY, tiny(unit="word", batch_size=2, num_steps=4)):
        run = trained(config)
        assert isinstance(run.trainer.validation, StreamValidation)
        found = run.trainer.validation(run.model)
        text = run.model.tokenizer.join(run.model.vocabulary.decode(run.valid_ids))
        evaluation = run.model.evaluate(text)
        assert found.tokens == (evaluation.tokens,) == (len(run.valid_ids) - 1,)
        assert found.mean == evaluation.nats / evaluation.tokens
        record = run.trainer.history[-1]
        assert record["valid_loss"] == found.mean
        assert record["valid_perplexity"] == evaluation.perplexity


def test_window_validation_starts_every_window_afresh() -> None:
    run = trained(tiny(sampling="windows", train_windows=20, valid_windows=13))
    assert isinstance(run.trainer.validation, WindowValidation)
    found = run.trainer.validation(run.model)
    ids = run.model.encode(TEXT)
    nll = np.stack(
        [
            run.model.negative_log_likelihood(ids[j : j + 6, None], ids[j + 1 : j + 7, None])[0][
                :, 0
            ]
            for j in range(20, 33)
        ]
    )
    assert found.tokens == (8 * 6, 5 * 6)
    assert found.means == pytest.approx((nll[:8].mean(), nll[8:].mean()), rel=1e-6)
    assert found.mean == pytest.approx(nll.mean(), rel=1e-6)
    record = run.trainer.history[-1]
    assert record["valid_perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-6)
    book = (math.exp(nll[:8].mean()) + math.exp(nll[8:].mean())) / 2
    assert record["valid_perplexity_book"] == pytest.approx(book, rel=1e-6)


def test_mean_loss_weighs_tokens_and_not_batches() -> None:
    found = Losses((1.0, 4.0), (30, 10))
    assert found.mean == 1.75
    assert found.record("any") == {"any_loss": 1.75, "any_perplexity": loss.perplexity(1.75)}
    book = pytest.approx((math.e + math.e**4) / 2)
    assert found.book_record("any") == {"any_perplexity_book": book}


def test_perplexity_beyond_all_numbers_is_none() -> None:
    """As JSON has no infinity."""
    found = Losses((1e3, 1.0), (1, 1))
    assert found.record("any") == {"any_loss": 500.5, "any_perplexity": math.exp(500.5)}
    assert found.book_record("any") == {"any_perplexity_book": None}
    assert Losses((1e3,), (1,)).record("any") == {"any_loss": 1e3, "any_perplexity": None}


# So many units learn 208 letters by heart, and no longer the rule behind them.
WORSENING = tiny(epochs=40, hidden_size=12, optimizer="adamw", lr=0.02)


def test_the_best_epoch_is_kept() -> None:
    run = prepared(WORSENING)
    by_epoch: list[dict[str, Array]] = []
    run.trainer.run(on_epoch=lambda record: by_epoch.append(params_of(run)))
    losses = [record["valid_loss"] for record in run.trainer.history]
    best = int(np.argmin(losses))
    assert 0 < best < len(losses) - 1
    assert losses[-1] > losses[best] + 0.1
    assert run.trainer.progress.best_epoch == best + 1
    assert run.trainer.progress.best_loss == losses[best]
    assert_same_params(run.trainer.best, by_epoch[best])
    assert_same_params(run.model.params, by_epoch[-1])
    assert run.about()["epoch"] == best + 1
    run.trainer.keep_best()
    assert_same_params(run.model.params, by_epoch[best])
    assert run.trainer.validation is not None
    assert run.trainer.validation(run.model).mean == losses[best]


def test_of_equal_epochs_the_first_is_the_best() -> None:
    run = trained(tiny(lr=1e-30))
    assert len({record["valid_loss"] for record in run.trainer.history}) == 1
    assert run.trainer.progress.best_epoch == 1


def test_without_validation_the_last_epoch_is_kept() -> None:
    run = trained(dataclasses.replace(WORSENING, valid_fraction=0.0))
    assert run.trainer.progress.best_epoch == 40
    assert_same_params(run.trainer.best, run.model.params)
    assert not any(name.startswith("valid") for name in run.trainer.history[-1])


def test_before_the_first_epoch_the_best_are_the_present_parameters() -> None:
    run = prepared(TINY)
    pause_at(run, 1)
    assert_same_params(run.trainer.best, run.model.params)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_stops(patience: int) -> None:
    config = dataclasses.replace(WORSENING, epochs=1000, patience=patience)
    run = trained(config)
    p = run.trainer.progress
    losses = [record["valid_loss"] for record in run.trainer.history]
    assert 1 < p.epoch < 1000
    assert p.epoch == p.best_epoch + patience
    assert min(losses) == losses[p.best_epoch - 1]
    # It stopped the first time that it could.
    for epoch in range(patience + 1, p.epoch):
        assert min(losses[epoch - patience : epoch]) < min(losses[: epoch - patience])


# Divergence

DIVERGING = tiny(activation="relu", lr=1e30, clip=None)


def diverged(run: Run, **options: Any) -> tuple[str, dict[str, Array]]:
    """Train a run that diverges; return the message and the parameters after the last update."""
    last = params_of(run)

    def on_step() -> bool:
        nonlocal last
        last = params_of(run)
        return True

    with pytest.raises(TrainingDiverged) as caught:
        run.trainer.run(on_step=on_step, **options)
    return str(caught.value), last


def test_divergence_leaves_the_parameters_of_the_update_before() -> None:
    run = prepared(DIVERGING)
    message, last = diverged(run)
    step = run.trainer.progress.step
    assert 0 < step < 4
    assert message.startswith(f"training diverged at update {step + 1} (epoch 1): ")
    assert "a lower learning rate (lr 1e+29 instead of 1e+30)" in message
    assert "clipping gradients (clip 1)" in message and "float64" in message
    assert_same_params(run.model.params, last)
    assert all(np.isfinite(a).all() for a in run.model.params.values())
    assert len(run.trainer.progress.losses) == step


def test_divergence_with_clipping_advises_a_smaller_clip() -> None:
    message, _ = diverged(prepared(tiny(activation="relu", lr=1e30, clip=0.5)))
    assert "(lr 1e+29 instead of 1e+30)" in message
    assert "a smaller clip" in message and "clip 1)" not in message


def test_divergence_in_float64_does_not_advise_float64() -> None:
    message, _ = diverged(prepared(dataclasses.replace(DIVERGING, dtype="float64", lr=1e300)))
    assert "a lower learning rate (lr 1e+299 instead of 1e+300)" in message
    assert "float64" not in message


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_number_that_is_not_finite_is_never_trained_on(optimizer: str, step: int) -> None:
    run = prepared(tiny(optimizer=optimizer, lr=0.1))
    pause_at(run, step)
    run.model.params["W_hh"][2, 3] = np.nan
    state = {name: a.copy() for name, a in run.trainer.optimizer.state.items()}
    message, last = diverged(run)
    epoch = run.trainer.progress.epoch + 1
    assert message.startswith(
        f"training diverged at update {step + 1} (epoch {epoch}): W_hh holds nan"
    )
    assert run.trainer.progress.step == step
    assert_same_params(run.model.params, last)
    assert_same_params(run.trainer.optimizer.state, state)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_loss_or_gradient_that_is_not_finite_is_not_applied(bad: str, value: float) -> None:
    run = prepared(TINY)
    pause_at(run, 2)
    inner = run.model.loss_and_gradients

    def spoilt(*args: Any, **options: Any) -> Any:
        mean, grads, state = inner(*args, **options)
        if bad == "gradient":
            grads["b_h"][0] = value
        return value if bad == "loss" else mean, grads, state

    run.model.loss_and_gradients = spoilt  # type: ignore[method-assign]
    message, last = diverged(run)
    named = {"loss": f"the loss is {value}", "gradient": f"the gradient's norm {value}"}
    assert named[bad] in message
    assert_same_params(run.model.params, last)
    assert run.trainer.progress.step == 2


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_update_that_overflows_is_not_applied(optimizer: str) -> None:
    run = prepared(tiny(optimizer=optimizer, lr=1e39))  # beyond float32
    _, last = diverged(run)
    assert_same_params(run.model.params, last)
    assert all(np.isfinite(a).all() for a in run.model.params.values())


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_state_of_the_optimizer_never_overflows_unnoticed(optimizer: str) -> None:
    run = prepared(tiny(optimizer=optimizer, lr=1e-30, clip=None, epochs=1))
    inner = run.model.loss_and_gradients

    def steep(*args: Any, **options: Any) -> Any:
        mean, grads, state = inner(*args, **options)
        return mean, {name: np.full_like(g, 3e38) for name, g in grads.items()}, state

    run.model.loss_and_gradients = steep  # type: ignore[method-assign]
    diverged(run)  # or a later, small gradient would move nothing
    assert all(np.isfinite(a).all() for a in run.trainer.optimizer.state.values())
    assert all(np.isfinite(a).all() for a in run.model.params.values())


def test_divergence_found_in_validation_names_the_epoch_and_the_update() -> None:
    # One update an epoch, and none after the one that spoils the model.
    run = prepared(dataclasses.replace(DIVERGING, sampling="windows", batch_size=1000, epochs=2))
    message, last = diverged(run)
    assert "in validation" in message
    assert message.startswith("training diverged at update 1 (epoch 1): ")
    assert_same_params(run.model.params, last)
    assert run.trainer.history == []


def test_validation_loss_that_is_infinite_is_divergence() -> None:
    run = prepared(TINY)

    def on_step() -> bool:
        if run.trainer.progress.step == 4:  # the epoch's last
            run.model.params["b_q"][1:3] = 3e38, -3e38  # finite, but their difference is not
        return True

    with pytest.raises(TrainingDiverged, match=r"update 4 \(epoch 1\): in validation"):
        run.trainer.run(on_step=on_step)
    assert run.trainer.history == []


# Counting, on the same tokens


def witten_bell(train: list[int], q: int, context: tuple[int, ...], token: int) -> float:
    """Return p(token | context) of the Witten-Bell model, by going through the text."""
    m = len(context)
    shorter = 1 / q if m == 0 else witten_bell(train, q, context[1:], token)
    followers = [train[i] for i in range(m, len(train)) if tuple(train[i - m : i]) == context]
    if not followers:
        return shorter
    distinct = len(set(followers))
    return (followers.count(token) + distinct * shorter) / (len(followers) + distinct)


@pytest.mark.parametrize("windows", [False, True], ids=["stream", "windows"])
def test_ngrams_predict_the_tokens_that_the_network_does(windows: bool) -> None:
    config = tiny(sampling="windows", train_windows=40, valid_windows=9) if windows else TINY
    run = prepared(config)
    train, q = run.train_ids.tolist(), len(run.model.vocabulary)
    if windows:
        held_out = run.trainer.validation.windows  # type: ignore[union-attr]
        rows = [[*x, y[-1]] for x, y in zip(held_out.X.tolist(), held_out.Y.tolist(), strict=True)]
    else:
        rows = [run.valid_ids.tolist()]
    assert run.trainer.validation is not None
    predicted = sum(run.trainer.validation(run.model).tokens)
    assert predicted == sum(len(row) - 1 for row in rows)
    found = ngram_perplexities(run, orders=(1, 2, 3))
    assert list(found) == [1, 2, 3]
    for order, perplexity in found.items():
        nats = [
            -math.log(witten_bell(train, q, tuple(row[max(0, t - order + 1) : t]), row[t]))
            for row in rows
            for t in range(1, len(row))
        ]
        assert len(nats) == predicted
        assert perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-9)


def test_ngrams_are_the_published_orders_by_default() -> None:
    assert list(ngram_perplexities(prepared(TINY))) == [1, 2, 5]


def test_ngrams_need_a_validation_text() -> None:
    with pytest.raises(ValueError, match="no validation text"):
        ngram_perplexities(prepared(tiny(valid_fraction=0.0)))


# Learning


def test_loss_falls() -> None:
    losses = [record["train_loss"] for record in trained(tiny(epochs=12)).trainer.history]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses[::3]))
    assert losses[-1] < losses[0] - 0.2


class MarkovSource:
    """A chain of ``order`` with random transitions, whose entropy rate is known."""

    def __init__(self, order: int, q: int, seed: int) -> None:
        self.order, self.q = order, q
        self._rng = np.random.default_rng(seed)
        self.p = self._rng.dirichlet(np.full(q, 0.3), size=(q,) * order)

    def draw(self, size: int) -> list[int]:
        ids = [0] * self.order
        for _ in range(size):
            ids.append(int(self._rng.choice(self.q, p=self.p[tuple(ids[-self.order :])])))
        return ids[self.order :]

    def nats(self, ids: list[int]) -> float:
        """Return −log p per token of the source itself: no model does better but by luck."""
        k = self.order
        return float(
            np.mean([-math.log(self.p[tuple(ids[t - k : t + 1])]) for t in range(k, len(ids))])
        )

    def entropy_rate(self, history: int) -> float:
        """Return H(x_t | the last ``history`` tokens) in the stationary state, in nats."""
        k, q = self.order, self.q
        pi = np.full((q,) * k, q**-k)
        for _ in range(2000):
            pi = (pi[..., None] * self.p).sum(axis=0)
        joint = pi[..., None] * self.p
        joint = joint.sum(axis=tuple(range(k - history)))
        conditional = joint / joint.sum(axis=-1, keepdims=True)
        return float(-(joint * np.log(conditional)).sum())


@pytest.mark.parametrize(
    ("order", "q", "seed"),
    [(1, 3, 1), (2, 3, 1), (2, 3, 2), pytest.param(3, 2, 2, marks=pytest.mark.slow)],
)
def test_a_markov_source_is_learned_to_its_entropy(order: int, q: int, seed: int) -> None:
    source = MarkovSource(order, q, seed)
    ids = source.draw(20_000)
    corpus = Corpus("markov", "".join("abc"[i] for i in ids), f"order {order}, seed {seed}")
    config = TrainingConfig(
        corpus="markov",
        sampling="sequential",
        num_steps=16,
        batch_size=16,
        valid_fraction=0.1,
        hidden_size=32,
        epochs=20,
        optimizer="adamw",
        lr=1e-2,
        schedule="cosine",
        warmup=0,
        clip=1.0,
    )
    run = prepare(config, corpus)
    run.trainer.run()
    best = run.trainer.progress.best_loss
    assert best is not None
    # The source on this very text; over so many tokens it is within a few hundredths of its rate.
    floor = source.nats(ids[18_000:])
    assert floor == pytest.approx(source.entropy_rate(order), abs=0.05)
    assert floor - 0.01 < best < floor + 0.015
    # With one token less of history nobody could: the recurrence has done it.
    if order > 1:
        assert best < source.entropy_rate(order - 1) - 0.1


def test_a_source_without_memory_gives_its_entropy() -> None:
    source = MarkovSource(1, 3, 0)
    source.p = np.broadcast_to(source.p[0], (3, 3))
    p = source.p[0]
    assert source.entropy_rate(1) == pytest.approx(-(p * np.log(p)).sum())
    assert source.entropy_rate(0) == pytest.approx(-(p * np.log(p)).sum())
