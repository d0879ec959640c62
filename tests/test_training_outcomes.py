"""Divergence, counting on the same tokens, and that runs learn."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from training_setup import (
    TINY,
    Array,
    assert_same_params,
    params_of,
    pause_at,
    prepared,
    tiny,
    trained,
)

from gpurnn.text import Corpus
from gpurnn.training.config import TrainingConfig
from gpurnn.training.run import Run, ngram_perplexities, prepare
from gpurnn.training.trainer import TrainingDiverged

# Divergence


DIVERGING = tiny(activation="relu", lr=1e30, clip=None)


def diverged(run: Run, **options: Any) -> tuple[str, dict[str, Array]]:
    """Train a run that diverges; return the message and the parameters after the last update."""
    last = params_of(run)

    def on_step() -> bool:
        nonlocal last
        last = params_of(run)
        return True

    with pytest.raises(TrainingDiverged) as caught:
        run.trainer.run(on_step=on_step, **options)
    return str(caught.value), last


def test_divergence_leaves_the_parameters_of_the_update_before() -> None:
    run = prepared(DIVERGING)
    message, last = diverged(run)
    step = run.trainer.progress.step
    assert 0 < step < 4
    assert message.startswith(f"training diverged at update {step + 1} (epoch 1): ")
    assert "a lower learning rate (lr 1e+29 instead of 1e+30)" in message
    assert "clipping gradients (clip 1)" in message and "float64" in message
    assert_same_params(run.model.params, last)
    assert all(np.isfinite(a).all() for a in run.model.params.values())
    assert len(run.trainer.progress.losses) == step


def test_divergence_with_clipping_advises_a_smaller_clip() -> None:
    message, _ = diverged(prepared(tiny(activation="relu", lr=1e30, clip=0.5)))
    assert "(lr 1e+29 instead of 1e+30)" in message
    assert "a smaller clip" in message and "clip 1)" not in message


def test_divergence_in_float64_does_not_advise_float64() -> None:
    message, _ = diverged(prepared(dataclasses.replace(DIVERGING, dtype="float64", lr=1e300)))
    assert "a lower learning rate (lr 1e+299 instead of 1e+300)" in message
    assert "float64" not in message


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_number_that_is_not_finite_is_never_trained_on(optimizer: str, step: int) -> None:
    run = prepared(tiny(optimizer=optimizer, lr=0.1))
    pause_at(run, step)
    run.model.params["W_hh"][2, 3] = np.nan
    state = {name: a.copy() for name, a in run.trainer.optimizer.state.items()}
    message, last = diverged(run)
    epoch = run.trainer.progress.epoch + 1
    assert message.startswith(
        f"training diverged at update {step + 1} (epoch {epoch}): W_hh holds nan"
    )
    assert run.trainer.progress.step == step
    assert_same_params(run.model.params, last)
    assert_same_params(run.trainer.optimizer.state, state)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_loss_or_gradient_that_is_not_finite_is_not_applied(bad: str, value: float) -> None:
    run = prepared(TINY)
    pause_at(run, 2)
    inner = run.model.loss_and_gradients

    def spoilt(*args: Any, **options: Any) -> Any:
        mean, grads, state = inner(*args, **options)
        if bad == "gradient":
            grads["b_h"][0] = value
        return value if bad == "loss" else mean, grads, state

    run.model.loss_and_gradients = spoilt  # type: ignore[method-assign]
    message, last = diverged(run)
    named = {"loss": f"the loss is {value}", "gradient": f"the gradient's norm {value}"}
    assert named[bad] in message
    assert_same_params(run.model.params, last)
    assert run.trainer.progress.step == 2


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_update_that_overflows_is_not_applied(optimizer: str) -> None:
    run = prepared(tiny(optimizer=optimizer, lr=1e39))  # beyond float32
    _, last = diverged(run)
    assert_same_params(run.model.params, last)
    assert all(np.isfinite(a).all() for a in run.model.params.values())


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_state_of_the_optimizer_never_overflows_unnoticed(optimizer: str) -> None:
    run = prepared(tiny(optimizer=optimizer, lr=1e-30, clip=None, epochs=1))
    inner = run.model.loss_and_gradients

    def steep(*args: Any, **options: Any) -> Any:
        mean, grads, state = inner(*args, **options)
        return mean, {name: np.full_like(g, 3e38) for name, g in grads.items()}, state

    run.model.loss_and_gradients = steep  # type: ignore[method-assign]
    diverged(run)  # or a later, small gradient would move nothing
    assert all(np.isfinite(a).all() for a in run.trainer.optimizer.state.values())
    assert all(np.isfinite(a).all() for a in run.model.params.values())


def test_divergence_found_in_validation_names_the_epoch_and_the_update() -> None:
    # One update an epoch, and none after the one that spoils the model.
    run = prepared(dataclasses.replace(DIVERGING, sampling="windows", batch_size=1000, epochs=2))
    message, last = diverged(run)
    assert "in validation" in message
    assert message.startswith("training diverged at update 1 (epoch 1): ")
    assert_same_params(run.model.params, last)
    assert run.trainer.history == []


def test_validation_loss_that_is_infinite_is_divergence() -> None:
    run = prepared(TINY)

    def on_step() -> bool:
        if run.trainer.progress.step == 4:  # the epoch's last
            run.model.params["b_q"][1:3] = 3e38, -3e38  # finite, but their difference is not
        return True

    with pytest.raises(TrainingDiverged, match=r"update 4 \(epoch 1\): in validation"):
        run.trainer.run(on_step=on_step)
    assert run.trainer.history == []


# Counting, on the same tokens


def witten_bell(train: list[int], q: int, context: tuple[int, ...], token: int) -> float:
    """Return p(token | context) of the Witten-Bell model, by going through the text."""
    m = len(context)
    shorter = 1 / q if m == 0 else witten_bell(train, q, context[1:], token)
    followers = [train[i] for i in range(m, len(train)) if tuple(train[i - m : i]) == context]
    if not followers:
        return shorter
    distinct = len(set(followers))
    return (followers.count(token) + distinct * shorter) / (len(followers) + distinct)


@pytest.mark.parametrize("windows", [False, True], ids=["stream", "windows"])
def test_ngrams_predict_the_tokens_that_the_network_does(windows: bool) -> None:
    config = tiny(sampling="windows", train_windows=40, valid_windows=9) if windows else TINY
    run = prepared(config)
    train, q = run.train_ids.tolist(), len(run.model.vocabulary)
    if windows:
        held_out = run.trainer.validation.windows  # type: ignore[union-attr]
        rows = [[*x, y[-1]] for x, y in zip(held_out.X.tolist(), held_out.Y.tolist(), strict=True)]
    else:
        rows = [run.valid_ids.tolist()]
    assert run.trainer.validation is not None
    predicted = sum(run.trainer.validation(run.model).tokens)
    assert predicted == sum(len(row) - 1 for row in rows)
    found = ngram_perplexities(run, orders=(1, 2, 3))
    assert list(found) == [1, 2, 3]
    for order, perplexity in found.items():
        nats = [
            -math.log(witten_bell(train, q, tuple(row[max(0, t - order + 1) : t]), row[t]))
            for row in rows
            for t in range(1, len(row))
        ]
        assert len(nats) == predicted
        assert perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-9)


def test_ngrams_are_the_published_orders_by_default() -> None:
    assert list(ngram_perplexities(prepared(TINY))) == [1, 2, 5]


def test_ngrams_need_a_validation_text() -> None:
    with pytest.raises(ValueError, match="no validation text"):
        ngram_perplexities(prepared(tiny(valid_fraction=0.0)))


# Learning


def test_loss_falls() -> None:
    losses = [record["train_loss"] for record in trained(tiny(epochs=12)).trainer.history]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses[::3]))
    assert losses[-1] < losses[0] - 0.2


class MarkovSource:
    """A chain of ``order`` with random transitions, whose entropy rate is known."""

    def __init__(self, order: int, q: int, seed: int) -> None:
        self.order, self.q = order, q
        self._rng = np.random.default_rng(seed)
        self.p = self._rng.dirichlet(np.full(q, 0.3), size=(q,) * order)

    def draw(self, size: int) -> list[int]:
        ids = [0] * self.order
        for _ in range(size):
            ids.append(int(self._rng.choice(self.q, p=self.p[tuple(ids[-self.order :])])))
        return ids[self.order :]

    def nats(self, ids: list[int]) -> float:
        """Return −log p per token of the source itself: no model does better but by luck."""
        k = self.order
        return float(
            np.mean([-math.log(self.p[tuple(ids[t - k : t + 1])]) for t in range(k, len(ids))])
        )

    def entropy_rate(self, history: int) -> float:
        """Return H(x_t | the last ``history`` tokens) in the stationary state, in nats."""
        k, q = self.order, self.q
        pi = np.full((q,) * k, q**-k)
        for _ in range(2000):
            pi = (pi[..., None] * self.p).sum(axis=0)
        joint = pi[..., None] * self.p
        joint = joint.sum(axis=tuple(range(k - history)))
        conditional = joint / joint.sum(axis=-1, keepdims=True)
        return float(-(joint * np.log(conditional)).sum())


@pytest.mark.parametrize(
    ("order", "q", "seed"),
    [(1, 3, 1), (2, 3, 1), (2, 3, 2), pytest.param(3, 2, 2, marks=pytest.mark.slow)],
)
def test_a_markov_source_is_learned_to_its_entropy(order: int, q: int, seed: int) -> None:
    source = MarkovSource(order, q, seed)
    ids = source.draw(20_000)
    corpus = Corpus("markov", "".join("abc"[i] for i in ids), f"order {order}, seed {seed}")
    config = TrainingConfig(
        corpus="markov",
        sampling="sequential",
        num_steps=16,
        batch_size=16,
        valid_fraction=0.1,
        hidden_size=32,
        epochs=20,
        optimizer="adamw",
        lr=1e-2,
        schedule="cosine",
        warmup=0,
        clip=1.0,
    )
    run = prepare(config, corpus)
    run.trainer.run()
    best = run.trainer.progress.best_loss
    assert best is not None
    # The source on this very text; over so many tokens it is within a few hundredths of its rate.
    floor = source.nats(ids[18_000:])
    assert floor == pytest.approx(source.entropy_rate(order), abs=0.05)
    assert floor - 0.01 < best < floor + 0.015
    # With one token less of history nobody could: the recurrence has done it.
    if order > 1:
        assert best < source.entropy_rate(order - 1) - 0.1


def test_a_source_without_memory_gives_its_entropy() -> None:
    source = MarkovSource(1, 3, 0)
    source.p = np.broadcast_to(source.p[0], (3, 3))
    p = source.p[0]
    assert source.entropy_rate(1) == pytest.approx(-(p * np.log(p)).sum())
    assert source.entropy_rate(0) == pytest.approx(-(p * np.log(p)).sum())
