"""A run's arrays where it takes place, and what its results must be."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpurnn import functional as F
from gpurnn import reference, validate
from gpurnn.bench.common import Problem
from gpurnn.bench.runs import Run
from gpurnn.cuda.engines import Engine
from gpurnn.planning import Group

__all__ = ["Data", "dtype_of", "exact_results", "on_host"]


@dataclass(frozen=True)
class Data:
    """A problem's arrays in an engine's place, of a dtype, as many steps as wanted."""

    arguments: tuple[Any, ...]
    dH: Any
    precision: str = "ieee"

    @classmethod
    def of(cls, problem: Problem, run: Run, engine: Engine, T: int) -> "Data":
        """Bring a problem's arrays to an engine, its steps repeated until there are T."""
        xp, dtype = engine.xp, dtype_of(run.dtype)
        checked = len(problem.dH)

        def long(a: Any) -> Any:
            return xp.concatenate([a] * (-(-T // checked)))[:T] if checked < T else a

        X, *rest = (xp.asarray(a) for a in problem.arguments(dtype))
        if run.ids:
            X = xp.asarray(problem.ids)
        return cls((long(X), *rest), long(xp.asarray(problem.dH.astype(dtype))), run.precision)

    def forward(self, kernel: str | Group | None) -> Any:
        """Run the forward pass."""
        return F.rnn_forward(*self.arguments, kernel=kernel, precision=self.precision)

    def both(self, kernel: str | Group | None) -> list[Any]:
        """Run forward and backward; return H and the gradients."""
        H, residuals = self.forward(kernel)
        return [H, *F.rnn_backward(self.dH, residuals)]

    def as_floats(self, engine: Engine) -> tuple[Any, ...]:
        """Return the arguments with one-hot rows in place of ids, for those who take no ids."""
        X, *rest = self.arguments
        if X.ndim == 2:
            X = engine.xp.eye(len(rest[1]), dtype=rest[1].dtype)[X]
        return (X, *rest)


def dtype_of(name: str) -> np.dtype[Any]:
    """Return a dtype by its name; bfloat16 needs ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    found: np.dtype[Any] = np.dtype(name)
    return found


def exact_results(problem: Problem, run: Run) -> list[Any]:
    """Return the reference's results on the very numbers that the dtype holds, in float64."""
    dtype = dtype_of(run.dtype)
    floats, h_0, W_xh, W_hh, b_h = (a.astype(np.float64) for a in problem.arguments(dtype))
    X: Any = problem.ids if run.ids else floats
    phi = validate.activation("tanh")
    states, Z = reference.rnn_forward(X, h_0, W_xh, W_hh, b_h, phi)
    dH = problem.dH.astype(dtype).astype(np.float64)
    gradients = reference.rnn_backward(dH, X, states, Z, W_xh, W_hh, phi, None)
    return [a for a in (states[1:], *gradients) if a is not None]


def on_host(a: Any) -> Any:
    """Return an array in the host's memory, as float64."""
    return (a if isinstance(a, np.ndarray) else a.get()).astype(np.float64)
