"""Where numbers lie in the small arrays that a training step keeps on the device.

A captured step is the same work each time; what differs from one to the next it finds in these.
Constants only, for kernels and for the host.
"""

from typing import NamedTuple

__all__ = ["Counts", "Rates", "Record", "Settings", "Updating"]


class Counts:
    """Of int64, what the steps count. A launch reads some and writes others, never the same."""

    BATCH = 0  # of the epoch, in this step
    STOPPED = 1  # whether an earlier step was refused: then this one changes nothing
    UPDATE = 2  # of the run, from 0
    NEXT_STOPPED = 3  # what the next step begins with
    NEXT_BATCH = 4
    FIRST_UPDATE = 5  # that of the epoch's first batch; the host sets these two, for each epoch
    SIZE = 6


class Rates:
    """Of float64, a row for each batch of an epoch."""

    LR = 0
    CORRECTION_1 = 1  # 1 − β₁ᵗ of adamw
    CORRECTION_2 = 2  # 1 − β₂ᵗ
    SIZE = 3


class Settings:
    """Of float64, what stays the same throughout a run."""

    MAX_NORM = 0  # that gradients are clipped to; infinite where they never are
    MOMENTUM = 1
    BETA_1 = 2
    BETA_2 = 3
    EPS = 4
    WEIGHT_DECAY = 5
    SIZE = 6


class Record:
    """Of float64, a row for each batch of an epoch: what the host wants to know of it."""

    LOSS = 0
    NORM = 1  # of all gradients together, before clipping
    STOPPED = 2  # 1 where the update was not made
    SIZE = 3


class Updating(NamedTuple):
    """What an update is compiled for: an optimizer's name."""

    optimizer: str

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 256
