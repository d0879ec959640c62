"""Corpora: the texts to train on, by name or from a file."""

import hashlib
import logging
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["CORPORA", "Corpus", "CorpusError", "decode_corpus", "load_corpus"]

_log = logging.getLogger(__name__)

CORPORA: Final = ("python-docs", "time-machine")
"""The corpora that have a name."""

DATA_VARIABLE: Final = "GPURNN_DATA"
TIME_MACHINE_FILE: Final = "timemachine.txt"
TIME_MACHINE_BYTES: Final = 178_979
TIME_MACHINE_SHA1: Final = "090b5e7e70c295757f55df93cb0a180b9691891a"
TIME_MACHINE_URL: Final = "http://d2l-data.s3-accelerate.amazonaws.com/timemachine.txt"
DOWNLOAD_TIMEOUT: Final = 10.0
"""Seconds to wait for the server, to connect and between two pieces of its answer."""

_PARAGRAPH_BREAK: Final = re.compile(r"\n(?:[ \t]*\n)+")


class CorpusError(ValueError):
    """A corpus that cannot be had; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Corpus:
    """A text and where it came from.

    ``name`` is what :func:`load_corpus` was asked for, ``origin`` says in words where the text
    came from, and ``sha256`` is the hexadecimal digest of the text as UTF-8: it belongs beside
    every figure that is measured on the text.
    """

    name: str
    text: str = field(repr=False)
    sha256: str = field(init=False)
    origin: str

    def about(self) -> dict[str, str]:
        """Return all but the text: what belongs beside every figure."""
        return {"name": self.name, "origin": self.origin, "sha256": self.sha256}

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.text.encode("utf-8")).hexdigest()
        object.__setattr__(self, "sha256", digest)


def load_corpus(name_or_path: str | os.PathLike[str]) -> Corpus:
    """Return the corpus of that name, or the text in that file.

    ``"python-docs"``
        The reference text that CPython ships for its ``help()``, without repeated paragraphs and
        non-ASCII characters: several hundred thousand characters, there without a download.
        It differs between releases of Python; ``origin`` names the one at hand.
    ``"time-machine"``
        H. G. Wells, *The Time Machine*, as in section 9.2 of *Dive into Deep Learning*: 178,979
        characters. Taken from the folder named by the environment variable ``GPURNN_DATA``, else
        from the user's cache, else downloaded into that cache; its hash is checked each time.
    anything else
        The path of a UTF-8 text file. Newlines of any kind become ``"\\n"`` and a byte order mark
        is dropped. A corpus's name wins over a file that is called the same: write
        ``"./time-machine"`` for the file. A path object is always a file.

    Raises :class:`CorpusError` if the corpus cannot be found, read, downloaded or decoded, has
    another hash than it should, or is empty; :class:`TypeError` for anything but a string or a
    path.
    """
    path = os.fspath(name_or_path)
    if not isinstance(path, str):
        raise TypeError(f"name_or_path must be a str or a path, got {name_or_path!r}")
    if name_or_path == "python-docs":
        return _python_docs()
    if name_or_path == "time-machine":
        return _time_machine()
    return _file(path)


def _file(path: str) -> Corpus:
    named = f"a corpus is {' or '.join(map(repr, CORPORA))} or the path of a UTF-8 text file"
    if os.path.isdir(path):
        raise CorpusError(f"corpus {path!r} is a folder; {named}")
    try:
        data = _read(path)
    except FileNotFoundError as error:
        raise CorpusError(f"corpus {path!r} is neither a known name nor a file; {named}") from error
    except (OSError, ValueError) as error:  # ValueError: a path the system cannot even express
        reason = getattr(error, "strerror", None) or str(error)
        raise CorpusError(f"corpus {path!r} cannot be read ({reason}); {named}") from error
    return decode_corpus(data, path, f"the file {path}")


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def decode_corpus(data: bytes, name: str, origin: str) -> Corpus:
    """Return bytes as a corpus: UTF-8, a byte order mark dropped, every newline made ``\\n``.

    ``name`` and ``origin`` are as in :class:`Corpus`. Raises :class:`CorpusError`, with the offset,
    for bytes that are not UTF-8, and for an empty text.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"corpus {name!r} is not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{error.start} ({error.reason}); convert it first, for example from Latin-1 with: "
            "iconv -f LATIN1 -t UTF-8 OLD > NEW"
        ) from error
    text = text.removeprefix("\N{BYTE ORDER MARK}").replace("\r\n", "\n").replace("\r", "\n")
    if not text:
        raise CorpusError(f"corpus {name!r} is empty")
    return Corpus(name=name, text=text, origin=origin)


def _python_docs() -> Corpus:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CorpusError(
            "corpus 'python-docs' is read from the module pydoc_data.topics of the standard "
            f"library, which this {python} lacks (some distributions leave it out): install the "
            "complete standard library, or give the path of a text file instead"
        ) from error
    text = "\n\n".join(_distinct_paragraphs(topics[name] for name in sorted(topics)))
    if not text:
        raise CorpusError(
            f"corpus 'python-docs' is empty: pydoc_data.topics of this {python} holds no text; "
            "give the path of a text file instead"
        )
    origin = f"the reference text in pydoc_data.topics of {python}, each paragraph once, ASCII only"
    return Corpus(name="python-docs", text=text, origin=origin)


def _distinct_paragraphs(texts: Iterable[str]) -> Iterable[str]:
    """Return the ASCII part of every paragraph of ``texts``, each distinct one once, in order."""
    distinct: dict[str, None] = {}
    for text in texts:
        ascii_text = text.encode("ascii", errors="ignore").decode("ascii")
        for paragraph in _PARAGRAPH_BREAK.split(ascii_text):
            if paragraph.strip():
                distinct[paragraph.strip("\n").rstrip()] = None
    return distinct


def _time_machine() -> Corpus:
    data = _time_machine_in_data_folder()
    source = f"${DATA_VARIABLE}"
    if data is None:
        data = _time_machine_in_cache()
        source = f"the cache of {TIME_MACHINE_URL}"
    return decode_corpus(data, "time-machine", f"The Time Machine, H. G. Wells, from {source}")


def _time_machine_in_data_folder() -> bytes | None:
    """Return the text in the data folder, checked, or None if there is no folder or no file."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        return None
    path = os.path.join(folder, TIME_MACHINE_FILE)
    try:
        data = _read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorpusError(
            f"corpus 'time-machine': {DATA_VARIABLE} leads to {path!r}, which cannot be read "
            f"({error.strerror})"
        ) from error
    found = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    if found != TIME_MACHINE_SHA1:
        raise CorpusError(
            f"corpus 'time-machine': {DATA_VARIABLE} leads to {path!r}, which is another text: "
            f"expected sha1 {TIME_MACHINE_SHA1}, found {found} ({len(data):,} bytes); replace "
            "or remove it, or load it as a file by its path"
        )
    return data


def _time_machine_in_cache() -> bytes:
    """Return the text in the cache; pooch checks its hash, and downloads it if need be."""
    import pooch

    # The file is small: without streaming, the connection is closed whatever happens.
    downloader = pooch.HTTPDownloader(timeout=DOWNLOAD_TIMEOUT, stream=False)
    cache = pooch.os_cache("gpurnn")
    pooch_log = pooch.get_logger()
    level = pooch_log.level
    pooch_log.setLevel(logging.WARNING)  # it would announce the download on the terminal
    _log.info("taking the corpus time-machine from %s, or else from %s", cache, TIME_MACHINE_URL)
    try:
        return _read(
            pooch.retrieve(
                TIME_MACHINE_URL,
                known_hash=f"sha1:{TIME_MACHINE_SHA1}",
                fname=TIME_MACHINE_FILE,
                path=cache,
                downloader=downloader,
            )
        )
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is not
        folder = os.environ.get(DATA_VARIABLE)
        looked = f"not in {DATA_VARIABLE} ({folder!r})" if folder else f"{DATA_VARIABLE} is not set"
        reason = str(error).rstrip(".")
        raise CorpusError(
            f"corpus 'time-machine' cannot be had: {looked}, not in the cache ({str(cache)!r}), "
            f"and downloading {TIME_MACHINE_URL} failed: {reason}. Put the file "
            f"({TIME_MACHINE_BYTES:,} bytes, sha1 {TIME_MACHINE_SHA1}) as {TIME_MACHINE_FILE} "
            f"into a folder and set {DATA_VARIABLE} to that folder, or use the corpus "
            "'python-docs', which needs no download"
        ) from error
    finally:
        pooch_log.setLevel(level)
