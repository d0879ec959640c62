"""Scalar types as kernels use them: called to convert a value, passed as an array's dtype."""

import functools
import math
from typing import Any

import numpy as np

__all__ = ["Cast", "cast", "converter", "dtype_of"]


class Cast:
    """One scalar type.

    Integers come out as Python ints within the type's range: a value beyond it wraps as CUDA's
    conversions between integers do, a float is cut toward zero and held at the type's limits.
    Floats come out as NumPy scalars, so that float32 arithmetic stays float32.
    """

    __slots__ = ("convert", "dtype")

    def __init__(self, dtype: np.dtype[Any]):
        self.dtype = dtype
        self.convert = converter(dtype)

    def __call__(self, value: Any) -> Any:
        """Convert a scalar."""
        return self.convert(value)

    def __repr__(self) -> str:
        return str(self.dtype)


@functools.cache
def cast(dtype: np.dtype[Any]) -> Cast:
    """Return the scalar type of ``dtype``."""
    return Cast(dtype)


@functools.cache
def converter(dtype: np.dtype[Any]) -> Any:
    """Return the function that turns a scalar into one of ``dtype``."""
    if dtype.kind in "iu":
        return _integers(dtype)
    if dtype.kind == "b":
        return bool
    return dtype.type


def dtype_of(spelled: Any) -> np.dtype[Any]:
    """Return the NumPy dtype of a cast, a Numba type, or whatever NumPy takes for one."""
    if isinstance(spelled, Cast):
        return spelled.dtype
    if type(spelled).__module__.startswith("numba."):
        spelled = str(spelled)  # Numba's scalar types are named as NumPy's are
    dtype: np.dtype[Any] = np.dtype(spelled)
    return dtype


def _integers(dtype: np.dtype[Any]) -> Any:
    limits = np.iinfo(dtype)
    low, high = int(limits.min), int(limits.max)
    mask = high - low

    def convert(value: Any) -> int:
        if type(value) is not int:
            if isinstance(value, float | np.floating):
                if math.isnan(value):
                    return 0
                return low if value <= low else high if value >= high else int(value)
            value = int(value)
        if low <= value <= high:
            return value  # type: ignore[no-any-return]
        return ((value - low) & mask) + low  # type: ignore[no-any-return]

    return convert
