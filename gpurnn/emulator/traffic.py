"""Counting what a warp's accesses cost: bank conflicts and memory sectors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from gpurnn.emulator.machine import line_of

if TYPE_CHECKING:
    from types import CodeType

    from gpurnn.emulator.machine import Machine
    from gpurnn.emulator.memory import Access

__all__ = ["LineTraffic", "Traffic"]

BANKS = 32
WORD = 4
SECTOR = 32


class LineTraffic(NamedTuple):
    """What the reads, or the writes, of one source line cost.

    Attributes:
        space: "shared" or "global".
        instructions: how many instructions of warps there were.
        needed: wavefronts (shared) or 32-byte sectors (global) they took.
        ideal: how few would have moved the same bytes.
    """

    file: str
    line: int
    space: str
    kind: str
    instructions: int
    needed: int
    ideal: int


class Traffic:
    """Collects accesses by warp instruction.

    The lanes of a warp are taken to run in step: what each lane does for the k-th time at one
    instruction is one instruction of the warp.
    """

    def __init__(self) -> None:
        # (code id, offset, space, write) → (warp, k) → {(first byte, bytes)}
        self._seen: dict[Any, dict[Any, set[tuple[Any, int, int]]]] = defaultdict(dict)
        self._codes: dict[int, CodeType] = {}

    def around(
        self, machine: Machine, access: Access
    ) -> tuple[Callable[[int], Any], Callable[[int, Any], None]]:
        """Return an access's functions with this in front."""
        inner_load, inner_store = access.load, access.store

        def load(k: int) -> Any:
            self.saw(machine, access, k, write=False)
            return inner_load(k)

        def store(k: int, value: Any) -> None:
            self.saw(machine, access, k, write=True)
            inner_store(k, value)

        return load, store

    def saw(self, machine: Machine, access: Access, k: int, *, write: bool) -> None:
        """Record one access."""
        allocation = access.allocation
        if allocation.key[0] == "constant":
            return
        code, offset = machine.frame()
        self._codes[id(code)] = code
        t = machine.thread
        space = "global" if allocation.block is None else "shared"
        instruction = (id(code), offset, space, write)
        turn = t.counts[instruction] = t.counts.get(instruction, -1) + 1
        size = access.dtype.itemsize
        warps = self._seen[instruction]
        first = k * size - allocation.origin
        warps.setdefault((id(t.warp), turn), set()).add((allocation.key, first, size))

    def lines(self) -> tuple[LineTraffic, ...]:
        """Return the cost of each source line."""
        totals: dict[Any, list[int]] = {}
        for (code_id, offset, space, write), warps in self._seen.items():
            code = self._codes[code_id]
            kind = "write" if write else "read"
            key = (code.co_filename, line_of(code, offset), space, kind)
            total = totals.setdefault(key, [0, 0, 0])
            for spans in warps.values():
                needed, ideal = (_wavefronts if space == "shared" else _sectors)(spans)
                total[0] += 1
                total[1] += needed
                total[2] += ideal
        return tuple(LineTraffic(*key, *total) for key, total in sorted(totals.items()))


def _wavefronts(spans: set[tuple[Any, int, int]]) -> tuple[int, int]:
    """Return how many wavefronts words in 32 banks take, and how few could do."""
    words = {
        (key, w)
        for key, first, size in spans
        for w in range(first // WORD, (first + size - 1) // WORD + 1)
    }
    banks = [0] * BANKS
    for _, w in words:
        banks[w % BANKS] += 1
    return max(banks), -(-len(words) // BANKS)


def _sectors(spans: set[tuple[Any, int, int]]) -> tuple[int, int]:
    """Return how many sectors the bytes lie in, and how few could hold them."""
    sectors = {
        (key, s)
        for key, first, size in spans
        for s in range(first // SECTOR, (first + size - 1) // SECTOR + 1)
    }
    return len(sectors), -(-sum(size for _, _, size in spans) // SECTOR)
