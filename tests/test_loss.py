"""What losses mean: perplexity, bits, and the mean that the book's plots show (9.3.2)."""

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close

from gpurnn import functional as F
from gpurnn.loss import bits_per_token, book_perplexity, perplexity

losses = st.lists(st.floats(0, 600, allow_nan=False), min_size=1, max_size=30)


def test_a_perfect_model_has_perplexity_1() -> None:
    assert perplexity(np.zeros(7)) == 1
    assert bits_per_token(np.zeros(7)) == 0
    assert book_perplexity([0.0, 0.0]) == 1


@pytest.mark.parametrize("q", [1, 2, 28, 4580])
def test_a_uniform_model_has_as_many_choices_as_tokens(q: int) -> None:
    nll = F.negative_log_likelihood(np.zeros((5, 3, q)), np.full((5, 3), q - 1))
    assert_close("perplexity", perplexity(nll), np.array(float(q)), length=q)
    assert_close("bits", bits_per_token(nll), np.array(math.log2(q)), length=q)


def test_one_impossible_token_makes_it_infinite() -> None:
    nll = F.negative_log_likelihood(np.array([[0.0, 0.0], [0.0, -np.inf]]), np.array([0, 1]))
    assert nll[1] == np.inf
    assert perplexity(nll) == math.inf
    assert bits_per_token(nll) == math.inf
    assert book_perplexity([0.0, math.inf]) == math.inf


def test_it_overflows_to_infinity_without_a_warning() -> None:
    assert math.isfinite(perplexity(709.0))
    assert perplexity(710.0) == math.inf
    assert perplexity(np.full((2, 2), 1e5, np.float32)) == math.inf
    assert book_perplexity([1.0, 710.0]) == math.inf


def test_a_nan_is_not_hidden() -> None:
    assert math.isnan(perplexity(np.array([1.0, np.nan])))
    assert math.isnan(book_perplexity([1.0, math.nan]))


@given(st.lists(st.fractions(Fraction(1, 1000), 1), min_size=1, max_size=12))
def test_it_is_the_reciprocal_of_the_geometric_mean(probabilities: list[Fraction]) -> None:
    """Of the probabilities of all tokens: 1 / (p_1 … p_N)^(1/N)."""
    product = math.prod(probabilities)  # exact
    nll = [-math.log(p) for p in probabilities]
    geometric_mean = float(product) ** (1 / len(probabilities))
    assert perplexity(nll) == pytest.approx(1 / geometric_mean, rel=1e-12)
    assert 2 ** bits_per_token(nll) == pytest.approx(1 / geometric_mean, rel=1e-12)


def test_each_token_weighs_the_same_whatever_the_shape() -> None:
    nll = np.random.default_rng(0).uniform(0, 5, (6, 4))
    for same in (nll.ravel(), nll.T, nll.reshape(2, 3, 4), nll[::-1], nll.tolist()):
        assert perplexity(same) == pytest.approx(perplexity(nll), rel=1e-14)
    assert perplexity(2.0) == math.exp(2)  # a mean that is known already
    assert isinstance(perplexity(nll.astype(np.float32)), float)


def test_the_mean_is_taken_in_float64() -> None:
    # A float32 sum that holds 2²⁵ loses every 1 that is added to it.
    nll = np.ones(4097, np.float32)
    nll[0] = 2.0**25
    assert bits_per_token(nll) * math.log(2) == pytest.approx(2**25 / 4097 + 4096 / 4097, rel=1e-14)


@given(losses)
def test_bits_are_the_logarithm_of_the_perplexity(nll: list[float]) -> None:
    assert bits_per_token(nll) == pytest.approx(math.log2(perplexity(nll)), rel=1e-12, abs=1e-12)


@given(losses)
def test_the_books_figure_is_never_below_the_perplexity(batches: list[float]) -> None:
    """Jensen's inequality, for batches of one size; equal where all batches are."""
    exact, book = perplexity(batches), book_perplexity(batches)
    assert book >= exact * (1 - 1e-12)
    assert book_perplexity(batches[:1] * 3) == pytest.approx(perplexity(batches[0]), rel=1e-12)


def test_the_books_figure_by_hand() -> None:
    assert book_perplexity([math.log(2), math.log(8)]) == pytest.approx(5, rel=1e-15)
    assert perplexity([math.log(2), math.log(8)]) == pytest.approx(4, rel=1e-15)


@pytest.mark.parametrize("nll", [[], np.empty((0, 3)), np.empty((3, 0))], ids=["[]", "0x3", "3x0"])
def test_a_mean_needs_a_token(nll: Any) -> None:
    message = re.escape(f"nll has shape {np.shape(nll)}: a mean needs at least one token")
    for measure in (perplexity, bits_per_token):
        with pytest.raises(ValueError, match=message):
            measure(nll)


def test_the_books_mean_needs_a_batch() -> None:
    with pytest.raises(ValueError, match="batch_losses is empty: a mean needs at least one batch"):
        book_perplexity([])
