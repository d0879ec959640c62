"""Plans of a generation in which each block draws one text."""

import math

from gpurnn.dense import MOST_OF_A_WARP, Dense, RowSizes
from gpurnn.planning.generation_parts import (
    CHAIN,
    DRAW,
    STATIC,
    draw_cycles,
    held,
    in_registers,
    output_columns,
    product_cycles,
)
from gpurnn.planning.group import registers_of
from gpurnn.planning.limits import Limits
from gpurnn.planning.plans import Plan, counted, itemsize
from gpurnn.tile import WARP

__all__ = ["row_plan", "row_sizes", "streaming"]

MOST_THREADS = 256  # that multiply
MOST_IN_REGISTERS = 256  # h: of a larger W_hh most passes through registers, on its way from L2
MOST_LOGITS = 96 * 1024  # bytes of logits and masses in shared memory
OTHER_REGISTERS = 72  # of a thread, beside those for weights: found by compiling
LAYER = 150.0  # cycles of each further layer: a barrier, a sum over lanes, φ


def row_sizes(
    h: int, q: int, layers: int, dtype: str, device: Limits, *, registers: bool = True
) -> tuple[RowSizes, bool]:
    """Return the sizes with as much on the chip as it holds, and whether that is all."""
    words = itemsize(dtype) // 4
    if h <= (144 if words == 1 else 64):
        slices = columns = 4
    elif h <= 256:
        slices = columns = 8
    else:
        slices, columns = 4, 8
    threads = min(MOST_THREADS, _whole_warps(-(-h // columns) * slices))
    plain = Dense(h, h, columns, slices, threads)
    few = min(threads, _whole_warps(q * slices))
    output = Dense(h, q, output_columns(q, few // slices), slices, few)
    on_chip = 2 * q * 4 * words <= MOST_LOGITS
    sizes = RowSizes(h, q, layers, (*[plain] * (2 * layers - 1), output), on_chip)

    matrices = list(sizes.matrices)
    free = (registers_of(sizes.threads) - OTHER_REGISTERS) // words
    if registers and h <= MOST_IN_REGISTERS and plain.passes == 1:
        first, free = in_registers(plain, free)
        matrices[0] = first
    if output.passes == 1 and matrices[0].kept == plain.quads:
        whole, _ = in_registers(output, free)
        if whole.kept == output.quads:
            matrices[-1] = whole
    room = (device.shared_per_block - STATIC) // (4 * words) - sizes.shared_numbers
    for i in (len(matrices) - 1, *range(len(matrices) - 1)):
        matrices[i] = held(matrices[i], room)
        room -= matrices[i].held_numbers
    sizes = sizes._replace(matrices=tuple(matrices))
    return sizes, all(m.kept + m.held == m.pieces for m in matrices)


def _whole_warps(threads: int) -> int:
    return -(-threads // WARP) * WARP


def streaming(sizes: RowSizes) -> RowSizes:
    """Return the same with nothing kept on the chip."""
    return sizes._replace(matrices=tuple(m._replace(kept=0, held=0) for m in sizes.matrices))


def row_plan(
    rows: int, sizes: RowSizes, dtype: str, device: Limits, *, resident: bool
) -> tuple[float, Plan]:
    """Return nanoseconds a token, for all waves of rows, and the plan."""
    size = itemsize(dtype)
    shared = sizes.shared_numbers * size
    beside = max(1, min(rows, device.multiprocessors))
    *recurrent, output = sizes.matrices

    def product(matrix: Dense) -> float:
        return product_cycles(matrix, size, beside, device)

    above = sum(product(m) + LAYER for m in recurrent[1::2])
    below = sum(product(m) for m in recurrent[::2])
    of_warp = sizes.q <= MOST_OF_A_WARP
    draw = max(DRAW, below) if of_warp else draw_cycles(sizes.q, sizes.threads) + below
    cycles = CHAIN + above + product(output) + draw
    waves = max(1, math.ceil(rows / device.multiprocessors))
    step = cycles / device.clock_ghz
    numbers = sum(m.numbers for m in sizes.matrices)
    on_chip = sum((m.kept + m.held) * m.piece_numbers for m in sizes.matrices)
    where = (
        "all weights stay in registers and shared memory of each block"
        if resident
        else f"{on_chip / numbers:.0%} of the weights stay in a block, the rest is read from L2 in "
        "each step"
    )
    why = (
        f"a block for each of {counted(rows, 'text')}; {where}",
        "a warp draws the token while the others multiply with W_hh"
        if of_warp
        else f"all threads draw the token, of {sizes.q:,}",
        f"about {step / 1e3:.2f} µs a token by the model, {counted(waves, 'wave')}",
    )
    plan = Plan(
        "resident" if resident else "streamed",
        (max(1, rows), 1, 1),
        (sizes.threads, 1, 1),
        shared,
        1,
        sizes,
        why,
    )
    return waves * step, plan
