"""What runs kernels: a GPU with CuPy arrays, or the emulator with NumPy arrays.

The operations in ``gpurnn.cuda.operations`` are written once, against ``Engine``.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpurnn import compiler, planning
from gpurnn.cuda import cublas, graphs, launching, reports
from gpurnn.cuda.machine_code import cubin
from gpurnn.cuda.packages import needed
from gpurnn.cuda.specs import MOST_KEPT, KernelSpec, build

__all__ = [
    "EmulatedEngine",
    "Engine",
    "GPUEngine",
    "Recorded",
    "cupy",
    "current_emulation",
    "emulated",
    "limits_of",
    "recording",
]

Array = Any  # cupy.ndarray, or numpy.ndarray under the emulator

Size = tuple[int, int, int]


class Engine(Hashable, Protocol):
    """A place where kernels run: ``xp`` makes its arrays."""

    @property
    def xp(self) -> Any: ...

    @property
    def limits(self) -> planning.Limits: ...

    def here(self) -> AbstractContextManager[object]:
        """Return a context in which new arrays lie, and kernels run, in this place."""

    def lasting(self) -> AbstractContextManager[object]:
        """Return a context in which new arrays own their memory, whatever pool others come from.

        So must all that is kept longer than the allocator of the moment may live.
        """

    def launch(
        self,
        spec: KernelSpec,
        grid: Size,
        block: Size,
        arrays: Sequence[Array],
        integers: Iterable[tuple[int, ...]] = ((),),
        shared: int = 0,
        *,
        cluster: int = 1,
        cooperative: bool = False,
    ) -> None:
        """Queue a kernel once for each tuple of ``integers``, in order.

        Its arguments are the arrays, C-contiguous, and then the integers. ``shared`` is dynamic
        shared memory in bytes, ``cluster`` the blocks of a cluster; of a ``cooperative`` launch all
        blocks run at once, or it fails.
        """

    def scratch(self, shape: tuple[int, ...]) -> Array:
        """Return an array of uint64, 0 in every place when the next launch begins."""

    def report(self, blocks: int) -> Array:
        """Return a flat array of uint32, 0, in which so many blocks report that they gave up."""

    def check_reports(self) -> None:
        """Raise if a block of an earlier launch reported; does not wait for those that still run.

        Raises:
            RuntimeError: one did; the message says which, and in which step.
        """

    def product(self, A: Array, B: Array, out: Array) -> None:
        """out = A B, summed in float32 at least."""

    def step_product(
        self, A: Array, B: Array, out: Array, workspace: Array | None, precision: str = "ieee"
    ) -> None:
        """out = A B of a step: out is of the type that is summed in, no size is 0.

        A and B are C-contiguous or transposes of such. It may be captured. ``workspace`` is what
        the method of that name returned, and nothing else's until the product is made.
        """

    def workspace(self) -> Array | None:
        """Allocate what a ``step_product`` works in; None if it needs nothing of the kind."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured, or soon will be with the same work.

        What is queued then runs later, and again: it may keep nothing for another call.
        """

    def replayed(
        self,
        spec: KernelSpec,
        key: Hashable,
        make: Callable[[], NamedTuple],
        run: Callable[[Any, int], None],
    ) -> AbstractContextManager[tuple[Any, Callable[[int], None]]]:
        """Give arrays that ``make`` made, and a function that does ``run(arrays, steps)`` on them.

        Where it pays, both are kept for the next call with this ``spec`` and ``key``, and the work
        is captured once for each number of steps. ``run`` queues products of steps and launches of
        the kernel ``spec``, without dynamic shared memory, and allocates nothing.
        """

    def settle(self) -> None:
        """Wait until everything queued on the current stream is done."""

    def fetched(self, a: Array) -> NDArray[Any]:
        """Return a copy of an array in the host's memory, when it is there."""


@dataclass(frozen=True)
class GPUEngine:
    """CUDA device ``index``, on CuPy's current stream."""

    index: int

    @property
    def xp(self) -> Any:
        return cupy()

    @property
    def limits(self) -> planning.Limits:
        return limits_of(self.index)

    def here(self) -> AbstractContextManager[object]:
        device: AbstractContextManager[object] = cupy().cuda.Device(self.index)
        return device

    def lasting(self) -> AbstractContextManager[object]:
        own: AbstractContextManager[object] = cupy().cuda.using_allocator(None)
        return own

    def launch(
        self,
        spec: KernelSpec,
        grid: Size,
        block: Size,
        arrays: Sequence[Array],
        integers: Iterable[tuple[int, ...]] = ((),),
        shared: int = 0,
        *,
        cluster: int = 1,
        cooperative: bool = False,
    ) -> None:
        function = _function(spec, self.index, shared, cluster)
        recorded = _recorded.get()
        if recorded is not None:
            recorded.functions.append(function)
        arguments: list[int] = []
        for a in arrays:
            arguments += compiler.packed(a.shape, a.itemsize, a.data.ptr)
        for last in integers:
            if cluster == 1 and not cooperative:
                function(grid, block, (*arguments, *last), shared_mem=shared)
                continue
            launching.launch(
                function.ptr,
                grid,
                block,
                (*arguments, *last),
                shared=shared,
                stream=cupy().cuda.get_current_stream().ptr,
                cluster=cluster,
                cooperative=cooperative,
            )

    def scratch(self, shape: tuple[int, ...]) -> Array:
        return cupy().zeros(shape, np.uint64)

    def report(self, blocks: int) -> Array:
        return reports.mapped(cupy(), self.index).array(blocks)

    def check_reports(self) -> None:
        reports.check(self.index)

    def product(self, A: Array, B: Array, out: Array) -> None:
        if A.shape[1] == 0:
            out.fill(0)
        elif not out.size:
            pass
        elif self.capturing():  # CuPy refuses
            self.step_product(A, B, out, self.workspace())
        else:
            cupy().matmul(A, B, out=out)

    def step_product(
        self, A: Array, B: Array, out: Array, workspace: Array | None, precision: str = "ieee"
    ) -> None:
        stream = cupy().cuda.get_current_stream().ptr
        cublas.product(self.index, stream, A, B, out, workspace=workspace, precision=precision)

    def workspace(self) -> Array | None:
        recorded = _recorded.get()
        if recorded is not None:
            return recorded.workspace
        if self.capturing():  # the graph, whoever keeps it, must have one of its own
            return None
        return cupy().empty(cublas.WORKSPACE, np.uint8)

    def capturing(self) -> bool:
        return _recorded.get() is not None or bool(cupy().cuda.get_current_stream().is_capturing())

    def replayed(
        self,
        spec: KernelSpec,
        key: Hashable,
        make: Callable[[], NamedTuple],
        run: Callable[[Any, int], None],
    ) -> AbstractContextManager[tuple[Any, Callable[[int], None]]]:
        needs = _function(spec, self.index, 0, 1)
        return graphs.replayed(cupy().cuda, (self.index, spec, key), make, run, needs)

    def settle(self) -> None:
        cupy().cuda.get_current_stream().synchronize()

    def fetched(self, a: Array) -> NDArray[Any]:
        with self.here():
            copied: NDArray[Any] = a.get()
        return copied


@cache
def cupy() -> Any:
    """Import CuPy."""
    return needed("cupy", "arrays on a GPU need CuPy", "cuda13")


@lru_cache(maxsize=MOST_KEPT)
def _function(spec: KernelSpec, device: int, shared: int, cluster: int) -> Any:
    """Load a kernel onto a device; let it have so much dynamic shared memory, and such clusters."""
    cuda = cupy().cuda
    needed("numba.cuda", "kernels are compiled by numba-cuda", "cuda13")
    with cuda.Device(device):
        module = cuda.Module()
        code = cubin(spec, limits_of(device).compute_capability)
        entry = compiler.entry_of(code)
        if build(spec).__name__ not in entry:
            raise RuntimeError(
                f"the machine code kept for {spec} is that of another kernel, {entry}"
            )
        module.load(code)
        function = module.get_function(entry)
        if shared:  # with what it declares it may exceed what a kernel has without asking
            driver = cuda.driver
            attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(function.ptr, attribute, shared)
        launching.allow_clusters(function.ptr, cluster)
    return function


# cudaDeviceAttr (CUDA Runtime API, device attributes)
CLOCK_KHZ, THREADS_PER_SM, MULTIPROCESSORS = 13, 39, 16
MAJOR, MINOR = 75, 76
SHARED_PER_SM, REGISTERS_PER_SM, SINGLE_TO_DOUBLE, SHARED_OPT_IN = 81, 82, 87, 97


@cache
def limits_of(device: int) -> planning.Limits:
    """Ask a GPU what it can hold.

    Raises:
        ValueError: there is no such device, or no driver that could answer.
    """
    runtime = cupy().cuda.runtime

    def ask(attribute: int) -> int:
        return int(runtime.deviceGetAttribute(attribute, device))

    try:
        name = runtime.getDeviceProperties(device)["name"].decode()
    except runtime.CUDARuntimeError as e:
        raise ValueError(f"CUDA device {device} cannot be used: {e}") from e
    return planning.Limits(
        name=name,
        compute_capability=(ask(MAJOR), ask(MINOR)),
        multiprocessors=ask(MULTIPROCESSORS),
        shared_per_block=ask(SHARED_OPT_IN),
        shared_per_multiprocessor=ask(SHARED_PER_SM),
        clock_ghz=ask(CLOCK_KHZ) / 1e6,
        registers_per_multiprocessor=ask(REGISTERS_PER_SM),
        threads_per_multiprocessor=ask(THREADS_PER_SM),
        half_rate_float64=ask(SINGLE_TO_DOUBLE) <= 2,
    )


class _PoisonedNumPy:
    """NumPy, except that new arrays hold NaN: what no kernel wrote is seen in the result."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any) -> Array:
        return np.full(shape, np.nan, dtype)

    def empty_like(self, a: Array) -> Array:
        return np.full_like(a, np.nan)


_POISONED = _PoisonedNumPy()


def _rounded_to_tf32(A: Array) -> Array:
    """Round float32 to 10 explicit bits of significand, to nearest, halfway away from zero."""
    bits = np.ascontiguousarray(A, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(A), rounded.view(np.float32), A)


@dataclass(frozen=True)
class EmulatedEngine:
    """The emulator, on NumPy arrays, planned for ``limits``; the rest goes to the emulator."""

    limits: planning.Limits
    seed: int | None
    check_races: bool

    @property
    def xp(self) -> Any:
        return _POISONED

    def here(self) -> AbstractContextManager[object]:
        return np.errstate(all="ignore")  # as on a GPU, infinities and NaN go their way

    def lasting(self) -> AbstractContextManager[object]:
        return nullcontext()

    def launch(
        self,
        spec: KernelSpec,
        grid: Size,
        block: Size,
        arrays: Sequence[Array],
        integers: Iterable[tuple[int, ...]] = ((),),
        shared: int = 0,
        *,
        cluster: int = 1,
        cooperative: bool = False,
    ) -> None:
        from gpurnn import emulator

        stored = [a.view(np.uint16) if a.itemsize == 2 else a for a in arrays]
        for last in integers:
            emulator.launch(
                build(spec),
                grid,
                block,
                (*stored, *last),
                shared=shared,
                cluster=None if cluster == 1 else cluster,
                seed=self.seed,
                check_races=self.check_races,
            )

    def scratch(self, shape: tuple[int, ...]) -> Array:
        return np.zeros(shape, np.uint64)

    def report(self, blocks: int) -> Array:
        return np.zeros(blocks, np.uint32)

    def check_reports(self) -> None:
        pass  # the emulator finds a thread that waits in vain before it gives up

    def product(self, A: Array, B: Array, out: Array) -> None:
        if out.itemsize == 2:  # NumPy would sum in half precision
            out[...] = A.astype(np.float32) @ B.astype(np.float32)
        else:
            np.matmul(A, B, out=out)

    def step_product(
        self, A: Array, B: Array, out: Array, workspace: Array | None, precision: str = "ieee"
    ) -> None:
        summed = out.dtype
        A, B = A.astype(summed, copy=False), B.astype(summed, copy=False)
        if precision == "tf32":
            A, B = _rounded_to_tf32(A), _rounded_to_tf32(B)
        np.matmul(A, B, out=out)

    def workspace(self) -> Array | None:
        return None

    def capturing(self) -> bool:
        return False

    @contextmanager
    def replayed(
        self,
        spec: KernelSpec,
        key: Hashable,
        make: Callable[[], NamedTuple],
        run: Callable[[Any, int], None],
    ) -> Iterator[tuple[Any, Callable[[int], None]]]:
        arrays = make()
        yield arrays, partial(run, arrays)

    def settle(self) -> None:
        pass

    def fetched(self, a: Array) -> NDArray[Any]:
        return np.array(a)


@dataclass
class Recorded:
    """What work that is done again needs for as long as it may be: kernels stay loaded.

    ``workspace`` serves one product after another: all is queued on one stream.
    """

    workspace: Array
    functions: list[Any] = field(default_factory=list)


_recorded: ContextVar[Recorded | None] = ContextVar("gpurnn_recorded", default=None)


@contextmanager
def recording(needs: Recorded) -> Iterator[None]:
    """Within this context work on a GPU is queued as if it were captured, captured or not."""
    token = _recorded.set(needs)
    try:
        yield
    finally:
        _recorded.reset(token)


_emulation: ContextVar[EmulatedEngine | None] = ContextVar("gpurnn_emulation", default=None)


def current_emulation() -> EmulatedEngine | None:
    """Return the engine of the ``emulated()`` around, if there is one."""
    return _emulation.get()


@contextmanager
def emulated(
    device: planning.Limits | str = "H100", *, seed: int | None = None, check_races: bool = True
) -> Iterator[None]:
    """Within this context, NumPy arrays take the kernels' path, run by ``gpurnn.emulator``.

    ::

        with gpurnn.emulated():
            H, residuals = F.rnn_forward(X, None, W_xh, W_hh, b_h)

    The planning, the kernels and the host's code are those of a GPU; only its instructions are
    Python's. It is slow: a microsecond or so for each access to an array.

    Args:
        device: the GPU to plan for: "A100", "H100", "H200", or a ``gpurnn.planning.Limits``.
        seed: shuffles the order in which threads go on; None is one fixed order.
        check_races: look for races too.

    Raises:
        ValueError: ``device`` names no GPU that is known.
        ImportError: numba-cuda or greenlet is not installed.
        gpurnn.emulator.EmulationError: (where a kernel is run) it has a fault.
    """
    engine = EmulatedEngine(planning.limits("device", device), seed, check_races)
    for module in ("numba.cuda", "greenlet"):
        needed(module, "the emulator runs Numba's kernels as greenlets", "emulator")
    token = _emulation.set(engine)
    try:
        yield
    finally:
        _emulation.reset(token)
