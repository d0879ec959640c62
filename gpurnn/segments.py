"""A backward pass from every k-th state: the sequence in segments, from the last to the first.

Each segment's states are computed again from the one kept before it, and forgotten once its
gradients are there, so that T / k + k states are held at a time in place of T. (Griewank, 1992,
"Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
differentiation", with one level.) It is a second forward pass in time.

Written against two functions, which NumPy's reference and the kernels each bring along.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["BackwardPass", "ForwardPass", "Gradients", "backward", "checkpoints"]

Array = Any  # numpy.ndarray or cupy.ndarray

Gradients = tuple[Array | None, Array, Array, Array, Array]
"""dX (None for ids), dh_0, dW_xh, dW_hh, db_h."""

ForwardPass = Callable[[Array, Array], tuple[Array, Array | None]]
"""(X, h_0) → the states with h_0 before them, and the pre-activations where φ′ wants them."""

BackwardPass = Callable[[Array, Array, Array, Array | None, Array | None], Gradients]
"""(dH, X, states, Z, xi) → the gradients, in new arrays; none of the arguments is written."""


def checkpoints(states: Array, every: int) -> Array:
    """Return a copy of the states that segments of ``every`` steps start from.

    Of states (T + 1, n, h), h_0 and then H: numbers 0, k, 2k, … below T, (⌈T / k⌉, n, h), and h_0
    where T = 0.
    """
    starts = max(len(states) - 1, 1)
    return states[: starts : min(every, starts)].copy()


def backward(
    dH: Array,
    X: Array,
    kept: Array,
    every: int,
    xi: Array | None,
    forward_pass: ForwardPass,
    backward_pass: BackwardPass,
    dX: Array | None,
) -> Gradients:
    """Backpropagate through a sequence of which ``checkpoints`` were kept.

    Args:
        dH: (T, n, h). X: (T, n, d), or (T, n) ids. xi: (T,) or None.
        kept: the ``checkpoints`` for segments of ``every`` steps.
        forward_pass, backward_pass: those of one segment. What the forward pass returns goes to
            the backward pass and is not kept beyond it.
        dX: written, like X; None for ids.

    The gradients by the weights and the bias are added up from the last segment to the first, those
    of half types in float32. The gradient that a segment passes to the one before it is an array of
    dH's dtype: half types round it, and its sum with the last dH there, once in ``every`` steps.
    """
    T, dtype = len(dH), dH.dtype
    real = np.dtype(np.float32) if dtype.itemsize == 2 else dtype

    def segment(start: int, carried: Array | None) -> Gradients:
        part = slice(start, min(start + every, T))
        states, Z = forward_pass(X[part], kept[start // every])
        gradient = dH[part]
        if carried is not None:
            gradient = gradient.copy()
            gradient[-1] += carried
        return backward_pass(gradient, X[part], states, Z, None if xi is None else xi[part])

    carried, totals = None, None
    for start in range((len(kept) - 1) * every, -1, -every):
        dX_part, carried, *added = segment(start, carried)
        if dX is not None:
            dX[start : start + every] = dX_part
        widened = [a.astype(real, copy=False) for a in added]
        totals = (
            widened
            if totals is None
            else [total + a for total, a in zip(totals, widened, strict=True)]
        )
    assert totals is not None  # there is one checkpoint at least
    dW_xh, dW_hh, db_h = (total.astype(dtype, copy=False) for total in totals)
    return dX, carried, dW_xh, dW_hh, db_h
