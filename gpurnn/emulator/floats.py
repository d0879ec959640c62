"""Python's ``math`` as a GPU has it: float32 stays float32, and nothing raises.

The values are those of the host's float64 functions rounded once, so they lie within an ulp or so
of a GPU's, not on the same bits.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

__all__ = ["MATH", "cbrt", "fma", "fma_float32", "rsqrt", "single", "unary"]

Function = Callable[..., Any]


def _wider(*values: Any) -> Any:
    """Return the float type that CUDA's ``math`` computes ``values`` in."""
    for value in values:
        if not isinstance(value, np.float32 | np.float16):
            return np.float64
    return np.float32


def single(*values: Any) -> Any:
    """Return the type that keeps half precision as well."""
    return np.float16 if all(isinstance(v, np.float16) for v in values) else _wider(*values)


def unary(function: Function, limit: Function, kind: Function = _wider) -> Function:
    """Return a twin of ``function``; ``limit`` gives its value where Python's raises."""

    def twin(x: Any) -> Any:
        try:
            return kind(x)(function(x))
        except (ValueError, OverflowError):
            return kind(x)(limit(np.float64(x)))

    twin.__name__ = function.__name__
    return twin


def _binary(function: Function, limit: Function) -> Function:
    def twin(x: Any, y: Any) -> Any:
        kind = _wider(*([v for v in (x, y) if not isinstance(v, int)] or [x]))
        try:
            return kind(function(x, y))
        except (ValueError, OverflowError, ZeroDivisionError):
            return kind(limit(np.float64(x), np.float64(y)))

    twin.__name__ = function.__name__
    return twin


def _rounding(function: Function) -> Function:
    def rounded(x: Any) -> Any:
        return x if isinstance(x, int) else function(np.float64(x))

    return unary(rounded, rounded, single)


def _gamma_limit(x: Any) -> float:
    return math.nan if x <= 0 and x != 0 else math.copysign(math.inf, x)


def rsqrt(x: Any) -> Any:
    """Return 1 / √x."""
    return _wider(x)(np.float64(1) / np.sqrt(np.float64(x)))


def cbrt(x: Any) -> Any:
    """Return the cube root of x."""
    return _wider(x)(np.cbrt(np.float64(x)))


def fma_float32(a: Any, b: Any, c: Any) -> Any:
    """Return a · b + c rounded once to float32.

    The product of two float32 is exact in float64. The sum is rounded there to odd, so that the
    second rounding, to float32, is the only one that counts.
    """
    product, addend = float(a) * float(b), float(c)
    total = product + addend
    if math.isfinite(total):
        part = total - product
        error = (product - (total - part)) + (addend - part)
        if error and not np.float64(total).view(np.int64) & 1:
            total = math.nextafter(total, math.copysign(math.inf, error))
    return np.float32(total)


def fma(a: Any, b: Any, c: Any) -> Any:
    """Return a · b + c with one rounding, in float32 if all three are."""
    if _wider(a, b, c) is np.float32:
        return fma_float32(a, b, c)
    a, b, c = np.float64(a), np.float64(b), np.float64(c)
    plain = a * b + c
    if plain == 0 or not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        exact = Fraction(0)
        if plain == 0:
            exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        return np.float64(float(exact)) if exact else plain
    try:
        return np.float64(float(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))))
    except OverflowError:
        return plain


def _modf(x: Any) -> tuple[Any, Any]:
    kind = _wider(x)
    fraction, whole = math.modf(x)
    return kind(fraction), kind(whole)


def _frexp(x: Any) -> tuple[Any, int]:
    mantissa, exponent = math.frexp(x)
    return _wider(x)(mantissa), exponent


def _ldexp(x: Any, exponent: int) -> Any:
    return _wider(x)(np.ldexp(np.float64(x), exponent))


def _nextafter(x: Any, y: Any) -> Any:
    kind = _wider(x, y)
    return np.nextafter(kind(x), kind(y))


_KEEP_HALF = ("sin", "cos", "sqrt", "log", "log2", "log10", "exp", "exp2", "fabs")
# fmt: off
_PLAIN = (
    "acos", "acosh", "asin", "asinh", "atan", "atanh", "cosh", "degrees", "expm1", "log1p",
    "radians", "sinh", "tanh", "tan",
)
# fmt: on
_NUMPY_NAMES = {
    "acos": "arccos",
    "acosh": "arccosh",
    "asin": "arcsin",
    "asinh": "arcsinh",
    "atan": "arctan",
    "atanh": "arctanh",
}

MATH: dict[str, Any] = {
    **{n: unary(getattr(math, n), getattr(np, n), single) for n in _KEEP_HALF},
    **{n: unary(getattr(math, n), getattr(np, _NUMPY_NAMES.get(n, n))) for n in _PLAIN},
    "floor": _rounding(np.floor),
    "ceil": _rounding(np.ceil),
    "trunc": _rounding(np.trunc),
    "erf": unary(math.erf, math.erf),
    "erfc": unary(math.erfc, math.erfc),
    "gamma": unary(math.gamma, _gamma_limit),
    "lgamma": unary(math.lgamma, lambda x: math.inf),
    "pow": _binary(math.pow, np.power),
    "atan2": _binary(math.atan2, np.arctan2),
    "hypot": _binary(math.hypot, np.hypot),
    "copysign": _binary(math.copysign, np.copysign),
    "fmod": _binary(math.fmod, np.fmod),
    "remainder": _binary(math.remainder, lambda x, y: math.nan),
    "ldexp": _ldexp,
    "nextafter": _nextafter,
    "modf": _modf,
    "frexp": _frexp,
    "isnan": math.isnan,
    "isinf": math.isinf,
    "isfinite": math.isfinite,
    "pi": np.float64(math.pi),
    "e": np.float64(math.e),
    "tau": np.float64(math.tau),
    "inf": np.float64(math.inf),
    "nan": np.float64(math.nan),
}
