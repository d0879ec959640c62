"""Timing on a GPU: by events on its stream, by the host's clock, and as a CUDA graph.

All figures are microseconds per pass. Everything is timed after a warm-up pass, and a sample holds
as many passes as make it long against what starting and stopping the clock costs.
"""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from gpurnn.bench.common import Figure, figure
from gpurnn.cuda.engines import cupy

__all__ = ["Clock", "GPUClock", "NotCapturedError", "Pass"]

Pass = Callable[[], object]

LEAST_SAMPLES = 5
SAMPLE = 2_000.0  # µs: a sample is at least about so long
UNWAITED_CALLS = 64  # in a sample of the host's time: the GPU's queue must not fill up
EVENTS = "events; gaps between launches included, where the host queues them too slowly"
GRAPH = "events around replays of a CUDA graph"


class NotCapturedError(Exception):
    """A pass could not be made a CUDA graph; the message says why."""


class Clock(Protocol):
    """What times a pass; ``seconds`` is what a figure may take."""

    def device(self, run: Pass, seconds: float) -> Figure:
        """Time on the GPU, between events, passes queued one behind the other."""

    def wall(self, run: Pass, seconds: float) -> Figure:
        """Time until the result is there, on the host's clock, each pass on its own."""

    def host(self, run: Pass, seconds: float) -> Figure:
        """Time until the call returns, the work only queued."""

    def graph(self, run: Pass, seconds: float) -> Figure:
        """Time on the GPU of a replay of the pass as a CUDA graph."""


def plan_samples(microseconds: float, seconds: float) -> tuple[int, int]:
    """Return samples, and passes in each, for passes of about so long."""
    passes = max(1, math.ceil(SAMPLE / max(microseconds, 0.1)))
    samples = int(1e6 * seconds / (passes * max(microseconds, 0.1)))
    return max(LEAST_SAMPLES, samples), passes


class GPUClock:
    """The clock of CuPy's current device and stream."""

    def device(self, run: Pass, seconds: float) -> Figure:
        """Time on the GPU, between events, passes queued one behind the other."""
        self._wait()
        run()  # warm-up: what is compiled, loaded and allocated once
        samples, passes = plan_samples(self._between_events(run, 1), seconds)
        taken = [self._between_events(run, passes) for _ in range(samples)]
        return {**figure(taken, samples * passes), "by": EVENTS}

    def wall(self, run: Pass, seconds: float) -> Figure:
        """Time until the result is there, on the host's clock, each pass on its own."""
        self._wait()
        run()
        samples, _ = plan_samples(max(self._until_done(run), SAMPLE / 10), seconds)
        return figure([self._until_done(run) for _ in range(samples)], samples)

    def host(self, run: Pass, seconds: float) -> Figure:
        """Time until the call returns, the work only queued."""
        self._wait()
        run()
        passes = max(1, min(UNWAITED_CALLS, int(SAMPLE / max(self._until_done(run), 1.0))))
        until = time.perf_counter() + seconds
        found: list[float] = []
        while len(found) < LEAST_SAMPLES or time.perf_counter() < until:
            self._wait()
            before = time.perf_counter()
            for _ in range(passes):
                run()
            found.append(1e6 * (time.perf_counter() - before) / passes)
        self._wait()
        return figure(found, passes * len(found))

    def graph(self, run: Pass, seconds: float) -> Figure:
        """Time on the GPU of a replay of the pass as a CUDA graph.

        Raises:
            NotCapturedError: the pass does something that a graph cannot hold.
        """
        stream = cupy().cuda.Stream(non_blocking=True)  # the default stream cannot be captured
        with stream:
            run()  # fills this stream's memory pool too, so that nothing is allocated meanwhile
            stream.synchronize()
            graph = _captured(stream, run)
            found = {**self.device(graph.launch, seconds), "by": GRAPH}
            stream.synchronize()
        return found

    def _between_events(self, run: Pass, passes: int) -> float:
        events = cupy().cuda
        start, stop = events.Event(), events.Event()
        start.record()
        for _ in range(passes):
            run()
        stop.record()
        stop.synchronize()
        return 1e3 * float(events.get_elapsed_time(start, stop)) / passes

    def _until_done(self, run: Pass) -> float:
        before = time.perf_counter()
        run()
        self._wait()
        return 1e6 * (time.perf_counter() - before)

    def _wait(self) -> None:
        cupy().cuda.Device().synchronize()


def _captured(stream: Any, run: Pass) -> Any:
    stream.begin_capture()
    try:
        run()
    except Exception as e:
        why = f"{type(e).__name__}: {e}"
        try:
            stream.end_capture()
        except Exception as also:  # ends an invalid capture too, and says that it was
            why += f" (ending it: {also})"
        raise NotCapturedError(f"cannot be captured: {why}") from e
    try:
        return stream.end_capture()
    except Exception as e:
        raise NotCapturedError(f"cannot be captured: {type(e).__name__}: {e}") from e
