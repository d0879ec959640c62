"""The threads of a launch, and the warps, blocks and clusters they form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpurnn.emulator.clocks import EMPTY, MASK, SHIFT, STAY, Joined, Readers, Release

if TYPE_CHECKING:
    from types import CodeType

    from greenlet import greenlet

    from gpurnn.emulator.barriers import Meeting, Phase, PhaseBarrier
    from gpurnn.emulator.memory import Allocation

__all__ = ["WARP", "Block", "Cluster", "Dim3", "Site", "Thread", "Warp"]

WARP = 32

# Where a thread stands: (code, offset) of each kernel frame, innermost first.
Site = tuple[tuple["CodeType", int], ...]


class Dim3(NamedTuple):
    """An index or a size along x, y and z."""

    x: int
    y: int
    z: int


class Cluster:
    """Blocks that may reach one another's shared memory."""

    def __init__(self, blocks: list[Block]):
        self.blocks = blocks
        self.barrier: PhaseBarrier | None = None


class Block:
    """One thread block: its threads, its shared memory, its barriers."""

    def __init__(self, index: Dim3, linear: int):
        self.index = index
        self.linear = linear
        self.threads: list[Thread] = []
        self.live = 0
        self.shared: dict[Any, Allocation] = {}
        self.meeting: Meeting | None = None
        self.named: dict[int, PhaseBarrier] = {}
        self.cluster: Cluster | None = None
        self.rank = 0


class Warp:
    """Up to 32 consecutive threads of a block."""

    def __init__(self, block: Block, number: int):
        self.block = block
        self.number = number
        self.lanes: list[Thread] = []
        self.mask = 0
        self.meetings: dict[int, Meeting] = {}


class Thread:
    """One CUDA thread: who it is, what it waits for and what it knows."""

    __slots__ = (
        "activity_seen",
        "arrivals",
        "block",
        "busy",
        "clock",
        "counts",
        "done",
        "epoch",
        "greenlet",
        "idle",
        "index",
        "known",
        "known_array",
        "lane",
        "movable",
        "pending",
        "pending_block",
        "polls",
        "released",
        "released_block",
        "rereads",
        "result",
        "seen",
        "seen_version",
        "single",
        "stored",
        "tid",
        "waiting",
        "warp",
    )

    def __init__(self, tid: int, block: Block, warp: Warp, lane: int, index: Dim3):
        self.tid = tid
        self.block = block
        self.warp = warp
        self.lane = lane
        self.index = index
        self.greenlet: greenlet = None
        self.done = False
        # What it waits for.
        self.waiting: str | None = None
        self.result: Any = None
        self.arrivals: dict[PhaseBarrier, Phase] = {}
        # Reads of unchanged memory, since others changed any, and since this thread stored.
        self.polls = self.idle = self.rereads = 0
        self.busy = False
        self.seen: set[Any] = set()
        # States in which it stored what was there.
        self.stored: set[int] = set()
        # Addresses it read without side effects since it last had any, and in which state.
        self.movable: dict[Any, int | None] = {}
        self.seen_version = self.activity_seen = -1
        self.counts: dict[Any, int] = {}
        # Vector clock.
        self.clock = 1
        self.epoch = 1 << SHIFT | tid
        self.known_array: NDArray[np.int64] = None  # type: ignore[assignment]
        self.known: memoryview[int] = None  # type: ignore[assignment]
        self.single: Readers | None = None
        self.released: Release | None = None
        self.released_block: Release | None = None
        self.pending: dict[Release, None] = {}
        self.pending_block: dict[Release, None] = {}

    def alone(self) -> Readers:
        """Return the set of readers that is this thread, now."""
        node = self.single
        if node is None or node.epoch != self.epoch:
            node = self.single = Readers(self.epoch, EMPTY)
            node[self.epoch] = STAY
        return node

    def adopt(self, known: NDArray[np.int64], view: memoryview[int]) -> None:
        """Know what ``known`` says from now on, in a new epoch."""
        self.known_array, self.known = known, view
        self.tick()

    def tick(self) -> None:
        """Begin a new epoch."""
        self.clock += 1
        self.epoch = self.clock << SHIFT | self.tid
        self.rereads = 0

    def precedes(self, epoch: int) -> bool:
        """Whether the epoch lies before what this thread does now."""
        u = epoch & MASK
        return u == self.tid or self.known[u] >= epoch >> SHIFT

    def publications(self) -> tuple[Release, ...]:
        """Return what a strong store of this thread tells those that read it."""
        wide, narrow = self.released, self.released_block
        if wide is None:
            return () if narrow is None else (narrow,)
        return (wide,) if narrow is None or narrow is wide else (wide, narrow)

    def hear(self, releases: tuple[Release, ...]) -> None:
        """Note what a strong load read; the next fence acquires it."""
        for r in releases:
            if r.tid == self.tid or self.known[r.tid] >= r.clock:
                continue
            if r.block is None and not self._shares_block(r):
                self.pending[r] = None
            elif r.block is None or r.block is self.block:
                self.pending_block[r] = None

    def fence(self, *, device: bool) -> None:
        """Acquire what was heard, and let later strong stores publish all that went before."""
        heard = list(self.pending_block)
        self.pending_block.clear()
        if device:
            heard += self.pending
            self.pending.clear()
        self._join(heard)
        release = Release(self.known_array, self.tid, self.clock, None if device else self.block)
        self.released_block = release
        if device:
            self.released = release
        self.tick()

    def learn_from(self, joined: Joined) -> None:
        """Know what the releases joined say, in a new epoch."""
        if id(self.known_array) in joined.parts:  # nothing that is not among it
            self.known_array, self.known = joined.known, joined.view
        else:
            self.known_array = np.maximum(self.known_array, joined.known)
            self.known = self.known_array.data
        self.tick()

    def _join(self, releases: list[Release]) -> None:
        news = [r for r in releases if r.tid != self.tid and self.known[r.tid] < r.clock]
        if news:
            arrays = {id(a): a for a in (self.known_array, *(r.known for r in news))}
            joined = np.maximum.reduce(list(arrays.values()))
            for r in news:
                joined[r.tid] = max(joined[r.tid], r.clock)
            self.known_array, self.known = joined, joined.data

    def _shares_block(self, release: Release) -> bool:
        first = self.block.threads[0].tid
        return first <= release.tid < first + len(self.block.threads)
