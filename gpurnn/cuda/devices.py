"""Devices by the names that users give them."""

import os
import re
import shutil

from gpurnn.cuda.engines import GPUEngine, cupy, limits_of
from gpurnn.cuda.packages import needed

__all__ = ["chosen", "driver_present", "named"]


def named(device: str) -> GPUEngine | None:
    """Return the GPU that "cuda" (CuPy's current one) or "cuda:N" names; None for "cpu".

    Raises:
        TypeError, ValueError: it is no such name, or there is no such GPU.
        ImportError: a GPU is meant, and a package that it needs is not installed.
    """
    wanted = f"device is {device!r}: expected 'cpu', 'cuda' or 'cuda:N'"
    if not isinstance(device, str):
        raise TypeError(wanted)
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise ValueError(wanted)
    needed("numba.cuda", "kernels are compiled by numba-cuda", "cuda13")
    cuda = cupy().cuda
    try:
        index = int(cuda.Device().id) if match[1] is None else int(match[1])
    except cuda.runtime.CUDARuntimeError as e:
        raise ValueError(f"device is {device!r} and there is no GPU that can be used: {e}") from e
    limits_of(index)
    return GPUEngine(index)


def driver_present() -> bool:
    """Whether this machine looks as if it had an NVIDIA GPU, whatever is installed to use it."""
    paths = ("/dev/nvidiactl", "/dev/dxg")
    return shutil.which("nvidia-smi") is not None or any(map(os.path.exists, paths))


def chosen(device: str) -> tuple[str, Exception | None]:
    """Return the device that a command shall use, and if it was left to us, why it is no GPU.

    "auto" is CuPy's current GPU if there is one that can be used, and else the CPU.

    Raises:
        TypeError, ValueError, ImportError: as ``named`` does, for a device that is named.
    """
    if device != "auto":
        engine = named(device)
        return ("cpu" if engine is None else f"cuda:{engine.index}"), None
    try:
        engine = named("cuda")
    except (ImportError, ValueError) as e:
        return "cpu", e
    assert engine is not None
    return f"cuda:{engine.index}", None
