"""From logits to the next token: temperature, top-k, top-p, and the draw."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import validate

__all__ = ["TokenSampler"]

Floats = NDArray[Any]
Ids = NDArray[Any]


class TokenSampler:
    """Turns logits into probabilities and draws from them.

    Args:
        temperature: divides the logits; 0 is greedy (the likeliest token, the lowest id among
            equals), 1 the model's own distribution.
        top_k: keep the k likeliest tokens (among equals the lowest ids). None keeps all.
        top_p: then keep the fewest likeliest tokens whose probabilities, renewed after top_k, add
            up to at least p (Holtzman et al., 2020). None keeps all.
        never: ids that are not drawn (such as ``<unk>``).
        seed: of the draws, a number or a generator; None differs from run to run.

    Raises:
        TypeError, ValueError: temperature below 0, top_k below 1, top_p outside (0, 1], …
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        never: tuple[int, ...] = (),
        seed: int | np.random.Generator | None = None,
    ) -> None:
        self.temperature = validate.number(
            "temperature", temperature, "a finite number, 0 or more", lambda x: 0 <= x < math.inf
        )
        self.top_k = None if top_k is None else validate.positive("top_k", top_k)
        self.top_p = None
        if top_p is not None:
            self.top_p = validate.number("top_p", top_p, "a number in (0, 1]", lambda x: 0 < x <= 1)
        self.never = list(never)
        self.rng = validate.generator("seed", seed)

    def probabilities(self, O: Floats) -> Floats:
        """Return the float64 distribution (q,) that the logits O (q,) are drawn from.

        Raises:
            ValueError: no token is left that may be drawn, or O holds a NaN or +inf.
        """
        logits = np.array(O, dtype=np.float64)
        if not (logits < np.inf).all():
            raise ValueError(f"O holds {logits.max()}: expected logits below infinity")
        logits[self.never] = -np.inf
        if np.isneginf(logits).all():
            raise ValueError(f"of {logits.size} tokens none may be drawn: {self.never} never are")
        if self.temperature == 0:
            p = np.zeros_like(logits)
            p[np.argmax(logits)] = 1
            return p
        logits -= logits.max()
        with np.errstate(over="ignore"):  # a tiny temperature: −inf is right
            p = np.exp(logits / self.temperature)
        p /= p.sum()
        if self.top_k is None and self.top_p is None:
            return p
        falling = np.argsort(-p, kind="stable")
        keep = len(p) if self.top_k is None else min(self.top_k, len(p))
        if self.top_p is not None:
            kept = p[falling[:keep]]
            reached = np.cumsum(kept / kept.sum()) >= self.top_p
            keep = int(np.argmax(reached)) + 1 if reached.any() else keep
        p[falling[keep:]] = 0
        p /= p.sum()
        return p

    def draw(self, O: Floats) -> int:
        """Draw one id from the logits O (q,): one uniform number, by inverting the distribution."""
        p = self.probabilities(O)
        if self.temperature == 0:
            return int(np.argmax(p))
        cumulative = np.cumsum(p)
        u = self.rng.random() * cumulative[-1]
        return int(np.searchsorted(cumulative, u, side="right"))
