"""How rows are added up by their id: sizes of the blocks, and how many there are."""

from dataclasses import dataclass

from gpurnn.planning.limits import Limits
from gpurnn.planning.plans import STATIC_SHARED, itemsize
from gpurnn.tile import WARP, Scatter

__all__ = ["ScatterPlan", "scatter_plan"]

THREADS = 256
LOADS = 8
SHARED = 64 * 1024  # bytes of sums, so that a multiprocessor takes two or three blocks
BLOCKS_PER_SM = 2
LEAST_ROWS = 512  # that are worth a part of their own
MOST_GRID_Z = 65_535


@dataclass(frozen=True)
class ScatterPlan:
    """What ``kernels.tokens.scatter`` is launched with.

    A block owns ``ids`` neighbouring ids and looks at ``rows`` rows; of ``parts`` parts of the rows
    another launch adds the sums. ``shared`` is dynamic shared memory in bytes.
    """

    tile: Scatter
    ids: int
    rows: int
    grid: tuple[int, int, int]
    shared: int

    @property
    def parts(self) -> int:
        """Parts that the rows are cut into."""
        return self.grid[2]


def scatter_plan(N: int, d: int, h: int, dtype: str, device: Limits) -> ScatterPlan:
    """Plan to add up N rows of h numbers by ids below d; N, d and h are at least 1.

    Few ids leave few blocks, and the commonest id keeps one busy for long: the rows are cut into
    parts as long as the parts' sums, d · h numbers each, stay few beside the rows' own. A block
    owns as many ids as there are blocks enough for, and as its shared memory holds sums of: the
    more, the fewer blocks look at the same ids.
    """
    columns = min(THREADS, _power_of_two(h))
    tile = Scatter(min(THREADS, max(WARP, columns, _power_of_two(N))), columns, LOADS)
    across = -(-h // columns)
    wanted = BLOCKS_PER_SM * device.multiprocessors
    most_parts = max(1, min(N // (4 * d), -(-N // LEAST_ROWS), wanted // across, MOST_GRID_Z))
    rows = -(-N // (most_parts * WARP)) * WARP
    parts = -(-N // rows)
    of_id = tile.threads * (8 if itemsize(dtype) == 8 else 4)
    most_ids = min(SHARED, device.shared_per_block - STATIC_SHARED) // of_id
    ranges = max(-(-d // most_ids), min(d, -(-wanted // (parts * across))))
    ids = -(-d // ranges)
    shared = of_id << (ids - 1).bit_length()  # few different sizes: each is set up once
    return ScatterPlan(tile, ids, rows, (-(-d // ids), across, parts), shared)


def _power_of_two(size: int) -> int:
    """Return the least that is not below ``size``."""
    return 1 << (size - 1).bit_length()
