"""What the hardware has too little of is refused."""

import numpy as np
import pytest
from kernel_lines import raises
from numba import cuda, float32, float64
from twins import bar_arrive, bar_sync

from gpurnn import emulator
from gpurnn.emulator import BarrierError, UnsupportedError


def nothing():
    pass


@pytest.mark.parametrize(
    ("grid", "block", "options", "match"),
    [
        (1, (1, 1, 65), {}, r"block is \(1, 1, 65\): expected at most \(1024, 1024, 64\)"),
        (1, (512, 1, 3), {}, "1536 threads: expected at most 1024"),
        ((1, 65_536), 1, {}, r"grid is \(1, 65536, 1\): expected at most"),
        ((1, 1, 65_536), 1, {}, r"grid is \(1, 1, 65536\): expected at most"),
        (32, 1, {"cluster": 32}, r"cluster is \(32, 1, 1\), 32 blocks: expected at most 16"),
        (1, 1, {"shared": 227 * 1024 + 1}, "shared is 232449: expected .* at most 232448"),
    ],
)
def test_launches_beyond_the_limits(grid, block, options, match):
    with pytest.raises(ValueError, match=match):
        emulator.launch(nothing, grid, block, (), **options)


def test_launches_at_the_limits():
    emulator.launch(nothing, 16, (1, 1, 64), (), cluster=16, shared=227 * 1024)


@cuda.jit
def two_static_arrays():
    a = cuda.shared.array(4096, float64)
    b = cuda.shared.array(4097, float32)  # too much
    a[0] = b[0] = 0


@cuda.jit
def static_and_dynamic():
    a = cuda.shared.array(4, float32)  # too much
    b = cuda.shared.array(0, float32)
    a[0] = b[0] = 0


def test_shared_memory_beyond_the_limits():
    with raises(UnsupportedError, two_static_arrays, "too much") as info:
        emulator.launch(two_static_arrays, 1, 1, ())
    assert "have 49156 bytes: expected at most 49152" in str(info.value)
    emulator.launch(static_and_dynamic, 1, 1, (), shared=227 * 1024 - 16)
    with raises(UnsupportedError, static_and_dynamic, "too much"):
        emulator.launch(static_and_dynamic, 1, 1, (), shared=227 * 1024 - 12)


def test_numbers_of_named_barriers():
    def kernel(number):
        bar_sync(number, 32)

    emulator.launch(kernel, 1, 32, (15,))
    for number in (-1, 0, 16):
        with pytest.raises(BarrierError, match=rf"barrier {number}: expected 1 to 15 \(0 is that"):
            emulator.launch(kernel, 1, 32, (number,))


def test_a_short_warp_counts_as_a_whole_one():
    def kernel(x, out):
        i = cuda.threadIdx.x
        x[i] = i
        bar_sync(1, 64)
        out[i] = x[47 - i]

    for seed in (None, 0, 1):
        out = np.zeros(48)
        emulator.launch(kernel, 1, 48, (np.zeros(48), out), seed=seed)
        assert (out == np.arange(48)[::-1]).all()


@pytest.mark.parametrize("seed", [0, 7])
def test_a_barrier_goes_on_before_all_that_waited_do(seed):
    def kernel():
        warp = cuda.threadIdx.x // 32
        if warp < 30:
            bar_arrive(3, 1024)
            bar_sync(1, 31 * 32)
        else:
            bar_sync(3, 1024)
            if warp == 30:
                bar_arrive(1, 31 * 32)
            for _ in range(3):
                bar_sync(2, 64)
                bar_arrive(1, 64)

    report = emulator.launch(kernel, 1, 1024, (), seed=seed)
    assert report.barriers == {"barrier 1": 4, "barrier 2": 3, "barrier 3": 1}
