"""What the language model's benchmark measures."""

from dataclasses import dataclass
from typing import Any

__all__ = ["CHARACTERS", "GenerateRun", "LMRun", "TrainRun", "lm_runs"]

CHARACTERS = {"cpu": 100, "cuda": 1000}
"""Of each text that is generated; calls are repeated until a block is long against the clock."""

IN_A_CALL = {"cpu": {}, "cuda": {1: 100_000, 64: 10_000}}
"""Of ours, by the number of texts."""


@dataclass(frozen=True)
class TrainRun:
    """Training: T steps, n rows, h units."""

    T: int
    n: int
    h: int

    @property
    def group(self) -> str:
        """Its kind, in a record."""
        return "train"

    def about(self) -> dict[str, Any]:
        """Return what names this run in a record."""
        return {"group": self.group, "unit": "tokens", "shape": vars(self)}


@dataclass(frozen=True)
class GenerateRun:
    """Generation: n texts at once, h units, so many characters each.

    ``in_a_call`` are those that our side makes in one call, which is one launch, and the others'
    are ``characters``: theirs cost the same each, ours begin with the packing of the weights.
    """

    n: int
    h: int
    characters: int
    in_a_call: int = 0

    @property
    def ours(self) -> int:
        """Characters of a call of our side's."""
        return self.in_a_call or self.characters

    @property
    def group(self) -> str:
        """Its kind, in a record."""
        return "generate"

    def about(self) -> dict[str, Any]:
        """Return what names this run in a record."""
        return {
            "group": self.group,
            "unit": "characters",
            "shape": {"n": self.n, "h": self.h},
            "characters": self.characters,
            "characters_in_our_call": self.ours,
        }


LMRun = TrainRun | GenerateRun

_TRAINING = (TrainRun(32, 1024, 32), TrainRun(35, 32, 512), TrainRun(128, 64, 1024))
"""The book's settings (9.5), those of its 2022 edition, and wider ones."""


def lm_runs(device: str) -> tuple[LMRun, ...]:
    """Return what is measured on cpu or cuda: where time is short, the last ones are left out."""
    found: list[LMRun] = []
    for training in _TRAINING:
        found.append(training)
        found += [
            GenerateRun(n, training.h, CHARACTERS[device], IN_A_CALL[device].get(n, 0))
            for n in (1, 64)
        ]
    return tuple(found)
