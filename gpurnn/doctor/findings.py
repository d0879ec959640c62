"""What a check has found, in words, and how to go on."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Status", "found_by"]

Status = Literal["ok", "warning", "missing", "failed"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    ``missing`` is not an error: something optional is not there. ``failed``: something that is
    there does not work, or gives wrong numbers. ``advice`` says what to do, empty where all is
    well.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


def found_by(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield what a check finds; if it raises, a failed finding called ``name`` with the error."""
    try:
        yield from check()
    except Exception as e:  # the doctor reports what is broken, whatever it raises
        yield Finding(
            name,
            "failed",
            f"{type(e).__name__}: {e}",
            "this check could not be finished; the error above is what to search for",
        )
