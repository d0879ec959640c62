"""What the public operations refuse: by exact message, and without touching an argument.

Also that they may be called from several threads at once.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
from cases import ACTIVATIONS, DTYPES, Case, draw
from numpy.typing import DTypeLike, NDArray

from gpurnn import functional as F
from gpurnn import reference

Array = NDArray[Any]

T, N, D, H_SIZE, Q = 2, 3, 4, 5, 6
NAMES = ("X", "h_0", "W_xh", "W_hh", "b_h")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def rnn_arguments(dtype: DTypeLike = np.float64, **replaced: object) -> list[Any]:
    """Good arguments of ``rnn_forward``, but for those replaced."""
    drawn = draw(Case("errors", T, N, D, H_SIZE), dtype=dtype)
    return [replaced.get(name, getattr(drawn, name)) for name in NAMES]


def numbers(*shape: int, dtype: DTypeLike = np.float64) -> Array:
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


def arrays_in(*values: object) -> list[Array]:
    """Every array among the values, and in the residuals among them."""
    found = []
    for value in values:
        if isinstance(value, np.ndarray):
            found.append(np.asarray(value))
        elif is_dataclass(value):
            found += arrays_in(*(getattr(value, field.name) for field in fields(value)))
    return found


def assert_refuses(
    error: type[Exception],
    message: str,
    function: Callable[..., object],
    *arguments: object,
    **keywords: object,
) -> None:
    """Require exactly this message, and every byte of the arguments as it was."""
    arrays = arrays_in(*arguments, *keywords.values())
    before = [a.tobytes() for a in arrays]
    with pytest.raises(error) as caught:
        function(*arguments, **keywords)
    assert str(caught.value) == message
    assert [a.tobytes() for a in arrays] == before, "an argument was written"


class FakeGPUArray:
    """What CuPy, PyTorch and Numba show of an array on a GPU."""

    __cuda_array_interface__ = {  # noqa: RUF012
        "shape": (T, N, D),
        "typestr": "<f8",
        "data": (0, False),
        "version": 3,
    }


GPU_KIND = f"{FakeGPUArray.__module__}.{FakeGPUArray.__qualname__}"
ON_A_GPU = f"is a {GPU_KIND} on a GPU: expected a numpy.ndarray here; copy it to the host first"


def on_a_gpu_but(other: str) -> str:
    return (
        f"is a {GPU_KIND} on a GPU but {other} is a numpy.ndarray: expected all arrays on one GPU, "
        "or each a numpy.ndarray"
    )


MASKED = "is a masked array, whose mask would be lost: pass .filled(…)"

SWAPPED = np.dtype(np.float64).newbyteorder("S")
BAD_FLOAT_DTYPES = [np.float16, np.complex64, np.complex128, np.bool_, object, SWAPPED, "U3"]


# ---------------------------------------------------------------------------------------
# rnn_forward
# ---------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("h_0", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_arguments_these_tests_spoil_are_good(bias: bool, h_0: bool, dtype: type) -> None:
    none = ({} if h_0 else {"h_0": None}) | ({} if bias else {"b_h": None})
    H, residuals = F.rnn_forward(*rnn_arguments(dtype, **none))
    assert (H.shape, H.dtype) == ((T, N, H_SIZE), dtype)
    F.rnn_backward(np.ones_like(H), residuals, xi=np.ones(T, dtype))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("X", (), "X has shape (), 0 axes: expected (T, n, d) floats or (T, n) ids, 3 axes"),
        (
            "X",
            (2, 3),
            "X has shape (2, 3), 2 axes: expected (T, n, d) floats or (T, n) ids, 3 axes",
        ),
        (
            "X",
            (2, 3, 4, 1),
            "X has shape (2, 3, 4, 1), 4 axes: expected (T, n, d) floats or (T, n) ids, 3 axes",
        ),
        ("X", (2, 3, 5), "X has shape (2, 3, 5): expected (T, n, d) = (2, 3, 4)"),
        ("X", (2, 1, 4), "h_0 has shape (3, 5): expected (n, h) = (1, 5)"),
        ("h_0", (5,), "h_0 has shape (5,), 1 axes: expected (n, h), 2 axes"),
        ("h_0", (1, 3, 5), "h_0 has shape (1, 3, 5), 3 axes: expected (n, h), 2 axes"),
        ("h_0", (1, 5), "h_0 has shape (1, 5): expected (n, h) = (3, 5)"),
        ("h_0", (5, 3), "h_0 has shape (5, 3): expected (n, h) = (3, 5)"),
        ("W_xh", (5,), "W_xh has shape (5,), 1 axes: expected (d, h), 2 axes"),
        ("W_xh", (5, 4), "W_xh has shape (5, 4): expected (d, h) = (5, 5)"),
        ("W_xh", (3, 5), "X has shape (2, 3, 4): expected (T, n, d) = (2, 3, 3)"),
        ("W_hh", (25,), "W_hh has shape (25,), 1 axes: expected (h, h), 2 axes"),
        ("W_hh", (5, 6), "W_hh has shape (5, 6): expected (h, h) = (5, 5)"),
        ("W_hh", (6, 5), "W_hh has shape (6, 5): expected (h, h) = (6, 6)"),
        ("W_hh", (6, 6), "W_xh has shape (4, 5): expected (d, h) = (4, 6)"),
        ("b_h", (), "b_h has shape (), 0 axes: expected (h,), 1 axes"),
        ("b_h", (1, 5), "b_h has shape (1, 5), 2 axes: expected (h,), 1 axes"),
        ("b_h", (1,), "b_h has shape (1,): expected (h,) = (5,)"),
        ("b_h", (4,), "b_h has shape (4,): expected (h,) = (5,)"),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    spoilt = rnn_arguments(**{name: np.array(numbers(*shape))})
    assert_refuses(ValueError, message, F.rnn_forward, *spoilt)


def test_integers_are_ids_and_need_two_axes() -> None:
    for shape in ((T,), (T, N, D)):
        message = (
            f"X has shape {shape}, {len(shape)} axes: "
            "expected (T, n) ids or (T, n, d) floats, 2 axes"
        )
        assert_refuses(ValueError, message, F.rnn_forward, *rnn_arguments(X=np.zeros(shape, int)))


@pytest.mark.parametrize("dtype", BAD_FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_other_than_float32_and_float64(name: str, dtype: DTypeLike) -> None:
    good = rnn_arguments()[NAMES.index(name)]
    spoilt = rnn_arguments(**{name: good.astype(dtype)})
    message = f"{name} has dtype {np.dtype(dtype)}: expected float32 or float64"
    assert_refuses(TypeError, message, F.rnn_forward, *spoilt)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8], ids=str)
@pytest.mark.parametrize("name", NAMES[1:])
def test_integer_weights_and_states(name: str, dtype: DTypeLike) -> None:
    good = rnn_arguments()[NAMES.index(name)]
    spoilt = rnn_arguments(**{name: good.astype(dtype)})
    message = f"{name} has dtype {np.dtype(dtype)}: expected float32 or float64"
    assert_refuses(TypeError, message, F.rnn_forward, *spoilt)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes(name: str) -> None:
    good = rnn_arguments()[NAMES.index(name)]
    spoilt = rnn_arguments(**{name: good.astype(np.float32)})
    if name == "W_hh":
        message = "W_xh has dtype float64 but W_hh has float32: expected one dtype for all"
    else:
        message = f"{name} has dtype float32 but W_hh has float64: expected one dtype for all"
    assert_refuses(TypeError, message, F.rnn_forward, *spoilt)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (np.ndarray.tolist, "is a builtins.list: expected a numpy.ndarray"),
        (lambda a: tuple(a.tolist()), "is a builtins.tuple: expected a numpy.ndarray"),
        (lambda a: 0.5, "is a builtins.float: expected a numpy.ndarray"),
        (lambda a: a.flat[0], "is a numpy.float64: expected a numpy.ndarray"),
        (memoryview, "is a builtins.memoryview: expected a numpy.ndarray"),
        (np.ma.masked_array, MASKED),
        (lambda a: np.ma.masked_less(a, 0), MASKED),
    ],
    ids=["list", "tuple", "number", "scalar", "memoryview", "unmasked", "masked"],
)
@pytest.mark.parametrize("name", NAMES)
def test_anything_but_a_plain_array(
    name: str, convert: Callable[[Array], object], message: str
) -> None:
    good = rnn_arguments()[NAMES.index(name)]
    spoilt = rnn_arguments(**{name: convert(good)})
    assert_refuses(TypeError, f"{name} {message}", F.rnn_forward, *spoilt)


@pytest.mark.parametrize("name", NAMES)
def test_one_array_on_a_gpu(name: str) -> None:
    spoilt = rnn_arguments(**{name: FakeGPUArray()})
    other = "h_0" if name == "X" else "X"
    assert_refuses(TypeError, f"{name} {on_a_gpu_but(other)}", F.rnn_forward, *spoilt)


@pytest.mark.parametrize("name", ["X", "W_xh", "W_hh"])
def test_none_where_nothing_may_be_missing(name: str) -> None:
    message = f"{name} is a builtins.NoneType: expected a numpy.ndarray"
    assert_refuses(TypeError, message, F.rnn_forward, *rnn_arguments(**{name: None}))


ACTIVATION_NAMES = (
    "tanh, relu, sigmoid, softplus, identity, fast_tanh, fast_sigmoid or a gpurnn.Activation"
)


@pytest.mark.parametrize("name", ["", "Tanh", "gelu", "tanh "])
def test_unknown_activations(name: str) -> None:
    message = f"activation is {name!r}: expected one of {ACTIVATION_NAMES}"
    assert_refuses(ValueError, message, F.rnn_forward, *rnn_arguments(), activation=name)
    X, _, W_xh, _, b_h = rnn_arguments()
    assert_refuses(ValueError, message, F.hidden_layer, X, W_xh, b_h, activation=name)


@pytest.mark.parametrize("name", [None, 0, ["tanh"], b"tanh"], ids=repr)
def test_activations_that_are_no_string(name: object) -> None:
    message = f"activation is {name!r}: expected one of {ACTIVATION_NAMES}"
    assert_refuses(TypeError, message, F.rnn_forward, *rnn_arguments(), activation=name)
    X, _, W_xh, _, b_h = rnn_arguments()
    assert_refuses(TypeError, message, F.hidden_layer, X, W_xh, b_h, activation=name)


# ---------------------------------------------------------------------------------------
# Ids, wherever they are taken
# ---------------------------------------------------------------------------------------

TAKING_IDS: dict[str, tuple[str, str, Callable[..., object], Callable[[Any], list[Any]]]] = {
    # What the ids are called, what they index, and the call that takes ids (T, N) in [0, D).
    "rnn_forward": ("X", "W_xh has 4 rows", F.rnn_forward, lambda ids: rnn_arguments(X=ids)),
    "embedding": ("ids", "E has 4 rows", F.embedding, lambda ids: [ids, numbers(D, 2)]),
    "embedding_backward": (
        "ids",
        "dE has 4 rows",
        F.embedding_backward,
        lambda ids: [numbers(T, N, 2), ids, D],
    ),
    "cross_entropy": (
        "targets",
        "O has 4 columns",
        F.cross_entropy,
        lambda ids: [numbers(T, N, D), ids],
    ),
    "negative_log_likelihood": (
        "targets",
        "O has 4 columns",
        F.negative_log_likelihood,
        lambda ids: [numbers(T, N, D), ids],
    ),
}
BESIDE = {"rnn_forward": "h_0", "embedding": "E", "embedding_backward": "dX"}
"""Of those that take arrays on a GPU as well: what lies on the host where the ids do not."""

each_taker = pytest.mark.parametrize("taker", TAKING_IDS)


@each_taker
def test_ids_at_both_ends_of_the_range_are_good(taker: str) -> None:
    _, _, function, arguments = TAKING_IDS[taker]
    function(*arguments(np.array([[0, 1, 2], [3, 3, 0]])))


@each_taker
@pytest.mark.parametrize(
    ("ids", "dtype", "bad", "where"),
    [
        ([[0, 1, 2], [3, 0, 4]], int, 4, (1, 2)),
        ([[0, 4, 2], [4, 0, 0]], np.int32, 4, (0, 1)),
        ([[0, 4, 2], [9, 0, 0]], np.uint8, 9, (1, 0)),
        ([[0, 1, -1], [3, 0, 0]], int, -1, (0, 2)),
        ([[0, 9, -1], [3, -2, 0]], np.int8, -2, (1, 1)),
        ([[0, 2**64 - 1, 0], [3, 0, 0]], np.uint64, 2**64 - 1, (0, 1)),
        ([[-(2**63), 0, 0], [3, 0, 0]], np.int64, -(2**63), (0, 0)),
    ],
    ids=["last", "first-of-two", "highest", "negative", "lowest", "uint64", "int64"],
)
def test_ids_out_of_range_say_which_and_where(
    taker: str, ids: list[list[int]], dtype: DTypeLike, bad: int, where: tuple[int, int]
) -> None:
    name, owner, function, arguments = TAKING_IDS[taker]
    message = f"{name} holds the id {bad} at index {where}: {owner}, so ids must lie in [0, 4)"
    assert_refuses(ValueError, message, function, *arguments(np.array(ids, dtype)))


@each_taker
@pytest.mark.parametrize("dtype", [np.bool_, np.float64, np.complex64, object, "U1"], ids=str)
def test_ids_of_another_kind(taker: str, dtype: DTypeLike) -> None:
    name, _, function, arguments = TAKING_IDS[taker]
    ids = np.array([[0, 1, 1], [1, 0, 0]]).astype(dtype)
    error: type[Exception] = TypeError
    message = f"{name} has dtype {ids.dtype}: expected integer token ids"
    if taker == "rnn_forward" and dtype is np.float64:  # floats of one axis too few
        error = ValueError
        message = "X has shape (2, 3), 2 axes: expected (T, n, d) floats or (T, n) ids, 3 axes"
    elif taker == "rnn_forward":
        message = f"X has dtype {ids.dtype}: expected float32 or float64"
    assert_refuses(error, message, function, *arguments(ids))


@each_taker
def test_ids_that_are_no_array(taker: str) -> None:
    name, _, function, arguments = TAKING_IDS[taker]
    ids = np.array([[0, 1, 2], [3, 3, 0]])
    for spoilt, message in (
        (ids.tolist(), "is a builtins.list: expected a numpy.ndarray"),
        (np.ma.masked_equal(ids, 3), MASKED),
        (FakeGPUArray(), on_a_gpu_but(BESIDE.get(taker, "O"))),
    ):
        assert_refuses(TypeError, f"{name} {message}", function, *arguments(spoilt))


# ---------------------------------------------------------------------------------------
# NaN and infinity
# ---------------------------------------------------------------------------------------


def not_finite(name: str, a: Array, where: tuple[int, ...], count: int = 1) -> str:
    return (
        f"{name} holds {a[where]} at index {where} ({count} of its {a.size} values "
        "are not finite): expected finite values"
    )


@each_dtype
@each_activation
@pytest.mark.parametrize("name", NAMES)
def test_a_nan_anywhere_in_the_arguments(name: str, activation: str, dtype: type) -> None:
    good = rnn_arguments(dtype)[NAMES.index(name)]
    for where in np.ndindex(good.shape):
        bad = good.copy()
        bad[where] = np.nan
        spoilt = rnn_arguments(dtype, **{name: bad})
        message = not_finite(name, bad, where)
        assert_refuses(ValueError, message, F.rnn_forward, *spoilt, activation=activation)


@each_activation
def test_a_nan_that_meets_only_zeros(activation: str) -> None:
    # 0 · NaN is NaN, though a product that skips zeros would lose it.
    for name in NAMES:
        zeros = {other: np.zeros_like(a) for other, a in zip(NAMES, rnn_arguments(), strict=True)}
        zeros[name].flat[0] = np.nan
        message = not_finite(name, zeros[name], (0,) * zeros[name].ndim)
        assert_refuses(ValueError, message, F.rnn_forward, *zeros.values(), activation=activation)


@each_dtype
@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_an_infinity_that_nothing_saturates(name: str, infinity: float, dtype: type) -> None:
    good = rnn_arguments(dtype)[NAMES.index(name)]
    for where in np.ndindex(good.shape):
        bad = good.copy()
        bad[where] = infinity
        spoilt = rnn_arguments(dtype, **{name: bad})
        message = not_finite(name, bad, where)
        assert_refuses(ValueError, message, F.rnn_forward, *spoilt, activation="identity")


def test_a_nan_in_a_row_that_ids_select() -> None:
    W_xh = numbers(D, H_SIZE)
    W_xh[2, 1] = np.nan
    spoilt = rnn_arguments(X=np.array([[0, 1, 2], [3, 0, 0]]), W_xh=W_xh)
    assert_refuses(ValueError, not_finite("W_xh", W_xh, (2, 1)), F.rnn_forward, *spoilt)


def test_the_first_of_several_bad_arguments_and_values_is_named() -> None:
    X, _, _, W_hh, _ = rnn_arguments()
    X[1, 1, 3], X[0, 2, 1], W_hh[0, 0] = np.nan, np.inf, np.nan
    message = not_finite("X", X, (0, 2, 1), count=2)
    assert_refuses(ValueError, message, F.rnn_forward, *rnn_arguments(X=X, W_hh=W_hh))


@each_dtype
@each_activation
def test_a_nan_anywhere_in_the_gradient(activation: str, dtype: type) -> None:
    H, residuals = F.rnn_forward(*rnn_arguments(dtype), activation=activation)
    X, _, W_xh, _, b_h = rnn_arguments(dtype)
    layer, layer_residuals = F.hidden_layer(X, W_xh, b_h, activation=activation)
    assert layer.shape == H.shape
    for where in np.ndindex(H.shape):
        dH = np.ones_like(H)
        dH[where] = np.nan
        message = not_finite("dH", dH, where)
        assert_refuses(ValueError, message, F.rnn_backward, dH, residuals)
        assert_refuses(ValueError, message, F.hidden_layer_backward, dH, layer_residuals)


@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_an_infinity_anywhere_in_the_gradient(infinity: float) -> None:
    H, residuals = F.rnn_forward(*rnn_arguments())
    for where in np.ndindex(H.shape):
        dH = np.ones_like(H)
        dH[where] = infinity
        assert_refuses(ValueError, not_finite("dH", dH, where), F.rnn_backward, dH, residuals)


@pytest.mark.parametrize("step", range(T))
def test_a_nan_in_xi(step: int) -> None:
    H, residuals = F.rnn_forward(*rnn_arguments())
    xi = np.ones(T)
    xi[step] = np.nan
    message = not_finite("xi", xi, (step,))
    assert_refuses(ValueError, message, F.rnn_backward, np.ones_like(H), residuals, xi=xi)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_in_the_layers(value: float) -> None:
    H, W, b = numbers(T, N, D), numbers(D, Q), numbers(Q)
    for name, a in (("H", H), ("W_hq", W), ("b_q", b)):
        bad = a.copy()
        bad.flat[-1] = value
        where = tuple(size - 1 for size in a.shape)
        arguments = [bad if a is x else x for x in (H, W, b)]
        message = not_finite(name, bad, where)
        assert_refuses(ValueError, message, F.linear, *arguments)
        message = not_finite({"H": "X", "W_hq": "W_xh", "b_q": "b_h"}[name], bad, where)
        assert_refuses(ValueError, message, F.hidden_layer, *arguments, activation="identity")
    dO = numbers(T, N, Q)
    dO[1, 0, 2] = value
    message = not_finite("dO", dO, (1, 0, 2))
    assert_refuses(ValueError, message, F.linear_backward, dO, H, W)


@each_dtype
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_without_a_softmax(value: float, dtype: type) -> None:
    targets = np.array([[0, 1, 2], [3, 4, 5]])
    for where in np.ndindex(T, N, Q):
        O = numbers(T, N, Q, dtype=dtype)
        O[where] = value
        message = not_finite("O", O, where)
        assert_refuses(ValueError, message, F.cross_entropy, O, targets)
        assert_refuses(ValueError, message, F.negative_log_likelihood, O, targets)


def test_a_row_of_minus_infinities_has_no_softmax() -> None:
    O = np.array([[0.0, 1.0], [-np.inf, -np.inf]])
    message = not_finite("O", O, (1, 0), count=2)
    assert_refuses(ValueError, message, F.cross_entropy, O, np.array([0, 1]))
    assert_refuses(ValueError, message, F.negative_log_likelihood, O, np.array([0, 1]))


# ---------------------------------------------------------------------------------------
# The other operations
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dH", "error", "message"),
    [
        (numbers(T, N, 4), ValueError, "dH has shape (2, 3, 4): expected H's shape = (2, 3, 5)"),
        (numbers(N, 5), ValueError, "dH has shape (3, 5): expected H's shape = (2, 3, 5)"),
        (numbers(1, N, 5), ValueError, "dH has shape (1, 3, 5): expected H's shape = (2, 3, 5)"),
        (
            numbers(T, N, 5, dtype=np.float32),
            TypeError,
            "dH has dtype float32 but H has float64: expected one dtype for all",
        ),
        (
            np.ones((T, N, 5), int),
            TypeError,
            "dH has dtype int64: expected float32 or float64",
        ),
        (None, TypeError, "dH is a builtins.NoneType: expected a numpy.ndarray"),
        (FakeGPUArray(), TypeError, f"dH {ON_A_GPU}"),
    ],
    ids=["h", "no-T", "T", "float32", "int", "none", "gpu"],
)
def test_gradients_that_do_not_fit_the_states(
    dH: object, error: type[Exception], message: str
) -> None:
    X, _, W_xh, _, b_h = rnn_arguments()
    _, residuals = F.rnn_forward(*rnn_arguments())
    assert_refuses(error, message, F.rnn_backward, dH, residuals)
    _, layer_residuals = F.hidden_layer(X, W_xh, b_h)
    assert_refuses(error, message, F.hidden_layer_backward, dH, layer_residuals)


@pytest.mark.parametrize(
    ("xi", "error", "message"),
    [
        (np.ones(3), ValueError, "xi has shape (3,): expected (T,) = (2,)"),
        (np.ones(1), ValueError, "xi has shape (1,): expected (T,) = (2,)"),
        (np.array(1.0), ValueError, "xi has shape (), 0 axes: expected (T,), 1 axes"),
        (np.ones((2, 1)), ValueError, "xi has shape (2, 1), 2 axes: expected (T,), 1 axes"),
        (
            np.ones(2, np.float32),
            TypeError,
            "xi has dtype float32 but H has float64: expected one dtype for all",
        ),
        (np.ones(2, bool), TypeError, "xi has dtype bool: expected float32 or float64"),
        ([1.0, 1.0], TypeError, "xi is a builtins.list: expected a numpy.ndarray"),
        (1.0, TypeError, "xi is a builtins.float: expected a numpy.ndarray"),
        (FakeGPUArray(), TypeError, f"xi {ON_A_GPU}"),
    ],
    ids=["long", "short", "scalar", "column", "float32", "bool", "list", "number", "gpu"],
)
def test_xi_that_does_not_fit(xi: object, error: type[Exception], message: str) -> None:
    H, residuals = F.rnn_forward(*rnn_arguments())
    assert_refuses(error, message, F.rnn_backward, np.ones_like(H), residuals, xi=xi)


@pytest.mark.parametrize(
    ("index", "bad", "error", "message"),
    [
        (
            0,
            np.array(1.0),
            ValueError,
            "{0} has shape (), 0 axes: expected (…, {3}), at least 1 axes",
        ),
        (0, numbers(3, 5), ValueError, "{0} has shape (3, 5): expected (…, {3}) = (3, 4)"),
        (
            0,
            numbers(3, 4, dtype=np.float32),
            TypeError,
            "{0} has dtype float32 but {1} has float64: expected one dtype for all",
        ),
        (0, [[1.0]], TypeError, "{0} is a builtins.list: expected a numpy.ndarray"),
        (1, numbers(4), ValueError, "{1} has shape (4,), 1 axes: expected ({3}, {4}), 2 axes"),
        (1, numbers(5, 6), ValueError, "{0} has shape (2, 3, 4): expected (…, {3}) = (2, 3, 5)"),
        (
            1,
            numbers(4, 6).astype(np.float16),
            TypeError,
            "{1} has dtype float16: expected float32 or float64",
        ),
        (2, numbers(5), ValueError, "{2} has shape (5,): expected ({4},) = (6,)"),
        (2, numbers(1, 6), ValueError, "{2} has shape (1, 6), 2 axes: expected ({4},), 1 axes"),
        (2, FakeGPUArray(), TypeError, f"{{2}} {on_a_gpu_but('{0}')}"),
    ],
    ids=[
        "rows-rank",
        "rows-shape",
        "rows-mixed",
        "rows-list",
        "weights-rank",
        "weights-shape",
        "weights-half",
        "bias-shape",
        "bias-rank",
        "bias-gpu",
    ],
)
def test_layers_refuse_what_does_not_fit(
    index: int, bad: object, error: type[Exception], message: str
) -> None:
    arguments: list[object] = [numbers(T, N, D), numbers(D, Q), numbers(Q)]
    arguments[index] = bad
    of_linear = message.format("H", "W_hq", "b_q", "h", "q")
    assert_refuses(error, of_linear, F.linear, *arguments)
    of_hidden = message.format("X", "W_xh", "b_h", "d", "h")
    assert_refuses(error, of_hidden, F.hidden_layer, *arguments)
    if index < 2:
        assert_refuses(error, of_linear, F.linear_backward, numbers(T, N, Q), *arguments[:2])


@pytest.mark.parametrize(
    ("dO", "error", "message"),
    [
        (numbers(2, 3, 5), ValueError, "dO has shape (2, 3, 5): expected (…, q) = (2, 3, 6)"),
        (numbers(6, 6), ValueError, "dO has shape (6, 6): expected (…, q) = (2, 3, 6)"),
        (
            numbers(2, 3, 6, dtype=np.float32),
            TypeError,
            "dO has dtype float32 but W_hq has float64: expected one dtype for all",
        ),
        (None, TypeError, "dO is a builtins.NoneType: expected a numpy.ndarray"),
    ],
    ids=["q", "flat", "float32", "none"],
)
def test_linear_backward_refuses_other_gradients(
    dO: object, error: type[Exception], message: str
) -> None:
    assert_refuses(error, message, F.linear_backward, dO, numbers(T, N, D), numbers(D, Q))


def test_embedding_refuses_tables_and_gradients_that_do_not_fit() -> None:
    ids = np.zeros((T, N), int)
    assert_refuses(
        ValueError,
        "E has shape (4,), 1 axes: expected (|V|, d), 2 axes",
        F.embedding,
        ids,
        numbers(4),
    )
    assert_refuses(
        TypeError,
        "E has dtype int64: expected float32 or float64",
        F.embedding,
        ids,
        np.ones((4, 2), np.int64),
    )
    assert_refuses(
        ValueError,
        "dX has shape (2, 3), 2 axes: expected (…, d), 3 axes",
        F.embedding_backward,
        numbers(T, N),
        ids,
        4,
    )
    assert_refuses(
        ValueError,
        "dX has shape (3, 2, 7): expected (…, d) = (2, 3, 7)",
        F.embedding_backward,
        numbers(N, T, 7),
        ids,
        4,
    )


@pytest.mark.parametrize(
    ("num_rows", "error", "message"),
    [
        (0, ValueError, "num_rows is 0: expected at least 1"),
        (-1, ValueError, "num_rows is -1: expected at least 1"),
        (4.0, TypeError, "num_rows is 4.0: expected an integer"),
        (True, TypeError, "num_rows is True: expected an integer"),
        ("4", TypeError, "num_rows is '4': expected an integer"),
        (None, TypeError, "num_rows is None: expected an integer"),
    ],
    ids=repr,
)
def test_embedding_backward_refuses_other_numbers_of_rows(
    num_rows: object, error: type[Exception], message: str
) -> None:
    ids = np.zeros((T, N), int)
    assert_refuses(error, message, F.embedding_backward, numbers(T, N, 2), ids, num_rows)


@pytest.mark.parametrize("loss", [F.cross_entropy, F.negative_log_likelihood])
@pytest.mark.parametrize(
    ("O", "targets", "error", "message"),
    [
        (
            numbers(2, 3, 6),
            np.zeros(6, int),
            ValueError,
            "targets has shape (6,): expected O's leading axes = (2, 3)",
        ),
        (
            numbers(6),
            np.zeros(1, int),
            ValueError,
            "targets has shape (1,): expected O's leading axes = ()",
        ),
        (
            np.array(1.0),
            np.array(0),
            ValueError,
            "O has shape (), 0 axes: expected (…, q), at least 1 axes",
        ),
        (
            np.ones((2, 6), int),
            np.zeros(2, int),
            TypeError,
            "O has dtype int64: expected float32 or float64",
        ),
        ([[1.0]], np.zeros(1, int), TypeError, "O is a builtins.list: expected a numpy.ndarray"),
        (FakeGPUArray(), np.zeros(1, int), TypeError, f"O {on_a_gpu_but('targets')}"),
    ],
    ids=["flat", "one-row", "scalar", "int", "list", "gpu"],
)
def test_losses_refuse_what_does_not_fit(
    O: object,
    targets: object,
    error: type[Exception],
    message: str,
    loss: Callable[..., object],
) -> None:
    assert_refuses(error, message, loss, O, targets)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_row_has_no_mean_but_an_empty_list_of_losses(shape: tuple[int, ...]) -> None:
    O, targets = numbers(*shape, 6), np.zeros(shape, int)
    message = f"targets has shape {shape}: a mean needs at least one row"
    assert_refuses(ValueError, message, F.cross_entropy, O, targets)
    assert F.negative_log_likelihood(O, targets).shape == shape


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"ignore_index": 1.0}, TypeError, "ignore_index is 1.0: expected an integer"),
        ({"ignore_index": True}, TypeError, "ignore_index is True: expected an integer"),
        ({"ignore_index": 2**31}, ValueError, f"ignore_index is {2**31}: expected less than 2³¹"),
        (
            {"ignore_index": -(2**31) - 1},
            ValueError,
            f"ignore_index is {-(2**31) - 1}: expected at least {-(2**31)}",
        ),
    ],
    ids=["float", "bool", "large", "small"],
)
def test_ids_to_ignore(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    for loss in (F.cross_entropy, F.negative_log_likelihood):
        assert_refuses(error, message, loss, numbers(T, 6), np.zeros(T, int), **keywords)


@pytest.mark.parametrize("value", [-0.1, 1.0, np.nan, np.inf, "0.1", None], ids=repr)
def test_label_smoothing_out_of_range(value: Any) -> None:
    error = TypeError if value is None or isinstance(value, str) else ValueError
    message = f"label_smoothing is {value!r}: expected a number in [0, 1)"
    arguments = numbers(T, 6), np.zeros(T, int)
    assert_refuses(error, message, F.cross_entropy, *arguments, label_smoothing=value)


@each_dtype
def test_ids_that_are_ignored_may_be_none(dtype: type) -> None:
    O = numbers(3, 4, dtype=dtype)
    for ids in (np.int64, np.int8, np.uint8):
        targets, ignored = np.array([0, 3, 100]).astype(ids), 100
        F.cross_entropy(O, targets, ignore_index=ignored)
        F.negative_log_likelihood(O, targets, ignore_index=ignored)
        message = (
            "targets holds the id 100 at index (2,): O has 4 columns, so ids must lie in [0, 4)"
        )
        for other in (None, 0, -100, 1000):
            for loss in (F.cross_entropy, F.negative_log_likelihood):
                assert_refuses(ValueError, message, loss, O, targets, ignore_index=other)


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"p": 1.0}, ValueError, "p is 1.0: expected a probability in [0, 1)"),
        ({"p": -0.5}, ValueError, "p is -0.5: expected a probability in [0, 1)"),
        ({"p": "half"}, TypeError, "p is 'half': expected a probability in [0, 1)"),
        ({"seed": -1}, ValueError, "seed is -1: expected at least 0"),
        ({"seed": 0.5}, TypeError, "seed is 0.5: expected an integer"),
        ({"update": -1}, ValueError, "update is -1: expected at least 0"),
        ({"update": None}, TypeError, "update is None: expected an integer"),
        ({"update": 1.0}, TypeError, "update is 1.0: expected an integer"),
        (
            {"update": np.zeros(1, np.int32)},
            TypeError,
            "update has dtype int32: expected int64, or an integer",
        ),
        (
            {"update": np.zeros(2, np.int64)},
            ValueError,
            "update has shape (2,): expected one number, (1,)",
        ),
        ({"H": [1.0]}, TypeError, "H is a builtins.list: expected a numpy.ndarray"),
        (
            {"H": np.ones(3, np.float16)},
            TypeError,
            "H has dtype float16: expected float32 or float64",
        ),
        ({"update": FakeGPUArray()}, TypeError, f"update {on_a_gpu_but('H')}"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_dropout_refuses_what_does_not_fit(
    replaced: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"H": numbers(T, 3), "p": 0.5, "seed": 1, "update": 2} | replaced
    H, p = arguments.pop("H"), arguments.pop("p")
    assert_refuses(error, message, F.dropout, H, p, **arguments)


def test_dropout_of_values_that_are_not_finite() -> None:
    H = np.full(64, np.nan)
    message = not_finite("H", H, (0,), count=64)
    assert_refuses(ValueError, message, F.dropout, H, 0.5, seed=0, update=0)


# ---------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------


class YieldingNumPy:
    """NumPy, except that every product lets the other threads run before it returns."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def matmul(self, *args: Any, **kwargs: Any) -> Array:
        product = np.matmul(*args, **kwargs)
        time.sleep(1e-5)
        return product


@pytest.mark.parametrize("by_id", [False, True], ids=["floats", "ids"])
@each_activation
def test_four_threads_at_once_get_the_bits_of_one(
    activation: str, by_id: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, repeats = Case("threads", T=12, n=9, d=17, h=33), 4
    draws = [draw(case, seed) for seed in range(4)]

    def run(seed: int) -> list[bytes]:
        drawn = draws[seed]
        H, residuals = F.rnn_forward(*drawn.arguments(by_id=by_id), activation=activation)
        gradients = F.rnn_backward(drawn.dH, residuals)
        return [a.tobytes() for a in (H, *gradients) if a is not None]

    expected = [run(seed) for seed in range(4)]
    assert len({results[0] for results in expected}) == 4
    monkeypatch.setattr(reference, "np", YieldingNumPy())
    start = threading.Barrier(4)

    def run_together(seed: int) -> list[list[bytes]]:
        start.wait(timeout=30)
        return [run(seed) for _ in range(repeats)]

    with ThreadPoolExecutor(4) as pool:
        for seed, repeated in enumerate(pool.map(run_together, range(4))):
            assert repeated == [expected[seed]] * repeats
