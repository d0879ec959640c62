"""Operations of a warp: its named lanes meet and exchange values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurnn.emulator.barriers import Meeting
from gpurnn.emulator.errors import BarrierError
from gpurnn.emulator.threads import WARP, Thread

if TYPE_CHECKING:
    from gpurnn.emulator.machine import Machine

__all__ = ["FULL", "WarpOperations"]

FULL = 0xFFFFFFFF


class WarpOperations:
    """The part of the ``cuda`` namespace that concerns warps."""

    machine: Machine

    def syncwarp(self, mask: int = FULL) -> None:
        """Wait for the lanes of ``mask``; it orders their memory accesses."""
        self._meet("syncwarp", mask, None, orders=True)

    def shfl_sync(self, mask: int, value: Any, src_lane: int) -> Any:
        """Return the value of lane ``src_lane`` mod 32."""
        return self._shuffle("shfl_sync", mask, value, lambda lane: int(src_lane) % WARP)

    def shfl_up_sync(self, mask: int, value: Any, delta: int) -> Any:
        """Return the value ``delta`` lanes below; a lane that has none below keeps its own."""
        return self._shuffle(
            "shfl_up_sync", mask, value, lambda lane: lane - delta if lane >= delta else lane
        )

    def shfl_down_sync(self, mask: int, value: Any, delta: int) -> Any:
        """Return the value ``delta`` lanes above; a lane that has none above keeps its own."""
        return self._shuffle(
            "shfl_down_sync", mask, value, lambda lane: lane + delta if lane + delta < 32 else lane
        )

    def shfl_xor_sync(self, mask: int, value: Any, lane_mask: int) -> Any:
        """Return the value of the lane whose number differs in the bits of ``lane_mask``."""
        return self._shuffle(
            "shfl_xor_sync",
            mask,
            value,
            lambda lane: lane ^ lane_mask if lane ^ lane_mask < 32 else lane,
        )

    def all_sync(self, mask: int, predicate: Any) -> bool:
        """Whether the predicate holds in all lanes."""
        return all(self._vote("all_sync", mask, predicate))

    def any_sync(self, mask: int, predicate: Any) -> bool:
        """Whether the predicate holds in any lane."""
        return any(self._vote("any_sync", mask, predicate))

    def eq_sync(self, mask: int, predicate: Any) -> bool:
        """Whether the predicate is the same in all lanes."""
        return len(set(self._vote("eq_sync", mask, predicate))) == 1

    def ballot_sync(self, mask: int, predicate: Any) -> int:
        """Return the mask of lanes in which the predicate holds."""
        votes = self._meet("ballot_sync", mask, bool(predicate))
        return sum(1 << t.lane for t, vote in votes.items() if vote)

    def match_any_sync(self, mask: int, value: Any) -> int:
        """Return the mask of lanes that hold the same value."""
        values = self._meet("match_any_sync", mask, _bits(value))
        mine = _bits(value)
        return sum(1 << t.lane for t, other in values.items() if other == mine)

    def match_all_sync(self, mask: int, value: Any) -> tuple[int, bool]:
        """Return (the mask, True) if all lanes hold the same value, else (0, False)."""
        values = self._meet("match_all_sync", mask, _bits(value))
        same = len(set(values.values())) == 1
        return (sum(1 << t.lane for t in values) if same else 0), same

    def activemask(self) -> int:
        """Return the lanes of this warp that have not returned from the kernel."""
        return sum(1 << t.lane for t in self.machine.thread.warp.lanes if not t.done)

    def lanemask_lt(self) -> int:
        """Return the mask of the lanes below this one."""
        return (1 << self.machine.thread.lane) - 1

    @property
    def laneid(self) -> int:
        """This thread's lane."""
        return self.machine.thread.lane

    @property
    def warpsize(self) -> int:
        """The size of a warp."""
        return WARP

    def _vote(self, operation: str, mask: int, predicate: Any) -> list[bool]:
        return list(self._meet(operation, mask, bool(predicate)).values())

    def _shuffle(self, operation: str, mask: int, value: Any, source: Callable[[int], int]) -> Any:
        values = self._meet(operation, mask, value)
        t = self.machine.thread
        lane = source(t.lane)
        if lane == t.lane:
            return value
        for other, theirs in values.items():
            if other.lane == lane:
                return theirs
        place = self.machine.place()
        raise BarrierError(
            f"{operation} at {place} reads from lane {lane}, which takes no part: the mask is "
            f"{int(mask) & FULL:#010x} and the warp has {len(t.warp.lanes)} threads",
            place,
        )

    def _meet(
        self, operation: str, mask: int, value: Any, *, orders: bool = False
    ) -> dict[Thread, Any]:
        machine = self.machine
        t = machine.thread
        warp = t.warp
        bits = int(mask) & FULL
        if not bits >> t.lane & 1:
            place = machine.place()
            raise BarrierError(
                f"{operation} at {place} is called by lane {t.lane} with a mask that does not name "
                f"it: {bits:#010x}",
                place,
            )
        meeting = warp.meetings.get(bits)
        if meeting is None:
            members = [m for m in warp.lanes if bits >> m.lane & 1]
            whose = f"warp {warp.number} of block {tuple(warp.block.index)} in mask {bits:#010x}"
            meeting = warp.meetings[bits] = Meeting(machine, members, whose)
            meeting.gone = next((m for m in members if m.done), None)
        return meeting.meet(operation, value, orders=orders)  # type: ignore[no-any-return]


def _bits(value: Any) -> Any:
    """Return what a comparison of bits compares."""
    return value.tobytes() if isinstance(value, np.generic) else value
