"""Plans of a generation in which the blocks of a group draw one text."""

import math
from collections.abc import Iterator

from gpurnn.dense import MOST_OF_A_WARP, Dense, GroupSizes
from gpurnn.planning.generation_parts import (
    CHAIN,
    DRAW,
    MARGIN,
    SHARED_BYTES_A_CYCLE,
    STATIC,
    draw_cycles,
    held,
    in_registers,
    output_columns,
    product_cycles,
)
from gpurnn.planning.group import (
    EXCHANGES,
    MOST_BLOCKS,
    Group,
    all_sizes,
    exchange_cycles,
    groups_at_once,
    registers_of,
    tried_sizes,
)
from gpurnn.planning.limits import Limits
from gpurnn.planning.plans import Plan, counted
from gpurnn.tile import LINE, VECTOR, WARP, Share

__all__ = ["generation_words", "group_plan", "group_plans", "group_sizes", "why_no_group"]

MOST_THREADS = 512
MOST_TABLE = 32 * 1024  # bytes of the table's columns in shared memory
OTHER_REGISTERS = 88  # of a thread, beside those for weights: found by compiling


def group_plans(
    rows: int, h: int, q: int, layers: int, dtype: str, device: Limits, wish: Group
) -> Iterator[tuple[float, Plan]]:
    """Yield nanoseconds a token, and plan, of every way that fits and ``wish`` leaves open."""
    if dtype != "float32" or layers != 1 or wish.rows not in (None, 1):
        return
    for exchange in EXCHANGES if wish.exchange is None else (wish.exchange,):
        tried = tried_sizes(h, exchange, device) if wish.blocks is None else (wish.blocks,)
        for blocks in tried:
            at_once = groups_at_once(blocks, exchange, device)
            for split in (False, True) if at_once else ():
                for sizes in group_sizes(h, q, blocks, device, split=split):
                    yield group_plan(rows, sizes, exchange, at_once, device)


def group_sizes(
    h: int, q: int, blocks: int, device: Limits, *, split: bool
) -> Iterator[GroupSizes]:
    """Yield the ways in which blocks can share out their columns."""
    columns = -(-h // blocks)
    for C in (1, 2, 4, 8):
        groups = -(-columns // (2 * C)) * 2
        share = Share(h, blocks, groups, C, 1, 1, 0)
        if share.threads > MOST_THREADS or (blocks - 1) * share.width >= h:
            continue  # every block must own a column
        free = registers_of(share.threads) - OTHER_REGISTERS
        kept = free // C // VECTOR * VECTOR
        if kept < share.depth:
            kept = max(0, kept - VECTOR)
        share = share._replace(kept=min(share.depth, kept))
        free -= share.kept * C
        width = -(-q // blocks) if split else q
        output = Dense(h, width, output_columns(width, groups), share.slices, share.threads)
        if output.passes == 1 and share.kept == share.depth:
            whole, _ = in_registers(output, free)
            if whole.kept == output.quads:
                output = whole
        table = 4 * q * share.width <= MOST_TABLE
        sizes = GroupSizes(share, q, output, split, table)
        room = (device.shared_per_block - STATIC) // 4 - sizes.shared_numbers
        if room < 0:
            continue
        yield sizes._replace(output=held(output, room))


def group_plan(
    rows: int, sizes: GroupSizes, exchange: str, at_once: int, device: Limits
) -> tuple[float, Plan]:
    """Return nanoseconds a token, for all waves of groups, and the plan."""
    share, clusters = sizes.share, exchange == "cluster"
    warps = math.ceil(share.threads / WARP / 4)
    product = share.depth * share.columns * MARGIN * warps
    from_shared = 4 * share.shared_weights / SHARED_BYTES_A_CYCLE
    groups = min(max(1, rows), at_once)
    logits = product_cycles(sizes.output, 4, groups * share.blocks, device)
    of_warp = sizes.q <= MOST_OF_A_WARP
    cycles = (
        CHAIN
        + max(product, from_shared)
        + logits
        + (DRAW if of_warp else draw_cycles(sizes.q, sizes.threads))
    )
    cycles += exchange_cycles(share, 1, exchange, groups, device)
    if sizes.split:
        whole = share._replace(h=sizes.q)
        cycles += 100 + exchange_cycles(whole, 1, exchange, groups, device)
    waves = max(1, -(-rows // at_once))
    step = cycles / device.clock_ghz
    count = min(max(1, rows), MOST_BLOCKS // share.blocks) if clusters else groups
    launches = max(1, -(-rows // count))
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


def why_no_group(h: int, layers: int, dtype: str, device: Limits, wish: Group) -> str:
    """Return why ``group_plans`` found nothing, and what was expected."""
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
