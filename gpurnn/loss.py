"""What a model's losses mean: perplexity and bits.

Perplexity is exp of the *mean* negative log-likelihood of all predicted tokens, each weighing the
same: the reciprocal of the geometric mean of their probabilities. 1 is perfect, a uniform model has
|V|, one impossible token makes it infinite (*Dive into Deep Learning* 9.3.2).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["bits_per_token", "book_perplexity", "finite", "perplexity"]


def perplexity(nll: ArrayLike) -> float:
    """Return exp(mean nll), the mean taken in float64 over all entries (natural logarithm)."""
    with np.errstate(over="ignore"):  # beyond e^709 it is infinite
        return float(np.exp(_mean(nll)))


def bits_per_token(nll: ArrayLike) -> float:
    """Return the mean nll in bits; for a character model these are bits per character."""
    return _mean(nll) / math.log(2)


def book_perplexity(batch_losses: Sequence[float]) -> float:
    """Return the mean over batches of exp(mean loss of the batch): what the book's plots show.

    By Jensen's inequality never below the perplexity of the same (equally large) batches.
    """
    if len(batch_losses) == 0:
        raise ValueError("batch_losses is empty: a mean needs at least one batch")
    return float(np.mean([perplexity(loss) for loss in batch_losses]))


def finite(value: float) -> float | None:
    """Return ``value``, or None if it is not finite, which JSON cannot say."""
    return value if math.isfinite(value) else None


def _mean(nll: ArrayLike) -> float:
    values: NDArray[Any] = np.asarray(nll)
    if values.size == 0:
        raise ValueError(f"nll has shape {values.shape}: a mean needs at least one token")
    return float(values.mean(dtype=np.float64))
