"""``RNN``: layers on top of each other, by the equation, finite differences, and PyTorch.

One layer is ``functional.rnn_forward``, which test_reference.py holds to the chapter's equation;
here it is what the class adds: parameters, states, and layers that take the states of those below.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cases import ACTIVATIONS, DTYPES
from gradcheck import check_gradients
from numpy.typing import NDArray
from tolerance import STANDARD_ERRORS, assert_close, assert_same_bits, standard_errors_off

import gpurnn
from gpurnn import RNN
from gpurnn import functional as F

Array = NDArray[Any]

T, N, D, H_SIZE = 7, 3, 5, 4

each_depth = pytest.mark.parametrize("num_layers", [1, 2, 3], ids="layers{}".format)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
each_input = pytest.mark.parametrize("by_id", [False, True], ids=["floats", "ids"])
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def length(num_layers: int) -> int:
    """Roundings that can stand behind one number: see ``Case.length``."""
    return num_layers * T * (N + D + H_SIZE + 8)


def network(num_layers: int, **options: Any) -> RNN:
    """Build a network whose states and gradients are neither tiny nor saturated."""
    rnn = RNN(D, H_SIZE, num_layers, **{"dtype": np.float64, "seed": num_layers, **options})
    for p in rnn.params.values():
        p *= 1.5
    return rnn


def inputs(by_id: bool, dtype: Any = np.float64, seed: int = 0) -> Array:
    rng = np.random.default_rng([seed, by_id])
    if by_id:
        return rng.integers(0, D, (T, N))
    return rng.standard_normal((T, N, D)).astype(dtype)


def some_state(rnn: RNN, seed: int = 1) -> Array:
    """A state that is not zero, of the shape that the network's have."""
    zero = rnn.init_state(N)
    return (0.5 * np.random.default_rng(seed).standard_normal(zero.shape)).astype(zero.dtype)


def by_layers(rnn: RNN, X: Array, state: Array) -> tuple[list[Array], list[Array]]:
    """Each layer's states, from the equation's own function: what the class is to do."""
    initial = state[None] if rnn.num_layers == 1 else state
    all_states = []
    for layer in range(rnn.num_layers):
        suffix = f".{layer}" if layer else ""
        X, _ = F.rnn_forward(
            X,
            initial[layer],
            rnn.params[f"W_xh{suffix}"],
            rnn.params[f"W_hh{suffix}"],
            rnn.params.get(f"b_h{suffix}"),
            activation=rnn.activation,
        )
        all_states.append(X)
    return all_states, [states[-1] for states in all_states]


def chunks(size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, T)) for start in range(0, T, size))


# ---------------------------------------------------------------------------------------
# Shapes, states, layers
# ---------------------------------------------------------------------------------------


@each_dtype
@each_input
@each_depth
def test_shapes_and_dtypes(num_layers: int, by_id: bool, dtype: type) -> None:
    rnn = network(num_layers, dtype=dtype)
    state_shape = (N, H_SIZE) if num_layers == 1 else (num_layers, N, H_SIZE)
    H, h_T = rnn(inputs(by_id, dtype), some_state(rnn))
    assert (H.shape, H.dtype) == ((T, N, H_SIZE), dtype)
    assert (h_T.shape, h_T.dtype) == (state_shape, dtype)
    zero = rnn.init_state(N)
    assert (zero.shape, zero.dtype) == (state_shape, dtype)
    assert not zero.any()
    assert rnn.init_state().shape == (*state_shape[:-2], 1, H_SIZE)

    H, h_T, residuals = rnn.forward(inputs(by_id, dtype))
    dX, dh_0, gradients = rnn.backward(np.ones_like(H), residuals)
    assert dX is None if by_id else (dX.shape, dX.dtype) == ((T, N, D), dtype)
    assert (dh_0.shape, dh_0.dtype) == (state_shape, dtype)
    assert sorted(gradients) == sorted(rnn.params)
    for name, p in rnn.params.items():
        assert (gradients[name].shape, gradients[name].dtype) == (p.shape, dtype), name


def test_parameters_have_the_chapters_names_and_shapes() -> None:
    rnn = RNN(D, H_SIZE, 3)
    assert {name: p.shape for name, p in rnn.params.items()} == {
        "W_xh": (D, H_SIZE),
        "W_hh": (H_SIZE, H_SIZE),
        "b_h": (H_SIZE,),
        "W_xh.1": (H_SIZE, H_SIZE),
        "W_hh.1": (H_SIZE, H_SIZE),
        "b_h.1": (H_SIZE,),
        "W_xh.2": (H_SIZE, H_SIZE),
        "W_hh.2": (H_SIZE, H_SIZE),
        "b_h.2": (H_SIZE,),
    }
    assert all(p.dtype == np.float32 for p in rnn.params.values())
    assert gpurnn.RNN is RNN


@each_input
@each_activation
@each_depth
def test_each_layer_is_the_equation_over_the_states_below(
    num_layers: int, activation: str, by_id: bool
) -> None:
    rnn = network(num_layers, activation=activation)
    X, state = inputs(by_id), some_state(rnn)
    all_states, final = by_layers(rnn, X, state)
    H, h_T = rnn(X, state)
    assert_same_bits("H", H, all_states[-1])
    assert_same_bits("h_T", h_T, final[0] if num_layers == 1 else np.stack(final))
    # No two layers do the same, so that none can stand in for another.
    for a, b in itertools.combinations(final, 2):
        assert np.abs(a - b).max() > 0.01


def test_tanh_is_the_activation_unless_said() -> None:
    X = inputs(by_id=False)
    assert_same_bits("H", network(2)(X)[0], network(2, activation="tanh")(X)[0])
    assert RNN(D, H_SIZE).activation == "tanh"


@each_depth
def test_no_state_is_the_zero_state(num_layers: int) -> None:
    rnn, X = network(num_layers), inputs(by_id=False)
    for a, b in zip(rnn(X), rnn(X, rnn.init_state(N)), strict=True):
        assert_same_bits("state", a, b)


@each_depth
def test_the_final_state_keeps_no_hold_on_the_sequence(num_layers: int) -> None:
    rnn = network(num_layers)
    H, h_T, residuals = rnn.forward(inputs(by_id=False))
    for r in residuals:
        assert not np.shares_memory(h_T, r.states)
    assert not np.shares_memory(h_T, H)


@each_depth
def test_a_pass_writes_to_nothing_it_was_given(num_layers: int) -> None:
    rnn, X = network(num_layers), inputs(by_id=False)
    state, dH = some_state(rnn), np.random.default_rng(0).standard_normal((T, N, H_SIZE))
    given = [X, state, dH, *rnn.params.values()]
    before = [a.copy() for a in given]
    H, _, residuals = rnn.forward(X, state)
    rnn.backward(dH, residuals)
    for a, b in zip(given, before, strict=True):
        assert_same_bits("argument", a, b)
    assert_same_bits("H", H, rnn(X, state)[0])


@each_dtype
@each_input
@each_activation
@each_depth
def test_steps_and_chunks_with_carried_state_give_the_bits_of_the_whole(
    num_layers: int, activation: str, by_id: bool, dtype: type
) -> None:
    """h_t = f(x_t, h_{t−1}): the state is all that a step needs of the past."""
    rnn = network(num_layers, activation=activation, dtype=dtype)
    X, first = inputs(by_id, dtype), some_state(rnn)
    whole, h_T = rnn(X, first)
    for size in (1, 2, 3, T):
        state, parts = first, []
        for chunk in chunks(size):
            H, state = rnn(X[chunk], state)
            parts.append(H)
        assert_same_bits(f"H in chunks of {size}", np.concatenate(parts), whole)
        assert_same_bits(f"h_T in chunks of {size}", state, h_T)

    state = first
    for t in range(T):
        state = rnn.step(X[t], state)
        assert_same_bits(f"the last layer at step {t}", state.reshape(-1, N, H_SIZE)[-1], whole[t])
    assert_same_bits("h_T by steps", state, h_T)


@each_depth
def test_the_state_carries_the_past(num_layers: int) -> None:
    """Chunks that forget the state end elsewhere: the test above is not about nothing."""
    rnn, X = network(num_layers), inputs(by_id=False)
    _, h_T = rnn(X)
    _, forgetful = rnn(X[T // 2 :])
    assert np.abs(forgetful - h_T).max() > 1e-3


# ---------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------


@each_input
@each_bias
@each_activation
@each_depth
def test_every_gradient_equals_finite_differences(
    num_layers: int, activation: str, bias: bool, by_id: bool
) -> None:
    rnn = network(num_layers, activation=activation, bias=bias)  # seeded off relu's kink
    X, state = inputs(by_id), some_state(rnn)
    dH = np.random.default_rng(2).standard_normal((T, N, H_SIZE))
    _, _, residuals = rnn.forward(X, state)
    dX, dh_0, gradients = rnn.backward(dH, residuals)
    arguments = {**{name: p.copy() for name, p in rnn.params.items()}, "h_0": state}
    expected: dict[str, Array | None] = {**gradients, "h_0": dh_0}
    if by_id:
        assert dX is None
    else:
        arguments["X"], expected["X"] = X, dX
    assert sorted(expected) == sorted(arguments)

    def loss(**a: Array) -> float:
        for name, p in rnn.params.items():
            p[...] = a[name]
        return float(np.vdot(rnn(a.get("X", X), a["h_0"])[0], dH))

    check_gradients(loss, arguments, expected)


@each_input
@each_depth
def test_ones_in_xi_are_the_full_gradient_to_the_bit(num_layers: int, by_id: bool) -> None:
    rnn = network(num_layers)
    H, _, residuals = rnn.forward(inputs(by_id), some_state(rnn))
    dX, dh_0, gradients = rnn.backward(H, residuals)
    dX_ones, dh_0_ones, gradients_ones = rnn.backward(H, residuals, xi=np.ones(T))
    assert_same_bits("dh_0", dh_0_ones, dh_0)
    for name in gradients:
        assert_same_bits(name, gradients_ones[name], gradients[name])
    if not by_id:
        assert_same_bits("dX", dX_ones, dX)


@pytest.mark.parametrize("tau", [1, 2, 3, T])
@each_depth
def test_zeros_in_xi_cut_every_layer_like_detached_chunks(num_layers: int, tau: int) -> None:
    """Truncated backpropagation: what flows from a chunk into the state before it is dropped."""
    rnn, X = network(num_layers), inputs(by_id=False)
    first = some_state(rnn)
    dH = np.random.default_rng(3).standard_normal((T, N, H_SIZE))
    xi = np.ones(T)
    xi[::tau] = 0
    _, _, residuals = rnn.forward(X, first)
    dX, dh_0, gradients = rnn.backward(dH, residuals, xi=xi)

    state, detached_dX = first, []
    sums = {name: np.zeros_like(p) for name, p in rnn.params.items()}
    for chunk in chunks(tau):
        _, state, r = rnn.forward(X[chunk], state)
        chunk_dX, _, contributions = rnn.backward(dH[chunk], r)
        detached_dX.append(chunk_dX)
        for name, contribution in contributions.items():
            sums[name] += contribution
    assert not dh_0.any()
    assert_close("dX", dX, np.concatenate(detached_dX), length=length(num_layers))
    for name in gradients:
        assert_close(name, gradients[name], sums[name], length=length(num_layers))

    _, _, full = rnn.backward(dH, residuals)
    for name in gradients:  # the cut is felt by every parameter, unless there is none to feel
        assert (np.abs(full[name] - gradients[name]).max() > 1e-3) == (tau < T), name


# ---------------------------------------------------------------------------------------
# Another implementation, by other people
# ---------------------------------------------------------------------------------------


def of_torch(rnn: RNN, X: Array, state: Array, dH: Array) -> dict[str, Array]:
    """Run ``torch.nn.RNN`` in float64 with the same weights, under our names for its results.

    Its weights are the transposes, and it has two biases whose sum is b_h; h_0 and h_T have an
    axis of layers even for one.
    """
    torch = pytest.importorskip("torch", reason="PyTorch is what this test compares with")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        theirs = torch.nn.RNN(
            D,
            H_SIZE,
            rnn.num_layers,
            nonlinearity=rnn.activation,
            bias=rnn.bias,
            dtype=torch.float64,
        )
        with torch.no_grad():
            for layer in range(rnn.num_layers):
                suffix = f".{layer}" if layer else ""
                values = {
                    "weight_ih": rnn.params[f"W_xh{suffix}"].T,
                    "weight_hh": rnn.params[f"W_hh{suffix}"].T,
                }
                if rnn.bias:
                    b_h = rnn.params[f"b_h{suffix}"]
                    values |= {"bias_ih": b_h, "bias_hh": np.zeros_like(b_h)}
                for name, value in values.items():
                    getattr(theirs, f"{name}_l{layer}").copy_(torch.tensor(value.copy()))
        X_, h_0 = torch.tensor(X).requires_grad_(), torch.tensor(state).requires_grad_()
        H, h_T = theirs(X_, h_0 if rnn.num_layers > 1 else h_0[None])
        H.backward(torch.tensor(dH))
        results = {"H": H.detach(), "h_T": h_T.detach(), "X": X_.grad, "h_0": h_0.grad}
        for layer in range(rnn.num_layers):
            suffix = f".{layer}" if layer else ""
            results[f"W_xh{suffix}"] = getattr(theirs, f"weight_ih_l{layer}").grad.T
            results[f"W_hh{suffix}"] = getattr(theirs, f"weight_hh_l{layer}").grad.T
            if rnn.bias:
                results[f"b_h{suffix}"] = getattr(theirs, f"bias_ih_l{layer}").grad
    finally:
        torch.set_num_threads(threads)
    return {name: tensor.numpy() for name, tensor in results.items()}


@each_bias
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@each_depth
def test_layers_are_those_of_torch(num_layers: int, activation: str, bias: bool) -> None:
    rnn = network(num_layers, activation=activation, bias=bias)
    X, state = inputs(by_id=False), some_state(rnn)
    dH = np.random.default_rng(4).standard_normal((T, N, H_SIZE))
    theirs = of_torch(rnn, X, state, dH)
    H, h_T, residuals = rnn.forward(X, state)
    dX, dh_0, gradients = rnn.backward(dH, residuals)
    assert dX is not None
    ours = {"H": H, "h_T": h_T.reshape(-1, N, H_SIZE), "X": dX, "h_0": dh_0, **gradients}
    assert sorted(ours) == sorted(theirs)
    for name, result in ours.items():
        assert np.abs(theirs[name]).max() > 0, name
        assert_close(name, result, theirs[name], length=length(num_layers))


# ---------------------------------------------------------------------------------------
# How many parameters, and what they start as
# ---------------------------------------------------------------------------------------


@each_bias
@each_depth
def test_the_number_of_parameters_does_not_depend_on_the_number_of_steps(
    num_layers: int, bias: bool
) -> None:
    d, h = 28, 32
    rnn = RNN(d, h, num_layers, bias=bias)
    first, further = d * h + h * h + bias * h, 2 * h * h + bias * h
    expected = first + (num_layers - 1) * further
    assert rnn.num_parameters() == expected
    assert sum(p.size for p in rnn.params.values()) == expected
    for steps in (1, 10, 100):
        H, _, residuals = rnn.forward(np.zeros((steps, 2), int))
        _, _, gradients = rnn.backward(H, residuals)
        assert H.shape == (steps, 2, h)
        assert sum(g.size for g in gradients.values()) == expected
        assert rnn.num_parameters() == expected


def test_without_bias_there_is_none_and_that_is_a_bias_of_zero() -> None:
    without, zero = network(2, bias=False), network(2)
    assert sorted(without.params) == ["W_hh", "W_hh.1", "W_xh", "W_xh.1"]
    for name, p in zero.params.items():
        p[...] = without.params.get(name, 0)
    X, state = inputs(by_id=False), some_state(zero)
    H, _, residuals = without.forward(X, state)
    H_zero, _, residuals_zero = zero.forward(X, state)
    assert_close("H", H, H_zero, length=1)
    dX, dh_0, gradients = without.backward(H, residuals)
    dX_zero, dh_0_zero, gradients_zero = zero.backward(H, residuals_zero)
    assert sorted(gradients) == sorted(without.params)
    assert dX is not None and dX_zero is not None
    assert_close("dX", dX, dX_zero, length=length(2))
    assert_close("dh_0", dh_0, dh_0_zero, length=length(2))
    for name, gradient in gradients.items():
        assert_close(name, gradient, gradients_zero[name], length=length(2))


def kolmogorov_smirnov(sample: Array, cdf: Callable[[float], float]) -> float:
    """√N times the largest distance between the sample's distribution function and ``cdf``."""
    below = np.array([cdf(x) for x in np.sort(sample, axis=None)])
    steps = np.arange(sample.size + 1) / sample.size
    return sample.size**0.5 * float(max((steps[1:] - below).max(), (below - steps[:-1]).max()))


KS_CRITICAL = 1.949  # of the limiting distribution, exceeded by one true sample in a thousand


def uniform_cdf(x: float, bound: float) -> float:
    return min(max((x / bound + 1) / 2, 0.0), 1.0)


def normal_cdf(x: float, sigma: float) -> float:
    return (1 + math.erf(x / sigma / math.sqrt(2))) / 2


@each_dtype
@pytest.mark.parametrize("seed", range(3))
def test_uniform_initialisation(seed: int, dtype: type) -> None:
    """U(−1/√h, 1/√h) for every parameter of every layer, biases too: h, not d, is the fan."""
    d, h = 70, 100
    rnn = RNN(d, h, 2, init="uniform", seed=seed, dtype=dtype)
    bound = 1 / math.sqrt(h)
    for name, p in rnn.params.items():
        assert p.dtype == dtype, name
        assert np.abs(p).max() <= bound * (1 + np.finfo(dtype).eps), name
        assert kolmogorov_smirnov(p, lambda x: uniform_cdf(x, bound)) < KS_CRITICAL, name
        variance = np.square(p.ravel(), dtype=np.float64)
        assert standard_errors_off(variance, np.array(bound**2 / 3)) < STANDARD_ERRORS, name
    # The matrices, of 7,000 numbers and more, could be told from neighbouring distributions.
    for wrong in (
        lambda x: normal_cdf(x, bound / math.sqrt(3)),
        lambda x: uniform_cdf(x, 1 / math.sqrt(d)),
    ):
        assert kolmogorov_smirnov(rnn.params["W_xh"], wrong) > 1.5 * KS_CRITICAL
    assert (
        RNN(d, h, 2, seed=seed).params["W_xh"].tobytes()
        == RNN(d, h, 2, seed=seed, init="uniform").params["W_xh"].tobytes()
    )  # what one gets without asking


@each_dtype
@pytest.mark.parametrize("seed", range(3))
def test_normal_initialisation(seed: int, dtype: type) -> None:
    """N(0, 0.01²) for the matrices whatever their size, biases exactly 0."""
    rnn = RNN(70, 100, 2, init="normal", seed=seed, dtype=dtype)
    for name, p in rnn.params.items():
        assert p.dtype == dtype, name
        if p.ndim == 1:
            assert not p.any(), name
            continue
        assert kolmogorov_smirnov(p, lambda x: normal_cdf(x, 0.01)) < KS_CRITICAL, name
        assert kolmogorov_smirnov(p, lambda x: normal_cdf(x, 0.012)) > 1.5 * KS_CRITICAL, name
    matrices = np.concatenate([p.ravel() for p in rnn.params.values() if p.ndim == 2])
    squares = np.square(matrices, dtype=np.float64)
    assert standard_errors_off(squares, np.array(0.01**2)) < STANDARD_ERRORS
    assert standard_errors_off(squares, np.array(0.0103**2)) > STANDARD_ERRORS


@pytest.mark.parametrize("init", ["uniform", "normal"])
def test_one_seed_gives_one_set_of_bits(init: Any) -> None:
    def weights(seed: Any) -> dict[str, Array]:
        return RNN(D, H_SIZE, 2, init=init, seed=seed, dtype=np.float64).params

    first = weights(3)
    for name, p in weights(3).items():
        assert_same_bits(name, p, first[name])
    for name, p in weights(np.random.default_rng(3)).items():
        assert_same_bits(name, p, first[name])
    generator = np.random.default_rng(3)
    others = [weights(generator), weights(generator), weights(4)]  # the second draws on
    numbers = np.concatenate([p.ravel() for some in others for p in some.values() if p.any()])
    assert np.unique(numbers).size == numbers.size  # nothing is drawn twice


# ---------------------------------------------------------------------------------------
# No steps, no rows
# ---------------------------------------------------------------------------------------


@each_input
@each_depth
@pytest.mark.parametrize(("steps", "rows"), [(0, N), (T, 0), (0, 0)])
def test_no_step_or_no_row(steps: int, rows: int, num_layers: int, by_id: bool) -> None:
    rnn = network(num_layers)
    X, state = inputs(by_id)[:steps, :rows], some_state(rnn)[..., :rows, :]
    H, h_T, residuals = rnn.forward(X, state)
    assert H.shape == (steps, rows, H_SIZE)
    assert h_T.shape == state.shape
    if steps == 0:
        assert_same_bits("h_T", h_T, state)
    _, dh_0, gradients = rnn.backward(H, residuals)
    assert dh_0.shape == state.shape and not dh_0.any()
    for name, gradient in gradients.items():
        assert_same_bits(name, gradient, np.zeros_like(rnn.params[name]))


# ---------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["input_size", "hidden_size", "num_layers"])
@pytest.mark.parametrize(
    ("size", "error", "expected"),
    [
        (0, ValueError, "0: expected at least 1"),
        (-3, ValueError, "-3: expected at least 1"),
        (True, TypeError, "True: expected an integer"),
        (np.True_, TypeError, "np.True_: expected an integer"),
        (2.0, TypeError, "2.0: expected an integer"),
        ("2", TypeError, "'2': expected an integer"),
        (None, TypeError, "None: expected an integer"),
    ],
)
def test_sizes_are_refused(name: str, size: Any, error: type[Exception], expected: str) -> None:
    sizes = {"input_size": 2, "hidden_size": 3, "num_layers": 1, name: size}
    with pytest.raises(error, match=f"^{re.escape(f'{name} is {expected}')}$"):
        RNN(**sizes)


def test_sizes_may_be_numpy_integers() -> None:
    rnn = RNN(np.int64(2), np.uint8(3), np.int32(2))
    assert (rnn.input_size, rnn.hidden_size, rnn.num_layers) == (2, 3, 2)
    assert rnn.num_parameters() == 2 * 3 + 3 * 3 + 3 + 2 * 3 * 3 + 3


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        (
            {"activation": "gelu"},
            ValueError,
            "activation is 'gelu': expected one of tanh, relu, sigmoid, softplus, identity",
        ),
        ({"activation": None}, TypeError, "activation is None: expected one of tanh, relu, "),
        ({"activation": "Tanh"}, ValueError, "activation is 'Tanh': expected one of tanh, relu, "),
        ({"init": "xavier"}, ValueError, "init is 'xavier': expected one of uniform, normal"),
        ({"init": 1}, TypeError, "init is 1: expected one of uniform, normal"),
        ({"dtype": np.float16}, TypeError, "dtype is float16: expected float32 or float64"),
        ({"dtype": int}, TypeError, "dtype is int64: expected float32 or float64"),
        ({"dtype": "complex64"}, TypeError, "dtype is complex64: expected float32 or float64"),
        ({"dtype": None}, TypeError, "dtype is None: expected float32 or float64"),
        ({"dtype": "single-ish"}, TypeError, "dtype is 'single-ish': expected float32 or float64"),
        ({"seed": -1}, ValueError, "seed is -1: expected at least 0"),
        ({"seed": 0.5}, TypeError, "seed is 0.5: expected an integer"),
        ({"seed": True}, TypeError, "seed is True: expected an integer"),
    ],
    ids=[
        "activation-unknown",
        "activation-none",
        "activation-case",
        "init-unknown",
        "init-number",
        "float16",
        "integers",
        "complex",
        "no-dtype",
        "unknown-dtype",
        "seed-negative",
        "seed-float",
        "seed-bool",
    ],
)
def test_options_are_refused(option: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        RNN(2, 3, **option)


def wrong(shape: tuple[int, ...], dtype: Any = np.float64) -> Array:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("num_layers", "h_0", "error", "message"),
    [
        (1, wrong((4, 4)), ValueError, "h_0 has shape (4, 4): expected (n, h) = (3, 4)"),
        (1, wrong((3, 5)), ValueError, "h_0 has shape (3, 5): expected (n, h) = (3, 4)"),
        (1, wrong((1, 3, 4)), ValueError, "h_0 has shape (1, 3, 4), 3 axes: expected (n, h), 2"),
        (1, wrong((4,)), ValueError, "h_0 has shape (4,), 1 axes: expected (n, h), 2 axes"),
        (1, wrong((3, 4), np.float32), TypeError, "h_0 has dtype float32 but W_hh has float64"),
        (1, [[0.0] * 4] * 3, TypeError, "h_0 is a builtins.list: expected a numpy.ndarray"),
        (
            2,
            wrong((3, 4)),
            ValueError,
            "h_0 has shape (3, 4): expected (num_layers, n, h) = (2, any, 4)",
        ),
        (
            2,
            wrong((3, 3, 4)),
            ValueError,
            "h_0 has shape (3, 3, 4): expected (num_layers, n, h) = (2, any, 4)",
        ),
        (
            2,
            wrong((2, 3, 5)),
            ValueError,
            "h_0 has shape (2, 3, 5): expected (num_layers, n, h) = (2, any, 4)",
        ),
        (2, wrong((2, 4, 4)), ValueError, "h_0 has shape (4, 4): expected (n, h) = (3, 4)"),
        (2, wrong((2, 3, 4), np.float32), TypeError, "h_0 has dtype float32 but W_hh has float64"),
        (2, [np.zeros((3, 4))] * 2, TypeError, "h_0 is a builtins.list: expected a numpy.ndarray"),
    ],
    ids=[
        "rows",
        "columns",
        "axis-of-layers",
        "one-axis",
        "float32",
        "list",
        "2-no-axis-of-layers",
        "2-layers",
        "2-columns",
        "2-rows",
        "2-float32",
        "2-list",
    ],
)
def test_initial_states_are_refused(
    num_layers: int, h_0: Any, error: type[Exception], message: str
) -> None:
    rnn = network(num_layers)
    with pytest.raises(error, match=re.escape(message)):
        rnn(inputs(by_id=False), h_0)
    with pytest.raises(error, match=re.escape(message)):
        rnn.step(inputs(by_id=False)[0], h_0)


@each_depth
def test_a_state_for_less_than_no_row_is_refused(num_layers: int) -> None:
    rnn = network(num_layers)
    assert rnn.init_state(0).size == 0
    with pytest.raises(ValueError, match=r"^n is -1: expected at least 0$"):
        rnn.init_state(-1)
    with pytest.raises(TypeError, match=r"^n is 1\.0: expected an integer$"):
        rnn.init_state(1.0)  # type: ignore[arg-type]


def test_inputs_and_gradients_are_refused() -> None:
    rnn = network(2)
    X = inputs(by_id=False)
    with pytest.raises(ValueError, match=re.escape("X has shape (7, 3, 4): expected (T, n, d)")):
        rnn(X[..., 1:])
    with pytest.raises(TypeError, match="X has dtype float32 but W_hh has float64"):
        rnn(X.astype(np.float32))
    with pytest.raises(ValueError, match=re.escape("X holds the id 5 at index (0, 1)")):
        rnn(np.array([[0, 5]]))
    with pytest.raises(
        TypeError, match=re.escape("X_t is a builtins.list: expected a numpy.ndarr")
    ):
        rnn.step([0, 1, 2], rnn.init_state(3))
    H, _, residuals = rnn.forward(X)
    with pytest.raises(ValueError, match=re.escape("dH has shape (6, 3, 4)")):
        rnn.backward(H[1:], residuals)
    with pytest.raises(ValueError, match=re.escape("xi has shape (6,): expected (T,) = (7,)")):
        rnn.backward(H, residuals, xi=np.ones(T - 1))
