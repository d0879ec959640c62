"""The training loop, and its whole state as something that can be saved and taken up again."""

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import checkpoint, philox
from gpurnn.batches import Sampler
from gpurnn.cuda.arrays import beside, engine_of, home_of, on_host
from gpurnn.language_model import LanguageModel
from gpurnn.optimizers import make_optimizer, scheduled
from gpurnn.training.config import TrainingConfig
from gpurnn.training.device import DeviceSteps
from gpurnn.training.interrupts import held_interrupts
from gpurnn.training.steps import Ended, Event, HostSteps, Plan, Spoilt, Steps, Update
from gpurnn.training.validation import Losses, Validation
from gpurnn.validate import NonFiniteError

__all__ = ["Trainer", "TrainingDiverged"]

Floats = NDArray[Any]
Record = dict[str, Any]

DEFAULT_WARMUP = 100  # updates


class TrainingDiverged(ArithmeticError):
    """The loss or a gradient is no longer finite; the message says where and what to try."""


@dataclass
class _Progress:
    """Where a run stands, all but arrays and random generators."""

    epoch: int = 0  # completed epochs
    batch: int = 0  # batches done in the current one
    step: int = 0  # updates so far
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # of the current epoch's batches
    tokens: list[int] = field(default_factory=list)
    epoch_tokens: int = 0  # their sum
    largest_norm: float = 0.0  # of the current epoch's gradients, before clipping
    best_loss: float | None = None
    best_epoch: int = 0
    history: list[Record] = field(default_factory=list)


class Trainer:
    """Trains a ``LanguageModel`` in place.

    Args:
        model: updated in place.
        sampler: gives the batches (``gpurnn.batches``).
        config: optimisation; its text and model settings are only carried along.
        validation: measured after every epoch. The parameters of the epoch that did best are kept
            as the result; without validation, those of the last epoch.

    One seed determines everything: the same arguments give the same bits on the same machine,
    with the same number of BLAS threads, with however many interruptions between ``contents`` and
    ``restore``. Only the seconds and tokens per second in the history differ.

    Where the model's parameters lie decides what computes: on a GPU a step is a CUDA graph, and
    everything it needs lies there (``gpurnn.training.device``).
    """

    def __init__(
        self,
        model: LanguageModel,
        sampler: Sampler,
        config: TrainingConfig,
        validation: Validation | None = None,
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.config = config
        self._validation = validation
        self.optimizer = make_optimizer(
            config.optimizer,
            model.params,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        batches, noise = np.random.SeedSequence(config.seed).spawn(2)
        self._batch_rng = np.random.Generator(np.random.PCG64(batches))
        self._noise = int(noise.generate_state(1, np.uint64)[0])  # seed of what has no state
        # before the draw of the current epoch, and of those after it that have been planned or are
        # to be next
        self._rng_states = deque([self._batch_rng.bit_generator.state])
        self._planned = 0  # updates up to the end of the last planned epoch
        self._ahead = False
        self._untold: deque[Record] = deque()  # of epochs that have ended
        self._best: Mapping[str, Floats] = {}
        self.progress = _Progress()
        self._steps = self._make_steps()

    def _make_steps(self) -> Steps:
        engine = engine_of(self.model.params["W_hq"])
        if engine is None:
            return HostSteps(
                self.model,
                self.optimizer,
                self.config.clip,
                self._noise,
                self.validation,
                carries_state=self.sampler.carries_state,
            )
        return DeviceSteps(
            engine,
            self.model,
            self.sampler,
            self.optimizer,
            self.config.clip,
            self._noise,
            self.validation,
        )

    @property
    def validation(self) -> Validation | None:
        """What measures the model after every epoch."""
        return self._validation

    @property
    def history(self) -> list[Record]:
        """One record per completed epoch."""
        return self.progress.history

    @property
    def best(self) -> Mapping[str, Floats]:
        """The parameters of the best epoch counted so far; without validation, of the last one.

        Before the first epoch has ended, the current ones.
        """
        return self._best or self.model.params

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or patience ran out."""
        p, patience = self.progress, self.config.patience
        waited = patience is not None and p.epoch - p.best_epoch >= patience
        return p.epoch >= self.config.epochs or waited

    def run(
        self,
        on_step: Callable[[], bool] = lambda: True,
        on_epoch: Callable[[Record], None] | None = None,
        *,
        ahead: bool | None = None,
    ) -> bool:
        """Train until finished.

        Args:
            on_step: called after every update; returning False pauses the run there. On a GPU it
                is called when the results of some updates have come, while the next ones run: what
                the model's parameters are then is not said, ``contents`` waits and knows.
            on_epoch: called after every epoch with its record.
            ahead: whether a GPU may go on with the next epoch before ``on_epoch`` has been called.
                What the model's parameters are then is not said either, only ``best``; but the GPU
                does not wait for the host. None is where there is no ``on_epoch`` to look at them.

        Returns:
            Whether the run is finished (False: paused; ``run`` again goes on).

        Raises:
            TrainingDiverged: a loss or gradient is not finite. The parameters are those before
                the update that would have spoilt them; if it was in validation, those of the
                epoch's end.

        Whatever is raised, by ``on_step`` and ``on_epoch`` too: nothing goes on by itself then.
        """
        try:
            return self._run(on_step, on_epoch, ahead)
        except BaseException:
            self._steps.settle()
            raise

    def _run(
        self,
        on_step: Callable[[], bool],
        on_epoch: Callable[[Record], None] | None,
        ahead: bool | None,
    ) -> bool:
        p = self.progress
        self._ahead = on_epoch is None if ahead is None else ahead
        self._finish()  # what an exception of on_step, or Ctrl-C, has left
        self._tell(on_epoch)
        if self.finished:
            return True
        while len(self._rng_states) > 1:  # planned, and not begun
            self._rng_states.pop()
        self._steps.begin(self._plan(p.batch, p.step), self._following)
        while events := self._count(self._steps.advance):
            if isinstance(events[0], Update) and not on_step():
                self._finish()
                self._tell(on_epoch)
                return self.finished
            self._tell(on_epoch)
        return True

    def _tell(self, on_epoch: Callable[[Record], None] | None) -> None:
        while self._untold:
            record = self._untold.popleft()
            if on_epoch is not None:
                on_epoch(record)

    def _following(self) -> Plan | None:
        """Plan the epoch after the last planned one, if there will certainly be one."""
        p, patience = self.progress, self.config.patience
        running = len(self._rng_states) - 1
        before = p.epoch + running
        if (running and not self._ahead) or before >= self.config.epochs:
            return None
        if patience is not None and before - p.best_epoch >= patience:
            return None
        return self._plan(0, self._planned)

    def _plan(self, first: int, update: int) -> Plan:
        """Draw an epoch, of which batch ``first`` is to be update number ``update``."""
        rng = self._batch_rng
        rng.bit_generator.state = self._rng_states[-1]
        batches = self.sampler.epoch(rng)
        if first > len(batches):
            raise checkpoint.CheckpointError(
                f"the run has done {first} batches of an epoch that has {len(batches)}: "
                "it was that of another text"
            )
        self._rng_states.append(rng.bit_generator.state)
        self._planned = update + len(batches) - first
        total = max(self.config.epochs * len(batches), 1)
        return Plan(batches, first, update, lambda i: self._lr(i, total), self._truncation)

    def _finish(self) -> None:
        while self._count(self._steps.finish):
            pass

    def _count(self, steps: Callable[[], Sequence[Event]]) -> Sequence[Event]:
        """Count what ``steps`` says has happened, and return it."""
        p, told = self.progress, self._steps.told
        try:
            events = steps()
        except Spoilt as e:
            raise self._diverged(p.step, str(e)) from e
        except NonFiniteError as e:
            raise self._diverged(p.step + 1, str(e)) from e
        with held_interrupts():
            while told:
                event = told[0]
                if isinstance(event, Ended):
                    self._end_epoch(event)
                    continue
                told.popleft()
                p.batch += 1
                p.step += 1
                p.losses.append(event.loss)
                p.tokens.append(event.tokens)
                p.epoch_tokens += event.tokens
                p.epoch_seconds += event.seconds
                p.largest_norm = max(p.largest_norm, event.norm)
        return events

    def _lr(self, step: int, total: int) -> float:
        """The learning rate of one of ``total`` updates."""
        c = self.config
        warmup = min(DEFAULT_WARMUP, total // 10) if c.warmup is None else c.warmup
        return scheduled(c.lr, c.schedule, step, total, warmup)

    def _truncation(self, updates: NDArray[np.integer[Any]]) -> Floats | None:
        """Return the factors of updates by their numbers, (updates, T)."""
        tau, T = self.config.tau, self.sampler.T
        if tau is None:
            return None
        xi = np.ones((len(updates), T), self.model.rnn.dtype)
        if self.config.bptt == "truncated":
            xi[:, ::tau] = 0
        else:
            pi = 1 - 1 / tau
            places = np.arange(T), 0, updates[:, None], philox.CUTS
            drawn = philox.words(self._noise, *places)[..., 0]
            xi[:] = np.where(philox.uniform(drawn) < pi, 1 / pi, 0)
        return xi

    def _diverged(self, update: int, what: str) -> TrainingDiverged:
        c = self.config
        advice = [f"a lower learning rate (lr {c.lr / 10:g} instead of {c.lr:g})"]
        advice.append("a smaller clip" if c.clip is not None else "clipping gradients (clip 1)")
        if c.dtype != "float64":
            advice.append("or float64")
        return TrainingDiverged(
            f"training diverged at update {update} (epoch {self.progress.epoch + 1}): {what}. "
            f"Try {', '.join(advice)}"
        )

    def _end_epoch(self, ended: Ended) -> None:
        """Count an epoch: all of it, or, if something is raised, nothing."""
        p, valid = self.progress, ended.valid
        train = Losses(tuple(p.losses), tuple(p.tokens))
        record: Record = {
            "epoch": p.epoch + 1,
            "step": p.step,
            "tokens": p.epoch_tokens,
            **train.record("train"),
            **train.book_record("train"),
            **({} if valid is None or self.validation is None else self.validation.record(valid)),
            "largest_gradient_norm": p.largest_norm,
            "lr": self._lr(p.step - 1, self.config.epochs * p.batch),
            "tokens_per_second": p.epoch_tokens / max(p.epoch_seconds, 1e-9),
            "seconds": p.seconds + p.epoch_seconds,
        }
        self._steps.told.popleft()
        p.epoch += 1
        p.seconds += p.epoch_seconds
        if valid is None:
            p.best_epoch = p.epoch
        elif p.best_loss is None or valid.mean < p.best_loss:
            p.best_loss, p.best_epoch = valid.mean, p.epoch
        if p.best_epoch == p.epoch:
            self._best = ended.params
        p.history.append(record)
        self._untold.append(record)
        self._rng_states.popleft()
        p.batch, p.losses, p.tokens = 0, [], []
        p.largest_norm, p.epoch_seconds, p.epoch_tokens = 0.0, 0.0, 0

    def keep_best(self) -> None:
        """Copy the best parameters into the model: after the run, not to be trained further."""
        for name, a in self.best.items():
            own = self.model.params[name]
            with home_of(own):
                own[...] = beside(a, own)

    def contents(self) -> checkpoint.Contents:
        """Return a copy of the whole state of the run, to be written to a file."""
        self._finish()
        arrays: dict[str, Floats] = {f"model.{k}": on_host(a) for k, a in self.model.params.items()}
        arrays |= {f"best.{k}": on_host(a) for k, a in self._best.items()}
        arrays |= {f"optimizer.{k}": a for k, a in self._steps.state().items()}
        hidden = self._steps.hidden
        if hidden is not None:
            arrays["state.hidden"] = hidden
        document = {
            "config": self.config.as_json(),
            "model": self.model.config(),
            "sampler": self.sampler.config(),
            "progress": copy.deepcopy(vars(self.progress)),
            "random": {"batches": self._rng_states[0]},
        }
        return checkpoint.Contents("training", {k: a.copy() for k, a in arrays.items()}, document)

    def restore(self, contents: checkpoint.Contents) -> None:
        """Take up a run where ``contents`` left it.

        Raises:
            CheckpointError: it belongs to another model, sampler or optimizer, or lacks something;
                this run is then not to be used.
        """
        try:
            self._restore(contents.document, contents.arrays)
        except (KeyError, TypeError, ValueError) as e:
            if isinstance(e, checkpoint.CheckpointError):
                raise
            raise checkpoint.CheckpointError(f"the checkpoint does not fit this run: {e!r}") from e

    def _restore(self, document: Mapping[str, Any], arrays: Mapping[str, Floats]) -> None:
        for name, own in (("model", self.model.config()), ("sampler", self.sampler.config())):
            theirs = document[name]
            differing = sorted(k for k in own | theirs if own.get(k) != theirs.get(k))
            if differing:
                raise checkpoint.CheckpointError(
                    f"the checkpoint's {name} is another one: it differs in {', '.join(differing)}"
                )
        progress = _Progress(**copy.deepcopy(document["progress"]))
        params, best = _part(arrays, "model."), _part(arrays, "best.")
        state, hidden = _part(arrays, "optimizer."), arrays.get("state.hidden")
        expected = _layout(dict(self.model.params))
        if _layout(state) != _layout(self._steps.state()):
            raise checkpoint.CheckpointError(
                "the checkpoint's optimizer state does not fit this run"
            )
        fits = _layout(best) == (expected if progress.history else {})
        if hidden is not None:
            zero = on_host(self.model.init_state(self.sampler.n))
            fits &= self.sampler.carries_state and _layout({"": hidden}) == _layout({"": zero})
        if not fits:
            raise checkpoint.CheckpointError("the checkpoint's arrays do not fit this run")
        random = document["random"]
        # older files call this "epoch", and have under "batches" the state after the draw
        drawn = progress.batch and "epoch" in random
        self._batch_rng.bit_generator.state = random["epoch" if drawn else "batches"]
        self._rng_states = deque([self._batch_rng.bit_generator.state])
        self._steps.forget()
        self._untold.clear()
        self.model.load_params(params)
        self._steps.load_state(state)
        self._best, self._steps.hidden = best, hidden
        self.progress = progress


def _layout(arrays: Mapping[str, Floats]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (a.shape, a.dtype.str) for name, a in arrays.items()}


def _part(arrays: Mapping[str, Floats], prefix: str) -> dict[str, Floats]:
    return {
        name.removeprefix(prefix): a.copy() for name, a in arrays.items() if name.startswith(prefix)
    }
