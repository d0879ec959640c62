"""Races planted in shared and global memory, and the kernels that do it right."""

import numpy as np
import pytest
from kernel_lines import line, raises
from numba import cuda, float32, int8, int32, int64
from twins import volatile_load

from gpurnn import emulator
from gpurnn.emulator import RaceError


@cuda.jit
def reduce_shared(x, out):
    s = cuda.shared.array(64, float32)
    i = cuda.threadIdx.x
    s[i] = x[i]
    cuda.syncthreads()
    step = 32
    while step > 0:
        if i < step:
            s[i] += s[i + step]
        cuda.syncthreads()
        step //= 2
    if i == 0:
        out[0] = s[0]


@cuda.jit
def reduce_shared_no_barrier(x, out):
    s = cuda.shared.array(64, float32)
    i = cuda.threadIdx.x
    s[i] = x[i]  # write
    step = 32
    while step > 0:
        if i < step:
            s[i] += s[i + step]  # read
        cuda.syncthreads()
        step //= 2
    if i == 0:
        out[0] = s[0]


def test_reduction():
    x, out = np.arange(64, dtype=np.float32), np.full(1, np.nan, np.float32)
    report = emulator.launch(reduce_shared, 1, 64, (x, out))
    assert out[0] == x.sum()
    assert report.barriers == {"syncthreads": 7}


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_missing_barrier_in_shared_memory(seed):
    x, out = np.ones(64, np.float32), np.zeros(1, np.float32)
    kernel = reduce_shared_no_barrier
    with pytest.raises((RaceError, emulator.UninitializedError)) as info:
        emulator.launch(kernel, 1, 64, (x, out), seed=seed)
    if seed is None:
        assert info.type is emulator.UninitializedError  # thread 0 runs first
    else:
        assert f":{line(kernel, 'read')} " in str(info.value)


@cuda.jit
def write_then_read_shared(out):
    s = cuda.shared.array(2, float32)
    i = cuda.threadIdx.x
    if i == 0:
        s[0] = 1.0  # write
    if i == 1:
        out[0] = s[0]  # read


def test_both_sides_of_a_race_are_named():
    with raises(RaceError, write_then_read_shared, "read", "write") as info:
        emulator.launch(write_then_read_shared, 1, 2, (np.zeros(1, np.float32),))
    here, there = info.value.places
    assert here.thread == (1, 0, 0) and there.thread == (0, 0, 0)
    assert "item 0 of the shared float32 array" in str(info.value)


@cuda.jit
def neighbour_in_place(x):
    i = cuda.grid(1)
    if i + 1 < x.size:
        x[i] = x[i + 1]  # both


@cuda.jit
def neighbour_two_steps(x):
    i = cuda.grid(1)
    v = x[i + 1] if i + 1 < x.size else x[i]
    cuda.syncthreads()
    x[i] = v


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_neighbour_in_global_memory(seed):
    x = np.arange(32, dtype=np.float32)
    with raises(RaceError, neighbour_in_place, "both", "both"):
        emulator.launch(neighbour_in_place, 1, 32, (x,), seed=seed)
    x = np.arange(32, dtype=np.float32)
    emulator.launch(neighbour_two_steps, 1, 32, (x,), seed=seed)
    assert (x == [*range(1, 32), 31]).all()


def test_blocks_race_where_threads_of_one_would_not():
    x = np.arange(64, dtype=np.float32)
    with pytest.raises(RaceError, match=r"element \(32,\) of argument x") as info:
        emulator.launch(neighbour_two_steps, 2, 32, (x,))
    assert {p.block for p in info.value.places} == {(0, 0, 0), (1, 0, 0)}


@cuda.jit
def same_value(out):
    out[0] = 1.0  # write


def test_two_writes_of_one_value_race():
    with raises(RaceError, same_value, "write", "write"):
        emulator.launch(same_value, 1, 2, (np.zeros(1),))
    emulator.launch(same_value, 1, 1, (np.zeros(1),))


@cuda.jit
def shift_two_arrays(a, b):
    i = cuda.threadIdx.x
    b[i] = a[i]  # both


def test_overlapping_arguments():
    x = np.zeros(33, np.float32)
    with raises(RaceError, shift_two_arrays, "both", "both") as info:
        emulator.launch(shift_two_arrays, 1, 32, (x[:-1], x[1:]))
    assert "argument a" in str(info.value) and "argument b" in str(info.value)
    emulator.launch(shift_two_arrays, 1, 32, (x[1:], x[1:]))  # each thread its own element
    emulator.launch(shift_two_arrays, 1, 16, (x[:16], x[16:32]))


def test_item_sizes_conflict():
    x = np.zeros(8, np.float64)
    with pytest.raises(RaceError):
        emulator.launch(write_words, 1, 2, (x, x.view(np.float32)))


@cuda.jit
def write_words(wide, narrow):
    if cuda.threadIdx.x == 0:
        wide[1] = 1.0
    else:
        narrow[3] = 2.0


@cuda.jit
def read_all_then_write(x, out):
    i = cuda.threadIdx.x
    total = float32(0)
    for j in range(x.size):
        total += x[j]  # read
    if i == 3:
        x[5] = total  # write
    out[i] = total


def test_write_after_reads_by_many():
    with raises(RaceError, read_all_then_write, "write", "read"):
        emulator.launch(read_all_then_write, 1, 8, (np.ones(8, np.float32), np.ones(8)))
    emulator.launch(read_all_then_write, 1, 3, (np.ones(8, np.float32), np.ones(8)))


# Fences.


@cuda.jit
def publish(data, flag, out):
    if cuda.blockIdx.x == 0:
        data[0] = 7.0
        cuda.threadfence()
        cuda.atomic.add(flag, 0, 1)
    else:
        while volatile_load(flag, 0) == 0:
            pass
        cuda.threadfence()
        out[0] = data[0]


@cuda.jit
def publish_without_first_fence(data, flag, out):
    if cuda.blockIdx.x == 0:
        data[0] = 7.0  # write
        cuda.atomic.add(flag, 0, 1)
    else:
        while volatile_load(flag, 0) == 0:
            pass
        cuda.threadfence()
        out[0] = data[0]  # read


@cuda.jit
def publish_without_second_fence(data, flag, out):
    if cuda.blockIdx.x == 0:
        data[0] = 7.0  # write
        cuda.threadfence()
        cuda.atomic.add(flag, 0, 1)
    else:
        while volatile_load(flag, 0) == 0:
            pass
        out[0] = data[0]  # read


@cuda.jit
def publish_block_fence(data, flag, out):
    if cuda.grid(1) == 0:
        data[0] = 7.0  # write
        cuda.threadfence_block()
        cuda.atomic.add(flag, 0, 1)
    elif cuda.grid(1) == 1:
        while volatile_load(flag, 0) == 0:
            pass
        cuda.threadfence_block()
        out[0] = data[0]  # read


def arrays():
    return np.zeros(1), np.zeros(1, np.int32), np.zeros(1)


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_fences(seed):
    data, flag, out = arrays()
    emulator.launch(publish, 2, 1, (data, flag, out), seed=seed)
    assert out[0] == 7
    for kernel in (publish_without_first_fence, publish_without_second_fence):
        with raises(RaceError, kernel, "read", "write"):
            emulator.launch(kernel, 2, 1, arrays(), seed=seed)


def test_a_fence_of_block_scope_counts_in_the_block_only():
    data, flag, out = arrays()
    emulator.launch(publish_block_fence, 1, 2, (data, flag, out))
    assert out[0] == 7
    with raises(RaceError, publish_block_fence, "read", "write"):
        emulator.launch(publish_block_fence, 2, 1, arrays())


@cuda.jit
def counter_barrier(x, count, out, steps):
    """A grid barrier of atomics: every block reads what the others wrote a step before."""
    b, i = cuda.blockIdx.x, cuda.threadIdx.x
    blocks, threads = cuda.gridDim.x, cuda.blockDim.x
    for t in range(steps):
        x[t % 2, b * threads + i] = t + b
        cuda.syncthreads()
        if i == 0:
            cuda.threadfence()
            cuda.atomic.add(count, 0, 1)
            while volatile_load(count, 0) < blocks * (t + 1):
                pass
            cuda.threadfence()
        cuda.syncthreads()
        out[b, i] += x[t % 2, (b + 1) % blocks * threads + i]


@pytest.mark.parametrize("seed", [None, *range(6)])
def test_counter_barrier(seed):
    x, count, out = np.zeros((2, 12)), np.zeros(1, np.int32), np.zeros((3, 4))
    emulator.launch(counter_barrier, 3, 4, (x, count, out, 5), seed=seed)
    assert (out == (10 + 5 * ((np.arange(3) + 1) % 3))[:, None]).all()


@cuda.jit
def counter_barrier_one_buffer(x, count, out, steps):
    b = cuda.blockIdx.x
    for t in range(steps):
        x[b] = t + b  # write
        cuda.threadfence()
        cuda.atomic.add(count, 0, 1)
        while volatile_load(count, 0) < cuda.gridDim.x * (t + 1):
            pass
        cuda.threadfence()
        out[b] += x[(b + 1) % cuda.gridDim.x]  # read


def test_a_buffer_reused_too_early():
    args = np.zeros(3), np.zeros(1, np.int32), np.zeros(3)
    with pytest.raises(RaceError) as info:
        emulator.launch(counter_barrier_one_buffer, 3, 1, (*args, 3))
    lines = {p.line for p in info.value.places}
    assert lines == {line(counter_barrier_one_buffer, m) for m in ("read", "write")}


# Flag in data: the value in the low word, the step in the high one.


@cuda.jit
def exchange_two_slots(words, out, steps):
    b, blocks = cuda.blockIdx.x, cuda.gridDim.x
    for t in range(steps):
        cuda.stcg(words, (t % 2, b), int64(t + 1) << 32 | (10 * t + b))
        total = 0
        for other in range(blocks):
            word = volatile_load(words, (t % 2, other))
            while word >> 32 != t + 1:
                word = volatile_load(words, (t % 2, other))
            total += word & 0xFFFFFFFF
        out[t, b] = total


@cuda.jit
def exchange_one_slot(words, out, steps):
    b, blocks = cuda.blockIdx.x, cuda.gridDim.x
    for t in range(steps):
        cuda.stcg(words, (0, b), int64(t + 1) << 32 | (10 * t + b))
        total = 0
        for other in range(blocks):
            word = volatile_load(words, (0, other))
            while word >> 32 != t + 1:
                word = volatile_load(words, (0, other))  # poll
            total += word & 0xFFFFFFFF
        out[t, b] = total


def test_flag_in_data():
    for seed in (None, *range(10)):
        words, out = np.zeros((2, 4), np.uint64), np.zeros((6, 4), np.int64)
        emulator.launch(exchange_two_slots, 4, 1, (words, out, 6), seed=seed)
        assert (out == (40 * np.arange(6) + 6)[:, None]).all()


def test_one_slot_is_overwritten_before_all_have_read_it():
    def launch_all():
        for seed in range(20):
            words, out = np.zeros((1, 4), np.uint64), np.zeros((6, 4), np.int64)
            emulator.launch(exchange_one_slot, 4, 1, (words, out, 6), seed=seed, max_polls=100)

    with pytest.raises(emulator.DeadlockError, match=f":{line(exchange_one_slot, 'poll')} "):
        launch_all()


@cuda.jit
def mixed(x):
    if cuda.threadIdx.x == 0:
        x[0] = 1  # plain
    else:
        cuda.atomic.add(x, 0, 1)  # atomic


def test_an_atomic_races_with_a_plain_write():
    with raises(RaceError, mixed, "atomic", "plain"):
        emulator.launch(mixed, 1, 2, (np.zeros(1, np.int32),))


@cuda.jit
def warp_ordered(out, ordered):
    s = cuda.shared.array(32, float32)
    i = cuda.threadIdx.x
    s[i] = i
    if ordered == 1:
        cuda.syncwarp()
    else:
        cuda.shfl_sync(0xFFFFFFFF, i, 0)
    out[i] = s[31 - i]  # read


def test_syncwarp_orders_and_a_shuffle_does_not():
    out = np.zeros(32)
    emulator.launch(warp_ordered, 1, 32, (out, 1))
    assert (out == np.arange(32)[::-1]).all()
    with raises(RaceError, warp_ordered, "read"):
        emulator.launch(warp_ordered, 1, 32, (out, 0))


def test_races_can_be_let_pass():
    x = np.arange(32, dtype=np.float32)
    emulator.launch(neighbour_in_place, 1, 32, (x,), check_races=False)
    assert (x[:-1] == np.arange(1, 32)).all()


def test_arrays_stay_as_they_were_when_the_race_was_found():
    x = np.arange(4, dtype=np.float32)
    with pytest.raises(RaceError):
        emulator.launch(neighbour_in_place, 1, 4, (x,))
    assert x.tolist() == [1, 1, 2, 3]  # thread 0 wrote; thread 1's write is the race


@cuda.jit
def race_after_a_barrier(x):
    i = cuda.threadIdx.x
    cuda.syncthreads()
    if i == 0:
        x[0] = 1  # write
    else:
        x[1] = x[0]  # read


def test_a_barrier_does_not_order_what_follows_it():
    with raises(RaceError, race_after_a_barrier, "read", "write"):
        emulator.launch(race_after_a_barrier, 1, 2, (np.zeros(2),))


@cuda.jit
def many_readers(x, out, steps, sync):
    for _ in range(steps):
        out[cuda.grid(1)] += x[0]  # read
        cuda.syncthreads()
    if sync == 1:
        cuda.cg.this_grid().sync()
    if cuda.grid(1) == 0:
        x[0] = 1  # write


@pytest.mark.parametrize("threads", [1, 24, 48])
def test_readers_of_another_block_are_kept(threads):
    out = np.zeros(2 * threads)
    with pytest.raises(RaceError) as info:
        emulator.launch(many_readers, 2, threads, (np.zeros(1), out, 7, 0))
    lines = {p.line for p in info.value.places}
    assert lines == {line(many_readers, "read"), line(many_readers, "write")}
    assert {p.block for p in info.value.places} == {(0, 0, 0), (1, 0, 0)}
    emulator.launch(many_readers, 2, threads, (np.zeros(1), out, 7, 1))


@cuda.jit
def two_fences(data, flag, out):
    if cuda.blockIdx.x == 0:
        data[0] = 7.0
        cuda.threadfence()
        data[1] = 8.0
        cuda.threadfence_block()
        cuda.atomic.add(flag, 0, 1)
    else:
        while volatile_load(flag, 0) == 0:
            pass
        cuda.threadfence()
        out[0] = data[0]
        out[1] = data[1]  # read


def test_a_narrow_fence_takes_nothing_back_from_a_wide_one():
    out = np.zeros(2)
    with raises(RaceError, two_fences, "read"):
        emulator.launch(two_fences, 2, 1, (np.zeros(2), np.zeros(1, np.int32), out))
    assert out[0] == 7


@cuda.jit
def plain_after_strong(x, kind):
    if cuda.threadIdx.x == 1:
        x[0] = 1  # plain
    elif kind == 0:
        cuda.atomic.add(x, 0, 1)  # atomic
    elif kind == 1:
        cuda.stcg(x, 0, 1)  # store
    else:
        cuda.ldcv(x, 0)  # load


@pytest.mark.parametrize(("kind", "mark"), [(0, "atomic"), (1, "store"), (2, "load")])
def test_a_plain_write_after_a_strong_access(kind, mark):
    seen = set()
    for seed in range(8):
        with pytest.raises(RaceError) as info:
            emulator.launch(plain_after_strong, 1, 2, (np.zeros(1, np.int32), kind), seed=seed)
        seen.add(tuple(p.line for p in info.value.places))
    strong, plain = line(plain_after_strong, mark), line(plain_after_strong, "plain")
    assert seen == {(strong, plain), (plain, strong)}


@cuda.jit
def read_on_three_lines(x, out):
    i = cuda.threadIdx.x
    if i == 0:
        out[i] = x[0]  # first
    elif i == 1:
        out[i] = x[0]  # second
    else:
        out[i] = x[0]  # third
        x[0] = 1  # write


def test_the_earlier_side_is_the_thread_that_is_not_ordered():
    with raises(RaceError, read_on_three_lines, "write", "second") as info:
        emulator.launch(read_on_three_lines, 1, 3, (np.zeros(1), np.zeros(3)))
    assert info.value.places[1].thread == (1, 0, 0)


@cuda.jit
def bytes_and_words(x, out, first):
    s = cuda.shared.array(8, int32)
    i = cuda.threadIdx.x
    s[i] = 0
    cuda.syncthreads()
    b = s.view(int8)
    if i < 4:
        b[i] = i  # byte
    elif i == 4:
        s[first] = 1  # word
    cuda.syncthreads()
    out[i] = b[i]


def test_bytes_of_a_word():
    out = np.zeros(8)
    emulator.launch(bytes_and_words, 1, 8, (None, out, 1))
    assert out.tolist() == [0, 1, 2, 3, 1, 0, 0, 0]
    with raises(RaceError, bytes_and_words, "word", "byte"):
        emulator.launch(bytes_and_words, 1, 8, (None, out, 0))


@cuda.jit
def one_early_reader(x, out):
    if cuda.blockIdx.x == 0:
        if cuda.threadIdx.x == 0:
            out[0] = x[0]  # early
        return
    for _ in range(7):
        out[cuda.grid(1)] += x[0]
        cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        x[0] = 1  # write


def test_a_reader_is_remembered_behind_hundreds_of_others():
    with raises(RaceError, one_early_reader, "write", "early"):
        emulator.launch(one_early_reader, 2, 48, (np.zeros(1), np.zeros(96)))


@cuda.jit
def plain_read_of_a_strong_store(x, out):
    if cuda.threadIdx.x == 0:
        cuda.stcg(x, 0, 1)  # store
    else:
        for _ in range(5):
            cuda.nanosleep(10)
        out[0] = x[0]  # read


def test_a_plain_read_of_a_strong_store():
    with raises(RaceError, plain_read_of_a_strong_store, "read", "store"):
        emulator.launch(plain_read_of_a_strong_store, 1, 2, (np.zeros(1), np.zeros(1)))


@cuda.jit
def halves(words, wide, how):
    if cuda.blockIdx.x == 0:
        cuda.stcg(words, 0, 5)
        cuda.stcg(words, 1, 7)  # half
    elif how == 0:
        cuda.ldcv(wide, 0)  # whole
    elif how == 1:
        cuda.stcg(wide, 0, 1)
    else:
        cuda.atomic.add(wide, 0, 1)


@cuda.jit
def halves_in_turn(words, wide, out):
    if cuda.blockIdx.x == 0:
        cuda.stcg(words, 0, 5)
        cuda.stcg(words, 1, 7)
    cuda.cg.this_grid().sync()
    out[cuda.blockIdx.x] = cuda.ldcv(wide, 0)


@pytest.mark.parametrize("how", [0, 1, 2])
@pytest.mark.parametrize("seed", [None, *range(4)])
def test_strong_accesses_of_several_sizes(how, seed):
    words = np.zeros(2, np.uint32)
    with pytest.raises(RaceError, match="not quite the same bytes"):
        emulator.launch(halves, 2, 1, (words, words.view(np.uint64), how), seed=seed)


def test_strong_accesses_of_several_sizes_in_turn():
    words, out = np.zeros(2, np.uint32), np.zeros(2, np.uint64)
    emulator.launch(halves_in_turn, 2, 1, (words, words.view(np.uint64), out))
    assert (out == 5 + (7 << 32)).all()
