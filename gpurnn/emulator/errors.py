"""What the emulator can find wrong with a kernel, one class each."""

from typing import NamedTuple

__all__ = [
    "BarrierError",
    "BoundsError",
    "DeadlockError",
    "EmulationError",
    "Place",
    "RaceError",
    "ReadOnlyError",
    "UninitializedError",
    "UnsupportedError",
]

Index3 = tuple[int, int, int]


class Place(NamedTuple):
    """Where a thread was: a line of the kernel, or of a device function, and who ran it."""

    file: str
    line: int
    function: str
    block: Index3
    thread: Index3

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}, {self.who}"

    @property
    def who(self) -> str:
        """The thread alone."""
        return f"block {self.block}, thread {self.thread}"


class EmulationError(Exception):
    """A kernel did what it must not do.

    Attributes:
        places: where the threads concerned were; the first is the one that was running.
    """

    def __init__(self, message: str, *places: Place):
        super().__init__(message)
        self.places = places


class BarrierError(EmulationError):
    """A barrier, or an operation of a warp, that not all of its threads reach."""


class DeadlockError(EmulationError):
    """No thread can go on: some poll memory that nobody will change."""


class UninitializedError(EmulationError):
    """A read of memory that nothing wrote."""


class BoundsError(EmulationError, IndexError):
    """An index outside its array, or below zero."""


class ReadOnlyError(EmulationError):
    """A write to a read-only array."""


class RaceError(EmulationError):
    """Two threads touch the same bytes, one of them writes, and nothing orders the two."""


class UnsupportedError(EmulationError):
    """The kernel uses something that has no emulation."""
