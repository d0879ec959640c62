"""Memory that threads share: its bytes, and beside each the record of who wrote and read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gpurnn.emulator import races
from gpurnn.emulator.casts import converter
from gpurnn.emulator.clocks import EMPTY, MASK, NEVER, SHIFT, STAY, STRONG
from gpurnn.emulator.errors import BarrierError, ReadOnlyError

if TYPE_CHECKING:
    from gpurnn.emulator.machine import Machine

__all__ = ["Access", "Allocation"]


class Allocation:
    """Bytes, in grains of which each has its own record.

    Attributes:
        writes: by grain, the epoch of the last write; 0 before the launch, NEVER, or STRONG where
            ``strong`` has the record.
        readers: by grain, who read since.
        origin: at which byte the buffer begins that it lies in, which the device aligns; negative
            if before the first.
    """

    def __init__(
        self,
        machine: Machine,
        key: Any,
        raw: NDArray[np.uint8],
        grain: int,
        describe: Callable[[int, int], str],
        *,
        written: bool,
        block: Any = None,
    ):
        self.machine = machine
        self.key = key
        self.raw = raw
        self.grain = grain
        self.describe = describe
        self.block = block
        self.closed = False
        self.origin = 0
        grains = -(-raw.size // grain)
        self.writes: list[int] = [0 if written else NEVER] * grains
        self.readers = [EMPTY] * grains if machine.check_races else []
        self.strong: dict[int, races.StrongRecord] = {}
        self.accesses: dict[tuple[np.dtype[Any], bool, bool], Access] = {}

    def access(
        self, dtype: np.dtype[Any], *, writable: bool = True, remote: bool = False
    ) -> Access:
        """Return how items of ``dtype`` are read and written here, or from another block."""
        found = self.accesses.get((dtype, writable, remote))
        if found is None:
            if dtype.itemsize < self.grain or dtype.itemsize % self.grain:
                self.refine(np.gcd(dtype.itemsize, self.grain))
            found = Access(self, dtype, writable, remote)
            self.accesses[dtype, writable, remote] = found
        return found

    def refine(self, grain: int) -> None:
        """Split every grain into smaller ones."""
        times, self.grain = self.grain // int(grain), int(grain)
        self.writes[:] = [w for w in self.writes for _ in range(times)]
        self.readers[:] = [r for r in self.readers for _ in range(times)]
        self.strong = {
            g * times + i: r.copy() for g, r in self.strong.items() for i in range(times)
        }
        for access in self.accesses.values():
            access.bind()

    def close(self) -> None:
        """Refuse every further access: the block has returned."""
        self.closed = True
        for access in self.accesses.values():
            access.bind()

    def refuse(self, *args: Any) -> NoReturn:
        """Raise: the block has returned."""
        place = self.machine.place()
        raise BarrierError(
            f"{place} reaches for {self.describe(-1, 1)} of block {tuple(self.block.index)}, all "
            "of whose threads have returned",
            place,
        )


class Access:
    """Loads and stores of items of one dtype, numbered from the start of an allocation."""

    load: Callable[[int], Any]
    store: Callable[[int, Any], None]

    def __init__(
        self, allocation: Allocation, dtype: np.dtype[Any], writable: bool, remote: bool = False
    ):
        self.allocation = allocation
        self.dtype = dtype
        self.writable = writable
        self.remote = remote
        self.space = "global" if allocation.block is None else "shared"
        raw = allocation.raw
        self.flat: NDArray[Any] = raw[: raw.size // dtype.itemsize * dtype.itemsize].view(dtype)
        self.convert = converter(dtype)
        # Integers are read as Python ints, floats as NumPy scalars.
        self.get = self.flat.item if dtype.kind in "iub" else self.flat.__getitem__
        self.bind()

    def bind(self) -> None:
        """Choose the functions that read and write."""
        machine = self.allocation.machine
        self.ratio = self.dtype.itemsize // self.allocation.grain
        if not machine.check_races:
            self.load, self.store = _unchecked(self)
        elif self.ratio == 1:
            self.load, self.store = _checked(self)
        else:
            self.load, self.store = _checked_wide(self)
        machine.observe(self)
        if self.allocation.closed:
            self.load = self.store = self.allocation.refuse
        elif not self.writable:
            self.store = self._refuse
        elif self.remote:
            self.load, self.store = _begun(self)

    def seen_as(self, dtype: np.dtype[Any]) -> Access:
        """Return how the same memory is read and written as items of another type."""
        return self.allocation.access(dtype, writable=self.writable, remote=self.remote)

    def check_begun(self) -> None:
        """Raise unless something orders the begin of the block that has this memory before."""
        machine, block = self.allocation.machine, self.allocation.block
        if not machine.check_races:
            return
        first = block.threads[0].tid
        if any(machine.thread.known[first : first + len(block.threads)]):
            return
        place = machine.place()
        raise BarrierError(
            f"{place} reaches for {self.allocation.describe(-1, 1)} of block "
            f"{tuple(block.index)}, which need not have begun: expected a cluster barrier before",
            place,
        )

    def grains(self, k: int) -> range:
        """Return the grains of an item."""
        return range(k * self.ratio, (k + 1) * self.ratio)

    def describe(self, k: int) -> str:
        """Name an item."""
        size = self.dtype.itemsize
        return self.allocation.describe(k * size, size)

    def _refuse(self, k: int, value: Any) -> None:
        place = self.allocation.machine.place()
        raise ReadOnlyError(f"{place} writes {self.describe(k)}, which is read-only", place)


Functions = tuple[Callable[[int], Any], Callable[[int, Any], None]]


def _begun(access: Access) -> Functions:
    """Return the functions for another block's memory."""
    inner_load, inner_store = access.load, access.store

    def load(k: int) -> Any:
        access.check_begun()
        return inner_load(k)

    def store(k: int, value: Any) -> None:
        access.check_begun()
        inner_store(k, value)

    return load, store


def _unchecked(access: Access) -> Functions:
    writes, get, ratio = access.allocation.writes, access.get, access.ratio
    machine = access.allocation.machine
    put = _putter(access)

    def load(k: int) -> Any:
        if writes[k * ratio] < 0 or (ratio > 1 and min(writes[k * ratio : (k + 1) * ratio]) < 0):
            races.uninitialized(access, k)
        return get(k)

    def store(k: int, value: Any) -> None:
        machine.thread.busy = True
        for g in range(k * ratio, k * ratio + ratio):
            writes[g] = 0
        put(k, value)

    return load, store


def _checked(access: Access) -> Functions:
    """Return the functions for items of one grain: what most of a kernel's time goes into."""
    allocation = access.allocation
    machine, writes, readers = allocation.machine, allocation.writes, allocation.readers
    get, flat, spin = access.get, access.flat, machine.spin
    plain = access.dtype.kind == "f"
    put = _putter(access)

    def load(k: int) -> Any:
        t = machine.thread
        e = t.epoch
        w = writes[k]
        if w and w != e:
            if w < 0:
                races.load_special(access, k, k, t)
            else:
                u = w & MASK
                if u != t.tid and t.known[u] < w >> SHIFT:
                    races.conflict(access, k, w, "write", "read")
        node = readers[k].get(e)
        if node is STAY:
            t.rereads += 1
            if t.rereads > spin:
                machine.spun()
        else:
            readers[k] = readers[k].follow(t) if node is None else node
        return get(k)

    def store(k: int, value: Any) -> None:
        t = machine.thread
        e = t.epoch
        w = writes[k]
        if w != e:
            if w > 0:
                u = w & MASK
                if u != t.tid and t.known[u] < w >> SHIFT:
                    races.conflict(access, k, w, "write", "write")
            elif w == STRONG:
                races.store_special(access, k, k, t)
            writes[k] = e
        node = readers[k]
        if node is not EMPTY:
            if node is not t.single and node.covered is not t.known:
                r = node.unordered(t)
                if r:
                    races.conflict(access, k, r, "read", "write")
            readers[k] = EMPTY
        t.busy = True
        if plain:
            flat[k] = value
        else:
            put(k, value)

    return load, store


def _checked_wide(access: Access) -> Functions:
    """Return the functions for items of several grains."""
    machine = access.allocation.machine
    get, put, ratio = access.get, _putter(access), access.ratio

    def load(k: int) -> Any:
        t = machine.thread
        for g in range(k * ratio, k * ratio + ratio):
            races.note_read(access, k, g, t)
        return get(k)

    def store(k: int, value: Any) -> None:
        t = machine.thread
        for g in range(k * ratio, k * ratio + ratio):
            races.note_write(access, k, g, t)
        t.busy = True
        put(k, value)

    return load, store


def _putter(access: Access) -> Callable[[int, Any], None]:
    flat, convert = access.flat, access.convert
    if access.dtype.kind in "iub":

        def put(k: int, value: Any) -> None:
            flat[k] = convert(value)

        return put
    return flat.__setitem__
