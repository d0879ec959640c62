"""``cuda`` as a kernel sees it in the emulator; it always answers for the thread that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurnn.emulator import atomics, floats
from gpurnn.emulator.arrays import Array
from gpurnn.emulator.errors import UnsupportedError
from gpurnn.emulator.libdevice import LIBDEVICE
from gpurnn.emulator.local import local_array
from gpurnn.emulator.operations import Operations
from gpurnn.emulator.shared import Shared
from gpurnn.emulator.threads import Dim3, Thread
from gpurnn.emulator.warps import WarpOperations

if TYPE_CHECKING:
    from gpurnn.emulator.machine import Machine

__all__ = ["Namespace"]

Load = Callable[["Namespace", Any, Any], Any]
Store = Callable[["Namespace", Any, Any, Any], None]


def _strong_load(name: str) -> Load:
    def load(cuda: Namespace, array: Any, i: Any) -> Any:
        _check_global(name, "ld.global", array)
        return atomics.strong_load(cuda.machine, array, i, volatile=False)

    return load


def _strong_store(name: str) -> Store:
    def store(cuda: Namespace, array: Any, i: Any, value: Any) -> None:
        _check_global(name, "st.global", array)
        atomics.strong_store(cuda.machine, array, i, value)

    return store


def _weak_load(name: str) -> Load:
    def load(cuda: Namespace, array: Any, i: Any) -> Any:
        _check_global(name, "ld.global", array)
        return array[i]

    return load


def _weak_store(name: str) -> Store:
    def store(cuda: Namespace, array: Any, i: Any, value: Any) -> None:
        _check_global(name, "st.global", array)
        array[i] = value

    return store


def _check_global(name: str, instruction: str, array: Any) -> None:
    if isinstance(array, Array) and array.space != "global":
        raise UnsupportedError(
            f"cuda.{name} of {array!r}: expected an array in global memory, as Numba emits "
            f"{instruction} for it, which faults on any other"
        )


class Namespace(WarpOperations):
    """What a kernel finds under ``cuda``, and for twins the operations of ``cuda.emu``."""

    def __init__(self, machine: Machine, grid: Dim3, block: Dim3, dynamic: int, constants: Any):
        self.machine = machine
        self.gridDim = grid
        self.blockDim = block
        self.shared = Shared(machine, dynamic)
        self.local = _Local(machine)
        self.const = _Constants(constants)
        self.atomic = atomics.Atomics(machine)
        self.cg = _CooperativeGroups(machine)
        self.emu = Operations(self)

    def add(self, found: dict[str, Any]) -> None:
        """Give the namespace more names."""
        self.__dict__.update(found)

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(f"cuda.{name} has no emulation")

    @property
    def threadIdx(self) -> Dim3:
        """The running thread's index in its block."""
        return self.machine.thread.index

    @property
    def blockIdx(self) -> Dim3:
        """The running thread's block."""
        return self.machine.thread.block.index

    def grid(self, ndim: int) -> Any:
        """Return the running thread's index in the grid."""
        t = self.machine.thread
        sizes, blocks = self.blockDim, t.block.index
        return _first(
            ndim, [b * n + i for b, n, i in zip(blocks, sizes, t.index, strict=True)], "grid"
        )

    def gridsize(self, ndim: int) -> Any:
        """Return the size of the grid in threads."""
        sizes = [g * b for g, b in zip(self.gridDim, self.blockDim, strict=True)]
        return _first(ndim, sizes, "gridsize")

    def syncthreads(self) -> None:
        """Wait for all threads of the block."""
        self._meet_block("syncthreads")

    def syncthreads_count(self, predicate: Any) -> int:
        """Wait for all threads of the block; return for how many the predicate holds."""
        return sum(map(bool, self._meet_block("syncthreads_count", predicate).values()))

    def syncthreads_and(self, predicate: Any) -> int:
        """Wait for all threads of the block; return 1 if the predicate holds for all."""
        return int(all(self._meet_block("syncthreads_and", predicate).values()))

    def syncthreads_or(self, predicate: Any) -> int:
        """Wait for all threads of the block; return 1 if the predicate holds for any."""
        return int(any(self._meet_block("syncthreads_or", predicate).values()))

    def threadfence(self) -> None:
        """Order this thread's accesses for all threads of the device."""
        self.machine.thread.fence(device=True)

    threadfence_system = threadfence

    def threadfence_block(self) -> None:
        """Order this thread's accesses for the threads of its block."""
        self.machine.thread.fence(device=False)

    def nanosleep(self, ns: Any) -> None:
        """Let other threads go first."""
        self.machine.pause()
        self.machine.polled("nanosleep")

    ldcg, ldcv = _strong_load("ldcg"), _strong_load("ldcv")
    stcg, stwt = _strong_store("stcg"), _strong_store("stwt")
    ldca, ldcs, ldlu = map(_weak_load, ("ldca", "ldcs", "ldlu"))
    stcs, stwb = map(_weak_store, ("stcs", "stwb"))

    fma = staticmethod(floats.fma)
    cbrt = staticmethod(floats.cbrt)

    @staticmethod
    def popc(x: int) -> int:
        """Return how many bits are set."""
        return (int(x) & (1 << _width(x)) - 1).bit_count()

    @staticmethod
    def clz(x: int) -> int:
        """Return how many bits are zero above the highest set bit."""
        return _width(x) - (int(x) & (1 << _width(x)) - 1).bit_length()

    @staticmethod
    def ffs(x: int) -> int:
        """Return the place of the lowest set bit, from 1, or 0."""
        return LIBDEVICE["ffsll"](x)  # type: ignore[no-any-return]

    @staticmethod
    def brev(x: int) -> int:
        """Return the bits in reverse."""
        return LIBDEVICE["brev" if _width(x) == 32 else "brevll"](x)  # type: ignore[no-any-return]

    @staticmethod
    def selp(condition: Any, a: Any, b: Any) -> Any:
        """Return ``a`` if the condition holds, else ``b``."""
        return a if condition else b

    def meet_lanes(self, operation: str, mask: int, value: Any) -> dict[Thread, Any]:
        """Let the lanes of ``mask`` meet; return their values."""
        return self._meet(operation, mask, value)

    def _meet_block(self, operation: str, value: Any = None) -> dict[Thread, Any]:
        meeting = self.machine.thread.block.meeting
        assert meeting is not None
        return meeting.meet(operation, value, orders=True)  # type: ignore[no-any-return]


class _Local:
    """``cuda.local``."""

    def __init__(self, machine: Machine):
        self._machine = machine

    def array(self, shape: Any, dtype: Any, alignment: int | None = None) -> Array:
        """Return an array of this thread's own, with nothing written."""
        return local_array(self._machine, shape, dtype)


class _Constants:
    """``cuda.const``."""

    def __init__(self, wrap: Any):
        self._wrap = wrap

    def array_like(self, ary: Any) -> Array:
        """Return the array's contents, read-only."""
        return ary if isinstance(ary, Array) else self._wrap(ary)


class _CooperativeGroups:
    """``cuda.cg``."""

    def __init__(self, machine: Machine):
        self._grid = _GridGroup(machine)

    def this_grid(self) -> _GridGroup:
        """Return the group of all threads."""
        return self._grid


class _GridGroup:
    """All threads of the launch."""

    def __init__(self, machine: Machine):
        self._machine = machine

    def sync(self) -> None:
        """Wait for all threads of the grid."""
        meeting = self._machine.grid_meeting
        assert meeting is not None
        meeting.meet("grid sync", orders=True)


def _first(ndim: int, values: list[int], what: str) -> Any:
    if ndim not in (1, 2, 3):
        raise UnsupportedError(f"cuda.{what}({ndim!r}): expected 1, 2 or 3")
    return values[0] if ndim == 1 else tuple(values[:ndim])


def _width(x: Any) -> int:
    if isinstance(x, np.generic):
        return x.dtype.itemsize * 8
    return 32 if -(2**31) <= int(x) < 2**32 else 64
