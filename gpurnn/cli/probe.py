"""``gpurnn bench --probe``: what a GPU's exchanges take."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from gpurnn.bench import command
from gpurnn.bench.probe import Probed
from gpurnn.cli.output import FAILED, err, fail, mistakes, note, print_json

__all__ = ["run_probes"]

MEANINGS = {
    "launch": "a launch, queued back to back",
    "l2": "a load from L2 that needs the one before",
    "remote_shared": "the same, another block's shared memory",
    "flag": "a flagged word from block to block",
    "counter": "a barrier of {} blocks by a counter",
    "cluster": "a barrier of a cluster of {}",
    "cluster_stores": "the same, each thread having stored to global memory",
}


def run_probes(device: str, seconds: float | None, out: Path | None, *, as_json: bool) -> None:
    """Measure, print, and write the table ``out``."""
    with mistakes():
        asked = command.checked_probe(device, seconds, out, note)
    try:
        with err.status("probing"):
            found = command.measure_probes(asked, note)
    except ImportError as e:
        fail(f"{e} ({command.INSTALL})", FAILED)
    except RuntimeError as e:
        fail(str(e), FAILED)
    if as_json:
        print_json(found.as_json())
    else:
        _print(found)
    if asked.out is not None:
        with mistakes():
            command.write_probes(found, asked.out)
        note(f"table: {asked.out}; GPURNN_TUNED={asked.out} makes plan() use it")


def _print(found: Probed) -> None:
    table = Table(title=f"{found.name}, {found.clock_ghz:.3g} GHz: nanoseconds")
    table.add_column("latency")
    table.add_column("what")
    for name in ("median", "from", "to"):
        table.add_column(name, justify="right")
    for name, figure in found.figures.items():
        kind, _, at = name.rpartition("_")
        meaning = MEANINGS.get(name) or MEANINGS[kind].format(at)
        if "ns" not in figure:
            table.add_row(name, meaning, "–", "–", "–")
            continue
        table.add_row(name, meaning, *(f"{ns:.0f}" for ns in (figure["ns"], *figure["quartiles"])))
    Console().print(table)
