"""The gradient of a bias by kernels: sums of columns, in one order."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from tolerance import assert_close, assert_same_bits

from gpurnn import planning
from gpurnn.cuda import operations
from gpurnn.cuda.engines import EmulatedEngine

Array = NDArray[Any]

H100 = planning.limits("device", "H100")
SIZES = [(1, 1), (2, 33), (64, 5), (65, 1), (300, 31), (511, 2), (520, 33), (1030, 3)]


def summed(A: Array, seed: int | None = None, out: Array | None = None) -> Array:
    engine = EmulatedEngine(H100, seed, check_races=True)
    with engine.here():
        found: Array = operations._sum_rows(engine, A, out)
    return found


def draw(N: int, q: int, dtype: Any) -> Array:
    return np.random.default_rng(N).standard_normal((N, q)).astype(np.float32).astype(dtype)


@pytest.mark.parametrize(("N", "q"), SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_are_those_of_the_columns(N: int, q: int, dtype: Any) -> None:
    A = draw(N, q, dtype)
    exact = A.astype(np.float64)
    assert_close("sums", summed(A), exact.sum(0), length=N, baseline=A.sum(0), dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("N", "q"), [(5, 3), (600, 2)])
def test_half_types_are_summed_as_float32_and_rounded_once(N: int, q: int, dtype: Any) -> None:
    A = draw(N, q, dtype)
    expected = A.astype(np.float64).sum(0)
    found = summed(A)
    assert found.dtype == dtype
    step = float(ml_dtypes.finfo(dtype).eps) * np.abs(expected)
    assert (np.abs(found.astype(np.float64) - expected) <= 0.51 * step + 1e-5).all()


def test_every_schedule_gives_the_same_bits_wherever_it_is_written() -> None:
    A = draw(600, 5, np.float32)
    expected = summed(A)
    for seed in (1, 2):
        out = np.full(5, np.nan, np.float32)
        assert summed(A, seed, out) is out
        assert_same_bits("sums", out, expected)


def test_a_number_that_is_none_reaches_its_own_column_only() -> None:
    A = draw(600, 4, np.float32)
    A[123, 2] = np.nan
    A[7, 1] = np.inf
    found = summed(A)
    assert np.isnan(found[2]) and found[1] == np.inf
    assert np.isfinite(found[[0, 3]]).all()
