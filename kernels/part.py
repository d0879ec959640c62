"""What a block of a group computes of the product, as a group kernel sees it."""

from typing import Any, NamedTuple

from gpurnn.kernels.device import DeviceFunction

__all__ = ["Part"]


class Part(NamedTuple):
    """A block's columns of v W, for the rows of its group: constants, and device functions.

    ``v`` is the block's dynamic shared memory as a flat array of ``element``. It has two buffers of
    the group's states (or gradients), all h of each row. ``w`` is a local array of shape
    ``weights`` and type ``weight``, ``acc`` one of shape ``sums`` and the kernel's real type.

    ``clear(v)``: write 0 to both buffers, padding and missing rows included. A barrier must follow.

    ``load(W, w, v, first)``: read the thread's piece of W (h, h), of the block's columns, which
    begin at ``first``; what lies beyond h becomes 0. A thread reads back only what it wrote itself.
    Every thread of the block comes here together.

    ``place(buffer, r, k)``: index into v of number k of row r of the group.
    ``encode(x)``: a real as an element, rounded once. ``bits(e)``, ``unbits(u)``: an element as a
    uint32, and back.

    ``multiply(w, v, buffer, r, acc)``: acc = Σ_k v[buffer, r + i, k] · W[k, j], over the thread's
    k, for the rows i < ``rows`` from r on. A barrier must stand between the buffer's last write and
    this.

    ``finish(acc, v)``: sum over k beyond the thread. Every thread of the block comes here together.
    Then ``result(acc, q)`` for q < ``own`` is the sum of row r + ``row(q)`` and of the block's
    column ``column(q)``; where ``owner()`` is false another thread owns the same one.
    """

    element: Any
    weight: Any
    weights: int | tuple[int, ...]
    sums: tuple[int, ...]
    own: int
    clear: DeviceFunction
    load: DeviceFunction
    place: DeviceFunction
    encode: DeviceFunction
    bits: DeviceFunction
    unbits: DeviceFunction
    multiply: DeviceFunction
    finish: DeviceFunction
    result: DeviceFunction
    row: DeviceFunction
    column: DeviceFunction
    owner: DeviceFunction
