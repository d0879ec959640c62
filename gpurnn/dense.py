"""How a block of a generating kernel shares out its products, and its memory: sizes only.

A generating kernel multiplies one vector, a state, with several matrices. ``Dense`` says how one of
them is shared out among threads, and where each part of it lies; ``RowSizes`` and ``GroupSizes``
are what a whole kernel is compiled for.
"""

from typing import NamedTuple

from gpurnn.tile import VECTOR, WARP, Share

__all__ = ["MOST_OF_A_WARP", "Dense", "GroupSizes", "RowSizes"]

MOST_OF_A_WARP = 128
"""Tokens of which one warp draws; of more all warps of a block do."""


class Dense(NamedTuple):
    """A matrix W (h, width), times a vector v of h numbers in shared memory.

    ``threads`` threads come in groups of ``slices`` neighbouring lanes. A group owns ``columns``
    neighbouring columns at a time, and takes as many times as many as it must: ``passes``. Lane s
    owns the rows of W, the k, from ``s · depth`` on, four at a time: a *piece* is four k of one
    thread and all its columns of a pass. A thread's pieces, pass by pass, lie in registers, the
    first ``kept`` (of the only pass), then in shared memory, ``held``, the rest in global memory.

    In global memory W is *packed*, so that neighbouring threads read neighbouring numbers: an array
    of shape (passes, quads, columns, threads, 4), thread = group · slices + s, whose element (p, i,
    c, thread, e) is W[s · depth + 4 i + e, (p · groups + group) · columns + c], and 0 beyond W.
    """

    h: int
    width: int
    columns: int
    slices: int
    threads: int
    kept: int = 0
    held: int = 0

    @property
    def groups(self) -> int:
        """Groups of lanes."""
        return self.threads // self.slices

    @property
    def depth(self) -> int:
        """Rows of W that a lane owns."""
        return -(-self.h // (self.slices * VECTOR)) * VECTOR

    @property
    def quads(self) -> int:
        """Pieces of a thread in a pass."""
        return self.depth // VECTOR

    @property
    def passes(self) -> int:
        """How often the block's columns cover W."""
        return -(-self.width // (self.groups * self.columns))

    @property
    def pieces(self) -> int:
        """Pieces of a thread."""
        return self.passes * self.quads

    @property
    def stride(self) -> int:
        """Distance of two slices of v in shared memory; see ``tile.Tile.stride``."""
        return self.depth if self.depth % 8 == VECTOR else self.depth + VECTOR

    @property
    def piece_numbers(self) -> int:
        """Numbers of one piece of all threads: how far pieces lie from each other."""
        return self.columns * self.threads * VECTOR

    @property
    def numbers(self) -> int:
        """Numbers of W, packed."""
        return self.pieces * self.piece_numbers

    @property
    def held_numbers(self) -> int:
        """Numbers of it that a block holds in shared memory."""
        return self.held * self.piece_numbers

    @property
    def parts(self) -> int:
        """Sums that a column's is made of at first, one for each k modulo this many.

        Few columns at a time would otherwise be few sums, each waiting for itself.
        """
        return VECTOR if self.columns <= 2 else 1

    @property
    def finished(self) -> int:
        """Lanes of a group that are left with different sums; the others hold copies."""
        return min(self.slices, self.columns)

    @property
    def own(self) -> int:
        """Sums of a pass that a lane is left with."""
        return self.columns // self.finished


class RowSizes(NamedTuple):
    """A kernel in which one block generates one row of the batch.

    ``matrices`` are W_hh, then W_xh and W_hh of each further layer, then W_hq: all of one h and one
    number of ``slices``, so that they read one layout of a state, and all but W_hq, which may take
    fewer, of one number of threads. Beside the threads that multiply there is a warp that draws.

    Shared memory, in numbers of the kernel's type, in this order: two states of each layer; the
    sums h W_hh of each layer; logits and masses (2 · q, where ``logits_on_chip``); what is held of
    the matrices, one after another.
    """

    h: int
    q: int
    layers: int
    matrices: tuple[Dense, ...]
    logits_on_chip: bool

    @property
    def product_threads(self) -> int:
        """Threads that multiply."""
        return self.matrices[0].threads

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.product_threads + WARP

    @property
    def state(self) -> int:
        """Numbers of a state in shared memory, with its padding."""
        return self.matrices[0].slices * self.matrices[0].stride

    @property
    def sums_at(self) -> int:
        """Where the sums of the layers begin."""
        return 2 * self.layers * self.state

    def sums_of(self, layer: int) -> int:
        """Return where those of a layer begin."""
        return self.sums_at + layer * _by_four(self.h)

    @property
    def logits_at(self) -> int:
        """Where the logits begin."""
        return self.sums_of(self.layers)

    @property
    def masses_at(self) -> int:
        """Where the masses begin."""
        return self.logits_at + _by_four(self.q)

    @property
    def held_at(self) -> tuple[int, ...]:
        """Where what is held of each matrix begins."""
        begin = self.logits_at + (2 * _by_four(self.q) if self.logits_on_chip else 0)
        starts = []
        for matrix in self.matrices:
            starts.append(begin)
            begin += matrix.held_numbers
        return tuple(starts)

    @property
    def shared_numbers(self) -> int:
        """Numbers of dynamic shared memory."""
        return self.held_at[-1] + self.matrices[-1].held_numbers

    @property
    def packed_at(self) -> tuple[int, ...]:
        """Where each matrix begins in the array of all packed ones."""
        starts, begin = [], 0
        for matrix in self.matrices:
            starts.append(begin)
            begin += matrix.numbers
        return tuple(starts)


class GroupSizes(NamedTuple):
    """A kernel in which the blocks of a group generate one row of the batch, in float32.

    ``share`` says how W_hh is split over them (one row, one pass); W_hq is ``output``. Where
    ``split`` is false each block multiplies with all of W_hq; where it is true, with its part, the
    columns from rank · width on, as many as ``output`` is wide, and logits are exchanged as well.

    Shared memory, behind that of ``share``: logits (two buffers where ``split``) and masses, the
    block's part of b_q, where ``table_on_chip`` its columns of the table (q, width), then what is
    held of W_hq.
    """

    share: Share
    q: int
    output: Dense
    split: bool
    table_on_chip: bool

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.share.threads

    @property
    def logits_at(self) -> int:
        """Where the logits begin."""
        return self.share.shared_weights + self.share.shared_values

    @property
    def logits_stride(self) -> int:
        """Distance of two buffers of logits."""
        return _by_four(self.q)

    @property
    def masses_at(self) -> int:
        """Where the masses begin."""
        return self.logits_at + (2 if self.split else 1) * self.logits_stride

    @property
    def bias_at(self) -> int:
        """Where b_q begins."""
        return self.masses_at + _by_four(self.q)

    @property
    def table_at(self) -> int:
        """Where the table begins."""
        return self.bias_at + _by_four(self.output.width)

    @property
    def held_at(self) -> int:
        """Where what is held of W_hq begins."""
        return self.table_at + (_by_four(self.q * self.share.width) if self.table_on_chip else 0)

    @property
    def shared_numbers(self) -> int:
        """Numbers of dynamic shared memory."""
        return self.held_at + self.output.held_numbers


def _by_four(count: int) -> int:
    return -(-count // VECTOR) * VECTOR
