"""Sums of the columns of a matrix: the gradient of a bias.

As a product with ones it would be a matrix product of one row, of which a library may make one long
chain. Here rows are dealt out to many blocks; ``gpurnn.kernels.tokens.add_parts`` adds what they
found.
"""

from collections.abc import Callable

from numba import cuda, uint32, uint64

from gpurnn.kernels.storage import Storage
from gpurnn.tile import WARP, Columns

__all__ = ["column_sums"]

IN_FLIGHT = 8
"""Rows that a thread has under way before it adds the first."""


def column_sums(tile: Columns, storage: Storage, *, partial: bool) -> Callable[..., None]:
    """Build ``kernel(A, sums, N, q, rows)``: the sum of each column of A (N, q).

    Arrays, flat:
        A (N · q): read.
        sums (parts · q): written, for each part of the N rows the sums of its columns. Of
            ``storage.real`` if ``partial``, else one part, rounded once to what is stored.

    N and q are at least 1. Nothing may overlap.

    The grid is (⌈q / 32⌉, ⌈N / rows⌉), with ``tile.threads`` threads a block. Block (x, y) owns 32
    columns of the ``rows`` rows from y · rows on. Lane i of each warp has the i-th column; warp w
    takes every ``tile.warps``-th row from the w-th on, in order. Behind a barrier the first warp
    adds the warps' sums in order.
    """
    real, load_value = storage.real, storage.load
    lanes, warps, apart = uint32(WARP), tile.warps, uint32(tile.warps * IN_FLIGHT)
    zero, first = real(0), uint32(0)
    keeps = partial
    store_value = storage.store

    def column_sums(A, sums, N, q, rows):
        of_warp = cuda.shared.array((warps, WARP), real)
        fetched = cuda.local.array(IN_FLIGHT, real)
        N, q, rows = uint32(N), uint32(q), uint32(rows)
        lane, warp = uint32(cuda.threadIdx.x) % lanes, uint32(cuda.threadIdx.x) // lanes
        j = uint32(cuda.blockIdx.x) * lanes + lane
        begin = uint32(cuda.blockIdx.y) * rows
        end = min(N, begin + rows)
        total = zero
        if j < q:
            for row in range(begin + warp, end, apart):
                for k in range(IN_FLIGHT):
                    fetched[k] = zero
                    r = row + uint32(k * warps)
                    if r < end:
                        fetched[k] = load_value(A[uint64(r) * uint64(q) + uint64(j)])
                for k in range(IN_FLIGHT):
                    total += fetched[k]
        of_warp[warp, lane] = total
        cuda.syncthreads()
        if warp == first and j < q:
            for w in range(1, warps):
                total += of_warp[uint32(w), lane]
            at = uint64(cuda.blockIdx.y) * uint64(q) + uint64(j)
            if keeps:
                sums[at] = total
            else:
                sums[at] = store_value(total)

    return column_sums
