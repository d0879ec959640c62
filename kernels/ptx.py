"""Instructions that Numba lacks, one function each, with its twin for the emulator.

A function here is a Numba intrinsic made of inline PTX. Its attribute ``emulated`` does the same in
Python for the emulator, which calls ``f.emulated(cuda, *arguments)``; ``cuda`` is the namespace of
the emulated thread, and ``cuda.emu`` what that thread does with others. References are to NVIDIA's
*Parallel Thread Execution ISA*, chapter "Instruction Set", by the name of the instruction. Types
are exact: a float64 where a float32 is expected is a typing error, not a conversion.

Instructions for clusters need compute capability 9.0, those that round to bfloat16 or pack a pair
8.0, the others 7.5.
"""

import math
import struct
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

__all__ = [
    "bar_sync",
    "bf16_to_float",
    "bits_float",
    "cluster_arrive",
    "cluster_load",
    "cluster_rank",
    "cluster_size",
    "cluster_store",
    "cluster_wait",
    "exp2_approx",
    "fence_gpu",
    "float_bits",
    "float_to_bf16",
    "float_to_half",
    "half_to_float",
    "load_acquire",
    "load_floats4",
    "load_relaxed",
    "load_relaxed_pair",
    "pack_bf16x2",
    "pack_f16x2",
    "prefetch_l2",
    "rcp_approx",
    "store_relaxed",
    "store_release",
    "tanh_approx",
    "unpack_bf16x2",
    "unpack_f16x2",
]

float32, uint16, uint32, int32 = types.float32, types.uint16, types.uint32, types.int32

SMALLEST_NORMAL = 2.0**-126  # of float32: .ftz flushes what is smaller to zero
NAN_16 = 0x7FFF  # what cvt makes of every NaN, bfloat16 or half
INFINITY_HALF = 0x7C00
HALF_OVERFLOWS = 65520.0  # halfway between the largest half and the next power of two


# ---------------------------------------------------------------------------------------
# From inline PTX to an intrinsic
# ---------------------------------------------------------------------------------------


def _instruction(emulated: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make an intrinsic of a typing function, with ``emulated`` as its twin."""

    def make(typed: Callable[..., Any]) -> Any:
        made = intrinsic(typed)
        made.emulated = emulated
        return made

    return make


def _call(
    builder: Any, result: Any, operands: list[Any], text: str, constraints: str, effect: bool
) -> Any:
    """Emit inline PTX; only without an ``effect`` may it be moved, merged or dropped."""
    if effect:
        constraints += ("," if constraints else "") + "~{memory}"
    function = ir.FunctionType(result, [operand.type for operand in operands])
    call = builder.call(ir.InlineAsm(function, text, constraints, side_effect=effect), operands)
    call.attributes.add("nounwind")
    if not effect:
        call.attributes.add("readnone")
    return call


def _typed(
    result: Any,
    expected: tuple[Any, ...],
    given: tuple[Any, ...],
    text: str,
    constraints: str,
    *,
    barrier: bool = False,
) -> Any:
    """Answer a typing request: one instruction on scalars, or None where the types differ.

    A barrier orders memory, and no branch is moved around it.
    """
    if tuple(map(types.unliteral, given)) != expected:
        return None

    def codegen(context: Any, builder: Any, _: Any, operands: Any) -> Any:
        returns = ir.VoidType() if result is types.void else context.get_value_type(result)
        value = _call(builder, returns, list(operands), text, constraints, effect=barrier)
        if barrier:
            value.attributes.add("convergent")
        return context.get_dummy_value() if result is types.void else value

    return result(*expected), codegen


# ---------------------------------------------------------------------------------------
# Approximations. The twins are more exact than the instructions: they round the true value
# to float32, so what runs in the emulator shows no error of approximation.
# ---------------------------------------------------------------------------------------


def _emulated_tanh_approx(cuda: Any, x: float) -> Any:
    return float32(math.tanh(x))


@_instruction(_emulated_tanh_approx)
def tanh_approx(typing: Any, x: Any) -> Any:
    """float32 → float32: ``tanh.approx.f32``, relative error up to 2⁻¹¹; NaN stays NaN.

    PTX ISA, "Floating Point Instructions: tanh". The twin is tanh in float64, rounded.
    """
    return _typed(float32, (float32,), (x,), "tanh.approx.f32 $0, $1;", "=f,f")


def _emulated_exp2_approx(cuda: Any, x: float) -> Any:
    if x >= 128:
        return float32(math.inf)
    if x < -126:
        return float32(0)
    return float32(math.exp2(x))


@_instruction(_emulated_exp2_approx)
def exp2_approx(typing: Any, x: Any) -> Any:
    """float32 → float32: 2ˣ by ``ex2.approx.ftz.f32``, relative error about 2⁻²².

    Subnormal results are 0. PTX ISA, "Floating Point Instructions: ex2". The twin is 2ˣ in
    float64, rounded, and flushed likewise.
    """
    return _typed(float32, (float32,), (x,), "ex2.approx.ftz.f32 $0, $1;", "=f,f")


def _emulated_rcp_approx(cuda: Any, x: float) -> Any:
    if abs(x) < SMALLEST_NORMAL:
        return float32(math.copysign(math.inf, x))
    inverse = 1 / float(x)
    return float32(math.copysign(0.0, x) if abs(inverse) < SMALLEST_NORMAL else inverse)


@_instruction(_emulated_rcp_approx)
def rcp_approx(typing: Any, x: Any) -> Any:
    """float32 → float32: 1/x by ``rcp.approx.ftz.f32``, error up to one unit in the last place.

    Subnormal x counts as 0, a subnormal result is 0, both with their sign. PTX ISA, "Floating
    Point Instructions: rcp". The twin is 1/x in float64, rounded, and flushed likewise.
    """
    return _typed(float32, (float32,), (x,), "rcp.approx.ftz.f32 $0, $1;", "=f,f")


# ---------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------


def _emulated_prefetch_l2(cuda: Any, array: Any, index: int) -> None:
    if not 0 <= index < array.shape[0]:
        raise IndexError(f"prefetch of [{index}] in an array of shape {array.shape}")


@_instruction(_emulated_prefetch_l2)
def prefetch_l2(typing: Any, array: Any, index: Any) -> Any:
    """Have the line of ``array[index]``, in global memory, brought to the L2 cache; nobody waits.

    PTX ISA, "Data Movement and Conversion Instructions: prefetch", ``prefetch.global.L2``. The twin
    only sees that the index is in range.
    """
    if not isinstance(array, types.Array) or array.ndim != 1:
        return None

    def codegen(context: Any, builder: Any, _: Any, operands: Any) -> Any:
        address = _address(context, builder, array, operands[0], index, operands[1])
        asm = ir.InlineAsm(
            ir.FunctionType(ir.VoidType(), [address.type]),
            "prefetch.global.L2 [$0];",
            "l",
            side_effect=True,
        )
        builder.call(asm, [address])
        return context.get_dummy_value()

    return types.void(array, index), codegen


def _word(array: Any, index: Any) -> bool:
    """Whether these are a flat array of 32- or 64-bit integers, and an index."""
    return (
        isinstance(array, types.Array)
        and array.ndim == 1
        and isinstance(array.dtype, types.Integer)
        and array.dtype.bitwidth in (32, 64)
        and isinstance(index, types.Integer)
    )


def _address(context: Any, builder: Any, array: Any, given: Any, index: Any, place: Any) -> Any:
    struct = context.make_array(array)(context, builder, given)
    place = context.cast(builder, place, index, types.intp)
    return cgutils.get_item_pointer(context, builder, array, struct, [place])


def _strong_load(array: Any, index: Any, order: str) -> Any:
    if not _word(array, index):
        return None
    bits = array.dtype.bitwidth

    def codegen(context: Any, builder: Any, _: Any, operands: Any) -> Any:
        address = _address(context, builder, array, operands[0], index, operands[1])
        text = f"ld.{order}.gpu.global.b{bits} $0, [$1];"
        constraints = "=r,l" if bits == 32 else "=l,l"
        return _call(builder, ir.IntType(bits), [address], text, constraints, effect=True)

    return array.dtype(array, index), codegen


def _strong_store(array: Any, index: Any, value: Any, order: str) -> Any:
    if not _word(array, index) or types.unliteral(value) != array.dtype:
        return None
    bits = array.dtype.bitwidth

    def codegen(context: Any, builder: Any, _: Any, operands: Any) -> Any:
        address = _address(context, builder, array, operands[0], index, operands[1])
        text = f"st.{order}.gpu.global.b{bits} [$0], $1;"
        constraints = "l,r" if bits == 32 else "l,l"
        _call(builder, ir.VoidType(), [address, operands[2]], text, constraints, effect=True)
        return context.get_dummy_value()

    return types.void(array, index, array.dtype), codegen


def _emulated_load_relaxed(cuda: Any, array: Any, index: int) -> int:
    return int(cuda.emu.strong_load(array, index))


@_instruction(_emulated_load_relaxed)
def load_relaxed(typing: Any, array: Any, index: Any) -> Any:
    """Read ``array[index]``, an integer in global memory that other blocks write, now.

    ``ld.relaxed.gpu``: what a loop that waits must read by. Numba's own ``cuda.ldcv`` and
    ``cuda.ldcg`` are read once before a loop that stores nothing, by leave of the compiler.
    PTX ISA, "Data Movement and Conversion Instructions: ld"; "Memory Consistency Model".
    """
    return _strong_load(array, index, "relaxed")


def _emulated_load_acquire(cuda: Any, array: Any, index: int) -> int:
    return int(cuda.emu.strong_load(array, index, acquire=True))


@_instruction(_emulated_load_acquire)
def load_acquire(typing: Any, array: Any, index: Any) -> Any:
    """As ``load_relaxed``; what was written before the value was released is seen after it.

    ``ld.acquire.gpu``. PTX ISA, "Memory Consistency Model".
    """
    return _strong_load(array, index, "acquire")


def _emulated_store_relaxed(cuda: Any, array: Any, index: int, value: int) -> None:
    cuda.emu.strong_store(array, index, value)


@_instruction(_emulated_store_relaxed)
def store_relaxed(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write an integer to ``array[index]`` in global memory, for ``load_relaxed`` to read.

    ``st.relaxed.gpu``. PTX ISA, "Data Movement and Conversion Instructions: st".
    """
    return _strong_store(array, index, value, "relaxed")


def _emulated_store_release(cuda: Any, array: Any, index: int, value: int) -> None:
    cuda.emu.strong_store(array, index, value, release=True)


@_instruction(_emulated_store_release)
def store_release(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """As ``store_relaxed``; who reads the value by ``load_acquire`` sees all written before it.

    ``st.release.gpu``. PTX ISA, "Memory Consistency Model".
    """
    return _strong_store(array, index, value, "release")


def _emulated_fence_gpu(cuda: Any) -> None:
    cuda.threadfence()


@_instruction(_emulated_fence_gpu)
def fence_gpu(typing: Any) -> Any:
    """Put what this thread wrote, or saw written, before its next strong write, for all blocks.

    ``fence.acq_rel.gpu``, which is lighter than the ``fence.sc`` of ``cuda.threadfence``.
    PTX ISA, "Parallel Synchronization and Communication Instructions: membar/fence".
    """
    return _typed(types.void, (), (), "fence.acq_rel.gpu;", "", barrier=True)


# ---------------------------------------------------------------------------------------
# bfloat16 and half precision, as the 16 bits that an array of uint16 holds. Exact twins.
# ---------------------------------------------------------------------------------------


def _float_of(bits: int) -> Any:
    return float32(struct.unpack("<f", struct.pack("<I", bits))[0])


def _emulated_bf16_to_float(cuda: Any, bits: int) -> Any:
    return _float_of(int(bits) << 16)


@_instruction(_emulated_bf16_to_float)
def bf16_to_float(typing: Any, bits: Any) -> Any:
    """bfloat16 in a uint16 → float32, exactly: its bits are the upper half of the float32.

    PTX ISA, "Data Movement and Conversion Instructions: mov", packing two halves.
    """
    return _typed(float32, (uint16,), (bits,), "mov.b32 $0, {0, $1};", "=f,h")


def _emulated_float_to_bf16(cuda: Any, x: float) -> Any:
    if math.isnan(x):
        return uint16(NAN_16)
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    odd = bits >> 16 & 1
    return uint16(bits + 0x7FFF + odd >> 16)  # to nearest, halfway to even; may carry to infinity


@_instruction(_emulated_float_to_bf16)
def float_to_bf16(typing: Any, x: Any) -> Any:
    """float32 → bfloat16 in a uint16, to nearest, halfway to even; every NaN becomes 0x7FFF.

    PTX ISA, "Data Movement and Conversion Instructions: cvt", ``cvt.rn.bf16.f32``.
    """
    return _typed(uint16, (float32,), (x,), "cvt.rn.bf16.f32 $0, $1;", "=h,f")


def _emulated_half_to_float(cuda: Any, bits: int) -> Any:
    return float32(struct.unpack("<e", struct.pack("<H", bits))[0])


@_instruction(_emulated_half_to_float)
def half_to_float(typing: Any, bits: Any) -> Any:
    """Half precision in a uint16 → float32, exactly.

    PTX ISA, "Data Movement and Conversion Instructions: cvt", ``cvt.f32.f16``.
    """
    return _typed(float32, (uint16,), (bits,), "cvt.f32.f16 $0, $1;", "=f,h")


def _emulated_float_to_half(cuda: Any, x: float) -> Any:
    if math.isnan(x):
        return uint16(NAN_16)
    if abs(x) >= HALF_OVERFLOWS:
        return uint16(INFINITY_HALF | (0x8000 if x < 0 else 0))
    return uint16(struct.unpack("<H", struct.pack("<e", x))[0])


@_instruction(_emulated_float_to_half)
def float_to_half(typing: Any, x: Any) -> Any:
    """float32 → half precision in a uint16, to nearest, halfway to even; every NaN becomes 0x7FFF.

    PTX ISA, "Data Movement and Conversion Instructions: cvt", ``cvt.rn.f16.f32``.
    """
    return _typed(uint16, (float32,), (x,), "cvt.rn.f16.f32 $0, $1;", "=h,f")


def _pack(convert: Callable[[Any, float], Any]) -> Callable[..., Any]:
    def emulated(cuda: Any, low: float, high: float) -> Any:
        return uint32(int(convert(cuda, high)) << 16 | int(convert(cuda, low)))

    return emulated


@_instruction(_pack(_emulated_float_to_bf16))
def pack_bf16x2(typing: Any, low: Any, high: Any) -> Any:
    """Two float32 → two bfloat16 in a uint32, ``low`` in its lower half; rounded as by itself.

    PTX ISA, "Data Movement and Conversion Instructions: cvt", ``cvt.rn.bf16x2.f32``.
    """
    text = "cvt.rn.bf16x2.f32 $0, $2, $1;"  # the upper half comes first
    return _typed(uint32, (float32, float32), (low, high), text, "=r,f,f")


@_instruction(_pack(_emulated_float_to_half))
def pack_f16x2(typing: Any, low: Any, high: Any) -> Any:
    """Two float32 → two halves in a uint32, ``low`` in its lower half; rounded as by itself.

    PTX ISA, "Data Movement and Conversion Instructions: cvt", ``cvt.rn.f16x2.f32``.
    """
    text = "cvt.rn.f16x2.f32 $0, $2, $1;"
    return _typed(uint32, (float32, float32), (low, high), text, "=r,f,f")


def _unpack(convert: Callable[[Any, int], Any]) -> Callable[..., Any]:
    def emulated(cuda: Any, bits: int) -> Any:
        return convert(cuda, int(bits) & 0xFFFF), convert(cuda, int(bits) >> 16)

    return emulated


def _typed_unpack(given: Any, low: str, high: str) -> Any:
    if given != uint32:
        return None
    pair = types.UniTuple(float32, 2)

    def codegen(context: Any, builder: Any, _: Any, operands: Any) -> Any:
        halves = [
            _call(builder, ir.FloatType(), list(operands), text, "=f,r", effect=False)
            for text in (low, high)
        ]
        return context.make_tuple(builder, pair, halves)

    return pair(uint32), codegen


@_instruction(_unpack(_emulated_bf16_to_float))
def unpack_bf16x2(typing: Any, bits: Any) -> Any:
    """Two bfloat16 in a uint32 → the lower and the upper one as float32, exactly.

    PTX ISA, "Logic and Shift Instructions": ``shl.b32`` and ``and.b32``.
    """
    return _typed_unpack(bits, "shl.b32 $0, $1, 16;", "and.b32 $0, $1, 0xffff0000;")


@_instruction(_unpack(_emulated_half_to_float))
def unpack_f16x2(typing: Any, bits: Any) -> Any:
    """Two halves in a uint32 → the lower and the upper one as float32, exactly.

    PTX ISA, "Data Movement and Conversion Instructions: cvt", ``cvt.f32.f16``.
    """
    return _typed_unpack(
        bits,
        "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l; }",
        "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h; }",
    )


# ---------------------------------------------------------------------------------------
# Thread block clusters and barriers
# ---------------------------------------------------------------------------------------


def _emulated_cluster_rank(cuda: Any) -> Any:
    return cuda.emu.cluster_rank()


@_instruction(_emulated_cluster_rank)
def cluster_rank(typing: Any) -> Any:
    """→ int32, this block's place in its cluster, [0, cluster_size()).

    PTX ISA, "Special Registers: %cluster_ctarank".
    """
    return _typed(int32, (), (), "mov.u32 $0, %cluster_ctarank;", "=r")


def _emulated_cluster_size(cuda: Any) -> Any:
    return cuda.emu.cluster_size()


@_instruction(_emulated_cluster_size)
def cluster_size(typing: Any) -> Any:
    """→ int32, the number of blocks in the cluster.

    PTX ISA, "Special Registers: %cluster_nctarank".
    """
    return _typed(int32, (), (), "mov.u32 $0, %cluster_nctarank;", "=r")


def _emulated_cluster_arrive(cuda: Any) -> None:
    cuda.emu.cluster_arrive()


@_instruction(_emulated_cluster_arrive)
def cluster_arrive(typing: Any) -> Any:
    """Announce this thread at the cluster's barrier; what it wrote before is released.

    Every thread of a warp arrives together, and each arrival is followed by ``cluster_wait``.
    PTX ISA, "Parallel Synchronization and Communication Instructions: barrier.cluster".
    """
    return _typed(types.void, (), (), "barrier.cluster.arrive.release.aligned;", "", barrier=True)


def _emulated_cluster_wait(cuda: Any) -> None:
    cuda.emu.cluster_wait()


@_instruction(_emulated_cluster_wait)
def cluster_wait(typing: Any) -> Any:
    """Wait until every thread of the cluster has arrived; then what they released is visible.

    PTX ISA, "Parallel Synchronization and Communication Instructions: barrier.cluster".
    """
    return _typed(types.void, (), (), "barrier.cluster.wait.acquire.aligned;", "", barrier=True)


def _remote_address(
    context: Any, builder: Any, array: Any, given: Any, index: Any, rank: Any
) -> Any:
    """The 32-bit shared::cluster address of element ``index`` of the array of block ``rank``.

    mapa has no effect of its own: of one array and rank the compiler computes it once.
    """
    base = builder.ptrtoint(context.make_array(array)(context, builder, given).data, ir.IntType(64))
    text = (
        "{ .reg .u64 a; .reg .u32 s; cvta.to.shared.u64 a, $1; cvt.u32.u64 s, a; "
        "mapa.shared::cluster.u32 $0, s, $2; }"
    )
    mapped = _call(builder, ir.IntType(32), [base, rank], text, "=r,l,r", effect=False)
    size = context.get_constant(int32, array.dtype.bitwidth // 8)
    return builder.add(mapped, builder.mul(index, size))


def _is_remote(array: Any, *numbers: Any, bits: tuple[int, ...] = (32, 64)) -> bool:
    return (
        isinstance(array, types.Array)
        and array.layout == "C"
        and isinstance(array.dtype, types.Number)
        and array.dtype.bitwidth in bits
        and all(isinstance(number, types.Integer) for number in numbers)
    )


def _emulated_cluster_store(cuda: Any, array: Any, index: int, rank: int, value: Any) -> None:
    cuda.emu.cluster_map(array, rank).reshape(-1)[index] = value


@_instruction(_emulated_cluster_store)
def cluster_store(typing: Any, array: Any, index: Any, rank: Any, value: Any) -> Any:
    """Write ``value`` to the place ``index`` of the flat shared array of block ``rank``.

    ``array`` is this block's own shared array, of 16-, 32- or 64-bit numbers; that of the other
    block lies at the same offset. ``value`` has its dtype.

    PTX ISA, "Data Movement and Conversion Instructions": ``mapa`` and ``st.shared::cluster``.
    """
    remote = _is_remote(array, index, rank, bits=(16, 32, 64))
    if not remote or types.unliteral(value) != array.dtype:
        return None
    signature = types.void(array, int32, int32, array.dtype)
    bits = array.dtype.bitwidth

    def codegen(context: Any, builder: Any, _: Any, operands: Any) -> Any:
        given, place, block, number = operands
        address = _remote_address(context, builder, array, given, place, block)
        word = builder.bitcast(number, ir.IntType(bits))
        text = f"st.shared::cluster.b{bits} [$0], $1;"
        constraints = {16: "r,h", 32: "r,r", 64: "r,l"}[bits]
        _call(builder, ir.VoidType(), [address, word], text, constraints, effect=True)
        return context.get_dummy_value()

    return signature, codegen


def _emulated_cluster_load(cuda: Any, array: Any, index: int, rank: int) -> Any:
    return cuda.emu.cluster_map(array, rank).reshape(-1)[index]


@_instruction(_emulated_cluster_load)
def cluster_load(typing: Any, array: Any, index: Any, rank: Any) -> Any:
    """Read the place ``index`` of the flat shared array of block ``rank``; see ``cluster_store``.

    Of 32- or 64-bit numbers.
    PTX ISA, "Data Movement and Conversion Instructions": ``mapa`` and ``ld.shared::cluster``.
    """
    if not _is_remote(array, index, rank):
        return None
    bits = array.dtype.bitwidth

    def codegen(context: Any, builder: Any, _: Any, operands: Any) -> Any:
        address = _remote_address(context, builder, array, *operands)
        text = f"ld.shared::cluster.b{bits} $0, [$1];"
        constraints = "=r,r" if bits == 32 else "=l,r"
        word = _call(builder, ir.IntType(bits), [address], text, constraints, effect=True)
        return builder.bitcast(word, context.get_value_type(array.dtype))

    return array.dtype(array, int32, int32), codegen


def _emulated_bar_sync(cuda: Any, barrier: int, count: int) -> None:
    cuda.emu.bar_sync(barrier, count)


@_instruction(_emulated_bar_sync)
def bar_sync(typing: Any, barrier: Any, count: Any) -> Any:
    """Wait at the block's barrier ``barrier`` (1–15; 0 is syncthreads) for ``count`` threads.

    ``count`` is a multiple of 32, and whole warps arrive.
    PTX ISA, "Parallel Synchronization and Communication Instructions: bar", ``bar.sync``.
    """
    if not all(isinstance(number, types.Integer) for number in (barrier, count)):
        return None
    expected = (int32, int32)
    return _typed(types.void, expected, expected, "bar.sync $0, $1;", "r,r", barrier=True)


# ---------------------------------------------------------------------------------------
# Several numbers at once
# ---------------------------------------------------------------------------------------


def _emulated_load_floats4(cuda: Any, array: Any, index: int) -> Any:
    return tuple(array[index + i] for i in range(4))


@_instruction(_emulated_load_floats4)
def load_floats4(typing: Any, array: Any, index: Any) -> Any:
    """Read ``array[index]`` to ``array[index + 3]``, float32, as one vector → UniTuple(float32, 4).

    The array is flat and its beginning aligned to 16 bytes; index is a multiple of 4. An ordinary
    load: the compiler may move it, and finds out itself that the memory is shared. PTX ISA, "Data
    Movement and Conversion Instructions: ld", ``ld.v4``.
    """
    if not isinstance(array, types.Array) or array.ndim != 1 or array.dtype != float32:
        return None
    quad = types.UniTuple(float32, 4)

    def codegen(context: Any, builder: Any, _: Any, operands: Any) -> Any:
        address = _address(context, builder, array, operands[0], index, operands[1])
        vector = ir.VectorType(ir.FloatType(), 4)
        value = builder.load(builder.bitcast(address, vector.as_pointer()), align=16)
        parts = [builder.extract_element(value, ir.Constant(ir.IntType(32), i)) for i in range(4)]
        return context.make_tuple(builder, quad, parts)

    return quad(array, index), codegen


def _emulated_load_relaxed_pair(cuda: Any, array: Any, index: int) -> Any:
    return tuple(int(cuda.emu.strong_load(array, index + i)) for i in range(2))


@_instruction(_emulated_load_relaxed_pair)
def load_relaxed_pair(typing: Any, array: Any, index: Any) -> Any:
    """Read the uint64 ``array[index]`` and ``array[index + 1]`` → UniTuple(uint64, 2).

    As ``load_relaxed``, and each number by itself: what one is says nothing of the other. The flat
    array begins at a multiple of 16 bytes, index is even. PTX ISA, "Data Movement and Conversion
    Instructions: ld", ``ld.relaxed.gpu.global.v2.b64``; "Memory Consistency Model: Vector Data
    Types".
    """
    if not isinstance(array, types.Array) or array.ndim != 1 or array.dtype != types.uint64:
        return None
    pair = types.UniTuple(types.uint64, 2)
    word = ir.IntType(64)

    def codegen(context: Any, builder: Any, _: Any, operands: Any) -> Any:
        address = _address(context, builder, array, operands[0], index, operands[1])
        text = "ld.relaxed.gpu.global.v2.b64 {$0, $1}, [$2];"
        both = ir.LiteralStructType([word, word])
        value = _call(builder, both, [address], text, "=l,=l,l", effect=True)
        parts = [builder.extract_value(value, i) for i in range(2)]
        return context.make_tuple(builder, pair, parts)

    return pair(array, index), codegen


# ---------------------------------------------------------------------------------------
# The bits of a float32
# ---------------------------------------------------------------------------------------


def _emulated_float_bits(cuda: Any, x: float) -> Any:
    return float32(x).view("u4")  # NaN and all


@_instruction(_emulated_float_bits)
def float_bits(typing: Any, x: Any) -> Any:
    """float32 → its bits, a uint32. PTX ISA, "Data Movement and Conversion Instructions: mov"."""
    return _typed(uint32, (float32,), (x,), "mov.b32 $0, $1;", "=r,f")


def _emulated_bits_float(cuda: Any, bits: int) -> Any:
    return uint32(bits).view("f4")


@_instruction(_emulated_bits_float)
def bits_float(typing: Any, bits: Any) -> Any:
    """The bits of a float32, a uint32 → the float32. PTX ISA as for ``float_bits``."""
    return _typed(float32, (uint32,), (bits,), "mov.b32 $0, $1;", "=f,r")
