"""Small helpers for writing device functions."""

from collections.abc import Callable, Sequence
from typing import Any

from numba import cuda

__all__ = ["device", "factor_at", "in_order"]

DeviceFunction = Any


def device(function: Callable[..., Any]) -> DeviceFunction:
    """Make a device function that is always inlined into its caller.

    Only then do its constants reach the loops around it, and arrays of the caller that it is given
    can stay in registers.
    """
    return cuda.jit(device=True, forceinline=True)(function)


def in_order(parts: Sequence[DeviceFunction]) -> DeviceFunction:
    """Return a device function of five arguments that calls ``parts`` one after another.

    The compiler unrolls a loop completely only up to a few hundred operations; beyond that a local
    array it indexes moves to memory. A long computation over registers is therefore written as
    several short ones, each with its own constants, and put together here.
    """
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2  # calls nest no deeper than they must: each compiles within another
    first, then = in_order(parts[:half]), in_order(parts[half:])

    @device
    def run(a, b, c, d, e):
        first(a, b, c, d, e)
        then(a, b, c, d, e)

    return run


def factor_at(real: Any, *, scaled: bool) -> DeviceFunction:
    """Return a device function of ``(xi, t)``: xi[t], or 1 where nothing is ``scaled``."""
    one = real(1)

    @device
    def factor_of(xi, t):
        return xi[t]

    @device
    def no_factor(xi, t):
        return one

    return factor_of if scaled else no_factor
