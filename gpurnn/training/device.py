"""Updates of a model whose arrays lie on a GPU (or, emulated, as if they did).

The text lies on the device, and so do, a row a batch, where batches begin, learning rates and
truncation factors. A step finds by itself which batch it is, so all steps of one shape are the same
work: one CUDA graph, which is launched again and again; validation is another. The host reads
losses and norms of up to ``CHUNK`` steps at once, and queues the next so many before it waits for
them, those of the next epoch too.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

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
from gpurnn.slots import Counts, Record
from gpurnn.training.device_validation import DeviceValidation
from gpurnn.training.interrupts import held_interrupts
from gpurnn.training.steps import Ended, Event, Plan, Refused, Spoilt, Update, validated
from gpurnn.training.tables import Tables
from gpurnn.training.validation import InBatches, Validation
from gpurnn.validate import NonFiniteError

__all__ = ["CHUNK", "DeviceSteps"]

Floats = NDArray[Any]

CHUNK = 16
"""Steps whose results the host reads at once; it knows of a signal, or of a loss that is not
finite, up to twice as many steps later."""


MOST_NODES = 20_000
"""Kernels of a validation that is captured as a graph; a larger one is queued kernel by kernel."""

MOST_ENDS = 2
"""Ends of epochs that are queued at once, each with a copy of all parameters."""


class _Steps(NamedTuple):
    """Steps whose records are on their way."""

    plan: Plan
    batches: range
    record: Read
    marks: tuple[Any, Any]  # before them and after them


class _End(NamedTuple):
    """The end of an epoch: a copy of the parameters, there when ``mark`` is reached.

    ``means`` is on its way, or None where no validation is queued.
    """

    params: Mapping[str, Array]
    means: Read | None
    mark: Any


def _nothing_follows() -> None:
    return None


class DeviceSteps:
    """Makes updates on an engine; see ``steps.Steps``.

    The model's parameters become views of one array, and so do the arrays of ``optimizer.state``
    that belong to them. ``optimizer`` says what is to be done and with which settings; its ``step``
    is not called.

    A ``validation`` that is ``InBatches`` is queued; any other is called when all that was queued
    before it is done, and nothing is queued behind it.

    Raises:
        TypeError, ValueError: the sampler's text, or that of a validation in batches, is none of
            ids of the model's vocabulary.
    """

    def __init__(
        self,
        engine: Engine,
        model: LanguageModel,
        sampler: Sampler,
        optimizer: Optimizer,
        clip: float | None,
        seed: int,
        validation: Validation | None,
    ) -> None:
        text = model.ids_beside(sampler.ids)
        self._engine, self._model, self._sampler = engine, model, sampler
        self._optimizer, self._seed, self._validation = optimizer, seed, validation
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
            self._partials = xp.zeros(update.partial_sums(size), np.float64)
            self._settings = xp.array(optimizing.settings_array(optimizer.settings, clip))
            self._counts = xp.zeros(Counts.SIZE, np.int64)
            self._text = xp.asarray(text, np.int32)
            n = sampler.n
            shape = model.rnn.num_layers, n, model.rnn.hidden_size
            self._hidden, self._zero_state = xp.zeros(shape, dtype), xp.zeros(shape, dtype)
        self.told: deque[Event] = deque()
        self._carried = False
        self._recorder = recorder(engine)
        self._adopt()
        self._queued_validation: DeviceValidation | None = None
        if isinstance(validation, InBatches):
            self._queued_validation = DeviceValidation(engine, model, validation)
        self._tables: Tables | None = None
        self._buffers: dict[int, tuple[Array, Array, Array]] = {}
        self._following: Callable[[], Plan | None] = _nothing_follows
        self._plan: Plan | None = None  # the last one that was set out on
        self._begun = 0  # steps of it that have been queued
        self._unread = 0  # of these, the last ones whose record is not on its way
        self._since: Any = None  # a mark before them
        self._at_end = False  # whether what comes after the last step has been queued
        self._made_before = 0  # updates of the optimizer, less those of the run
        self._waiting: deque[_Steps | _End] = deque()
        self._refused: Callable[[], NonFiniteError] | None = None
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

    def begin(self, plan: Plan, following: Callable[[], Plan | None]) -> None:
        """See ``steps.Steps``."""
        self._drop()
        self._raise_fault()
        self._following = following
        made = self._optimizer.state.get("updates")
        self._made_before = 0 if made is None else int(made[0]) - plan.update
        if self._tables is None:
            truncated = plan.xi(np.zeros(0, np.int64)) is not None
            dtype = self._model.rnn.dtype
            self._tables = Tables(self._engine, self._sampler, dtype, truncated=truncated)
        self._recorder.once(lambda: self._counts.fill(0))
        self._set_out(plan)

    def forget(self) -> None:
        """See ``steps.Steps``."""
        self._drop()
        self._fault = None
        self.told.clear()

    def _drop(self) -> None:
        """Drop what was begun and has not been told."""
        self._recorder.settle()  # it may still be written to
        self._plan, self._following = None, _nothing_follows
        self._waiting.clear()
        self._refused = None

    def settle(self) -> None:
        """See ``steps.Steps``."""
        self._recorder.settle()

    def _set_out(self, plan: Plan) -> None:
        """Let the coming steps be those of a plan."""
        tables = self._existing_tables()
        self._adopt()
        if not tables.holds(len(plan.batches)):
            self._recorder.settle()
            self._recorder = recorder(self._engine)  # graphs have the old addresses in them
            tables.grow(len(plan.batches))
        places = np.array([plan.first, plan.update - plan.first], np.int64)

        def begin() -> None:
            if plan.first == 0 and self._sampler.carries_state:  # unless a step was refused
                update.keep_state(self._engine, self._zero_state, self._hidden, self._counts)
            self._counts[Counts.NEXT_BATCH :] = self._engine.xp.array(places)

        self._recorder.once(begin)
        self._plan, self._begun, self._unread, self._at_end = plan, 0, 0, False

    def advance(self) -> list[Update] | list[Ended]:
        """See ``steps.Steps``."""
        while self._little_waits() and self._queue_more():
            pass
        if self._waiting and self._refused is None:
            first = self._waiting[0]
            told = self._steps_made(first) if isinstance(first, _Steps) else self._ended(first)
            if told:
                return told
        if self._waiting:
            self._recorder.settle()  # what is dropped may still be written to
            self._waiting.clear()
        self._raise_fault()
        if self._refused is not None:
            raise self._refused()
        return []

    def finish(self) -> Sequence[Event]:
        """See ``steps.Steps``; what was refused is told by the next ``advance``."""
        self._recorder.settle()
        if self._plan is not None:  # who was interrupted may have queued more than was noted
            counts = self._engine.fetched(self._counts)
            upcoming = int(counts[Counts.FIRST_UPDATE] + counts[Counts.NEXT_BATCH])
            more = max(0, upcoming - self._plan.update - self._begun)
            self._begun, self._unread = self._begun + more, self._unread + more
        self._read()
        told: Sequence[Event] = []
        if self._waiting and self._refused is None:
            first = self._waiting[0]
            if isinstance(first, _Steps):
                told = self._steps_made(first)
            elif not self._validates_alone:
                told = self._ended(first)
        if self._refused is not None:
            self._recorder.settle()
            self._waiting.clear()
        return told

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

    def _adopt(self) -> None:
        """Take the model's parameters in, where they are not the views already."""
        params = self._model.params
        if any(params[name] is not view for name, view in self._theta.items()):
            self._recorder.settle()
            with self._engine.here():
                for name, view in self._theta.items():
                    view[...] = beside(params[name], view)
                self._engine.settle()
            self._model.use_params(self._theta)

    def _existing_tables(self) -> Tables:
        assert self._tables is not None, "no epoch has begun"
        return self._tables

    @property
    def _validates_alone(self) -> bool:
        """Whether there is a validation that cannot be queued."""
        return self._validation is not None and self._queued_validation is None

    def _little_waits(self) -> bool:
        """Whether more is to be queued before the first of it is waited for."""
        steps = sum(len(item.batches) for item in self._waiting if isinstance(item, _Steps))
        ends = sum(isinstance(item, _End) for item in self._waiting)
        return steps <= CHUNK and ends < MOST_ENDS

    def _raise_fault(self) -> None:
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def _check(self) -> None:
        """Note what kernels report; what was made is told before it is raised."""
        try:
            self._engine.check_reports()
        except RuntimeError as e:
            self._fault = self._fault or e

    def _queue_more(self) -> bool:
        """Queue some steps, or the end of an epoch with them; return whether there were any."""
        if self._plan is None or self._refused is not None or self._fault is not None:
            return False
        if self._at_end:
            if self._validates_alone and self._waiting:
                return False
            following = self._following()
            if following is None:
                return False
            self._set_out(following)
        self._queue_chunk(self._plan)
        if self._plan.first + self._begun == len(self._plan.batches):
            self._queue_end()
        return True

    def _queue_chunk(self, plan: Plan) -> None:
        """Queue up to ``CHUNK`` steps, and the copy of their records."""
        first = plan.first + self._begun
        batches = range(first, min(first + CHUNK, len(plan.batches)))
        if not batches:
            return
        tables = self._existing_tables()
        self._since = self._recorder.mark()
        self._recorder.once(lambda: tables.write(plan, batches, partial(self._rates, plan)))
        for b in batches:
            n = len(plan.batches.starts(b))
            step = partial(self._step, n, self._counts, tables.record)
            self._recorder.again(n, step, partial(self._rehearse, n))
            self._begun, self._unread = self._begun + 1, self._unread + 1
        self._read()

    def _rates(self, plan: Plan, update: int) -> tuple[float, ...]:
        return self._optimizer.rates(plan.lr(update), self._made_before + update + 1)

    def _read(self) -> None:
        """Queue a copy of the records that no copy was queued of."""
        if self._plan is None or not self._unread:
            return
        last = self._plan.first + self._begun
        batches = range(last - self._unread, last)
        marks = self._since, self._recorder.mark()
        record = self._recorder.read(self._existing_tables().noted(batches))
        with held_interrupts():
            self._waiting.append(_Steps(self._plan, batches, record, marks))
            self._unread = 0

    def _queue_end(self) -> None:
        """Queue validation, and copies of what it finds and of the parameters."""
        means, validation = None, self._queued_validation
        if validation is not None:
            queue = partial(validation.queue, self._model, self._counts)
            if validation.nodes <= MOST_NODES:
                rehearse = partial(self._rehearse_validation, validation)
                self._recorder.again("validation", queue, rehearse)
            else:
                self._recorder.once(queue)
            means = self._recorder.read(validation.means)
        kept: list[Array] = []
        self._recorder.once(lambda: kept.append(self._flat.theta.copy()))
        params = views(kept[0], self._model.params)
        end = _End(params, means, self._recorder.mark())
        with held_interrupts():
            self._waiting.append(end)
            self._at_end = True

    def _steps_made(self, item: _Steps) -> list[Update]:
        """Wait for the records of steps; return their updates, up to one that was refused."""
        record = item.record().reshape(-1, Record.SIZE)  # interrupted here, all is as it was
        seconds = self._recorder.between(*item.marks) / len(item.batches)
        made, refused = [], None
        for b, row in zip(item.batches, record, strict=True):
            loss, norm = float(row[Record.LOSS]), float(row[Record.NORM])
            if row[Record.STOPPED]:
                what = f"the loss is {loss}, the gradient's norm {norm}"
                if math.isfinite(loss) and math.isfinite(norm):
                    what += ", and a parameter would overflow"
                refused = partial(Refused, what)
                break
            rows = len(item.plan.batches.starts(b))
            made.append(Update(loss, norm, rows * self._sampler.T, seconds))
        self._check()
        with held_interrupts():
            self._waiting.popleft()
            self._refused = refused
            before = self._carried and item.batches.start > 0
            self._carried = self._sampler.carries_state and (before or bool(made))
            if "updates" in self._optimizer.state:
                self._optimizer.state["updates"] += len(made)
            self.told.extend(made)
        return made

    def _ended(self, item: _End) -> list[Ended]:
        """Return that an epoch has ended, or nothing where validation found what is not finite."""
        self._recorder.wait(item.mark)
        valid = None
        if self._queued_validation is not None and item.means is not None:
            means = item.means()
            self._check()
            spoilt = means[~np.isfinite(means)]
            if spoilt.size:  # as the device has judged, too
                self._refused = partial(Spoilt, f"in validation, the loss is {spoilt[0]}")
                return []
            valid = self._queued_validation.losses(means)
        elif self._validates_alone:
            self._recorder.settle()
            valid = validated(self._validation, self._model)
        ended = Ended(valid, item.params)
        with held_interrupts():
            self._waiting.popleft()
            self.told.append(ended)
        return [ended]

    def _rehearse(self, n: int) -> None:
        """Do all that a step of n rows does, but as one that is refused."""
        with self._engine.here():
            counts = self._engine.xp.zeros_like(self._counts)
            counts[Counts.NEXT_STOPPED :] = self._engine.xp.array(np.array([1, 0, 0]))
            self._step(n, counts, self._engine.xp.zeros(Record.SIZE, np.float64))

    def _rehearse_validation(self, validation: DeviceValidation) -> None:
        with self._engine.here():
            validation.queue(self._model, self._engine.xp.zeros_like(self._counts))

    def _step(self, n: int, counts: Array, record: Array) -> None:
        """Queue one training step of n rows: nothing here may depend on which step it is."""
        engine, model, tables = self._engine, self._model, self._existing_tables()
        with engine.here():
            X, Y, xi = self._batch_buffers(n)
            scalars = update.Scalars(tables.rates, self._settings, counts, record)
            update.take_batch(
                engine,
                self._text,
                tables.starts,
                tables.factors,
                counts,
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
                xi=xi if tables.factors.size else None,
                noise=(self._seed, counts[Counts.UPDATE : Counts.UPDATE + 1]),
                check_ids=False,
                out=self._grads,
            )
            loss = engine.xp.asarray(loss).reshape(1)
            update.update(engine, self._optimizer.name, self._flat, loss, self._partials, scalars)
            if carries:
                update.keep_state(engine, after, self._hidden, counts)

    def _batch_buffers(self, n: int) -> tuple[Array, Array, Array]:
        if n not in self._buffers:
            xp, T = self._engine.xp, self._sampler.T
            with self._engine.lasting():
                X, Y = (xp.zeros((T, n), np.int32) for _ in range(2))
                self._buffers[n] = X, Y, xp.zeros(T, self._model.rnn.dtype)
        return self._buffers[n]
