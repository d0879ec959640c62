"""Pictures of the GPU benchmark: time of a step against h, one panel for each n, peers beside."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from gpurnn.files import write_atomically

__all__ = ["plot"]

# Readable in grey: line, marker and shade each tell them apart.
STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpurnn": ("gpurnn", {"color": "0.0", "linestyle": "-", "marker": "o", "linewidth": 2}),
    "torch_ieee": ("PyTorch, ieee", {"color": "0.35", "linestyle": "--", "marker": "s"}),
    "torch_tf32": ("PyTorch, tf32", {"color": "0.5", "linestyle": "-.", "marker": "^"}),
    "jax_scan": ("JAX scan", {"color": "0.6", "linestyle": ":", "marker": "D"}),
    "cupy_loop": ("CuPy loop", {"color": "0.7", "linestyle": ":", "marker": "x"}),
    "floor": ("floor without tensor cores", {"color": "0.8", "linestyle": "-", "linewidth": 3}),
}
PASSES = {"forward": "forward", "forward_backward": "forward + backward"}


def plot(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the records of the group "grid" of a result of ``gpurnn bench --device cuda``, as a PNG.

    Where it has none, those of the group "group" (``--grid group``), float32 as IEEE has it. Rows
    of panels: forward, and forward + backward; columns: n. Both axes are logarithmic.

    Raises:
        ValueError: the result has no such record.
        OSError: the file could not be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    timed = [r for r in result.get("records", ()) if "times_us" in r]
    grids = ([r for r in timed if r.get("group") == name] for name in ("grid", "group"))
    records = next(filter(None, grids), None)
    if records is None:
        raise ValueError(
            "the result has no timed record of the group 'grid' or 'group': expected one of "
            "gpurnn bench --device cuda"
        )
    rows = sorted({r["shape"]["n"] for r in records})
    units = sorted({r["shape"]["h"] for r in records})
    size = (1.0 + 3.0 * len(rows), 6.2)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(rows), sharex=True, sharey="row", squeeze=False)
    for line, (what, name) in zip(panels, PASSES.items(), strict=True):
        for axes, n in zip(line, rows, strict=True):
            for label, style, points in _lines([r for r in records if r["shape"]["n"] == n], what):
                axes.plot(*zip(*points, strict=True), label=label, markersize=5, **style)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(units, [str(h) for h in units])
            axes.tick_params(axis="x", rotation=60)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.set_title(f"{name}, n = {n}", fontsize=10)
            axes.grid(True, which="both", color="0.92")
            if line is panels[-1]:
                axes.set_xlabel("hidden units h")
        line[0].set_ylabel("time of a step (µs)")
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(_title(result), fontsize=10, parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def _lines(
    records: Sequence[Mapping[str, Any]], what: str
) -> list[tuple[str, dict[str, Any], list[tuple[int, float]]]]:
    """Return label, style and points (h, µs per step) of each curve that has any."""
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in STYLES}
    for record in sorted(records, key=lambda r: int(r["shape"]["h"])):
        h, T = record["shape"]["h"], record["shape"]["T"]
        curves["gpurnn"].append((h, record["times_us"][what]["median"] / T))
        if what == "forward":
            curves["floor"].append((h, record["floor"]["us_per_step"]))
        for peer, figures in record.get("peers", {}).items():
            if what in figures and peer in curves:
                curves[peer].append((h, figures[what]["median"] / T))
    return [(*STYLES[name], points) for name, points in curves.items() if points]


def _title(result: Mapping[str, Any]) -> str:
    environment = result.get("environment", {})
    gpu = (environment.get("gpu") or {}).get("name", "unknown GPU")
    found = environment.get("versions", {})
    told = [f"{name} {found[name]}" for name in ("gpurnn", "torch", "jax") if name in found]
    return f"{gpu}, float32, tanh; " + ", ".join(told)
