"""Kernels that are right give one result, in whatever order their threads run."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import cuda, float32, int32

from gpurnn import emulator

TILE = 8


@cuda.jit
def matmul(A, B, C):
    a = cuda.shared.array((TILE, TILE), float32)
    b = cuda.shared.array((TILE, TILE), float32)
    i, j = cuda.threadIdx.y, cuda.threadIdx.x
    col, row = cuda.grid(2)
    total = float32(0)
    for t in range(0, A.shape[1], TILE):
        a[i, j] = A[row, t + j] if row < A.shape[0] and t + j < A.shape[1] else 0
        b[i, j] = B[t + i, col] if col < B.shape[1] and t + i < B.shape[0] else 0
        cuda.syncthreads()
        for k in range(TILE):
            total += a[i, k] * b[k, j]
        cuda.syncthreads()
    if row < C.shape[0] and col < C.shape[1]:
        C[row, col] = total


@cuda.jit
def block_sum(x, out):
    s = cuda.shared.array(0, float32)
    i = cuda.threadIdx.x
    total = float32(0)
    for k in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        total += x[k]
    s[i] = total
    cuda.syncthreads()
    n = cuda.blockDim.x
    while n > 1:
        half = (n + 1) // 2
        if i + half < n:
            s[i] += s[i + half]
        cuda.syncthreads()
        n = half
    if i == 0:
        out[cuda.blockIdx.x] = s[0]


@cuda.jit
def smooth(x, steps):
    grid = cuda.cg.this_grid()
    i = cuda.grid(1)
    for _ in range(steps):
        v = x[i]
        if 0 < i < x.size - 1:
            v = (x[i - 1] + x[i] + x[i + 1]) * float32(1 / 3)
        grid.sync()
        x[i] = v
        grid.sync()


@cuda.jit
def warp_sums(x, out):
    s = cuda.shared.array(32, float32)
    i = cuda.threadIdx.x
    v = x[cuda.grid(1)]
    for delta in (16, 8, 4, 2, 1):
        v += cuda.shfl_xor_sync(0xFFFFFFFF, v, delta)
    if cuda.laneid == 0:
        s[i // 32] = v
    cuda.syncthreads()
    if i < 32:
        v = s[i] if i < cuda.blockDim.x // 32 else float32(0)
        for delta in (16, 8, 4, 2, 1):
            v += cuda.shfl_down_sync(0xFFFFFFFF, v, delta)
        if i == 0:
            out[cuda.blockIdx.x] = v


def run(name, seed):
    rng = np.random.default_rng(7)
    if name == "matmul":
        A, B = rng.normal(size=(11, 17)), rng.normal(size=(17, 9))
        C = np.full((11, 9), np.nan, np.float32)
        args, grid, block, shared = (A.astype("f"), B.astype("f"), C), (2, 2), (TILE, TILE), 0
        result, expected = C, A @ B
    elif name == "block_sum":
        x, out = rng.normal(size=200).astype("f"), np.full(3, np.nan, np.float32)
        args, grid, block, shared = (x, out), 3, 37, 37 * 4
        result, expected = out, None
    elif name == "smooth":
        x = rng.normal(size=96).astype("f")
        args, grid, block, shared = (x, 4), 3, 32, 0
        result, expected = x, None
    else:
        x, out = rng.normal(size=192).astype("f"), np.full(2, np.nan, np.float32)
        args, grid, block, shared = (x, out), 2, 96, 0
        result, expected = out, x.reshape(2, 96).sum(1)
    kernels = {"matmul": matmul, "block_sum": block_sum, "smooth": smooth, "warp_sums": warp_sums}
    emulator.launch(kernels[name], grid, block, args, shared=shared, seed=seed)
    if expected is not None:
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    return result


@pytest.mark.parametrize("name", ["matmul", "block_sum", "smooth", "warp_sums"])
def test_twenty_schedules(name):
    first = run(name, None)
    assert np.isfinite(first).all()
    for seed in range(20):
        assert run(name, seed).tobytes() == first.tobytes()


@given(st.integers(0, 150), st.integers(1, 40), st.integers(1, 3), st.none() | st.integers(0, 9))
def test_reductions_of_any_shape(size, threads, blocks, seed):
    x = np.arange(size, dtype=np.float32)
    out = np.full(blocks, np.nan, np.float32)
    emulator.launch(block_sum, blocks, threads, (x, out), shared=threads * 4, seed=seed)
    assert out.sum() == x.sum()


def test_many_threads():
    @cuda.jit
    def kernel(out):
        s = cuda.shared.array(256, int32)
        i = cuda.threadIdx.x
        s[i] = cuda.grid(1)
        cuda.cg.this_grid().sync()
        out[cuda.grid(1)] = s[255 - i]

    out = np.zeros(2048, np.int64)
    report = emulator.launch(kernel, 8, 256, (out,))
    assert (out.reshape(8, 256) == np.arange(2048).reshape(8, 256)[:, ::-1]).all()
    assert report.threads == 2048
