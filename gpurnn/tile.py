"""How a block shares out a product with W_hh among its threads: sizes only, no device code.

A block computes ``a[r, j] = Σ_k v[r, k] W[k, j]`` for its ``rows`` rows r and all h columns j, with
W resident. Threads come in groups of ``slices`` neighbouring lanes. Group g owns the ``columns``
columns from ``g · columns`` on; lane s of a group owns the rows of W (the k) from ``s · depth`` on.
So a thread holds a (depth, columns) piece of W: its first ``kept`` rows in registers, the rest in
shared memory. After the sum over a group's lanes, lane s is left with ``own`` columns, those from
``g · columns + s · own`` on, complete.

Sizes past h are padding: weights of 0 that are never stored, in registers and shared memory only.
"""

from typing import NamedTuple

__all__ = ["VECTOR", "WARP", "Tile"]

WARP = 32
VECTOR = 4
"""Neighbouring k that a thread takes at a time: a 128-bit load of floats."""


class Tile(NamedTuple):
    """Sizes that a resident kernel is compiled for; ``columns`` is a multiple of ``slices``."""

    h: int
    rows: int
    columns: int
    slices: int
    depth: int
    kept: int

    @property
    def own(self) -> int:
        """Columns that a lane is left with after the sum over its group."""
        return self.columns // self.slices

    @property
    def threads(self) -> int:
        """Threads of a block: whole warps; the last ones may own no column below h."""
        lanes = -(-self.h // self.columns) * self.slices
        return -(-lanes // WARP) * WARP

    @property
    def stride(self) -> int:
        """Distance of two slices of v in shared memory.

        Lanes of a group read different slices at once, 16 bytes each: their addresses fall into
        different banks if the distance in 4-byte words is an odd multiple of 4.
        """
        return self.depth if self.depth % 8 == VECTOR else self.depth + VECTOR

    @property
    def exact(self) -> bool:
        """Whether every thread owns columns below h only."""
        return self.h % self.columns == 0 and self.h // self.columns * self.slices == self.threads

    @property
    def shared_weights(self) -> int:
        """Numbers of W that the block holds in dynamic shared memory."""
        return (self.depth - self.kept) * self.columns * self.threads

    @property
    def shared_values(self) -> int:
        """Numbers of v that it holds in static shared memory: two buffers of its rows."""
        return 2 * self.rows * self.slices * self.stride
