"""The operations of ``gpurnn.functional`` on kernels: allocate, plan, launch.

Arguments have passed ``gpurnn.validate``: C-contiguous arrays of one dtype, in one place, ids in
range. What a kernel writes is allocated here; nothing of the caller's is written. Everything is
queued on the current stream, and nothing waits for it. Every sum has one order: the same arguments
give the same bits each time.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from gpurnn import planning, segments
from gpurnn.activation import Activation, AnyActivation
from gpurnn.cuda import gemm, reports, tokens
from gpurnn.cuda.engines import Array, Engine
from gpurnn.cuda.specs import REAL, KernelSpec, Kind
from gpurnn.planning import SIDE, Group, Plan, dtype_name, scratch_words
from gpurnn.reference import rows_of
from gpurnn.tile import WARP, Columns, Share, TensorShare

__all__ = [
    "hidden_layer",
    "hidden_layer_backward",
    "linear",
    "linear_backward",
    "rnn_backward",
    "rnn_backward_by_segments",
    "rnn_forward",
    "specs_of_sum",
]

Outs = Sequence[Array | None]
"""Arrays that results are written to; None for a new one."""

POINTWISE_THREADS = 256
FEW_ROWS = 64  # that a warp adds up, column by column
WARPS_OF_SUM = 8
ROWS_OF_PART = 256  # that a block of so many adds up, at least
MOST_PARTS = 1024
LARGEST_KEPT = 1 << 20  # zeros of an array that is kept for the next call


def rnn_forward(
    engine: Engine,
    kernel: str | Group | None,
    X: Array,
    h_0: Array | None,
    W_xh: Array,
    W_hh: Array,
    b_h: Array | None,
    activation: AnyActivation,
    precision: str = "ieee",
) -> tuple[Array, Array | None, Plan]:
    """H_t = φ(X_t W_xh + b_h + H_{t-1} W_hh) (9.4.5): one GEMM, then the recurrence.

    Where X are ids there is no product: the recurrence fetches rows of W_xh.

    Returns the states with h_0 before them (T + 1, n, h), the pre-activations (T, n, h) where φ′ is
    a function of them, and the plan, which the backward pass follows as well.
    """
    (T, n), (d, h), dtype = X.shape[:2], W_xh.shape, W_hh.dtype
    plan = planning.plan(
        T=T,
        n=n,
        d=d,
        h=h,
        dtype=dtype_name(dtype),
        device=engine.limits,
        kernel=kernel,
        precision=precision,
    )
    return *_rnn_states(engine, plan, X, h_0, W_xh, W_hh, b_h, activation), plan


def _rnn_states(
    engine: Engine,
    plan: Plan,
    X: Array,
    h_0: Array | None,
    W_xh: Array,
    W_hh: Array,
    b_h: Array | None,
    activation: AnyActivation,
) -> tuple[Array, Array | None]:
    xp, dtype = engine.xp, W_hh.dtype
    (T, n), h = X.shape[:2], len(W_hh)
    with engine.here():
        states = xp.empty((T + 1, n, h), dtype)
        if h_0 is None:
            states[0].fill(0)
        else:
            states[0] = h_0
        Z = None if activation.of_output else xp.empty((T, n, h), dtype)
        if T and n:
            b = _kept_zeros(engine, h, dtype) if b_h is None else b_h
            target = states[1:] if Z is None else Z
            if plan.kernel == "concatenated":
                spec = _spec("step_concatenated", SIDE, activation, dtype)
                arrays = (X, target, states, W_xh, W_hh, b)
                engine.launch(spec, plan.grid, plan.block, arrays, ((t,) for t in range(T)))
            elif X.ndim == 2:
                _recurrence(engine, plan, target, states, W_hh, b, activation, (X, W_xh))
            else:
                engine.product(X.reshape(T * n, len(W_xh)), W_xh, target.reshape(T * n, h))
                _recurrence(engine, plan, target, states, W_hh, b, activation)
    return states, Z


def _recurrence(
    engine: Engine,
    plan: Plan,
    Z: Array,
    states: Array,
    W_hh: Array,
    b_h: Array,
    activation: AnyActivation,
    by_id: tuple[Array, Array] | None = None,
) -> None:
    """Do all steps; ``by_id`` are X (T, n) and W_xh, whose rows come in place of those of Z."""
    T, n, _ = Z.shape
    ids = [] if by_id is None else [a.reshape(-1) for a in by_id]
    flat = [*ids, Z.reshape(-1), states.reshape(-1), W_hh, b_h]
    dtype, takes_ids = W_hh.dtype, by_id is not None
    if plan.kernel == "resident":
        spec = _spec("resident_forward", plan.tile, activation, dtype, by_id=takes_ids)
        engine.launch(spec, plan.grid, plan.block, flat, [(T, n)], plan.shared)
        return
    if plan.kernel == "group":
        spec = _spec(
            "group_forward",
            plan.tile,
            activation,
            dtype,
            exchange=plan.exchange,
            by_id=takes_ids,
        )
        _launch_groups(engine, plan, spec, flat, (), T, n)
        return
    if plan.kernel == "gemm":
        spec = _spec("tail_forward", None, activation, dtype)
        keeps_z = not activation.of_output
        gemm.forward(engine, plan, spec, Z, states, W_hh, b_h, keeps_z=keeps_z, by_id=by_id)
        return
    spec = _spec("step_forward", SIDE, activation, dtype, by_id=takes_ids)
    arrays = (*ids, Z, states, W_hh, b_h)
    engine.launch(spec, plan.grid, plan.block, arrays, ((t,) for t in range(T)))


def _launch_groups(
    engine: Engine,
    plan: Plan,
    spec: KernelSpec,
    arrays: Sequence[Array],
    last: Sequence[Array],
    T: int,
    n: int,
) -> None:
    """Launch a group kernel, several times where the grid does not own all rows of the batch.

    ``last`` are the arrays behind the scratch and the report.
    """
    assert isinstance(plan.tile, Share | TensorShare)
    engine.check_reports()
    rows = plan.grid[0] // plan.tile.blocks * plan.tile.slice_rows
    starts = range(0, n, rows)
    shape = len(starts), scratch_words(plan)
    if plan.cooperative:
        words = engine.scratch(shape)
    else:  # no one looks at them: not worth a launch that clears them
        words = _kept_zeros(engine, math.prod(shape), np.uint64).reshape(shape)
    report = engine.report(plan.grid[0])
    for i, row_0 in enumerate(starts):
        engine.launch(
            spec,
            plan.grid,
            plan.block,
            (*arrays, words[i], report, *last),
            [(T, n, row_0, reports.PATIENCE)],
            plan.shared,
            cluster=plan.cluster,
            cooperative=plan.cooperative,
        )


def rnn_backward(
    engine: Engine,
    plan: Plan,
    dH: Array,
    X: Array,
    states: Array,
    Z: Array | None,
    W_xh: Array,
    W_hh: Array,
    activation: AnyActivation,
    xi: Array | None,
    out: Outs = (None, None, None),
) -> tuple[Array | None, Array, Array, Array, Array]:
    """Return dX (None for ids), dh_0, dW_xh, dW_hh, db_h (9.7.2).

    ``out`` is where the last three go.
    """
    xp, dtype = engine.xp, states.dtype
    (T, n, h), d = dH.shape, len(W_xh)
    by_id = X.ndim == 2
    with engine.here():
        if T == 0 or n == 0:
            dX = None if by_id else xp.zeros(X.shape, dtype)
            dW_xh, dW_hh, db_h = _zeros(engine, ((d, h), (h, h), (h,)), dtype, out)
            return dX, xp.zeros((n, h), dtype), dW_xh, dW_hh, db_h
        grads = xp.empty((T + 1, n, h), dtype)
        A = states[1:] if Z is None else Z
        weights = [W_hh]
        if xi is not None:
            weights.append(xi.astype(REAL[dtype_name(dtype)], copy=False))
        scaled = xi is not None
        if plan.kernel == "resident":
            spec = _spec("resident_backward", plan.tile, activation, dtype, scaled=scaled)
            flat = [dH.reshape(-1), A.reshape(-1), grads.reshape(-1), *weights]
            engine.launch(spec, plan.grid, plan.block, flat, [(T, n)], plan.shared)
        elif plan.kernel == "group":
            spec = _spec(
                "group_backward",
                plan.tile,
                activation,
                dtype,
                scaled=scaled,
                exchange=plan.exchange,
            )
            flat = [dH.reshape(-1), A.reshape(-1), grads.reshape(-1), W_hh]
            _launch_groups(engine, plan, spec, flat, weights[1:], T, n)
        elif plan.kernel == "gemm":
            _times_slope(engine, dH[-1], A[-1], grads[T], activation)
            spec = _spec("tail_backward", None, activation, dtype, scaled=scaled)
            gemm.backward(engine, plan, spec, dH, A, grads, *weights)
        else:
            arrays = [dH, A, grads, *weights]
            spec = _spec("step_backward", SIDE, activation, dtype, scaled=scaled)
            engine.launch(spec, plan.grid, plan.block, arrays, ((i,) for i in range(T, -1, -1)))
        dZ = grads[1:].reshape(T * n, h)
        dW_hh = _product(engine, states[:-1].reshape(T * n, h).T, dZ, out[1])
        if by_id:
            dW_xh = tokens.scatter(engine, X.reshape(-1), dZ, d, out=out[0])
            # Each row of dZ is in one of its rows; but those of half types are rounded.
            summed = dZ if dtype.itemsize == 2 or d > T * n else dW_xh
            db_h = _sum_rows(engine, summed, out[2])
            return None, grads[0], dW_xh, dW_hh, db_h
        dW_xh = _product(engine, X.reshape(T * n, d).T, dZ, out[0])
        dX = _product(engine, dZ, W_xh.T).reshape(X.shape)
        return dX, grads[0], dW_xh, dW_hh, _sum_rows(engine, dZ, out[2])


def rnn_backward_by_segments(
    engine: Engine,
    plan: Plan,
    every: int,
    dH: Array,
    X: Array,
    checkpoints: Array,
    W_xh: Array,
    W_hh: Array,
    b_h: Array | None,
    activation: AnyActivation,
    xi: Array | None,
) -> segments.Gradients:
    """Return what ``rnn_backward`` does, from the ``segments.checkpoints`` of the states.

    Each segment follows the plan of the whole sequence, forward and backward.
    """

    def forward_pass(X: Array, h_0: Array) -> tuple[Array, Array | None]:
        return _rnn_states(engine, plan, X, h_0, W_xh, W_hh, b_h, activation)

    def backward_pass(
        dH: Array, X: Array, states: Array, Z: Array | None, xi: Array | None
    ) -> segments.Gradients:
        return rnn_backward(engine, plan, dH, X, states, Z, W_xh, W_hh, activation, xi)

    with engine.here():
        dX = None if X.ndim == 2 else engine.xp.empty(X.shape, dH.dtype)
        return segments.backward(dH, X, checkpoints, every, xi, forward_pass, backward_pass, dX)


def hidden_layer(
    engine: Engine, X: Array, W_xh: Array, b_h: Array | None, activation: AnyActivation
) -> tuple[Array, Array | None]:
    """Return H = φ(X W_xh + b_h) (9.4.3), and the pre-activations where φ′ wants them."""
    xp, dtype = engine.xp, W_xh.dtype
    h = W_xh.shape[1]
    with engine.here():
        rows = rows_of(X)
        H = xp.empty((*X.shape[:-1], h), dtype)
        Z = None if activation.of_output else xp.empty_like(H)
        flat = H.reshape(len(rows), h)
        b = _kept_zeros(engine, h, dtype) if b_h is None else b_h
        if len(rows):
            engine.launch(
                _spec("layer_forward", SIDE, activation, dtype),
                planning.tiled_grid(len(rows), h),
                (SIDE, SIDE, 1),
                (rows, flat if Z is None else Z.reshape(len(rows), h), flat, W_xh, b),
            )
    return H, Z


def hidden_layer_backward(
    engine: Engine,
    dH: Array,
    X: Array,
    H: Array,
    Z: Array | None,
    W_xh: Array,
    activation: AnyActivation,
) -> tuple[Array, Array, Array]:
    """Return dX, dW_xh, db_h."""
    with engine.here():
        dZ = engine.xp.empty_like(H)
        if H.size:
            _times_slope(engine, dH, H if Z is None else Z, dZ, activation)
        return linear_backward(engine, dZ, X, W_xh)


def _times_slope(engine: Engine, dH: Array, A: Array, dZ: Array, activation: AnyActivation) -> None:
    """dZ = dH φ′, of arrays of any one shape."""
    engine.launch(
        _spec("layer_backward", None, activation, dZ.dtype),
        (-(-dZ.size // POINTWISE_THREADS), 1, 1),
        (POINTWISE_THREADS, 1, 1),
        (dH.reshape(-1), A.reshape(-1), dZ.reshape(-1)),
    )


def linear(
    engine: Engine, H: Array, W_hq: Array, b_q: Array | None, out: Array | None = None
) -> Array:
    """O = H W_hq + b_q (9.4.6); ``out`` is where it goes."""
    q = W_hq.shape[1]
    with engine.here():
        O = engine.xp.empty((*H.shape[:-1], q), W_hq.dtype) if out is None else out
        if O.size:
            engine.product(rows_of(H), W_hq, rows_of(O))
        if b_q is not None:
            O += b_q
    return O


def linear_backward(
    engine: Engine, dO: Array, H: Array, W_hq: Array, out: Outs = (None, None)
) -> tuple[Array, Array, Array]:
    """Return dH (like H), dW_hq (h, q), db_q (q,); ``out`` is where the last two go."""
    q, xp = W_hq.shape[1], engine.xp
    with engine.here():
        if not dO.size:
            dW_hq, db_q = _zeros(engine, (W_hq.shape, (q,)), W_hq.dtype, out)
            return xp.zeros(H.shape, H.dtype), dW_hq, db_q
        rows = rows_of(dO)
        dH = _product(engine, rows, W_hq.T).reshape(H.shape)
        dW_hq = _product(engine, rows_of(H).T, rows, out[0])
        return dH, dW_hq, _sum_rows(engine, rows, out[1])


def _zeros(
    engine: Engine, shapes: Sequence[tuple[int, ...]], dtype: Any, out: Outs
) -> Iterator[Array]:
    for shape, a in zip(shapes, out, strict=True):
        if a is None:
            yield engine.xp.zeros(shape, dtype)
        else:
            a.fill(0)
            yield a


def _spec(
    kind: Kind,
    sizes: Any,
    activation: AnyActivation,
    dtype: Any,
    *,
    scaled: bool = False,
    exchange: str | None = None,
    by_id: bool = False,
) -> KernelSpec:
    key = activation if isinstance(activation, Activation) else activation.name
    return KernelSpec(kind, sizes, key, dtype_name(dtype), scaled, exchange, by_id)


def _product(engine: Engine, A: Array, B: Array, out: Array | None = None) -> Array:
    if out is None:
        out = engine.xp.empty((A.shape[0], B.shape[1]), B.dtype)
    engine.product(A, B, out)
    return out


def _sum_rows(engine: Engine, A: Array, out: Array | None = None) -> Array:
    """Sum the rows, at least one of at least one number, in a fixed order."""
    (N, q), xp = A.shape, engine.xp
    if out is None:
        out = xp.empty(q, A.dtype)
    parts = _parts_of_sum(N)
    sums = out if parts == 1 else xp.empty((parts, q), REAL[dtype_name(A.dtype)])
    spec, *_ = specs_of_sum(N, dtype_name(A.dtype))
    engine.launch(
        spec,
        (-(-q // WARP), parts, 1),
        (spec.threads, 1, 1),
        (A.reshape(-1), sums.reshape(-1)),
        [(N, q, -(-N // parts))],
    )
    if parts > 1:
        tokens.add_parts(engine, sums, out)
    return out


def _parts_of_sum(N: int) -> int:
    return max(1, min(N // ROWS_OF_PART, MOST_PARTS))


def specs_of_sum(N: int, dtype: str) -> list[KernelSpec]:
    """Return the kernels that add up the columns of N rows, a bias's gradient."""
    sizes = Columns(1 if N <= FEW_ROWS else WARPS_OF_SUM)
    if _parts_of_sum(N) == 1:
        return [KernelSpec("column_sums", sizes, "identity", dtype)]
    return [KernelSpec("column_parts", sizes, "identity", dtype), tokens.parts_spec(dtype)]


def _kept_zeros(engine: Engine, size: int, dtype: Any) -> Array:
    """Return ``size`` zeros that no one writes to, from any stream."""
    if size > LARGEST_KEPT:
        return engine.xp.zeros(size, dtype)
    return _kept(engine, 1 << (size - 1).bit_length(), dtype)[:size]


@cache
def _kept(engine: Engine, size: int, dtype: Any) -> Array:
    with engine.here(), engine.lasting():
        made = engine.xp.zeros(size, dtype)
        engine.settle()
    return made
