"""Loops that come to an end are no deadlocks; loops that poll are, and by which loads they may."""

import numpy as np
import pytest
from kernel_lines import line, raises
from numba import cuda, int32
from twins import volatile_load

from gpurnn import emulator
from gpurnn.emulator import DeadlockError, UnsupportedError


@cuda.jit
def rewrite_then_signal(flag, buf):
    if cuda.blockIdx.x == 0:
        for i in range(buf.size):
            cuda.stcg(buf, i, 0)
        cuda.threadfence()
        cuda.stcg(flag, 0, 1)
    else:
        while volatile_load(flag, 0) == 0:
            pass


@cuda.jit
def sleep_then_signal(flag, buf):
    if cuda.blockIdx.x == 0:
        for _ in range(buf.size):
            cuda.nanosleep(100)
        cuda.stcg(flag, 0, 1)
    else:
        while volatile_load(flag, 0) == 0:
            pass


@cuda.jit
def sum_one_place(flag, buf):
    total = 0
    for _ in range(buf.size):
        total += cuda.ldcv(buf, 0)
    flag[0] = total


@cuda.jit
def add_nothing(flag, buf):
    for i in range(buf.size):
        cuda.atomic.add(buf, i % 4, 0)


@cuda.jit
def raise_nothing(flag, buf):
    for _ in range(buf.size):
        cuda.atomic.max(buf, 0, 0)


FINITE = [rewrite_then_signal, sleep_then_signal, sum_one_place, add_nothing, raise_nothing]


@pytest.mark.parametrize("kernel", FINITE)
@pytest.mark.parametrize("seed", [None, 0])
def test_a_loop_that_counts_is_no_deadlock(kernel, seed):
    args = np.zeros(1, np.int32), np.zeros(400, np.int32)
    blocks = 1 if kernel is sum_one_place else 2
    emulator.launch(kernel, blocks, 1, args, seed=seed, max_polls=50)


@cuda.jit
def poll_two(flags):
    a = b = 0
    while a == 0 or b == 0:
        a += volatile_load(flags, 0)
        b += volatile_load(flags, 1)


@cuda.jit
def poll_and_rewrite(flags):
    while volatile_load(flags, 0) == 0:
        for i in range(4):
            cuda.stcg(flags, i, 0)


@cuda.jit
def poll_and_count(flags):
    polls = 0
    while volatile_load(flags, 0) == 0:
        polls += 1
    flags[1] = polls


@pytest.mark.parametrize("kernel", [poll_two, poll_and_rewrite, poll_and_count])
@pytest.mark.parametrize("seed", [None, 0])
def test_a_loop_that_polls_is_a_deadlock(kernel, seed):
    with pytest.raises(DeadlockError, match="max_polls is 20"):
        emulator.launch(kernel, 2, 1, (np.zeros(4, np.int32),), seed=seed, max_polls=20)


@cuda.jit
def poll_by_a_load_that_moves(flag, out):
    if cuda.blockIdx.x == 0:
        for _ in range(20):
            cuda.nanosleep(100)
        cuda.stcg(flag, 0, 1)
    else:
        while cuda.ldcv(flag, 0) == 0:  # poll
            cuda.nanosleep(10)
        out[0] = 1


@cuda.jit
def poll_and_store(flag, out):
    s = cuda.shared.array(1, int32)
    if cuda.blockIdx.x == 0:
        for _ in range(20):
            cuda.nanosleep(100)
        cuda.stcg(flag, 0, 1)
    else:
        while cuda.ldcg(flag, 0) == 0:
            s[0] = 1
        out[0] = 1


def test_a_load_without_side_effects_in_a_loop_that_stores_nothing():
    args = np.zeros(1, np.int32), np.zeros(1)
    with raises(UnsupportedError, poll_by_a_load_that_moves, "poll") as info:
        emulator.launch(poll_by_a_load_that_moves, 2, 1, args)
    assert "may move out of the loop" in str(info.value)
    assert info.value.places[0].line == line(poll_by_a_load_that_moves, "poll")


def test_a_load_without_side_effects_in_a_loop_that_stores():
    out = np.zeros(1)
    emulator.launch(poll_and_store, 2, 1, (np.zeros(1, np.int32), out))
    assert out[0] == 1
