"""Ctrl-C (and SIGTERM) as a request that the loop sees between two updates, or a little later."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupts", "held_interrupts", "noticed_interrupts"]


class Interrupts:
    """Holds the number of the signal that came, or None."""

    signal: int | None = None


@contextmanager
def noticed_interrupts() -> Iterator[Interrupts]:
    """Note the first SIGINT or SIGTERM instead of being stopped by it; a second one stops at once.

    Outside the main thread, where Python delivers no signals, nothing is changed.
    """
    noticed = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield noticed
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A signal that is ignored, as in a script's background job, stays so; None is not Python's.
    before = {
        n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)
    }

    def notice(number: int, frame: FrameType | None) -> None:
        noticed.signal = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, notice)
    try:
        yield noticed
    finally:
        restore()


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back to the end of the context: what stands in it is done wholly or not begun.

    For what waits for nothing. Outside the main thread nothing is changed, as nothing need be.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is None:  # not Python's
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)
