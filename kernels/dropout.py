"""Dropout whose mask is a function of its place: made anew in the backward pass, never stored."""

from collections.abc import Callable

from numba import cuda, uint32, uint64

from gpurnn.kernels.philox import philox
from gpurnn.kernels.storage import Storage

__all__ = ["dropout"]

STREAM = uint32(1)  # gpurnn.philox.DROPOUT
OF_A_CALL = uint64(4)  # words
HALF, UNUSED = uint64(32), uint32(8)


def dropout(storage: Storage) -> Callable[..., None]:
    """Build ``kernel(X, Y, scale, counts, below, key_0, key_1, update)``: Y = X · mask · scale.

    Element e is kept where its word, of the update's number ``counts[0] + update``, has upper 24
    bits of ``below`` or more; what is not kept is 0. ``gpurnn.philox`` says which word is whose,
    and ``key_0`` and ``key_1`` are those of a seed.

    Arrays:
        X, flat: read. Y, as large: written; it may be X.
        scale (1,) of ``storage.real``: read. counts (1,) int64: read.

    One thread owns four elements and makes their words; nothing is shared.
    """
    real, load_value, store_value = storage.real, storage.load, storage.store
    zero = real(0)

    def dropout(X, Y, scale, counts, below, key_0, key_1, update):
        call = uint64(cuda.blockIdx.x) * uint64(cuda.blockDim.x) + uint64(cuda.threadIdx.x)
        first, size = call * OF_A_CALL, uint64(X.shape[0])
        if first < size:
            x = cuda.local.array(4, real)
            for k in range(4):
                e = first + uint64(k)
                x[k] = load_value(X[e]) if e < size else zero
            a, b, c, d = philox(
                uint32(call),
                uint32(call >> HALF),
                uint32(counts[0] + update),
                STREAM,
                uint32(key_0),
                uint32(key_1),
            )
            words = uint32(a), uint32(b), uint32(c), uint32(d)
            factor, least = scale[0], uint32(below)
            for k in range(4):
                e = first + uint64(k)
                if e < size:
                    kept = words[k] >> UNUSED >= least
                    Y[e] = store_value(x[k] * factor if kept else zero)

    return dropout
