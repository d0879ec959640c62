"""What the tests of the reference have in common."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cases import ACTIVATIONS, CASES, DTYPES, SMALL, Draw
from numpy.typing import DTypeLike, NDArray

from gpurnn import functional as F

Array = NDArray[Any]


each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


each_case = pytest.mark.parametrize("case", CASES, ids=str)


each_input = pytest.mark.parametrize("by_id", [False, True], ids=["floats", "ids"])


each_variant = pytest.mark.parametrize(
    "variant",
    [
        {"by_id": by_id, "h_0": h_0, "bias": bias}
        for by_id in (False, True)
        for h_0, bias in ((True, True), (True, False), (False, True), (False, False))
    ],
    ids=lambda v: "-".join(
        ("ids" if v["by_id"] else "floats", *(name for name in ("h_0", "bias") if v[name]))
    ),
)


PRIME = next(case for case in SMALL if case.name == "prime")


def one_hot(ids: Array, d: int, dtype: DTypeLike) -> Array:
    return (ids[..., None] == np.arange(d)).astype(dtype)


def arguments_of_all(drawn: Draw) -> dict[str, Array]:
    """Name what the OPERATIONS take: the draw, targets in [0, h) and factors xi."""
    arrays = dict(vars(drawn))
    rng = np.random.default_rng(drawn.dH.shape)
    arrays["targets"] = rng.integers(0, len(drawn.W_hh), drawn.ids.shape)
    arrays["xi"] = rng.uniform(0.5, 1.5, len(drawn.dH)).astype(np.float32).astype(drawn.dH.dtype)
    return arrays


def run_hidden_layer(a: dict[str, Array], activation: str) -> dict[str, Array | None]:
    H, residuals = F.hidden_layer(a["X"], a["W_xh"], a["b_h"], activation=activation)
    dX, dW_xh, db_h = F.hidden_layer_backward(a["dH"], residuals)
    return {"H": H, "dX": dX, "dW_xh": dW_xh, "db_h": db_h}


def run_linear(a: dict[str, Array], _: str) -> dict[str, Array | None]:
    O = F.linear(a["X"], a["W_xh"], a["b_h"])
    dX, dW, db = F.linear_backward(a["dH"], a["X"], a["W_xh"])
    return {"O": O, "dX": dX, "dW": dW, "db": db}


def run_embedding(a: dict[str, Array], _: str) -> dict[str, Array | None]:
    E = a["W_xh"]
    return {"X": F.embedding(a["ids"], E), "dE": F.embedding_backward(a["dH"], a["ids"], len(E))}


PHI: dict[str, Callable[[float], float]] = {
    "tanh": math.tanh,
    "relu": lambda z: max(z, 0.0),
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "softplus": lambda z: math.log1p(math.exp(z)),
    "identity": lambda z: z,
}


def chunks(T: int, size: int) -> Iterator[slice]:
    """Cut T steps into slices of ``size``, the last of which may be shorter."""
    return (slice(start, min(start + size, T)) for start in range(0, T, size))
