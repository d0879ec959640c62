"""Rows of a table by token id, and their gradient."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import reference, validate
from gpurnn.cuda import tokens
from gpurnn.functional.placing import placed, put, quiet, there

__all__ = ["embedding", "embedding_backward"]

Floats = NDArray[Any]
Ids = NDArray[Any]


def embedding(ids: Ids, E: Floats, *, check_ids: bool = True) -> Floats:
    """Rows of E (|V|, d) by token id: ids (…) → (…, d).

    Args:
        ids: (…) integers in [0, |V|). E: (|V|, d).
        check_ids: False where ids on a GPU are known to be in range, as in ``rnn_forward``.

    Raises:
        ValueError: an id is negative or at least |V|; the message says which and where.
    """
    engine, (ids, E), place = placed({"ids": ids, "E": E})
    with there(engine):
        ids_, E_ = validate.embedding(ids, E, place, check_ids=check_ids)
    if engine is not None:
        found: Floats = tokens.embedding(engine, ids_, E_)
        return found
    X = np.take(E_, ids_, axis=0)
    if not np.isfinite(X).all():
        validate.refuse_non_finite({"E": E_})
    return X


def embedding_backward(
    dX: Floats,
    ids: Ids,
    num_rows: int,
    *,
    check_ids: bool = True,
    out: Floats | None = None,
) -> Floats:
    """Return dE (num_rows, d): the rows of dX (…, d) added up by their id, always in one order.

    ``check_ids`` is as in ``embedding``; the result is written to ``out``, if that is an array. On
    a GPU half types are summed as float32 and rounded once.
    """
    engine, (dX, ids), place = placed({"dX": dX, "ids": ids})
    with there(engine):
        dX_, ids_, rows = validate.embedding_backward(dX, ids, num_rows, place, check_ids=check_ids)
        shape = rows, dX_.shape[-1]
        (out_,) = validate.outs((out,), ("dE",), (shape,), dX_.dtype, place)
    if engine is not None:
        summed: Floats = tokens.embedding_backward(engine, dX_, ids_, rows, out_)
        return summed
    with quiet():
        dE = reference.embedding_backward(dX_, ids_, rows)
    if not np.isfinite(dE).all():
        validate.refuse_non_finite({"dX": dX_})
    result: Floats = put(dE, out_)
    return result
