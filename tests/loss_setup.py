"""What the tests of the losses have in common: rows of logits, and what they must come to."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tolerance import assert_close

from gpurnn import functional as F

__all__ = [
    "OPTIONS",
    "Array",
    "assert_gradient_close",
    "assert_loss_as_reference",
    "exact",
    "halves",
    "logits",
    "spelled_out",
]

Array = NDArray[Any]

# Of ``cross_entropy``; "first" stands for the target of the first row.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ignore": {"ignore_index": "first"},
    "smooth": {"label_smoothing": 0.1},
    "both": {"ignore_index": "first", "label_smoothing": 0.3},
}


def logits(N: int, q: int, dtype: Any = np.float64, seed: int = 0) -> tuple[Array, Array]:
    """Return O (N, q), the same numbers in each dtype but for rounding, and targets (N,)."""
    rng = np.random.default_rng([N, q, seed])
    O = (3 * rng.standard_normal((N, q))).astype(np.float32)
    return O.astype(dtype), rng.integers(0, q, N)


def spelled_out(options: dict[str, Any], targets: Array) -> dict[str, Any]:
    first = options.get("ignore_index") == "first"
    return {**options, "ignore_index": int(targets[0])} if first else options


def exact(O: Array, targets: Array, **options: Any) -> tuple[float, Array]:
    """Return loss and gradient by the reference in float64."""
    return F.cross_entropy(O.astype(np.float64), targets, **options)


def assert_gradient_close(O: Array, dO: Array, truth: Array, options: dict[str, Any]) -> None:
    """Hold a gradient against the float64 reference's by the tests' rule."""
    assert (dO.dtype, dO.shape) == (O.dtype, truth.shape)
    q = O.shape[-1]
    if halves(O):  # computed as float32, rounded once
        import ml_dtypes

        limits = ml_dtypes.finfo(O.dtype)
        u, least = float(limits.eps) / 2, float(limits.smallest_subnormal)
        error = np.abs(dO.astype(np.float64) - truth)
        assert (error <= 1.01 * u * np.abs(truth) + least + 1e-6 * np.abs(truth).max()).all()
        return
    # 1 is what is subtracted at the target; shares of a mean, they are next to 1/N.
    largest = max(float(np.abs(truth).max()), np.finfo(O.dtype).eps)
    assert_close("dO", dO / largest, truth / largest, length=q, dtype=O.dtype)


def assert_loss_as_reference(
    O: Array, targets: Array, loss: Any, dO: Array, options: dict[str, Any]
) -> None:
    """Hold what a kernel found of O against the float64 reference."""
    truth, gradient = exact(O, targets, **options)
    if np.isnan(truth):
        assert np.isnan(loss)
    else:
        dtype = np.float32 if halves(O) else O.dtype
        # Where q = 1 every loss is 0: rounding is that of the logits.
        largest = 1 + np.abs(O.astype(np.float64)).max()
        length = O.shape[-1]
        assert_close("loss", loss + largest, np.array(truth + largest), length=length, dtype=dtype)
    assert_gradient_close(O, dO, gradient, options)


def halves(O: Array) -> bool:
    """Whether O is of a type that is computed with as float32."""
    return O.dtype.itemsize == 2
