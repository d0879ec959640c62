"""Finding a kernel's marked lines, and expecting an error there."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from gpurnn import emulator

__all__ = ["line", "raises"]


def line(kernel: Any, mark: str) -> int:
    """Return the number of the one line of a kernel that ends in ``# mark``."""
    lines, first = inspect.getsourcelines(getattr(kernel, "py_func", kernel))
    (found,) = (i for i, text in enumerate(lines) if text.rstrip().endswith(f"# {mark}"))
    return first + found


@contextlib.contextmanager
def raises(error: type[emulator.EmulationError], kernel: Any, *marks: str) -> Iterator[Any]:
    """Expect exactly ``error``, at the marked lines in this order, all named in its message."""
    with pytest.raises(error) as info:
        yield info
    assert info.type is error
    assert [p.line for p in info.value.places][: len(marks)] == [line(kernel, m) for m in marks]
    for place in info.value.places[: len(marks)]:
        assert f"{place.file}:{place.line}" in str(info.value)
        assert f"block {place.block}, thread {place.thread}" in str(info.value)
        assert place.file == inspect.getsourcefile(getattr(kernel, "py_func", kernel))
