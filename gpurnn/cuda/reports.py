"""Where blocks report that they waited for another block in vain.

The report lies in host memory that the GPU writes to directly: to look at it means to wait for
nothing. A block writes only when it gives up, so launches on all streams of a device share one.
"""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn.planning import MOST_BLOCKS

__all__ = ["PATIENCE", "Mapped", "check", "mapped"]

PATIENCE = 1 << 24
"""Polls of a thread, a third of a microsecond each or more, after which its block gives up."""


class Mapped:
    """The report of one device: ``words`` are as the host sees them, (MOST_BLOCKS,).

    ``used`` is how many of them launches so far may have written.
    """

    def __init__(self, memory: Any):
        self.memory = memory  # kept alive
        self.words: NDArray[np.uint32] = np.frombuffer(memory, np.uint32, MOST_BLOCKS)
        self.words[:] = 0
        self.used = 0

    def array(self, blocks: int) -> Any:
        """Return the words of the first ``blocks`` blocks, as ``Engine.launch`` takes an array.

        Raises:
            ValueError: there are more blocks than it has room for.
        """
        if blocks > MOST_BLOCKS:
            raise ValueError(f"a grid of {blocks:,} blocks: expected at most {MOST_BLOCKS:,}")
        self.used = max(self.used, blocks)
        return SimpleNamespace(
            shape=(blocks,), itemsize=4, data=SimpleNamespace(ptr=self.memory.ptr)
        )


_mapped: dict[int, Mapped] = {}
_ONE_AT_A_TIME = threading.Lock()


def mapped(cupy: Any, device: int) -> Mapped:
    """Return the report of a device, made when it is first asked for."""
    with _ONE_AT_A_TIME:
        if device not in _mapped:
            _mapped[device] = Mapped(cupy.cuda.alloc_pinned_memory(4 * MOST_BLOCKS))
        return _mapped[device]


def check(device: int) -> None:
    """Raise if a block of an earlier launch on the device reported, and forget what it said.

    Blocks that give up later, of the same launch or of a graph that is replayed, are found by the
    next look.

    Raises:
        RuntimeError: the message says which block, and which exchange of its launch.
    """
    report = _mapped.get(device)
    if report is None or not report.words[: report.used].any():
        return
    blocks = np.flatnonzero(report.words)
    first = int(blocks[0])
    step = int(report.words[first])
    report.words[:] = 0
    raise RuntimeError(
        f"a group kernel on CUDA device {device} gave up: block {first} waited in vain for the "
        f"others at exchange {step} of its sequence, and so did {len(blocks) - 1} more; what it "
        "computed after that is NaN (of a generation, −1). All blocks of a launch must run at "
        "once: another program on this GPU, or a debugger, may have kept some of them from it"
    )
