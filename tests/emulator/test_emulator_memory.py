"""Bounds, first writes, read-only arrays, views, and the kinds of memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_lines import raises
from numba import cuda, float32, float64, int8, int32, int64, uint32

from gpurnn import emulator
from gpurnn.emulator import BoundsError, ReadOnlyError, UninitializedError, UnsupportedError


@cuda.jit
def copy(x, out):
    i = cuda.grid(1)
    out[i] = x[i]  # copy


@cuda.jit
def copy_guarded(x, out):
    i = cuda.grid(1)
    if i < out.size:
        out[i] = x[i]


def test_one_past_the_end():
    x, out = np.arange(30.0), np.zeros(30)
    with raises(BoundsError, copy, "copy") as info:
        emulator.launch(copy, 1, 32, (x, out))
    assert info.value.places[0].thread == (30, 0, 0)
    assert "index 30 is out of range for argument x of shape (30,)" in str(info.value)
    emulator.launch(copy_guarded, 1, 32, (x, out))
    assert (out == x).all()


@cuda.jit
def shift_shared(x, out):
    s = cuda.shared.array(8, float32)
    i = cuda.threadIdx.x
    s[i] = x[i]
    cuda.syncthreads()
    out[i] = s[i - 1]  # left


def test_below_zero():
    with raises(BoundsError, shift_shared, "left") as info:
        emulator.launch(shift_shared, 1, 8, (np.zeros(8), np.zeros(8)))
    assert "index -1" in str(info.value)


@pytest.mark.parametrize(
    "index", [(0, 3), (2, 0), (-1, 0), (0, -1), 2, (slice(-1, None), 0), (0, 0, 0)]
)
def test_two_axes(index):
    def kernel(x):
        x[index]

    for space in ("global", "shared", "local"):
        with pytest.raises(BoundsError):
            emulator.launch(
                kernel if space == "global" else made(space, index), 1, 1, (np.zeros((2, 3)),)
            )


def made(space, index):
    if space == "shared":

        def kernel(x):
            a = cuda.shared.array((2, 3), float32)
            a[index] = 0

    else:

        def kernel(x):
            a = cuda.local.array((2, 3), float32)
            a[index] = 0

    return kernel


@cuda.jit
def tile_edge(x, out):
    s = cuda.shared.array(32, float32)
    i = cuda.threadIdx.x
    if i < x.size:
        s[i] = x[i]
    cuda.syncthreads()
    out[i] = s[31 - i]  # read


@cuda.jit
def tile_edge_filled(x, out):
    s = cuda.shared.array(32, float32)
    i = cuda.threadIdx.x
    s[i] = x[i] if i < x.size else 0
    cuda.syncthreads()
    out[i] = s[31 - i]


@pytest.mark.parametrize("check_races", [True, False])
def test_shared_memory_that_nothing_wrote(check_races):
    x, out = np.ones(30, np.float32), np.zeros(32)
    with raises(UninitializedError, tile_edge, "read") as info:
        emulator.launch(tile_edge, 1, 32, (x, out), check_races=check_races)
    assert "item 31 of the shared float32 array" in str(info.value)
    emulator.launch(tile_edge_filled, 1, 32, (x, out), check_races=check_races)
    assert out.sum() == 30


@cuda.jit
def local_sum(x, out):
    a = cuda.local.array(4, float32)
    for i in range(3):
        a[i] = x[i]
    out[0] = a[0] + a[1] + a[2]
    out[1] = a[3]  # read


def test_local_memory_that_nothing_wrote():
    with raises(UninitializedError, local_sum, "read"):
        emulator.launch(local_sum, 1, 1, (np.ones(3, np.float32), np.zeros(2)))


@pytest.mark.parametrize("check_races", [True, False])
def test_global_memory_marked_as_uninitialized(check_races):
    x = np.ones(8)
    with raises(UninitializedError, copy, "copy") as info:
        args = (emulator.uninitialized(x), np.zeros(8))
        emulator.launch(copy, 1, 8, args, check_races=check_races)
    assert "element (0,) of argument x" in str(info.value)
    emulator.launch(copy, 1, 8, (x, emulator.uninitialized(np.zeros(8))), check_races=check_races)
    whole = np.ones(16)
    args = (whole[::2], emulator.uninitialized(whole))  # the odd elements mean nothing
    emulator.launch(lambda a, b: b[2], 1, 1, args, check_races=check_races)
    with pytest.raises(UninitializedError, match=r"element \(3,\)"):
        emulator.launch(lambda a, b: b[3], 1, 1, args, check_races=check_races)


def test_read_only_arrays():
    out = np.zeros(8)
    out.flags.writeable = False
    with raises(ReadOnlyError, copy, "copy") as info:
        emulator.launch(copy, 1, 8, (np.ones(8), out))
    assert "element (0,) of argument out" in str(info.value)
    assert not out.any()
    with pytest.raises(ReadOnlyError):
        emulator.launch(lambda a: cuda.atomic.add(a, 0, 1), 1, 1, (out,))


CONSTANTS = np.arange(5, dtype=np.float32)


def test_global_arrays_are_constants():
    def kernel(out):
        c = cuda.const.array_like(CONSTANTS)
        out[cuda.threadIdx.x] = c[cuda.threadIdx.x] + CONSTANTS[1]

    out = np.zeros(5)
    emulator.launch(kernel, 1, 5, (out,))
    assert (out == CONSTANTS + 1).all()

    def writes():
        CONSTANTS[0] = 1

    with pytest.raises(ReadOnlyError):
        emulator.launch(writes, 1, 1, ())
    assert CONSTANTS[0] == 0


def test_rows_slices_and_properties():
    def kernel(A, out):
        row = A[1]
        out[0] = row[2, 3]
        out[1] = A[1, 2][3]
        out[2] = A[1:, 2, 3][0]
        out[3] = A[1, :, 3][2]
        out[4] = A[..., 3][1, 2]
        out[5] = A.size + 100 * A.ndim + 1000 * len(A) + row.shape[1]
        out[6] = A.T[3, 2, 1]
        out[7] = A.reshape(6, 4)[5, 3]
        row[0, 0] = 77
        A[0, 1] = 5
        A[0, 2, 1:3] = row[1, :2]

    A, out = np.arange(24.0).reshape(2, 3, 4), np.zeros(8)
    emulator.launch(kernel, 1, 1, (A, out))
    assert out.tolist() == [23, 23, 23, 23, 23, 24 + 300 + 2000 + 4, 23, 23]
    assert A[1, 0, 0] == 77 and (A[0, 1] == 5).all() and A[0, 2].tolist() == [8, 16, 17, 11]


@given(st.data())
def test_any_strides(data):
    base = np.arange(360.0).reshape(6, 6, 10)
    steps = data.draw(st.tuples(*[st.sampled_from([-2, -1, 1, 2, 3])] * 3))
    axes = data.draw(st.permutations(range(3)))
    a = base[tuple(slice(None, None, s) for s in steps)].transpose(axes)
    out = np.zeros(a.shape)

    def kernel(a, out):
        i, j, k = cuda.grid(3)
        out[i, j, k] = a[i, j, k]
        a[i, j, k] += 1000

    expected = a.copy()
    rest = base.sum() - a.sum()
    emulator.launch(kernel, a.shape, 1, (a, out))
    assert (out == expected).all() and (a == expected + 1000).all()
    assert base.sum() - a.sum() == rest


def test_four_axes_and_none():
    def kernel(a, b):
        a[0, 1, 0, 2] = b[()]

    a = np.zeros((1, 2, 1, 3))
    emulator.launch(kernel, 1, 1, (a, np.array(4.0)))
    assert a[0, 1, 0, 2] == 4 and a.sum() == 4


def test_dynamic_shared_memory_is_one_buffer():
    def kernel(out):
        words = cuda.shared.array(0, int32)
        floats = cuda.shared.array(0, float32)
        halves = cuda.shared.array(shape=0, dtype=float64)
        i = cuda.threadIdx.x
        part = floats[4:8]
        part[i] = 1.5
        words[i] = i
        cuda.syncthreads()
        out[0, i] = words[4 + i]
        out[1, i] = part[i] + words.size + 100 * halves.size
        view = words.view(int8)
        out[2, i] = view[4 * i]

    out = np.zeros((3, 4))
    report = emulator.launch(kernel, 1, 4, (out,), shared=32)
    assert (out[0] == np.float32(1.5).view(np.int32)).all()
    assert (out[1] == 1.5 + 8 + 400).all()
    assert (out[2] == np.arange(4)).all()
    assert report.shared_bytes == 32
    with pytest.raises(BoundsError):
        emulator.launch(kernel, 1, 4, (out,), shared=28)


def test_dynamic_parts_of_different_types_do_not_overlap_by_mistake():
    def kernel(out, start):
        floats = cuda.shared.array(0, float32)[:8]
        doubles = cuda.shared.array(0, float64)[start:]
        i = cuda.threadIdx.x
        floats[i] = i
        doubles[i] = 10 * i
        cuda.syncthreads()
        out[i] = floats[7 - i] + doubles[7 - i]

    out = np.zeros(8)
    emulator.launch(kernel, 1, 8, (out, 4), shared=96)
    assert (out == 11.0 * np.arange(8)[::-1]).all()
    with pytest.raises(emulator.RaceError):
        emulator.launch(kernel, 1, 8, (out, 2), shared=96)


@cuda.jit(device=True)
def scratch():
    return cuda.shared.array(4, int32, alignment=16)


def test_a_static_array_belongs_to_its_declaration_and_block():
    def kernel(out):
        a, b = scratch(), scratch()
        c = cuda.shared.array(4, int32)
        d = cuda.shared.array(4, int32)
        i = cuda.threadIdx.x
        a[i] = i + 10 * cuda.blockIdx.x
        c[i] = -1
        d[i] = -2
        cuda.syncthreads()
        out[cuda.blockIdx.x, i] = b[3 - i]
        out[cuda.blockIdx.x, i] += c[i] * 100 + d[i] * 1000

    out = np.zeros((2, 4), np.int64)
    report = emulator.launch(kernel, 2, 4, (out,))
    assert (out == np.array([[0], [10]]) + np.arange(4)[::-1] - 2100).all()
    assert report.shared_bytes == 48


def test_shared_memory_of_a_changing_shape():
    def kernel():
        for n in range(1, 3):
            cuda.shared.array(n, int32)

    with pytest.raises(UnsupportedError, match="constant shape"):
        emulator.launch(kernel, 1, 1, ())


def test_views_of_other_types():
    def kernel(x, out):
        words = x.view(uint32)
        out[0] = words[1]
        out[1] = x.view(int64)[1]
        words[0] = 0x40000000
        s = cuda.shared.array((2, 4), int8)
        s.view(int32)[1, 0] = 0x01020304
        out[2] = s[1, 3]

    x, out = np.array([1, -1, 2, 4], np.float32), np.zeros(3, np.int64)
    emulator.launch(kernel, 1, 1, (x, out))
    expected = np.array([1, -1, 2, 4], np.float32)
    assert out.tolist() == [0xBF800000, expected.view(np.int64)[1], 1]
    assert x[0] == 2


def test_indices_in_three_dimensions():
    def kernel(out):
        x, y, z = cuda.grid(3)
        t, b, d, g = cuda.threadIdx, cuda.blockIdx, cuda.blockDim, cuda.gridDim
        assert x == t.x + b.x * d.x and y == t.y + b.y * d.y and z == t.z + b.z * d.z
        assert cuda.gridsize(3) == (g.x * d.x, g.y * d.y, g.z * d.z)
        assert cuda.grid(2) == (x, y) and cuda.grid(1) == x and cuda.gridsize(1) == 8
        out[x, y, z] += x + 10 * y + 100 * z

    out = np.zeros((8, 6, 2), np.int64)
    emulator.launch(kernel, (2, 3), (4, 2, 2), (out,))
    x, y, z = np.indices(out.shape)
    assert (out == x + 10 * y + 100 * z).all()


@pytest.mark.parametrize(
    ("grid", "block", "cluster", "error"),
    [
        (0, 1, None, ValueError),
        (1, 0, None, ValueError),
        ((1, 1, 1, 1), 1, None, ValueError),
        (1.5, 1, None, TypeError),
        (1, (32, 32, 2), None, ValueError),
        (3, 1, 2, ValueError),
    ],
)
def test_impossible_launches(grid, block, cluster, error):
    with pytest.raises(error):
        emulator.launch(copy, grid, block, (np.zeros(1), np.zeros(1)), cluster=cluster)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"1 arguments for copy\(x, out\)"):
        emulator.launch(copy, 1, 1, (np.zeros(1),))
    with pytest.raises(TypeError, match="argument out is a str"):
        emulator.launch(copy, 1, 1, (np.zeros(1), "x"))
    with pytest.raises(TypeError, match="dtype"):
        emulator.launch(copy, 1, 1, (np.zeros(1), np.array(["x"])))
    with pytest.raises(TypeError, match="kernel is 3"):
        emulator.launch(3, 1, 1, ())


def test_tuples_of_arrays():
    def kernel(pair, scale):
        pair[1][0] = pair[0][0] * scale

    out = np.zeros(1)
    emulator.launch(kernel, 1, 1, ((np.full(1, 3.0), out), 2))
    assert out[0] == 6


def test_an_exception_says_where_the_kernel_was():
    def kernel(x):
        x[0] = 1 // x.ndim - 1 // (x.ndim - 1)

    with pytest.raises(ZeroDivisionError) as info:
        emulator.launch(kernel, 1, 1, (np.zeros(1),))
    (note,) = info.value.__notes__
    assert f"{__file__}:" in note and "block (0, 0, 0), thread (0, 0, 0)" in note


@cuda.jit
def half_written(out):
    s = cuda.shared.array(2, uint32)
    s[0] = 1
    out[0] = s.view(int64)[0]  # read


@pytest.mark.parametrize("check_races", [True, False])
def test_half_of_a_wider_item_is_written(check_races):
    with raises(UninitializedError, half_written, "read"):
        emulator.launch(half_written, 1, 1, (np.zeros(1, np.int64),), check_races=check_races)


@pytest.mark.parametrize("name", ["ldcg", "ldcv", "ldca", "ldcs", "ldlu"])
@pytest.mark.parametrize("space", ["shared", "local"])
def test_cached_loads_are_of_global_memory(name, space):
    load, place = getattr(cuda, name), getattr(cuda, space)

    def kernel(x):
        s = place.array(1, int32)
        s[0] = load(x, 0)
        load(s, 0)

    with pytest.raises(UnsupportedError, match=rf"cuda\.{name} of .*Numba emits ld\.global"):
        emulator.launch(kernel, 1, 1, (np.zeros(1, np.int32),))


@pytest.mark.parametrize("name", ["stcg", "stwt", "stcs", "stwb"])
@pytest.mark.parametrize("space", ["shared", "local"])
def test_cached_stores_are_to_global_memory(name, space):
    store, place = getattr(cuda, name), getattr(cuda, space)

    def kernel(x):
        store(x, 0, 1)
        store(place.array(1, int32), 0, 1)

    x = np.zeros(1, np.int32)
    with pytest.raises(UnsupportedError, match=rf"cuda\.{name} of .*Numba emits st\.global"):
        emulator.launch(kernel, 1, 1, (x,))
    assert x[0] == 1
