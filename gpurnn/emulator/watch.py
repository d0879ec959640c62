"""Finding the earlier side of a race: the launch is run again, and watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpurnn.emulator.clocks import MASK
from gpurnn.emulator.errors import Place

if TYPE_CHECKING:
    from gpurnn.emulator.machine import Machine
    from gpurnn.emulator.memory import Access
    from gpurnn.emulator.races import Conflict

__all__ = ["Watch"]


class Watch:
    """Notes where the thread that came first last touched the bytes in question."""

    def __init__(self, conflict: Conflict):
        self.key = conflict.key
        self.bytes = conflict.bytes
        self.epoch = conflict.epoch
        self.tid = conflict.epoch & MASK
        self.what = conflict.other
        self.place: Place | None = None

    def saw(self, machine: Machine, access: Access, k: int, what: str) -> None:
        """Take note of one access."""
        t = machine.thread
        if t.tid != self.tid or t.epoch != self.epoch or what != self.what:
            return
        size = access.dtype.itemsize
        if (
            access.allocation.key == self.key
            and k * size < self.bytes.stop
            and (k + 1) * size > self.bytes.start
        ):
            self.place = machine.place()

    def around(
        self, machine: Machine, access: Access
    ) -> tuple[Callable[[int], Any], Callable[[int, Any], None]]:
        """Return an access's functions with this in front."""
        inner_load, inner_store = access.load, access.store

        def load(k: int) -> Any:
            self.saw(machine, access, k, "read")
            return inner_load(k)

        def store(k: int, value: Any) -> None:
            self.saw(machine, access, k, "write")
            inner_store(k, value)

        return load, store
