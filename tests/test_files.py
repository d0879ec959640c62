"""Writing a file whole or not at all: at every moment, and whatever fails."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpurnn.files import write_atomically

OLD = b"the old content\n" * 40
NEW = bytes(range(256)) * 5

PYTHON = [sys.executable, "-W", "ignore::DeprecationWarning"]  # of os.fork beside BLAS's threads

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals, modes and limits")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file with the old content, alone in its folder."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(OLD)
    return path


def assert_alone(path: Path, *contents: bytes) -> None:
    """Require one of the contents in the file, and no other file beside it."""
    assert path.read_bytes() in contents
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# What it writes


@pytest.mark.parametrize("content", [b"", b"x", NEW, bytes(3_000_000)], ids=len)
def test_new_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "new"
    write_atomically(path, content)
    assert_alone(path, content)


@pytest.mark.parametrize("content", [b"", NEW], ids=len)
def test_old_file_is_replaced(target: Path, content: bytes) -> None:
    write_atomically(target, content)
    assert_alone(target, content)


@pytest.mark.parametrize("kind", [str, Path])
def test_relative_path(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomically(kind("here"), NEW)
    assert_alone(tmp_path / "here", NEW)


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o666, 0o444])
def test_mode_of_the_old_file_is_kept(target: Path, mode: int) -> None:
    target.chmod(mode)
    write_atomically(target, NEW)
    assert target.stat().st_mode & 0o7777 == mode
    assert_alone(target, NEW)


@posix
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "new", NEW)
    finally:
        left = os.umask(before)
    assert left == mask, "the process's own umask has changed"
    assert (tmp_path / "new").stat().st_mode & 0o7777 == mode


@posix
def test_link_is_followed(target: Path) -> None:
    link = target.parent / "folder" / "link"
    link.parent.mkdir()
    link.symlink_to(Path("..", target.name))
    write_atomically(link, NEW)
    assert link.is_symlink()
    assert target.read_bytes() == NEW
    assert [p.name for p in link.parent.iterdir()] == ["link"]


@posix
def test_link_to_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("new")
    write_atomically(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new").read_bytes() == NEW


@posix
def test_what_a_killed_process_left_is_replaced(target: Path) -> None:
    left = target.with_name(f".{target.name}.new")
    left.write_bytes(bytes(10_000))
    write_atomically(target, NEW)
    assert_alone(target, NEW)


@posix
def test_link_in_the_place_of_the_new_file_is_not_followed(target: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(OLD)
    target.with_name(f".{target.name}.new").symlink_to(elsewhere)
    write_atomically(target, NEW)
    assert elsewhere.read_bytes() == OLD
    assert target.read_bytes() == NEW
    assert {p.name for p in tmp_path.iterdir()} == {target.name, "elsewhere"}
    assert not target.is_symlink()


# At every moment

KILLED_AT_EVERY_LINE = """
import json, os, signal, sys
from pathlib import Path
from gpurnn import files

target, old, new = Path(sys.argv[1]), *(bytes.fromhex(a) for a in sys.argv[2:])
found = []
while True:
    target.write_bytes(old)
    child = os.fork()
    if child == 0:
        lines = 0
        def trace(frame, event, arg):
            global lines
            if frame.f_code.co_filename != files.__file__:
                return None
            if event in ("line", "return"):
                lines += 1
                if lines > len(found):
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        files.write_atomically(target, new)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    beside = [p.name for p in target.parent.iterdir() if p != target]
    found.append((target.read_bytes().hex(), beside))
    if not os.WIFSIGNALED(status):
        break
print(json.dumps(found))
"""


@posix
def test_killed_before_each_line_the_file_is_the_old_or_the_new_one(target: Path) -> None:
    done = subprocess.run(
        [*PYTHON, "-c", KILLED_AT_EVERY_LINE, str(target), OLD.hex(), NEW.hex()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    *killed, finished = json.loads(done.stdout)
    assert finished == [NEW.hex(), []]
    contents = [content for content, _ in killed]
    assert len(contents) > 10  # the kills came
    switched = contents.index(NEW.hex())
    assert switched > 0
    assert contents == [OLD.hex()] * switched + [NEW.hex()] * (len(contents) - switched)
    # Over all these kills no more than one file has ever been left, which the next write replaced.
    assert {tuple(beside) for _, beside in killed} == {(), (f".{target.name}.new",)}


def test_a_reader_sees_no_mixture(target: Path) -> None:
    one, two = b"1" * 200_000, b"2" * 300_000
    seen, stop = set[bytes](), threading.Event()
    target.write_bytes(one)

    def read() -> None:
        while not stop.is_set():
            content = target.read_bytes()
            seen.add(content if content in (one, two) else b"mixture")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(40):
            write_atomically(target, two)
            write_atomically(target, one)
    finally:
        stop.set()
        reader.join()
    assert b"mixture" not in seen
    assert seen <= {one, two} and seen


@posix
def test_content_is_on_the_disk_before_its_name_and_then_the_name(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    flushed: list[tuple[str, bytes]] = []

    def recording(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), target.parent.stat()):
            flushed.append(("folder", target.read_bytes()))
        else:
            beside = next(p for p in target.parent.iterdir() if p != target)
            assert os.path.samestat(os.fstat(descriptor), beside.stat())
            assert beside.read_bytes() == NEW
            flushed.append(("file", target.read_bytes()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    write_atomically(target, NEW)
    assert flushed == [("file", OLD), ("folder", NEW)]


# Whatever fails


@contextmanager
def broken(call: str, error: BaseException, at_call: int = 1) -> Iterator[None]:
    """Let call number ``at_call`` of a function of ``os`` fail; its other calls do nothing."""
    calls = 0

    def fail(*args: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, fail)
        yield


CALLS = ["fsync", "chmod", "replace"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_failed_call_leaves_the_old_file_alone(target: Path, call: str, number: int) -> None:
    error = OSError(number, os.strerror(number))
    with broken(call, error), pytest.raises(OSError) as caught:
        write_atomically(target, NEW)
    assert caught.value.errno == number
    assert caught.value.filename == str(target)
    assert_alone(target, OLD)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_any_interruption_leaves_the_old_file_alone(
    target: Path, call: str, error: type[BaseException]
) -> None:
    with broken(call, error()), pytest.raises(error):
        write_atomically(target, NEW)
    assert_alone(target, OLD)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_leaves_no_new_file(tmp_path: Path, call: str) -> None:
    with broken(call, OSError(errno.EIO, "worn out")), pytest.raises(OSError):
        write_atomically(tmp_path / "new", NEW)
    assert list(tmp_path.iterdir()) == []


@posix
def test_failed_flush_of_the_folder_leaves_a_whole_file(target: Path) -> None:
    with broken("fsync", OSError(errno.EIO, "worn out"), at_call=2), pytest.raises(OSError):
        write_atomically(target, NEW)
    assert_alone(target, OLD, NEW)


def test_failures_leave_no_open_file(target: Path) -> None:
    def lowest_free() -> int:
        descriptor = os.open(target, os.O_RDONLY)
        os.close(descriptor)
        return descriptor

    free = lowest_free()
    for call in CALLS:
        for at_call in (1, 2):
            error = OSError(errno.EIO, "worn out")
            with broken(call, error, at_call), contextlib.suppress(OSError):
                write_atomically(target, NEW)
    assert lowest_free() == free


def test_missing_folder(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "model"
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(path, NEW)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file(target: Path) -> None:
    path = target / "model"
    with pytest.raises(NotADirectoryError) as caught:
        write_atomically(path, NEW)
    assert caught.value.filename == str(path)
    assert_alone(target, OLD)


def test_path_that_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "inside").write_bytes(OLD)
    with pytest.raises(OSError) as caught:
        write_atomically(folder, NEW)
    assert caught.value.filename == str(folder)
    assert_alone(folder / "inside", OLD)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@posix
def test_path_that_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # or a writer that opens it waits for ever
    try:
        with pytest.raises(OSError) as caught:
            write_atomically(pipe, NEW)
    finally:
        os.close(reader)
    assert caught.value.filename == str(pipe)
    assert pipe.is_fifo()
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


@posix
@pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere"
)
def test_read_only_folder(target: Path) -> None:
    target.parent.chmod(0o555)
    try:
        with pytest.raises(PermissionError) as caught:
            write_atomically(target, NEW)
        assert caught.value.filename == str(target)
        assert_alone(target, OLD)
    finally:
        target.parent.chmod(0o755)


# Full disks

BEYOND_THE_LIMIT = """
import errno, resource, signal, sys
from gpurnn.files import write_atomically

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    write_atomically(sys.argv[1], bytes(int(sys.argv[3])))
except OSError as e:
    print(errno.errorcode[e.errno], e.filename)
"""


@posix
@pytest.mark.parametrize("size", [4_097, 10_000, 1_000_000])
def test_write_that_breaks_off_at_a_size_limit(target: Path, size: int) -> None:
    limit = 4_096
    done = subprocess.run(
        [*PYTHON, "-c", BEYOND_THE_LIMIT, str(target), str(limit), str(size)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"EFBIG {target}\n"
    assert_alone(target, OLD)


@posix
def test_write_up_to_the_size_limit(target: Path) -> None:
    done = subprocess.run(
        [*PYTHON, "-c", BEYOND_THE_LIMIT, str(target), "4096", "4096"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert_alone(target, bytes(4096))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB of its own, where this user may mount one."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if sys.platform != "linux" or mount is None or umount is None:
        pytest.skip("needs Linux's mount and tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"this user may not mount a disk: {made.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run([umount, str(disk)], timeout=60, check=True)


def test_read_only_disk(small_disk: Path) -> None:
    target = small_disk / "model"
    target.write_bytes(OLD)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], timeout=60, check=True)
    with pytest.raises(OSError) as caught:
        write_atomically(target, NEW)
    assert caught.value.errno == errno.EROFS
    assert caught.value.filename == str(target)
    assert_alone(target, OLD)


def test_full_disk(small_disk: Path) -> None:
    target = small_disk / "model"
    write_atomically(target, b"o" * 32_768)
    with pytest.raises(OSError) as caught:
        write_atomically(target, b"n" * 49_152)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(target)
    assert_alone(target, b"o" * 32_768)
    write_atomically(target, b"n" * 24_576)  # what the failure took has been given back
    assert_alone(target, b"n" * 24_576)


def test_disk_without_room_for_a_name(small_disk: Path) -> None:
    target = small_disk / "model"
    write_atomically(target, OLD)
    filler = small_disk / "filler"
    with pytest.raises(OSError):
        filler.write_bytes(bytes(100_000))
    with pytest.raises(OSError) as caught:
        write_atomically(target, NEW)
    assert caught.value.errno == errno.ENOSPC
    filler.unlink()
    assert_alone(target, OLD)
