"""A whole sequence in one launch, W_hh split by columns over the blocks of a group.

A group of blocks holds one copy of W_hh in registers and shared memory, and owns some rows of the
batch, which it takes through all T steps. In each step every block computes its columns of H_t, and
the group exchanges them once (``gpurnn.kernels.exchange``). Groups need nothing of one another.

``share`` is a ``gpurnn.tile.Share``, which multiplies in float32, or a ``TensorShare``, for tensor
cores. Both kernels are launched with blocks of ``share.threads`` threads and ``share.shared_bytes``
of dynamic shared memory, in a grid of ``share.blocks`` for each group: block i is number
i mod blocks of group i // blocks. With the exchange "cluster" a group is a cluster; with the others
the launch is cooperative. A block whose columns all lie beyond h only meets the others: it reads no
states, as nobody waits until it has.
"""

from collections.abc import Callable

from numba import cuda, uint32, uint64

from gpurnn.kernels import split, tensor
from gpurnn.kernels.activations import Pair
from gpurnn.kernels.device import DeviceFunction, device, factor_at
from gpurnn.kernels.exchange import exchange
from gpurnn.kernels.part import Part
from gpurnn.kernels.ptx import prefetch_l2
from gpurnn.kernels.storage import Storage
from gpurnn.kernels.tokens import source
from gpurnn.tile import Share, TensorShare

__all__ = ["backward", "forward"]

AHEAD = 4
"""Steps ahead that the L2 cache is told of what a group of one or two rows will read."""
FEW_ROWS = 2


def _part(share: Share | TensorShare, storage: Storage, *, transposed: bool) -> Part:
    make = split.part if isinstance(share, Share) else tensor.part
    return make(share, storage, transposed=transposed)


def _stores_late(share: Share | TensorShare, name: str) -> bool:
    """Whether a step's values go to global memory when they are sent, and not before.

    What a cluster's barrier releases waits for all stores before it, so those come after. Others
    read the values from there only where the exchange is "counter".
    """
    return share.passes == 1 and name != "counter"


def _keep(share: Share | TensorShare, part: Part, storage: Storage) -> DeviceFunction:
    """Build a function that stores what a thread has made of a step, from ``at`` on in a flat A."""
    own, h, store_value = part.own, uint32(share.h), storage.store
    row_of, column_of = part.row, part.column

    @device
    def keep(A, at, rows, column, mine, made):
        for q in range(own):
            row, j = row_of(q), column + column_of(q)
            if mine and row < rows and j < h:
                A[at + uint64(row * h + j)] = store_value(made[q])

    return keep


def forward(
    share: Share | TensorShare, pair: Pair, storage: Storage, name: str, *, by_id: bool = False
) -> Callable[..., None]:
    """Build ``kernel(Z, states, W_hh, b_h, words, report, T, n, row_0, patience)``.

    ``by_id`` kernels take X and W_xh before the others, and W_xh[X_t] in place of Z_t.

    H_t = φ(Z_t + b_h + H_{t-1} W_hh) (9.4.5), for the rows of the batch from row_0 on, as many as
    the groups of the grid own, or up to n. ``name`` is that of the exchange.

    Arrays, those of sequences flat:
        Z (T · n · h): read, X_t W_xh. Where ``pair.of_output`` is false, Z_t is overwritten with
            the whole pre-activation. ``by_id`` it is not read, and where ``pair.of_output`` not
            used.
        X (T · n), W_xh (d · h): read, ids and the rows that they pick.
        states ((T + 1) · n · h): h_0, the first n · h, is read; the rest is written, H.
        W_hh (h, h), b_h (h,): read.
        words (uint64): scratch of the exchange, 0 before.
        report (blocks of the grid, uint32): 0 before. Where a block waited in vain in step t, its
            element becomes t + 1, and the rest of its columns of H becomes NaN, and of Z where that
            is written.

    T ≥ 1, and row_0 < n. Z may be the part of states that is written, where ``pair.of_output``:
    each element of Z_t is read by the thread that later writes the same element of H_t. Otherwise
    nothing may overlap. After a step's exchange, blocks of a group may read H_t of states.

    Who does what: the thread that owns a sum (``gpurnn.kernels.part``) reads the same element of
    Z_t, before the exchange of the step before, applies φ, and writes and sends the element of H_t.
    The id that says which of W_xh that is it reads a pass earlier.
    """
    part = _part(share, storage, transposed=False)
    begin, send, post, wait = exchange(name, share, part, storage)
    element, weight, weights, sums, own = part[:5]
    clear, load, place, encode = part.clear, part.load, part.place, part.encode
    multiply, finish, result = part.multiply, part.finish, part.result
    row_of, column_of, owner = part.row, part.column, part.owner
    real, load_value, store_value, phi = storage.real, storage.load, storage.store, pair.phi
    learn_row, number, announce = source(storage, by_id=by_id)
    keeps_z, looks_ahead = not pair.of_output, share.slice_rows <= FEW_ROWS
    stores_late = _stores_late(share, name)
    h, blocks, threads = uint32(share.h), uint32(share.blocks), uint32(share.threads)
    width, R, slice_rows = uint32(share.width), uint32(share.rows), uint32(share.slice_rows)
    several, passes = share.passes > 1, uint32(share.passes)
    nan, zero, first, one, two, ahead = (
        real(float("nan")),
        real(0),
        uint32(0),
        uint32(1),
        uint32(2),
        uint32(AHEAD),
    )

    @device
    def learn(A, of_x, rows, r, mine, ids):
        """Fetch what is known of the thread's rows from r on; of_x is the group's first in A."""
        for q in range(own):
            row = r + row_of(q)
            if mine and row < rows:
                learn_row(ids, q, A, of_x + uint64(row))

    @device
    def fetch(A, W_xh, ids, at, rows, r, column, mine, z):
        for q in range(own):
            row, j = r + row_of(q), column + column_of(q)
            z[q] = zero
            if mine and row < rows and j < h:
                z[q] = number(A, W_xh, ids, q, at + uint64(row * h + j), h, j)

    keep = _keep(share, part, storage)

    @device
    def body(A, W_xh, Z, states, W_hh, b_h, words, report, T, n, row_0, patience):
        v = cuda.shared.array(0, element, alignment=16)
        w = cuda.local.array(weights, weight)
        acc = cuda.local.array(sums, real)
        z = cuda.local.array(own, real)
        b = cuda.local.array(own, real)
        made = cuda.local.array(own, real)
        ids, later = z, z
        if by_id:  # an array that no one uses makes the compiler arrange the rest anew
            ids = cuda.local.array(own, uint32)
            later = cuda.local.array(own, uint32)

        T, patience = uint32(T), uint32(patience)
        thread = uint32(cuda.threadIdx.x)
        rank, group = uint32(cuda.blockIdx.x) % blocks, uint32(cuda.blockIdx.x) // blocks
        row = uint32(row_0) + group * slice_rows
        column, mine = rank * width, owner()
        rows = first
        if row < uint32(n) and column < h:
            rows = min(slice_rows, uint32(n) - row)
        step = uint64(n) * uint64(h)
        at = uint64(row) * uint64(h)  # of the group's first number in step t
        batch, of_x = uint64(n), uint64(row)  # of its first row

        if by_id:
            learn(A, of_x, rows, first, mine, ids)
        load(W_hh, w, v, column)
        clear(v)
        cuda.syncthreads()
        for e in range(thread, rows * h, threads):
            v[place(first, e // h, e % h)] = encode(load_value(states[at + uint64(e)]))
        for q in range(own):
            j = column + column_of(q)
            b[q] = zero
            if j < h:
                b[q] = load_value(b_h[j])
        fetch(A, W_xh, ids, at, rows, first, column, mine, z)
        if several:
            learn(A, of_x, rows, R, mine, ids)
        elif one < T:
            learn(A, of_x + batch, rows, first, mine, ids)
        if looks_ahead and ahead < T:
            learn(A, of_x + uint64(ahead) * batch, rows, first, mine, later)
        begin()

        now, t, failed = first, first, first
        while t < T and failed == first:
            then, more = one - now, t + one < T
            for i in range(passes):
                r = i * R
                multiply(w, v, now, r, acc)
                finish(acc, v)
                for q in range(own):
                    row, j = r + row_of(q), column + column_of(q)
                    if mine and row < rows and j < h:
                        here = at + uint64(row * h + j)
                        a = result(acc, q) + (z[q] + b[q])
                        if keeps_z:
                            Z[here] = store_value(a)
                        H = store_value(phi(a))
                        if more:
                            send(words, v, group, then, row, j, load_value(H), t + one)
                        if stores_late:
                            made[q] = load_value(H)
                        else:
                            states[here + step] = H
                        if looks_ahead and t + ahead < T:
                            announce(A, W_xh, later, q, here + uint64(ahead) * step, h, j)
                if several and i + one < passes:
                    fetch(A, W_xh, ids, at, rows, r + R, column, mine, z)
                    if i + two < passes:
                        learn(A, of_x, rows, r + R + R, mine, ids)
                    elif more:
                        learn(A, of_x + batch, rows, first, mine, ids)
                    if looks_ahead and t + ahead < T:
                        learn(A, of_x + uint64(ahead) * batch, rows, r + R, mine, later)
            if more:
                post(words, group)
            at += step
            of_x += batch
            if more:
                fetch(A, W_xh, ids, at, rows, first, column, mine, z)
                if several:
                    learn(A, of_x, rows, R, mine, ids)
                elif t + two < T:
                    learn(A, of_x + batch, rows, first, mine, ids)
                if looks_ahead and t + ahead + one < T:
                    learn(A, of_x + uint64(ahead) * batch, rows, first, mine, later)
            if stores_late:
                keep(states, at, rows, column, mine, made)
            if more:
                failed = wait(words, v, states, at, group, then, rows, t + one, patience)
            now = then
            t += one

        if failed != first:
            if thread == first:
                report[cuda.blockIdx.x] = t
            for _ in range(t, T):
                for e in range(thread, rows * width, threads):
                    j = column + e % width
                    if j < h:
                        place_in_step = at + uint64(e // width * h + j)
                        if keeps_z:
                            Z[place_in_step] = store_value(nan)
                        states[place_in_step + step] = store_value(nan)
                at += step

    if by_id:

        def group_forward_by_id(
            X, W_xh, Z, states, W_hh, b_h, words, report, T, n, row_0, patience
        ):
            body(X, W_xh, Z, states, W_hh, b_h, words, report, T, n, row_0, patience)

        return group_forward_by_id

    def group_forward(Z, states, W_hh, b_h, words, report, T, n, row_0, patience):
        body(Z, b_h, Z, states, W_hh, b_h, words, report, T, n, row_0, patience)

    return group_forward


def backward(
    share: Share | TensorShare, pair: Pair, storage: Storage, name: str, *, scaled: bool = False
) -> Callable[..., None]:
    """Build ``kernel(dH, A, grads, W_hh, words, report, T, n, row_0, patience)``.

    ``scaled`` kernels take ξ behind the other arrays. dZ_t = φ′ · (dH_t + ξ_{t+1} dZ_{t+1} W_hhᵀ)
    from the last step, which takes nothing from beyond, to the first; what flows out of that is
    dh_0 (9.7.2). ``name`` is that of the exchange.

    Arrays, those of sequences flat:
        dH (T · n · h): read, the derivative by each H_t as output of its step.
        A (T · n · h): read, what φ′ wants: H where ``pair.of_output``, else the pre-activations.
        grads ((T + 1) · n · h): written, dh_0 and then dZ.
        W_hh (h, h): read.
        words (uint64): scratch of the exchange, 0 before.
        report (blocks of the grid, uint32): 0 before. Where a block waited in vain for dZ_t, its
            element becomes T − t, and the rest of its columns of grads becomes NaN.
        xi (T,) of ``storage.real``: read, ξ_t scales what flows from step t to the state before it.

    T ≥ 1, and row_0 < n. Nothing may overlap, but dH may be the dZ of grads: each element of dH_t
    is read by the thread that later writes the same element of dZ_t.

    Who does what: as in ``forward``, with dZ_t in place of H_{t-1}. What is multiplied is dZ_t as
    it is stored.
    """
    part = _part(share, storage, transposed=True)
    begin, send, post, wait = exchange(name, share, part, storage)
    element, weight, weights, sums, own = part[:5]
    clear, load = part.clear, part.load
    multiply, finish, result = part.multiply, part.finish, part.result
    row_of, column_of, owner = part.row, part.column, part.owner
    real, load_value, store_value, dphi = storage.real, storage.load, storage.store, pair.dphi
    looks_ahead, stores_late = share.slice_rows <= FEW_ROWS, _stores_late(share, name)
    h, blocks, threads = uint32(share.h), uint32(share.blocks), uint32(share.threads)
    width, R, slice_rows = uint32(share.width), uint32(share.rows), uint32(share.slice_rows)
    several, passes = share.passes > 1, uint32(share.passes)
    nan, zero, first, one, ahead = (
        real(float("nan")),
        real(0),
        uint32(0),
        uint32(1),
        uint32(AHEAD),
    )
    factor = factor_at(real, scaled=scaled)

    @device
    def fetch(dH, A, at, rows, r, column, mine, dh, a):
        for q in range(own):
            row, j = r + row_of(q), column + column_of(q)
            dh[q], a[q] = zero, zero
            if mine and row < rows and j < h:
                here = at + uint64(row * h + j)
                dh[q], a[q] = load_value(dH[here]), load_value(A[here])

    keep = _keep(share, part, storage)

    @device
    def body(dH, A, grads, W_hh, words, report, xi, T, n, row_0, patience):
        v = cuda.shared.array(0, element, alignment=16)
        w = cuda.local.array(weights, weight)
        acc = cuda.local.array(sums, real)
        dh = cuda.local.array(own, real)
        a = cuda.local.array(own, real)
        made = cuda.local.array(own, real)

        thread = uint32(cuda.threadIdx.x)
        rank, group = uint32(cuda.blockIdx.x) % blocks, uint32(cuda.blockIdx.x) // blocks
        row = row_0 + group * slice_rows
        column, mine = rank * width, owner()
        rows = first
        if row < n and column < h:
            rows = min(slice_rows, n - row)
        step = uint64(n) * uint64(h)
        at = uint64(row) * uint64(h) + uint64(T) * step  # of the group's first number in grads[i]

        load(W_hh, w, v, column)
        clear(v)
        fetch(dH, A, at - step, rows, first, column, mine, dh, a)
        begin()

        now, i, failed = first, T, first
        scale = zero
        while failed == first:
            then = one - now
            for k in range(passes):
                r = k * R
                if i < T:
                    multiply(w, v, now, r, acc)
                    finish(acc, v)
                for q in range(own):
                    row, j = r + row_of(q), column + column_of(q)
                    if mine and row < rows and j < h:
                        here = at + uint64(row * h + j)
                        gradient = result(acc, q) * scale if i < T else zero
                        if i > first:
                            gradient = (gradient + dh[q]) * dphi(a[q])
                            if looks_ahead and i > ahead:
                                prefetch_l2(dH, here - uint64(ahead + one) * step)
                                prefetch_l2(A, here - uint64(ahead + one) * step)
                        dZ = store_value(gradient)
                        if i > first:
                            send(words, v, group, then, row, j, load_value(dZ), T - i + one)
                        if stores_late:
                            made[q] = load_value(dZ)
                        else:
                            grads[here] = dZ
                if several and k + one < passes and i > first:
                    fetch(dH, A, at - step, rows, r + R, column, mine, dh, a)
            if i > first:
                post(words, group)
                scale = factor(xi, i - one)
                if i > one:
                    fetch(dH, A, at - step - step, rows, first, column, mine, dh, a)
            if stores_late:
                keep(grads, at, rows, column, mine, made)
            if i == first:
                break
            failed = wait(words, v, grads, at, group, then, rows, T - i + one, patience)
            now = then
            i -= one
            at -= step

        if failed != first:
            if thread == first:
                report[cuda.blockIdx.x] = T - i
            for _ in range(i + one):
                for e in range(thread, rows * width, threads):
                    j = column + e % width
                    if j < h:
                        grads[at + uint64(e // width * h + j)] = store_value(nan)
                at -= step

    if scaled:

        def group_backward_scaled(dH, A, grads, W_hh, words, report, xi, T, n, row_0, patience):
            body(
                dH,
                A,
                grads,
                W_hh,
                words,
                report,
                xi,
                uint32(T),
                uint32(n),
                uint32(row_0),
                uint32(patience),
            )

        return group_backward_scaled

    def group_backward(dH, A, grads, W_hh, words, report, T, n, row_0, patience):
        body(
            dH,
            A,
            grads,
            W_hh,
            words,
            report,
            W_hh,
            uint32(T),
            uint32(n),
            uint32(row_0),
            uint32(patience),
        )

    return group_backward
