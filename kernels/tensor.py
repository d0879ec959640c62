"""A block's part of a product with W_hh, multiplied on tensor cores and summed in float32.

``gpurnn.tile.TensorShare`` says who owns what, ``gpurnn.kernels.part.Part`` what is offered, and
``gpurnn.kernels.mma`` how matrices lie in the registers of a warp.

An ``mma`` multiplies 16 columns of W (its A, transposed: 16 × k) with 8 rows of v (its B: k × 8),
of 16 or, for TF32, 8 of the k. Which k a place in A and B stands for is free, as long as it is the
same in both: a lane reads 16 neighbouring bytes of v at a time, four registers. The first two are B
of one ``mma``, the others B of the next, and the lane's registers of W are filled accordingly.

Rows of the batch are filled up to 8 by zeros in shared memory; their sums are dropped.
"""

from typing import Any

from numba import cuda, float32, int32, uint16, uint32

from gpurnn.kernels.device import DeviceFunction, device, in_order
from gpurnn.kernels.mma import load_words4, mma_bf16, mma_f16, mma_tf32, to_tf32
from gpurnn.kernels.part import Part
from gpurnn.kernels.ptx import bits_float, float_bits
from gpurnn.kernels.storage import Storage
from gpurnn.tile import WARP, TensorShare

__all__ = ["part"]

LOADED = 2  # chunks of W at once
SUMS = 4  # of a lane, from one mma
CHAINS = 2
"""Sums that are added up side by side: an mma need not wait for the one before."""


def part(share: TensorShare, storage: Storage, *, transposed: bool) -> Part:
    """Build the functions for W, or for its transpose: W[j, k] where else W[k, j] stands.

    ``storage`` is that of W: float32 for the kind "tf32", whose numbers ``encode`` and ``load``
    round by ``to_tf32``; for the others what ``kind`` says, which is multiplied as it is stored.

    A warp adds up its k in rising order of chunks, each ``mma`` as the hardware does, in two chains
    that take turns. ``finish`` adds the chains, then the warps' sums from the first to the last.
    """
    halves = share.kind != "tf32"
    encode, bits, unbits = _of_halves(storage) if halves else (_rounded, float_bits, bits_float)
    return Part(
        element=uint16 if halves else float32,
        weight=uint32,
        weights=share.registers,
        sums=(CHAINS, share.tiles, SUMS),
        own=share.own,
        clear=_clear(share),
        load=_load(share, transposed=transposed),
        place=_place(share),
        encode=encode,
        bits=bits,
        unbits=unbits,
        multiply=_multiply(share),
        finish=_finish(share),
        **_places(share),
    )


@device
def _rounded(x):
    return bits_float(to_tf32(x))


def _of_halves(storage: Storage) -> tuple[DeviceFunction, DeviceFunction, DeviceFunction]:
    @device
    def bits(e):
        return uint32(e)

    @device
    def unbits(u):
        return uint16(u)

    return storage.store, bits, unbits


def _clear(share: TensorShare) -> DeviceFunction:
    end, threads = uint32(share.shared_values), uint32(share.threads)
    zero = float32(0) if share.kind == "tf32" else uint16(0)

    @device
    def clear(v):
        for i in range(uint32(cuda.threadIdx.x), end, threads):
            v[i] = zero

    return clear


def _place(share: TensorShare) -> DeviceFunction:
    rows, stride = uint32(share.slice_rows), uint32(share.stride)

    @device
    def place(buffer, r, k):
        return (buffer * rows + r) * stride + k

    return place


def _word(share: TensorShare, *, transposed: bool) -> DeviceFunction:
    """Return a device function of ``(W, k, j)``: a register of A, from row k of W on."""
    h, one, upper, nothing = uint32(share.h), uint32(1), uint32(16), uint32(0)

    @device
    def single(W, k, j):
        word = nothing
        if k < h and j < h:
            word = to_tf32(W[j, k]) if transposed else to_tf32(W[k, j])
        return word

    @device
    def half(W, k, j):
        word = nothing
        if k < h and j < h:
            word = uint32(W[j, k]) if transposed else uint32(W[k, j])
        return word

    @device
    def pair(W, k, j):
        return half(W, k, j) | (half(W, k + one, j) << upper)

    return single if share.kind == "tf32" else pair


def _load(share: TensorShare, *, transposed: bool) -> DeviceFunction:
    """Build ``load`` of ``Part``; the block's threads come here together.

    Barriers that gather nothing, but of which the compiler cannot know that, hold it back: else it
    computes all addresses and issues all loads at once, and has no registers left.
    """
    word = _word(share, transposed=transposed)
    depth, slices, width = uint32(share.depth), uint32(share.slices), uint32(16)
    lanes, four, eight = uint32(WARP), uint32(4), uint32(8)
    of_lane, of_word = share.chunk // 4, share.chunk // 16  # neighbouring k

    def chunk(number):
        a, start = 8 * number, number * share.chunk

        @device
        def run(W, w, k, j, _):
            for i in range(4):
                at = k + uint32(start + i * of_word)
                w[a + 2 * i] = word(W, at, j)
                w[a + 2 * i + 1] = word(W, at, j + eight)

        return run

    def some(first):
        chunks = in_order([chunk(i) for i in range(first, min(first + LOADED, number_of_chunks))])

        @device
        def run(W, w, k, j, _):
            chunks(W, w, k + uint32(cuda.syncthreads_or(none)), j, 0)

        return run

    number_of_chunks, none = share.depth // share.chunk, int32(0)
    pieces = in_order([some(i) for i in range(0, number_of_chunks, LOADED)])

    @device
    def load(W, w, v, first):
        warp, lane = uint32(cuda.threadIdx.x) // lanes, uint32(cuda.threadIdx.x) % lanes
        k = warp % slices * depth + lane % four * uint32(of_lane)
        pieces(W, w, k, first + warp // slices * width + lane // four, 0)

    return load


MMA: dict[str, Any] = {"float16": mma_f16, "bfloat16": mma_bf16, "tf32": mma_tf32}


def _multiply(share: TensorShare) -> DeviceFunction:
    tiles, mma, next_tile = share.tiles, MMA[share.kind], 8 * share.stride
    rows, stride, depth = uint32(share.slice_rows), uint32(share.stride), uint32(share.depth)
    slices, of_lane = uint32(share.slices), uint32(share.chunk // 4)
    lanes, four = uint32(WARP), uint32(4)
    zero = float32(0)

    def of_chain(chain, a):
        """Multiply four registers of W, from ``a`` on, with two words of v, into a chain's sums."""
        b = 2 * chain

        @device
        def run(w, words, acc, t):
            acc[chain, t, 0], acc[chain, t, 1], acc[chain, t, 2], acc[chain, t, 3] = mma(
                w[a],
                w[a + 1],
                w[a + 2],
                w[a + 3],
                words[b],
                words[b + 1],
                acc[chain, t, 0],
                acc[chain, t, 1],
                acc[chain, t, 2],
                acc[chain, t, 3],
            )

        return run

    def chunk(number):
        a, start = 8 * number, number * share.chunk
        one, other = of_chain(0, a), of_chain(1, a + 4)

        @device
        def run(w, v, at, acc, _):
            for t in range(tiles):
                words = load_words4(v, at + uint32(t * next_tile + start))
                one(w, words, acc, t)
                other(w, words, acc, t)

        return run

    pieces = in_order([chunk(i) for i in range(share.depth // share.chunk)])

    @device
    def multiply(w, v, buffer, r, acc):
        for chain in range(CHAINS):
            for t in range(tiles):
                for i in range(SUMS):
                    acc[chain, t, i] = zero
        warp, lane = uint32(cuda.threadIdx.x) // lanes, uint32(cuda.threadIdx.x) % lanes
        row = buffer * rows + r + lane // four
        at = row * stride + warp % slices * depth + lane % four * of_lane
        pieces(w, v, at, acc, 0)

    return multiply


def _finish(share: TensorShare) -> DeviceFunction:
    """Sum over the warps that share the k of 16 columns, through scratch behind the two buffers.

    Each thread writes all its sums, waits for the block, and reads those that it will own, of every
    slice. The scratch is written again in the next pass, or the next step. Between passes a second
    barrier, before the writes, puts them after all reads of the pass before. Between steps that is
    done by what ends a step, which every thread of the block comes through: the cluster's barrier,
    or the block's behind the values' arrival.
    """
    tiles, own, slices, several = share.tiles, share.own, share.slices, share.passes > 1
    sums_of_warp, lanes = uint32(SUMS * tiles * WARP), uint32(WARP)
    start, of_slices = uint32(share.itemsize * share.shared_values // 4), uint32(slices)
    finished = uint32(share.finished)

    @device
    def finish(acc, v):
        sums = cuda.shared.array(0, float32, alignment=16)  # the memory of v
        warp, lane = uint32(cuda.threadIdx.x) // lanes, uint32(cuda.threadIdx.x) % lanes
        mine = start + warp * sums_of_warp + lane
        s = warp % of_slices
        first = start + (warp - s) * sums_of_warp + s % finished * uint32(own * WARP) + lane
        if several:
            cuda.syncthreads()
        for t in range(tiles):
            for i in range(SUMS):
                sums[mine + uint32((SUMS * t + i) * WARP)] = acc[0, t, i] + acc[1, t, i]
        cuda.syncthreads()
        for q in range(own):
            total = sums[first + uint32(q * WARP)]
            for k in range(1, slices):
                total += sums[first + uint32((k * SUMS * tiles + q) * WARP)]
            acc[0, q // SUMS, q % SUMS] = total

    return finish


def _places(share: TensorShare) -> dict[str, DeviceFunction]:
    """Sum i of a lane is number i % 4 of D, of tile i // 4; slice s owns those from s · own on."""
    slices, own, finished = uint32(share.slices), uint32(share.own), uint32(share.finished)
    width, lanes = uint32(16), uint32(WARP)
    two, four, eight = uint32(2), uint32(4), uint32(8)

    @device
    def result(acc, q):
        return acc[0, q // SUMS, q % SUMS]

    @device
    def number(q):
        return uint32(cuda.threadIdx.x) // lanes % slices % finished * own + uint32(q)

    @device
    def row(q):
        i = number(q)
        return i // four * eight + uint32(cuda.threadIdx.x) % four * two + i % two

    @device
    def column(q):
        group = uint32(cuda.threadIdx.x) % lanes // four
        of_block = uint32(cuda.threadIdx.x) // lanes // slices * width
        return of_block + group + number(q) // two % two * eight

    @device
    def owner():
        return uint32(cuda.threadIdx.x) // lanes % slices < finished

    return {"result": result, "row": row, "column": column, "owner": owner}
