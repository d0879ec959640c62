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
        _write_beside_and_rename(Path(os.path.realpath(target)), content)
    except OSError as e:  # the system names the new file, or none: name the one that was meant
        raise OSError(e.errno, e.strerror or str(e), str(target)) from e


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
    """Flush the rename itself, where the system lets a folder be opened and flushed.

    The file has its new content by now, so a refusal is no failure to write it: some folders may be
    written but not read, and some file systems do not flush folders.
    """
    if os.name != "posix":
        return
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        if descriptor is not None:
            os.close(descriptor)
