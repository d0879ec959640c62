"""Vocabulary: the one-to-one map between tokens and ids."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpurnn import validate

__all__ = ["UNK", "Vocabulary"]

UNK: Final = "<unk>"
"""The token that stands for every token the vocabulary does not hold; its id is 0."""


class Vocabulary:
    """The tokens of a text, numbered: ``<unk>``, then reserved tokens, then by falling frequency.

    ``tokens`` are the tokens of the training text (a string counts as its characters). Those that
    occur at least ``min_freq`` times are kept; tokens of equal frequency stand in code point
    order, so that the ids depend on the text alone. ``reserved`` tokens, such as ``"<bos>"``, get
    the ids after ``<unk>`` in the order given whether or not they occur.

    Source: *Dive into Deep Learning*, section 9.2.3. The book's current edition numbers tokens
    alphabetically; the order by frequency is that of its editions up to 2022 (section 8.2.3).

    Raises :class:`ValueError` if there are no tokens, if ``min_freq`` is below 1 or leaves no
    token, or if ``reserved`` repeats a token or holds ``<unk>``; :class:`TypeError` for tokens
    that are not strings, a single string as ``reserved``, or a ``min_freq`` that is no integer.
    """

    __slots__ = ("_counts", "_ids", "_num_reserved", "_tokens")

    def __init__(
        self, tokens: Iterable[str], *, min_freq: int = 1, reserved: Sequence[str] = ()
    ) -> None:
        min_freq = validate.positive("min_freq", min_freq)
        if isinstance(reserved, str):
            raise TypeError(f"reserved must be a sequence of tokens, got the string {reserved!r}")
        fixed = (UNK, *_strings("reserved", reserved))
        if UNK in fixed[1:]:
            raise ValueError(f"reserved must not name {UNK!r}, which is always there, as id 0")
        _refuse_repeats("reserved", fixed)
        found = Counter(_strings("tokens", tokens))
        if not found:
            raise ValueError("tokens is empty: a vocabulary needs the tokens of a non-empty text")

        fixed_counts = {token: found.pop(token, 0) for token in fixed}
        ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        kept = [(token, count) for token, count in ranked if count >= min_freq]
        if ranked and not kept:
            token, count = ranked[0]
            raise ValueError(
                f"min_freq={min_freq} leaves no token: the most frequent, {token!r}, occurs "
                f"{count} time{'s' if count > 1 else ''}"
            )
        fixed_counts[UNK] += sum(count for _, count in ranked[len(kept) :])
        self._set(
            tokens=(*fixed, *(token for token, _ in kept)),
            counts=(*fixed_counts.values(), *(count for _, count in kept)),
            num_reserved=len(fixed) - 1,
        )

    @classmethod
    def from_tokens_in_order(cls, tokens: Sequence[str], *, num_reserved: int = 0) -> "Vocabulary":
        """Build the vocabulary whose :attr:`tokens` are ``tokens``, as read from a file.

        ``num_reserved`` is the number of reserved tokens after ``<unk>``. The counts are not
        known (:attr:`counts` is None).

        Raises :class:`ValueError` if ``tokens`` does not start with ``<unk>``, repeats a token or
        is too short for ``num_reserved``; :class:`TypeError` if it is a string or holds anything
        but strings.
        """
        if isinstance(tokens, str):
            raise TypeError(f"tokens must be a sequence of tokens, got the string {tokens!r}")
        in_order = tuple(_strings("tokens", tokens))
        if not in_order or in_order[0] != UNK:
            first = repr(in_order[0]) if in_order else "no token at all"
            raise ValueError(f"tokens must start with {UNK!r}, which has id 0; got {first}")
        _refuse_repeats("tokens", in_order)
        num_reserved = validate.at_least("num_reserved", num_reserved, 0)
        if num_reserved >= len(in_order):
            raise ValueError(
                f"num_reserved must be from 0 to {len(in_order) - 1} for {len(in_order)} tokens "
                f"of which the first is {UNK!r}; got {num_reserved}"
            )
        vocabulary = cls.__new__(cls)
        vocabulary._set(tokens=in_order, counts=None, num_reserved=num_reserved)
        return vocabulary

    def _set(
        self, *, tokens: tuple[str, ...], counts: tuple[int, ...] | None, num_reserved: int
    ) -> None:
        self._tokens = tokens
        self._ids = {token: id_ for id_, token in enumerate(tokens)}
        self._counts = counts
        self._num_reserved = num_reserved

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens in the order of their ids."""
        return self._tokens

    @property
    def counts(self) -> tuple[int, ...] | None:
        """How often each token occurred in the text, in the order of the ids.

        The count of ``<unk>`` includes every token that was dropped, so the counts sum to the
        number of tokens in the text. None for a vocabulary made by :meth:`from_tokens_in_order`.
        """
        return self._counts

    @property
    def unk(self) -> int:
        """The id of ``<unk>``: 0."""
        return 0

    @property
    def num_reserved(self) -> int:
        """The number of reserved tokens, ``<unk>`` not counted."""
        return self._num_reserved

    @property
    def reserved_ids(self) -> tuple[int, ...]:
        """The ids that stand for no text and are never to be sampled: ``<unk>`` and reserved."""
        return tuple(range(1 + self._num_reserved))

    def encode(self, tokens: Iterable[str]) -> npt.NDArray[np.int64]:
        """Return the ids of ``tokens``, shape (number of tokens,), int64; unknown tokens give 0.

        A string counts as its characters. Raises :class:`TypeError` for tokens that are not
        strings.
        """
        known = _strings("tokens", tokens)
        return np.fromiter((self._ids.get(t, 0) for t in known), dtype=np.int64, count=len(known))

    def decode(self, ids: npt.ArrayLike) -> list[str]:
        """Return the tokens of ``ids``, a one-dimensional array or sequence of integers.

        Raises :class:`ValueError` for an id that is negative or not below ``len(self)``, or for
        another number of dimensions; :class:`TypeError` for anything but integers.
        """
        array: npt.NDArray[Any] = np.asarray(ids)
        if array.ndim != 1:
            raise ValueError(f"ids must have one dimension, got shape {array.shape}")
        if array.size == 0:
            return []
        if array.dtype.kind not in "iu":
            raise TypeError(f"ids must be integers, got dtype {array.dtype}")
        outside = np.flatnonzero((array < 0) | (array >= len(self)))
        if outside.size:
            position = int(outside[0])
            raise ValueError(
                f"ids must be from 0 to {len(self) - 1} for a vocabulary of {len(self)} tokens; "
                f"got {array[position]} at position {position}"
            )
        return [self._tokens[id_] for id_ in array.tolist()]

    def __getitem__(self, token: str) -> int:
        """Return the id of ``token``, or 0 (``<unk>``) if the vocabulary does not hold it."""
        if not isinstance(token, str):
            raise TypeError(f"a token must be a str, got {token!r} ({type(token).__name__})")
        return self._ids.get(token, 0)

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def __eq__(self, other: object) -> bool:
        """Two vocabularies are equal if every token has the same id in both."""
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self._tokens == other._tokens

    def __hash__(self) -> int:
        return hash(self._tokens)

    def __repr__(self) -> str:
        return f"<Vocabulary of {len(self)} tokens, {self._num_reserved} reserved>"


def _strings(name: str, tokens: Iterable[str]) -> list[str]:
    """Return ``tokens`` as a list, or raise a TypeError for the first that is not a string."""
    listed = list(tokens)
    for position, token in enumerate(listed):
        if not isinstance(token, str):
            raise TypeError(
                f"{name} must be strings, got {token!r} ({type(token).__name__}) "
                f"at position {position}"
            )
    return listed


def _refuse_repeats(name: str, tokens: Sequence[str]) -> None:
    token, count = Counter(tokens).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{name} must not repeat a token, got {token!r} {count} times")
