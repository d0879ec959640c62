"""Updates of a model whose arrays lie on a GPU (or, emulated, as if they did).

The text, the order of its batches, learning rates and truncation factors of an epoch are put on the
device when it begins. A step finds by itself which batch it is, so all steps of one shape are the
same work: the first is queued as it is, the second captured as a CUDA graph, and all further ones
are launches of that graph. The host reads losses and norms of ``CHUNK`` steps at once, and queues
the next so many before it waits for them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn.batches import Sampler
from gpurnn.cuda import optimizing, update
from gpurnn.cuda.arrays import beside, on_host
from gpurnn.cuda.engines import Array, Engine
from gpurnn.cuda.optimizing import flat_size, views
from gpurnn.cuda.recording import Read, recorder
from gpurnn.language_model import LanguageModel
from gpurnn.optimizers import Optimizer
from gpurnn.slots import Counts, Rates, Record
from gpurnn.training.steps import Plan, Refused, Update

__all__ = ["CHUNK", "DeviceSteps"]

Floats = NDArray[Any]

CHUNK = 16
"""Steps whose results the host reads at once; it knows of a signal, or of a loss that is not
finite, up to twice as many steps later."""


class DeviceSteps:
    """Makes updates on an engine; see ``steps.Steps``.

    The model's parameters become views of one array, and so do the arrays of ``optimizer.state``
    that belong to them. ``optimizer`` says what is to be done and with which settings; its ``step``
    is not called.

    Raises:
        TypeError, ValueError: the sampler's text is none of ids of the model's vocabulary.
    """

    def __init__(
        self,
        engine: Engine,
        model: LanguageModel,
        sampler: Sampler,
        optimizer: Optimizer,
        clip: float | None,
        seed: int,
    ) -> None:
        text = model.ids_beside(sampler.ids)
        self._engine, self._model, self._sampler = engine, model, sampler
        self._optimizer, self._seed = optimizer, seed
        with engine.here():
            xp, dtype = engine.xp, model.rnn.dtype
            size = flat_size(model.params)
            many = [size if part in optimizer.memory else 1 for part in ("m", "v")]
            self._flat = update.Flat(
                xp.zeros(size, dtype), xp.zeros(size, dtype), *(xp.zeros(s, dtype) for s in many)
            )
            self._theta = views(self._flat.theta, model.params)
            self._grads = views(self._flat.grads, model.params)
            for part in optimizer.memory:
                for parameter, view in views(getattr(self._flat, part), model.params).items():
                    view[...] = optimizer.state[f"{part}.{parameter}"]
                    optimizer.state[f"{part}.{parameter}"] = view
            self._adopt()
            self._partials = xp.zeros(update.partial_sums(size), np.float64)
            self._settings = xp.array(optimizing.settings_array(optimizer.settings, clip))
            self._counts = xp.zeros(Counts.SIZE, np.int64)
            self._text = xp.asarray(text, np.int32)
            n = sampler.n
            self._hidden = xp.zeros((model.rnn.num_layers, n, model.rnn.hidden_size), dtype)
        self._carried = False
        self._recorder = recorder(engine)
        self._tables: dict[str, Array] = {}
        self._buffers: dict[int, tuple[Array, Array, Array]] = {}
        self._plan: Plan | None = None
        self._begun = 0  # steps of the plan that have been queued
        self._unread = 0  # of these, the last ones whose record is not on its way
        self._waiting: list[tuple[range, Read]] = []  # batches, their records
        self._refused: str | None = None
        self._fault: RuntimeError | None = None

    @property
    def hidden(self) -> Floats | None:
        """The state carried to the next batch, on the host; None is zeros."""
        if not self._carried:
            return None
        self._recorder.settle()
        states = self._engine.fetched(self._hidden)
        return states[0] if len(states) == 1 else states

    @hidden.setter
    def hidden(self, state: Floats | None) -> None:
        self._carried = state is not None
        with self._engine.here():
            if state is None:
                self._hidden.fill(0)
            else:
                self._hidden[...] = self._engine.xp.array(state.reshape(self._hidden.shape))
            self._engine.settle()

    def begin(self, plan: Plan) -> None:
        """See ``steps.Steps``."""
        assert not self._waiting, "the updates before have not been finished"
        self._recorder.settle()
        self._plan, self._begun, self._unread = None, 0, 0  # until the device knows of it
        self._refused, self._fault = None, None
        batches, first = plan.batches, plan.first
        updates = plan.update + np.arange(len(batches) - first)
        rates = np.ones((len(batches), Rates.SIZE))
        made = self._updates()
        for i, number in enumerate(updates):
            rates[first + i] = self._optimizer.rates(plan.lr(int(number)), made + i + 1)
        xi = np.zeros(0, self._model.rnn.dtype)
        factors = plan.xi(updates)
        if factors is not None:
            unused = np.zeros((first, self._sampler.T), self._model.rnn.dtype)
            xi = np.concatenate([unused, factors])
        starts = [batches.starts(b) for b in range(len(batches))]
        counts = np.zeros(Counts.SIZE, np.int64)
        counts[Counts.NEXT_BATCH] = first
        counts[Counts.FIRST_UPDATE] = plan.update - first
        with self._engine.here():
            self._adopt()
            self._put("rates", rates.reshape(-1))
            self._put("starts", np.concatenate(starts).astype(np.int64))
            self._put("factors", xi.reshape(-1))
            self._put("record", np.zeros(len(batches) * Record.SIZE))
            self._counts[...] = self._engine.xp.array(counts)
            self._engine.settle()
        self._plan = plan

    def advance(self) -> list[Update]:
        """See ``steps.Steps``."""
        while len(self._waiting) < 2 and self._queue_chunk():
            pass
        made = self._collect()
        if made:
            return made
        if self._waiting:
            self._recorder.settle()  # what is dropped may still be written to
            self._waiting.clear()
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        if self._refused is not None:
            raise Refused(self._refused)
        return []

    def finish(self) -> list[Update]:
        """See ``steps.Steps``; what was refused is told by the next ``advance``."""
        self._recorder.settle()
        if self._plan is not None:  # who was interrupted may have queued more than was noted
            queued = int(self._engine.fetched(self._counts)[Counts.NEXT_BATCH]) - self._plan.first
            self._unread += max(0, queued - self._begun)
            self._begun = max(self._begun, queued)
        self._read()
        made = []
        while self._waiting and self._refused is None:
            made += self._collect()
        self._waiting.clear()
        return made

    def state(self) -> dict[str, Floats]:
        """See ``steps.Steps``."""
        self._recorder.settle()
        return {name: on_host(a) for name, a in self._optimizer.state.items()}

    def load_state(self, state: Mapping[str, Floats]) -> None:
        """See ``steps.Steps``."""
        with self._engine.here():
            for name, a in self._optimizer.state.items():
                a[...] = beside(state[name], a)
            self._engine.settle()

    def _updates(self) -> int:
        """Return how many updates the optimizer has made, if it counts them."""
        made = self._optimizer.state.get("updates")
        return 0 if made is None else int(made[0])

    def _adopt(self) -> None:
        """Take the model's parameters in, where they are not the views already."""
        params = self._model.params
        if any(params[name] is not view for name, view in self._theta.items()):
            for name, view in self._theta.items():
                view[...] = beside(params[name], view)
            self._model.use_params(self._theta)

    def _put(self, name: str, a: NDArray[Any]) -> None:
        """Put a table of the epoch on the device, where the one of the last epoch was if it fits.

        A graph has its address in it: a table that has to move takes the graphs along.
        """
        there = self._tables.get(name)
        if there is None or there.size < a.size or bool(there.size) != bool(a.size):
            self._tables[name] = self._engine.xp.zeros(a.size, a.dtype)
            if there is not None:
                self._recorder = recorder(self._engine)
        self._tables[name][: a.size] = self._engine.xp.array(a)

    def _queue_chunk(self) -> bool:
        """Queue some steps and the copy of their records; return whether there were any left."""
        plan = self._plan
        if plan is None or self._refused is not None or self._fault is not None:
            return False
        last = min(plan.first + self._begun + CHUNK, len(plan.batches))
        for b in range(plan.first + self._begun, last):
            n = len(plan.batches.starts(b))
            self._recorder.again(n, lambda n=n: self._step(n))  # type: ignore[misc]
            self._begun, self._unread = self._begun + 1, self._unread + 1
        return self._read()

    def _read(self) -> bool:
        """Queue a copy of the records that no copy was queued of; return whether there were any."""
        if self._plan is None or not self._unread:
            return False
        last = self._plan.first + self._begun
        batches = range(last - self._unread, last)
        part = self._tables["record"][batches.start * Record.SIZE : last * Record.SIZE]
        self._waiting.append((batches, self._recorder.read(part)))
        self._unread = 0
        return True

    def _collect(self) -> list[Update]:
        """Wait for the records that were asked for first; return their updates, up to a refusal."""
        if self._plan is None or not self._waiting or self._refused is not None:
            return []
        batches, read = self._waiting[0]
        record = read().reshape(-1, Record.SIZE)  # an interruption here leaves all as it was
        self._waiting.pop(0)
        made = []
        for b, row in zip(batches, record, strict=True):
            loss, norm = float(row[Record.LOSS]), float(row[Record.NORM])
            if row[Record.STOPPED]:
                self._refused = f"the loss is {loss}, the gradient's norm {norm}"
                if math.isfinite(loss) and math.isfinite(norm):
                    self._refused += ", and a parameter would overflow"
                break
            rows = len(self._plan.batches.starts(b))
            made.append(Update(loss, norm, rows * self._sampler.T))
        self._carried = self._sampler.carries_state and (self._carried or bool(made))
        if "updates" in self._optimizer.state:
            self._optimizer.state["updates"] += len(made)
        try:
            self._engine.check_reports()
        except RuntimeError as e:  # what was made before is told first
            self._fault = e
        return made

    def _step(self, n: int) -> None:
        """Queue one training step of n rows: nothing here may depend on which step it is."""
        engine, model, tables = self._engine, self._model, self._tables
        with engine.here():
            X, Y, xi = self._batch_buffers(n)
            scalars = update.Scalars(
                tables["rates"], self._settings, self._counts, tables["record"]
            )
            update.take_batch(
                engine,
                self._text,
                tables["starts"],
                tables["factors"],
                self._counts,
                X,
                Y,
                xi,
                self._sampler.n,
            )
            carries = self._sampler.carries_state
            hidden = None
            if carries:
                hidden = self._hidden[0] if len(self._hidden) == 1 else self._hidden
            loss, _, after = model.loss_and_gradients(
                X,
                Y,
                hidden,
                xi=xi if tables["factors"].size else None,
                noise=(self._seed, self._counts[Counts.UPDATE : Counts.UPDATE + 1]),
                check_ids=False,
                out=self._grads,
            )
            loss = engine.xp.asarray(loss).reshape(1)
            update.update(engine, self._optimizer.name, self._flat, loss, self._partials, scalars)
            if carries:
                update.keep_state(engine, after, self._hidden, self._counts)

    def _batch_buffers(self, n: int) -> tuple[Array, Array, Array]:
        if n not in self._buffers:
            xp, T = self._engine.xp, self._sampler.T
            with self._engine.lasting():
                X, Y = (xp.zeros((T, n), np.int32) for _ in range(2))
                self._buffers[n] = X, Y, xp.zeros(T, self._model.rnn.dtype)
        return self._buffers[n]
