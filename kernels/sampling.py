"""From logits to the next token: temperature, top-k, top-p and the draw, by a warp or a block.

What is drawn is what ``gpurnn.sampling.TokenSampler`` draws, but for rounding: the arithmetic here
is that of the model. ``u`` is a float32 in [0, 1), ``scale`` one over the temperature. ``top_k``
≥ 1 (q or more keeps all, 1 is greedy: the likeliest token, of equals the lowest id), ``top_p`` in
(0, 1] (1 keeps all) are the same for all threads, and so is what comes back: an id below q, or one
of

* ``NOT_A_NUMBER``: a logit is NaN,
* ``INFINITE``: none is, but one is +∞,
* ``NOTHING``: all are −∞.

Nothing is sorted. A token is kept by top-k if fewer than k are ahead of it: those with larger
logits, and of equal ones those with lower ids. It is kept by top-p if those ahead of it have
together less than p of what top-k has left. Sums have one order. The draw inverts the sums of the
probabilities in the order of ids: the first token whose sum, its own probability included, exceeds
u times all.
"""

import math
from typing import Any

from numba import cuda, float32, int32, uint32, uint64
from numba.cuda import libdevice

from gpurnn.kernels.device import DeviceFunction, device
from gpurnn.kernels.ptx import float_bits
from gpurnn.tile import WARP

__all__ = ["INFINITE", "NOTHING", "NOT_A_NUMBER", "by_block", "by_warp"]

NOT_A_NUMBER, INFINITE, NOTHING = -1, -2, -3

ALL_LANES = 0xFFFFFFFF
ROUNDS = 5  # of a tree over 32 lanes
_WARP, _LAST_LANE, _HALF = uint32(WARP), 31, 16
_ZERO, _ONE = uint32(0), uint32(1)


def by_warp(q: int, real: Any) -> DeviceFunction:
    """Build ``draw(O, at, u, scale, top_p, top_k)`` → int32, for one whole warp.

    The logits are O[at] to O[at + q − 1], of a flat array in shared or global memory; a barrier
    must stand between their last write and this. A lane owns ⌈q / 32⌉ neighbouring ids. Which
    tokens are ahead of which is counted pair by pair: it takes q² / 32 rounds, or q for q ≤ 32.
    """
    each = -(-q // WARP)
    lanes = -(-q // each)
    size, mine_at_once = uint32(q), uint32(each)
    zero, one, infinity = real(0), real(1), real(math.inf)
    least = real(-math.inf)
    nan_code, infinite_code, nothing_code = (
        int32(NOT_A_NUMBER),
        int32(INFINITE),
        int32(NOTHING),
    )

    @device
    def of_first(holders, mine):
        """What the first lane of ``holders`` has."""
        return cuda.shfl_sync(ALL_LANES, int32(mine), int32(cuda.ffs(holders)) - int32(1))

    @device
    def cut(x, p, begin, top_p, top_k):
        """Set p of what is not kept to 0; return the sum of the lane's own."""
        rank = cuda.local.array(each, uint32)
        ahead = cuda.local.array(each, real)
        for e in range(each):
            rank[e] = _ZERO
            ahead[e] = zero
        for source in range(lanes):
            for f in range(each):
                other = cuda.shfl_sync(ALL_LANES, x[f], int32(source))
                mass = cuda.shfl_sync(ALL_LANES, p[f], int32(source))
                j = uint32(source) * mine_at_once + uint32(f)
                for e in range(each):
                    if other > x[e] or (other == x[e] and j < begin + uint32(e)):
                        rank[e] += _ONE
                        ahead[e] += mass
        own = zero
        for e in range(each):
            if rank[e] >= top_k:
                p[e] = zero
            own += p[e]
        if top_p < one:
            total = own
            for i in range(ROUNDS):
                total += cuda.shfl_xor_sync(ALL_LANES, total, int32(_HALF >> i))
            own = zero
            for e in range(each):
                if ahead[e] >= top_p * total:
                    p[e] = zero
                own += p[e]
        return own

    @device
    def draw(O, at, u, scale, top_p, top_k):
        x = cuda.local.array(each, real)
        p = cuda.local.array(each, real)
        lane = uint32(cuda.threadIdx.x) % _WARP
        begin = lane * mine_at_once

        largest, beyond, nan = least, False, False
        for e in range(each):
            i = begin + uint32(e)
            x[e] = least
            if i < size:
                x[e] = O[at + i]
            if not x[e] < infinity:
                beyond = True
            if x[e] != x[e]:
                nan = True
            if x[e] > largest:
                largest = x[e]
        for i in range(ROUNDS):
            other = cuda.shfl_xor_sync(ALL_LANES, largest, int32(_HALF >> i))
            if other > largest:
                largest = other
        if cuda.any_sync(ALL_LANES, beyond):
            return nan_code if cuda.any_sync(ALL_LANES, nan) else infinite_code
        if largest == least:
            return nothing_code
        if top_k == _ONE:
            mine = size
            for e in range(each):
                if x[each - 1 - e] == largest:
                    mine = begin + uint32(each - 1 - e)
            return of_first(uint32(cuda.ballot_sync(ALL_LANES, mine < size)), mine)

        own = zero
        for e in range(each):
            p[e] = real(math.exp((x[e] - largest) * scale))
            own += p[e]
        if top_k < size or top_p < one:
            own = cut(x, p, begin, top_p, top_k)

        through = own
        for i in range(ROUNDS):
            below = cuda.shfl_up_sync(ALL_LANES, through, int32(1 << i))
            if lane >= uint32(1 << i):
                through += below
        total = cuda.shfl_sync(ALL_LANES, through, int32(_LAST_LANE))
        running = cuda.shfl_up_sync(ALL_LANES, through, int32(1))
        if lane == _ZERO:
            running = zero
        aim = real(u) * total
        hit, last = size, size
        for e in range(each):
            running += p[e]
            if p[e] > zero:
                last = begin + uint32(e)
                if hit == size and running > aim:
                    hit = last
        holders = uint32(cuda.ballot_sync(ALL_LANES, hit < size))
        if holders != _ZERO:
            return of_first(holders, hit)
        # Lanes' sums are not added up in one order: by rounding none may exceed the aim.
        holders = uint32(cuda.ballot_sync(ALL_LANES, last < size))
        return cuda.shfl_sync(ALL_LANES, int32(last), int32(_LAST_LANE) - int32(cuda.clz(holders)))

    return draw


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
