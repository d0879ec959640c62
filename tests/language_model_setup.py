"""Small language models, and what their tests have in common."""

import math
import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpurnn import (
    LanguageModel,
    Tokenizer,
    Vocabulary,
)

Array = NDArray[Any]


ALPHABET = "abcdefghijklmnopqrstuvwxyz "


WELLS = "the time machine by h. g. wells"


# What a model can be made of, as keyword arguments.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "embedding": {"embedding_size": 3},
    "two-layers": {"num_layers": 2},
    "relu": {"activation": "relu"},
    "dropout": {"dropout": 0.4},
    "everything": {"embedding_size": 3, "num_layers": 2, "dropout": 0.4, "activation": "sigmoid"},
}


each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def language(tokens: Any = "abcde", tokenizer: Tokenizer | None = None, **options: Any) -> Any:
    """Build a small float64 model whose logits differ enough to tell tokens apart."""
    settings = {"hidden_size": 6, "dtype": np.float64, "seed": 3, **options}
    model = LanguageModel(Vocabulary(tokens), tokenizer, **settings)
    for p in model.params.values():
        p *= 2
    return model


def some_ids(model: LanguageModel, shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, len(model.vocabulary), shape)


def some_text(length: int, alphabet: str = "abcde", seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=length))


def spelled(options: dict[str, Any]) -> str:
    """Name keyword arguments in a test's id."""
    return "-".join(f"{k}={v}" for k, v in options.items()) or "default"


def set_params(model: LanguageModel, **values: Any) -> None:
    """Set these parameters, and all others to zero."""
    assert set(values) <= set(model.params)
    for name, p in model.params.items():
        p[...] = values.get(name, 0)


def minus_log_softmax(O: Array, target: int) -> float:
    """−log softmax(O)[target] of one row, with an exact sum."""
    largest = float(O.max())
    return math.log(math.fsum(math.exp(o - largest) for o in O)) + largest - float(O[target])


def alphabet_in_a_circle(certainty: float) -> LanguageModel:
    """Build a model that expects b after a, c after b, …, a after e."""
    model = language(hidden_size=6, activation="identity")
    after = np.zeros((6, 6))
    for token, following in zip("abcde", "bcdea", strict=True):
        after[model.vocabulary[token], model.vocabulary[following]] = certainty
    set_params(model, W_xh=np.eye(6), W_hq=after)
    return model
