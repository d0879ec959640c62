"""Work that is done again: rehearsed, captured, launched."""

from collections.abc import Iterator
from typing import Any

import fake_cupy
import numpy as np
import pytest
from fake_cupy import FakeCuPy

from gpurnn import planning
from gpurnn.cuda.engines import EmulatedEngine, GPUEngine
from gpurnn.cuda.recording import recorder

H100 = planning.limits("device", "H100")


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuPy]:
    yield fake_cupy.install(monkeypatch)
    fake_cupy.clear()


def counting(xp: Any, total: Any, calls: list[Any]) -> Any:
    def run() -> None:
        calls.append(total)
        one = xp.zeros(3, np.float32)  # allocated anew each time
        one += np.float32(1)
        total.__iadd__(one)

    return run


def nothing() -> None:
    pass


def test_rehearsed_then_captured_then_launched(cupy: FakeCuPy) -> None:
    engine = GPUEngine(2)
    with engine.here():
        total = cupy.zeros(3, np.float32)
        other = cupy.zeros(3, np.float32)
        unseen = cupy.zeros(3, np.float32)
    calls: list[Any] = []
    record = recorder(engine)
    rehearse = counting(cupy, unseen, calls)
    for done in range(5):
        record.again("a", counting(cupy, total, calls), rehearse)
        assert len(cupy.replays) == done + 1
    for _ in range(3):
        record.again("b", counting(cupy, other, calls), rehearse)
    names = {id(total): "total", id(other): "other", id(unseen): "unseen"}
    assert [names[id(a)] for a in calls] == ["unseen", "total", "unseen", "other"]  # and no more
    with engine.here():
        assert total.get().tolist() == [5, 5, 5]
        assert other.get().tolist() == [3, 3, 3]
    assert cupy.current.id == 0


def test_what_is_read_is_what_was_queued_before(cupy: FakeCuPy) -> None:
    engine = GPUEngine(0)
    total = cupy.zeros((2, 3), np.float64)
    record = recorder(engine)

    def run() -> None:
        total.__iadd__(np.float64(1))

    record.again("a", run, nothing)
    read = record.read(total[1:])
    found = read()
    assert found.shape == (1, 3)
    assert found.tolist() == [[1, 1, 1]]
    event = cupy.order[-1][2]
    assert cupy.order[-2:] == [("record", cupy.order[-2][1], event), ("synchronize", 0, event)]
    record.settle()


def test_a_capture_that_fails_is_ended_and_tried_again(cupy: FakeCuPy) -> None:
    record = recorder(GPUEngine(0))
    fails: list[bool] = [True, False]

    def run() -> None:
        if fails.pop(0):
            raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        record.again("a", run, nothing)
    assert cupy.stream.captured is None
    assert not cupy.replays
    record.again("a", run, nothing)
    assert fails == []
    assert len(cupy.replays) == 1


@pytest.mark.parametrize("refused", [1, 2])
def test_memory_that_is_short_costs_what_others_do_not_use(cupy: FakeCuPy, refused: int) -> None:
    """The pool itself frees nothing: what it does not use at the moment is in its graphs."""
    engine = GPUEngine(0)
    total, calls = cupy.zeros(3, np.float32), []
    record = recorder(engine)
    cupy.allocations_refused = refused
    run = counting(cupy, total, calls)
    if refused == 1:
        record.again("a", run, run)
    else:
        with pytest.raises(MemoryError, match=r"a graph needs \d+ bytes more"):
            record.again("a", run, run)
    assert cupy.freed == 1


def test_what_is_queued_once_comes_after_the_current_stream(cupy: FakeCuPy) -> None:
    engine = GPUEngine(1)
    record = recorder(engine)
    current, inside = cupy.stream, []
    first = record.mark()
    record.once(lambda: inside.append(cupy.stream))
    second = record.mark()
    assert inside[0] is not current and inside[0].non_blocking
    (_, _, mark), (what, where, before), (then, there, waited), _ = cupy.order[-4:]
    assert mark is first
    assert (what, where) == ("record", current.ptr)
    assert (then, there) == ("wait", inside[0].ptr)
    assert waited is before
    record.wait(second)
    assert cupy.order[-1] == ("synchronize", 0, second)
    assert record.between(first, second) > 0


def test_what_is_recorded_runs_as_if_it_were_captured(cupy: FakeCuPy) -> None:
    engine = GPUEngine(0)
    seen: list[bool] = []
    record = recorder(engine)
    record.again("a", *[lambda: seen.append(engine.capturing())] * 2)
    assert seen == [True, True]
    assert not engine.capturing()


def test_the_emulator_does_all_at_once() -> None:
    record = recorder(EmulatedEngine(H100, None, check_races=True))
    total = np.zeros(2)

    def run() -> None:
        total.__iadd__(1)

    for _ in range(2):
        record.again("a", run, nothing)
    record.once(run)
    read = record.read(total)
    record.again("a", run, nothing)
    assert read().tolist() == [3, 3]
    record.settle()
