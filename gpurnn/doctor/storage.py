"""The folder in which compiled kernels are kept."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpurnn.doctor.findings import Finding

__all__ = ["kernel_cache"]

ADVICE = "name another folder in GPURNN_CACHE; without one each process compiles its kernels again"


def kernel_cache() -> Iterator[Finding]:
    """Yield where compiled kernels are kept, whether that can be written, and how much is there."""
    from gpurnn.cuda.machine_code import cache_folder

    folder = cache_folder()
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as e:
        yield Finding("kernel cache", "warning", f"{folder} cannot be written: {e}", ADVICE)
        return
    kept = _kept(folder)
    size = sum(path.stat().st_size for path in kept)
    yield Finding("kernel cache", "ok", f"{folder}: {len(kept)} kept, {size / 2**20:.1f} MiB")


def _kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.cubin")) if folder.is_dir() else []
