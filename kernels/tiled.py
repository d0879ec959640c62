"""A matrix product by tiles that pass through shared memory, as a device function."""

from numba import cuda, uint32

from gpurnn.kernels.device import DeviceFunction, device
from gpurnn.kernels.storage import Storage

__all__ = ["tiled_product"]


def tiled_product(side: int, storage: Storage, *, transposed: bool) -> DeviceFunction:
    """Build ``dot(A, B, row, column)``: Σ_k A[row, k] B[k, column], or B[column, k].

    The block fetches a tile of A and one of B at a time, which serve ``side`` threads each. k rises
    from 0, whatever the tile. Two barriers a tile: written before read, and read before the next is
    written. Every thread of the block must come here, those outside the result too: their dot is
    not to be used.
    """
    real, load_value = storage.real, storage.load
    width, zero, first = uint32(side), real(0), uint32(0)
    padded = side + 1  # so that a column of the tile lies in different banks

    @device
    def dot(A, B, row, column):
        tile_A = cuda.shared.array((side, padded), real)
        tile_B = cuda.shared.array((side, padded), real)
        x, y = uint32(cuda.threadIdx.x), uint32(cuda.threadIdx.y)
        rows, terms = uint32(A.shape[0]), uint32(A.shape[1])
        columns = uint32(B.shape[0]) if transposed else uint32(B.shape[1])
        total = zero
        for start in range(first, terms, width):
            tile_A[y, x] = zero
            if row < rows and start + x < terms:
                tile_A[y, x] = load_value(A[row, start + x])
            if transposed:  # threads next to each other read numbers next to each other
                tile_B[x, y] = zero
                if column - x + y < columns and start + x < terms:
                    tile_B[x, y] = load_value(B[column - x + y, start + x])
            else:
                tile_B[y, x] = zero
                if start + y < terms and column < columns:
                    tile_B[y, x] = load_value(B[start + y, column])
            cuda.syncthreads()
            for k in range(side):
                total += tile_A[y, uint32(k)] * tile_B[uint32(k), x]
            cuda.syncthreads()
        return total

    return dot
