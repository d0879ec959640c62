"""Plans of the group kernel: W_hh over several blocks, and how those exchange their states.

The model counts a step's cycles on one multiprocessor: instructions issued, shared memory read, the
chain from the states to φ, and the exchange, whose latencies are ``gpurnn.tuned``'s.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from gpurnn import tuned
from gpurnn.planning.limits import Limits
from gpurnn.planning.plans import Plan, counted
from gpurnn.tile import LINE, VECTOR, WARP, Share, TensorShare

__all__ = [
    "EXCHANGES",
    "Group",
    "all_sizes",
    "exchange_cycles",
    "group_plans",
    "groups_at_once",
    "registers_of",
    "scratch_words",
    "tried_sizes",
    "why_no_group",
]

EXCHANGES = ("cluster", "flags", "counter")

BLOCKS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
"""Sizes of a group that are looked at where none is asked for."""
MOST_BLOCKS = 1 << 16  # of a grid, which report apart from each other
WAVES = (1, 2, 3, 4, 8)
ROWS = (8, 16, 32)
CLUSTERS = (2, 4, 8, 16)
WHOLE_CHIP = 128  # multiprocessors: eight parts of 16 that are all there
STEPS = (2, 4, 8, 16)  # of the columns of a block
PART_OF_CHIP = 16  # multiprocessors within which a cluster lies
MOST_BLOCK_THREADS = 512
MOST_PASSES = 16
MOST_SUMS = 32  # of a thread at a time: registers

# Of a step, in cycles.
CHAIN = 330.0  # shared loads, the sum over lanes, φ, a barrier of the block
PASS = 60.0  # instructions of a warp that do not grow with its rows
EPILOGUE = 45.0  # and per number it finishes
MARGIN = 1.25  # all instructions of the product over its multiply-adds
TENSOR_STEP = 16.0  # of a scheduler, for one mma of a warp
WORDS_A_CYCLE = 5.0  # 64-bit words that one multiprocessor takes out of L2
L2_WORDS_A_CYCLE = 400.0  # and all together
REMOTE_BYTES_A_CYCLE = 32.0  # into another block's shared memory


@dataclass(frozen=True)
class Group:
    """A wish: ``kernel=Group(blocks=8, exchange="cluster", rows=4)``. What is None is chosen.

    Attributes:
        blocks: that one copy of W_hh is split over.
        exchange: "cluster" (through the shared memory of a thread block cluster; compute capability
            9.0), "flags" (through L2, a flag in each word) or "counter" (through L2, a barrier).
        rows: of the batch, that a group takes through the sequence, at least: rounded up to what it
            takes at a time.
    """

    blocks: int | None = None
    exchange: str | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("blocks", "rows"):
            size = getattr(self, name)
            least = 2 if name == "blocks" else 1
            if size is None:
                continue
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} of a Group is {size!r}: expected an integer or None")
            if size < least:
                raise ValueError(f"{name} of a Group is {size}: expected at least {least}")
        if self.exchange is not None and self.exchange not in EXCHANGES:
            raise ValueError(
                f"exchange of a Group is {self.exchange!r}: expected None or one of "
                f"{', '.join(EXCHANGES)}"
            )

    def __str__(self) -> str:
        wishes = [f"{k}={v!r}" for k, v in vars(self).items() if v is not None]
        return f"Group({', '.join(wishes)})" if wishes else "'group'"


@lru_cache(maxsize=4096)
def group_plans(
    n: int, h: int, dtype: str, precision: str, device: Limits, wish: Group
) -> tuple[tuple[float, Plan], ...]:
    """Return nanoseconds a step and plan of every way that fits and that ``wish`` leaves open."""
    if dtype == "float64" or (dtype != "float32" and not device.tensor_cores):
        return ()
    found: list[tuple[float, Plan]] = []
    idle: list[tuple[float, Plan]] = []
    for exchange in EXCHANGES if wish.exchange is None else (wish.exchange,):
        for blocks in tried_sizes(h, exchange, device) if wish.blocks is None else (wish.blocks,):
            at_once = groups_at_once(blocks, exchange, device)
            if at_once == 0:
                continue
            for rows in _rows(n, at_once) if wish.rows is None else (wish.rows,):
                for share in _shares(h, blocks, rows, dtype, precision, exchange):
                    if share.shared_bytes <= device.shared_per_block:
                        kind = idle if _idle(share) else found
                        kind.append(_plan(n, share, exchange, at_once, device))
    return tuple(found or idle)


def _idle(share: Share | TensorShare) -> bool:
    """Whether fewer blocks would own all columns."""
    return (share.blocks - 1) * share.width >= share.h


def why_no_group(h: int, dtype: str, device: Limits, wish: Group) -> str:
    """Return why ``group_plans`` found nothing, and what was expected."""
    if dtype == "float64":
        return "dtype is float64: expected float32, float16 or bfloat16"
    if dtype != "float32" and not device.tensor_cores:
        major, minor = device.compute_capability
        return (
            f"dtype is {dtype} and {device.name} has compute capability {major}.{minor}: expected "
            "8.0 or higher, or float32"
        )
    if wish.exchange == "cluster" and not device.largest_cluster:
        major, minor = device.compute_capability
        return (
            f"{device.name} has compute capability {major}.{minor} and no clusters: expected "
            "exchange 'flags' or 'counter'"
        )
    if wish.blocks is not None:
        exchanges = EXCHANGES if wish.exchange is None else (wish.exchange,)
        possible = {size for exchange in exchanges for size in all_sizes(exchange, device)}
        if wish.blocks not in possible:
            most = max(possible, default=0)
            if exchanges == ("cluster",):
                sizes = ", ".join(map(str, all_sizes("cluster", device)))
                return (
                    f"blocks is {wish.blocks} and clusters of {device.name} have {sizes} blocks: "
                    "expected one of these"
                )
            return (
                f"blocks is {wish.blocks} and {device.name} runs {most} blocks of a group at once: "
                f"expected 2 to {most}"
            )
    at = "" if wish.blocks is None else f" over {wish.blocks} blocks"
    rows = "" if wish.rows is None else f" and the states of {wish.rows} rows"
    return (
        f"W_hh ({h}, {h}){at}{rows} is more than the multiprocessors of {device.name} hold: "
        "expected a smaller h, more blocks, fewer rows, or kernel 'gemm'"
    )


def scratch_words(plan: Plan) -> int:
    """Return how many 64-bit words a launch needs as scratch."""
    assert isinstance(plan.tile, Share | TensorShare)
    groups = plan.grid[0] // plan.tile.blocks
    if plan.exchange == "flags":
        return groups * 2 * plan.tile.slice_rows * (-(-plan.tile.h // 2) * 2)
    return groups * LINE if plan.exchange == "counter" else 2


def all_sizes(exchange: str, device: Limits) -> tuple[int, ...]:
    """Return how many blocks a group can have."""
    if exchange == "cluster":
        most = min(device.largest_cluster, device.multiprocessors)
        return tuple(size for size in CLUSTERS if size <= most)
    return tuple(range(2, device.multiprocessors + 1))


def tried_sizes(h: int, exchange: str, device: Limits) -> tuple[int, ...]:
    """Return the sizes to look at where none is asked for.

    Widths of a block come in steps, so each number of blocks is taken down to as many as own a
    column.
    """
    sizes = all_sizes(exchange, device)
    if exchange == "cluster":
        # More than 8 is not portable: taken unasked only where the parts of a chip hold it.
        whole = device.multiprocessors >= WHOLE_CHIP
        return tuple(size for size in sizes if size <= 8 or whole)
    found = {2}  # fewer would be no group
    for size in {*BLOCKS, device.multiprocessors}:
        width = -(-h // size)
        found |= {-(-h // (-(-width // step) * step)) for step in STEPS}
    return tuple(sorted(found & set(sizes)))


def groups_at_once(blocks: int, exchange: str, device: Limits) -> int:
    """Return how many groups run at once; 0 if none does. A block has a multiprocessor to itself.

    A cluster lies within one part of the chip, of 16 multiprocessors or a few more: those are left
    over. Clusters that do not run at once follow one another; where fewer do, that is all.
    """
    if blocks not in all_sizes(exchange, device):
        return 0
    if exchange == "cluster" and blocks > 2:
        return max(1, device.multiprocessors // PART_OF_CHIP * PART_OF_CHIP // blocks)
    return device.multiprocessors // blocks


def _rows(n: int, at_once: int) -> tuple[int, ...]:
    """Return how many rows of the batch a group might own: those of a few waves, or else few."""
    few = [-(-max(1, n) // (at_once * waves)) for waves in WAVES]
    return tuple(dict.fromkeys([*few, *(rows for rows in ROWS if rows < few[-1])]))


def _shares(
    h: int, blocks: int, rows: int, dtype: str, precision: str, exchange: str
) -> Iterator[Share | TensorShare]:
    """Yield the ways in which a block can share out its columns for so many rows of the batch."""
    columns = -(-h // blocks)
    if dtype == "float32" and precision == "ieee":
        yield from _plain_shares(h, blocks, columns, rows)
    else:
        yield from _tensor_shares(h, blocks, columns, rows, dtype, exchange)


def _plain_shares(h: int, blocks: int, columns: int, rows: int) -> Iterator[Share]:
    for C in (1, 2, 4, 8):
        groups = -(-columns // (2 * C)) * 2
        for R in (1, 2, 4, 8):
            passes = -(-rows // R)
            if R * C > MOST_SUMS or (R > 1 and 2 * rows <= R) or passes > MOST_PASSES:
                continue
            share = Share(h, blocks, groups, C, R, passes, 0)
            if share.threads > MOST_BLOCK_THREADS:
                continue
            kept = register_weights(share.threads, R * C) // C // VECTOR * VECTOR
            if kept < share.depth:  # the others pass through registers, four k at a time
                kept = max(0, kept - VECTOR)
            yield share._replace(kept=min(share.depth, kept))


def register_weights(threads: int, sums: int) -> int:
    """Registers a thread has for weights, with so many sums at a time.

    Chosen so that the kernels compile without spilling, see ``tests/resources.json``.
    """
    free = {4: 168, 8: 160, 16: 144, 32: 128}[max(4, sums)]
    return free - (255 - registers_of(threads))


def registers_of(threads: int) -> int:
    """Registers that each thread of a block can have: a quarter of all serves every fourth warp."""
    return min(255, 512 // -(-threads // (4 * WARP)) // 8 * 8)


def _tensor_shares(
    h: int, blocks: int, columns: int, rows: int, dtype: str, exchange: str
) -> Iterator[TensorShare]:
    kind = "tf32" if dtype == "float32" else dtype
    slices = 8 if kind == "tf32" and h > 1024 else 4
    warps = -(-columns // 16) * slices
    if warps * WARP > MOST_BLOCK_THREADS:
        return
    for tiles in (1, 2, 4):
        passes = -(-rows // (8 * tiles))
        if (tiles > 1 and 4 * tiles >= rows) or passes > MOST_PASSES:
            continue
        share = TensorShare(h, blocks, tiles, passes, slices, warps, kind)
        if share.registers + _other_registers(share, exchange) <= registers_of(share.threads):
            yield share


def _other_registers(share: TensorShare, exchange: str) -> int:
    """Registers that a thread needs beside those for weights, so that nothing is spilled.

    Found by compiling, see ``tests/resources.json``. A store into another block's shared memory
    takes an address of two registers, and all of a value's are under way together.
    """
    sums = 8 * share.tiles
    return sums + (32 + 2 * share.blocks if exchange == "cluster" else 72)


def _plan(
    n: int, share: Share | TensorShare, exchange: str, at_once: int, device: Limits
) -> tuple[float, Plan]:
    groups = max(1, -(-n // share.slice_rows))
    waves = -(-groups // at_once)
    clusters = exchange == "cluster"
    launches = -(-groups * share.blocks // MOST_BLOCKS) if clusters else waves
    groups = -(-groups // launches)
    product = _product_cycles(share)
    rows = min(share.slice_rows, max(1, n))
    cycles = product + exchange_cycles(share, rows, exchange, min(groups, at_once), device)
    step = cycles / device.clock_ghz
    blocks = groups * share.blocks
    words = "registers" if _all_in_registers(share) else "registers and shared memory"
    how = {
        "cluster": f"a cluster of {share.blocks}, states into each other's shared memory",
        "flags": "states through L2, each word with its step's number, which readers poll for",
        "counter": "states through L2, a counter tells when all are there",
    }[exchange]
    arithmetic = (
        "float32, IEEE" if isinstance(share, Share) else f"tensor cores, {share.kind} into float32"
    )
    h = share.h
    why = (
        f"W_hh ({h}, {h}) is split over {share.blocks} blocks, {share.width} columns each, in "
        f"{words}; {arithmetic}",
        f"{counted(min(groups, at_once), 'group')} at once, "
        f"{counted(share.slice_rows, 'row')} of the batch each, {share.rows} at a time; "
        f"{counted(waves, 'wave')}",
        f"exchange: {how}",
        f"about {step / 1e3:.2f} µs a step by the model: "
        f"{product / device.clock_ghz / 1e3:.2f} for the product, the rest for the exchange",
    )
    plan = Plan(
        "group",
        (blocks, 1, 1),
        (share.threads, 1, 1),
        share.shared_bytes,
        launches,
        share,
        why,
        exchange=exchange,
        cluster=share.blocks if clusters else 1,
        precision=precision_of(share),
    )
    return waves * step, plan


def precision_of(share: Share | TensorShare) -> str:
    """Return the precision that a share multiplies float32 in."""
    return "tf32" if isinstance(share, TensorShare) and share.kind == "tf32" else "ieee"


def _all_in_registers(share: Share | TensorShare) -> bool:
    return isinstance(share, TensorShare) or share.kept >= share.depth


def _product_cycles(share: Share | TensorShare) -> float:
    warps = share.threads // WARP
    schedulers = math.ceil(warps / 4)
    if isinstance(share, TensorShare):
        chunk = 8 if share.kind == "tf32" else 16
        steps = share.depth // chunk * share.tiles
        loads = steps // 2 * 4 * warps  # a load of 512 bytes feeds two steps
        issued = steps * TENSOR_STEP + share.own * EPILOGUE + PASS
        return CHAIN + share.passes * max(issued * schedulers, float(loads))
    R, C = share.rows, share.columns
    issued = R * share.depth * C * MARGIN + share.own * EPILOGUE + R * C * 3 + PASS
    loads = R * share.depth // VECTOR * 2 + (share.depth - share.kept) * C // VECTOR * 4
    return CHAIN + share.passes * max(issued * schedulers, float(loads * warps))


def exchange_cycles(
    share: Share | TensorShare, rows: int, exchange: str, groups: int, device: Limits
) -> float:
    """Return what an exchange of so many rows adds to a step, with so many groups at once."""
    latencies = tuned.latencies(device.name, device.clock_ghz)
    clock = device.clock_ghz
    values = rows * share.h
    if exchange == "cluster":
        barrier = dict(latencies.cluster)[share.blocks]
        return (latencies.remote_shared + barrier) * clock + values * 4 / REMOTE_BYTES_A_CYCLE
    everywhere = groups * share.blocks * values
    if exchange == "flags":
        volume = max(values / WORDS_A_CYCLE, everywhere / L2_WORDS_A_CYCLE)
        return latencies.flag * clock + volume
    volume = max(values / WORDS_A_CYCLE, everywhere / L2_WORDS_A_CYCLE) / 2
    waiting = _between(latencies.counter, share.blocks) + latencies.l2
    return waiting * clock + volume + 90


def _between(points: tuple[tuple[int, float], ...], at: int) -> float:
    """Return the value at ``at``, on straight lines between the points, level beyond them."""
    before = points[0]
    for point in points:
        if point[0] >= at:
            if point[0] == before[0]:
                return point[1]
            part = (at - before[0]) / (point[0] - before[0])
            return before[1] + part * (point[1] - before[1])
        before = point
    return before[1]
