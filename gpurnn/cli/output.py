"""What the commands share: messages on stderr, results on stdout, mistakes without a traceback."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console

__all__ = ["FAILED", "MISTAKE", "err", "fail", "mistakes", "note", "print_json", "reason"]

FAILED = 1
MISTAKE = 2

err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def note(message: str) -> None:
    """Say something on stderr."""
    err.print(message, markup=False)


def fail(message: str, code: int) -> NoReturn:
    """Say what went wrong on stderr and exit."""
    err.print(f"error: {message}", markup=False, style="bold red")
    raise typer.Exit(code)


@contextmanager
def mistakes() -> Iterator[None]:
    """Turn errors about the user's input into a message and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as e:
        fail(reason(e), MISTAKE)
    except MemoryError as e:
        fail(f"not enough memory for these sizes: {e}", MISTAKE)


def reason(e: Exception) -> str:
    """Return an error in words: for a failed file operation what failed, and on which file."""
    if isinstance(e, OSError) and e.strerror:
        return f"{e.filename}: {e.strerror}" if e.filename else e.strerror
    return str(e)


def print_json(result: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))
