"""The settings of a run, and what is made of them."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_setup import CORPUS, TEXT, TINY, prepared, tiny, trained

from gpurnn.text import Corpus
from gpurnn.training.config import PRESETS, TrainingConfig
from gpurnn.training.run import prepare
from gpurnn.training.validation import StreamValidation

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
