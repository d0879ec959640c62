"""``gpurnn bench``: speed, after the result has been checked."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gpurnn.bench import command
from gpurnn.cli.bench_lm import run_lm
from gpurnn.cli.output import FAILED, MISTAKE, err, fail, mistakes, note, print_json, reason
from gpurnn.cli.probe import run_probes
from gpurnn.cli.soak import run_soak

__all__ = ["bench"]


def bench(
    what: Annotated[
        str,
        typer.Argument(help="What to time: rnn, the recurrence, or lm, the language model."),
    ] = "rnn",
    device: Annotated[
        str, typer.Option(help="Where to run: cuda, cpu, or auto (cuda if there is a GPU).")
    ] = "auto",
    seconds: Annotated[
        float | None, typer.Option(help="Seconds for each figure; unset: 2 on cpu, 0.15 on cuda.")
    ] = None,
    threads: Annotated[int, typer.Option(help="On cpu: threads, on both sides.")] = 2,
    limit: Annotated[
        float | None, typer.Option(help="On cuda: begin nothing new after so many seconds.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the result as JSON to this file; on cuda its plot beside it."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Measure nothing: draw the plot of this earlier result beside it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    grid: Annotated[
        str,
        typer.Option(
            help="On cuda: what to measure: default, group (W_hh over several blocks) or all."
        ),
    ] = "default",
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="On cuda: measure the GPU's latencies instead; --out is a table for GPURNN_TUNED.",
        ),
    ] = False,
    soak: Annotated[
        int | None,
        typer.Option(
            help="Run so many random shapes twice instead, on cuda or, small ones, on emulator."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the soak.")] = 0,
    kernel: Annotated[
        str | None, typer.Option(help="Of the soak, by name; unset: all of them.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Of lm on cpu: time torch.compile too, as on cuda.")
    ] = False,
) -> None:
    """Time rnn_forward + rnn_backward (tanh), on NumPy or a GPU, and whatever else is installed.

    On cpu against torch.nn.RNN; on cuda against it in ieee and tf32, a CuPy loop and JAX's scan.
    With lm, time training and generation by the language model against PyTorch programs: eager,
    as CUDA graphs, and with torch.compile.
    """
    with mistakes():
        others = {
            "plot": plot,
            "grid": None if grid == "default" else grid,
            "probe": probe or None,
            "soak": soak,
            "seed": seed or None,
            "kernel": kernel,
        }
        command.check_what(what, compiled=compiled, others=others)
    if what == "lm":
        run_lm(device, seconds, threads, limit, out, compiled=compiled, as_json=as_json)
        return
    if plot is not None:
        _draw(plot)
        return
    with mistakes():
        command.check_mode(
            probe=probe, soak=soak, seconds=seconds, out=out, grid=grid, kernel=kernel
        )
    if soak is not None:
        run_soak(device, soak, seed, kernel, limit)
        return
    if probe:
        run_probes(device, seconds, out, as_json=as_json)
        return
    with mistakes():
        asked = command.checked(device, seconds, threads, limit, out, note, grid)
    try:
        with err.status("measuring"):
            result = command.measure(asked, note)
    except ImportError as e:
        fail(f"{e} ({command.INSTALL})", FAILED)
    except ArithmeticError as e:
        fail(str(e), FAILED)
    except OSError as e:
        fail(reason(e), MISTAKE)
    if as_json:
        print_json(result)
    elif asked.device == "cuda":
        _print_gpu(result)
    else:
        _print_cpu(result)
    timed = any("times_us" in record for record in result["records"])
    if out is not None and asked.device == "cuda" and timed:
        _draw(out)
    if told := command.failures(result):
        fail(told, FAILED)


def _draw(path: Path) -> None:
    with mistakes():
        note(f"plot: {command.draw(path)}")


def _print_cpu(result: dict[str, Any]) -> None:
    table = Table(title="forward + backward, float32 (median)")
    for name in ("T", "n", "d", "h", "µs/step", "ms", "torch ms", "speed-up", "error"):
        table.add_column(name, justify="right")
    for r in result["records"]:
        peer = r.get("torch_forward_backward_ms")
        table.add_row(
            *(str(size) for size in r["shape"].values()),
            f"{r['forward_backward_us_per_step']:.1f}",
            f"{r['gpurnn_forward_backward_ms']['median']:.2f}",
            f"{peer['median']:.2f}" if peer else "–",
            f"{r['forward_backward_speedup']:.2f}" if peer else "–",
            f"{r['error']:.1e}",
        )
    Console().print(table)
    if "geometric_mean_speedup" in result:
        typer.echo(
            f"geometric mean {result['geometric_mean_speedup']:.2f}, "
            f"least {result['least_speedup']:.2f}"
        )


PASSES = ("forward", "forward_backward")
COLUMNS = {
    "recurrence_forward": "kernel",
    "recurrence_backward": "kernel, back",
    "forward": "forward",
    "forward_backward": "both",
}


def _print_gpu(result: dict[str, Any]) -> None:
    table = Table(title="µs per step (median); peers: how many times our time, forward / both")
    names = ("group", "T", "n", "d", "h", "dtype", "kernel", *COLUMNS.values(), "over floor")
    peers = sorted({peer for r in result["records"] for peer in r.get("ratios", ())})
    for name in (*names, *peers, "error"):
        table.add_column(name, justify="right")
    for r in result["records"]:
        if "us_per_step" not in r:
            continue
        table.add_row(
            r["group"],
            *(str(size) for size in r["shape"].values()),
            r["dtype"] if r.get("precision", "ieee") == "ieee" else r["precision"],
            r["kernel"],
            *(f"{r['us_per_step'][name]:.3f}" for name in COLUMNS),
            f"{r['over_floor']['recurrence_forward']:.1f}" if "over_floor" in r else "–",
            *(_ratio(r.get("ratios", {}).get(peer, {})) for peer in peers),
            f"{r['error']:.1e}",
        )
    Console(width=None if Console().is_terminal else 200).print(table)
    for name, found in result["overhead_us"].items():
        if name == "failed":
            continue  # told on stderr
        typer.echo(f"{name:<18} {found['median']:.1f} µs")
    _print_ratios(result["summary"]["ratios"])
    by_group = result["summary"]["ratios_by_group"]
    for group, ratios in by_group.items() if len(by_group) > 1 else ():
        _print_ratios(ratios, f"{group}: ")


def _print_ratios(ratios: dict[str, Any], of: str = "") -> None:
    for peer, passes in ratios.items():
        for what, found in passes.items():
            typer.echo(
                f"{of}{peer} {what}: geometric mean {found['geometric_mean']:.2f}, least "
                f"{found['least']:.2f}, {found['runs']} runs"
            )


def _ratio(found: dict[str, float]) -> str:
    return " / ".join(f"{found[w]:.1f}" if w in found else "–" for w in PASSES) if found else "–"
