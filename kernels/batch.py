"""A batch out of a text that lies on the device, and the state from one batch to the next.

With ``gpurnn.kernels.update`` these make a training step that needs nothing from the host: which
batch it is they find in ``counts`` (``gpurnn.slots``).
"""

from collections.abc import Callable

from numba import cuda, float64, int32, uint32, uint64

from gpurnn.slots import Counts

__all__ = ["keep", "stop", "take"]

BATCH, STOPPED, UPDATE = uint32(Counts.BATCH), uint32(Counts.STOPPED), uint32(Counts.UPDATE)
NEXT_BATCH, NEXT_STOPPED = uint32(Counts.NEXT_BATCH), uint32(Counts.NEXT_STOPPED)
FIRST_UPDATE = uint32(Counts.FIRST_UPDATE)


def take() -> Callable[..., None]:
    """Build ``kernel(text, starts, factors, counts, X, Y, xi, T, n, stride)``.

    Arrays, all flat:
        text (ids): read. starts (int64): read; those of batch b begin at b · stride.
        factors: read; ξ of batch b begins at b · T. Of length 0 where nothing is truncated.
        counts: NEXT_BATCH, NEXT_STOPPED and FIRST_UPDATE are read, the others written.
        X, Y (T · n): written. X[t, i] is the id t places behind start i, Y[t, i] the one after it.
        xi (T): written, unless factors is empty.

    Launched with a thread for each of the T · n places; a place is one thread's. Block 0's first
    thread writes counts, which no other reads.
    """

    def take_batch(text, starts, factors, counts, X, Y, xi, T, n, stride):
        e = uint64(cuda.blockIdx.x) * uint64(cuda.blockDim.x) + uint64(cuda.threadIdx.x)
        T, n = uint64(T), uint64(n)
        batch = uint64(counts[NEXT_BATCH])
        if e < T * n:
            at = uint64(starts[batch * uint64(stride) + e % n]) + e // n
            X[e] = text[at]
            Y[e] = text[at + uint64(1)]
        if e < T and factors.shape[0] > 0:
            xi[e] = factors[batch * T + e]
        if e == uint64(0):
            counts[BATCH] = counts[NEXT_BATCH]
            counts[STOPPED] = counts[NEXT_STOPPED]
            counts[UPDATE] = counts[FIRST_UPDATE] + counts[NEXT_BATCH]

    return take_batch


def keep() -> Callable[..., None]:
    """Build ``kernel(source, target, counts)``: target = source, unless the step was refused.

    source and target are flat and of one length, a thread for each number. Of counts NEXT_STOPPED
    is read, which the update before has written.
    """

    def keep_state(source, target, counts):
        i = uint64(cuda.blockIdx.x) * uint64(cuda.blockDim.x) + uint64(cuda.threadIdx.x)
        if i < uint64(source.shape[0]) and counts[NEXT_STOPPED] == 0:
            target[i] = source[i]

    return keep_state


def stop() -> Callable[..., None]:
    """Build ``kernel(numbers, counts)``: no later step changes anything unless all are finite.

    numbers (N,) float64 is read; of counts NEXT_STOPPED is written, or left as it is. One block.
    """
    nothing = float64(0)

    def stop_unless_finite(numbers, counts):
        spoilt = False
        i = uint32(cuda.threadIdx.x)
        while i < uint32(numbers.shape[0]):
            if numbers[i] - numbers[i] != nothing:
                spoilt = True
            i = uint32(i + uint32(cuda.blockDim.x))
        any_spoilt = cuda.syncthreads_or(int32(spoilt))
        if cuda.threadIdx.x == 0 and any_spoilt != 0:
            counts[NEXT_STOPPED] = 1

    return stop_unless_finite
