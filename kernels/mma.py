"""Products of small matrices on tensor cores: a warp's instructions, with twins for the emulator.

As in ``gpurnn.kernels.ptx``, whose conventions hold here; compute capability 8.0 and later. All 32
lanes of a warp take part in an ``mma`` together. Lane 4 g + q of them holds, by PTX ISA, "Warp
Level Matrix Instructions: Matrix Fragments for mma.m16n8k16" and "… mma.m16n8k8":

====================  =================================  =====================================
matrix                16-bit numbers, k = 0 … 15         TF32, k = 0 … 7
====================  =================================  =====================================
A (16, k): a0, a1     rows g, g + 8; k = 2q and 2q + 1   rows g, g + 8; k = q
A (16, k): a2, a3     rows g, g + 8; k = 2q + 8, 2q + 9  rows g, g + 8; k = q + 4
B (k, 8): b0, b1      column g; k = 2q, 2q + 1 in b0,    column g; k = q in b0, q + 4 in b1
                      2q + 8, 2q + 9 in b1
C, D (16, 8): 0 to 3  rows g, g, g + 8, g + 8 of columns 2q, 2q + 1, 2q, 2q + 1
====================  =================================  =====================================

Of two numbers in a register the one of smaller k is in the lower half.
"""

import math
import struct
from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

from llvmlite import ir
from numba.cuda import types

from gpurnn.kernels.ptx import (
    _address,
    _call,
    _emulated_bf16_to_float,
    _emulated_half_to_float,
    _float_of,
    _instruction,
    _typed,
)

__all__ = ["load_words4", "mma_bf16", "mma_f16", "mma_tf32", "to_tf32"]

float32, uint32 = types.float32, types.uint32

INFINITY = 0x7F800000
NAN_TF32 = 0x7FFFFFFF
DROPPED = 13  # bits of a float32's significand that TF32 has not


# ---------------------------------------------------------------------------------------
# D = A B + C
# ---------------------------------------------------------------------------------------


@cache
def _all_of(convert: Callable[[Any, int], Any]) -> list[float]:
    """What each 16 bits stand for."""
    return [float(convert(None, bits)) for bits in range(1 << 16)]


def _halves(convert: Callable[[Any, int], Any]) -> Callable[..., list[float]]:
    def numbers(low: list[int], high: list[int]) -> list[float]:
        value = _all_of(convert)
        return [value[half] for word in chain(low, high) for half in (word & 0xFFFF, word >> 16)]

    return numbers


def _tf32s(low: list[int], high: list[int]) -> list[float]:
    return [float(_float_of(word)) for word in chain(low, high)]


def _emulated_mma(numbers: Callable[..., list[float]]) -> Callable[..., Any]:
    """Make a twin; ``numbers`` are those of four lanes' first and second registers, k rising.

    A lane puts together the two rows of A and the two columns of B that its own four sums need.
    """

    def emulated(
        cuda: Any,
        a0: int,
        a1: int,
        a2: int,
        a3: int,
        b0: int,
        b1: int,
        c0: float,
        c1: float,
        c2: float,
        c3: float,
    ) -> Any:
        lane = int(cuda.laneid)
        words = tuple(int(word) for word in (a0, a1, a2, a3, b0, b1))
        held = cuda.emu.exchange(words)

        def of_four(group: int, first: int, second: int) -> list[float]:
            four = [held[4 * group + quad] for quad in range(4)]
            return numbers([w[first] for w in four], [w[second] for w in four])

        group, pair = lane // 4, lane % 4 * 2
        rows = of_four(group, 0, 2), of_four(group, 1, 3)
        columns = of_four(pair, 4, 5), of_four(pair + 1, 4, 5)
        sums = []
        for c, row, column in (
            (c0, rows[0], columns[0]),
            (c1, rows[0], columns[1]),
            (c2, rows[1], columns[0]),
            (c3, rows[1], columns[1]),
        ):
            total = float32(c)
            for a, b in zip(row, column, strict=True):
                total += a * b  # exact, then a sum of float32
            sums.append(total)
        return tuple(sums)

    return emulated


def _typed_mma(shape: str, kind: str, given: tuple[Any, ...]) -> Any:
    quad = types.UniTuple(float32, 4)
    expected = (uint32,) * 6 + (float32,) * 4
    if tuple(map(types.unliteral, given)) != expected:
        return None

    def codegen(context: Any, builder: Any, _: Any, operands: Any) -> Any:
        text = (
            f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        four = ir.LiteralStructType([ir.FloatType()] * 4)
        constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
        value = _call(builder, four, list(operands), text, constraints, effect=False)
        value.attributes.add("convergent")
        parts = [builder.extract_value(value, i) for i in range(4)]
        return context.make_tuple(builder, quad, parts)

    return quad(*expected), codegen


@_instruction(_emulated_mma(_halves(_emulated_half_to_float)))
def mma_f16(
    typing: Any,
    a0: Any,
    a1: Any,
    a2: Any,
    a3: Any,
    b0: Any,
    b1: Any,
    c0: Any,
    c1: Any,
    c2: Any,
    c3: Any,
) -> Any:
    """A (16, 16) B (16, 8) + C of halves, two in a uint32, and float32 → UniTuple(float32, 4).

    PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions: mma",
    ``mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32``; who holds what is said above. Products
    are exact. The twin adds them to C in rising k, each sum rounded to float32; in what order the
    hardware adds, and how it rounds in between, is its own affair, but the same in every tile.
    """
    return _typed_mma("m16n8k16", "f16", (a0, a1, a2, a3, b0, b1, c0, c1, c2, c3))


@_instruction(_emulated_mma(_halves(_emulated_bf16_to_float)))
def mma_bf16(
    typing: Any,
    a0: Any,
    a1: Any,
    a2: Any,
    a3: Any,
    b0: Any,
    b1: Any,
    c0: Any,
    c1: Any,
    c2: Any,
    c3: Any,
) -> Any:
    """As ``mma_f16``, of bfloat16.

    PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions: mma",
    ``mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32``.
    """
    return _typed_mma("m16n8k16", "bf16", (a0, a1, a2, a3, b0, b1, c0, c1, c2, c3))


@_instruction(_emulated_mma(_tf32s))
def mma_tf32(
    typing: Any,
    a0: Any,
    a1: Any,
    a2: Any,
    a3: Any,
    b0: Any,
    b1: Any,
    c0: Any,
    c1: Any,
    c2: Any,
    c3: Any,
) -> Any:
    """A (16, 8) B (8, 8) + C, A and B the bits of float32 → UniTuple(float32, 4); as ``mma_f16``.

    The hardware takes no notice of the lower 13 bits of what it multiplies, which ``to_tf32``
    clears; the twin takes them as they are.

    PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions: mma",
    ``mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32``.
    """
    return _typed_mma("m16n8k8", "tf32", (a0, a1, a2, a3, b0, b1, c0, c1, c2, c3))


def _emulated_to_tf32(cuda: Any, x: float) -> Any:
    if math.isnan(x):
        return uint32(NAN_TF32)
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    if bits & INFINITY != INFINITY:
        bits += 1 << (DROPPED - 1)  # of the magnitude: halfway goes away from 0; may carry to ∞
    return uint32(bits >> DROPPED << DROPPED)


@_instruction(_emulated_to_tf32)
def to_tf32(typing: Any, x: Any) -> Any:
    """float32 → the bits of the nearest float32 of 10 bits of significand, halfway away from 0.

    Infinities stay, and so do subnormal numbers but for the bits that fall off; from 2¹²⁸ − 2¹¹⁶ on
    a number becomes infinite; a NaN becomes some NaN, the twin's 0x7FFFFFFF.

    PTX ISA, "Data Movement and Conversion Instructions: cvt", ``cvt.rna.tf32.f32``.
    """
    return _typed(uint32, (float32,), (x,), "cvt.rna.tf32.f32 $0, $1;", "=r,f")


# ---------------------------------------------------------------------------------------
# Four registers at once
# ---------------------------------------------------------------------------------------


def _emulated_load_words4(cuda: Any, array: Any, index: int) -> Any:
    size = array.dtype.itemsize
    items = [array[index + i] for i in range(16 // size)]
    code = {"f": "f", "u": "I" if size == 4 else "H", "i": "i" if size == 4 else "h"}
    raw = struct.pack(f"<{len(items)}{code[array.dtype.kind]}", *items)
    return tuple(uint32(word) for word in struct.unpack("<4I", raw))


@_instruction(_emulated_load_words4)
def load_words4(typing: Any, array: Any, index: Any) -> Any:
    """Read the 16 bytes from ``array[index]`` on as one vector → UniTuple(uint32, 4).

    The array is flat, of numbers of 16 or 32 bits, and its beginning aligned to 16 bytes; index is
    a multiple of 8 or 4. Of two numbers in a word the first is in the lower half. An ordinary load,
    which the compiler may move: ``ld.v4``, by PTX ISA, "Data Movement and Conversion Instructions:
    ld".
    """
    if not isinstance(array, types.Array) or array.ndim != 1 or array.layout != "C":
        return None
    dtype = array.dtype
    real = isinstance(dtype, types.Float) and dtype.bitwidth == 32
    integer = isinstance(dtype, types.Integer) and dtype.bitwidth in (16, 32)
    if not (real or integer) or not isinstance(index, types.Integer):
        return None
    quad = types.UniTuple(uint32, 4)

    def codegen(context: Any, builder: Any, _: Any, operands: Any) -> Any:
        address = _address(context, builder, array, operands[0], index, operands[1])
        vector = ir.VectorType(ir.IntType(32), 4)
        value = builder.load(builder.bitcast(address, vector.as_pointer()), align=16)
        parts = [builder.extract_element(value, ir.Constant(ir.IntType(32), i)) for i in range(4)]
        return context.make_tuple(builder, quad, parts)

    return quad(array, index), codegen
