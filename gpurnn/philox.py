"""Random numbers that are a function of their place; the twin of ``gpurnn.kernels.philox``.

A seed, a *stream* and three words of place give four words, the same everywhere (Philox 4×32-10:
Salmon et al., SC 2011). What is drawn where:

============  ======================  ====================  ===========================
stream        first word              second                third
============  ======================  ====================  ===========================
``SAMPLING``  number of the token     row of the batch      0
``DROPOUT``   element // 4, lower     element // 4, upper   number of the update, from 0
``CUTS``      time step               0                     number of the update, from 0
============  ======================  ====================  ===========================

Sampling and the cuts of randomized truncation take the first of the four words; element e of an
array whose values are dropped, counted in C order, takes the one with number e % 4.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["CUTS", "DROPOUT", "LOWER", "SAMPLING", "below", "key", "uniform", "words"]

Words = NDArray[np.uint32]

SAMPLING, DROPOUT, CUTS = 0, 1, 2

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
LOWER = 0xFFFFFFFF


def key(seed: int) -> tuple[int, int]:
    """Return the two words of a seed, its lower 64 bits."""
    return seed & LOWER, seed >> 32 & LOWER


def words(
    seed: int, first: ArrayLike, second: ArrayLike, third: ArrayLike, stream: ArrayLike
) -> Words:
    """Return (…, 4) words for places that broadcast to (…); only their lower 32 bits count."""
    places = np.broadcast_arrays(first, second, third, stream)
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) & np.uint64(LOWER) for c in places)
    k0, k1 = key(seed)
    for _ in range(ROUNDS):
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
        )
        c1, c3 = b & np.uint64(LOWER), a & np.uint64(LOWER)
        k0, k1 = k0 + WEYL[0] & LOWER, k1 + WEYL[1] & LOWER
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniform(drawn: Words) -> NDArray[Any]:
    """Return the upper 24 bits of each word as a float32 in [0, 1), exactly."""
    return (drawn >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def below(p: float) -> int:
    """Return how many of the 2²⁴ values of ``uniform`` are less than p, for 0 ≤ p ≤ 1.

    So a word's upper 24 bits, as a number, are that or more where its value is p or more: exactly,
    in whatever type p would be compared.
    """
    return math.ceil(p * 2**24)
