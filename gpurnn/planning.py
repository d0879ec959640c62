"""Which kernel runs a shape, with what sizes, and why: arithmetic only, no device is asked.

``plan`` compares what the kernels would take by a rough model of a multiprocessor (instructions
issued, shared memory read, latency of a step) and explains its choice in words. The constants come
from compiled kernels (``tests/resources.json``: registers, instructions) and published latencies;
they decide between ways of cutting up the work and are not a promise of speed.
"""

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from gpurnn.tile import VECTOR, WARP, Tile

__all__ = [
    "DEVICES",
    "DTYPES",
    "KERNELS",
    "MOST_ROWS",
    "SIDE",
    "Limits",
    "Plan",
    "dtype_name",
    "largest_resident",
    "limits",
    "plan",
    "registers_guess",
    "resident_tiles",
    "tiled_grid",
]

KERNELS = ("step", "resident", "concatenated")
"""Kernels that ``kernel=`` may name."""

DTYPES = ("float32", "float64", "float16", "bfloat16")

SIDE = 16  # of the step kernel's square blocks
MOST_THREADS = 256  # of a resident block: beyond that a thread has fewer than 255 registers
STATIC_SHARED = 48 * 1024  # bytes a kernel may declare
MOST_GRID_Y = 65_535
MOST_ROWS = 2**31  # indices of steps and rows are 32-bit, and so are cuBLAS's sizes

# Of a resident step, in cycles.
LATENCY = 250.0  # shared loads, the sum over lanes, φ, one barrier
OVERHEAD = 40.0  # instructions of a warp that do not grow with its rows
EPILOGUE = 45.0  # and per number it finishes
MARGIN = 1.2  # all instructions of the product over its multiply-adds


@dataclass(frozen=True)
class Limits:
    """What a GPU can hold: bytes of shared memory and 32-bit registers, per multiprocessor (SM)."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    clock_ghz: float
    registers_per_multiprocessor: int = 65_536
    threads_per_multiprocessor: int = 2_048
    half_rate_float64: bool = True


DEVICES = {
    "A100": Limits("NVIDIA A100", (8, 0), 108, 166_912, 167_936, 1.41),
    "H100": Limits("NVIDIA H100", (9, 0), 132, 232_448, 233_472, 1.755),
    "H200": Limits("NVIDIA H200", (9, 0), 132, 232_448, 233_472, 1.755),
}
"""GPUs one can plan for without having one. (CUDA C++ Programming Guide, compute capabilities.)"""


@cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the name of a dtype: what NumPy takes microseconds to put together."""
    return dtype.name


def limits(name: str, device: object) -> Limits:
    """Return the limits that ``device`` names, or is; ``name`` is the argument it came as."""
    if isinstance(device, Limits):
        return device
    if isinstance(device, str) and device in DEVICES:
        return DEVICES[device]
    raise ValueError(
        f"{name} is {device!r}: expected one of {', '.join(DEVICES)}, or a planning.Limits"
    )


@dataclass(frozen=True)
class Plan:
    """How one call runs; ``str(plan)`` explains it.

    ``grid`` counts blocks, ``block`` threads (x, y, z); ``shared`` is dynamic shared memory, bytes.
    ``launches`` are those of the forward pass. ``tile`` is the resident kernel's, None for others.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    launches: int
    tile: Tile | None
    why: tuple[str, ...]

    def __str__(self) -> str:
        threads = math.prod(self.block)
        blocks = math.prod(self.grid)
        first = (
            f"{self.kernel}: {_count(self.launches, 'launch', 'launches')} of "
            f"{_count(blocks, 'block')} × {_count(threads, 'thread')}, "
            f"{self.shared:,} bytes of dynamic shared memory"
        )
        return "\n".join([first, *(f"  {reason}" for reason in self.why)])


def plan(
    *,
    T: int,
    n: int,
    d: int,
    h: int,
    dtype: str = "float32",
    device: Limits,
    kernel: str | None = None,
) -> Plan:
    """Choose a kernel for a sequence of T steps of n rows, d inputs and h units.

    Args:
        T: time steps. n: rows of the batch. d: inputs (the choice does not depend on them).
        h: hidden units.
        dtype: "float32", "float64", "float16" or "bfloat16", of the arrays; half types are
            multiplied and summed as float32.
        device: what the GPU can hold.
        kernel: "step", "resident" or "concatenated" to have that one; None chooses.

    Raises:
        ValueError: the kernel named cannot hold this shape; the message says what would.
    """
    for name, size, least in (("T", T, 0), ("n", n, 0), ("d", d, 0), ("h", h, 1)):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} is {size!r}: expected an integer")
        if not least <= size < MOST_ROWS:
            raise ValueError(f"{name} is {size}: expected at least {least} and less than 2³¹")
    if T * n >= MOST_ROWS:
        raise ValueError(
            f"T · n is {T} · {n}: expected less than 2³¹, the rows of one matrix product"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    if dtype == "bfloat16" and device.compute_capability < (8, 0):
        major, minor = device.compute_capability
        raise ValueError(
            f"dtype is 'bfloat16' and {device.name} has compute capability {major}.{minor}: "
            "expected 8.0 or higher, or another dtype"
        )
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}: expected None or one of {', '.join(KERNELS)}")
    return _plan(T, n, h, dtype, device, kernel)


@lru_cache(maxsize=4096)
def _plan(T: int, n: int, h: int, dtype: str, device: Limits, kernel: str | None) -> Plan:
    candidates = _resident_plans(T, n, h, dtype, device)
    resident = min(candidates, key=lambda c: c[0])[1] if candidates else None
    if kernel in ("step", "concatenated"):
        return _step_plan(T, n, h, device, kernel, "asked for by name")
    if kernel == "resident":
        if resident is None:
            raise ValueError(
                f"kernel is 'resident', h is {h}, dtype {dtype}: one block of {device.name} holds "
                f"W_hh up to h = {largest_resident(dtype, device)}; expected a smaller h, or "
                "kernel 'step'"
            )
        return resident
    if resident is not None:
        return resident
    why = f"W_hh ({h}, {h}) of {dtype} is more than one block can hold"
    return _step_plan(T, n, h, device, "step", why)


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


def _resident_plans(T: int, n: int, h: int, dtype: str, device: Limits) -> list[tuple[float, Plan]]:
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
            f"{_count(tile.rows, 'row')} of the batch a block, {_count(beside, 'block')} at once "
            f"on each of {device.multiprocessors} multiprocessors, {_count(waves, 'wave')}",
            f"about {microseconds:.2f} µs a step by the model; between steps a barrier, no launch",
        )
        found.append(
            (
                waves * cycles,
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


def _step_plan(T: int, n: int, h: int, device: Limits, kernel: str, why: str) -> Plan:
    reasons = (
        why,
        f"W_hh ({h}, {h}) is read again in every step, in tiles of {SIDE} × {SIDE}",
        "a launch for each step",
    )
    return Plan(kernel, tiled_grid(n, h), (SIDE, SIDE, 1), 0, T, None, reasons)


def tiled_grid(rows: int, columns: int) -> tuple[int, int, int]:
    """Return the grid of square blocks that covers a matrix.

    Raises:
        ValueError: there are more columns than a grid has room for.
    """
    down, across = -(-rows // SIDE), -(-columns // SIDE)
    if across > MOST_GRID_Y:
        raise ValueError(f"h is {columns:,}: a grid has room for {MOST_GRID_Y * SIDE:,}")
    return max(1, down), max(1, across), 1


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
