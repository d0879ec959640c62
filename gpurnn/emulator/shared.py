"""Shared memory: one static array per declaration and block, and one dynamic buffer per block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpurnn.emulator.arrays import Array, array
from gpurnn.emulator.casts import dtype_of
from gpurnn.emulator.errors import UnsupportedError
from gpurnn.emulator.machine import line_of
from gpurnn.emulator.memory import Allocation
from gpurnn.emulator.threads import Block

if TYPE_CHECKING:
    from gpurnn.emulator.machine import Machine

__all__ = ["MOST_SHARED", "Shared"]

DYNAMIC = "dynamic"

# Bytes of a block: declared arrays alone, and with the dynamic buffer.
MOST_STATIC = 48 * 1024
MOST_SHARED = 227 * 1024


class Shared:
    """``cuda.shared``."""

    def __init__(self, machine: Machine, dynamic: int):
        self._machine = machine
        self._dynamic = dynamic
        # By declaration, its number in order of appearance: the same in every run.
        self._numbers: dict[Any, int] = {}

    def array(self, shape: Any, dtype: Any, alignment: int | None = None) -> Array:
        """Return this block's array declared here; shape 0: the dynamic buffer."""
        machine = self._machine
        kind = dtype_of(dtype)
        sizes = (int(shape),) if isinstance(shape, int | np.integer) else tuple(map(int, shape))
        block = machine.thread.block
        if sizes == (0,):
            allocation = self._dynamic_of(block, kind.itemsize)
            items = self._dynamic // kind.itemsize
            return array(
                machine, allocation.access(kind), 0, (items,), None, "dynamic shared memory"
            )
        if any(n <= 0 for n in sizes):
            raise UnsupportedError(f"a shared array of shape {sizes}")
        code, offset = machine.frame()
        number = self._numbers.setdefault((id(code), offset), len(self._numbers))
        label = f"the shared {kind} array of {code.co_filename}:{line_of(code, offset)}"
        nbytes = int(np.prod(sizes)) * kind.itemsize
        found = block.shared.get(number)
        if found is None:
            found = self._allocate(block, number, nbytes, kind.itemsize, label)
        elif found.raw.size != nbytes:
            raise UnsupportedError(
                f"{label} has {nbytes} bytes here and {found.raw.size} before: "
                "expected a constant shape and type"
            )
        return array(machine, found.access(kind), 0, sizes, None, label)

    def in_block(self, block: Block, like: Allocation) -> Allocation:
        """Return what corresponds to ``like`` in another block, which need not have begun."""
        number = like.key[1]
        found = block.shared.get(number)
        if found is None:
            label = like.describe(-1, like.grain)
            found = self._allocate(block, number, like.raw.size, like.grain, label)
        return found

    def _dynamic_of(self, block: Block, itemsize: int) -> Allocation:
        found = block.shared.get(DYNAMIC)
        if found is None:
            label = "dynamic shared memory"
            found = self._allocate(block, DYNAMIC, self._dynamic, itemsize, label)
        return found

    def _allocate(
        self, block: Block, number: Any, nbytes: int, itemsize: int, label: str
    ) -> Allocation:
        if number != DYNAMIC:
            self._check_room(block, nbytes, label)

        def describe(offset: int, size: int) -> str:
            if offset < 0:
                return label
            return f"item {offset // size} of {label} in block {tuple(block.index)}"

        raw = np.full(nbytes, 0xFF, np.uint8)
        allocation = Allocation(
            self._machine,
            (block.linear, number),
            raw,
            itemsize,
            describe,
            written=False,
            block=block,
        )
        block.shared[number] = allocation
        return allocation

    def _check_room(self, block: Block, nbytes: int, label: str) -> None:
        """Raise if a block's shared memory cannot hold another declared array."""
        static = nbytes + sum(a.raw.size for n, a in block.shared.items() if n != DYNAMIC)
        if static > MOST_STATIC:
            raise UnsupportedError(
                f"with {label}, declared shared arrays have {static} bytes: expected at most "
                f"{MOST_STATIC}, and more than that as dynamic shared memory"
            )
        if static + self._dynamic > MOST_SHARED:
            raise UnsupportedError(
                f"with {label}, declared shared arrays have {static} bytes beside {self._dynamic} "
                f"dynamic ones: expected at most {MOST_SHARED} together"
            )
