"""``gpurnn eval``: how well a model predicts a text."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gpurnn.cli.device import DeviceOption, placed
from gpurnn.cli.output import mistakes, note, print_json
from gpurnn.language_model import LanguageModel
from gpurnn.loss import finite
from gpurnn.text import decode_corpus, load_corpus

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[Path, typer.Argument(help="A model file that train wrote.")],
    text: Annotated[
        str,
        typer.Argument(help="python-docs, time-machine, the path of a UTF-8 text, or - for stdin."),
    ],
    book: Annotated[
        bool,
        typer.Option(
            "--book", help="Also the book's figure: mean of exp(batch loss), 32-step windows."
        ),
    ] = False,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Evaluate a model on a text: exact perplexity, each token predicted from all before it."""
    with mistakes():
        lm = placed(LanguageModel.load(model), device)
        if text == "-":
            corpus = decode_corpus(sys.stdin.buffer.read(), "-", "standard input")
        else:
            corpus = load_corpus(text)
        found = lm.evaluate(corpus.text)
        in_book = lm.book_perplexity(corpus.text) if book else None
    if found.unknown:
        note(
            f"note: {found.unknown:,} of {found.tokens:,} tokens are outside the model's "
            "vocabulary and count as <unk>"
        )
    if as_json:
        print_json(
            {
                "model": str(model),
                "text": corpus.name,
                "origin": corpus.origin,
                "sha256": corpus.sha256,
                "perplexity": finite(found.perplexity),
                **({} if in_book is None else {"perplexity_book": finite(in_book)}),
                "bits_per_token": finite(found.bits_per_token),
                "bits_per_character": finite(found.bits_per_character),
                "tokens": found.tokens,
                "characters": found.characters,
                "unknown": found.unknown,
            }
        )
        return
    typer.echo(f"perplexity          {found.perplexity:.4f} per token")
    if in_book is not None:
        typer.echo(f"book's figure       {in_book:.4f} mean of exp(batch loss)")
    typer.echo(f"bits per token      {found.bits_per_token:.4f}")
    typer.echo(f"bits per character  {found.bits_per_character:.4f}")
    typer.echo(f"tokens              {found.tokens:,} predicted, {found.unknown:,} unknown")
    typer.echo(f"text                {corpus.origin}, sha256 {corpus.sha256}")
