"""The history of a run as a picture."""

import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpurnn.files import write_atomically

__all__ = ["plot_curves"]


def plot_curves(
    history: Sequence[dict[str, Any]], path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Draw training and validation perplexity by epoch, on a logarithmic axis, as a PNG.

    Readable in grey: the training curve is solid, the validation curve dashed with dots.

    Raises:
        ValueError: the history has no record.
        OSError: the file could not be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

    if not history:
        raise ValueError("history is empty: a curve needs at least one epoch")
    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    epochs = [record["epoch"] for record in history]
    axes.plot(epochs, _values(history, "train_perplexity"), "-", color="0.1", label="training")
    if "valid_perplexity" in history[0]:
        valid = _values(history, "valid_perplexity")
        marker = "." if len(epochs) <= 50 else ""
        axes.plot(epochs, valid, "--", marker=marker, color="0.45", label="validation")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    digits = (1, 2, 5) if high > 4 * low else tuple(np.arange(1, 10, 0.5))  # those with a label
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("perplexity per token")
    axes.set_title(title.encode(errors="replace").decode(), parse_math=False)
    axes.grid(True, which="both", color="0.9")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def _values(history: Sequence[dict[str, Any]], name: str) -> list[float]:
    """The curve called ``name``; None (infinite) leaves a gap."""
    return [math.nan if r[name] is None else r[name] for r in history]
