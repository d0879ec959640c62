#!/usr/bin/env python3
"""Run the notebooks, and write their outputs down:

    python scripts/notebooks.py                 # all of notebooks/, each .py beside its .ipynb
    python scripts/notebooks.py --check 02      # run the one whose name begins so; write nothing

A notebook is a pair: a percent script, which is what is written by hand, and the .ipynb that this
makes of it. It runs in a process of its own, in the folder notebooks, with the Python that runs
this; a cell that fails ends it with exit code 1. The .ipynb notes the version of gpurnn and the
SHA-256 of the script with style.py, and is replaced only when everything has run. (Within a version
a change of the library does not show in it: run them again before a release.)

It needs what `pip install -e '.[notebooks]'` brings.
"""

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

import gpurnn
from gpurnn.files import write_atomically

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
STYLE = FOLDER / "style.py"
LIMIT = 600  # seconds a cell may take
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def scripts() -> list[Path]:
    """Return the percent scripts of all notebooks, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def sha256(script: Path) -> str:
    """Return the hash that the .ipynb of a script notes."""
    return hashlib.sha256(script.read_bytes() + STYLE.read_bytes()).hexdigest()


def unrun(script: Path) -> Any:
    """Return a script as a notebook without outputs; cells are numbered, so that they stay so."""
    notebook = jupytext.read(script)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": KERNEL,
            "language_info": {"name": "python"},
            "gpurnn": {"version": gpurnn.__version__, "sha256": sha256(script)},
        }
    )
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    return notebook


def run(script: Path) -> Any:
    """Return a script as a notebook with the outputs of all its cells.

    Raises:
        CellExecutionError: a cell failed; the message has its traceback.
    """
    notebook = unrun(script)
    for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # which decide some last bits
        os.environ.setdefault(threads, "1")
    client = NotebookClient(
        notebook,
        timeout=LIMIT,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(words: list[str] | None = None) -> int:
    """Run notebooks; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="*", help="beginnings of names; all if none is given")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(words)
    chosen = [
        script
        for script in scripts()
        if not options.name or script.name.startswith(tuple(options.name))
    ]
    if not chosen:
        parser.error(f"no notebook begins with {' or '.join(options.name)}")
    failed = False
    for script in chosen:
        started = time.perf_counter()
        try:
            notebook = run(script)
        except (CellControlSignal, CellExecutionError, DeadKernelError, TimeoutError) as e:
            print(f"{script.name}: {e}", file=sys.stderr)
            failed = True
            continue
        if not options.check:
            written = nbformat.writes(notebook).rstrip("\n") + "\n"
            write_atomically(script.with_suffix(".ipynb"), written.encode())
        print(f"{script.name}: {time.perf_counter() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
