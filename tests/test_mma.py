"""Products on tensor cores: twins against NumPy, instructions in the machine code."""

import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from offline import assemble, cuda, each_target, ptx_of

numba = pytest.importorskip("numba")
from numba.core.errors import TypingError  # noqa: E402

from gpurnn import resources  # noqa: E402
from gpurnn.kernels import mma  # noqa: E402  (needs numba-cuda)
from gpurnn.sass import instruction_mix  # noqa: E402

emulator = pytest.importorskip("gpurnn.emulator", reason="the emulator needs greenlet")

Array = NDArray[Any]

f4, u2, u4 = numba.float32, numba.uint16, numba.uint32

LANES = np.arange(32)
GROUP, QUAD = LANES // 4, LANES % 4

KINDS = {
    "mma_f16": (np.float16, 16),
    "mma_bf16": (ml_dtypes.bfloat16, 16),
    "mma_tf32": (np.float32, 8),
}


def rounded_to_tf32(a: Array) -> Array:
    """float32 to 10 bits of significand by arithmetic; halfway goes away from zero."""
    fraction, exponent = np.frexp(a.astype(np.float64))
    exact = np.ldexp(np.copysign(np.floor(np.abs(fraction) * 2**11 + 0.5), fraction), exponent - 11)
    return exact.astype(np.float32)


# ---------------------------------------------------------------------------------------
# The twins
# ---------------------------------------------------------------------------------------


def of_halves(matrix: Array, row: Array, k: Array) -> Array:
    """The registers of all lanes that hold k and k + 1 of a row, as the figures draw them."""
    bits = matrix.view(np.uint16).astype(np.uint32)
    return bits[row, k] | bits[row, k + 1] << 16


def fragments(A: Array, B: Array) -> list[Array]:
    """Lay A (16, k) and B (k, 8) out over a warp: a0 to a3, b0, b1, each (32,) uint32."""
    B = np.ascontiguousarray(B.T)
    if A.dtype.itemsize == 2:
        low, high = 2 * QUAD, 2 * QUAD + 8
        return [
            of_halves(A, GROUP, low),
            of_halves(A, GROUP + 8, low),
            of_halves(A, GROUP, high),
            of_halves(A, GROUP + 8, high),
            of_halves(B, GROUP, low),
            of_halves(B, GROUP, high),
        ]
    A, B = A.view(np.uint32), B.view(np.uint32)
    return [
        A[GROUP, QUAD],
        A[GROUP + 8, QUAD],
        A[GROUP, QUAD + 4],
        A[GROUP + 8, QUAD + 4],
        B[GROUP, QUAD],
        B[GROUP, QUAD + 4],
    ]


def sums_of_lanes(C: Array) -> Array:
    """C (16, 8) as lanes hold it, (4, 32)."""
    first, second = 2 * QUAD, 2 * QUAD + 1
    return np.array([C[GROUP, first], C[GROUP, second], C[GROUP + 8, first], C[GROUP + 8, second]])


def multiplies(name: str) -> Callable[..., None]:
    f = getattr(mma, name)

    def kernel(words, sums, out):
        i = cuda.threadIdx.x
        d0, d1, d2, d3 = f(
            words[0, i],
            words[1, i],
            words[2, i],
            words[3, i],
            words[4, i],
            words[5, i],
            sums[0, i],
            sums[1, i],
            sums[2, i],
            sums[3, i],
        )
        out[0, i], out[1, i], out[2, i], out[3, i] = d0, d1, d2, d3

    return kernel


def product(name: str, A: Array, B: Array, C: Array, seed: int | None = None) -> Array:
    out = np.full((4, 32), np.nan, np.float32)
    words = np.array(fragments(A, B))
    emulator.launch(multiplies(name), 1, 32, (words, sums_of_lanes(C), out), seed=seed)
    return out


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_product_of_random_matrices(name: str, seed: int) -> None:
    """Exact products, added to C in rising k, each sum rounded to float32: to the last bit."""
    dtype, k = KINDS[name]
    rng = np.random.default_rng(seed)
    A, B = (rng.standard_normal(s).astype(np.float32) for s in ((16, k), (k, 8)))
    A, B = (rounded_to_tf32(a) if dtype == np.float32 else a.astype(dtype) for a in (A, B))
    C = rng.standard_normal((16, 8)).astype(np.float32)
    expected = C.copy()
    for i in range(k):
        expected += A[:, i : i + 1].astype(np.float32) * B[i].astype(np.float32)
    found = product(name, A, B, C, seed)
    np.testing.assert_array_equal(found, sums_of_lanes(expected))
    exact = C + A.astype(np.float64) @ B.astype(np.float64)
    np.testing.assert_allclose(found, sums_of_lanes(exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_each_number_meets_its_own(name: str) -> None:
    """A one in each place of A and of B: it comes out where row and column say."""
    dtype, k = KINDS[name]
    numbers = np.arange(1, 16 * k + 1).reshape(16, k) % 251
    picks = np.eye(k, 8).astype(dtype)
    found = product(name, numbers.astype(dtype), picks, np.zeros((16, 8), np.float32))
    np.testing.assert_array_equal(found, sums_of_lanes(numbers[:, :8].astype(np.float32)))
    if k > 8:
        picks = np.eye(k, 8, -8).astype(dtype)
        found = product(name, numbers.astype(dtype), picks, np.zeros((16, 8), np.float32))
        np.testing.assert_array_equal(found, sums_of_lanes(numbers[:, 8:].astype(np.float32)))


@pytest.mark.parametrize("name", KINDS)
def test_infinities_and_nan_go_their_way(name: str) -> None:
    dtype, k = KINDS[name]
    A, B = np.ones((16, k), dtype), np.ones((k, 8), dtype)
    A[3, 1], A[9, 2], B[2, 5] = np.inf, np.nan, 0
    C = np.zeros((16, 8), np.float32)
    found = product(name, A, B, C)
    expected = np.full((16, 8), k, np.float32)
    expected[:, 5] -= 1
    expected[3], expected[9] = np.inf, np.nan
    np.testing.assert_array_equal(found, sums_of_lanes(expected))


def test_a_warp_that_is_not_full_is_refused() -> None:
    words, sums = np.zeros((6, 32), np.uint32), np.zeros((4, 32), np.float32)
    with pytest.raises((emulator.EmulationError, KeyError)):
        emulator.launch(multiplies("mma_f16"), 1, 16, (words, sums, sums.copy()))


def floats_about_rounding() -> Array:
    rng = np.random.default_rng(0)
    low = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2FFF, 0x3000, 0x3001, *rng.integers(0, 8192, 6)]
    high = np.arange(0, 1 << 19, 61, dtype=np.uint32) << 13
    return (high[:, None] + np.array(low, np.uint32)).reshape(-1).view(np.float32)


def test_rounding_to_tf32() -> None:
    x = floats_about_rounding()
    found = np.array([mma.to_tf32.emulated(None, a) for a in x])
    assert found.dtype == np.uint32
    nan = np.isnan(x)
    assert nan.any() and (found[nan] == 0x7FFFFFFF).all()
    with np.errstate(over="ignore"):
        expected = rounded_to_tf32(x[~nan])
    tiny = np.abs(x[~nan]) < 2.0**-126  # of those NumPy's way keeps 10 bits, not a fixed place
    np.testing.assert_array_equal(found[~nan][~tiny], expected[~tiny].view(np.uint32))
    assert (found[~nan] & 0x1FFF == 0).all()
    subnormal = x[~nan][tiny]
    off = np.abs(found[~nan][tiny].view(np.float32) - subnormal)
    assert (off <= 2.0**-149 * 4096).all()


@pytest.mark.parametrize(
    ("x", "bits"),
    [
        (1.0, 0x3F800000),
        (1 + 2.0**-11, 0x3F802000),  # halfway: away from zero
        (-1 - 2.0**-11, 0xBF802000),
        (1 + 2.0**-11 - 2.0**-23, 0x3F800000),
        (1 + 3 * 2.0**-11, 0x3F804000),
        (np.float32(np.finfo(np.float32).max), 0x7F800000),
        (2.0**128 - 2.0**117, 0x7F7FE000),
        (np.inf, 0x7F800000),
        (-np.inf, 0xFF800000),
        (-0.0, 0x80000000),
        (2.0**-149, 0),
    ],
)
def test_what_tf32_makes_of(x: float, bits: int) -> None:
    assert mma.to_tf32.emulated(None, np.float32(x)) == bits


def test_four_words_of_shared_memory() -> None:
    def kernel(halves, floats, out):
        of_halves = cuda.shared.array(64, u2)
        of_floats = cuda.shared.array(32, f4)
        i = cuda.threadIdx.x
        of_halves[i], of_floats[i] = halves[i], floats[i]
        of_halves[i + 32] = halves[i + 32]
        cuda.syncthreads()
        if i < 8:
            words = mma.load_words4(of_halves, 8 * i)
            for k in range(4):
                out[0, 4 * i + k] = words[k]
            words = mma.load_words4(of_floats, 4 * i)
            for k in range(4):
                out[1, 4 * i + k] = words[k]

    rng = np.random.default_rng(1)
    halves = rng.integers(0, 1 << 16, 64, np.uint16)
    floats = rng.standard_normal(32, np.float32)
    out = np.zeros((2, 32), np.uint32)
    emulator.launch(kernel, 1, 32, (halves, floats, out))
    np.testing.assert_array_equal(out[0], halves.view(np.uint32))
    np.testing.assert_array_equal(out[1], floats.view(np.uint32))


def test_four_words_are_looked_at_as_any_read_is() -> None:
    def beyond(x, out):
        out[0] = mma.load_words4(x, 4)[0]

    def unwritten(x, out):
        shared = cuda.shared.array(8, u2)
        out[0] = mma.load_words4(shared, 0)[0]

    def unordered(x, out):
        shared = cuda.shared.array(8, u2)
        if cuda.threadIdx.x == 0:
            for i in range(8):
                shared[i] = i
        else:
            out[0] = mma.load_words4(shared, 0)[0]

    x, out = np.zeros(6, np.float32), np.zeros(1, np.uint32)
    for kernel, threads, error in (
        (beyond, 1, emulator.BoundsError),
        (unwritten, 1, emulator.UninitializedError),
        (unordered, 2, emulator.RaceError),
    ):
        with pytest.raises(error):
            emulator.launch(kernel, 1, threads, (x, out))


# ---------------------------------------------------------------------------------------
# The instructions
# ---------------------------------------------------------------------------------------


def test_every_instruction_has_a_twin() -> None:
    for name in mma.__all__:
        assert callable(getattr(mma, name).emulated), name
        assert "PTX ISA" in getattr(mma, name).__doc__, name


def sass_of(
    kernel: Callable[..., None], signature: tuple[Any, ...], target: Any
) -> tuple[str, str]:
    text = ptx_of(kernel, signature, target)
    assemble(text, target)  # skips where there is no ptxas
    try:
        return text, resources.sass_of(text, target)
    except resources.ToolMissing as e:
        pytest.skip(str(e))


HMMA = {
    "mma_f16": ("m16n8k16.row.col.f32.f16.f16.f32", "HMMA.16816.F32 "),
    "mma_bf16": ("m16n8k16.row.col.f32.bf16.bf16.f32", "HMMA.16816.F32.BF16 "),
    "mma_tf32": ("m16n8k8.row.col.f32.tf32.tf32.f32", "HMMA.1688.F32.TF32 "),
}


@each_target
@pytest.mark.parametrize("name", KINDS)
def test_products_are_one_instruction(name: str, target: tuple[int, int]) -> None:
    signature = (u4[:, ::1], f4[:, ::1], f4[:, ::1])
    text, sass = sass_of(multiplies(name), signature, target)
    in_ptx, in_sass = HMMA[name]
    assert text.count(f"mma.sync.aligned.{in_ptx}") == 1
    assert sass.count(in_sass) == 1, sass
    assert instruction_mix(sass)["HMMA"] == 1


@each_target
@pytest.mark.parametrize("dtype", [u2, f4, u4], ids=str)
def test_four_words_are_one_load(dtype: Any, target: tuple[int, int]) -> None:
    def kernel(x, out):
        shared = cuda.shared.array(512, dtype)
        i = cuda.threadIdx.x
        for k in range(8):
            shared[64 * k + i] = x[64 * k + i]
        cuda.syncthreads()
        a, b, c, d = mma.load_words4(shared, 8 * i)
        out[i] = a ^ b ^ c ^ d

    _, sass = sass_of(kernel, (dtype[::1], u4[::1]), target)
    mix = instruction_mix(sass)
    assert mix["LDS.128"] == 1 and mix["LDS"] + mix["LDS.64"] == 0


@each_target
def test_rounding_to_tf32_compiles(target: tuple[int, int]) -> None:
    def kernel(x, out):
        out[0] = mma.to_tf32(x[0])

    text, _ = sass_of(kernel, (f4[::1], u4[::1]), target)
    assert "cvt.rna.tf32.f32" in text


@pytest.mark.parametrize("name", KINDS)
def test_other_types_are_typing_errors(name: str) -> None:
    with pytest.raises(TypingError):
        ptx_of(multiplies(name), (f4[:, ::1], f4[:, ::1], f4[:, ::1]), (9, 0))


@pytest.mark.parametrize("dtype", [numba.float64, numba.uint8], ids=str)
def test_words_of_other_sizes_are_refused(dtype: Any) -> None:
    def kernel(x, out):
        out[0] = mma.load_words4(x, 0)[0]

    with pytest.raises(TypingError):
        ptx_of(kernel, (dtype[::1], u4[::1]), (9, 0))


def test_tf32_bits_are_those_of_a_float() -> None:
    """What the tests above lay out as bits is what a kernel would write as a number."""
    word = struct.unpack("<I", struct.pack("<f", 1.5))[0]
    assert mma.to_tf32.emulated(None, np.float32(1.5)) == word
