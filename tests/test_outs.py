"""Gradients written where the caller wants them."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tolerance import assert_same_bits

import gpurnn
from gpurnn import functional as F

Array = NDArray[Any]

everywhere = pytest.mark.parametrize("emulated", [False, True], ids=["numpy", "kernels"])


def context(emulated: bool) -> Any:
    return gpurnn.emulated() if emulated else nullcontext()


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def wanted(*shapes: tuple[int, ...]) -> tuple[Array, ...]:
    return tuple(np.full(shape, np.nan, np.float32) for shape in shapes)


def assert_written(found: Any, out: Any, expected: Any) -> None:
    for one, array, value in zip(found, out, expected, strict=True):
        assert np.shares_memory(one, array)
        assert_same_bits("out", array, value)


@everywhere
@pytest.mark.parametrize("ids", [False, True], ids=["vectors", "ids"])
@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("T", [3, 0])
def test_gradients_of_the_recurrence(emulated: bool, ids: bool, every: int | None, T: int) -> None:
    n, d, h = 2, 4, 3
    X = np.arange(T * n).reshape(T, n) % d if ids else draw(T, n, d)
    with context(emulated):
        H, residuals = F.rnn_forward(
            X, None, draw(d, h), draw(h, h), draw(h), checkpoint_every=every
        )
        expected = F.rnn_backward(np.ones_like(H), residuals)
        out = wanted((d, h), (h, h), (h,))
        found = F.rnn_backward(np.ones_like(H), residuals, out=out)
    assert_written(found[2:], out, expected[2:])
    assert_same_bits("dh_0", found[1], expected[1])


@everywhere
@pytest.mark.parametrize("rows", [4, 0])
def test_gradients_of_the_output_layer_and_of_an_embedding(emulated: bool, rows: int) -> None:
    dO, H, W_hq = draw(rows, 5), draw(rows, 3), draw(3, 5)
    ids = np.arange(rows) % 3
    with context(emulated):
        expected = F.linear_backward(dO, H, W_hq)
        out = wanted((3, 5), (5,))
        found = F.linear_backward(dO, H, W_hq, out=out)
        dE = F.embedding_backward(dO, ids, 3)
        (into,) = wanted((3, 5))
        found_dE = F.embedding_backward(dO, ids, 3, out=into)
    assert_written(found[1:], out, expected[1:])
    assert_written((found_dE,), (into,), (dE,))


def test_one_of_them_may_be_left_to_be_made() -> None:
    (dW_hq,) = wanted((3, 5))
    found = F.linear_backward(draw(4, 5), draw(4, 3), draw(3, 5), out=(dW_hq, None))
    assert found[1] is dW_hq
    assert np.isfinite(found[2]).all()


@everywhere
@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (3, TypeError, r"out is 3: expected None or \(dW_hq, db_q\)"),
        ((None,), ValueError, r"out has 1 entries: expected None or \(dW_hq, db_q\)"),
        (
            (np.zeros((3, 4), np.float32), None),
            ValueError,
            r"out of dW_hq has shape \(3, 4\): expected dW_hq's shape = \(3, 5\)",
        ),
        (
            (None, np.zeros(5)),
            TypeError,
            r"out of db_q has dtype float64 but db_q has float32: expected one dtype for all",
        ),
        (
            (np.zeros((5, 3), np.float32).T, None),
            ValueError,
            "out of dW_hq is not C-contiguous",
        ),
    ],
)
def test_what_cannot_be_written_to_is_refused(
    emulated: bool, out: Any, error: type[Exception], message: str
) -> None:
    with context(emulated), pytest.raises(error, match=message):
        F.linear_backward(draw(4, 5), draw(4, 3), draw(3, 5), out=out)
