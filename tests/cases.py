"""Named shapes, and the numbers drawn for them: one set for every way of computing.

The sizes are those at which indexing goes wrong: 1 in every place, odd, prime, and one more than a
tile. Shapes that are worth timing belong to ``gpurnn.bench``.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = [
    "ACTIVATIONS",
    "CASES",
    "DTYPES",
    "EMPTY",
    "PAST_A_TILE",
    "SMALL",
    "Case",
    "Draw",
    "draw",
    "draw_off_kink",
    "kink_distance",
]

Array = NDArray[Any]

# Spelled out, not read from the library: a name that goes missing there must fail here.
ACTIVATIONS = ("tanh", "relu", "sigmoid", "softplus", "identity")
DTYPES = (np.float32, np.float64)


@dataclass(frozen=True)
class Case:
    """A shape: T steps of n rows with d features (or ids below d) and h hidden units."""

    name: str
    T: int
    n: int
    d: int
    h: int

    def __str__(self) -> str:
        return self.name

    @property
    def length(self) -> int:
        """Roundings that can stand behind one number.

        In each of T steps d + h terms and a handful for bias, φ and φ′; over each of T n rows one.
        """
        return self.T * (self.n + self.d + self.h + 8)

    @property
    def seeds(self) -> range:
        """Enough draws for the shortest gradient, db_h of h numbers, to come to 16 together."""
        return range(-(-16 // self.h))


# Few enough numbers to perturb each of them.
SMALL = (
    Case("one-everywhere", T=1, n=1, d=1, h=1),
    Case("one-step", T=1, n=3, d=2, h=5),
    Case("one-row", T=4, n=1, d=3, h=5),
    Case("one-feature", T=3, n=2, d=1, h=4),
    Case("one-unit", T=5, n=3, d=2, h=1),
    Case("odd", T=5, n=3, d=7, h=9),
    Case("prime", T=7, n=5, d=11, h=13),
)
PAST_A_TILE = (
    Case("past-16", T=17, n=17, d=17, h=17),
    Case("past-32", T=3, n=33, d=33, h=33),
    Case("past-64", T=2, n=65, d=65, h=65),
    Case("past-64-steps", T=65, n=2, d=3, h=5),
    Case("past-64-one-row", T=5, n=1, d=65, h=65),
    Case("past-128-units", T=3, n=2, d=5, h=129),
)
EMPTY = (
    Case("no-step", T=0, n=3, d=4, h=5),
    Case("no-row", T=3, n=0, d=4, h=5),
    Case("no-step-no-row", T=0, n=0, d=4, h=5),
)
CASES = SMALL + PAST_A_TILE


@dataclass(frozen=True, eq=False)
class Draw:
    """Arguments for one case: every float array has one dtype, ids (T, n) lie in [0, d)."""

    X: Array
    ids: Array
    h_0: Array
    W_xh: Array
    W_hh: Array
    b_h: Array
    dH: Array

    def astype(self, dtype: DTypeLike) -> "Draw":
        """Return the same numbers in another dtype (exactly, going from float32 to float64)."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return Draw(**{k: a if k == "ids" else a.astype(dtype) for k, a in arrays.items()})

    def arguments(
        self, *, by_id: bool = False, h_0: bool = True, bias: bool = True
    ) -> tuple[Array, Array | None, Array, Array, Array | None]:
        """Return X or ids, h_0, W_xh, W_hh, b_h as ``rnn_forward`` takes them."""
        return (
            self.ids if by_id else self.X,
            self.h_0 if h_0 else None,
            self.W_xh,
            self.W_hh,
            self.b_h if bias else None,
        )


def draw(case: Case, seed: int = 0, dtype: DTypeLike = np.float64, *, kink_redraw: int = 0) -> Draw:
    """Draw the arguments of a case.

    The numbers depend on the shape and the seed alone. They are rounded to float32 first, so that
    float32 and float64 hold the same ones. W_hh is scaled to a spectral radius of about 0.9: states
    and gradients neither vanish nor explode, under any activation, in the longest case.
    ``kink_redraw`` counts the further draws of ``draw_off_kink``.
    """
    T, n, d, h = case.T, case.n, case.d, case.h
    rng = np.random.default_rng([seed, kink_redraw, T, n, d, h])

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return (scale * rng.standard_normal(shape)).astype(np.float32).astype(dtype)

    return Draw(
        X=normal(T, n, d),
        ids=rng.integers(0, d, (T, n)),
        h_0=normal(n, h, scale=0.5),
        W_xh=normal(d, h, scale=d**-0.5),
        W_hh=normal(h, h, scale=0.9 * h**-0.5),
        b_h=normal(h, scale=0.5),
        dH=normal(T, n, h),
    )


def draw_off_kink(
    case: Case,
    margin: float,
    seed: int = 0,
    dtype: DTypeLike = np.float64,
    *,
    by_id: bool = False,
    h_0: bool = True,
    bias: bool = True,
) -> Draw:
    """Draw until no pre-activation of the relu network lies within ``margin`` of 0.

    relu has no derivative at 0, and rounding (or a finite difference) that carries a pre-activation
    across it changes the gradient by far more than rounding.
    """
    for attempt in range(100):
        drawn = draw(case, seed, dtype, kink_redraw=attempt)
        if kink_distance(*drawn.arguments(by_id=by_id, h_0=h_0, bias=bias)) > margin:
            return drawn
    raise RuntimeError(f"{case}: no draw in 100 keeps relu {margin} away from its kink")


def kink_distance(
    X: Array, h_0: Array | None, W_xh: Array, W_hh: Array, b_h: Array | None
) -> float:
    """Return the smallest |pre-activation| of the relu network, computed in float64."""
    W_xh, W_hh = W_xh.astype(np.float64), W_hh.astype(np.float64)
    H_t = np.zeros((X.shape[1], len(W_hh))) if h_0 is None else h_0.astype(np.float64)
    smallest = np.inf
    for X_t in X:
        Z_t = (W_xh[X_t] if X.ndim == 2 else X_t @ W_xh) + H_t @ W_hh
        if b_h is not None:
            Z_t = Z_t + b_h
        smallest = min(smallest, float(np.abs(Z_t).min(initial=np.inf)))
        H_t = np.maximum(Z_t, 0)
    return smallest
