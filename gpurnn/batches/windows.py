"""Stride-1 windows: the sampler of the book's current edition."""

import numpy as np

from gpurnn import validate
from gpurnn.batches.epoch import Batch, Epoch, Ids, Starts, check_rng, gather, need

__all__ = ["Windows"]


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
        self.ids = validate.text_ids("ids", ids)
        self.T = validate.at_least("T", T, 1)
        self.n = validate.at_least("n", n, 1)
        self.shuffle = bool(shuffle)
        need(self.ids, self.T + 1, f"one window of T={self.T} and its target", "T")
        there = self.ids.size - self.T
        self.start = validate.at_least("start", start, 0)
        self.count = there - self.start if count is None else validate.at_least("count", count, 1)
        if self.count < 1 or self.start + self.count > there:
            raise ValueError(
                f"start={self.start} and count={count} select windows that do not exist: "
                f"{self.ids.size} tokens have {there} windows of T={self.T}"
            )
        pairs = np.lib.stride_tricks.sliding_window_view(self.ids, self.T + 1)
        pairs = pairs[self.start : self.start + self.count]
        self.X: Ids = pairs[:, :-1]
        self.Y: Ids = pairs[:, 1:]

    @property
    def num_batches(self) -> int:
        """The number of batches of every epoch: count / n, rounded up."""
        return -(-self.count // self.n)

    def epoch(self, rng: np.random.Generator) -> Epoch:
        """Return the batches of one pass; draws from ``rng`` only if the order is random."""
        check_rng(rng)
        starts = self.start + (
            rng.permutation(self.count) if self.shuffle else np.arange(self.count)
        )

        def of_batch(k: int) -> Starts:
            return starts[k * self.n : (k + 1) * self.n]

        def batch(k: int) -> Batch:
            return gather(self.ids, of_batch(k), self.T)

        return Epoch(batch, of_batch, range(self.num_batches))

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
