"""Two ways of measuring a model on text it was not trained on."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpurnn import loss
from gpurnn.batches import Windows
from gpurnn.language_model import LanguageModel

__all__ = ["Losses", "StreamValidation", "Validation", "WindowValidation"]


@dataclass(frozen=True)
class Losses:
    """Mean losses of batches, and how many tokens each predicted."""

    means: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean negative log-likelihood of all tokens, each weighing the same, in nats."""
        return float(np.average(self.means, weights=self.tokens))

    def record(self, split: str) -> dict[str, float]:
        """Return the mean loss and both perplexities, under names that begin with ``split``."""
        return {
            f"{split}_loss": self.mean,
            f"{split}_perplexity": loss.perplexity(self.mean),
            f"{split}_perplexity_book": loss.book_perplexity(self.means),
        }


class Validation(Protocol):
    """Measures a model."""

    def __call__(self, model: LanguageModel) -> Losses:
        """Return the model's losses on the validation text."""


@dataclass(frozen=True)
class StreamValidation:
    """The text as one stream, the state carried from its first token to its last."""

    ids: NDArray[Any]

    def __call__(self, model: LanguageModel) -> Losses:
        """Return the losses of the whole stream as one batch."""
        found = model.evaluate_ids(self.ids)
        return Losses((found.nats / found.tokens,), (found.tokens,))


@dataclass(frozen=True)
class WindowValidation:
    """Batches of windows in a fixed order, each from a zero state (the book's way)."""

    windows: Windows

    def __call__(self, model: LanguageModel) -> Losses:
        """Return the losses batch by batch."""
        means, tokens = [], []
        for X, Y in self.windows.epoch(np.random.default_rng(0)):
            nll, _ = model.negative_log_likelihood(X, Y)
            means.append(float(nll.mean(dtype=np.float64)))
            tokens.append(nll.size)
        return Losses(tuple(means), tuple(tokens))
