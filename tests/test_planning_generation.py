"""Plans of a generation: what is chosen, how it is explained, and what is refused."""

import re
from typing import Any

import pytest

from gpurnn import planning
from gpurnn.dense import GroupSizes, RowSizes
from gpurnn.planning import DEVICES, Group, Plan, generation_plan, generation_words

H100, A100 = DEVICES["H100"], DEVICES["A100"]


def plan(**changes: Any) -> Plan:
    arguments: dict[str, Any] = {
        "rows": 1,
        "h": 128,
        "q": 28,
        "layers": 1,
        "dtype": "float32",
        "device": H100,
    }
    return generation_plan(**{**arguments, **changes})


def microseconds(found: Plan) -> float:
    (said,) = (reason for reason in found.why if "µs a token" in reason)
    return float(re.search(r"about ([\d.]+) µs", said)[1])  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "resident"),
        ({"h": 16}, "resident"),
        ({"h": 200}, "resident"),
        ({"h": 200, "rows": 1000}, "resident"),
        ({"h": 64, "layers": 3}, "resident"),
        ({"h": 64, "dtype": "float64"}, "resident"),
        ({"h": 64, "q": 500}, "resident"),
        ({"h": 512}, "group"),
        ({"h": 512, "device": A100}, "group"),
        ({"h": 1024, "q": 97}, "group"),
        ({"h": 512, "dtype": "float64"}, "streamed"),
        ({"h": 512, "layers": 2}, "streamed"),
        ({"h": 10_000}, "streamed"),
    ],
    ids=str,
)
def test_what_is_chosen(changes: dict[str, Any], kernel: str) -> None:
    found = plan(**changes)
    assert found.kernel == kernel
    assert str(found).startswith(f"{kernel}: 1 launch of ")
    assert isinstance(found.tile, GroupSizes if kernel == "group" else RowSizes)
    device = changes.get("device", H100)
    size = 8 if changes.get("dtype") == "float64" else 4
    assert found.shared == found.tile.shared_numbers * size <= device.shared_per_block - 1024
    assert found.block == (found.tile.threads, 1, 1)
    if found.cooperative:
        assert found.grid[0] <= device.multiprocessors


def test_the_model_promises_what_is_aimed_at() -> None:
    assert microseconds(plan(h=512)) < 2
    for h in (32, 128, 200):
        assert microseconds(plan(h=h)) < 1


def test_all_weights_of_a_resident_model_are_on_the_chip() -> None:
    for h in range(1, 225):
        sizes = plan(h=h, kernel="resident").tile
        assert isinstance(sizes, RowSizes)
        assert all(m.kept + m.held == m.pieces for m in sizes.matrices)
        assert len({(m.h, m.slices) for m in sizes.matrices}) == 1
        assert len({m.threads for m in sizes.matrices[:-1]}) == 1
        assert all(at % 4 == 0 for at in (*sizes.held_at, *sizes.packed_at, sizes.logits_at))
        assert all(m.passes * m.groups * m.columns >= m.width for m in sizes.matrices)


def test_a_kernel_that_is_named_is_had() -> None:
    assert plan(kernel="streamed").kernel == "streamed"
    sizes = plan(kernel="streamed").tile
    assert isinstance(sizes, RowSizes) and not any(m.kept or m.held for m in sizes.matrices)
    found = plan(kernel=Group(4, "flags"), h=100)
    assert (found.grid, found.exchange, found.cluster) == ((4, 1, 1), "flags", 1)
    assert plan(kernel=Group(4, "cluster"), h=100, rows=3).grid == (12, 1, 1)
    assert plan(kernel=Group(4, "flags"), h=100, rows=50).launches == 2
    many = plan(kernel=Group(16, "cluster"), rows=5000)
    assert (many.grid, many.launches) == ((1 << 16, 1, 1), 2)


def test_every_block_of_a_group_owns_columns() -> None:
    for h in (33, 100, 257, 512, 1000):
        for exchange in planning.EXCHANGES:
            sizes = plan(kernel=Group(exchange=exchange), h=h).tile
            assert isinstance(sizes, GroupSizes)
            assert (sizes.share.blocks - 1) * sizes.share.width < h


def test_many_tokens_are_split_over_a_group() -> None:
    few, many = plan(h=512).tile, plan(h=512, q=5000).tile
    assert isinstance(few, GroupSizes) and not few.split
    assert isinstance(many, GroupSizes) and many.split
    assert many.output.width * many.share.blocks >= 5000


def test_words_of_the_exchanges() -> None:
    assert generation_words(plan(h=101, kernel=Group(4, "flags"))) == 2 * 102
    assert generation_words(plan(h=100, kernel=Group(4, "counter"))) == 16
    split = plan(h=512, q=5001, kernel=Group(exchange="flags"))
    assert generation_words(split) == 2 * 5002  # of the larger of two exchanges


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16': expected one of float32, float64"),
        (
            {"kernel": "gemm"},
            "kernel is 'gemm': expected None, a Group, or one of resident, streamed, group",
        ),
        (
            {"kernel": "resident", "h": 512},
            "kernel is 'resident', h is 512, q 28, layers 1, dtype float32: one block of NVIDIA "
            "H100 cannot hold all weights; expected a smaller model, or kernel 'streamed' or "
            "'group'",
        ),
        (
            {"kernel": "group", "dtype": "float64"},
            "kernel is 'group': dtype is float64: expected float32, or kernel 'streamed'",
        ),
        (
            {"kernel": "group", "layers": 2},
            "kernel is 'group': the model has 2 layers: expected one, or kernel 'streamed'",
        ),
        (
            {"kernel": Group(rows=2)},
            "kernel is Group(rows=2): rows is 2: expected 1, the texts that a group generates at a "
            "time",
        ),
        (
            {"kernel": Group(exchange="cluster"), "device": A100},
            "kernel is Group(exchange='cluster'): NVIDIA A100 has compute capability 8.0 and no "
            "clusters: expected exchange 'flags' or 'counter'",
        ),
        (
            {"kernel": Group(3, "cluster")},
            "kernel is Group(blocks=3, exchange='cluster'): blocks is 3: expected one of 2, 4, 8, "
            "16, the clusters of NVIDIA H100",
        ),
        (
            {"kernel": Group(200)},
            "kernel is Group(blocks=200): blocks is 200: expected 2 to 132, what NVIDIA H100 runs",
        ),
        (
            {"kernel": Group(100, "flags"), "h": 64},
            "kernel is Group(blocks=100, exchange='flags'): h is 64: expected 100 blocks that own "
            "a column each, 2 at least, so fewer blocks",
        ),
        (
            {"kernel": "group", "h": 10_000},
            "kernel is 'group': W_hh (10000, 10000) is more than the multiprocessors of NVIDIA "
            "H100 hold: expected a smaller h, more blocks, or kernel 'streamed'",
        ),
        (
            {"h": 40_000},
            "h is 40000, q 28 and layers 1: expected less than 2³⁰ weights in all, as they are "
            "counted in 32 bits",
        ),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan(**changes)
