"""The draw of a warp and of a block, alone: against ``TokenSampler``, and by χ²."""

import math
from typing import Any

import numpy as np
import pytest
from numba import cuda, float32, float64, uint32
from numpy.typing import NDArray
from test_sampling import chi_squared

from gpurnn import emulator, philox
from gpurnn.dense import MOST_OF_A_WARP
from gpurnn.kernels import sampling, sampling_block
from gpurnn.kernels.philox import philox as words_of
from gpurnn.kernels.philox import uniform
from gpurnn.sampling import TokenSampler
from gpurnn.tile import WARP

Array = NDArray[Any]

REAL = {np.dtype(np.float32): float32, np.dtype(np.float64): float64}
SEED = 11
ONE_OF_A_HUNDRED_THOUSAND = {3: 25.90, 4: 28.47, 5: 30.86}  # χ² by its degrees of freedom


def warp_kernel(q: int, real: Any) -> Any:
    """Build a kernel whose warps draw a row each, or several times from one."""
    draw = sampling.by_warp(q, real)
    size, warp = uint32(q), uint32(WARP)

    def draws(O, out, settings, rows, top_k, key):
        at = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // warp
        row = uint32(at % rows)
        u = uniform(
            words_of(uint32(at), uint32(0), uint32(0), uint32(0), uint32(key), uint32(0))[0]
        )
        token = draw(O, row * size, u, settings[0], settings[1], uint32(top_k))
        if cuda.threadIdx.x % warp == 0:
            out[at] = token

    return draws


def block_kernel(q: int, real: Any, threads: int) -> Any:
    """Build a kernel whose blocks draw from a row each, several times."""
    draw = sampling_block.by_block(q, real, threads)
    size = uint32(q)

    def draws(O, P, out, settings, times, top_k, key):
        row = uint32(cuda.blockIdx.x)
        for i in range(times):
            at = uint32(row * uint32(times) + uint32(i))
            u = uniform(words_of(at, uint32(0), uint32(0), uint32(0), uint32(key), uint32(0))[0])
            place = row * size
            token = draw(O, P, place, place, u, settings[0], settings[1], uint32(top_k))
            if cuda.threadIdx.x == 0:
                out[at] = token

    return draws


def device_draws(
    O: Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    times: int = 1,
    threads: int = 0,
    seed: int | None = None,
    check_races: bool = True,
) -> Array:
    """Draw from each row of O (rows, q), ``times`` times, by a warp, or a block of ``threads``.

    Draw i of row r has the number i · rows + r by a warp, r · times + i by a block.
    """
    rows, q = O.shape
    kind = np.finfo(O.dtype)
    scale = 1 / max(temperature, float(kind.tiny))
    settings = np.array([scale, top_p or 1], O.dtype)
    keep = 1 if temperature == 0 else top_k or q
    out = np.full(rows * times, -9, np.int32)
    how: dict[str, Any] = {"seed": seed, "check_races": check_races}
    if threads:
        kernel = block_kernel(q, REAL[O.dtype], threads)
        P = np.full(O.size, np.nan, O.dtype)
        arguments = (O.reshape(-1), P, out, settings, times, keep, SEED)
        emulator.launch(kernel, rows, threads, arguments, **how)
        return out.reshape(rows, times)
    kernel = warp_kernel(q, REAL[O.dtype])
    arguments = (O.reshape(-1), out, settings, rows, keep, SEED)
    emulator.launch(kernel, rows * times, WARP, arguments, **how)
    return out.reshape(times, rows).T


def host_draws(O: Array, settings: dict[str, Any], numbers: Array) -> Array:
    """Draw by ``TokenSampler`` from each row what ``device_draws`` should."""
    sampler = TokenSampler(**settings, seed=SEED)
    return np.array(
        [
            [sampler.draw(row, number=int(i)) for i in of_row]
            for row, of_row in zip(O, numbers, strict=True)
        ]
    )


def rows_of_logits(rows: int, q: int, dtype: Any, seed: int = 0) -> Array:
    """Logits of every sort: smooth, tied, far apart, with some, or all but one, at −∞."""
    rng = np.random.default_rng(seed)
    O = (2 * rng.standard_normal((rows, q))).astype(dtype)
    O[1::5] = np.round(O[1::5])  # ties, and zeros of both signs
    O[2::5] *= 40
    O[3::5][rng.random(O[3::5].shape) < 0.3] = -np.inf
    O[4::5] = 0
    O[-1] = -np.inf
    O[-1, q // 2] = 3
    O[np.isneginf(O).all(axis=1)] = 0
    return O


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.6},
    {"temperature": 1e-12},
    {"temperature": 5e-324},
    {"temperature": 1e6, "top_k": 3},
    {"top_k": 1, "temperature": 2},
    {"top_k": 4},
    {"top_k": 1000},
    {"top_p": 0.55},
    {"top_p": 1.0},
    {"top_p": 1e-9},
    {"top_k": 6, "top_p": 0.7, "temperature": 1.7},
]

WAYS = [
    pytest.param(1, 0, id="one"),
    pytest.param(7, 0, id="warp-7"),
    pytest.param(28, 0, id="warp-28"),
    pytest.param(32, 0, id="warp-32"),
    pytest.param(75, 0, id="warp-75"),
    pytest.param(MOST_OF_A_WARP, 0, id="warp-most", marks=pytest.mark.slow),
    pytest.param(1, WARP, id="block-one"),
    pytest.param(29, WARP, id="block-29"),
    pytest.param(150, 2 * WARP, id="block-150"),
    pytest.param(300, 3 * WARP, id="block-300", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("q", "threads"), WAYS)
def test_float64_draws_are_those_of_numpy(q: int, threads: int, settings: dict[str, Any]) -> None:
    rows = 6 if q < 100 else 5
    O = rows_of_logits(rows, q, np.float64, seed=q)
    found = device_draws(O, **settings, threads=threads, times=2, seed=q)
    numbers = np.arange(2 * rows)
    numbers = numbers.reshape(rows, 2) if threads else numbers.reshape(2, rows).T
    np.testing.assert_array_equal(found, host_draws(O, settings, numbers))


@pytest.mark.parametrize(("q", "threads"), [(28, 0), (45, 0), (140, 2 * WARP)])
def test_float32_draws_are_those_of_numpy(q: int, threads: int) -> None:
    """Far from where rounding decides: one unit in 2²⁴ is a thousandth of the smallest margin."""
    O = rows_of_logits(5, q, np.float32, seed=q)
    for settings in ({"temperature": 0}, {"top_k": 3, "temperature": 0.7}, {"top_p": 0.6}):
        found = device_draws(O, **settings, threads=threads)[:, 0]
        expected = host_draws(O, settings, np.arange(5)[:, None])[:, 0]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("threads", "dtype"),
    [
        (0, np.float32),
        (0, np.float64),
        (WARP, np.float32),
        pytest.param(WARP, np.float64, marks=pytest.mark.slow),
        pytest.param(4 * WARP, np.float32, marks=pytest.mark.slow),
    ],
)
def test_ties_are_cut_by_id_and_zeros_are_equal(threads: int, dtype: type) -> None:
    O = np.array([[0.0, -0.0, 1, 0.0, 1, -0.0]], dtype)
    times = 4 if threads else 24

    def drawn(**settings: Any) -> set[int]:
        return set(device_draws(O, times=times, threads=threads, **settings)[0].tolist())

    assert drawn(temperature=0) == {2}
    assert drawn(top_k=1) == {2}
    assert drawn(top_k=2) <= {2, 4}
    assert drawn(top_k=3, temperature=50) <= {2, 4, 0}
    assert drawn(top_k=4, temperature=50) <= {2, 4, 0, 1}
    equal = np.zeros_like(O)
    assert set(device_draws(equal, times=times, threads=threads, top_p=0.5)[0]) <= {0, 1, 2}
    assert set(device_draws(equal, times=times, threads=threads, top_p=0.17)[0]) <= {0, 1}
    assert set(device_draws(equal, times=times, threads=threads, top_p=0.16)[0]) == {0}
    if threads == 0:  # enough draws to see each of those that are kept
        assert drawn(top_k=4, temperature=50) == {2, 4, 0, 1}


@pytest.mark.parametrize("threads", [0, WARP, 2 * WARP])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_without_a_distribution_are_told_apart(threads: int, dtype: type) -> None:
    q = 40
    O = rows_of_logits(6, q, dtype)
    O[0, 3] = np.nan
    O[1, q - 1] = np.inf
    O[2] = -np.inf
    O[3, 0], O[3, q - 1] = np.inf, np.nan
    for settings in ({}, {"temperature": 0}, {"top_k": 3, "top_p": 0.5}):
        found = device_draws(O, threads=threads, **settings)[:, 0].tolist()
        nan, infinite, nothing = (
            sampling.NOT_A_NUMBER,
            sampling.INFINITE,
            sampling.NOTHING,
        )
        assert found[:4] == [nan, infinite, nothing, nan]
        assert min(found[4:]) >= 0


@pytest.mark.parametrize("schedule", [1, 2])
def test_a_block_draws_the_same_whatever_its_schedule(schedule: int) -> None:
    O = rows_of_logits(2, 130, np.float32, seed=3)
    for settings in ({}, {"top_k": 9, "top_p": 0.8}):
        first = device_draws(O, **settings, threads=3 * WARP)
        again = device_draws(O, **settings, threads=3 * WARP, seed=schedule)
        np.testing.assert_array_equal(first, again)


OF_SIX = np.log(np.array([0.22, 0.12, 0.3, 0.16, 0.06, 0.14], np.float32))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        pytest.param({}, 6, marks=pytest.mark.slow),
        pytest.param({"temperature": 1.5, "top_k": 5}, 5, marks=pytest.mark.slow),
        pytest.param({"top_k": 5, "top_p": 0.8}, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_frequencies_of_a_warp(settings: dict[str, Any], kept: int) -> None:
    """Some thousand draws from one row, in one launch, of float32."""
    p = TokenSampler(**settings).probabilities(OF_SIX)
    assert np.count_nonzero(p) == kept
    draws = device_draws(OF_SIX[None], **settings, times=2000, check_races=False)[0]
    assert chi_squared(draws, p) < ONE_OF_A_HUNDRED_THOUSAND[kept - 1]
    if not settings:  # the same draws tell another distribution apart
        other = TokenSampler(1.5).probabilities(OF_SIX)
        assert chi_squared(draws, other) > ONE_OF_A_HUNDRED_THOUSAND[kept - 1]


@pytest.mark.slow
def test_frequencies_of_a_block() -> None:
    settings: dict[str, Any] = {"top_k": 5, "top_p": 0.8}
    p = TokenSampler(**settings).probabilities(OF_SIX)
    rows = np.repeat(OF_SIX[None], 10, axis=0)
    draws = device_draws(rows, **settings, times=50, threads=WARP, check_races=False).reshape(-1)
    assert chi_squared(draws, p) < ONE_OF_A_HUNDRED_THOUSAND[3]


def test_the_uniform_number_is_that_of_its_place() -> None:
    """Of many equal tokens the draw tells u itself."""
    q = 128
    draws = device_draws(np.zeros((1, q), np.float64), times=50)[0]
    u = philox.uniform(philox.words(SEED, np.arange(50), 0, 0, philox.SAMPLING)[:, 0])
    np.testing.assert_array_equal(draws, np.floor(u.astype(np.float64) * q))
    assert math.isclose(u.mean(), 0.5, abs_tol=0.2)
