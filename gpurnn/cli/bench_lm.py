"""``gpurnn bench lm``: the language model's speed, training and generating."""

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from gpurnn.bench import command as shared
from gpurnn.bench.lm import command
from gpurnn.cli.output import FAILED, MISTAKE, err, fail, mistakes, note, print_json, reason

__all__ = ["run_lm"]


def run_lm(
    device: str,
    seconds: float | None,
    threads: int,
    limit: float | None,
    out: Path | None,
    *,
    compiled: bool,
    as_json: bool,
) -> None:
    """Measure, print, and write the result."""
    with mistakes():
        asked = command.checked_lm(device, seconds, threads, limit, out, note, compiled=compiled)
    try:
        with err.status("measuring"):
            result = command.measure(asked, note)
    except ImportError as e:
        fail(f"{e} ({shared.INSTALL})", FAILED)
    except OSError as e:
        fail(reason(e), MISTAKE)
    if as_json:
        print_json(result)
    else:
        _print(result)
    if told := shared.failures(result):
        fail(told, FAILED)


def _print(result: dict[str, Any]) -> None:
    table = Table(title="tokens or characters a second; peers: ours over theirs")
    for name in ("what", "T", "n", "h", "a second", "spread"):
        table.add_column(name, justify="right")
    peers = list(dict.fromkeys(p for r in result["records"] for p in r.get("peers", ())))
    for peer in peers:
        table.add_column(peer, justify="right")
    for r in result["records"]:
        if "per_second" not in r:
            continue
        figure = r["per_second"]
        ratios = (r["ratios"].get(peer, {}).get(r["group"]) for peer in peers)
        table.add_row(
            r["group"],
            *(str(r["shape"].get(size, "–")) for size in ("T", "n", "h")),
            f"{figure['median']:,.0f}",
            f"{figure['least']:,.0f} – {figure['most']:,.0f}",
            *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        )
    Console(width=None if Console().is_terminal else 200).print(table)
    for peer, groups in result["summary"]["ratios"].items():
        for group, found in groups.items():
            typer.echo(
                f"{peer} {group}: geometric mean {found['geometric_mean']:.2f}, least "
                f"{found['least']:.2f}, {found['runs']} runs"
            )
