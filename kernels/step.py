"""One time step in one launch: product, bias and φ fused, tiled through shared memory.

The plain version, to be read first, and the one that takes any shape. Nothing is kept on the chip
between steps: each reads W_hh again, and starts where the launch before it ended.

All kernels here are launched with blocks of (side, side) threads and a grid of
(⌈n / side⌉, ⌈h / side⌉). Thread (x, y) computes one number, in row ``blockIdx.x · side + y`` and
column ``blockIdx.y · side + x``.
"""

from collections.abc import Callable

from numba import cuda, uint32, uint64

from gpurnn.kernels.activations import Pair
from gpurnn.kernels.device import device, factor_at
from gpurnn.kernels.storage import Storage
from gpurnn.kernels.tiled import tiled_product
from gpurnn.kernels.tokens import source

__all__ = ["backward", "concatenated", "forward"]


def forward(side: int, pair: Pair, storage: Storage, *, by_id: bool = False) -> Callable[..., None]:
    """Build ``kernel(Z, states, W_hh, b_h, t)``: H_t = φ(Z_t + b_h + H_{t-1} W_hh) (9.4.5).

    ``by_id``: ``kernel(X, W_xh, Z, states, W_hh, b_h, t)``, with W_xh[X_t] in place of Z_t.

    Arrays:
        Z (T, n, h): Z[t] is read, X_t W_xh; where ``pair.of_output`` is false it is overwritten
            with the whole pre-activation. ``by_id`` it is not read, and where ``pair.of_output``
            not used.
        X (T · n), W_xh (d · h), flat: read, ids and the rows that they pick.
        states (T + 1, n, h): states[t] is read, H_{t-1}; states[t + 1] is written, H_t.
        W_hh (h, h), b_h (h,): read.

    Z may be states[1:], where ``pair.of_output``: a thread writes only where it alone has read.
    """
    load_value, store_value, phi = storage.load, storage.store, pair.phi
    keeps_z = not pair.of_output
    dot = tiled_product(side, storage, transposed=False)
    learn, number, _ = source(storage, by_id=by_id)
    width, one = uint32(side), uint32(1)

    @device
    def body(A, W_xh, Z, states, W_hh, b_h, t):
        n, h = uint32(states.shape[1]), uint32(states.shape[2])
        row = uint32(cuda.blockIdx.x) * width + uint32(cuda.threadIdx.y)
        j = uint32(cuda.blockIdx.y) * width + uint32(cuda.threadIdx.x)
        of_row = cuda.local.array(1, uint32)
        if row < n:
            learn(of_row, 0, A, uint64(t) * uint64(n) + uint64(row))
        recurrent = dot(states[t], W_hh, row, j)
        if row < n and j < h:
            z = number(A, W_xh, of_row, 0, (t, row, j), h, j)
            a = recurrent + (z + load_value(b_h[j]))
            if keeps_z:
                Z[t, row, j] = store_value(a)
            states[t + one, row, j] = store_value(phi(a))

    if by_id:

        def step_forward_by_id(X, W_xh, Z, states, W_hh, b_h, t):
            body(X, W_xh, Z, states, W_hh, b_h, uint32(t))

        return step_forward_by_id

    def step_forward(Z, states, W_hh, b_h, t):
        body(Z, b_h, Z, states, W_hh, b_h, uint32(t))

    return step_forward


def concatenated(side: int, pair: Pair, storage: Storage) -> Callable[..., None]:
    """Build ``kernel(X, Z, states, W_xh, W_hh, b_h, t)``.

    H_t = φ([X_t, H_{t-1}] [W_xh; W_hh] + b_h), the chapter's other way of writing (9.4.5): one
    product over d + h terms, of matrices that lie where they are. X (T, n, d) and W_xh (d, h) are
    read; Z (T, n, h) is written with the pre-activation where ``pair.of_output`` is false, else not
    used; the rest is as in ``forward``.
    """
    load_value, store_value, phi = storage.load, storage.store, pair.phi
    keeps_z = not pair.of_output
    dot = tiled_product(side, storage, transposed=False)
    width, one = uint32(side), uint32(1)

    def step_concatenated(X, Z, states, W_xh, W_hh, b_h, t):
        t = uint32(t)
        n, h = uint32(states.shape[1]), uint32(states.shape[2])
        row = uint32(cuda.blockIdx.x) * width + uint32(cuda.threadIdx.y)
        j = uint32(cuda.blockIdx.y) * width + uint32(cuda.threadIdx.x)
        both = dot(X[t], W_xh, row, j) + dot(states[t], W_hh, row, j)
        if row < n and j < h:
            a = both + load_value(b_h[j])
            if keeps_z:
                Z[t, row, j] = store_value(a)
            states[t + one, row, j] = store_value(phi(a))

    return step_concatenated


def backward(
    side: int, pair: Pair, storage: Storage, *, scaled: bool = False
) -> Callable[..., None]:
    """Build ``kernel(dH, A, grads, W_hh, i)``; ``scaled``: ``kernel(dH, A, grads, W_hh, xi, i)``.

    It writes grads[i], for i from T down to 0: where i > 0, dZ_{i−1} = φ′ · (dH_{i−1} + ξ_i dZ_i
    W_hhᵀ), and where i = 0, dh_0 = ξ_0 dZ_0 W_hhᵀ (9.7.2).

    Arrays:
        dH (T, n, h): dH[i − 1] is read where i > 0.
        A (T, n, h): so is A[i − 1], what φ′ wants: H where ``pair.of_output``, else the
            pre-activations.
        grads (T + 1, n, h): grads[i + 1] is read where i < T; grads[i] is written.
        W_hh (h, h): read. xi (T,) of ``storage.real``: xi[i] is read where i < T.

    dH may be grads[1:]: a thread writes only where it alone has read.
    """
    real, load_value, store_value, dphi = storage.real, storage.load, storage.store, pair.dphi
    dot = tiled_product(side, storage, transposed=True)
    width, first, one, zero = uint32(side), uint32(0), uint32(1), real(0)

    factor = factor_at(real, scaled=scaled)

    @device
    def body(dH, A, grads, W_hh, xi, i):
        T, n, h = uint32(dH.shape[0]), uint32(dH.shape[1]), uint32(dH.shape[2])
        row = uint32(cuda.blockIdx.x) * width + uint32(cuda.threadIdx.y)
        j = uint32(cuda.blockIdx.y) * width + uint32(cuda.threadIdx.x)
        dh = zero
        if i < T:  # the same for all threads
            dh = dot(grads[i + one], W_hh, row, j) * factor(xi, i)
        if row < n and j < h:
            if i > first:
                dh = (dh + load_value(dH[i - one, row, j])) * dphi(load_value(A[i - one, row, j]))
            grads[i, row, j] = store_value(dh)

    if scaled:

        def step_backward_scaled(dH, A, grads, W_hh, xi, i):
            body(dH, A, grads, W_hh, xi, uint32(i))

        return step_backward_scaled

    def step_backward(dH, A, grads, W_hh, i):
        body(dH, A, grads, W_hh, W_hh, uint32(i))

    return step_backward
