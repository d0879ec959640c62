"""A multilayer perceptron as a language model: a hidden layer, and no hidden state.

The tokens before the next one, ``context`` of them, are all it can ever see: with context 1 it is a
first-order Markov model in another form (*Dive into Deep Learning* 9.4.1; Bengio et al., 2003).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpurnn import functional as F
from gpurnn import validate
from gpurnn.activation import Activation
from gpurnn.rnn import Initialisation, draw_weights

__all__ = ["MLPModel"]

Floats = NDArray[Any]
Ids = NDArray[Any]


class MLPModel:
    """p(x_{t+1} | x_t, …, x_{t−context+1}) = softmax(φ(X_t W_xh + b_h) W_hq + b_q).

    X_t joins the embeddings of the last ``context`` tokens, the oldest first; where the sequence
    has not begun, an embedding of its own stands for "nothing yet". ``tanh`` by default.

    Attributes:
        params: E (|V| + 1, e), W_xh (context·e, h), b_h (h,), W_hq (h, |V|), b_q (|V|,).

    Raises:
        TypeError, ValueError: a size below 1, an unknown activation or dtype.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int = 1,
        *,
        embedding_size: int = 16,
        hidden_size: int = 64,
        activation: str | Activation = "tanh",
        dtype: DTypeLike = np.float32,
        init: Initialisation = "uniform",
        seed: int | np.random.Generator = 0,
    ) -> None:
        self.vocab_size = validate.positive("vocab_size", vocab_size)
        self.context = validate.positive("context", context)
        e = validate.positive("embedding_size", embedding_size)
        h = validate.positive("hidden_size", hidden_size)
        self.activation = validate.activation_or_name(activation)
        self.dtype = validate.dtype("dtype", dtype)
        rng = validate.generator("seed", seed)
        fans: dict[str, tuple[int, tuple[int, ...]]] = {
            "E": (e, (vocab_size + 1, e)),
            "W_xh": (context * e, (context * e, h)),
            "b_h": (context * e, (h,)),
            "W_hq": (h, (h, vocab_size)),
            "b_q": (h, (vocab_size,)),
        }
        self._params = {
            name: draw_weights(init, fan, shape, self.dtype, rng)
            for name, (fan, shape) in fans.items()
        }

    @property
    def params(self) -> Mapping[str, Floats]:
        """The parameters by name; change them in place."""
        return MappingProxyType(self._params)

    def __call__(self, X: Ids) -> Floats:
        """Return O (T, n, |V|) for the ids X (T, n); O_t sees X_{t−context+1}, …, X_t."""
        return self._forward(X)[0]

    def loss_and_gradients(self, X: Ids, Y: Ids) -> tuple[float, dict[str, Floats]]:
        """Mean cross-entropy of the targets Y (T, n) given X (T, n), and its gradients."""
        p = self._params
        O, contexts, residuals = self._forward(X)
        loss, dO = F.cross_entropy(O, Y)
        dH, dW_hq, db_q = F.linear_backward(dO, residuals.H, p["W_hq"])
        dX, dW_xh, db_h = F.hidden_layer_backward(dH, residuals)
        assert db_h is not None
        dE = F.embedding_backward(
            dX.reshape(*contexts.shape, p["E"].shape[1]), contexts, len(p["E"])
        )
        return loss, {"E": dE, "W_xh": dW_xh, "b_h": db_h, "W_hq": dW_hq, "b_q": db_q}

    def negative_log_likelihood(self, X: Ids, Y: Ids) -> Floats:
        """−log p of each target Y (T, n) given X (T, n), natural logarithm."""
        return F.negative_log_likelihood(self(X), Y)

    def num_parameters(self) -> int:
        """Return how many numbers ``params`` holds."""
        return sum(a.size for a in self._params.values())

    def _forward(self, X: Ids) -> tuple[Floats, Ids, F.HiddenResiduals]:
        p = self._params
        validate.axes("X", X, "(T, n)", (None, None))
        ids = validate.token_ids("X", X, self.vocab_size, "the vocabulary", axis="tokens")
        T, n = ids.shape
        nothing_yet = np.full((self.context - 1, n), self.vocab_size)
        padded = np.concatenate([nothing_yet, ids])
        contexts = np.stack([padded[j : j + T] for j in range(self.context)], axis=-1)
        joined = F.embedding(contexts, p["E"]).reshape(T, n, p["W_xh"].shape[0])
        H, residuals = F.hidden_layer(joined, p["W_xh"], p["b_h"], activation=self.activation)
        return F.linear(H, p["W_hq"], p["b_q"]), contexts, residuals
