"""Gradients against central finite differences, in float64."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tolerance import DIFFERENCE_STEP, assert_derivative

__all__ = ["check_gradients"]

Array = NDArray[Any]

EVERY_ELEMENT_UP_TO = 64
DIRECTIONS = 16


def check_gradients(
    f: Callable[..., float],
    arguments: Mapping[str, Array],
    gradients: Mapping[str, Array | None],
    *,
    seed: int = 0,
) -> None:
    """Hold ``gradients``, by name, against differences of ``f(**arguments)``.

    Arrays of up to EVERY_ELEMENT_UP_TO numbers are perturbed number by number, larger ones along
    DIRECTIONS random directions, each of which moves every number. Only the arguments that
    ``gradients`` names are perturbed, and every one of them must have a gradient.
    """
    size = f(**arguments)
    rng = np.random.default_rng(seed)
    for name, gradient in gradients.items():
        a = arguments[name]
        if a.dtype != np.float64:
            raise AssertionError(f"{name} is {a.dtype}: finite differences need float64")
        if gradient is None or gradient.shape != a.shape:
            raise AssertionError(f"{name} has shape {a.shape}, its gradient is {gradient}")
        if a.size <= EVERY_ELEMENT_UP_TO:
            directions = np.eye(a.size).reshape(a.size, *a.shape)
        else:
            directions = rng.standard_normal((DIRECTIONS, *a.shape))
            directions /= np.sqrt(
                np.sum(directions**2, axis=tuple(range(1, a.ndim + 1)), keepdims=True)
            )

        def along(direction: Array, name: str = name, a: Array = a) -> float:
            step = DIFFERENCE_STEP * direction
            ahead, behind = f(**{**arguments, name: a + step}), f(**{**arguments, name: a - step})
            return (ahead - behind) / (2 * DIFFERENCE_STEP)

        differences = np.array([along(direction) for direction in directions])
        derivatives = np.array([np.vdot(gradient, direction) for direction in directions])
        assert_derivative(f"d{name}", derivatives, differences, size)
