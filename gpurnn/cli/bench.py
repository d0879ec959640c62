"""``gpurnn bench``: speed, after the result has been checked."""

import json
import math
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


def bench(
    device: Annotated[str, typer.Option(help="Where to run: cpu.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="Seconds for each figure.")] = 2.0,
    threads: Annotated[int, typer.Option(help="Threads, on both sides.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Time rnn_forward + rnn_backward against torch.nn.RNN (float32, tanh), if it is installed."""
    with mistakes():
        if device != "cpu":
            raise ValueError(f"device is {device!r}: this version has kernels for cpu only")
        validate.positive("threads", threads)
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"out is {out}: {out.parent} is not a folder")
        validate.number("seconds", seconds, "a finite number above 0", lambda x: 0 < x < math.inf)
    records: list[dict[str, Any]] = []
    try:
        where = benchmark.environment(threads)
        if where["versions"]["torch"] == "not installed":
            note(f"torch is not installed: no comparison ({INSTALL})")
        with err.status("measuring"):
            for record in benchmark.measure_cpu(seconds=seconds, threads=threads):
                records.append(record)
                err.print(f"done: {record['shape']}", markup=False)
    except ImportError as e:
        fail(f"{e} ({INSTALL})", FAILED)
    except ArithmeticError as e:
        fail(str(e), FAILED)
    result = {"environment": where, "records": records, **benchmark.summary(records)}
    if as_json:
        print_json(result)
    else:
        _print(result)
    if out is not None:
        with mistakes():
            write_atomically(out, (json.dumps(result, indent=2) + "\n").encode())


def _print(result: dict[str, Any]) -> None:
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
