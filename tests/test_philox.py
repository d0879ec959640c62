"""Counter-based random numbers: known answers, and the device's against NumPy's."""

import numpy as np
import pytest
from numba import cuda, uint32

from gpurnn import emulator, philox
from gpurnn.kernels.philox import philox as device_philox
from gpurnn.kernels.philox import uniform as device_uniform

ONES = 0xFFFFFFFF
# Of the authors' own test vectors for philox4x32 with ten rounds: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def kernel(counters, keys, out, uniforms):
    i = cuda.threadIdx.x
    drawn = device_philox(
        counters[i, 0], counters[i, 1], counters[i, 2], counters[i, 3], keys[i, 0], keys[i, 1]
    )
    for k in range(4):
        out[i, uint32(k)] = drawn[k]
        uniforms[i, uint32(k)] = device_uniform(drawn[k])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    found = philox.words(key[0] | key[1] << 32, *counter)
    assert found.dtype == np.uint32
    assert found.tolist() == list(expected)


def test_the_device_draws_the_same_words():
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 1 << 32, (32, 4), dtype=np.uint32)
    keys = rng.integers(0, 1 << 32, (32, 2), dtype=np.uint32)
    for i, (counter, key, _) in enumerate(KNOWN):
        counters[i], keys[i] = counter, key
    out, uniforms = np.zeros((32, 4), np.uint32), np.full((32, 4), np.nan, np.float32)
    emulator.launch(kernel, 1, 32, (counters, keys, out, uniforms))
    for i, (_, _, expected) in enumerate(KNOWN):
        assert out[i].tolist() == list(expected)
    for i in range(32):
        seed = int(keys[i, 0]) | int(keys[i, 1]) << 32
        expected = philox.words(seed, *counters[i])
        np.testing.assert_array_equal(out[i], expected)
        np.testing.assert_array_equal(uniforms[i], philox.uniform(expected))


def test_uniform_numbers_are_in_the_half_open_interval_and_exact():
    ends = philox.uniform(np.array([0, 0xFF, 0x100, ONES], np.uint32))
    assert ends.dtype == np.float32
    assert ends.tolist() == [0, 0, 2.0**-24, 1 - 2.0**-24]


def test_places_broadcast_and_differ():
    drawn = philox.words(7, np.arange(1000)[:, None], np.arange(3), 0, philox.DROPOUT)
    assert drawn.shape == (1000, 3, 4)
    assert len(np.unique(drawn)) > 11_990
    u = philox.uniform(drawn)
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / u.size) ** 0.5
    other = philox.words(7, np.arange(1000)[:, None], np.arange(3), 0, philox.SAMPLING)
    assert (drawn != other).any(axis=-1).all()


def test_the_lower_64_bits_of_a_seed_are_its_key():
    assert philox.key((5 << 64) + (3 << 32) + 2) == (2, 3)
