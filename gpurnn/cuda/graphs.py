"""CUDA graphs of a few steps, captured once for each shape and replayed by every later call.

A graph has addresses in it. So that they are always good, it works on arrays of its own, which it
keeps; a call copies its steps into them and the results out of them. They, and the graph's
workspace, serve one call at a time: a lock lets one thread queue at a time, and an event, recorded
where a call ends, is waited for where the next one begins, on whatever stream. Two streams with one
shape therefore take turns; with different shapes they may run at once.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["MOST_BYTES", "MOST_GRAPHS", "forget", "replayed"]

MOST_GRAPHS = 16
"""Shapes whose graphs and arrays are kept at once; those that were not used longest are dropped."""

MOST_BYTES = 256 << 20
"""Bytes of the arrays that are kept at once, but for those of the shape used last."""

_ONE_AT_A_TIME = threading.Lock()

Run = Callable[[Any, int], None]


@dataclass(eq=False)
class _Kept:
    """One shape's arrays, its graphs by their number of steps, and where its last use ended."""

    needs: Any
    buffers: Any
    nbytes: int
    done: Any
    graphs: dict[int, Any] = field(default_factory=dict)


_kept: OrderedDict[Hashable, _Kept] = OrderedDict()  # the one used last is the last


@contextmanager
def replayed(
    cuda: Any, key: Hashable, make: Callable[[], NamedTuple], run: Run, needs: object = None
) -> Iterator[tuple[Any, Callable[[int], None]]]:
    """Give a shape's arrays, and a function that queues so many steps on them as one graph.

    All is queued on the current stream, which must not be captured itself. The first use of a key
    waits for the GPU: it runs a step on arrays of zeros, so that nothing is left to be loaded or
    set up while a stream is captured.

    Args:
        cuda: ``cupy.cuda``. The device that is meant is the current one.
        key: all that the graph depends on, device included, but for the number of steps.
        make: allocates the arrays: a named tuple, of which entries may be None.
        run: ``run(arrays, steps)`` queues that many steps; it allocates nothing, and does the same
            each time.
        needs: what else the graph is no good without: the kernel, loaded.
    """
    with _ONE_AT_A_TIME:
        one = _kept.get(key)
        if one is None:
            _drop(MOST_GRAPHS - 1, MOST_BYTES)
            one = _kept[key] = _first_use(cuda, make, run, needs)
        _kept.move_to_end(key)
        stream = cuda.get_current_stream()
        stream.wait_event(one.done)

        def play(steps: int) -> None:
            graph = one.graphs.get(steps)
            if graph is None:
                graph = one.graphs[steps] = _captured(cuda, run, one.buffers, steps)
            graph.launch()

        try:
            yield one.buffers, play
        finally:
            one.done.record(stream)
            _drop(MOST_GRAPHS, MOST_BYTES)


def forget() -> None:
    """Drop all graphs and give their memory back to CuPy's pool."""
    with _ONE_AT_A_TIME:
        _drop(0, 0, keep=0)


def _drop(graphs: int, nbytes: int, *, keep: int = 1) -> None:
    """Drop the graphs used least lately until there are no more than so many, of so many bytes."""
    while len(_kept) > keep and (
        len(_kept) > graphs or sum(one.nbytes for one in _kept.values()) > nbytes
    ):
        _, one = _kept.popitem(last=False)
        one.done.synchronize()  # its memory may go to another stream's arrays


def _first_use(cuda: Any, make: Callable[[], NamedTuple], run: Run, needs: object) -> _Kept:
    buffers = make()
    arrays = [a for a in buffers if a is not None]
    # What this memory held before may still be in use on the current stream.
    cuda.get_current_stream().synchronize()
    with cuda.Stream(non_blocking=True) as stream:
        for a in arrays:
            a.fill(0)
        run(buffers, 1)
        stream.synchronize()
    done = cuda.Event(disable_timing=True)
    return _Kept(needs, buffers, sum(a.nbytes for a in arrays), done)


def _captured(cuda: Any, run: Run, buffers: Any, steps: int) -> Any:
    with cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            run(buffers, steps)
        except BaseException:
            with suppress(Exception):  # it is void, and what made it so is the error to be seen
                stream.end_capture()
            raise
        return stream.end_capture()
