"""Updates of a model, one batch after another, on NumPy; what training needs to know of any."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpurnn.batches import Epoch
from gpurnn.language_model import LanguageModel
from gpurnn.optimizers import Optimizer, clip_global_norm
from gpurnn.validate import NonFiniteError

__all__ = ["HostSteps", "Plan", "Refused", "Steps", "Update"]

Floats = NDArray[Any]


class Update(NamedTuple):
    """One update that was made: its loss, the gradients' norm before clipping, its targets."""

    loss: float
    norm: float
    tokens: int


class Refused(NonFiniteError):
    """An update was not made, as something in it is not finite."""


class Plan(NamedTuple):
    """What an epoch's updates are to be.

    ``batches`` are all those of the epoch, and the first one to do is number ``first``, as update
    number ``update`` of the run. ``lr`` gives the learning rate of an update by its number, ``xi``
    the truncation factors of several, (updates, T); None where nothing is truncated.
    """

    batches: Epoch
    first: int
    update: int
    lr: Callable[[int], float]
    xi: Callable[[NDArray[np.integer[Any]]], Floats | None]


class Steps(Protocol):
    """Makes the updates of an epoch, in order."""

    hidden: Floats | None
    """The state carried to the next batch, on the host; None is zeros."""

    def begin(self, plan: Plan) -> None:
        """Set out on what is left of an epoch."""

    def advance(self) -> list[Update]:
        """Go on; return updates that have been made since, none only where none is left.

        Raises:
            Refused: an update could not be made, and is as if it had not been tried. Those before
                it come first: they are returned, and the next call raises.
        """

    def finish(self) -> list[Update]:
        """Return those that were begun and not yet returned; then nothing goes on by itself.

        It may be called at any time, after an exception too. That one was refused is for
        ``advance`` to say.
        """

    def state(self) -> dict[str, Floats]:
        """Return what the optimizer remembers, by name, on the host."""

    def load_state(self, state: Mapping[str, Floats]) -> None:
        """Take it up again; names, shapes and dtypes are those of ``state``."""


class HostSteps:
    """On NumPy: an update at a time, each made when it is asked for."""

    def __init__(
        self,
        model: LanguageModel,
        optimizer: Optimizer,
        clip: float | None,
        seed: int,
        *,
        carries_state: bool,
    ) -> None:
        self.hidden: Floats | None = None
        self._model, self._optimizer, self._clip = model, optimizer, clip
        self._seed, self._carries_state = seed, carries_state
        self._plan: Plan | None = None
        self._done = 0

    def begin(self, plan: Plan) -> None:
        """See ``Steps``."""
        self._plan, self._done = plan, 0

    def advance(self) -> list[Update]:
        """See ``Steps``."""
        plan, done = self._plan, self._done
        if plan is None or plan.first + done >= len(plan.batches):
            return []
        X, Y = plan.batches[plan.first + done]
        update = plan.update + done
        factors = plan.xi(np.array([update]))
        loss, grads, hidden = self._model.loss_and_gradients(
            X,
            Y,
            self.hidden,
            xi=None if factors is None else factors[0],
            noise=(self._seed, update),
        )
        norm = clip_global_norm(grads, self._clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Refused(f"the loss is {loss}, the gradient's norm {norm}")
        self._optimizer.step(self._model.params, grads, plan.lr(update))
        if self._carries_state:
            self.hidden = hidden
        self._done += 1
        return [Update(loss, norm, Y.size)]

    def finish(self) -> list[Update]:
        """See ``Steps``."""
        return []

    def state(self) -> dict[str, Floats]:
        """See ``Steps``."""
        return self._optimizer.state

    def load_state(self, state: Mapping[str, Floats]) -> None:
        """See ``Steps``."""
        for name, a in self._optimizer.state.items():
            a[...] = state[name]
