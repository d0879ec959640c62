"""A block's part of a product with W_hh, multiplied and summed in float32.

``gpurnn.tile.Share`` says who owns what, ``gpurnn.kernels.part.Part`` what is offered.
"""

from numba import cuda, float32, uint32

from gpurnn.kernels.device import DeviceFunction, device, in_order
from gpurnn.kernels.part import Part
from gpurnn.kernels.product import loader
from gpurnn.kernels.ptx import bits_float, float_bits, load_floats4
from gpurnn.kernels.storage import Storage
from gpurnn.tile import VECTOR, Share

__all__ = ["part"]

ALL_LANES = 0xFFFFFFFF
SUMS_OF_PIECE = 16
"""Sums that a stretch of code which the compiler must unroll adds to."""
HALVED_AT_ONCE = 8
"""Sums that such a stretch exchanges."""


def part(share: Share, storage: Storage, *, transposed: bool) -> Part:
    """Build the functions for W, or for its transpose: W[j, k] where else W[k, j] stands.

    Numbers in shared memory and in registers are float32, whatever W is stored as. A thread adds up
    its k in rising order; then lanes add up in pairs 8, 4, 2 and 1 apart.
    """
    return Part(
        element=float32,
        weight=float32,
        weights=(share.kept + (VECTOR if share.kept < share.depth else 0), share.columns),
        sums=(share.rows, share.columns),
        own=share.own,
        clear=_clear(share),
        load=_load(share, storage, transposed=transposed),
        place=_place(share),
        encode=_same,
        bits=float_bits,
        unbits=bits_float,
        multiply=_multiply(share),
        finish=_finish(share),
        **_places(share),
    )


@device
def _same(x):
    return x


def _clear(share: Share) -> DeviceFunction:
    begin = uint32(share.shared_weights)
    end = uint32(share.shared_weights + share.shared_values)
    threads, zero = uint32(share.threads), float32(0)

    @device
    def clear(v):
        for i in range(begin + uint32(cuda.threadIdx.x), end, threads):
            v[i] = zero

    return clear


def _load(share: Share, storage: Storage, *, transposed: bool) -> DeviceFunction:
    load_pieces = loader(share, float32, storage.load, transposed=transposed)
    lanes, depth, columns = uint32(share.slices), uint32(share.depth), uint32(share.columns)

    @device
    def load(W, w, v, first):
        thread = uint32(cuda.threadIdx.x)
        load_pieces(W, w, v, thread % lanes * depth, first + thread // lanes * columns)

    return load


def _place(share: Share) -> DeviceFunction:
    rows, row = uint32(share.slice_rows), uint32(share.slices * share.stride)
    begin, depth, stride = (
        uint32(share.shared_weights),
        uint32(share.depth),
        uint32(share.stride),
    )

    @device
    def place(buffer, r, k):
        return begin + (buffer * rows + r) * row + k // depth * stride + k % depth

    return place


def _multiply(share: Share) -> DeviceFunction:
    """Multiply in pieces of four k and a few rows, each short enough to be unrolled.

    What lies in shared memory of W is read four k at a time, into rows of w behind those it keeps.
    """
    R, C, kept, threads = share.rows, share.columns, share.kept, uint32(share.threads)
    row_stride = share.slices * share.stride
    lanes, stride, vector = uint32(share.slices), uint32(share.stride), uint32(VECTOR)
    start, rows, whole_row = (
        uint32(share.shared_weights),
        uint32(share.slice_rows),
        uint32(row_stride),
    )
    zero = float32(0)
    rows_of_piece = max(1, SUMS_OF_PIECE // C)

    def piece(k, at_w, begin):
        """Rows from ``begin`` on, of v from k on, times rows of w from ``at_w`` on."""
        end = min(R, begin + rows_of_piece)

        @device
        def run(w, v, at, _, acc):
            for r in range(begin, end):
                x = load_floats4(v, at + uint32(r * row_stride + k))
                for i in range(VECTOR):
                    for c in range(C):
                        acc[r, c] += x[i] * w[at_w + i, c]

        return run

    def fetch(k):
        quad = (k - kept) // VECTOR * C

        @device
        def run(w, v, _, thread, acc):
            for c in range(C):
                four = load_floats4(v, (uint32(quad + c) * threads + thread) * vector)
                for i in range(VECTOR):
                    w[kept + i, c] = four[i]

        return run

    pieces = []
    for k in range(0, share.depth, VECTOR):
        if k >= kept:
            pieces.append(fetch(k))
        pieces += [piece(k, min(k, kept), begin) for begin in range(0, R, rows_of_piece)]
    product = in_order(pieces)

    @device
    def multiply(w, v, buffer, r, acc):
        thread = uint32(cuda.threadIdx.x)
        for i in range(R):
            for c in range(C):
                acc[i, c] = zero
        at = start + (buffer * rows + r) * whole_row + thread % lanes * stride
        product(w, v, at, thread, acc)

    return multiply


def _finish(share: Share) -> DeviceFunction:
    """Sum over lanes by halves, while a lane has more than one sum, then as they are.

    The lane whose bit is set keeps the upper half and sends the lower, its partner the reverse.
    """
    C, lanes = share.columns, uint32(share.slices)

    def halve(count, distance, begin):
        bit, end = uint32(distance), min(count, begin + HALVED_AT_ONCE)

        @device
        def run(acc, s, _1, _2, _3):
            upper = (s & bit) != uint32(0)
            for i in range(begin, end):
                low = acc[i // C, i % C]
                high = acc[(i + count) // C, (i + count) % C]
                keep = high if upper else low
                send = low if upper else high
                acc[i // C, i % C] = keep + cuda.shfl_xor_sync(ALL_LANES, send, distance)

        return run

    def together(distance):
        @device
        def run(acc, s, _1, _2, _3):
            acc[0, 0] += cuda.shfl_xor_sync(ALL_LANES, acc[0, 0], distance)

        return run

    steps = []
    count, distance = share.rows * C, share.slices // 2
    while distance:
        if count == 1:
            steps.append(together(distance))
        else:
            half = count // 2
            steps += [halve(half, distance, i) for i in range(0, half, HALVED_AT_ONCE)]
        count, distance = max(1, count // 2), distance // 2
    summed = in_order(steps)

    @device
    def finish(acc, v):
        summed(acc, uint32(cuda.threadIdx.x) % lanes, 0, 0, 0)

    return finish


def _places(share: Share) -> dict[str, DeviceFunction]:
    C = share.columns
    lanes, columns, own = uint32(share.slices), uint32(C), uint32(share.own)
    copies = uint32(share.slices // share.finished)

    @device
    def result(acc, q):
        return acc[q // C, q % C]

    @device
    def number(q):
        return uint32(cuda.threadIdx.x) % lanes // copies * own + uint32(q)

    @device
    def row(q):
        return number(q) // columns

    @device
    def column(q):
        return uint32(cuda.threadIdx.x) // lanes * columns + number(q) % columns

    @device
    def owner():
        return uint32(cuda.threadIdx.x) % copies == uint32(0)

    return {"result": result, "row": row, "column": column, "owner": owner}
