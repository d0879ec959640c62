"""Sums over the threads of a warp and of a block, each in one order."""

from typing import Any

from numba import cuda, uint32

from gpurnn.kernels.device import DeviceFunction, device
from gpurnn.tile import WARP

__all__ = ["over_warp", "sum_of_block", "sum_of_warp"]

ALL_LANES = 0xFFFFFFFF
MOST_WARPS = 32


def over_warp(combined: DeviceFunction) -> DeviceFunction:
    """Return a device function of a number of each lane: all of them combined, in every lane."""

    @device
    def run(value):
        value = combined(value, cuda.shfl_xor_sync(ALL_LANES, value, 16))
        value = combined(value, cuda.shfl_xor_sync(ALL_LANES, value, 8))
        value = combined(value, cuda.shfl_xor_sync(ALL_LANES, value, 4))
        value = combined(value, cuda.shfl_xor_sync(ALL_LANES, value, 2))
        return combined(value, cuda.shfl_xor_sync(ALL_LANES, value, 1))

    return run


@device
def _added(a, b):
    return a + b


sum_of_warp = over_warp(_added)


def sum_of_block(kind: Any) -> DeviceFunction:
    """Return a device function of a number of each thread: the sum of all, in every thread.

    All threads of a block of whole warps call it, once; it has one barrier.
    """
    lanes, nothing = uint32(WARP), kind(0)

    @device
    def run(value):
        sums = cuda.shared.array(MOST_WARPS, kind)
        thread = uint32(cuda.threadIdx.x)
        value = sum_of_warp(value)
        if thread % lanes == uint32(0):
            sums[thread // lanes] = value
        cuda.syncthreads()
        total = nothing
        for w in range(uint32(cuda.blockDim.x) // lanes):
            total += sums[w]
        return total

    return run
