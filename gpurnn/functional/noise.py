"""Dropout."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import reference, validate
from gpurnn.cuda import arrays, noise
from gpurnn.functional.placing import placed, quiet, there

__all__ = ["dropout"]

Floats = NDArray[Any]


def dropout(H: Floats, p: float, *, seed: int, update: int | NDArray[np.int64]) -> Floats:
    """Zero each number of H with probability p, and divide the others by 1 − p.

    Applied to dH with the same p, seed and update it is the backward pass: what is dropped is a
    function of seed, update and place alone (``gpurnn.philox``), the same for every dtype and
    wherever the arrays lie, so that nothing has to be kept. On a GPU the first call with a p waits,
    and keeps a number there for good: p is not for drawing.

    Args:
        H: (…), any shape.
        p: in [0, 1). With 0 the result is a copy of H.
        seed: at least 0; its lower 64 bits count.
        update: the number of the update, at least 0; its lower 32 bits count. On a GPU it may be an
            int64 array of one number there, which the kernel reads when it runs: a CUDA graph then
            drops others whenever it is launched.

    Returns:
        An array like H.
    """
    in_array = isinstance(update, np.ndarray) or arrays.on_gpu(update)
    engine, (H, array), place = placed({"H": H, "update": update if in_array else None})
    with there(engine):
        H_, p_, seed_, update_ = validate.dropout(H, p, seed, array if in_array else update, place)
    if engine is not None:
        return noise.dropout(engine, H_, p_, seed_, update_)  # type: ignore[no-any-return]
    with quiet():
        Y = reference.dropout(H_, p_, seed_, int(update_))
    if not np.isfinite(Y).all():
        validate.refuse_non_finite({"H": H_})
    return Y
