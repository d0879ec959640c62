"""As much of CuPy as the host's code uses, on NumPy: devices that are none, kernels emulated.

``install`` puts it in CuPy's place, and ``fake_cublas`` in cuBLAS's. Arrays know their device and
their address. A module is loaded from the bytes that ``cubin`` (replaced as well) made of a
kernel's specification; calling its function takes the packed arguments apart again, as the machine
code would. What is queued on a stream runs at once, kernels and cuBLAS's products on one that is
captured when the graph is launched, and so is what CuPy itself does to arrays, as far as it is in
use there: assignments, additions in place, copies.
``cuLaunchKernelEx`` of cuda-bindings is replaced too, by one that takes its configuration apart.
"""

import ctypes
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
from cuda.bindings import driver
from fake_cublas import FakeCuBLAS

from gpurnn import compiler, emulator
from gpurnn.cuda import cublas, engines, graphs, operations, reports, scalars
from gpurnn.cuda.specs import KernelSpec, build, signature

__all__ = ["Array", "CUDARuntimeError", "Event", "FakeCuPy", "Stream", "clear", "install"]

ALIGNMENT = 512  # of CuPy's memory
NOT_USED = 2  # references to what a list alone refers to: the list's, and the count's own

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
        made = super().astype(*a, **k)
        return made if made is self else FakeCuPy.latest.new(made)

    def copy(self, *a: Any, **k: Any) -> Any:
        self._here()
        made = FakeCuPy.latest.noted(super().copy(*a, **k))
        if FakeCuPy.latest.stream.captured is not None:
            made[...] = self
        return made

    def fill(self, value: Any) -> None:
        self._here()
        FakeCuPy.latest.queue(lambda: np.ndarray.fill(self, value))

    def __iadd__(self, other: Any) -> Any:
        self._here()
        whole = super().__iadd__
        FakeCuPy.latest.queue(lambda: whole(other))
        return self

    def __setitem__(self, where: Any, value: Any) -> None:
        self._here()
        assert not isinstance(value, np.ndarray) or isinstance(value, Array) or not value.ndim
        FakeCuPy.latest.queue(lambda: np.ndarray.__setitem__(self, where, value))

    def get(self, stream: Any = None, out: Any = None, *, blocking: bool = True) -> Any:
        """Return, or write, a copy in the host's memory."""
        self._here()
        assert FakeCuPy.latest.stream.captured is None
        assert blocking or stream is FakeCuPy.latest.stream
        if out is None:
            return np.array(self.view(np.ndarray))
        out[...] = self.view(np.ndarray)
        return out

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
        fake.functions[self.ptr] = self
        self.device = FakeCuPy.current.id

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[int, ...],
        shared_mem: int = 0,
    ) -> None:
        self.run(grid, block, arguments, shared_mem)

    def run(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[int, ...],
        shared_mem: int,
        cluster: int | None = None,
    ) -> None:
        """Emulate it, on what the packed arguments point to."""
        assert FakeCuPy.current.id == self.device, "launched on a device it is not loaded on"
        assert all(type(a) is int for a in arguments)
        assert shared_mem <= self.fake.allowed.get(self.ptr, 0)
        self.fake.streams.append("kernel")
        loaded = weakref.ref(self)

        def run() -> None:
            function = loaded()
            assert function is not None, "a kernel that is no longer loaded"
            function._run(grid, block, arguments, shared_mem, cluster)

        self.fake.queue(run)

    def _run(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[int, ...],
        shared_mem: int,
        cluster: int | None,
    ) -> None:
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
            assert self.fake.holds(pointer, size * itemsize), "memory that was freed"
            memory = (ctypes.c_byte * (size * itemsize)).from_address(pointer)
            flat = np.frombuffer(memory, dtype)
            shape, strides = header[5 : 5 + n], header[5 + n :]
            values.append(np.lib.stride_tricks.as_strided(flat, shape, strides))
        assert not rest, "arguments too many"
        self.fake.launches.append((self.spec, FakeCuPy.current.id))
        emulator.launch(
            build(self.spec), grid, block, tuple(values), shared=shared_mem, cluster=cluster
        )


class Extended(NamedTuple):
    """What a launch by ``cuLaunchKernelEx`` was asked to be."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    attributes: dict[str, int]


class Pinned(bytearray):
    """Memory of the host that a GPU can write to; it holds anything at first."""

    @property
    def ptr(self) -> int:
        """Its address."""
        return ctypes.addressof(ctypes.c_byte.from_buffer(self))


class Event:
    """A mark on a stream."""

    def __init__(self, fake: "FakeCuPy", *, disable_timing: bool = False) -> None:
        self.fake, self.timing = fake, not disable_timing
        self.seconds: float | None = None

    def record(self, stream: "Stream | None" = None) -> None:
        stream = stream or self.fake.stream
        assert stream.captured is None
        self.seconds = time.perf_counter()
        self.fake.order.append(("record", stream.ptr, self))

    def synchronize(self) -> None:
        self.fake.order.append(("synchronize", 0, self))


def elapsed(first: Event, second: Event) -> float:
    """Return the milliseconds from one mark to another."""
    assert first.timing and second.timing
    assert first.seconds is not None and second.seconds is not None
    return 1e3 * (second.seconds - first.seconds)


class Stream:
    """A stream, and the context in which it is the current one."""

    def __init__(self, fake: "FakeCuPy", *, non_blocking: bool = False, ptr: int = -1) -> None:
        fake.made += 1
        self.fake, self.non_blocking = fake, non_blocking
        self.ptr = 16 * fake.made if ptr < 0 else ptr
        self.captured: list[Callable[[], None]] | None = None

    def __enter__(self) -> "Stream":
        self.fake.stream_stack.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.fake.stream_stack.pop() is self

    def synchronize(self) -> None:
        assert self.captured is None, "cudaErrorStreamCaptureUnsupported"
        self.fake.streams.append("wait")

    def is_capturing(self) -> bool:
        return self.captured is not None

    def begin_capture(self) -> None:
        assert self.non_blocking, "the default stream cannot be captured"
        self.captured = []

    def end_capture(self) -> "Graph":
        captured, self.captured = self.captured, None
        assert captured is not None
        if self.fake.invalid:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated")
        graph = Graph(self.fake, captured)
        self.fake.graphs.append(weakref.ref(graph))
        return graph

    def wait_event(self, event: Event) -> None:
        assert self.captured is None
        self.fake.order.append(("wait", self.ptr, event))


class Graph:
    """What a stream captured."""

    def __init__(self, fake: "FakeCuPy", work: list[Callable[[], None]]) -> None:
        self.fake, self.work = fake, work

    def launch(self, stream: "Stream | None" = None) -> None:
        assert (stream or self.fake.stream).captured is None, "a graph within a graph"
        self.fake.replays.append(len(self.work))
        for one in self.work:
            one()


class Pool:
    """Memory that is given out again when its array is gone, and freed with the pool.

    As CuPy's: neither a graph that has an address in it, nor an array that outlives the pool, keeps
    memory from that.
    """

    def __init__(self, fake: "FakeCuPy", allocator: Callable[[int], Any]) -> None:
        self.fake, self.allocator = weakref.ref(fake), allocator
        self.owners: list[Any] = []

    def malloc(self, size: int) -> Any:
        """Name the pool: who allocates looks at whose method it is."""

    def owner(self, nbytes: int) -> Any:
        """Return bytes that no array uses."""
        for i in range(len(self.owners)):
            unused = sys.getrefcount(self.owners[i]) == NOT_USED
            if unused and self.owners[i].nbytes >= nbytes:
                return self.owners[i]
        self.owners.append(self.allocator(nbytes))
        return self.owners[-1]

    def __del__(self) -> None:
        fake = self.fake()
        if fake is not None:
            freed = {id(owner) for owner in self.owners}
            fake.memory = [one for one in fake.memory if id(one[0]()) not in freed]


class FakeCuPy(types.ModuleType):
    """The module."""

    current: Any = None
    stack: list[Any] = []  # noqa: RUF012
    latest: Any = None

    def __init__(self) -> None:
        super().__init__("cupy")
        self.launches: list[tuple[KernelSpec, int]] = []
        self.loads: list[tuple[KernelSpec, int]] = []
        self.allowed: dict[int, int] = {}
        self.large_clusters: list[int] = []
        self.functions: dict[int, Function] = {}
        self.extended: list[Extended] = []
        self.result = driver.CUresult.CUDA_SUCCESS
        self.pinned: list[Pinned] = []
        self.specs: list[KernelSpec] = []
        self.allocations_left: int | None = None
        self.allocations_refused, self.freed = 0, 0  # of new memory for pools; of CuPy's own
        self.devices = 8
        self.streams: list[str] = []
        self.order: list[tuple[str, int, Event]] = []  # of events: what, on which stream
        self.graphs: list[weakref.ref[Graph]] = []  # all that were captured
        self.replays: list[int] = []  # kernels and products of each graph that was launched
        self.invalid = False  # whether captures come to nothing
        self.made = 0
        self.memory: list[tuple[weakref.ref[Any], int, int]] = []
        self.pool: list[Any] | None = None  # a list is a pool that gives nothing out twice
        self.own: Pool | None = None  # the one in use
        self.ndarray = Array
        self.stream_stack = [Stream(self, ptr=0)]
        self.cublas = FakeCuBLAS(self)
        FakeCuPy.current = Device(0)
        FakeCuPy.latest = self
        FakeCuPy.stack = []
        self.cuda = types.SimpleNamespace(
            Device=Device,
            Module=lambda: Module(self),
            Stream=lambda non_blocking=False: Stream(self, non_blocking=non_blocking),
            get_elapsed_time=elapsed,
            Event=lambda disable_timing=False: Event(self, disable_timing=disable_timing),
            get_current_stream=lambda: self.stream,
            alloc_pinned_memory=self._pinned,
            MemoryPool=lambda allocator: Pool(self, allocator),
            Memory=self._memory,
            MemoryPointer=lambda memory, offset: memory,
            using_allocator=self._using,
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

    def _memory(self, size: int) -> Any:
        if self.allocations_refused:
            self.allocations_refused -= 1
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        return np.empty(size, np.uint8)

    def get_default_memory_pool(self) -> Any:
        """Return what frees no more than it notes."""

        def free_all_blocks() -> None:
            self.freed += 1

        return types.SimpleNamespace(free_all_blocks=free_all_blocks)

    def _allow(self, function: int, attribute: int, value: int) -> None:
        assert attribute == 8
        self.allowed[function] = value

    @property
    def stream(self) -> Stream:
        """The current stream."""
        return self.stream_stack[-1]

    def queue(self, work: Callable[[], None]) -> None:
        """Run something, or let the current stream capture it."""
        if self.stream.captured is None:
            work()
        else:
            self.stream.captured.append(work)

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether there is an array that holds all of this memory."""
        self.memory = [one for one in self.memory if one[0]() is not None]
        kept = [(begin, size) for _, begin, size in self.memory]
        kept += [(pinned.ptr, len(pinned)) for pinned in self.pinned]
        return any(begin <= address and address + nbytes <= begin + size for begin, size in kept)

    @contextmanager
    def _using(self, malloc: Any) -> Iterator[None]:
        """Allocate within the context from a pool; of None arrays own their memory."""
        before = self.pool, self.own
        self.pool, self.own = None, None if malloc is None else malloc.__self__
        try:
            yield
        finally:
            self.pool, self.own = before

    def noted(self, array: Any) -> Any:
        """Return an array that NumPy made, whose memory is one of the device's now."""
        owner = array if array.base is None else array.base
        self.memory.append((weakref.ref(owner), array.ctypes.data, array.nbytes))
        return array

    def _pinned(self, size: int) -> "Pinned":
        self.pinned.append(Pinned(b"\xff" * size))
        return self.pinned[-1]

    def launch_extended(
        self, config: Any, function: Any, parameters: Any, extra: int
    ) -> tuple[Any]:
        """Stand in for ``cuLaunchKernelEx``: take its arguments apart, and run the kernel."""
        values, kinds = parameters
        assert len(values) == len(kinds) and set(kinds) == {ctypes.c_int64}
        assert extra == 0 and len(config.attrs) == config.numAttrs
        attributes: dict[str, int] = {}
        for attribute in config.attrs:
            match attribute.id:
                case driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
                    size = attribute.value.clusterDim
                    assert (size.y, size.z) == (1, 1)
                    attributes["cluster"] = size.x
                case driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE:
                    attributes["cooperative"] = attribute.value.cooperative
                case other:
                    raise AssertionError(f"an attribute that nobody needs: {other}")
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        block = (config.blockDimX, config.blockDimY, config.blockDimZ)
        stream = int(config.hStream)
        self.extended.append(Extended(grid, block, config.sharedMemBytes, stream, attributes))
        if self.result == driver.CUresult.CUDA_SUCCESS:
            cluster = attributes.get("cluster", 1)
            assert grid[0] % cluster == 0, "the grid counts blocks"
            kernel = self.functions[int(function)]
            assert cluster <= 8 or kernel.ptr in self.large_clusters
            kernel.run(grid, block, tuple(values), config.sharedMemBytes, cluster)
        return (self.result,)

    def set_attribute(self, function: Any, attribute: Any, value: int) -> tuple[Any]:
        """Stand in for ``cuFuncSetAttribute``."""
        kinds = driver.CUfunction_attribute
        assert attribute == kinds.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        assert value == 1
        self.large_clusters.append(int(function))
        return (self.result,)

    def new(self, a: Any) -> Any:
        """Return a copy of a NumPy array on the current device."""
        a = np.asarray(a)
        size = a.nbytes + ALIGNMENT
        owner = np.empty(size, np.uint8) if self.own is None else self.own.owner(size)
        begin = -owner.ctypes.data % ALIGNMENT
        array = owner[begin : begin + a.nbytes].view(a.dtype).reshape(a.shape).view(Array)
        array.view(np.ndarray)[...] = a
        array._device = FakeCuPy.current
        if self.pool is not None:
            self.pool.append(owner)
        self.memory.append((weakref.ref(owner), array.ctypes.data, a.nbytes))
        return array

    def _allocate(self, make: Any) -> Any:
        if self.allocations_left is not None:
            if self.allocations_left == 0:
                raise MemoryError("out of memory on a GPU that is none")
            self.allocations_left -= 1
        return self.new(make())

    def _filled(self, make: Any) -> Any:
        """Allocate, and write what every replay of a graph writes again."""
        made = self._allocate(make)
        if self.stream.captured is not None:
            bare, value = made.view(np.ndarray), make()
            self.queue(lambda: bare.__setitem__(..., value))
        return made

    def empty(self, shape: Any, dtype: Any) -> Any:
        poison = np.nan if np.dtype(dtype).kind not in "iu" else np.iinfo(dtype).max
        return self._allocate(lambda: np.full(shape, poison, dtype))

    def empty_like(self, a: Any) -> Any:
        return self.empty(a.shape, a.dtype)

    def zeros(self, shape: Any, dtype: Any) -> Any:
        return self._filled(lambda: np.zeros(shape, dtype))

    def zeros_like(self, a: Any) -> Any:
        return self.zeros(a.shape, a.dtype)

    def ones(self, shape: Any, dtype: Any) -> Any:
        return self._filled(lambda: np.ones(shape, dtype))

    def arange(self, n: int, dtype: Any) -> Any:
        return self._filled(lambda: np.arange(n, dtype=dtype))

    def matmul(self, a: Any, b: Any, out: Any) -> None:
        if self.stream.captured is not None:
            raise NotImplementedError("calling cuBLAS API during stream capture is unsupported")
        assert a.device.id == b.device.id == out.device.id == FakeCuPy.current.id
        np.matmul(a.view(np.ndarray), b.view(np.ndarray), out=out.view(np.ndarray))

    def take(self, a: Any, ids: Any, axis: int, out: Any) -> None:
        assert a.device.id == ids.device.id == out.device.id == FakeCuPy.current.id
        self.queue(lambda: np.take(a, ids, axis=axis, out=out))

    def argwhere(self, a: Any) -> Any:
        return np.argwhere(a)

    def array(self, a: Any) -> Any:
        """Return a copy on the device of a NumPy array, or of one that is there."""
        assert self.stream.captured is None, "a copy from memory that may be gone"
        return self.new(np.asarray(a).view(np.ndarray))

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


def clear() -> None:
    """Forget all that is kept of a CuPy, this one or the real one."""
    graphs._kept.clear()
    for cached in (engines.cupy, engines.limits_of, engines._function, operations._kept):
        cached.cache_clear()
    for cached in (cublas._functions, cublas._handle, scalars.scalar):
        cached.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuPy:
    """Put it in CuPy's place for a test, which calls ``clear`` in the end."""
    fake = FakeCuPy()

    def cubin(spec: KernelSpec, compute_capability: tuple[int, int]) -> bytes:
        assert compute_capability == (9, 0)
        fake.specs.append(spec)
        return str(len(fake.specs) - 1).encode()

    monkeypatch.setitem(__import__("sys").modules, "cupy", fake)
    monkeypatch.setattr(driver, "cuLaunchKernelEx", fake.launch_extended)
    monkeypatch.setattr(driver, "cuFuncSetAttribute", fake.set_attribute)
    monkeypatch.setattr(reports, "_mapped", {})
    monkeypatch.setattr(engines, "cubin", cubin)
    monkeypatch.setattr(cublas, "_library", lambda: fake.cublas)
    monkeypatch.setattr(compiler, "entry_of", lambda code: build(fake.specs[int(code)]).__name__)
    clear()
    return fake
