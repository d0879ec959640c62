"""Softmax and cross-entropy on kernels.

As for ``gpurnn.cuda.operations``, arguments have passed ``gpurnn.validate``, everything is queued
on the current stream and nothing waits for it. The loss stays on the device; after the first call
of a kind, all of it can be captured in a CUDA graph.
"""

import numpy as np

from gpurnn.cuda.engines import Array, Engine
from gpurnn.cuda.scalars import scalar
from gpurnn.cuda.specs import REAL, KernelSpec
from gpurnn.planning import dtype_name
from gpurnn.tile import WARP, OneBlock, Softmax

__all__ = ["cross_entropy", "mean", "negative_log_likelihood", "softmax_sizes"]

MOST_HELD = 8  # numbers of a row that a lane holds in registers
ROWS_OF_BLOCK = 8  # where a warp has a row
ONE_BLOCK = OneBlock(1024)
AT_ONCE = 8  # numbers that each of its threads loads at once
NONE_IGNORED = 1 << 40  # no int32


def cross_entropy(
    engine: Engine,
    O: Array,
    targets: Array,
    *,
    b_q: Array | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    dO: Array | None = None,
) -> tuple[Array, Array]:
    """Return the mean loss of O (N, q), float64 (1,), and its gradient: O itself, overwritten.

    Args:
        engine: where the arrays lie.
        O: logits, C-contiguous, without the bias where there is a ``b_q`` (q,). q ≥ 1.
        targets: (N,) integers in [0, q), or ``ignore_index``; of another type than int32 they are
            copied.
        b_q: added to O in the same pass.
        ignore_index: rows with this target have loss 0 and gradient 0, and are not counted.
        label_smoothing: ε of the distribution (1 − ε) onehot + ε/q, in [0, 1).
        dO: where the gradient goes, like O; None overwrites O.

    The gradient is that of the mean over the rows that count. Where none does, the mean is NaN and
    the gradient 0.
    """
    N, q = O.shape
    real = REAL[dtype_name(O.dtype)]
    smoothed = label_smoothing > 0
    dO = O if dO is None else dO
    with engine.here():
        losses, mean_ = engine.xp.empty(N, real), engine.xp.empty(1, np.float64)
        targets = targets.astype(np.int32, copy=False)
        counts, rows = scalar(engine, 0, np.int64), N  # kernels add the two
        if ignore_index is not None:
            counts, rows = engine.xp.empty(1, np.float64).view(np.int64), 0
            spec = KernelSpec("target_count", ONE_BLOCK, "identity", "float32")
            engine.launch(spec, *_one_block(N), (targets, counts), [(ignore_index,)])
        sizes = softmax_sizes(q, smoothed=smoothed, biased=b_q is not None)
        smoothing = scalar(engine, label_smoothing, real)
        _softmax(engine, sizes, O, dO, targets, losses, b_q, smoothing, counts, ignore_index, rows)
        _mean(engine, losses, counts, rows, mean_)
    return mean_, dO


def mean(engine: Engine, losses: Array, out: Array) -> None:
    """Write the mean of losses (N,), summed in float64, to out, float64 (1,)."""
    with engine.here():
        _mean(engine, losses, scalar(engine, 0, np.int64), len(losses), out)


def _mean(engine: Engine, losses: Array, counts: Array, rows: int, out: Array) -> None:
    spec = KernelSpec("loss_mean", ONE_BLOCK, "identity", dtype_name(losses.dtype))
    engine.launch(spec, *_one_block(len(losses)), (losses, counts, out), [(rows,)])


def negative_log_likelihood(
    engine: Engine, O: Array, targets: Array, *, ignore_index: int | None = None
) -> Array:
    """Return −log softmax(O)[target] of each row, (N,) of the type computed with; O is read."""
    N, q = O.shape
    real = REAL[dtype_name(O.dtype)]
    with engine.here():
        losses = engine.xp.empty(N, real)
        targets = targets.astype(np.int32, copy=False)
        sizes = softmax_sizes(q, gradient=False)
        smoothing, counts = scalar(engine, 0.0, real), scalar(engine, 0, np.int64)
        _softmax(engine, sizes, O, O, targets, losses, None, smoothing, counts, ignore_index, N)
    return losses


def softmax_sizes(
    q: int, *, gradient: bool = True, smoothed: bool = False, biased: bool = False
) -> Softmax:
    """Return how rows of q numbers are shared out: to warps up to 256, then to larger blocks."""
    held = 1 << (-(-q // WARP) - 1).bit_length()  # a power of two: few kernels for many q
    if held <= MOST_HELD:
        return Softmax(held, WARP * ROWS_OF_BLOCK, gradient, smoothed, biased)
    threads = 128 if q <= 1024 else 256 if q <= 16_384 else 512
    return Softmax(0, threads, gradient, smoothed, biased)


def _softmax(
    engine: Engine,
    sizes: Softmax,
    O: Array,
    dO: Array,
    targets: Array,
    losses: Array,
    b_q: Array | None,
    smoothing: Array,
    counts: Array,
    ignore_index: int | None,
    rows: int,
) -> None:
    N = len(O)
    if not N:
        return
    blocks = N if sizes.columns == 0 else -(-N * WARP // sizes.threads)
    bias = O.reshape(-1) if b_q is None else b_q  # where there is none, no one reads it
    ignored = NONE_IGNORED if ignore_index is None else ignore_index
    engine.launch(
        KernelSpec("cross_entropy", sizes, "identity", dtype_name(O.dtype)),
        (blocks, 1, 1),
        (sizes.threads, 1, 1),
        (O, dO, targets, losses, bias, smoothing, counts),
        [(ignored, rows)],
    )


def _one_block(N: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the grid and the block of a sum of N numbers: the order of the sum depends on N."""
    warps = -(-N // (WARP * AT_ONCE))
    return (1, 1, 1), (min(ONE_BLOCK.threads, WARP * max(1, warps)), 1, 1)
