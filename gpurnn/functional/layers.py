"""Layers without a state: the hidden layer and the output layer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import reference, validate
from gpurnn.activation import Activation, AnyActivation
from gpurnn.cuda import operations
from gpurnn.cuda.engines import Engine
from gpurnn.functional.placing import beside, placed, put, quiet, there

__all__ = [
    "HiddenResiduals",
    "hidden_layer",
    "hidden_layer_backward",
    "linear",
    "linear_backward",
]

Floats = NDArray[Any]
Outs = tuple[Floats | None, Floats | None]


@dataclass(frozen=True, slots=True, eq=False)
class HiddenResiduals:
    """What ``hidden_layer_backward`` needs; the same holds as for ``RNNResiduals``."""

    X: Floats
    H: Floats
    Z: Floats | None
    W_xh: Floats
    has_bias: bool
    activation: AnyActivation
    engine: Engine | None = None


def hidden_layer(
    X: Floats, W_xh: Floats, b_h: Floats | None, *, activation: str | Activation = "tanh"
) -> tuple[Floats, HiddenResiduals]:
    """H = φ(X W_xh + b_h) (9.4.3): X (…, d), W_xh (d, h), b_h (h,) or None → H (…, h), residuals.

    A hidden *layer*: unlike ``rnn_forward`` it has no hidden *state*.
    """
    engine, (X, W_xh, b_h), place = placed({"X": X, "W_xh": W_xh, "b_h": b_h})
    with there(engine):
        X_, W_xh_, b_h_, phi = validate.hidden_layer(X, W_xh, b_h, activation, place)
    if engine is not None:
        H, Z = operations.hidden_layer(engine, X_, W_xh_, b_h_, phi)
        return H, HiddenResiduals(X_, H, Z, W_xh_, b_h_ is not None, phi, engine)
    with quiet():
        H, Z = reference.hidden_layer(X_, W_xh_, b_h_, phi)
    if not np.isfinite(H).all():
        validate.refuse_non_finite({"X": X_, "W_xh": W_xh_, "b_h": b_h_})
    return H, HiddenResiduals(X_, H, Z, W_xh_, b_h_ is not None, phi)


def hidden_layer_backward(
    dH: Floats, residuals: HiddenResiduals
) -> tuple[Floats, Floats, Floats | None]:
    """Return dX, dW_xh, db_h (None without bias) of ``hidden_layer``; dH has H's shape."""
    r = residuals
    (dH,), place = beside(r.engine, {"dH": dH})
    with there(r.engine):
        dH_ = validate.like("dH", dH, "H", r.H, place)
    if r.engine is not None:
        dX, dW_xh, db_h = operations.hidden_layer_backward(
            r.engine, dH_, r.X, r.H, r.Z, r.W_xh, r.activation
        )
        return dX, dW_xh, db_h if r.has_bias else None
    with quiet():
        dX, dW_xh, db_h = reference.hidden_layer_backward(dH_, r.X, r.H, r.Z, r.W_xh, r.activation)
    if not np.isfinite(db_h).all():
        validate.refuse_non_finite({"dH": dH_})
    return dX, dW_xh, db_h if r.has_bias else None


def linear(H: Floats, W_hq: Floats, b_q: Floats | None = None) -> Floats:
    """O = H W_hq + b_q (9.4.6): H (…, h), W_hq (h, q), b_q (q,) or None → O (…, q).

    For a NumPy H (T, n, h) it is one product for each step, so that a step's O has the same bits
    alone; on a GPU one product for all.
    """
    engine, (H, W_hq, b_q), place = placed({"H": H, "W_hq": W_hq, "b_q": b_q})
    with there(engine):
        H_, W_hq_, b_q_ = validate.linear(H, W_hq, b_q, place)
    if engine is not None:
        result: Floats = operations.linear(engine, H_, W_hq_, b_q_)
        return result
    with quiet():
        O = reference.linear(H_, W_hq_, b_q_)
    if not np.isfinite(O).all():
        validate.refuse_non_finite({"H": H_, "W_hq": W_hq_, "b_q": b_q_})
    return O


def linear_backward(
    dO: Floats, H: Floats, W_hq: Floats, *, out: Outs | None = None
) -> tuple[Floats, Floats, Floats]:
    """Return dH (…, h), dW_hq (h, q), db_q (q,) of ``linear``; dO is (…, q).

    ``out`` may have arrays that dW_hq and db_q are written to, None for a new one.
    """
    engine, (dO, H, W_hq), place = placed({"dO": dO, "H": H, "W_hq": W_hq})
    with there(engine):
        dO_, H_, W_hq_ = validate.linear_backward(dO, H, W_hq, place)
        shapes = (W_hq_.shape, W_hq_.shape[1:])
        outs = validate.outs(out, ("dW_hq", "db_q"), shapes, W_hq_.dtype, place)
    if engine is not None:
        return operations.linear_backward(engine, dO_, H_, W_hq_, outs)
    with quiet():
        dH, dW_hq, db_q = reference.linear_backward(dO_, H_, W_hq_)
    if not all(np.isfinite(a).all() for a in (dH, dW_hq, db_q)):
        validate.refuse_non_finite({"dO": dO_, "H": H_, "W_hq": W_hq_})
    return dH, put(dW_hq, outs[0]), put(db_q, outs[1])
