"""Two ways of measuring a model on text it was not trained on."""

from dataclasses import dataclass, field
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

    def record(self, split: str) -> dict[str, float | None]:
        """Return mean loss and perplexity, under names that begin with ``split``.

        A perplexity too large for a float is None, as JSON has no infinity.
        """
        return {
            f"{split}_loss": self.mean,
            f"{split}_perplexity": loss.finite(loss.perplexity(self.mean)),
        }

    def book_record(self, split: str) -> dict[str, float | None]:
        """Return the mean over the batches of exp(loss), as the book plots it."""
        return {f"{split}_perplexity_book": loss.finite(loss.book_perplexity(self.means))}


class Validation(Protocol):
    """Measures a model."""

    def __call__(self, model: LanguageModel) -> Losses:
        """Return the model's losses on the validation text."""

    def record(self, losses: Losses) -> dict[str, float | None]:
        """Return what the history is to hold of them."""


@dataclass(frozen=True)
class StreamValidation:
    """The text as one stream, the state carried from its first token to its last."""

    ids: NDArray[Any]

    def __call__(self, model: LanguageModel) -> Losses:
        """Return the mean loss of the whole stream."""
        found = model.evaluate_ids(self.ids)
        return Losses((found.nats / found.tokens,), (found.tokens,))

    def record(self, losses: Losses) -> dict[str, float | None]:
        """Return loss and perplexity; a stream has no batches for the book's figure."""
        return losses.record("valid")


@dataclass(frozen=True)
class WindowValidation:
    """Batches of windows in a fixed order, each from a zero state (the book's way)."""

    windows: Windows
    _kept: dict[tuple[str, int], list[tuple[NDArray[Any], NDArray[Any]]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, model: LanguageModel) -> Losses:
        """Return the losses batch by batch; batches that were put on a GPU stay there."""
        batches = self.windows.epoch(np.random.default_rng(0))
        if model.device == "cpu":
            return Losses(*model.batch_losses(batches))
        key = model.device, len(model.vocabulary)
        if key not in self._kept:
            there = [(model.ids_beside(X), model.ids_beside(Y)) for X, Y in batches]
            self._kept.clear()
            self._kept[key] = there
        return Losses(*model.batch_losses(self._kept[key], check_ids=False))

    def record(self, losses: Losses) -> dict[str, float | None]:
        """Return loss, perplexity and the book's figure."""
        return losses.record("valid") | losses.book_record("valid")
