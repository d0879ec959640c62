"""``gpurnn bench --soak``: random shapes, again and again."""

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpurnn.bench import command
from gpurnn.bench.soak import Outcome, SoakError
from gpurnn.cli.output import FAILED, err, fail, mistakes, note

__all__ = ["run_soak"]


def run_soak(device: str, count: int, seed: int, kernel: str | None, limit: float | None) -> None:
    """Run a soak, with a bar on stderr; print what it came to, or the first failure."""
    with mistakes():
        asked = command.checked_soak(device, count, seed, kernel, limit, note)
    columns = (TextColumn("soak"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=err, transient=True) as bar:
            task = bar.add_task("soak", total=asked.count)

            def progress(_: Outcome) -> None:
                bar.advance(task)

            found = command.soak(asked, note, progress)
    except SoakError as e:
        fail(str(e), FAILED)
    except ImportError as e:
        fail(f"{e} ({command.INSTALL})", FAILED)
    typer.echo(f"soak: {found}")
