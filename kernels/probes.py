"""Probes: one thing that a group of blocks does in each step, again and again within one launch.

Their times tell what it takes; what they write tells that it was done. Each is a kernel as it
stands, not made for sizes; ``steps`` ≥ 1 is how often. A launch has 1 to 256 threads in a block.
"""

from numba import cuda, int32, uint32, uint64

from gpurnn.kernels.ptx import (
    cluster_arrive,
    cluster_load,
    cluster_rank,
    cluster_size,
    cluster_wait,
    load_acquire,
    load_relaxed,
    store_relaxed,
)
from gpurnn.tile import LINE

__all__ = [
    "REMOTE_LENGTH",
    "REMOTE_STRIDE",
    "probe_cluster",
    "probe_cluster_stores",
    "probe_counter",
    "probe_flag",
    "probe_l2",
    "probe_launch",
    "probe_remote",
]

REMOTE_LENGTH = 1024
"""Numbers of the chain that ``probe_remote`` follows through another block's shared memory."""
REMOTE_STRIDE = 33
"""From one to the next: an odd number, so that the chain comes by all of them."""

ZERO, ONE, UPPER = uint32(0), uint32(1), uint64(32)


def probe_launch():
    """Do nothing: what is timed is the launch. Any grid and block."""


def probe_l2(chain, found, steps):
    """Follow a chain through global memory, each load needing the one before.

    One block of one thread. The loads are strong (``load_relaxed``), so they pass the L1 cache by
    and L2 serves them, once the chain lies there.

    Arrays:
        chain (uint32): read; element i holds the place that follows i. The chain begins at 0.
        found (1, uint32): written, the place after so many steps.
    """
    at = ZERO
    for _ in range(uint32(steps)):
        at = load_relaxed(chain, at)
    found[0] = at


def probe_remote(found, steps):
    """Follow a chain through the shared memory of the next block of the cluster, likewise.

    Clusters of 2 blocks or more, compute capability 9.0. In its own shared memory each block writes
    the chain i → (i + REMOTE_STRIDE) mod REMOTE_LENGTH; a cluster barrier puts that before all
    loads, another all loads before the end of any block. Its first thread follows.

    Arrays:
        found (blocks of the grid, uint32): written by each block, the place it has come to, from 0.
    """
    chain = cuda.shared.array(REMOTE_LENGTH, uint32)
    length, stride = uint32(REMOTE_LENGTH), uint32(REMOTE_STRIDE)
    thread = uint32(cuda.threadIdx.x)
    for i in range(thread, length, uint32(cuda.blockDim.x)):
        chain[i] = (i + stride) % length
    cluster_arrive()
    cluster_wait()
    if thread == ZERO:
        next_block = int32((cluster_rank() + int32(1)) % cluster_size())
        at = ZERO
        for _ in range(uint32(steps)):
            at = cluster_load(chain, int32(at), next_block)
        found[cuda.blockIdx.x] = at
    cuda.syncthreads()
    cluster_arrive()
    cluster_wait()


def probe_cluster(found, steps):
    """Pass the cluster's barrier, as the exchange "cluster" does once a step.

    Compute capability 9.0; clusters of any size.

    Arrays:
        found (blocks of the grid, uint32): written by the first thread of each block, how often.
    """
    passed = ZERO
    for _ in range(uint32(steps)):
        cluster_arrive()
        cluster_wait()
        passed += ONE
    if cuda.threadIdx.x == 0:
        found[cuda.blockIdx.x] = passed


def probe_cluster_stores(found, steps):
    """As ``probe_cluster``, each thread storing a number to global memory before it arrives.

    So does a group kernel, its part of H_t. On sm_90 the barrier's release is a fence of the whole
    GPU, which may have to wait for such stores: the difference tells.

    Arrays:
        found (threads of the grid, uint32): written by each thread, how often.
    """
    me = uint32(cuda.blockIdx.x) * uint32(cuda.blockDim.x) + uint32(cuda.threadIdx.x)
    for passed in range(uint32(steps)):
        found[me] = uint32(passed) + ONE
        cluster_arrive()
        cluster_wait()


def probe_flag(words, report, steps, patience):
    """Send a flagged word there and back between two blocks, as the exchange "flags" sends them.

    Two blocks of one thread, launched cooperatively. In step t, from 1, block 0 adds 1 to what came
    back last (0 at first) and stores it with t in the upper half; block 1 polls for it, adds 1 and
    stores that with t in another line of L2, which block 0 polls for. So one step is two ways.

    Arrays:
        words (LINE + 1, uint64): 0 before. Block 0 writes the first word, block 1 the last: t, and
            2 t − 1 or 2 t, of the last step.
        report (2, uint32): 0 before. A block that has polled ``patience`` times in vain writes the
            step and ends.
    """
    me = uint32(cuda.blockIdx.x)
    mine, theirs = me * uint32(LINE), (ONE - me) * uint32(LINE)
    t, value, missing = ONE, ZERO, ZERO
    while t <= uint32(steps) and missing == ZERO:
        if me == ZERO:
            store_relaxed(words, mine, uint64(value + ONE) | (uint64(t) << UPPER))
        polls = ZERO
        word = load_relaxed(words, theirs)
        while missing == ZERO and uint32(word >> UPPER) != t:
            polls += ONE
            if polls > uint32(patience):
                missing = ONE
            word = load_relaxed(words, theirs)
        value = uint32(word)
        if me == ONE and missing == ZERO:
            store_relaxed(words, mine, uint64(value + ONE) | (uint64(t) << UPPER))
        t += ONE
    if missing != ZERO:
        report[me] = t - ONE


def probe_counter(words, report, steps, patience):
    """Pass a barrier of all blocks through a counter, as the exchange "counter" does once a step.

    Launched cooperatively, any grid along x. Each block counts itself in; its first thread polls
    until all have come, and the block's barrier holds the others back.

    Arrays:
        words (1, uint64): 0 before; counts, blocks · steps in the end.
        report (blocks of the grid, uint32): 0 before. A block whose first thread has polled
            ``patience`` times in vain writes the step, from 1, and ends.
    """
    blocks = uint64(cuda.gridDim.x)
    first = cuda.threadIdx.x == 0
    t, missing = ONE, ZERO
    while t <= uint32(steps) and missing == ZERO:
        cuda.syncthreads()
        if first:
            cuda.threadfence()
            cuda.atomic.add(words, ZERO, uint64(1))
            polls = ZERO
            while missing == ZERO and load_acquire(words, ZERO) < uint64(t) * blocks:
                polls += ONE
                if polls > uint32(patience):
                    missing = ONE
        missing = uint32(cuda.syncthreads_or(int32(missing)))
        t += ONE
    if missing != ZERO and first:
        report[cuda.blockIdx.x] = t - ONE
