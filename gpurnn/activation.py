"""An activation of the user's own: two Python functions of one number.

The GPU's kernels are compiled with them inside, and on NumPy arrays Numba makes loops of them, so
that neither place knows them as anything special.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn.activations import ReferenceActivation
from gpurnn.narrowing import narrowed

__all__ = ["Activation", "AnyActivation"]

Floats = NDArray[Any]

EPSILON = float(np.finfo(np.float64).eps)
STEP = EPSILON ** (1 / 3)  # of a central difference, in which it is right to about ε^⅔
DIFFERENCE_FACTOR = 64
SMOOTH = 1e-4  # central differences that differ by less belong to a smooth place
GOLDEN = (math.sqrt(5) - 1) / 2  # keeps the points off every number a function may break at
NEAR = tuple((k + GOLDEN) / 16 for k in range(-128, 128))
FAR = tuple(sign * GOLDEN * size for size in (32, 256, 2048) for sign in (-1, 1))


@dataclass(frozen=True, repr=False)
class Activation:
    """φ and φ′ as Python functions of one float, which Numba compiles.

    Pass it wherever an activation goes by its name. Two are equal if their functions, ``of_output``
    and ``name`` are.

    Args:
        f: φ: a ``def`` or ``lambda`` of one float that returns a float, made of arithmetic,
            comparisons and the functions of ``math``.
        df: φ′, likewise, of the pre-activation z.
        of_output: ``df`` takes the output φ(z) instead; then no pre-activations need to be kept.
        name: what to call it; the name of ``f`` by default.

    Constants may be literals, globals or closed-over variables; what they are when the function is
    compiled stays. In float32 they are float32 (integers within ±32,767), whereas an attribute such
    as ``math.pi`` is a float64 and draws the arithmetic around it along: write ``pi = math.pi``
    outside. Each ``Activation`` is compiled into kernels of its own: make one and keep it.

    On creation ``df`` is held against central differences of ``f`` in float64, at some 260 points
    between −1300 and 1300, most of them in [−8, 8]: where two steps agree on the slope, ``df`` must
    agree with them to about ε^⅔. An overflow beyond [−8, 8] is let pass: compiled code gives inf
    there.

    Raises:
        TypeError: ``f`` or ``df`` is no Python function of one argument, or returns no number.
        ValueError: ``f`` or ``df`` raises or returns NaN, or ``df`` is not the derivative of ``f``.
        ImportError: (at its first use on NumPy arrays) Numba is not installed.
    """

    f: Callable[[float], float]
    df: Callable[[float], float]
    _: KW_ONLY
    of_output: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        _check_function("f", self.f)
        _check_function("df", self.df)
        if not isinstance(self.of_output, bool):
            raise TypeError(f"of_output is {self.of_output!r}: expected True or False")
        if self.name is None:
            object.__setattr__(self, "name", self.f.__name__)
        elif not isinstance(self.name, str):
            raise TypeError(f"name is {self.name!r}: expected a string or None")
        _check_derivative(self.f, self.df, self.of_output)

    def __repr__(self) -> str:
        return f"<gpurnn.Activation {self.name}>"

    def apply(self, Z: Floats) -> None:
        """Overwrite Z by φ(Z)."""
        _loop(self.f, Z.dtype)(Z, out=Z)

    def derivative(self, A: Floats, out: Floats) -> None:
        """Write φ′ of A, the outputs if ``of_output``, else the pre-activations."""
        _loop(self.df, A.dtype)(A, out=out)


AnyActivation = ReferenceActivation | Activation


@cache
def _loop(function: FunctionType, dtype: np.dtype[Any]) -> Callable[..., object]:
    """Compile a function of one number to a NumPy ufunc for one dtype."""
    try:
        import numba
    except ImportError as e:
        raise ImportError(
            f"an activation of your own ({function.__name__}) is compiled by Numba, which could "
            f"not be imported ({e}): pip install numba"
        ) from e
    scalar = narrowed(function) if dtype == np.float32 else function
    try:
        loop: Callable[..., object] = numba.vectorize([f"{dtype}({dtype})"])(scalar)
    except numba.core.errors.NumbaError as e:
        raise TypeError(
            f"{function.__name__} cannot be compiled by Numba for {dtype}: expected arithmetic, "
            f"comparisons and functions of math on one float. Numba says: {e}"
        ) from e
    return loop


def _check_function(name: str, function: object) -> None:
    if not isinstance(function, FunctionType):
        raise TypeError(
            f"{name} is {function!r}: expected a Python function of one float (def or lambda)"
        )
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if (
        len(parameters) != 1
        or parameters[0].kind not in positional
        or parameters[0].default is not inspect.Parameter.empty
    ):
        raise TypeError(f"{name} takes {signature}: expected one argument, without a default")


def _value(name: str, function: Callable[[float], float], x: float, z: float) -> float:
    """Return function(x) as a float: finite, or inf where |z| > 8."""
    came = f"{name}({x!r})" if x == z else f"{name}({x!r}), at z = {z!r},"
    try:
        y = function(x)
    except OverflowError as e:
        if abs(z) > 8:
            return math.inf
        raise ValueError(f"{came} raises OverflowError ({e}): expected a finite number") from e
    except Exception as e:
        raise ValueError(f"{came} raises {type(e).__name__} ({e}): expected a finite number") from e
    if isinstance(y, bool) or not isinstance(y, int | float | np.integer | np.floating):
        raise TypeError(f"{came} returns {y!r}: expected a float")
    if math.isnan(y) or (math.isinf(y) and abs(z) <= 8):
        raise ValueError(f"{came} returns {y!r}: expected a finite number")
    return float(y)


def _slopes(f: Callable[[float], float]) -> Iterator[tuple[float, float, float, float]]:
    """Yield z, f(z), the slope there and how far off it may be, where f is finite and smooth."""
    for z in NEAR + FAR:
        size = max(1.0, abs(z))
        y = _value("f", f, z, z)
        slopes = []
        for step in (STEP * size, 2 * STEP * size):
            ahead, behind = z + step, z - step
            rise = _value("f", f, ahead, ahead) - _value("f", f, behind, behind)
            slopes.append(rise / (ahead - behind))
        scale = max(1.0, abs(slopes[0]), abs(y) / size)
        apart = abs(slopes[0] - slopes[1])  # thrice what the higher derivatives make of the first
        if apart <= SMOOTH * scale < math.inf:
            yield z, y, slopes[0], DIFFERENCE_FACTOR * STEP**2 * scale + apart


def _check_derivative(
    f: Callable[[float], float], df: Callable[[float], float], of_output: bool
) -> None:
    takes = "the output f(z)" if of_output else "the pre-activation z"
    for z, y, slope, off in _slopes(f):
        x = y if of_output else z
        came = _value("df", df, x, z)
        if math.isfinite(came) and not abs(came - slope) <= off:
            raise ValueError(
                f"df({x!r}) returns {came!r}: expected {slope:.9g} to within {off:.1g}, the slope "
                f"of f at z = {z!r} by central differences (df takes {takes})"
            )
