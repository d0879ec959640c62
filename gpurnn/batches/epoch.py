"""One pass over a text as a sequence of batches, and what all samplers have in common."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, overload

import numpy as np
import numpy.typing as npt

__all__ = ["Batch", "Epoch", "Ids", "Sampler", "Starts", "check_rng", "gather", "need"]

Ids: TypeAlias = npt.NDArray[np.integer[Any]]
"""Token ids."""

Batch: TypeAlias = tuple[Ids, Ids]
"""Inputs X and targets Y, each (T, n)."""


Starts: TypeAlias = npt.NDArray[np.intp]
"""Positions in a text."""


class Epoch(Sequence[Batch]):
    """One pass over the text: a sequence of batches (X, Y), each made when it is asked for.

    ``epoch[k]`` is batch k, always with the same content; a negative k counts from the end. A
    slice is an :class:`Epoch` again. Raises :class:`IndexError` for a batch that does not exist.

    Args:
        batch: makes batch k.
        starts: says where batch k lies in the text: (n,) positions, those of ``X[0]``; what follows
            them are the other time steps, and the targets.
        numbers: those of the batches.
    """

    __slots__ = ("_batch", "_numbers", "_starts")

    def __init__(
        self, batch: Callable[[int], Batch], starts: Callable[[int], Starts], numbers: range
    ) -> None:
        self._batch = batch
        self._starts = starts
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, k: int) -> Batch: ...
    @overload
    def __getitem__(self, k: slice) -> "Epoch": ...
    def __getitem__(self, k: int | slice) -> "Batch | Epoch":
        """Return batch ``k``, or the part of the epoch that the slice ``k`` selects."""
        if isinstance(k, slice):
            return Epoch(self._batch, self._starts, self._numbers[k])
        return self._batch(self._number(k))

    def starts(self, k: int) -> Starts:
        """Return where the examples of batch ``k`` begin in the text, (n,)."""
        return self._starts(self._number(k))

    def _number(self, k: int) -> int:
        if not -len(self) <= k < len(self):
            raise IndexError(f"batch {k} of an epoch of {len(self)} batches")
        return self._numbers[k]


class Sampler(Protocol):
    """What the samplers have in common, and all that training needs to know of one."""

    @property
    def ids(self) -> Ids:
        """The text, (N,)."""

    @property
    def carries_state(self) -> bool:
        """Whether example i of a batch continues example i of the batch before."""

    @property
    def T(self) -> int:
        """The number of time steps of every batch."""

    @property
    def n(self) -> int:
        """The number of examples of a batch."""

    @property
    def num_batches(self) -> int:
        """The number of batches that every epoch has at least; ``len(epoch)`` is exact.

        They differ only where a random offset costs some epochs a batch.
        """

    def epoch(self, rng: np.random.Generator) -> Epoch:
        """Return one pass over the text; all its randomness is drawn from ``rng`` now."""

    def config(self) -> dict[str, str | int]:
        """Return the sampler's kind and its numbers."""


def gather(ids: Ids, starts: npt.NDArray[np.intp], T: int) -> Batch:
    """Copy the subsequences at ``starts`` and their targets into a (T + 1, n) array; view it."""
    block = ids[np.arange(T + 1)[:, None] + starts]
    return block[:-1], block[1:]


def need(ids: Ids, needed: int, what: str, lower: str) -> None:
    """Raise ValueError if there are fewer than ``needed`` ids; ``lower`` says what to lower."""
    if ids.size < needed:
        raise ValueError(
            f"ids has {ids.size} tokens, but {what} needs at least {needed}: "
            f"lower {lower}, or give a longer text"
        )


def check_rng(rng: np.random.Generator) -> None:
    """Raise TypeError unless ``rng`` is a generator: a seed would give the same batches again."""
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator, got {type(rng).__name__}")
