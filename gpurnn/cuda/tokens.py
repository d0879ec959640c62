"""Rows by token id on a GPU, or under the emulator: gathered, and their gradients added up."""

from typing import Any

import numpy as np

from gpurnn.cuda.engines import Array, Engine
from gpurnn.cuda.specs import REAL, KernelSpec
from gpurnn.planning import ScatterPlan, dtype_name, scatter_plan
from gpurnn.tile import ADDED_AT_ONCE, WARP

__all__ = ["add_parts", "embedding", "embedding_backward", "gather", "parts_spec", "scatter"]


def embedding(engine: Engine, ids: Array, E: Array) -> Array:
    """Return the rows of E (|V|, d) by ids (…): (…, d)."""
    with engine.here():
        X = engine.xp.empty((*ids.shape, E.shape[1]), E.dtype)
        gather(engine, E, ids, X)
    return X


def embedding_backward(
    engine: Engine, dX: Array, ids: Array, rows: int, out: Array | None = None
) -> Array:
    """Return dE (rows, d): the rows of dX (…, d) added up by id."""
    with engine.here():
        flat = dX.reshape(ids.size, dX.shape[-1])
        return scatter(engine, ids.reshape(-1), flat, rows, out=out)


def gather(engine: Engine, W: Array, ids: Array, out: Array) -> None:
    """out = W[ids], bit for bit: it is all the same to a copy what the bits mean."""
    if out.size:
        if W.itemsize == 2:
            W, out = W.view(np.uint16), out.view(np.uint16)
        engine.xp.take(W, ids, axis=0, out=out)


def scatter(
    engine: Engine,
    ids: Array,
    dZ: Array,
    d: int,
    plan: ScatterPlan | None = None,
    out: Array | None = None,
) -> Array:
    """Return (d, h): the rows of dZ (N, h) added up by their ids (N,), each sum rounded once.

    ``plan`` stands in for what ``planning.scatter_plan`` says, ``out`` is where the result goes.
    """
    (N, h), name, xp = dZ.shape, dtype_name(dZ.dtype), engine.xp
    if out is None:
        out = xp.empty((d, h), dZ.dtype)
    if not dZ.size or not d:
        out.fill(0)
        return out
    plan = plan or scatter_plan(N, d, h, name, engine.limits)
    whole = plan.parts == 1
    sums = out if whole else xp.empty((plan.parts, d, h), REAL[name])
    engine.launch(
        _spec("scatter" if whole else "scatter_parts", plan.tile, name),
        plan.grid,
        (plan.tile.threads, 1, 1),
        (ids, dZ.reshape(-1), sums.reshape(-1)),
        [(N, d, h, plan.ids, plan.rows)],
        plan.shared,
    )
    if not whole:
        add_parts(engine, sums, out)
    return out


def add_parts(engine: Engine, sums: Array, out: Array) -> None:
    """out = Σ of the parts of sums (parts, …), in order, rounded once."""
    engine.launch(
        parts_spec(dtype_name(out.dtype)),
        (-(-out.size // WARP), 1, 1),
        (WARP * ADDED_AT_ONCE, 1, 1),
        (sums.reshape(-1), out.reshape(-1)),
        [(len(sums),)],
    )


def parts_spec(dtype: str) -> KernelSpec:
    """Return the kernel of ``add_parts``."""
    return _spec("scatter_parts_added", None, dtype)


def _spec(kind: Any, sizes: Any, dtype: str) -> KernelSpec:
    return KernelSpec(kind, sizes, "identity", dtype)
