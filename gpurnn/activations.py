"""The activations φ of the NumPy reference, each with its derivative φ′.

φ works in place on the pre-activation, and φ′ is written in terms of the *output* H = φ(Z): none of
these needs Z again, so the backward pass keeps nothing but the states.

============  ====================  ==================
name          φ(z)                  φ′ in terms of H
============  ====================  ==================
tanh          tanh z                1 − H²
relu          max(z, 0)             1 if H > 0 else 0
sigmoid       1 / (1 + e^−z)        H (1 − H)
softplus      log(1 + e^z)          1 − e^−H
identity      z                     1
fast_tanh     tanh z                1 − H²
fast_sigmoid  1 / (1 + e^−z)        H (1 − H)
============  ====================  ==================

The fast ones allow a GPU to approximate. The reference defines what is right, so here they are what
they approximate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ACTIVATIONS", "FAST_ACTIVATIONS", "ReferenceActivation"]

Floats = NDArray[Any]


@dataclass(frozen=True)
class ReferenceActivation:
    """A pair of NumPy functions.

    ``apply(Z)`` overwrites Z by φ(Z). ``derivative(A, out)`` writes φ′ at the point whose output is
    A (or, where ``of_output`` is false, whose pre-activation is A); ``out`` has A's shape and dtype
    and does not overlap it. e^−z may overflow to inf on the way to a correct 0: callers hold
    ``np.errstate(over="ignore")``.
    """

    name: str
    apply: Callable[[Floats], object]
    derivative: Callable[[Floats, Floats], object]
    of_output: bool = True


def _tanh(Z: Floats) -> None:
    np.tanh(Z, out=Z)


def _tanh_derivative(H: Floats, out: Floats) -> None:
    np.multiply(H, H, out=out)
    np.subtract(1, out, out=out)


def _relu(Z: Floats) -> None:
    np.maximum(Z, 0, out=Z)


def _relu_derivative(H: Floats, out: Floats) -> None:
    np.greater(H, 0, out=out, casting="unsafe")


def _sigmoid(Z: Floats) -> None:
    np.negative(Z, out=Z)
    np.exp(Z, out=Z)
    Z += 1
    np.reciprocal(Z, out=Z)


def _sigmoid_derivative(H: Floats, out: Floats) -> None:
    np.subtract(1, H, out=out)
    out *= H


def _softplus(Z: Floats) -> None:
    np.logaddexp(Z, 0, out=Z)


def _softplus_derivative(H: Floats, out: Floats) -> None:
    np.negative(H, out=out)
    np.expm1(out, out=out)
    np.negative(out, out=out)


def _identity(Z: Floats) -> None:
    pass


def _identity_derivative(H: Floats, out: Floats) -> None:
    out.fill(1)


ACTIVATIONS = {
    pair.name: pair
    for pair in (
        ReferenceActivation("tanh", _tanh, _tanh_derivative),
        ReferenceActivation("relu", _relu, _relu_derivative),
        ReferenceActivation("sigmoid", _sigmoid, _sigmoid_derivative),
        ReferenceActivation("softplus", _softplus, _softplus_derivative),
        ReferenceActivation("identity", _identity, _identity_derivative),
    )
}
FAST_ACTIVATIONS = {
    pair.name: pair
    for pair in (
        ReferenceActivation("fast_tanh", _tanh, _tanh_derivative),
        ReferenceActivation("fast_sigmoid", _sigmoid, _sigmoid_derivative),
    )
}
