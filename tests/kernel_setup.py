"""What the tests of the kernels under the emulator have in common."""

from typing import Any

import numpy as np
import pytest
from cases import ACTIVATIONS, Case, Draw
from numpy.typing import DTypeLike, NDArray
from tolerance import assert_close

import gpurnn
from gpurnn import functional as F
from gpurnn import reference, validate

pytest.importorskip("greenlet", reason="the emulator needs greenlet")
pytest.importorskip("numba.cuda", reason="the kernels need numba-cuda")

Array = NDArray[Any]

KERNELS = ("resident", "step", "concatenated", "gemm")
NAMES = ("H", "dX", "dh_0", "dW_xh", "dW_hh", "db_h")

each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def results(
    drawn: Draw,
    activation: Any = "tanh",
    *,
    kernel: str | None = None,
    xi: Array | None = None,
    **variant: bool,
) -> dict[str, Array]:
    """Return H and all gradients: of a kernel under the emulator around, or of NumPy."""
    H, residuals = F.rnn_forward(*drawn.arguments(**variant), activation=activation, kernel=kernel)
    found = (H, *F.rnn_backward(drawn.dH, residuals, xi=xi))
    return {name: a for name, a in zip(NAMES, found, strict=True) if a is not None}


def exact(
    drawn: Draw, activation: Any = "tanh", *, xi: Array | None = None, **variant: bool
) -> dict[str, Array]:
    """Return the same in float64 by the reference."""
    xi = None if xi is None else xi.astype(np.float64)
    return results(drawn.astype(np.float64), activation, xi=xi, **variant)


def assert_as_reference(
    case: Case,
    drawn: Draw,
    activation: Any = "tanh",
    *,
    kernel: str,
    xi: Array | None = None,
    **variant: bool,
) -> None:
    """Hold a kernel's results, float32 or float64, against the reference by the tests' rule."""
    with gpurnn.emulated():
        found = results(drawn, activation, kernel=kernel, xi=xi, **variant)
    truth = exact(drawn, activation, xi=xi, **variant)
    single = drawn.X.dtype == np.float32
    baseline = results(drawn, activation, xi=xi, **variant) if single else {}
    assert found.keys() == truth.keys()
    for name, a in found.items():
        assert a.dtype == drawn.X.dtype
        assert_close(
            f"{kernel} {name}", a, truth[name], length=case.length, baseline=baseline.get(name)
        )


def reference_states(drawn: Draw, dtype: DTypeLike, activation: str = "tanh") -> Array:
    """Return h_0 and the states of the reference, (T + 1, n, h)."""
    arguments = validate.rnn_forward(*drawn.astype(dtype).arguments(), activation)
    return reference.rnn_forward(*arguments)[0]
