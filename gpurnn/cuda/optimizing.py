"""An optimizer's step, and clipping, for arrays on a GPU that somebody else has laid out.

They are copied into flat arrays, updated in two launches, and copied back. Training, where all lies
flat and nothing waits, does not come here (``gpurnn.training.device``).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn.cuda import update
from gpurnn.cuda.engines import Array, Engine
from gpurnn.slots import Counts, Rates, Record, Settings

__all__ = ["flat_size", "global_norm", "settings_array", "step", "views"]

ALIGNED = 4
"""Numbers, 16 bytes or more: cuBLAS is slower at other addresses. What lies between stays 0."""

Arrays = Mapping[str, Array]


def settings_array(settings: Mapping[int, float], max_norm: float | None) -> NDArray[Any]:
    """Return the array of ``slots.Settings`` for an optimizer's own, and the norm to clip to."""
    a = np.zeros(Settings.SIZE)
    a[Settings.EPS] = 1.0  # a divisor
    for place, value in settings.items():
        a[place] = value
    a[Settings.MAX_NORM] = math.inf if max_norm is None else max_norm
    return a


def step(
    engine: Engine,
    optimizer: str,
    memory: Mapping[str, Arrays],
    params: Arrays,
    grads: Arrays,
    rates: Sequence[float],
    settings: Mapping[int, float],
) -> bool:
    """Update params, and ``memory`` ("m" and "v" by name), in place; wait for it.

    Returns whether that was done: not if a new value would not be finite, or a gradient is not.
    """
    xp = engine.xp
    with engine.here():
        theta = _flattened(engine, params, params)
        flat = update.Flat(
            theta,
            _flattened(engine, grads, params),
            *(
                _flattened(engine, memory[part], params)
                if part in memory
                else xp.zeros_like(theta[:1])
                for part in ("m", "v")
            ),
        )
        record = xp.zeros(Record.SIZE, np.float64)
        scalars = update.Scalars(
            xp.array(np.array(rates, np.float64)),
            xp.array(settings_array(settings, None)),
            xp.zeros(Counts.SIZE, np.int64),
            record,
        )
        partials = xp.zeros(update.partial_sums(theta.size), np.float64)
        no_loss = xp.zeros(1, np.float64)
        update.update(engine, optimizer, flat, no_loss, partials, scalars)
        if engine.fetched(record)[Record.STOPPED]:
            return False
        _put_back(theta, params)
        for part, arrays in memory.items():
            _put_back(getattr(flat, part), arrays)
    return True


def global_norm(engine: Engine, grads: Arrays) -> float:
    """Return the length of all gradients together, squares added in float64; wait for it."""
    xp = engine.xp
    with engine.here():
        flat = _flattened(engine, grads, grads)
        partials = xp.zeros(update.partial_sums(flat.size), np.float64)
        counts = xp.zeros(Counts.SIZE, np.int64)
        rates = xp.zeros(Rates.SIZE, np.float64)
        settings = xp.array(settings_array({}, None))
        one = xp.zeros(1, flat.dtype)
        update.norm(
            engine, "sgd", update.Flat(flat, flat, one, one), partials, rates, settings, counts
        )
        sums = engine.fetched(partials)
    with np.errstate(over="ignore"):
        return math.sqrt(float(sums[: len(sums) // 2].sum()))


def flat_size(arrays: Arrays) -> int:
    """Return how many numbers a flat array has that holds all of these, each well aligned."""
    return sum(_aligned(a.size) for a in arrays.values())


def views(flat: Array, arrays: Arrays) -> dict[str, Array]:
    """Cut a flat array of ``flat_size`` into one like each of ``arrays``, in their order."""
    found, begin = {}, 0
    for name, a in arrays.items():
        found[name] = flat[begin : begin + a.size].reshape(a.shape)
        begin += _aligned(a.size)
    return found


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _flattened(engine: Engine, arrays: Arrays, order: Arrays) -> Array:
    first = next(iter(order.values()))
    flat = engine.xp.zeros(flat_size(order), first.dtype)
    for name, view in views(flat, order).items():
        view[...] = arrays[name]
    return flat


def _put_back(flat: Array, arrays: Arrays) -> None:
    for name, view in views(flat, arrays).items():
        arrays[name][...] = view
