"""φ and φ′ as pairs of device functions.

A kernel factory closes over a pair, so a kernel knows nothing of the activation, and the user's own
is compiled into it like the others. All are exact to a few units in the last place of their type,
except the two whose names begin with ``fast_``.

============  ===========================  ==================  ==================================
name          φ(z)                         φ′ in terms of h    float32 on the device
============  ===========================  ==================  ==================================
tanh          tanh z                       1 − h²              libdevice
relu          z, or 0 where z ≤ 0          1 if h > 0 else 0
sigmoid       1 / (1 + e^−z)               h (1 − h)           libdevice's exp of −|z|
softplus      log(1 + e^z)                 1 − e^−h            log1p(exp(−|z|)) + max(z, 0)
identity      z                            1
fast_tanh     tanh z                       1 − h²              tanh.approx: relative error 2⁻¹¹
fast_sigmoid  1 / (1 + e^−z)               h (1 − h)           ex2.approx and rcp.approx
============  ===========================  ==================  ==================================

NaN comes out of every φ that it goes into, and ±∞ gives the limit. Constants have the type of the
kernel: a literal would be a float64, and draw the arithmetic around it along.
"""

import math
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

from numba.cuda import types

from gpurnn.kernels.device import device
from gpurnn.kernels.ptx import exp2_approx, rcp_approx, tanh_approx
from gpurnn.narrowing import narrowed

__all__ = ["Pair", "pair", "user_pair"]


class Pair(NamedTuple):
    """Device functions: phi(z) → h; dphi(h) if ``of_output``, else dphi(z) → φ′."""

    phi: Any
    dphi: Any
    of_output: bool


@cache
def pair(name: str, real: Any) -> Pair:
    """Return the pair of a name of the table above, always the same objects.

    ``real`` is numba.float32 or numba.float64.

    Raises:
        ValueError: a fast activation with float64, of which the GPU has no fast form.
    """
    if name.startswith("fast_") and real != types.float32:
        raise ValueError(f"activation {name!r} with {real}: expected float32, its only fast form")
    return _MAKERS[name](real)


@cache
def user_pair(f: FunctionType, df: FunctionType, real: Any, *, of_output: bool = False) -> Pair:
    """Return device functions of the user's φ and φ′, always the same ones for the same two.

    ``df`` takes h = φ(z) if ``of_output``, else z. What they return is converted to ``real``.
    """

    def converted(function: FunctionType) -> Any:
        inner = device(narrowed(function) if real == types.float32 else function)

        @device
        def outer(x: Any) -> Any:
            return real(inner(x))

        return outer

    return Pair(converted(f), converted(df), of_output)


def _square_complement(real: Any) -> Any:
    """1 − h², the derivative of tanh in terms of its output."""
    one = real(1)

    @device
    def dphi(h: Any) -> Any:
        return one - h * h

    return dphi


def _times_complement(real: Any) -> Any:
    """h (1 − h), the derivative of the sigmoid in terms of its output."""
    one = real(1)

    @device
    def dphi(h: Any) -> Any:
        return (one - h) * h

    return dphi


def _tanh(real: Any) -> Pair:
    @device
    def phi(z: Any) -> Any:
        return real(math.tanh(z))

    return Pair(phi, _square_complement(real), of_output=True)


def _relu(real: Any) -> Pair:
    zero, one = real(0), real(1)

    @device
    def phi(z: Any) -> Any:
        return zero if z <= zero else z  # so written, NaN stays NaN

    @device
    def dphi(h: Any) -> Any:
        return one if h > zero else zero

    return Pair(phi, dphi, of_output=True)


def _sigmoid(real: Any) -> Pair:
    zero, one = real(0), real(1)

    @device
    def phi(z: Any) -> Any:
        e = real(math.exp(-abs(z)))  # never overflows, and keeps small results exact
        return (e if z < zero else one) / (one + e)

    return Pair(phi, _times_complement(real), of_output=True)


def _softplus(real: Any) -> Pair:
    zero = real(0)

    @device
    def phi(z: Any) -> Any:
        return real(math.log1p(real(math.exp(-abs(z))))) + (zero if z <= zero else z)

    @device
    def dphi(h: Any) -> Any:
        return -real(math.expm1(-h))

    return Pair(phi, dphi, of_output=True)


def _identity(real: Any) -> Pair:
    one = real(1)

    @device
    def phi(z: Any) -> Any:
        return z

    @device
    def dphi(h: Any) -> Any:
        return one

    return Pair(phi, dphi, of_output=True)


def _fast_tanh(real: Any) -> Pair:
    @device
    def phi(z: Any) -> Any:
        return tanh_approx(z)

    return Pair(phi, _square_complement(real), of_output=True)


def _fast_sigmoid(real: Any) -> Pair:
    one, log2_e = real(1), real(math.log2(math.e))

    @device
    def phi(z: Any) -> Any:
        return rcp_approx(one + exp2_approx(-z * log2_e))

    return Pair(phi, _times_complement(real), of_output=True)


_MAKERS: dict[str, Callable[[Any], Pair]] = {
    "tanh": _tanh,
    "relu": _relu,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "identity": _identity,
    "fast_tanh": _fast_tanh,
    "fast_sigmoid": _fast_sigmoid,
}
