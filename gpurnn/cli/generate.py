"""``gpurnn generate``: continue a prefix."""

import secrets
import warnings
from pathlib import Path
from typing import Annotated

import typer

from gpurnn.cli.device import DeviceOption, placed
from gpurnn.cli.output import mistakes, note, print_json
from gpurnn.language_model import LanguageModel

__all__ = ["generate"]


def generate(
    model: Annotated[Path, typer.Argument(help="A model file that train wrote.")],
    prefix: Annotated[str, typer.Option(help="Text to continue, at least one token.")],
    n: Annotated[int, typer.Option("-n", help="Tokens to add.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="Below 1 more likely, above 1 more surprising; 0 is greedy.")
    ] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")] = False,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Only the likeliest tokens, of probability p together.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For the same text again.")] = None,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Continue a prefix with text that the model makes up."""
    drawn = seed is None
    if seed is None:
        seed = secrets.randbits(32)
    with mistakes(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        lm = placed(LanguageModel.load(model), device)
        text = lm.generate(
            prefix,
            n,
            temperature=0.0 if greedy else temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
    for w in warned:
        note(f"note: {w.message}")
    if drawn:
        note(f"seed {seed}")  # so that this text, too, can be had again
    if as_json:
        print_json({"model": str(model), "prefix": prefix, "text": text, "seed": seed})
    else:
        typer.echo(text)
