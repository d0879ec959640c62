"""The text that both sides train on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpurnn.text import Corpus, CorpusError, Tokenizer, load_corpus, training_text

__all__ = ["EDITION", "Text", "benchmark_text", "synthetic"]

EDITION = "book"
LETTERS = "abcdefghijklmnopqrstuvwxyz "


@dataclass(frozen=True)
class Text:
    """A corpus, and how many tokens of it the book's preprocessing leaves."""

    corpus: Corpus
    tokens: int

    @classmethod
    def of(cls, corpus: Corpus) -> "Text":
        """Count a corpus's tokens."""
        kept = Tokenizer("char", EDITION).tokens(training_text(corpus.text, EDITION))
        return cls(corpus, len(kept))


def benchmark_text(note: Callable[[str], None]) -> Text:
    """Return the default corpus; ``note`` is told where a synthetic text has to stand in for it."""
    try:
        return Text.of(load_corpus("python-docs"))
    except CorpusError as e:
        note(f"a synthetic text is used: {e}")
        return Text.of(synthetic(300_000))


def synthetic(characters: int) -> Corpus:
    """Return a seeded text over the 26 letters and the blank, no blank beside another."""
    weights = np.r_[np.linspace(2.0, 0.2, 26), 6.0]
    drawn = np.random.default_rng(0).choice(
        list(LETTERS), 2 * characters, p=weights / weights.sum()
    )
    blank = drawn == " "
    drawn = drawn[~(blank & np.r_[True, blank[:-1]])]
    text = LETTERS + "".join(drawn[: characters - len(LETTERS)])
    return Corpus("synthetic", text, f"{characters:,} characters from a seeded generator")
