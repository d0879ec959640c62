"""Timing in blocks that take turns, so that a change in the machine's speed hits every side."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gpurnn.bench.common import Figure
from gpurnn.bench.due import Due, LateError

__all__ = ["BLOCKS", "PAUSE", "Block", "Side", "in_turn", "per_second"]

BLOCKS = 5  # turns of each side
PAUSE = 0.3  # seconds before a block on the cpu, for the other side's threads to fall asleep


@dataclass(frozen=True)
class Block:
    """So many tokens or characters in so many seconds of wall-clock time."""

    items: int
    seconds: float


class Side(Protocol):
    """Something that works in blocks."""

    def block(self, seconds: float) -> Block:
        """Work for about so long, and wait for all of it.

        What is done before the clock starts is not counted: a part of the same work, in which
        whatever happens once happens.
        """


def in_turn(
    sides: Mapping[str, Side], ours: str, seconds: float, pause: float, due: Due
) -> tuple[dict[str, Figure], dict[str, str]]:
    """Time every side for about ``seconds``; return figures, and why the others have none.

    A side that fails is left out from there. Where the time runs out, the blocks that all have had
    must do.

    Raises:
        LateError: the time ran out before each side had a block.
        Exception: whatever our own side raises.
    """
    blocks: dict[str, list[Block]] = {name: [] for name in sides}
    failed: dict[str, str] = {}
    for turn in range(BLOCKS):
        try:
            due.check()
        except LateError:
            if turn == 0:
                raise
            break
        for name, side in sides.items():
            if name in failed:
                continue
            time.sleep(pause)
            try:
                blocks[name].append(side.block(seconds / BLOCKS))
            except Exception as e:  # whatever another library raises
                if name == ours:
                    raise
                failed[name] = told(e)
    return {name: per_second(b) for name, b in blocks.items() if name not in failed}, failed


def told(e: Exception) -> str:
    """Return an error in words; compilers say more than a record can hold."""
    return f"{type(e).__name__}: {e}"[:1000]


def per_second(blocks: list[Block]) -> dict[str, Any]:
    """Sum up: items per second, median and spread over the blocks."""
    rates = [block.items / block.seconds for block in blocks]
    low, median, high = (float(p) for p in np.percentile(rates, [25, 50, 75]))
    return {
        "median": median,
        "quartiles": [low, high],
        "least": min(rates),
        "most": max(rates),
        "blocks": len(rates),
        "items": sum(block.items for block in blocks),
        "seconds": sum(block.seconds for block in blocks),
    }
