"""Strong accesses: atomics, and the loads and stores that bypass the L1 cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurnn.emulator import races
from gpurnn.emulator.arrays import Array
from gpurnn.emulator.errors import ReadOnlyError, UnsupportedError
from gpurnn.emulator.progress import check_movable

if TYPE_CHECKING:
    from gpurnn.emulator.machine import Machine

__all__ = ["Atomics", "strong_load", "strong_store"]


def strong_load(machine: Machine, array: Any, index: Any, *, volatile: bool = True) -> Any:
    """Read ``array[index]`` where others may write it meanwhile.

    ``volatile`` says that the load has side effects, so that it stays in its loop.
    """
    access, k = _target(machine, array, index)
    machine.pause()
    value = races.strong_load(access, k)
    if volatile:
        machine.thread.movable.clear()
    else:
        check_movable(machine, (access, k))
    machine.polled((access, k))
    return value


def strong_store(machine: Machine, array: Any, index: Any, value: Any) -> None:
    """Write ``array[index]`` where others may read or write it meanwhile."""
    access, k = _target(machine, array, index)
    _check_writable(machine, access, k)
    machine.pause()
    machine.thread.movable.clear()
    if races.strong_store(access, k, value):
        machine.changes += 1
    else:
        machine.rewrote((access, k))


def _target(machine: Machine, array: Any, index: Any) -> tuple[Any, int]:
    if not isinstance(array, Array):
        raise UnsupportedError(f"atomic or strong access to {array!r}: expected an array")
    access = array.access
    if access.allocation.closed:  # a local array has no allocation, and says so
        access.allocation.refuse()
    if access.remote:
        access.check_begun()
    return access, array.locate(index)


def _check_writable(machine: Machine, access: Any, k: int) -> None:
    if not access.writable:
        place = machine.place()
        raise ReadOnlyError(f"{place} writes {access.describe(k)}, which is read-only", place)


class Atomics:
    """``cuda.atomic``: each returns the old value."""

    def __init__(self, machine: Machine):
        self._machine = machine

    def _update(self, array: Any, index: Any, change: Callable[[Any], Any]) -> Any:
        machine = self._machine
        access, k = _target(machine, array, index)
        _check_writable(machine, access, k)
        machine.pause()
        machine.thread.movable.clear()
        old, changed = races.strong_update(access, k, change)
        if changed:
            machine.changes += 1
        else:
            machine.polled((access, k))
        return old

    def _with(self, array: Any, index: Any, value: Any, function: Callable[..., Any]) -> Any:
        access, _ = _target(self._machine, array, index)
        val = access.convert(value)
        return self._update(array, index, lambda old: function(old, val))

    def add(self, ary: Any, idx: Any, val: Any) -> Any:
        """``ary[idx] += val``."""
        return self._with(ary, idx, val, lambda old, v: old + v)

    def sub(self, ary: Any, idx: Any, val: Any) -> Any:
        """``ary[idx] -= val``."""
        return self._with(ary, idx, val, lambda old, v: old - v)

    def and_(self, ary: Any, idx: Any, val: Any) -> Any:
        """``ary[idx] &= val``."""
        return self._with(ary, idx, val, lambda old, v: old & v)

    def or_(self, ary: Any, idx: Any, val: Any) -> Any:
        """``ary[idx] |= val``."""
        return self._with(ary, idx, val, lambda old, v: old | v)

    def xor(self, ary: Any, idx: Any, val: Any) -> Any:
        """``ary[idx] ^= val``."""
        return self._with(ary, idx, val, lambda old, v: old ^ v)

    def inc(self, ary: Any, idx: Any, val: Any) -> Any:
        """Add one, or begin again at 0 from ``val`` on."""
        return self._with(ary, idx, val, lambda old, v: 0 if old >= v else old + 1)

    def dec(self, ary: Any, idx: Any, val: Any) -> Any:
        """Subtract one, or begin again at ``val`` from 0 and above ``val``."""
        return self._with(ary, idx, val, lambda old, v: v if old == 0 or old > v else old - 1)

    def exch(self, ary: Any, idx: Any, val: Any) -> Any:
        """``ary[idx] = val``."""
        return self._with(ary, idx, val, lambda old, v: v)

    def max(self, ary: Any, idx: Any, val: Any) -> Any:
        """``ary[idx] = max(ary[idx], val)``; a NaN stays."""
        return self._with(ary, idx, val, np.maximum if _floats(ary) else max)

    def min(self, ary: Any, idx: Any, val: Any) -> Any:
        """``ary[idx] = min(ary[idx], val)``; a NaN stays."""
        return self._with(ary, idx, val, np.minimum if _floats(ary) else min)

    def nanmax(self, ary: Any, idx: Any, val: Any) -> Any:
        """``ary[idx] = max(ary[idx], val)``; a number wins over NaN."""
        return self._with(ary, idx, val, np.fmax if _floats(ary) else max)

    def nanmin(self, ary: Any, idx: Any, val: Any) -> Any:
        """``ary[idx] = min(ary[idx], val)``; a number wins over NaN."""
        return self._with(ary, idx, val, np.fmin if _floats(ary) else min)

    def cas(self, ary: Any, idx: Any, old: Any, val: Any) -> Any:
        """``ary[idx] = val`` if it is ``old``."""
        if isinstance(ary, Array):
            old = ary.access.convert(old)
        return self._with(ary, idx, val, lambda found, v: v if found == old else found)

    def compare_and_swap(self, ary: Any, old: Any, val: Any) -> Any:
        """``ary[0] = val`` if it is ``old``."""
        return self.cas(ary, 0, old, val)


def _floats(array: Any) -> bool:
    return isinstance(array, Array) and array.dtype.kind == "f"
