"""Updates of a model, one batch after another, on NumPy; what training needs to know of any."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpurnn.batches import Epoch
from gpurnn.cuda.arrays import copied
from gpurnn.language_model import LanguageModel
from gpurnn.optimizers import Optimizer, clip_global_norm
from gpurnn.training.interrupts import held_interrupts
from gpurnn.training.validation import Losses, Validation
from gpurnn.validate import NonFiniteError

__all__ = [
    "Ended",
    "Event",
    "HostSteps",
    "Plan",
    "Refused",
    "Spoilt",
    "Steps",
    "Update",
    "validated",
]

Floats = NDArray[Any]


class Update(NamedTuple):
    """One update that was made: its loss, the gradients' norm before clipping, its targets."""

    loss: float
    norm: float
    tokens: int
    seconds: float


class Ended(NamedTuple):
    """An epoch has ended: what validation found, and a copy of the parameters."""

    valid: Losses | None
    params: Mapping[str, Floats]


Event = Update | Ended


class Refused(NonFiniteError):
    """An update was not made, as something in it is not finite."""


class Spoilt(NonFiniteError):
    """Validation at the end of an epoch found something that is not finite."""


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
    """Makes the updates of epochs, in order, and validates after each."""

    hidden: Floats | None
    """The state carried to the next batch, on the host; None is zeros, as before a first batch."""

    told: deque[Event]
    """What has happened, in order; who counts it takes it out."""

    def begin(self, plan: Plan, following: Callable[[], Plan | None]) -> None:
        """Set out on what is left of an epoch.

        ``following`` gives the whole epoch after the last that was given, or None if it is not
        certain yet that there will be one; it may be asked before the last has ended.
        """

    def advance(self) -> Sequence[Event]:
        """Go on; return updates that have been made since, or that an epoch has ended.

        One or the other, which is also put into ``told``; nothing only where there is nothing left.

        Raises:
            Refused: an update could not be made, and is as if it had not been tried. What was
                before it comes first, and the next call raises.
            Spoilt: as validation found what is not finite, no further update was made.
        """

    def finish(self) -> Sequence[Event]:
        """Return, and tell, some of what was begun and is not yet told; nothing goes on then.

        It may be called at any time, after an exception too, and is to be called until it returns
        nothing. That something was refused is for ``advance`` to say, and what can only be
        validated while nothing else goes on is left to it.
        """

    def settle(self) -> None:
        """Wait until nothing goes on by itself."""

    def forget(self) -> None:
        """Drop all that was begun and told: the run goes on from elsewhere."""

    def state(self) -> dict[str, Floats]:
        """Return what the optimizer remembers, by name, on the host."""

    def load_state(self, state: Mapping[str, Floats]) -> None:
        """Take it up again; names, shapes and dtypes are those of ``state``."""


def validated(validation: Validation | None, model: LanguageModel) -> Losses | None:
    """Return what validation finds.

    Raises:
        Spoilt: it is not finite.
    """
    if validation is None:
        return None
    try:
        valid = validation(model)
    except NonFiniteError as e:
        raise Spoilt(f"in validation, {e}") from e
    if not math.isfinite(valid.mean):
        raise Spoilt(f"in validation, the loss is {valid.mean}")
    return valid


class HostSteps:
    """On NumPy: an update at a time, each made when it is asked for."""

    def __init__(
        self,
        model: LanguageModel,
        optimizer: Optimizer,
        clip: float | None,
        seed: int,
        validation: Validation | None,
        *,
        carries_state: bool,
    ) -> None:
        self.hidden: Floats | None = None
        self.told: deque[Event] = deque()
        self._model, self._optimizer, self._clip = model, optimizer, clip
        self._seed, self._carries_state = seed, carries_state
        self._validation = validation
        self._plan: Plan | None = None
        self._following: Callable[[], Plan | None] = lambda: None
        self._done = 0

    def begin(self, plan: Plan, following: Callable[[], Plan | None]) -> None:
        """See ``Steps``."""
        self._following = following
        self._set_out(plan)

    def _set_out(self, plan: Plan | None) -> None:
        self._plan, self._done = plan, 0
        if plan is not None and plan.first == 0:
            self.hidden = None

    def advance(self) -> list[Update] | list[Ended]:
        """See ``Steps``."""
        if self._plan is None:
            self._set_out(self._following())
        plan = self._plan
        if plan is None:
            return []
        if plan.first + self._done < len(plan.batches):
            return [self._step(plan, self._done)]
        valid = validated(self._validation, self._model)
        ended = Ended(valid, {name: copied(a) for name, a in self._model.params.items()})
        with held_interrupts():
            self._plan = None
            self.told.append(ended)
        return [ended]

    def _step(self, plan: Plan, done: int) -> Update:
        started = time.perf_counter()
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
        with held_interrupts():
            self._optimizer.step(self._model.params, grads, plan.lr(update))
            if self._carries_state:
                self.hidden = hidden
            self._done += 1
            made = Update(loss, norm, Y.size, time.perf_counter() - started)
            self.told.append(made)
        return made

    def finish(self) -> list[Event]:
        """See ``Steps``."""
        return []

    def settle(self) -> None:
        """See ``Steps``."""

    def forget(self) -> None:
        """See ``Steps``."""
        self._plan = None
        self.told.clear()

    def state(self) -> dict[str, Floats]:
        """See ``Steps``."""
        return self._optimizer.state

    def load_state(self, state: Mapping[str, Floats]) -> None:
        """See ``Steps``."""
        for name, a in self._optimizer.state.items():
            a[...] = state[name]
