"""The n-gram model: counting, the baseline that a recurrent network has to beat.

A model of order n keeps the last n − 1 tokens and forgets the rest (*Dive into Deep Learning* 9.3,
9.4). A table of all contexts would hold |V|ⁿ numbers; here only what the text holds is stored,
level by level, as sorted integers, so memory grows with order × length of the text.

A text can be measured in two ways. The figures differ, and must not be mixed:

- as a stream (``perplexity``): each token once, with up to order − 1 tokens of history;
- as windows (``perplexity_windows``): every target of every window, with no more history than the
  window has shown so far. A network that starts each window from a zero state sees just this much,
  so this is the figure to print beside it.

The Witten-Bell figures that this project quotes for The Time Machine (validation, order 1 … 5:
16.67, 9.53, 6.47, 5.31, 5.36) are a stream's: fitted on the 10,031 characters that are inputs of
the first 10,000 windows, measured on the 5,031 that are inputs of the next 5,000, with no history
before the first. The same counts measured as windows give 16.67, 9.53, 6.54, 5.44, 5.49. The tests
hold both, and say how the maximum-likelihood figures come about.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from gpurnn import loss, validate

__all__ = ["SMOOTHINGS", "NGramModel", "Smoothing"]

Floats = NDArray[np.float64]
Ids = NDArray[Any]
Ints = NDArray[np.int64]
Smoothing = Literal["maximum-likelihood", "additive", "witten-bell"]

SMOOTHINGS: tuple[Smoothing, ...] = ("maximum-likelihood", "additive", "witten-bell")


class _Level(NamedTuple):
    """The counts for one length of context. A context's number is its place in ``contexts``."""

    contexts: Ints  # (C,) sorted codes: number of the context less its oldest token, that token
    ngrams: Ints  # (G,) sorted codes: number of the context, token that followed it
    counts: Ints  # (G,) how often it did
    totals: Ints  # (C,) how many tokens followed the context
    distinct: Ints  # (C,) how many different ones


class _Counts(NamedTuple):
    """What ``fit`` learns. A token is coded by its rank, so no code exceeds (text length + 1)²."""

    observed: Ints  # (U,) sorted ids of the text; an id's rank is its place here
    levels: list[_Level]  # levels[m]: contexts of m tokens, as far as the text is long enough

    @property
    def base(self) -> int:
        """A code is number × base + rank; rank base − 1 stands for every id that never occurred."""
        return self.observed.size + 1

    def ranks(self, ids: Ints) -> Ints:
        found = _find(self.observed, ids)
        return np.where(found < 0, self.observed.size, found)


class NGramModel:
    """Predicts a token from the order − 1 tokens before it.

    With c the context, c′ the same without its oldest token, count(c, w) how often w followed c,
    count(c) its sum over w, and N1+(c) how many different tokens followed c, p(w | c) is

    ``maximum-likelihood``: count(c, w) / count(c). A token that never followed a context that did
        occur has probability 0, and a text that holds such a pair has infinite perplexity: that is
        the estimate, and nothing hides it. A context that never occurred has no estimate of its own
        (nothing chosen there changes the likelihood), so that of c′ stands in, down to the unigram:
        what a text's beginning gets too, and what lets a generation find back to known contexts.
    ``additive``: (count(c, w) + α) / (count(c) + α |V|); 1 / |V| where c never occurred.
    ``witten-bell``: (count(c, w) + N1+(c) p(w | c′)) / (count(c) + N1+(c)), and 1 / |V| below the
        unigram; p(w | c′) where c never occurred.

    Where fewer than order − 1 tokens came before, the context is those. Every method that needs
    counts raises ValueError before ``fit``, and TypeError or ValueError for an argument that is not
    an integer array, has the wrong number of axes, holds an id outside [0, vocab_size), or no id
    where there must be one.

    Args:
        order: the length of the n-grams: 1 counts single tokens, 2 pairs.
        vocab_size: |V|, below 2⁶³.
        smoothing: "maximum-likelihood", "additive" or "witten-bell".
        alpha: α > 0 of "additive", with α |V| finite; the others do not use it.

    Raises:
        TypeError, ValueError: an order or vocabulary size below 1, an unknown smoothing, an alpha
            not above 0.

    Sources: *Dive into Deep Learning* 9.3. Witten and Bell, "The zero-frequency problem", IEEE
    Transactions on Information Theory 37 (1991), pages 1085–1094, method C, here interpolated.
    """

    def __init__(
        self,
        order: int,
        vocab_size: int,
        smoothing: Smoothing = "witten-bell",
        alpha: float = 1.0,
    ) -> None:
        self.order = validate.positive("order", order)
        self.vocab_size = validate.positive("vocab_size", vocab_size)
        if self.vocab_size >= 2**63:
            raise ValueError(f"vocab_size is {vocab_size}: expected less than 2**63")
        validate.choice("smoothing", smoothing, SMOOTHINGS)
        self.smoothing = smoothing
        self.alpha = _alpha(alpha, self.vocab_size)
        self._fitted: _Counts | None = None

    def __repr__(self) -> str:
        return f"NGramModel({self.order}, {self.vocab_size}, {self.smoothing!r}, {self.alpha})"

    def fit(self, ids: Ids, *more: Ids) -> Self:
        """Count one text or several, in place of what was counted before, and return the model.

        Args:
            ids: (length,), at least one token; each position counts once for every order.
            more: further texts. No n-gram reaches from one text into the next, and a text given
                twice counts twice: ``fit(*windows)`` counts a character once per window it is in.
        """
        texts = [self._text("ids", ids)]
        texts += [self._text(f"more[{i}]", text) for i, text in enumerate(more)]
        observed, ranks = np.unique(np.concatenate(texts), return_inverse=True)
        counts = _Counts(observed, [])
        available = np.concatenate([np.arange(text.size) for text in texts])
        rows = np.arange(ranks.size)  # the positions that have this much history
        nodes = np.zeros(ranks.size, np.int64)  # and the number of their context
        contexts = np.zeros(1, np.int64)  # at first the empty one
        for length in range(self.order):
            if length:
                longer = available[rows] >= length
                rows, nodes = rows[longer], nodes[longer]
                if not rows.size:
                    break
                codes = nodes * counts.base + ranks[rows - length]
                contexts, nodes = np.unique(codes, return_inverse=True)
            ngrams, times = np.unique(nodes * counts.base + ranks[rows], return_counts=True)
            totals, distinct = np.bincount(nodes), np.bincount(ngrams // counts.base)
            counts.levels.append(_Level(contexts, ngrams, times, totals, distinct))
        self._fitted = counts
        return self

    def log_prob(self, contexts: Ids, tokens: Ids) -> Floats:
        """Return the natural logarithm of p(token | context), −inf where it is impossible.

        Args:
            contexts: (…, m) ids, oldest first, m ≥ 0; no more than the last order − 1 are used.
            tokens: (…) ids. The leading axes of the two broadcast; the result has them, in float64.
        """
        counts = self._counts()
        history, targets = self._ids("contexts", contexts), self._ids("tokens", tokens)
        if history.ndim == 0:
            raise ValueError("contexts has shape (): expected (…, m), at least 1 axis")
        *leading, m = history.shape
        try:
            shape = np.broadcast_shapes(tuple(leading), targets.shape)
        except ValueError:
            raise ValueError(
                f"tokens has shape {targets.shape}: expected one that broadcasts with the leading "
                f"axes of contexts {history.shape}"
            ) from None
        ends = np.arange(1, math.prod(leading) + 1).reshape(leading) * m
        ends, targets = (np.broadcast_to(a, shape).ravel() for a in (ends, targets))
        available = np.full(ends.size, m)
        p = self._probability(counts.ranks(history.ravel()), ends, available, targets)
        return _log(p).reshape(shape)

    def distribution(self, context: Ids) -> Floats:
        """Return the probabilities (vocab_size,) after a context (m,), oldest first; they sum to 1.

        No more than the last order − 1 ids are used, and m may be 0.
        """
        self._counts()
        return self._distribution(self._ids("context", context, 1))

    def negative_log_likelihood(self, ids: Ids) -> Floats:
        """Return −log p of each token of a text (length,) read as a stream, float64, in nats.

        The first token is predicted from nothing, the second from one token, and so on. To give a
        text a history, put that in front and drop its part of the result.
        """
        counts, text = self._counts(), self._text("ids", ids)
        positions = np.arange(text.size)
        p = self._probability(counts.ranks(text), positions, positions, text)
        return -_log(p) + 0.0  # for p = 1 this is 0.0, not −0.0

    def perplexity(self, ids: Ids) -> float:
        """Return exp of the mean ``negative_log_likelihood``: inf if any token is impossible."""
        return loss.perplexity(self.negative_log_likelihood(ids))

    def bits_per_token(self, ids: Ids) -> float:
        """Return the mean ``negative_log_likelihood`` in bits, the logarithm of ``perplexity``."""
        return loss.bits_per_token(self.negative_log_likelihood(ids))

    def negative_log_likelihood_windows(self, X: Ids, Y: Ids) -> Floats:
        """Return −log p of each target (N, T), float64, in nats; no history but the window's own.

        Args:
            X: (N, T) ids, the inputs of N windows.
            Y: (N, T) ids; Y[i, t] is predicted from the last order − 1 ids of X[i, :t + 1].
        """
        counts = self._counts()
        inputs, targets = self._ids("X", X, 2), self._ids("Y", Y, 2)
        if inputs.shape != targets.shape:
            raise ValueError(f"Y has shape {targets.shape}: expected X's shape {inputs.shape}")
        N, T = inputs.shape
        ends, available = np.arange(1, N * T + 1), np.tile(np.arange(1, T + 1), N)
        p = self._probability(counts.ranks(inputs.ravel()), ends, available, targets.ravel())
        return -_log(p).reshape(N, T) + 0.0

    def perplexity_windows(self, X: Ids, Y: Ids) -> float:
        """Return exp of the mean of ``negative_log_likelihood_windows`` over all N × T targets."""
        nll = self.negative_log_likelihood_windows(X, Y)
        if not nll.size:
            raise ValueError(f"X has shape {nll.shape}: expected at least one token")
        return loss.perplexity(nll)

    def sample(self, prefix: Ids, n: int, seed: int | np.random.Generator = 0) -> Ints:
        """Draw n ≥ 1 tokens after a prefix (m,), m ≥ 0, each by its ``distribution``; return (n,).

        The prefix is not part of the result. A generator given as ``seed`` is advanced.
        """
        rng = validate.generator("seed", seed)
        return self._continue(prefix, n, lambda p: int(rng.choice(p.size, p=p)))

    def greedy(self, prefix: Ids, n: int) -> Ints:
        """Like ``sample``, but always take the likeliest token; of equals the lowest id."""
        return self._continue(prefix, n, lambda p: int(p.argmax()))

    def dense_table_size(self) -> int:
        """Return |V|ⁿ exactly: how many numbers a table of all n-grams, n = order, would hold."""
        return int(self.vocab_size**self.order)

    def num_observed(self, k: int | None = None) -> int:
        """Return how many different k-grams were counted, 1 ≤ k ≤ order; None is order."""
        levels = self._counts().levels
        k = self.order if k is None else validate.positive("k", k)
        if k > self.order:
            raise ValueError(f"k is {k}: expected at most the order, {self.order}")
        return int(levels[k - 1].ngrams.size) if k <= len(levels) else 0

    def _counts(self) -> _Counts:
        if self._fitted is None:
            raise ValueError("the model has no counts: call fit first")
        return self._fitted

    def _ids(self, name: str, ids: Ids, ndim: int | None = None) -> Ints:
        checked = validate.token_ids(name, ids, self.vocab_size, "the vocabulary", axis="tokens")
        if ndim is not None and ids.ndim != ndim:
            raise ValueError(f"{name} has shape {ids.shape}: expected {ndim}-D ids")
        return checked.astype(np.int64, copy=False).reshape(ids.shape)  # a single id: (), not (1,)

    def _text(self, name: str, ids: Ids) -> Ints:
        text = self._ids(name, ids, 1)
        if not text.size:
            raise ValueError(f"{name} is empty: expected at least one token")
        return text

    def _probability(self, ranks: Ints, ends: Ints, available: Ints, targets: Ints) -> Floats:
        """Return p of each id targets[i] (N,) after row i's history.

        That history is ranks[:ends[i]], of which the last available[i] may be used. Rows go from
        the empty context to longer ones, and drop out at their first context that never occurred.
        """
        counts = self._counts()
        tokens = counts.ranks(targets)
        depth = np.minimum(available, min(self.order - 1, ranks.size))
        p = np.full(ends.size, 1 / self.vocab_size)
        rows = np.arange(ends.size)
        nodes = np.zeros(ends.size, np.int64)
        for length, level in enumerate(counts.levels):
            if length:
                longer = depth[rows] >= length
                rows, nodes = rows[longer], nodes[longer]
                nodes = _find(level.contexts, nodes * counts.base + ranks[ends[rows] - length])
                rows, nodes = rows[nodes >= 0], nodes[nodes >= 0]
            if not rows.size:
                break
            at = _find(level.ngrams, nodes * counts.base + tokens[rows])
            count = np.where(at < 0, 0, level.counts[at])
            total, distinct = level.totals[nodes], level.distinct[nodes]
            if self.smoothing == "witten-bell":
                p[rows] = (count + distinct * p[rows]) / (total + distinct)
            elif self.smoothing == "maximum-likelihood":
                p[rows] = count / total
            else:  # lengths are not mixed: a context counts at its full length or not at all
                p_level = (count + self.alpha) / (total + self.alpha * self.vocab_size)
                p[rows] = np.where(depth[rows] == length, p_level, p[rows])
        return p

    def _distribution(self, context: Ints) -> Floats:
        m = np.full(self.vocab_size, context.size)
        return self._probability(self._counts().ranks(context), m, m, np.arange(self.vocab_size))

    def _continue(self, prefix: Ids, n: int, pick: Callable[[Floats], int]) -> Ints:
        self._counts()
        before = self._ids("prefix", prefix, 1)
        text = np.concatenate([before, np.zeros(validate.positive("n", n), np.int64)])
        for i in range(before.size, text.size):
            text[i] = pick(self._distribution(text[max(0, i - self.order + 1) : i]))
        return text[before.size :]


def _find(table: Ints, codes: Ints) -> Ints:
    """Return where each code stands in a sorted, non-empty table; −1 where it does not."""
    at = np.minimum(np.searchsorted(table, codes), table.size - 1)
    return np.where(table[at] == codes, at, -1)


def _log(p: Floats) -> Floats:
    """Return the natural logarithm, −inf for 0."""
    with np.errstate(divide="ignore"):
        return np.log(p)


def _alpha(value: object, vocab_size: int) -> float:
    expected = "more than 0, and alpha · |V| finite"
    return validate.number("alpha", value, expected, lambda x: 0 < x * vocab_size < math.inf)
