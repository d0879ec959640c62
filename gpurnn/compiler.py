"""Kernels from Python to machine code, with or without a GPU at hand.

Numba makes PTX of a Python function, nvJitLink makes a cubin of the PTX; neither needs a device. A
kernel's arguments are arrays in C order and 64-bit integers. In machine code an array is a row of
64-bit numbers, as Numba lays it out: ``packed`` makes them.
"""

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = [
    "ArraySpec",
    "Compiled",
    "compile_kernel",
    "compiling_for",
    "entry_of",
    "installed",
    "packed",
    "ptx_of",
    "toolchain",
]

SECTION = re.compile(rb"\0\.text\.(\w+)(?=\0)")  # of an ELF file's table of names
TOOLCHAIN = (
    "numba",
    "numba-cuda",
    "llvmlite",
    "nvidia-nvvm",
    "nvidia-nvjitlink",
    "cuda-core",
    "cuda-bindings",
)
ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\(")


@dataclass(frozen=True)
class ArraySpec:
    """An array argument: element type by Numba's name ("float32", "uint16", …), number of axes."""

    dtype: str
    ndim: int


@dataclass(frozen=True)
class Compiled:
    """A kernel as machine code for one architecture; ``name`` is that of its entry point."""

    name: str
    compute_capability: tuple[int, int]
    cubin: bytes


def toolchain() -> str:
    """Return the versions that machine code depends on, in one line."""
    return " ".join(f"{name}={installed(name) or 'none'}" for name in TOOLCHAIN)


def installed(*distributions: str) -> str | None:
    """Return the version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def ptx_of(
    function: Callable[..., None],
    arguments: tuple[ArraySpec | None, ...],
    compute_capability: tuple[int, int],
    threads: int,
) -> tuple[str, str]:
    """Compile a kernel's Python function to PTX, to be read.

    Args:
        function: what a factory of ``gpurnn.kernels`` returns.
        arguments: an ``ArraySpec`` for each array, None for each integer.
        compute_capability: such as (9, 0).
        threads: of a block, at most; the fewer, the more registers each may have.

    Returns:
        The name of the entry point, and the PTX.
    """
    ptx = _compiled(function, arguments, compute_capability, threads, "ptx")
    mangled = ENTRY.findall(ptx)
    if len(mangled) != 1:
        raise RuntimeError(f"{function.__name__}: {len(mangled)} entry points in its PTX, not one")
    return function.__name__, str(ptx.replace(mangled[0], function.__name__))


def compile_kernel(
    function: Callable[..., None],
    arguments: tuple[ArraySpec | None, ...],
    compute_capability: tuple[int, int],
    threads: int,
) -> Compiled:
    """Compile a kernel's Python function to machine code; the arguments are those of ``ptx_of``.

    The linker gets NVVM's code and not PTX: of PTX it makes code that can be linked further, where
    helpers are called and registers are kept free for them.
    """
    from cuda.core import Linker, LinkerOptions, ObjectCode

    major, minor = compute_capability
    linker = Linker(
        ObjectCode.from_ltoir(_compiled(function, arguments, compute_capability, threads, "ltoir")),
        options=LinkerOptions(arch=f"sm_{major}{minor}", link_time_optimization=True),
    )
    cubin = bytes(linker.link("cubin").code)
    return Compiled(entry_of(cubin), compute_capability, cubin)


def entry_of(cubin: bytes) -> str:
    """Return the name of the one kernel in machine code."""
    names = set(SECTION.findall(cubin))
    if len(names) != 1:
        raise ValueError(f"machine code with {len(names)} kernels: expected one")
    return str(names.pop(), "ascii")


def _compiled(
    function: Callable[..., None],
    arguments: tuple[ArraySpec | None, ...],
    compute_capability: tuple[int, int],
    threads: int,
    output: str,
) -> Any:
    from numba import cuda
    from numba.cuda import types

    signature = types.void(
        *(
            types.int64 if a is None else types.Array(getattr(types, a.dtype), a.ndim, "C")
            for a in arguments
        )
    )
    with compiling_for(compute_capability):
        code: Any
        code, _ = cuda.compile(
            function,
            signature,
            cc=compute_capability,
            device=False,
            abi="numba",
            output=output,
            launch_bounds=(threads, 1),
        )
    return code


@contextmanager
def compiling_for(compute_capability: tuple[int, int]) -> Iterator[None]:
    """Let Numba compile device functions for an architecture, whatever device is there, or none.

    Numba asks the current device for it. The lock that it compiles under is held meanwhile, so that
    no other thread's compilation sees the answer.
    """
    from numba.cuda import dispatcher
    from numba.cuda.core.compiler_lock import global_compiler_lock

    class Device:
        pass

    device: Any = Device()
    device.compute_capability = compute_capability
    with global_compiler_lock:
        asked = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: device
        try:
            yield
        finally:
            dispatcher.get_current_device = asked


def packed(shape: tuple[int, ...], itemsize: int, pointer: int) -> tuple[int, ...]:
    """Return what a kernel is passed for a C-contiguous array: 5 + 2 · ndim 64-bit integers.

    Two unused pointers, the number of elements, bytes of one, the address, then sizes and strides
    in bytes of all axes.
    """
    strides = []
    step = itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return 0, 0, step // itemsize, itemsize, pointer, *shape, *reversed(strides)
