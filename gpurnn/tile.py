"""How a block shares out a product with W_hh among its threads: sizes only, no device code.

A block computes ``a[r, j] = Σ_k v[r, k] W[k, j]`` for its ``rows`` rows r and all h columns j, with
W resident. Threads come in groups of ``slices`` neighbouring lanes. Group g owns the ``columns``
columns from ``g · columns`` on; lane s of a group owns the rows of W (the k) from ``s · depth`` on.
So a thread holds a (depth, columns) piece of W: its first ``kept`` rows in registers, the rest in
shared memory. After the sum over a group's lanes, lane s is left with ``own`` columns, those from
``g · columns + s · own`` on, complete.

Sizes past h are padding: weights of 0 that are never stored, in registers and shared memory only.
"""

from typing import NamedTuple

__all__ = [
    "ADDED_AT_ONCE",
    "LINE",
    "VECTOR",
    "WARP",
    "Columns",
    "OneBlock",
    "Scatter",
    "Share",
    "Softmax",
    "TensorShare",
    "Tile",
]

WARP = 32
LINE = 16
"""64-bit words of a line of the L2 cache."""
VECTOR = 4
"""Neighbouring k that a thread takes at a time: a 128-bit load of floats."""
ADDED_AT_ONCE = 8
"""Threads that share the adding up of one number from its parts."""


class Tile(NamedTuple):
    """Sizes that a resident kernel is compiled for; ``columns`` is a multiple of ``slices``."""

    h: int
    rows: int
    columns: int
    slices: int
    depth: int
    kept: int

    @property
    def own(self) -> int:
        """Columns that a lane is left with after the sum over its group."""
        return self.columns // self.slices

    @property
    def threads(self) -> int:
        """Threads of a block: whole warps; the last ones may own no column below h."""
        lanes = -(-self.h // self.columns) * self.slices
        return -(-lanes // WARP) * WARP

    @property
    def stride(self) -> int:
        """Distance of two slices of v in shared memory.

        Lanes of a group read different slices at once, 16 bytes each: their addresses fall into
        different banks if the distance in 4-byte words is an odd multiple of 4.
        """
        return self.depth if self.depth % 8 == VECTOR else self.depth + VECTOR

    @property
    def exact(self) -> bool:
        """Whether every thread owns columns below h only."""
        return self.h % self.columns == 0 and self.h // self.columns * self.slices == self.threads

    @property
    def shared_weights(self) -> int:
        """Numbers of W that the block holds in dynamic shared memory."""
        return (self.depth - self.kept) * self.columns * self.threads

    @property
    def shared_values(self) -> int:
        """Numbers of v that it holds in static shared memory: two buffers of its rows."""
        return 2 * self.rows * self.slices * self.stride


class Share(NamedTuple):
    """Sizes of a group kernel that multiplies in float32: W_hh split over ``blocks`` by columns.

    A block owns ``width`` columns of the product. Its threads come in ``groups`` of 16 neighbouring
    lanes, which own ``columns`` columns each; lane s of a group owns the rows of W from
    ``s · depth`` on, the first ``kept`` of them in registers, the rest in shared memory. It takes
    ``rows`` rows of the batch at a time and ``passes`` times as many in a step.

    The order of every sum depends on h alone: neither the number of blocks nor that of rows nor
    how they exchange their states changes a bit of the result.
    """

    h: int
    blocks: int
    groups: int
    columns: int
    rows: int
    passes: int
    kept: int

    @property
    def slices(self) -> int:
        """Lanes that share the rows of W."""
        return 16

    @property
    def threads(self) -> int:
        """Threads of a block: whole warps, where ``groups`` is even."""
        return self.groups * self.slices

    @property
    def width(self) -> int:
        """Columns of a block; those from h on are padding."""
        return self.groups * self.columns

    @property
    def depth(self) -> int:
        """Rows of W that a lane owns."""
        return -(-self.h // (self.slices * VECTOR)) * VECTOR

    @property
    def stride(self) -> int:
        """Distance of two slices of v in shared memory; see ``Tile.stride``."""
        return self.depth if self.depth % 8 == VECTOR else self.depth + VECTOR

    @property
    def slice_rows(self) -> int:
        """Rows of the batch that a group of blocks owns."""
        return self.rows * self.passes

    @property
    def finished(self) -> int:
        """Lanes of a group that are left with different sums; the others hold copies."""
        return min(self.slices, self.rows * self.columns)

    @property
    def own(self) -> int:
        """Sums that a lane is left with."""
        return self.rows * self.columns // self.finished

    @property
    def shared_weights(self) -> int:
        """Numbers of W that a block holds in shared memory; the values of v lie behind them."""
        return (self.depth - self.kept) * self.columns * self.threads

    @property
    def shared_values(self) -> int:
        """Numbers of v in shared memory: two buffers of all the rows of a group."""
        return 2 * self.slice_rows * self.slices * self.stride

    @property
    def shared_bytes(self) -> int:
        """Bytes of dynamic shared memory."""
        return 4 * (self.shared_weights + self.shared_values)


class TensorShare(NamedTuple):
    """Sizes of a group kernel that multiplies on tensor cores: W_hh split over ``blocks``.

    ``kind`` is what is multiplied: "float16", "bfloat16" or "tf32". A block owns ``width`` columns
    of the product, 16 for every ``slices`` of its ``warps``. The warps of one 16 share the rows of
    W: the s-th owns ``depth`` of them from ``s · depth`` on, all in registers. A block takes
    ``rows`` rows of the batch at a time, ``tiles`` of 8, and ``passes`` times as many in a step;
    rows that the batch lacks are zeros in shared memory.

    The order of every sum depends on ``slices`` and ``depth``: as long as those depend on h and
    ``kind`` alone, so do the bits of every result.
    """

    h: int
    blocks: int
    tiles: int
    passes: int
    slices: int
    warps: int
    kind: str

    @property
    def rows(self) -> int:
        """Rows of the batch at a time."""
        return 8 * self.tiles

    @property
    def slice_rows(self) -> int:
        """Rows of the batch that a group of blocks owns."""
        return self.rows * self.passes

    @property
    def width(self) -> int:
        """Columns of a block; those from h on are padding."""
        return 16 * self.warps // self.slices

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps

    @property
    def itemsize(self) -> int:
        """Bytes of a number of v in shared memory."""
        return 4 if self.kind == "tf32" else 2

    @property
    def chunk(self) -> int:
        """Neighbouring k that a warp takes at a time: 64 bytes of a row, 16 for each of 4 lanes."""
        return 64 // self.itemsize

    @property
    def depth(self) -> int:
        """Rows of W that a warp owns."""
        return -(-self.h // (self.slices * self.chunk)) * self.chunk

    @property
    def registers(self) -> int:
        """Registers of a lane that hold W: for 2 columns, a quarter of the warp's rows."""
        return 8 * self.depth // self.chunk

    @property
    def finished(self) -> int:
        """Warps of a 16 that are left with different sums; the others hold copies."""
        return min(self.slices, 4 * self.tiles)

    @property
    def own(self) -> int:
        """Sums that a thread is left with."""
        return 4 * self.tiles // self.finished

    @property
    def stride(self) -> int:
        """Distance of two rows of v in shared memory.

        Eight lanes, a quarter of a warp, read 64 bytes each of two neighbouring rows at once: from
        different banks if the rows are 64 bytes apart, modulo the 128 of all banks.
        """
        return self.slices * self.depth + self.chunk

    @property
    def shared_values(self) -> int:
        """Numbers of v in shared memory: two buffers of all the rows of a group."""
        return 2 * self.slice_rows * self.stride

    @property
    def shared_sums(self) -> int:
        """Numbers, float32, of the sum over slices; they lie behind the values."""
        return 4 * self.tiles * self.threads

    @property
    def shared_bytes(self) -> int:
        """Bytes of dynamic shared memory."""
        return self.itemsize * self.shared_values + 4 * self.shared_sums


class Scatter(NamedTuple):
    """Sizes of the kernel that adds up rows by their id.

    A block has ``columns`` columns of the sums, a power of two that divides ``threads``, in as many
    ``groups`` of threads as that leaves. A thread looks at ``loads`` ids at a time.
    """

    threads: int
    columns: int
    loads: int

    @property
    def groups(self) -> int:
        """Threads that share a column."""
        return self.threads // self.columns

    @property
    def chunk(self) -> int:
        """Ids that a block looks at between two barriers."""
        return self.threads * self.loads

    @property
    def room(self) -> int:
        """Rows that its list holds, in static shared memory, 6 bytes each."""
        return 2 * self.chunk

    @property
    def shared(self) -> int:
        """Bytes of static shared memory: the list, and two counts of each warp."""
        return 6 * self.room + 8 * self.threads // WARP


class Columns(NamedTuple):
    """Sizes of the kernel that adds up columns: a block has so many ``warps``."""

    warps: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps


class Softmax(NamedTuple):
    """Sizes of a cross-entropy kernel, and what it computes.

    A warp has a row, of which each lane holds up to ``columns`` numbers in registers; 0 stands for
    a block a row. The ``gradient`` is written or not, labels are ``smoothed`` or not, the logits
    are ``biased`` in the same pass or not.
    """

    columns: int
    threads: int
    gradient: bool = True
    smoothed: bool = False
    biased: bool = False


class OneBlock(NamedTuple):
    """A kernel of one block, of so many ``threads`` at most."""

    threads: int
