"""Arrays of other libraries that lie on a GPU, taken in without a copy."""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn.cuda.engines import Array, Engine, GPUEngine, cupy, current_emulation

__all__ = [
    "beside",
    "copied",
    "engine_of",
    "gpu_of",
    "home_of",
    "library_of",
    "on_gpu",
    "on_host",
    "taken",
]

DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


def on_gpu(a: object) -> bool:
    """Whether ``a`` is an array on a CUDA GPU, of whatever library.

    Raises:
        TypeError: its library cannot say, an array on several devices at once for one.
    """
    if a is None or type(a) is np.ndarray:
        return False
    if not hasattr(type(a), "__dlpack_device__"):
        return hasattr(a, "__cuda_array_interface__")
    try:
        kind, _ = a.__dlpack_device__()  # type: ignore[attr-defined]
    except Exception as e:
        raise TypeError(
            f"an argument is a {_kind(a)} that does not say where it lies ({e}): expected an array "
            "on one device"
        ) from e
    return kind in DLPACK_CUDA


def taken(arguments: Mapping[str, object]) -> tuple[GPUEngine, dict[str, Array | None]]:
    """Return the device where all of these arrays lie, and the arrays as CuPy's, in no new memory.

    Raises:
        TypeError: an array lies in the host's memory, or its library does not hand it out.
        ValueError: an array lies on another device than the first, has no memory behind it, or
            does not begin at a multiple of its element's size.
    """
    given: dict[str, Any] = {name: a for name, a in arguments.items() if a is not None}
    native = getattr(sys.modules.get("cupy"), "ndarray", None)
    here = [name for name, a in given.items() if type(a) is native or on_gpu(a)]
    if len(here) < len(given):
        away = [name for name in given if name not in here]
        away_is = f"{away[0]} is a {_kind(given[away[0]])}"
        if not here:
            raise TypeError(f"{away_is}: expected an array on a GPU, as in the forward pass")
        raise TypeError(
            f"{here[0]} is a {_kind(given[here[0]])} on a GPU but {away_is}: expected all arrays "
            "on one GPU, or each a numpy.ndarray"
        )
    found = {name: a if type(a) is native else _taken(name, a) for name, a in given.items()}
    first = next(iter(found))
    device = found[first].device.id
    for name, a in found.items():
        if a.device.id != device:
            raise ValueError(
                f"{name} is on CUDA device {a.device.id} but {first} on {device}: "
                "expected all arrays on one device"
            )
        address = a.data.ptr
        if a.size and not address:
            raise ValueError(f"{name} has no memory behind it: it has been freed")
        if address % a.itemsize:
            raise ValueError(
                f"{name} begins at the address {address}: expected a multiple of {a.itemsize}, the "
                f"size of its {a.dtype} in bytes"
            )
    return GPUEngine(device), {name: found.get(name) for name in arguments}


def engine_of(a: Array) -> Engine | None:
    """Return what computes with ``a``, a NumPy or CuPy array; None is NumPy itself."""
    return gpu_of(a) or current_emulation()


def gpu_of(a: Array) -> GPUEngine | None:
    """Return the GPU that ``a``, a NumPy or CuPy array, lies on; None is the host's memory."""
    return GPUEngine(a.device.id) if on_gpu(a) else None


def library_of(a: Array) -> Any:
    """Return the library that made ``a``, a NumPy or CuPy array."""
    return cupy() if on_gpu(a) else np


def on_host(a: Array) -> NDArray[Any]:
    """Return a NumPy array as it is, a CuPy array as a copy in the host's memory."""
    if on_gpu(a):
        return GPUEngine(a.device.id).fetched(a)
    found: NDArray[Any] = a
    return found


def copied(a: Array) -> Array:
    """Return a copy where ``a``, a NumPy or CuPy array, lies."""
    with home_of(a):
        return a.copy()


def beside(a: Array, other: Array) -> Array:
    """Return a NumPy array ``a`` in the memory where ``other`` lies; any other as it is."""
    if not isinstance(a, np.ndarray) or on_gpu(a) or not on_gpu(other):
        return a
    with home_of(other):
        return cupy().array(a)


def home_of(a: Array) -> AbstractContextManager[object]:
    """Return a context in which what is computed from ``a``, NumPy's or CuPy's, lies where it does.

    CuPy makes new arrays on its current device, wherever those lie that they are made of.
    """
    home: AbstractContextManager[object] = a.device if on_gpu(a) else nullcontext()
    return home


def _taken(name: str, a: Any) -> Array:
    xp = cupy()
    if isinstance(a, xp.ndarray):
        array = a
    else:
        try:
            array = xp.from_dlpack(a) if hasattr(type(a), "__dlpack__") else xp.asarray(a)
        except (MemoryError, xp.cuda.runtime.CUDARuntimeError):
            raise  # the GPU's fault, not the array's
        except Exception as e:
            raise TypeError(
                f"{name} is a {_kind(a)} that does not hand out its memory ({e}): expected an "
                "array that CuPy can take without a copy (a PyTorch tensor needs .detach())"
            ) from e
    return array


def _kind(a: object) -> str:
    return f"{type(a).__module__}.{type(a).__qualname__}"
