"""Machine code of kernels, compiled once and kept, in this process and on disk.

On disk it lies in ``kernels`` in the user's cache folder (``$GPURNN_CACHE`` names another), a file
for each kernel, architecture and version of everything that went into it. Kernels with the user's
own activation are kept for the process only.
"""

import os
import threading
import warnings
from dataclasses import astuple
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path

from gpurnn import compiler, dense, files, narrowing, slots, tile
from gpurnn.cuda import specs
from gpurnn.cuda.specs import MOST_KEPT, KernelSpec, build, signature

__all__ = ["cache_folder", "cubin", "sources"]

DIGEST = 32  # bytes of a SHA-256 before the code in a file

_ONE_AT_A_TIME = threading.Lock()


def cache_folder() -> Path:
    """Return where machine code is kept between processes."""
    named = os.environ.get("GPURNN_CACHE")
    if named:
        return Path(named) / "kernels"
    import pooch

    return Path(pooch.os_cache("gpurnn")) / "kernels"


@lru_cache(maxsize=MOST_KEPT)
def cubin(spec: KernelSpec, compute_capability: tuple[int, int]) -> bytes:
    """Return a kernel's machine code.

    Where the cache folder cannot be read or written, each kernel is compiled anew, with a warning.
    """
    with _ONE_AT_A_TIME:
        if not spec.lasting:
            return _compiled(spec, compute_capability)
        path = cache_folder() / f"{_key(spec, compute_capability)}.cubin"
        code = None
        try:
            code = _read(path)
            if code is None:
                code = _compiled(spec, compute_capability)
                _write(path, code)
        except OSError as e:
            warnings.warn(
                f"compiled kernels cannot be kept in {path.parent} ({e}); each process compiles "
                "them again. GPURNN_CACHE names another folder",
                stacklevel=2,
            )
        return code or _compiled(spec, compute_capability)


def _read(path: Path) -> bytes | None:
    """Return what ``_write`` wrote; None if it is not there, or not whole."""
    if not path.exists():
        return None
    content = path.read_bytes()
    digest, code = content[:DIGEST], content[DIGEST:]
    return code if sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_suffix(f".{os.getpid()}")  # another process may write the same now
    files.write_atomically(own, sha256(code).digest() + code)
    own.replace(path)


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
    return sha256(repr((astuple(spec), compute_capability, _origin())).encode()).hexdigest()[:40]


@cache
def _origin() -> str:
    """Return a digest of the kernels' source and of the versions of what compiles it."""
    found = sha256(compiler.toolchain().encode())
    for source in sources():
        found.update(source.read_bytes())
    return found.hexdigest()


def sources() -> list[Path]:
    """Return the files that machine code depends on."""
    import gpurnn.kernels

    modules = (compiler, specs, dense, tile, narrowing, slots)
    used = [Path(module.__file__) for module in modules if module.__file__]
    for folder in gpurnn.kernels.__path__:
        used += sorted(Path(folder).glob("*.py"))
    return used
