"""Everything that defines a training run, in one record that a checkpoint can hold."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from gpurnn import validate
from gpurnn.optimizers import OPTIMIZERS, SCHEDULES
from gpurnn.rnn import INITIALISATIONS, Initialisation
from gpurnn.text import EDITIONS, UNITS

__all__ = ["BPTT", "PRESETS", "SAMPLING", "TrainingConfig"]

SAMPLING = ("windows", "random", "sequential")
BPTT = ("full", "truncated", "randomized")

_CHOICES: dict[str, tuple[str, ...]] = {
    "edition": tuple(EDITIONS),
    "unit": UNITS,
    "sampling": SAMPLING,
    "init": INITIALISATIONS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "bptt": BPTT,
}
_INTEGERS = {  # and their least values
    "min_freq": 1,
    "num_steps": 1,
    "batch_size": 1,
    "hidden_size": 1,
    "num_layers": 1,
    "epochs": 1,
    "seed": 0,
}
_OPTIONAL_INTEGERS = {
    "max_tokens": 1,
    "train_windows": 1,
    "valid_windows": 1,
    "embedding_size": 1,
    "warmup": 0,
    "tau": 1,
    "patience": 1,
}
_LEAST_TAU = {"full": 0, "truncated": 1, "randomized": 2}  # 1/tau is a probability below 1


@dataclass(frozen=True)
class TrainingConfig:
    """A training run: text, model and optimisation.

    Attributes:
        corpus: "python-docs", "time-machine" or a path.
        edition, unit, min_freq: see ``text.Tokenizer`` and ``text.Vocabulary``.
        max_tokens: use only the first so many tokens; None uses all.
        sampling: "windows" (stride 1, zero state; the book's current edition), "random" or
            "sequential" (partitions of the 2017–2022 editions; sequential carries the state).
        num_steps: T, the time steps of a batch. batch_size: n.
        train_windows, valid_windows: with "windows", how many of the first windows train, and how
            many after them validate; None splits the text by position instead.
        valid_fraction: the part at the end of the text that validates, as one stream with carried
            state (unless ``valid_windows`` is given); 0 validates nothing.
        hidden_size, num_layers, activation, embedding_size, dropout, dtype, init: see
            ``LanguageModel``.
        epochs: passes over the training text.
        optimizer, lr, momentum, weight_decay, schedule, warmup: see ``optimizers``. warmup None is
            100 updates, or a tenth of all if that is less.
        clip: global norm that gradients are clipped to; None never clips.
        bptt: how far gradients flow within the T steps: "full", "truncated" (cut every ``tau``
            steps), "randomized" (cut each step with probability 1/tau, reweighted to stay
            unbiased; 9.7.1.3).
        patience: stop after so many epochs without a better validation; None never does.
        seed: of weights, batches, dropout and random truncation.

    Raises:
        TypeError, ValueError: on construction, naming the setting, its value and the choices.
    """

    corpus: str = "python-docs"
    edition: str = "raw"
    unit: Literal["char", "word"] = "char"
    min_freq: int = 1
    max_tokens: int | None = None
    sampling: str = "sequential"
    num_steps: int = 64
    batch_size: int = 32
    train_windows: int | None = None
    valid_windows: int | None = None
    valid_fraction: float = 0.1
    hidden_size: int = 256
    num_layers: int = 1
    activation: str = "tanh"
    embedding_size: int | None = None
    dropout: float = 0.0
    dtype: str = "float32"
    init: Initialisation = "uniform"
    epochs: int = 20
    optimizer: str = "adamw"
    lr: float = 4e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: int | None = None
    clip: float | None = 1.0
    bptt: str = "full"
    tau: int | None = None
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no run could use; keep the rest as plain Python values."""
        checked: dict[str, Any] = {
            "corpus": _path("corpus", self.corpus),
            "activation": validate.activation_name(self.activation),
            "dtype": validate.dtype("dtype", self.dtype).name,
        }
        for name, choices in _CHOICES.items():
            checked[name] = validate.choice(name, getattr(self, name), choices)
        for name, least in _INTEGERS.items():
            checked[name] = validate.at_least(name, getattr(self, name), least)
        for name, least in _OPTIONAL_INTEGERS.items():
            value = getattr(self, name)
            checked[name] = None if value is None else validate.at_least(name, value, least)
        for name in ("dropout", "valid_fraction", "momentum"):
            checked[name] = validate.number(
                name, getattr(self, name), "a number in [0, 1)", lambda x: 0 <= x < 1
            )
        for name in ("lr", "clip"):
            if getattr(self, name) is not None or name == "lr":
                checked[name] = validate.number(
                    name, getattr(self, name), "a finite number above 0", lambda x: 0 < x < np.inf
                )
        checked["weight_decay"] = validate.number(
            "weight_decay",
            self.weight_decay,
            "a finite number, 0 or more",
            lambda x: 0 <= x < np.inf,
        )
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(
                f"weight_decay is {self.weight_decay}: only adamw has it, not {self.optimizer}"
            )
        if self.bptt == "full" and self.tau is not None:
            raise ValueError(f"tau is {self.tau}: bptt 'full' does not truncate")
        least = _LEAST_TAU[self.bptt]
        if least and (self.tau is None or self.tau < least):
            raise ValueError(
                f"tau is {self.tau}: bptt {self.bptt!r} needs a number of steps from {least} up"
            )
        for name in ("train_windows", "valid_windows"):
            if self.sampling != "windows" and getattr(self, name) is not None:
                raise ValueError(f"{name} needs sampling 'windows', not {self.sampling!r}")
        if self.patience is not None and not (self.valid_fraction or self.valid_windows):
            raise ValueError(f"patience is {self.patience}: nothing is validated to wait for")
        if (self.train_windows is None) != (self.valid_windows is None):
            raise ValueError("train_windows and valid_windows are given together or not at all")

    def as_json(self) -> dict[str, Any]:
        """Return the settings by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> Self:
        """Build from ``as_json()``; a name this version does not know raises TypeError."""
        return cls(**settings)


def _path(name: str, value: object) -> str:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} is {value!r}: expected a name or a path")
    return str(value)


_BOOK = TrainingConfig(
    corpus="time-machine",
    edition="book",
    sampling="windows",
    num_steps=32,
    batch_size=1024,
    train_windows=10_000,
    valid_windows=5_000,
    hidden_size=32,
    init="normal",
    epochs=100,
    optimizer="sgd",
    lr=1.0,
    schedule="constant",
    warmup=0,
    clip=1.0,
)

_BOOK_2022 = TrainingConfig(
    corpus="time-machine",
    edition="book-2017",
    max_tokens=10_000,
    sampling="sequential",
    num_steps=35,
    batch_size=32,
    valid_fraction=0.0,
    hidden_size=512,
    init="normal",
    epochs=500,
    optimizer="sgd",
    lr=1.0,
    schedule="constant",
    warmup=0,
    clip=1.0,
)

PRESETS: dict[str, TrainingConfig] = {
    "default": TrainingConfig(),
    "book": _BOOK,
    "book-deep": dataclasses.replace(_BOOK, num_layers=2, lr=2.0),
    "book-2022": _BOOK_2022,
    "book-2022-random": dataclasses.replace(_BOOK_2022, sampling="random"),
}
"""Whole runs by name: the default, and the published runs of *Dive into Deep Learning* 9.5 (and two
layers, 10.3), and of its 2017–2022 editions (8.5 there)."""
