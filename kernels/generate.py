"""A text in one launch: each block reads a prefix, and goes on with tokens that it draws.

One block generates one row of the batch, and blocks need nothing of one another. ``gpurnn.dense.
RowSizes`` says where the weights lie: in registers and shared memory, or, as much as must, in
global memory, where each step reads them again.

In the step that takes a token the input's part of the first layer is a row of a table. What comes
of the states by W_hh is computed while one warp, which has no columns of its own, draws the token:
neither waits for the other.
"""

from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32, uint32, uint64

from gpurnn.dense import MOST_OF_A_WARP, RowSizes
from gpurnn.kernels.activations import Pair
from gpurnn.kernels.dense import Functions, dense
from gpurnn.kernels.device import DeviceFunction, device, in_order
from gpurnn.kernels.philox import philox, uniform
from gpurnn.kernels.sampling import by_warp
from gpurnn.kernels.sampling_block import by_block
from gpurnn.kernels.storage import Storage

__all__ = ["generate_rows"]

_SAMPLING = uint32(0)  # of gpurnn.philox
_ZERO, _ONE = uint32(0), uint32(1)


def generate_rows(sizes: RowSizes, pair: Pair, storage: Storage) -> Callable[..., None]:
    """Build the kernel, of float32 or float64::

        kernel(ids, lengths, table, weights, biases, settings, scratch, out, status,
               longest, N, first, top_k, key_0, key_1)

    It is launched with a block for each row, of ``sizes.threads`` threads, and
    ``sizes.shared_numbers`` numbers of dynamic shared memory. For layer l, H_t = φ(below W_xh + b_h
    + H_{t-1} W_hh) (9.4.5), from a state of zeros; O_t = H_t W_hq + b_q of the last layer (9.4.6).

    Arrays, all flat:
        ids (rows · longest, int32): read, the prefixes, each from the beginning of its row; ids of
            [0, q).
        lengths (rows, int32): read, of the prefixes, 1 to longest.
        table (q · h): read, for each id what the first layer takes of it: X W_xh + b_h.
        weights: read, the matrices, packed, one behind another (``gpurnn.dense``).
        biases ((layers − 1) · h + q): read, b_h of the further layers, and b_q; −∞ there keeps a
            token from being drawn.
        settings (2): read, one over the temperature, and top_p.
        scratch (rows · 2 · q): where ``sizes.logits_on_chip`` is false, the block's own; else not
            used.
        out (rows · N, int32): written, the tokens.
        status (rows, int32): written, 0, or the code of ``gpurnn.kernels.sampling`` of logits
            without a distribution; from that token on out is −1.

    Integers: N ≥ 1; ``first`` is the number of the first token drawn, in its counter (``gpurnn.
    philox``), the row's the block's; top_k ≥ 1; key_0 and key_1 are the words of the seed.

    Nothing may overlap.

    Barriers: a state goes into the one of two buffers that is not read. In a step, a barrier
    follows each layer's states, another the logits, and another the draw and the sums h W_hh, which
    orders this step's reads before the next one's writes. While all steps read the prefix, logits
    and draw are left out, and their barriers but for the last.
    """
    real, phi = storage.real, pair.phi
    matrices = [
        dense(matrix, real, packed, held)
        for matrix, packed, held in zip(sizes.matrices, sizes.packed_at, sizes.held_at, strict=True)
    ]
    first_weights, output_weights = matrices[0].weights, matrices[-1].weights
    load_first, load_output = matrices[0].load, matrices[-1].load
    load_others = _loads(matrices[1:-1])
    place = _place(sizes)
    upper = _upper_layers(sizes, matrices, phi, real)
    recur = _recurrent_sums(sizes, matrices, real)
    emit = _logits(sizes, matrices[-1], real)
    tail = _tail_of_a_warp if sizes.q <= MOST_OF_A_WARP else _tail_of_a_block
    drawn = tail(sizes, emit, recur, real)
    h, state, sums = uint32(sizes.h), uint32(sizes.state), uint32(sizes.sums_at)
    product_threads, threads = uint32(sizes.product_threads), uint32(sizes.threads)
    output_threads = uint32(sizes.matrices[-1].threads)
    rounds = -(-sizes.h // sizes.product_threads)
    cleared, zero, no_token = uint32(sizes.logits_at), real(0), int32(-1)

    def generate_rows(
        ids,
        lengths,
        table,
        weights,
        biases,
        settings,
        scratch,
        out,
        status,
        longest,
        N,
        first,
        top_k,
        key_0,
        key_1,
    ):
        v = cuda.shared.array(0, real, alignment=16)
        said = cuda.shared.array(1, int32)
        w = cuda.local.array(first_weights, real)
        w_q = cuda.local.array(output_weights, real)

        thread, row = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        N, first, top_k = uint32(N), uint32(first), uint32(top_k)
        key_0, key_1 = uint32(key_0), uint32(key_1)
        multiplies = thread < product_threads
        at_ids, at_out = uint64(row) * uint64(longest), uint64(row) * uint64(N)
        length = uint32(lengths[row])
        scale, top_p = settings[0], settings[1]
        if multiplies:
            load_first(weights, v, w)
            if thread < output_threads:
                load_output(weights, v, w_q)
            load_others(weights, v, 0, 0, 0)
        for i in range(thread, cleared, threads):
            v[i] = zero
        token, failed = ids[at_ids], int32(0)
        cuda.syncthreads()

        now, t, end = _ZERO, _ZERO, uint32(length + N - _ONE)
        while t < end:
            then = _ONE - now
            if multiplies:
                for k in range(rounds):
                    j = thread + uint32(k) * product_threads
                    if j < h:
                        a = v[sums + j] + table[uint32(token) * h + j]
                        v[then * state + place(j)] = phi(a)
            cuda.syncthreads()
            upper(v, weights, biases, then, 0)
            t += _ONE
            if t < length:
                token = ids[at_ids + uint64(t)]
                if multiplies:
                    recur(v, weights, w, then, 0)
                cuda.syncthreads()
            else:
                i = t - length
                token = drawn(
                    v,
                    weights,
                    biases,
                    w,
                    w_q,
                    scratch,
                    said,
                    then,
                    t < end,
                    first + i,
                    row,
                    key_0,
                    key_1,
                    scale,
                    top_p,
                    top_k,
                )
                if token < int32(0):
                    failed = token
                    for rest in range(i + thread, N, threads):
                        out[at_out + uint64(rest)] = no_token
                    t = end
                elif thread == product_threads:
                    out[at_out + uint64(i)] = token
            now = then
        if thread == _ZERO:
            status[row] = failed

    return generate_rows


def _place(sizes: RowSizes) -> DeviceFunction:
    depth, stride = uint32(sizes.matrices[0].depth), uint32(sizes.matrices[0].stride)

    @device
    def place(k):
        return k // depth * stride + k % depth

    return place


def _loads(matrices: list[Functions]) -> DeviceFunction:
    """Build a function that loads matrices of which nothing stays in registers."""

    def one(load):
        @device
        def run(weights, v, _1, _2, _3):
            load(weights, v, v)

        return run

    return in_order([one(matrix.load) for matrix in matrices]) if matrices else _nothing


@device
def _nothing(_0, _1, _2, _3, _4):
    pass


def _upper_layers(
    sizes: RowSizes, matrices: list[Functions], phi: Any, real: Any
) -> DeviceFunction:
    """Build the step of all layers but the first, a barrier after each; all threads come here."""
    state, place = sizes.state, _place(sizes)
    h, product_threads = uint32(sizes.h), uint32(sizes.product_threads)

    def one(layer):
        matrix, passes = matrices[2 * layer - 1], sizes.matrices[2 * layer - 1].passes
        multiply, finish, column, owner = (
            matrix.multiply,
            matrix.finish,
            matrix.column,
            matrix.owner,
        )
        n_sums, own = matrix.sums, matrix.own
        below, above = uint32(2 * (layer - 1) * state), uint32(2 * layer * state)
        size, biases_at = uint32(state), uint32((layer - 1) * sizes.h)
        sums = uint32(sizes.sums_of(layer))

        @device
        def run(v, weights, biases, then, _):
            acc = cuda.local.array(n_sums, real)
            if uint32(cuda.threadIdx.x) < product_threads:
                for p in range(passes):
                    multiply(weights, v, v, below + then * size, uint32(p), acc)
                    finish(acc)
                    for e in range(own):
                        j = column(uint32(p), e)
                        if owner() and j < h:
                            a = v[sums + j] + (acc[e] + biases[biases_at + j])
                            v[above + then * size + place(j)] = phi(a)
            cuda.syncthreads()

        return run

    layers = range(1, sizes.layers)
    return in_order([one(layer) for layer in layers]) if layers else _nothing


def _recurrent_sums(sizes: RowSizes, matrices: list[Functions], real: Any) -> DeviceFunction:
    """Build the sums h W_hh of all layers; only threads that multiply come here."""
    h, state = uint32(sizes.h), uint32(sizes.state)

    def one(layer):
        matrix, passes = matrices[2 * layer], sizes.matrices[2 * layer].passes
        multiply, finish, column, owner = (
            matrix.multiply,
            matrix.finish,
            matrix.column,
            matrix.owner,
        )
        n_sums, own = matrix.sums, matrix.own
        states, sums = uint32(2 * layer * sizes.state), uint32(sizes.sums_of(layer))

        @device
        def run(v, weights, w, then, _):
            acc = cuda.local.array(n_sums, real)
            for p in range(passes):
                multiply(weights, v, w, states + then * state, uint32(p), acc)
                finish(acc)
                for e in range(own):
                    j = column(uint32(p), e)
                    if owner() and j < h:
                        v[sums + j] = acc[e]

        return run

    return in_order([one(layer) for layer in range(sizes.layers)])


def _logits(sizes: RowSizes, output: Functions, real: Any) -> DeviceFunction:
    """Build O = H W_hq + b_q, by as many threads as it takes; all that multiply come here."""
    multiply, finish, column, owner = output.multiply, output.finish, output.column, output.owner
    n_sums, own, passes = output.sums, output.own, sizes.matrices[-1].passes
    q, state, on_chip = uint32(sizes.q), uint32(sizes.state), sizes.logits_on_chip
    states = uint32(2 * (sizes.layers - 1) * sizes.state)
    biases_at, logits, two = (
        uint32((sizes.layers - 1) * sizes.h),
        uint32(sizes.logits_at),
        uint32(2),
    )
    threads = uint32(sizes.matrices[-1].threads)

    @device
    def emit(v, weights, biases, w_q, scratch, then):
        acc = cuda.local.array(n_sums, real)
        row = uint32(cuda.blockIdx.x)
        if uint32(cuda.threadIdx.x) >= threads:
            return
        for p in range(passes):
            multiply(weights, v, w_q, states + then * state, uint32(p), acc)
            finish(acc)
            for e in range(own):
                j = column(uint32(p), e)
                if owner() and j < q:
                    o = acc[e] + biases[biases_at + j]
                    if on_chip:
                        v[logits + j] = o
                    else:
                        scratch[row * two * q + j] = o

    return emit


def _tail_of_a_warp(
    sizes: RowSizes, emit: DeviceFunction, recur: DeviceFunction, real: Any
) -> DeviceFunction:
    """Build the end of a step that draws: logits, the draw by the last warp, and h W_hh beside."""
    draw = by_warp(sizes.q, real)
    logits, product_threads = uint32(sizes.logits_at), uint32(sizes.product_threads)

    @device
    def drawn(
        v,
        weights,
        biases,
        w,
        w_q,
        scratch,
        said,
        then,
        more,
        number,
        row,
        key_0,
        key_1,
        scale,
        top_p,
        top_k,
    ):
        thread = uint32(cuda.threadIdx.x)
        multiplies = thread < product_threads
        u = float32(0)
        if multiplies:
            emit(v, weights, biases, w_q, scratch, then)
        else:
            u = uniform(philox(number, row, _ZERO, _SAMPLING, key_0, key_1)[0])
        cuda.syncthreads()
        if multiplies:
            if more:
                recur(v, weights, w, then, 0)
        else:
            token = draw(v, logits, u, scale, top_p, top_k)
            if thread == product_threads:
                said[0] = token
        cuda.syncthreads()
        return said[0]

    return drawn


def _tail_of_a_block(
    sizes: RowSizes, emit: DeviceFunction, recur: DeviceFunction, real: Any
) -> DeviceFunction:
    """Build the same for many tokens: the draw by all threads, then h W_hh."""
    draw = by_block(sizes.q, real, sizes.threads)
    q, two, on_chip = uint32(sizes.q), uint32(2), sizes.logits_on_chip
    logits, masses = uint32(sizes.logits_at), uint32(sizes.masses_at)
    product_threads = uint32(sizes.product_threads)

    @device
    def drawn(
        v,
        weights,
        biases,
        w,
        w_q,
        scratch,
        said,
        then,
        more,
        number,
        row,
        key_0,
        key_1,
        scale,
        top_p,
        top_k,
    ):
        multiplies = uint32(cuda.threadIdx.x) < product_threads
        if multiplies:
            emit(v, weights, biases, w_q, scratch, then)
        u = uniform(philox(number, row, _ZERO, _SAMPLING, key_0, key_1)[0])
        cuda.syncthreads()
        if on_chip:
            token = draw(v, v, logits, masses, u, scale, top_p, top_k)
        else:
            at = row * two * q
            token = draw(scratch, scratch, at, at + q, u, scale, top_p, top_k)
        if multiplies and more:
            recur(v, weights, w, then, 0)
        cuda.syncthreads()
        return token

    return drawn
