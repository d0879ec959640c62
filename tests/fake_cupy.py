"""As much of CuPy as the host's code uses, on NumPy: devices that are none, kernels emulated.

``install`` puts it in CuPy's place. Arrays know their device and their address. A module is loaded
from the bytes that ``cubin`` (replaced as well) made of a kernel's specification; calling its
function takes the packed arguments apart again, as the machine code would.
"""

import ctypes
import types
from typing import Any

import numpy as np
import pytest

from gpurnn import compiler, emulator
from gpurnn.cuda import engines
from gpurnn.cuda.specs import KernelSpec, build, signature

__all__ = ["FakeCuPy", "install"]

ATTRIBUTES = {
    13: 1_755_000,
    16: 132,
    39: 2048,
    75: 9,
    76: 0,
    81: 233_472,
    82: 65_536,
    87: 2,
    97: 232_448,
}


class Array(np.ndarray):  # type: ignore[type-arg]
    """An array on a device."""

    def __array_finalize__(self, parent: Any) -> None:
        self._device = getattr(parent, "_device", FakeCuPy.current)

    @property
    def device(self) -> Any:  # type: ignore[override]
        return self._device

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def _here(self) -> None:
        assert FakeCuPy.current.id == self.device.id, "used while another device is the current one"

    def min(self, *a: Any, **k: Any) -> Any:
        self._here()
        return super().min(*a, **k)

    def max(self, *a: Any, **k: Any) -> Any:
        self._here()
        return super().max(*a, **k)

    def astype(self, *a: Any, **k: Any) -> Any:
        self._here()
        return super().astype(*a, **k)

    def copy(self, *a: Any, **k: Any) -> Any:
        self._here()
        return super().copy(*a, **k)

    def fill(self, value: Any) -> None:
        self._here()
        super().fill(value)

    def __iadd__(self, other: Any) -> Any:
        self._here()
        return super().__iadd__(other)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.id


class CUDARuntimeError(RuntimeError):
    """What CuPy raises where CUDA refuses."""


class Device:
    """A device, and the context in which it is the current one."""

    def __init__(self, index: int | None = None) -> None:
        self.id = FakeCuPy.current.id if index is None else index

    def __enter__(self) -> "Device":
        FakeCuPy.stack.append(FakeCuPy.current)
        FakeCuPy.current = self
        return self

    def __exit__(self, *_: object) -> None:
        FakeCuPy.current = FakeCuPy.stack.pop()


class Function:
    """A loaded kernel."""

    def __init__(self, fake: "FakeCuPy", spec: KernelSpec) -> None:
        self.fake, self.spec, self.ptr = fake, spec, id(self)
        self.device = FakeCuPy.current.id

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[int, ...],
        shared_mem: int = 0,
    ) -> None:
        assert FakeCuPy.current.id == self.device, "launched on a device it is not loaded on"
        assert all(type(a) is int for a in arguments)
        assert shared_mem <= self.fake.allowed.get(self.ptr, 0)
        self.fake.streams.append("kernel")
        rest, values = list(arguments), []
        for expected in signature(self.spec):
            if expected is None:
                values.append(rest.pop(0))
                continue
            n = expected.ndim
            header, rest = rest[: 5 + 2 * n], rest[5 + 2 * n :]
            _, _, size, itemsize, pointer = header[:5]
            dtype = np.dtype(expected.dtype)
            assert itemsize == dtype.itemsize
            memory = (ctypes.c_byte * (size * itemsize)).from_address(pointer)
            flat = np.frombuffer(memory, dtype)
            shape, strides = header[5 : 5 + n], header[5 + n :]
            values.append(np.lib.stride_tricks.as_strided(flat, shape, strides))
        assert not rest, "arguments too many"
        self.fake.launches.append((self.spec, FakeCuPy.current.id))
        emulator.launch(build(self.spec), grid, block, tuple(values), shared=shared_mem)


class FakeCuPy(types.ModuleType):
    """The module."""

    current: Any = None
    stack: list[Any] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__("cupy")
        self.launches: list[tuple[KernelSpec, int]] = []
        self.loads: list[tuple[KernelSpec, int]] = []
        self.allowed: dict[int, int] = {}
        self.specs: list[KernelSpec] = []
        self.allocations_left: int | None = None
        self.devices = 8
        self.streams: list[str] = []
        self.ndarray = Array
        FakeCuPy.current = Device(0)
        FakeCuPy.stack = []
        self.cuda = types.SimpleNamespace(
            Device=Device,
            Module=lambda: Module(self),
            get_current_stream=lambda: types.SimpleNamespace(
                synchronize=lambda: self.streams.append("wait")
            ),
            runtime=types.SimpleNamespace(
                CUDARuntimeError=CUDARuntimeError,
                deviceGetAttribute=lambda attribute, device: ATTRIBUTES[attribute],
                getDeviceProperties=self._properties,
            ),
            driver=types.SimpleNamespace(
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
                funcSetAttribute=self._allow,
            ),
        )

    def _properties(self, device: int) -> dict[str, bytes]:
        if device >= self.devices:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        return {"name": b"a GPU that is none"}

    def _allow(self, function: int, attribute: int, value: int) -> None:
        assert attribute == 8
        self.allowed[function] = value

    def new(self, a: Any) -> Any:
        """Return a copy of a NumPy array on the current device."""
        array = np.array(a).view(Array)
        array._device = FakeCuPy.current
        return array

    def _allocate(self, make: Any) -> Any:
        if self.allocations_left is not None:
            if self.allocations_left == 0:
                raise MemoryError("out of memory on a GPU that is none")
            self.allocations_left -= 1
        return self.new(make())

    def empty(self, shape: Any, dtype: Any) -> Any:
        return self._allocate(lambda: np.full(shape, np.nan, dtype))

    def empty_like(self, a: Any) -> Any:
        return self.empty(a.shape, a.dtype)

    def zeros(self, shape: Any, dtype: Any) -> Any:
        return self._allocate(lambda: np.zeros(shape, dtype))

    def zeros_like(self, a: Any) -> Any:
        return self.zeros(a.shape, a.dtype)

    def ones(self, shape: Any, dtype: Any) -> Any:
        return self._allocate(lambda: np.ones(shape, dtype))

    def arange(self, n: int, dtype: Any) -> Any:
        return self._allocate(lambda: np.arange(n, dtype=dtype))

    def matmul(self, a: Any, b: Any, out: Any) -> None:
        assert a.device.id == b.device.id == out.device.id == FakeCuPy.current.id
        np.matmul(a.view(np.ndarray), b.view(np.ndarray), out=out.view(np.ndarray))

    def take(self, a: Any, ids: Any, axis: int, out: Any) -> None:
        assert a.device.id == ids.device.id == out.device.id == FakeCuPy.current.id
        np.take(a, ids, axis=axis, out=out)

    def argwhere(self, a: Any) -> Any:
        return np.argwhere(a)

    def asarray(self, a: Any, dtype: Any = None, order: str = "C") -> Any:
        assert isinstance(a, Array)
        if dtype is None or (a.dtype == dtype and a.flags.c_contiguous):
            return a
        return self.new(a.view(np.ndarray).astype(dtype, order=order))

    def ascontiguousarray(self, a: Any) -> Any:
        return a if a.flags.c_contiguous else self.new(np.ascontiguousarray(a.view(np.ndarray)))

    def from_dlpack(self, a: Any) -> Any:
        return a.__dlpack__()


class Module:
    """Code on a device."""

    def __init__(self, fake: FakeCuPy) -> None:
        self.fake = fake

    def load(self, code: bytes) -> None:
        self.spec = self.fake.specs[int(code)]
        self.fake.loads.append((self.spec, FakeCuPy.current.id))

    def get_function(self, name: str) -> Function:
        assert name == build(self.spec).__name__
        return Function(self.fake, self.spec)


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuPy:
    """Put it in CuPy's place for a test."""
    fake = FakeCuPy()

    def cubin(spec: KernelSpec, compute_capability: tuple[int, int]) -> bytes:
        assert compute_capability == (9, 0)
        fake.specs.append(spec)
        return str(len(fake.specs) - 1).encode()

    monkeypatch.setitem(__import__("sys").modules, "cupy", fake)
    monkeypatch.setattr(engines, "cubin", cubin)
    monkeypatch.setattr(compiler, "entry_of", lambda code: build(fake.specs[int(code)]).__name__)
    for cached in (engines.cupy, engines.limits_of, engines._function):
        cached.cache_clear()
    return fake
