"""Two ways of measuring a model on text it was not trained on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gpurnn import loss
from gpurnn.batches import Windows
from gpurnn.language_model import LanguageModel

__all__ = ["InBatches", "Losses", "StreamValidation", "Validation", "WindowValidation"]

Batch = tuple[NDArray[Any], NDArray[Any]]


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


@runtime_checkable
class InBatches(Validation, Protocol):
    """A validation that is told by the mean losses of batches, the same each time.

    On a GPU it is queued like a training step, and training does not stop for it: there ``batches``
    and ``losses`` are called instead of the validation itself, which must find the same. What
    ``losses`` makes of finite means has to be finite.
    """

    @property
    def carries_state(self) -> bool:
        """Whether a batch begins with the state that the one before has ended with."""

    def batches(self, model: LanguageModel) -> Iterable[Batch]:
        """Return the batches (X, Y) of ids, in the host's memory."""

    def losses(self, means: Sequence[float], tokens: Sequence[int]) -> Losses:
        """Return the losses, given the mean and the number of targets of each batch."""


@dataclass(frozen=True)
class StreamValidation:
    """The text as one stream, the state carried from its first token to its last."""

    ids: NDArray[Any]
    carries_state = True

    def __call__(self, model: LanguageModel) -> Losses:
        """Return the mean loss of the whole stream."""
        found = model.evaluate_ids(self.ids)
        return Losses((found.nats / found.tokens,), (found.tokens,))

    def batches(self, model: LanguageModel) -> Iterable[Batch]:
        """Return the stream, a stretch at a time."""
        return model.stretches(self.ids)

    def losses(self, means: Sequence[float], tokens: Sequence[int]) -> Losses:
        """Return the mean loss of the whole stream."""
        return Losses((Losses(tuple(means), tuple(tokens)).mean,), (sum(tokens),))

    def record(self, losses: Losses) -> dict[str, float | None]:
        """Return loss and perplexity; a stream has no batches for the book's figure."""
        return losses.record("valid")


@dataclass(frozen=True)
class WindowValidation:
    """Batches of windows in a fixed order, each from a zero state (the book's way)."""

    windows: Windows
    carries_state = False

    def __call__(self, model: LanguageModel) -> Losses:
        """Return the losses batch by batch."""
        return Losses(*model.batch_losses(self.batches(model)))

    def batches(self, model: LanguageModel) -> Iterable[Batch]:
        """Return the windows, a batch at a time."""
        return self.windows.epoch(np.random.default_rng(0))

    def losses(self, means: Sequence[float], tokens: Sequence[int]) -> Losses:
        """Return the losses batch by batch."""
        return Losses(tuple(means), tuple(tokens))

    def record(self, losses: Losses) -> dict[str, float | None]:
        """Return loss, perplexity and the book's figure."""
        return losses.record("valid") | losses.book_record("valid")
