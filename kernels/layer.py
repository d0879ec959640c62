"""A layer without a state, H = φ(X W_xh + b_h), in one launch (9.4.3).

``forward`` is launched like the kernels of ``gpurnn.kernels.step``, ``backward`` with one thread
for each number.
"""

from collections.abc import Callable

from numba import cuda, uint32, uint64

from gpurnn.kernels.activations import Pair
from gpurnn.kernels.storage import Storage
from gpurnn.kernels.tiled import tiled_product

__all__ = ["backward", "forward"]


def forward(side: int, pair: Pair, storage: Storage) -> Callable[..., None]:
    """Build ``kernel(X, Z, H, W_xh, b_h)``: H = φ(X W_xh + b_h).

    X (n, d), W_xh (d, h) and b_h (h,) are read, H (n, h) is written; Z (n, h) is written with the
    pre-activation where ``pair.of_output`` is false, else not used. Nothing may overlap.
    """
    load_value, store_value, phi = storage.load, storage.store, pair.phi
    keeps_z = not pair.of_output
    dot = tiled_product(side, storage, transposed=False)
    width = uint32(side)

    def layer_forward(X, Z, H, W_xh, b_h):
        n, h = uint32(H.shape[0]), uint32(H.shape[1])
        row = uint32(cuda.blockIdx.x) * width + uint32(cuda.threadIdx.y)
        j = uint32(cuda.blockIdx.y) * width + uint32(cuda.threadIdx.x)
        a = dot(X, W_xh, row, j)
        if row < n and j < h:
            a += load_value(b_h[j])
            if keeps_z:
                Z[row, j] = store_value(a)
            H[row, j] = store_value(phi(a))

    return layer_forward


def backward(pair: Pair, storage: Storage) -> Callable[..., None]:
    """Build ``kernel(dH, A, dZ)``: dZ = dH φ′, number by number.

    All are flat, of one size. A is what φ′ wants: H where ``pair.of_output``, else the
    pre-activations. dZ is written and may be dH.
    """
    load_value, store_value, dphi = storage.load, storage.store, pair.dphi

    def layer_backward(dH, A, dZ):
        i = uint64(cuda.blockIdx.x) * uint64(cuda.blockDim.x) + uint64(cuda.threadIdx.x)
        if i < uint64(dH.shape[0]):
            dZ[i] = store_value(load_value(dH[i]) * dphi(load_value(A[i])))

    return layer_backward
