"""Softmax, loss and gradient in one pass over the logits O (N, q).

A row of O belongs to a warp, which holds it in registers, or, where it is too long for that, to a
block, which goes through it twice. There are no atomics, and every sum has one order, which the
size of the block gives. ``gpurnn.kernels.loss_mean`` follows.
"""

import math
from collections.abc import Callable
from typing import Any

from numba import cuda, float32, float64, int64, uint32
from numba.cuda import libdevice

from gpurnn.kernels.device import DeviceFunction, device
from gpurnn.kernels.storage import Storage
from gpurnn.kernels.sums import over_warp, sum_of_warp
from gpurnn.tile import WARP, Softmax

__all__ = ["cross_entropy"]

AT_A_TIME = 4  # logits that a thread of a block loads before it computes with them

# The least finite number, with which a search for the largest begins: unlike −∞ it can be
# subtracted from −∞.
LOWEST = {float32: -(2.0 - 2.0**-23) * 2.0**127, float64: -(2.0 - 2.0**-52) * 2.0**1023}
LARGER = {float32: libdevice.fmaxf, float64: libdevice.fmax}  # of two; NaN only where both are


def cross_entropy(sizes: Softmax, storage: Storage) -> Callable[..., None]:
    """Build ``kernel(O, dO, targets, losses, b_q, smoothing, counts, ignored, rows)``.

    With z = O + b_q where ``sizes.biased``, else O, and p = softmax(z), a row has the loss
    −Σ_j t_j log p_j (*Dive into Deep Learning* 4.1), and the gradient by z (p − t) / M. The
    distribution t is ε/q everywhere, and 1 − ε more at the target; M is the number of rows that
    count. A row whose target is ``ignored`` has loss 0 and gradient 0, whatever its logits are.

    Arrays:
        O (N, q): read.
        dO (N, q): written where ``sizes.gradient``, else not used; it may be O.
        targets (N,) int32: read. One that lies outside [0, q) and is not ignored makes its row's
            loss NaN.
        losses (N,) of ``storage.real``: written.
        b_q (q,): read where ``sizes.biased``, else not used.
        smoothing (1,) of ``storage.real``: ε < 1, read where ``sizes.smoothed``, else it is 0.
        counts (1,) int64: read where ``sizes.gradient``; M is counts[0] + ``rows``.

    A logit of −∞ has probability 0. NaN, +∞ or nothing but −∞ in a row make NaN of its loss and of
    all its gradient. Sums are of ``storage.real``, and each result is rounded once: a gradient may
    be too small for float16.

    Blocks of ``sizes.threads``. Where ``sizes.columns`` is not 0 a warp has one row of up to 32
    times as many columns, blockDim.x / 32 rows to a block: lane l holds columns l, l + 32, … in
    registers, and reads each logit once. Its lanes exchange by shuffles alone. Otherwise block i
    has row i: thread t takes columns t, t + blockDim.x, …, AT_A_TIME at a time, for the sum with
    the largest logit so far, and again for the gradient. A barrier stands between the warps' sums
    in shared memory and their reading, another after the second pass where labels are smoothed.
    In either, no logit is read but by the thread that writes its gradient.
    """
    return _of_block(sizes, storage) if sizes.columns == 0 else _of_warp(sizes, storage)


def _logit_of(sizes: Softmax, storage: Storage) -> DeviceFunction:
    """Return a device function of ``(O, b_q, row, j)``: the logit, with its bias."""
    load_value = storage.load

    @device
    def biased(O, b_q, row, j):
        return load_value(O[row, j]) + load_value(b_q[j])

    @device
    def plain(O, b_q, row, j):
        return load_value(O[row, j])

    return biased if sizes.biased else plain


def _loss_of(sizes: Softmax, real: Any) -> DeviceFunction:
    """Return a device function of ``(log_total, at_target, shifts, smoothing, q)``: a row's loss.

    log p_j is a shift, the j-th logit less the largest, less ``log_total``. ``at_target`` is the
    shift of the target, ``shifts`` the sum of all of them. None is above 0: nothing cancels, and
    only a probability of 0 makes one infinite.
    """
    one = real(1)

    @device
    def smoothed(log_total, at_target, shifts, smoothing, q):
        eps = smoothing[0]
        return log_total - (one - eps) * at_target - eps / real(q) * shifts

    @device
    def plain(log_total, at_target, shifts, smoothing, q):
        return log_total - at_target

    return smoothed if sizes.smoothed else plain


def _wanted_of(sizes: Softmax, real: Any) -> DeviceFunction:
    """Return a device function of ``(smoothing, q)``: what t has everywhere, and what beside."""
    zero, one = real(0), real(1)

    @device
    def smoothed(smoothing, q):
        return smoothing[0] / real(q), one - smoothing[0]

    @device
    def plain(smoothing, q):
        return zero, one

    return smoothed if sizes.smoothed else plain


def _of_warp(sizes: Softmax, storage: Storage) -> Callable[..., None]:
    real, store_value, held = storage.real, storage.store, sizes.columns
    gradient, smoothed = sizes.gradient, sizes.smoothed
    logit = _logit_of(sizes, storage)
    loss_of, wanted_of = _loss_of(sizes, real), _wanted_of(sizes, real)
    larger = LARGER[real]
    largest_of_warp = over_warp(larger)
    zero, one, nan, away = real(0), real(1), real(math.nan), real(-math.inf)
    lowest = real(LOWEST[real])
    lanes = uint32(WARP)
    rows_of_block = uint32(sizes.threads // WARP)

    def cross_entropy_of_warp(O, dO, targets, losses, b_q, smoothing, counts, ignored, rows):
        q = uint32(O.shape[1])
        lane = uint32(cuda.threadIdx.x) % lanes
        row = uint32(uint32(cuda.blockIdx.x) * rows_of_block + uint32(cuda.threadIdx.x) // lanes)
        if row >= uint32(O.shape[0]):
            return
        # All that lies in memory is loaded before anything is computed.
        own_target, scale = targets[row], one
        if gradient:
            scale = one / real(counts[0] + rows)
        z = cuda.local.array(held, real)
        for k in range(held):
            j = uint32(lane + uint32(WARP * k))
            z[k] = away
            if j < q:
                z[k] = logit(O, b_q, row, j)
        if int64(own_target) == ignored:
            if lane == uint32(0):
                losses[row] = zero
            if gradient:
                for k in range(held):
                    j = uint32(lane + uint32(WARP * k))
                    if j < q:
                        dO[row, j] = store_value(zero)
            return
        target = uint32(own_target)
        top = lowest
        for k in range(held):
            top = larger(top, z[k])
        top = largest_of_warp(top)
        total, shifts, at_target = zero, zero, zero
        for k in range(held):
            j = uint32(lane + uint32(WARP * k))
            shift = z[k] - top
            if smoothed and j < q:
                shifts += shift
            if j == target:
                at_target = shift
            z[k] = real(math.exp(shift))
            total += z[k]
        total = sum_of_warp(total)
        if smoothed:
            shifts = sum_of_warp(shifts)
        if lane == target % lanes:
            loss = loss_of(real(math.log(total)), at_target, shifts, smoothing, q)
            losses[row] = loss if target < q else nan
        if gradient:
            inverse = one / total
            everywhere, beside = wanted_of(smoothing, q)
            for k in range(held):
                j = uint32(lane + uint32(WARP * k))
                if j < q:
                    excess = z[k] * inverse - everywhere
                    if j == target:
                        excess -= beside
                    dO[row, j] = store_value(excess * scale)

    return cross_entropy_of_warp


def _of_block(sizes: Softmax, storage: Storage) -> Callable[..., None]:
    real, store_value = storage.real, storage.store
    gradient, smoothed = sizes.gradient, sizes.smoothed
    logit = _logit_of(sizes, storage)
    loss_of, wanted_of = _loss_of(sizes, real), _wanted_of(sizes, real)
    larger = LARGER[real]
    largest_of_warp = over_warp(larger)
    zero, one, nan, away = real(0), real(1), real(math.nan), real(-math.inf)
    lowest = real(LOWEST[real])
    lanes, threads = uint32(WARP), uint32(sizes.threads)
    warps, step = sizes.threads // WARP, uint32(AT_A_TIME * sizes.threads)

    @device
    def loaded(O, b_q, row, first, q, z):
        """Load the thread's next logits; −∞ stands for those that a row has not."""
        for k in range(AT_A_TIME):
            j = uint32(first + uint32(k) * threads)
            z[k] = away
            if j < q:
                z[k] = logit(O, b_q, row, j)

    def cross_entropy_of_block(O, dO, targets, losses, b_q, smoothing, counts, ignored, rows):
        tops = cuda.shared.array(warps, real)
        totals = cuda.shared.array(warps, real)
        q, row = uint32(O.shape[1]), uint32(cuda.blockIdx.x)
        thread = uint32(cuda.threadIdx.x)
        warp, lane = thread // lanes, thread % lanes
        target = uint32(targets[row])
        if int64(targets[row]) == ignored:
            if thread == uint32(0):
                losses[row] = zero
            if gradient:
                j = thread
                while j < q:
                    dO[row, j] = store_value(zero)
                    j = uint32(j + threads)
            return
        scale = one
        if gradient:
            scale = one / real(counts[0] + rows)
        z = cuda.local.array(AT_A_TIME, real)
        top, total = lowest, zero
        first = thread
        while first < q:
            loaded(O, b_q, row, first, q, z)
            raised = top
            for k in range(AT_A_TIME):
                raised = larger(raised, z[k])
            total *= real(math.exp(top - raised))
            for k in range(AT_A_TIME):
                total += real(math.exp(z[k] - raised))
            top = raised
            first = uint32(first + step)
        raised = largest_of_warp(top)
        total = sum_of_warp(total * real(math.exp(top - raised)))
        if lane == uint32(0):
            tops[warp] = raised
            totals[warp] = total
        cuda.syncthreads()
        top = lowest
        for w in range(uint32(warps)):
            top = larger(top, tops[w])
        total = zero
        for w in range(uint32(warps)):
            total += totals[w] * real(math.exp(tops[w] - top))
        log_total, at_target, shifts = real(math.log(total)), zero, zero
        owner = thread == target % threads
        if owner and target < q:
            at_target = logit(O, b_q, row, target) - top
        if gradient or smoothed:
            inverse = one / total
            everywhere, beside = wanted_of(smoothing, q)
            first = thread
            while first < q:
                loaded(O, b_q, row, first, q, z)
                for k in range(AT_A_TIME):
                    j = uint32(first + uint32(k) * threads)
                    if j < q:
                        shift = z[k] - top
                        if smoothed:
                            shifts += shift
                        if gradient:
                            excess = real(math.exp(shift)) * inverse - everywhere
                            if j == target:
                                excess -= beside
                            dO[row, j] = store_value(excess * scale)
                first = uint32(first + step)
        if smoothed:
            sums = cuda.shared.array(warps, real)
            shifts = sum_of_warp(shifts)
            if lane == uint32(0):
                sums[warp] = shifts
            cuda.syncthreads()
            shifts = zero
            for w in range(uint32(warps)):
                shifts += sums[w]
        if owner:
            loss = loss_of(log_total, at_target, shifts, smoothing, q)
            losses[row] = loss if target < q else nan

    return cross_entropy_of_block
