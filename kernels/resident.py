"""A whole sequence in one launch, W_hh resident in the registers and shared memory of each block.

The rows of a batch never meet, so each block takes its own rows through all T steps, and blocks
need nothing of each other. Within a step a block multiplies its states with W_hh (see
``gpurnn.kernels.product``), adds what came from the input, applies φ, and one barrier later its
threads read the new states out of shared memory.

Both kernels are launched with ⌈n / rows⌉ blocks of ``tile.threads`` threads and
``tile.shared_weights`` numbers of dynamic shared memory. The last block may own fewer rows.
"""

from collections.abc import Callable

from numba import cuda, uint32, uint64

from gpurnn.kernels.activations import Pair
from gpurnn.kernels.device import device, factor_at
from gpurnn.kernels.product import product
from gpurnn.kernels.ptx import prefetch_l2
from gpurnn.kernels.storage import Storage
from gpurnn.kernels.tokens import source
from gpurnn.tile import Tile

__all__ = ["backward", "forward"]

AHEAD = 4
"""Steps ahead that the L2 cache is told of what a block of one row will read: its step is longer
than a load from there, and shorter than one from memory. A step of more rows is longer than both.
"""


def forward(
    tile: Tile, pair: Pair, storage: Storage, *, by_id: bool = False
) -> Callable[..., None]:
    """Build ``kernel(Z, states, W_hh, b_h, T, n)``: H_t = φ(Z_t + b_h + H_{t-1} W_hh) (9.4.5).

    ``by_id``: ``kernel(X, W_xh, Z, states, W_hh, b_h, T, n)``, with W_xh[X_t] in place of Z_t.

    Arrays, those of sequences flat:
        Z (T · n · h): read, X_t W_xh. Where ``pair.of_output`` is false, Z_t is overwritten with
            the whole pre-activation, which φ′ will need. ``by_id`` it is not read, and where
            ``pair.of_output`` not used.
        X (T · n), W_xh (d · h): read, ids and the rows that they pick.
        states ((T + 1) · n · h): the first n · h are read, h_0; the rest is written, H.
        W_hh (h, h), b_h (h,): read.

    T ≥ 1, n ≥ 1. Z may be the part of states that is written, where ``pair.of_output``: each
    element of Z_t is read by the thread that later writes the same element of H_t. Otherwise
    nothing may overlap.

    Who does what: the thread that owns column j (``tile``) reads Z[t, r, j], applies φ and writes
    H[t, r, j] for each row r of its block. Z_{t+1} is fetched while step t computes, and where a
    block has one row Z_{t+4} is brought to the L2 cache. So are the rows of W_xh; the id of each is
    fetched a step before it is wanted for that.

    Barriers: the states of step t lie in one of two buffers in shared memory. A block writes those
    of t + 1 into the other and meets at one barrier. That orders this step's writes before the
    next step's reads, and this step's reads before the writes of the step after the next.
    """
    R, S, own, depth, stride, width = (
        tile.rows,
        tile.slices,
        tile.own,
        tile.depth,
        tile.stride,
        tile.h,
    )
    C, kept = tile.columns, tile.kept
    exact, keeps_z, looks_ahead = tile.exact, not pair.of_output, R == 1
    real, load_value, store_value, phi = storage.real, storage.load, storage.store, pair.phi
    clear, load, multiply, reduce = product(tile, real, load_value, transposed=False)
    learn, number, announce = source(storage, by_id=by_id)
    h, k_depth, group_columns = uint32(tile.h), uint32(depth), uint32(C)
    lanes, owned, rows = uint32(S), uint32(own), uint32(R)
    zero, first, one, two, ahead = real(0), uint32(0), uint32(1), uint32(2), uint32(AHEAD)

    @device
    def body(A, W_xh, Z, states, W_hh, b_h, T, n):
        v = cuda.shared.array((2, R, S, stride), real, alignment=16)
        ws = cuda.shared.array(0, real, alignment=16)
        w = cuda.local.array((kept, C), real)
        acc = cuda.local.array((R, C), real)
        z = cuda.local.array((R, own), real)
        b = cuda.local.array(own, real)
        ids, later = z, z
        if by_id:  # an array that no one uses makes the compiler arrange the rest anew
            ids = cuda.local.array(R, uint32)
            later = cuda.local.array(1, uint32)

        thread = uint32(cuda.threadIdx.x)
        s, group = thread % lanes, thread // lanes
        row = uint32(cuda.blockIdx.x) * rows
        column = group * group_columns + s * owned
        step = uint64(n) * uint64(h)
        at = uint64(row) * uint64(h) + uint64(column)  # of the first number the thread owns
        batch, of_x = uint64(n), uint64(row)  # of the block's first row in step t

        if by_id:
            for r in range(R):
                if row + uint32(r) < n:
                    learn(ids, r, A, of_x + uint64(r))
        load(W_hh, w, ws, s * k_depth, group * group_columns)
        clear(v)
        cuda.syncthreads()
        for p in range(own):
            j = column + uint32(p)
            b[p] = zero
            if exact or j < h:
                b[p] = load_value(b_h[j])
            for r in range(R):
                z[r, p] = zero
                if row + uint32(r) < n and (exact or j < h):
                    place = at + uint64(r * width + p)
                    z[r, p] = number(A, W_xh, ids, r, place, h, j)
                    v[first, r, j // k_depth, j % k_depth] = load_value(states[place])
        if by_id and one < T:
            for r in range(R):
                if row + uint32(r) < n:
                    learn(ids, r, A, of_x + batch + uint64(r))
        if looks_ahead and row < n and ahead < T:
            learn(later, 0, A, of_x + uint64(ahead) * batch)
        cuda.syncthreads()

        now = first
        for t in range(first, T):
            for r in range(R):
                for c in range(C):
                    acc[r, c] = zero
            multiply(w, ws, v[now], s, acc)
            reduce(acc, s, 0, 0, 0)
            now = one - now
            more = t + one < T
            for r in range(R):
                for p in range(own):
                    j = column + uint32(p)
                    a = acc[r, p] + (z[r, p] + b[p])
                    if row + uint32(r) < n and (exact or j < h):
                        place = at + uint64(r * width + p)
                        after = place + step
                        if more:
                            z[r, p] = number(A, W_xh, ids, r, after, h, j)
                        if looks_ahead and t + ahead < T:
                            announce(A, W_xh, later, 0, place + uint64(ahead) * step, h, j)
                        if keeps_z:
                            Z[place] = store_value(a)
                        H = store_value(phi(a))
                        states[after] = H
                        v[now, r, j // k_depth, j % k_depth] = load_value(H)
                if by_id and row + uint32(r) < n and t + two < T:
                    learn(ids, r, A, of_x + uint64(two) * batch + uint64(r))
            if looks_ahead and row < n and t + ahead + one < T:
                learn(later, 0, A, of_x + uint64(ahead + one) * batch)
            at += step
            of_x += batch
            cuda.syncthreads()

    if by_id:

        def resident_forward_by_id(X, W_xh, Z, states, W_hh, b_h, T, n):
            body(X, W_xh, Z, states, W_hh, b_h, uint32(T), uint32(n))

        return resident_forward_by_id

    def resident_forward(Z, states, W_hh, b_h, T, n):
        body(Z, b_h, Z, states, W_hh, b_h, uint32(T), uint32(n))

    return resident_forward


def backward(
    tile: Tile, pair: Pair, storage: Storage, *, scaled: bool = False
) -> Callable[..., None]:
    """Build ``kernel(dH, A, grads, W_hh, T, n)``; ``scaled``: ``(dH, A, grads, W_hh, xi, T, n)``.

    dZ_t = φ′ · (dH_t + ξ_{t+1} dZ_{t+1} W_hhᵀ) from the last step, which takes nothing from beyond,
    to the first; what flows out of that is dh_0 (9.7.2).

    Arrays, those of sequences flat:
        dH (T · n · h): read, the derivative by each H_t as output of its step.
        A (T · n · h): read, what φ′ wants: H where ``pair.of_output``, else the pre-activations.
        grads ((T + 1) · n · h): written, dh_0 and then dZ.
        W_hh (h, h): read.
        xi (T,) of ``storage.real``: read, ξ_t scales what flows from step t to the state before it.

    T ≥ 1, n ≥ 1. Nothing may overlap, but dH may be the dZ of grads: each element of dH_t is read
    by the thread that later writes the same element of dZ_t.

    Who does what, and the barriers: as in ``forward``, with dZ_t in place of H_{t-1}.
    """
    R, S, own, depth, stride, width = (
        tile.rows,
        tile.slices,
        tile.own,
        tile.depth,
        tile.stride,
        tile.h,
    )
    C, kept = tile.columns, tile.kept
    exact, looks_ahead = tile.exact, R == 1
    real, load_value, store_value, dphi = storage.real, storage.load, storage.store, pair.dphi
    clear, load, multiply, reduce = product(tile, real, load_value, transposed=True)
    h, k_depth, group_columns = uint32(tile.h), uint32(depth), uint32(C)
    lanes, owned, rows = uint32(S), uint32(own), uint32(R)
    zero, first, one, ahead = real(0), uint32(0), uint32(1), uint32(AHEAD)

    factor = factor_at(real, scaled=scaled)

    @device
    def body(dH, A, grads, W_hh, xi, T, n):
        v = cuda.shared.array((2, R, S, stride), real, alignment=16)
        ws = cuda.shared.array(0, real, alignment=16)
        w = cuda.local.array((kept, C), real)
        acc = cuda.local.array((R, C), real)
        dh = cuda.local.array((R, own), real)
        a = cuda.local.array((R, own), real)

        thread = uint32(cuda.threadIdx.x)
        s, group = thread % lanes, thread // lanes
        row = uint32(cuda.blockIdx.x) * rows
        column = group * group_columns + s * owned
        step = uint64(n) * uint64(h)
        begin = uint64(row) * uint64(h) + uint64(column)  # of the first number the thread owns
        at = begin + uint64(T - one) * step

        load(W_hh, w, ws, s * k_depth, group * group_columns)
        clear(v)
        cuda.syncthreads()
        for r in range(R):
            for p in range(own):
                j = column + uint32(p)
                dh[r, p] = zero
                a[r, p] = zero
                if row + uint32(r) < n and (exact or j < h):
                    place = at + uint64(r * width + p)
                    dh[r, p] = load_value(dH[place])
                    a[r, p] = load_value(A[place])
            for c in range(C):
                acc[r, c] = zero

        now = first
        for steps_after in range(first, T):
            t = T - one - steps_after
            scale = factor(xi, t)  # fetched long before it is wanted
            for r in range(R):
                for p in range(own):
                    j = column + uint32(p)
                    if row + uint32(r) < n and (exact or j < h):
                        place = at + uint64(r * width + p)
                        dZ = (dh[r, p] + acc[r, p]) * dphi(a[r, p])
                        grads[place + step] = store_value(dZ)
                        v[now, r, j // k_depth, j % k_depth] = dZ
                        if t > first:
                            dh[r, p] = load_value(dH[place - step])
                            a[r, p] = load_value(A[place - step])
                        if looks_ahead and t >= ahead:
                            prefetch_l2(dH, place - uint64(ahead) * step)
                            prefetch_l2(A, place - uint64(ahead) * step)
                for c in range(C):
                    acc[r, c] = zero
            cuda.syncthreads()
            multiply(w, ws, v[now], s, acc)
            reduce(acc, s, 0, 0, 0)
            for r in range(R):
                for p in range(own):
                    acc[r, p] *= scale
            now = one - now
            at -= step

        for r in range(R):
            for p in range(own):
                j = column + uint32(p)
                if row + uint32(r) < n and (exact or j < h):
                    grads[begin + uint64(r * width + p)] = store_value(acc[r, p])

    if scaled:

        def resident_backward_scaled(dH, A, grads, W_hh, xi, T, n):
            body(dH, A, grads, W_hh, xi, uint32(T), uint32(n))

        return resident_backward_scaled

    def resident_backward(dH, A, grads, W_hh, T, n):
        body(dH, A, grads, W_hh, W_hh, uint32(T), uint32(n))

    return resident_backward
