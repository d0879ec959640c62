"""What follows the product in a step: bias and φ, or ξ and φ′, number by number.

The product is made before, by a library, and handed over in ``P``. So a step is two launches, and
is worth it where it is large: a library multiplies faster than ``gpurnn.kernels.step``.

All kernels here are launched with two-dimensional blocks, x along the h columns and y along the n
rows, and a grid whose x counts blocks of rows, y blocks of columns. A thread owns one number: what
it writes no other thread reads or writes. Nothing is shared, and there is no barrier.
"""

from collections.abc import Callable

from numba import cuda, uint32, uint64

from gpurnn.kernels.activations import Pair
from gpurnn.kernels.device import device, factor_at
from gpurnn.kernels.storage import Storage
from gpurnn.kernels.tokens import source

__all__ = ["backward", "forward"]


@device
def own_row():
    """Return the row of this thread's number."""
    return uint32(cuda.blockIdx.x) * uint32(cuda.blockDim.y) + uint32(cuda.threadIdx.y)


@device
def own_column():
    """Return its column."""
    return uint32(cuda.blockIdx.y) * uint32(cuda.blockDim.x) + uint32(cuda.threadIdx.x)


def forward(pair: Pair, storage: Storage, *, by_id: bool = False) -> Callable[..., None]:
    """Build ``kernel(P, Z, states, b_h, t)``: H_t = φ(Z_t + b_h + P), P = H_{t-1} W_hh (9.4.5).

    ``by_id``: ``kernel(X, W_xh, P, Z, states, b_h, t)``, with W_xh[X_t] in place of Z_t.

    Arrays:
        P (n, h) of ``storage.real``: read.
        Z (T, n, h): Z[t] is read, X_t W_xh; where ``pair.of_output`` is false it is overwritten
            with the whole pre-activation. ``by_id`` it is not read, and where ``pair.of_output``
            not used.
        X (T · n), W_xh (d · h), flat: read, ids and the rows that they pick.
        states (T + 1, n, h): states[t + 1] is written, H_t; the rest is not touched.
        b_h (h,): read.

    Z may be states[1:], where ``pair.of_output``.
    """
    load_value, store_value, phi = storage.load, storage.store, pair.phi
    keeps_z = not pair.of_output
    learn, number, _ = source(storage, by_id=by_id)
    one = uint32(1)

    @device
    def body(A, W_xh, P, Z, states, b_h, t):
        n, h = uint32(P.shape[0]), uint32(P.shape[1])
        row, j = own_row(), own_column()
        if row < n and j < h:
            of_row = cuda.local.array(1, uint32)
            learn(of_row, 0, A, uint64(t) * uint64(n) + uint64(row))
            z = number(A, W_xh, of_row, 0, (t, row, j), h, j)
            a = P[row, j] + (z + load_value(b_h[j]))
            if keeps_z:
                Z[t, row, j] = store_value(a)
            states[t + one, row, j] = store_value(phi(a))

    if by_id:

        def tail_forward_by_id(X, W_xh, P, Z, states, b_h, t):
            body(X, W_xh, P, Z, states, b_h, uint32(t))

        return tail_forward_by_id

    def tail_forward(P, Z, states, b_h, t):
        body(Z, b_h, P, Z, states, b_h, uint32(t))

    return tail_forward


def backward(pair: Pair, storage: Storage, *, scaled: bool = False) -> Callable[..., None]:
    """Build ``kernel(P, dH, A, grads, i)``; ``scaled``: ``kernel(P, dH, A, grads, xi, i)``.

    With P = dZ_i W_hhᵀ it writes grads[i], for an i below T: where i > 0, dZ_{i−1} = φ′ ·
    (dH_{i−1} + ξ_i P), and where i = 0, dh_0 = ξ_0 P (9.7.2). grads[T], to which no later step
    contributes, is not its work.

    Arrays:
        P (n, h) of ``storage.real``: read.
        dH (T, n, h): dH[i − 1] is read where i > 0.
        A (T, n, h): so is A[i − 1], what φ′ wants: H where ``pair.of_output``, else the
            pre-activations.
        grads (T + 1, n, h), or longer: grads[i] is written, the rest is not touched.
        xi of ``storage.real``: xi[i] is read.

    dH may be grads[1:].
    """
    real, load_value, store_value, dphi = storage.real, storage.load, storage.store, pair.dphi
    first, one = uint32(0), uint32(1)
    factor = factor_at(real, scaled=scaled)

    @device
    def body(P, dH, A, grads, xi, i):
        row, j = own_row(), own_column()
        if row < uint32(P.shape[0]) and j < uint32(P.shape[1]):
            dh = P[row, j] * factor(xi, i)
            if i > first:
                dh = (dh + load_value(dH[i - one, row, j])) * dphi(load_value(A[i - one, row, j]))
            grads[i, row, j] = store_value(dh)

    if scaled:

        def tail_backward_scaled(P, dH, A, grads, xi, i):
            body(P, dH, A, grads, xi, uint32(i))

        return tail_backward_scaled

    def tail_backward(P, dH, A, grads, i):
        body(P, dH, A, grads, P, uint32(i))

    return tail_backward
