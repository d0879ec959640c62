"""What all plans of a generation have in common: where a matrix fits, and what a step takes."""

import math

from gpurnn.dense import Dense
from gpurnn.planning.limits import Limits
from gpurnn.tile import VECTOR, WARP

__all__ = [
    "CHAIN",
    "DRAW",
    "MARGIN",
    "SHARED_BYTES_A_CYCLE",
    "STATIC",
    "draw_cycles",
    "held",
    "in_registers",
    "output_columns",
    "product_cycles",
]

STATIC = 1024  # bytes of shared memory that a kernel declares, at most
MOST_COLUMNS = 8  # of a group of lanes at a time
IN_FLIGHT = 32  # numbers that pass through registers on their way from memory

# Of a step, in cycles.
CHAIN = 400.0  # a row of the table, φ, barriers, sums over lanes
DRAW = 350.0  # by a warp
DRAW_OF_BLOCK = 1_000.0  # by all warps
DRAW_OF_THREAD = 60.0  # and for each token of a thread, of a warp of a scheduler
MARGIN = 1.25  # all instructions of a product over its multiply-adds
SHARED_BYTES_A_CYCLE = 128.0
L2_BYTES_A_CYCLE = 48.0  # into one multiprocessor
ALL_L2_BYTES_A_CYCLE = 3_000.0


def output_columns(q: int, groups: int) -> int:
    """Return how many columns of W_hq a group of lanes takes at a time."""
    columns = 1
    while columns < MOST_COLUMNS and groups * columns < q:
        columns *= 2
    return columns if groups * columns >= q else VECTOR


def in_registers(matrix: Dense, free: int) -> tuple[Dense, int]:
    """Return the matrix with as much in so many registers as they hold, and those left over."""
    piece = VECTOR * matrix.columns
    kept = free // piece
    if kept < matrix.quads:  # the others pass through registers
        kept = max(0, (free - IN_FLIGHT) // piece)
    kept = min(kept, matrix.quads)
    return matrix._replace(kept=kept), free - kept * piece


def held(matrix: Dense, room: int) -> Dense:
    """Return the matrix with as much in shared memory as there is room for so many numbers."""
    count = max(0, min(matrix.pieces - matrix.kept, room // matrix.piece_numbers))
    if matrix.passes > 1 and count < matrix.pieces:
        count = 0
    return matrix._replace(held=count)


def draw_cycles(q: int, threads: int) -> float:
    """Return the cycles of a draw by so many threads, without cuts."""
    each = -(-q // threads)
    return DRAW_OF_BLOCK + each * DRAW_OF_THREAD * math.ceil(threads / WARP / 4)


def product_cycles(matrix: Dense, size: int, beside: int, device: Limits) -> float:
    """Cycles of one product, with so many blocks at once on the whole GPU."""
    rate = 1.0 if size == 4 else (2.0 if device.half_rate_float64 else 32.0)
    issued = matrix.pieces * VECTOR * matrix.columns * rate * MARGIN
    issued *= math.ceil(matrix.threads / WARP / 4)
    shared = matrix.held_numbers * size / SHARED_BYTES_A_CYCLE
    streamed = (matrix.pieces - matrix.kept - matrix.held) * matrix.piece_numbers * size
    from_l2 = max(streamed / L2_BYTES_A_CYCLE, streamed * beside / ALL_L2_BYTES_A_CYCLE)
    return max(issued, shared, from_l2)
