"""Partitions of the text: the samplers of the book's 2017 to 2022 editions."""

import numpy as np

from gpurnn import validate
from gpurnn.batches.epoch import Batch, Epoch, Ids, Starts, check_rng, gather, need

__all__ = ["RandomPartition", "SequentialPartition"]


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
        self.ids = validate.text_ids("ids", ids)
        self.T = validate.at_least("T", T, 1)
        self.n = validate.at_least("n", n, 1)
        need(
            self.ids,
            (self.n + 1) * self.T,
            f"one batch of n={self.n} subsequences of T={self.T} at any offset",
            "T or n",
        )

    @property
    def num_batches(self) -> int:
        """The number of batches that every epoch has at least; some offsets give one more."""
        return self._num_subsequences(self.T - 1) // self.n

    def _num_subsequences(self, offset: int) -> int:
        return (self.ids.size - offset - 1) // self.T

    def epoch(self, rng: np.random.Generator) -> Epoch:
        """Return the batches of one pass; draws the offset and then the order from ``rng``."""
        check_rng(rng)
        offset = int(rng.integers(self.T))
        starts = offset + self.T * rng.permutation(self._num_subsequences(offset))

        def of_batch(k: int) -> Starts:
            return starts[k * self.n : (k + 1) * self.n]

        def batch(k: int) -> Batch:
            return gather(self.ids, of_batch(k), self.T)

        return Epoch(batch, of_batch, range(starts.size // self.n))

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
        self.ids = validate.text_ids("ids", ids)
        self.T = validate.at_least("T", T, 1)
        self.n = validate.at_least("n", n, 1)
        self.random_offset = bool(random_offset)
        need(
            self.ids,
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
        return (self.ids.size - offset - 1) // self.n

    def epoch(self, rng: np.random.Generator) -> Epoch:
        """Return the batches of one pass; draws from ``rng`` only if the offset is random."""
        check_rng(rng)
        offset = int(rng.integers(self.T, endpoint=True)) if self.random_offset else 0
        L = self._stream_length(offset)
        X = self.ids[offset : offset + self.n * L].reshape(self.n, L)
        Y = self.ids[offset + 1 : offset + 1 + self.n * L].reshape(self.n, L)

        def batch(k: int) -> Batch:
            steps = slice(k * self.T, (k + 1) * self.T)
            return X[:, steps].T, Y[:, steps].T

        def of_batch(k: int) -> Starts:
            return offset + k * self.T + L * np.arange(self.n)

        return Epoch(batch, of_batch, range(L // self.T))

    def config(self) -> dict[str, str | int]:
        """Return the sampler's kind and its numbers."""
        return {
            "kind": "sequential-partition",
            "T": self.T,
            "n": self.n,
            "random_offset": self.random_offset,
        }
