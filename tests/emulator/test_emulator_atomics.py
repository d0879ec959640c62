"""Atomics: what they store and what they return."""

import numpy as np
import pytest
from numba import cuda, float32, int32

from gpurnn import emulator


@pytest.mark.parametrize(
    ("name", "dtype", "before", "value", "after"),
    [
        ("add", np.int32, 5, 7, 12),
        ("add", np.int32, 2**31 - 1, 1, -(2**31)),
        ("add", np.float32, 1.5, 2, 3.5),
        ("add", np.float32, 2**24, 1, 2**24),
        ("sub", np.uint32, 0, 1, 2**32 - 1),
        ("sub", np.float64, 1, 0.5, 0.5),
        ("max", np.int64, -3, -5, -3),
        ("max", np.float32, 1, 2.5, 2.5),
        ("max", np.float32, 1, np.nan, np.nan),
        ("nanmax", np.float32, 1, np.nan, 1),
        ("min", np.uint64, 2**63, 3, 3),
        ("nanmin", np.float64, np.nan, 3, 3),
        ("and_", np.uint32, 0b1100, 0b1010, 0b1000),
        ("or_", np.uint32, 0b1100, 0b1010, 0b1110),
        ("xor", np.uint32, 0b1100, 0b1010, 0b0110),
        ("inc", np.uint32, 3, 4, 4),
        ("inc", np.uint32, 4, 4, 0),
        ("dec", np.uint32, 3, 4, 2),
        ("dec", np.uint32, 0, 4, 4),
        ("dec", np.uint32, 9, 4, 4),
        ("exch", np.int32, 3, 4, 4),
    ],
)
def test_each(name, dtype, before, value, after):
    update = getattr(cuda.atomic, name)
    x, old = np.zeros((2, 3), dtype), np.zeros(1, dtype)
    x[1, 2] = before

    def kernel(x, old):
        s = cuda.shared.array(1, dtype)
        s[0] = x[1, 2]
        old[0] = getattr(cuda.atomic, name)(x, (1, 2), value)
        getattr(cuda.atomic, name)(s, 0, value)
        assert s[0] == x[1, 2] or s[0] != s[0]

    emulator.launch(kernel, 1, 1, (x, old))
    assert old[0] == dtype(before) or np.isnan(before)
    np.testing.assert_array_equal(x[1, 2], dtype(after))
    assert update is not None and not x[0].any()


def test_compare_and_swap():
    def kernel(x, old):
        old[0] = cuda.atomic.cas(x, 1, 5, 9)
        old[1] = cuda.atomic.cas(x, 1, 5, 7)
        old[2] = cuda.atomic.compare_and_swap(x, 3, 4)

    x, old = np.array([3, 5], np.int32), np.zeros(3)
    emulator.launch(kernel, 1, 1, (x, old))
    assert x.tolist() == [4, 9] and old.tolist() == [5, 9, 3]


def test_each_thread_gets_its_own_number():
    def kernel(count, shared_count, out):
        s = cuda.shared.array(1, int32)
        if cuda.threadIdx.x == 0:
            s[0] = 0
        cuda.syncthreads()
        out[0, cuda.grid(1)] = cuda.atomic.add(count, 0, 1)
        out[1, cuda.grid(1)] = cuda.atomic.add(s, 0, 1)

    for seed in (None, 0, 1):
        count, out = np.zeros(1, np.int64), np.zeros((2, 96), np.int64)
        emulator.launch(kernel, 3, 32, (count, None, out), seed=seed)
        assert count[0] == 96 and sorted(out[0]) == list(range(96))
        assert (np.sort(out[1].reshape(3, 32)) == np.arange(32)).all()


def test_seeds_change_the_order_and_repeat_it():
    def kernel(count, out):
        out[cuda.grid(1)] = cuda.atomic.add(count, 0, 1)

    orders = []
    for seed in (None, None, 0, 0, 1):
        count, out = np.zeros(1, np.int64), np.zeros(64, np.int64)
        emulator.launch(kernel, 2, 32, (count, out), seed=seed)
        orders.append(out.tolist())
    assert orders[0] == orders[1] == list(range(64))
    assert orders[2] == orders[3] and orders[2] != orders[0] and orders[4] != orders[2]


def test_bounds_and_local_arrays():
    def outside(x):
        cuda.atomic.add(x, 4, 1)

    def local(x):
        cuda.atomic.add(cuda.local.array(1, float32), 0, 1)

    with pytest.raises(emulator.BoundsError, match="index 4"):
        emulator.launch(outside, 1, 1, (np.zeros(4),))
    with pytest.raises(emulator.UnsupportedError, match="local array"):
        emulator.launch(local, 1, 1, (np.zeros(4),))


def test_cache_hints():
    def kernel(x, out):
        cuda.stcg(x, 0, 1)
        cuda.stcs(x, 1, 2)
        cuda.stwb(x, 2, 3)
        cuda.stwt(x, 3, 4)
        out[0] = cuda.ldca(x, 0)
        out[1] = cuda.ldcg(x, 1)
        out[2] = cuda.ldcs(x, 2)
        out[3] = cuda.ldlu(x, 3)
        out[4] = cuda.ldcv(x, 3)

    x, out = np.zeros(4, np.float32), np.zeros(5)
    emulator.launch(kernel, 1, 1, (x, out))
    assert x.tolist() == [1, 2, 3, 4] and out.tolist() == [1, 2, 3, 4, 4]


@pytest.mark.parametrize(("load", "clean"), [("ldcv", True), ("ldcg", True), ("ldca", False)])
def test_hints_that_read_past_the_nearest_cache(load, clean):
    def kernel(x, out):
        if cuda.grid(1) == 0:
            cuda.stcg(x, 0, 1)
        else:
            out[0] = getattr(cuda, load)(x, 0)

    args = np.zeros(1, np.int32), np.zeros(1)
    if clean:
        emulator.launch(kernel, 2, 1, args)
    else:
        with pytest.raises(emulator.RaceError):
            emulator.launch(kernel, 2, 1, args)
