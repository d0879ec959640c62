"""What tells a thread at work from one that polls: the values its loop goes round with."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurnn.emulator.arrays import Array
from gpurnn.emulator.errors import UnsupportedError

if TYPE_CHECKING:
    from gpurnn.emulator.machine import Machine

__all__ = ["check_movable", "state"]

HERE = os.path.dirname(__file__) + os.sep
# So many addresses are remembered before all are forgotten.
MOST = 4096


def state(machine: Machine) -> int:
    """Return a hash of where the running thread is and of its variables.

    A thread that comes by twice with one state, and finds memory as it was, goes round in circles.
    """
    codes, kernel = machine.codes, machine.kernel
    parts: list[Any] = []
    frame = sys._getframe(1)
    while True:
        code = frame.f_code
        if id(code) in codes or not code.co_filename.startswith(HERE):
            parts.append(frame.f_lasti)
            parts += [(name, _digest(value)) for name, value in frame.f_locals.items()]
        if code is kernel or frame.f_back is None:
            return hash(tuple(parts))
        frame = frame.f_back


def _digest(value: Any) -> Any:
    kind = type(value)
    if kind is int or kind is bool:
        return value
    if isinstance(value, np.generic):
        return value.tobytes()
    if isinstance(value, Array):
        return id(value.access), value.k0, value.shape
    if kind is tuple:
        return tuple(map(_digest, value))
    return repr(value) if kind is float or kind is complex else id(value)


def check_movable(machine: Machine, key: Any) -> None:
    """Refuse a loop that polls by a load without side effects, and has none itself."""
    t = machine.thread
    if t.busy:  # it stored
        t.busy = False
        machine.activity += 1
        t.movable.clear()
    if key not in t.movable:
        if len(t.movable) >= MOST:
            t.movable.clear()
        t.movable[key] = None
        return
    now = state(machine)
    if t.movable[key] == now:
        place = machine.place()
        raise UnsupportedError(
            f"{place} polls by cuda.ldcv or cuda.ldcg in a loop that stores nothing: Numba emits "
            "them as inline assembly without side effects, which the compiler may move out of the "
            "loop: expected a load with side effects (a volatile one)",
            place,
        )
    t.movable[key] = now
