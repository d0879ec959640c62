"""The group kernel on tensor cores under the emulator, races looked for, against float64."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import SMALL, Case, Draw, draw
from group_setup import EXCHANGES, SMALL_CARD, run_backward, run_forward
from kernel_setup import Array, exact, reference_states, results
from tolerance import assert_same_bits

import gpurnn
from gpurnn import functional as F
from gpurnn import planning
from gpurnn.emulator import RaceError
from gpurnn.planning import Group
from gpurnn.tile import TensorShare

ODD = next(case for case in SMALL if case.name == "odd")

DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "tf32": np.float32,
}
# Of what is multiplied: with TF32 numbers are stored as float32, and rounded to 10 bits.
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "tf32": 2.0**-11}

each_kind = pytest.mark.parametrize("kind", DTYPES)

XI = np.array([1.5, 0.5, 2], np.float32)


def share_of(
    kind: str, h: int, blocks: int, tiles: int = 1, passes: int = 1, slices: int = 4
) -> TensorShare:
    warps = -(-h // (16 * blocks)) * slices
    return TensorShare(h, blocks, tiles, passes, slices, warps, kind)


def drawn_for(kind: str, h: int, n: int, seed: int = 0) -> Draw:
    return draw(Case("", T=3, n=n, d=2, h=h), seed).astype(DTYPES[kind])


def exact_grads(drawn: Draw, H: Array, xi: Array) -> Array:
    """dh_0 and dZ (T + 1, n, h) for tanh, in float64, of the states H (T, n, h)."""
    wide = drawn.astype(np.float64)
    grads = np.zeros((len(H) + 1, *H.shape[1:]))
    flows = np.zeros(H.shape[1:])
    for t in reversed(range(len(H))):
        grads[t + 1] = (1 - H[t].astype(np.float64) ** 2) * (wide.dH[t] + flows)
        flows = xi[t] * (grads[t + 1] @ wide.W_hh.T)
    grads[0] = flows
    return grads


def assert_near(name: str, found: Array, truth: Array, kind: str) -> None:
    """Each number is rounded once or twice on its way, and nothing in between.

    A state's rounding goes through W_hh and φ′ at every step, and fades.
    """
    error = np.abs(found.astype(np.float64) - truth).max()
    limit = 4 * UNIT[kind] * np.abs(truth).max()
    assert error <= limit, f"{name}: {error:.3g} beyond {limit:.3g}"  # so written, NaN fails


def bits(a: Array) -> Array:
    return a.view(np.uint16) if a.itemsize == 2 else a


# h, blocks, tiles, passes, rows
SHARES = {
    "one-tile": (8, 2, 1, 1, 3),
    "several-passes": (13, 2, 1, 2, 9),
    "several-tiles": (13, 4, 2, 1, 5),
    "a-block-without-columns": (33, 4, 1, 1, 2),
    "tiles-and-passes": (33, 2, 2, 2, 17),
}

# The emulator is slow: what is left to the slow tests is like what is not.
QUICK = (
    ("float16", "flags", "one-tile"),
    ("float16", "cluster", "several-passes"),
    ("float16", "counter", "a-block-without-columns"),
    ("bfloat16", "counter", "one-tile"),
    ("bfloat16", "flags", "several-tiles"),
    ("tf32", "cluster", "one-tile"),
    ("tf32", "counter", "several-passes"),
    ("tf32", "cluster", "several-tiles"),
    ("tf32", "flags", "a-block-without-columns"),
)
WAYS = [
    pytest.param(*way, marks=[] if way in QUICK else pytest.mark.slow)
    for way in product(DTYPES, EXCHANGES, SHARES)
]


@pytest.mark.parametrize(("kind", "exchange", "name"), WAYS)
def test_every_way_of_sharing_out(kind: str, exchange: str, name: str) -> None:
    h, blocks, tiles, passes, n = SHARES[name]
    share = share_of(kind, h, blocks, tiles, passes)
    drawn = drawn_for(kind, h, n, seed=h + tiles)
    states = run_forward(share, exchange, drawn, seed=n)
    assert states.dtype == DTYPES[kind]
    assert_near("states", states, reference_states(drawn, np.float64), kind)
    grads = run_backward(share, exchange, drawn, states, xi=XI, seed=n + 1)
    assert_near("grads", grads, exact_grads(drawn, states[1:], XI), kind)


@pytest.mark.parametrize(
    "kind", ["float16", *(pytest.param(k, marks=pytest.mark.slow) for k in ("bfloat16", "tf32"))]
)
def test_neither_blocks_nor_exchange_nor_schedule_changes_a_bit(kind: str) -> None:
    drawn = drawn_for(kind, 20, 3)
    plain = share_of(kind, 20, 2)
    states = run_forward(plain, "counter", drawn)
    grads = run_backward(plain, "counter", drawn, states)
    for seed, (exchange, blocks, tiles, passes) in enumerate(
        [("flags", 3, 1, 1), ("cluster", 2, 2, 1), ("flags", 2, 1, 2)]
    ):
        share = share_of(kind, 20, blocks, tiles, passes)
        again = run_forward(share, exchange, drawn, seed=seed)
        assert_same_bits(f"states of {share}", bits(again), bits(states))
        again = run_backward(share, exchange, drawn, states, seed=seed)
        assert_same_bits(f"grads of {share}", bits(again), bits(grads))


@pytest.mark.parametrize("tiles", [1, 2])
def test_eight_warps_that_share_the_rows(tiles: int) -> None:
    """As for large h of TF32; with one tile half of them end with copies of the others' sums."""
    share = share_of("tf32", 13, 2, tiles, slices=8)
    assert (share.finished, share.own) == ((4, 1), (8, 1))[tiles - 1]
    drawn = drawn_for("tf32", 13, 6)
    states = run_forward(share, "flags", drawn, seed=1)
    assert_near("states", states, reference_states(drawn, np.float64), "tf32")
    grads = run_backward(share, "cluster", drawn, states, xi=XI)
    assert_near("grads", grads, exact_grads(drawn, states[1:], XI), "tf32")


def test_a_row_does_not_depend_on_the_others() -> None:
    """Neither on what they hold, nor on how many there are; missing ones are zeros."""
    share = share_of("float16", 13, 2)
    drawn = drawn_for("float16", 13, 4)
    whole = run_forward(share, "flags", drawn)
    drawn.h_0[1:], drawn.X[:, 1:] = np.nan, np.inf
    with np.errstate(all="ignore"):
        other = run_forward(share, "flags", drawn)
    assert_same_bits("row 0 beside others", bits(other[:, 0]), bits(whole[:, 0]))
    part = run_forward(share, "counter", drawn_for("float16", 13, 4), row_0=2, groups=1)
    assert_same_bits("rows of the launch", bits(part[:, 2:]), bits(whole[:, 2:]))
    assert np.isnan(part[1:, :2]).all()


def test_what_is_multiplied_is_rounded_and_what_is_stored_is_not() -> None:
    """Of TF32: states keep all of their float32; one step on they count as rounded."""
    share = share_of("tf32", 8, 2)
    drawn = drawn_for("tf32", 8, 1)
    drawn.X[:], drawn.b_h[:] = 0, 0
    drawn.h_0[:] = 1 + 2.0**-11  # halfway: away from zero
    drawn.W_hh[:] = np.eye(8)
    states = run_forward(share, "flags", drawn, "identity")
    np.testing.assert_array_equal(states[1:], np.full((3, 1, 8), 1 + 2.0**-10))
    drawn.W_hh[:] = np.eye(8) * (1 + 2.0**-11)
    drawn.h_0[:] = 1
    states = run_forward(share, "flags", drawn, "identity")
    np.testing.assert_array_equal(states[1], np.full((1, 8), 1 + 2.0**-10))
    # (1 + 2⁻¹⁰)² is stored whole, and rounded to 1 + 2⁻⁹ before the next step
    np.testing.assert_array_equal(states[2], np.full((1, 8), (1 + 2.0**-10) ** 2))
    np.testing.assert_array_equal(states[3], np.full((1, 8), (1 + 2.0**-9) * (1 + 2.0**-10)))


def test_the_barrier_before_scratch_is_written_again_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gpurnn.kernels import tensor

    made = tensor._finish

    def hasty(share: TensorShare) -> Any:
        sizes = ("tiles", "own", "slices", "finished", "itemsize", "shared_values")
        return made(SimpleNamespace(passes=1, **{name: getattr(share, name) for name in sizes}))

    monkeypatch.setattr(tensor, "_finish", hasty)
    own = gpurnn.Activation(lambda z: 0.5 * z, lambda h: 0.5, of_output=True)  # built anew
    with pytest.raises(RaceError):
        run_forward(share_of("tf32", 8, 2, passes=2), "flags", drawn_for("tf32", 8, 9), own)


# ---------------------------------------------------------------------------------------
# As the library runs it
# ---------------------------------------------------------------------------------------


def assert_as_exact(drawn: Draw, kind: str, group: Any, **options: Any) -> None:
    precision = "tf32" if kind == "tf32" else "ieee"
    xi, variant = options.pop("xi", None), options
    with gpurnn.emulated(SMALL_CARD, seed=1):
        H, residuals = F.rnn_forward(*drawn.arguments(**variant), kernel=group, precision=precision)
        found = dict(
            zip(
                ("H", "dX", "dh_0", "dW_xh", "dW_hh", "db_h"),
                (H, *F.rnn_backward(drawn.dH, residuals, xi=xi)),
                strict=True,
            )
        )
    assert residuals.plan is not None
    assert isinstance(residuals.plan.tile, TensorShare)
    assert residuals.plan.tile.kind == kind
    truth = exact(drawn, xi=xi, **variant)
    for name, a in truth.items():
        assert found[name].dtype == DTYPES[kind]
        assert_near(f"{group} {name}", found[name], a, kind)


@pytest.mark.parametrize(
    ("kind", "exchange"),
    [
        pytest.param(kind, exchange, marks=[] if k == (e + 1) % 3 else pytest.mark.slow)
        for k, kind in enumerate(DTYPES)
        for e, exchange in enumerate(EXCHANGES)
    ],
)
def test_a_sequence_and_its_gradients(kind: str, exchange: str) -> None:
    drawn = draw(ODD, seed=3).astype(DTYPES[kind])
    assert_as_exact(drawn, kind, Group(2, exchange))


@each_kind
def test_ids_and_truncated_gradients(kind: str) -> None:
    drawn = draw(ODD).astype(DTYPES[kind])
    xi = np.array([2, 0, 1, 0.5, 1.5], DTYPES[kind])
    assert_as_exact(drawn, kind, Group(2, "flags"), by_id=True, xi=xi)


@each_kind
def test_group_by_name(kind: str) -> None:
    drawn = draw(Case("", T=3, n=5, d=4, h=13), seed=1).astype(DTYPES[kind])
    assert_as_exact(drawn, kind, "group", h_0=False, bias=False)


@pytest.mark.parametrize("n", [0, 2])
def test_nothing_to_launch(n: int) -> None:
    drawn = draw(Case("", T=3 if n == 0 else 0, n=n, d=2, h=5), dtype=np.float32)
    with gpurnn.emulated(SMALL_CARD):
        H, residuals = F.rnn_forward(*drawn.arguments(), kernel="group", precision="tf32")
        found = F.rnn_backward(drawn.dH, residuals)
    assert H.shape == drawn.dH.shape
    for a, b in zip(found, list(results(drawn).values())[1:], strict=True):
        assert_same_bits("gradient", a, b.astype(np.float32))


OLD = planning.Limits("a T4", (7, 5), 40, 65_536, 65_536, 1.59, threads_per_multiprocessor=1_024)
H100 = planning.DEVICES["H100"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dtype": "float64"},
            "precision is 'tf32' and dtype float64: expected dtype float32, or 'ieee'",
        ),
        (
            {"dtype": "float16"},
            "precision is 'tf32' and dtype float16: expected dtype float32, or 'ieee'",
        ),
        (
            {"device": OLD},
            "precision is 'tf32' and a T4 has compute capability 7.5: expected 8.0 or higher, or "
            "'ieee'",
        ),
        (
            {"kernel": "resident"},
            "precision is 'tf32' and kernel 'resident', which multiplies as IEEE float32 does: "
            "expected kernel 'group' or 'gemm', or 'ieee'",
        ),
        (
            {"kernel": "step"},
            "precision is 'tf32' and kernel 'step', which multiplies as IEEE float32 does: "
            "expected kernel 'group' or 'gemm', or 'ieee'",
        ),
    ],
)
def test_where_there_is_no_tf32(change: dict[str, Any], message: str) -> None:
    wish = {"T": 3, "n": 2, "d": 1, "h": 5, "device": H100, "precision": "tf32", **change}
    with pytest.raises(ValueError) as e:
        planning.plan(**wish)
    assert str(e.value) == message


@pytest.mark.parametrize("kernel", ["resident", "step"])
def test_tf32_asked_of_a_kernel_without_it(kernel: str) -> None:
    drawn = draw(ODD, dtype=np.float32)
    with gpurnn.emulated(), pytest.raises(ValueError, match=f"'tf32' and kernel '{kernel}'"):
        F.rnn_forward(*drawn.arguments(), kernel=kernel, precision="tf32")


# ---------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("h", [1, 8, 33, 100, 256, 500, 1024, 2048])
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_sizes_of_a_share(kind: str, h: int, tiles: int) -> None:
    share = share_of(kind, h, 16, tiles, 2, slices=8 if kind == "tf32" and h > 1024 else 4)
    assert share.width * share.blocks >= h
    assert share.depth * share.slices >= h
    # an mma takes 16 or 8 of k; 16 × 16 and 16 × 8 numbers of A are 4 registers of each lane
    assert share.registers == share.depth // (8 if kind == "tf32" else 16) * 4
    assert share.finished * share.own == 4 * tiles
    assert share.stride >= share.slices * share.depth
    numbers = 2 * share.slice_rows * share.stride * share.itemsize
    assert share.shared_bytes == numbers + 4 * share.threads * 4 * tiles
    # where lanes read: each quarter of a warp from all 32 banks
    for first in range(0, 32, 8):
        banks = {
            (lane // 4 * share.stride * share.itemsize // 4 + lane % 4 * 4 + word) % 32
            for lane in range(first, first + 8)
            for word in range(4)
        }
        assert len(banks) == 32
