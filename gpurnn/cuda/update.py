"""What a training step does beside forward and backward: take a batch, update, keep the state.

All of it is queued on the current stream, waits for nothing and can be captured in a CUDA graph.
"""

from typing import NamedTuple

from gpurnn.cuda.engines import Array, Engine
from gpurnn.cuda.specs import KernelSpec, Kind
from gpurnn.planning import dtype_name
from gpurnn.slots import Updating

__all__ = [
    "Flat",
    "Scalars",
    "keep_state",
    "norm",
    "partial_sums",
    "stop_unless_finite",
    "take_batch",
    "update",
]

THREADS = 256
NUMBERS_A_BLOCK = 4 * THREADS  # of a parameter, that are worth a block
MOST_BLOCKS = 512


class Flat(NamedTuple):
    """Parameters, gradients and an optimizer's memory, each (P,), in one order.

    ``m`` and ``v`` are arrays of one number where the optimizer has none of them.
    """

    theta: Array
    grads: Array
    m: Array
    v: Array


class Scalars(NamedTuple):
    """The arrays of ``gpurnn.slots``, flat: ``rates`` and ``record`` of an epoch's batches."""

    rates: Array
    settings: Array
    counts: Array
    record: Array


def partial_sums(parameters: int) -> int:
    """Return the length of the array of partial sums for so many parameters."""
    return 2 * max(1, min(-(-parameters // NUMBERS_A_BLOCK), MOST_BLOCKS))


def update(
    engine: Engine, optimizer: str, flat: Flat, loss: Array, partials: Array, scalars: Scalars
) -> None:
    """Clip all gradients together and update all parameters, or nothing, in two launches.

    ``loss`` is the step's, float64 (1,): an update is refused where it is not finite. ``partials``
    is a float64 array of ``partial_sums``.
    """
    rates, settings, counts, record = scalars
    norm(engine, optimizer, flat, partials, rates, settings, counts)
    sizes = Updating(optimizer)
    engine.launch(
        _spec("update_apply", flat.theta, sizes),
        (len(partials) // 2, 1, 1),
        (sizes.threads, 1, 1),
        (*flat, loss, partials, rates, settings, counts, record),
    )


def norm(
    engine: Engine,
    optimizer: str,
    flat: Flat,
    partials: Array,
    rates: Array,
    settings: Array,
    counts: Array,
) -> None:
    """Add up the squares of all gradients, a part a block: the first half of ``update``."""
    sizes = Updating(optimizer)
    engine.launch(
        _spec("update_norm", flat.theta, sizes),
        (len(partials) // 2, 1, 1),
        (sizes.threads, 1, 1),
        (*flat, rates, settings, counts, partials),
    )


def take_batch(
    engine: Engine,
    text: Array,
    starts: Array,
    factors: Array,
    counts: Array,
    X: Array,
    Y: Array,
    xi: Array,
    stride: int,
) -> None:
    """Fill X and Y (T, n) with the coming batch of a text, and xi (T,) with its factors."""
    T, n = X.shape
    engine.launch(
        _spec("take_batch", xi),
        (-(-X.size // THREADS), 1, 1),
        (THREADS, 1, 1),
        (text, starts, factors, counts, X.reshape(-1), Y.reshape(-1), xi),
        [(T, n, stride)],
    )


def keep_state(engine: Engine, source: Array, target: Array, counts: Array) -> None:
    """Copy a state, unless the update before was refused."""
    engine.launch(
        _spec("keep_state", source),
        (-(-source.size // THREADS), 1, 1),
        (THREADS, 1, 1),
        (source.reshape(-1), target.reshape(-1), counts),
    )


def stop_unless_finite(engine: Engine, numbers: Array, counts: Array) -> None:
    """Let no later step change anything if one of the numbers (N,), float64, is not finite."""
    engine.launch(
        KernelSpec("stop_unless_finite", None, "identity", "float64"),
        (1, 1, 1),
        (THREADS, 1, 1),
        (numbers, counts),
    )


def _spec(kind: Kind, a: Array, sizes: Updating | None = None) -> KernelSpec:
    return KernelSpec(kind, sizes, "identity", dtype_name(a.dtype))
