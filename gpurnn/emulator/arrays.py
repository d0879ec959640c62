"""Arrays as a kernel sees them: every element access is checked, and indices never wrap."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from gpurnn.emulator.casts import dtype_of
from gpurnn.emulator.errors import BoundsError, UnsupportedError

if TYPE_CHECKING:
    from gpurnn.emulator.machine import Machine
    from gpurnn.emulator.memory import Access

__all__ = ["Array", "array"]

Shape = tuple[int, ...]


class Array:
    """A strided view of an allocation; offset and strides count items."""

    __slots__ = ("access", "k0", "label", "machine", "n0", "n1", "s0", "s1", "shape", "steps")

    def __init__(
        self, machine: Machine, access: Any, k0: int, shape: Shape, steps: Shape, label: str
    ):
        self.machine = machine
        self.access = access
        self.k0 = k0
        self.shape = shape
        self.steps = steps
        self.label = label
        self.n0 = shape[0] if shape else 0
        self.s0 = steps[0] if steps else 0
        self.n1 = shape[1] if len(shape) > 1 else 0
        self.s1 = steps[1] if len(steps) > 1 else 0

    def __getitem__(self, index: Any) -> Any:
        return self._get(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._set(index, value)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.n0

    def __iter__(self) -> Iterator[Any]:
        for i in range(len(self)):
            yield self[i]

    def __bool__(self) -> bool:
        raise TypeError(f"{self.label} is used as a condition: expected a scalar")

    def __repr__(self) -> str:
        return f"<{self.label}: {self.dtype} {self.shape}>"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The items' type."""
        return self.access.dtype  # type: ignore[no-any-return]

    @property
    def space(self) -> str:
        """The memory it lies in: "global", "shared" or "local"."""
        return self.access.space  # type: ignore[no-any-return]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of items."""
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def itemsize(self) -> int:
        """The bytes of an item."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """The bytes of all items."""
        return self.size * self.itemsize

    @property
    def strides(self) -> Shape:
        """The bytes from one item to the next, by axis."""
        return tuple(s * self.itemsize for s in self.steps)

    @property
    def T(self) -> Array:
        """The same memory with the axes in reverse."""
        return array(
            self.machine, self.access, self.k0, self.shape[::-1], self.steps[::-1], self.label
        )

    def view(self, dtype: Any) -> Array:
        """Return the same memory as items of another type."""
        to, size = dtype_of(dtype), self.itemsize
        access = self.access.seen_as(to)
        start = self.k0 * size
        if to.itemsize == size:
            return array(self.machine, access, self.k0, self.shape, self.steps, self.label)
        last = self.shape[-1] * size if self.shape else 0
        if not self.shape or self.steps[-1] != 1 or last % to.itemsize or start % to.itemsize:
            raise UnsupportedError(
                f"{self!r} seen as {to}: expected a last axis without gaps "
                "that starts and ends with a whole item"
            )
        if any(s * size % to.itemsize for s in self.steps[:-1]):
            raise UnsupportedError(f"the rows of {self!r} as {to} overlap")
        steps = (*(s * size // to.itemsize for s in self.steps[:-1]), 1)
        shape = (*self.shape[:-1], last // to.itemsize)
        return array(self.machine, access, start // to.itemsize, shape, steps, self.label)

    def reshape(self, *shape: Any) -> Array:
        """Return the same memory, which must have no gaps, with other axes."""
        new = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        if -1 in new:
            rest = -int(np.prod(new))
            new = tuple(self.size // rest if n == -1 else n for n in new)
        if self.steps != _contiguous(self.shape) or int(np.prod(new)) != self.size:
            raise UnsupportedError(
                f"{self!r} reshaped to {new}: expected as many items and no gaps"
            )
        return array(self.machine, self.access, self.k0, new, _contiguous(new), self.label)

    def locate(self, index: Any) -> int:
        """Return the number, in the allocation, of the one item at ``index``."""
        k, shape, _ = self._select(index)
        if shape is not None:
            raise UnsupportedError(f"index {index!r} of {self!r}: expected one index per axis")
        return k

    def _get(self, index: Any) -> Any:
        k, shape, steps = self._select(index)
        if shape is None:
            return self.access.load(k)
        return array(self.machine, self.access, k, shape, steps, self.label)

    def _set(self, index: Any, value: Any) -> None:
        k, shape, steps = self._select(index)
        if shape is None:
            self.access.store(k, value)
            return
        target = array(self.machine, self.access, k, shape, steps, self.label)
        source = value if isinstance(value, Array) else None
        if source is not None and source.shape != shape:
            raise BoundsError(f"{source!r} is assigned to items of shape {shape}")
        for i in itertools.product(*map(range, shape)):
            target[i if len(i) > 1 else i[0]] = value if source is None else source[i]

    def _select(self, index: Any) -> tuple[int, Any, Any]:
        """Return (item, None, None), or (first item, shape, steps) of a part."""
        parts = index if type(index) is tuple else (index,)
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            fill = (slice(None),) * (len(self.shape) - len(parts) + 1)
            parts = (*parts[:at], *fill, *parts[at + 1 :])
        if len(parts) > len(self.shape):
            self._outside(index, f"expected at most {len(self.shape)} indices")
        k = self.k0
        shape, steps = [], []
        for axis, part in enumerate(parts):
            n, s = self.shape[axis], self.steps[axis]
            if isinstance(part, slice):
                if any(b is not None and b < 0 for b in (part.start, part.stop, part.step)):
                    self._outside(index, "a slice's bounds must not be negative")
                chosen = range(*part.indices(n))
                k += chosen.start * s if chosen else 0
                shape.append(len(chosen))
                steps.append(s * chosen.step)
                continue
            try:
                i = operator.index(part)
            except TypeError:
                raise UnsupportedError(f"index {part!r} of {self!r}: expected integers") from None
            if not 0 <= i < n:
                self._outside(index, f"axis {axis} has size {n}")
            k += i * s
        shape += self.shape[len(parts) :]
        steps += self.steps[len(parts) :]
        if not shape and len(parts) == len(self.shape):
            return k, None, None
        return k, tuple(shape), tuple(steps)

    def _outside(self, index: Any, why: str) -> NoReturn:
        place = self.machine.place()
        raise BoundsError(
            f"{place}: index {index!r} is out of range for {self.label} of shape {self.shape}: "
            f"{why}",
            place,
        )


class _Array1(Array):
    __slots__ = ()

    def __getitem__(self, i: Any) -> Any:
        if type(i) is int and 0 <= i < self.n0:
            load = self.access.load
            return load(self.k0 + i * self.s0)
        return self._get(i)

    def __setitem__(self, i: Any, value: Any) -> None:
        if type(i) is int and 0 <= i < self.n0:
            store = self.access.store
            store(self.k0 + i * self.s0, value)
        else:
            self._set(i, value)


class _Array2(Array):
    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        if type(index) is tuple and len(index) == 2:
            i, j = index
            if type(i) is int and type(j) is int and 0 <= i < self.n0 and 0 <= j < self.n1:
                load = self.access.load
                return load(self.k0 + i * self.s0 + j * self.s1)
        return self._get(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        if type(index) is tuple and len(index) == 2:
            i, j = index
            if type(i) is int and type(j) is int and 0 <= i < self.n0 and 0 <= j < self.n1:
                store = self.access.store
                store(self.k0 + i * self.s0 + j * self.s1, value)
                return
        self._set(index, value)


class _Array3(Array):
    __slots__ = ("n2", "s2")

    def __init__(
        self, machine: Machine, access: Any, k0: int, shape: Shape, steps: Shape, label: str
    ):
        super().__init__(machine, access, k0, shape, steps, label)
        self.n2, self.s2 = shape[2], steps[2]

    def __getitem__(self, index: Any) -> Any:
        if type(index) is tuple and len(index) == 3:
            h, i, j = index
            if (
                type(h) is int
                and type(i) is int
                and type(j) is int
                and 0 <= h < self.n0
                and 0 <= i < self.n1
                and 0 <= j < self.n2
            ):
                load = self.access.load
                return load(self.k0 + h * self.s0 + i * self.s1 + j * self.s2)
        return self._get(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        if type(index) is tuple and len(index) == 3:
            h, i, j = index
            if (
                type(h) is int
                and type(i) is int
                and type(j) is int
                and 0 <= h < self.n0
                and 0 <= i < self.n1
                and 0 <= j < self.n2
            ):
                store = self.access.store
                store(self.k0 + h * self.s0 + i * self.s1 + j * self.s2, value)
                return
        self._set(index, value)


_BY_RANK = {1: _Array1, 2: _Array2, 3: _Array3}


def array(
    machine: Machine, access: Access | Any, k0: int, shape: Shape, steps: Shape | None, label: str
) -> Array:
    """Return a view of an allocation; steps None: without gaps."""
    steps = _contiguous(shape) if steps is None else steps
    return _BY_RANK.get(len(shape), Array)(machine, access, k0, shape, steps, label)


def _contiguous(shape: Shape) -> Shape:
    steps = [1]
    for n in shape[:0:-1]:
        steps.append(steps[-1] * n)
    return tuple(steps[::-1][: len(shape)])
