"""Batches: windows, partitions, epochs, splits."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timemachine import require_time_machine

from gpurnn.batches import (
    Epoch,
    RandomPartition,
    SequentialPartition,
    Windows,
    shifted,
    split,
)
from gpurnn.text import Tokenizer, Vocabulary

SAMPLERS = [
    lambda ids, T, n: Windows(ids, T, n),
    lambda ids, T, n: Windows(ids, T, n, shuffle=False),
    RandomPartition,
    SequentialPartition,
    lambda ids, T, n: SequentialPartition(ids, T, n, random_offset=False),
]
KINDS = [Windows, RandomPartition, SequentialPartition]

samplers = st.sampled_from(SAMPLERS)
lengths = st.integers(0, 200)
small = st.integers(1, 9)
seeds = st.integers(0, 2**32)


class Offset(np.random.Generator):
    """A generator whose ``integers`` gives the offset a test asks for, and checks the range."""

    def __init__(self, offset: int, largest: int) -> None:
        super().__init__(np.random.PCG64(0))
        self._answer = offset
        self._largest = largest

    def integers(self, high: int, *, endpoint: bool = False) -> int:
        assert (high if endpoint else high - 1) == self._largest
        return self._answer


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def text_of(length: int) -> np.ndarray:
    """Every token is its own position, so a batch tells where it came from."""
    return np.arange(length)


def make(sampler, length: int, T: int, n: int):
    """Build the sampler, or drop the example if the text is too short for any sampler."""
    assume(length >= (n + 1) * T + 1)
    return sampler(text_of(length), T, n)


# shifted, split


def test_machin_achine() -> None:
    vocabulary = Vocabulary("machine")
    ids = vocabulary.encode("machine")
    X, Y = shifted(ids)
    assert "".join(vocabulary.decode(X)) == "machin"
    assert "".join(vocabulary.decode(Y)) == "achine"
    assert Y[2] == vocabulary["h"]
    assert np.shares_memory(X, ids) and np.shares_memory(Y, ids)


def test_words_shifted() -> None:
    words = Tokenizer("word").tokens("The Time Machine, by H. G. Wells")
    vocabulary = Vocabulary(words)
    X, Y = shifted(vocabulary.encode(words))
    assert vocabulary.decode(X) == ["the", "time", "machine", "by", "h.", "g."]
    assert vocabulary.decode(Y) == ["time", "machine", "by", "h.", "g.", "wells"]
    assert vocabulary.decode(Y)[2] == "by"


def test_shifted_needs_two_tokens() -> None:
    assert [part.tolist() for part in shifted(text_of(2))] == [[0], [1]]
    with pytest.raises(ValueError, match="at least 2 tokens, one and its target; got 1"):
        shifted(text_of(1))


@settings(deadline=None)
@given(length=st.integers(2, 300), fraction=st.floats(0.01, 0.99))
def test_split_by_position(length: int, fraction: float) -> None:
    ids = text_of(length)
    assume(0 < round(fraction * length) < length)
    train, validation = split(ids, fraction)
    assert np.concatenate([train, validation]).tolist() == ids.tolist()
    assert abs(train.size - fraction * length) <= 0.5
    assert np.shares_memory(train, ids) and np.shares_memory(validation, ids)


def test_split_rounds() -> None:
    train, validation = split(text_of(100), 0.29)  # 0.29 · 100 is 28.999… in binary
    assert (train.size, validation.size) == (29, 71)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError) as caught:
        split(text_of(10), fraction)
    assert str(caught.value) == (
        f"fraction must be between 0 and 1, both excluded; got {fraction!r}"
    )


def test_split_with_an_empty_part() -> None:
    with pytest.raises(ValueError, match=r"fraction=0.01 of 10 tokens leaves 0 .* and 10 to val"):
        split(text_of(10), 0.01)
    with pytest.raises(ValueError, match=r"fraction=0.99 of 10 tokens leaves 10 .* and 0 to val"):
        split(text_of(10), 0.99)


# What all samplers have in common


@settings(deadline=None)
@given(sampler=samplers, length=lengths, T=small, n=small, seed=seeds)
def test_targets_are_the_tokens_that_follow(sampler, length, T, n, seed) -> None:
    sampler = make(sampler, length, T, n)
    for X, Y in sampler.epoch(rng(seed)):
        assert X.shape == Y.shape
        assert X.shape[0] == T and 1 <= X.shape[1] <= n
        assert (Y == X + 1).all()
        np.testing.assert_array_equal(X, X[0] + np.arange(T)[:, None])


@settings(deadline=None)
@given(sampler=samplers, length=lengths, T=small, n=small, seed=seeds)
def test_same_rng_same_batches_in_any_order_of_asking(sampler, length, T, n, seed) -> None:
    sampler = make(sampler, length, T, n)
    forward = list(sampler.epoch(rng(seed)))
    again = sampler.epoch(rng(seed))
    assert len(again) == len(forward)
    for k in reversed(range(len(again))):
        assert_same(again[k], forward[k])
        assert_same(again[k - len(again)], forward[k])


def assert_same(batch, other) -> None:
    for mine, theirs in zip(batch, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@settings(deadline=None)
@given(sampler=samplers, length=lengths, T=small, n=small, seed=seeds, data=st.data())
def test_rest_of_an_epoch(sampler, length, T, n, seed, data) -> None:
    epoch = make(sampler, length, T, n).epoch(rng(seed))
    k = data.draw(st.integers(0, len(epoch)))
    rest = epoch[k:]
    assert isinstance(rest, Epoch) and len(rest) == len(epoch) - k
    for batch, expected in zip(rest, itertools.islice(epoch, k, None), strict=True):
        assert_same(batch, expected)


def test_slices_of_slices() -> None:
    epoch = Windows(text_of(10), 1, 1, shuffle=False).epoch(rng())
    part = epoch[1:][2:][::-2]
    assert [X.item() for X, _ in part] == [8, 6, 4]
    assert part[-1][0].item() == 4


@settings(deadline=None)
@given(sampler=samplers, length=lengths, T=small, n=small, seed=seeds)
def test_num_batches_is_a_tight_lower_bound(sampler, length, T, n, seed) -> None:
    sampler = make(sampler, length, T, n)
    assert 1 <= sampler.num_batches <= len(sampler.epoch(rng(seed))) <= sampler.num_batches + 1


@settings(deadline=None)
@given(sampler=samplers, length=lengths, T=small, n=small, seed=seeds)
def test_all_randomness_is_drawn_when_the_epoch_is_made(sampler, length, T, n, seed) -> None:
    sampler = make(sampler, length, T, n)
    generator = rng(seed)
    epoch = sampler.epoch(generator)
    state = generator.bit_generator.state
    first = list(epoch)
    assert generator.bit_generator.state == state
    sampler.epoch(generator)
    for batch, expected in zip(epoch, first, strict=True):
        assert_same(batch, expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batch_that_does_not_exist(sampler) -> None:
    epoch = sampler(text_of(50), 4, 3).epoch(rng())
    for k in (len(epoch), -len(epoch) - 1):
        with pytest.raises(IndexError, match=f"batch {k} of an epoch of {len(epoch)} batches"):
            epoch[k]


@pytest.mark.parametrize("sampler", KINDS)
def test_epochs_differ(sampler) -> None:
    generator = rng()
    sampler = sampler(text_of(5_000), 50, 4)
    firsts = [sampler.epoch(generator)[0][0].tolist() for _ in range(6)]
    assert any(first != firsts[0] for first in firsts)


@pytest.mark.parametrize("sampler", KINDS)
@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_batches_have_the_dtype_of_the_ids(sampler, dtype) -> None:
    X, Y = sampler(text_of(50).astype(dtype), 4, 3).epoch(rng())[0]
    assert X.dtype == Y.dtype == dtype


@pytest.mark.parametrize("sampler", KINDS)
def test_numbers_of_the_sampler(sampler) -> None:
    sampler = sampler(text_of(50), np.int64(4), 3)
    assert (sampler.T, sampler.n) == (4, 3)
    assert sampler.carries_state == isinstance(sampler, SequentialPartition)


@pytest.mark.parametrize(
    ("sampler", "config"),
    [
        (
            Windows(text_of(50), 4, 3),
            {"kind": "windows", "T": 4, "n": 3, "shuffle": True, "start": 0, "count": 46},
        ),
        (
            Windows(text_of(50), 4, 3, shuffle=False, start=5, count=7),
            {"kind": "windows", "T": 4, "n": 3, "shuffle": False, "start": 5, "count": 7},
        ),
        (RandomPartition(text_of(50), 4, 3), {"kind": "random-partition", "T": 4, "n": 3}),
        (
            SequentialPartition(text_of(50), 4, 3, random_offset=False),
            {"kind": "sequential-partition", "T": 4, "n": 3, "random_offset": False},
        ),
    ],
)
def test_config(sampler, config: dict) -> None:
    assert sampler.config() == config


# Windows


def test_windows_are_views_of_the_text() -> None:
    ids = text_of(100)
    windows = Windows(ids, 5, 8)
    assert windows.X.shape == windows.Y.shape == (95, 5)
    assert np.shares_memory(windows.X, ids) and np.shares_memory(windows.Y, ids)
    assert (windows.Y[:, :-1] == windows.X[:, 1:]).all()
    assert windows.X[7].tolist() == [7, 8, 9, 10, 11] and windows.Y[7].tolist() == [
        8,
        9,
        10,
        11,
        12,
    ]
    assert windows.Y[-1, -1] == 99
    with pytest.raises(ValueError, match="read-only"):
        windows.X[0, 0] = 1


@settings(deadline=None)
@given(length=st.integers(2, 60), T=small, n=small, seed=seeds, data=st.data())
def test_every_window_once_in_an_epoch(length, T, n, seed, data) -> None:
    assume(length > T)
    start = data.draw(st.integers(0, length - T - 1))
    count = data.draw(st.integers(1, length - T - start))
    windows = Windows(text_of(length), T, n, start=start, count=count)
    batches = list(windows.epoch(rng(seed)))
    assert len(batches) == windows.num_batches == -(-count // n)
    assert [X.shape[1] for X, _ in batches[:-1]] == [n] * (len(batches) - 1)
    firsts = np.concatenate([X[0] for X, _ in batches])
    assert sorted(firsts) == list(range(start, start + count))
    assert windows.X[:, 0].tolist() == list(range(start, start + count))


def test_windows_in_order() -> None:
    epoch = Windows(text_of(10), 3, 4, shuffle=False, start=1).epoch(rng())
    assert [X.tolist() for X, _ in epoch] == [
        [[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]],
        [[5, 6], [6, 7], [7, 8]],
    ]
    assert epoch[1][1].tolist() == [[6, 7], [7, 8], [8, 9]]


def test_windows_in_order_draw_nothing() -> None:
    generator = rng()
    Windows(text_of(10), 3, 4, shuffle=False).epoch(generator)
    assert generator.bit_generator.state == rng().bit_generator.state


def test_batches_of_windows_are_contiguous_in_time_major_order() -> None:
    for X in Windows(text_of(50), 4, 8).epoch(rng())[0]:
        assert X.flags.c_contiguous and X.shape == (4, 8)


def test_windows_of_the_book() -> None:
    vocabulary = Vocabulary(tokens := Tokenizer("char", "book").tokens(require_time_machine()))
    ids = vocabulary.encode(tokens)
    train = Windows(ids, 32, 1024, count=10_000)
    validation = Windows(ids, 32, 1024, start=10_000, count=5_000, shuffle=False)
    assert Windows(ids, 32, 1024).count == 173_428 - 32
    assert (train.num_batches, validation.num_batches) == (10, 5)
    assert [X.shape for X, _ in train.epoch(rng())] == [(32, 1024)] * 9 + [(32, 784)]
    assert "".join(vocabulary.decode(train.X[0])) == "the time machine by h g wells i "
    assert (validation.X[0] == ids[10_000:10_032]).all()


@pytest.mark.parametrize(
    ("start", "count"), [(0, 8), (7, None), (5, 3), (6, 2), (100, None), (0, 10**9)]
)
def test_windows_that_do_not_exist(start: int, count: int | None) -> None:
    with pytest.raises(ValueError) as caught:
        Windows(text_of(10), 3, 2, start=start, count=count)
    assert str(caught.value) == (
        f"start={start} and count={count} select windows that do not exist: "
        "10 tokens have 7 windows of T=3"
    )


def test_start_and_count_are_checked() -> None:
    with pytest.raises(ValueError, match="start is -1: expected at least 0"):
        Windows(text_of(10), 3, 2, start=-1)
    with pytest.raises(ValueError, match="count is 0: expected at least 1"):
        Windows(text_of(10), 3, 2, count=0)
    assert Windows(text_of(10), 3, 2, start=6).count == 1


# RandomPartition


@settings(deadline=None)
@given(length=lengths, T=small, n=small, data=st.data())
def test_random_partition_at_every_offset(length, T, n, data) -> None:
    partition = make(RandomPartition, length, T, n)
    offset = data.draw(st.integers(0, T - 1))
    batches = list(partition.epoch(Offset(offset, T - 1)))
    num_subsequences = (length - offset - 1) // T
    assert len(batches) == num_subsequences // n
    assert all(X.shape == (T, n) for X, _ in batches)
    tokens = np.concatenate([X.ravel() for X, _ in batches])
    covered = range(offset, offset + num_subsequences * T)
    assert len(set(tokens.tolist())) == tokens.size
    assert set(tokens.tolist()) <= set(covered)
    assert len(covered) - tokens.size == num_subsequences % n * T
    assert all(((X[0] - offset) % T == 0).all() for X, _ in batches)


@settings(deadline=None)
@given(T=small, n=small, num_batches=small, seed=seeds)
def test_random_partition_gives_every_token_once(T, n, num_batches, seed) -> None:
    length = T * (n * num_batches + 1)  # whatever the offset, n · num_batches subsequences fit
    epoch = RandomPartition(text_of(length), T, n).epoch(rng(seed))
    tokens = np.sort(np.concatenate([X.ravel() for X, _ in epoch]))
    assert tokens.tolist() == list(range(tokens[0], tokens[0] + T * n * num_batches))
    assert 0 <= tokens[0] < T


def test_random_partition_draws_every_offset_and_mixes_the_order() -> None:
    partition = RandomPartition(text_of(41), 4, 9)
    generator = rng()
    firsts = [partition.epoch(generator)[0][0][0] for _ in range(100)]
    assert {int(first[0]) % 4 for first in firsts} == {0, 1, 2, 3}
    assert not any((np.diff(first) == 4).all() for first in firsts)


def test_random_partition_batches_are_contiguous_in_time_major_order() -> None:
    for X in RandomPartition(text_of(50), 4, 8).epoch(rng())[0]:
        assert X.flags.c_contiguous and X.shape == (4, 8)


# SequentialPartition


@settings(deadline=None)
@given(length=lengths, T=small, n=small, data=st.data())
def test_sequential_partition_at_every_offset(length, T, n, data) -> None:
    partition = make(SequentialPartition, length, T, n)
    offset = data.draw(st.integers(0, T))
    batches = list(partition.epoch(Offset(offset, T)))
    L = (length - offset - 1) // n
    assert len(batches) == L // T
    streams = np.concatenate([X for X, _ in batches])
    expected = offset + L * np.arange(n) + np.arange(len(batches) * T)[:, None]
    np.testing.assert_array_equal(streams, expected)


@settings(deadline=None)
@given(T=small, n=small, num_batches=small)
def test_sequential_partition_gives_every_token_once(T, n, num_batches) -> None:
    length = T * n * num_batches + 1
    partition = SequentialPartition(text_of(length), T, n, random_offset=False)
    tokens = np.concatenate([X.ravel() for X, _ in partition.epoch(rng())])
    assert sorted(tokens.tolist()) == list(range(length - 1))


def test_sequential_partition_reads_on() -> None:
    epoch = SequentialPartition(text_of(26), 4, 2, random_offset=False).epoch(rng())
    assert [X.T.tolist() for X, _ in epoch] == [
        [[0, 1, 2, 3], [12, 13, 14, 15]],
        [[4, 5, 6, 7], [16, 17, 18, 19]],
        [[8, 9, 10, 11], [20, 21, 22, 23]],
    ]
    assert epoch[2][1].T.tolist() == [[9, 10, 11, 12], [21, 22, 23, 24]]


def test_sequential_batches_are_views_of_the_text() -> None:
    ids = text_of(50)
    for X, Y in SequentialPartition(ids, 4, 3).epoch(rng()):
        assert np.shares_memory(X, ids) and np.shares_memory(Y, ids)


def test_sequential_partition_draws_every_offset() -> None:
    partition = SequentialPartition(text_of(41), 4, 3)
    generator = rng()
    offsets = {int(partition.epoch(generator)[0][0][0, 0]) for _ in range(200)}
    assert offsets == {0, 1, 2, 3, 4}


def test_fixed_offset_draws_nothing() -> None:
    generator = rng()
    SequentialPartition(text_of(41), 4, 3, random_offset=False).epoch(generator)
    assert generator.bit_generator.state == rng().bit_generator.state


# Errors


@pytest.mark.parametrize(
    ("sampler", "needed", "message"),
    [
        (
            Windows,
            5,
            "ids has 4 tokens, but one window of T=4 and its target needs at least 5: "
            "lower T, or give a longer text",
        ),
        (
            RandomPartition,
            16,
            "ids has 15 tokens, but one batch of n=3 subsequences of T=4 at any offset needs at "
            "least 16: lower T or n, or give a longer text",
        ),
        (
            SequentialPartition,
            17,
            "ids has 16 tokens, but one batch of n=3 streams of T=4 at any offset needs at least "
            "17: lower T or n, or give a longer text",
        ),
        (
            lambda ids, T, n: SequentialPartition(ids, T, n, random_offset=False),
            13,
            "ids has 12 tokens, but one batch of n=3 streams of T=4 needs at least 13: "
            "lower T or n, or give a longer text",
        ),
    ],
)
def test_shortest_text(sampler, needed: int, message: str) -> None:
    assert sampler(text_of(needed), 4, 3).num_batches == 1
    with pytest.raises(ValueError) as caught:
        sampler(text_of(needed - 1), 4, 3)
    assert str(caught.value) == message


def test_shortest_text_gives_a_batch_at_the_worst_offset() -> None:
    assert len(RandomPartition(text_of(16), 4, 3).epoch(Offset(3, 3))) == 1
    assert len(SequentialPartition(text_of(17), 4, 3).epoch(Offset(4, 4))) == 1


@pytest.mark.parametrize("sampler", KINDS)
@pytest.mark.parametrize("name", ["T", "n"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "is 0: expected at least 1"),
        (-2, ValueError, "is -2: expected at least 1"),
        (2.0, TypeError, "is 2.0: expected an integer"),
        (True, TypeError, "is True: expected an integer"),
        (None, TypeError, "is None: expected an integer"),
    ],
)
def test_T_and_n_are_checked(sampler, name: str, value, error, message: str) -> None:
    with pytest.raises(error, match=f"^{name} {message}$"):
        sampler(text_of(50), **{"T": 4, "n": 3, name: value})


@pytest.mark.parametrize(
    "use",
    [*[lambda ids, kind=kind: kind(ids, 4, 3) for kind in KINDS], shifted, lambda i: split(i, 0.5)],
)
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (np.zeros((5, 10), int), ValueError, r"has shape \(5, 10\), 2 axes: .* 1 axes"),
        (np.array(3), ValueError, r"has shape \(\), 0 axes: .* 1 axes"),
        (np.zeros(50), TypeError, "has dtype float64: expected integer token ids"),
        (np.zeros(50, bool), TypeError, "has dtype bool: expected integer token ids"),
        (list("machine"), TypeError, "is a builtins.list: expected a numpy.ndarray"),
    ],
)
def test_ids_are_checked(use, ids, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^ids {message}$"):
        use(ids)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seed", [0, None, np.random.RandomState(0)])
def test_rng_is_checked(sampler, seed) -> None:
    with pytest.raises(TypeError, match=r"rng must be a numpy.random.Generator, got "):
        sampler(text_of(50), 4, 3).epoch(seed)
