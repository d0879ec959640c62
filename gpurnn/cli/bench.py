"""``gpurnn bench``: speed, after the result has been checked."""

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gpurnn import bench as benchmark
from gpurnn import validate
from gpurnn.cli.output import FAILED, err, fail, mistakes, note, print_json
from gpurnn.files import write_atomically

__all__ = ["bench"]

INSTALL = "in the source folder: pip install -e '.[bench]'"
DEVICES = ("auto", "cpu", "cuda")
SECONDS = {"cpu": 2.0, "cuda": 0.15}


def bench(
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
) -> None:
    """Time rnn_forward + rnn_backward (tanh), on NumPy or a GPU, and whatever else is installed.

    On cpu against torch.nn.RNN; on cuda against it in ieee and tf32, a CuPy loop and JAX's scan.
    """
    if plot is not None:
        _draw(plot)
        return
    with mistakes():
        where = _device(device)
        validate.positive("threads", threads)
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"out is {out}: {out.parent} is not a folder")
        for name, given in (("seconds", seconds), ("limit", limit)):
            if given is not None:
                validate.number(name, given, "a finite number above 0", lambda x: 0 < x < math.inf)
    spend = SECONDS[where] if seconds is None else seconds
    try:
        result = _on_gpu(spend, limit) if where == "cuda" else _on_cpu(spend, threads)
    except ImportError as e:
        fail(f"{e} ({INSTALL})", FAILED)
    except ArithmeticError as e:
        fail(str(e), FAILED)
    if as_json:
        print_json(result)
    elif where == "cuda":
        _print_gpu(result)
    else:
        _print_cpu(result)
    if out is not None:
        with mistakes():
            write_atomically(out, (json.dumps(result, indent=2) + "\n").encode())
        if where == "cuda" and any("times_us" in record for record in result["records"]):
            _draw(out)
    if failed := result.get("summary", {}).get("failed"):
        fail(f"{failed} of {len(result['records'])} runs failed: see above", FAILED)


def _device(asked: str) -> str:
    from gpurnn.doctor.device import why_no_gpu

    if asked not in DEVICES:
        raise ValueError(f"device is {asked!r}: expected one of {', '.join(DEVICES)}")
    if asked == "cpu":
        return asked
    missing = why_no_gpu()
    if missing is None:
        return "cuda"
    if asked == "cuda":
        raise ValueError(f"device is 'cuda' but there is no GPU to use: {missing}")
    note(f"no GPU to use ({missing}): measuring on cpu")
    return "cpu"


def _on_cpu(seconds: float, threads: int) -> dict[str, Any]:
    records: list[dict[str, Any]] = []
    where = benchmark.environment(threads)
    if where["versions"]["torch"] == "not installed":
        note(f"torch is not installed: no comparison ({INSTALL})")
    with err.status("measuring"):
        for record in benchmark.measure_cpu(seconds=seconds, threads=threads):
            records.append(record)
            err.print(f"done: {record['shape']}", markup=False)
    return {"environment": where, "records": records, **benchmark.summary(records)}


def _on_gpu(seconds: float, limit: float | None) -> dict[str, Any]:
    where = benchmark.gpu_environment()
    records: list[dict[str, Any]] = []
    begun = time.monotonic()
    with err.status("compiling"):
        for failure in benchmark.compile_runs(benchmark.GPU_RUNS):
            note(f"could not be compiled: {failure}")
    if limit is not None:
        limit = max(1.0, limit - (time.monotonic() - begun))
    with err.status("measuring"):
        overhead = benchmark.measure_overhead(seconds=seconds)
        for record in benchmark.measure_gpu(seconds=seconds, limit=limit):
            records.append(record)
            told = f"{record['group']} {record['shape']} {record['dtype']}"
            if "left_out" in record:
                note(f"left out: {told}: {record['left_out']}")
                continue
            if "failed" in record:
                note(f"FAILED: {told}: {record['failed']}")
                continue
            note(f"done: {told}, {record['us_per_step']['forward']:.3f} µs a step forward")
            for peer, found in record.get("peers", {}).items():
                if "failed" in found:
                    note(f"  {peer} failed: {found['failed']}")
    return {
        "environment": where,
        "overhead_us": overhead,
        "records": records,
        "summary": benchmark.gpu_summary(records),
    }


def _draw(path: Path) -> None:
    picture = path.with_suffix(".png")
    with mistakes():
        try:
            result = json.loads(path.read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as e:
            raise ValueError(f"{path} is not JSON: {e}") from e
        benchmark.plot(result, picture)
    note(f"plot: {picture}")


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
            r["dtype"],
            r["kernel"],
            *(f"{r['us_per_step'][name]:.3f}" for name in COLUMNS),
            f"{r['over_floor']['recurrence_forward']:.1f}",
            *(_ratio(r.get("ratios", {}).get(peer, {})) for peer in peers),
            f"{r['error']:.1e}",
        )
    Console(width=None if Console().is_terminal else 200).print(table)
    for name, found in result["overhead_us"].items():
        typer.echo(f"{name:<18} {found['median']:.1f} µs")
    for peer, passes in result["summary"]["ratios"].items():
        for what, found in passes.items():
            typer.echo(
                f"{peer} {what}: geometric mean {found['geometric_mean']:.2f}, least "
                f"{found['least']:.2f}, {found['runs']} runs"
            )


def _ratio(found: dict[str, float]) -> str:
    return " / ".join(f"{found[w]:.1f}" if w in found else "–" for w in PASSES) if found else "–"
