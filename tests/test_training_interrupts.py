"""Ctrl-C at any line of what takes out, counts and notes updates: nothing is lost or told twice."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from group_setup import SMALL_CARD
from training_setup import SHORTEST, prepared, state_of, trained

import gpurnn
from gpurnn.training import device, steps, trainer
from gpurnn.training.interrupts import held_interrupts

FILES = {module.__file__ for module in (device, steps, trainer)}
WATCHED = {
    *("_count", "_end_epoch", "_finish", "_tell", "_following", "_plan"),
    *("_step", "_set_out", "advance", "finish", "begin"),
    *("_steps_made", "_ended", "_read", "_queue_chunk", "_queue_end", "_queue_more"),
}


@contextmanager
def pressed(at: int) -> Iterator[list[int]]:
    """Press Ctrl-C once, at a line of those watched; the list counts the lines."""
    lines = [0]

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            lines[0] += 1
            if lines[0] == at:
                signal.raise_signal(signal.SIGINT)
        return local

    def called(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        watched = code.co_filename in FILES and code.co_name in WATCHED
        if code.co_name == "_step" and code.co_filename == device.__file__:
            watched = False  # on a GPU a step that counts is the launch of a graph
        return local if watched else None

    before = sys.gettrace()
    sys.settrace(called)
    try:
        yield lines
    finally:
        sys.settrace(before)


def go_on_from(at: int, whole: Any) -> bool:
    """Train, interrupted at a line, then to the end; return whether it was interrupted at all."""
    run, interrupted = prepared(SHORTEST), False
    with pressed(at) as lines:
        try:
            run.trainer.run()
        except KeyboardInterrupt:
            interrupted = True
    while not run.trainer.finished:
        run.trainer.run()
    assert state_of(run) == whole, f"line {at}"
    return interrupted or lines[0] >= at


def test_at_any_line_on_numpy() -> None:
    whole, at = state_of(trained(SHORTEST)), 1
    while go_on_from(at, whole):
        at += 1
    assert at > 100


@pytest.mark.slow
def test_at_many_a_line_on_a_device() -> None:
    with gpurnn.emulated(SMALL_CARD, check_races=False):
        whole, at = state_of(trained(SHORTEST)), 1
        while go_on_from(at, whole):
            at += 13
    assert at > 200


def test_what_is_held_comes_at_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        done.append(2)
    assert done == [1]
    before = signal.getsignal(signal.SIGINT)
    with held_interrupts():
        pass
    assert signal.getsignal(signal.SIGINT) is before
