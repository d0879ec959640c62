"""Clusters: ranks, barriers in one step and in two, and one another's shared memory."""

import numpy as np
import pytest
import twins
from kernel_lines import line, raises
from numba import cuda, float32, int32, int64
from twins import (
    cluster_arrive,
    cluster_map,
    cluster_rank,
    cluster_size,
    cluster_sync,
    cluster_wait,
)

from gpurnn import emulator
from gpurnn.emulator import BarrierError, RaceError


@cuda.jit
def cluster_sum(x, out):
    """Each block sums its part; rank 0 of each cluster sums the parts of all."""
    part = cuda.shared.array(1, float32)
    i = cuda.threadIdx.x
    if i == 0:
        total = float32(0)
        for j in range(cuda.blockDim.x):
            total += x[cuda.blockIdx.x * cuda.blockDim.x + j]
        part[0] = total
    cluster_sync()
    if cluster_rank() == 0 and i == 0:
        total = float32(0)
        for rank in range(cluster_size()):
            total += cluster_map(part, rank)[0]
        out[cuda.blockIdx.x // cluster_size()] = total
    cluster_sync()


@cuda.jit
def cluster_sum_no_barrier(x, out):
    part = cuda.shared.array(1, float32)
    cluster_sync()
    part[0] = x[cuda.blockIdx.x]  # write
    cuda.syncthreads()
    if cluster_rank() == 1:
        out[0] = cluster_map(part, 0)[0] + part[0]  # read
    cluster_sync()


@cuda.jit
def cluster_sum_leaves_early(x, out):
    part = cuda.shared.array(1, float32)
    part[0] = x[cuda.blockIdx.x]
    cluster_sync()
    if cluster_rank() == 0:
        out[0] = cluster_map(part, 1)[0] + part[0]  # read


@pytest.mark.parametrize("seed", [None, *range(5)])
def test_cluster_reduction(seed):
    x, out = np.arange(32, dtype=np.float32), np.zeros(2)
    report = emulator.launch(cluster_sum, 8, 4, (x, out), cluster=4, seed=seed)
    assert (out == x.reshape(2, 16).sum(1)).all()
    assert report.barriers["cluster barrier"] == 4


@pytest.mark.parametrize("seed", [None, *range(5)])
def test_missing_cluster_barrier(seed):
    args = np.ones(2, np.float32), np.zeros(1)
    with pytest.raises((RaceError, emulator.UninitializedError)) as info:
        emulator.launch(cluster_sum_no_barrier, 2, 1, args, cluster=2, seed=seed)
    assert f":{line(cluster_sum_no_barrier, 'read')} " in str(info.value)
    if seed is None:
        with raises(RaceError, cluster_sum_no_barrier, "read", "write"):
            emulator.launch(cluster_sum_no_barrier, 2, 1, args, cluster=2)


@pytest.mark.parametrize("seed", [None, *range(5)])
def test_a_block_returns_while_others_read_its_shared_memory(seed):
    args = np.ones(2, np.float32), np.zeros(1)
    with pytest.raises((RaceError, BarrierError)) as info:
        emulator.launch(cluster_sum_leaves_early, 2, 1, args, cluster=2, seed=seed)
    assert f":{line(cluster_sum_leaves_early, 'read')} " in str(info.value)


def test_the_barrier_in_two_steps():
    def kernel(out, order):
        s = cuda.shared.array(1, int32)
        cluster_sync()
        s[0] = 5 + cluster_rank()
        cluster_arrive()
        out[0, cuda.grid(1)] = s[0]  # own memory needs no wait
        if order == 1:
            cluster_wait()
        out[1, cuda.grid(1)] = cluster_map(s, 1 - cluster_rank())[0]
        if order == 0:
            cluster_wait()
        cluster_sync()

    out = np.zeros((2, 2))
    emulator.launch(kernel, 2, 1, (out, 1), cluster=2)
    assert out.tolist() == [[5, 6], [6, 5]]
    with pytest.raises((RaceError, emulator.UninitializedError)):
        emulator.launch(kernel, 2, 1, (out, 0), cluster=2)


def test_waiting_without_arriving():
    def waits():
        cluster_wait()

    def arrives():
        cluster_arrive()
        cluster_arrive()

    with pytest.raises(BarrierError, match="without having arrived"):
        emulator.launch(waits, 2, 1, (), cluster=2)
    with pytest.raises(BarrierError, match="arrives twice"):
        emulator.launch(arrives, 2, 1, (), cluster=2)


def test_a_thread_leaves_the_cluster_barrier_out():
    def kernel():
        if cuda.grid(1) == 3:
            return
        cluster_sync()

    for seed in (None, 0, 1):
        with pytest.raises(
            BarrierError, match=r"block \(1, 0, 0\), thread \(1, 0, 0\) has returned"
        ):
            emulator.launch(kernel, 2, 2, (), cluster=2, seed=seed)


def test_ranks_and_sizes():
    def kernel(out):
        b = cuda.blockIdx
        out[b.y, b.x, 0] = cluster_rank()
        out[b.y, b.x, 1] = twins.cluster_size()

    out = np.zeros((4, 6, 2), np.int32)
    emulator.launch(kernel, (6, 4), 1, (out,), cluster=(3, 2))
    y, x = np.indices((4, 6))
    assert (out[..., 0] == x % 3 + 3 * (y % 2)).all() and (out[..., 1] == 6).all()


def test_writing_to_others_and_to_parts():
    def kernel(out):
        s = cuda.shared.array((2, 4), int32)
        rank, i = cluster_rank(), cuda.threadIdx.x
        theirs = cluster_map(s[1], 1 - rank)
        cluster_sync()
        theirs[i] = 10 * rank + i
        cluster_sync()
        out[rank, i] = s[1, i]

    out = np.zeros((2, 4), np.int32)
    emulator.launch(kernel, 2, 4, (out,), cluster=2)
    assert out.tolist() == [[10, 11, 12, 13], [0, 1, 2, 3]]


def test_only_shared_memory_and_ranks_of_the_cluster_can_be_mapped():
    for number, match in enumerate(["expected a shared array", "rank 2 in a cluster of 2"]):

        def kernel(x, number):
            s = cuda.shared.array(1, int32)
            cluster_map(x if number == 0 else s, 2 * number)

        with pytest.raises(emulator.UnsupportedError, match=match):
            emulator.launch(kernel, 2, 1, (np.zeros(1), number), cluster=2)


@cuda.jit
def read_late(x, out):
    part = cuda.shared.array(1, float32)
    part[0] = x[cuda.blockIdx.x]
    theirs = cluster_map(part, 1 - cluster_rank())
    cluster_sync()
    if cluster_rank() == 0:
        for _ in range(5):
            cuda.nanosleep(10)
        out[0] = theirs[0]  # read


def test_a_block_has_returned_before_others_read_its_shared_memory():
    with raises(BarrierError, read_late, "read") as info:
        emulator.launch(read_late, 2, 1, (np.ones(2, np.float32), np.zeros(1)), cluster=2)
    assert "of block (1, 0, 0), all of whose threads have returned" in str(info.value)


@cuda.jit
def reach_early(out, how):
    s = cuda.shared.array(2, int32)
    if how == 3:
        cuda.syncthreads()
    theirs = cluster_map(s, 1 - cluster_rank())
    if how == 0:
        theirs[0] = 1  # reach
    elif how == 1:
        cuda.atomic.add(theirs, 0, 1)
    elif how == 2:
        theirs.view(int64)[0] = 1
    else:
        out[0] = theirs[0]
    cluster_sync()
    out[cuda.blockIdx.x] = s[0]


@pytest.mark.parametrize("how", range(4))
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_block_may_not_have_begun_when_others_reach_for_its_shared_memory(how, seed):
    with pytest.raises(BarrierError, match="need not have begun: expected a cluster barrier"):
        emulator.launch(reach_early, 2, 1, (np.zeros(2), how), cluster=2, seed=seed)
    if how == 0:
        with raises(BarrierError, reach_early, "reach"):
            emulator.launch(reach_early, 2, 1, (np.zeros(2), how), cluster=2, seed=seed)
