"""What every benchmark has in common: shapes, the numbers drawn for them, errors, figures."""

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gpurnn
from gpurnn.compiler import installed

__all__ = [
    "ERROR_LIMITS",
    "Figure",
    "Problem",
    "Shape",
    "commit",
    "date",
    "figure",
    "machine",
    "processor",
    "relative_error",
    "versions",
]

Floats = NDArray[Any]
Figure = dict[str, Any]

ERROR_LIMITS = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest ‖result − float64 reference‖ / ‖float64 reference‖ of a result that is worth timing."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one benchmark, T steps, n rows, d inputs, h units."""

    T: int
    n: int
    d: int
    h: int


class Problem:
    """One shape's arrays, float32, drawn from a fixed seed; ``ids`` stand for one-hot rows."""

    def __init__(self, shape: Shape) -> None:
        rng = np.random.default_rng(0)
        T, n, d, h = shape.T, shape.n, shape.d, shape.h

        def draw(*size: int, scale: float = 1.0) -> Floats:
            return (scale * rng.standard_normal(size)).astype(np.float32)

        self.X, self.h_0, self.dH = draw(T, n, d), draw(n, h), draw(T, n, h)
        self.W_xh, self.W_hh = draw(d, h, scale=d**-0.5), draw(h, h, scale=h**-0.5)
        self.b_h = draw(h)
        self.ids = rng.integers(0, d, (T, n))

    def arguments(self, dtype: Any) -> tuple[Floats, ...]:
        """Return X, h_0, W_xh, W_hh, b_h as ``rnn_forward`` takes them, in a dtype."""
        return tuple(a.astype(dtype) for a in (self.X, self.h_0, self.W_xh, self.W_hh, self.b_h))


def relative_error(found: Sequence[Any], exact: Sequence[Any], what: object, limit: float) -> float:
    """Return the largest ‖found − exact‖ / ‖exact‖ of pairs of arrays.

    Raises:
        ArithmeticError: it is above ``limit``, or NaN.
    """
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, exact, strict=True)]
    worst = float(np.max(errors))  # unlike max(), it passes a NaN on
    if not worst <= limit:
        raise ArithmeticError(f"{what}: relative error {worst:.2e}, not timed")
    return worst


def figure(microseconds: Sequence[float], passes: int) -> Figure:
    """Sum up samples, each the mean of some passes: median and quartiles, and passes in all."""
    low, median, high = (float(p) for p in np.percentile(microseconds, [25, 50, 75]))
    return {"median": median, "quartiles": [low, high], "passes": passes}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of distributions by name; gpurnn's own also where it is a checkout."""
    found = {package: installed(package) or "not installed" for package in packages}
    if "gpurnn" in found and installed("gpurnn") is None:
        found["gpurnn"] = gpurnn.__version__
    return found


def machine() -> Mapping[str, str]:
    """Return processor, system and Python."""
    return {
        "processor": processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def date() -> str:
    """Return the time of day in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str | None:
    """Return the commit of the source tree this runs from, or None outside one."""
    here = Path(__file__).resolve()
    commands = (
        ["git", "ls-files", "--error-unmatch", here.name],  # not just any tree around it
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
    )
    found = ""
    for command in commands:
        try:
            done = subprocess.run(
                command, cwd=here.parent, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        found = done.stdout.strip()
    return found
