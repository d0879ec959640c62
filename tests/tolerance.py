"""The only tolerances of the tests, and the rule they follow.

Nothing here is a guess about how exact an implementation ought to be. The float64 reference is the
truth; the float32 reference shows how much the arithmetic itself loses on these very numbers; an
implementation may lose a small factor more:

    error ≤ FACTOR · (error of the baseline + √length · u · largest value of the truth)

An error is the largest absolute difference in an array, u the unit roundoff of the result's dtype,
and length the number of additions behind one number: their roundings add up like a random walk.
That second term covers a baseline that happened to be lucky. Where there is no baseline (the
float32 reference itself; float64 against another library's float64) it stands alone. One number
says little about rounding, and cancellation can make it small next to what was added: where arrays
hold few numbers, draw several times (``Case.seeds``) and compare the stacked results.

A finite difference is judged by its own optimum: with steps of ε^⅓ a central difference is right to
about ε^⅔ of the function's size. A mean over random draws is judged by its own standard error.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = [
    "CONCATENATION",
    "DIFFERENCE_STEP",
    "KINK_MARGIN",
    "STANDARD_ERRORS",
    "assert_close",
    "assert_derivative",
    "assert_same_bits",
    "standard_errors_off",
]

Array = NDArray[Any]

FACTOR = 4

# Of a central difference in float64.
DIFFERENCE_STEP = float(np.finfo(np.float64).eps ** (1 / 3))
DIFFERENCE_FACTOR = 64

# How far a seeded mean may lie from what it estimates: for a hundred normal means, p < 1e-4.
STANDARD_ERRORS = 5.0

# Of relu's pre-activations, {float32: its rounding, float64: a finite difference's step}, with room
# for what the network makes of either.
KINK_MARGIN = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-4}

# What the seed chapter's example is held to: [X, H] [W_xh; W_hh] against X W_xh + H W_hh.
CONCATENATION = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-14}


def assert_close(
    name: str,
    result: ArrayLike,
    truth: ArrayLike,
    *,
    length: int,
    baseline: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Hold ``result`` against a float64 ``truth`` by the rule above.

    ``dtype`` is that of the arithmetic, where the result's own does not tell.
    """
    result, truth = np.asarray(result), np.asarray(truth)
    if truth.dtype != np.float64 or not np.isfinite(truth).all():
        raise AssertionError(f"{name}: the truth must be finite float64, this one is {truth}")
    if result.shape != truth.shape:
        raise AssertionError(f"{name}: shape {result.shape} against {truth.shape}")
    if result.size == 0:
        return
    u = np.finfo(result.dtype if dtype is None else dtype).eps / 2
    rounding = max(1, length) ** 0.5 * u * np.abs(truth).max()
    lost = 0.0 if baseline is None else np.abs(np.asarray(baseline) - truth).max()
    _compare(
        name, result, truth, FACTOR * (lost + rounding), f"{FACTOR} × ({lost:.3g} + {rounding:.3g})"
    )


def assert_derivative(name: str, gradient: Array, difference: Array, size: float) -> None:
    """Hold a gradient against central differences of a function of about ``size``."""
    if gradient.shape != difference.shape:
        raise AssertionError(f"{name}: shape {gradient.shape} against {difference.shape}")
    if gradient.size == 0:
        return
    scale = max(abs(size), float(np.abs(difference).max()))
    limit = DIFFERENCE_FACTOR * DIFFERENCE_STEP**2 * scale
    _compare(name, gradient, difference, limit, f"{DIFFERENCE_FACTOR} × ε^⅔ × {scale:.3g}")


def assert_same_bits(name: str, a: Array, b: Array) -> None:
    """Require one dtype, one shape and the same bits: 0.0 is not −0.0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        raise AssertionError(f"{name}: {a.dtype} {a.shape} against {b.dtype} {b.shape}")
    if a.tobytes() != b.tobytes():
        differ = np.argwhere(~((a == b) & (np.signbit(a) == np.signbit(b))))
        raise AssertionError(
            f"{name}: {len(differ)} of {a.size} numbers differ, first at {tuple(differ[0])}, "
            f"largest difference {np.abs(a - b).max():.3g}"
        )


def standard_errors_off(draws: Array, expected: Array) -> float:
    """Return by how many of its standard errors the mean over axis 0 misses ``expected``, at most.

    A number that does not vary must be right.
    """
    excess = draws - expected  # first, so that what does not vary leaves exact zeros
    standard_error = excess.std(axis=0, ddof=1) / len(draws) ** 0.5
    rounding = FACTOR * np.finfo(draws.dtype).eps * np.abs(expected).max()
    return float((np.abs(excess.mean(axis=0)) / (standard_error + rounding)).max())


def _compare(name: str, result: Array, expected: Array, limit: float, why: str) -> None:
    error = np.abs(result - expected)
    if not (error <= limit).all():  # so written, NaN fails
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
        raise AssertionError(
            f"{name}: {result[worst]} against {expected[worst]} at {tuple(map(int, worst))}, "
            f"{np.count_nonzero(~(error <= limit))} of {error.size} beyond {limit:.3g} = {why}"
        )
