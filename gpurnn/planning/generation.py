"""Plans of a generation: where the weights lie, and how many blocks generate a row of the batch.

Three kernels generate (``gpurnn.kernels.generate``, ``generate_group``), all in one launch:

* *resident*: a block a row, all weights in its registers and shared memory;
* *streamed*: the same, but what the block cannot hold it reads from the L2 cache in each step;
* *group*: several blocks a row, each with a part of W_hh, for one layer in float32.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

from gpurnn.dense import MOST_OF_A_WARP, Dense, GroupSizes, RowSizes
from gpurnn.planning.group import (
    EXCHANGES,
    Group,
    all_sizes,
    exchange_cycles,
    groups_at_once,
    registers_of,
    tried_sizes,
)
from gpurnn.planning.limits import Limits
from gpurnn.planning.plans import MOST_ROWS, Plan, counted, itemsize
from gpurnn.tile import LINE, VECTOR, WARP, Share

__all__ = ["GENERATORS", "generation_plan", "generation_words"]

GENERATORS = ("resident", "streamed", "group")
"""Kernels that ``kernel=`` of a generation may name."""

DTYPES = ("float32", "float64")
MOST_ROW_THREADS = 256  # that multiply
MOST_GROUP_THREADS = 512
MOST_IN_REGISTERS = 256  # h: of a larger W_hh most passes through registers, on its way from L2
MOST_COLUMNS = 8  # of a group of lanes at a time
STATIC = 1024  # bytes that a kernel declares, at most
MOST_LOGITS = 96 * 1024  # bytes of logits and masses in shared memory
MOST_TABLE = 32 * 1024  # and of the columns of the table, in a block of a group
OTHER_REGISTERS = 72  # of a thread, beside those for weights: found by compiling
OF_A_GROUP = 88
IN_FLIGHT = 32  # numbers that pass through registers on their way from memory

WORTH_A_GROUP = 0.8  # of the time without: the model of a group is the rougher

# Of a step, in cycles.
CHAIN = 400.0  # a row of the table, φ, barriers, sums over lanes
LAYER = 150.0  # each further layer: a barrier, a sum over lanes, φ
DRAW = 350.0  # by a warp
DRAW_OF_BLOCK = 1_000.0  # by all warps
DRAW_OF_THREAD = 60.0  # and for each token of a thread, of a warp of a scheduler
MARGIN = 1.25  # all instructions of a product over its multiply-adds
SHARED_BYTES_A_CYCLE = 128.0
L2_BYTES_A_CYCLE = 48.0  # into one multiprocessor
ALL_L2_BYTES_A_CYCLE = 3_000.0


def generation_plan(
    *,
    rows: int,
    h: int,
    q: int,
    layers: int,
    dtype: str,
    device: Limits,
    kernel: str | Group | None = None,
) -> Plan:
    """Choose a kernel for texts of a language model.

    Args:
        rows: texts at once. h: hidden units. q: tokens. layers: recurrent layers.
        dtype: "float32" or "float64".
        device: what the GPU can hold.
        kernel: one of ``GENERATORS``, or a ``Group`` with some of its sizes (one row each), to have
            that one; None chooses.

    Raises:
        ValueError: an argument is out of range, or the kernel named cannot hold this model; the
            message says what would.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    if kernel is not None and not isinstance(kernel, Group) and kernel not in GENERATORS:
        raise ValueError(
            f"kernel is {kernel!r}: expected None, a Group, or one of {', '.join(GENERATORS)}"
        )
    weights = (2 * layers - 1) * h * h + h * q
    if 2 * weights >= MOST_ROWS:  # with padding
        raise ValueError(
            f"h is {h}, q {q} and layers {layers}: expected less than 2³⁰ weights in all, as "
            "they are counted in 32 bits"
        )
    return _plan(rows, h, q, layers, dtype, device, kernel)


def generation_words(plan: Plan) -> int:
    """Return how many 64-bit words each exchange of a group needs as scratch.

    That of the states does, and that of the logits, where these are exchanged; the larger counts.
    """
    sizes = plan.tile
    assert isinstance(sizes, GroupSizes)
    if plan.exchange == "flags":
        values = max(sizes.share.h, sizes.q if sizes.split else 0)
        return 2 * (-(-values // 2) * 2)
    return LINE if plan.exchange == "counter" else 2


@lru_cache(maxsize=1024)
def _plan(
    rows: int,
    h: int,
    q: int,
    layers: int,
    dtype: str,
    device: Limits,
    kernel: str | Group | None,
) -> Plan:
    if kernel == "group" or isinstance(kernel, Group):
        wish = kernel if isinstance(kernel, Group) else Group()
        groups = list(_group_plans(rows, h, q, layers, dtype, device, wish))
        if not groups:
            raise ValueError(f"kernel is {wish}: {_why_no_group(h, layers, dtype, device, wish)}")
        return min(groups, key=lambda found: found[0])[1]
    sizes, resident = _row_sizes(h, q, layers, dtype, device)
    if layers > 1 and not resident:  # several matrices are streamed, and want the registers
        sizes, resident = _row_sizes(h, q, layers, dtype, device, registers=False)
    if kernel == "streamed" and resident:
        sizes, resident = _streaming(sizes), False
    if kernel == "resident" and not resident:
        raise ValueError(
            f"kernel is 'resident', h is {h}, q {q}, layers {layers}, dtype {dtype}: one block of "
            f"{device.name} cannot hold all weights; expected a smaller model, or kernel "
            "'streamed' or 'group'"
        )
    cost, alone = _row_plan(rows, sizes, dtype, device, resident=resident)
    found = [(cost * WORTH_A_GROUP, alone)]
    if kernel is None:
        found += _group_plans(rows, h, q, layers, dtype, device, Group())
    return min(found, key=lambda one: one[0])[1]


# ---------------------------------------------------------------------------------------
# A block a row
# ---------------------------------------------------------------------------------------


def _row_sizes(
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
    threads = min(MOST_ROW_THREADS, _whole_warps(-(-h // columns) * slices))
    plain = Dense(h, h, columns, slices, threads)
    few = min(threads, _whole_warps(q * slices))
    output = Dense(h, q, _output_columns(q, few // slices), slices, few)
    on_chip = 2 * q * 4 * words <= MOST_LOGITS
    sizes = RowSizes(h, q, layers, (*[plain] * (2 * layers - 1), output), on_chip)

    matrices = list(sizes.matrices)
    free = (registers_of(sizes.threads) - OTHER_REGISTERS) // words
    if registers and h <= MOST_IN_REGISTERS and plain.passes == 1:
        first, free = _in_registers(plain, free)
        matrices[0] = first
    if output.passes == 1 and matrices[0].kept == plain.quads:
        whole, _ = _in_registers(output, free)
        if whole.kept == output.quads:
            matrices[-1] = whole
    room = (device.shared_per_block - STATIC) // (4 * words) - sizes.shared_numbers
    for i in (len(matrices) - 1, *range(len(matrices) - 1)):
        matrices[i] = _held(matrices[i], room)
        room -= matrices[i].held_numbers
    sizes = sizes._replace(matrices=tuple(matrices))
    return sizes, all(m.kept + m.held == m.pieces for m in matrices)


def _whole_warps(threads: int) -> int:
    return -(-threads // WARP) * WARP


def _output_columns(q: int, groups: int) -> int:
    """Return how many columns of W_hq a group of lanes takes at a time."""
    columns = 1
    while columns < MOST_COLUMNS and groups * columns < q:
        columns *= 2
    return columns if groups * columns >= q else VECTOR


def _in_registers(matrix: Dense, free: int) -> tuple[Dense, int]:
    """Return the matrix with as much in so many registers as they hold, and those left over."""
    piece = VECTOR * matrix.columns
    kept = free // piece
    if kept < matrix.quads:  # the others pass through registers
        kept = max(0, (free - IN_FLIGHT) // piece)
    kept = min(kept, matrix.quads)
    return matrix._replace(kept=kept), free - kept * piece


def _held(matrix: Dense, room: int) -> Dense:
    """Return the matrix with as much in shared memory as there is room for so many numbers."""
    held = max(0, min(matrix.pieces - matrix.kept, room // matrix.piece_numbers))
    if matrix.passes > 1 and held < matrix.pieces:
        held = 0
    return matrix._replace(held=held)


def _streaming(sizes: RowSizes) -> RowSizes:
    return sizes._replace(matrices=tuple(m._replace(kept=0, held=0) for m in sizes.matrices))


def _row_plan(
    rows: int, sizes: RowSizes, dtype: str, device: Limits, *, resident: bool
) -> tuple[float, Plan]:
    size = itemsize(dtype)
    shared = sizes.shared_numbers * size
    beside = max(1, min(rows, device.multiprocessors))
    *recurrent, output = sizes.matrices

    def product(matrix: Dense) -> float:
        return _product_cycles(matrix, size, beside, device)

    above = sum(product(m) + LAYER for m in recurrent[1::2])
    below = sum(product(m) for m in recurrent[::2])
    of_warp = sizes.q <= MOST_OF_A_WARP
    draw = max(DRAW, below) if of_warp else _draw_cycles(sizes.q, sizes.threads) + below
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


def _draw_cycles(q: int, threads: int) -> float:
    each = -(-q // threads)
    return DRAW_OF_BLOCK + each * DRAW_OF_THREAD * math.ceil(threads / WARP / 4)


def _product_cycles(matrix: Dense, size: int, beside: int, device: Limits) -> float:
    """Cycles of one product, with so many blocks at once on the whole GPU."""
    rate = 1.0 if size == 4 else (2.0 if device.half_rate_float64 else 32.0)
    issued = matrix.pieces * VECTOR * matrix.columns * rate * MARGIN
    issued *= math.ceil(matrix.threads / WARP / 4)
    shared = matrix.held_numbers * size / SHARED_BYTES_A_CYCLE
    streamed = (matrix.pieces - matrix.kept - matrix.held) * matrix.piece_numbers * size
    from_l2 = max(streamed / L2_BYTES_A_CYCLE, streamed * beside / ALL_L2_BYTES_A_CYCLE)
    return max(issued, shared, from_l2)


# ---------------------------------------------------------------------------------------
# Several blocks a row
# ---------------------------------------------------------------------------------------


def _group_plans(
    rows: int, h: int, q: int, layers: int, dtype: str, device: Limits, wish: Group
) -> Iterator[tuple[float, Plan]]:
    if dtype != "float32" or layers != 1 or wish.rows not in (None, 1):
        return
    for exchange in EXCHANGES if wish.exchange is None else (wish.exchange,):
        tried = tried_sizes(h, exchange, device) if wish.blocks is None else (wish.blocks,)
        for blocks in tried:
            at_once = groups_at_once(blocks, exchange, device)
            for split in (False, True) if at_once else ():
                for sizes in _group_sizes(h, q, blocks, device, split=split):
                    yield _group_plan(rows, sizes, exchange, at_once, device)


def _group_sizes(
    h: int, q: int, blocks: int, device: Limits, *, split: bool
) -> Iterator[GroupSizes]:
    columns = -(-h // blocks)
    for C in (1, 2, 4, 8):
        groups = -(-columns // (2 * C)) * 2
        share = Share(h, blocks, groups, C, 1, 1, 0)
        if share.threads > MOST_GROUP_THREADS or (blocks - 1) * share.width >= h:
            continue  # every block must own a column
        free = registers_of(share.threads) - OF_A_GROUP
        kept = free // C // VECTOR * VECTOR
        if kept < share.depth:
            kept = max(0, kept - VECTOR)
        share = share._replace(kept=min(share.depth, kept))
        free -= share.kept * C
        width = -(-q // blocks) if split else q
        output = Dense(h, width, _output_columns(width, groups), share.slices, share.threads)
        if output.passes == 1 and share.kept == share.depth:
            whole, _ = _in_registers(output, free)
            if whole.kept == output.quads:
                output = whole
        table = 4 * q * share.width <= MOST_TABLE
        sizes = GroupSizes(share, q, output, split, table)
        room = (device.shared_per_block - STATIC) // 4 - sizes.shared_numbers
        if room < 0:
            continue
        yield sizes._replace(output=_held(output, room))


def _group_plan(
    rows: int, sizes: GroupSizes, exchange: str, at_once: int, device: Limits
) -> tuple[float, Plan]:
    share, clusters = sizes.share, exchange == "cluster"
    warps = math.ceil(share.threads / WARP / 4)
    product = share.depth * share.columns * MARGIN * warps
    held = 4 * share.shared_weights / SHARED_BYTES_A_CYCLE
    groups = min(max(1, rows), at_once)
    logits = _product_cycles(sizes.output, 4, groups * share.blocks, device)
    of_warp = sizes.q <= MOST_OF_A_WARP
    cycles = (
        CHAIN
        + max(product, held)
        + logits
        + (DRAW if of_warp else _draw_cycles(sizes.q, sizes.threads))
    )
    cycles += exchange_cycles(share, 1, exchange, groups, device)
    if sizes.split:
        whole = share._replace(h=sizes.q)
        cycles += 100 + exchange_cycles(whole, 1, exchange, groups, device)
    waves = max(1, -(-rows // at_once))
    step = cycles / device.clock_ghz
    launches = 1 if clusters else waves
    count = max(1, rows) if clusters else groups
    how = {
        "cluster": f"a cluster of {share.blocks}, states into each other's shared memory",
        "flags": "states through L2, each word with its step's number, which readers poll for",
        "counter": "states through L2, a counter tells when all are there",
    }[exchange]
    why = (
        f"W_hh ({share.h}, {share.h}) is split over {share.blocks} blocks, {share.width} columns "
        f"each; {counted(groups, 'text')} at once, {counted(waves, 'wave')}",
        f"W_hq ({share.h}, {sizes.q}) is split too, and logits are exchanged; each block draws"
        if sizes.split
        else f"each block multiplies with all of W_hq ({share.h}, {sizes.q}), and draws",
        f"exchange: {how}",
        f"about {step / 1e3:.2f} µs a token by the model",
    )
    plan = Plan(
        "group",
        (count * share.blocks, 1, 1),
        (sizes.threads, 1, 1),
        4 * sizes.shared_numbers,
        launches,
        sizes,
        why,
        exchange=exchange,
        cluster=share.blocks if clusters else 1,
    )
    return waves * step, plan


def _why_no_group(h: int, layers: int, dtype: str, device: Limits, wish: Group) -> str:
    if dtype != "float32":
        return f"dtype is {dtype}: expected float32, or kernel 'streamed'"
    if layers != 1:
        return f"the model has {layers} layers: expected one, or kernel 'streamed'"
    if wish.rows not in (None, 1):
        return f"rows is {wish.rows}: expected 1, the texts that a group generates at a time"
    if wish.exchange == "cluster" and not device.largest_cluster:
        major, minor = device.compute_capability
        return (
            f"{device.name} has compute capability {major}.{minor} and no clusters: expected "
            "exchange 'flags' or 'counter'"
        )
    exchanges = EXCHANGES if wish.exchange is None else (wish.exchange,)
    possible = sorted({size for exchange in exchanges for size in all_sizes(exchange, device)})
    if wish.blocks is not None and wish.blocks not in possible:
        if exchanges == ("cluster",):
            return (
                f"blocks is {wish.blocks}: expected one of {', '.join(map(str, possible))}, the "
                f"clusters of {device.name}"
            )
        return f"blocks is {wish.blocks}: expected 2 to {possible[-1]}, what {device.name} runs"
    if wish.blocks is not None and (wish.blocks - 1) * 2 >= h:
        return (
            f"h is {h}: expected {wish.blocks} blocks that own a column each, 2 at least, so fewer "
            "blocks"
        )
    over = "" if wish.blocks is None else f" over {wish.blocks} blocks"
    return (
        f"W_hh ({h}, {h}){over} is more than the multiprocessors of {device.name} hold: expected "
        "a smaller h, more blocks, or kernel 'streamed'"
    )
