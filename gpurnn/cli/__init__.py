"""The command line: results on stdout, progress and messages on stderr.

Exit codes: 0 done; 1 the run failed (diverged, disk or memory full, output closed); 2 a mistake in
the command or its input; 128 + N stopped by signal N (130 after Ctrl-C), training with everything
saved unless a second one came at once.
"""

import sys

import typer

from gpurnn import __version__
from gpurnn.cli.bench import bench
from gpurnn.cli.doctor import doctor
from gpurnn.cli.evaluate import evaluate
from gpurnn.cli.generate import generate
from gpurnn.cli.output import FAILED
from gpurnn.cli.train import train

__all__ = ["app", "main"]

app = typer.Typer(
    name="gpurnn",
    help="Recurrent networks, and a character-level language model: train, evaluate, sample.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command(name="eval")(evaluate)
app.command()(generate)
app.command()(bench)
app.command()(doctor)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"gpurnn {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line; the console script ``gpurnn``."""
    try:
        app(prog_name="gpurnn")
    except OSError as e:  # commands deal with their own files: this is stdout, on a full disk say
        sys.stderr.write(f"error: could not write the result: {e.strerror}\n")
        raise SystemExit(FAILED) from None
