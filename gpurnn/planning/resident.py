"""Plans of the resident kernel: W_hh in one block."""

import math
from functools import lru_cache

from gpurnn.planning.limits import Limits
from gpurnn.planning.plans import STATIC_SHARED, Plan, counted
from gpurnn.tile import VECTOR, WARP, Tile

__all__ = ["LATENCY", "largest_resident", "registers_guess", "resident_plans", "resident_tiles"]

MOST_THREADS = 256  # of a resident block: beyond that a thread has fewer than 255 registers

# Of a resident step, in cycles.
LATENCY = 250.0  # shared loads, the sum over lanes, φ, one barrier
OVERHEAD = 40.0  # instructions of a warp that do not grow with its rows
EPILOGUE = 45.0  # and per number it finishes
MARGIN = 1.2  # all instructions of the product over its multiply-adds


@lru_cache(maxsize=64)
def largest_resident(dtype: str, device: Limits) -> int:
    """Return the largest h whose W_hh one block of the device can hold."""
    return max((h for h in range(1, 513) if _fitting(h, dtype, device)), default=0)


def resident_tiles(h: int, dtype: str) -> tuple[Tile, ...]:
    """Return the ways of sharing out W_hh that are compiled: one for each number of rows.

    All have the same columns, slices and depth, which alone decide the order of every sum. How much
    of W_hh goes into registers was chosen so that the kernels compile without spilling.
    """
    words = 2 if dtype == "float64" else 1
    columns = 4 if h <= (144 if words == 1 else 64) else 8
    depth = -(-h // (columns * VECTOR)) * VECTOR
    tiles = []
    for rows in (1, 2, 4, 8):
        if rows * columns * words > 32:
            continue
        whole, part = _register_weights(rows, dtype)
        weights = depth * columns * words
        kept = depth if weights <= whole else part // (columns * words) // VECTOR * VECTOR
        tile = Tile(h, rows, columns, columns, depth, kept)
        if tile.threads <= MOST_THREADS:
            tiles.append(tile)
    return tuple(tiles)


def _register_weights(rows: int, dtype: str) -> tuple[int, int]:
    """Registers a thread has for weights: where they hold all of them, and where only a part."""
    if dtype == "float64":
        return (192, 128) if rows == 1 else (128, 128)
    return {1: (192, 160), 2: (192, 128), 4: (160, 128), 8: (128, 128)}[rows]


def _fitting(h: int, dtype: str, device: Limits) -> list[Tile]:
    size = 8 if dtype == "float64" else 4
    return [
        tile
        for tile in resident_tiles(h, dtype)
        if tile.shared_values * size <= STATIC_SHARED
        and (tile.shared_values + tile.shared_weights) * size <= device.shared_per_block
    ]


def resident_plans(n: int, h: int, dtype: str, device: Limits) -> list[tuple[float, Plan]]:
    """Return nanoseconds a step and plan of every tile that fits."""
    found = []
    words = 2 if dtype == "float64" else 1
    for tile in _fitting(h, dtype, device):
        blocks = -(-n // tile.rows)
        shared = tile.shared_weights * 4 * words
        at_once = _blocks_at_once(tile, words, device)
        waves = max(1, math.ceil(blocks / (at_once * device.multiprocessors)))
        beside = min(at_once, max(1, math.ceil(blocks / device.multiprocessors)))
        cycles = _step_cycles(tile, words, beside, device)
        microseconds = cycles / device.clock_ghz / 1e3
        where = (
            "registers"
            if tile.kept == tile.depth
            else (f"registers ({tile.kept / tile.depth:.0%}) and shared memory")
        )
        why = (
            f"W_hh ({h}, {h}) stays in {where} of each block",
            f"{counted(tile.rows, 'row')} of the batch a block, {counted(beside, 'block')} at once "
            f"on each of {device.multiprocessors} multiprocessors, {counted(waves, 'wave')}",
            f"about {microseconds:.2f} µs a step by the model; between steps a barrier, no launch",
        )
        found.append(
            (
                waves * cycles / device.clock_ghz,
                Plan(
                    "resident", (max(1, blocks), 1, 1), (tile.threads, 1, 1), shared, 1, tile, why
                ),
            )
        )
    return found


def _blocks_at_once(tile: Tile, words: int, device: Limits) -> int:
    """Blocks a multiprocessor holds, by registers, threads and shared memory."""
    registers = registers_guess(tile, words)
    shared = (tile.shared_values + tile.shared_weights) * 4 * words + 1024
    return max(
        1,
        min(
            device.registers_per_multiprocessor // (registers * tile.threads),
            device.threads_per_multiprocessor // tile.threads,
            device.shared_per_multiprocessor // shared,
            32,
        ),
    )


def registers_guess(tile: Tile, words: int) -> int:
    """About the registers of a thread, for numbers of so many 32-bit words."""
    own = tile.rows * (tile.columns + 4 * tile.own) * words
    registers = min(255, tile.kept * tile.columns * words + own + 35)
    return -(-registers // 8) * 8


def _step_cycles(tile: Tile, words: int, beside: int, device: Limits) -> float:
    """Cycles from one step to the next with ``beside`` blocks on the multiprocessor."""
    warps = tile.threads // WARP
    rate = 1.0 if words == 1 else (2.0 if device.half_rate_float64 else 32.0)
    product = tile.rows * tile.depth * tile.columns * rate * MARGIN
    issued = product + tile.rows * tile.own * EPILOGUE + OVERHEAD
    alone = issued * math.ceil(warps / 4)
    together = issued * beside * warps / 4
    values = tile.rows * tile.depth // VECTOR * words
    weights = (tile.depth - tile.kept) * tile.columns // VECTOR * 4 * words
    shared = float((values + weights) * warps * beside)
    return max(LATENCY + alone, together, shared)
