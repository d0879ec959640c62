"""Group kernels launched by hand, with sizes that no plan would choose."""

from typing import Any

import numpy as np
from kernel_setup import Array

from gpurnn import emulator
from gpurnn.cuda.specs import REAL, KernelSpec, build
from gpurnn.emulator import Report
from gpurnn.planning import Limits, Plan, scratch_words
from gpurnn.tile import Share, TensorShare

__all__ = ["EXCHANGES", "SMALL_CARD", "launch", "run_backward", "run_forward"]

EXCHANGES = ("cluster", "flags", "counter")

SMALL_CARD = Limits("a small card", (9, 0), 8, 232_448, 233_472, 1.755)
"""So that groups of any size own several rows of a batch, and a grid has few threads."""


def launch(
    spec: KernelSpec,
    arrays: list[Array],
    T: int,
    n: int,
    *,
    last: tuple[Array, ...] = (),
    row_0: int = 0,
    groups: int | None = None,
    missing: int = 0,
    patience: int = 1 << 20,
    **options: Any,
) -> tuple[Array, Report]:
    """Launch a group kernel on arrays as they are; return the report of its blocks.

    ``missing`` blocks of the last group are left out.
    """
    share = spec.sizes
    assert isinstance(share, Share | TensorShare)
    if groups is None:
        groups = -(-(n - row_0) // share.slice_rows)
    grid = (groups * share.blocks, 1, 1)
    plan = Plan(
        "group", grid, (share.threads, 1, 1), share.shared_bytes, 1, share, (), spec.exchange
    )
    words = np.zeros(scratch_words(plan), np.uint64)
    report = np.zeros(grid[0], np.uint32)
    stored = [a.view(np.uint16) if a.itemsize == 2 else a for a in arrays]
    report_of_emulator = emulator.launch(
        build(spec),
        (grid[0] - missing, 1, 1),
        plan.block,
        (*stored, words, report, *last, T, n, row_0, patience),
        shared=plan.shared,
        cluster=share.blocks if spec.exchange == "cluster" else None,
        **options,
    )
    return report, report_of_emulator


def run_forward(
    share: Share | TensorShare,
    exchange: str,
    drawn: Any,
    activation: Any = "tanh",
    **options: Any,
) -> Array:
    """Return the states (T + 1, n, h), of what started as NaN; Z is X W_xh."""
    T, n = drawn.X.shape[:2]
    dtype = drawn.X.dtype
    h = len(drawn.W_hh)
    states = np.full((T + 1, n, h), np.nan, dtype)
    states[0] = drawn.h_0
    Z = (drawn.X.astype(np.float32) @ drawn.W_xh.astype(np.float32)).astype(dtype)
    spec = KernelSpec("group_forward", share, activation, dtype.name, False, exchange)
    arrays = [Z.reshape(-1), states.reshape(-1), drawn.W_hh, drawn.b_h]
    report, _ = launch(spec, arrays, T, n, **options)
    assert not report.any(), "a block gave up"
    return states


def run_backward(
    share: Share | TensorShare,
    exchange: str,
    drawn: Any,
    states: Array,
    activation: Any = "tanh",
    xi: Array | None = None,
    **options: Any,
) -> Array:
    """Return dh_0 and dZ (T + 1, n, h), of what started as NaN, for states as φ′ wants them."""
    T, n, h = drawn.dH.shape
    dtype = drawn.X.dtype
    grads = np.full((T + 1, n, h), np.nan, dtype)
    scaled = xi is not None
    spec = KernelSpec("group_backward", share, activation, dtype.name, scaled, exchange)
    arrays = [drawn.dH.reshape(-1), states[1:].reshape(-1), grads.reshape(-1), drawn.W_hh]
    last = () if xi is None else (xi.astype(REAL[dtype.name]),)
    report, _ = launch(spec, arrays, T, n, last=last, **options)
    assert not report.any(), "a block gave up"
    return grads
