"""All parameters updated from their gradients, clipped together, in two launches.

Parameters, gradients and what the optimizer remembers of them are flat arrays of one length P, in
one order. ``norm`` adds up the squares and looks for what would overflow; ``apply`` clips, and
updates all of it or nothing. Neither is told anything by the host: what changes from step to step
lies in small arrays (``gpurnn.slots``).

Both are launched with blocks of 256 threads, ``apply`` with any number of them. No two arrays may
overlap.
"""

import math
from collections.abc import Callable

from numba import cuda, float64, int32, uint32, uint64

from gpurnn.kernels.device import DeviceFunction, device
from gpurnn.kernels.storage import Storage
from gpurnn.kernels.sums import sum_of_block
from gpurnn.slots import Counts, Rates, Record, Settings, Updating

__all__ = ["apply", "norm"]

THREADS = Updating("sgd").threads
SCALARS = 5
"""Of the kernel's real type, that an update is made with."""

LR, CORRECTION_1, CORRECTION_2 = (
    uint32(Rates.LR),
    uint32(Rates.CORRECTION_1),
    uint32(Rates.CORRECTION_2),
)
RATES = uint64(Rates.SIZE)
MAX_NORM, MOMENTUM = uint32(Settings.MAX_NORM), uint32(Settings.MOMENTUM)
BETA_1, BETA_2 = uint32(Settings.BETA_1), uint32(Settings.BETA_2)
EPS, WEIGHT_DECAY = uint32(Settings.EPS), uint32(Settings.WEIGHT_DECAY)
BATCH, STOPPED = uint32(Counts.BATCH), uint32(Counts.STOPPED)
NEXT_BATCH, NEXT_STOPPED = uint32(Counts.NEXT_BATCH), uint32(Counts.NEXT_STOPPED)
RECORD, LOSS, NORM = uint64(Record.SIZE), uint64(Record.LOSS), uint64(Record.NORM)
REFUSED = uint64(Record.STOPPED)


def _new_values(optimizer: str, real) -> tuple[DeviceFunction, DeviceFunction]:
    """Build ``new(p, g, m, v, s)`` → new p, m, v, and ``scalars(s, rates, settings, batch)``.

    The order of operations is that of ``gpurnn.optimizers``, the scalars are rounded as there.
    """
    one = float64(1)
    s0, s1, s2, s3, s4 = (uint32(i) for i in range(SCALARS))

    @device
    def scalars(s, rates, settings, batch):
        row = batch * RATES
        lr = rates[row + LR]
        s[s0] = real(lr)
        if optimizer == "momentum":
            s[s1] = real(settings[MOMENTUM])
        if optimizer == "adamw":
            s[s0] = real(lr / rates[row + CORRECTION_1])
            s[s1] = real(one - settings[BETA_1])
            s[s2] = real(one - settings[BETA_2])
            s[s3] = real(rates[row + CORRECTION_2])
            s[s4] = real(lr * settings[WEIGHT_DECAY])

    @device
    def sgd(p, g, m, v, s, eps):
        return p - s[s0] * g, m, v

    @device
    def momentum(p, g, m, v, s, eps):
        v_next = s[s1] * v + g
        return p - s[s0] * v_next, m, v_next

    @device
    def adamw(p, g, m, v, s, eps):
        m_next = m + s[s1] * (g - m)
        v_next = v + s[s2] * (g * g - v)
        change = m_next / (real(math.sqrt(v_next / s[s3])) + eps) * s[s0]
        return p - (change + s[s4] * p), m_next, v_next

    return {"sgd": sgd, "momentum": momentum, "adamw": adamw}[optimizer], scalars


def _bound(optimizer: str, real) -> DeviceFunction:
    """Build ``bound(p, g, m, v, s, eps)``: finite only if all new values of a number are.

    g is as large as what is left of the gradient after clipping can be. Of adamw the denominator is
    taken for ε alone, so that the bound is far too large; but numbers that are reach it only where
    the run is lost anyway.
    """
    s0, s1, s2, s4 = uint32(0), uint32(1), uint32(2), uint32(4)

    @device
    def sgd(p, g, m, v, s, eps):
        return abs(p) + s[s0] * g

    @device
    def momentum(p, g, m, v, s, eps):
        return abs(p) + s[s0] * (s[s1] * abs(v) + g) + (abs(v) + g)

    @device
    def adamw(p, g, m, v, s, eps):
        change = (abs(m) + s[s1] * (g + abs(m))) / eps * s[s0]
        return max(abs(p), s[s4] * abs(p)) + change + (v + s[s2] * g * g)

    return {"sgd": sgd, "momentum": momentum, "adamw": adamw}[optimizer]


def norm(updating: Updating, storage: Storage) -> Callable[..., None]:
    """Build ``kernel(theta, grads, m, v, rates, settings, counts, partials)``.

    Arrays, all flat:
        theta, grads (P,): read.
        m, v: read, as far as the optimizer has them: (P,), else of any length.
        rates, settings, counts: read, see ``gpurnn.slots``.
        partials (2 · blocks of the grid): written. Block b's sum of squares of gradients, in
            float64, is element b; element blocks + b is 0, or 1 if a new value of one of its
            numbers may overflow.

    A thread takes every (256 · blocks)-th number, in order; a block adds its threads' sums, of
    its warps and then of all. So the order of all sums depends on P and the grid alone.
    """
    real, zero, no, yes = storage.real, storage.real(0), float64(0), float64(1)
    bound = _bound(updating.optimizer, real)
    _, scalars = _new_values(updating.optimizer, real)
    has_m, has_v = updating.optimizer == "adamw", updating.optimizer != "sgd"
    summed = sum_of_block(float64)

    def update_norm(theta, grads, m, v, rates, settings, counts, partials):
        s = cuda.local.array(SCALARS, real)
        scalars(s, rates, settings, uint64(counts[BATCH]))
        most, eps = settings[MAX_NORM], real(settings[EPS])
        squares, over = no, no
        blocks = uint32(cuda.gridDim.x)
        first = uint64(cuda.blockIdx.x) * uint64(THREADS) + uint64(cuda.threadIdx.x)
        for i in range(first, uint64(theta.shape[0]), uint64(blocks) * uint64(THREADS)):
            g = grads[i]
            squares += float64(g) * float64(g)
            old_m, old_v = zero, zero
            if has_m:
                old_m = m[i]
            if has_v:
                old_v = v[i]
            clipped = real(min(float64(abs(g)), most))
            new = bound(theta[i], clipped, old_m, old_v, s, eps)
            if new - new != zero:
                over = yes
        total = summed(squares)
        any_over = cuda.syncthreads_or(int32(over != no))
        if cuda.threadIdx.x == 0:
            partials[cuda.blockIdx.x] = total
            partials[blocks + uint32(cuda.blockIdx.x)] = yes if any_over != 0 else no

    return update_norm


def apply(updating: Updating, storage: Storage) -> Callable[..., None]:
    """Build ``kernel(theta, grads, m, v, loss, partials, rates, settings, counts, record)``.

    Arrays, all flat:
        theta (P,): read and written. grads (P,): read.
        m, v: read and written, as far as the optimizer has them.
        loss (1,) of float64, partials, rates, settings: read.
        counts: BATCH and STOPPED are read, NEXT_BATCH and NEXT_STOPPED written.
        record: the row of the batch is written.

    If the loss or the norm is not finite, a new value may overflow, or a step before was refused,
    theta, m and v stay as they are, and the steps after this one are refused too.

    Every block adds up all partial sums, in the same order. A number is updated by one thread.
    Block 0 alone writes counts and record, to places that no block reads in this launch.
    """
    real, zero, no, yes = storage.real, storage.real(0), float64(0), float64(1)
    new, scalars = _new_values(updating.optimizer, real)
    has_m, has_v = updating.optimizer == "adamw", updating.optimizer != "sgd"
    summed = sum_of_block(float64)

    def update_apply(theta, grads, m, v, loss, partials, rates, settings, counts, record):
        s = cuda.local.array(SCALARS, real)
        batch = uint64(counts[BATCH])
        scalars(s, rates, settings, batch)
        eps = real(settings[EPS])
        thread, blocks = uint32(cuda.threadIdx.x), uint32(partials.shape[0]) // uint32(2)
        squares, over = no, no
        for b in range(thread, blocks, uint32(THREADS)):
            squares += partials[b]
            over = max(over, partials[blocks + b])
        total = summed(squares)
        may_overflow = cuda.syncthreads_or(int32(over != no))
        length = math.sqrt(total)
        finite = length - length == no and loss[0] - loss[0] == no
        stopped = counts[STOPPED] != 0 or may_overflow != 0 or not finite
        if cuda.blockIdx.x == 0 and thread == uint32(0):
            record[batch * RECORD + LOSS] = loss[0]
            record[batch * RECORD + NORM] = length
            record[batch * RECORD + REFUSED] = yes if stopped else no
            counts[NEXT_BATCH] = counts[BATCH] + 1
            counts[NEXT_STOPPED] = 1 if stopped else 0
        if stopped:
            return
        most = settings[MAX_NORM]
        scale, clips = real(most / length) if length > most else real(1), length > most
        first = uint64(cuda.blockIdx.x) * uint64(THREADS) + uint64(thread)
        for i in range(first, uint64(theta.shape[0]), uint64(cuda.gridDim.x) * uint64(THREADS)):
            g = grads[i]
            if clips:
                g *= scale
            old_m, old_v = zero, zero
            if has_m:
                old_m = m[i]
            if has_v:
                old_v = v[i]
            theta[i], new_m, new_v = new(theta[i], g, old_m, old_v, s, eps)
            if has_m:
                m[i] = new_m
            if has_v:
                v[i] = new_v

    return update_apply
