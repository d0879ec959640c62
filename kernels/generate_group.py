"""A text in one launch, W_hh split by columns over the blocks of a group.

A group of blocks generates one row of the batch. In each step every block computes its columns of
H_t, and the group exchanges them (``gpurnn.kernels.exchange``); then each block has all of H_t, and
computes all logits, or, where they are ``split``, its part, and the group exchanges once more. Then
every block draws the token, by the same number: no one waits to be told.
"""

from collections.abc import Callable
from typing import Any

from numba import cuda, float32, int32, uint32, uint64

from gpurnn.dense import MOST_OF_A_WARP, GroupSizes
from gpurnn.kernels import split as split_product
from gpurnn.kernels.activations import Pair
from gpurnn.kernels.dense import dense
from gpurnn.kernels.device import DeviceFunction, device
from gpurnn.kernels.exchange import exchange
from gpurnn.kernels.part import Part
from gpurnn.kernels.philox import philox, uniform
from gpurnn.kernels.sampling import by_warp
from gpurnn.kernels.sampling_block import by_block
from gpurnn.kernels.storage import Storage
from gpurnn.tile import WARP

__all__ = ["generate_group"]

_SAMPLING = uint32(0)  # of gpurnn.philox
_ZERO, _ONE, _TWO = uint32(0), uint32(1), uint32(2)


def generate_group(
    sizes: GroupSizes, pair: Pair, storage: Storage, name: str
) -> Callable[..., None]:
    """Build the kernel, of float32; ``name`` is that of the exchange::

        kernel(ids, lengths, table, W_hh, W_hq, b_q, settings, words, logit_words, exchanged, out,
               status, report, longest, N, first, top_k, key_0, key_1, rows, row_0, patience)

    It is launched with blocks of ``sizes.threads`` threads and ``sizes.shared_numbers`` floats of
    dynamic shared memory, in a grid of ``share.blocks`` for each group: block i is number i mod
    blocks of group i // blocks, which generates row row_0 + i // blocks, if that is below ``rows``.
    With the exchange "cluster" a group is a cluster; with the others the launch is cooperative.
    Every block must own a column of W_hh below h.

    ids, lengths, table, b_q (q,), settings, out, status and the integers up to key_1 are as in
    ``gpurnn.kernels.generate``, all rows of the batch in them. The other arrays, flat but the first
    two:
        W_hh (h, h): read.
        W_hq (1, numbers): read, packed (``gpurnn.dense``); where ``sizes.split`` it is (blocks,
            numbers), the part of each block.
        words, logit_words (uint64): scratch of the two exchanges, 0 before, of all groups of the
            launch; the second only where ``sizes.split``.
        exchanged: with the exchange "counter" scratch of 2 · h + 2 · q numbers for each group.
        report (blocks of the grid, uint32): 0 before. Where a block waited in vain in step t, its
            element becomes t + 1; if it is the first of its group, the rest of the row's out
            becomes −1.

    Nothing may overlap. Only the first block of a group writes out and status; a token after it has
    told the group of the step that follows, as what a cluster's barrier releases waits for all
    stores before it. To acquire empties the L1 cache: so b_q and, where it fits, the table lie in
    shared memory.

    Barriers: those of the exchanges; beside them one of the block after the logits, where they are
    not exchanged, and one after the draw, by the first warp or all of them. The others go on to the
    product with W_hh; its sums stay in registers until the next step.
    """
    share, split = sizes.share, sizes.split
    part = split_product.part(share, storage, transposed=False)
    begin, send, post, wait = exchange(name, share, part, storage)
    weight, weights, sums, own = part.weight, part.weights, part.sums, part.own
    clear, load, multiply, finish = part.clear, part.load, part.multiply, part.finish
    result, column_of, owner = part.result, part.column, part.owner
    output = dense(sizes.output, float32, 0, sizes.held_at)
    load_output, output_weights = output.load, output.weights
    logits, draw = _logits(sizes, part, storage, name, output), _draw(sizes)
    phi = pair.phi
    keeps = name == "counter"
    h, blocks, threads = uint32(share.h), uint32(share.blocks), uint32(share.threads)
    width, scratch = uint32(share.width), uint32(2 * (share.h + sizes.q))
    zero, no_token = float32(0), int32(-1)
    drawing = uint32(WARP if sizes.q <= MOST_OF_A_WARP else share.threads)
    load_beside, of_table = _beside(sizes)

    def generate_group(
        ids,
        lengths,
        table,
        W_hh,
        W_hq,
        b_q,
        settings,
        words,
        logit_words,
        exchanged,
        out,
        status,
        report,
        longest,
        N,
        first,
        top_k,
        key_0,
        key_1,
        rows,
        row_0,
        patience,
    ):
        v = cuda.shared.array(0, float32, alignment=16)
        said = cuda.shared.array(1, int32)
        w = cuda.local.array(weights, weight)
        w_q = cuda.local.array(output_weights, float32)
        acc = cuda.local.array(sums, float32)

        thread = uint32(cuda.threadIdx.x)
        rank, group = uint32(cuda.blockIdx.x) % blocks, uint32(cuda.blockIdx.x) // blocks
        row = uint32(row_0) + group
        if row >= uint32(rows):
            return
        N, first, top_k, patience = uint32(N), uint32(first), uint32(top_k), uint32(patience)
        key_0, key_1 = uint32(key_0), uint32(key_1)
        at_ids, at_out = uint64(row) * uint64(longest), uint64(row) * uint64(N)
        length, mine = uint32(lengths[row]), owner()
        scale, top_p = settings[0], settings[1]
        column, writes = rank * width, rank == _ZERO

        load(W_hh, w, v, column)
        packed = W_hq[rank] if split else W_hq[_ZERO]
        load_output(packed, v, w_q)
        load_beside(v, table, b_q, rank)
        clear(v)
        for r in range(sums[0]):
            for c in range(sums[1]):
                acc[r, c] = zero
        token, failed, late, owed = ids[at_ids], int32(0), _ZERO, False
        begin()

        u = float32(0)
        now, t, end = _ZERO, _ZERO, uint32(length + N - _ONE)
        while t < end and late == _ZERO:
            then = _ONE - now
            base = group * scratch + then * h
            for e in range(own):
                j = column + column_of(e)
                if mine and j < h:
                    H = phi(result(acc, e) + of_table(v, table, uint32(token), column_of(e), j))
                    if keeps:
                        exchanged[base + j] = H
                    send(words, v, group, then, _ZERO, j, H, t + _ONE)
            post(words, group)
            if owed:
                out[at_out + uint64(t - length)] = token
                owed = False
            if thread < drawing and t + _ONE >= length:  # while the states are on their way
                i = t + _ONE - length
                u = uniform(philox(first + i, row, _ZERO, _SAMPLING, key_0, key_1)[0])
            late = wait(words, v, exchanged, base, group, then, _ONE, t + _ONE, patience)
            t += _ONE
            if late == _ZERO:
                if t < length:
                    token = ids[at_ids + uint64(t)]
                    multiply(w, v, then, _ZERO, acc)
                    finish(acc, v)
                else:
                    i = t - length
                    late = logits(
                        v, packed, w_q, logit_words, exchanged, group, rank, then, i, patience
                    )
                    if late == _ZERO:
                        draw(v, i, u, scale, top_p, top_k, said)
                        multiply(w, v, then, _ZERO, acc)
                        finish(acc, v)
                        cuda.syncthreads()
                        token = said[0]
                        if token < int32(0):
                            failed = token
                            if writes:
                                for rest in range(i + thread, N, threads):
                                    out[at_out + uint64(rest)] = no_token
                            t = end
                        else:
                            owed = writes and thread == _ZERO
            now = then
        if owed:
            out[at_out + uint64(t - length)] = token
        if late != _ZERO:
            if thread == _ZERO:
                report[cuda.blockIdx.x] = t
            if writes:
                had = t - length if t > length else _ZERO
                for rest in range(had + thread, N, threads):
                    out[at_out + uint64(rest)] = no_token
        if writes and thread == _ZERO:
            status[row] = failed

    return generate_group


def _logits(
    sizes: GroupSizes, part: Part, storage: Storage, name: str, output: Any
) -> DeviceFunction:
    """Build the logits of a state, whole in each block; returns whether the block gave up."""
    share, multiply, finish = sizes.share, output.multiply, output.finish
    column, owner, n_sums, own = output.column, output.owner, output.sums, output.own
    passes, width = sizes.output.passes, uint32(sizes.output.width)
    place, q, logits = part.place, uint32(sizes.q), uint32(sizes.logits_at)
    bias = uint32(sizes.bias_at)

    if not sizes.split:

        @device
        def whole(v, packed, w_q, words, exchanged, group, rank, buffer, i, patience):
            acc = cuda.local.array(n_sums, float32)
            for p in range(passes):
                multiply(packed, v, w_q, place(buffer, _ZERO, _ZERO), uint32(p), acc)
                finish(acc)
                for e in range(own):
                    j = column(uint32(p), e)
                    if owner() and j < q:
                        v[logits + j] = acc[e] + v[bias + j]
            cuda.syncthreads()
            return _ZERO

        return whole

    half = uint32(sizes.logits_stride)

    @device
    def place_of(buffer, r, k):
        return logits + buffer * half + k

    of_logits = part._replace(place=place_of)
    _, send, post, wait = exchange(name, share._replace(h=sizes.q), of_logits, storage)
    keeps = name == "counter"
    scratch, behind = uint32(2 * (share.h + sizes.q)), uint32(2 * share.h)

    @device
    def in_parts(v, packed, w_q, words, exchanged, group, rank, buffer, i, patience):
        acc = cuda.local.array(n_sums, float32)
        to = i % _TWO
        base = group * scratch + behind + to * q
        for p in range(passes):
            multiply(packed, v, w_q, place(buffer, _ZERO, _ZERO), uint32(p), acc)
            finish(acc)
            for e in range(own):
                k = column(uint32(p), e)
                j = rank * width + k
                if owner() and k < width and j < q:
                    o = acc[e] + v[bias + k]
                    if keeps:
                        exchanged[base + j] = o
                    send(words, v, group, to, _ZERO, j, o, i + _ONE)
        post(words, group)
        return wait(words, v, exchanged, base, group, to, _ONE, i + _ONE, patience)

    return in_parts


def _beside(sizes: GroupSizes) -> tuple[DeviceFunction, DeviceFunction]:
    """Build the loads of b_q and the table, and ``of_table(v, table, token, c, j)``.

    That is the table's number of a token in column j, the block's column c.
    """
    share, on_chip, split = sizes.share, sizes.table_on_chip, sizes.split
    h, width, threads = uint32(share.h), uint32(share.width), uint32(share.threads)
    q, part = uint32(sizes.q), uint32(sizes.output.width)
    bias, at, numbers = (
        uint32(sizes.bias_at),
        uint32(sizes.table_at),
        uint32(sizes.q * share.width),
    )

    @device
    def load_beside(v, table, b_q, rank):
        thread = uint32(cuda.threadIdx.x)
        first = rank * part if split else _ZERO
        for k in range(thread, part, threads):
            if first + k < q:
                v[bias + k] = b_q[first + k]
        if on_chip:
            for i in range(thread, numbers, threads):
                j = rank * width + i % width
                if j < h:
                    v[at + i] = table[i // width * h + j]

    @device
    def of_shared(v, table, token, c, j):
        return v[at + token * width + c]

    @device
    def of_global(v, table, token, c, j):
        return table[token * h + j]

    return load_beside, of_shared if on_chip else of_global


def _draw(sizes: GroupSizes) -> DeviceFunction:
    """Build the draw; ``said[0]`` is the token after the block's next barrier."""
    logits, masses = uint32(sizes.logits_at), uint32(sizes.masses_at)
    half, warp = uint32(sizes.logits_stride if sizes.split else 0), uint32(WARP)
    if sizes.q <= MOST_OF_A_WARP:
        draw_of_warp = by_warp(sizes.q, float32)

        @device
        def draw(v, i, u, scale, top_p, top_k, said):
            if uint32(cuda.threadIdx.x) < warp:
                token = draw_of_warp(v, logits + i % _TWO * half, u, scale, top_p, top_k)
                if cuda.threadIdx.x == 0:
                    said[0] = token

        return draw

    draw_of_block = by_block(sizes.q, float32, sizes.threads)

    @device
    def draw_together(v, i, u, scale, top_p, top_k, said):
        at = logits + i % _TWO * half
        token = draw_of_block(v, v, at, masses, u, scale, top_p, top_k)
        if cuda.threadIdx.x == 0:
            said[0] = token

    return draw_together
