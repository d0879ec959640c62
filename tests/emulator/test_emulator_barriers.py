"""Barriers that not all threads reach, and threads that wait for ever."""

import numpy as np
import pytest
from kernel_lines import line, raises
from numba import cuda, int32
from twins import volatile_load

from gpurnn import emulator
from gpurnn.emulator import BarrierError, DeadlockError


@cuda.jit
def barrier_in_a_branch(out):
    if cuda.threadIdx.x < 16:
        cuda.syncthreads()  # then
    else:
        cuda.syncthreads()  # else
    out[cuda.threadIdx.x] = 1


@cuda.jit
def barrier_for_some(out):
    if cuda.threadIdx.x < 16:
        cuda.syncthreads()  # barrier
    out[cuda.threadIdx.x] = 1


@cuda.jit
def early_return(out, n):
    i = cuda.threadIdx.x
    if i >= n:
        return
    cuda.syncthreads()  # barrier
    out[i] = 1


def test_barrier_in_both_branches():
    with raises(BarrierError, barrier_in_a_branch, "else", "then") as info:
        emulator.launch(barrier_in_a_branch, 1, 32, (np.zeros(32),))
    assert [p.thread for p in info.value.places] == [(16, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize("kernel", [barrier_for_some, early_return])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_thread_that_has_returned(kernel, seed):
    args = (np.zeros(32),) if kernel is barrier_for_some else (np.zeros(32), 16)
    with raises(BarrierError, kernel, "barrier") as info:
        emulator.launch(kernel, (2, 1, 1), 32, args, seed=seed)
    assert "returned from the kernel" in str(info.value)


@cuda.jit
def first_threads_return(out):
    if cuda.threadIdx.x < 16:
        return
    cuda.syncthreads()  # barrier
    out[cuda.threadIdx.x] = 1


def test_threads_that_returned_before_the_others_came():
    with raises(BarrierError, first_threads_return, "barrier") as info:
        emulator.launch(first_threads_return, 1, 32, (np.zeros(32),))
    assert "thread (15, 0, 0) has returned" in str(info.value)


def test_all_threads_reach_it():
    out = np.zeros(32)
    emulator.launch(early_return, 1, 32, (out, 32))
    assert out.all()


@cuda.jit(device=True)
def meet():
    cuda.syncthreads()  # inside


@cuda.jit
def barrier_through_two_calls(out):
    if cuda.threadIdx.x == 0:
        meet()
    else:
        meet()
    out[cuda.threadIdx.x] = 1


def test_one_barrier_called_from_two_places():
    with raises(BarrierError, meet, "inside", "inside"):
        emulator.launch(barrier_through_two_calls, 1, 2, (np.zeros(2),))


@cuda.jit
def counts(out):
    i = cuda.threadIdx.x
    out[0, i] = cuda.syncthreads_count(i % 3 == 0)
    out[1, i] = cuda.syncthreads_and(i < 40)
    out[2, i] = cuda.syncthreads_and(i < 30)
    out[3, i] = cuda.syncthreads_or(i == 39)
    out[4, i] = cuda.syncthreads_or(i == 40)


def test_barriers_with_a_predicate():
    out = np.full((5, 40), -1, np.int32)
    report = emulator.launch(counts, 1, 40, (out,))
    assert (out == np.array([14, 1, 0, 1, 0])[:, None]).all()
    assert report.barriers["syncthreads_and"] == 2


@cuda.jit
def grid_sync(x, out):
    i = cuda.grid(1)
    grid = cuda.cg.this_grid()
    x[i] = i
    grid.sync()
    out[i] = x[(i + cuda.blockDim.x) % x.size]


@cuda.jit
def grid_sync_one_block_leaves(x, out):
    if cuda.blockIdx.x == 1:
        return
    cuda.cg.this_grid().sync()  # sync
    out[cuda.grid(1)] = x[0]


@cuda.jit
def grid_sync_against_block_barrier(x):
    if cuda.blockIdx.x == 0:
        cuda.cg.this_grid().sync()  # grid
    else:
        while volatile_load(x, 0) == 0:  # poll
            pass
        cuda.cg.this_grid().sync()


def test_grid_barrier():
    x, out = np.zeros(12), np.zeros(12)
    report = emulator.launch(grid_sync, 3, 4, (x, out))
    assert (out == (np.arange(12) + 4) % 12).all()
    assert report.barriers == {"grid sync": 1}


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_grid_barrier_that_a_block_leaves(seed):
    with raises(BarrierError, grid_sync_one_block_leaves, "sync") as info:
        emulator.launch(grid_sync_one_block_leaves, 3, 4, (np.zeros(12), np.zeros(12)), seed=seed)
    assert "waits for all 12 threads of the grid" in str(info.value)


def test_deadlock_between_a_barrier_and_a_poll():
    kernel = grid_sync_against_block_barrier
    with pytest.raises(DeadlockError) as info:
        emulator.launch(kernel, 2, 2, (np.zeros(1, np.int32),), max_polls=50)
    text = str(info.value)
    assert f"grid sync: {kernel.py_func.__code__.co_filename}:{line(kernel, 'grid')}" in text
    assert f":{line(kernel, 'poll')} " in text
    assert "block (0, 0, 0), thread (0, 0, 0) and 1 more threads" in text
    assert "block (1, 0, 0), thread (0, 0, 0) and 1 more threads" in text


@cuda.jit
def poll_with_barrier(flag, out):
    s = cuda.shared.array(1, int32)
    while True:
        if cuda.threadIdx.x == 0:
            s[0] = volatile_load(flag, 0)
        cuda.syncthreads()
        if s[0] != 0:
            break
        cuda.syncthreads()
    out[cuda.grid(1)] = s[0]


@cuda.jit
def poll_plainly(flag):
    while flag[0] == 0:
        pass


@cuda.jit
def poll_sleeping(flag):
    while cuda.atomic.cas(flag, 0, 1, 0) == 0:
        cuda.nanosleep(100)


@pytest.mark.parametrize("kernel", [poll_plainly, poll_sleeping])
@pytest.mark.parametrize("seed", [None, 0])
def test_polls_that_nobody_answers(kernel, seed):
    with pytest.raises(DeadlockError):
        emulator.launch(kernel, 2, 2, (np.zeros(1, np.int32),), seed=seed, max_polls=30)


def test_polls_by_whole_blocks_that_nobody_answers():
    with pytest.raises(DeadlockError):
        emulator.launch(poll_with_barrier, 2, 4, (np.zeros(1, np.int32), np.zeros(8)), max_polls=30)


@cuda.jit
def slow_answer(flag, work):
    if cuda.blockIdx.x == 0:
        for i in range(500):
            cuda.syncthreads()
            if cuda.threadIdx.x == 0:
                work[i % 4] = i
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            cuda.stcg(flag, 0, 1)
    else:
        while volatile_load(flag, 0) == 0:
            pass


@pytest.mark.parametrize("seed", [None, 0])
def test_a_slow_answer_is_no_deadlock(seed):
    emulator.launch(
        slow_answer, 2, 32, (np.zeros(1, np.int32), np.zeros(4)), seed=seed, max_polls=40
    )


# Locks.


@cuda.jit
def lock(mutex, total):
    while cuda.atomic.cas(mutex, 0, 0, 1) != 0:
        pass
    cuda.threadfence()
    total[0] += cuda.grid(1)
    cuda.threadfence()
    cuda.atomic.exch(mutex, 0, 0)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_lock(seed):
    total = np.zeros(1)
    emulator.launch(lock, 4, 2, (np.zeros(1, np.int32), total), seed=seed)
    assert total[0] == 28


def test_named_barriers_of_two_halves():
    emulated = type(
        "bar_sync", (), {"emulated": staticmethod(lambda cuda, *a: cuda.emu.bar_sync(*a))}
    )

    def kernel(x, out, count):
        i = cuda.threadIdx.x
        x[i] = i
        emulated(1 + i // 64, count)
        out[i] = x[i ^ 32]

    x, out = np.zeros(128), np.zeros(128)
    report = emulator.launch(kernel, 1, 128, (x, out, 64))
    assert (out == np.arange(128) ^ 32).all()
    assert report.barriers == {"barrier 1": 1, "barrier 2": 1}
    with pytest.raises(emulator.RaceError):
        emulator.launch(kernel, 1, 128, (x, out, 32))
    with pytest.raises(BarrierError, match="no thread can go on"):
        emulator.launch(kernel, 1, 128, (x, out, 96))
    with pytest.raises(BarrierError, match="expected a multiple of 32"):
        emulator.launch(kernel, 1, 128, (x, out, 16))


def test_producer_and_consumer_warps():
    class Bar:
        def __init__(self, name):
            self.emulated = lambda cuda, *a: getattr(cuda.emu, name)(*a)

    sync, arrive = Bar("bar_sync"), Bar("bar_arrive")

    def kernel(x, out, steps):
        i = cuda.threadIdx.x
        for t in range(steps):
            if i < 32:
                sync(2, 64)  # the buffer is free
                x[i] = t + i
                arrive(1, 64)
            else:
                arrive(2, 64)
                sync(1, 64)
                out[t, i - 32] = x[63 - i]

    for seed in (None, 0, 1, 2):
        out = np.zeros((4, 32))
        emulator.launch(kernel, 1, 64, (np.zeros(32), out, 4), seed=seed)
        assert (out == np.arange(4)[:, None] + np.arange(32)[::-1]).all()
