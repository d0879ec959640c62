"""The kernel "gemm": in each step a product by cuBLAS, and a kernel for what follows it.

A step is two launches, and for all but large shapes it takes no longer than they do. So up to
``plan.chunk`` steps are captured as a CUDA graph (``gpurnn.cuda.graphs``). Such a graph has in it
the addresses of its arrays, and which step does what. To have none of the caller's, it works on
arrays of its own: a chunk of steps is copied into them, done there and copied out. The price is
bandwidth, each number of a step read and written two or three times more, and a few copies a chunk.
Kernels that look addresses and step up in memory would copy nothing; but cuBLAS cannot, and the
emulator, which checks bounds and races by arrays, would see no more than numbers.

T is cut into chunks of ``plan.chunk`` and of smaller powers of two, each of which is a graph of its
own: no step is computed that is not wanted, nothing is read that was not written in this call, and
every T makes do with the same few graphs.

Where the current stream is being captured already, by the caller, the same steps go into that
capture, on the caller's arrays, as they do where a step is too large for a graph. There, where X
are ids, the kernel fetches the rows of W_xh that they pick; a graph's own arrays get them gathered,
in place of a copy.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from gpurnn.cuda import tokens
from gpurnn.cuda.engines import Array, Engine
from gpurnn.cuda.specs import REAL, KernelSpec
from gpurnn.planning import Plan, dtype_name

__all__ = ["backward", "chunks", "forward"]


class _Forward(NamedTuple):
    """What steps of the forward pass work on: the caller's arrays, or a graph's of K steps."""

    Z: Array  # (K, n, h)
    states: Array  # (K + 1, n, h)
    W_hh: Array
    b_h: Array
    P: Array  # (n, h), each step's product
    workspace: Array | None


class _Backward(NamedTuple):
    """The same of the backward pass; what a graph has in front of step 1 is not used."""

    dH: Array  # (K, n, h)
    A: Array  # (K, n, h)
    grads: Array  # (K + 1, n, h), a graph's (K + 2, n, h)
    W_hh: Array
    xi: Array | None  # (K,), a graph's (K + 1,)
    P: Array
    workspace: Array | None


def forward(
    engine: Engine,
    plan: Plan,
    spec: KernelSpec,
    Z: Array,
    states: Array,
    W_hh: Array,
    b_h: Array,
    *,
    keeps_z: bool,
    by_id: tuple[Array, Array] | None = None,
) -> None:
    """Do all steps of ``tail.forward``, with H_{t-1} W_hh for P.

    Z (T, n, h), states (T + 1, n, h), W_hh (h, h) and b_h (h,) are as there; T and n are at least
    1, states[0] is written. ``keeps_z``: Z is to be overwritten with the pre-activations.
    ``by_id``: X (T, n) and W_xh, whose rows by id come in place of those of Z.
    """
    T, n, h = Z.shape
    xp, dtype = engine.xp, W_hh.dtype

    def product_in() -> Array:
        return xp.empty((n, h), REAL[dtype_name(dtype)])

    def run(on: _Forward, steps: int, kernel: KernelSpec = spec, *ids: Array) -> None:
        arrays = (*ids, on.P, on.Z, on.states, on.b_h)
        for t in range(steps):
            engine.step_product(on.states[t], on.W_hh, on.P, on.workspace, plan.precision)
            engine.launch(kernel, plan.grid, plan.block, arrays, [(t,)])

    if not plan.chunk or engine.capturing():
        given = _Forward(Z, states, W_hh, b_h, product_in(), engine.workspace())
        if by_id is None:
            run(given, T)
        else:
            run(given, T, replace(spec, by_id=True), *(a.reshape(-1) for a in by_id))
        return

    def make() -> _Forward:
        own_Z, own_states = (xp.empty((plan.chunk + more, n, h), dtype) for more in (0, 1))
        weights = xp.empty_like(W_hh), xp.empty(h, dtype)
        return _Forward(own_Z, own_states, *weights, product_in(), engine.workspace())

    with engine.replayed(spec, (n, h, plan.chunk, plan.precision), make, run) as (own, play):
        own.W_hh[...] = W_hh
        own.b_h[...] = b_h
        for t, steps in chunks(T, plan.chunk):
            own.states[0] = states[t]
            if by_id is None:
                own.Z[:steps] = Z[t : t + steps]
            else:
                X, W_xh = by_id
                tokens.gather(engine, W_xh, X[t : t + steps], own.Z[:steps])
            play(steps)
            states[t + 1 : t + steps + 1] = own.states[1 : steps + 1]
            if keeps_z:
                Z[t : t + steps] = own.Z[:steps]


def backward(
    engine: Engine,
    plan: Plan,
    spec: KernelSpec,
    dH: Array,
    A: Array,
    grads: Array,
    W_hh: Array,
    xi: Array | None = None,
) -> None:
    """Do all steps of ``tail.backward``, from i = T − 1 down to 0, with dZ_i W_hhᵀ for P.

    dH and A (T, n, h), grads (T + 1, n, h), W_hh (h, h) and xi (T,) are as there; T and n are at
    least 1, grads[T] is written.
    """
    T, n, h = dH.shape
    xp, dtype = engine.xp, W_hh.dtype
    last, real = T - 1, REAL[dtype_name(dtype)]

    def step(on: _Backward, i: int) -> None:
        engine.step_product(on.grads[i + 1], on.W_hh.T, on.P, on.workspace, plan.precision)
        arrays = [on.P, on.dH, on.A, on.grads]
        if on.xi is not None:
            arrays.append(on.xi)
        engine.launch(spec, plan.grid, plan.block, arrays, [(i,)])

    def run(on: _Backward, steps: int) -> None:
        for i in range(steps, 0, -1):
            step(on, i)

    def given(P: Array, workspace: Array | None) -> _Backward:
        return _Backward(dH, A, grads, W_hh, xi, P, workspace)

    if not plan.chunk or engine.capturing():
        whole = given(xp.empty((n, h), real), engine.workspace())
        run(whole, last)
        step(whole, 0)
        return

    def make() -> _Backward:
        each = (xp.empty((plan.chunk + more, n, h), dtype) for more in (0, 0, 2))
        own_dH, own_A, own_grads = each
        factors = None if xi is None else xp.empty(plan.chunk + 1, real)
        weights, P = xp.empty_like(W_hh), xp.empty((n, h), real)
        return _Backward(own_dH, own_A, own_grads, weights, factors, P, engine.workspace())

    with engine.replayed(spec, (n, h, plan.chunk, plan.precision), make, run) as (own, play):
        own.W_hh[...] = W_hh
        for begun, steps in chunks(last, plan.chunk):
            i = last - begun - steps + 1  # of the last step of the chunk, the graph's step 1
            own.grads[steps + 1] = grads[i + steps]
            own.dH[:steps] = dH[i - 1 : i - 1 + steps]
            own.A[:steps] = A[i - 1 : i - 1 + steps]
            if xi is not None:
                own.xi[1 : steps + 1] = xi[i : i + steps]
            play(steps)
            grads[i : i + steps] = own.grads[1 : steps + 1]
        step(given(own.P, own.workspace), 0)


def chunks(steps: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut so many steps into chunks of ``most`` and of smaller powers of two: (start, steps).

    ``most`` is a power of two.
    """
    start = 0
    while start < steps:
        chunk = min(most, 1 << (steps - start).bit_length() - 1)
        yield start, chunk
        start += chunk
