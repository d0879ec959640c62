"""Token ids under the emulator: rows of W_xh that kernels fetch, and gradients added up by id."""

import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import CASES, EMPTY, SMALL, Case, Draw, draw
from group_setup import EXCHANGES, SMALL_CARD, launch
from hypothesis import given
from hypothesis import strategies as st
from kernel_setup import Array, assert_as_reference, exact, results
from numpy.typing import DTypeLike
from tolerance import assert_close, assert_same_bits

import gpurnn
from gpurnn import functional as F
from gpurnn import planning
from gpurnn.cuda import gemm, tokens
from gpurnn.cuda.engines import EmulatedEngine
from gpurnn.cuda.specs import KernelSpec
from gpurnn.planning import DEVICES, Group, ScatterPlan
from gpurnn.tile import Scatter, Share, TensorShare, Tile

ODD = next(case for case in SMALL if case.name == "odd")
PRIME = next(case for case in SMALL if case.name == "prime")
HALVES = (np.float16, ml_dtypes.bfloat16)
DTYPES = (np.float32, np.float64, *HALVES)

KERNELS = ("resident", "step", "gemm", *(Group(2, exchange) for exchange in EXCHANGES))
ENGINE = EmulatedEngine(DEVICES["H100"], 3, True)

each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)

LEAKY = gpurnn.Activation(  # φ′ is a function of the pre-activation
    lambda z: 0.9 * math.tanh(z) + 0.1 * z, lambda z: 0.9 * (1.0 - math.tanh(z) ** 2) + 0.1
)


# ---------------------------------------------------------------------------------------
# Rows that a kernel fetches
# ---------------------------------------------------------------------------------------


def one_hot(drawn: Draw) -> Draw:
    """Return the same arguments with one-hot rows for X."""
    return replace(drawn, X=np.eye(len(drawn.W_xh), dtype=drawn.X.dtype)[drawn.ids])


KINDS = [
    pytest.param(kernel, dtype, id=f"{kernel}-{np.dtype(dtype).name}")
    for kernel in KERNELS
    for dtype in DTYPES
    if dtype != np.float64 or not isinstance(kernel, Group)  # which has none
]


@pytest.mark.parametrize("activation", ["tanh", LEAKY], ids=["of-h", "of-z"])
@pytest.mark.parametrize(("kernel", "dtype"), KINDS)
def test_ids_are_one_hot_rows_to_the_bit(kernel: Any, dtype: DTypeLike, activation: Any) -> None:
    """A product with a one-hot row adds zeros to one number, in whatever order."""
    case = Case("", T=4, n=3, d=3, h=5)
    drawn = draw(case).astype(dtype)
    with gpurnn.emulated(SMALL_CARD):
        by_id = F.rnn_forward(*drawn.arguments(by_id=True), activation=activation, kernel=kernel)
        floats = F.rnn_forward(*one_hot(drawn).arguments(), activation=activation, kernel=kernel)
    for name, a, b in (
        ("H", by_id[0], floats[0]),
        ("Z", by_id[1].Z, floats[1].Z),
    ):
        assert (a is None) == (b is None) == (name == "Z" and activation == "tanh")
        if a is not None and b is not None:
            assert a.dtype == dtype
            assert_same_bits(name, bits(a), bits(b))


def bits(a: Array) -> Array:
    """Return half types as integers: NumPy does not print the differences of bfloat16."""
    return a.view(np.uint16) if a.itemsize == 2 else a


VOCABULARIES = [
    pytest.param(kernel, d, marks=[pytest.mark.slow] if d > 1000 and kernel != "resident" else [])
    for kernel in ("resident", "step", "gemm", Group(2, "flags"))
    for d in (2, 3, 28, 1000, 100_000)
]


@pytest.mark.parametrize(("kernel", "d"), VOCABULARIES, ids=str)
def test_vocabularies(kernel: Any, d: int) -> None:
    """Their largest ids included; the gradient of ids that do not occur is 0."""
    case = Case("", T=3, n=2, d=d, h=2 if d > 1000 else 5)
    drawn = draw(case, dtype=np.float32)
    drawn.ids[0, 1], drawn.ids[2, 0] = d - 1, 0
    with gpurnn.emulated(SMALL_CARD):
        found = results(drawn, kernel=kernel, by_id=True)
    truth, baseline = exact(drawn, by_id=True), results(drawn, by_id=True)
    for name, a in found.items():
        assert_close(name, a, truth[name], length=40, baseline=baseline[name])
    unused = np.delete(found["dW_xh"], drawn.ids.reshape(-1), axis=0)
    assert not unused.any() and len(unused) < d


LARGE = [
    pytest.param(case, marks=[] if case in SMALL or case.n == 2 else pytest.mark.slow)
    for case in CASES
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_every_case(case: Case) -> None:
    assert_as_reference(case, draw(case, dtype=np.float32), kernel="resident", by_id=True)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("T", [1, 2, 4, 5, 6, 11])
def test_ids_are_fetched_as_early_as_there_are_steps(rows: int, T: int) -> None:
    """As many steps as a row is announced ahead, and one more and less: nothing beyond is read."""
    tile = Tile(h=5, rows=rows, columns=4, slices=4, depth=4, kept=4)
    drawn = draw(Case("", T=T, n=3, d=4, h=5), dtype=np.float32)
    found = forward("resident_forward", tile, drawn)
    with gpurnn.emulated():
        expected, _ = F.rnn_forward(*drawn.arguments(by_id=True), kernel="resident")
    assert_same_bits("H", found, expected)


def forward(kind: Any, tile: Tile, drawn: Draw) -> Array:
    """Launch a resident kernel by hand; its Z is not there to be read."""
    (T, n), h = drawn.ids.shape, tile.h
    states = np.full((T + 1, n, h), np.nan, np.float32)
    states[0] = drawn.h_0
    ids = drawn.ids.astype(np.int32)
    arrays = [ids, drawn.W_xh, np.zeros(0, np.float32), states, drawn.W_hh, drawn.b_h]
    flat = [a if a is drawn.W_hh else a.reshape(-1) for a in arrays]
    ENGINE.launch(
        KernelSpec(kind, tile, "tanh", "float32", by_id=True),
        (-(-n // tile.rows), 1, 1),
        (tile.threads, 1, 1),
        flat,
        [(T, n)],
        4 * tile.shared_weights,
    )
    return states[1:]


SHARES = [
    Share(h=19, blocks=2, groups=4, columns=4, rows=1, passes=1, kept=4),
    Share(h=19, blocks=2, groups=4, columns=4, rows=1, passes=2, kept=4),
    Share(h=19, blocks=2, groups=4, columns=4, rows=2, passes=3, kept=4),
    TensorShare(h=19, blocks=2, tiles=1, passes=2, slices=2, warps=2, kind="tf32"),
]


@pytest.mark.parametrize("T", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("share", SHARES, ids=lambda s: f"{type(s).__name__}-{s.passes}")
def test_ids_of_several_passes(share: Share | TensorShare, T: int) -> None:
    """Rows taken a few at a time: the ids of the pass after the next are fetched, of this step or
    the next.
    """
    exchange = EXCHANGES[T % 3]
    case = Case("", T=T, n=5, d=4, h=19)
    drawn = draw(case, dtype=np.float32)
    states = np.full((T + 1, case.n, case.h), np.nan, np.float32)
    states[0] = drawn.h_0
    spec = KernelSpec("group_forward", share, "tanh", "float32", False, exchange)
    rest = [states.reshape(-1), drawn.W_hh, drawn.b_h]
    Z = drawn.W_xh[drawn.ids]
    launch(spec, [Z.reshape(-1), *rest], T, case.n)
    expected = states.copy()
    states[1:] = np.nan
    ids = drawn.ids.astype(np.int32).reshape(-1)
    first = [ids, drawn.W_xh.reshape(-1), np.zeros(0, np.float32)]
    launch(replace(spec, by_id=True), [*first, *rest], T, case.n, seed=T)
    assert_same_bits("states", states, expected)
    assert np.isfinite(states).all()


@pytest.mark.parametrize("activation", ["tanh", LEAKY], ids=["of-h", "of-z"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_the_graphs_of_gemm_gather_into_their_own_arrays(
    monkeypatch: pytest.MonkeyPatch, chunk: int, activation: Any
) -> None:
    forward_pass = gemm.forward
    monkeypatch.setattr(
        gemm,
        "forward",
        lambda engine, plan, *a, **k: forward_pass(engine, replace(plan, chunk=chunk), *a, **k),
    )
    assert_as_reference(ODD, draw(ODD, dtype=np.float32), activation, kernel="gemm", by_id=True)


@each_kernel
def test_each_schedule_gives_the_same_bits(kernel: Any) -> None:
    drawn = draw(Case("", T=4, n=2, d=3, h=5), dtype=np.float32)
    found = []
    for seed in (None, 1, 2, 3):
        with gpurnn.emulated(SMALL_CARD, seed=seed):
            found.append(results(drawn, kernel=kernel, by_id=True))
    for again in found[1:]:
        for name, a in again.items():
            assert_same_bits(name, a, found[0][name])


@pytest.mark.parametrize("case", EMPTY, ids=str)
@pytest.mark.parametrize("kernel", ["resident", "step", "gemm", None])
def test_no_step_or_no_row(kernel: str | None, case: Case) -> None:
    drawn = draw(case, dtype=np.float32)
    with gpurnn.emulated():
        found = results(drawn, kernel=kernel, by_id=True)
    for name, a in results(drawn, by_id=True).items():
        assert_same_bits(name, found[name], a)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.uint64])
def test_ids_of_any_integer_type(dtype: DTypeLike) -> None:
    drawn = draw(ODD, dtype=np.float32)
    with gpurnn.emulated():
        expected, residuals = F.rnn_forward(*drawn.arguments(by_id=True))
        ids = np.asfortranarray(drawn.ids.astype(dtype))
        found, _ = F.rnn_forward(ids, *drawn.arguments()[1:])
    assert residuals.X.dtype == np.int32
    assert_same_bits("H", found, expected)


# ---------------------------------------------------------------------------------------
# Gradients added up by id
# ---------------------------------------------------------------------------------------

TINY = Scatter(threads=32, columns=4, loads=2)


def plan_of(tile: Scatter, ids: int, rows: int, N: int, d: int, h: int, size: int) -> ScatterPlan:
    """Return a plan of any sizes."""
    grid = (-(-d // ids), -(-h // tile.columns), -(-N // rows))
    return ScatterPlan(tile, ids, rows, grid, ids * tile.threads * size)


def by_adding(ids: Array, dZ: Array, d: int) -> Array:
    total = np.zeros((d, dZ.shape[1]))
    np.add.at(total, ids, dZ.astype(np.float64))
    return total


PLANS = {
    "an-id-a-block": (TINY, 1, 10_000),
    "ids-and-columns": (TINY, 3, 10_000),
    "parts": (TINY, 2, 64),
    "parts-of-a-chunk-and-some": (TINY, 5, 96),
    "one-group": (Scatter(32, 32, 1), 4, 10_000),
    "two-warps": (Scatter(64, 8, 3), 2, 224),
    "a-column": (Scatter(32, 1, 4), 7, 10_000),
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))


def scatter(
    ids: Array, dZ: Array, d: int, plan: tuple[Scatter, int, int], seed: int | None = 3
) -> Array:
    (N, h), size = dZ.shape, 8 if dZ.itemsize == 8 else 4
    engine = EmulatedEngine(DEVICES["H100"], seed, True)
    with engine.here():
        return tokens.scatter(
            engine, ids.astype(np.int32), dZ, d, plan_of(*plan, N=N, d=d, h=h, size=size)
        )


def assert_added(found: Array, ids: Array, dZ: Array, d: int) -> None:
    assert found.dtype == dZ.dtype
    truth = by_adding(ids, dZ, d)
    if dZ.itemsize == 2:  # the nearest of its type, but for what float32 lost before
        limit = 1.02 * float(ml_dtypes.finfo(dZ.dtype).eps) / 2 * np.abs(truth) + 1e-6
        assert (np.abs(found.astype(np.float64) - truth) <= limit).all()
        return
    baseline = None
    if dZ.dtype == np.float32:
        baseline = np.zeros((d, dZ.shape[1]), np.float32)
        np.add.at(baseline, ids, dZ)
    assert_close("sums", found, truth, length=len(ids), baseline=baseline)


@each_plan
@each_dtype
def test_rows_are_added_up_by_id(plan: tuple[Scatter, int, int], dtype: DTypeLike) -> None:
    N, d, h = 300, 7, 9
    rng = np.random.default_rng(0)
    ids = rng.integers(0, d, N)
    dZ = rng.standard_normal((N, h), np.float32).astype(dtype)
    assert_added(scatter(ids, dZ, d, plan), ids, dZ, d)


@pytest.mark.parametrize("N", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("which", ["all-equal", "sorted", "the-last", "of-one-chunk"])
def test_lists_of_every_length(which: str, N: int) -> None:
    """Chunks are of 64 ids and the list holds 128: rows that fill it, and are one too many."""
    d, h = 5, 3
    ids = {
        "all-equal": np.full(N, 2),
        "sorted": np.sort(np.arange(N) % d),
        "the-last": np.where(np.arange(N) == N - 1, 4, 0),
        "of-one-chunk": np.where(np.arange(N) // 64 == 1, 3, 1),
    }[which]
    dZ = np.random.default_rng(N).standard_normal((N, h), np.float32)
    for ids_of_block in (1, 3):
        found = scatter(ids, dZ, d, (TINY, ids_of_block, 10_000))
        assert_added(found, ids, dZ, d)
        assert not np.delete(found, ids, axis=0).any()


@each_plan
def test_a_sum_has_one_order(plan: tuple[Scatter, int, int]) -> None:
    """Every schedule gives the same bits, of numbers whose sum depends on their order."""
    N, d, h = 150, 3, 5
    rng = np.random.default_rng(1)
    ids = rng.integers(0, d, N)
    dZ = rng.standard_normal((N, h), np.float32) * np.float32(10) ** rng.integers(-6, 6, (N, 1))
    dZ = dZ.astype(np.float32)
    first = scatter(ids, dZ, d, plan, None)
    for seed in range(3):
        assert_same_bits(f"seed {seed}", scatter(ids, dZ, d, plan, seed), first)


@each_plan
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_with_its_id(plan: tuple[Scatter, int, int], bad: float) -> None:
    N, d, h = 140, 7, 5
    rng = np.random.default_rng(2)
    ids, dZ = rng.integers(0, d, N), rng.standard_normal((N, h), np.float32)
    clean = scatter(ids, dZ, d, plan)
    dZ[70, 3] = bad
    found = scatter(ids, dZ, d, plan)
    spoilt = np.zeros((d, h), bool)
    spoilt[ids[70], 3] = True
    assert_same_bits("the others", found[~spoilt], clean[~spoilt])
    np.testing.assert_array_equal(found[spoilt], [bad])


def test_ids_out_of_range_are_passed_over() -> None:
    """Where nobody looked at them: no harm is done beyond their own gradient."""
    ids = np.array([0, -1, 2, 3, 5, 2**31 - 1, -(2**31), 1])
    dZ = np.ones((8, 2), np.float32)
    for plan in ((TINY, 2, 10_000), (TINY, 3, 10_000)):
        found = scatter(ids, dZ, 3, plan)
        np.testing.assert_array_equal(found, [[1, 1]] * 3)


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_halves_are_rounded_once(dtype: DTypeLike) -> None:
    """1 + 2000 · 2⁻¹² is 1 where each addition rounds."""
    ids = np.zeros(500, np.int64)
    dZ = np.full((500, 1), 2.0**-10).astype(dtype)
    dZ[0] = 1
    for rows in (10_000, 64):
        found = scatter(ids, dZ, 1, (TINY, 1, rows))
        assert found.astype(np.float64)[0, 0] == np.float64(dtype(1 + 499 * 2.0**-10))


def test_the_recurrence_s_gradient_that_is_not_finite() -> None:
    """It reaches its id's row, and the bias; other rows and columns do not know of it."""
    drawn = draw(Case("", T=1, n=3, d=4, h=5), dtype=np.float32)
    drawn.ids[0] = [1, 3, 1]
    drawn.dH[0, 1, 2] = np.inf
    with gpurnn.emulated():
        _, residuals = F.rnn_forward(*drawn.arguments(by_id=True))
        _, _, dW_xh, _, db_h = F.rnn_backward(drawn.dH, residuals)
    spoilt = np.zeros((4, 5), bool)
    spoilt[3, 2] = True
    np.testing.assert_array_equal(~np.isfinite(dW_xh), spoilt)
    assert db_h is not None
    np.testing.assert_array_equal(~np.isfinite(db_h), spoilt[3])


# ---------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------


@given(
    N=st.integers(1, 5_000_000),
    d=st.integers(1, 100_000),
    h=st.integers(1, 3000),
    dtype=st.sampled_from(planning.DTYPES),
    device=st.sampled_from(list(DEVICES)),
)
def test_plans_cover_all_and_fit(N: int, d: int, h: int, dtype: str, device: str) -> None:
    limits = DEVICES[device]
    found = planning.scatter_plan(N, d, h, dtype, limits)
    tile, (ranges, across, parts) = found.tile, found.grid
    assert tile.threads % 32 == 0 and tile.threads <= 256
    assert tile.groups * tile.columns == tile.threads
    assert (ranges - 1) * found.ids < d <= ranges * found.ids
    assert (across - 1) * tile.columns < h <= across * tile.columns
    assert (parts - 1) * found.rows < N <= parts * found.rows
    assert across <= 65_535 and parts <= 65_535
    needed = found.ids * tile.threads * (8 if dtype == "float64" else 4)
    assert needed <= found.shared
    assert tile.shared <= planning.STATIC_SHARED
    assert tile.shared + found.shared <= limits.shared_per_block
    assert found.ids <= 1 << 16  # in a list of 16 bits
    # the sums of the parts are few beside the rows
    assert parts == 1 or 4 * parts * d <= N


def test_plans_for_few_and_for_many_ids() -> None:
    """Characters: their rows are dealt out. Words: a block has many ids, and all rows."""
    card = DEVICES["H100"]
    few = planning.scatter_plan(32_768, 28, 128, "float32", card)
    assert few.parts > 16 and math.prod(few.grid) >= 2 * card.multiprocessors
    many = planning.scatter_plan(32_768, 100_000, 128, "float32", card)
    assert many.parts == 1 and many.ids > 32


@pytest.mark.parametrize(("N", "d"), [(2100, 2), (500, 40)])
def test_as_planned(N: int, d: int) -> None:
    """By the plan's own sizes, on a card of a few blocks: with parts, and without."""
    card = replace(DEVICES["H100"], multiprocessors=1)
    rng = np.random.default_rng(0)
    ids, dZ = rng.integers(0, d, N), rng.standard_normal((N, 3), np.float32)
    assert (planning.scatter_plan(N, d, 3, "float32", card).parts > 1) == (d == 2)
    with gpurnn.emulated(card):
        found = F.embedding_backward(dZ, ids, d)
    assert_added(found, ids, dZ, d)


# ---------------------------------------------------------------------------------------
# The embedding
# ---------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 0), (0,), (2, 1, 3)], ids=str)
def test_an_embedding(shape: tuple[int, ...], dtype: DTypeLike) -> None:
    rng = np.random.default_rng(0)
    ids, E = rng.integers(0, 6, shape), rng.standard_normal((6, 5), np.float32).astype(dtype)
    dX = rng.standard_normal((*shape, 5), np.float32).astype(dtype)
    with gpurnn.emulated():
        X, dE = F.embedding(ids, E), F.embedding_backward(dX, ids, 6)
    assert X.dtype == dE.dtype == dtype
    assert_same_bits("X", bits(X), bits(E[ids]))
    assert_added(dE, ids.reshape(-1), dX.reshape(ids.size, 5), 6)


def test_an_embedding_of_no_columns() -> None:
    with gpurnn.emulated():
        assert F.embedding(np.zeros(3, int), np.ones((2, 0), np.float32)).shape == (3, 0)
        dE = F.embedding_backward(np.ones((3, 0), np.float32), np.zeros(3, int), 2)
    assert dE.shape == (2, 0)


F32 = np.ones((4, 2), np.float32)
WRONG: dict[str, tuple[Any, list[Any]]] = {
    "id-too-large": (F.embedding, [np.array([[1, 4]]), F32]),
    "id-negative": (F.embedding, [np.array([0, -1]), F32]),
    "ids-are-floats": (F.embedding, [np.array([0.0]), F32]),
    "no-table": (F.embedding, [np.array([0]), F32[0]]),
    "a-list": (F.embedding, [[0], F32]),
    "gradient-id-too-large": (F.embedding_backward, [F32, np.array([0, 1, 2, 3]), 3]),
    "gradient-of-other-rows": (F.embedding_backward, [F32, np.array([0, 1, 2]), 4]),
    "gradient-of-other-rank": (F.embedding_backward, [F32, np.array([[0], [1]]), 4]),
    "no-rows": (F.embedding_backward, [F32, np.array([0, 1, 2, 3]), 0]),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_numpy_s(name: str) -> None:
    function, arguments = WRONG[name]
    with pytest.raises((TypeError, ValueError)) as expected:
        function(*arguments)
    with gpurnn.emulated(), pytest.raises(type(expected.value)) as found:
        function(*arguments)
    assert str(found.value) == str(expected.value)


def test_more_rows_than_kernels_count() -> None:
    dX, ids = np.ones((1, 1), np.float32), np.zeros(1, int)
    with (
        gpurnn.emulated(),
        pytest.raises(ValueError, match=r"^num_rows is 2,147,483,648: expected"),
    ):
        F.embedding_backward(dX, ids, 2**31)


@pytest.mark.parametrize("check_ids", [False, True])
def test_numpy_s_ids_are_always_looked_at(check_ids: bool) -> None:
    with pytest.raises(ValueError, match=r"^ids holds the id 4 at index \(1,\): E has 4 rows"):
        F.embedding(np.array([0, 4]), F32, check_ids=check_ids)
    with pytest.raises(ValueError, match=r"^ids holds the id 4 at index \(1,\): dE has 4 rows"):
        F.embedding_backward(F32[:2], np.array([0, 4]), 4, check_ids=check_ids)
