"""Each instruction's twin against its definition, and each instruction against ptxas."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from offline import assemble, cuda, each_target, ptx_of

numba = pytest.importorskip("numba")
from numba.core.errors import TypingError  # noqa: E402

from gpurnn import resources  # noqa: E402
from gpurnn.kernels import ptx  # noqa: E402  (needs numba-cuda)
from gpurnn.sass import instruction_mix, recurrent_loop  # noqa: E402

emulator = pytest.importorskip("gpurnn.emulator", reason="the emulator needs greenlet")

Array = NDArray[Any]

f4, f8, u2, u4 = numba.float32, numba.float64, numba.uint16, numba.uint32

ALL_16 = np.arange(1 << 16, dtype=np.uint16)


def twin(name: str, *arguments: Array) -> list[Any]:
    """Run the twin of an instruction on each row of the arguments."""
    f = getattr(ptx, name).emulated
    return [f(None, *row) for row in zip(*arguments, strict=True)]


def some_floats() -> Array:
    """Every exponent, both signs, with the significands at which rounding turns."""
    rng = np.random.default_rng(0)
    low = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, *rng.integers(0, 1 << 16, 8).tolist()]
    # The lower 13 bits fall off for a half, 16 for a bfloat16: halfway and its neighbours.
    low += [0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001]
    bits = ALL_16[::7].astype(np.uint32)[:, None] << 16 | np.array(low, np.uint32)
    return bits.reshape(-1).view(np.float32)


def assert_floats_equal(found: Array, expected: Array) -> None:
    assert found.dtype == expected.dtype == np.float32
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))


# The twins


def test_every_instruction_has_a_twin() -> None:
    for name in ptx.__all__:
        assert callable(getattr(ptx, name).emulated), name
        assert "PTX ISA" in getattr(ptx, name).__doc__, name


def test_every_bfloat16_becomes_its_float() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    expected = ALL_16.view(ml_dtypes.bfloat16).astype(np.float32)
    assert_floats_equal(np.array(twin("bf16_to_float", ALL_16)), expected)


def test_every_half_becomes_its_float() -> None:
    found = np.array(twin("half_to_float", ALL_16))
    assert_floats_equal(found, ALL_16.view(np.float16).astype(np.float32))


@pytest.mark.parametrize(("name", "there"), [("bf16", "bf16_to_float"), ("half", "half_to_float")])
def test_every_16_bits_come_back_from_float(name: str, there: str) -> None:
    floats = np.array(twin(there, ALL_16))
    back = np.array(twin(f"float_to_{name}", floats))
    assert back.dtype == np.uint16
    nan = np.isnan(floats)
    np.testing.assert_array_equal(back[~nan], ALL_16[~nan])
    assert (back[nan] == 0x7FFF).all()


def test_floats_are_rounded_to_the_nearest_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    floats = some_floats()
    with np.errstate(all="ignore"):
        expected = floats.astype(ml_dtypes.bfloat16).view(np.uint16)
    expected[np.isnan(floats)] = 0x7FFF
    np.testing.assert_array_equal(twin("float_to_bf16", floats), expected)


def test_floats_are_rounded_to_the_nearest_half() -> None:
    floats = np.concatenate([some_floats(), np.float32([65519.996, 65520, -65520, 2**-25, 3e-8])])
    with np.errstate(all="ignore"):
        expected = floats.astype(np.float16).view(np.uint16)
    expected[np.isnan(floats)] = 0x7FFF
    np.testing.assert_array_equal(twin("float_to_half", floats), expected)


@pytest.mark.parametrize(("packed", "one"), [("bf16x2", "bf16"), ("f16x2", "half")])
def test_pairs_are_two_of_one(packed: str, one: str) -> None:
    low = some_floats()[::5]
    high = low[::-1]
    words = np.array(twin(f"pack_{packed}", low, high))
    assert words.dtype == np.uint32
    np.testing.assert_array_equal(words & 0xFFFF, twin(f"float_to_{one}", low))
    np.testing.assert_array_equal(words >> 16, twin(f"float_to_{one}", high))
    halves = np.array(twin(f"unpack_{packed}", words))
    for column, bits in zip(halves.T, (words & 0xFFFF, words >> 16), strict=True):
        assert_floats_equal(column, np.array(twin(f"{one}_to_float", bits)))


APPROXIMATIONS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "tanh_approx": (np.tanh, 2.0**-11),
    "exp2_approx": (np.exp2, 2.0**-22),
    "rcp_approx": (np.reciprocal, 2.0**-23),
}


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_approximations_are_within_the_error_of_the_instruction(name: str) -> None:
    exact, relative = APPROXIMATIONS[name]
    x = some_floats()
    smallest, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    with np.errstate(all="ignore"):
        flushed = np.where(np.abs(x) < smallest, np.copysign(np.float32(0), x), x)
        expected = exact((x if name == "tanh_approx" else flushed).astype(np.float64))
        found = np.array(twin(name, x))
        assert found.dtype == np.float32
        nan, big = np.isnan(expected), np.abs(expected) > largest
        small = ~nan & (np.abs(expected) < smallest)  # also 0
        usual = ~(nan | big | small)
        off = np.abs(found[usual] / expected[usual] - 1)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[big], np.copysign(np.inf, expected[big]))
    assert (off <= relative).all()
    if name != "tanh_approx":
        np.testing.assert_array_equal(found[small], np.copysign(0, expected[small]))


@pytest.mark.parametrize("subnormal", [1e-40, -1e-40, 0.0, -0.0])
def test_what_ftz_flushes(subnormal: float) -> None:
    x = np.float32(subnormal)
    assert ptx.exp2_approx.emulated(None, x) == 1
    assert ptx.rcp_approx.emulated(None, x) == math.copysign(math.inf, subnormal)


def test_cluster_instructions_ask_the_emulated_thread() -> None:
    class Thread:
        def __init__(self) -> None:
            self.calls: list[Any] = []
            self.arrays = {rank: np.zeros((2, 3)) for rank in range(2)}
            self.emu = self

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: self.calls.append((name, *arguments)) or len(self.calls)

        def cluster_map(self, array: str, rank: int) -> Array:
            assert array == "shared"
            return self.arrays[rank]

    thread = Thread()
    ptx.cluster_store.emulated(thread, "shared", 4, 1, 2.5)
    assert thread.arrays[1][1, 1] == 2.5 and not thread.arrays[0].any()
    assert ptx.cluster_load.emulated(thread, "shared", 4, 1) == 2.5
    assert [ptx.cluster_rank.emulated(thread), ptx.cluster_size.emulated(thread)] == [1, 2]
    ptx.cluster_arrive.emulated(thread)
    ptx.cluster_wait.emulated(thread)
    ptx.bar_sync.emulated(thread, 1, 64)
    names = ["cluster_rank", "cluster_size", "cluster_arrive", "cluster_wait"]
    assert thread.calls == [*((name,) for name in names), ("bar_sync", 1, 64)]


# The instructions


def on_floats(name: str) -> Callable[..., None]:
    f = getattr(ptx, name)

    def kernel(x, y):
        y[0] = f(x[0])

    return kernel


def packs(name: str) -> Callable[..., None]:
    f = getattr(ptx, name)

    def kernel(x, y):
        y[0] = f(x[0], x[1])

    return kernel


def unpacks(name: str) -> Callable[..., None]:
    f = getattr(ptx, name)

    def kernel(x, y):
        y[0], y[1] = f(x[0])

    return kernel


def bars(x, y):
    ptx.bar_sync(1, 64)


SCALARS = {
    "tanh_approx": (on_floats, f4, f4, "tanh.approx.f32"),
    "exp2_approx": (on_floats, f4, f4, "ex2.approx.ftz.f32"),
    "rcp_approx": (on_floats, f4, f4, "rcp.approx.ftz.f32"),
    "bf16_to_float": (on_floats, u2, f4, "mov.b32 %f1, {0, %rs1}"),
    "float_to_bf16": (on_floats, f4, u2, "cvt.rn.bf16.f32"),
    "half_to_float": (on_floats, u2, f4, "cvt.f32.f16"),
    "float_to_half": (on_floats, f4, u2, "cvt.rn.f16.f32"),
    "pack_bf16x2": (packs, f4, u4, "cvt.rn.bf16x2.f32 %r1, %f2, %f1"),  # the high one first
    "pack_f16x2": (packs, f4, u4, "cvt.rn.f16x2.f32 %r1, %f2, %f1"),
    "unpack_bf16x2": (unpacks, u4, f4, "and.b32 %f2, %r1, 0xffff0000"),
    "unpack_f16x2": (unpacks, u4, f4, "cvt.f32.f16"),
    "bar_sync": (lambda _: bars, f4, f4, "bar.sync"),
    "float_bits": (on_floats, f4, u4, "mov.b32 %r1, %f1"),
    "bits_float": (on_floats, u4, f4, "mov.b32 %f1, %r1"),
}


@each_target
@pytest.mark.parametrize("name", SCALARS)
def test_instructions_on_scalars(name: str, target: tuple[int, int]) -> None:
    make, takes, gives, instruction = SCALARS[name]
    text = ptx_of(make(name), (takes[::1], gives[::1]), target)
    assert instruction in text
    assert ".f64" not in text
    assemble(text, target)


@pytest.mark.parametrize("dtype", [u2, numba.int16], ids=str)
def test_16_bits_into_another_block(dtype: Any) -> None:
    def kernel(x):
        shared = cuda.shared.array(8, dtype)
        shared[cuda.threadIdx.x] = x[0]
        ptx.cluster_store(shared, 5, 1, x[1])
        x[2] = shared[5]

    text = ptx_of(kernel, (dtype[::1],), (9, 0))
    assert text.count("st.shared::cluster.b16") == 1
    assemble(text, (9, 0))

    def reads(x):
        x[0] = ptx.cluster_load(cuda.shared.array(8, dtype), 5, 0)

    with pytest.raises(TypingError, match="cluster_load"):
        ptx_of(reads, (dtype[::1],), (9, 0))


@pytest.mark.parametrize("dtype", [f4, f8, numba.int32, numba.uint64], ids=str)
def test_instructions_of_clusters(dtype: Any) -> None:
    def kernel(x):
        shared = cuda.shared.array((2, 4), dtype)
        rank, size = ptx.cluster_rank(), ptx.cluster_size()
        shared[0, cuda.threadIdx.x] = x[rank]
        ptx.cluster_arrive()
        ptx.cluster_wait()
        ptx.cluster_store(shared, 5, (rank + 1) % size, x[1])
        ptx.cluster_arrive()
        ptx.cluster_wait()
        x[0] = ptx.cluster_load(shared, 5, 0)

    text = ptx_of(kernel, (dtype[::1],), (9, 0))
    bits = dtype.bitwidth
    for instruction, times in {
        "%cluster_ctarank": 1,
        "%cluster_nctarank": 1,
        "mapa.shared::cluster.u32": 2,
        "barrier.cluster.arrive.release.aligned": 2,
        "barrier.cluster.wait.acquire.aligned": 2,
        f"st.shared::cluster.b{bits}": 1,
        f"ld.shared::cluster.b{bits}": 1,
    }.items():
        assert text.count(instruction) == times, instruction
    order = [text.index(i) for i in ("cluster.arrive", "st.shared::cluster", "ld.shared::cluster")]
    assert order == sorted(order)
    assert (".f64" in text) == (dtype == f8)
    assemble(text, (9, 0))


@pytest.mark.parametrize(
    ("name", "takes"),
    [("tanh_approx", f8), ("float_to_half", f8), ("half_to_float", u4), ("bf16_to_float", f4)],
)
def test_other_types_are_typing_errors(name: str, takes: Any) -> None:
    with pytest.raises(TypingError, match=name):
        ptx_of(on_floats(name), (takes[::1], f4[::1]), (9, 0))


# The twins in their place


def test_a_cluster_in_the_emulator() -> None:
    pytest.importorskip("greenlet", reason="the emulator needs greenlet")
    from gpurnn.emulator import launch

    def kernel(x, y):
        shared = cuda.shared.array((2, 32), f4)
        thread = cuda.threadIdx.x
        rank, size = ptx.cluster_rank(), ptx.cluster_size()
        shared[0, thread] = x[rank]
        ptx.bar_sync(1, 32)
        ptx.cluster_arrive()
        ptx.cluster_wait()
        ptx.cluster_store(shared, 32 + thread, (rank + 1) % size, 10 * shared[0, thread] + thread)
        ptx.cluster_arrive()
        ptx.cluster_wait()
        y[rank, thread] = ptx.cluster_load(shared, 32 + thread, (rank + 2) % size)
        ptx.cluster_arrive()
        ptx.cluster_wait()

    x, y = np.arange(4, dtype=np.float32), np.full((4, 32), np.nan, np.float32)
    launch(kernel, 4, 32, (x, y), cluster=4)
    expected = 10 * ((np.arange(4)[:, None] + 1) % 4) + np.arange(32)
    np.testing.assert_array_equal(y, expected)


def test_halves_into_another_block_in_the_emulator() -> None:
    def kernel(x, y):
        shared = cuda.shared.array(32, u2)
        thread = cuda.threadIdx.x
        rank = ptx.cluster_rank()
        ptx.cluster_arrive()
        ptx.cluster_wait()
        ptx.cluster_store(shared, thread, 1 - rank, x[rank, thread])
        ptx.cluster_arrive()
        ptx.cluster_wait()
        y[rank, thread] = shared[thread]

    x = np.arange(64, dtype=np.uint16).reshape(2, 32) * 1023
    y = np.zeros_like(x)
    emulator.launch(kernel, 2, 32, (x, y), cluster=2)
    np.testing.assert_array_equal(y, x[::-1])


def test_conversions_in_the_emulator() -> None:
    pytest.importorskip("greenlet", reason="the emulator needs greenlet")
    from gpurnn.emulator import launch

    def kernel(x, y):
        i = cuda.threadIdx.x
        y[0, i] = ptx.bf16_to_float(ptx.float_to_bf16(x[i]))
        y[1, i] = ptx.half_to_float(ptx.float_to_half(x[i]))
        y[2, i], y[3, i] = ptx.unpack_bf16x2(ptx.pack_bf16x2(x[i], x[0]))
        y[4, i], y[5, i] = ptx.unpack_f16x2(ptx.pack_f16x2(x[i], x[0]))
        y[6, i] = ptx.rcp_approx(ptx.exp2_approx(x[i]))
        y[7, i] = ptx.tanh_approx(x[i])

    x = np.array([-2, 1 / 3, 0, 3, 1e-6, 7e4, -np.inf, np.nan], np.float32)
    y = np.zeros((8, 8), np.float32)
    launch(kernel, 1, 8, (x, y))
    with np.errstate(over="ignore"):
        halves = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(y[1], halves)
    np.testing.assert_array_equal(y[4], halves)
    np.testing.assert_array_equal(y[2], y[0])
    np.testing.assert_allclose(y[0], x, rtol=2.0**-8)
    np.testing.assert_array_equal(y[[3, 5]], np.full((2, 8), -2, np.float32))
    np.testing.assert_allclose(y[6], np.exp2(-x), rtol=1e-6)
    np.testing.assert_array_equal(y[7], np.tanh(x.astype(np.float64)).astype(np.float32))


# ---------------------------------------------------------------------------------------
# Bits, and several numbers at once
# ---------------------------------------------------------------------------------------


def test_the_bits_of_a_float() -> None:
    x = some_floats()
    bits = np.array(twin("float_bits", x))
    assert bits.dtype == np.uint32
    np.testing.assert_array_equal(bits, x.view(np.uint32))
    back = np.array(twin("bits_float", bits))
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back.view(np.uint32), bits)


def test_four_floats_in_the_emulator() -> None:
    def kernel(x, out):
        shared = cuda.shared.array(32, f4)
        i = cuda.threadIdx.x
        shared[i] = x[i]
        cuda.syncthreads()
        if i < 8:
            four = ptx.load_floats4(shared, 4 * i)
            for k in range(4):
                out[4 * i + k] = four[k]

    def beyond(x, out):
        out[0] = ptx.load_floats4(x, 32)[0]

    x = np.random.default_rng(0).standard_normal(34, np.float32)
    out = np.zeros(32, np.float32)
    emulator.launch(kernel, 1, 32, (x, out))
    np.testing.assert_array_equal(out, x[:32])
    with pytest.raises(emulator.BoundsError):
        emulator.launch(beyond, 1, 1, (x, out))


def test_a_pair_that_another_block_writes_in_the_emulator() -> None:
    """Each number by itself: a reader may see the second without the first."""

    def kernel(words, out):
        if cuda.blockIdx.x == 0:
            ptx.store_relaxed(words, 3, numba.uint64(5))
            ptx.store_relaxed(words, 2, numba.uint64(2**63))
        else:
            first, second = ptx.load_relaxed_pair(words, 2)
            while first == numba.uint64(0) or second == numba.uint64(0):
                first, second = ptx.load_relaxed_pair(words, 2)
            out[0], out[1] = first, second

    for seed in (None, 1, 2):
        words, out = np.zeros(4, np.uint64), np.zeros(2, np.uint64)
        emulator.launch(kernel, 2, 1, (words, out), seed=seed)
        assert out.tolist() == [2**63, 5]


def mix_of(kernel: Callable[..., None], signature: tuple[Any, ...], target: Any) -> Any:
    text = ptx_of(kernel, signature, target)
    assemble(text, target)
    try:
        sass = resources.sass_of(text, target)
    except resources.ToolMissing as e:
        pytest.skip(str(e))
    return instruction_mix(sass), sass


@each_target
def test_four_floats_are_one_load(target: tuple[int, int]) -> None:
    def kernel(x, out):
        shared = cuda.shared.array(128, f4)
        i = cuda.threadIdx.x
        for k in range(4):
            shared[32 * k + i] = x[32 * k + i]
        cuda.syncthreads()
        a, b, c, d = ptx.load_floats4(shared, 4 * i)
        out[i] = a + b * c + d

    mix, _ = mix_of(kernel, (f4[::1], f4[::1]), target)
    assert mix["LDS.128"] == 1 and mix["LDS"] + mix["LDS.64"] == 0


@each_target
def test_a_pair_is_one_load_that_is_repeated(target: tuple[int, int]) -> None:
    def kernel(words, out):
        first, second = ptx.load_relaxed_pair(words, 0)
        while first != second:
            first, second = ptx.load_relaxed_pair(words, 0)
        out[0] = first

    u8 = numba.uint64
    mix, sass = mix_of(kernel, (u8[::1], u8[::1]), target)
    strong = re.findall(r"LDG\.E\.128\.STRONG\.GPU", sass)
    assert len(strong) == mix["LDG.128"] >= 1
    assert any("LDG.E.128.STRONG" in line for line in recurrent_loop(sass).splitlines())


# ---------------------------------------------------------------------------------------
# Loads and stores that other blocks see
# ---------------------------------------------------------------------------------------


def waits_relaxed(flags: Any, out: Any) -> None:
    while ptx.load_relaxed(flags, 0) == numba.uint64(0):
        pass
    out[0] = ptx.load_relaxed(flags, 1)


def waits_acquire(flags: Any, out: Any) -> None:
    while ptx.load_acquire(flags, 0) == numba.uint64(0):
        pass
    out[0] = flags[1]


@each_target
@pytest.mark.parametrize("kernel", [waits_relaxed, waits_acquire])
@pytest.mark.parametrize("dtype", [numba.uint64, numba.uint32], ids=["64", "32"])
def test_a_loop_that_waits_reads_again_each_time(
    kernel: Callable[..., None], dtype: Any, target: tuple[int, int]
) -> None:
    """What Numba's cuda.ldcv does not: the load stands between the loop's label and its branch."""
    array = numba.types.Array(dtype, 1, "C")
    text = ptx_of(kernel, (array, array), target)
    assemble(text, target)
    order = kernel.__name__.removeprefix("waits_")
    loop = re.search(r"^(\$L\w+):\n(.*?)bra \t\1;", text, re.MULTILINE | re.DOTALL)
    assert loop is not None and f"ld.{order}.gpu.global" in loop[2]


@each_target
def test_stores_that_other_blocks_see(target: tuple[int, int]) -> None:
    def kernel(flags: Any, value: Any) -> None:
        ptx.store_relaxed(flags, 1, value)
        ptx.store_release(flags, 0, value)

    text = ptx_of(kernel, (numba.types.Array(numba.uint64, 1, "C"), numba.uint64), target)
    assemble(text, target)
    assert text.index("st.relaxed.gpu.global.b64") < text.index("st.release.gpu.global.b64")


def test_a_message_from_block_to_block_under_the_emulator() -> None:
    def kernel(flags: Any, data: Any, out: Any) -> None:
        if cuda.blockIdx.x == 0:
            data[0] = 7
            ptx.store_release(flags, 0, numba.uint64(1))
        else:
            while ptx.load_acquire(flags, 0) == numba.uint64(0):
                pass
            out[0] = data[0]

    def careless(flags: Any, data: Any, out: Any) -> None:
        if cuda.blockIdx.x == 0:
            data[0] = 7
            ptx.store_relaxed(flags, 0, numba.uint64(1))
        else:
            while ptx.load_relaxed(flags, 0) == numba.uint64(0):
                pass
            out[0] = data[0]

    for seed in (None, 1, 2):
        flags, data, out = np.zeros(1, np.uint64), np.zeros(1, np.int32), np.zeros(1, np.int32)
        emulator.launch(kernel, 2, 1, (flags, data, out), seed=seed)
        assert out[0] == 7
    with pytest.raises(emulator.RaceError):
        emulator.launch(careless, 2, 1, (flags * 0, data, out))


@pytest.mark.parametrize("value", [numba.float32, numba.uint32])
def test_a_value_of_another_type_is_refused(value: Any) -> None:
    def kernel(flags: Any, value: Any) -> None:
        ptx.store_relaxed(flags, 0, value)

    with pytest.raises(TypingError):
        ptx_of(kernel, (numba.types.Array(numba.uint64, 1, "C"), value), (9, 0))
