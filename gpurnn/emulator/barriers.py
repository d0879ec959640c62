"""Where threads wait for one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpurnn.emulator.clocks import Joined, Release, learn
from gpurnn.emulator.errors import BarrierError
from gpurnn.emulator.threads import WARP, Site, Thread

if TYPE_CHECKING:
    from gpurnn.emulator.machine import Machine

__all__ = ["Meeting", "Phase", "PhaseBarrier"]


class Meeting:
    """A barrier at which fixed threads meet, all at one place of the kernel."""

    def __init__(self, machine: Machine, members: list[Thread], whose: str):
        self.machine = machine
        self.members = members
        self.whose = whose
        self.operation = ""
        self.site: Site = ()
        self.arrived: dict[Thread, Any] = {}
        self.gone: Thread | None = None

    def meet(
        self,
        operation: str,
        value: Any = None,
        *,
        orders: bool,
        combine: Callable[[dict[Thread, Any]], Any] = lambda values: values,
    ) -> Any:
        """Wait for the others; return what ``combine`` makes of all values, by thread."""
        machine = self.machine
        t = machine.thread
        t.movable.clear()
        site = machine.site()
        if not self.arrived:
            self.operation, self.site = operation, site
        elif self.operation != operation or self.site != site:
            self._diverged(operation, t)
        self.arrived[t] = value
        if self.gone is not None:
            self.left(self.gone)
        if len(self.arrived) < len(self.members):
            machine.wait(operation)
            return t.result
        values, self.arrived = self.arrived, {}
        machine.barriers[operation] += 1
        if orders and machine.check_races:
            learn(self.members)
        result = combine(values)
        for member in self.members:
            member.result = result
        if not any(m.idle for m in self.members):  # idle: a loop that polls and meets
            machine.activity += 1
        machine.resume([m for m in self.members if m is not t])
        machine.pause()
        return result

    def left(self, t: Thread) -> None:
        """Take note that a member ended; raise if others wait for it."""
        self.gone = t
        if self.arrived:
            raise _left(self, len(self.members), t)

    def _diverged(self, operation: str, t: Thread) -> None:
        machine = self.machine
        here, there = machine.place(t), machine.place(next(iter(self.arrived)))
        raise BarrierError(
            f"threads of {self.whose} wait at different places: {self.operation} at {there} and "
            f"{operation} at {here}: expected all {len(self.members)} at one",
            here,
            there,
        )


class Phase:
    """One time that a barrier is passed: what those who arrived for it knew, once all have.

    All of it is one array of clocks, which those who knew no more than that share afterwards.
    """

    def __init__(self) -> None:
        self.joined: Joined | None = None


class PhaseBarrier:
    """A barrier that threads may reach and pass in two steps; it goes through phases."""

    def __init__(
        self,
        machine: Machine,
        operation: str,
        count: int,
        whose: str,
        *,
        whole_warps: bool = False,
    ):
        self.machine = machine
        self.operation = operation
        self.whole_warps = whole_warps
        self.count = count
        self.whose = whose
        self.phase = Phase()
        self.arrived: dict[Thread, Release] = {}
        self.waiting: list[Thread] = []
        self.gone: list[Thread] = []

    def arrive(self) -> None:
        """Count this thread in; go on."""
        t, machine = self.machine.thread, self.machine
        if t in self.arrived or self in t.arrivals:
            place = machine.place(t)
            raise BarrierError(f"{self.operation}: {place} arrives twice without a wait", place)
        t.arrivals[self] = self.phase
        self.arrived[t] = Release(t.known_array, t.tid, t.clock, None)
        t.tick()
        self._check_gone()
        if self._came() < self.count:
            return
        if machine.check_races:
            self.phase.joined = Joined(list(self.arrived.values()))
        self.phase = Phase()
        self.arrived = {}
        machine.barriers[self.operation] += 1
        machine.activity += 1
        waiting, self.waiting = self.waiting, []
        machine.resume(waiting)

    def forget(self) -> None:
        """Let this thread arrive again without having waited, as ``bar.arrive`` does."""
        self.machine.thread.arrivals.pop(self, None)

    def wait(self) -> None:
        """Go on when all have arrived."""
        t, machine = self.machine.thread, self.machine
        phase = t.arrivals.pop(self, None)
        if phase is None:
            place = machine.place(t)
            raise BarrierError(f"{self.operation}: {place} waits without having arrived", place)
        if phase is self.phase:
            self.waiting.append(t)
            machine.wait(self.operation)
        else:
            machine.pause()
        if phase.joined is not None:
            t.learn_from(phase.joined)

    def _came(self) -> int:
        """Return how many threads have arrived, for which a short warp that is whole has 32."""
        count = len(self.arrived)
        lanes = self.machine.thread.block.threads[-1].warp.lanes  # only the last may be short
        if self.whole_warps and len(lanes) < WARP and all(t in self.arrived for t in lanes):
            count += WARP - len(lanes)
        return count

    def left(self, t: Thread) -> None:
        """Take note that a member ended; raise if others wait for it."""
        self.gone.append(t)
        if self.arrived:
            self._check_gone()

    def _check_gone(self) -> None:
        for t in self.gone:
            if t not in self.arrived:
                raise _left(self, self.count, t)


def _left(barrier: Meeting | PhaseBarrier, count: int, gone: Thread) -> BarrierError:
    place = barrier.machine.place(next(iter(barrier.arrived)))
    return BarrierError(
        f"{barrier.operation} at {place} waits for all {count} threads of {barrier.whose}, of "
        f"which {len(barrier.arrived)} came; block {tuple(gone.block.index)}, thread "
        f"{tuple(gone.index)} has returned from the kernel",
        place,
    )
