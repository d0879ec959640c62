"""Twins of the libdevice functions, by name; one that is missing here has no emulation."""

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from gpurnn.emulator.casts import converter
from gpurnn.emulator.floats import MATH, cbrt, fma, fma_float32, rsqrt

__all__ = ["LIBDEVICE"]

Function = Callable[..., Any]

_int32 = converter(np.dtype(np.int32))
_uint32 = converter(np.dtype(np.uint32))
_int64 = converter(np.dtype(np.int64))
_uint64 = converter(np.dtype(np.uint64))


def _float_as_int(x: Any) -> int:
    return struct.unpack("<i", np.float32(x).tobytes())[0]  # type: ignore[no-any-return]


def _int_as_float(x: Any) -> Any:
    return np.frombuffer(struct.pack("<i", _int32(x)), np.float32)[0]


def _double_as_longlong(x: Any) -> int:
    return struct.unpack("<q", np.float64(x).tobytes())[0]  # type: ignore[no-any-return]


def _longlong_as_double(x: Any) -> Any:
    return np.frombuffer(struct.pack("<q", _int64(x)), np.float64)[0]


def _hiloint2double(high: Any, low: Any) -> Any:
    return _longlong_as_double(_uint32(high) << 32 | _uint32(low))


def _float2half_rn(x: Any) -> int:
    return int(np.float16(np.float32(x)).view(np.int16))


def _half2float(bits: Any) -> Any:
    return np.float32(np.frombuffer(struct.pack("<H", int(bits) & 0xFFFF), np.float16)[0])


def _in(kind: Any, function: Function) -> Function:
    """Return ``function`` with its floats converted to ``kind`` before and after."""

    def twin(*values: Any) -> Any:
        result = function(*(v if isinstance(v, int) else kind(v) for v in values))
        return tuple(map(kind, result)) if isinstance(result, tuple) else kind(result)

    return twin


def _fmax(x: Any, y: Any) -> Any:
    return np.fmax(x, y)


def _fmin(x: Any, y: Any) -> Any:
    return np.fmin(x, y)


def _saturate(x: Any) -> Any:
    return np.float32(0) if not x > 0 else min(np.float32(x), np.float32(1))


def _sincos(x: Any) -> tuple[Any, Any]:
    return MATH["sin"](x), MATH["cos"](x)


def _reversed(width: int) -> Function:
    return lambda x: int(f"{int(x) & ((1 << width) - 1):0{width}b}"[::-1], 2)


def _leading_zeros(width: int) -> Function:
    return lambda x: width - (int(x) & ((1 << width) - 1)).bit_length()


def _first_set(width: int) -> Function:
    def ffs(x: Any) -> int:
        bits = int(x) & ((1 << width) - 1)
        return (bits & -bits).bit_length()

    return ffs


def _population(width: int) -> Function:
    return lambda x: (int(x) & ((1 << width) - 1)).bit_count()


# fmt: off
_SAME_IN_MATH = (
    "acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "exp", "expm1", "exp2",
    "log", "log10", "log1p", "log2", "sin", "sinh", "sqrt", "tan", "tanh", "erf", "erfc",
    "ceil", "floor", "trunc", "fmod", "pow", "hypot", "atan2", "copysign", "remainder", "fabs",
)
# fmt: on


def _two_kinds() -> dict[str, Function]:
    functions: dict[str, Function] = {name: MATH[name] for name in _SAME_IN_MATH}
    functions |= {
        "exp10": lambda x: np.float64(np.power(np.float64(10), np.float64(x))),
        "rsqrt": rsqrt,
        "cbrt": cbrt,
        "rint": np.rint,
        "nearbyint": np.rint,
        "fmax": _fmax,
        "fmin": _fmin,
        "fdim": lambda x, y: x - y if x > y else type(x)(0),
        "sincos": _sincos,
        "tgamma": MATH["gamma"],
        "lgamma": MATH["lgamma"],
        "nextafter": MATH["nextafter"],
        "normcdf": lambda x: 0.5 * math.erfc(-x / math.sqrt(2)),
    }
    table: dict[str, Function] = {}
    for name, function in functions.items():
        table[name] = _in(np.float64, function)
        table[f"{name}f"] = _in(np.float32, function)
    return table


def _fast() -> dict[str, Function]:
    names = ("cosf", "exp10f", "expf", "log10f", "log2f", "logf", "powf", "sincosf", "sinf", "tanf")
    exact = _two_kinds()
    return {f"fast_{name}": exact[name] for name in names}


def _arithmetic() -> dict[str, Function]:
    """Return the operations rounded to nearest; those with another rounding have no twin."""
    table: dict[str, Function] = {}
    for letter, kind in (("f", np.float32), ("d", np.float64)):
        table |= {
            f"{letter}add_rn": _in(kind, lambda x, y: x + y),
            f"{letter}mul_rn": _in(kind, lambda x, y: x * y),
            f"{letter}div_rn": _in(kind, lambda x, y: np.divide(x, y)),
            f"{letter}rcp_rn": _in(kind, lambda x: np.divide(type(x)(1), x)),
            f"{letter}sqrt_rn": _in(kind, np.sqrt),
        }
    table["fsub_rn"] = _in(np.float32, lambda x, y: x - y)
    table["frsqrt_rn"] = _in(np.float32, rsqrt)
    table["fast_fdividef"] = table["fdiv_rn"]
    table["fmaf"] = table["fmaf_rn"] = fma_float32
    table["fma"] = table["fma_rn"] = lambda a, b, c: fma(np.float64(a), b, c)
    return table


def _conversions() -> dict[str, Function]:
    table: dict[str, Function] = {}
    integers = {"int": _int32, "uint": _uint32, "ll": _int64, "ull": _uint64}
    for name, to in integers.items():
        for source in ("float", "double"):
            table[f"{source}2{name}_rz"] = lambda x, to=to: to(np.float64(x))
            table[f"{source}2{name}_rn"] = lambda x, to=to: to(np.rint(np.float64(x)))
            table[f"{source}2{name}_rd"] = lambda x, to=to: to(np.floor(np.float64(x)))
            table[f"{source}2{name}_ru"] = lambda x, to=to: to(np.ceil(np.float64(x)))
        table[f"{name}2float_rn"] = lambda x, to=to: np.float32(to(x))
        table[f"{name}2double_rn"] = lambda x, to=to: np.float64(to(x))
    table["double2float_rn"] = np.float32
    return table


LIBDEVICE: dict[str, Function] = {
    **_two_kinds(),
    **_fast(),
    **_arithmetic(),
    **_conversions(),
    "abs": lambda x: abs(_int32(x)),
    "llabs": lambda x: abs(_int64(x)),
    "brev": _reversed(32),
    "brevll": _reversed(64),
    "clz": _leading_zeros(32),
    "clzll": _leading_zeros(64),
    "ffs": _first_set(32),
    "ffsll": _first_set(64),
    "popc": _population(32),
    "popcll": _population(64),
    "double_as_longlong": _double_as_longlong,
    "longlong_as_double": _longlong_as_double,
    "float_as_int": _float_as_int,
    "int_as_float": _int_as_float,
    "double2hiint": lambda x: _int32(_double_as_longlong(x) >> 32),
    "double2loint": lambda x: _int32(_double_as_longlong(x)),
    "hiloint2double": _hiloint2double,
    "float2half_rn": _float2half_rn,
    "half2float": _half2float,
    "saturatef": _saturate,
    "isnanf": lambda x: int(math.isnan(x)),
    "isnand": lambda x: int(math.isnan(x)),
    "isinff": lambda x: int(math.isinf(x)),
    "isinfd": lambda x: int(math.isinf(x)),
    "finitef": lambda x: int(math.isfinite(x)),
    "isfinited": lambda x: int(math.isfinite(x)),
    "signbitf": lambda x: int(np.signbit(x)),
    "signbitd": lambda x: int(np.signbit(x)),
    "max": lambda x, y: max(_int32(x), _int32(y)),
    "min": lambda x, y: min(_int32(x), _int32(y)),
    "umax": lambda x, y: max(_uint32(x), _uint32(y)),
    "umin": lambda x, y: min(_uint32(x), _uint32(y)),
    "llmax": lambda x, y: max(_int64(x), _int64(y)),
    "llmin": lambda x, y: min(_int64(x), _int64(y)),
    "ullmax": lambda x, y: max(_uint64(x), _uint64(y)),
    "ullmin": lambda x, y: min(_uint64(x), _uint64(y)),
    "mulhi": lambda x, y: _int32(x) * _int32(y) >> 32,
    "umulhi": lambda x, y: _uint32(x) * _uint32(y) >> 32,
    "mul64hi": lambda x, y: _int64(x) * _int64(y) >> 64,
    "umul64hi": lambda x, y: _uint64(x) * _uint64(y) >> 64,
}
