"""A recurrent network of one or more layers: parameters, and passes over whole sequences.

Each layer is equation 9.4.5 of *Dive into Deep Learning*, H_t = φ(X_t W_xh + H_{t-1} W_hh + b_h);
a further layer takes the states of the one below as its input (section 10.3 there).
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gpurnn import functional as F
from gpurnn import validate
from gpurnn.activation import Activation
from gpurnn.cuda.arrays import beside, copied, home_of, library_of

__all__ = ["INITIALISATIONS", "RNN", "Initialisation", "draw_weights"]

Floats = NDArray[Any]
Ids = NDArray[Any]
Initialisation = Literal["uniform", "normal"]

INITIALISATIONS: tuple[Initialisation, ...] = ("uniform", "normal")


def draw_weights(
    init: Initialisation,
    fan: int,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    rng: np.random.Generator,
) -> Floats:
    """Draw one parameter: a matrix (rows, columns) or a bias (columns,).

    ``uniform``: U(−1/√fan, 1/√fan), biases too (what frameworks do; ``fan`` is the hidden size).
    ``normal``: N(0, 0.01²) with biases 0 (the book's implementation from scratch, 9.5).

    Raises:
        TypeError, ValueError: ``init`` is neither.
    """
    validate.choice("init", init, INITIALISATIONS)
    if init == "uniform":
        return (rng.uniform(-1, 1, shape) / math.sqrt(fan)).astype(dtype)
    if len(shape) == 1:
        return np.zeros(shape, dtype)
    return (0.01 * rng.standard_normal(shape)).astype(dtype)


class RNN:
    """Recurrent layers over time-major input.

    Args:
        input_size: d, the size of an input vector, or the number of token ids.
        hidden_size: h.
        num_layers: layers on top of each other.
        activation: a name or a ``gpurnn.Activation``, see ``functional.rnn_forward``.
        bias: False leaves every b_h out.
        dtype: float32 or float64.
        init: "uniform" or "normal", see ``draw_weights``.
        seed: of the initial weights, a number or a generator.

    Attributes:
        params: dict of W_xh (d, h), W_hh (h, h), b_h (h,); those of layer k ≥ 1 are named
            ``W_xh.k`` (h, h), ``W_hh.k``, ``b_h.k``. Their number does not depend on T.

    The hidden *state* is (n, h) for one layer and (num_layers, n, h) for several.

    Raises:
        TypeError, ValueError: a size below 1, an unknown activation, initialisation or dtype.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        activation: str | Activation = "tanh",
        bias: bool = True,
        dtype: DTypeLike = np.float32,
        init: Initialisation = "uniform",
        seed: int | np.random.Generator = 0,
    ) -> None:
        self.input_size = validate.positive("input_size", input_size)
        self.hidden_size = validate.positive("hidden_size", hidden_size)
        self.num_layers = validate.positive("num_layers", num_layers)
        self.activation = validate.activation_or_name(activation)
        self.dtype = validate.dtype("dtype", dtype)
        self.bias = bias
        rng = validate.generator("seed", seed)
        h = hidden_size
        self.params: dict[str, Floats] = {}
        for layer in range(num_layers):
            shapes: dict[str, tuple[int, ...]] = {
                "W_xh": (input_size if layer == 0 else h, h),
                "W_hh": (h, h),
            }
            if bias:
                shapes["b_h"] = (h,)
            for name, shape in shapes.items():
                self.params[_named(name, layer)] = draw_weights(init, h, shape, self.dtype, rng)

    def __call__(
        self,
        X: Floats | Ids,
        h_0: Floats | None = None,
        *,
        checkpoint_every: int | None = None,
    ) -> tuple[Floats, Floats]:
        """Return H (T, n, h) of the last layer and the final state; see ``forward``."""
        H, h_T, _ = self.forward(X, h_0, checkpoint_every=checkpoint_every)
        return H, h_T

    def forward(
        self,
        X: Floats | Ids,
        h_0: Floats | None = None,
        *,
        checkpoint_every: int | None = None,
        check_ids: bool = True,
    ) -> tuple[Floats, Floats, list[F.RNNResiduals]]:
        """Run a whole sequence.

        Args:
            X: (T, n, d) floats or (T, n) ids.
            h_0: the state before the first step; None is zeros.
            checkpoint_every: as in ``functional.rnn_forward``, for every layer. What a layer takes
                from the one below, that one's H, is kept whole.
            check_ids: as in ``functional.rnn_forward``.

        Returns:
            H (T, n, h) of the last layer, the final state, and the residuals for ``backward``.
        """
        initial = self._states_by_layer(h_0)
        final, residuals = [], []
        H = X
        for layer in range(self.num_layers):
            W_xh, W_hh, b_h = (self.params.get(_named(p, layer)) for p in ("W_xh", "W_hh", "b_h"))
            assert W_xh is not None and W_hh is not None
            H, r = F.rnn_forward(
                H,
                initial[layer],
                W_xh,
                W_hh,
                b_h,
                activation=self.activation,
                checkpoint_every=checkpoint_every,
                check_ids=check_ids,
            )
            residuals.append(r)
            last = H[-1] if len(H) else r.states[0]
            final.append(copied(last))  # a view would hold the whole sequence
        return H, _stacked(final), residuals

    def backward(
        self,
        dH: Floats,
        residuals: list[F.RNNResiduals],
        *,
        xi: Floats | None = None,
        out: Mapping[str, Floats] | None = None,
    ) -> tuple[Floats | None, Floats, dict[str, Floats]]:
        """Return dX (None for ids), the gradient by the initial state, and those by ``params``.

        dH is (T, n, h), by the last layer's states; ``xi`` as in ``functional.rnn_backward``, for
        every layer. ``out`` may have arrays that gradients by ``params`` are written to, by name.
        """
        grads: dict[str, Floats] = {}
        dh_0: list[Floats] = []
        dX: Floats | None = dH
        for layer in reversed(range(self.num_layers)):
            assert dX is not None  # only the first layer takes ids
            names = [_named(p, layer) for p in ("W_xh", "W_hh", "b_h")]
            outs = None if out is None else (out[names[0]], out[names[1]], out.get(names[2]))
            dX, d_initial, dW_xh, dW_hh, db_h = F.rnn_backward(
                dX, residuals[layer], xi=xi, out=outs
            )
            grads[_named("W_xh", layer)] = dW_xh
            grads[_named("W_hh", layer)] = dW_hh
            if db_h is not None:
                grads[_named("b_h", layer)] = db_h
            dh_0.append(d_initial)
        return dX, _stacked(dh_0[::-1]), grads

    def init_state(self, n: int = 1) -> Floats:
        """Return the zero state for n rows: (n, h), or (num_layers, n, h) for several layers."""
        shape: tuple[int, ...] = (validate.at_least("n", n, 0), self.hidden_size)
        if self.num_layers > 1:
            shape = (self.num_layers, *shape)
        zero: Floats = beside(np.zeros(shape, self.dtype), self.params["W_hh"])
        return zero

    def step(self, X_t: Floats | Ids, state: Floats) -> Floats:
        """One time step: X_t (n, d) floats or (n,) ids, and the state, give the next state."""
        place = validate.kernels_place(library_of(self.params["W_hh"]))
        return self.forward(validate.array("X_t", X_t, place)[None], state)[1]

    def num_parameters(self) -> int:
        """Return how many numbers ``params`` holds; it does not grow with T."""
        return sum(p.size for p in self.params.values())

    def _states_by_layer(self, h_0: Floats | None) -> list[Floats | None]:
        if h_0 is None:
            return [None] * self.num_layers
        if self.num_layers == 1:
            return [h_0]
        place = validate.kernels_place(library_of(self.params["W_hh"]))
        shape = (self.num_layers, None, self.hidden_size)
        validate.axes("h_0", h_0, "(num_layers, n, h)", shape, place)
        return list(h_0)


def _stacked(states: list[Floats]) -> Floats:
    """Return the states of all layers as one array, that of one layer as it is."""
    if len(states) == 1:
        return states[0]
    first = states[0]
    with home_of(first):
        stacked: Floats = library_of(first).empty((len(states), *first.shape), first.dtype)
        for one, state in zip(stacked, states, strict=True):
            one[...] = state
    return stacked


def _named(parameter: str, layer: int) -> str:
    return parameter if layer == 0 else f"{parameter}.{layer}"
