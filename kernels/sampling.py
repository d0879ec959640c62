"""From logits to the next token: temperature, top-k, top-p and the draw, by a warp.

``gpurnn.kernels.sampling_block`` has the same for a block, and many tokens.

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

from numba import cuda, int32, uint32

from gpurnn.kernels.device import DeviceFunction, device
from gpurnn.tile import WARP

__all__ = ["INFINITE", "NOTHING", "NOT_A_NUMBER", "by_warp"]

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
