# %% [markdown]
# # 3. Gradients through time
#
# At the end one will know how far a gradient reaches back through a recurrence, what clipping and
# truncation do to it, and that it can go through a whole book at once; also what a recurrent
# network can express exactly, what it sees of the past, and what is wrong with it.
#
# Equation numbers in brackets are those of *Dive into Deep Learning*, section 9.4. H_t (n, h) is
# the hidden state after step t of T, O_t (n, q) the logits, φ the activation, n the batch, |V|
# the size of the vocabulary. What begins with **Statement** is shown by the code after it, which
# fails if it does not hold. It runs in a minute, on NumPy but for the models that are trained,
# and the last pass.

# %%
import dataclasses
import math
import time
import tracemalloc
from unittest import mock

import numpy as np
import style

import gpurnn
from gpurnn import RNN, LanguageModel, MLPModel, NGramModel, Tokenizer, Vocabulary, loss
from gpurnn import functional as F
from gpurnn.batches import RandomPartition
from gpurnn.optimizers import clip_global_norm, make_optimizer
from gpurnn.training import PRESETS, StreamValidation, Trainer, TrainingConfig, prepare

tokenizer = Tokenizer(unit="char", edition="book")
characters = tokenizer.tokens(gpurnn.load_corpus("time-machine").text)
vocabulary = Vocabulary(characters)
ids, q = vocabulary.encode(characters), len(vocabulary)
print(f"The Time Machine: {len(ids):,} characters, |V| = {q}")
print(f"Models are trained {style.BACKEND_NOTE}")

# %% [markdown]
# ## The gradient over a long sequence
#
# Write Z_t for what φ is applied to in (9.4.5). A loss L reaches H_{t−1} in two ways, by the
# output of that step and by the next state:
#
# ∂L/∂H_{t−1} = ∂L/∂O_{t−1} W_hqᵀ + (φ′(Z_t) ⊙ ∂L/∂H_t) W_hhᵀ.
#
# So a gradient that comes from step T has been multiplied T − t times by W_hhᵀ, and by a φ′ each
# time (section 9.7). The spectral radius ρ of W_hh is the largest absolute value of its
# eigenvalues.
#
# **Statement 28.** Over a long sequence the gradient vanishes or explodes, exponentially in the
# distance: with φ the identity, the logarithm of ‖∂L/∂H_t‖ is, far back, a line of slope log ρ per
# step back. With tanh or relu each factor has a φ′ ≤ 1 beside it, and here the norm falls faster,
# or grows more slowly.
#
# Each of the h rows of the batch below has a loss of its own, L_j = H_T[j], so that their
# gradients together are the Jacobian ∂H_T/∂H_t. W_xh is the identity; then the library's dX is
# ∂L/∂Z.

# %%
h = 64
rng = np.random.default_rng(28)
W = rng.standard_normal((h, h))
W /= np.abs(np.linalg.eigvals(W)).max()  # its spectral radius is 1 now


def jacobians(rho, activation, T):
    """The states H (T, h, h), and ∂H_T/∂H_t for t = 1…T, (T, h, h)."""
    X = 0.5 * np.random.default_rng(0).standard_normal((T, 1, h)).repeat(h, axis=1)
    H, residuals = F.rnn_forward(X, None, np.eye(h), rho * W, None, activation=activation)
    dH = np.zeros_like(H)
    dH[-1] = np.eye(h)
    dZ, *_ = F.rnn_backward(dH, residuals)
    return H, np.concatenate([dZ[1:] @ (rho * W).T, dH[-1:]])


H, found = jacobians(0.9, "tanh", 20)
by_hand = np.eye(h)
for H_t in H[:0:-1]:  # t = T, …, 2
    by_hand = ((1 - H_t**2) * by_hand) @ (0.9 * W).T
np.testing.assert_allclose(found[0], by_hand, rtol=0, atol=1e-12)

_, found = jacobians(0.9, "identity", 20)
np.testing.assert_allclose(found[0], np.linalg.matrix_power(0.9 * W.T, 19), rtol=0, atol=1e-12)

# %%
RADII = (0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.5)


def norms(rho, activation, T):
    """‖∂H_T/∂H_t‖ for t = 1…T."""
    return np.linalg.norm(jacobians(rho, activation, T)[1], axis=(1, 2))


def slope(norms):
    """Of log ‖∂L/∂H_t‖ per step back, by least squares over all but the 60 steps next to the loss,
    where the other eigenvalues still count."""
    far = np.log(norms[:-60])
    return -np.polyfit(np.arange(len(far)), far, 1)[0]


linear = {rho: slope(norms(rho, "identity", 300)) for rho in RADII}
print("   ρ     log ρ   slope")
for rho, found in linear.items():
    print(f"{rho:4.1f}  {math.log(rho):8.5f}  {found:8.5f}")
    assert abs(found - math.log(rho)) < max(0.01 * abs(math.log(rho)), 1e-4), rho

# %%
SHOWN = {0.5: "-", 0.8: "--", 1.0: "-", 1.2: "-.", 1.5: ":"}
profiles = {
    (activation, rho): norms(rho, activation, 121)
    for activation in ("identity", "tanh", "relu")
    for rho in SHOWN
}
with style.grid_of(1, 3, height=3.2, sharex=True, sharey=True) as grid:
    for axes, activation in zip(grid[0], ("identity", "tanh", "relu"), strict=True):
        for rho, dashes in SHOWN.items():
            back = profiles[activation, rho][::-1][:61]
            shade = "0.6" if rho == 1.0 else "0.1"
            axes.semilogy(back, dashes, color=shade, marker="", label=f"ρ = {rho}")
        axes.set_title(f"φ = {activation}")
        axes.set_xlabel("T − t (steps back)")
    grid[0, 0].set_ylabel("‖∂H_T/∂H_t‖")
    grid[0, 0].figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5
    )

for (activation, rho), found in profiles.items():
    if activation != "identity":
        assert slope(found) < math.log(rho) - 0.1, (activation, rho)
left = {}
for activation in ("identity", "tanh", "relu"):
    left[activation] = profiles[activation, 1.0][-61] / profiles[activation, 1.0][-1]
    print(f"ρ = 1, {activation}: after 60 steps {left[activation]:.1e} of the norm is left")
assert 0.01 < left["identity"] < 1 and left["tanh"] < 1e-6 and left["relu"] < 1e-6

# %% [markdown]
# ## Clipping
#
# **Statement 28.** What explodes can be clipped: the gradient g of all parameters is replaced by
# min(1, θ/‖g‖) g (section 9.5.3). In the book's own run, θ = 1, that never acts. A relu network
# that starts with W_hh = I adds its inputs up over 32 steps; there it decides what is learned.
#
# First 20 of the book's 100 epochs (notebook 2 asserts the same of all 100). The history has the
# largest norm of each epoch, measured before clipping.

# %%
g = {"W": np.array([3.0, 0.0]), "b": np.array([4.0])}
assert clip_global_norm(g, 1.0) == 5 and np.allclose([*g["W"], *g["b"]], [0.6, 0, 0.8])


def train(W_hh=None, **changes):
    """Make the book's run with some settings changed."""
    config = dataclasses.replace(PRESETS["book"], **changes)
    run = prepare(config, device=style.DEVICE)
    if W_hh is not None:
        run.model.load_params({**run.model.params, "W_hh": W_hh})
    assert run.trainer.run()
    run.model.to("cpu")
    return run


book = train(epochs=20)
largest = [record["largest_gradient_norm"] for record in book.trainer.history]
print(f"the book's run: largest norm of 20 epochs {max(largest):.2f}, clipped above 1")
assert 0.3 < max(largest) < 1

# %% [markdown]
# Then relu and W_hh = I, without clipping and with it. To be short, 8 epochs in batches of 128
# windows: 632 updates, where the book's whole run, in batches of 1,024, has 1,000. Without
# clipping the first steps throw the weights to where every unit is dead, 0 at all steps; what is
# left is b_q, which learns how frequent each character is. (Norms are told as they are before
# clipping, so the largest is the larger one with it: there the units live on.)

# %%
options = {"activation": "relu", "batch_size": 128, "epochs": 8}
identity = np.eye(32, dtype=np.float32)
curves = {}
for clip in (None, 1.0):
    run = train(identity, **options, clip=clip)
    history = run.trainer.history
    curves[clip] = [record["valid_perplexity"] for record in history]
    steepest = history[0]["largest_gradient_norm"]
    print(
        f"clip {clip}: largest norm of the first epoch {steepest:.3g}, "
        f"validation perplexity after 8 epochs {curves[clip][-1]:.2f}"
    )
    assert steepest > 50  # in both: clipping acts
    assert run.trainer.progress.step == 632
    H, _ = run.model.rnn(run.valid_ids[:5000].reshape(-1, 100).T)  # (T = 100, n = 50)
    assert (H > 0).mean() < 0.01 if clip is None else (H > 0).mean() > 0.05  # dead, or not
unigram = NGramModel(1, q, "maximum-likelihood").fit(run.train_ids).perplexity(run.valid_ids)

with style.figure("epoch", "validation perplexity", "relu, W_hh = I at first") as axes:
    epochs = range(1, 9)
    axes.plot(epochs, curves[None], label="never clipped")
    axes.plot(epochs, curves[1.0], label="clipped to norm 1")
    axes.axhline(unigram, color="0.6", linestyle=":", marker="", label="frequencies of characters")
assert curves[None][-1] > 15.5 and abs(curves[None][-1] / unigram - 1) < 0.07
assert curves[1.0][-1] < 12.5

# %% [markdown]
# ## Truncation
#
# Backpropagation is cut between steps t − 1 and t where a factor ξ_t on the gradient that flows
# there is 0. Regular truncation (section 9.7.1.2) cuts every τ steps; the values of the states go
# on, only their gradient ends: the state is carried, and detached. Randomized truncation
# (9.7.1.3) draws ξ_t = 1/π with probability π and else 0, so that E[ξ_t] = 1.
#
# **Statement 22.** τ = T is the full gradient. For τ < T the gradient is that of chunks of τ
# steps, each starting from the last state of the one before it as from a constant. It is biased;
# the randomized gradient is right in the mean, and varies.


# %%
def in_float64(model):
    """A copy of a model whose parameters are float64."""
    options = {"hidden_size": model.rnn.hidden_size, "dtype": np.float64}
    double = LanguageModel(model.vocabulary, model.tokenizer, **options)
    double.load_params({name: p.astype(np.float64) for name, p in model.params.items()})
    return double


lm = in_float64(book.model)
T, n = 64, 16
X, Y = ids[: n * T].reshape(n, T).T, ids[1 : n * T + 1].reshape(n, T).T  # both (T, n)


def truncated(tau):
    """ξ of regular truncation: 0 at the first step of each chunk but the first."""
    xi = np.ones(T)
    xi[tau::tau] = 0
    return xi


mean, full, last = lm.loss_and_gradients(X, Y)
_, at_T, _ = lm.loss_and_gradients(X, Y, xi=truncated(T))
assert all(np.array_equal(at_T[name], full[name]) for name in full)

chunks, losses, state = [], [], None
for t in range(0, T, 16):
    chunk_loss, gradients, state = lm.loss_and_gradients(X[t : t + 16], Y[t : t + 16], state)
    chunks.append(gradients)
    losses.append(chunk_loss)
_, at_16, _ = lm.loss_and_gradients(X, Y, xi=truncated(16))
assert np.array_equal(state, last)  # carried: the same values as in one pass
np.testing.assert_allclose(np.mean(losses), mean, rtol=1e-12)
for name in full:  # detached: the gradient of the cut sequence, which is not the full one
    by_chunks = np.mean([gradients[name] for gradients in chunks], axis=0)
    np.testing.assert_allclose(by_chunks, at_16[name], rtol=0, atol=1e-12)
    far = np.linalg.norm(at_16[name] - full[name]) / np.linalg.norm(full[name])
    print(f"{name}: cut every 16 steps, {far:.1%} off the full gradient")
    assert far < 1e-12 if name in ("W_hq", "b_q") else far > 0.01  # those need no gradient by H

# %% [markdown]
# Both ways side by side, cut once in τ steps, the randomized one on average: π = 1 − 1/τ. Of N
# draws, the part of each along the full gradient has a mean with a confidence interval (99.9 %),
# which must hold 1; and the mean of the whole vectors must be some √N times nearer to the full
# gradient than one draw is. Without the factor 1/π the mean is too short. For τ = 16 and 32 a
# randomized gradient is further from the full one than the regular one is. (In the picture, the
# bias at τ = T = 64 is missing: it is 0, which a logarithmic axis does not have.)

# %%
H, _, residuals = lm.rnn.forward(X)
_, dH, *_ = F.linear_cross_entropy(H, lm.params["W_hq"], lm.params["b_q"], Y)


def recurrent_gradient(xi):
    """Of W_xh, W_hh and b_h as one vector."""
    _, _, gradients = lm.rnn.backward(dH, residuals, xi=xi)
    return np.concatenate([g.ravel() for g in gradients.values()])


exact, draws = recurrent_gradient(None), 300
length = np.linalg.norm(exact)
off = {}
print("    τ   bias, regular   one draw's error   mean along full gradient   without 1/π")
for tau in (2, 4, 8, 16, 32, 64):
    pi = 1 - 1 / tau
    kept = np.random.default_rng(tau).random((draws, T)) < pi
    drawn = np.array([recurrent_gradient(xi / pi) for xi in kept])
    plain = np.array([recurrent_gradient(xi * 1.0) for xi in kept]) @ exact / length**2
    bias = np.linalg.norm(recurrent_gradient(truncated(tau)) - exact) / length
    error = math.sqrt(np.square(drawn - exact).sum(axis=1).mean()) / length
    along = drawn @ exact / length**2
    interval = 3.3 * along.std(ddof=1) / math.sqrt(draws)  # 99.9 %
    print(
        f"{tau:5}   {bias:13.3f}   {error:16.3f}   {along.mean():16.3f} ± {interval:.3f}"
        f"   {plain.mean():11.3f}"
    )
    off[tau] = bias, error
    assert abs(along.mean() - 1) < interval
    assert np.linalg.norm(drawn.mean(axis=0) - exact) / length < 2 * error / math.sqrt(draws)
    assert plain.mean() + 3.3 * plain.std(ddof=1) / math.sqrt(draws) < 1  # not the randomized one

# %%
with style.figure("τ (steps)", "distance from the full gradient (% of its norm)") as axes:
    axes.loglog(list(off), [bias or math.nan for bias, _ in off.values()], label="regular: bias")
    axes.loglog(
        list(off), [error for _, error in off.values()], label="randomized: standard deviation"
    )
    axes.set_xticks(list(off), [str(tau) for tau in off])
    axes.set_yticks([0.03, 0.1, 0.3], ["3", "10", "30"])
    axes.minorticks_off()

biases, errors = zip(*off.values(), strict=True)
assert list(biases) == sorted(biases, reverse=True) and biases[-1] == 0  # τ = T
assert list(errors) == sorted(errors, reverse=True) and min(errors) > 0
assert all(off[tau][1] > 1.1 * off[tau][0] for tau in (16, 32))

# %% [markdown]
# ## A recurrent network that is exact
#
# A shift register of n − 1 blocks of |V| units, φ the identity: W_xh writes the token into the
# first block, W_hh moves each block's content to the next, and what was in the last is forgotten.
# H_t then holds the last n − 1 tokens, each as a one-hot vector.

# %%
letters = "machine"
m = 3
register_W_xh = np.eye(7, m * 7)
register_W_hh = np.eye(m * 7, k=7)
one_by_one = np.arange(7)[:, None]  # the ids of m, a, c, h, i, n, e, (T, n = 1)
H, _ = F.rnn_forward(one_by_one, None, register_W_xh, register_W_hh, None, activation="identity")
for t in range(7):  # block b holds token t − b, or nothing yet
    seen = [letters[block.argmax()] if block.any() else "" for block in H[t, 0].reshape(m, 7)]
    assert seen == [letters[t - b] if t >= b else "" for b in range(m)]

with style.figure("unit of H_t", "t, and the token x_t", width=6.4, height=3.1) as axes:
    axes.imshow(H[:, 0], aspect="auto", interpolation="nearest")
    for b, block in enumerate(("the token x_t", "x_{t−1}", "x_{t−2}")):
        axes.text(7 * b + 3, -0.8, block, ha="center")
    axes.set_xticks(range(m * 7), m * letters)
    axes.set_yticks(range(7), [f"{t + 1} {letter}" for t, letter in enumerate(letters)])
    axes.grid(visible=False)
    for b in range(1, m):
        axes.axvline(b * 7 - 0.5, color="0.4", linewidth=1, linestyle="-", marker="")

# %% [markdown]
# The readout is a table, a hidden layer between H_t and O_t that (9.4.6) has not: for each context
# of 1 … n − 1 tokens a hidden unit (9.4.3) that is 1 if the register holds just this context, else
# 0, and a row of W_hq with log p of all tokens after it. With l tokens to match, a unit's weights
# are 1 for each of them and −1 for any token in the block before them, which is empty only where
# the text began later; its bias is −(l − 1), its φ relu.
#
# **Statement 26.** This network is exact for any n-gram that rules no token out: its −log p of
# every character of an unseen text is that of `NGramModel`, to 10⁻⁶, for n = 2, 3, 4.


# %%
def readout(ngram):
    """The readout's weights: W (m|V|, contexts), b (contexts,), W_hq (contexts, |V|)."""
    m, W, b, W_hq = ngram.order - 1, [], [], []
    for l in range(1, m + 1):  # contexts of l tokens, the oldest first
        contexts = np.indices((q,) * l).reshape(l, -1).T
        units = np.zeros((m, q, len(contexts)))
        for back in range(l):
            units[back, contexts[:, l - 1 - back], np.arange(len(contexts))] = 1
        if l < m:
            units[l] = -1
        W.append(units.reshape(m * q, -1))
        b.append(np.full(len(contexts), 1.0 - l))
        W_hq.append(ngram.log_prob(contexts[:, None], np.arange(q)))
    return np.concatenate(W, axis=1), np.concatenate(b), np.concatenate(W_hq)


unseen = ids[20_000:20_301]
print("n     h   contexts   perplexity   largest difference of −log p")
for order in (2, 3, 4):
    ngram = NGramModel(order, q, "witten-bell").fit(ids[:10_000])
    m = order - 1
    H, _ = F.rnn_forward(
        unseen[:-1, None], None, np.eye(q, m * q), np.eye(m * q, k=q), None, activation="identity"
    )
    W_context, b_context, W_hq = readout(ngram)
    C, _ = F.hidden_layer(H, W_context, b_context, activation="relu")
    assert np.array_equal(np.count_nonzero(C, axis=-1), np.ones((300, 1)))  # one context at a time
    O = F.linear(C, W_hq, None)
    of_rnn = F.negative_log_likelihood(O, unseen[1:, None])[:, 0]
    of_ngram = ngram.negative_log_likelihood(unseen)[1:]
    difference = np.abs(of_rnn - of_ngram).max()
    perplexity = loss.perplexity(of_rnn)
    print(f"{order}   {m * q:3}   {len(b_context):8,}   {perplexity:10.3f}   {difference:.1e}")
    np.testing.assert_allclose(np.exp(O).sum(axis=-1), 1, rtol=1e-12)  # O is log p as it is
    assert difference <= 1e-6

# %% [markdown]
# **Statement 5.** With a hidden state, (9.4.1) need not be an approximation: by (9.4.2) H_t can be
# a record of the whole text. In the n-gram above P(x_{t+1} | x_t, …, x_1) was computed from H_t
# alone. With as many blocks as steps, nothing is forgotten at all: from the last state the whole
# text is read off. The chapter's warning comes with it: the state grows with the text, and W_hh
# with its square.

# %%
text = tokenizer.tokens("the time traveller")
T = len(text)
by_id = vocabulary.encode(text)[:, None]
H, _ = F.rnn_forward(by_id, None, np.eye(q, T * q), np.eye(T * q, k=q), None, activation="identity")
blocks = H[-1, 0].reshape(T, q)[::-1]  # the oldest first
read = vocabulary.decode(blocks.argmax(axis=1))
print(f"{''.join(read)!r}: {T} tokens, {T * q} numbers in the state, {(T * q) ** 2:,} in W_hh")
assert read == text and (blocks.sum(axis=1) == 1).all()

# %% [markdown]
# ## What O_t sees
#
# **Statement 27.** O_t depends on every token so far and on none that comes later: the Jacobian
# ∂O_t/∂x_s, x_s the one-hot vector of token s, is not zero for s ≤ t and zero for s > t. That of
# an MLP with a context of four tokens is zero outside these four as well.
#
# The network is the one trained above. The batch has a row for each pair of t and an output j,
# whose gradient starts from O_t[j] alone: one backward pass gives all Jacobians.

# %%
text = tokenizer.tokens("the time machine")
x, T = vocabulary.encode(text), len(text)
p = lm.params

X = np.eye(q)[x][:, None].repeat(T * q, axis=1)  # (T, rows, q)
_, residuals = F.rnn_forward(X, None, p["W_xh"], p["W_hh"], p["b_h"])
dH = np.zeros((T, T, q, lm.rnn.hidden_size))
dH[np.arange(T), np.arange(T)] = p["W_hq"].T  # at step t in the rows of t
dX, *_ = F.rnn_backward(dH.reshape(T, T * q, -1), residuals)
of_rnn = np.linalg.norm(dX.reshape(T, T, q * q), axis=-1).T  # (t, s)

context = 4
mlp = MLPModel(q, context, embedding_size=8, dtype=np.float64)
E, W_hq = mlp.params["E"], mlp.params["W_hq"]
padded = np.concatenate([np.full(context - 1, q), x])  # q stands for "nothing yet"
windows = np.lib.stride_tricks.sliding_window_view(padded, context)
joined = F.embedding(windows, E).reshape(T, 1, -1).repeat(q, axis=1)  # (t, j, context · 8)
C, residuals = F.hidden_layer(joined, mlp.params["W_xh"], mlp.params["b_h"])
O = F.linear(C[:, 0], W_hq, mlp.params["b_q"])
np.testing.assert_allclose(O, mlp(x[:, None])[:, 0], rtol=0, atol=1e-12)  # it is the library's MLP
dX, *_ = F.hidden_layer_backward(np.broadcast_to(W_hq.T, C.shape), residuals)
slots = np.linalg.norm(dX.reshape(T, q, context, -1) @ E[:q].T, axis=(1, 3))  # (t, slot)
of_mlp = np.zeros((T, T + context - 1))
for t in range(T):
    of_mlp[t, t : t + context] = slots[t]
of_mlp = of_mlp[:, context - 1 :]  # what stands before the text is no token

with style.grid_of(1, 2, width=7.6, height=3.4) as grid:
    for axes, norm, name in zip(grid[0], (of_rnn, of_mlp), ("RNN", "MLP, context 4"), strict=True):
        decades = np.log10(norm, out=np.full_like(norm, np.nan), where=norm > 0)
        style.heat(axes, decades, "log₁₀ ‖∂O_t/∂x_s‖ (white: 0)", vmin=-6.5, vmax=1.5)
        axes.set_xticks(range(T), ["␣" if c == " " else c for c in text])
        axes.set_yticks(range(T), ["␣" if c == " " else c for c in text])
        axes.set_xlabel("s, the token x_s")
        axes.set_ylabel("t, of the output O_t")
        axes.set_title(name)
print(f"RNN, ‖∂O_16/∂x_s‖: {of_rnn[15, 15]:.2g} for s = 16, {of_rnn[15, 0]:.2g} for s = 1")

# %% [markdown]
# The MLP's picture was put together from its windows, and could show nothing outside them. So
# both are tried out as well: with another token at s, which outputs differ?


# %%
def changed(outputs):
    """(t, s): whether O_t is another one after token s has been replaced."""
    found = np.zeros((T, T), bool)
    for s in range(T):
        other = x.copy()
        other[s] = vocabulary["z"]
        found[:, s] = (outputs(other) != outputs(x)).any(axis=-1)
    return found


past = np.tri(T, dtype=bool)  # s ≤ t
window = past & ~np.tri(T, k=-context, dtype=bool)  # and s > t − 4
assert (of_rnn[past] > 10**-6.5).all() and (of_rnn[~past] == 0).all()
assert (of_mlp[window] > 10**-6.5).all() and (of_mlp[~window] == 0).all()
assert np.array_equal(changed(lambda x: lm.forward(x[:, None])[0][:, 0]), past)
assert np.array_equal(changed(lambda x: mlp(x[:, None])[:, 0]), window)

# %% [markdown]
# ## What is wrong with the model
#
# **Statement 29.** Gradients vanish, so that what lies far back is not learned; the network needs
# much text; always taking the likeliest character it runs in circles; and its steps must wait for
# each other.
#
# *Vanishing.* One of four tokens, then noise, and after it the first token is to be named. Only
# the lag differs: the less of the gradient reaches the initial state before training, the less is
# learned. (Points are three seeds, the line is their median.)


# %%
def recall(lag, seed, updates=400, h=32, n=64):
    """Accuracy after training, and how much of the gradient by H_T reaches H_0 at first."""
    rng = np.random.default_rng(seed)
    rnn = RNN(8, h, seed=seed)
    W_hq = (rng.standard_normal((h, 4)) / math.sqrt(h)).astype(np.float32)
    params = {**rnn.params, "W_hq": W_hq, "b_q": np.zeros(4, np.float32)}
    optimizer = make_optimizer("adamw", params)

    def batch(n):
        X = rng.integers(4, 8, (lag + 1, n))
        X[0] = rng.integers(0, 4, n)
        return X

    reaching = None
    for _ in range(updates):
        X = batch(n)
        H, _, residuals = rnn.forward(X)
        _, dlast, dW_hq, db_q = F.linear_cross_entropy(H[-1], W_hq, params["b_q"], X[0])
        dH = np.zeros_like(H)
        dH[-1] = dlast
        _, dh_0, gradients = rnn.backward(dH, residuals)
        if reaching is None:
            reaching = np.linalg.norm(dh_0) / np.linalg.norm(dlast)
        gradients |= {"W_hq": dW_hq, "b_q": db_q}
        clip_global_norm(gradients, 1.0)
        optimizer.step(params, gradients, 3e-3)
    X = batch(2000)
    O = F.linear(rnn(X)[0][-1], W_hq, params["b_q"])
    return (O.argmax(axis=-1) == X[0]).mean(), reaching


lags, seeds = (2, 5, 10, 20, 40, 60), (0, 1, 2)
found = np.array([[recall(lag, seed) for seed in seeds] for lag in lags])  # (lag, seed, 2)
with style.grid_of(1, 2, height=2.9) as grid:
    for axes, values in zip(grid[0], (found[..., 0], found[..., 1]), strict=True):
        axes.plot(lags, values, "o", color="0.5")  # each seed
        axes.plot(lags, np.median(values, axis=1), "-", color="0.05", marker="")
        axes.set_xlabel("lag (steps)")
    grid[0, 0].set_title("after 400 updates")
    grid[0, 0].set_ylabel("accuracy")
    grid[0, 0].set_ylim(0, 1.05)
    grid[0, 0].axhline(0.25, color="0.5", linestyle=":", marker="")
    grid[0, 0].text(2, 0.17, "guessing")
    grid[0, 1].set_title("before training")
    grid[0, 1].set_ylabel("‖∂L/∂H_0‖ / ‖∂L/∂H_T‖")
    grid[0, 1].set_yscale("log")
assert (found[:2, :, 0] > 0.95).all()  # lags 2 and 5, with each seed
assert (found[-1, :, 0] < 0.35).all()  # lag 60: no better than guessing
assert (found[-1, :, 1] < 1e-8 * found[0, :, 1]).all()
assert (np.diff(np.median(found[..., 1], axis=1)) < 0).all()
assert np.median(found[:3, :, 0]) > 0.95 and np.median(found[-2:, :, 0]) < 0.4

# %% [markdown]
# *Data hunger.* The same network on more and more text, each time stopped where it does best on
# the last 5,000 characters of the book, and measured on them; beside it the best of five n-grams
# counted on the same text, chosen by these characters as well (which favours both). Counting does
# better each time; on little text the network learns the text itself.

# %%
held_out = ids[-5000:]
sizes, rows = (2_500, 10_000, 40_000), []
for size, epochs in zip(sizes, (100, 60, 25), strict=True):
    network = LanguageModel(vocabulary, tokenizer, hidden_size=128).to(style.DEVICE)
    config = TrainingConfig(hidden_size=128, epochs=epochs, patience=15)
    trainer = Trainer(
        network, RandomPartition(ids[:size], T=32, n=16), config, StreamValidation(held_out)
    )
    assert trainer.run()
    trainer.keep_best()
    network.to("cpu")
    counted = [
        loss.perplexity(NGramModel(order, q).fit(ids[:size]).negative_log_likelihood(held_out)[1:])
        for order in range(1, 6)
    ]
    last = trainer.history[-1]
    rows.append((network.evaluate_ids(held_out).perplexity, min(counted)))
    print(
        f"{size:6,} characters: network {rows[-1][0]:5.2f}, n-gram {rows[-1][1]:5.2f}; last epoch: "
        f"training {last['train_perplexity']:5.2f}, validation {last['valid_perplexity']:5.2f}"
    )
    if size == sizes[0]:
        assert last["valid_perplexity"] > 1.4 * last["train_perplexity"]
of_network, of_counting = zip(*rows, strict=True)

with style.figure("characters to learn from", "perplexity of unseen text") as axes:
    axes.semilogx(sizes, of_network, label="network, h = 128")
    axes.semilogx(sizes, of_counting, label="best n-gram, n ≤ 5")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
assert all(a > 1.05 * b for a, b in rows)
assert of_network[0] > 1.1 * of_network[1] and of_network[1] > 1.2 * of_network[2]

# %% [markdown]
# *Greedy loops.* The last of these networks continues a text with its likeliest characters. The
# next state is then a function of the state alone, and the text soon repeats itself. Drawn at
# random from the same network, it does not.


# %%
def period(text):
    """The least number of characters after which a text repeats itself; None if it does not."""
    return next((k for k in range(1, len(text) // 2) if text[k:] == text[:-k]), None)


for prefix in ("the time machine ", "i ", "weena "):
    greedy = network.generate(prefix, 2000, temperature=0)[-1000:]
    sampled = network.generate(prefix, 2000, seed=29)[-1000:]
    print(f"{prefix!r}, after 1,000 characters, period {period(greedy)}: …{greedy[-60:]}")
    assert period(greedy) is not None and period(sampled) is None
print(f"drawn at random: …{sampled[-60:]}")

# %% [markdown]
# *Cost of T.* On NumPy, the products of a forward pass, and those of a backward pass that wait
# for each other, are calls of `numpy.matmul`, so they can be counted. There and back it is T
# products with W_hh, each of which needs the result of the one before; an MLP has one product a
# layer for all steps. Multiply-adds and stored states grow in proportion to T.


# %%
def counted(call, *arguments):
    """The number of calls of matmul, and their multiply-adds; and what the call returns."""
    with mock.patch.object(np, "matmul", wraps=np.matmul) as product:
        result = call(*arguments)
    pairs = [made.args for made in product.call_args_list]
    return len(pairs), sum(a.size * b.shape[-1] for a, b in pairs), result


print("     T   calls: forward, backward   MLP   multiply-adds   states kept")
h = lm.rnn.hidden_size
for T in (64, 128, 256, 512):
    X = ids[:T, None]
    calls, operations, _ = counted(lm.forward, X)
    H, _, residuals = lm.rnn.forward(X)
    calls_back, _, _ = counted(lm.rnn.backward, np.ones_like(H), residuals)
    calls_mlp, _, _ = counted(mlp, X)
    kept = len(residuals[0].states)
    print(f"{T:6}   {calls:14} {calls_back:10}   {calls_mlp:3}   {operations:13,}   {kept:11}")
    assert calls == T + 1 and calls_back == T  # the one more is the output layer's
    assert operations == T * (h * h + h * q)
    assert kept == T + 1 and calls_mlp == 2

# %% [markdown]
# ## A whole book in one pass
#
# The 2019 edition of the chapter calls backpropagation through a book, 100,000 characters and
# more, out of the question without an approximation. In time it is T steps there and T back. In
# memory it is T states, unless only every k-th is kept and the others are computed again, k at a
# time, on the way back (`checkpoint_every=k`): T/k + k states, least for k = √T. That is what the
# recurrence keeps for the way back. H itself, and ∂L/∂H, are made here for all steps at once, 44 MB
# each, as the loss is computed in one piece; in pieces it would need neither.
#
# **Statement 22.** Full backpropagation through *The Time Machine*, T = 173,427, takes one
# backward pass for which the recurrence keeps 833 states, and its gradient is that of a pass that
# keeps all.
#
# First 20,000 characters, with checkpoints and without; and how much a truncation would miss.


# %%
def through(lm, ids, k=None, xi=None):
    """One pass over a text, and back: the mean loss, the gradients, ∂L/∂H_0, how many states were
    kept, and how many bytes of NumPy's the backward pass added to them."""
    X, Y = lm.ids_beside(ids[:-1, None]), lm.ids_beside(ids[1:, None])
    H, _, residuals = lm.rnn.forward(X, checkpoint_every=k)
    mean, dH, dW_hq, db_q = F.linear_cross_entropy(H, lm.params["W_hq"], lm.params["b_q"], Y)
    del H
    tracemalloc.start()
    _, dh_0, gradients = lm.rnn.backward(dH, residuals, xi=xi)
    added = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    gradients |= {"W_hq": dW_hq, "b_q": db_q}
    return float(mean), gradients, dh_0, len(residuals[0].states), added


piece, T, k = ids[:20_001], 20_000, 141
_, whole, dh_0, kept, added = through(lm, piece)
_, again, dh_0_again, kept_again, added_again = through(lm, piece, k)
print(f"T = {T:,}, all states:    {kept:6,} kept, {added / 1e6:5.2f} MB more on the way back")
print(f"T = {T:,}, every {k}st: {kept_again:6,} kept, {added_again / 1e6:5.2f} MB more")
for name, gradient in whole.items():
    np.testing.assert_allclose(again[name], gradient, rtol=0, atol=1e-12)
assert np.array_equal(dh_0_again, dh_0)  # step by step they are the same bits
assert kept == T + 1 and kept_again == math.ceil(T / k) and added_again < added / 10

for tau, least, most in ((32, 0.005, 0.05), (512, 0.001, 0.01)):
    xi = np.ones(T)
    xi[tau::tau] = 0
    _, cut, *_ = through(lm, piece, k, xi)
    difference = clip_global_norm({name: cut[name] - whole[name] for name in whole})
    share = difference / clip_global_norm(whole)
    print(f"cut every {tau} steps: {share:.2%} off the full gradient")
    assert least < share < most

# %% [markdown]
# The chapter's other reason for truncation, that little depends on what is far away, holds for
# this network. Its claim that the full gradient is out of reach does not. Now the whole book, and
# one step against its gradient.

# %%
lm.to(style.DEVICE)
T = len(ids) - 1
k = math.isqrt(T)
started = time.perf_counter()
mean, gradients, dh_0, kept, added = through(lm, ids, k)
norm = clip_global_norm(gradients)
seconds = time.perf_counter() - started
print(f"T = {T:,}: {kept} + {k} states held in place of {T:,}; {seconds:.1f} s on this machine")
if lm.device == "cpu":
    print(f"{added / 1e6:.2f} MB more on the way back, beside {T * h * 8 / 1e6:.0f} for ∂L/∂H")
    assert round(T * h * 8 / 1e6) == 44
assert T == 173_427 and kept == math.ceil(T / k) and kept + k == 833
assert math.isfinite(mean) and 0.05 < norm < 1
assert all(bool((abs(g) < math.inf).all()) for g in (*gradients.values(), dh_0))

_, whole, dh_0_whole, kept_whole, _ = through(lm, ids)
assert kept_whole == T + 1
for name in whole:
    assert abs(gradients[name] - whole[name]).max() < 1e-12, name
assert abs(dh_0 - dh_0_whole).max() < 1e-12
del whole, dh_0_whole

for name, p in lm.params.items():
    p -= 0.3 * gradients[name]
after = lm.evaluate_ids(ids).perplexity
print(f"perplexity of the book: {math.exp(mean):.3f}, after the step {after:.3f}")
assert after < math.exp(mean) - 0.02

# %% [markdown]
# ## What was shown
#
# - A gradient goes back through time as powers of W_hh, with φ′ in between: exponentially less or
#   more, with a slope of log ρ per step where φ is the identity. Clipping acts where it explodes,
#   and not in the book's run (28).
# - Truncated at τ = T it is the full gradient, for τ < T biased; truncated at random it is right
#   in the mean, and varies. A state can be carried and its gradient cut (22).
# - A shift register with a table is an n-gram, exactly (26): the hidden state need not
#   approximate (5).
# - An output depends on all tokens up to its own and on none after it; an MLP's on its context
#   alone (27).
# - What is far back is not learned, counting does better on the same text, greedy text runs in
#   circles, and T steps are T products one after the other (29).
# - The gradient of a whole book takes one backward pass, with 833 states held in place of 173,427
#   (22).
