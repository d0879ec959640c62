"""Runs Numba CUDA kernels on the CPU and finds what is wrong with them.

``launch`` runs a kernel; the errors say what it may find. See docs/emulator.md.
"""

from gpurnn.emulator.arguments import uninitialized
from gpurnn.emulator.errors import (
    BarrierError,
    BoundsError,
    DeadlockError,
    EmulationError,
    Place,
    RaceError,
    ReadOnlyError,
    UninitializedError,
    UnsupportedError,
)
from gpurnn.emulator.launching import launch
from gpurnn.emulator.report import Report
from gpurnn.emulator.traffic import LineTraffic

__all__ = [
    "BarrierError",
    "BoundsError",
    "DeadlockError",
    "EmulationError",
    "LineTraffic",
    "Place",
    "RaceError",
    "ReadOnlyError",
    "Report",
    "UninitializedError",
    "UnsupportedError",
    "launch",
    "uninitialized",
]
