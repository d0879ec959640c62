"""Which kernel runs a shape: sizes that fit together, limits kept, choices said in words."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpurnn import planning
from gpurnn.planning import (
    DEVICES,
    DTYPES,
    SIDE,
    Limits,
    Plan,
    largest_resident,
    plan,
    resident_tiles,
    tiled_grid,
)
from gpurnn.tile import VECTOR, WARP, Share

A100, H100 = DEVICES["A100"], DEVICES["H100"]

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_device = pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))


def itemsize(dtype: str) -> int:
    return 8 if dtype == "float64" else 4  # half types are computed with as float32


# How W_hh is shared out


@each_dtype
@pytest.mark.parametrize("h", range(1, 257))
def test_tiles_cover_the_matrix_within_what_a_block_may_have(h: int, dtype: str) -> None:
    tiles = resident_tiles(h, dtype)
    assert tiles
    for tile in tiles:
        assert tile.h == h
        assert tile.threads <= 256
        assert tile.threads % WARP == 0
        # every column has an owner, every row of W_hh a lane
        groups = tile.threads // tile.slices
        assert groups * tile.columns >= h
        assert tile.depth * tile.slices >= h
        assert tile.columns == tile.slices * tile.own
        # shuffles stay inside a warp; loads are of whole vectors
        assert WARP % tile.slices == 0
        assert tile.depth % VECTOR == 0
        assert tile.kept % VECTOR == 0
        assert 0 < tile.kept <= tile.depth
        # 16-byte loads of neighbouring slices fall into different banks
        assert tile.stride % 8 == VECTOR
        assert tile.stride >= tile.depth
        # weights and sums of a thread leave registers for the rest of the 255
        words = itemsize(dtype) // 4
        assert (tile.kept + tile.rows) * tile.columns * words <= 255 - 20
        assert tile.shared_values == 2 * tile.rows * tile.slices * tile.stride
        assert tile.shared_weights == (tile.depth - tile.kept) * tile.columns * tile.threads
        assert tile.shared_values * itemsize(dtype) <= 48 * 1024


@each_dtype
@pytest.mark.parametrize("h", range(1, 257))
def test_tiles_of_one_h_differ_in_rows_alone_as_far_as_sums_go(h: int, dtype: str) -> None:
    tiles = resident_tiles(h, dtype)
    assert len({(t.columns, t.slices, t.depth) for t in tiles}) == 1
    rows = [t.rows for t in tiles]
    assert rows == sorted(set(rows))
    assert rows[0] == 1


@each_dtype
def test_tiles_that_hold_no_padding_are_known(dtype: str) -> None:
    exact = {h for h in range(1, 257) for t in resident_tiles(h, dtype) if t.exact}
    for h in exact:
        tile = resident_tiles(h, dtype)[0]
        assert tile.threads // tile.slices * tile.columns == h
    assert {32, 64, 96, 128, 192, 224, 256} <= exact


@each_device
@each_dtype
def test_what_a_plan_takes_fits_the_device(dtype: str, device: Limits) -> None:
    largest = largest_resident(dtype, device)
    for h in (*range(1, largest, 7), largest):
        for n in (1, 7, 130, 3000):
            found = plan(T=3, n=n, d=2, h=h, dtype=dtype, device=device, kernel="resident")
            tile = found.tile
            assert tile is not None
            static = tile.shared_values * itemsize(dtype)
            assert found.shared == tile.shared_weights * itemsize(dtype)
            assert static + found.shared <= device.shared_per_block
            assert found.block == (tile.threads, 1, 1)
            assert found.grid[0] * tile.rows >= n > (found.grid[0] - 1) * tile.rows
            assert found.grid[1:] == (1, 1)
            assert found.launches == 1


@each_device
@each_dtype
def test_every_h_up_to_the_largest_fits_and_none_beyond(dtype: str, device: Limits) -> None:
    largest = largest_resident(dtype, device)
    kernels = [
        plan(T=1, n=1, d=1, h=h, dtype=dtype, device=device).kernel for h in range(1, largest + 2)
    ]
    assert kernels == ["resident"] * largest + ["gemm" if dtype == "float64" else "group"]


@pytest.mark.parametrize(
    ("dtype", "device", "largest"),
    [
        ("float32", A100, 256),
        ("float32", H100, 256),
        ("float16", H100, 256),
        ("bfloat16", A100, 256),
        ("float64", A100, 160),
        ("float64", H100, 192),
    ],
)
def test_largest_resident(dtype: str, device: Limits, largest: int) -> None:
    assert largest_resident(dtype, device) == largest


def test_nothing_is_resident_where_a_block_may_share_nothing() -> None:
    bare = replace(H100, name="bare", shared_per_block=0)
    assert largest_resident("float32", bare) == 0
    assert plan(T=1, n=1, d=1, h=1, device=bare).kernel == "gemm"


# Choices


def test_plan_in_words() -> None:
    found = plan(T=100, n=32, d=8, h=128, device=H100)
    first, where, what, time = str(found).split("\n")
    assert first == (
        "resident: 1 launch of 32 blocks × 128 threads, 0 bytes of dynamic shared memory"
    )
    assert where == "  W_hh (128, 128) stays in registers of each block"
    assert what == (
        "  1 row of the batch a block, 1 block at once on each of 132 multiprocessors, 1 wave"
    )
    assert time.startswith("  about 0.")
    assert time.endswith(" µs a step by the model; between steps a barrier, no launch")


def test_plan_with_a_part_in_shared_memory_in_words() -> None:
    text = str(plan(T=2, n=300, d=1, h=224, device=H100))
    assert text.startswith(
        "resident: 1 launch of 75 blocks × 224 threads, 86,016 bytes of dynamic shared memory\n"
        "  W_hh (224, 224) stays in registers (57%) and shared memory of each block\n"
        "  4 rows of the batch a block, "
    )


def test_plan_of_steps_in_words() -> None:
    assert str(plan(T=35, n=32, d=28, h=1024, device=H100, kernel="step")) == (
        "step: 35 launches of 128 blocks × 256 threads, 0 bytes of dynamic shared memory\n"
        "  asked for by name\n"
        "  W_hh (1024, 1024) is read again in every step, in tiles of 16 × 16\n"
        "  a launch for each step"
    )


def test_plan_of_products_in_words() -> None:
    many = plan(T=35, n=64, d=28, h=1536, device=H100)
    assert many.kernel == "gemm"
    assert many.why[:2] == (
        "W_hh (1536, 1536) times 64 rows is more than blocks that hold it take less time for",
        "in each step a product by cuBLAS, then bias and φ in one kernel",
    )
    assert many.why[-1].endswith(" µs a step by the model")
    assert str(plan(T=35, n=32, d=28, h=5000, device=H100)).startswith(
        "gemm: 70 launches of 626 blocks × 256 threads, 0 bytes of dynamic shared memory\n"
        "  W_hh (5000, 5000) of float32 is more than blocks of NVIDIA H100 hold at once\n"
        "  in each step a product by cuBLAS, then bias and φ in one kernel\n"
        "  two launches a step: a step is long against them, and large for a graph's own memory\n"
        "  about "
    )
    text = str(plan(T=35, n=32, d=28, h=1024, device=H100, kernel="gemm"))
    assert text.startswith(
        "gemm: 3 graph launches of 128 blocks × 256 threads, 0 bytes of dynamic shared memory\n"
        "  asked for by name\n"
    )
    assert (
        "\n  up to 32 steps a launch, as CUDA graphs that are captured once for n = 32 and "
        "h = 1024; what is left of T in powers of two\n"
    ) in text
    few = plan(T=3, n=1, d=28, h=1024, device=H100, kernel="gemm")
    assert few.why[2] == "two launches a step: too few for a graph"


@pytest.mark.parametrize(
    ("n", "h", "dtype", "chunk"),
    [
        (1, 300, "float32", 32),
        (0, 300, "float32", 32),
        (64, 1024, "float32", 32),
        (65, 1024, "float32", 16),
        (128, 1024, "float32", 16),
        (128, 1024, "float16", 32),
        (128, 1024, "float64", 8),
        (512, 1024, "float32", 4),
        (513, 1024, "float32", 0),
        (1, 4096, "float32", 32),
        (1, 4097, "float32", 0),
        (1, 4097, "bfloat16", 32),
        (1, 2897, "float64", 0),
    ],
)
def test_steps_that_are_captured_together(n: int, h: int, dtype: str, chunk: int) -> None:
    """A power of two, of which a graph's own arrays hold no more than they may."""
    found = plan(T=100, n=n, d=1, h=h, dtype=dtype, device=H100, kernel="gemm")
    assert found.chunk == chunk
    size = {"float32": 4, "float64": 8}.get(dtype, 2)
    if chunk:
        assert chunk * n * h * size <= 8 * 2**20
        assert h * h * size <= 64 * 2**20


@pytest.mark.parametrize(
    ("T", "launches"),
    [(0, 0), (1, 2), (3, 6), (4, 1), (7, 3), (31, 5), (32, 1), (33, 2), (200_000, 6250)],
)
def test_launches_of_graphs(T: int, launches: int) -> None:
    assert plan(T=T, n=2, d=1, h=512, device=H100, kernel="gemm").launches == launches


@pytest.mark.parametrize("kernel", planning.KERNELS)
def test_kernel_by_name(kernel: str) -> None:
    found = plan(T=7, n=33, d=2, h=64, device=H100, kernel=kernel)
    assert found.kernel == kernel
    if kernel == "resident":
        assert found == plan(T=7, n=33, d=2, h=64, device=H100)
    elif kernel == "group":
        assert isinstance(found.tile, Share)
        assert found.grid[0] % found.tile.blocks == 0
    else:
        assert found.why[0] == "asked for by name"
        launches = 3 if kernel == "gemm" else 7  # 7 = 4 + 2 + 1
        assert (found.launches, found.grid, found.block) == (launches, (3, 4, 1), (16, 16, 1))
        assert (found.shared, found.tile) == (0, None)


@pytest.mark.parametrize("h", [257, 300, 513, 1024, 100_000])
@each_dtype
def test_h_too_large_to_be_resident(h: int, dtype: str) -> None:
    largest = largest_resident(dtype, H100)
    with pytest.raises(
        ValueError,
        match=rf"^kernel is 'resident', h is {h}, dtype {dtype}: one block of NVIDIA H100 holds "
        rf"W_hh up to h = {largest}; expected a smaller h, or kernel 'group' or 'gemm'$",
    ):
        plan(T=3, n=2, d=1, h=h, dtype=dtype, device=H100, kernel="resident")
    found = plan(T=3, n=2, d=1, h=h, dtype=dtype, device=H100)
    if dtype == "float64" or h > 2048:
        assert found.kernel == "gemm"
        held = "is more than blocks of NVIDIA H100 hold at once"
        assert found.why[0] == f"W_hh ({h}, {h}) of {dtype} {held}"
    else:
        assert found.kernel == "group"
        assert found.why[0].startswith(f"W_hh ({h}, {h}) is split over ")


@pytest.mark.parametrize("h", [1, 128, 300])
@pytest.mark.parametrize(("T", "n"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_do_is_planned_like_something(T: int, n: int, h: int) -> None:
    found = plan(T=T, n=n, d=1, h=h, device=H100)
    assert min(*found.grid, *found.block) >= 1
    assert found.kernel == ("resident" if h <= 256 else "group")
    assert found.launches == 1
    assert str(found).startswith(f"{found.kernel}: ")


def blocks(n: int, h: int, **more: Any) -> int:
    return math.prod(plan(T=5, n=n, d=1, h=h, device=H100, **more).grid)


@given(n=st.integers(0, 5000), more=st.integers(1, 500), h=st.integers(1, 300))
def test_more_rows_are_never_fewer_blocks_of_the_same_rows(n: int, more: int, h: int) -> None:
    few = plan(T=5, n=n, d=1, h=h, device=H100)
    many = plan(T=5, n=n + more, d=1, h=h, device=H100)
    if few.tile == many.tile:
        assert math.prod(few.grid) <= math.prod(many.grid)
    assert blocks(n, h, kernel="step") <= blocks(n + more, h, kernel="step")


@given(
    T=st.integers(0, 1000),
    n=st.integers(0, 5000),
    d=st.integers(1, 1000),
    h=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
)
def test_choice_depends_on_neither_the_steps_nor_the_inputs(
    T: int, n: int, d: int, h: int, dtype: str
) -> None:
    found = plan(T=T, n=n, d=d, h=h, dtype=dtype, device=H100)
    other = plan(T=2, n=n, d=3, h=h, dtype=dtype, device=H100)
    if "gemm" in (found.kernel, other.kernel):  # which captures only where there are many steps
        return
    assert found == other


def rows(found: Plan) -> int:
    assert found.tile is not None
    return found.tile.rows


@pytest.mark.parametrize("h", [1, 32, 64, 100, 128, 144, 200, 224, 256])
@each_device
def test_batch_that_fills_the_card_once_has_a_row_a_block(h: int, device: Limits) -> None:
    for n in (1, 2, device.multiprocessors):
        assert rows(plan(T=9, n=n, d=1, h=h, device=device)) == 1


@pytest.mark.parametrize("h", [1, 32, 64, 128, 200, 224, 256])
@each_device
def test_large_batch_has_several_rows_a_block(h: int, device: Limits) -> None:
    assert rows(plan(T=9, n=100_000, d=1, h=h, device=device, kernel="resident")) > 1


def test_half_types_are_shared_out_like_float32() -> None:
    for h in range(1, 257):
        assert resident_tiles(h, "float16") == resident_tiles(h, "float32")
        assert resident_tiles(h, "bfloat16") == resident_tiles(h, "float32")


# Arguments


OLD = Limits("a T4", (7, 5), 40, 65_536, 65_536, 1.59, threads_per_multiprocessor=1_024)
GOOD: dict[str, Any] = {"T": 3, "n": 2, "d": 1, "h": 5, "device": H100}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"T": -1}, ValueError, "T is -1: expected at least 0 and less than 2³¹"),
        ({"n": -1}, ValueError, "n is -1: expected at least 0 and less than 2³¹"),
        ({"d": -1}, ValueError, "d is -1: expected at least 0 and less than 2³¹"),
        ({"h": 0}, ValueError, "h is 0: expected at least 1 and less than 2³¹"),
        ({"T": 2**31}, ValueError, f"T is {2**31}: expected at least 0 and less than 2³¹"),
        ({"n": 2**40}, ValueError, f"n is {2**40}: expected at least 0 and less than 2³¹"),
        (
            {"T": 2**16, "n": 2**15},
            ValueError,
            "T · n is 65536 · 32768: expected less than 2³¹, the rows of one matrix product",
        ),
        (
            {"dtype": "bfloat16", "device": OLD},
            ValueError,
            "dtype is 'bfloat16' and a T4 has compute capability 7.5: expected 8.0 or higher, or "
            "another dtype",
        ),
        ({"T": 3.0}, TypeError, "T is 3.0: expected an integer"),
        ({"n": "2"}, TypeError, "n is '2': expected an integer"),
        ({"h": True}, TypeError, "h is True: expected an integer"),
        (
            {"dtype": "int8"},
            ValueError,
            "dtype is 'int8': expected one of float32, float64, float16, bfloat16",
        ),
    ],
)
def test_what_cannot_be_planned(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as e:
        plan(**{**GOOD, **change})
    assert str(e.value) == message


@pytest.mark.parametrize("kernel", ["Group", "", "Step", 3])
def test_unknown_kernel(kernel: Any) -> None:
    with pytest.raises(ValueError) as e:
        plan(**GOOD, kernel=kernel)
    expected = f"kernel is {kernel!r}: expected None, a Group, or one of "
    expected += ", ".join(planning.KERNELS)
    assert str(e.value) == expected


def test_devices_by_name() -> None:
    for name, device in DEVICES.items():
        assert planning.limits("device", name) is device
        assert device.name == f"NVIDIA {name}"
    assert planning.limits("device", A100) is A100
    own = replace(H100, name="mine", multiprocessors=4)
    assert planning.limits("device", own) is own


@pytest.mark.parametrize("device", ["V100", "h100", None, 0])
def test_unknown_device(device: Any) -> None:
    with pytest.raises(ValueError) as e:
        planning.limits("on", device)
    expected = f"on is {device!r}: expected one of {', '.join(DEVICES)}, or a planning.Limits"
    assert str(e.value) == expected


def test_fewer_multiprocessors_take_more_rows_a_block() -> None:
    few = replace(H100, name="few", multiprocessors=4)
    assert rows(plan(T=9, n=64, d=1, h=128, device=few)) > 1
    assert rows(plan(T=9, n=64, d=1, h=128, device=H100)) == 1


# Tiled kernels


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1, 1), (1, 1, 1)),
        ((16, 16), (1, 1, 1)),
        ((17, 16), (2, 1, 1)),
        ((16, 17), (1, 2, 1)),
        ((0, 5), (1, 1, 1)),
        ((1024 * 1024, 33), (65_536, 3, 1)),
    ],
)
def test_tiled_grid(size: tuple[int, int], grid: tuple[int, int, int]) -> None:
    assert SIDE == 16
    assert tiled_grid(*size) == grid


def test_more_units_than_a_grid_has() -> None:
    message = "h is 1,048,561: a grid has room for 1,048,560"
    with pytest.raises(ValueError) as e:
        plan(T=1, n=3, d=1, h=65_535 * 16 + 1, device=H100)
    assert str(e.value) == message
    assert plan(T=1, n=2**30, d=1, h=1024, device=H100, kernel="step").grid == (2**26, 64, 1)
