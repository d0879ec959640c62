"""What a kernel takes of a multiprocessor, read from its machine code; no GPU is needed.

How Python becomes registers::

    from gpurnn import compiler, resources

    name, ptx = compiler.ptx_of(kernel, arguments, (9, 0), threads)
    print(resources.of_kernel(ptx, (9, 0)))
    print(resources.recurrent_loop(resources.sass_of(ptx, (9, 0))))

PTX is made machine code by ptxas; of a ``Compiled`` the machine code that it holds is read. Both
NVIDIA's tools come from PyPI: ``pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm``.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gpurnn import compiler
from gpurnn.compiler import Compiled
from gpurnn.sass import instruction_mix, multiply_adds, recurrent_loop

__all__ = [
    "Resources",
    "ToolMissing",
    "assemble",
    "instruction_mix",
    "listing_of",
    "multiply_adds",
    "of_kernel",
    "of_listing",
    "recurrent_loop",
    "sass_of",
    "sass_of_listing",
    "toolchain",
]

PACKAGES = {"ptxas": "nvidia-cuda-nvcc", "nvdisasm": "nvidia-cuda-nvdisasm"}
RESERVED = 1024  # bytes of a block's shared memory that the system keeps, from sm_90 on

ENTRY = re.compile(r'\.other\s+(\S+?),@"STO_CUDA_ENTRY')
FIELD = re.compile(
    r"//----- nvinfo : EIATTR_(FRAME_SIZE|MIN_STACK_SIZE|REGCOUNT)$"
    r".*?index@\((\S+)\)\s*/\*\w+\*/\s*\.word\s+(0x[0-9a-f]+)",
    re.DOTALL | re.MULTILINE,
)
ARCHITECTURE = re.compile(r"\.target\s+sm_(\d+)")
LOCAL = re.compile(r"\b(STL|LDL)((?:\.\w+)*)\s")


class ToolMissing(RuntimeError):
    """A program of NVIDIA's toolkit is not installed; the message says where it comes from."""


@dataclass(frozen=True)
class Resources:
    """A kernel's machine code in numbers.

    Args:
        registers: 32-bit registers of a thread.
        stack: bytes of local memory of a thread, which is as far away as global memory.
        spill_stores: bytes that the instructions store there, each counted once.
        spill_loads: bytes that they load from there.
        shared: bytes of static shared memory of a block, without what the system keeps.
        loop: instructions of the recurrent loop (``recurrent_loop``).
        multiply_adds: floating-point multiply-adds of a thread in it; its part of a warp's, on
            tensor cores.
        barriers: barriers of the block in it.
        useful: the share of the loop's instructions that are multiply-adds of the product, None
            where it was not said how many the product has.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    loop: int
    multiply_adds: int
    barriers: int
    useful: float | None


def of_kernel(
    kernel: Compiled | str, compute_capability: tuple[int, int] | None = None, *, product: int = 0
) -> Resources:
    """Return what a kernel takes.

    Args:
        kernel: PTX, or a compiled kernel.
        compute_capability: such as (9, 0), for PTX.
        product: multiply-adds between two barriers that the source asks for, which for a resident
            kernel are ``depth · columns · rows`` of its tile.

    Raises:
        ToolMissing: ptxas (for PTX) or nvdisasm is not installed.
        ValueError: ptxas does not accept the PTX.
    """
    return of_listing(listing_of(kernel, compute_capability), product=product)


def sass_of(kernel: Compiled | str, compute_capability: tuple[int, int] | None = None) -> str:
    """Return a kernel's machine code as nvdisasm lists it; the rest is as in ``of_kernel``."""
    return sass_of_listing(listing_of(kernel, compute_capability))


def of_listing(listing: str, *, product: int = 0) -> Resources:
    """Return what the kernel takes of which ``listing`` is all that nvdisasm prints.

    Raises:
        ValueError: there is no kernel in it, or more than one, or a number is missing.
    """
    name, code = _entry(listing), sass_of_listing(listing)
    fields = {(kind, of): int(value, 16) for kind, of, value in FIELD.findall(listing)}
    if ("REGCOUNT", name) not in fields or ("FRAME_SIZE", name) not in fields:
        raise ValueError(f"the listing says not how many registers and how much stack {name} has")
    spilled = {"STL": 0, "LDL": 0}
    for opcode, modifiers in LOCAL.findall(code):
        widths = [int(m) // 8 for m in modifiers.split(".") if m in ("64", "128")]
        spilled[opcode] += widths[0] if widths else 4
    loop = recurrent_loop(code)
    mix = instruction_mix(loop)
    instructions, barriers = mix.total(), mix["BAR"]
    useful = None
    if product and instructions:
        # A compiler that has unrolled the loop leaves a barrier for every round.
        useful = product * max(1, barriers) / instructions
    return Resources(
        registers=fields["REGCOUNT", name],
        stack=max(fields["FRAME_SIZE", name], fields.get(("MIN_STACK_SIZE", name), 0)),
        spill_stores=spilled["STL"],
        spill_loads=spilled["LDL"],
        shared=_shared(listing, name),
        loop=instructions,
        multiply_adds=multiply_adds(loop),
        barriers=barriers,
        useful=useful,
    )


def listing_of(kernel: Compiled | str, compute_capability: tuple[int, int] | None = None) -> str:
    """Return all that nvdisasm prints of a kernel; the rest is as in ``of_kernel``."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        if isinstance(kernel, Compiled):
            cubin.write_bytes(kernel.cubin)
        elif compute_capability is None:
            raise TypeError("compute_capability is None: expected one such as (9, 0) with PTX")
        else:
            cubin.write_bytes(assemble(kernel, compute_capability))
        return _run("nvdisasm", str(cubin))


def assemble(ptx: str, compute_capability: tuple[int, int]) -> bytes:
    """Return what ptxas makes of PTX.

    Raises:
        ToolMissing: there is no ptxas.
        ValueError: ptxas refuses the PTX; the message is its own.
    """
    major, minor = compute_capability
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        _run("ptxas", f"-arch=sm_{major}{minor}", str(source), "-o", str(cubin))
        return cubin.read_bytes()


def sass_of_listing(listing: str) -> str:
    """Return the kernel's instructions out of all that nvdisasm prints."""
    name = re.escape(_entry(listing))
    found = re.search(rf"^\.text\.{name}:$.*?(?=^//-----|\Z)", listing, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"no section .text.{name} in the listing")
    return found[0].rstrip() + "\n"


def toolchain() -> str:
    """Return the versions that the numbers depend on, in one line."""
    found = re.search(r"V(\d[\d.]*)", _run("ptxas", "--version"))
    return f"{compiler.toolchain()} ptxas={found[1] if found else 'unknown'}"


def _entry(listing: str) -> str:
    names = ENTRY.findall(listing)
    if len(names) != 1:
        raise ValueError(f"{len(names)} kernels in the listing ({', '.join(names)}), not one")
    return str(names[0])


def _shared(listing: str, name: str) -> int:
    found = re.search(rf"^\.nv\.shared\.{re.escape(name)}:\n\s*\.zero\s+(\d+)", listing, re.M)
    if found is None:
        return 0
    architecture = ARCHITECTURE.search(listing)
    if architecture is None:
        raise ValueError("the listing says not for which architecture it is")
    return int(found[1]) - (RESERVED if int(architecture[1]) >= 90 else 0)


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_path(tool), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise ValueError(f"{tool} ends with {done.returncode}: {said}")
    return done.stdout


def _path(tool: str) -> str:
    try:
        from cuda.pathfinder import find_nvidia_binary_utility
    except ImportError as e:
        raise ToolMissing(
            f"{tool} is looked for with cuda.pathfinder, which could not be imported ({e}): "
            f"pip install cuda-pathfinder {PACKAGES[tool]}"
        ) from e
    path = find_nvidia_binary_utility(tool)
    if path is None:
        raise ToolMissing(f"{tool} is not installed: pip install {PACKAGES[tool]}")
    return str(path)
