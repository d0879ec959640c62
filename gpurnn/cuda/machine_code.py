"""Machine code of kernels, compiled once and kept, in this process and on disk.

On disk it lies in ``kernels`` in the user's cache folder (``$GPURNN_CACHE`` names another), a file
for each kernel, architecture and version of everything that went into it. Kernels with the user's
own activation are kept for the process only.
"""

import os
import warnings
from functools import cache
from hashlib import sha256
from pathlib import Path

from gpurnn import compiler, files
from gpurnn.cuda.specs import KernelSpec, build, signature

__all__ = ["cache_folder", "cubin"]


def cache_folder() -> Path:
    """Return where machine code is kept between processes."""
    named = os.environ.get("GPURNN_CACHE")
    if named:
        return Path(named) / "kernels"
    import pooch

    return Path(pooch.os_cache("gpurnn")) / "kernels"


@cache
def cubin(spec: KernelSpec, compute_capability: tuple[int, int]) -> bytes:
    """Return a kernel's machine code.

    A cache folder that cannot be written is warned of once, and done without.
    """
    path = cache_folder() / f"{_key(spec, compute_capability)}.cubin" if spec.lasting else None
    if path is not None and path.exists():
        return path.read_bytes()
    code = _compiled(spec, compute_capability)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            own = path.with_suffix(f".{os.getpid()}")  # another process may write the same now
            files.write_atomically(own, code)
            own.replace(path)
        except OSError as e:
            warnings.warn(
                f"compiled kernels cannot be kept in {path.parent} ({e}); each process compiles "
                "them again. GPURNN_CACHE names another folder",
                stacklevel=2,
            )
    return code


def _compiled(spec: KernelSpec, compute_capability: tuple[int, int]) -> bytes:
    from numba.core.errors import NumbaError

    try:
        compiled = compiler.compile_kernel(
            build(spec), signature(spec), compute_capability, spec.threads
        )
    except NumbaError as e:
        if spec.lasting:
            raise
        raise TypeError(
            f"activation is {spec.activation!r}, which Numba cannot compile for a GPU: expected "
            f"arithmetic, comparisons and functions of math on one float. Numba says: {e}"
        ) from e
    return compiled.cubin


def _key(spec: KernelSpec, compute_capability: tuple[int, int]) -> str:
    parts = (spec.kind, spec.sizes, spec.activation, spec.dtype, spec.scaled, compute_capability)
    return sha256(repr((parts, _origin())).encode()).hexdigest()[:40]


@cache
def _origin() -> str:
    """Return a digest of the kernels' source and of the versions of what compiles it."""
    import gpurnn.kernels

    sources = [Path(compiler.__file__), Path(__file__).with_name("specs.py")]
    for folder in gpurnn.kernels.__path__:
        sources += sorted(Path(folder).glob("*.py"))
    found = sha256(compiler.toolchain().encode())
    for source in sources:
        found.update(source.read_bytes())
    return found.hexdigest()
