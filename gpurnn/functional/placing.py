"""Where the arrays of a call lie, and so what computes with them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from gpurnn import validate
from gpurnn.cuda import arrays
from gpurnn.cuda.engines import Engine, GPUEngine, current_emulation

__all__ = ["beside", "placed", "put", "quiet", "there"]


def quiet() -> np.errstate:
    """Overflow and NaN travel to the result, where they are looked for."""
    return np.errstate(all="ignore")


def placed(arguments: dict[str, object]) -> tuple[Engine | None, list[Any], validate.Place]:
    """Return what runs kernels on these arrays (None: NumPy), they, and where they must lie."""
    values = list(arguments.values())
    if any(map(arrays.on_gpu, values)):
        gpu, taken = arrays.taken(arguments)
        return gpu, list(taken.values()), validate.kernels_place(gpu.xp)
    engine = current_emulation()
    return engine, values, validate.kernels_place(engine.xp) if engine else validate.HOST


def there(engine: Engine | None) -> AbstractContextManager[object]:
    """Return the context in which arrays are looked at where they lie."""
    return nullcontext() if engine is None else engine.here()


def beside(engine: Engine | None, arguments: dict[str, object]) -> tuple[list[Any], validate.Place]:
    """Return the arrays of a backward pass, and where they must lie, as in the forward pass."""
    values = list(arguments.values())
    if engine is None:
        return values, validate.HOST
    if isinstance(engine, GPUEngine):
        gpu, taken = arrays.taken(arguments)
        if gpu != engine:
            raise ValueError(
                f"{next(iter(arguments))} is on CUDA device {gpu.index} but the forward pass ran "
                f"on {engine.index}: expected all arrays on one device"
            )
        values = list(taken.values())
    return values, validate.kernels_place(engine.xp)


def put(result: Any, out: Any) -> Any:
    """Return a result, or the array that it was to be written to, with it."""
    if out is None or result is None or out is result:
        return result
    out[...] = result
    return out
