"""Rows of a table by token id, and their gradient."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import reference, validate
from gpurnn.functional.placing import quiet

__all__ = ["embedding", "embedding_backward"]

Floats = NDArray[Any]
Ids = NDArray[Any]


def embedding(ids: Ids, E: Floats) -> Floats:
    """Rows of E (|V|, d) by token id: ids (…) → (…, d).

    Raises:
        ValueError: an id is negative or at least |V|; the message says which and where.
    """
    ids_, E_ = validate.embedding(ids, E)
    X = np.take(E_, ids_, axis=0)
    if not np.isfinite(X).all():
        validate.refuse_non_finite({"E": E_})
    return X


def embedding_backward(dX: Floats, ids: Ids, num_rows: int) -> Floats:
    """Return dE (num_rows, d): the rows of dX (…, d) added up by their id, always in one order."""
    dX_, ids_, rows = validate.embedding_backward(dX, ids, num_rows)
    with quiet():
        dE = reference.embedding_backward(dX_, ids_, rows)
    if not np.isfinite(dE).all():
        validate.refuse_non_finite({"dX": dX_})
    return dE
