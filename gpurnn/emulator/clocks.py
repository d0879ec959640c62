"""Who has seen what: the vector clocks by which a race is told from an ordered access.

An epoch is one integer, ``clock << SHIFT | thread``. A thread's own clock moves on whenever it
learns of or publishes something, at a barrier or a fence, so what a thread knows is fixed within
an epoch. What it knows of the others is one array of clocks, which the threads that leave a barrier
share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gpurnn.emulator.threads import Thread

__all__ = [
    "EMPTY",
    "MASK",
    "NEVER",
    "SHIFT",
    "STAY",
    "STRONG",
    "Joined",
    "Readers",
    "Release",
    "learn",
]

SHIFT = 20
MASK = (1 << SHIFT) - 1

# In place of a location's last write.
NEVER = -1
STRONG = -2

STAY = True

LIMIT = 64


class Readers(dict[int, Any]):
    """The threads that read a location since its last write, as epochs, newest first.

    Locations read by the same threads in the same order share one of these. Its items say which
    node follows when an epoch reads next: another, or STAY if that epoch is here already.
    """

    __slots__ = ("covered", "epoch", "length", "limit", "older")

    def __init__(self, epoch: int, older: Readers | None):
        self.epoch = epoch
        self.older = older
        self.length: int = 0 if older is None else older.length + 1
        # The length at which those that no longer matter are dropped.
        self.limit: int = LIMIT if older is None else older.limit
        # What a writer knew when all of these were found to lie before it.
        self.covered: memoryview[int] | None = None

    def epochs(self) -> Iterator[int]:
        """Yield the epochs, newest first."""
        node: Readers | None = self
        while node is not None and node.epoch:
            yield node.epoch
            node = node.older

    def follow(self, thread: Thread) -> Readers:
        """Return the node for these and a read by ``thread``."""
        e, last = thread.epoch, self.epoch
        # Often all of these lie before a barrier: then the read takes their place.
        if not last or (thread.precedes(last) and not self.unordered(thread)):
            node = thread.alone()
        else:
            node = Readers(e, self if self.length < self.limit else self._rest(thread))
            node[e] = STAY
        if last:
            self[e] = node
        return node

    def _rest(self, thread: Thread) -> Readers:
        """Return the newest read of each thread, less those that lie before ``thread``."""
        newest: dict[int, int] = {}
        for x in self.epochs():
            if not thread.precedes(x):
                newest.setdefault(x & MASK, x)
        node = EMPTY
        for x in newest.values():
            node = Readers(x, node)
        node.limit = max(LIMIT, 2 * node.length)
        return node

    def unordered(self, thread: Thread) -> int:
        """Return an epoch of these that nothing orders before ``thread``, or 0."""
        me, known = thread.tid, thread.known
        if self.covered is known:
            return 0
        mine = False
        for x in self.epochs():
            u = x & MASK
            if known[u] < x >> SHIFT:
                if u != me:
                    return x
                mine = True
        if not mine:
            self.covered = known
        return 0


EMPTY = Readers(0, None)


class Release:
    """What a thread knew, and had done, as of a fence: who acquires it learns the same."""

    __slots__ = ("block", "clock", "known", "tid")

    def __init__(self, known: NDArray[np.int64], tid: int, clock: int, block: Any):
        self.known = known
        self.tid = tid
        self.clock = clock
        # The only block that a fence of block scope counts in; None: any.
        self.block = block


class Joined:
    """What many releases say together."""

    __slots__ = ("known", "parts", "view")

    def __init__(self, releases: list[Release]):
        # By id, and kept, so that no other array takes one's place.
        self.parts = {id(r.known): r.known for r in releases}
        self.known = np.maximum.reduce(list(self.parts.values()))
        for r in releases:
            self.known[r.tid] = max(self.known[r.tid], r.clock)
        self.view: memoryview[int] = self.known.data


def learn(threads: Iterable[Thread]) -> None:
    """Let threads that met at a barrier know of one another's past."""
    threads = list(threads)
    arrays = {id(t.known_array): t.known_array for t in threads}
    joined = np.maximum.reduce(list(arrays.values()))
    joined[[t.tid for t in threads]] = [t.clock for t in threads]
    known = joined.data
    for t in threads:
        t.adopt(joined, known)
