"""The rules by which accesses to one location are ordered, or race.

A strong access (an atomic, or a load or store that bypasses the caches of one multiprocessor) never
races with another strong one. Between a strong and a plain access, and between two plain ones of
which one writes, something must decide which is first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurnn.emulator.clocks import EMPTY, MASK, NEVER, SHIFT, STAY, STRONG, Release
from gpurnn.emulator.errors import RaceError, UninitializedError

if TYPE_CHECKING:
    from gpurnn.emulator.memory import Access, Allocation
    from gpurnn.emulator.threads import Block, Thread

__all__ = [
    "Conflict",
    "StrongRecord",
    "check_end",
    "conflict",
    "load_special",
    "note_read",
    "note_write",
    "store_special",
    "strong_load",
    "strong_store",
    "strong_update",
    "uninitialized",
]


class Conflict(RaceError):
    """A race of which only one side's line is known yet: ``key`` and ``grain`` tell the other."""

    def __init__(self, access: Access, k: int, grain: int, epoch: int, other: str, mine: str):
        place = access.allocation.machine.place()
        super().__init__(f"race on {access.describe(k)}", place)
        self.subject = access.describe(k)
        self.mine = mine
        self.other = other
        self.epoch = epoch
        self.key = access.allocation.key
        size = access.allocation.grain
        self.bytes = range(grain * size, (grain + 1) * size)


# The first byte and the size of an access; with the thread that made it.
Span = tuple[int, int]
Owner = tuple[int, Span]


class StrongRecord:
    """What happened to a location since the first strong access after its last plain write."""

    __slots__ = ("loads", "plain", "releases", "spans", "stores")

    def __init__(self, plain: int):
        # Epochs: of the last plain write (0: before the launch, NEVER), and by thread and bytes.
        self.plain = plain
        self.stores: dict[Owner, int] = {}
        self.loads: dict[Owner, int] = {}
        # Which bytes were accessed at once: strong accesses to others that overlap may race.
        self.spans: set[Span] = set()
        # What a strong load acquires.
        self.releases: tuple[Release, ...] = ()

    def copy(self) -> StrongRecord:
        """Return one that goes its own way from here."""
        other = StrongRecord(self.plain)
        other.stores, other.loads = dict(self.stores), dict(self.loads)
        other.releases, other.spans = self.releases, set(self.spans)
        return other


def conflict(access: Access, k: int, epoch: int, other: str, mine: str, grain: int = -1) -> None:
    """Raise: an earlier access in ``epoch`` and the running thread's are not ordered."""
    raise Conflict(access, k, k if grain < 0 else grain, epoch, other, mine)


def uninitialized(access: Access, k: int) -> None:
    """Raise: the running thread reads what nothing wrote."""
    place = access.allocation.machine.place()
    raise UninitializedError(f"{place} reads {access.describe(k)}, which nothing wrote", place)


def load_special(access: Access, k: int, g: int, t: Thread) -> None:
    """Check a plain read of a location that nothing wrote, or that has a strong record."""
    if access.allocation.writes[g] == NEVER:
        uninitialized(access, k)
    record = access.allocation.strong[g]
    if record.plain == NEVER and not record.stores:
        uninitialized(access, k)
    if record.plain > 0 and not t.precedes(record.plain):
        conflict(access, k, record.plain, "write", "read", g)
    for epoch in record.stores.values():
        if not t.precedes(epoch):
            conflict(access, k, epoch, "strong write", "read", g)


def store_special(access: Access, k: int, g: int, t: Thread) -> None:
    """Check a plain write to a location that has a strong record, and end that record."""
    record = access.allocation.strong.pop(g)
    if record.plain > 0 and not t.precedes(record.plain):
        conflict(access, k, record.plain, "write", "write", g)
    for what, epochs in (("strong write", record.stores), ("strong read", record.loads)):
        for epoch in epochs.values():
            if not t.precedes(epoch):
                conflict(access, k, epoch, what, "write", g)


def note_read(access: Access, k: int, g: int, t: Thread) -> None:
    """Check and record a plain read of one grain."""
    allocation = access.allocation
    w = allocation.writes[g]
    if w < 0:
        load_special(access, k, g, t)
    elif w and not t.precedes(w):
        conflict(access, k, w, "write", "read", g)
    readers = allocation.readers
    node = readers[g].get(t.epoch)
    if node is STAY:
        t.rereads += 1
        if t.rereads > allocation.machine.spin:
            allocation.machine.spun()
    else:
        readers[g] = readers[g].follow(t) if node is None else node


def note_write(access: Access, k: int, g: int, t: Thread) -> None:
    """Check and record a plain write of one grain."""
    allocation = access.allocation
    w = allocation.writes[g]
    if w > 0 and not t.precedes(w):
        conflict(access, k, w, "write", "write", g)
    elif w == STRONG:
        store_special(access, k, g, t)
    allocation.writes[g] = t.epoch
    _after_readers(access, k, g, t, "write")


def strong_load(access: Access, k: int) -> Any:
    """Read an item with a strong load; the thread's next fence acquires what it saw."""
    allocation, t = access.allocation, access.allocation.machine.thread
    allocation.machine.saw(access, k, "strong read")
    for g in access.grains(k):
        if not allocation.machine.check_races:
            if allocation.writes[g] < 0:
                uninitialized(access, k)
            continue
        record = _record(access, k, g, t, "strong read")
        if record.plain == NEVER and not record.stores:
            uninitialized(access, k)
        span = _overlap(access, k, g, record, record.stores, "strong write", "strong read")
        record.loads[t.tid, span] = t.epoch
        t.hear(record.releases)
    return access.get(k)


def strong_store(access: Access, k: int, value: Any) -> bool:
    """Write an item with a strong store, which publishes what went before the last fence.

    Returns:
        Whether the bytes differ from those before.
    """
    allocation, t = access.allocation, access.allocation.machine.thread
    allocation.machine.saw(access, k, "strong write")
    for g in access.grains(k):
        if not allocation.machine.check_races:
            allocation.writes[g] = 0
            continue
        record = _record(access, k, g, t, "strong write")
        _after_readers(access, k, g, t, "strong write")
        _overlap(access, k, g, record, record.loads, "strong read", "strong write")
        span = _overlap(access, k, g, record, record.stores, "strong write", "strong write")
        record.stores[t.tid, span] = t.epoch
        record.releases = t.publications()
    return _put(access, k, value)


def strong_update(access: Access, k: int, change: Callable[[Any], Any]) -> tuple[Any, bool]:
    """Replace an item by ``change`` of it in one step, which others' releases pass through.

    Returns:
        The item before, and whether its bytes changed.
    """
    allocation, t = access.allocation, access.allocation.machine.thread
    old = strong_load(access, k)
    allocation.machine.saw(access, k, "strong write")
    for g in access.grains(k) if allocation.machine.check_races else ():
        record = allocation.strong[g]
        _after_readers(access, k, g, t, "atomic update")
        span = _overlap(access, k, g, record, record.loads, "strong read", "atomic update")
        record.stores[t.tid, span] = t.epoch
        mine = t.publications()
        if mine:
            record.releases = (*_not_in(record.releases, mine[0]), *mine)
    return old, _put(access, k, change(old))


def _overlap(
    access: Access,
    k: int,
    g: int,
    record: StrongRecord,
    epochs: dict[Owner, int],
    other: str,
    mine: str,
) -> Span:
    """Check that strong accesses to a grain are to the same bytes, or ordered; return these."""
    size = access.dtype.itemsize
    span = k * size, size
    record.spans.add(span)
    if len(record.spans) > 1:
        t = access.allocation.machine.thread
        for (_, theirs), epoch in epochs.items():
            if theirs != span and not t.precedes(epoch):
                conflict(access, k, epoch, other, f"{mine} of not quite the same bytes", g)
    return span


def _not_in(releases: tuple[Release, ...], last: Release) -> tuple[Release, ...]:
    """Return the releases whose contents ``last`` does not bring along."""
    if last.block is not None:
        return releases
    known, me = last.known, last.tid
    return tuple(r for r in releases if r.tid != me and known[r.tid] < r.clock)


def check_end(allocation: Allocation, block: Block) -> None:
    """Check, when a block ends, that all others have done with its shared memory."""
    first = block.threads[0].tid
    own = range(first, first + len(block.threads))
    known = np.maximum.reduce(list({id(t.known): t.known_array for t in block.threads}.values()))
    access = next(iter(allocation.accesses.values()))

    def check(g: int, epochs: Iterable[int], what: str) -> None:
        for e in epochs:
            if e > 0 and e & MASK not in own and known[e & MASK] < e >> SHIFT:
                conflict(access, g // access.ratio, e, what, "the return of its block", g)

    for g, w in enumerate(allocation.writes):
        check(g, (w,), "write")
        check(g, allocation.readers[g].epochs(), "read")
    for g, record in allocation.strong.items():
        check(g, (record.plain,), "write")
        check(g, record.stores.values(), "strong write")
        check(g, record.loads.values(), "strong read")


def _put(access: Access, k: int, value: Any) -> bool:
    before = access.flat[k].tobytes()
    access.flat[k] = access.convert(value)
    return bool(access.flat[k].tobytes() != before)


def _record(access: Access, k: int, g: int, t: Thread, mine: str) -> StrongRecord:
    allocation = access.allocation
    w = allocation.writes[g]
    if w == STRONG:
        record = allocation.strong[g]
    else:
        record = allocation.strong[g] = StrongRecord(w)
        allocation.writes[g] = STRONG
    if record.plain > 0 and not t.precedes(record.plain):
        conflict(access, k, record.plain, "write", mine, g)
    return record


def _after_readers(access: Access, k: int, g: int, t: Thread, mine: str) -> None:
    readers = access.allocation.readers
    node = readers[g]
    if node is EMPTY:
        return
    if node is not t.single and node.covered is not t.known:
        epoch = node.unordered(t)
        if epoch:
            conflict(access, k, epoch, "read", mine, g)
    readers[g] = EMPTY
