"""The Time Machine for tests: from $GPURNN_DATA or the cache, never from the network."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import pytest

SHA1 = "090b5e7e70c295757f55df93cb0a180b9691891a"


def require_time_machine() -> str:
    """Return the text (178,979 characters), or skip the test where it is not at hand."""
    folders = []
    with suppress(ImportError):  # a machine that has no more than what kernels need
        import pooch

        folders = [Path(pooch.os_cache("gpurnn"))]
    if os.environ.get("GPURNN_DATA"):
        folders.insert(0, Path(os.environ["GPURNN_DATA"]))
    for folder in folders:
        path = folder / "timemachine.txt"
        if path.is_file():
            data = path.read_bytes()
            assert hashlib.sha1(data).hexdigest() == SHA1, f"{path} is not the book's text"
            return data.decode("ascii")
    pytest.skip("The Time Machine is neither in $GPURNN_DATA nor in gpurnn's cache")
