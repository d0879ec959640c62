"""Local arrays: one thread's own, so that only bounds and first writes need a check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpurnn.emulator.arrays import Array, array
from gpurnn.emulator.casts import converter, dtype_of
from gpurnn.emulator.errors import UninitializedError, UnsupportedError

if TYPE_CHECKING:
    from gpurnn.emulator.machine import Machine

__all__ = ["local_array"]


class _Local:
    """Items of a local array; None where nothing was written."""

    __slots__ = ("dtype", "items", "load", "machine", "store", "writable")

    space = "local"

    def __init__(self, machine: Machine, dtype: np.dtype[Any], size: int, writable: bool = True):
        self.machine = machine
        self.dtype = dtype
        self.writable = writable
        self.items: list[Any] = [None] * size
        items, convert = self.items, converter(dtype)
        kind = dtype.type if dtype.kind == "f" else int if dtype.kind in "iu" else bool
        ready = dtype.kind == "f"

        def load(k: int) -> Any:
            value = items[k]
            if value is None:
                place = machine.place()
                raise UninitializedError(
                    f"{place} reads item {k} of a local {dtype} array, which nothing wrote", place
                )
            return value

        def store(k: int, value: Any) -> None:
            items[k] = value if ready and type(value) is kind else convert(value)

        self.load, self.store = load, store

    def seen_as(self, dtype: np.dtype[Any]) -> Any:
        """Refuse to view the same items as another type."""
        return self.allocation

    @property
    def allocation(self) -> Any:
        """There is none to view as another type."""
        raise UnsupportedError(
            "a local array is used as shared or global memory, or viewed "
            "as another type, which is not emulated"
        )


def local_array(machine: Machine, shape: Any, dtype: Any) -> Array:
    """Return a new local array of which nothing is written."""
    sizes = (int(shape),) if isinstance(shape, int | np.integer) else tuple(map(int, shape))
    kind = dtype_of(dtype)
    access = _Local(machine, kind, int(np.prod(sizes)))
    return array(machine, access, 0, sizes, None, f"a local {kind} array")
