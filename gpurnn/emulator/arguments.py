"""A kernel's arguments: arrays become checked views of the memory they lie in."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpurnn.emulator.arrays import Array, array
from gpurnn.emulator.memory import Allocation

if TYPE_CHECKING:
    from gpurnn.emulator.machine import Machine

__all__ = ["Arguments", "Uninitialized", "constant", "uninitialized"]

# Arrays are found by address; every item type's alignment divides this.
ALIGNMENT = 16

Anything = NDArray[Any]


class Uninitialized(NamedTuple):
    """An array whose contents no kernel may read before it wrote them."""

    array: Anything


def uninitialized(array: Anything) -> Uninitialized:
    """Mark an argument of ``launch``: its contents mean nothing, and reading them is an error."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"array is a {type(array).__name__}: expected a numpy.ndarray")
    return Uninitialized(array)


class _Part(NamedTuple):
    name: str
    array: Anything
    low: int
    high: int
    written: bool


class _Region(NamedTuple):
    """Bytes that arguments share."""

    low: int
    size: int
    parts: list[_Part]
    before: NDArray[np.uint8]
    # Where the buffer begins that these are a part of.
    buffer: int


class Arguments:
    """The arguments of a launch, and the contents of their arrays before it."""

    def __init__(self, args: tuple[Any, ...], names: tuple[str, ...]):
        self._args = args
        self._names = names
        parts = [p for name, a in zip(names, args, strict=True) for p in _parts(name, a)]
        self._regions = list(_regions(parts))

    def place(self, machine: Machine, *, copied: bool) -> tuple[Any, ...]:
        """Return what the kernel gets: views of the arrays' memory, or of copies of it."""
        views: dict[int, Array] = {}
        for number, region in enumerate(self._regions):
            raw = region.before.copy() if copied else _memory(region.low, region.size)
            grain = min(p.array.itemsize for p in region.parts)
            allocation = Allocation(
                machine, ("argument", number), raw, grain, _describer(region), written=True
            )
            allocation.origin = region.buffer - region.low
            _mark(allocation, region)
            for part in region.parts:
                views[id(part.array)] = _view(machine, allocation, region, part)
        return tuple(
            self._convert(name, a, views) for name, a in zip(self._names, self._args, strict=True)
        )

    def _convert(self, name: str, value: Any, views: dict[int, Array]) -> Any:
        if isinstance(value, Uninitialized):
            value = value.array
        if isinstance(value, np.ndarray):
            return views[id(value)]
        if isinstance(value, tuple):
            items = [self._convert(f"{name}[{i}]", v, views) for i, v in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, bool | np.bool):
            return bool(value)
        if isinstance(value, int | np.integer):
            return int(value)
        if isinstance(value, np.floating):
            return value
        if isinstance(value, float):
            return np.float64(value)
        if value is None:
            return None
        raise TypeError(
            f"argument {name} is a {type(value).__name__}: expected NumPy arrays and numbers"
        )


def constant(machine: Machine, a: Anything) -> Array:
    """Return a read-only view of a copy of ``a``."""
    copy = np.ascontiguousarray(a)
    raw = np.frombuffer(copy.tobytes(), np.uint8)
    allocation = Allocation(
        machine,
        ("constant", id(a)),
        raw,
        a.itemsize,
        lambda offset, size: f"item {offset // size} of a constant array",
        written=True,
    )
    access = allocation.access(a.dtype, writable=False)
    return array(machine, access, 0, a.shape, None, "a constant array")


def _parts(name: str, value: Any) -> Iterator[_Part]:
    written = True
    if isinstance(value, Uninitialized):
        value, written = value.array, False
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _parts(f"{name}[{i}]", item)
    if not isinstance(value, np.ndarray):
        return
    if value.dtype.kind not in "biufc" or value.dtype.itemsize > ALIGNMENT:
        raise TypeError(f"argument {name} has dtype {value.dtype}: expected numbers")
    if not value.dtype.isnative:
        raise TypeError(f"argument {name} has dtype {value.dtype}: expected the host's byte order")
    address = value.__array_interface__["data"][0]
    unit = value.itemsize
    if value.size and (address % unit or any(s % unit for s in value.strides)):
        raise ValueError(
            f"argument {name} at address {address:#x} with strides {value.strides}: expected "
            f"multiples of its item size, {unit}"
        )
    low, high = np.lib.array_utils.byte_bounds(value)
    yield _Part(name, value, low, high if value.size else low, written)


def _regions(parts: list[_Part]) -> Iterator[_Region]:
    """Yield regions of memory that do not overlap."""
    group: list[_Part] = []
    high = -1
    for part in sorted(parts, key=lambda p: (p.low, p.high)):
        if group and part.low >= high:
            yield _region(group)
            group = []
        group.append(part)
        high = max(high, part.high) if len(group) > 1 else part.high
    if group:
        yield _region(group)


def _region(parts: list[_Part]) -> _Region:
    low = parts[0].low // ALIGNMENT * ALIGNMENT
    size = max(p.high for p in parts) - low
    before = np.zeros(size, np.uint8)
    inside = parts[0].low - low
    before[inside:] = _memory(parts[0].low, size - inside)
    return _Region(low, size, parts, before, min(_buffer(p.array) for p in parts))


def _buffer(array: Anything) -> int:
    """Return the address of the array that owns the memory."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return int(np.lib.array_utils.byte_bounds(array)[0])


def _memory(address: int, size: int) -> NDArray[np.uint8]:
    """Return the bytes at an address; only those inside the arguments are ever touched."""
    if not size:
        return np.zeros(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _view(machine: Machine, allocation: Allocation, region: _Region, part: _Part) -> Array:
    a = part.array
    access = allocation.access(a.dtype, writable=a.flags.writeable)
    unit = a.itemsize
    start = (a.__array_interface__["data"][0] - region.low) // unit if a.size else 0
    steps = tuple(s // unit for s in a.strides)
    return array(machine, access, start, a.shape, steps, f"argument {part.name}")


def _mark(allocation: Allocation, region: _Region) -> None:
    """Set the grains that only arrays marked as uninitialized cover."""
    if all(p.written for p in region.parts):
        return
    for written in (False, True):
        for part in region.parts:
            if part.written is written:
                for g in _grains(allocation, region, part):
                    allocation.writes[g] = 0 if written else -1


def _grains(allocation: Allocation, region: _Region, part: _Part) -> Iterator[int]:
    per_item = part.array.itemsize // allocation.grain
    for offset in _offsets(region, part):
        first = int(offset) // allocation.grain
        yield from range(first, first + per_item)


def _offsets(region: _Region, part: _Part) -> NDArray[np.int64]:
    a = part.array
    offsets = np.array([a.__array_interface__["data"][0] - region.low], np.int64)
    for n, s in zip(a.shape, a.strides, strict=True):
        offsets = np.add.outer(offsets, np.arange(n) * s)
    return offsets.reshape(-1)


def _describer(region: _Region) -> Any:
    def describe(offset: int, size: int) -> str:
        found = []
        for part in region.parts:
            if part.array.itemsize == size:
                at = np.flatnonzero(_offsets(region, part) == offset)
                if at.size:
                    index = np.unravel_index(at[0], part.array.shape)
                    found.append(f"element {tuple(map(int, index))} of argument {part.name}")
        if found:
            return ", which is ".join(found)
        names = ", ".join(p.name for p in region.parts)
        return f"{size} bytes at byte {offset} of argument {names}"

    return describe
