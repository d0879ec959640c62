"""A user's function of one number, with its constants in single precision.

A literal in Python source is a float64 or an int64, and Numba computes float32 with either of them
in float64: ``math.tanh(z) + 0.1 * z`` of a float32 z would be a double-precision function, which on
most GPUs is many times slower. So the constants are made narrow before Numba sees them.
"""

from collections.abc import Mapping
from types import CellType, FunctionType
from typing import Any

import numpy as np

__all__ = ["narrowed"]

SHORT = np.iinfo(np.int16)


def narrowed(f: FunctionType) -> FunctionType:
    """Return a copy of ``f`` whose numbers leave float32 arithmetic in float32.

    Floats become np.float32, and ints, where they fit, np.int16 (the widest integer that Numba
    joins with float32 to float32): the literals of the function, and what it finds by a plain name
    outside itself, globals and closed-over variables, at their values of now (Numba freezes them
    too). An attribute such as ``math.pi`` stays a float64: give it a name first.

    The copy is for Numba; it keeps the name of ``f`` and everything else.
    """
    code = f.__code__
    found: Mapping[str, Any] = f.__globals__
    own = {name: _narrow(found[name]) for name in code.co_names if name in found}
    copy = FunctionType(
        code.replace(co_consts=_narrow(code.co_consts)),
        {**found, **own},
        f.__name__,
        f.__defaults__,
        tuple(CellType(_narrow(cell.cell_contents)) for cell in f.__closure__ or ()) or None,
    )
    copy.__doc__, copy.__module__, copy.__qualname__ = f.__doc__, f.__module__, f.__qualname__
    return copy


def _narrow(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(map(_narrow, value))
    if type(value) is float or type(value) is np.float64:
        return np.float32(value)
    if type(value) is int and SHORT.min <= value <= SHORT.max:  # not a bool
        return np.int16(value)
    return value
