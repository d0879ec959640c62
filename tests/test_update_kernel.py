"""A training step's own kernels: updates against the optimizers on NumPy, batches, kept states."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tolerance import assert_close, assert_same_bits

import gpurnn
from gpurnn import planning
from gpurnn.batches import RandomPartition, SequentialPartition, Windows
from gpurnn.cuda import update
from gpurnn.cuda.engines import EmulatedEngine
from gpurnn.cuda.optimizing import settings_array
from gpurnn.optimizers import OPTIMIZERS, Optimizer, clip_global_norm, make_optimizer
from gpurnn.slots import Counts, Rates, Record
from gpurnn.validate import NonFiniteError

Array = NDArray[Any]

H100 = planning.limits("device", "H100")
STEPS = 4

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def engine(seed: int | None = None) -> EmulatedEngine:
    return EmulatedEngine(H100, seed, check_races=True)


def build(name: str, params: dict[str, Array]) -> Optimizer:
    decay = {"weight_decay": 0.1} if name == "adamw" else {}
    return make_optimizer(name, params, momentum=0.8, **decay)


def rate(step: int) -> float:
    return 0.1 / (1 + step)


class Device:
    """One flat parameter array, updated by the kernels."""

    def __init__(
        self,
        name: str,
        theta: Array,
        clip: float | None,
        steps: int = STEPS,
        seed: int | None = None,
    ) -> None:
        self.name, self.engine = name, engine(seed)
        optimizer = build(name, {"a": theta})
        many = [theta.size if part in optimizer.memory else 1 for part in ("m", "v")]
        self.flat = update.Flat(
            theta.copy(),
            np.full(theta.size, np.nan, theta.dtype),
            *(np.zeros(size, theta.dtype) for size in many),
        )
        rates = np.ones((steps, Rates.SIZE))
        for step in range(steps):
            rates[step] = optimizer.rates(rate(step), step + 1)
        self.scalars = update.Scalars(
            rates.reshape(-1),
            settings_array(optimizer.settings, clip),
            np.zeros(Counts.SIZE, np.int64),
            np.full(steps * Record.SIZE, np.nan),
        )
        self.partials = np.full(update.partial_sums(theta.size), np.nan)

    def step(self, grads: Array, loss: float = 1.0) -> Array:
        counts = self.scalars.counts
        counts[Counts.BATCH] = counts[Counts.NEXT_BATCH]  # what take_batch does
        counts[Counts.STOPPED] = counts[Counts.NEXT_STOPPED]
        self.flat.grads[...] = grads
        self.partials[...] = np.nan
        update.update(
            self.engine, self.name, self.flat, np.array([loss]), self.partials, self.scalars
        )
        row: Array = self.scalars.record.reshape(-1, Record.SIZE)[counts[Counts.BATCH]]
        return row


def draw(size: int, dtype: Any, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


@each_optimizer
@each_dtype
@pytest.mark.parametrize(
    ("size", "clip"), [(1, None), (257, 1.0), (1500, 0.5), (2876, 1e3)], ids=str
)
def test_updates_are_those_of_numpy(name: str, dtype: Any, size: int, clip: float | None) -> None:
    theta = draw(size, dtype, 0)
    device = Device(name, theta, clip)
    params = {"a": theta.copy()}
    exact = {"a": theta.astype(np.float64)}
    ours, truth = build(name, params), build(name, exact)
    for step in range(STEPS):
        grads = draw(size, dtype, 1 + step)
        loss, norm, refused = device.step(grads, loss=2.0 + step)
        for optimizer, values in ((ours, params), (truth, exact)):
            g = {"a": grads.astype(values["a"].dtype)}
            expected = clip_global_norm(g, clip)
            optimizer.step(values, g, rate(step))
        assert (loss, refused) == (2.0 + step, 0)
        assert norm == pytest.approx(expected, rel=1e-14)
    assert_close("theta", device.flat.theta, exact["a"], length=4 * STEPS, baseline=params["a"])
    for part in truth.memory:
        found, expected_part = getattr(device.flat, part), truth.state[f"{part}.a"]
        assert_close(part, found, expected_part, length=STEPS, baseline=ours.state[f"{part}.a"])
    assert device.scalars.counts[Counts.NEXT_BATCH] == STEPS


@each_optimizer
def test_every_schedule_gives_the_same_bits(name: str) -> None:
    theta = draw(1500, np.float32, 0)
    results = []
    for seed in (None, 1, 2):
        device = Device(name, theta, 1.0, seed=seed)
        for step in range(2):
            device.step(draw(1500, np.float32, 1 + step))
        results.append(device)
    for other in results[1:]:
        assert_same_bits("theta", other.flat.theta, results[0].flat.theta)
        assert_same_bits("record", other.scalars.record, results[0].scalars.record)


HUGE = float(np.finfo(np.float32).max)
REFUSED: list[tuple[str, float, float, float]] = [  # what spoils it: loss, gradient, parameter
    ("loss NaN", math.nan, 1.0, 1.0),
    ("loss infinite", math.inf, 1.0, 1.0),
    ("gradient NaN", 1.0, math.nan, 1.0),
    ("gradient infinite", 1.0, -math.inf, 1.0),
    ("parameter overflows", 1.0, -HUGE, HUGE),
]


@each_optimizer
@pytest.mark.parametrize(("what", "loss", "g", "p"), REFUSED, ids=[r[0] for r in REFUSED])
def test_a_step_that_would_spoil_a_number_changes_none(
    name: str, what: str, loss: float, g: float, p: float
) -> None:
    theta = draw(1500, np.float32, 0)
    theta[1234] = p
    device = Device(name, theta, None)
    grads = draw(1500, np.float32, 1)
    assert device.step(grads)[Record.STOPPED] == 0
    before = [a.copy() for a in (device.flat.theta, device.flat.m, device.flat.v)]
    bad = grads.copy()
    bad[1234] = g
    row = device.step(bad, loss)
    assert row[Record.STOPPED] == 1
    if what.startswith("loss"):
        assert row[Record.LOSS] == loss or math.isnan(loss)
    assert device.step(grads)[Record.STOPPED] == 1  # nor do those that are already queued
    for a, was in zip((device.flat.theta, device.flat.m, device.flat.v), before, strict=True):
        assert_same_bits("unchanged", a, was)


def test_a_large_gradient_that_is_clipped_overflows_nothing() -> None:
    device = Device("sgd", np.ones(3, np.float32), 1.0)
    row = device.step(np.array([3e38, 0, 0], np.float32))
    assert row[Record.STOPPED] == 0
    np.testing.assert_allclose(device.flat.theta, [0.9, 1, 1], rtol=1e-6)


SAMPLERS = {
    "windows": lambda ids: Windows(ids, 3, 4, count=10),
    "random": lambda ids: RandomPartition(ids, 3, 4),
    "sequential": lambda ids: SequentialPartition(ids, 3, 4),
}


@pytest.mark.parametrize("sampling", SAMPLERS)
@pytest.mark.parametrize("scaled", [False, True], ids=["full", "truncated"])
def test_batches_are_those_of_the_sampler(sampling: str, scaled: bool) -> None:
    ids = np.random.default_rng(0).integers(0, 9, 70)
    sampler = SAMPLERS[sampling](ids)
    epoch = sampler.epoch(np.random.default_rng(1))
    starts = np.concatenate([epoch.starts(b) for b in range(len(epoch))]).astype(np.int64)
    factors = draw(len(epoch) * 3 if scaled else 0, np.float32, 2)
    counts = np.zeros(Counts.SIZE, np.int64)
    counts[Counts.FIRST_UPDATE] = 100
    for b, (X, Y) in enumerate(epoch):
        counts[Counts.NEXT_BATCH] = b
        counts[Counts.NEXT_STOPPED] = b % 2
        x, y = (np.full(X.shape, -1, np.int32) for _ in range(2))
        xi = np.full(3, np.nan, np.float32)
        text = ids.astype(np.int32)
        update.take_batch(engine(b), text, starts, factors, counts, x, y, xi, sampler.n)
        np.testing.assert_array_equal(x, X)
        np.testing.assert_array_equal(y, Y)
        assert counts[Counts.BATCH] == b
        assert counts[Counts.STOPPED] == b % 2
        assert counts[Counts.UPDATE] == 100 + b
        if scaled:
            np.testing.assert_array_equal(xi, factors[3 * b : 3 * b + 3])
        else:
            assert np.isnan(xi).all()


@pytest.mark.parametrize("refused", [0, 1])
def test_a_state_is_kept_unless_the_update_was_refused(refused: int) -> None:
    source, target = draw(300, np.float64, 0).reshape(2, 150), draw(300, np.float64, 1)
    before = target.copy()
    counts = np.zeros(Counts.SIZE, np.int64)
    counts[Counts.NEXT_STOPPED] = refused
    update.keep_state(engine(), source, target.reshape(2, 150), counts)
    assert_same_bits("state", target, before if refused else source.reshape(-1))


@pytest.mark.parametrize("N", [1, 256, 300, 1000])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_stops_what_follows(N: int, value: float | None) -> None:
    numbers = draw(N, np.float64, 0)
    for at in (0, N // 2, N - 1):
        for before in (0, 1):
            spoilt, counts = numbers.copy(), np.arange(10, 10 + Counts.SIZE)
            counts[Counts.NEXT_STOPPED] = before
            if value is not None:
                spoilt[at] = value
            expected = counts.copy()
            expected[Counts.NEXT_STOPPED] = 1 if value is not None else before
            update.stop_unless_finite(engine(at), spoilt, counts)
            np.testing.assert_array_equal(counts, expected)


SHAPES = {"W_xh": (3, 4), "W_hh": (4, 4), "b_h": (4,), "scalar": (1,)}


def arrays(seed: int, dtype: Any) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


@each_optimizer
@each_dtype
def test_optimizers_step_on_kernels_as_on_numpy(name: str, dtype: Any) -> None:
    params, expected = arrays(0, dtype), arrays(0, dtype)
    exact = {key: a.astype(np.float64) for key, a in expected.items()}
    ours, theirs, truth = build(name, params), build(name, expected), build(name, exact)
    for step in range(STEPS):
        grads = arrays(1 + step, dtype)
        theirs.step(expected, grads, rate(step))
        truth.step(exact, {k: g.astype(np.float64) for k, g in grads.items()}, rate(step))
        with gpurnn.emulated():
            ours.step(params, grads, rate(step))
        assert_same_bits("gradients", grads["W_hh"], arrays(1 + step, dtype)["W_hh"])
    for key, a in exact.items():
        assert_close(key, params[key], a, length=4 * STEPS, baseline=expected[key])
    assert ours.state.keys() == theirs.state.keys()
    for key, a in truth.state.items():
        if key == "updates":
            assert ours.state[key] == a
        else:
            assert_close(key, ours.state[key], a, length=STEPS, baseline=theirs.state[key])


@each_optimizer
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    params = arrays(0, np.float32)
    optimizer, grads = build(name, params), arrays(1, np.float32)
    grads["W_hh"][1, 2] = bad
    state = {key: a.copy() for key, a in optimizer.state.items()}
    with (
        gpurnn.emulated(),
        pytest.raises(NonFiniteError, match=r"W_hh holds (nan|inf) at index \(1, 2\)"),
    ):
        optimizer.step(params, grads, 0.1)
    for key, a in arrays(0, np.float32).items():
        assert_same_bits(key, params[key], a)
    for key, a in state.items():
        assert_same_bits(key, optimizer.state[key], a)


@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
def test_clipping_on_kernels_is_that_of_numpy(max_norm: float | None) -> None:
    grads, expected = arrays(0, np.float32), arrays(0, np.float32)
    norm = clip_global_norm(expected, max_norm)
    with gpurnn.emulated():
        found = clip_global_norm(grads, max_norm)
    assert found == pytest.approx(norm, rel=1e-14)
    for key, a in expected.items():
        np.testing.assert_allclose(grads[key], a, rtol=1e-6)
