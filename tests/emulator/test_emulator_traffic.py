"""Bank conflicts and sectors, counted by hand."""

import numpy as np
import pytest
from kernel_lines import line
from numba import cuda, float32, float64

from gpurnn import emulator


def make_shared(index, dtype=float32, size=2048):
    @cuda.jit
    def kernel(out):
        s = cuda.shared.array(size, dtype)
        for k in range(cuda.threadIdx.x, size, cuda.blockDim.x):
            s[k] = k  # fill
        cuda.syncthreads()
        out[cuda.threadIdx.x] = s[index(cuda.threadIdx.x)]  # use

    return kernel


def cost(kernel, mark, kind, space, *args, block=32):
    report = emulator.launch(kernel, 1, block, args, measure=True)
    (found,) = (
        t for t in report.traffic if (t.line, t.kind, t.space) == (line(kernel, mark), kind, space)
    )
    return found.instructions, found.needed, found.ideal


@pytest.mark.parametrize(
    ("index", "needed", "ideal"),
    [
        (lambda i: i, 1, 1),
        (lambda i: 2 * i, 2, 1),
        (lambda i: 32 * i, 32, 1),
        (lambda i: 33 * i, 1, 1),
        (lambda i: 8 * i, 8, 1),
        (lambda i: 5, 1, 1),
        (lambda i: i // 4 * 32, 8, 1),
        (lambda i: (i * 7) % 32, 1, 1),
    ],
)
def test_banks(index, needed, ideal):
    out = np.zeros(32, np.float32)
    assert cost(make_shared(index), "use", "read", "shared", out) == (1, needed, ideal)


def test_banks_of_wide_items_and_several_warps():
    out = np.zeros(64, np.float32)
    kernel = make_shared(lambda i: i, float64)
    assert cost(kernel, "use", "read", "shared", out[:32]) == (1, 2, 2)
    assert cost(make_shared(lambda i: 2 * i), "use", "read", "shared", out, block=64) == (2, 4, 2)
    assert cost(make_shared(lambda i: i), "fill", "write", "shared", out[:32]) == (64, 64, 64)


def test_a_padded_tile():
    def make(pad):
        @cuda.jit
        def kernel(out):
            s = cuda.shared.array((32, 32 + pad), float32)
            i = cuda.threadIdx.x
            for r in range(32):
                s[r, i] = r
            cuda.syncthreads()
            for c in range(32):
                out[i] += s[i, c]  # column

        return kernel

    out = np.zeros(32, np.float32)
    assert cost(make(0), "column", "read", "shared", out) == (32, 1024, 32)
    assert cost(make(1), "column", "read", "shared", out) == (32, 32, 32)


@pytest.mark.parametrize(
    ("step", "first", "needed", "ideal"), [(1, 0, 4, 4), (2, 0, 8, 4), (32, 0, 32, 4), (1, 1, 5, 4)]
)
def test_sectors(step, first, needed, ideal):
    @cuda.jit
    def kernel(x, out):
        i = cuda.threadIdx.x
        out[i] = x[first + step * i]  # copy

    x, out = np.zeros(1100, np.float32), np.zeros(32, np.float32)
    assert cost(kernel, "copy", "read", "global", x, out) == (1, needed, ideal)


def test_one_address_for_all_is_one_sector():
    @cuda.jit
    def kernel(x, out):
        out[cuda.threadIdx.x] = x[3]  # read

    args = np.zeros(8, np.float32), np.zeros(32, np.float32)
    assert cost(kernel, "read", "read", "global", *args) == (1, 1, 1)


def test_the_report_as_text():
    kernel = make_shared(lambda i: 2 * i)
    out = np.zeros(32, np.float32)
    report = emulator.launch(kernel, 1, 32, (out,), measure=True)
    text = str(report)
    assert "1 × syncthreads" in text and "8192 bytes" in text
    assert f"test_emulator_traffic.py:{line(kernel, 'use')}" in report.table()
    assert emulator.launch(kernel, 1, 32, (out,)).traffic == ()


def test_sectors_are_those_of_the_whole_buffer():
    @cuda.jit
    def kernel(x, out):
        out[cuda.threadIdx.x] = x[cuda.threadIdx.x]  # copy

    room, out = np.zeros((2, 64), np.float32), np.zeros(32, np.float32)
    for first, needed in ((0, 4), (1, 5), (4, 5), (7, 5), (8, 4)):
        for x in (room[0, first : first + 32], room[1:].reshape(64)[first:][:32]):
            assert cost(kernel, "copy", "read", "global", x, out) == (1, needed, 4)
