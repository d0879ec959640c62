"""Running a kernel."""

from __future__ import annotations

import contextlib
import contextvars
import operator
from types import FunctionType
from typing import Any

import greenlet
import numpy as np

from gpurnn.emulator.arguments import Arguments, constant
from gpurnn.emulator.barriers import Meeting, PhaseBarrier
from gpurnn.emulator.clocks import MASK
from gpurnn.emulator.errors import EmulationError, RaceError
from gpurnn.emulator.machine import Machine
from gpurnn.emulator.namespace import Namespace
from gpurnn.emulator.races import Conflict
from gpurnn.emulator.rebind import Rebinder, python_function
from gpurnn.emulator.report import Report
from gpurnn.emulator.shared import MOST_SHARED
from gpurnn.emulator.threads import WARP, Block, Cluster, Dim3, Thread, Warp
from gpurnn.emulator.traffic import Traffic
from gpurnn.emulator.watch import Watch

__all__ = ["launch"]

MOST_THREADS_PER_BLOCK = 1024
MOST_BLOCKS_PER_CLUSTER = 16
# Along x, y and z.
MOST_BLOCKS = (2**31 - 1, 65_535, 65_535)
MOST_THREADS = (1024, 1024, 64)


def launch(
    kernel: Any,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    args: tuple[Any, ...] | list[Any],
    *,
    shared: int = 0,
    cluster: int | tuple[int, ...] | None = None,
    seed: int | None = None,
    check_races: bool = True,
    measure: bool = False,
    max_polls: int = 1000,
) -> Report:
    """Run a Numba CUDA kernel on the CPU, all blocks at once, and check what its threads do.

    Args:
        kernel: what ``cuda.jit`` returns, or the plain function.
        grid: blocks along x, y and z.
        block: threads along x, y and z.
        args: NumPy arrays, which the kernel changes in place and which may overlap, numbers, and
            tuples of these. An array wrapped by ``uninitialized`` must be written before it is
            read.
        shared: bytes of dynamic shared memory.
        cluster: blocks of a cluster along x, y and z; each must divide the grid's.
        seed: None runs threads in one fixed order; an integer shuffles who goes on at every switch,
            the same way each time.
        check_races: record who read and wrote what, and raise where nothing orders two threads.
        measure: count bank conflicts and memory sectors by source line.
        max_polls: how often a thread may re-read unchanged memory, with the same in its variables,
            while no other thread does anything either, before that is called a deadlock.

    Returns:
        What was counted.

    Raises:
        EmulationError: the kernel did what it must not do; see the subclasses. What it wrote until
            then stays in the arrays.
        TypeError, ValueError: the launch itself is wrong.
    """
    function = python_function(kernel)
    arguments = Arguments(tuple(args), _names(function, len(args)))
    shape = _Shape(grid, block, cluster)
    dynamic = operator.index(shared)
    if not 0 <= dynamic <= MOST_SHARED:
        raise ValueError(f"shared is {shared}: expected a number of bytes, at most {MOST_SHARED}")
    if max_polls < 1:
        raise ValueError(f"max_polls is {max_polls}: expected at least 1")

    def machine(watch: Watch | None = None) -> Machine:
        return Machine(
            seed=seed,
            check_races=check_races,
            max_polls=max_polls,
            traffic=Traffic() if measure else None,
            watch=watch,
        )

    first = machine()
    try:
        _run(first, function, arguments, shape, dynamic)
    except Conflict as conflict:
        watch = Watch(conflict)
        second = machine(watch)
        with contextlib.suppress(Conflict):
            _run(second, function, arguments, shape, dynamic, copied=True)
        raise _race(first, conflict, watch) from None
    return Report(
        threads=len(first.threads),
        barriers=dict(first.barriers),
        switches=first.switches,
        shared_bytes=max(sum(a.raw.size for a in b.shared.values()) for b in first.blocks),
        traffic=first.traffic.lines() if first.traffic is not None else (),
    )


class _Shape:
    """The sizes of a launch."""

    def __init__(self, grid: Any, block: Any, cluster: Any):
        self.grid = _dim3("grid", grid)
        self.block = _dim3("block", block)
        self.cluster = _dim3("cluster", 1 if cluster is None else cluster)
        _check_most("grid", self.grid, MOST_BLOCKS)
        _check_most("block", self.block, MOST_THREADS)
        x, y, z = self.block
        if x * y * z > MOST_THREADS_PER_BLOCK:
            raise ValueError(
                f"block is {tuple(self.block)}, {x * y * z} threads: expected at most "
                f"{MOST_THREADS_PER_BLOCK}"
            )
        x, y, z = self.cluster
        if x * y * z > MOST_BLOCKS_PER_CLUSTER:
            raise ValueError(
                f"cluster is {tuple(self.cluster)}, {x * y * z} blocks: expected at most "
                f"{MOST_BLOCKS_PER_CLUSTER}"
            )
        if any(g % c for g, c in zip(self.grid, self.cluster, strict=True)):
            raise ValueError(
                f"cluster is {tuple(self.cluster)}: expected sizes that divide the grid's, "
                f"{tuple(self.grid)}"
            )


def _dim3(name: str, value: Any) -> Dim3:
    sizes = value if isinstance(value, tuple | list) else (value,)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{name} is {value!r}: expected one to three sizes")
    try:
        found = [operator.index(n) for n in sizes]
    except TypeError:
        raise TypeError(f"{name} is {value!r}: expected integers") from None
    if min(found) < 1:
        raise ValueError(f"{name} is {value!r}: expected sizes of at least 1")
    return Dim3(*found, *(1,) * (3 - len(found)))


def _check_most(name: str, sizes: Dim3, most: tuple[int, int, int]) -> None:
    if any(n > m for n, m in zip(sizes, most, strict=True)):
        raise ValueError(f"{name} is {tuple(sizes)}: expected at most {most}")


def _names(function: FunctionType, given: int) -> tuple[str, ...]:
    code = function.__code__
    count = code.co_argcount
    least = count - len(function.__defaults__ or ())
    if not least <= given <= count:
        raise TypeError(
            f"{given} arguments for {function.__name__}({', '.join(code.co_varnames[:count])})"
        )
    return code.co_varnames[:given]


def _run(
    machine: Machine,
    function: FunctionType,
    arguments: Arguments,
    shape: _Shape,
    dynamic: int,
    *,
    copied: bool = False,
) -> None:
    _populate(machine, shape)
    placed = arguments.place(machine, copied=copied)

    def constants(a: Any) -> Any:
        return constant(machine, a)

    cuda = Namespace(machine, shape.grid, shape.block, dynamic, constants)
    kernel = Rebinder(cuda, machine.codes, constants).kernel(function)
    machine.kernel = kernel.__code__

    def body() -> None:
        try:
            kernel(*placed)
            machine.end()
        except Exception as e:
            _locate(machine, e)
            raise

    with np.errstate(all="ignore"):
        for t in machine.threads:
            t.greenlet = greenlet.greenlet(body, machine.hub)
            t.greenlet.gr_context = contextvars.copy_context()
        machine.resume(machine.threads)
        try:
            machine.run()
        finally:
            machine.abandon()


def _populate(machine: Machine, shape: _Shape) -> None:
    (gx, gy, gz), (bx, by, bz), (cx, cy, cz) = shape.grid, shape.block, shape.cluster
    if gx * gy * gz * bx * by * bz > MASK:
        raise ValueError(f"{gx * gy * gz * bx * by * bz} threads: expected at most {MASK}")
    clusters: dict[Any, Cluster] = {}
    for linear, (z, y, x) in enumerate(np.ndindex(gz, gy, gx)):
        block = Block(Dim3(x, y, z), linear)
        machine.blocks.append(block)
        home = (x // cx, y // cy, z // cz)
        block.cluster = clusters.setdefault(home, Cluster([]))
        block.rank = len(block.cluster.blocks)
        block.cluster.blocks.append(block)
        for number, (tz, ty, tx) in enumerate(np.ndindex(bz, by, bx)):
            if number % WARP == 0:
                warp = Warp(block, number // WARP)
            t = Thread(len(machine.threads), block, warp, number % WARP, Dim3(tx, ty, tz))
            warp.lanes.append(t)
            block.threads.append(t)
            machine.threads.append(t)
        block.live = len(block.threads)
        block.meeting = Meeting(machine, block.threads, f"block {tuple(block.index)}")
    for cluster in clusters.values():
        count = len(cluster.blocks) * bx * by * bz
        whose = f"the cluster of block {tuple(cluster.blocks[0].index)}"
        cluster.barrier = PhaseBarrier(machine, "cluster barrier", count, whose)
    machine.clusters = list(clusters.values())
    machine.grid_meeting = Meeting(machine, machine.threads, "the grid")
    nothing = np.zeros(len(machine.threads), np.int64)
    for t in machine.threads:
        t.known_array, t.known = nothing, nothing.data


def _locate(machine: Machine, error: Exception) -> None:
    """Say in an error where the kernel was, unless it says so itself."""
    if isinstance(error, EmulationError) and error.places:
        return
    site = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if id(code) in machine.codes:
            site.append((code, trace.tb_lasti))
        trace = trace.tb_next
    place = machine.place_of(machine.thread, tuple(reversed(site)))
    if isinstance(error, EmulationError):
        error.places = (place,)
        error.args = (f"{place}: {error.args[0]}",)
    else:
        error.add_note(f"in the emulated kernel at {place}")


def _race(machine: Machine, conflict: Conflict, watch: Watch) -> RaceError:
    here = conflict.places[0]
    t = machine.threads[conflict.epoch & MASK]
    there = watch.place
    who = f"block {tuple(t.block.index)}, thread {tuple(t.index)}"
    first = f"{conflict.other} by {who}" if there is None else f"{conflict.other} at {there}"
    return RaceError(
        f"race on {conflict.subject}: {first}, and {conflict.mine} at {here}, with no barrier or "
        "fence that puts one before the other",
        *((here,) if there is None else (here, there)),
    )
