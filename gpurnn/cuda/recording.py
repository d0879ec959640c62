"""Work that is done again and again: rehearsed, captured as a graph, and then only launched.

A recorder has a stream and, on a GPU, a pool of memory of its own, which only what it records
allocates from: so the addresses in a graph stay good as long as the recorder lives. What is made
there and kept longer must own its memory (``Engine.lasting``): to a graph that is replayed all of
the pool is free to write to. Before a capture there is a rehearsal, which does the same by the same
products: it compiles and loads, and leaves in the pool what the capture then takes out of it. So
what counts is only ever the launch of a graph: who is interrupted has done all of it, or nothing.
"""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpurnn.cuda import cublas
from gpurnn.cuda.engines import Array, Engine, GPUEngine, Recorded, cupy, recording

__all__ = ["Recorder", "recorder"]

Read = Callable[[], NDArray[Any]]


class Recorder(Protocol):
    """Where work is queued that will be done again."""

    def again(self, key: Hashable, run: Callable[[], None], rehearse: Callable[[], None]) -> None:
        """Queue what ``run`` queues, which for one ``key`` is always the same, on the same arrays.

        ``rehearse`` queues the same on arrays that nobody looks at; it is called before a capture.

        What it allocates may be used until the next call, and by what is queued before that.
        """

    def once(self, run: Callable[[], None]) -> None:
        """Queue what ``run`` queues, which need not be the same another time.

        It comes after all that was queued on the current stream, as does what is queued later.
        """

    def read(self, a: Array) -> Read:
        """Queue a copy to the host; the function that comes back waits for it and returns it."""

    def mark(self) -> Any:
        """Note the time at which all that was queued before is done."""

    def wait(self, mark: Any) -> None:
        """Wait for what was queued before a mark."""

    def between(self, first: Any, second: Any) -> float:
        """Return the seconds between two marks that have been waited for, or what is behind."""

    def settle(self) -> None:
        """Wait until all that was queued is done."""


def recorder(engine: Engine) -> Recorder:
    """Return a new recorder for work on an engine; it is made when the engine has settled."""
    engine.settle()
    return _Graphs(engine) if isinstance(engine, GPUEngine) else _Repeats()


class _Repeats:
    """The emulator's: everything is done at once."""

    def again(self, key: Hashable, run: Callable[[], None], rehearse: Callable[[], None]) -> None:
        run()

    def once(self, run: Callable[[], None]) -> None:
        run()

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self, mark: float) -> None:
        pass

    def between(self, first: float, second: float) -> float:
        return second - first

    def read(self, a: Array) -> Read:
        copied = np.array(a)
        return lambda: copied

    def settle(self) -> None:
        pass


def _new_memory(size: int) -> Any:
    """Allocate for a recorder's pool, at the cost of what CuPy's own pool does not use.

    Where there is too little, the pool must not hear of it from CUDA: it would free all that is not
    in use at the moment, and the graphs have addresses of that in them.
    """
    cuda = cupy().cuda
    for attempt in (1, 2):
        try:
            return cuda.MemoryPointer(cuda.Memory(size), 0)
        except cuda.runtime.CUDARuntimeError as e:
            if attempt == 2:
                raise MemoryError(f"a graph needs {size:,} bytes more: {e}") from e
            cupy().get_default_memory_pool().free_all_blocks()
    raise AssertionError("unreachable")


class _Graphs:
    """A GPU's: CUDA graphs, on a stream that waits for no other."""

    def __init__(self, engine: GPUEngine) -> None:
        self._engine = engine
        self._graphs: dict[Hashable, Any] = {}
        with engine.here():
            self._stream = cupy().cuda.Stream(non_blocking=True)
            self._pool = cupy().cuda.MemoryPool(_new_memory)
            self._needs = Recorded(cupy().empty(cublas.WORKSPACE, np.uint8))

    @contextmanager
    def _here(self) -> Iterator[None]:
        with self._engine.here(), self._stream, recording(self._needs):
            yield

    def again(self, key: Hashable, run: Callable[[], None], rehearse: Callable[[], None]) -> None:
        with self._here():
            graph = self._graphs.get(key)
            if graph is None:
                with cupy().cuda.using_allocator(self._pool.malloc):
                    rehearse()
                    graph = self._graphs[key] = self._captured(run)
            graph.launch(stream=self._stream)

    def _captured(self, run: Callable[[], None]) -> Any:
        try:
            self._stream.begin_capture()
            run()
        except BaseException:
            with suppress(Exception):  # it is void, and what made it so is the error to be seen
                self._stream.end_capture()
            raise
        return self._stream.end_capture()

    def once(self, run: Callable[[], None]) -> None:
        with self._engine.here():
            before = cupy().cuda.Event(disable_timing=True)
            before.record(cupy().cuda.get_current_stream())
            self._stream.wait_event(before)
            with self._stream:
                run()

    def mark(self) -> Any:
        with self._engine.here():
            mark = cupy().cuda.Event()
            mark.record(self._stream)
        return mark

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def between(self, first: Any, second: Any) -> float:
        return float(cupy().cuda.get_elapsed_time(first, second)) / 1e3

    def read(self, a: Array) -> Read:
        with self._here():
            copied = cupy().cuda.alloc_pinned_memory(a.nbytes)
            out = np.frombuffer(copied, a.dtype, a.size).reshape(a.shape)
            a.get(stream=self._stream, out=out, blocking=False)
            done = cupy().cuda.Event(disable_timing=True)
            done.record(self._stream)

        def finished() -> NDArray[Any]:
            done.synchronize()
            return out

        return finished

    def settle(self) -> None:
        self._stream.synchronize()
