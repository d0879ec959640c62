"""``cuda.emu``: what twins of inline PTX need and Numba's ``cuda`` has no name for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpurnn.emulator import atomics
from gpurnn.emulator.arrays import Array, array
from gpurnn.emulator.barriers import PhaseBarrier
from gpurnn.emulator.errors import BarrierError, UnsupportedError
from gpurnn.emulator.threads import WARP, Cluster
from gpurnn.emulator.warps import FULL

if TYPE_CHECKING:
    from gpurnn.emulator.namespace import Namespace

__all__ = ["Operations"]

# The highest number of a barrier within a block.
MOST_NAMED = 15


class Operations:
    """Clusters, named barriers, strong accesses and exchanges, for the thread that runs."""

    def __init__(self, cuda: Namespace):
        self._cuda = cuda
        self._machine = cuda.machine

    def cluster_rank(self) -> int:
        """Return this block's rank in its cluster, x varying fastest."""
        return self._machine.thread.block.rank

    def cluster_size(self) -> int:
        """Return how many blocks this block's cluster has."""
        return len(self._cluster().blocks)

    def cluster_arrive(self) -> None:
        """Arrive at the cluster's barrier (``barrier.cluster.arrive``) and go on."""
        self._cluster_barrier().arrive()

    def cluster_wait(self) -> None:
        """Wait for all threads of the cluster to have arrived (``barrier.cluster.wait``)."""
        self._cluster_barrier().wait()

    def cluster_sync(self) -> None:
        """Arrive and wait."""
        self.cluster_arrive()
        self.cluster_wait()

    def cluster_map(self, shared: Any, rank: int) -> Array:
        """Return a shared array, or part of one, as it is in the block of rank ``rank``."""
        blocks = self._cluster().blocks
        machine = self._machine
        allocation = shared.access.allocation if isinstance(shared, Array) else None
        if allocation is None or allocation.block is None:
            raise UnsupportedError(f"cluster_map of {shared!r}: expected a shared array")
        if not 0 <= rank < len(blocks):
            raise UnsupportedError(f"rank {rank} in a cluster of {len(blocks)} blocks")
        block = blocks[int(rank)]
        theirs = self._cuda.shared.in_block(block, allocation)
        if block.live == 0:
            theirs.refuse()
        access = theirs.access(shared.dtype, remote=block is not machine.thread.block)
        label = f"{shared.label} of block {tuple(block.index)}"
        return array(machine, access, shared.k0, shared.shape, shared.steps, label)

    def bar_sync(self, number: int, count: int) -> None:
        """Wait at named barrier ``number`` until ``count`` threads have arrived (``bar.sync``)."""
        barrier = self._named(number, count)
        barrier.arrive()
        barrier.wait()

    def bar_arrive(self, number: int, count: int) -> None:
        """Arrive at named barrier ``number`` and go on (``bar.arrive``)."""
        barrier = self._named(number, count)
        barrier.arrive()
        barrier.forget()

    def exchange(self, value: Any, mask: int = FULL) -> dict[int, Any]:
        """Return what each lane of ``mask`` brought, by lane; it does not order memory."""
        values = self._cuda.meet_lanes("exchange", mask, value)
        return {t.lane: v for t, v in values.items()}

    def strong_load(self, ary: Any, index: Any, *, acquire: bool = False) -> Any:
        """Read ``ary[index]`` (``ld.relaxed``, ``ld.volatile``; ``ld.acquire``)."""
        value = atomics.strong_load(self._machine, ary, index)
        if acquire:
            self._machine.thread.fence(device=True)
        return value

    def strong_store(self, ary: Any, index: Any, value: Any, *, release: bool = False) -> None:
        """Write ``ary[index]`` (``st.relaxed``, ``st.volatile``; ``st.release``)."""
        if release:
            self._machine.thread.fence(device=True)
        atomics.strong_store(self._machine, ary, index, value)

    def pause(self) -> None:
        """Let other threads go first."""
        self._machine.pause()

    def _cluster(self) -> Cluster:
        cluster = self._machine.thread.block.cluster
        assert cluster is not None
        return cluster

    def _cluster_barrier(self) -> PhaseBarrier:
        barrier = self._cluster().barrier
        assert barrier is not None
        return barrier

    def _named(self, number: int, count: int) -> PhaseBarrier:
        machine = self._machine
        block = machine.thread.block
        if not 0 < number <= MOST_NAMED:
            place = machine.place()
            raise BarrierError(
                f"{place}: barrier {number}: expected 1 to {MOST_NAMED} (0 is that of "
                "cuda.syncthreads)",
                place,
            )
        if count % WARP or not 0 < count <= -(-len(block.threads) // WARP) * WARP:
            place = machine.place()
            raise BarrierError(
                f"{place}: barrier {number} for {count} threads: expected a multiple of {WARP}, at "
                f"most the block's {len(block.threads)}",
                place,
            )
        barrier = block.named.get(number)
        if barrier is None:
            whose = f"block {tuple(block.index)}"
            operation = f"barrier {number}"
            barrier = PhaseBarrier(machine, operation, count, whose, whole_warps=True)
            block.named[number] = barrier
        if barrier.count != count and barrier.arrived:
            place = machine.place()
            raise BarrierError(
                f"{place}: barrier {number} for {count} threads, where {len(barrier.arrived)} "
                f"have arrived for {barrier.count}",
                place,
            )
        barrier.count = count
        return barrier
