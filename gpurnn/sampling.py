"""From logits to the next token: temperature, top-k, top-p, and the draw.

``gpurnn.kernels.sampling`` does the same on a GPU, with the same random numbers.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import philox, validate

__all__ = ["TokenSampler", "beyond_all_bounds", "nothing_to_draw"]

Floats = NDArray[Any]
Ids = NDArray[Any]

BLOCK = 256  # uniform numbers that are made at a time


class TokenSampler:
    """Turns logits into probabilities and draws from them.

    Args:
        temperature: divides the logits; 0 is greedy (the likeliest token, the lowest id among
            equals), 1 the model's own distribution.
        top_k: keep the k likeliest tokens (among equals the lowest ids). None keeps all.
        top_p: then keep the fewest likeliest tokens whose probabilities, renewed after top_k, add
            up to at least p (Holtzman et al., 2020). None keeps all.
        never: ids that are not drawn (such as ``<unk>``).
        seed: of the draws, a number, of which the lower 64 bits count, or a generator, which draws
            one; None differs from run to run.

    Attributes:
        count: how many tokens have been drawn: the number of the next one.

    The number that token i of row r is drawn by depends on the seed, i and r alone
    (``gpurnn.philox``): the same on NumPy and on a GPU.

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
        if seed is None or isinstance(seed, np.random.Generator):
            seed = int(validate.generator("seed", seed).integers(1 << 63))
        self.seed = validate.at_least("seed", seed, 0)
        self.count = 0
        self._block: tuple[tuple[int, int] | None, Floats] = None, np.empty(0, np.float32)

    def probabilities(self, O: Floats) -> Floats:
        """Return the float64 distribution (q,) that the logits O (q,) are drawn from.

        Raises:
            ValueError: no token is left that may be drawn, or O holds a NaN or +inf.
        """
        logits = np.array(O, dtype=np.float64)
        if not (logits < np.inf).all():
            raise beyond_all_bounds(logits.max())
        logits[self.never] = -np.inf
        if np.isneginf(logits).all():
            raise nothing_to_draw(logits.size, self.never)
        if self.temperature == 0:
            p = np.zeros_like(logits)
            p[np.argmax(logits)] = 1
            return p
        logits -= logits.max()
        with np.errstate(over="ignore"):  # a tiny temperature: −inf is right
            p = np.exp(logits / self.temperature)
        p /= p.sum()
        if self.top_k is None and self.top_p in (None, 1):
            return p
        falling = np.argsort(-logits, kind="stable")
        keep = len(p) if self.top_k is None else min(self.top_k, len(p))
        if self.top_p not in (None, 1):
            kept = p[falling[:keep]]
            reached = np.cumsum(kept / kept.sum()) >= self.top_p
            keep = int(np.argmax(reached)) + 1 if reached.any() else keep
        p[falling[keep:]] = 0
        p /= p.sum()
        return p

    def draw(self, O: Floats, *, number: int | None = None, row: int = 0) -> int:
        """Draw one id from the logits O (q,): one uniform number, by inverting the distribution.

        Args:
            O: the logits.
            number, row: of the token, and of its row in the batch, which choose the uniform number;
                None counts the tokens that were drawn so.

        Raises:
            ValueError: as in ``probabilities``.
        """
        p = self.probabilities(O)
        if number is None:
            number, self.count = self.count, self.count + 1
        if self.temperature == 0:
            return int(np.argmax(p))
        cumulative = np.cumsum(p)
        u = self.uniform(number, row) * cumulative[-1]
        return int(np.searchsorted(cumulative, u, side="right"))

    def uniform(self, number: int, row: int = 0) -> float:
        """Return what token ``number`` of a row is drawn by: one of 2²⁴ numbers in [0, 1)."""
        block = number // BLOCK, row
        if self._block[0] != block:  # NumPy takes as long for one
            numbers = block[0] * BLOCK + np.arange(BLOCK)
            words = philox.words(self.seed, numbers, row, 0, philox.SAMPLING)
            self._block = block, philox.uniform(words[:, 0])
        return float(self._block[1][number % BLOCK])


def beyond_all_bounds(logit: float) -> ValueError:
    """Return the error of logits of which the largest, or one, is +inf or NaN."""
    return ValueError(f"O holds {logit}: expected logits below infinity")


def nothing_to_draw(q: int, never: list[int]) -> ValueError:
    """Return the error of logits that are all −inf, once those of ``never`` are."""
    return ValueError(f"of {q} tokens none may be drawn: {never} never are")
