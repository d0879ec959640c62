"""Activations of the user's own: what is checked, and what NumPy makes of them."""

import copy
import importlib.util
import math
import pickle
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import SMALL, Case, Draw, draw
from gradcheck import check_gradients
from numpy.typing import NDArray
from reference_setup import PHI, PRIME, chunks, each_dtype, each_input
from tolerance import KINK_MARGIN, assert_close, assert_same_bits

from gpurnn import RNN, Activation, LanguageModel, MLPModel, Vocabulary
from gpurnn import functional as F
from gpurnn.narrowing import narrowed
from gpurnn.training import TrainingConfig

Array = NDArray[Any]


def leaky_tanh(z: float) -> float:
    return 0.9 * math.tanh(z) + 0.1 * z


def leaky_tanh_derivative(z: float) -> float:
    return 1 - 0.9 * math.tanh(z) ** 2


def leaky_relu(z: float) -> float:
    return z if z > 0 else 0.2 * z


OWN = {
    "leaky-tanh": Activation(leaky_tanh, leaky_tanh_derivative),
    "softsign": Activation(lambda z: z / (1 + abs(z)), lambda z: 1 / (1 + abs(z)) ** 2),
    "leaky-relu": Activation(leaky_relu, lambda z: 1 if z > 0 else 0.2),
    "leaky-relu-of-output": Activation(leaky_relu, lambda h: 1 if h > 0 else 0.2, of_output=True),
    "elu": Activation(
        lambda z: z if z > 0 else math.expm1(z), lambda h: min(h, 0.0) + 1, of_output=True
    ),
}
each_own = pytest.mark.parametrize("own", OWN.values(), ids=OWN)

# The five that have a name, as a user would write them: of z and of φ(z).
AGAIN: dict[str, tuple[Callable[[float], float], ...]] = {
    "tanh": (lambda z: math.tanh(z), lambda z: 1 - math.tanh(z) ** 2, lambda h: 1 - h * h),
    "relu": (lambda z: max(z, 0), lambda z: 1 if z > 0 else 0, lambda h: 1 if h > 0 else 0),
    "sigmoid": (
        lambda z: 1 / (1 + math.exp(-z)),
        lambda z: math.exp(-abs(z)) / (1 + math.exp(-abs(z))) ** 2,
        lambda h: h * (1 - h),
    ),
    "softplus": (
        lambda z: math.log1p(math.exp(-abs(z))) + max(z, 0),
        lambda z: 1 / (1 + math.exp(-z)),
        lambda h: -math.expm1(-h),
    ),
    "identity": (lambda z: z, lambda z: 1, lambda h: 1),
}


# What is accepted


def test_what_an_activation_is_known_by() -> None:
    a = OWN["leaky-tanh"]
    again = Activation(leaky_tanh, leaky_tanh_derivative, of_output=False)
    assert a == again and hash(a) == hash(again) and len({a, again}) == 1
    assert (a.name, a.of_output, repr(a)) == ("leaky_tanh", False, "<gpurnn.Activation leaky_tanh>")
    named = Activation(leaky_tanh, leaky_tanh_derivative, name="leaky")
    assert named != a and named.name == "leaky"
    with pytest.raises(AttributeError):
        a.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Activation(leaky_tanh, leaky_tanh_derivative, True)  # type: ignore[misc]


def test_copies_and_pickles_are_equal() -> None:
    a = OWN["leaky-tanh"]
    for other in (copy.copy(a), copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert other == a and other.name == a.name


SMOOTH: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "silu": (
        lambda z: z / (1 + math.exp(-z)),
        lambda z: (1 + z / (1 + math.exp(z))) / (1 + math.exp(-z)),
    ),
    "gelu": (
        lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2.0))),
        lambda z: (
            0.5 * (1 + math.erf(z / math.sqrt(2.0)))
            + z * math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        ),
    ),
    "overflowing": (lambda z: math.log(1 + math.exp(z)), lambda z: 1 / (1 + math.exp(-z))),
    "steep": (lambda z: math.tanh(50 * z), lambda z: 50 * (1 - math.tanh(50 * z) ** 2)),
    "fast-wave": (lambda z: math.sin(20 * z), lambda z: 20 * math.cos(20 * z)),
    "cube": (lambda z: z**3, lambda z: 3 * z * z),
    "stairs": (lambda z: math.floor(z), lambda z: 0),
    "clamp": (lambda z: min(max(z, -1), 1), lambda z: 1 if -1 < z < 1 else 0),
    "small": (lambda z: 1e-3 * math.sin(z), lambda z: 1e-3 * math.cos(z)),
}


@pytest.mark.parametrize("pair", SMOOTH.values(), ids=SMOOTH)
def test_true_derivatives_pass(pair: tuple[Any, Any]) -> None:
    Activation(*pair)


@pytest.mark.parametrize("name", AGAIN)
def test_true_derivatives_pass_in_either_form(name: str) -> None:
    f, of_z, of_h = AGAIN[name]
    Activation(f, of_z)
    Activation(f, of_h, of_output=True)


# What is refused


@pytest.mark.parametrize(
    ("df", "of_output"),
    [
        (lambda z: 1 - z * z, False),  # takes z for the output
        (lambda h: 1 - math.tanh(h) ** 2, True),  # and the other way round
        (lambda z: 1.000001 * (1 - math.tanh(z) ** 2), False),
        (lambda z: 1 - math.tanh(z) ** 2 + (1e-6 if 2 < z < 2.1 else 0), False),
        (lambda z: 1 - math.tanh(z) ** 2 if z < 100 else 1.0, False),
        (lambda z: -(1 - math.tanh(z) ** 2), False),
        (lambda z: 0.0, False),
    ],
    ids=["of-output", "of-z", "factor", "somewhere", "far", "sign", "zero"],
)
def test_wrong_derivatives_are_refused(df: Callable[[float], float], of_output: bool) -> None:
    takes = "the output f(z)" if of_output else "the pre-activation z"
    number = r"-?[\d.]+(e-\d+)?"
    message = (
        rf"^df\({number}\) returns {number}: expected {number} to within {number}, the slope of f "
        rf"at z = {number} by central differences \(df takes {re.escape(takes)}\)$"
    )
    with pytest.raises(ValueError, match=message):
        Activation(lambda z: math.tanh(z), df, of_output=of_output)


@pytest.mark.parametrize("slopes", [(0.2, 1.0), (1.0, 0.19999)], ids=["swapped", "off"])
def test_wrong_sides_of_a_kink_are_refused(slopes: tuple[float, float]) -> None:
    above, below = slopes
    with pytest.raises(ValueError, match=r"^df\(.*the slope of f at z = "):
        Activation(leaky_relu, lambda z: above if z > 0 else below)


def two(z: float, w: float) -> float:
    return z


def fallen(z: float) -> float:
    raise KeyError("fallen")


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (math.tanh, TypeError, "{0} is <built-in function tanh>: expected a Python function of "),
        ("tanh", TypeError, "{0} is 'tanh': expected a Python function of one float (def or lam"),
        (None, TypeError, "{0} is None: expected a Python function of one float (def or lambda)"),
        (two, TypeError, "{0} takes (z: float, w: float) -> float: expected one argument, witho"),
        (lambda: 1.0, TypeError, "{0} takes (): expected one argument, without a default"),
        (lambda z=0.0: z, TypeError, "{0} takes (z=0.0): expected one argument, without a defaul"),
        (lambda *z: z[0], TypeError, "{0} takes (*z): expected one argument, without a default"),
        (lambda z: None, TypeError, "{0}(-7.961372875703131) returns None: expected a float"),
        (lambda z: True, TypeError, "{0}(-7.961372875703131) returns True: expected a float"),
        (lambda z: "z", TypeError, "{0}(-7.961372875703131) returns 'z': expected a float"),
        (lambda z: z * 1j, TypeError, "{0}(-7.961372875703131) returns (-0-7.961372875703131j): "),
        (
            lambda z: math.nan,
            ValueError,
            "{0}(-7.961372875703131) returns nan: expected a finite number",
        ),
        (
            lambda z: math.inf,
            ValueError,
            "{0}(-7.961372875703131) returns inf: expected a finite number",
        ),
        (
            lambda z: math.log(z),
            ValueError,
            "{0}(-7.961372875703131) raises ValueError (math domain error): expected a finite ",
        ),
        (
            fallen,
            ValueError,
            "{0}(-7.961372875703131) raises KeyError ('fallen'): expected a finite number",
        ),
        (
            lambda z: math.exp(-1000 * z),
            ValueError,
            "{0}(-7.961372875703131) raises OverflowError (math range error): expected a finite ",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None) or None,
)
def test_functions_that_are_none(bad: Any, error: type[Exception], message: str) -> None:
    good: Callable[[float], float] = lambda z: z + 0.0  # noqa: E731
    slope: Callable[[float], float] = lambda z: 1.0  # noqa: E731
    with pytest.raises(error, match=f"^{re.escape(message.format('f'))}"):
        Activation(bad, slope)
    with pytest.raises(error, match=f"^{re.escape(message.format('df'))}"):
        Activation(good, bad)


def test_an_error_names_both_the_output_and_the_point() -> None:
    message = "df(-15.922745751406262), at z = -7.961372875703131, returns None: expected a float"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        Activation(lambda z: 2 * z, lambda h: None, of_output=True)  # type: ignore[arg-type,return-value]


def test_options_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^of_output is 1: expected True or False$"):
        Activation(leaky_tanh, leaky_tanh_derivative, of_output=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^name is 1: expected a string or None$"):
        Activation(leaky_tanh, leaky_tanh_derivative, name=1)  # type: ignore[arg-type]


# What it needs


needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="own activations on NumPy need numba"
)


def test_without_numba_the_first_use_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    own = Activation(lambda z: z, lambda z: 1.0, name="mine")
    with pytest.raises(ImportError, match=r"^an activation of your own .*: pip install numba$"):
        F.rnn_forward(*draw(PRIME).arguments(), activation=own)


def helper(z: float) -> float:
    return z


@needs_numba
def test_functions_that_numba_cannot_compile() -> None:
    own = Activation(lambda z: helper(z), lambda z: 1.0)
    message = "^<lambda> cannot be compiled by Numba for float64: .*helper"
    with pytest.raises(TypeError, match=re.compile(message, re.DOTALL)):
        F.rnn_forward(*draw(PRIME).arguments(), activation=own)


# What NumPy computes


def off_kink(own: Activation, case: Case, dtype: type = np.float64, **variant: bool) -> Draw:
    """Draw until no state, and so no pre-activation, lies near 0, where some of OWN have a kink."""
    for seed in range(100):
        drawn = draw(case, seed, dtype)
        H, _ = F.rnn_forward(*drawn.arguments(**variant), activation=own)
        if np.abs(H).min(initial=np.inf) > KINK_MARGIN[np.dtype(dtype)]:
            return drawn
    raise RuntimeError(f"{case}: no draw in 100 stays away from the kink")


@needs_numba
@each_input
@each_own
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_gradient_equals_finite_differences(case: Case, own: Activation, by_id: bool) -> None:
    drawn = off_kink(own, case, by_id=by_id)
    X, h_0, W_xh, W_hh, b_h = drawn.arguments(by_id=by_id)
    _, residuals = F.rnn_forward(X, h_0, W_xh, W_hh, b_h, activation=own)
    dX, dh_0, dW_xh, dW_hh, db_h = F.rnn_backward(drawn.dH, residuals)
    arguments = {"h_0": h_0, "W_xh": W_xh, "W_hh": W_hh, "b_h": b_h}
    gradients = {"h_0": dh_0, "W_xh": dW_xh, "W_hh": dW_hh, "b_h": db_h}
    if not by_id:
        arguments["X"], gradients["X"] = X, dX

    def loss(**a: Array) -> float:
        H, _ = F.rnn_forward(a.pop("X", X), **a, activation=own)
        return float(np.vdot(H, drawn.dH))

    check_gradients(loss, arguments, gradients)


@needs_numba
@each_own
def test_every_gradient_of_a_hidden_layer(own: Activation) -> None:
    drawn = off_kink(own, PRIME)
    arguments = {"X": drawn.X, "W_xh": drawn.W_xh, "b_h": drawn.b_h}
    _, residuals = F.hidden_layer(**arguments, activation=own)
    gradients = dict(zip(arguments, F.hidden_layer_backward(drawn.dH, residuals), strict=True))

    def loss(**a: Array) -> float:
        return float(np.vdot(F.hidden_layer(**a, activation=own)[0], drawn.dH))

    check_gradients(loss, arguments, gradients)


def run(
    drawn: Draw, activation: str | Activation, by_id: bool
) -> tuple[F.RNNResiduals, dict[str, Array]]:
    H, residuals = F.rnn_forward(*drawn.arguments(by_id=by_id), activation=activation)
    names = ("H", "dX", "dh_0", "dW_xh", "dW_hh", "db_h")
    results = (H, *F.rnn_backward(drawn.dH, residuals))
    return residuals, {k: a for k, a in zip(names, results, strict=True) if a is not None}


@needs_numba
@each_dtype
@each_input
@pytest.mark.parametrize("of_output", [False, True], ids=["of-z", "of-output"])
@pytest.mark.parametrize("name", AGAIN)
def test_what_has_a_name_is_computed_as_well_without(
    name: str, of_output: bool, by_id: bool, dtype: type
) -> None:
    f, of_z, of_h = AGAIN[name]
    own = Activation(f, of_h if of_output else of_z, of_output=of_output)
    drawn = off_kink(Activation(leaky_relu, OWN["leaky-relu"].df), PRIME, dtype, by_id=by_id)
    _, truth = run(drawn.astype(np.float64), name, by_id)
    _, baseline = run(drawn, name, by_id)
    residuals, results = run(drawn, own, by_id)
    assert (residuals.Z is None) == of_output
    for key, result in results.items():
        assert result.dtype == dtype
        assert_close(key, result, truth[key], length=PRIME.length, baseline=baseline[key])


@needs_numba
@each_dtype
def test_the_function_is_applied_to_every_number(dtype: type) -> None:
    drawn = draw(PRIME, dtype=dtype)
    own = OWN["leaky-tanh"]
    H, residuals = F.rnn_forward(*drawn.arguments(), activation=own)
    assert residuals.Z is not None and residuals.Z.dtype == dtype
    expected = np.vectorize(leaky_tanh)(residuals.Z.astype(np.float64))
    assert_close("H", H, expected, length=4, dtype=dtype)
    Z = drawn.X @ drawn.W_xh + residuals.states[:-1] @ drawn.W_hh + drawn.b_h
    assert_close("Z", residuals.Z, Z.astype(np.float64), length=PRIME.length, dtype=dtype)


@needs_numba
@each_dtype
@each_own
def test_chunks_give_the_bits_of_the_whole(own: Activation, dtype: type) -> None:
    X, h_0, *parameters = draw(PRIME, dtype=dtype).arguments()
    whole, _ = F.rnn_forward(X, h_0, *parameters, activation=own)
    state = h_0
    for chunk in chunks(PRIME.T, 3):
        H, _ = F.rnn_forward(X[chunk], state, *parameters, activation=own)
        assert_same_bits("H", H, whole[chunk])
        state = H[-1]


@pytest.mark.parametrize("name", [*PHI, "fast_tanh", "fast_sigmoid"])
def test_pre_activations_are_kept_for_no_other(name: str) -> None:
    drawn = draw(PRIME)
    assert F.rnn_forward(*drawn.arguments(), activation=name)[1].Z is None
    assert F.hidden_layer(drawn.X, drawn.W_xh, None, activation=name)[1].Z is None


@needs_numba
def test_overflow_and_division_by_zero_give_their_limits() -> None:
    own = Activation(lambda z: z / (1 + math.exp(-z)), SMOOTH["silu"][1])
    Z = np.array([[-1e4], [0.0], [1e4]], np.float32)
    H, residuals = F.hidden_layer(Z, np.ones((1, 1), np.float32), None, activation=own)
    np.testing.assert_array_equal(H[:, 0], [0, 0, 1e4])
    dX, _, _ = F.hidden_layer_backward(np.ones_like(H), residuals)
    np.testing.assert_array_equal(dX[:, 0], [0, 0.5, 1])
    inverse = Activation(lambda z: 1 / z, lambda z: -1 / (z * z))
    H, _ = F.hidden_layer(Z[1:2], np.ones((1, 1), np.float32), None, activation=inverse)
    assert H[0, 0] == np.inf


@needs_numba
def test_a_nan_is_refused_as_with_the_others() -> None:
    X, *rest = draw(PRIME).arguments()
    X[2, 1, 3] = np.nan
    with pytest.raises(ValueError, match=r"^X holds nan at index \(2, 1, 3\)"):
        F.rnn_forward(X, *rest, activation=OWN["leaky-tanh"])


@needs_numba
def test_no_step_and_no_row() -> None:
    case = Case("empty", T=0, n=0, d=2, h=3)
    _, results = run(draw(case), OWN["leaky-tanh"], by_id=False)
    assert results["H"].shape == (0, 0, 3) and not results["dW_hh"].any()


@needs_numba
def test_four_threads_at_once_compile_and_compute_the_same() -> None:
    own = Activation(lambda z: math.atan(z), lambda z: 1 / (1 + z * z))
    drawn = draw(PRIME)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run(drawn, own, by_id=False)[1], range(4)))
    for other in results[1:]:
        for key, a in results[0].items():
            assert_same_bits(key, other[key], a)


# Fast variants


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
@each_dtype
def test_fast_variants_are_exact_on_numpy(name: str, dtype: type) -> None:
    drawn = draw(PRIME, dtype=dtype)
    (_, fast), (_, exact) = (run(drawn, n, by_id=False) for n in (f"fast_{name}", name))
    for key, a in exact.items():
        assert_same_bits(key, fast[key], a)


def test_fast_variants_are_kept_by_name(tmp_path: Path) -> None:
    model = LanguageModel(Vocabulary("ab"), hidden_size=3, activation="fast_tanh")
    model.save(tmp_path / "model.safetensors")
    assert LanguageModel.load(tmp_path / "model.safetensors").rnn.activation == "fast_tanh"
    assert TrainingConfig(activation="fast_sigmoid").activation == "fast_sigmoid"


# Models


@needs_numba
def test_models_take_it() -> None:
    own = OWN["softsign"]
    rnn = RNN(3, 4, 2, activation=own, dtype=np.float64)
    X = draw(Case("x", T=5, n=2, d=3, h=4)).X
    H, _ = rnn(X)
    H_0, _ = F.rnn_forward(
        X, None, *(rnn.params[p] for p in ("W_xh", "W_hh", "b_h")), activation=own
    )
    upper = (rnn.params[p] for p in ("W_xh.1", "W_hh.1", "b_h.1"))
    H_1, _ = F.rnn_forward(H_0, None, *upper, activation=own)
    assert_same_bits("H", H, H_1)
    assert copy.deepcopy(rnn).activation == rnn.activation == own

    ids = np.array([[0, 1], [2, 3], [1, 1]])
    mlp = MLPModel(5, 2, activation=own)
    assert mlp.activation == own
    model = LanguageModel(Vocabulary("abcd"), hidden_size=4, activation=own)
    for learner in (mlp, model):
        before, gradients, *_ = learner.loss_and_gradients(ids, ids)
        for name, p in learner.params.items():
            p -= 0.1 * gradients[name]
        assert learner.loss_and_gradients(ids, ids)[0] < before
    assert len(model.generate("ab", 5, seed=0)) == 7


def test_a_model_with_it_is_not_saved(tmp_path: Path) -> None:
    model = LanguageModel(Vocabulary("ab"), hidden_size=3, activation=OWN["leaky-tanh"])
    message = (
        "activation is <gpurnn.Activation leaky_tanh>, made of Python functions, which a file "
        "cannot hold: expected one that has a name"
    )
    for refused in (model.config, lambda: model.save(tmp_path / "model.safetensors")):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            refused()
    assert not list(tmp_path.iterdir())


def test_training_takes_names_only() -> None:
    message = "^activation is <gpurnn.Activation leaky_tanh>: expected one of tanh, relu, .*"
    with pytest.raises(TypeError, match=message):
        TrainingConfig(activation=OWN["leaky-tanh"])  # type: ignore[arg-type]


# Constants


GLOBAL, COUNT = 0.25, 3


def test_constants_are_narrowed_in_a_copy() -> None:
    closed, large = 0.125, 1 << 20

    def f(z: float) -> float:
        """Document f."""
        inside = (0.5, 2)
        return z * 0.75 * GLOBAL * COUNT * closed * large * inside[0] * (1 if True else z)

    copied = narrowed(f)
    assert (copied.__name__, copied.__doc__, copied.__qualname__) == (
        f.__name__,
        f.__doc__,
        f.__qualname__,
    )
    constants = [c for c in copied.__code__.co_consts if isinstance(c, float | np.floating)]
    assert constants and all(type(c) is np.float32 for c in constants)
    (inside,) = (c for c in copied.__code__.co_consts if isinstance(c, tuple))
    assert [type(c) for c in inside] == [np.float32, np.int16]
    assert type(copied.__globals__["GLOBAL"]) is np.float32
    assert type(copied.__globals__["COUNT"]) is np.int16
    assert [type(c.cell_contents) for c in copied.__closure__ or ()] == [np.float32, int]
    assert copied(np.float32(2)) == f(2)
    # The function itself is as it was.
    assert type(GLOBAL) is float and type(closed) is float and GLOBAL is f.__globals__["GLOBAL"]
    again = narrowed(copied)
    assert again.__code__.co_consts == copied.__code__.co_consts


@needs_numba
@pytest.mark.parametrize("own", [*OWN.values(), *(Activation(*p[:2]) for p in AGAIN.values())])
def test_float32_is_computed_in_float32(own: Activation) -> None:
    import numba

    for function in (own.f, own.df):
        compiled = numba.njit([numba.float32(numba.float32)])(narrowed(function))  # type: ignore[arg-type]
        assert "double" not in compiled.inspect_llvm(compiled.signatures[0]).split("define")[1]
