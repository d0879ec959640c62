"""Plans of the group kernel: what fits, what is chosen, what is refused, all without a device."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpurnn.planning import DEVICES, Group, Limits, Plan, plan, scratch_words
from gpurnn.planning.group import group_plans, registers_of
from gpurnn.tile import LINE, VECTOR, WARP, Share, TensorShare

A100, H100 = DEVICES["A100"], DEVICES["H100"]
OLD = Limits("a T4", (7, 5), 40, 65_536, 65_536, 1.59, threads_per_multiprocessor=1_024)
GOOD: dict[str, Any] = {"T": 3, "n": 2, "d": 1, "h": 512, "device": H100}


def assert_fits(found: Plan, n: int, h: int, device: Limits) -> None:
    share = found.tile
    assert isinstance(share, Share | TensorShare)
    assert share.h == h
    # every column has an owner, every row of W_hh a lane or a warp
    assert share.width * share.blocks >= h
    assert share.depth * share.slices >= h
    assert share.depth % VECTOR == 0
    # every row of the batch has a group
    groups = found.grid[0] // share.blocks
    assert found.grid == (groups * share.blocks, 1, 1)
    assert groups * share.slice_rows * found.launches >= n
    assert found.block == (share.threads, 1, 1)
    assert share.threads % WARP == 0
    assert found.shared == share.shared_bytes <= device.shared_per_block
    weights = share.registers if isinstance(share, TensorShare) else share.kept * share.columns
    assert weights + 30 <= registers_of(share.threads)
    assert registers_of(share.threads) * share.threads <= device.registers_per_multiprocessor
    if found.exchange == "cluster":
        assert found.cluster == share.blocks
        assert share.blocks in (2, 4, 8, 16)
        assert device.compute_capability >= (9, 0)
        assert not found.cooperative
        assert found.launches == 1
    else:
        assert found.cluster == 1
        assert found.cooperative
        assert found.grid[0] <= device.multiprocessors
    if isinstance(share, Share):
        assert share.threads == share.groups * share.slices
        assert share.own * share.finished == share.rows * share.columns
        assert share.kept % VECTOR == 0 and 0 <= share.kept <= share.depth
        assert share.stride % 8 == VECTOR and share.stride >= share.depth
        assert share.shared_weights % VECTOR == 0  # values behind them are read 16 bytes at a time
    else:
        assert share.registers * (2 if share.kind == "tf32" else 4) == share.depth


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 300),
    h=st.integers(1, 2200),
    kind=st.sampled_from(["ieee", "tf32", "float16", "bfloat16"]),
    device=st.sampled_from([A100, H100]),
)
def test_whatever_is_planned_fits(n: int, h: int, kind: str, device: Limits) -> None:
    dtype = "float32" if kind in ("ieee", "tf32") else kind
    precision = "tf32" if kind == "tf32" else "ieee"
    for cost, found in group_plans(n, h, dtype, precision, device, Group()):
        assert cost > 0
        assert found.precision == precision
        assert_fits(found, n, h, device)
        assert isinstance(found.tile, Share | TensorShare)
        # a block without columns only where fewer would be no group
        assert (found.tile.blocks - 1) * found.tile.width < h or h <= found.tile.width


@pytest.mark.parametrize(
    ("h", "n"), [(h, n) for h in (257, 320, 512, 640, 1024) for n in (1, 7, 32)]
)
@pytest.mark.parametrize("device", [A100, H100], ids=["A100", "H100"])
def test_float32_up_to_1024_units_is_a_group(h: int, n: int, device: Limits) -> None:
    found = plan(T=100, n=n, d=h, h=h, device=device)
    assert found.kernel == "group"
    assert found.launches == 1
    assert (found.exchange == "cluster") <= (device is H100)


def test_bits_do_not_depend_on_the_plan() -> None:
    """Of float32, the order of a sum is that of h alone: lanes and rows of W_hh a lane."""
    for h in (300, 1000):
        found = {p.tile for _, p in group_plans(8, h, "float32", "ieee", H100, Group())}
        assert len({(s.slices, s.depth) for s in found if isinstance(s, Share)}) == 1
        assert len(found) > 20


def test_a_wish_is_kept() -> None:
    found = plan(**GOOD, kernel=Group(blocks=8, exchange="counter", rows=3))
    assert isinstance(found.tile, Share)
    assert (found.tile.blocks, found.exchange) == (8, "counter")
    assert found.tile.slice_rows >= 3
    for exchange in ("cluster", "flags", "counter"):
        assert plan(**GOOD, kernel=Group(exchange=exchange)).exchange == exchange
    best = plan(**GOOD, kernel="group")
    assert best == plan(**GOOD, kernel=Group())


def test_a_plan_in_words() -> None:
    text = str(plan(T=100, n=16, d=1, h=512, device=H100, kernel=Group(8, "flags", 1)))
    first, split, rows, exchange, time = text.split("\n")
    assert first.startswith("group: 1 launch of 128 blocks × ")
    assert split.startswith(
        "  W_hh (512, 512) is split over 8 blocks, 64 columns each, in register"
    )
    assert split.endswith("; float32, IEEE")
    assert rows == "  16 groups at once, 1 row of the batch each, 1 at a time; 1 wave"
    assert exchange == (
        "  exchange: states through L2, each word with its step's number, which readers poll for"
    )
    assert time.startswith("  about ") and time.endswith("the rest for the exchange")
    tensor = plan(T=9, n=8, d=1, h=512, device=H100, kernel=Group(8, "cluster"), precision="tf32")
    assert tensor.why[0].endswith("tensor cores, tf32 into float32")
    assert tensor.why[2] == ("exchange: a cluster of 8, states into each other's shared memory")


def test_rows_beyond_one_launch() -> None:
    found = plan(T=9, n=1000, d=1, h=512, device=A100, kernel=Group(54, "flags", rows=8))
    assert (found.grid[0], found.launches) == (108, 63)
    many = plan(T=9, n=1000, d=1, h=512, device=H100, kernel=Group(8, "cluster", rows=8))
    assert (many.grid[0], many.launches) == (1000, 1)  # clusters follow one another
    most = plan(T=9, n=80_000, d=1, h=64, device=H100, kernel=Group(2, "cluster", rows=1))
    assert (most.grid[0], most.launches) == (53_334, 3)


@pytest.mark.parametrize(("h", "n"), [(64, 200_000), (1024, 2048), (2048, 128)])
def test_a_group_by_name_takes_any_number_of_rows(h: int, n: int) -> None:
    assert_fits(plan(T=9, n=n, d=1, h=h, device=H100, kernel="group"), n, h, H100)


def test_clusters_of_16_are_taken_unasked_on_a_whole_chip_only() -> None:
    part = replace(H100, name="a part of one", multiprocessors=78)
    for h in (300, 512, 1024):
        for n in (1, 8, 64):
            assert plan(T=9, n=n, d=1, h=h, device=part).cluster <= 8
    assert plan(T=9, n=1, d=1, h=512, device=part, kernel=Group(16, "cluster")).cluster == 16


def test_scratch() -> None:
    flags = plan(**{**GOOD, "h": 301, "n": 4}, kernel=Group(8, "flags", 2))
    assert isinstance(flags.tile, Share)
    assert scratch_words(flags) == 2 * 2 * flags.tile.slice_rows * 302
    counter = plan(**{**GOOD, "n": 4}, kernel=Group(8, "counter", 2))
    assert scratch_words(counter) == 2 * LINE
    for found in (flags, counter, plan(**GOOD, kernel=Group(8, "cluster"))):
        assert scratch_words(found) % 2 == 0  # two are read at a time


@pytest.mark.parametrize(
    ("change", "kernel", "message"),
    [
        (
            {},
            Group(200),
            "kernel is Group(blocks=200): blocks is 200 and NVIDIA H100 runs 132 blocks of a group "
            "at once: expected 2 to 132",
        ),
        (
            {},
            Group(32, "cluster"),
            "kernel is Group(blocks=32, exchange='cluster'): blocks is 32 and clusters of NVIDIA "
            "H100 have 2, 4, 8, 16 blocks: expected one of these",
        ),
        (
            {"device": A100},
            Group(8, "cluster"),
            "kernel is Group(blocks=8, exchange='cluster'): NVIDIA A100 has compute capability 8.0 "
            "and no clusters: expected exchange 'flags' or 'counter'",
        ),
        (
            {"h": 2048},
            Group(4),
            "kernel is Group(blocks=4): W_hh (2048, 2048) over 4 blocks is more than the "
            "multiprocessors of NVIDIA H100 hold: expected a smaller h, more blocks, fewer rows, "
            "or kernel 'gemm'",
        ),
        (
            {"h": 1024},
            Group(16, "flags", 500),
            "kernel is Group(blocks=16, exchange='flags', rows=500): W_hh (1024, 1024) over 16 "
            "blocks and the states of 500 rows is more than the multiprocessors of NVIDIA H100 "
            "hold: expected a smaller h, more blocks, fewer rows, or kernel 'gemm'",
        ),
        (
            {"dtype": "float64"},
            "group",
            "kernel is 'group': dtype is float64: expected float32, float16 or bfloat16",
        ),
        (
            {"dtype": "float16", "device": OLD},
            "group",
            "kernel is 'group': dtype is float16 and a T4 has compute capability 7.5: expected 8.0 "
            "or higher, or float32",
        ),
        (
            {"precision": "tf32"},
            "resident",
            "precision is 'tf32' and kernel 'resident', which multiplies as IEEE float32 does: "
            "expected kernel 'group' or 'gemm', or 'ieee'",
        ),
        (
            {"precision": "tf32", "dtype": "float64"},
            None,
            "precision is 'tf32' and dtype float64: expected dtype float32, or 'ieee'",
        ),
        (
            {"precision": "tf32", "device": OLD},
            None,
            "precision is 'tf32' and a T4 has compute capability 7.5: expected 8.0 or higher, or "
            "'ieee'",
        ),
        (
            {"precision": "TF32"},
            None,
            "precision is 'TF32': expected one of ieee, tf32",
        ),
    ],
)
def test_what_cannot_be_planned(change: dict[str, Any], kernel: Any, message: str) -> None:
    with pytest.raises(ValueError) as e:
        plan(**{**GOOD, **change}, kernel=kernel)
    assert str(e.value) == message


@pytest.mark.parametrize(
    ("wish", "error", "message"),
    [
        ({"blocks": 1}, ValueError, "blocks of a Group is 1: expected at least 2"),
        ({"blocks": 2.0}, TypeError, "blocks of a Group is 2.0: expected an integer or None"),
        ({"rows": 0}, ValueError, "rows of a Group is 0: expected at least 1"),
        ({"rows": True}, TypeError, "rows of a Group is True: expected an integer or None"),
        (
            {"exchange": "l2"},
            ValueError,
            "exchange of a Group is 'l2': expected None or one of cluster, flags, counter",
        ),
    ],
)
def test_wishes_that_cannot_be(wish: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as e:
        Group(**wish)
    assert str(e.value) == message


def test_tf32_is_leave_and_not_an_order() -> None:
    small = plan(T=9, n=1, d=1, h=64, device=H100, precision="tf32")
    assert (small.kernel, small.precision) == ("resident", "ieee")
    assert small.why[0] == "IEEE, as it takes no longer"
    large = plan(T=9, n=32, d=1, h=512, device=H100, precision="tf32")
    assert (large.kernel, large.precision) == ("group", "tf32")
    named = plan(T=9, n=1, d=1, h=64, device=H100, precision="tf32", kernel="group")
    assert isinstance(named.tile, TensorShare)
    assert named.precision == "tf32"


def test_half_types_are_multiplied_on_tensor_cores_where_there_are_any() -> None:
    found = plan(T=9, n=8, d=1, h=512, device=H100, dtype="float16", kernel="group")
    assert isinstance(found.tile, TensorShare)
    few = replace(H100, name="few", multiprocessors=1)
    assert plan(T=9, n=8, d=1, h=512, device=few).kernel == "gemm"
