"""What one update is made of; dropout and validation."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from tolerance import STANDARD_ERRORS, assert_same_bits, standard_errors_off
from training_setup import (
    TEXT,
    TINY,
    Array,
    assert_same_params,
    params_of,
    pause_at,
    prepared,
    state_of,
    tiny,
    trained,
)

from gpurnn import loss
from gpurnn.language_model import LanguageModel
from gpurnn.optimizers import scheduled
from gpurnn.training.run import Run
from gpurnn.training.validation import Losses, StreamValidation, WindowValidation


def gradients_of_first_update(run: Run, **options: Any) -> tuple[float, dict[str, Array]]:
    """Return loss and gradients of a run's first batch, drawn without disturbing the run."""
    twin = prepared(run.config)
    X, Y = twin.trainer.sampler.epoch(twin.trainer._batch_rng)[0]
    mean, grads, _ = twin.model.loss_and_gradients(X, Y, **options)
    return mean, grads


def norm_of(arrays: Any) -> float:
    return math.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in arrays.values()))


# What one update is made of


@pytest.mark.parametrize("clip", [None, 1e-3, 1e3])
def test_largest_norm_is_that_before_clipping(clip: float | None) -> None:
    config = tiny(clip=clip, lr=0.125, dtype="float64")
    run = prepared(config)
    mean, grads = gradients_of_first_update(run)
    before = params_of(run)
    pause_at(run, 1)
    moved = {name: before[name] - a for name, a in run.model.params.items()}
    norm = norm_of(grads)
    assert run.trainer.progress.largest_norm == pytest.approx(norm, rel=1e-12)
    assert run.trainer.progress.losses == [mean]
    length = norm if clip is None else min(norm, clip)
    assert norm_of(moved) == pytest.approx(0.125 * length, rel=1e-9)
    for name, g in grads.items():
        np.testing.assert_allclose(moved[name], 0.125 * g * length / norm, rtol=1e-6, atol=1e-15)


def test_record_of_an_epoch() -> None:
    config = tiny(sampling="windows", batch_size=60, schedule="cosine", warmup=3, clip=0.05)
    run = prepared(config)
    losses: list[float] = []
    norms: list[float] = []
    inner = run.model.loss_and_gradients

    def spied(*args: Any, **options: Any) -> Any:
        mean, grads, state = inner(*args, **options)
        losses.append(mean)
        norms.append(norm_of(grads))
        return mean, grads, state

    run.model.loss_and_gradients = spied  # type: ignore[method-assign]
    records: list[dict[str, Any]] = []
    run.trainer.run(on_epoch=records.append)
    assert records == run.trainer.history
    assert len(records) == 3
    rows = [60, 60, 60, 22]  # 202 windows; the last batch is smaller and weighs less
    for epoch, record in enumerate(records, start=1):
        means = losses[4 * epoch - 4 : 4 * epoch]
        assert record["epoch"] == epoch
        assert record["step"] == 4 * epoch
        assert record["tokens"] == 202 * 6
        mean = sum(r * m for r, m in zip(rows, means, strict=True)) / 202
        assert record["train_loss"] == pytest.approx(mean, rel=1e-12)
        assert record["train_perplexity"] == pytest.approx(math.exp(mean), rel=1e-12)
        book = sum(map(math.exp, means)) / 4
        assert record["train_perplexity_book"] == pytest.approx(book, rel=1e-12)
        assert record["largest_gradient_norm"] == max(norms[4 * epoch - 4 : 4 * epoch]) > 0.05
        assert record["lr"] == scheduled(0.5, "cosine", 4 * epoch - 1, 12, 3)
        assert record["tokens_per_second"] > 0
    assert "valid_perplexity_book" not in records[0]  # a stream has no batches
    assert 0 < records[0]["seconds"] < records[1]["seconds"] < records[2]["seconds"]


def rates_of(run: Run, updates: int | None = None) -> list[float]:
    """Train and return the learning rate of every update."""
    found: list[float] = []
    inner = run.trainer.optimizer.step

    def spied(params: Any, grads: Any, lr: float) -> None:
        found.append(lr)
        inner(params, grads, lr)

    run.trainer.optimizer.step = spied  # type: ignore[method-assign]
    run.trainer.run(on_step=lambda: len(found) != updates)
    return found


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (0, [0.5] * 20),
        (4, [0.125, 0.25, 0.375] + [0.5] * 17),
        (None, [0.25] + [0.5] * 19),  # a tenth of all
    ],
)
def test_warmup(warmup: int | None, expected: list[float]) -> None:
    run = prepared(tiny(sampling="windows", batch_size=1000, epochs=20, warmup=warmup))
    assert rates_of(run) == pytest.approx(expected)
    assert [record["lr"] for record in run.trainer.history] == pytest.approx(expected)


def test_warmup_of_a_long_run_is_100_updates() -> None:
    run = prepared(tiny(sampling="windows", batch_size=1000, epochs=10_000, warmup=None))
    assert rates_of(run, 3) == pytest.approx([0.005, 0.01, 0.015])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_of_every_update(schedule: str) -> None:
    run = prepared(tiny(sampling="sequential", epochs=6, schedule=schedule, warmup=2))
    assert rates_of(run) == [scheduled(0.5, schedule, step, 24, 2) for step in range(24)]


def xi_of(run: Run) -> list[Any]:
    """Train and return the truncation factors of every update."""
    found: list[Any] = []
    inner = run.model.loss_and_gradients

    def spied(*args: Any, xi: Any = None, **options: Any) -> Any:
        found.append(xi)
        return inner(*args, xi=xi, **options)

    run.model.loss_and_gradients = spied  # type: ignore[method-assign]
    run.trainer.run()
    return found


def test_full_backpropagation_cuts_nothing() -> None:
    assert set(xi_of(prepared(TINY))) == {None}


@pytest.mark.parametrize(
    ("tau", "xi"),
    [
        (1, [0, 0, 0, 0, 0, 0]),
        (2, [0, 1, 0, 1, 0, 1]),
        (4, [0, 1, 1, 1, 0, 1]),
        (6, [0, 1, 1, 1, 1, 1]),
        (99, [0, 1, 1, 1, 1, 1]),
    ],
)
def test_truncated_backpropagation_cuts_every_tau_steps(tau: int, xi: list[int]) -> None:
    run = prepared(tiny(bptt="truncated", tau=tau))
    found = xi_of(run)
    assert len(found) == run.trainer.progress.step
    for factors in found:
        assert_same_bits("xi", factors, np.array(xi, np.float32))


@pytest.mark.parametrize("tau", [1, 2, 4])
def test_update_is_that_of_the_truncated_gradient(tau: int) -> None:
    config = tiny(bptt="truncated", tau=tau, lr=1.0, clip=None)
    run = prepared(config)
    xi = np.array([step % tau != 0 for step in range(6)], np.float32)
    _, truncated = gradients_of_first_update(run, xi=xi)
    _, full = gradients_of_first_update(run)
    assert norm_of({k: truncated[k] - full[k] for k in full}) > 1e-3 * norm_of(full)
    expected = {name: a - truncated[name] for name, a in params_of(run).items()}
    pause_at(run, 1)
    assert_same_params(run.model.params, expected)


@pytest.mark.parametrize("sampling", ["windows", "random", "sequential"])
def test_truncation_at_tau_T_is_full(sampling: str) -> None:
    config = tiny(sampling=sampling, batch_size=16)
    full = trained(config)
    same = trained(dataclasses.replace(config, bptt="truncated", tau=6))
    cut = trained(dataclasses.replace(config, bptt="truncated", tau=5))
    assert_same_params(same.model.params, full.model.params)
    assert state_of(same)[0] == state_of(full)[0] != state_of(cut)[0]


@pytest.mark.parametrize("tau", [2, 3, 10])
def test_randomized_truncation_draws_unbiased_factors(tau: int) -> None:
    found = xi_of(prepared(tiny(bptt="randomized", tau=tau, dtype="float64", epochs=100)))
    draws = np.stack(found)
    pi = 1 - 1 / tau
    assert draws.shape == (100 * 4, 6)
    assert set(np.unique(draws)) == {0.0, 1 / pi}
    assert standard_errors_off(draws, np.ones(6)) < STANDARD_ERRORS
    assert len({row.tobytes() for row in draws}) > 10  # drawn anew for every update


def test_first_update_of_randomized_truncation_is_that_of_its_factors() -> None:
    config = tiny(bptt="randomized", tau=2, lr=1.0, clip=None)
    xi = xi_of(prepared(config))[0]
    run = prepared(config)
    _, grads = gradients_of_first_update(run, xi=xi)
    expected = {name: a - grads[name] for name, a in params_of(run).items()}
    pause_at(run, 1)
    assert_same_params(run.model.params, expected)


def states_of(run: Run) -> list[Any]:
    """Train, and return the state before and after each update."""
    found: list[Any] = []
    inner = run.model.loss_and_gradients

    def spied(X: Any, Y: Any, state: Any = None, **options: Any) -> Any:
        mean, grads, final = inner(X, Y, state, **options)
        found.append((state, final))
        return mean, grads, final

    run.model.loss_and_gradients = spied  # type: ignore[method-assign]
    run.trainer.run()
    return found


def test_state_is_carried_through_an_epoch_of_streams() -> None:
    found = states_of(prepared(tiny(sampling="sequential", epochs=2)))
    assert len(found) == 8
    for epoch in (found[:4], found[4:]):
        assert epoch[0][0] is None
        for (_, final), (state, _) in itertools.pairwise(epoch):
            assert_same_bits("state", state, final)
            assert np.abs(state).max() > 0


@pytest.mark.parametrize("sampling", ["windows", "random"])
def test_no_state_is_carried_between_windows_and_random_partitions(sampling: str) -> None:
    found = states_of(prepared(tiny(sampling=sampling, batch_size=16)))
    assert len(found) > 3
    assert all(state is None for state, _ in found)


# Dropout


def test_dropout_only_in_training() -> None:
    run = trained(tiny(dropout=0.5))
    without = LanguageModel(run.model.vocabulary, hidden_size=5)
    without.load_params(run.model.params)
    validation = run.trainer.validation
    assert validation is not None
    assert validation(run.model) == validation(run.model) == validation(without)
    assert trained(TINY).trainer.history[0]["train_loss"] != run.trainer.history[0]["train_loss"]


def test_dropout_draws_another_mask_for_every_update() -> None:
    run = prepared(tiny(dropout=0.5, lr=1e-30))
    run.trainer.run()
    same = prepared(tiny(dropout=0.0, lr=1e-30))
    same.trainer.run()
    # The weights stay, the batches are the same: what differs is the mask.
    differ = [a != b for a, b in zip(run.trainer.history, same.trainer.history, strict=True)]
    assert all(differ)
    dropped = [record["train_loss"] for record in run.trainer.history]
    assert len(set(dropped)) == len(dropped)


# Validation


def test_stream_validation_is_evaluation() -> None:
    for config in (TINY, tiny(unit="word", batch_size=2, num_steps=4)):
        run = trained(config)
        assert isinstance(run.trainer.validation, StreamValidation)
        found = run.trainer.validation(run.model)
        text = run.model.tokenizer.join(run.model.vocabulary.decode(run.valid_ids))
        evaluation = run.model.evaluate(text)
        assert found.tokens == (evaluation.tokens,) == (len(run.valid_ids) - 1,)
        assert found.mean == evaluation.nats / evaluation.tokens
        record = run.trainer.history[-1]
        assert record["valid_loss"] == found.mean
        assert record["valid_perplexity"] == evaluation.perplexity


def test_window_validation_starts_every_window_afresh() -> None:
    run = trained(tiny(sampling="windows", train_windows=20, valid_windows=13))
    assert isinstance(run.trainer.validation, WindowValidation)
    found = run.trainer.validation(run.model)
    ids = run.model.encode(TEXT)
    nll = np.stack(
        [
            run.model.negative_log_likelihood(ids[j : j + 6, None], ids[j + 1 : j + 7, None])[0][
                :, 0
            ]
            for j in range(20, 33)
        ]
    )
    assert found.tokens == (8 * 6, 5 * 6)
    assert found.means == pytest.approx((nll[:8].mean(), nll[8:].mean()), rel=1e-6)
    assert found.mean == pytest.approx(nll.mean(), rel=1e-6)
    record = run.trainer.history[-1]
    assert record["valid_perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-6)
    book = (math.exp(nll[:8].mean()) + math.exp(nll[8:].mean())) / 2
    assert record["valid_perplexity_book"] == pytest.approx(book, rel=1e-6)


def test_mean_loss_weighs_tokens_and_not_batches() -> None:
    found = Losses((1.0, 4.0), (30, 10))
    assert found.mean == 1.75
    assert found.record("any") == {"any_loss": 1.75, "any_perplexity": loss.perplexity(1.75)}
    book = pytest.approx((math.e + math.e**4) / 2)
    assert found.book_record("any") == {"any_perplexity_book": book}


def test_perplexity_beyond_all_numbers_is_none() -> None:
    """As JSON has no infinity."""
    found = Losses((1e3, 1.0), (1, 1))
    assert found.record("any") == {"any_loss": 500.5, "any_perplexity": math.exp(500.5)}
    assert found.book_record("any") == {"any_perplexity_book": None}
    assert Losses((1e3,), (1,)).record("any") == {"any_loss": 1e3, "any_perplexity": None}


# So many units learn 208 letters by heart, and no longer the rule behind them.
WORSENING = tiny(epochs=40, hidden_size=12, optimizer="adamw", lr=0.02)


def test_the_best_epoch_is_kept() -> None:
    run = prepared(WORSENING)
    by_epoch: list[dict[str, Array]] = []
    run.trainer.run(on_epoch=lambda record: by_epoch.append(params_of(run)))
    losses = [record["valid_loss"] for record in run.trainer.history]
    best = int(np.argmin(losses))
    assert 0 < best < len(losses) - 1
    assert losses[-1] > losses[best] + 0.1
    assert run.trainer.progress.best_epoch == best + 1
    assert run.trainer.progress.best_loss == losses[best]
    assert_same_params(run.trainer.best, by_epoch[best])
    assert_same_params(run.model.params, by_epoch[-1])
    assert run.about()["epoch"] == best + 1
    run.trainer.keep_best()
    assert_same_params(run.model.params, by_epoch[best])
    assert run.trainer.validation is not None
    assert run.trainer.validation(run.model).mean == losses[best]


def test_of_equal_epochs_the_first_is_the_best() -> None:
    run = trained(tiny(lr=1e-30))
    assert len({record["valid_loss"] for record in run.trainer.history}) == 1
    assert run.trainer.progress.best_epoch == 1


def test_without_validation_the_last_epoch_is_kept() -> None:
    run = trained(dataclasses.replace(WORSENING, valid_fraction=0.0))
    assert run.trainer.progress.best_epoch == 40
    assert_same_params(run.trainer.best, run.model.params)
    assert not any(name.startswith("valid") for name in run.trainer.history[-1])


def test_before_the_first_epoch_the_best_are_the_present_parameters() -> None:
    run = prepared(TINY)
    pause_at(run, 1)
    assert_same_params(run.trainer.best, run.model.params)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_stops(patience: int) -> None:
    config = dataclasses.replace(WORSENING, epochs=1000, patience=patience)
    run = trained(config)
    p = run.trainer.progress
    losses = [record["valid_loss"] for record in run.trainer.history]
    assert 1 < p.epoch < 1000
    assert p.epoch == p.best_epoch + patience
    assert min(losses) == losses[p.best_epoch - 1]
    # It stopped the first time that it could.
    for epoch in range(patience + 1, p.epoch):
        assert min(losses[epoch - patience : epoch]) < min(losses[: epoch - patience])
