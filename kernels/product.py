"""Products of a block's rows with a matrix that stays on the chip, as device functions.

The heart of the resident kernels; ``gpurnn.tile`` says who owns what.
"""

from typing import Any, NamedTuple

from numba import cuda, uint32

from gpurnn.kernels.device import DeviceFunction, device, in_order
from gpurnn.tile import VECTOR, Share, Tile

__all__ = ["Product", "loader", "product"]

ALL_LANES = 0xFFFFFFFF


class Product(NamedTuple):
    """Device functions, called in this order.

    ``clear(v)``: write 0 to all of v (2, rows, slices, stride) that is ever read; its padding must
    be finite, as it meets weights of 0. A barrier must follow.

    ``load(W, w, ws, k, j)``: read the thread's piece of W, rows from k and columns from j on, into
    its registers w (kept, columns) and its part of the block's shared memory ws; every element that
    lies beyond h becomes 0. Each thread reads back only what it wrote itself: no barrier needed.

    ``multiply(w, ws, v, s, acc)``: acc (rows, columns) += v[r, s, k] · W[k, j] over the thread's k,
    in rising order of k. v (rows, slices, stride) lies in shared memory; a barrier must stand
    between its last write and this.

    ``reduce(acc, s, 0, 0, 0)``: sum acc over the lanes of the group. Afterwards acc[r, p] for
    p < own holds column s · own + p of the group's; the rest of acc is spent. Whole warps only.

    The order of every sum depends on h and the tile's columns, slices and depth alone; neither
    the number of rows nor what other rows hold changes a bit of a row's result.
    """

    clear: DeviceFunction
    load: DeviceFunction
    multiply: DeviceFunction
    reduce: DeviceFunction


def product(tile: Tile, real: Any, load_value: DeviceFunction, *, transposed: bool) -> Product:
    """Build the functions for W (h, h) in global memory, or for its transpose.

    Args:
        tile: the sizes.
        real: numba.float32 or numba.float64, of every sum.
        load_value: device function from W's element to ``real``.
        transposed: use Wᵀ: W[j, k] where else W[k, j] stands.
    """
    return Product(
        _clear(tile, real),
        loader(tile, real, load_value, transposed=transposed),
        _multiply(tile, real),
        _reduce(tile),
    )


def _clear(tile: Tile, real: Any) -> DeviceFunction:
    depth, threads = tile.depth, uint32(tile.threads)
    rows, lanes, pieces = (
        uint32(tile.rows),
        uint32(tile.slices),
        uint32(2 * tile.rows * tile.slices),
    )
    zero = real(0)

    @device
    def clear(v):
        for piece in range(uint32(cuda.threadIdx.x), pieces, threads):
            for k in range(depth):
                v[piece // (rows * lanes), piece // lanes % rows, piece % lanes, k] = zero

    return clear


def loader(
    tile: Tile | Share, real: Any, load_value: DeviceFunction, *, transposed: bool
) -> DeviceFunction:
    """Build ``load`` of ``Product``."""
    C, kept, threads = tile.columns, tile.kept, uint32(tile.threads)
    h, vector, columns = uint32(tile.h), uint32(VECTOR), uint32(C)
    quads = uint32((tile.depth - kept) // VECTOR * C)
    zero = real(0)

    @device
    def element(W, k, j):
        value = zero
        if k < h and j < h:
            value = load_value(W[j, k]) if transposed else load_value(W[k, j])
        return value

    def to_registers(first):
        @device
        def run(W, w, ws, k, j):
            for i in range(VECTOR):
                for c in range(C):
                    w[first + i, c] = element(W, k + uint32(first + i), j + uint32(c))

        return run

    @device
    def to_shared(W, w, ws, k, j):
        # A loop that is not unrolled: nothing is gained here by loading many at once.
        for quad in range(uint32(0), quads):
            slot = (quad * threads + uint32(cuda.threadIdx.x)) * vector
            for i in range(VECTOR):
                ws[slot + uint32(i)] = element(
                    W, k + uint32(kept + i) + quad // columns * vector, j + quad % columns
                )

    registers = [to_registers(k) for k in range(0, kept, VECTOR)]
    return in_order([*registers, to_shared] if kept < tile.depth else registers)


def _multiply(tile: Tile, real: Any) -> DeviceFunction:
    R, C, kept, threads = tile.rows, tile.columns, tile.kept, uint32(tile.threads)
    vector = uint32(VECTOR)

    def from_registers(first):
        @device
        def run(w, ws, v, s, acc):
            for r in range(R):
                for i in range(VECTOR):
                    x = v[r, s, uint32(first + i)]
                    for c in range(C):
                        acc[r, c] += x * w[first + i, c]

        return run

    def from_shared(first):
        quad = (first - kept) // VECTOR * C

        @device
        def run(w, ws, v, s, acc):
            x = cuda.local.array((R, VECTOR), real)
            for r in range(R):
                for i in range(VECTOR):
                    x[r, i] = v[r, s, uint32(first + i)]
            for c in range(C):
                slot = (uint32(quad + c) * threads + uint32(cuda.threadIdx.x)) * vector
                for i in range(VECTOR):
                    weight = ws[slot + uint32(i)]
                    for r in range(R):
                        acc[r, c] += x[r, i] * weight

        return run

    registers = [from_registers(k) for k in range(0, kept, VECTOR)]
    return in_order(registers + [from_shared(k) for k in range(kept, tile.depth, VECTOR)])


def _reduce(tile: Tile) -> DeviceFunction:
    """Sum over lanes by halves: each exchange leaves a lane half the columns it had.

    The lane whose bit is set keeps the upper half and sends the lower, its partner the reverse.
    """
    R = tile.rows

    def halve(columns):
        distance = columns // tile.own
        bit = uint32(distance)

        @device
        def run(acc, s, _0, _1, _2):
            upper = (s & bit) != uint32(0)
            for r in range(R):
                for c in range(columns):
                    low, high = acc[r, c], acc[r, c + columns]
                    keep = high if upper else low
                    send = low if upper else high
                    acc[r, c] = keep + cuda.shfl_xor_sync(ALL_LANES, send, distance)

        return run

    halves = []
    columns = tile.columns // 2
    while columns >= tile.own:
        halves.append(halve(columns))
        columns //= 2
    if not halves:

        @device
        def nothing(acc, s, _0, _1, _2):
            pass

        return nothing
    return in_order(halves)
