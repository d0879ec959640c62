"""The device functions φ and φ′: how exact they are, where they end, and what they compile to.

There is no GPU here. Their Python source is run as it stands, on NumPy scalars, and compiled for
the processor: both round where the GPU rounds, save that exp, log1p, … are another library's.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from cases import ACTIVATIONS
from numpy.typing import NDArray
from offline import assemble, each_target, ptx_of
from tolerance import DIFFERENCE_STEP, assert_derivative

numba = pytest.importorskip("numba")
from gpurnn.kernels.activations import Pair, pair, user_pair  # noqa: E402  (needs numba-cuda)

Array = NDArray[Any]

f4, f8 = numba.float32, numba.float64
FAST = ("fast_tanh", "fast_sigmoid")

each_activation = pytest.mark.parametrize("name", ACTIVATIONS)
each_real = pytest.mark.parametrize("real", [f4, f8], ids=str)
each_name_and_real = pytest.mark.parametrize(
    ("name", "real"),
    [*((name, real) for name in ACTIVATIONS for real in (f4, f8)), *((name, f4) for name in FAST)],
    ids=str,
)


def sigmoid(z: Array) -> Array:
    e = np.exp(-np.abs(z))
    return np.where(z < 0, e, 1) / (1 + e)


EXACT: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0),
    "sigmoid": sigmoid,
    "softplus": lambda z: np.log1p(np.exp(-np.abs(z))) + np.maximum(z, 0),
    "identity": lambda z: z,
}
EXACT_DERIVATIVE: dict[str, Callable[[Array], Array]] = {
    "tanh": lambda h: 1 - h * h,
    "relu": lambda h: (h > 0).astype(np.float64),
    "sigmoid": lambda h: h * (1 - h),
    "softplus": lambda h: -np.expm1(-h),
    "identity": np.ones_like,
}


def python(f: Any) -> Callable[[Any], Any]:
    """Return the Python function behind a device function, its intrinsics replaced by twins."""
    source = f.py_func
    twins = {
        name: partial(value.emulated, None)
        for name, value in source.__globals__.items()
        if hasattr(value, "emulated")
    }
    names = {**source.__globals__, **twins}
    return FunctionType(source.__code__, names, source.__name__, None, source.__closure__)


@cache
def on_processor(f: Any, real: Any) -> Callable[[Array], Array]:
    return numba.vectorize([real(real)])(f.py_func)


def floats() -> Array:
    """All magnitudes of float32 densely, subnormal ones too, and where φ bends more densely."""
    positive = np.arange(1, 0x7F800000, 4001, dtype=np.uint32).view(np.float32)
    bend = np.linspace(0, 120, 1_000_001, dtype=np.float32)
    return np.concatenate([positive, -positive, bend, -bend])


def ulps(found: Array, exact: Array) -> float:
    """Return the largest error in units in the last place of the exact value, as a float32."""
    assert found.dtype == np.float32 and exact.dtype == np.float64
    with np.errstate(over="ignore", under="ignore"):
        unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float((np.abs(found - exact) / unit).max())


# Exactness


@each_activation
def test_phi_is_exact_to_a_few_units_in_the_last_place(name: str) -> None:
    z = floats()
    phi = pair(name, f4).phi
    with np.errstate(all="ignore"):
        exact = EXACT[name](z.astype(np.float64))
        assert ulps(on_processor(phi, f4)(z), exact) <= 3.5
        some = slice(None, None, 97)
        in_python = np.array([python(phi)(x) for x in z[some]])
        assert ulps(in_python, exact[some]) <= 2.5


@each_activation
def test_dphi_is_exact_to_a_few_units_in_the_last_place(name: str) -> None:
    h = floats()
    if name in ("tanh", "sigmoid"):
        h = h[np.abs(h) <= 1]
    if name != "tanh":
        h = np.abs(h) if name in ("sigmoid", "softplus") else h
    dphi = pair(name, f4).dphi
    with np.errstate(all="ignore"):
        exact = EXACT_DERIVATIVE[name](h.astype(np.float64))
        found = on_processor(dphi, f4)(h)
    if name == "tanh":  # 1 − h² cancels: exact to the last place of 1 (on a GPU an FMA helps)
        assert np.abs(found - exact).max() <= 2.0**-24 * 2
    else:
        assert ulps(found, exact) <= 2.5


@pytest.mark.parametrize("name", FAST)
def test_fast_variants_are_what_they_say(name: str) -> None:
    z = np.linspace(-20, 20, 4001, dtype=np.float32)
    found = np.array([python(pair(name, f4).phi)(x) for x in z])
    assert found.dtype == np.float32
    exact = EXACT[name.removeprefix("fast_")](z.astype(np.float64))
    off = np.abs(found - exact)
    assert (off <= 2.0**-11 * np.abs(exact)).all()
    assert pair(name, f4).of_output


@pytest.mark.parametrize("name", FAST)
def test_fast_variants_exist_in_float32_only(name: str) -> None:
    message = f"activation '{name}' with float64: expected float32, its only fast form"
    with pytest.raises(ValueError, match=f"^{message}$"):
        pair(name, f8)


@each_real
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_those_of_finite_differences(name: str, real: Any) -> None:
    phi, _, of_output = pair(name, f8)
    assert of_output
    z = np.linspace(-9, 9, 500)  # no 0, which is relu's kink
    step = DIFFERENCE_STEP
    f = np.vectorize(python(phi), otypes=[float])
    differences = (f(z + step) - f(z - step)) / (2 * step)
    df = np.vectorize(python(pair(name, real).dphi), otypes=[float])
    h = f(z)
    if real == f8:
        assert_derivative("φ′", df(h), differences, 9.0)
    else:
        assert np.abs(df(h.astype(np.float32)) - differences).max() <= 4e-7


# Ends


LIMITS = {  # φ(−∞), φ(∞)
    "tanh": (-1, 1),
    "relu": (0, np.inf),
    "sigmoid": (0, 1),
    "softplus": (0, np.inf),
    "identity": (-np.inf, np.inf),
}


@each_name_and_real
def test_infinities_and_nan(name: str, real: Any) -> None:
    phi, dphi, _ = pair(name, real)
    runs = [python(phi)] if name in FAST else [python(phi), on_processor(phi, real)]
    below, above = LIMITS[name.removeprefix("fast_")]
    for f in runs:
        with np.errstate(invalid="ignore"):
            assert math.isnan(f(real(math.nan)))
        assert f(real(-math.inf)) == below
        assert f(real(math.inf)) == above
        far = [float(f(real(z))) for z in (-1e4, 1e4)]
        assert far == [max(below, -1e4), min(above, 1e4)]
    slopes = [python(dphi)(real(h)) for h in far]
    assert np.isfinite(slopes).all()


@each_real
def test_results_have_the_type_of_the_kernel(real: Any) -> None:
    expected = np.float32 if real == f4 else np.float64
    for name in ACTIVATIONS:
        for f in pair(name, real)[:2]:
            assert type(python(f)(real(0.3))) is expected, name


# Compiled


def kernel_of(functions: Pair) -> Callable[[Any, Any], None]:
    phi, dphi, _ = functions

    def kernel(z, y):
        y[0] = phi(z[0])
        y[1] = dphi(z[1])

    return kernel


def compiled(functions: Pair, real: Any, target: tuple[int, int]) -> str:
    ptx = ptx_of(kernel_of(functions), (real[::1], real[::1]), target)
    assemble(ptx, target)
    return ptx


@each_target
@each_name_and_real
def test_ptx(name: str, real: Any, target: tuple[int, int]) -> None:
    ptx = compiled(pair(name, real), real, target)
    assert (".f64" in ptx) == (real == f8)
    assert ("tanh.approx" in ptx) == (name == "fast_tanh")
    assert "call" not in ptx
    if name == "fast_sigmoid":
        assert "ex2.approx.ftz.f32" in ptx and "rcp.approx.ftz.f32" in ptx


@each_real
def test_the_same_pair_is_the_same_object(real: Any) -> None:
    for name in ACTIVATIONS:
        assert pair(name, real) is pair(name, real)
    assert pair("tanh", f4).phi is not pair("tanh", f8).phi


# The user's own

SLOPE, TWO = 0.1, 2


def leaky_tanh(z: float) -> float:
    return (1.0 - SLOPE) * math.tanh(z) + SLOPE * z


def leaky_tanh_derivative(z: float) -> float:
    return 1 - (1 - SLOPE) * math.tanh(z) ** TWO


def closed_over(slope: float) -> Callable[[float], float]:
    return lambda z: z if z > 0 else slope * z


OWN = {
    "literal": (lambda z: math.tanh(z) + 0.1 * z, lambda z: 1.1 - math.tanh(z) ** 2),
    "globals": (leaky_tanh, leaky_tanh_derivative),
    "closure": (closed_over(0.2), lambda h: 1 if h > 0 else 0.2),
    "integers": (lambda z: z / (1 + abs(z)), lambda z: 1 / (1 + abs(z)) ** 2),
    "builtins": (lambda z: min(max(z, -1), 1), lambda z: 1.0 if -1 < z < 1 else 0.0),
}


@each_target
@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_own_functions_stay_in_float32(
    own: tuple[FunctionType, FunctionType], target: tuple[int, int]
) -> None:
    functions = user_pair(*own, f4)
    assert ".f64" not in compiled(functions, f4, target)
    assert not functions.of_output


def test_own_functions_in_float64() -> None:
    ptx = compiled(user_pair(*OWN["globals"], f8), f8, (9, 0))
    assert ".f64" in ptx


def test_the_same_functions_give_the_same_pair() -> None:
    f, df = OWN["globals"]
    assert user_pair(f, df, f4) is user_pair(f, df, f4)
    assert user_pair(f, df, f4) is not user_pair(f, df, f8)
    of_output = user_pair(f, df, f4, of_output=True)
    assert of_output.of_output and of_output is user_pair(f, df, f4, of_output=True)


# In the emulator


@pytest.mark.parametrize("name", [*ACTIVATIONS, *FAST])
def test_pairs_in_the_emulator(name: str) -> None:
    assert_emulated(pair(name, f4), EXACT[name.removeprefix("fast_")])


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_own_pairs_in_the_emulator(own: tuple[FunctionType, FunctionType]) -> None:
    assert_emulated(user_pair(*own, f4), np.vectorize(own[0], otypes=[float]))


def assert_emulated(functions: Pair, exact: Callable[[Array], Array]) -> None:
    """Run a pair in the emulator, and φ against its definition."""
    pytest.importorskip("greenlet", reason="the emulator needs greenlet")
    from gpurnn.emulator import launch

    phi, dphi, _ = functions

    def kernel(z, y):
        for i in range(len(z)):
            y[0, i] = phi(z[i])
            y[1, i] = dphi(z[i])

    z = np.linspace(-3, 3, 64, dtype=np.float32)
    y = np.full((2, 64), np.nan, np.float32)
    launch(kernel, 1, 1, (z, y))
    np.testing.assert_allclose(y[0], exact(z.astype(np.float64)), rtol=5e-7)
    assert np.isfinite(y[1]).all()
