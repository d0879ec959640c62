"""``TokenSampler``: its distribution by formulas and brute force, its draws by χ²."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tolerance import assert_close

from gpurnn import philox
from gpurnn.sampling import TokenSampler

Array = NDArray[Any]

LOGITS = np.array([0.3, -0.6, 1.2, 0.0, 0.8, -0.4, 0.6, -0.9])

# χ² with 7 degrees of freedom exceeds this once in a thousand times.
CHI_SQUARED_7 = 24.32


def softmax(O: Array, temperature: float = 1.0) -> Array:
    """exp(o/τ) / Σ exp(o/τ), term by term, the sum exact."""
    powers = [math.exp(float(o) / temperature) for o in O]
    return np.array([p / math.fsum(powers) for p in powers])


def chi_squared(draws: Array, p: Array) -> float:
    """Σ (observed − expected)² / expected over the tokens that can be drawn at all."""
    observed, expected = np.bincount(draws, minlength=len(p)), len(draws) * p
    assert not observed[p == 0].any(), "an impossible token was drawn"
    assert expected[p > 0].min() >= 5, "too few draws for χ²"
    return float((np.square(observed - expected)[p > 0] / expected[p > 0]).sum())


# ---------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_draws_follow_the_distribution(temperature: float, seed: int) -> None:
    sampler = TokenSampler(temperature, seed=seed)
    draws = np.array([sampler.draw(LOGITS) for _ in range(20_000)])
    assert chi_squared(draws, softmax(LOGITS, temperature)) < CHI_SQUARED_7
    # The same draws tell neighbouring distributions apart, by far.
    for wrong in (1.25 * temperature, temperature / 1.25):
        assert chi_squared(draws, softmax(LOGITS, wrong)) > 2 * CHI_SQUARED_7
    swapped = softmax(LOGITS, temperature)
    swapped[[0, 3]] = swapped[[3, 0]]
    assert chi_squared(draws, swapped) > 2 * CHI_SQUARED_7


def test_draws_follow_a_distribution_that_is_cut() -> None:
    # Four tokens remain: 3 degrees of freedom, exceeded once in a thousand times at 16.27.
    sampler = TokenSampler(1.5, top_k=5, top_p=0.85, never=(4,), seed=0)
    p = sampler.probabilities(LOGITS)
    assert np.count_nonzero(p) == 4
    draws = np.array([sampler.draw(LOGITS) for _ in range(20_000)])
    assert chi_squared(draws, p) < 16.27


def fixed(sampler: TokenSampler, u: float) -> TokenSampler:
    """Make all draws of a sampler by one number."""
    sampler.uniform = lambda number, row=0: u  # type: ignore[method-assign]
    return sampler


LARGEST = 1 - 2**-24  # the largest number that there is


def test_a_draw_inverts_the_distribution() -> None:
    """Tokens by their ids take up [0, 1) from the left; a boundary belongs to the right one."""
    O = np.log([1e-300, 1.0, 2.0, 1e-300, 1.0])  # nothing, ¼, ½, nothing, ¼
    sampler = TokenSampler()
    for u, expected in [
        (1e-9, 1),
        (0.25 - 1e-9, 1),
        (0.25 + 1e-9, 2),
        (0.75 - 1e-9, 2),
        (0.75 + 1e-9, 4),
        (LARGEST, 4),
    ]:
        assert fixed(sampler, u).draw(O) == expected, u
    equal = np.zeros(4)
    for u, expected in [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3)]:
        assert fixed(sampler, u).draw(equal) == expected, u


@pytest.mark.parametrize("u", [0.0, 0.5, LARGEST])
def test_what_has_no_probability_is_not_drawn_even_at_the_ends(u: float) -> None:
    for q in (3, 5, 28, 1000):
        O = np.random.default_rng(q).standard_normal(q).astype(np.float32)
        allowed = q // 2
        sampler = TokenSampler(never=tuple(i for i in range(q) if i != allowed))
        assert fixed(sampler, u).draw(O) == allowed
        sampler = TokenSampler(never=(0, q - 1))
        assert 0 < fixed(sampler, u).draw(O) < q - 1


def test_the_number_of_a_draw_is_that_of_its_place() -> None:
    """Counted where it is not said, from 0 on: the same as on a GPU, by seed, token and row."""
    sampler = TokenSampler(0.7, top_k=3, top_p=0.9, seed=5)
    counted = [sampler.draw(LOGITS) for _ in range(300)]
    assert sampler.count == 300
    placed = [sampler.draw(LOGITS, number=i) for i in reversed(range(300))]
    assert placed[::-1] == counted and sampler.count == 300
    assert [sampler.draw(LOGITS, number=i, row=1) for i in range(300)] != counted
    for number, row in ((0, 0), (255, 0), (256, 0), (256, 3), (7, 3), (1 << 31, 2)):
        word = philox.words(5, number, row, 0, philox.SAMPLING)[0]
        assert sampler.uniform(number, row) == int(word >> 8) / 2**24
    assert TokenSampler(seed=5 + (1 << 64)).uniform(3) == sampler.uniform(3)


def test_one_seed_gives_one_sequence() -> None:
    def draws(seed: Any) -> list[int]:
        sampler = TokenSampler(seed=seed)
        return [sampler.draw(LOGITS) for _ in range(50)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(np.random.default_rng(1)) == draws(np.random.default_rng(1))
    rng = np.random.default_rng(1)
    assert draws(rng) != draws(rng)  # each sampler draws a seed of its own
    assert draws(None) != draws(None)  # by chance once in 10³⁰
    assert all(type(i) is int for i in draws(1))


# ---------------------------------------------------------------------------------------
# The distribution
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [0.5, 1, 2])
def test_temperature_divides_the_logits(temperature: float, dtype: type) -> None:
    O = LOGITS.astype(dtype)
    p = TokenSampler(temperature).probabilities(O)
    assert p.dtype == np.float64
    assert_close("p", p, softmax(O, temperature), length=len(O))
    # p_i ∝ (p of the model)_i^(1/τ)
    powers = TokenSampler(1).probabilities(O) ** (1 / temperature)
    assert_close("p by powers", p, powers / powers.sum(), length=len(O))


@given(
    st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=12),
    st.floats(1e-3, 1e3) | st.sampled_from([1e-300, 1e300]),
)
def test_it_is_a_distribution_that_keeps_the_order(O: list[float], temperature: float) -> None:
    p = TokenSampler(temperature).probabilities(np.array(O))
    assert (p >= 0).all()
    assert p.sum() == pytest.approx(1, rel=1e-14)
    for i, j in itertools.combinations(range(len(O)), 2):
        if O[i] == O[j]:
            assert p[i] == p[j]
        else:
            assert (p[i] - p[j]) * (O[i] - O[j]) >= 0


@pytest.mark.parametrize("temperature", [1e-4, 1e-12, 1e-300, 5e-324])
def test_towards_no_temperature_it_is_greedy_without_a_warning(temperature: float) -> None:
    for O, expected in [
        (LOGITS, [0, 0, 1, 0, 0, 0, 0, 0]),
        (np.array([1e4, -1e4, 0]), [1, 0, 0]),
        (np.array([-1e4, -1e4, -1e300]), [0.5, 0.5, 0]),
    ]:
        np.testing.assert_array_equal(TokenSampler(temperature).probabilities(O), expected)


@pytest.mark.parametrize("temperature", [1e12, 1e300])
def test_towards_infinite_temperature_it_is_uniform(temperature: float) -> None:
    p = TokenSampler(temperature).probabilities(LOGITS)
    np.testing.assert_allclose(p, 1 / 8, rtol=10 / temperature + 1e-15)


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("top_p", [None, 0.1, 1.0])
def test_zero_temperature_takes_the_likeliest_of_equals_the_lowest_id(
    top_k: int | None, top_p: float | None
) -> None:
    sampler = TokenSampler(0, top_k, top_p)
    O = np.array([1.0, 3.0, 2.0, 3.0])
    np.testing.assert_array_equal(sampler.probabilities(O), [0, 1, 0, 0])
    assert sampler.draw(O) == 1
    assert sampler.draw(-O) == 0
    sampler = TokenSampler(0, top_k, top_p, never=(1,))
    assert sampler.draw(O) == 3


def kept_by_brute_force(
    weights: list[int], top_k: int | None, top_p: Fraction | None, never: set[int]
) -> tuple[list[int], Fraction]:
    """Which tokens remain, likeliest first, in exact arithmetic.

    Also how near top_p comes to a sum of probabilities, where rounding may decide.
    """
    ranked = sorted(
        (i for i in range(len(weights)) if i not in never), key=lambda i: (-weights[i], i)
    )[:top_k]
    if top_p is None:
        return ranked, Fraction(1)
    total = sum(weights[i] for i in ranked)
    sums = [Fraction(s, total) for s in itertools.accumulate(weights[i] for i in ranked)]
    needed = next(count for count, s in enumerate(sums, 1) if s >= top_p)
    return ranked[:needed], min(abs(s - top_p) for s in sums)


@given(
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.fractions(Fraction(1, 100), Fraction(99, 100)),
    excluded=st.sets(st.integers(0, 8), max_size=4),
)
@example(weights=[1, 1, 1, 1], top_k=2, top_p=None, excluded=set())
@example(weights=[1, 9, 1, 1], top_k=3, top_p=Fraction(9, 10), excluded=set())
@example(weights=[5, 9, 1, 1], top_k=None, top_p=Fraction(1, 2), excluded={1})
def test_top_k_and_top_p_equal_brute_force(
    weights: list[int], top_k: int | None, top_p: Fraction | None, excluded: set[int]
) -> None:
    """top_k first, then top_p of what that leaves, renewed; among equals the lowest ids."""
    never = {i for i in excluded if i < len(weights)}
    assume(len(never) < len(weights))
    kept, near = kept_by_brute_force(weights, top_k, top_p, never)
    assume(near > Fraction(1, 10**9))
    expected = np.zeros(len(weights))
    expected[kept] = [weights[i] / sum(weights[j] for j in kept) for i in kept]
    sampler = TokenSampler(1, top_k, None if top_p is None else float(top_p), tuple(never))
    p = sampler.probabilities(np.log(weights))
    np.testing.assert_array_equal(p > 0, expected > 0)
    assert_close("p", p, expected, length=len(weights))


def test_top_p_is_reached_where_the_sum_is_exact() -> None:
    """Quarters are exact: "at least p" is met by a sum that equals p."""
    O = np.zeros(4)
    for top_p, count in [(1e-9, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)]:
        expected = [1 / count] * count + [0] * (4 - count)
        np.testing.assert_array_equal(TokenSampler(top_p=top_p).probabilities(O), expected)


def test_ties_are_cut_by_id() -> None:
    O = np.array([1.0, 2.0, 1.0, 2.0, 1.0])
    np.testing.assert_array_equal(TokenSampler(top_k=1).probabilities(O), [0, 1, 0, 0, 0])
    np.testing.assert_array_equal(TokenSampler(top_k=2).probabilities(O), [0, 0.5, 0, 0.5, 0])
    assert np.flatnonzero(TokenSampler(top_k=4).probabilities(O)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("q", [1, 2, 28, 300])
def test_what_keeps_all_changes_nothing(q: int) -> None:
    O = np.random.default_rng(q).standard_normal(q)
    plain = TokenSampler().probabilities(O)
    for sampler in (TokenSampler(top_k=q), TokenSampler(top_k=q + 5), TokenSampler(top_p=1.0)):
        assert_close("p", sampler.probabilities(O), plain, length=q)
        assert (sampler.probabilities(O) > 0).all()


def test_top_k_1_is_greedy() -> None:
    for seed in range(20):
        O = np.random.default_rng(seed).integers(0, 4, 9).astype(np.float32)  # with many ties
        np.testing.assert_array_equal(
            TokenSampler(3.0, top_k=1).probabilities(O), TokenSampler(0).probabilities(O)
        )


def test_never_leaves_the_others_as_they_are_to_each_other() -> None:
    never = (2, 5)
    p, full = TokenSampler(never=never).probabilities(LOGITS), softmax(LOGITS)
    assert not p[list(never)].any()
    full[list(never)] = 0
    assert_close("p", p, full / full.sum(), length=8)


@pytest.mark.parametrize("temperature", [0, 1e-300, 1, 1e300])
def test_never_holds_at_any_temperature_and_against_any_logits(temperature: float) -> None:
    for others in (0.0, -1e12, -1e300):
        O = np.array([1.0, others, 1e300, others])
        p = TokenSampler(temperature, never=(0, 2)).probabilities(O)
        np.testing.assert_array_equal(p, [0, 1, 0, 0] if temperature == 0 else [0, 0.5, 0, 0.5])


def test_an_enormous_logit_that_is_never_drawn_leaves_the_others_alone() -> None:
    O = LOGITS.copy()
    O[2] = 1e300
    np.testing.assert_array_equal(
        TokenSampler(never=(2,)).probabilities(O), TokenSampler(never=(2,)).probabilities(LOGITS)
    )
    assert TokenSampler(0, never=(2,)).draw(O) == 4


def test_logits_are_not_written() -> None:
    for temperature in (0, 1):
        O = LOGITS.copy()
        TokenSampler(temperature, 3, 0.5, never=(1,)).draw(O)
        np.testing.assert_array_equal(O, LOGITS)


# ---------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: expected a finite number, 0 or more"),
        ({"temperature": math.inf}, "temperature is inf: expected a finite number, 0 or more"),
        ({"temperature": math.nan}, "temperature is nan: expected a finite number, 0 or more"),
        ({"top_k": 0}, "top_k is 0: expected at least 1"),
        ({"top_k": -1}, "top_k is -1: expected at least 1"),
        ({"top_p": 0}, r"top_p is 0: expected a number in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p is 1.01: expected a number in \(0, 1\]"),
        ({"top_p": -0.5}, r"top_p is -0.5: expected a number in \(0, 1\]"),
        ({"top_p": math.nan}, r"top_p is nan: expected a number in \(0, 1\]"),
        ({"seed": -1}, "seed is -1: expected at least 0"),
    ],
    ids=[
        "temperature-negative",
        "temperature-infinite",
        "temperature-nan",
        "top_k-0",
        "top_k-negative",
        "top_p-0",
        "top_p-above-1",
        "top_p-negative",
        "top_p-nan",
        "seed-negative",
    ],
)
def test_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        TokenSampler(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot': expected a finite number, 0 or more"),
        ({"temperature": None}, "temperature is None: expected a finite number, 0 or more"),
        ({"top_k": 2.0}, "top_k is 2.0: expected an integer"),
        ({"top_k": True}, "top_k is True: expected an integer"),
        ({"top_p": True}, r"top_p is True: expected a number in \(0, 1\]"),
        ({"seed": 0.5}, "seed is 0.5: expected an integer"),
    ],
    ids=["temperature-str", "temperature-none", "top_k-float", "top_k-bool", "top_p-bool", "seed"],
)
def test_settings_of_another_kind_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}$"):
        TokenSampler(**settings)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_distribution_over_nothing_is_refused(temperature: float) -> None:
    """Every token is one that is never drawn: no draw can be right, and none may be made."""
    with pytest.raises(ValueError, match="never"):
        TokenSampler(temperature, never=(0, 1)).draw(np.zeros(2))


@pytest.mark.parametrize(("logit", "temperature"), [(math.nan, 0), (math.nan, 1), (math.inf, 1)])
def test_logits_without_a_distribution_are_refused(logit: float, temperature: float) -> None:
    """Finite weights can overflow into such logits: no id, let alone one past the last, is due."""
    with pytest.raises(ValueError, match=r"\bO\b|logit"):
        TokenSampler(temperature, seed=0).draw(np.array([0.0, logit, 1.0]))
