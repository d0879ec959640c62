"""How many rows count, and the mean of their losses: numbers that stay on the device.

Kernels of one block, which neither wait for the host nor add in an order that could change.
"""

from collections.abc import Callable

from numba import cuda, float64, int64, uint32

from gpurnn.kernels.storage import Storage
from gpurnn.kernels.sums import sum_of_block

__all__ = ["loss_mean", "target_count"]

AT_ONCE = 8  # losses or targets that a thread loads before it adds them


def target_count() -> Callable[..., None]:
    """Build ``kernel(targets, counts, ignored)``: counts[0] = how many targets are not ``ignored``.

    targets (N,) int32 is read, counts (1,) int64 written. One block of up to 32 whole warps.
    """
    summed = sum_of_block(int64)
    nothing, another = int64(0), int64(1)

    def target_count(targets, counts, ignored):
        N, threads = uint32(targets.shape[0]), uint32(cuda.blockDim.x)
        found = nothing
        first = uint32(cuda.threadIdx.x)
        while first < N:
            for k in range(AT_ONCE):
                i = uint32(first + uint32(k) * threads)
                if i < N and int64(targets[i]) != ignored:
                    found += another
            first = uint32(first + uint32(AT_ONCE) * threads)
        found = summed(found)
        if cuda.threadIdx.x == 0:
            counts[0] = found

    return target_count


def loss_mean(storage: Storage) -> Callable[..., None]:
    """Build ``kernel(losses, counts, mean, rows)``: mean[0] = Σ losses / (counts[0] + ``rows``).

    losses (N,) of ``storage.real`` and counts (1,) int64 are read, mean (1,) float64 is written:
    the sum is taken in float64, and the mean of no row is NaN. One block of up to 32 whole warps.
    """
    summed = sum_of_block(float64)
    real, nothing = storage.real, float64(0)

    def loss_mean(losses, counts, mean, rows):
        N, threads = uint32(losses.shape[0]), uint32(cuda.blockDim.x)
        loaded = cuda.local.array(AT_ONCE, real)
        total = nothing
        first = uint32(cuda.threadIdx.x)
        while first < N:
            for k in range(AT_ONCE):
                i = uint32(first + uint32(k) * threads)
                loaded[k] = losses[i] if i < N else real(0)
            for k in range(AT_ONCE):
                total += float64(loaded[k])
            first = uint32(first + uint32(AT_ONCE) * threads)
        total = summed(total)
        if cuda.threadIdx.x == 0:
            mean[0] = total / float64(counts[0] + rows)

    return loss_mean
