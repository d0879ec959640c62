"""Small runs, and what the tests of training have in common."""

import dataclasses
import json
from typing import Any

import numpy as np
from tolerance import assert_same_bits

from gpurnn.text import Corpus
from gpurnn.training.config import TrainingConfig
from gpurnn.training.run import Run, prepare

Array = np.ndarray[Any, Any]


def text_of(size: int, letters: str = "abcdef ", seed: int = 0) -> str:
    """Return a text that leans on its last letter, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    steps = rng.choice(
        len(letters), size, p=[0.5, 0.3, *[0.2 / (len(letters) - 2)] * (len(letters) - 2)]
    )
    return "".join(letters[i] for i in np.cumsum(steps) % len(letters))


TEXT = text_of(260)


CORPUS = Corpus("a text", TEXT, "made for the test")


# Nothing here hangs on the defaults: they are chosen for long runs.
TINY = TrainingConfig(
    corpus="a text",
    sampling="random",
    num_steps=6,
    batch_size=8,
    valid_fraction=0.2,
    hidden_size=5,
    activation="tanh",
    init="uniform",
    epochs=3,
    optimizer="sgd",
    lr=0.5,
    schedule="constant",
    warmup=0,
    clip=1.0,
    seed=1,
)


def tiny(**changes: Any) -> TrainingConfig:
    return dataclasses.replace(TINY, **changes)


# For tests that interrupt a run everywhere: two epochs of two batches, with all that is carried.
SHORTEST = tiny(
    sampling="sequential",
    batch_size=2,
    num_steps=2,
    hidden_size=2,
    max_tokens=16,
    epochs=2,
    optimizer="adamw",
    lr=0.01,
    valid_fraction=0.3,
)


def prepared(config: TrainingConfig) -> Run:
    return prepare(config, CORPUS)


def trained(config: TrainingConfig) -> Run:
    run = prepared(config)
    assert run.trainer.run()
    return run


def params_of(run: Run) -> dict[str, Array]:
    return {name: a.copy() for name, a in run.model.params.items()}


def assert_same_params(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    for name, a in expected.items():
        assert_same_bits(name, found[name], a)


def state_of(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all that a checkpoint holds, but not how long it took."""
    contents = run.trainer.contents()
    arrays = {k: (a.dtype.str, a.shape, a.tobytes()) for k, a in contents.arrays.items()}
    document = json.loads(json.dumps(contents.document))
    progress = document["progress"]
    for timed in (progress, *progress["history"]):
        for name in ("seconds", "epoch_seconds", "tokens_per_second"):
            timed.pop(name, None)
    return arrays, document


def pause_at(run: Run, step: int) -> None:
    progress = run.trainer.progress
    assert progress.step < step
    assert run.trainer.run(on_step=lambda: progress.step < step) is False
    assert progress.step == step
