"""Our side: what a user runs, ``Trainer.run`` and ``LanguageModel.generate``."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn.batches import Windows
from gpurnn.bench.data import on_host
from gpurnn.bench.lm.blocks import Block
from gpurnn.bench.lm.checks import UPDATES
from gpurnn.bench.lm.runs import TrainRun
from gpurnn.bench.lm.text import EDITION, Text
from gpurnn.language_model import LanguageModel
from gpurnn.training import Run, Trainer, TrainingConfig, prepare

__all__ = [
    "OurGeneration",
    "OurTraining",
    "continuations",
    "finished",
    "first_losses",
    "prepared",
    "weights_of",
]

MOST_BATCHES = 256  # of an epoch: its end, and the order of the next, belong to training
LR, CLIP = 1e-3, 1.0


def prepared(shape: TrainRun, text: Text, device: str) -> Run:
    """Return a run of training on stride-1 windows of the text, cut so that every batch is full.

    Raises:
        ValueError: the text is too short.
    """
    T, n = shape.T, shape.n
    batches = min(MOST_BATCHES, (text.tokens - T) // n)
    if batches < UPDATES:
        raise ValueError(
            f"the text has {text.tokens} tokens: expected at least {UPDATES * n + T}, for "
            f"{UPDATES} batches of n={n} windows of T={T}"
        )
    config = TrainingConfig(
        corpus=text.corpus.name,
        edition=EDITION,
        max_tokens=batches * n + T,
        sampling="windows",
        num_steps=T,
        batch_size=n,
        valid_fraction=0.0,
        hidden_size=shape.h,
        epochs=1_000_000,
        optimizer="adamw",
        lr=LR,
        schedule="constant",
        warmup=0,
        clip=CLIP,
    )
    return prepare(config, text.corpus, device=device)


def first_losses(run: Run) -> list[float]:
    """Train a run's model on its first batches, in order; return the losses of the updates."""
    c = run.config
    found: list[float] = []
    in_order = Windows(
        run.train_ids, c.num_steps, c.batch_size, shuffle=False, count=UPDATES * c.batch_size
    )
    trainer = Trainer(run.model, in_order, c)

    def on_step() -> bool:
        found[:] = trainer.progress.losses
        return len(found) < UPDATES

    trainer.run(on_step, ahead=False)
    return found


def weights_of(model: LanguageModel) -> dict[str, NDArray[Any]]:
    """Return a copy of a model's parameters, on the host."""
    return {name: on_host(a).astype(np.float32) for name, a in model.params.items()}


class OurTraining:
    """A trainer, paused between its blocks.

    The clock starts when the results of the first updates have come (on a GPU those of a chunk,
    with the graphs captured), and stops when those of later ones have.
    """

    def __init__(self, run: Run) -> None:
        self.trainer = run.trainer
        self.tokens = run.config.num_steps * run.config.batch_size  # of each update

    def block(self, seconds: float) -> Block:
        """Train for about so long."""
        progress = self.trainer.progress
        seen: list[tuple[float, int]] = []

        def on_step() -> bool:
            seen.append((time.perf_counter(), progress.step))
            return len(seen) < 2 or seen[-1][0] - seen[0][0] < seconds

        self.trainer.run(on_step)
        (begun, before), (ended, after) = seen[0], seen[-1]
        return Block((after - before) * self.tokens, ended - begun)


def continuations(
    model: LanguageModel, prefixes: Sequence[str], characters: int, temperature: float
) -> list[str]:
    """Continue texts by so many characters, all at once; return them on the host.

    What it gives must be what ``finished`` makes of the other side's ids.
    """
    texts: list[str] = model.generate(list(prefixes), characters, temperature=temperature, seed=0)
    return texts


def finished(model: LanguageModel, prefixes: Sequence[str], ids: NDArray[np.int64]) -> list[str]:
    """Return ids (characters, n) of another side as what our own returns."""
    return [model.continued(p, row) for p, row in zip(prefixes, ids.T, strict=True)]


class OurGeneration:
    """Continuations of prefixes, from one call."""

    def __init__(self, model: LanguageModel, prefixes: Sequence[str], characters: int) -> None:
        self.model, self.prefixes, self.characters = model, prefixes, characters

    def greedy(self, characters: int) -> NDArray[np.int64]:
        """Return the ids (characters, n) that follow the prefixes at temperature 0."""
        texts = continuations(self.model, self.prefixes, characters, 0.0)
        rows = [
            self.model.vocabulary.encode(text[len(prefix) :])
            for text, prefix in zip(texts, self.prefixes, strict=True)
        ]
        return np.stack(rows, axis=1)

    def block(self, seconds: float) -> Block:
        """Generate for about so long."""
        return repeated(self._once, len(self.prefixes) * self.characters, seconds)

    def _once(self) -> None:
        continuations(self.model, self.prefixes, self.characters, 1.0)


def repeated(call: Any, items: int, seconds: float) -> Block:
    """Call once, then again and again for about so long; each call waits for its result."""
    call()
    calls, begun = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        taken = time.perf_counter() - begun
        if taken >= seconds:
            return Block(calls * items, taken)
