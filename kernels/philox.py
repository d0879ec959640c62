"""Random numbers that are a function of their place: Philox 4×32 with ten rounds.

J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers: as easy as 1, 2,
3", SC 2011. There is no state to carry: a counter of four words and a key of two give four words.
Who needs the numbers of a place again, in the backward pass or in another thread, makes them again.

``gpurnn.philox`` is the twin in NumPy, and says which counters are whose.
"""

from numba import float32, uint32, uint64

from gpurnn.kernels.device import device

__all__ = ["philox", "uniform"]

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

_M0, _M1 = uint64(MULTIPLIERS[0]), uint64(MULTIPLIERS[1])
_W0, _W1 = uint32(WEYL[0]), uint32(WEYL[1])
_UPPER, _UNUSED, _SCALE = uint64(32), uint32(8), float32(2.0**-24)


@device
def philox(c0, c1, c2, c3, k0, k1):
    """Return four uint32, of the lower 32 bits of a counter's and a key's words."""
    c0, c1, c2, c3 = uint32(c0), uint32(c1), uint32(c2), uint32(c3)
    k0, k1 = uint32(k0), uint32(k1)
    for _ in range(ROUNDS):
        first, second = uint64(c0) * _M0, uint64(c2) * _M1
        c0 = uint32(uint32(second >> _UPPER) ^ c1 ^ k0)
        c2 = uint32(uint32(first >> _UPPER) ^ c3 ^ k1)
        c1, c3 = uint32(second), uint32(first)
        k0, k1 = uint32(k0 + _W0), uint32(k1 + _W1)
    return c0, c1, c2, c3


@device
def uniform(word):
    """Return a word's upper 24 bits as a float32 in [0, 1), each of them exact."""
    return float32(word >> _UNUSED) * _SCALE
