"""``gpurnn doctor``: what is installed, which GPU there is, whether the kernels are right."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from gpurnn import doctor as examination
from gpurnn.cli.output import FAILED, err, print_json

__all__ = ["doctor"]

MARKS = {"ok": "[green]ok     [/]", "warning": "[yellow]warning[/]"}
MARKS |= {"missing": "[blue]missing[/]", "failed": "[bold red]failed [/]"}


def doctor(
    skip_checks: Annotated[
        bool, typer.Option("--skip-checks", help="Only look: compile and run no kernel.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what is installed and fits, and hold kernels against the reference on small problems.

    Exit code 0 if all that is installed works (a machine without a GPU is fine), else 1.
    """
    findings = []
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    with err.status("examining"):
        for finding in examination.examine(checks=not skip_checks):
            findings.append(finding)
            if as_json:
                continue
            console.print(
                f"{MARKS[finding.status]}  {escape(finding.name)}: {escape(finding.detail)}"
            )
            if finding.advice:
                console.print(f"         → {escape(finding.advice)}")
    found = examination.report(findings)
    if as_json:
        print_json(found)
    if not found["works"]:
        raise typer.Exit(FAILED)
