"""How the pictures of the notebooks look: small, labelled with units, readable in grey.

``figure`` makes one, ``show`` ends it. Lines differ in dashes and markers as well as in grey.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes

from gpurnn.doctor.device import why_no_gpu

__all__ = ["BACKEND_NOTE", "DEVICE", "GREYS", "figure", "grid_of", "heat"]

GREYS = ("0.05", "0.35", "0.55", "0.7")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("", "o", "s", "^")

LOOK: dict[str, Any] = {
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=GREYS) + cycler(linestyle=DASHES) + cycler(marker=MARKERS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 90,
    "font.size": 9.5,
    "grid.color": "0.9",
    "image.cmap": "Greys",
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}

DEVICE = "cpu" if why_no_gpu() else "cuda"
"""Where models are trained: on a GPU if there is one."""

BACKEND_NOTE = {
    "cpu": "on NumPy, without a GPU; gpurnn doctor says what is missing",
    "cuda": "on the GPU, by kernels",
}[DEVICE]


@contextmanager
def figure(
    x: str, y: str, title: str = "", *, width: float = 5.6, height: float = 3.2
) -> Iterator[Axes]:
    """Give the axes of a new figure, and show it: ``x`` and ``y`` label them, with their units."""
    with plt.rc_context(LOOK):
        _, axes = plt.subplots(figsize=(width, height))
        yield axes
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(title)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend()
        plt.show()


@contextmanager
def grid_of(
    rows: int, columns: int, *, width: float = 7.2, height: float = 3.0, **options: Any
) -> Iterator[Any]:
    """Give an array of axes (rows, columns) of one figure, and show it; label them yourself."""
    with plt.rc_context(LOOK):
        _, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)
        yield axes
        plt.show()


def heat(axes: Axes, values: Any, unit: str, **options: Any) -> None:
    """Draw a matrix, dark for large, with a scale that is labelled with its unit."""
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **options)
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, label=unit, shrink=0.9)
