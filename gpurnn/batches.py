"""Batches: how a text, as an array of token ids, becomes minibatches of inputs and targets.

Three samplers, each of one edition of *Dive into Deep Learning*:

=============================  =====================================  =======================
sampler                        subsequences of length T               state between batches
=============================  =====================================  =======================
:class:`Windows`               every position starts one (9.3)        none
:class:`RandomPartition`       disjoint, in random order (8.3, 2022)  none
:class:`SequentialPartition`   n streams, read on (8.3, 2022)         carried
=============================  =====================================  =======================

A batch is a pair (X, Y) of integer arrays of shape (T, n), time first: ``X[t, i]`` is the token
of example i at time step t, and ``Y[t, i]``, the target, is the token that follows it in the text.

A sampler holds the text and no other state. ``sampler.epoch(rng)`` draws all the randomness of
one pass from ``rng`` at once and returns the pass as a sequence of batches, of which any can be
had without making those before it; ``epoch[k:]`` is the rest of a pass that was interrupted.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, overload

import numpy as np
import numpy.typing as npt

__all__ = [
    "Batch",
    "Epoch",
    "Ids",
    "RandomPartition",
    "Sampler",
    "SequentialPartition",
    "Windows",
    "shifted",
    "split",
]

Ids: TypeAlias = npt.NDArray[np.integer[Any]]
"""Token ids."""

Batch: TypeAlias = tuple[Ids, Ids]
"""Inputs X and targets Y, each (T, n)."""


class Epoch(Sequence[Batch]):
    """One pass over the text: a sequence of batches (X, Y), each made when it is asked for.

    ``epoch[k]`` is batch k, always with the same content; a negative k counts from the end. A
    slice is an :class:`Epoch` again. Raises :class:`IndexError` for a batch that does not exist.
    """

    __slots__ = ("_batch", "_numbers")

    def __init__(self, batch: Callable[[int], Batch], numbers: range) -> None:
        self._batch = batch
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
            return Epoch(self._batch, self._numbers[k])
        if not -len(self) <= k < len(self):
            raise IndexError(f"batch {k} of an epoch of {len(self)} batches")
        return self._batch(self._numbers[k])


class Sampler(Protocol):
    """What the samplers have in common, and all that training needs to know of one."""

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


class Windows:
    """Every subsequence of T tokens that has a target: the book's current edition (section 9.3).

    ``ids`` is a one-dimensional integer array. Window j is ``ids[j : j + T]``, its target
    ``ids[j + 1 : j + T + 1]``, so a text of len(ids) tokens has len(ids) − T windows. ``start``
    and ``count`` select ``count`` windows (default: all) from window ``start`` on: the book
    trains on the first 10,000 and validates on the next 5,000.

    :attr:`X` and :attr:`Y`, both (count, T), are read-only views of ``ids``. An epoch gives each
    window once, in random order unless ``shuffle`` is false, in batches of ``n``, of which the
    last may be smaller: (T, n') with n' ≤ n. The X and Y of a batch share memory.

    Raises :class:`TypeError` or :class:`ValueError` for ids that are no one-dimensional integer
    array, T or n below 1, fewer than T + 1 tokens, or windows that do not exist.
    """

    carries_state = False

    def __init__(
        self,
        ids: Ids,
        T: int,
        n: int,
        *,
        shuffle: bool = True,
        start: int = 0,
        count: int | None = None,
    ) -> None:
        self._ids = _checked_ids(ids)
        self.T = _at_least(1, "T", T)
        self.n = _at_least(1, "n", n)
        self.shuffle = bool(shuffle)
        _need(self._ids, self.T + 1, f"one window of T={self.T} and its target", "T")
        there = self._ids.size - self.T
        self.start = _at_least(0, "start", start)
        self.count = there - self.start if count is None else _at_least(1, "count", count)
        if self.count < 1 or self.start + self.count > there:
            raise ValueError(
                f"start={self.start} and count={count} select windows that do not exist: "
                f"{self._ids.size} tokens have {there} windows of T={self.T}"
            )
        pairs = np.lib.stride_tricks.sliding_window_view(self._ids, self.T + 1)
        pairs = pairs[self.start : self.start + self.count]
        self.X: Ids = pairs[:, :-1]
        self.Y: Ids = pairs[:, 1:]

    @property
    def num_batches(self) -> int:
        """The number of batches of every epoch: count / n, rounded up."""
        return -(-self.count // self.n)

    def epoch(self, rng: np.random.Generator) -> Epoch:
        """Return the batches of one pass; draws from ``rng`` only if the order is random."""
        _check_rng(rng)
        starts = self.start + (
            rng.permutation(self.count) if self.shuffle else np.arange(self.count)
        )

        def batch(k: int) -> Batch:
            return _gather(self._ids, starts[k * self.n : (k + 1) * self.n], self.T)

        return Epoch(batch, range(self.num_batches))

    def config(self) -> dict[str, str | int]:
        """Return the sampler's kind and its numbers."""
        return {
            "kind": "windows",
            "T": self.T,
            "n": self.n,
            "shuffle": self.shuffle,
            "start": self.start,
            "count": self.count,
        }


class RandomPartition:
    """Random sampling of the book's 2017 to 2022 editions (section 8.3.4.1 of 2022).

    An epoch draws an offset from [0, T) and cuts the text after it into ⌊(len(ids) − offset − 1)
    / T⌋ disjoint subsequences of T tokens. They are dealt in random order into batches of exactly
    ``n``, (T, n); those left over are dropped. The X and Y of a batch share memory.

    Raises :class:`TypeError` or :class:`ValueError` for ids that are no one-dimensional integer
    array, T or n below 1, or fewer than (n + 1) · T tokens: with those, every offset leaves a
    batch.
    """

    carries_state = False

    def __init__(self, ids: Ids, T: int, n: int) -> None:
        self._ids = _checked_ids(ids)
        self.T = _at_least(1, "T", T)
        self.n = _at_least(1, "n", n)
        _need(
            self._ids,
            (self.n + 1) * self.T,
            f"one batch of n={self.n} subsequences of T={self.T} at any offset",
            "T or n",
        )

    @property
    def num_batches(self) -> int:
        """The number of batches that every epoch has at least; some offsets give one more."""
        return self._num_subsequences(self.T - 1) // self.n

    def _num_subsequences(self, offset: int) -> int:
        return (self._ids.size - offset - 1) // self.T

    def epoch(self, rng: np.random.Generator) -> Epoch:
        """Return the batches of one pass; draws the offset and then the order from ``rng``."""
        _check_rng(rng)
        offset = int(rng.integers(self.T))
        starts = offset + self.T * rng.permutation(self._num_subsequences(offset))

        def batch(k: int) -> Batch:
            return _gather(self._ids, starts[k * self.n : (k + 1) * self.n], self.T)

        return Epoch(batch, range(starts.size // self.n))

    def config(self) -> dict[str, str | int]:
        """Return the sampler's kind and its numbers."""
        return {"kind": "random-partition", "T": self.T, "n": self.n}


class SequentialPartition:
    """Sequential partitioning of the book's 2017 to 2022 editions (section 8.3.4.2 of 2022).

    An epoch draws an offset from [0, T] (0 if ``random_offset`` is false) and lays the text after
    it out as ``n`` streams of L = ⌊(len(ids) − offset − 1) / n⌋ tokens, one below the other. Batch
    k is the k-th window of T tokens of every stream, so example i of a batch continues example i
    of the batch before, and the state is to be carried over. The ends that fill no window are
    dropped. X and Y are (T, n) views of ``ids``; nothing is copied.

    Raises :class:`TypeError` or :class:`ValueError` for ids that are no one-dimensional integer
    array, T or n below 1, or fewer than n · T + 1 tokens (and T more for the random offset).
    """

    carries_state = True

    def __init__(self, ids: Ids, T: int, n: int, *, random_offset: bool = True) -> None:
        self._ids = _checked_ids(ids)
        self.T = _at_least(1, "T", T)
        self.n = _at_least(1, "n", n)
        self.random_offset = bool(random_offset)
        _need(
            self._ids,
            self.n * self.T + 1 + self._largest_offset,
            f"one batch of n={self.n} streams of T={self.T}"
            + (" at any offset" if self.random_offset else ""),
            "T or n",
        )

    @property
    def num_batches(self) -> int:
        """The number of batches that every epoch has at least; some offsets give one more."""
        return self._stream_length(self._largest_offset) // self.T

    @property
    def _largest_offset(self) -> int:
        return self.T if self.random_offset else 0

    def _stream_length(self, offset: int) -> int:
        return (self._ids.size - offset - 1) // self.n

    def epoch(self, rng: np.random.Generator) -> Epoch:
        """Return the batches of one pass; draws from ``rng`` only if the offset is random."""
        _check_rng(rng)
        offset = int(rng.integers(self.T, endpoint=True)) if self.random_offset else 0
        L = self._stream_length(offset)
        X = self._ids[offset : offset + self.n * L].reshape(self.n, L)
        Y = self._ids[offset + 1 : offset + 1 + self.n * L].reshape(self.n, L)

        def batch(k: int) -> Batch:
            steps = slice(k * self.T, (k + 1) * self.T)
            return X[:, steps].T, Y[:, steps].T

        return Epoch(batch, range(L // self.T))

    def config(self) -> dict[str, str | int]:
        """Return the sampler's kind and its numbers."""
        return {
            "kind": "sequential-partition",
            "T": self.T,
            "n": self.n,
            "random_offset": self.random_offset,
        }


def shifted(ids: Ids) -> Batch:
    """Return inputs and targets of a whole text, ``(ids[:-1], ids[1:])``, as views.

    The target of every token is the one that follows: "machine" gives "machin" and "achine"
    (*Dive into Deep Learning*, section 9.4.3). ``ids`` is a one-dimensional integer array.

    Raises :class:`TypeError` or :class:`ValueError` if it is not, or has fewer than two tokens.
    """
    ids = _checked_ids(ids)
    if ids.size < 2:
        raise ValueError(f"ids must have at least 2 tokens, one and its target; got {ids.size}")
    return ids[:-1], ids[1:]


def split(ids: Ids, fraction: float) -> tuple[Ids, Ids]:
    """Split a text by position; return its first part, to train on, and the rest, to validate.

    The training part is the fraction ``fraction`` of the tokens, rounded to a whole number. Both
    parts are views of ``ids``, a one-dimensional integer array.

    Raises :class:`TypeError` or :class:`ValueError` if it is not, if ``fraction`` is not between
    0 and 1, or if one of the parts would be empty.
    """
    ids = _checked_ids(ids)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, both excluded; got {fraction!r}")
    at = round(fraction * ids.size)
    if not 0 < at < ids.size:
        raise ValueError(
            f"fraction={fraction!r} of {ids.size} tokens leaves {at} to train on and "
            f"{ids.size - at} to validate: both parts need at least one"
        )
    return ids[:at], ids[at:]


def _gather(ids: Ids, starts: npt.NDArray[np.intp], T: int) -> Batch:
    """Copy the subsequences at ``starts`` and their targets into a (T + 1, n) array; view it."""
    block = ids[np.arange(T + 1)[:, None] + starts]
    return block[:-1], block[1:]


def _checked_ids(ids: Ids) -> Ids:
    array = np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"ids must be a one-dimensional array, got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"ids must be an array of integers, got dtype {array.dtype}")
    return array


def _at_least(least: int, name: str, value: int) -> int:
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _need(ids: Ids, needed: int, what: str, lower: str) -> None:
    if ids.size < needed:
        raise ValueError(
            f"ids has {ids.size} tokens, but {what} needs at least {needed}: "
            f"lower {lower}, or give a longer text"
        )


def _check_rng(rng: np.random.Generator) -> None:
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator, got {type(rng).__name__}")
