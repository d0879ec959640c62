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
from gpurnn.cuda.engines import Array, Engine
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

    The model's parameters become views of one array, and stay so. ``optimizer`` says what is to be
    done and with which settings; it is not called, and its arrays are only read, here.
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
        self._engine, self._model, self._sampler = engine, model, sampler
        self._optimizer, self._seed = optimizer, seed
        self._kept: dict[str, Floats] = dict(optimizer.state)  # all but what is on the device
        with engine.here():
            xp, dtype = engine.xp, model.rnn.dtype
            params = model.params
            size = model.num_parameters()
            many = [size if part in optimizer.memory else 1 for part in ("m", "v")]
            self._flat = update.Flat(
                xp.zeros(size, dtype), xp.zeros(size, dtype), *(xp.zeros(s, dtype) for s in many)
            )
            self._views = {part: _views(a, params) for part, a in self._flat._asdict().items()}
            for parameter, view in self._views["theta"].items():
                view[...] = params[parameter]
            model.use_params(self._views["theta"])
            self._partials = xp.zeros(update.partial_sums(size), np.float64)
            self._settings = xp.array(optimizing.settings_array(optimizer.settings, clip))
            self._counts = xp.zeros(Counts.SIZE, np.int64)
            self._text = xp.array(np.asarray(sampler.ids, np.int32))
            n = sampler.n
            self._hidden = xp.zeros((model.rnn.num_layers, n, model.rnn.hidden_size), dtype)
        self.load_state(optimizer.state)
        self._recorder = recorder(engine)
        self._tables: dict[str, Array] = {}
        self._buffers: dict[int, tuple[Array, Array, Array]] = {}
        self._plan: Plan | None = None
        self._begun = 0
        self._waiting: list[tuple[list[int], Read]] = []
        self._refused: str | None = None

    @property
    def hidden(self) -> Floats | None:
        """The state carried to the next batch, on the host."""
        if not self._sampler.carries_state:
            return None
        self._recorder.settle()
        states = self._engine.fetched(self._hidden)
        return states[0] if len(states) == 1 else states

    @hidden.setter
    def hidden(self, state: Floats | None) -> None:
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
        self._plan, self._begun, self._refused = plan, 0, None
        batches = plan.batches
        rates = np.ones((len(batches), Rates.SIZE))
        factors = []
        for b in range(plan.first, len(batches)):
            number = plan.update + b - plan.first
            done = self._updates() + b - plan.first
            rates[b] = self._optimizer.rates(plan.lr(number), done + 1)
            factors.append(plan.xi(number))
        xi = np.zeros(0, self._model.rnn.dtype)
        if factors and factors[0] is not None:
            unused = np.zeros((plan.first, self._sampler.T), self._model.rnn.dtype)
            xi = np.concatenate([unused, np.stack([f for f in factors if f is not None])])
        starts = [batches.starts(b) for b in range(len(batches))]
        counts = np.zeros(Counts.SIZE, np.int64)
        counts[Counts.NEXT_BATCH] = plan.first
        counts[Counts.FIRST_UPDATE] = plan.update - plan.first
        with self._engine.here():
            self._put("rates", rates.reshape(-1))
            self._put("starts", np.concatenate(starts).astype(np.int64))
            self._put("factors", xi.reshape(-1))
            self._put("record", np.zeros(len(batches) * Record.SIZE))
            self._counts[...] = self._engine.xp.array(counts)
            self._engine.settle()

    def advance(self) -> list[Update]:
        """See ``steps.Steps``."""
        while len(self._waiting) < 2 and self._queue_chunk():
            pass
        return self._collect()

    def finish(self) -> list[Update]:
        """See ``steps.Steps``."""
        made = []
        while self._waiting:
            made += self._collect()
        self._recorder.settle()
        return made

    def state(self) -> dict[str, Floats]:
        """See ``steps.Steps``."""
        self._recorder.settle()
        state = dict(self._kept)
        for part in self._optimizer.memory:
            for parameter, view in self._views[part].items():
                state[f"{part}.{parameter}"] = self._engine.fetched(view)
        return state

    def load_state(self, state: Mapping[str, Floats]) -> None:
        """See ``steps.Steps``."""
        with self._engine.here():
            for part in self._optimizer.memory:
                for parameter, view in self._views[part].items():
                    view[...] = self._engine.xp.array(state[f"{part}.{parameter}"])
            self._engine.settle()
        if "updates" in state:
            self._kept["updates"] = np.array(state["updates"])

    def _updates(self) -> int:
        return int(self._kept["updates"][0]) if "updates" in self._kept else 0

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
        if plan is None or self._refused is not None:
            return False
        first = plan.first + self._begun
        last = min(first + CHUNK, len(plan.batches))
        if first >= last:
            return False
        widths = [len(plan.batches.starts(b)) for b in range(first, last)]
        for n in widths:
            self._recorder.again(n, lambda n=n: self._step(n))  # type: ignore[misc]
        part = self._tables["record"][first * Record.SIZE : last * Record.SIZE]
        self._waiting.append(([n * self._sampler.T for n in widths], self._recorder.read(part)))
        self._begun = last - plan.first
        return True

    def _collect(self) -> list[Update]:
        """Wait for the chunk that was queued first and return its updates."""
        if self._refused is not None:
            self._waiting.clear()
            raise Refused(self._refused)
        if not self._waiting:
            return []
        tokens, read = self._waiting.pop(0)
        record = read().reshape(-1, Record.SIZE)
        self._engine.check_reports()
        made = []
        for row, count in zip(record, tokens, strict=True):
            loss, norm = float(row[Record.LOSS]), float(row[Record.NORM])
            if row[Record.STOPPED]:
                self._refused = f"the loss is {loss}, the gradient's norm {norm}"
                if math.isfinite(loss) and math.isfinite(norm):
                    self._refused += ", and a parameter would overflow"
                break
            made.append(Update(loss, norm, count))
        if "updates" in self._kept:
            self._kept["updates"] = self._kept["updates"] + len(made)
        return made if made or self._refused is None else self._collect()

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
                out=self._views["grads"],
            )
            loss = engine.xp.asarray(loss).reshape(1)
            update.update(engine, self._optimizer.name, self._flat, loss, self._partials, scalars)
            if carries:
                update.keep_state(engine, after, self._hidden, self._counts)

    def _batch_buffers(self, n: int) -> tuple[Array, Array, Array]:
        if n not in self._buffers:
            xp, T = self._engine.xp, self._sampler.T
            X, Y = (xp.zeros((T, n), np.int32) for _ in range(2))
            self._buffers[n] = X, Y, xp.zeros(T, self._model.rnn.dtype)
        return self._buffers[n]


def _views(flat: Array, params: Mapping[str, Floats]) -> dict[str, Array]:
    """Cut a flat array into one for each parameter; none if it is not long enough."""
    views: dict[str, Array] = {}
    begin = 0
    if flat.size < sum(p.size for p in params.values()):
        return views
    for name, p in params.items():
        views[name] = flat[begin : begin + p.size].reshape(p.shape)
        begin += p.size
    return views
