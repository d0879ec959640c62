"""Dropout on kernels."""

import numpy as np

from gpurnn import philox
from gpurnn.cuda.engines import Array, Engine
from gpurnn.cuda.scalars import scalar
from gpurnn.cuda.specs import REAL, KernelSpec
from gpurnn.planning import dtype_name

__all__ = ["dropout"]

THREADS = 256
OF_A_THREAD = 4


def dropout(
    engine: Engine, H: Array, p: float, seed: int, update: int | Array, out: Array | None = None
) -> Array:
    """Return H · mask / (1 − p), with the mask that ``gpurnn.philox`` has for seed and update.

    Args:
        engine: where the arrays lie.
        H: of any shape, C-contiguous.
        p: in [0, 1).
        seed: its lower 64 bits count.
        update: its lower 32 bits count. An array int64 (1,) on the device is read when the kernel
            runs: so a CUDA graph draws another mask each time.
        out: where the result goes, like H; it may be H. None is a new array.

    Queued on the current stream; nothing waits. To apply it to dH is the backward pass. The first
    call with a p cannot be captured.
    """
    dtype = dtype_name(H.dtype)
    with engine.here():
        Y = engine.xp.empty_like(H) if out is None else out
        if not H.size:
            return Y
        if isinstance(update, int):
            counts, number = scalar(engine, 0, np.int64), update & philox.LOWER
        else:
            counts, number = update.reshape(-1), 0
        engine.launch(
            KernelSpec("dropout", None, "identity", dtype),
            (-(-H.size // (THREADS * OF_A_THREAD)), 1, 1),
            (THREADS, 1, 1),
            (H.reshape(-1), Y.reshape(-1), scalar(engine, 1 / (1 - p), REAL[dtype]), counts),
            [(philox.below(p), *philox.key(seed), number)],
        )
    return Y
