"""What the GPU benchmark measures: which shapes, in which dtype, by which kernel."""

from dataclasses import dataclass
from typing import Any

from gpurnn.bench.common import Shape
from gpurnn.planning import Group

__all__ = ["GPU_RUNS", "GRIDS", "GROUP_RUNS", "Run"]

MOST_ELEMENTS = 1 << 26  # of a (T, n, h) array
MOST_STEPS = 1024


@dataclass(frozen=True)
class Run:
    """One thing to measure.

    ``kernel`` None leaves the choice to the plan. ``ids``: X holds token ids, peers get the one-hot
    matrix ready-made, and its gradient is asked of nobody. ``jax``: compile and time JAX's scan
    too, which takes seconds. ``precision`` is that of our recurrence; PyTorch is timed in both.
    """

    group: str
    shape: Shape
    dtype: str = "float32"
    kernel: str | Group | None = None
    ids: bool = False
    peers: bool = True
    jax: bool = False
    precision: str = "ieee"

    def about(self) -> dict[str, Any]:
        """Return what names this run in a record."""
        return {
            "group": self.group,
            "shape": vars(self.shape),
            "dtype": self.dtype,
            "precision": self.precision,
            "kernel_asked": None if self.kernel is None else str(self.kernel),
            "ids": self.ids,
        }


def _steps(n: int, h: int) -> int:
    return max(16, min(MOST_STEPS, MOST_ELEMENTS // (n * h)))


def _grid() -> list[Run]:
    found = []
    for n in (32, 1, 128, 512):
        for h in (32, 64, 128, 192, 224, 256):
            jax = n == 32 and h in (64, 128, 256)
            found.append(Run("grid", Shape(_steps(n, h), n, 32, h), jax=jax))
    return found


def _wide() -> list[Run]:
    shapes = [Shape(256, n, 64, h) for h in (512, 1024) for n in (8, 32, 128)]
    return [Run("wide", shape, kernel="step") for shape in shapes]


def _dtypes() -> list[Run]:
    """d is a multiple of 128 and n of 8, which PyTorch's fast kernels for half types want."""
    shapes = [Shape(512, 32, 128, h) for h in (64, 128, 256)]
    names = ("float16", "bfloat16", "float64")
    return [Run("dtypes", shape, dtype=dtype) for shape in shapes for dtype in names]


def _forms() -> list[Run]:
    """The input's product apart from the recurrence, and within each step (concatenated)."""
    shapes = [Shape(256, n, h, h) for n, h in ((32, 128), (32, 512), (128, 1024))]
    kernels = ("step", "concatenated")
    return [Run("forms", shape, kernel=k, peers=False) for shape in shapes for k in kernels]


GPU_RUNS: tuple[Run, ...] = (
    Run("book", Shape(32, 1024, 28, 32), ids=True, jax=True),
    *_grid(),
    *_wide(),
    *_dtypes(),
    *_forms(),
)
"""In the order in which they are measured: where time is short, the last ones are left out."""


def _group_grid() -> list[Run]:
    """Widths that one block cannot hold, and the widest that it can, for all three arithmetics.

    d is a multiple of 128 and n of 8 where it is not 1, which PyTorch's fast kernels want.
    """
    found = []
    for n in (1, 8, 32, 128):
        for h in (128, 256, 512, 1024, 2048):
            shape = Shape(max(16, _steps(n, h) // 2), n, 128, h)
            found.append(Run("group", shape))
            found.append(Run("group-tf32", shape, precision="tf32"))
            found.append(Run("group-half", shape, dtype="bfloat16" if n == 8 else "float16"))
    return found


GROUP_RUNS: tuple[Run, ...] = (
    # The whole of The Time Machine without truncation: PyTorch would take half a minute to time.
    Run("whole-book", Shape(200_000, 1, 28, 512), kernel="group", ids=True, peers=False),
    *_group_grid(),
)
"""h = 128 … 2048, n = 1 … 128, and a whole book in one sequence."""

GRIDS = {"default": GPU_RUNS, "group": GROUP_RUNS, "all": (*GPU_RUNS, *GROUP_RUNS)}
"""What ``gpurnn bench --grid`` may name."""
