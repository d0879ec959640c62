"""A validation whose batches lie on a device, queued like a step of the training it belongs to."""

import numpy as np

from gpurnn import planning
from gpurnn.cuda import losses, update
from gpurnn.cuda.engines import Array, Engine
from gpurnn.language_model import LanguageModel
from gpurnn.training.validation import InBatches, Losses

__all__ = ["DeviceValidation"]


class DeviceValidation:
    """Measures a model; what it finds stays on the device, in ``means``, float64, one a batch.

    ``nodes`` is about how many kernels that takes.

    Raises:
        TypeError, ValueError: the batches hold none of ids of the model's vocabulary.
    """

    def __init__(self, engine: Engine, model: LanguageModel, validation: InBatches) -> None:
        self._engine, self._validation = engine, validation
        with engine.here():
            self._batches = [
                (model.ids_beside(X), model.ids_beside(Y)) for X, Y in validation.batches(model)
            ]
            self._tokens = [Y.size for _, Y in self._batches]
            self.means: Array = engine.xp.zeros(len(self._batches), np.float64)
            engine.settle()
        rnn = model.rnn
        self.nodes = 0
        for X, _ in self._batches:
            T, n = X.shape
            plan = planning.plan(
                T=T,
                n=n,
                d=rnn.input_size,
                h=rnn.hidden_size,
                dtype=rnn.dtype.name,
                device=engine.limits,
            )
            whole = plan.kernel in ("resident", "group")
            self.nodes += 4 + rnn.num_layers * (plan.launches if whole else 2 * T)

    def queue(self, model: LanguageModel, counts: Array) -> None:
        """Queue it: always the same work. Where a mean is not finite, no later step is made."""
        with self._engine.here():
            state = None
            for i, (X, Y) in enumerate(self._batches):
                nll, after = model.negative_log_likelihood(X, Y, state, check_ids=False)
                losses.mean(self._engine, nll.reshape(-1), self.means[i : i + 1])
                state = after if self._validation.carries_state else None
            update.stop_unless_finite(self._engine, self.means, counts)

    def losses(self, means: Array) -> Losses:
        """Return what the validation makes of a copy of ``means``, on the host."""
        return self._validation.losses([float(mean) for mean in means], self._tokens)
