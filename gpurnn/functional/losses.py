"""Softmax and cross-entropy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import reference, validate
from gpurnn.cuda import losses, operations
from gpurnn.cuda.engines import EmulatedEngine, Engine
from gpurnn.functional.layers import linear, linear_backward
from gpurnn.functional.placing import placed, quiet, there

__all__ = ["cross_entropy", "linear_cross_entropy", "negative_log_likelihood"]

Floats = NDArray[Any]
Ids = NDArray[Any]


def cross_entropy(
    O: Floats,
    targets: Ids,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    check_ids: bool = True,
) -> tuple[Any, Floats]:
    """Softmax and cross-entropy of all rows at once.

    Args:
        O: (…, q) logits. targets: (…) integer ids in [0, q), or ``ignore_index``.
        ignore_index: rows with this target do not count: neither in the mean, nor has their
            gradient anything but zeros. It need not be an id.
        label_smoothing: ε in [0, 1). What is held against the softmax is then not the one-hot
            vector of the target but (1 − ε) onehot + ε/q. On a GPU the first call with an ε waits,
            and keeps a number there for good.
        check_ids: False where targets on a GPU are known to be such: to look means to wait for the
            GPU, and cannot be captured in a CUDA graph. One that is none makes the loss NaN.

    Returns:
        loss: mean over the rows that count of −log softmax(O)[target], natural logarithm, summed in
            float64; a float, or on a GPU a float64 array without axes, for which nothing waits.
        dO: (…, q), its gradient (softmax(O) − onehot(target)) / rows.

    Where targets are there but all of them ignored, the loss is NaN, as it is in PyTorch, and dO 0.
    For float16, dO is rounded to multiples of 2⁻²⁴: too coarse where there are many rows.

    Raises:
        TypeError, ValueError: as above; also where there is no row at all, or a NumPy O holds a NaN
            in a row that counts.
    """
    engine, (O, targets), place = placed({"O": O, "targets": targets})
    with there(engine):
        O_, targets_, ignored, smoothing = validate.cross_entropy(
            O, targets, ignore_index, label_smoothing, place, check_ids=check_ids
        )
    if engine is not None:
        with there(engine):
            dO = engine.xp.empty_like(O_)
        mean, dO = losses.cross_entropy(
            engine, O_, targets_, ignore_index=ignored, label_smoothing=smoothing, dO=dO
        )
        return _loss(engine, mean), dO.reshape(O.shape)
    with quiet():
        loss, dO = reference.cross_entropy(O_, targets_, ignored, smoothing)
    if np.isnan(loss) and (ignored is None or (targets_ != ignored).any()):
        validate.refuse_non_finite({"O": O})
    return loss, dO.reshape(np.shape(O))


def linear_cross_entropy(
    H: Floats,
    W_hq: Floats,
    b_q: Floats | None,
    targets: Ids,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    check_ids: bool = True,
    out: tuple[Floats | None, Floats | None] | None = None,
) -> tuple[Any, Floats, Floats, Floats]:
    """The output layer, its loss and all gradients: ``linear``, ``cross_entropy`` and back.

    On a GPU the logits are held once: the bias is added in the pass that computes the loss, and
    their gradient is written over them.

    Args:
        H: (…, h). W_hq: (h, q). b_q: (q,) or None. targets: (…) ids.
        ignore_index, label_smoothing, check_ids: see ``cross_entropy``.
        out: arrays that dW_hq and db_q are written to, None for a new one.

    Returns:
        loss, as of ``cross_entropy``; dH (…, h), dW_hq (h, q), db_q (q,).

    Raises:
        TypeError, ValueError: as by ``linear`` and ``cross_entropy``.
    """
    engine, arrays, place = placed({"H": H, "W_hq": W_hq, "b_q": b_q, "targets": targets})
    if engine is None:
        O = linear(H, W_hq, b_q)
        loss, dO = cross_entropy(
            O, targets, ignore_index=ignore_index, label_smoothing=label_smoothing
        )
        return loss, *linear_backward(dO, H, W_hq, out=out)
    with there(engine):
        H_, W_hq_, b_q_ = validate.linear(arrays[0], arrays[1], arrays[2], place)
        O = engine.xp.empty((*H_.shape[:-1], W_hq_.shape[1]), W_hq_.dtype)
        O_, targets_, ignored, smoothing = validate.cross_entropy(
            O, arrays[3], ignore_index, label_smoothing, place, check_ids=check_ids
        )
        shapes = (W_hq_.shape, W_hq_.shape[1:])
        outs = validate.outs(out, ("dW_hq", "db_q"), shapes, W_hq_.dtype, place)
        operations.linear(engine, H_, W_hq_, None, O_)
    mean, dO = losses.cross_entropy(
        engine, O_, targets_, b_q=b_q_, ignore_index=ignored, label_smoothing=smoothing
    )
    gradients = operations.linear_backward(engine, dO.reshape(O.shape), H_, W_hq_, outs)
    return _loss(engine, mean), *gradients


def _loss(engine: Engine, mean: Any) -> Any:
    return float(mean[0]) if isinstance(engine, EmulatedEngine) else mean.reshape(())


def negative_log_likelihood(
    O: Floats, targets: Ids, *, ignore_index: int | None = None, check_ids: bool = True
) -> Floats:
    """−log softmax(O)[target] of each row: O (…, q), targets (…) → (…), natural logarithm.

    It has O's dtype, but float32 where that is float16 or bfloat16. Rows whose target is
    ``ignore_index`` have 0: a mean must leave them out of the count. ``check_ids`` is that of
    ``cross_entropy``.
    """
    engine, (O, targets), place = placed({"O": O, "targets": targets})
    with there(engine):
        O_, targets_, ignored, _ = validate.negative_log_likelihood(
            O, targets, ignore_index, place, check_ids=check_ids
        )
    if engine is not None:
        nll = losses.negative_log_likelihood(engine, O_, targets_, ignore_index=ignored)
        return nll.reshape(targets.shape)  # type: ignore[no-any-return]
    with quiet():
        nll = reference.negative_log_likelihood(O_, targets_, ignored)
    if np.isnan(nll).any():
        validate.refuse_non_finite({"O": O})
    return nll.reshape(np.shape(targets))
