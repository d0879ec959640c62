"""How well a model predicts a text."""

import math
from dataclasses import dataclass

from gpurnn import loss

__all__ = ["Evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """What a model found on a text.

    Attributes:
        nats: −log p of all predicted tokens, added up (natural logarithm).
        tokens: predicted tokens: all but the first, which nothing comes before.
        characters: of the text that the predicted tokens stand for, separators included; None
            where only ids were given.
        unknown: predicted tokens outside the vocabulary, counted as ``<unk>``.
    """

    nats: float
    tokens: int
    characters: int | None
    unknown: int

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens)."""
        return loss.perplexity(self.nats / self.tokens)

    @property
    def bits_per_token(self) -> float:
        """Bits per predicted token."""
        return self.nats / self.tokens / math.log(2)

    @property
    def bits_per_character(self) -> float:
        """Bits per character: comparable between character and word models of one text.

        Raises:
            ValueError: the number of characters is not known.
        """
        if self.characters is None:
            raise ValueError("characters is None: evaluate a text, not ids, for bits per character")
        return self.nats / self.characters / math.log(2)
