"""Optimizers, global-norm clipping and learning-rate schedules.

An optimizer updates parameters in place and keeps its own arrays in ``state``, by name, so that a
checkpoint can hold them. θ are the parameters, g the gradients, η the learning rate.

Arrays on a GPU (CuPy's) are updated there, all in two launches, by the same arithmetic; each call
waits for its outcome. ``training.Trainer`` on a GPU does not wait.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpurnn import validate
from gpurnn.cuda import optimizing
from gpurnn.cuda.arrays import engine_of, on_host
from gpurnn.slots import Settings

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
    "AdamW",
    "Momentum",
    "Optimizer",
    "clip_global_norm",
    "make_optimizer",
    "scheduled",
]

Floats = NDArray[Any]
Params = Mapping[str, Floats]
Changes = dict[str, tuple[Floats, Floats]]  # by name: the array, its new values

OPTIMIZERS = ("sgd", "momentum", "adamw")
SCHEDULES = ("constant", "linear", "cosine")


class Optimizer(Protocol):
    """What training needs of an optimizer."""

    name: str
    memory: tuple[str, ...]
    """What it remembers of each parameter: ``state`` has "m.W_hh" for "m" of W_hh."""
    state: dict[str, Floats]

    @property
    def settings(self) -> dict[int, float]:
        """Its numbers, by their place in ``slots.Settings``."""

    def rates(self, lr: float, update: int) -> tuple[float, ...]:
        """Return the row of ``slots.Rates`` of an update, counted from 1."""

    def step(self, params: Params, grads: Params, lr: float) -> None:
        """Update every parameter in place from its gradient, with learning rate ``lr``.

        Raises:
            NonFiniteError: a value would overflow; then nothing has been changed.
        """


class SGD:
    """θ ← θ − η g (*Dive into Deep Learning* 12.4)."""

    name: str = "sgd"
    memory: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.state: dict[str, Floats] = {}

    @property
    def settings(self) -> dict[int, float]:
        """See ``Optimizer.settings``."""
        return {}

    def rates(self, lr: float, update: int) -> tuple[float, ...]:
        """See ``Optimizer.rates``."""
        return lr, 1.0, 1.0

    def step(self, params: Params, grads: Params, lr: float) -> None:
        """Update ``params`` in place; see ``Optimizer.step``."""
        if _on_device(self, params, grads, self.rates(lr, 1)):
            return
        with np.errstate(all="ignore"):
            _write({name: (p, p - lr * grads[name]) for name, p in params.items()})


class Momentum:
    """v ← μ v + g, θ ← θ − η v (*Dive into Deep Learning* 12.6)."""

    name: str = "momentum"
    memory: tuple[str, ...] = ("v",)

    def __init__(self, params: Params, momentum: float = 0.9) -> None:
        self.momentum = validate.number(
            "momentum", momentum, "a number in [0, 1)", lambda x: 0 <= x < 1
        )
        self.state = {f"v.{name}": np.zeros_like(p) for name, p in params.items()}

    @property
    def settings(self) -> dict[int, float]:
        """See ``Optimizer.settings``."""
        return {Settings.MOMENTUM: self.momentum}

    def rates(self, lr: float, update: int) -> tuple[float, ...]:
        """See ``Optimizer.rates``."""
        return lr, 1.0, 1.0

    def step(self, params: Params, grads: Params, lr: float) -> None:
        """Update ``params`` in place; see ``Optimizer.step``."""
        if _on_device(self, params, grads, self.rates(lr, 1)):
            return
        changes: Changes = {}
        with np.errstate(all="ignore"):
            for name, p in params.items():
                v = self.state[f"v.{name}"]
                v_next = self.momentum * v + grads[name]
                changes[f"v.{name}"] = v, v_next
                changes[name] = p, p - lr * v_next
        _write(changes)


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g², θ ← θ − η (λ θ + m̂ / (√v̂ + ε)), where m̂ and v̂
    are m and v over 1 − βᵗ at update t. Every parameter decays alike.
    """

    name: str = "adamw"
    memory: tuple[str, ...] = ("m", "v")

    def __init__(
        self,
        params: Params,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas is {betas}: expected two numbers in [0, 1)")
        least = max(
            (float(np.finfo(p.dtype).tiny) for p in params.values()), default=np.finfo(float).tiny
        )
        self.betas = betas
        self.eps = validate.number(
            "eps", eps, f"a finite number, {least:.3g} or more", lambda x: least <= x < math.inf
        )
        self.weight_decay = validate.number(
            "weight_decay", weight_decay, "0 or more", lambda x: 0 <= x < math.inf
        )
        self.state = {f"m.{name}": np.zeros_like(p) for name, p in params.items()}
        self.state |= {f"v.{name}": np.zeros_like(p) for name, p in params.items()}
        self.state["updates"] = np.zeros(1, np.int64)

    @property
    def settings(self) -> dict[int, float]:
        """See ``Optimizer.settings``."""
        return {
            Settings.BETA_1: self.betas[0],
            Settings.BETA_2: self.betas[1],
            Settings.EPS: self.eps,
            Settings.WEIGHT_DECAY: self.weight_decay,
        }

    def rates(self, lr: float, update: int) -> tuple[float, ...]:
        """See ``Optimizer.rates``."""
        return lr, *(1 - beta**update for beta in self.betas)

    def step(self, params: Params, grads: Params, lr: float) -> None:
        """Update ``params`` in place; see ``Optimizer.step``."""
        updates = self.state["updates"] + 1
        rates = self.rates(lr, int(updates[0]))
        if _on_device(self, params, grads, rates):
            self.state["updates"][...] = updates
            return
        changes: Changes = {"updates": (self.state["updates"], updates)}
        _, correction_1, correction_2 = rates
        with np.errstate(all="ignore"):
            for name, p in params.items():
                m, v, g = self.state[f"m.{name}"], self.state[f"v.{name}"], grads[name]
                m_next = m + (1 - self.betas[0]) * (g - m)
                v_next = v + (1 - self.betas[1]) * (g * g - v)
                update = np.sqrt(v_next / correction_2)
                update += self.eps
                np.divide(m_next, update, out=update)
                update *= lr / correction_1
                if self.weight_decay:
                    update += lr * self.weight_decay * p
                changes[f"m.{name}"] = m, m_next
                changes[f"v.{name}"] = v, v_next
                changes[name] = p, p - update
        _write(changes)


def _on_device(
    optimizer: Optimizer, params: Params, grads: Params, rates: tuple[float, ...]
) -> bool:
    """Make the update where the parameters lie, if that is on a GPU; return whether it is.

    Raises:
        NonFiniteError: a value would overflow; then nothing has been changed.
    """
    engine = None if not params else engine_of(next(iter(params.values())))
    if engine is None:
        return False
    with engine.here():
        place = validate.kernels_place(engine.xp)
        grads = {
            name: validate.like(f"gradient of {name}", grads[name], name, p, place)
            for name, p in params.items()
        }
    memory = {
        part: {name: optimizer.state[f"{part}.{name}"] for name in params}
        for part in optimizer.memory
    }
    if not optimizing.step(
        engine, optimizer.name, memory, params, grads, rates, optimizer.settings
    ):
        validate.refuse_non_finite({name: on_host(g) for name, g in grads.items()})
        raise validate.NonFiniteError("a parameter would not be finite: expected finite values")
    return True


def _write(changes: Changes) -> None:
    """Write all the new values, or none if one of them is not finite."""
    validate.refuse_non_finite({name: new for name, (_, new) in changes.items()})
    for old, new in changes.values():
        old[...] = new


def make_optimizer(
    name: str, params: Params, *, momentum: float = 0.9, weight_decay: float = 0.0
) -> Optimizer:
    """Return the optimizer ``name`` ("sgd", "momentum", "adamw") for ``params``.

    Raises:
        ValueError: the name is unknown, or weight decay is asked of one that has none.
    """
    validate.choice("optimizer", name, OPTIMIZERS)
    if weight_decay and name != "adamw":
        raise ValueError(f"weight_decay is {weight_decay}: only adamw has it, not {name}")
    if name == "sgd":
        return SGD()
    if name == "momentum":
        return Momentum(params, momentum)
    return AdamW(params, weight_decay=weight_decay)


def clip_global_norm(grads: Params, max_norm: float | None = None) -> float:
    """Scale all gradients in place so that together they are no longer than ``max_norm`` (9.5.3).

    Returns the norm before: √ of the sum of all squares, added in float64. With ``max_norm`` None
    nothing is scaled.
    """
    engine = None if not grads else engine_of(next(iter(grads.values())))
    if engine is not None:
        norm = optimizing.global_norm(engine, grads)
    else:
        with np.errstate(over="ignore"):  # beyond 1e154 a square is infinite, and so is the norm
            squares = [float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values()]
        norm = math.sqrt(sum(squares))
    if max_norm is not None and math.isfinite(norm) and norm > max_norm:
        for g in grads.values():
            g *= max_norm / norm
    return norm


def scheduled(lr: float, schedule: str, step: int, total: int, warmup: int = 0) -> float:
    """Return the learning rate of update ``step`` (from 0) of ``total``.

    The first ``warmup`` updates rise linearly to ``lr``. From there "constant" stays, "linear"
    falls towards 0 in a straight line, "cosine" along half a cosine.
    """
    validate.choice("schedule", schedule, SCHEDULES)
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return lr * (1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)
