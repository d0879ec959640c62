"""The draw of ``gpurnn.kernels.sampling``, by all threads of a block, of any number of tokens."""

import math
from typing import Any

from numba import cuda, float32, int32, uint32, uint64
from numba.cuda import libdevice

from gpurnn.kernels.device import DeviceFunction, device
from gpurnn.kernels.ptx import float_bits
from gpurnn.kernels.sampling import INFINITE, NOT_A_NUMBER, NOTHING
from gpurnn.tile import WARP

__all__ = ["by_block"]

ALL_LANES = 0xFFFFFFFF
ROUNDS = 5  # of a tree over 32 lanes
_WARP, _LAST_LANE, _HALF = uint32(WARP), 31, 16
_ZERO, _ONE = uint32(0), uint32(1)


def by_block(q: int, real: Any, threads: int) -> DeviceFunction:
    """Build ``draw(O, P, O_at, P_at, u, scale, top_p, top_k)`` → int32, for a block.

    It has so many threads, whole warps, which all come here. The logits are O[O_at] to O[O_at + q −
    1], and P[P_at] on are q numbers of scratch, both of flat arrays in shared or global memory. A
    barrier must stand between the last write to the logits and this. A thread owns ⌈q / threads⌉
    neighbouring ids, or one more: an odd number, so that lanes read different banks. It reads and
    writes O and P there alone, and neither after the last barrier in here: they may then be written
    by others.

    Where top-k and top-p cut is found by bisection over the bits of a logit, in their order: 32
    rounds, or 64, of one barrier each, at most.
    """
    each, size, beyond = uint32(-(-q // threads) | 1), uint32(q), int32(q)
    bits = uint32 if real == float32 else uint64
    zero, one, infinity, least = real(0), real(1), real(math.inf), real(-math.inf)
    no_bits, one_bit, none, single, worst = (
        bits(0),
        bits(1),
        int32(0),
        int32(1),
        int32(2),
    )
    nan_code, infinite_code, nothing_code = (
        int32(NOT_A_NUMBER),
        int32(INFINITE),
        int32(NOTHING),
    )
    key = _key(real)
    warps = threads // WARP
    largest_of = _reduction(warps, _larger, real)
    most_of = _reduction(warps, _larger, int32)
    least_of = _reduction(warps, _lower, int32)
    sum_of, count_of = _reduction(warps, _added, real), _reduction(warps, _added, int32)
    sums_before, counts_before = _scan(warps, real), _scan(warps, int32)

    @device
    def draw(O, P, O_at, P_at, u, scale, top_p, top_k):
        sums = cuda.shared.array((2, WARP), real)
        counts = cuda.shared.array((2, WARP), int32)
        begin = min(uint32(cuda.threadIdx.x) * each, size)
        end = min(begin + each, size)

        largest, fault = least, none
        for i in range(begin, end):
            x = O[O_at + i]
            if x != x:
                fault = worst
            elif not x < infinity and fault == none:
                fault = single
            if x > largest:
                largest = x
        largest = largest_of(largest, sums, 0)
        fault = most_of(fault, counts, 0)
        if fault != none:
            return nan_code if fault == worst else infinite_code
        if largest == least:
            return nothing_code
        if top_k == _ONE:
            mine = beyond
            for i in range(begin, end):
                if mine == beyond and O[O_at + i] == largest:
                    mine = int32(i)
            return least_of(mine, counts, 1)

        own = zero
        for i in range(begin, end):
            mass = real(math.exp((O[O_at + i] - largest) * scale))
            P[P_at + i] = mass
            own += mass
        turn = 1
        low, high = no_bits, bits(key(largest) + one_bit)
        keep = int32(min(top_k, size))
        if top_k < size:
            # ``low`` is a key that at least k reach, ``high`` one that fewer do.
            found = beyond
            while high - low > one_bit and found != keep:
                middle = bits(low + ((high - low) >> one_bit))
                count = none
                for i in range(begin, end):
                    if key(O[O_at + i]) >= middle:
                        count += single
                count = count_of(count, counts, turn)
                turn = 1 - turn
                if count >= keep:
                    low, found = middle, count
                else:
                    high = middle
            above, equal = none, none
            for i in range(begin, end):
                of = key(O[O_at + i])
                if of > low:
                    above += single
                elif of == low:
                    equal += single
            above = count_of(above, counts, turn)
            before, _ = counts_before(equal, counts, 1 - turn)
            own = zero
            for i in range(begin, end):
                of = key(O[O_at + i])
                if of < low or (of == low and above + before >= keep):
                    P[P_at + i] = zero
                if of == low:
                    before += single
                own += P[P_at + i]
        if top_p < one:
            aim = top_p * sum_of(own, sums, 1)
            high = bits(key(largest) + one_bit)
            side = 0
            # ``low`` is a key above which, itself included, at least p lies.
            while high - low > one_bit:
                middle = bits(low + ((high - low) >> one_bit))
                mass = zero
                for i in range(begin, end):
                    if key(O[O_at + i]) >= middle:
                        mass += P[P_at + i]
                mass = sum_of(mass, sums, side)
                side = 1 - side
                if mass >= aim:
                    low = middle
                else:
                    high = middle
            mass, equal = zero, none
            for i in range(begin, end):
                of = key(O[O_at + i])
                if of > low:
                    mass += P[P_at + i]
                elif of == low:
                    equal += single
            mass = sum_of(mass, sums, side)
            before, _ = counts_before(equal, counts, turn)
            own = zero
            for i in range(begin, end):
                of = key(O[O_at + i])
                if of < low or (of == low and mass + real(before) * P[P_at + i] >= aim):
                    P[P_at + i] = zero
                if of == low:
                    before += single
                own += P[P_at + i]

        running, everything = sums_before(own, sums, 0)
        aim = real(u) * everything
        hit, last = beyond, none
        for i in range(begin, end):
            mass = P[P_at + i]
            running += mass
            if mass > zero:
                last = int32(i)
                if hit == beyond and running > aim:
                    hit = last
        hit = least_of(hit, counts, 0)
        last = most_of(last, counts, 1)
        # Sums are not added up in one order: by rounding none may exceed the aim.
        return hit if hit < beyond else last

    return draw


def _key(real: Any) -> DeviceFunction:
    """Build a function that maps numbers, NaN aside, to unsigned ones of the same order."""
    zero = real(0)
    if real == float32:
        sign, everything = uint32(1 << 31), uint32(0xFFFFFFFF)

        @device
        def of_float(x):
            bits = float_bits(x + zero)  # −0 becomes 0
            return uint32(bits ^ everything) if bits >= sign else uint32(bits | sign)

        return of_float

    long_sign, all_of_long = uint64(1 << 63), uint64(0xFFFFFFFFFFFFFFFF)

    @device
    def of_double(x):
        bits = uint64(libdevice.double_as_longlong(x + zero))
        return uint64(bits ^ all_of_long) if bits >= long_sign else uint64(bits | long_sign)

    return of_double


@device
def _larger(a, b):
    return max(a, b)


@device
def _lower(a, b):
    return min(a, b)


@device
def _added(a, b):
    return a + b


def _reduction(warps: int, of: DeviceFunction, kind: Any) -> DeviceFunction:
    """Build ``reduce(x, box, turn)``: of the x of all threads of a block, in one order.

    ``box`` (2, 32), of ``kind``, is shared memory. Of two calls with one box the second takes the
    other ``turn``, 0 or 1, unless a barrier lies between them: so that one barrier in each is
    enough. Who writes to a side has passed the barrier of the call between, and so have those who
    read that side before.
    """

    @device
    def reduce(x, box, turn):
        thread, found = uint32(cuda.threadIdx.x), kind(x)
        for i in range(ROUNDS):
            found = kind(of(found, cuda.shfl_xor_sync(ALL_LANES, found, int32(_HALF >> i))))
        if thread % _WARP == _ZERO:
            box[turn, thread // _WARP] = found
        cuda.syncthreads()
        found = box[turn, 0]
        for w in range(1, warps):
            found = kind(of(found, box[turn, w]))
        return found

    return reduce


def _scan(warps: int, kind: Any) -> DeviceFunction:
    """Build ``scan(x, box, turn)``: the sum of the x of all threads before, and of all.

    ``box`` and ``turn`` are as in ``_reduction``.
    """
    zero = kind(0)

    @device
    def scan(x, box, turn):
        thread, through = uint32(cuda.threadIdx.x), kind(x)
        lane, warp = thread % _WARP, thread // _WARP
        for i in range(ROUNDS):
            below = cuda.shfl_up_sync(ALL_LANES, through, int32(1 << i))
            if lane >= uint32(1 << i):
                through = kind(through + below)
        if lane == uint32(_LAST_LANE):
            box[turn, warp] = through
        below = cuda.shfl_up_sync(ALL_LANES, through, int32(1))
        cuda.syncthreads()
        before, everything = zero, zero
        for w in range(warps):
            if uint32(w) == warp:
                before = everything
            everything = kind(everything + box[turn, w])
        if lane != _ZERO:
            before = kind(before + below)
        return before, everything

    return scan
