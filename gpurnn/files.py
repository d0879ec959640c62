"""Writing a file whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path``; at every moment the old or the new file is there, whole.

    The bytes go to a new file beside it, are flushed to the disk, and the new name replaces the
    old. If anything fails, on a full disk say, the new file is removed and the old one stays.

    Raises:
        OSError: the folder is missing or read-only, the disk is full, …; ``filename`` is ``path``.
    """
    target = Path(path)
    try:
        _write_beside_and_rename(target, content)
    except OSError as e:  # the system names the new file, or none: name the one that was meant
        raise OSError(e.errno, e.strerror, str(target)) from e


def _write_beside_and_rename(target: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".new")
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        beside.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        beside.replace(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        raise
    _sync_folder(target.parent)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    """Flush the rename itself; only POSIX lets a folder be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
