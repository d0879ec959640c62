"""``MLPModel``: a hidden layer and no hidden state, beside a network with one (9.4.1, 9.4.2)."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import ACTIVATIONS, DTYPES
from gradcheck import check_gradients
from numpy.typing import NDArray
from reference_setup import PHI
from timemachine import require_time_machine
from tolerance import DIFFERENCE_STEP, assert_close, assert_same_bits

from gpurnn import LanguageModel, MLPModel, NGramModel, Vocabulary
from gpurnn.batches import Windows
from gpurnn.loss import perplexity
from gpurnn.optimizers import AdamW, scheduled
from gpurnn.text import normalize

Array = NDArray[Any]

Q, E_SIZE, H_SIZE = 6, 3, 5
T, N = 7, 2

each_context = pytest.mark.parametrize("context", [1, 2, 3], ids="context{}".format)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def mlp(context: int, **options: Any) -> MLPModel:
    """Build a model none of whose outputs is nearly zero or saturated."""
    settings = {"embedding_size": E_SIZE, "hidden_size": H_SIZE, "dtype": np.float64, "seed": 1}
    model = MLPModel(Q, context, **{**settings, **options})
    for p in model.params.values():
        p *= 1.5
    return model


def some_ids(shape: tuple[int, ...] = (T, N), seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, Q, shape)


# ---------------------------------------------------------------------------------------
# The equation, and what it can and cannot see
# ---------------------------------------------------------------------------------------


@each_context
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_by_hand(activation: str, context: int) -> None:
    """softmax's argument is φ([x_{t−c+1}, …, x_t] W_xh + b_h) W_hq + b_q, number by number."""
    model = mlp(context, activation=activation)
    E, W_xh, b_h, W_hq, b_q = (model.params[k] for k in ("E", "W_xh", "b_h", "W_hq", "b_q"))
    X = some_ids()
    O = model(X)
    expected = np.empty((T, N, Q))
    for t, i in np.ndindex(T, N):
        seen = [X[s, i] if s >= 0 else Q for s in range(t - context + 1, t + 1)]
        joined = [float(x) for token in seen for x in E[token]]
        H = [
            PHI[activation](math.fsum([x * w for x, w in zip(joined, column, strict=True)] + [b]))
            for column, b in zip(W_xh.T, b_h, strict=True)
        ]
        expected[t, i] = [
            math.fsum([h * w for h, w in zip(H, column, strict=True)] + [b])
            for column, b in zip(W_hq.T, b_q, strict=True)
        ]
    assert_close("O", O, expected, length=context * E_SIZE + 2 * H_SIZE + 8)


def test_tanh_and_one_token_of_context_unless_said() -> None:
    plain = MLPModel(Q)
    assert (plain.context, plain.activation, plain.params["E"].dtype) == (1, "tanh", np.float32)


@each_dtype
@each_context
def test_shapes_and_dtypes(context: int, dtype: type) -> None:
    model = mlp(context, dtype=dtype)
    shapes = {
        "E": (Q + 1, E_SIZE),
        "W_xh": (context * E_SIZE, H_SIZE),
        "b_h": (H_SIZE,),
        "W_hq": (H_SIZE, Q),
        "b_q": (Q,),
    }
    assert {name: p.shape for name, p in model.params.items()} == shapes
    assert model.num_parameters() == sum(math.prod(shape) for shape in shapes.values())
    X, Y = some_ids(), some_ids(seed=1)
    for steps in (1, context, T):
        O = model(X[:steps])
        assert (O.shape, O.dtype) == ((steps, N, Q), dtype)
    nll = model.negative_log_likelihood(X, Y)
    assert (nll.shape, nll.dtype) == ((T, N), dtype)
    loss, gradients = model.loss_and_gradients(X, Y)
    assert loss == pytest.approx(float(nll.mean(dtype=np.float64)), rel=1e-6)
    assert {name: g.shape for name, g in gradients.items()} == shapes
    assert all(g.dtype == dtype for g in gradients.values())


@pytest.mark.parametrize(("steps", "rows"), [(0, N), (T, 0), (0, 0)])
@each_context
def test_no_step_or_no_row_gives_empty_outputs(context: int, steps: int, rows: int) -> None:
    model, X = mlp(context), some_ids()[:steps, :rows]
    assert model(X).shape == (steps, rows, Q)
    assert model.negative_log_likelihood(X, X).shape == (steps, rows)


def test_there_is_no_state() -> None:
    """What the chapter keeps apart, hidden layers and hidden states, the interface does too."""
    for name in ("init_state", "step"):
        assert hasattr(LanguageModel, name)
        assert not hasattr(MLPModel, name)


def rnn_like(model: MLPModel) -> LanguageModel:
    """Build a recurrent model of the same tokens and sizes."""
    tokens = ["<unk>", *(chr(ord("a") + i) for i in range(Q - 1))]
    rnn = LanguageModel(
        Vocabulary.from_tokens_in_order(tokens),
        hidden_size=H_SIZE,
        embedding_size=E_SIZE,
        activation=model.activation,
        dtype=np.float64,
        seed=1,
    )
    for p in rnn.params.values():
        p *= 1.5
    return rnn


@each_context
def test_a_hidden_layer_forgets_what_a_hidden_state_keeps(context: int) -> None:
    """Two texts that differ until ``context`` tokens ago: for the one the same, not the other."""
    model = mlp(context)
    rnn = rnn_like(model)
    X = some_ids((T, 1))
    other = (X + 1) % Q
    other[T - context :] = X[T - context :]
    O, O_other = model(X), model(other)
    assert_same_bits("the MLP's last output", O_other[-1], O[-1])
    assert (O_other[:-1] != O[:-1]).all()
    (O, _), (O_other, _) = rnn.forward(X), rnn.forward(other)
    assert np.abs(O_other[-1] - O[-1]).max() > 1e-6


def test_a_model_without_state_cannot_tell_when_a_token_came() -> None:
    """With one token of context the order of the steps changes the order of the outputs only."""
    model, order = mlp(1), np.random.default_rng(2).permutation(T)
    X = some_ids()
    assert_close("O", model(X[order]), model(X)[order], length=2 * H_SIZE)
    rnn = rnn_like(model)
    assert np.abs(rnn.forward(X[order])[0] - rnn.forward(X)[0][order]).max() > 0.01


def dependence(
    outputs: Callable[[Array], Array], E: Array, X: Array, step: float = DIFFERENCE_STEP
) -> Array:
    """Largest entry of ∂O_t/∂x_s for every t and s, (T, T): central differences.

    No token of X comes twice, so that row X_s of the embedding E is the input at step s alone.
    """
    assert len(np.unique(X)) == len(X)
    found = np.zeros((len(X), len(X)))
    for s, token in enumerate(X):
        for k in range(E.shape[1]):
            before = E[token, k]
            E[token, k] = before + step
            ahead = outputs(X[:, None])
            E[token, k] = before - step
            behind = outputs(X[:, None])
            E[token, k] = before
            slope = np.abs(ahead - behind).max(axis=(1, 2)) / (2 * step)
            found[:, s] = np.maximum(found[:, s], slope)
    return found


def test_the_recurrent_output_depends_on_every_token_so_far() -> None:
    """9.4.5, exercise 2: ∂O_t/∂x_s is there for every s ≤ t, and there is none of what follows."""
    rnn = rnn_like(mlp(1))
    X = np.random.default_rng(3).permutation(Q)
    found = dependence(lambda X: rnn.forward(X)[0], rnn.params["E"], X)
    t, s = np.indices(found.shape)
    assert (found[s > t] == 0).all()
    assert (found[s <= t] > 1e-4).all()


@each_context
def test_the_mlps_output_depends_on_its_context_alone(context: int) -> None:
    model = mlp(context)
    X = np.random.default_rng(3).permutation(Q)
    found = dependence(model, model.params["E"], X)
    t, s = np.indices(found.shape)
    inside = (s <= t) & (t - s < context)
    assert (found[~inside] == 0).all()
    assert (found[inside] > 1e-2).all()


def test_any_token_can_be_changed_for_any_other() -> None:
    """The same without derivatives, over all replacements: who notices is a matter of place."""
    context = 3
    model = mlp(context)
    rnn = rnn_like(model)
    X = some_ids((T, 1))
    O, (O_rnn, _) = model(X), rnn.forward(X)
    for s in range(T):
        for token in set(range(Q)) - {int(X[s, 0])}:
            changed = X.copy()
            changed[s] = token
            differs = (model(changed) != O).any(axis=(1, 2))
            assert differs.tolist() == [s <= t < s + context for t in range(T)]
            differs = (rnn.forward(changed)[0] != O_rnn).any(axis=(1, 2))
            assert differs.tolist() == [s <= t for t in range(T)]


# ---------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, T])
@each_context
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_gradient_equals_finite_differences(
    activation: str, context: int, steps: int
) -> None:
    model = mlp(context, activation=activation)  # its seed keeps relu away from its kink
    X, Y = some_ids()[:steps], some_ids(seed=1)[:steps]
    loss, gradients = model.loss_and_gradients(X, Y)
    arguments = {name: p.copy() for name, p in model.params.items()}
    assert sorted(gradients) == sorted(arguments)

    def f(**a: Array) -> float:
        for name, p in model.params.items():
            p[...] = a[name]
        return float(model.negative_log_likelihood(X, Y).mean())

    assert loss == pytest.approx(f(**arguments), rel=1e-14)
    check_gradients(f, arguments, gradients)
    never_seen = [i for i in range(Q) if i not in X]
    assert not gradients["E"][never_seen].any()
    assert gradients["E"][Q].any() == (context > 1)  # "nothing yet" is seen by those who look back


# ---------------------------------------------------------------------------------------
# What it learns: a first-order model in another form
# ---------------------------------------------------------------------------------------


def trained_perplexity(
    ids: Array, vocab_size: int, context: int, *, T: int, n: int, epochs: int, seed: int
) -> float:
    """Train on windows in random order; return the perplexity of all pairs of the text.

    Windows of T = 1 are the pairs (x_t, x_{t+1}).
    """
    model = MLPModel(vocab_size, context, seed=seed)
    optimizer = AdamW(model.params)
    windows = Windows(ids, T=T, n=n)
    rng = np.random.default_rng(seed)
    total = epochs * windows.num_batches
    batches = (batch for _ in range(epochs) for batch in windows.epoch(rng))
    for step, (X, Y) in enumerate(batches):
        _, gradients = model.loss_and_gradients(X, Y)
        optimizer.step(model.params, gradients, scheduled(0.03, "cosine", step, total))
    return perplexity(model.negative_log_likelihood(ids[:-1, None], ids[1:, None]))


def maximum_likelihood(ids: Array, vocab_size: int, order: int) -> float:
    """Return the perplexity of all tokens but the first, under the counts of these very tokens."""
    counts = NGramModel(order, vocab_size, "maximum-likelihood").fit(ids)
    return perplexity(counts.negative_log_likelihood(ids)[1:])


def assert_reaches(found: float, limit: float) -> None:
    """Hold a perplexity to within 1 % of the lowest that a model of its kind can have."""
    assert limit * (1 - 1e-3) < found < limit * 1.01


@pytest.mark.parametrize("seed", range(2))
def test_pairs_of_the_time_machine_are_learned_as_well_as_they_are_counted(seed: int) -> None:
    text = normalize(require_time_machine(), "book")[:10_000]
    vocabulary = Vocabulary(text)
    ids, q = vocabulary.encode(text), len(vocabulary)
    assert q == 28
    limit = maximum_likelihood(ids, q, order=2)
    assert limit == pytest.approx(9.42, abs=0.005)
    found = trained_perplexity(ids, q, 1, T=1, n=512, epochs=50, seed=seed)
    assert_reaches(found, limit)
    assert found < 0.6 * maximum_likelihood(ids, q, order=1)  # it does use the token it sees


def markov_chain(P: Array, length: int, lag: int, rng: np.random.Generator) -> Array:
    """Draw x_t with the probabilities P[x_{t − lag}]; the first ``lag`` are drawn evenly."""
    ids = rng.integers(0, len(P), length)
    u, cumulative = rng.random(length), np.cumsum(P, axis=1)
    for t in range(lag, length):
        ids[t] = min(np.searchsorted(cumulative[ids[t - lag]], u[t], side="right"), len(P) - 1)
    return ids


def entropy_rate_perplexity(P: Array) -> float:
    """Return exp(Σ π_i H(P_i)) with the stationary π: the best that any model can do."""
    eigenvalues, vectors = np.linalg.eig(P.T)
    stationary = np.real(vectors[:, np.argmax(np.real(eigenvalues))])
    stationary = stationary / stationary.sum()
    return float(np.exp(-(stationary[:, None] * P * np.log(P)).sum()))


@pytest.mark.parametrize("seed", range(2))
def test_pairs_of_a_markov_chain_are_learned_as_well_as_they_are_counted(seed: int) -> None:
    rng = np.random.default_rng([94, seed])
    P = rng.dirichlet(np.full(5, 0.5), 5) * 0.99 + 0.002
    ids = markov_chain(P, 6000, 1, rng)
    limit = maximum_likelihood(ids, 5, order=2)
    # Counting is what it should be: near the source, and nearer than chance would have it.
    assert limit == pytest.approx(entropy_rate_perplexity(P), rel=0.05)
    assert_reaches(trained_perplexity(ids, 5, 1, T=1, n=256, epochs=15, seed=seed), limit)


def test_a_longer_context_sees_what_a_shorter_one_cannot() -> None:
    """A source that looks back two tokens: context 1 learns pairs, context 2 learns the source."""
    rng = np.random.default_rng(942)
    P = rng.dirichlet(np.full(5, 0.3), 5) * 0.99 + 0.002
    ids = markov_chain(P, 6000, 2, rng)
    pairs, triples = (maximum_likelihood(ids, 5, order) for order in (2, 3))
    assert pairs > 1.3 * triples
    assert triples == pytest.approx(entropy_rate_perplexity(P), rel=0.05)
    for context, limit in [(1, pairs), (2, triples)]:
        found = trained_perplexity(ids, 5, context, T=8, n=256, epochs=10, seed=0)
        assert_reaches(found, limit)


# ---------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------


def test_parameters_change_in_place_and_cannot_be_replaced() -> None:
    model, X = mlp(2), some_ids()
    before = model(X)
    with pytest.raises(TypeError, match="does not support item assignment"):
        model.params["E"] = np.zeros((Q + 1, E_SIZE))  # type: ignore[index]
    model.params["b_q"][...] += 1
    assert_close("O", model(X), before + 1, length=2 * H_SIZE)


@pytest.mark.parametrize("init", ["uniform", "normal"])
def test_one_seed_gives_one_set_of_bits(init: Any) -> None:
    def weights(seed: Any) -> dict[str, Array]:
        return dict(MLPModel(40, 2, init=init, seed=seed, dtype=np.float64).params)

    first = weights(3)
    for seed in (3, np.random.default_rng(3)):
        for name, p in weights(seed).items():
            assert_same_bits(name, p, first[name])
    assert (weights(4)["E"] != first["E"]).all()
    fans = {"E": 16, "W_xh": 32, "b_h": 32, "W_hq": 64, "b_q": 64}
    for name, p in first.items():
        if init == "uniform":
            assert 0.9 < np.abs(p).max() * math.sqrt(fans[name]) <= 1, name
        elif p.ndim == 1:
            assert not p.any(), name
        else:
            assert p.std() == pytest.approx(0.01, rel=0.1), name


# ---------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vocab_size", "context", "embedding_size", "hidden_size"])
@pytest.mark.parametrize(
    ("size", "error", "expected"),
    [
        (0, ValueError, "0: expected at least 1"),
        (-1, ValueError, "-1: expected at least 1"),
        (True, TypeError, "True: expected an integer"),
        (1.0, TypeError, "1.0: expected an integer"),
        (None, TypeError, "None: expected an integer"),
    ],
)
def test_sizes_are_refused(name: str, size: Any, error: type[Exception], expected: str) -> None:
    sizes = {"vocab_size": 4, "context": 2, "embedding_size": 3, "hidden_size": 5, name: size}
    with pytest.raises(error, match=f"^{re.escape(f'{name} is {expected}')}$"):
        MLPModel(**sizes)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"activation": "gelu"}, ValueError, "activation is 'gelu': expected one of tanh, relu"),
        ({"dtype": np.float16}, TypeError, "dtype is float16: expected float32 or float64"),
        ({"init": "xavier"}, ValueError, "init is 'xavier': expected one of uniform, normal"),
        ({"seed": -1}, ValueError, "seed is -1: expected at least 0"),
    ],
    ids=["activation", "dtype", "init", "seed"],
)
def test_options_are_refused(option: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        MLPModel(4, **option)


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (np.zeros(3, int), ValueError, "X has shape (3,): expected (T, n) = (any, any)"),
        (np.zeros((3, 2, 1), int), ValueError, "X has shape (3, 2, 1): expected (T, n)"),
        (np.zeros((3, 2)), TypeError, "X has dtype float64: expected integer token ids"),
        ([[0, 1]], TypeError, "X is a builtins.list: expected a numpy.ndarray"),
        (np.array([[0, -1]]), ValueError, "X holds the id -1 at index (0, 1)"),
        # Q is the row that stands for "nothing yet": no token of a text may select it.
        (np.array([[0], [Q]]), ValueError, f"X holds the id {Q} at index (1, 0)"),
    ],
    ids=["1-axis", "3-axes", "floats", "list", "negative", "nothing-yet"],
)
def test_ids_are_refused(X: Any, error: type[Exception], message: str) -> None:
    model = mlp(2)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        model(X)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        model.loss_and_gradients(X, np.zeros(np.shape(X), int))


def test_targets_are_refused() -> None:
    model = mlp(2)
    for call in (model.loss_and_gradients, model.negative_log_likelihood):
        with pytest.raises(ValueError, match=re.escape("targets has shape (6, 2)")):
            call(some_ids(), some_ids()[1:])
        with pytest.raises(ValueError, match=f"targets holds the id {Q} at index"):
            call(some_ids(), some_ids() * 0 + Q)
