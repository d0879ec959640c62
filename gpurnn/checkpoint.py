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
    """Write the file whole or not at all.

    Raises:
        OSError: it could not be written; a file of that name is as it was.
    """
    arrays = {name: np.ascontiguousarray(a) for name, a in contents.arrays.items()}
    document = json.dumps(contents.document, sort_keys=True, ensure_ascii=True)
    metadata = {
        "format": f"gpurnn-{contents.kind}",
        "format_version": str(FORMAT_VERSION),
        "document": document,
        "sha256": _digest(contents.kind, arrays, document),
    }
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
        what = "is a folder" if where.is_dir() else "does not exist"
        raise CheckpointError(f"{where} {what}: expected a file that gpurnn wrote")
    data = where.read_bytes()
    header = _header(where, data)
    metadata = header.get("__metadata__", {})
    found = metadata.get("format", "")
    if not found.startswith("gpurnn-"):
        raise CheckpointError(f"{where} is a safetensors file, but gpurnn did not write it")
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{where} has format version {version or '(none)'}: this gpurnn reads {FORMAT_VERSION}"
        )
    if found != f"gpurnn-{kind}":
        raise CheckpointError(
            f"{where} is a {found.removeprefix('gpurnn-')} file, not a {kind} file"
        )
    try:
        arrays = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as e:
        raise CheckpointError(f"{where} is damaged: {e}") from e
    document = metadata.get("document", "")
    if metadata.get("sha256") != _digest(kind, arrays, document):
        raise CheckpointError(
            f"{where} has been changed since it was written: its contents do not match their digest"
        )
    return Contents(kind, arrays, json.loads(document))


def _header(where: Path, data: bytes) -> dict[str, Any]:
    """Parse the safetensors header: 8 bytes of length, JSON, then the arrays' bytes."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > 100_000_000 or data[8:9] != b"{":
        truncated = 0 < len(data) < 9
        raise CheckpointError(
            f"{where} is {'truncated' if truncated else 'not a safetensors file'} "
            f"({len(data)} bytes)"
        )
    if len(data) < 8 + length:
        raise CheckpointError(f"{where} is truncated: it ends within its header")
    try:
        header = json.loads(data[8 : 8 + length])
        ends = [a["data_offsets"][1] for name, a in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError) as e:
        raise CheckpointError(f"{where} is damaged: its header cannot be read ({e})") from e
    expected = 8 + length + max(ends, default=0)
    if len(data) != expected:
        what = "truncated" if len(data) < expected else "damaged"
        raise CheckpointError(f"{where} is {what}: {len(data)} bytes, its header tells {expected}")
    if not isinstance(header.get("__metadata__", {}), dict):
        raise CheckpointError(f"{where} is damaged: its metadata cannot be read")
    return header  # type: ignore[no-any-return]


def _digest(kind: str, arrays: Arrays, document: str) -> str:
    digest = hashlib.sha256(f"{kind}\n{FORMAT_VERSION}\n{document}\n".encode())
    for name in sorted(arrays):
        a = arrays[name]
        digest.update(f"{name} {a.dtype.str} {a.shape}\n".encode())
        digest.update(np.ascontiguousarray(a).tobytes())
    return digest.hexdigest()
