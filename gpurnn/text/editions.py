"""Editions: the ways the successive editions of the book prepare a text.

*Dive into Deep Learning* changed its preprocessing twice; a perplexity can only be compared with
one that was published for the same edition. :func:`normalize` applies an edition's rule to any
text (a corpus, a prefix, a text to evaluate); :func:`training_text` also makes the cut that an
edition makes in the text it trains on.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from gpurnn import validate

__all__ = ["EDITIONS", "EDITION_LIMIT", "normalize", "training_text"]

_NOT_LETTERS: Final = re.compile("[^A-Za-z]+")
_LINE_END: Final = re.compile("\r\n|\r|\n")


def _raw(text: str) -> str:
    """Leave the text as it is."""
    return text


def _book(text: str) -> str:
    """Turn every run of anything but ASCII letters into one space; lower case (section 9.2)."""
    return _NOT_LETTERS.sub(" ", text).lower()


def _book_2017(text: str) -> str:
    """Do as ``book`` within each line, strip the line, and join the lines with nothing between.

    The rule of the 2017 to 2022 editions (section 8.2 of 2022). The last word of a line and the
    first of the next run together.
    """
    return "".join(_NOT_LETTERS.sub(" ", line).strip().lower() for line in _LINE_END.split(text))


def _book_2019(text: str) -> str:
    """Turn each newline character into a space; lower case. Everything else stays.

    That edition trains on the first 10,000 characters only. The cut belongs to the training
    text, not to the rule: it is made by :func:`training_text` (see :data:`EDITION_LIMIT`) and
    never by :func:`normalize`.
    """
    return text.replace("\n", " ").replace("\r", " ").lower()


EDITIONS: Final[Mapping[str, Callable[[str], str]]] = MappingProxyType(
    {"raw": _raw, "book": _book, "book-2017": _book_2017, "book-2019": _book_2019}
)
"""The rule of each edition, by name. Applying one twice is the same as applying it once."""

EDITION_LIMIT: Final[Mapping[str, int]] = MappingProxyType({"book-2019": 10_000})
"""How many characters of the normalised text an edition trains on; the others train on all."""


def normalize(text: str, edition: str) -> str:
    """Return ``text`` after the rule of ``edition``, one of :data:`EDITIONS`.

    ============  ===================================================  =====================
    edition       rule                                                 *The Time Machine*
    ============  ===================================================  =====================
    ``raw``       unchanged                                            178,979 characters
    ``book``      ``[^A-Za-z]+`` → one space, lower case               173,428 characters
    ``book-2017`` the same line by line, stripped, lines joined by ""  170,580 characters
    ``book-2019`` newline characters → spaces, lower case              178,979 characters
    ============  ===================================================  =====================

    Nothing is cut off: see :func:`training_text`. Source: *Dive into Deep Learning*, section 9.2
    (``book``) and section 8.2 of the 2022 edition (``book-2017``).

    Raises :class:`ValueError` for an unknown edition and :class:`TypeError` if ``text`` is not a
    string.
    """
    validate.choice("edition", edition, EDITIONS)
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    return EDITIONS[edition](text)


def training_text(text: str, edition: str) -> str:
    """Return the part of ``text`` that ``edition`` trains on, normalised.

    This is :func:`normalize`, cut to the first :data:`EDITION_LIMIT` characters for an edition
    that has a limit: with ``book-2019``, *The Time Machine* becomes 10,000 characters, 43 of
    them distinct. Normalising the result again changes nothing, so it can be handed to a
    :class:`~gpurnn.text.tokenizer.Tokenizer` of the same edition.

    Raises what :func:`normalize` raises.
    """
    return normalize(text, edition)[: EDITION_LIMIT.get(edition)]
