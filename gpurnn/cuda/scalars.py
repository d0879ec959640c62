"""Numbers that kernels read from memory: kept on the device, as they do not change."""

from functools import cache
from typing import Any

from gpurnn.cuda.engines import Array, Engine

__all__ = ["scalar"]


@cache
def scalar(engine: Engine, value: float, dtype: Any) -> Array:
    """Return an array of one number that no one writes to, from any stream.

    It is kept for good: a CUDA graph may read it whenever it is launched. To make one means to wait
    for the GPU, and cannot be captured.
    """
    with engine.here(), engine.lasting():
        made = engine.xp.zeros(1, dtype)
        made.fill(value)
        engine.settle()
    return made
