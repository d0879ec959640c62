"""Dropout by counters: which numbers, that it is its own backward pass, kernels as NumPy."""

import math
from typing import Any

import kernel_setup  # noqa: F401  (skips without what the emulator needs)
import ml_dtypes
import numpy as np
import pytest
from gradcheck import check_gradients
from numpy.typing import NDArray
from tolerance import STANDARD_ERRORS, assert_same_bits, standard_errors_off

import gpurnn
from gpurnn import functional as F
from gpurnn import philox
from gpurnn.cuda import noise
from gpurnn.cuda.engines import current_emulation
from gpurnn.kernels import dropout as kernel

Array = NDArray[Any]

SEED = (5 << 32) + 7
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
SHAPES = [(1,), (2,), (3,), (4,), (5,), (33,), (2, 3, 7), (1025,), (0,), (3, 0)]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def kept_by_hand(size: int, p: float, seed: int, update: int) -> list[bool]:
    """Element by element, by the table of ``gpurnn.philox``."""
    found = []
    for e in range(size):
        words = philox.words(seed, e // 4, e // 4 >> 32, update, philox.DROPOUT)
        found.append(float(philox.uniform(words[e % 4])) >= p)
    return found


@each_shape
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.7, 0.999])
def test_what_is_dropped(shape: tuple[int, ...], p: float) -> None:
    H = np.random.default_rng(1).standard_normal(shape)
    Y = F.dropout(H, p, seed=SEED, update=3)
    kept = np.array(kept_by_hand(H.size, p, SEED, 3), bool).reshape(shape)
    assert_same_bits("Y", Y, np.where(kept, H * (1 / (1 - p)), 0.0))
    assert not np.shares_memory(H, Y)


@each_shape
@each_dtype
def test_kernels_drop_the_same(dtype: Any, shape: tuple[int, ...]) -> None:
    H = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    before = H.tobytes()
    for p in (0.0, 0.3, 0.7):
        with gpurnn.emulated():
            Y = F.dropout(H, p, seed=SEED, update=3)
        assert (Y.shape, Y.dtype) == (H.shape, H.dtype)
        real = H.astype(np.float32) if H.dtype.itemsize == 2 else H
        expected = F.dropout(real, p, seed=SEED, update=3).astype(dtype)
        assert Y.tobytes() == expected.tobytes()
    assert H.tobytes() == before


def test_which_updates_and_seeds_draw_alike() -> None:
    ones = np.ones(256, np.float32)
    places = [(0, 0), (0, 1), (1, 0), (1 << 32, 0), (0, 2**32 - 1)]
    for context in (gpurnn.emulated(), np.errstate()):
        with context:
            masks = [F.dropout(ones, 0.5, seed=s, update=u).tobytes() for s, u in places]
            assert len(set(masks)) == len(places)
            again = F.dropout(ones, 0.5, seed=1 << 64, update=1 << 32)  # the lower bits count
            assert again.tobytes() == masks[0]


def test_an_update_in_an_array() -> None:
    H = np.random.default_rng(2).standard_normal((5, 7)).astype(np.float32)
    for update in (0, 3, 2**32 - 1):
        expected = F.dropout(H, 0.5, seed=1, update=update)
        for context in (gpurnn.emulated(), np.errstate()):
            with context:
                for number in (np.array([update]), np.array(update), np.int64(update)):
                    found = F.dropout(H, 0.5, seed=1, update=number)
                    assert_same_bits("Y", found, expected)


@each_dtype
def test_it_may_be_done_in_place(dtype: Any) -> None:
    H = np.random.default_rng(3).standard_normal(41).astype(dtype)
    with gpurnn.emulated():
        engine = current_emulation()
        assert engine is not None
        expected = F.dropout(H, 0.4, seed=2, update=9)
        found = noise.dropout(engine, H, 0.4, 2, 9, out=H)
    assert found is H
    assert H.tobytes() == expected.tobytes()


def test_every_schedule_gives_the_same_bits() -> None:
    H = np.random.default_rng(4).standard_normal(130).astype(np.float32)
    found = []
    for seed in (None, 1, 2):
        with gpurnn.emulated(seed=seed):
            found.append(F.dropout(H, 0.5, seed=0, update=0))
    for Y in found[1:]:
        assert_same_bits("Y", Y, found[0])


@pytest.mark.parametrize("emulated", [False, True], ids=["numpy", "kernel"])
def test_applied_to_the_gradient_it_is_the_backward_pass(emulated: bool) -> None:
    rng = np.random.default_rng(5)
    H, dY = rng.standard_normal((2, 4, 5))
    options: dict[str, Any] = {"p": 0.4, "seed": 6, "update": 7}
    with gpurnn.emulated() if emulated else np.errstate():
        dH = F.dropout(dY, **options)
    check_gradients(lambda H: float(np.vdot(F.dropout(H, **options), dY)), {"H": H}, {"H": dH})


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_its_share_is_dropped_and_the_mean_stays(p: float) -> None:
    """Of each number over many updates: masks of different updates are independent draws."""
    draws = np.stack([F.dropout(np.ones(64), p, seed=8, update=u) for u in range(1000)])
    assert standard_errors_off((draws == 0).astype(float), np.full(64, p)) < STANDARD_ERRORS
    assert standard_errors_off(draws, np.ones(64)) < STANDARD_ERRORS


def test_a_large_array_is_drawn_a_part_at_a_time() -> None:
    size = 2 * (1 << 16) + 5
    Y = F.dropout(np.ones(size, np.float32), 0.5, seed=3, update=1)
    calls = np.arange(-(-size // 4))
    kept = philox.uniform(philox.words(3, calls, 0, 1, philox.DROPOUT)).reshape(-1)[:size] >= 0.5
    np.testing.assert_array_equal(Y != 0, kept)


def test_what_is_dropped_is_zero_whatever_it_was() -> None:
    H = np.ones(64, np.float32)
    dropped = F.dropout(H, 0.5, seed=0, update=0) == 0
    H[dropped] = np.nan, *[-np.inf] * (np.count_nonzero(dropped) - 1)
    for context in (gpurnn.emulated(), np.errstate()):
        with context:
            Y = F.dropout(H, 0.5, seed=0, update=0)
        assert_same_bits("Y", Y, np.where(dropped, 0, 2).astype(np.float32))


def test_the_kernel_s_stream_is_that_of_the_table() -> None:
    assert int(kernel.STREAM) == philox.DROPOUT


@pytest.mark.parametrize("p", [0.0, 2.0**-24, 0.1, 0.5, 0.7, 1 - 2.0**-24, 1 - 2.0**-53])
def test_below_counts_the_uniform_numbers_below(p: float) -> None:
    n = philox.below(p)
    assert n == 0 or (n - 1) * 2.0**-24 < p
    assert n * 2.0**-24 >= p
    assert n == math.ceil(p * 2**24)
