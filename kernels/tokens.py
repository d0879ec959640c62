"""Rows of W_xh by token id: how forward kernels fetch them, and how their gradient is added up.

A one-hot row times W_xh is a row of W_xh. So no kernel multiplies where X are ids, and none has
rows copied out for it: ``source`` is how a forward kernel gets at X_t W_xh, be it Z, computed
before, or the rows of W_xh that the ids pick. Backward, the rows of dZ are added up by their id:
``scatter`` does so in an order that the ids alone decide, without atomics, and ``add_parts`` ends
what it began where the rows were dealt out to several blocks.

Ids are int32 and lie in [0, d).
"""

from collections.abc import Callable
from typing import NamedTuple

from numba import cuda, uint16, uint32, uint64

from gpurnn.kernels.device import DeviceFunction, device
from gpurnn.kernels.ptx import prefetch_l2
from gpurnn.kernels.storage import Storage
from gpurnn.tile import ADDED_AT_ONCE, WARP, Scatter

__all__ = ["Source", "add_parts", "scatter", "source"]

ALL_LANES = 0xFFFFFFFF

IN_FLIGHT = 16
"""Rows that a thread has under way before it adds the first: they come from far."""


class Source(NamedTuple):
    """What X_t W_xh is fetched by: device functions. ``A`` and ``W_xh`` are flat arrays.

    ``learn(ids, q, A, i)``: fetch what must be known of row i of the T · n before any of its
    numbers can be read, and note it in ids[q], ids being a local array of uint32. It is worth doing
    a step ahead.

    ``number(A, W_xh, ids, q, place, h, j)``: number j of the row, of h, that ids[q] was noted of,
    as a real. ``place`` is where it stands in Z.

    ``announce(A, W_xh, ids, q, place, h, j)``: have its line brought to the L2 cache; nobody waits.
    """

    learn: DeviceFunction
    number: DeviceFunction
    announce: DeviceFunction


def source(storage: Storage, *, by_id: bool) -> Source:
    """Build the functions that read Z, which is A then, or rows of W_xh by the ids in A.

    Of Z nothing need be known, and neither ids nor W_xh are looked at: they may be any arrays. Z
    may have three axes where nothing is announced; ``place`` is an index of it all the same.
    """
    load_value = storage.load

    @device
    def learn_nothing(ids, q, A, i):
        pass

    @device
    def of_z(A, W_xh, ids, q, place, h, j):
        return load_value(A[place])

    @device
    def announce_z(A, W_xh, ids, q, place, h, j):
        prefetch_l2(A, place)

    @device
    def learn_id(ids, q, A, i):
        ids[q] = uint32(A[i])

    @device
    def of_row(A, W_xh, ids, q, place, h, j):
        return load_value(W_xh[uint64(ids[q]) * uint64(h) + uint64(j)])

    @device
    def announce_row(A, W_xh, ids, q, place, h, j):
        prefetch_l2(W_xh, uint64(ids[q]) * uint64(h) + uint64(j))

    if by_id:
        return Source(learn_id, of_row, announce_row)
    return Source(learn_nothing, of_z, announce_z)


def scatter(tile: Scatter, storage: Storage, *, partial: bool) -> Callable[..., None]:
    """Build ``kernel(X, dZ, sums, N, d, h, ids, rows)``: dW_xh[id] = Σ of the rows dZ with that id.

    Arrays, flat:
        X (N): read, ids.
        dZ (N · h): read.
        sums (parts · d · h): written, every number of it, 0 where an id does not occur: for each
            part of the N rows what they add up to. Of ``storage.real`` if ``partial``, else one
            part, rounded once to what is stored.

    N, d and h are at least 1. Nothing may overlap. An id beyond d is passed over.

    The grid is (⌈d / ids⌉, ⌈h / columns⌉, ⌈N / rows⌉), with ``tile.threads`` threads a block and as
    many reals of dynamic shared memory as ``ids · threads``. Block (x, y, z) owns the sums of
    ``ids`` neighbouring ids, from x · ids on, and ``tile.columns`` columns, of the ``rows`` rows
    from z · rows on.

    A block looks at all its rows' ids, a chunk at a time: warp after warp, each at ``tile.loads``
    times 32 neighbours. It notes in a list in shared memory which rows are its own, and of which
    id, in rising order of rows. Before a chunk that the list might not have room for, and in the
    end, the list is added up: thread i owns column i mod ``columns`` of group i // ``columns``; the
    groups take equal parts of the list, in order, each into sums of its own in shared memory, which
    only this thread touches. A run of rows of one id is added up in a register first. In the end
    the groups' sums are added from the first to the last. So every sum has an order that X alone
    decides, and a number that is none reaches its own id only.

    Barriers: one a chunk, after which every thread knows how many each warp has found; the counts
    lie in one of two buffers, so that the next chunk's are not written before this one's are read.
    Around the adding, one puts it after the list's writing, another before the list's next.
    """
    threads, loads, chunk, room = tile.threads, tile.loads, uint32(tile.chunk), uint32(tile.room)
    groups, warps, lanes = tile.groups, tile.threads // WARP, uint32(WARP)
    columns, all_threads, of_warp = uint32(tile.columns), uint32(threads), uint32(WARP * loads)
    real, load_value = storage.real, storage.load
    zero, first, one, none = real(0), uint32(0), uint32(1), uint32(0xFFFFFFFF)
    in_flight, of_groups, places = uint32(IN_FLIGHT), uint32(groups), tile.room

    @device
    def as_it_is(x):
        return x

    store_value = as_it_is if partial else storage.store

    @device
    def add_up(dZ, h, j, place, slot, begin, end, acc, thread):
        """Add list elements from begin to end: those of a thread's group, in its column."""
        fetched = cuda.local.array(IN_FLIGHT, real)
        now, total, k = uint32(slot[begin]), zero, uint32(begin)
        while k < end:
            for u in range(IN_FLIGHT):
                fetched[u] = zero
                if k + uint32(u) < end:
                    row = uint64(place[k + uint32(u)])
                    fetched[u] = load_value(dZ[row * uint64(h) + uint64(j)])
            for u in range(IN_FLIGHT):
                if k + uint32(u) < end:
                    s = uint32(slot[k + uint32(u)])
                    if s != now:
                        acc[now * all_threads + thread] += total
                        total, now = zero, s
                    total += fetched[u]
            k = uint32(k + in_flight)
        acc[now * all_threads + thread] += total

    def scatter_rows(X, dZ, sums, N, d, h, ids, rows):
        place = cuda.shared.array(places, uint32)
        slot = cuda.shared.array(places, uint16)
        found = cuda.shared.array((2, warps), uint32)
        acc = cuda.shared.array(0, real)
        seen = cuda.local.array(loads, uint32)

        N, d, h, ids, rows = uint32(N), uint32(d), uint32(h), uint32(ids), uint32(rows)
        thread = uint32(cuda.threadIdx.x)
        warp, lane = thread // lanes, thread % lanes
        group, column = thread // columns, uint32(cuda.blockIdx.y) * columns
        j = column + thread % columns
        below = uint32((one << lane) - one)  # the lanes below this one
        first_id = uint32(cuda.blockIdx.x) * ids
        own = min(ids, d - first_id)
        at = uint32(uint32(cuda.blockIdx.z) * rows)
        end = uint32(min(N, at + rows))

        for s in range(first, own):
            acc[s * all_threads + thread] = zero

        count, buffer = first, first
        while at < end:
            row = at + warp * of_warp + lane
            here = first
            for v in range(loads):
                seen[v] = none
                if row + uint32(v * WARP) < end:
                    seen[v] = uint32(uint32(X[row + uint32(v * WARP)]) - first_id)
            for v in range(loads):
                here = uint32(here + uint32(cuda.popc(cuda.ballot_sync(ALL_LANES, seen[v] < own))))
            if lane == first:
                found[buffer, warp] = here
            cuda.syncthreads()
            put, total = count, count
            for k in range(warps):
                more = found[buffer, uint32(k)]
                if uint32(k) < warp:
                    put = uint32(put + more)
                total = uint32(total + more)
            if here > first:  # the same in all lanes
                for v in range(loads):
                    mine = seen[v] < own
                    lanes_found = uint32(cuda.ballot_sync(ALL_LANES, mine))
                    if mine:
                        to = put + uint32(cuda.popc(uint32(lanes_found & below)))
                        place[to] = row + uint32(v * WARP)
                        slot[to] = uint16(seen[v])
                    put = uint32(put + uint32(cuda.popc(lanes_found)))
            count, buffer = total, uint32(one - buffer)
            at = uint32(at + chunk)
            if count + chunk > room or at >= end:
                cuda.syncthreads()
                low, high = count * group // of_groups, count * (group + one) // of_groups
                if j < h and low < high:
                    add_up(dZ, h, j, place, slot, low, high, acc, thread)
                cuda.syncthreads()
                count = first

        start = (uint64(cuda.blockIdx.z) * uint64(d) + uint64(first_id)) * uint64(h)
        for e in range(thread, own * columns, all_threads):
            s, c = e // columns, e % columns
            if column + c < h:
                total_of_all = acc[s * all_threads + c]
                for g in range(1, groups):
                    total_of_all += acc[s * all_threads + uint32(g) * columns + c]
                to_sums = start + uint64(s) * uint64(h) + uint64(column + c)
                sums[to_sums] = store_value(total_of_all)

    return scatter_rows


def add_parts(storage: Storage) -> Callable[..., None]:
    """Build ``kernel(sums, out, parts)``: out = Σ of the parts, flat and one after another in sums.

    sums (parts · size) of ``storage.real`` is read, out (size) is written, rounded once. Launched
    with ``WARP · ADDED_AT_ONCE`` threads for every 32 numbers: thread i adds number i mod 32 of an
    equal share of the parts, the i // 32nd, in order; behind a barrier the first warp adds the
    shares in order.
    """
    real, store_value = storage.real, storage.store
    zero, lanes, shares, first, one = (
        real(0),
        uint32(WARP),
        uint32(ADDED_AT_ONCE),
        uint32(0),
        uint32(1),
    )

    def scatter_parts_added(sums, out, parts):
        of_share = cuda.shared.array((ADDED_AT_ONCE, WARP), real)
        parts, size = uint32(parts), uint64(out.shape[0])
        lane, share = uint32(cuda.threadIdx.x) % lanes, uint32(cuda.threadIdx.x) // lanes
        number = uint64(cuda.blockIdx.x) * uint64(lanes) + uint64(lane)
        total = zero
        if number < size:
            for part in range(parts * share // shares, parts * (share + one) // shares):
                total += sums[uint64(part) * size + number]
        of_share[share, lane] = total
        cuda.syncthreads()
        if share == first and number < size:
            for k in range(1, ADDED_AT_ONCE):
                total += of_share[uint32(k), lane]
            out[number] = store_value(total)

    return scatter_parts_added
