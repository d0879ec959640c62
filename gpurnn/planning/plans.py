"""A plan: what a launch will look like, and what all kernels' plans have in common."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from gpurnn.dense import GroupSizes, RowSizes
from gpurnn.tile import Share, TensorShare, Tile

__all__ = [
    "DTYPES",
    "MOST_ROWS",
    "PRECISIONS",
    "SIDE",
    "STATIC_SHARED",
    "Plan",
    "counted",
    "dtype_name",
    "itemsize",
    "tiled_grid",
]

DTYPES = ("float32", "float64", "float16", "bfloat16")

PRECISIONS = ("ieee", "tf32")
"""How float32 is multiplied in the recurrence."""

SIDE = 16  # of the step kernel's square blocks
STATIC_SHARED = 48 * 1024  # bytes a kernel may declare
MOST_GRID_Y = 65_535
MOST_ROWS = 2**31  # indices of steps and rows are 32-bit, and so are cuBLAS's sizes


def itemsize(dtype: str) -> int:
    """Return the bytes of a number of one of ``DTYPES``."""
    return {"float32": 4, "float64": 8}.get(dtype, 2)


@cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the name of a dtype: what NumPy takes microseconds to put together."""
    return dtype.name


@dataclass(frozen=True)
class Plan:
    """How one call runs; ``str(plan)`` explains it.

    ``grid`` counts blocks, ``block`` threads (x, y, z); ``shared`` is dynamic shared memory, bytes.
    ``launches`` are those of the forward pass. ``tile`` has the sizes of a resident or group
    kernel, or of one that generates, None for others. Of a group kernel, ``exchange`` says how its
    blocks tell one another their states, and ``cluster`` how many of them are a cluster. ``chunk``
    is the steps of a gemm graph, at most; with 0 nothing is captured. Of gemm ``grid`` and
    ``block`` are those of what follows the product. ``precision`` is how products with W_hh treat
    float32.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    launches: int
    tile: Tile | Share | TensorShare | RowSizes | GroupSizes | None
    why: tuple[str, ...]
    exchange: str | None = None
    cluster: int = 1
    chunk: int = 0
    precision: str = "ieee"

    @property
    def cooperative(self) -> bool:
        """Whether all blocks must run at once, which the launch then makes sure of."""
        return self.exchange in ("flags", "counter")

    def __str__(self) -> str:
        threads = math.prod(self.block)
        blocks = math.prod(self.grid)
        graph = "graph " if self.chunk else ""
        first = (
            f"{self.kernel}: {counted(self.launches, f'{graph}launch', f'{graph}launches')} of "
            f"{counted(blocks, 'block')} × {counted(threads, 'thread')}, "
            f"{self.shared:,} bytes of dynamic shared memory"
        )
        return "\n".join([first, *(f"  {reason}" for reason in self.why)])


def tiled_grid(rows: int, columns: int) -> tuple[int, int, int]:
    """Return the grid of square blocks that covers a matrix.

    Raises:
        ValueError: there are more columns than a grid has room for.
    """
    down, across = -(-rows // SIDE), -(-columns // SIDE)
    if across > MOST_GRID_Y:
        raise ValueError(f"h is {columns:,}: a grid has room for {MOST_GRID_Y * SIDE:,}")
    return max(1, down), max(1, across), 1


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number and what it counts, one of them or many."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
