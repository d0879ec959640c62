"""Softmax and cross-entropy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import reference, validate
from gpurnn.functional.placing import quiet

__all__ = ["cross_entropy", "negative_log_likelihood"]

Floats = NDArray[Any]
Ids = NDArray[Any]


def cross_entropy(O: Floats, targets: Ids) -> tuple[float, Floats]:
    """Softmax and cross-entropy of all rows at once.

    Args:
        O: (…, q) logits. targets: (…) integer ids in [0, q).

    Returns:
        loss: mean over all rows of −log softmax(O)[target], natural logarithm, summed in float64.
        dO: (…, q), its gradient (softmax(O) − onehot(target)) / rows.

    Raises:
        TypeError, ValueError: as above; also where there is no row at all, or O holds a NaN.
    """
    O_, targets_ = validate.cross_entropy(O, targets)
    with quiet():
        loss, dO = reference.cross_entropy(O_, targets_)
    if np.isnan(loss):
        validate.refuse_non_finite({"O": O})
    return loss, dO.reshape(np.shape(O))


def negative_log_likelihood(O: Floats, targets: Ids) -> Floats:
    """−log softmax(O)[target] of each row: O (…, q), targets (…) → (…), natural logarithm."""
    O_, targets_ = validate.negative_log_likelihood(O, targets)
    with quiet():
        nll = reference.negative_log_likelihood(O_, targets_)
    if np.isnan(nll).any():
        validate.refuse_non_finite({"O": O})
    return nll.reshape(np.shape(targets))
