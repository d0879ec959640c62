"""When a benchmark must begin nothing new."""

import time

__all__ = ["Due", "LateError"]


class LateError(Exception):
    """The time is used up; the message says so."""


class Due:
    """Counts from where it is made; ``limit`` is in seconds, None is never."""

    def __init__(self, limit: float | None) -> None:
        self.limit, self.begun = limit, time.perf_counter()

    def check(self) -> None:
        """Raise LateError from then on."""
        if self.limit is not None and time.perf_counter() - self.begun > self.limit:
            raise LateError("the time limit was reached")
