"""A language model's files and parameters, and what is refused."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_model_setup import Array, each_dtype, each_variant, language, some_ids, some_text
from tolerance import assert_same_bits

from gpurnn import (
    CheckpointError,
    LanguageModel,
    Tokenizer,
    Vocabulary,
    checkpoint,
)
from gpurnn.validate import NonFiniteError


def bits_of(model: LanguageModel) -> dict[str, bytes]:
    return {name: p.tobytes() for name, p in model.params.items()}


# Files and parameters


@each_dtype
@each_variant
def test_a_file_brings_back_the_same_bits(
    variant: dict[str, Any], dtype: type, tmp_path: Path
) -> None:
    model = language(dtype=dtype, **variant)
    model.save(tmp_path / "model.safetensors")
    loaded = LanguageModel.load(tmp_path / "model.safetensors")
    assert loaded.config() == model.config()
    assert bits_of(loaded) == bits_of(model)
    assert loaded.vocabulary == model.vocabulary and loaded.tokenizer == model.tokenizer
    assert (loaded.dropout, loaded.about) == (model.dropout, {})
    X = some_ids(model, (6, 2))
    for a, b in zip(loaded.forward(X), model.forward(X), strict=True):
        assert_same_bits("O or state", a, b)
    (loss, gradients, _), (loss_loaded, gradients_loaded, _) = (
        m.loss_and_gradients(X, X, noise=(1, 2)) for m in (model, loaded)
    )
    assert loss_loaded == loss
    for name, gradient in gradients.items():
        assert_same_bits(name, gradients_loaded[name], gradient)
    assert loaded.evaluate(some_text(30)) == model.evaluate(some_text(30))
    assert loaded.generate("ab", 20, seed=0) == model.generate("ab", 20, seed=0)
    for p in loaded.params.values():
        p += 1  # its own, and writable: training goes on from here
    assert bits_of(loaded) != bits_of(model)


def test_a_file_brings_back_tokenizer_reserved_tokens_and_origin(tmp_path: Path) -> None:
    vocabulary = Vocabulary(["té", "a.", "a."], reserved=["<bos>"])
    model = LanguageModel(vocabulary, Tokenizer("word", "raw"), hidden_size=3)
    about = {"corpus": "none", "nested": {"epoch": 3, "losses": [1.5, None]}}
    model.save(tmp_path / "model", about=about)
    loaded = LanguageModel.load(tmp_path / "model")
    assert loaded.about == about
    assert loaded.tokenizer == Tokenizer("word", "raw")
    assert loaded.vocabulary.tokens == ("<unk>", "<bos>", "a.", "té")
    assert loaded.vocabulary.reserved_ids == (0, 1)


def test_other_parameters_can_be_saved_in_place_of_the_current_ones(tmp_path: Path) -> None:
    model, best = language(), {name: p + 1 for name, p in language().params.items()}
    before = bits_of(model)
    model.save(tmp_path / "model", params=best)
    assert bits_of(model) == before
    for name, p in LanguageModel.load(tmp_path / "model").params.items():
        assert_same_bits(name, p, best[name])


def test_sizes_that_are_numpy_integers_are_saved_like_others(tmp_path: Path) -> None:
    sizes = {"hidden_size": np.int64(4), "num_layers": np.int32(2), "embedding_size": np.int64(3)}
    model = language(**sizes)
    model.save(tmp_path / "model")
    assert LanguageModel.load(tmp_path / "model").config() == model.config()


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda arrays, config: arrays.pop("W_hh"), "parameters"),
        (lambda arrays, config: arrays.update(W_hh=np.zeros((6, 5))), "W_hh has shape (6, 5)"),
        (lambda arrays, config: arrays["b_q"].fill(np.nan), "b_q holds nan"),
        (lambda arrays, config: config.pop("tokens"), "tokens"),
        (lambda arrays, config: config.update(hidden_size=0), "hidden_size is 0"),
        (lambda arrays, config: config.update(colour="red"), "colour"),
        (lambda arrays, config: config.update(tokenizer={"unit": "char"}), "tokenizer"),
        (lambda arrays, config: config.update(tokens=["a"]), "<unk>"),
        (lambda arrays, config: config.update(dtype="float32"), "dtype float64"),
    ],
    ids=["names", "shape", "nan", "no-tokens", "size", "setting", "tokenizer", "tokens", "dtype"],
)
def test_a_file_that_holds_no_model_is_refused(
    break_it: Callable[[dict[str, Array], dict[str, Any]], Any], why: str, tmp_path: Path
) -> None:
    model = language()
    arrays = {name: p.copy() for name, p in model.params.items()}
    config = model.config()
    break_it(arrays, config)
    path = tmp_path / "model"
    checkpoint.write(path, checkpoint.Contents("model", arrays, {"model": config, "about": {}}))
    with pytest.raises(CheckpointError, match=re.escape(why)) as caught:
        LanguageModel.load(path)
    assert str(caught.value).startswith(f"{path} holds no usable model: ")


def test_parameters_are_copied_in() -> None:
    model, other = language(), language(seed=8)
    arrays = dict(model.params)
    source = {name: p.copy() for name, p in other.params.items()}
    model.load_params(source)
    assert bits_of(model) == bits_of(other)
    for p in source.values():
        p += 1
    assert bits_of(model) == bits_of(other)
    assert all(model.params[name] is p for name, p in arrays.items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: p.pop("b_q"), ValueError, "parameters ['W_hh', 'W_hq', 'W_xh', 'b_h']: expect"),
        (lambda p: p.update(E=np.zeros((6, 6))), ValueError, "parameters ['E', 'W_hh', 'W_hq', "),
        (
            lambda p: p.update(W_hq=p["W_hq"].T.copy()),
            ValueError,
            "W_hq has shape (7, 6): expected W_hq's shape = (6, 7)",
        ),
        (lambda p: p.update(b_q=p["b_q"][None]), ValueError, "b_q has shape (1, 7)"),
        (
            lambda p: p.update(b_q=p["b_q"].astype(np.float32)),
            TypeError,
            "b_q has dtype float32 but b_q has float64",
        ),
        (lambda p: p.update(b_q=p["b_q"].tolist()), TypeError, "b_q is a builtins.list"),
        (lambda p: p["b_q"].put(2, np.nan), NonFiniteError, "b_q holds nan at index (2,)"),
        (lambda p: p["W_xh"].put(8, -np.inf), NonFiniteError, "W_xh holds -inf at index (1, 2)"),
    ],
    ids=["missing", "extra", "transposed", "axes", "dtype", "list", "nan", "infinity"],
)
def test_parameters_that_do_not_fit_are_refused_and_leave_the_model_untouched(
    change: Callable[[dict[str, Any]], Any], error: type[Exception], message: str
) -> None:
    model = language("abcdef")
    before = bits_of(model)
    params = {name: p + 1 for name, p in model.params.items()}
    change(params)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        model.load_params(params)
    assert bits_of(model) == before


# What is refused


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size is 0: expected at least 1"),
        ({"num_layers": True}, TypeError, "num_layers is True: expected an integer"),
        ({"embedding_size": 0}, ValueError, "embedding_size is 0: expected at least 1"),
        ({"embedding_size": 1.5}, TypeError, "embedding_size is 1.5: expected an integer"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu': expected one of tanh"),
        ({"init": "xavier"}, ValueError, "init is 'xavier': expected one of uniform, normal"),
        ({"dtype": np.float16}, TypeError, "dtype is float16: expected float32 or float64"),
        (
            {"dtype": np.float16, "embedding_size": 3},
            TypeError,
            "dtype is float16: expected float32 or float64",
        ),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0: expected a probability in [0, 1)"),
        ({"dropout": -0.1}, ValueError, "dropout is -0.1: expected a probability in [0, 1)"),
        ({"dropout": math.nan}, ValueError, "dropout is nan: expected a probability in [0, 1)"),
        ({"dropout": True}, TypeError, "dropout is True: expected a probability in [0, 1)"),
        ({"seed": -1}, ValueError, "seed is -1: expected at least 0"),
        ({"vocabulary": "ab"}, TypeError, "vocabulary is 'ab': expected a gpurnn.Vocabulary"),
    ],
    ids=[
        "hidden_size",
        "num_layers",
        "embedding_size-0",
        "embedding_size-float",
        "activation",
        "init",
        "float16",
        "float16-embedding",
        "dropout-1",
        "dropout-negative",
        "dropout-nan",
        "dropout-bool",
        "seed",
        "vocabulary",
    ],
)
def test_options_are_refused(option: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        LanguageModel(**{"vocabulary": Vocabulary("ab"), **option})


@each_variant
def test_ids_and_states_are_refused(variant: dict[str, Any]) -> None:
    model = language(**variant)
    for bad in (-1, 6):
        X = np.array([[0, 1], [2, bad]])
        with pytest.raises(ValueError, match=re.escape(f"holds the id {bad} at index (1, 1)")):
            model.forward(X)
        with pytest.raises(ValueError, match=re.escape(f"holds the id {bad} at index (1, 1)")):
            model.loss_and_gradients(np.zeros((2, 2), int), X)
    X = some_ids(model, (3, 2))
    with pytest.raises(ValueError, match=re.escape("h_0 has shape")):
        model.forward(X, model.init_state(3))
    with pytest.raises(ValueError, match=re.escape("targets has shape (2, 2)")):
        model.loss_and_gradients(X, X[1:])
    with pytest.raises(TypeError, match="dtype float64: expected"):
        model.loss_and_gradients(X, X * 1.0)
