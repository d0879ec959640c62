"""Tokenizer: text to a list of tokens, characters or words, and back."""

import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from gpurnn import validate
from gpurnn.text.editions import EDITIONS, normalize

__all__ = ["UNITS", "Tokenizer"]

UNITS: Final = ("char", "word")
"""What a token can be."""

_CHARACTERS_ONLY: Final = frozenset({"book-2017"})
"""Editions that join lines with nothing between, so that no word rule can find the words."""


@dataclass(frozen=True)
class Tokenizer:
    """How a text becomes tokens: an edition's preprocessing, then a split in units.

    ``unit="char"``: every code point of the normalised text is a token.

    ``unit="word"``: one rule for normalised and raw text alike. Tokens are lower case and are

    - *words*: runs of letters and digits of any script with their combining marks; apostrophes
      inside a word stay (``don't``; a typographic one becomes ``'``), and so do a point or comma
      between two digits (``3.11``, ``1,000``);
    - *initials*: one letter with its period (``h.``, and ``e.`` ``g.`` out of "e.g."), unless two
      or more letters or digits follow the period directly (``x.append`` is ``x``, ``append``).
      A one-letter word that ends a sentence looks the same and keeps its period, too: "said I."
      ends in ``i.``.

    Everything else separates tokens and is dropped: other punctuation, hyphens, underscores,
    symbols. Canonically equivalent spellings give the same word (they are composed, NFC).
    "The Time Machine, by H. G. Wells" is ``the time machine by h. g. wells``.

    Source: *Dive into Deep Learning*, section 9.2 (units; on edition ``book`` the word rule
    agrees with the book's split at spaces) and section 9.4 in its 2019 edition (initials).

    Raises :class:`ValueError` for an unknown ``unit`` or ``edition``, and for words of an edition
    that runs words together (``book-2017``).
    """

    unit: str = "char"
    edition: str = "raw"

    def __post_init__(self) -> None:
        validate.choice("unit", self.unit, UNITS)
        validate.choice("edition", self.edition, EDITIONS)
        if self.unit == "word" and self.edition in _CHARACTERS_ONLY:
            raise ValueError(
                f"unit='word' cannot be had with edition={self.edition!r}, which joins lines "
                "without a space and so runs words together; use edition='book' or 'raw'"
            )

    def tokens(self, text: str) -> list[str]:
        """Return the tokens of ``text``, normalised by the edition first.

        For words, ``tokens(join(tokens(text)))`` is ``tokens(text)``; for characters,
        ``join(tokens(text))`` is the normalised text.
        """
        text = normalize(text, self.edition)
        return list(text) if self.unit == "char" else _words(text)

    def join(self, tokens: Iterable[str]) -> str:
        """Return the text that ``tokens`` spell: joined by nothing (char) or a space (word)."""
        return self.separator.join(tokens)

    @property
    def separator(self) -> str:
        """What stands between two tokens in a text: nothing (char) or a space (word)."""
        return "" if self.unit == "char" else " "

    def config(self) -> dict[str, str]:
        """Return what :meth:`from_config` needs to build an equal tokenizer."""
        return {"unit": self.unit, "edition": self.edition}

    @classmethod
    def from_config(cls, config: Mapping[str, str]) -> "Tokenizer":
        """Build the tokenizer that :meth:`config` described.

        Raises :class:`ValueError` if the keys are not exactly ``unit`` and ``edition``, or for a
        value that the constructor refuses.
        """
        if set(config) != {"unit", "edition"}:
            raise ValueError(
                f"a tokenizer's config must have the keys 'unit' and 'edition', got {list(config)}"
            )
        return cls(unit=config["unit"], edition=config["edition"])


def _words(text: str) -> list[str]:
    """Split ``text`` by the word rule of :class:`Tokenizer`."""
    text = unicodedata.normalize("NFC", text.lower()).replace(
        "\N{RIGHT SINGLE QUOTATION MARK}", "'"
    )
    marks = "".join(sorted(c for c in set(text) if unicodedata.category(c).startswith("M")))
    return _word_pattern(marks).findall(text)


@functools.lru_cache(maxsize=16)
def _word_pattern(marks: str) -> re.Pattern[str]:
    r"""Compile the word rule, with ``marks`` as the combining marks (which ``\w`` leaves out)."""
    mark = f"[{marks}]" if marks else r"[^\s\S]"
    word = rf"[^\W_](?:[^\W_]|{mark})*"
    initial = rf"[^\W\d_]{mark}*\.(?![^\W_]{mark}*[^\W_])"
    return re.compile(rf"{initial}|{word}(?:(?:'|(?<=\d)[.,](?=\d)){word})*")
