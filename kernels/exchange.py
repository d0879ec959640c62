"""How blocks of a group tell one another what each has computed of a step.

A group of ``blocks`` blocks owns some rows of the batch; each block computes some columns of them,
and all need all columns for the next step. In every variant a step's values arrive in the other of
the two buffers that each block has in its shared memory (``gpurnn.kernels.part``), so that no one
waits for those who still read the last step's.

=========  =======================================================================================
cluster    The group is a cluster. Each value is written straight into the shared memory of every
           block; a cluster barrier ends the step. Compute capability 9.0 and later.
flags      Each value goes through global memory as one 64-bit word, with the number of its step in
           the upper half. Readers poll the words they want: no fence, no barrier between blocks.
counter    The blocks count themselves in, in global memory; when all have come, each reads the
           step's values from where they are stored for good.
=========  =======================================================================================

With ``flags`` and ``counter`` all blocks of the grid must run at once: the launch is cooperative.
A thread that has polled ``patience`` times in vain gives up: its block reports, and with these two
no one waits for ever. (A cluster is scheduled as a whole: none of its blocks can be missing.)

Scratch for those two, ``words``, uint64, all 0 before the launch:

* flags: (groups, 2, rows of a group, h rounded up to even). Word (g, s, r, k) is number k of row r
  of group g, of a step whose number is s modulo 2. Two are enough: a block writes step t + 2 only
  after its threads have read all of step t + 1, which every block wrote after reading all of t. (A
  block that has no columns below h writes nothing, so nobody would wait for it: it reads nothing.)
* counter: ``LINE`` words for each group, of which the first counts.
"""

from typing import NamedTuple

from numba import cuda, int32, uint32, uint64

from gpurnn.kernels.device import DeviceFunction, device
from gpurnn.kernels.part import Part
from gpurnn.kernels.ptx import (
    cluster_arrive,
    cluster_store,
    cluster_wait,
    fence_gpu,
    load_acquire,
    load_relaxed_pair,
    store_relaxed,
)
from gpurnn.kernels.storage import Storage
from gpurnn.tile import LINE, Share, TensorShare

__all__ = ["Exchange", "exchange"]

IN_FLIGHT = 4
"""Loads that a thread issues, at most, before it looks at the first."""


class Exchange(NamedTuple):
    """Device functions, called in this order by every thread of a block.

    ``begin()``: once, when the block's shared memory is filled for the first step.

    ``send(words, v, group, buffer, r, k, x, tag)``: number k of row r of the group is x; ``buffer``
    is that of the coming step, ``tag`` counts the exchanges from 1. Only by the value's owner.

    ``post(words, group)``: the thread has sent all it has to send in this step.

    ``wait(words, v, source, base, group, buffer, rows, tag, patience)``: fill ``buffer`` with what
    the group has sent, of so many rows; returns 0, or 1 in every thread of a block that has waited
    in vain. ``source[base + r · h + k]`` is where the values lie in global memory. Afterwards the
    buffer can be read, and the other one be written.
    """

    begin: DeviceFunction
    send: DeviceFunction
    post: DeviceFunction
    wait: DeviceFunction


def exchange(name: str, share: Share | TensorShare, part: Part, storage: Storage) -> Exchange:
    """Build the functions of "cluster", "flags" or "counter"."""
    if name == "cluster":
        return _cluster(share, part)
    return _flags(share, part) if name == "flags" else _counter(share, part, storage)


def _in_flight(share: Share | TensorShare, loads_of_row: int) -> int:
    return min(IN_FLIGHT, -(-share.slice_rows * loads_of_row // share.threads))


@device
def _block_begins():
    cuda.syncthreads()


def _cluster(share: Share | TensorShare, part: Part) -> Exchange:
    """Write into every block's shared memory; one cluster barrier a step.

    The barrier puts all writes of a step before all reads of it, and all reads of a step before the
    writes of the step after the next, which go to the same buffer. The first one, in ``begin``,
    makes sure that every block of the cluster runs before another writes to it; after the last no
    block touches another's memory.
    """
    blocks = share.blocks
    place, encode = part.place, part.encode
    done = uint32(0)

    @device
    def begin():
        cluster_arrive()
        cluster_wait()

    @device
    def send(words, v, group, buffer, r, k, x, tag):
        at, value = int32(place(buffer, r, k)), encode(x)
        for block in range(blocks):
            cluster_store(v, at, int32(block), value)

    @device
    def post(words, group):
        cluster_arrive()

    @device
    def wait(words, v, source, base, group, buffer, rows, tag, patience):
        cluster_wait()
        return done

    return Exchange(begin, send, post, wait)


def _flags(share: Share | TensorShare, part: Part) -> Exchange:
    """Write value and step as one word; poll for it.

    A relaxed 64-bit access is never torn, so who sees the tag sees the value. That a slot is not
    overwritten before it was read rests on a thread's store following, through the block's barrier,
    the loads it depends on: no hardware stores ahead of a branch. One barrier of the block, which
    also gathers whether a thread gave up, puts its writes to shared memory before the reads of the
    next step.
    """
    h, pairs = uint32(share.h), uint32((share.h + 1) // 2)
    threads, odd = uint32(share.threads), share.h % 2 == 1
    words_of_step = uint32((share.h + 1) // 2 * 2 * share.slice_rows)
    padded = uint32((share.h + 1) // 2 * 2)
    in_flight = _in_flight(share, (share.h + 1) // 2)
    place, encode, bits, unbits = part.place, part.encode, part.bits, part.unbits
    zero, one, two, upper = uint32(0), uint32(1), uint32(2), uint64(32)

    @device
    def send(words, v, group, buffer, r, k, x, tag):
        at = (group * two + buffer) * words_of_step + r * padded + k
        store_relaxed(words, at, uint64(bits(encode(x))) | (uint64(tag) << upper))

    @device
    def post(words, group):
        pass

    @device
    def arrived(first, second, k, tag):
        came = uint32(first >> upper) == tag
        if odd:
            return came and (uint32(second >> upper) == tag or k + one >= h)
        return came and uint32(second >> upper) == tag

    @device
    def wait(words, v, source, base, group, buffer, rows, tag, patience):
        got = cuda.local.array((in_flight, 2), uint64)
        missing = zero
        begin, end = (group * two + buffer) * words_of_step, rows * pairs
        for some in range(uint32(cuda.threadIdx.x), end, threads * uint32(in_flight)):
            for i in range(in_flight):
                e = some + uint32(i) * threads
                if e < end:
                    got[i, 0], got[i, 1] = load_relaxed_pair(words, begin + e * two)
            for i in range(in_flight):
                e = some + uint32(i) * threads
                if e < end:
                    r, k = e // pairs, e % pairs * two
                    first, second = got[i, 0], got[i, 1]
                    polls = zero
                    while missing == zero and not arrived(first, second, k, tag):
                        polls += one
                        if polls > patience:
                            missing = one
                        first, second = load_relaxed_pair(words, begin + e * two)
                    v[place(buffer, r, k)] = unbits(uint32(first))
                    if not odd or k + one < h:
                        v[place(buffer, r, k + one)] = unbits(uint32(second))
        return uint32(cuda.syncthreads_or(int32(missing)))

    return Exchange(_block_begins, send, post, wait)


def _counter(share: Share | TensorShare, part: Part, storage: Storage) -> Exchange:
    """Count blocks in; then read what they stored.

    A block's barrier and the fence of its first thread put its stores before its count; the first
    thread of a reader acquires the count, and another barrier puts that before the block's loads. A
    third puts its writes to shared memory before the reads of the next step.
    """
    h, threads = uint32(share.h), uint32(share.threads)
    in_flight = _in_flight(share, share.h)
    blocks, line = uint64(share.blocks), uint32(LINE)
    place, encode, load_value, real = part.place, part.encode, storage.load, storage.real
    zero, one, counts = uint32(0), uint32(1), uint64(1)

    @device
    def send(words, v, group, buffer, r, k, x, tag):
        pass

    @device
    def post(words, group):
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            fence_gpu()
            cuda.atomic.add(words, group * line, counts)

    @device
    def wait(words, v, source, base, group, buffer, rows, tag, patience):
        got = cuda.local.array(in_flight, real)
        missing = zero
        if cuda.threadIdx.x == 0:
            polls = zero
            while missing == zero and load_acquire(words, group * line) < uint64(tag) * blocks:
                polls += one
                if polls > patience:
                    missing = one
        missing = uint32(cuda.syncthreads_or(int32(missing)))
        end = rows * h if missing == zero else zero
        for some in range(uint32(cuda.threadIdx.x), end, threads * uint32(in_flight)):
            for i in range(in_flight):
                e = some + uint32(i) * threads
                if e < end:
                    got[i] = load_value(source[base + uint64(e)])
            for i in range(in_flight):
                e = some + uint32(i) * threads
                if e < end:
                    v[place(buffer, e // h, e % h)] = encode(got[i])
        cuda.syncthreads()
        return missing

    return Exchange(_block_begins, send, post, wait)
