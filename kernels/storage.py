"""How a number lies in global memory, and how a kernel computes with it."""

from typing import Any, NamedTuple

from numba import float32, float64, uint16

from gpurnn.kernels import ptx
from gpurnn.kernels.device import DeviceFunction, device

__all__ = ["STORAGES", "Storage"]


class Storage(NamedTuple):
    """One way of storing: ``stored`` is the element type of the arrays a kernel gets.

    ``load(x)`` gives a ``real``, exactly; ``store(a)`` rounds a ``real`` to nearest, ties to even.
    """

    stored: Any
    real: Any
    load: DeviceFunction
    store: DeviceFunction


@device
def _same(x):
    return x


@device
def _load_half(bits):
    return ptx.half_to_float(bits)


@device
def _store_half(a):
    return ptx.float_to_half(a)


@device
def _load_bfloat16(bits):
    return ptx.bf16_to_float(bits)


@device
def _store_bfloat16(a):
    return ptx.float_to_bf16(a)


STORAGES = {
    "float32": Storage(float32, float32, _same, _same),
    "float64": Storage(float64, float64, _same, _same),
    "float16": Storage(uint16, float32, _load_half, _store_half),
    "bfloat16": Storage(uint16, float32, _load_bfloat16, _store_bfloat16),
}
