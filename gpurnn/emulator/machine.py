"""The scheduler: which thread runs, where it may be switched, and when none can go on."""

from __future__ import annotations

import dis
import itertools
import random
import sys
from collections import Counter, deque
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import greenlet

from gpurnn.emulator import races
from gpurnn.emulator.barriers import Meeting, PhaseBarrier
from gpurnn.emulator.errors import BarrierError, DeadlockError, EmulationError, Place
from gpurnn.emulator.progress import state
from gpurnn.emulator.threads import Block, Cluster, Site, Thread

if TYPE_CHECKING:
    from gpurnn.emulator.memory import Access
    from gpurnn.emulator.traffic import Traffic
    from gpurnn.emulator.watch import Watch

__all__ = ["Code", "Machine", "line_of"]

# A thread that re-read one and the same memory so often without a switch is taken to poll it.
SPIN = 20_000
# A thread that stores between its polls, or whose variables change, may be counting to something:
# so many times the patience.
COUNTING = 100
# So many states of a thread are remembered before all are forgotten.
STATES = 1 << 16


class Code:
    """The code of a kernel or device function.

    Attributes:
        starts: by half the offset, where the instruction begins: what a frame says lies anywhere in
            an instruction, depending on how often it ran.
    """

    def __init__(self, code: CodeType):
        self.code = code
        self.starts: list[int] = []
        offsets = [i.offset for i in dis.get_instructions(code)]
        for start, end in itertools.pairwise([*offsets, len(code.co_code)]):
            self.starts += [start] * ((end - start) // 2)


class Machine:
    """A launch in progress: all of its threads, one of them running."""

    def __init__(
        self,
        *,
        seed: int | None,
        check_races: bool,
        max_polls: int,
        traffic: Traffic | None = None,
        watch: Watch | None = None,
    ):
        self.thread: Thread = None  # type: ignore[assignment]
        self.threads: list[Thread] = []
        self.blocks: list[Block] = []
        self.clusters: list[Cluster] = []
        self.grid_meeting: Meeting | None = None
        self.hub: greenlet.greenlet = greenlet.getcurrent()
        self.check_races = check_races
        self.traffic = traffic
        # Set to find the line of the earlier side of a race, by running once more.
        self.watch = watch
        self.max_polls = max_polls
        self.runnable: deque[Thread] = deque()
        self.random = None if seed is None else random.Random(seed).random
        self.switches = 0
        self.barriers: Counter[str] = Counter()
        # Counts what may let a polling thread go on.
        self.changes = 0
        # Counts everything else that shows a thread is at work.
        self.activity = 0
        # The code of the kernel and its device functions, by id.
        self.codes: dict[int, Code] = {}
        self.kernel: CodeType | None = None
        self.spin = SPIN

    def observe(self, access: Access) -> None:
        """Put what must see every load and store in front of an access's functions."""
        if self.watch is not None:
            access.load, access.store = self.watch.around(self, access)
        if self.traffic is not None:
            access.load, access.store = self.traffic.around(self, access)

    def saw(self, access: Access, k: int, what: str) -> None:
        """Tell the observers of a strong access."""
        if self.watch is not None:
            self.watch.saw(self, access, k, what)
        if self.traffic is not None and what == "strong read":
            self.traffic.saw(self, access, k, write=False)
        elif self.traffic is not None:
            self.traffic.saw(self, access, k, write=True)

    def run(self) -> None:
        """Let the threads run until all have ended."""
        runnable = self.runnable
        while runnable:
            if self.random is not None:
                runnable.rotate(-int(self.random() * len(runnable)))
            t = runnable.popleft()
            self.thread = t
            self.switches += 1
            t.greenlet.switch()
        if not all(t.done for t in self.threads):
            raise self._stuck()

    def end(self) -> None:
        """Take note that the running thread's kernel returned."""
        t = self.thread
        t.done = True
        self.changes += 1
        block, warp = t.block, t.warp
        block.live -= 1
        for mask, meeting in warp.meetings.items():
            if mask >> t.lane & 1:
                meeting.left(t)
        meetings: list[Meeting | PhaseBarrier | None] = [block.meeting, self.grid_meeting]
        if block.cluster is not None:
            meetings.append(block.cluster.barrier)
        for barrier in meetings:
            if barrier is not None:
                barrier.left(t)
        if block.live == 0 and self.check_races and len(self.clusters) < len(self.blocks):
            for allocation in block.shared.values():
                races.check_end(allocation, block)
                allocation.close()

    def abandon(self) -> None:
        """End every thread that has not ended."""
        for t in self.threads:
            if t.greenlet is not None and not t.greenlet.dead:
                t.greenlet.throw(greenlet.GreenletExit)

    def wait(self, operation: str) -> None:
        """Stop the running thread until another resumes it."""
        t = self.thread
        t.waiting = operation
        self.hub.switch()
        t.waiting = None

    def resume(self, threads: Iterable[Thread]) -> None:
        """Let waiting threads go on."""
        self.runnable.extend(threads)

    def pause(self) -> None:
        """Let others go first."""
        self.runnable.append(self.thread)
        self.hub.switch()

    def polled(self, key: Any) -> None:
        """Take note that the running thread read memory that may be another's signal.

        It polls if it reads what it read before, at one place, with the same in its variables.

        Raises:
            DeadlockError: it and all others have only re-read unchanged memory for long.
        """
        t = self.thread
        if t.seen_version != self.changes:
            t.seen_version = self.changes
            t.seen.clear()
            t.polls = t.idle = 0
        if key not in t.seen:
            t.seen.add(key)
            t.idle = 0
            self.activity += 1
            return
        t.polls += 1
        now = (key, state(self))
        if now in t.seen:
            t.idle += 1
        else:
            if len(t.seen) < STATES:
                t.seen.add(now)
            t.idle = 0
            self.activity += 1
        patient = t.idle == 0 or t.idle % self.max_polls
        if not patient or t.polls % (COUNTING * self.max_polls) == 0:
            self._look_for_deadlock()

    def rewrote(self, key: Any) -> None:
        """Take note of a strong store of what was there: progress, but for one that is repeated."""
        stored = self.thread.stored
        now = hash((key, state(self)))
        if now not in stored:
            if len(stored) >= STATES:
                stored.clear()
            stored.add(now)
            self.changes += 1

    def _look_for_deadlock(self) -> None:
        """Raise if nothing has happened, anywhere, since the running thread looked last."""
        t = self.thread
        for other in self.threads:
            if other.busy:
                other.busy = False
                self.activity += 1
        if t.activity_seen == self.activity or t.polls >= COUNTING * self.max_polls:
            raise self._stuck()
        t.activity_seen = self.activity

    def spun(self) -> None:
        """Let others go first after the running thread re-read plain memory very often."""
        self.thread.rereads = 0
        self.pause()
        for _ in range(max(1, self.max_polls // 10)):
            self.polled("spin")

    def frame(self) -> tuple[CodeType, int]:
        """Return the innermost instruction of the kernel that is running."""
        codes, frame = self.codes, sys._getframe(1)
        while id(frame.f_code) not in codes:
            assert frame.f_back is not None
            frame = frame.f_back
        code = frame.f_code
        return code, codes[id(code)].starts[frame.f_lasti // 2]

    def site(self) -> Site:
        """Return where the running thread is, through all device functions."""
        return self._site(sys._getframe(1))

    def _site(self, frame: FrameType | None) -> Site:
        codes, kernel = self.codes, self.kernel
        found = []
        while frame is not None:
            code = frame.f_code
            known = codes.get(id(code))
            if known is not None:
                found.append((code, known.starts[frame.f_lasti // 2]))
                if code is kernel:
                    break
            frame = frame.f_back
        return tuple(found)

    def place(self, t: Thread | None = None) -> Place:
        """Return where a thread is: the running one, or one that waits."""
        t = self.thread if t is None else t
        frame = sys._getframe(1) if t.greenlet is greenlet.getcurrent() else t.greenlet.gr_frame
        site = self._site(frame)
        return self.place_of(t, site)

    def place_of(self, t: Thread, site: Site) -> Place:
        """Return the place of a thread at a site."""
        block, index = tuple(t.block.index), tuple(t.index)
        if not site:  # it has returned
            assert self.kernel is not None
            site = ((self.kernel, -1),)
        code, offset = site[0]
        line = line_of(code, offset)
        return Place(code.co_filename, line, code.co_name, block, index)  # type: ignore[arg-type]

    def _stuck(self) -> EmulationError:
        """Return the error that says who waits where."""
        live = [t for t in self.threads if not t.done]
        polling = [t for t in live if t.waiting is None]
        found: dict[tuple[str, str, int, Any], list[tuple[Thread, Place]]] = {}
        for t in live:
            place = self.place(t)
            what = "polls memory that does not change" if t.waiting is None else t.waiting
            key = (what, place.file, place.line, place.block)
            found.setdefault(key, []).append((t, place))
        lines = []
        for (what, *_), group in itertools.islice(found.items(), 12):
            place = group[0][1]
            more = f" and {len(group) - 1} more threads of its block" if len(group) > 1 else ""
            lines.append(f"  {what}: {place}{more}")
        if len(found) > len(lines):
            lines.append(f"  … and at {len(found) - len(lines)} more places")
        ended = len(self.threads) - len(live)
        kind = DeadlockError if polling else BarrierError
        if polling:
            lines.append(f"  (max_polls is {self.max_polls}: more lets them poll for longer)")
        return kind(
            f"no thread can go on: {len(live)} wait, {ended} have returned\n" + "\n".join(lines),
            *(group[0][1] for group in found.values()),
        )


def line_of(code: CodeType, offset: int) -> int:
    """Return the source line of an instruction."""
    for start, end, line in code.co_lines():
        if start <= offset < end:
            return line or code.co_firstlineno
    return code.co_firstlineno
