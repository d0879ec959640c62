"""Products of one vector in shared memory with a matrix that lies anywhere, as device functions.

``gpurnn.dense.Dense`` says who owns what, and how the matrix is packed.
"""

from typing import Any, NamedTuple

from numba import cuda, float32, uint32

from gpurnn.dense import Dense
from gpurnn.kernels.device import DeviceFunction, device, in_order
from gpurnn.kernels.ptx import load_floats4
from gpurnn.tile import VECTOR

__all__ = ["Functions", "dense"]

ALL_LANES = 0xFFFFFFFF
AT_ONCE = 32
"""Registers for what a thread loads of W, at most, before it uses the first number."""
FROM_SHARED, FROM_GLOBAL = 16, 1
"""Such loads that are written out one after another; of more there is a loop.

The compiler brings loads forward as far as there are registers: those of global memory too far.
"""


class Functions(NamedTuple):
    """Device functions of one matrix. ``packed`` is the flat array it begins in at ``packed_at``,
    ``shared`` the block's dynamic shared memory, where what is held of it begins at ``held_at``.

    ``w`` is a local array of ``weights`` numbers, ``acc`` one of ``sums``.

    ``load(packed, shared, w)``: read what stays on the chip; a thread reads back only what it wrote
    itself. Only threads that multiply come here, as to all that follows.

    ``multiply(packed, shared, w, at, p, acc)``: the thread's sums of pass p, of the vector whose
    number k lies at ``at + place(k)``; slices are padded with zeros up to ``depth``. A barrier must
    stand between its last write and this.

    ``finish(acc)``: sum over the lanes of a group, whole warps together. Then ``acc[e]`` for
    e < ``own`` is the sum of column ``column(p, e)``, where ``owner()``; it may lie beyond W.

    The order of a sum depends on h, ``slices`` and ``columns`` (by ``parts``) alone: not on where W
    lies, nor on how many threads there are.
    """

    weights: int
    sums: int
    own: int
    load: DeviceFunction
    multiply: DeviceFunction
    finish: DeviceFunction
    column: DeviceFunction
    owner: DeviceFunction


def dense(sizes: Dense, real: Any, packed_at: int = 0, held_at: int = 0) -> Functions:
    """Build the functions, for W of ``real``: numba.float32 or numba.float64.

    ``held_at`` must be a multiple of 4, and so must ``packed_at``.
    """
    return Functions(
        weights=max(1, sizes.kept * VECTOR * sizes.columns),
        sums=sizes.columns * sizes.parts,
        own=sizes.own,
        load=_load(sizes, real, packed_at, held_at),
        multiply=_multiply(sizes, real, packed_at, held_at),
        finish=_finish(sizes),
        column=_column(sizes),
        owner=_owner(sizes),
    )


def _four(real: Any) -> DeviceFunction:
    if real == float32:

        @device
        def of_floats(A, at):
            return load_floats4(A, at)

        return of_floats

    one, two, three = uint32(1), uint32(2), uint32(3)

    @device
    def of_doubles(A, at):
        return A[at], A[at + one], A[at + two], A[at + three]

    return of_doubles


def _load(sizes: Dense, real: Any, packed_at: int, held_at: int) -> DeviceFunction:
    C, piece, vector = sizes.columns, sizes.piece_numbers, uint32(VECTOR)
    threads = uint32(sizes.threads)
    four = _four(real)

    def to_registers(i):
        at, begin = uint32(packed_at + i * piece), i * C * VECTOR

        @device
        def run(packed, shared, w, thread, _):
            for c in range(C):
                x = four(packed, at + (uint32(c) * threads + thread) * vector)
                for e in range(VECTOR):
                    w[begin + c * VECTOR + e] = x[e]

        return run

    first, vectors = uint32(packed_at + sizes.kept * piece), uint32(sizes.held * C)
    there = uint32(held_at)

    @device
    def to_shared(packed, shared, w, thread, _):
        for c in range(vectors):
            at = (uint32(c) * threads + thread) * vector
            x = four(packed, first + at)
            for e in range(VECTOR):
                shared[there + at + uint32(e)] = x[e]

    pieces = [to_registers(i) for i in range(sizes.kept)]
    if sizes.held:
        pieces.append(to_shared)
    if not pieces:

        @device
        def nothing(packed, shared, w):
            pass

        return nothing
    all_pieces = in_order(pieces)

    @device
    def load(packed, shared, w):
        all_pieces(packed, shared, w, uint32(cuda.threadIdx.x), 0)

    return load


def _multiply(sizes: Dense, real: Any, packed_at: int, held_at: int) -> DeviceFunction:
    C, parts, quads = sizes.columns, sizes.parts, sizes.quads
    piece, vector, threads = sizes.piece_numbers, uint32(VECTOR), uint32(sizes.threads)
    lanes, stride = uint32(sizes.slices), uint32(sizes.stride)
    zero, sums = real(0), C * parts
    four = _four(real)

    def of_registers(i):
        begin, k = i * C * VECTOR, uint32(i * VECTOR)

        @device
        def run(w, shared, at, _, acc):
            x = four(shared, at + k)
            for e in range(VECTOR):
                for c in range(C):
                    acc[c * parts + e % parts] += x[e] * w[begin + c * VECTOR + e]

        return run

    def of_memory(count):
        """``count`` pieces of W, the first at ``here``, with v from ``at`` on."""
        numbers = count * C * VECTOR

        @device
        def run(W, shared, at, here, acc):
            weights = cuda.local.array(numbers, real)
            for i in range(count):
                for c in range(C):
                    place = here + uint32(i * piece) + uint32(c) * threads * vector
                    x = four(W, place)
                    for e in range(VECTOR):
                        weights[(i * C + c) * VECTOR + e] = x[e]
            for i in range(count):
                x = four(shared, at + uint32(i * VECTOR))
                for e in range(VECTOR):
                    for c in range(C):
                        acc[c * parts + e % parts] += x[e] * weights[(i * C + c) * VECTOR + e]

        return run

    def moved(some, i):
        k, further = uint32(i * VECTOR), uint32(i * piece)

        @device
        def run(W, shared, at, here, acc):
            some(W, shared, at + k, here + further, acc)

        return run

    def from_memory(first, count, unrolled):
        """Pieces of a pass, with v from piece ``first`` on, loaded some at a time."""
        words = 1 if real == float32 else 2
        together = min(count, max(1, AT_ONCE // (C * VECTOR * words)))
        groups, rest = count // together, count % together
        some = of_memory(together)
        if groups <= unrolled:
            pieces = [moved(some, i * together) for i in range(groups)]
        else:
            k, further, rounds = (
                uint32(together * VECTOR),
                uint32(together * piece),
                uint32(groups),
            )

            @device
            def loop(W, shared, at, here, acc):
                for _ in range(rounds):
                    some(W, shared, at, here, acc)
                    at += k
                    here += further

            pieces = [loop]
        if rest:
            pieces.append(moved(of_memory(rest), groups * together))
        all_pieces, k_first = in_order(pieces), uint32(first * VECTOR)

        @device
        def run(W, shared, at, here, acc):
            all_pieces(W, shared, at + k_first, here, acc)

        return run

    @device
    def nothing(W, shared, at, here, acc):
        pass

    kept = [of_registers(i) for i in range(sizes.kept)]
    from_registers = in_order(kept) if kept else nothing
    pass_numbers = uint32(quads * piece)
    held_begin, end = uint32(held_at), sizes.kept + sizes.held
    packed_begin = uint32(packed_at + (end * piece if sizes.passes == 1 else 0))
    if sizes.passes == 1:
        from_shared = from_memory(sizes.kept, sizes.held, FROM_SHARED) if sizes.held else nothing
        from_global = from_memory(end, quads - end, FROM_GLOBAL) if end < quads else nothing
    else:  # all of it here or there
        from_shared = from_memory(0, quads, FROM_SHARED) if sizes.held else nothing
        from_global = nothing if sizes.held else from_memory(0, quads, FROM_GLOBAL)

    @device
    def multiply(packed, shared, w, at, p, acc):
        thread = uint32(cuda.threadIdx.x)
        for i in range(sums):
            acc[i] = zero
        mine = at + thread % lanes * stride
        here = p * pass_numbers + thread * vector
        from_registers(w, shared, mine, 0, acc)
        from_shared(shared, shared, mine, held_begin + here, acc)
        from_global(packed, shared, mine, packed_begin + here, acc)

    return multiply


def _finish(sizes: Dense) -> DeviceFunction:
    """Add up a column's parts, then lanes: by halves, while a lane has more than one sum.

    The lane whose bit is set keeps the upper half and sends the lower, its partner the reverse.
    """
    C, parts, lanes = sizes.columns, sizes.parts, uint32(sizes.slices)
    none = uint32(0)

    @device
    def fold(acc, s, _1, _2, _3):
        for c in range(C):
            acc[c] = (acc[c * parts] + acc[c * parts + 1]) + (
                acc[c * parts + 2] + acc[c * parts + 3]
            )

    def halve(count, distance):
        bit = uint32(distance)

        @device
        def run(acc, s, _1, _2, _3):
            upper = (s & bit) != none
            for i in range(count):
                low, high = acc[i], acc[i + count]
                keep = high if upper else low
                send = low if upper else high
                acc[i] = keep + cuda.shfl_xor_sync(ALL_LANES, send, distance)

        return run

    def together(distance):
        @device
        def run(acc, s, _1, _2, _3):
            acc[0] += cuda.shfl_xor_sync(ALL_LANES, acc[0], distance)

        return run

    steps = [fold] if parts > 1 else []
    count, distance = C, sizes.slices // 2
    while distance:
        steps.append(together(distance) if count == 1 else halve(count // 2, distance))
        count, distance = max(1, count // 2), distance // 2
    summed = in_order(steps)

    @device
    def finish(acc):
        summed(acc, uint32(cuda.threadIdx.x) % lanes, 0, 0, 0)

    return finish


def _column(sizes: Dense) -> DeviceFunction:
    lanes, columns, own = uint32(sizes.slices), uint32(sizes.columns), uint32(sizes.own)
    copies, groups = uint32(sizes.slices // sizes.finished), uint32(sizes.groups)

    @device
    def column(p, e):
        thread = uint32(cuda.threadIdx.x)
        number = thread % lanes // copies * own + uint32(e)
        return (p * groups + thread // lanes) * columns + number

    return column


def _owner(sizes: Dense) -> DeviceFunction:
    copies, none = uint32(sizes.slices // sizes.finished), uint32(0)

    @device
    def owner():
        return uint32(cuda.threadIdx.x) % copies == none

    return owner
