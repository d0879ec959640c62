"""The resident kernels for every way of sharing out W_hh, at sizes where the emulator is quick."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from cases import Case, draw
from kernel_setup import Array, reference_states
from tolerance import assert_close, assert_same_bits

import gpurnn
from gpurnn import functional as F
from gpurnn import planning
from gpurnn.cuda.engines import EmulatedEngine
from gpurnn.cuda.specs import KernelSpec
from gpurnn.planning import DEVICES
from gpurnn.tile import Tile

TILES = [
    # all in registers; one row and several, more than there are in the last block
    Tile(h=13, rows=1, columns=4, slices=4, depth=4, kept=4),
    Tile(h=13, rows=2, columns=4, slices=4, depth=4, kept=4),
    Tile(h=13, rows=8, columns=4, slices=4, depth=4, kept=4),
    # a part in shared memory; slices that lie wholly beyond h
    Tile(h=13, rows=2, columns=4, slices=4, depth=12, kept=4),
    Tile(h=13, rows=4, columns=8, slices=8, depth=8, kept=4),
    Tile(h=33, rows=2, columns=8, slices=8, depth=8, kept=4),
    # lanes that are left with two and with four columns; no sum over lanes at all
    Tile(h=13, rows=2, columns=8, slices=4, depth=8, kept=8),
    Tile(h=13, rows=2, columns=4, slices=1, depth=16, kept=8),
    # no padding at all
    Tile(h=32, rows=1, columns=4, slices=4, depth=8, kept=8),
    Tile(h=64, rows=2, columns=8, slices=8, depth=8, kept=4),
]
each_tile = pytest.mark.parametrize("tile", TILES, ids=lambda t: "-".join(map(str, t)))


def launch(kind: str, tile: Tile, arrays: Sequence[Array], n: int, dtype: str) -> None:
    engine = EmulatedEngine(DEVICES["H100"], seed=3, check_races=True)
    size = 8 if dtype == "float64" else 4
    engine.launch(
        KernelSpec(kind, tile, "tanh", dtype),  # type: ignore[arg-type]
        (-(-n // tile.rows), 1, 1),
        (tile.threads, 1, 1),
        [a.reshape(-1) if a.ndim == 3 else a for a in arrays],
        [(len(arrays[0]), n)],
        tile.shared_weights * size,
    )


def forward(tile: Tile, case: Case, dtype: str) -> Array:
    d = draw(case, dtype=dtype)
    states = np.full((case.T + 1, case.n, case.h), np.nan, dtype)
    states[0] = d.h_0
    states[1:] = d.X @ d.W_xh
    launch("resident_forward", tile, (states[1:], states, d.W_hh, d.b_h), case.n, dtype)
    return states


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@each_tile
def test_forward(tile: Tile, dtype: str) -> None:
    case = Case("", T=3, n=3, d=2, h=tile.h)
    drawn = draw(case)
    assert_close(
        "H",
        forward(tile, case, dtype),
        reference_states(drawn, np.float64),
        length=case.length,
        baseline=reference_states(drawn, np.float32) if dtype == "float32" else None,
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@each_tile
def test_backward(tile: Tile, dtype: str) -> None:
    case = Case("", T=3, n=3, d=2, h=tile.h)
    d = draw(case, dtype=dtype)
    H = np.ascontiguousarray(reference_states(d, dtype)[1:])
    grads = np.full((case.T + 1, case.n, case.h), np.nan, dtype)
    launch("resident_backward", tile, (d.dH, H, grads, d.W_hh), case.n, dtype)

    dh = np.zeros((case.n, case.h))
    expected = np.empty(grads.shape)
    for t in reversed(range(case.T)):
        expected[t + 1] = (d.dH[t] + dh) * (1 - H[t].astype(float) ** 2)
        dh = expected[t + 1] @ d.W_hh.astype(float).T
    expected[0] = dh
    assert_close("dZ and dh_0", grads, expected, length=case.length)


def test_the_gradient_of_a_sequence_may_overwrite_that_of_its_states() -> None:
    tile, case = TILES[1], Case("", T=3, n=3, d=2, h=13)
    d = draw(case, dtype=np.float32)
    H = np.ascontiguousarray(reference_states(d, np.float32)[1:])
    apart, together = np.empty((2, case.T + 1, case.n, case.h), np.float32)
    launch("resident_backward", tile, (d.dH, H, apart, d.W_hh), case.n, "float32")
    together[1:] = d.dH
    launch("resident_backward", tile, (together[1:], H, together, d.W_hh), case.n, "float32")
    assert_same_bits("dZ and dh_0", together, apart)


@pytest.mark.parametrize(("h", "dtype"), [(13, "float32"), (33, "float64")])
def test_the_rows_of_a_block_and_the_place_of_the_weights_change_no_bit(h: int, dtype: str) -> None:
    case = Case("", T=3, n=5, d=2, h=h)
    tiles = planning.resident_tiles(h, dtype)
    assert len(tiles) > 1
    first = forward(tiles[0], case, dtype)
    for tile in tiles[1:]:
        assert_same_bits(f"{tile}", forward(tile, case, dtype), first)
    deep = tiles[0]._replace(depth=tiles[0].depth + 4)
    half = forward(deep._replace(kept=4), case, dtype)
    assert_same_bits("weights in shared memory", half, forward(deep, case, dtype))


def test_where_rows_are_many_a_block_takes_several() -> None:
    """More rows than multiprocessors and their blocks: then reading W_hh once serves several."""
    one = dataclasses.replace(DEVICES["H100"], multiprocessors=1)
    rows = [
        planning.plan(T=2, n=n, d=2, h=128, device=one).tile.rows  # type: ignore[union-attr]
        for n in (1, 2, 4, 64)
    ]
    assert rows[0] == 1 and rows[-1] == 8 and rows == sorted(rows)
    case = Case("", T=2, n=17, d=2, h=16)
    drawn = draw(case, dtype=np.float32)
    with gpurnn.emulated(one):
        H, residuals = F.rnn_forward(*drawn.arguments())
    assert residuals.plan is not None and residuals.plan.tile is not None
    assert residuals.plan.tile.rows > 1 and case.n % residuals.plan.tile.rows
    truth = reference_states(drawn, np.float64)[1:]
    baseline = reference_states(drawn, np.float32)[1:]
    assert_close("H", H, truth, length=case.length, baseline=baseline)
