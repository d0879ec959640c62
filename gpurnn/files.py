"""Writing a file whole or not at all."""

import contextlib
import errno
import os
import stat
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path``; at every moment the old or the new file is there, whole.

    The bytes go to a file named ``.NAME.new`` beside it, are flushed to the disk, and that file
    takes the name. If anything fails before that, on a full disk say, the old file stays as it was
    and the new one is removed; one that a killed process left is replaced. The file's permissions
    stay, and a link is followed. Two processes must not write the same file at once.

    Raises:
        OSError: the folder is missing or read-only, the disk is full, ``path`` is something other
            than a file, …; ``filename`` is ``path``.
    """
    target = Path(path)
    try:
        _write_beside_and_rename(target.resolve(), content)
    except OSError as e:  # the system names the new file, or none: name the one that was meant
        raise OSError(e.errno, e.strerror, str(target)) from e


def _write_beside_and_rename(target: Path, content: bytes) -> None:
    mode = target.stat().st_mode if target.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "exists and is not a regular file")
    beside = target.with_name(f".{target.name}.new")
    beside.unlink(missing_ok=True)  # left by a process that was killed
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        if mode is not None:
            beside.chmod(stat.S_IMODE(mode))
        beside.replace(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Flush the rename itself; only POSIX lets a folder be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
