"""Optimizers by hand and against PyTorch; clipping by its definition and by what it is for."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray
from timemachine import require_time_machine
from tolerance import assert_close, assert_same_bits

from gpurnn import Corpus
from gpurnn.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    SGD,
    AdamW,
    Momentum,
    Optimizer,
    clip_global_norm,
    make_optimizer,
    scheduled,
)
from gpurnn.training.config import PRESETS
from gpurnn.training.run import prepare
from gpurnn.validate import NonFiniteError

Array = NDArray[Any]

STEPS = 12
SHAPES = {"W_xh": (3, 4), "W_hh": (4, 4), "b_h": (4,), "scalar": (1,)}

each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def draw(dtype: DTypeLike = np.float64, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def gradients(step: int, dtype: DTypeLike = np.float64) -> dict[str, Array]:
    """Gradients that change from step to step, and sign too, but not their scale."""
    return draw(dtype, seed=100 + step)


def rate(step: int) -> float:
    """A learning rate that changes: an optimizer must not remember the first one."""
    return 0.1 / (1 + step)


def run(
    optimizer: Optimizer, params: dict[str, Array], steps: range = range(STEPS)
) -> dict[str, Array]:
    for step in steps:
        optimizer.step(params, gradients(step, params["W_xh"].dtype), rate(step))
    return params


# ---------------------------------------------------------------------------------------
# Each optimizer by its definition, one number at a time
# ---------------------------------------------------------------------------------------


def sgd_by_hand(theta: float, g: list[float]) -> float:
    for t, g_t in enumerate(g):
        theta = theta - rate(t) * g_t
    return theta


def momentum_by_hand(theta: float, g: list[float], mu: float) -> float:
    v = 0.0
    for t, g_t in enumerate(g):
        v = mu * v + g_t
        theta = theta - rate(t) * v
    return theta


def adamw_by_hand(
    theta: float, g: list[float], betas: tuple[float, float], eps: float, decay: float
) -> float:
    m = v = 0.0
    for t, g_t in enumerate(g, 1):
        m = betas[0] * m + (1 - betas[0]) * g_t
        v = betas[1] * v + (1 - betas[1]) * g_t**2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        theta = theta - rate(t - 1) * (decay * theta + m_hat / (math.sqrt(v_hat) + eps))
    return theta


Build = Callable[[Mapping[str, Array]], Optimizer]
ByHand = Callable[[float, list[float]], float]
DEFINITIONS: dict[str, tuple[Build, ByHand]] = {
    "sgd": (lambda params: SGD(), sgd_by_hand),
    "momentum": (
        lambda params: Momentum(params, 0.8),
        lambda theta, g: momentum_by_hand(theta, g, 0.8),
    ),
    "momentum-0": (lambda params: Momentum(params, 0), sgd_by_hand),
    "adamw": (
        lambda params: AdamW(params),
        lambda theta, g: adamw_by_hand(theta, g, (0.9, 0.999), 1e-8, 0.0),
    ),
    "adamw-decay": (
        lambda params: AdamW(params, (0.7, 0.95), 1e-3, 0.2),
        lambda theta, g: adamw_by_hand(theta, g, (0.7, 0.95), 1e-3, 0.2),
    ),
}


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_updates_by_hand(definition: str) -> None:
    build, by_hand = DEFINITIONS[definition]
    params = draw()
    before = draw()
    run(build(params), params)
    for name, p in params.items():
        expected = [
            by_hand(theta, [float(gradients(t)[name].flat[i]) for t in range(STEPS)])
            for i, theta in enumerate(before[name].flat)
        ]
        assert_close(name, p.ravel(), np.array(expected), length=10 * STEPS)
        assert np.abs(p - before[name]).min() > 0, "every number is updated"


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_float32_stays_float32_and_near_float64(definition: str) -> None:
    build, _ = DEFINITIONS[definition]
    single, double = draw(np.float32), draw()
    optimizer = build(single)
    run(optimizer, single)
    run(build(double), double)
    for name, p in single.items():
        assert p.dtype == np.float32
        assert_close(name, p, double[name], length=100 * STEPS)
    for name, state in optimizer.state.items():
        assert state.dtype == (np.int64 if name == "updates" else np.float32), name


def test_the_first_step_of_adamw_is_the_learning_rate_against_the_sign() -> None:
    """m̂ / √v̂ = g / |g| at the first update, however large or small the gradient."""
    params = {"W": np.zeros(4)}
    AdamW(params, eps=1e-300).step(params, {"W": np.array([1e-9, -1e9, 3.0, -0.1])}, 0.25)
    assert_close("W", params["W"], np.array([-0.25, 0.25, -0.25, 0.25]), length=10)


def test_weight_decay_is_decoupled_from_the_gradient() -> None:
    """θ shrinks by 1 − ηλ per update, biases too, and the moments know nothing of it."""
    params, before = draw(), draw()
    optimizer = AdamW(params, weight_decay=0.3)
    for step in range(STEPS):
        optimizer.step(params, {name: np.zeros_like(p) for name, p in params.items()}, rate(step))
    shrunk = math.prod(1 - 0.3 * rate(step) for step in range(STEPS))
    for name, p in params.items():
        assert_close(name, p, shrunk * before[name], length=3 * STEPS)

    with_decay, without = draw(), draw()
    decaying, plain = AdamW(with_decay, weight_decay=0.3), AdamW(without)
    run(decaying, with_decay)
    run(plain, without)
    for name, moment in plain.state.items():
        assert_same_bits(name, decaying.state[name], moment)
    for name, p in without.items():
        assert np.abs(with_decay[name] - p).max() > 1e-3


# ---------------------------------------------------------------------------------------
# Another implementation, by other people
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda p: SGD(), lambda torch, p: torch.optim.SGD(p, lr=1)),
        (lambda p: Momentum(p), lambda torch, p: torch.optim.SGD(p, lr=1, momentum=0.9)),
        (lambda p: AdamW(p), lambda torch, p: torch.optim.AdamW(p, lr=1, weight_decay=0)),
        (
            lambda p: AdamW(p, (0.8, 0.99), 1e-4, 0.1),
            lambda torch, p: torch.optim.AdamW(
                p, lr=1, betas=(0.8, 0.99), eps=1e-4, weight_decay=0.1
            ),
        ),
    ],
    ids=["sgd", "momentum", "adamw", "adamw-decay"],
)
def test_optimizers_are_those_of_torch(ours: Build, theirs: Callable[..., Any]) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is what this test compares with")
    params = draw()
    tensors = {name: torch.tensor(p).requires_grad_() for name, p in draw().items()}
    optimizer, reference = ours(params), theirs(torch, list(tensors.values()))
    for step in range(STEPS):
        g = gradients(step)
        optimizer.step(params, g, rate(step))
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(g[name])
        reference.param_groups[0]["lr"] = rate(step)
        reference.step()
        for name, p in params.items():
            truth = tensors[name].detach().numpy()
            assert_close(f"{name} after update {step}", p, truth, length=10 * (step + 1))


# ---------------------------------------------------------------------------------------
# In place, and with a state that a checkpoint can hold
# ---------------------------------------------------------------------------------------


@each_dtype
@each_optimizer
def test_parameters_are_updated_in_place_and_gradients_are_not_written(
    name: str, dtype: type
) -> None:
    params, g = draw(dtype), gradients(0, dtype)
    arrays, before = dict(params), draw(dtype)
    optimizer = make_optimizer(name, params)
    optimizer.step(params, g, 0.1)
    for key, p in params.items():
        assert p is arrays[key]
        assert p.dtype == dtype
        assert np.abs(p - before[key]).min() > 0
        assert_same_bits(key, g[key], gradients(0, dtype)[key])
        for state in optimizer.state.values():
            assert not np.shares_memory(state, p)
            assert not np.shares_memory(state, g[key])


@each_dtype
@each_optimizer
def test_the_state_is_all_that_a_run_needs_to_go_on(name: str, dtype: type) -> None:
    whole = draw(dtype)
    run(make_optimizer(name, whole), whole)

    params = draw(dtype)
    first = make_optimizer(name, params)
    run(first, params, range(STEPS // 2))
    saved = {key: a.copy() for key, a in first.state.items()}
    run(first, draw(dtype))  # what happens to the first one no longer matters
    second = make_optimizer(name, params)
    assert {k: a.shape for k, a in second.state.items()} == {k: a.shape for k, a in saved.items()}
    second.state = saved
    run(second, params, range(STEPS // 2, STEPS))
    for key, p in params.items():
        assert_same_bits(key, p, whole[key])

    if name != "sgd":  # without its state it would have gone on otherwise
        forgetful = draw(dtype)
        run(make_optimizer(name, forgetful), forgetful, range(STEPS // 2))
        run(make_optimizer(name, forgetful), forgetful, range(STEPS // 2, STEPS))
        assert any((forgetful[key] != whole[key]).any() for key in whole)


def test_optimizers_by_name() -> None:
    params = draw()
    assert type(make_optimizer("sgd", params)) is SGD
    momentum = make_optimizer("momentum", params, momentum=0.5)
    assert type(momentum) is Momentum and momentum.momentum == 0.5
    adamw = make_optimizer("adamw", params, weight_decay=0.25)
    assert type(adamw) is AdamW and adamw.weight_decay == 0.25
    assert make_optimizer("sgd", params).state == {}
    assert sorted(momentum.state) == sorted(f"v.{name}" for name in params)
    assert sorted(adamw.state) == sorted(
        ["updates", *(f"{moment}.{name}" for moment in "mv" for name in params)]
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda p: make_optimizer("adam", p),
            "optimizer is 'adam': expected one of sgd, momentum, adamw",
        ),
        (
            lambda p: make_optimizer("sgd", p, weight_decay=0.1),
            "weight_decay is 0.1: only adamw has it, not sgd",
        ),
        (
            lambda p: make_optimizer("momentum", p, weight_decay=0.1),
            "weight_decay is 0.1: only adamw has it, not momentum",
        ),
        (
            lambda p: make_optimizer("adamw", p, weight_decay=-0.1),
            "weight_decay is -0.1: expected 0 or more",
        ),
        (
            lambda p: AdamW(p, weight_decay=math.nan),
            "weight_decay is nan: expected 0 or more",
        ),
        (lambda p: Momentum(p, 1.0), "momentum is 1.0: expected a number in [0, 1)"),
        (lambda p: Momentum(p, -0.1), "momentum is -0.1: expected a number in [0, 1)"),
        (
            lambda p: make_optimizer("momentum", p, momentum=math.nan),
            "momentum is nan: expected a number in [0, 1)",
        ),
        (lambda p: AdamW(p, (0.9, 1.0)), "betas is (0.9, 1.0): expected two numbers in [0, 1)"),
        (lambda p: AdamW(p, (-0.1, 0.9)), "betas is (-0.1, 0.9): expected two numbers in [0, 1)"),
    ],
    ids=[
        "unknown",
        "sgd-decay",
        "momentum-decay",
        "decay-negative",
        "decay-nan",
        "momentum-1",
        "momentum-negative",
        "momentum-nan",
        "beta-1",
        "beta-negative",
    ],
)
def test_settings_are_refused(build: Build, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build(draw())


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_an_update_that_would_overflow_changes_nothing(definition: str) -> None:
    """All gradients are finite, and so is all but one number of what would come of them."""
    build, _ = DEFINITIONS[definition]
    params = draw(np.float32)
    optimizer = build(params)
    run(optimizer, params)
    params["scalar"][0] = 3e38
    before = {name: p.copy() for name, p in params.items()}
    state_before = {name: a.copy() for name, a in optimizer.state.items()}
    g = gradients(0, np.float32)
    g["scalar"][0] = -3e38
    with pytest.raises(NonFiniteError, match="scalar"):
        optimizer.step(params, g, 1.0)
    for name, p in params.items():
        assert_same_bits(name, p, before[name])
    for name, a in optimizer.state.items():
        assert_same_bits(name, a, state_before[name])
    optimizer.step(params, gradients(0, np.float32), 1e-3)  # and it can go on
    assert all(np.isfinite(p).all() for p in params.values())


# ---------------------------------------------------------------------------------------
# Clipping
# ---------------------------------------------------------------------------------------


@each_dtype
def test_gradients_that_are_too_long_keep_their_direction(dtype: type) -> None:
    """3, 4 and 12 are 13 long together; none of them alone is longer than 12."""
    g = {"a": np.array([3.0, 4.0], dtype), "b": np.array([[12.0]], dtype)}
    arrays = dict(g)
    assert clip_global_norm(g, 12.5) == 13
    for name, a in g.items():
        assert a is arrays[name] and a.dtype == dtype
    assert_close("a", g["a"], np.array([3, 4]) * 12.5 / 13, length=4)
    assert_close("b", g["b"], np.array([[12]]) * 12.5 / 13, length=4)
    assert clip_global_norm(g) == pytest.approx(12.5, rel=4 * float(np.finfo(dtype).eps))


@each_dtype
@pytest.mark.parametrize("max_norm", [13.0, 13.5, 1e300, math.inf, None])
def test_gradients_that_are_short_enough_keep_their_bits(
    max_norm: float | None, dtype: type
) -> None:
    g = {"a": np.array([3.0, 4.0], dtype), "b": np.array([[12.0]], dtype)}
    assert clip_global_norm(g, max_norm) == 13
    assert_same_bits("a", g["a"], np.array([3.0, 4.0], dtype))
    assert_same_bits("b", g["b"], np.array([[12.0]], dtype))


@pytest.mark.parametrize("max_norm", [1.0, None])
def test_zero_gradients_stay_zero(max_norm: float | None) -> None:
    g = {"a": np.zeros(3), "b": np.zeros((0, 4))}
    assert clip_global_norm(g, max_norm) == 0
    assert not g["a"].any()
    assert clip_global_norm({}, max_norm) == 0


@each_dtype
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_gradients_that_are_not_finite_are_reported_and_left_alone(bad: float, dtype: type) -> None:
    """Scaling would turn an infinity into NaN, and every other number into 0."""
    g = {"a": np.array([1.0, 2.0], dtype), "b": np.array([bad], dtype)}
    norm = clip_global_norm(g, 1.0)
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    np.testing.assert_array_equal(g["a"], [1, 2])
    np.testing.assert_array_equal(g["b"], [bad])


def test_squares_are_added_in_float64() -> None:
    # In float32 the square of 1e30 overflows, and 4096² swallows every 1 that is added to it.
    assert clip_global_norm({"a": np.full(4, 1e30, np.float32)}) == pytest.approx(2e30, rel=1e-7)
    g = {"a": np.array([4096.0] + [1.0] * 1000, np.float32), "b": np.ones(24, np.float32)}
    assert clip_global_norm(g) == math.sqrt(4096**2 + 1024)


def test_huge_float64_gradients_are_no_warning() -> None:
    """Their squares overflow. Whoever asks for the norm must see it as large, not be warned."""
    g = {"a": np.array([1e200, -1e200])}
    assert clip_global_norm(g, 1.0) >= 1e200


@given(
    st.lists(
        st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.floats(1e-6, 1e6),
)
def test_clipping_is_its_definition(values: list[list[float]], max_norm: float) -> None:
    """g ← min(1, θ / ‖g‖) g (9.5.3), ‖g‖ over all gradients together."""
    g = {str(i): np.array(v) for i, v in enumerate(values)}
    norm = math.hypot(*(x for v in values for x in v))
    factor = 1.0 if norm <= max_norm else max_norm / norm
    assert clip_global_norm(g, max_norm) == pytest.approx(norm, rel=1e-14)
    for i, v in enumerate(values):
        np.testing.assert_allclose(g[str(i)], np.multiply(v, factor), rtol=1e-13)
    assert math.hypot(*(x for a in g.values() for x in a)) <= max_norm * (1 + 1e-14)


def test_clipping_saves_a_relu_network_that_starts_with_identity_weights() -> None:
    """The book's windows, relu, W_hh = I, learning rate 1: what 9.5.3 is about.

    A relu network whose states add up over 32 steps has gradients hundreds of times too long. One
    such step throws the weights where every unit is dead, and what remains is b_q, which can only
    learn the unigram (17.1). Clipped to 1 the same run gets past it within three epochs. (Batches
    of 128 windows: as many updates in 3 epochs as the book's 1,024 have in 24.)
    """
    corpus = Corpus("time-machine", require_time_machine(), "the test's own copy")

    def train(clip: float | None) -> list[dict[str, Any]]:
        config = dataclasses.replace(
            PRESETS["book"], activation="relu", clip=clip, batch_size=128, epochs=3
        )
        prepared = prepare(config, corpus)
        prepared.model.params["W_hh"][...] = np.eye(config.hidden_size)
        assert prepared.trainer.run()
        return prepared.trainer.history

    without, clipped = train(None), train(1.0)
    for history in (without, clipped):
        assert history[0]["largest_gradient_norm"] > 50
    assert without[-1]["train_perplexity"] > 16.5
    assert without[-1]["valid_perplexity"] > 15.5
    assert clipped[-1]["train_perplexity"] < 15.5
    assert clipped[-1]["valid_perplexity"] < 15


# ---------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2, 2, 2, 2, 2, 2, 2]),
        ("linear", [2, 1.5, 1, 0.5, 0, 0, 0]),
        ("cosine", [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0, 0, 0]),
    ],
    ids=SCHEDULES,
)
def test_schedules_by_value(schedule: str, expected: list[float]) -> None:
    """Of 4 updates the rates 0 … 3 are used; what comes after the last stays at the end."""
    rates = [scheduled(2.0, schedule, step, 4) for step in range(7)]
    np.testing.assert_allclose(rates, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1.5, 2, 2, 2, 2, 2, 2]),
        ("linear", [0.5, 1, 1.5, 2, 2, 1.5, 1, 0.5, 0]),
        ("cosine", [0.5, 1, 1.5, 2, 2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0]),
    ],
    ids=SCHEDULES,
)
def test_warm_up_rises_in_a_straight_line_to_where_the_schedule_begins(
    schedule: str, expected: list[float]
) -> None:
    rates = [scheduled(2.0, schedule, step, 8, warmup=4) for step in range(9)]
    np.testing.assert_allclose(rates, expected, rtol=1e-15, atol=1e-15)


@given(
    lr=st.floats(1e-6, 1e3),
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(1, 60),
    warmup=st.integers(0, 80),
)
def test_rates_rise_then_fall_within_bounds(
    lr: float, schedule: str, total: int, warmup: int
) -> None:
    """Also where the warm-up is as long as the run, or longer."""
    rates = [scheduled(lr, schedule, step, total, warmup) for step in range(total)]
    assert all(0 < r <= lr * (1 + 1e-15) for r in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if warmup <= total - 1:
        assert falling[0] == lr
    if 0 < warmup <= total:
        assert rising[-1] == pytest.approx(lr, rel=1e-15)


def test_an_unknown_schedule_is_refused() -> None:
    message = "schedule is 'step': expected one of constant, linear, cosine"
    with pytest.raises(ValueError, match=f"^{message}$"):
        scheduled(1.0, "step", 0, 10)
    with pytest.raises(ValueError, match=f"^{message}$"):
        scheduled(1.0, "step", 0, 10, warmup=5)
