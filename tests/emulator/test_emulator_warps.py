"""Operations of a warp: what they return, and lanes that never come."""

import numpy as np
import pytest
from kernel_lines import raises
from numba import cuda, float32

from gpurnn import emulator
from gpurnn.emulator import BarrierError

FULL = 0xFFFFFFFF


@cuda.jit
def warp_sum(x, out):
    i = cuda.grid(1)
    v = x[i]
    for delta in (16, 8, 4, 2, 1):
        v += cuda.shfl_down_sync(FULL, v, delta)
    if cuda.laneid == 0:
        out[i // 32] = v


@cuda.jit
def warp_sum_lane_missing(x, out, n):
    i = cuda.grid(1)
    if i < n:
        v = x[i]
        for delta in (16, 8, 4, 2, 1):
            v += cuda.shfl_xor_sync(FULL, v, delta)  # shuffle
        out[i] = v


def test_shuffle_reduction():
    x, out = np.arange(128, dtype=np.float32), np.zeros(4, np.float32)
    emulator.launch(warp_sum, 2, 64, (x, out))
    assert (out == x.reshape(4, 32).sum(1)).all()


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_lane_is_missing(seed):
    args = np.ones(32, np.float32), np.zeros(32, np.float32), 31
    with raises(BarrierError, warp_sum_lane_missing, "shuffle") as info:
        emulator.launch(warp_sum_lane_missing, 1, 32, args, seed=seed)
    assert "thread (31, 0, 0) has returned" in str(info.value)


@cuda.jit
def lane_waits_elsewhere(out):
    if cuda.laneid == 3:
        cuda.syncthreads()  # block
    out[cuda.laneid] = cuda.shfl_sync(FULL, cuda.laneid, 0)  # warp
    cuda.syncthreads()


def test_a_lane_waits_elsewhere():
    with pytest.raises(BarrierError) as info:
        emulator.launch(lane_waits_elsewhere, 1, 32, (np.zeros(32),))
    assert "syncthreads: " in str(info.value) and "shfl_sync: " in str(info.value)


@cuda.jit
def foreign_mask(out):
    out[cuda.laneid] = cuda.ballot_sync(0x0F, True)  # vote


def test_a_mask_without_the_lane_itself():
    with raises(BarrierError, foreign_mask, "vote") as info:
        emulator.launch(foreign_mask, 1, 32, (np.zeros(32),), seed=5)
    assert "a mask that does not name it: 0x0000000f" in str(info.value)


@cuda.jit
def half_warps(out):
    i = cuda.laneid
    mask = 0xFFFF if i < 16 else 0xFFFF0000
    out[0, i] = cuda.shfl_sync(mask, i, 3 if i < 16 else 20)
    out[1, i] = cuda.ballot_sync(mask, i % 2 == 0)


@cuda.jit
def from_a_lane_outside(out):
    i = cuda.laneid
    mask = 0xFFFF if i < 16 else 0xFFFF0000
    out[i] = cuda.shfl_xor_sync(mask, i, 16)  # shuffle


def test_halves_of_a_warp():
    out = np.zeros((2, 32), np.int64)
    emulator.launch(half_warps, 1, 32, (out,))
    assert out[0].tolist() == [3] * 16 + [20] * 16
    assert out[1].tolist() == [0x5555] * 16 + [0x55550000] * 16
    with raises(BarrierError, from_a_lane_outside, "shuffle"):
        emulator.launch(from_a_lane_outside, 1, 32, (out[0],))


@cuda.jit
def everything(out):
    i = cuda.laneid
    out[0, i] = cuda.shfl_sync(FULL, i * 10, 33)
    out[1, i] = cuda.shfl_up_sync(FULL, i, 3)
    out[2, i] = cuda.shfl_down_sync(FULL, i, 3)
    out[3, i] = cuda.shfl_xor_sync(FULL, i, 5)
    out[4, i] = cuda.all_sync(FULL, i < 32) and not cuda.all_sync(FULL, i < 31)
    out[5, i] = cuda.any_sync(FULL, i == 31) and not cuda.any_sync(FULL, i == 32)
    out[6, i] = cuda.eq_sync(FULL, 1) and not cuda.eq_sync(FULL, i == 0)
    out[7, i] = cuda.ballot_sync(FULL, i >= 30)
    out[8, i] = cuda.match_any_sync(FULL, i % 16)
    out[9, i] = cuda.match_all_sync(FULL, 4)[0]
    out[10, i] = cuda.match_all_sync(FULL, i)[1]
    out[11, i] = cuda.activemask()
    out[12, i] = cuda.lanemask_lt()
    out[13, i] = cuda.warpsize
    cuda.syncwarp()


def test_every_operation():
    out = np.full((14, 32), -1, np.int64)
    emulator.launch(everything, 1, 32, (out,))
    i = np.arange(32)
    assert (out[0] == 10).all()
    assert (out[1] == np.where(i < 3, i, i - 3)).all()
    assert (out[2] == np.where(i > 28, i, i + 3)).all()
    assert (out[3] == i ^ 5).all()
    assert (out[4:7] == 1).all()
    assert (out[7] == 0xC0000000).all()
    assert (out[8] == (1 << i % 16) | (1 << i % 16 + 16)).all()
    assert (out[9] == FULL).all() and (out[10] == 0).all()
    assert (out[11] == FULL).all()
    assert (out[12] == (1 << i) - 1).all()
    assert (out[13] == 32).all()


def test_a_partial_warp_may_use_the_full_mask():
    def kernel(out):
        out[cuda.laneid] = cuda.ballot_sync(FULL, True)

    out = np.zeros(8, np.int64)
    emulator.launch(kernel, 1, 8, (out,))
    assert (out == 0xFF).all()


def test_lanes_go_along_x_first():
    def kernel(out):
        t = cuda.threadIdx
        out[t.z, t.y, t.x] = cuda.laneid

    out = np.zeros((2, 3, 8), np.int32)
    emulator.launch(kernel, 1, (8, 3, 2), (out,))
    assert (out.reshape(-1) == np.arange(48) % 32).all()


def test_values_keep_their_type():
    def kernel(out):
        v = cuda.shfl_xor_sync(FULL, float32(0.1), 1)
        out[cuda.laneid] = v == float32(0.1)

    out = np.zeros(32, np.bool)
    emulator.launch(kernel, 1, 32, (out,))
    assert out.all()
