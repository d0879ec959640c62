"""What a device has to know of an epoch's batches, and what it notes of each, a row a batch.

A graph has the addresses of these arrays in it: an epoch's rows go where those of the one before
were, some at a time, between the steps that read them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpurnn.batches import Sampler
from gpurnn.cuda.engines import Array, Engine
from gpurnn.slots import Rates, Record
from gpurnn.training.steps import Plan

__all__ = ["Tables"]


class Tables:
    """Flat arrays on a device.

    Attributes:
        starts: int64, the places in the text where the n examples of each batch begin.
        rates: float64, ``gpurnn.slots.Rates``.
        factors: of ``dtype``, the T truncation factors; of length 0 where nothing is truncated.
        record: float64, ``gpurnn.slots.Record``.
    """

    def __init__(self, engine: Engine, sampler: Sampler, dtype: Any, *, truncated: bool) -> None:
        self._engine, self._dtype = engine, dtype
        self._n, self._T = sampler.n, sampler.T if truncated else 0
        self._rows = 0
        self._make(sampler.num_batches + 1)

    def _make(self, rows: int) -> None:
        with self._engine.here():
            zeros = self._engine.xp.zeros
            self.starts: Array = zeros(rows * self._n, np.int64)
            self.rates: Array = zeros(rows * Rates.SIZE, np.float64)
            self.factors: Array = zeros(rows * self._T, self._dtype)
            self.record: Array = zeros(rows * Record.SIZE, np.float64)
            self._engine.settle()
        self._rows = rows

    def holds(self, rows: int) -> bool:
        """Say whether there is room for so many batches."""
        return rows <= self._rows

    def grow(self, rows: int) -> None:
        """Make room for so many: the arrays are then others, and nothing may use the old ones."""
        self._make(rows)

    def write(self, plan: Plan, batches: range, rates: Callable[[int], tuple[float, ...]]) -> None:
        """Queue the writing of some rows; ``rates`` gives those of an update by its number."""
        updates = plan.update - plan.first + np.array(batches)
        starts = [plan.batches.starts(b) for b in batches]
        self._put(self.starts, batches.start * self._n, np.concatenate(starts).astype(np.int64))
        rows = np.array([rates(int(u)) for u in updates], np.float64)
        self._put(self.rates, batches.start * Rates.SIZE, rows.reshape(-1))
        factors = plan.xi(updates)
        if factors is not None:
            self._put(self.factors, batches.start * self._T, factors.reshape(-1))

    def noted(self, batches: range) -> Array:
        """Return a view of the records of some batches."""
        return self.record[batches.start * Record.SIZE : batches.stop * Record.SIZE]

    def _put(self, there: Array, first: int, a: Any) -> None:
        there[first : first + a.size] = self._engine.xp.array(a)
