"""Files of arrays and settings that can be trusted: safetensors, written whole, checked on reading.

A file holds named NumPy arrays and one JSON document, both under a SHA-256 digest kept in the
safetensors metadata. The digest finds damage and careless editing; it is no signature.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from gpurnn.files import write_atomically

__all__ = ["FORMAT_VERSION", "CheckpointError", "Contents", "read", "write"]

FORMAT_VERSION = 1
METADATA_KEY = "gpurnn"
LONGEST_HEADER = 100_000_000  # bytes, as in safetensors itself

Arrays = Mapping[str, NDArray[Any]]


class CheckpointError(ValueError):
    """The file cannot be used; the message says which file and why."""


@dataclass(frozen=True)
class Contents:
    """What a file holds: its kind ("model", "training"), arrays by name, and a JSON document."""

    kind: str
    arrays: dict[str, NDArray[Any]]
    document: dict[str, Any]


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write the file whole or not at all; equal contents give equal bytes.

    Raises:
        OSError: it could not be written; a file of that name is as it was.
        ValueError: the document holds a NaN or infinity, which JSON has not.
    """
    arrays = {
        name: np.asarray(a, dtype=a.dtype.newbyteorder("="), order="C")
        for name, a in contents.arrays.items()
    }
    document = json.dumps(contents.document, sort_keys=True, allow_nan=False)
    about = {
        "format": f"gpurnn-{contents.kind}",
        "format_version": str(FORMAT_VERSION),
        "document": document,
        "sha256": _digest(contents.kind, arrays, document),
    }
    # One key: safetensors writes several in no particular order.
    metadata = {METADATA_KEY: json.dumps(about, sort_keys=True)}
    write_atomically(path, save(arrays, metadata=metadata))


def read(path: str | os.PathLike[str], kind: str) -> Contents:
    """Read and check a file of ``kind``.

    Raises:
        CheckpointError: it is missing, truncated, no safetensors file, not gpurnn's or of another
            kind, written by a later version, or its contents do not match their digest.
        OSError: it could not be read.
    """
    where = Path(path)
    if not where.is_file():
        what = (
            "is a folder"
            if where.is_dir()
            else "is no file"
            if where.exists()
            else "does not exist"
        )
        raise CheckpointError(f"{where} {what}: expected a file that gpurnn wrote")
    data = where.read_bytes()
    about = _metadata(where, data)
    version = about.get("format_version", "(none)")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{where} has format version {version}: this gpurnn reads {FORMAT_VERSION}"
        )
    found = str(about.get("format")).removeprefix("gpurnn-")
    if found != kind:
        raise CheckpointError(f"{where} is a {found} file, not a {kind} file")
    document = str(about.get("document"))
    try:
        arrays = load(data)
    except (SafetensorError, *_UNREADABLE) as e:
        raise CheckpointError(f"{where} is damaged: {e}") from e
    if about.get("sha256") != _digest(kind, arrays, document):
        raise CheckpointError(
            f"{where} has been changed since it was written: its contents do not match their digest"
        )
    try:
        return Contents(kind, arrays, dict(json.loads(document)))
    except _UNREADABLE as e:
        raise CheckpointError(f"{where} is damaged: its document cannot be read ({e!r})") from e


def _metadata(where: Path, data: bytes) -> dict[str, Any]:
    """Check the frame of the file, and return what gpurnn's entry in its metadata says.

    A safetensors file is 8 bytes of length, a JSON header of that length, then the arrays' bytes.
    """
    length = int.from_bytes(data[:8], "little")
    if not data:
        raise CheckpointError(f"{where} is empty")
    if len(data) < 9:
        raise CheckpointError(f"{where} is truncated: it has {len(data)} bytes")
    if length > LONGEST_HEADER or data[8:9] != b"{":
        raise CheckpointError(f"{where} is not a safetensors file ({len(data)} bytes)")
    if len(data) < 8 + length:
        raise CheckpointError(f"{where} is truncated: it ends within its header")
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
        ours = metadata.get(METADATA_KEY)
        about = None if ours is None else dict(json.loads(ours))
    except _UNREADABLE as e:
        raise CheckpointError(f"{where} is damaged: its header cannot be read ({e!r})") from e
    if about is None:
        raise CheckpointError(f"{where} is a safetensors file, but gpurnn did not write it")
    expected = 8 + length + max(ends, default=0)
    if len(data) != expected:
        what = "truncated" if len(data) < expected else "damaged"
        raise CheckpointError(f"{where} is {what}: {len(data)} bytes, its header tells {expected}")
    return about


_UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
"""What parsing a header made by somebody else may raise."""


def _digest(kind: str, arrays: Arrays, document: str) -> str:
    digest = hashlib.sha256(f"{kind}\n{FORMAT_VERSION}\n{document}\n".encode())
    for name in sorted(arrays):
        a = arrays[name]
        digest.update(f"{name} {a.dtype.str} {a.shape}\n".encode())
        digest.update(a.tobytes())
    return digest.hexdigest()
