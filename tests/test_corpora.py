"""Corpora: by name, from a file, over a loopback server, and every way that can fail."""

import gc
import hashlib
import http.server
import io
import logging
import platform
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pooch
import pytest
from timemachine import SHA1, require_time_machine

from gpurnn.text import CORPORA, Corpus, CorpusError, corpora, load_corpus

STORY = b"The Time Machine, by a test\n\nI\n"
STORY_SHA1 = hashlib.sha1(STORY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Answers every request with ``body``, claiming ``length`` bytes; counts the requests."""

    body = STORY
    length = len(STORY)
    status = 200
    requests = 0


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(self.server.length))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make the cache an empty folder, the Time Machine the test's story, and the net loopback."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(pooch, "os_cache", lambda project: folder)
    monkeypatch.setattr(corpora, "TIME_MACHINE_SHA1", STORY_SHA1)
    monkeypatch.setattr(corpora, "TIME_MACHINE_URL", "http://127.0.0.1:1/not-set-by-this-test")
    monkeypatch.delenv("GPURNN_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    level = pooch.get_logger().level
    pooch.get_logger().setLevel(logging.DEBUG)
    yield folder
    gc.collect()  # a connection that was left open warns now, in the test that left it
    assert pooch.get_logger().level == logging.DEBUG, "the level of pooch's logger was changed"
    pooch.get_logger().setLevel(level)


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}/timemachine.txt"
        monkeypatch.setattr(corpora, "TIME_MACHINE_URL", url)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def file(folder: Path, data: bytes, name: str = "text.txt") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(data)
    return path


# Files


def test_file(tmp_path: Path) -> None:
    path = file(tmp_path, "Où? Là.\n".encode())
    corpus = load_corpus(str(path))
    assert corpus.text == "Où? Là.\n"
    assert corpus.name == str(path)
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert corpus.origin == f"the file {path}"
    assert load_corpus(path) == corpus


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\r\nb\rc\n\r\nd", "a\nb\nc\n\nd"),
        (b"\xef\xbb\xbfafter the mark", "after the mark"),
        (b"a\xef\xbb\xbfb", "a\ufeffb"),
        (b"\n", "\n"),
    ],
)
def test_newlines_and_byte_order_mark(tmp_path: Path, data: bytes, text: str) -> None:
    corpus = load_corpus(file(tmp_path, data))
    assert corpus.text == text
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf"])
def test_empty_file(tmp_path: Path, data: bytes) -> None:
    path = file(tmp_path, data)
    with pytest.raises(CorpusError) as caught:
        load_corpus(path)
    assert str(caught.value) == f"corpus {str(path)!r} is empty"


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"na\xefve\n", "byte 0xef at offset 2 (invalid continuation byte)"),
        (b"\xef\xbb\xbfab\xff", "byte 0xff at offset 5 (invalid start byte)"),
        (b"a\r\n\xe2\x82", "byte 0xe2 at offset 3 (unexpected end of data)"),
    ],
)
def test_file_that_is_not_utf8(tmp_path: Path, data: bytes, place: str) -> None:
    path = file(tmp_path, data)
    with pytest.raises(CorpusError) as caught:
        load_corpus(path)
    message = str(caught.value)
    assert message.startswith(f"corpus {str(path)!r} is not UTF-8: {place}; convert it first")
    assert "iconv -f LATIN1 -t UTF-8" in message


@pytest.mark.parametrize("name", ["time_machine", "", "no/such/file.txt"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(CorpusError) as caught:
        load_corpus(name)
    assert str(caught.value) == (
        f"corpus {name!r} is neither a known name nor a file; a corpus is 'python-docs' or "
        "'time-machine' or the path of a UTF-8 text file"
    )


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        load_corpus(tmp_path)
    assert str(caught.value).startswith(f"corpus {str(tmp_path)!r} is a folder; a corpus is")


@pytest.mark.parametrize("path", ["nul\0byte", "x" * 5_000])
def test_path_that_cannot_be(path: str) -> None:
    with pytest.raises(CorpusError, match=r"cannot be read \(.+\); a corpus is 'python-docs'"):
        load_corpus(path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permissions do not bind a superuser, who may well run the tests: refuse in open's place.
    path = file(tmp_path, b"secret")

    def refuse(path: str) -> bytes:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(corpora, "_read", refuse)
    with pytest.raises(CorpusError, match=r"cannot be read \(Permission denied\); a corpus is"):
        load_corpus(path)


@pytest.mark.parametrize("value", [b"time-machine", 3, None])
def test_neither_string_nor_path(value: object) -> None:
    with pytest.raises(TypeError, match="str"):
        load_corpus(value)


def test_name_wins_over_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file(tmp_path, b"mine", "python-docs")
    assert load_corpus("python-docs").text != "mine"
    assert load_corpus("./python-docs").text == "mine"
    assert load_corpus(Path("python-docs")).text == "mine"


def test_corpus_hashes_its_text_and_hides_it_from_its_repr() -> None:
    corpus = Corpus(name="é", text="Où?", origin="here")
    assert corpus.sha256 == hashlib.sha256("Où?".encode()).hexdigest()
    assert "Où?" not in repr(corpus) and corpus.sha256 in repr(corpus)


def test_named_corpora() -> None:
    assert CORPORA == ("python-docs", "time-machine")


# python-docs


def test_python_docs() -> None:
    pytest.importorskip("pydoc_data.topics", reason="this Python has no pydoc_data")
    corpus = load_corpus("python-docs")
    paragraphs = corpus.text.split("\n\n")
    assert corpus.name == "python-docs"
    assert platform.python_version() in corpus.origin
    assert corpus.text.isascii() and len(corpus.text) > 250_000
    assert len(set(paragraphs)) == len(paragraphs) > 2_000
    assert load_corpus("python-docs") == corpus


def fake_topics(monkeypatch: pytest.MonkeyPatch, topics: dict[str, str]) -> None:
    module = types.ModuleType("pydoc_data.topics")
    module.topics = topics
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)


def test_python_docs_paragraphs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_topics(
        monkeypatch,
        {
            "b": "\nSee “also”\n   indented\n\n   example\n\nTitle\n",
            "a": "Title\n*****\n \nSee also\n   indented\n\n…\n\nexample\n",
        },
    )
    assert load_corpus("python-docs").text == (
        "Title\n*****\n\nSee also\n   indented\n\nexample\n\n   example\n\nTitle"
    )


def test_python_docs_of_a_python_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CorpusError) as caught:
        load_corpus("python-docs")
    message = str(caught.value)
    assert platform.python_version() in message and "pydoc_data.topics" in message
    assert message.endswith(
        "install the complete standard library, or give the path of a text file instead"
    )


def test_python_docs_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_topics(monkeypatch, {"a": " \n\n…\n"})
    with pytest.raises(CorpusError, match="corpus 'python-docs' is empty"):
        load_corpus("python-docs")


# time-machine


def test_the_time_machine_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = require_time_machine()
    file(tmp_path, text.encode(), "timemachine.txt")
    monkeypatch.setenv("GPURNN_DATA", str(tmp_path))
    corpus = load_corpus("time-machine")
    assert corpus.text == text and len(text) == corpora.TIME_MACHINE_BYTES == 178_979
    assert corpora.TIME_MACHINE_SHA1 == SHA1
    assert corpus.origin == "The Time Machine, H. G. Wells, from $GPURNN_DATA"


def test_data_folder_comes_first(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    file(tmp_path, STORY, "timemachine.txt")
    monkeypatch.setenv("GPURNN_DATA", str(tmp_path))
    assert load_corpus("time-machine").text == STORY.decode()
    assert server.requests == 0


def test_data_folder_with_another_text(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(tmp_path, b"another", "timemachine.txt")
    monkeypatch.setenv("GPURNN_DATA", str(tmp_path))
    with pytest.raises(CorpusError) as caught:
        load_corpus("time-machine")
    found = hashlib.sha1(b"another").hexdigest()
    assert str(caught.value) == (
        f"corpus 'time-machine': GPURNN_DATA leads to {str(path)!r}, which is another text: "
        f"expected sha1 {STORY_SHA1}, found {found} (7 bytes); replace or remove it, or load "
        "it as a file by its path"
    )
    assert server.requests == 0


def test_data_folder_with_something_unreadable(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timemachine.txt").mkdir()
    monkeypatch.setenv("GPURNN_DATA", str(tmp_path))
    with pytest.raises(CorpusError, match=r"timemachine.txt', which cannot be read \("):
        load_corpus("time-machine")
    assert server.requests == 0


def test_data_folder_without_the_file(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPURNN_DATA", str(tmp_path))
    assert load_corpus("time-machine").text == STORY.decode()
    assert server.requests == 1


def test_empty_variable_is_no_data_folder(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file(tmp_path, b"another", "timemachine.txt")
    monkeypatch.setenv("GPURNN_DATA", "")
    assert load_corpus("time-machine").text == STORY.decode()


def test_download_once_then_cache(cache: Path, server: Server) -> None:
    first = load_corpus("time-machine")
    assert server.requests == 1
    assert [path.name for path in cache.iterdir()] == ["timemachine.txt"]
    assert first.text == STORY.decode()
    assert first.origin == (
        f"The Time Machine, H. G. Wells, from the cache of {corpora.TIME_MACHINE_URL}"
    )
    assert load_corpus("time-machine") == first
    assert server.requests == 1


def test_damaged_file_in_the_cache_is_replaced(cache: Path, server: Server) -> None:
    path = file(cache, STORY[:-5], "timemachine.txt")
    assert load_corpus("time-machine").text == STORY.decode()
    assert path.read_bytes() == STORY


def test_download_says_nothing_on_the_terminal(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said = logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(pooch.get_logger(), "handlers", [said])
    load_corpus("time-machine")
    assert server.requests == 1
    assert said.stream.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_download_is_logged_for_those_who_listen(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gpurnn")
    load_corpus("time-machine")
    assert corpora.TIME_MACHINE_URL in caplog.text


def assert_refused_with_advice(cache: Path, *reasons: str) -> None:
    with pytest.raises(CorpusError) as caught:
        load_corpus("time-machine")
    message = str(caught.value)
    for reason in (
        "corpus 'time-machine' cannot be had: GPURNN_DATA is not set",
        f"not in the cache ({str(cache)!r})",
        f"downloading {corpora.TIME_MACHINE_URL} failed: ",
        f"178,979 bytes, sha1 {STORY_SHA1}) as timemachine.txt into a folder",
        "set GPURNN_DATA to that folder, or use the corpus 'python-docs'",
        *reasons,
    ):
        assert reason in message
    assert list(cache.iterdir()) == []


def test_download_of_another_text(cache: Path, server: Server) -> None:
    server.body, server.length = b"<html>log in first</html>", 25
    found = hashlib.sha1(server.body).hexdigest()
    assert_refused_with_advice(cache, f"expected sha1:{STORY_SHA1} but got {found}")


def test_download_that_breaks_off(cache: Path, server: Server) -> None:
    server.length = 178_979
    assert_refused_with_advice(cache)


def test_server_without_the_file(cache: Path, server: Server) -> None:
    server.status = 404
    assert_refused_with_advice(cache, "404")


def test_nobody_listens(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:  # holds the port without listening, so nobody else can
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        monkeypatch.setattr(corpora, "TIME_MACHINE_URL", f"http://127.0.0.1:{port}/t.txt")
        assert_refused_with_advice(cache, "refused")


def test_server_that_never_answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "DOWNLOAD_TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(corpora, "TIME_MACHINE_URL", f"http://127.0.0.1:{port}/t.txt")
        assert_refused_with_advice(cache, "timed out. (read timeout=0.05)")


def test_cache_that_cannot_be_made(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = file(tmp_path, b"", "a-file") / "cache"
    monkeypatch.setattr(pooch, "os_cache", lambda project: blocked)
    monkeypatch.setenv("GPURNN_DATA", str(tmp_path))
    with pytest.raises(CorpusError) as caught:
        load_corpus("time-machine")
    assert f"not in GPURNN_DATA ({str(tmp_path)!r})" in str(caught.value)
    assert str(blocked) in str(caught.value)
    assert server.requests == 0


def test_import_is_light() -> None:
    code = "import sys, gpurnn.text; print({'pooch', 'requests', 'pydoc_data'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
