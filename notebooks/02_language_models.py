# %% [markdown]
# # 2. A character-level and a word-level language model
#
# At the end one will know how a recurrent network becomes a language model: what its inputs,
# targets and loss are, what perplexity says and what it does not, how the book's run is trained
# and where it arrives, how a text is generated, and what it means to predict words in place of
# characters.
#
# It follows section 9.4.3 of *Dive into Deep Learning* and the published run of its section 9.5;
# equation numbers are in brackets. What begins with **Statement** is shown by the code after it,
# which fails if it does not hold; the numbers are those of this project's list of statements. It
# takes about a minute, half of it for the book's run, which a GPU computes if there is one.

# %%
import dataclasses
import math
from collections import Counter

import numpy as np
import style

import gpurnn
from gpurnn import Evaluation, LanguageModel, NGramModel, Tokenizer, Vocabulary, loss
from gpurnn import functional as F
from gpurnn.batches import SequentialPartition, Windows, shifted
from gpurnn.optimizers import clip_global_norm, make_optimizer
from gpurnn.sampling import TokenSampler
from gpurnn.training import PRESETS, Losses, Trainer, TrainingConfig, ngram_perplexities, prepare

print(f"gpurnn {gpurnn.__version__}, NumPy {np.__version__}")
print(f"models are trained {style.BACKEND_NOTE}")

# %% [markdown]
# ## "machin" and "achine"
#
# A language model predicts the next token from those up to now. Here a token is a character. The
# network reads one a step: X_t is the token of step t, H_t the hidden state, O_t a score for each
# token of the vocabulary V,
#
#     H_t = φ(X_t W_xh + H_{t−1} W_hh + b_h)      (9.4.5)
#     O_t = H_t W_hq + b_q                        (9.4.6)
#
# and what O_t is held against, its *target*, is the token of step t + 1.
#
# **Statement 16.** Of "machine" the input is "machin" and the target "achine". O_3 depends on m, a
# and c only, not on what follows; its target is h.


# %%
def draw_unrolled(axes, inputs, targets):
    box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "0.3"}
    for t, (x, y) in enumerate(zip(inputs, targets, strict=True), start=1):
        rows = ((0, x, {}), (1, f"H_{t}", box), (2, f"O_{t}", box), (3, y, {}))
        for height, label, bbox in rows:
            options = {"bbox": bbox} if bbox else {"style": "italic", "fontsize": 11}
            axes.text(t, height, label, ha="center", va="center", **options)
        for low in (0, 1):
            axes.annotate("", (t, low + 0.75), (t, low + 0.22), arrowprops={"arrowstyle": "->"})
        axes.plot([t, t], [2.25, 2.75], ":", color="0.5", marker="")
        if t > 1:
            axes.annotate("", (t - 0.24, 1), (t - 0.76, 1), arrowprops={"arrowstyle": "->"})
    for height, name in ((0, "input"), (1, "state"), (2, "output"), (3, "target")):
        axes.text(0.25, height, name, ha="right", va="center", color="0.35")
    axes.set(xlim=(-0.4, len(inputs) + 0.5), ylim=(-0.4, 3.4))
    axes.axis("off")


tokenizer = Tokenizer("char")
vocabulary = Vocabulary(tokenizer.tokens("machine"))
ids = vocabulary.encode("machine")
X, Y = shifted(ids)
spelled = "".join(vocabulary.decode(X)), "".join(vocabulary.decode(Y))
print(f"input {spelled[0]!r}, target {spelled[1]!r}, |V| = {len(vocabulary)} with <unk>")
with style.grid_of(1, 1, width=5.6, height=2.6) as axes:
    draw_unrolled(axes[0, 0], *spelled)

assert spelled == ("machin", "achine")

# %% [markdown]
# Which inputs an output depends on can be tried: replace one letter by each other letter of the
# vocabulary, and see which outputs change. The weights are random; nothing is trained yet.

# %%
model = LanguageModel(vocabulary, tokenizer, hidden_size=16, dtype=np.float64, seed=1)
O, _ = model.forward(X[:, None])  # ids (T, n) with n = 1; O is (T, n, q)
largest = np.zeros((len(X), len(X)))  # how far O_t moves where x_s is replaced
least = np.full((len(X), len(X)), np.inf)
for s in range(len(X)):
    for other in set(range(len(vocabulary))) - {X[s]}:
        changed = X.copy()
        changed[s] = other
        moved = np.abs(model.forward(changed[:, None])[0] - O).max(axis=(1, 2))
        largest[s], least[s] = np.maximum(largest[s], moved), np.minimum(least[s], moved)

with style.figure("output", "replaced input", "Largest change of an output") as axes:
    style.heat(axes, largest, "change of a score")
    axes.set_xticks(range(6), [f"O_{t}" for t in range(1, 7)])
    axes.set_yticks(range(6), [f"x_{t} = {c}" for t, c in enumerate(spelled[0], start=1)])

assert (largest[3:, 2] == 0).all(), "O_3 does not depend on h, i, n"
assert (least[:3, 2] > 1e-4).all(), "O_3 depends on m, a, c: every replacement changes it"
assert (largest[np.tril_indices(6, -1)] == 0).all(), "nor does any output depend on later inputs"
assert vocabulary.decode(Y)[2] == "h"

# %% [markdown]
# **Statement 17.** The targets are the sequence shifted by one: of all windows X and Y, each T
# long, `Y[:, :-1] == X[:, 1:]`. Both are views of the text; no character is copied.
#
# The text from here on is the book's: *The Time Machine*, all but letters made one space, lower
# case. Its vocabulary has 26 letters, the space, and `<unk>` for what a text may hold beside these.

# %%
corpus = gpurnn.load_corpus("time-machine")
text = "".join(Tokenizer("char", edition="book").tokens(corpus.text))
vocabulary = Vocabulary(text)
ids, V = vocabulary.encode(text), len(vocabulary)
print(f"sha256 {corpus.sha256[:16]}…: {len(ids):,} characters, |V| = {V}")

T = 32
windows = Windows(ids, T, n=1024)  # X and Y: a row for each place in the text
print(f"windows: X and Y are {windows.X.shape}, {windows.X.size:,} ids, of {len(ids):,} in memory")

np.testing.assert_array_equal(windows.Y[:, :-1], windows.X[:, 1:])
assert np.shares_memory(windows.X, ids) and np.shares_memory(windows.Y, ids)
assert windows.X.strides == windows.Y.strides == (ids.itemsize, ids.itemsize), "a step is one id"
assert (len(ids), V) == (173_428, 28)

# %% [markdown]
# ## Tokens as vectors, sequences as a batch
#
# A token enters (9.4.5) as a vector of d numbers, and n sequences side by side make X_t an (n, d)
# matrix. The plainest vector of token i is one-hot: d = |V|, 1 at place i, else 0. Then X_t W_xh
# picks row i of W_xh, which needs no product. A *learned embedding* E (|V|, d) gives each token a
# row of its own, trained like any weight.
#
# **Statement 18.** One-hot vectors, rows picked by id, and an embedding that is the identity give
# the same states and the same gradients. Permuting the batch changes nothing but the order of the
# rows; permuting time changes the states.

# %%
h, n = 32, 8
rng = np.random.default_rng(0)
X, Y = next(iter(Windows(ids, T, n).epoch(rng)))  # (T, n) ids
options = {"hidden_size": h, "dtype": np.float64}
by_id = LanguageModel(vocabulary, seed=1, **options)
embedded = LanguageModel(vocabulary, embedding_size=V, **options)
embedded.load_params({**by_id.params, "E": np.eye(V)})
weights = [by_id.params[name] for name in ("W_xh", "W_hh", "b_h")]

H_id, residuals_id = F.rnn_forward(X, None, *weights)
H_one_hot, residuals = F.rnn_forward(np.eye(V)[X], None, *weights)  # (T, n, |V|)
dH = rng.standard_normal(H_id.shape)
dW_xh_id, dW_xh = (F.rnn_backward(dH, r)[2] for r in (residuals_id, residuals))
loss_id, grads_id, _ = by_id.loss_and_gradients(X, Y)
loss_embedded, grads_embedded, _ = embedded.loss_and_gradients(X, Y)
print(f"by id {X.nbytes:,} bytes of input, one-hot {np.eye(V)[X].nbytes:,}")
print(f"loss by id {loss_id:.12f}, by the embedding {loss_embedded:.12f}")

np.testing.assert_allclose(H_one_hot, H_id, rtol=0, atol=1e-13)
np.testing.assert_allclose(dW_xh, dW_xh_id, rtol=0, atol=1e-12)
np.testing.assert_allclose(embedded.forward(X)[0], by_id.forward(X)[0], rtol=0, atol=1e-13)
for name in grads_id:
    np.testing.assert_allclose(grads_embedded[name], grads_id[name], rtol=0, atol=1e-13)

# %%
rows, steps = rng.permutation(n), rng.permutation(T)
H_rows, _ = F.rnn_forward(X[:, rows], None, *weights)
H_steps, _ = F.rnn_forward(X[steps], None, *weights)
loss_rows, grads_rows, _ = by_id.loss_and_gradients(X[:, rows], Y[:, rows])
loss_steps, grads_steps, _ = by_id.loss_and_gradients(X[steps], Y[steps])  # the same pairs (x, y)
print(f"loss {loss_id:.6f}, rows permuted {loss_rows:.6f}, steps permuted {loss_steps:.6f}")

np.testing.assert_allclose(H_rows, H_id[:, rows], rtol=0, atol=1e-13)
np.testing.assert_allclose(loss_rows, loss_id, rtol=1e-13)
for name in grads_id:
    np.testing.assert_allclose(grads_rows[name], grads_id[name], rtol=0, atol=1e-13)
assert np.abs(H_steps - H_id[steps]).max() > 0.1, "a state depends on the order before it"
assert abs(loss_steps - loss_id) > 1e-4

# %% [markdown]
# ## Softmax and cross-entropy at every step
#
# softmax turns the q scores of a step into probabilities, p_j = exp(o_j) / Σ_k exp(o_k). The loss
# of the step is −log p of its target, the loss of a batch the mean over its T·n steps and rows,
# and the gradient of that mean by the scores is (p − onehot(target)) / (T·n).
#
# **Statement 9.** The library computes it so, and stably: scores of ±10⁴, whose exp overflows,
# leave loss and gradient finite. A uniform model has perplexity |V|. Each row of the gradient
# sums to 0.

# %%
O, _ = by_id.forward(X)  # (T, n, q)
mean, dO = F.cross_entropy(O, Y)

P = np.exp(O) / np.exp(O).sum(axis=-1, keepdims=True)
onehot = np.eye(V)[Y]
print(f"mean of −log p: {mean:.12f}, by hand {-np.log(P[onehot == 1]).mean():.12f}")
np.testing.assert_allclose(mean, -np.log(P[onehot == 1]).mean(), rtol=1e-13)
np.testing.assert_allclose(dO, (P - onehot) / (T * n), rtol=0, atol=1e-16)
np.testing.assert_allclose(F.negative_log_likelihood(O, Y).mean(), mean, rtol=1e-13)

huge = rng.choice([-1e4, 1e4], O.shape).astype(np.float32)
with np.errstate(over="ignore", invalid="ignore"):
    naive = np.exp(huge) / np.exp(huge).sum(axis=-1, keepdims=True)
mean_huge, dO_huge = F.cross_entropy(huge, Y)
# Where all scores are ±10⁴ and k are +10⁴: log k, and 2·10⁴ more if the target's is −10⁴.
target_score = np.take_along_axis(huge, Y[..., None], axis=-1)[..., 0].astype(np.float64)
by_hand = np.log((huge > 0).sum(axis=-1)) + 1e4 - target_score
print(f"scores of ±10⁴: loss {mean_huge:.2f}; softmax as written has {np.isnan(naive).sum():,} NaN")

mean_uniform, dO_uniform = F.cross_entropy(np.zeros_like(O), Y)
print(f"perplexity of the uniform model: {loss.perplexity(mean_uniform):.12f}")

assert np.isnan(naive).any() and math.isfinite(mean_huge) and np.isfinite(dO_huge).all()
np.testing.assert_allclose(mean_huge, by_hand.mean(), rtol=1e-6)
np.testing.assert_allclose(loss.perplexity(mean_uniform), V, rtol=1e-12)
for gradient, bound in ((dO, 1e-17), (dO_uniform, 1e-17), (dO_huge, 1e-9)):
    assert np.abs(gradient.sum(axis=-1, dtype=np.float64)).max() <= bound, "rows sum to 0"

# %% [markdown]
# ## Perplexity
#
# Perplexity is exp of the mean of −log p over all predicted tokens, the reciprocal of the
# geometric mean of their probabilities: among how many equally likely tokens the model seems to
# choose. Its logarithm to base 2 is bits per token, for a character model bits per character.
#
# The book's plots show something else: the mean over batches of exp(loss of the batch). As exp is
# convex, that is never below the perplexity where batches are equally large. Where they are not,
# tokens of a small batch weigh more, and it can be either side.
#
# **Statement 31.** A perfect model has perplexity 1, one that calls impossible what occurs ∞, a
# uniform one |V|. Each token weighs the same: the perplexity is not that of batches that weigh the
# same, and not the book's figure.

# %%
p = np.array([0.5, 0.5, 0.5, 0.125])  # of four targets
tokens = (3, 1)  # in two batches
means = tuple(-np.log(part).mean() for part in np.split(p, [3]))
exact, book = loss.perplexity(-np.log(p)), loss.book_perplexity(means)
unweighted = math.exp(np.mean(means))
found = Evaluation(nats=-np.log(p).sum(), tokens=4, characters=4, unknown=0)
print(f"exact {exact:.4f}, batches weighing the same {unweighted:.4f}, the book's {book:.4f}")
print(f"bits per character {found.bits_per_character:.4f}")

np.testing.assert_allclose(exact, 2**1.5, rtol=1e-14)
np.testing.assert_allclose(exact, 1 / p.prod() ** (1 / 4), rtol=1e-14)
np.testing.assert_allclose(loss.perplexity(Losses(means, tokens).mean), exact, rtol=1e-14)
np.testing.assert_allclose(found.perplexity, exact, rtol=1e-14)
np.testing.assert_allclose((unweighted, book), (4, (2 + 8) / 2), rtol=1e-14)
np.testing.assert_allclose(found.bits_per_character, 1.5, rtol=1e-14)

perfect = F.negative_log_likelihood(1e4 * onehot, Y)
never_seen = np.zeros((1, 1, V))
never_seen[..., vocabulary["q"]] = -np.inf
impossible = F.negative_log_likelihood(never_seen, np.full((1, 1), vocabulary["q"]))
uniform = LanguageModel(vocabulary, by_id.tokenizer, **options)
uniform.load_params({name: np.zeros_like(a) for name, a in uniform.params.items()})
print(
    f"perfect {loss.perplexity(perfect)}, impossible {loss.perplexity(impossible)},",
    f"uniform {uniform.perplexity(text[:1000]):.6f}",
)
assert loss.perplexity(perfect) == 1
assert loss.perplexity(impossible) == math.inf
np.testing.assert_allclose(uniform.perplexity(text[:1000]), V, rtol=1e-12)

# %% [markdown]
# ## Training
#
# One update takes a batch of random windows, computes the gradient of its loss by every parameter
# θ, shortens all gradients g together if their norm is above a bound (*clipping*), and goes a step
# against them. With the learning rate η:
#
# - *SGD*: θ ← θ − η g;
# - *momentum*: v ← μ v + g, θ ← θ − η v;
# - *AdamW*: m and v are running means of g and g², corrected for their start at 0;
#   θ ← θ − η m / (√v + ε) (and − η λ θ where there is a decay λ; here there is none).
#
# **Statement 10.** Sampling takes each window once an epoch, in an order that the seed decides. The
# gradient is that of the loss. Clipping keeps its direction. The three optimizers do what their
# formulas say. (That they train is the next statement.)

# %%
sampler = Windows(ids, T, 1024, count=10_000)
epochs = [sampler.epoch(np.random.default_rng(seed)) for seed in (5, 5, 6)]
starts = [np.concatenate([e.starts(k) for k in range(len(e))]) for e in epochs]
assert (np.sort(starts[0]) == np.arange(10_000)).all(), "each window once"
assert (starts[0] == starts[1]).all() and (starts[0] != starts[2]).mean() > 0.99

# The gradient along a random direction u of all parameters, by the difference of two losses.
u, eps = {name: rng.standard_normal(a.shape) for name, a in by_id.params.items()}, 1e-5
sides = []
for sign in (1, -1):
    for name, a in by_id.params.items():
        a += sign * eps * u[name]
    sides.append(by_id.loss_and_gradients(X, Y)[0])
    for name, a in by_id.params.items():
        a -= sign * eps * u[name]
slope = (sides[0] - sides[1]) / (2 * eps)
along = sum(np.vdot(grads_id[name], u[name]) for name in u)
print(f"gradient along a direction: {along:.9f}, by differences {slope:.9f}")
np.testing.assert_allclose(along, slope, rtol=1e-5)

clipped = {name: g.copy() for name, g in grads_id.items()}
norm = clip_global_norm(clipped, 0.1)
print(f"norm of all gradients {norm:.4f}, clipped {clip_global_norm(clipped):.4f}")
np.testing.assert_allclose(norm, math.sqrt(sum((g**2).sum() for g in grads_id.values())))
for name, g in grads_id.items():
    np.testing.assert_allclose(clipped[name], g * (0.1 / norm), rtol=1e-12)
assert norm > 0.1
below = {name: g.copy() for name, g in grads_id.items()}
clip_global_norm(below, 2 * norm)
assert all(np.array_equal(below[name], g) for name, g in grads_id.items()), "nothing to clip"

# %%
eta, first, second = 0.1, grads_id, grads_steps  # the gradients of two updates
m = {k: 0.9 * 0.1 * first[k] + 0.1 * second[k] for k in first}
v = {k: 0.999 * 0.001 * first[k] ** 2 + 0.001 * second[k] ** 2 for k in first}
expected = {
    "sgd": {k: eta * (first[k] + second[k]) for k in first},
    "momentum": {k: eta * (first[k] + 0.9 * first[k] + second[k]) for k in first},
    "adamw": {
        k: eta * first[k] / (np.abs(first[k]) + 1e-8)
        + eta * (m[k] / (1 - 0.9**2)) / (np.sqrt(v[k] / (1 - 0.999**2)) + 1e-8)
        for k in first
    },
}
for name, moved in expected.items():
    params = {k: a.copy() for k, a in by_id.params.items()}
    optimizer = make_optimizer(name, params, momentum=0.9)
    for gradient in (first, second):
        optimizer.step(params, gradient, eta)
    for k, a in params.items():
        np.testing.assert_allclose(a, by_id.params[k] - moved[k], rtol=0, atol=1e-12)
print("two updates each, as by hand:", ", ".join(expected))

# %% [markdown]
# Now the book's run, from scratch: a tanh network with h = 32, weights N(0, 0.01²), biases 0; the
# first 10,000 windows of T = 32 characters in batches of n = 1,024, each from a zero state; SGD
# with η = 1, gradients clipped at norm 1, 100 epochs. The next 5,000 windows validate. Eleven
# published builds of the book end at 6.19 ± 0.07 in training and 7.32 ± 0.11 in validation, by the
# book's own figure.
#
# Whether a run has arrived there is worth asserting. Two ways of being broken are known by where
# they get stuck, and both have been published, as such a run ends without an error:
#
# - at about 17.1: only b_q is learned, how frequent characters are;
# - at about 9.5: the state is not carried over, so that only the character before counts.
#
# **Statement 19.** The library's pipeline, windows, trainer and clipping together arrive in the
# published window: training 6.0 to 6.4, validation 7.0 to 7.6.

# %%
run = prepare(PRESETS["book"], device=style.DEVICE)
assert run.trainer.run()
history, lm = run.trainer.history, run.model.to("cpu")
last = history[-1]
print(f"{lm.num_parameters():,} parameters, {last['step']:,} updates, {last['seconds']:.0f} s")
print("               training  validation")
for name, key in (("the book's", "_perplexity_book"), ("perplexity", "_perplexity")):
    print(f"{name:<12} {last['train' + key]:10.3f} {last['valid' + key]:11.3f}")
print(f"largest norm of a gradient: {max(r['largest_gradient_norm'] for r in history):.2f}")
prediction = lm.generate("it has", 20, temperature=0)
print("prediction:", prediction)

assert lm.num_parameters() == 2_876
assert 6.0 <= last["train_perplexity_book"] <= 6.4
assert 7.0 <= last["valid_perplexity_book"] <= 7.6
assert max(r["largest_gradient_norm"] for r in history) < 1, "clipping never acted"

# %% [markdown]
# Both ways of being broken, in numbers. A best b_q alone makes every step's probabilities the
# frequencies of the characters: the maximum-likelihood unigram. Without a state the best is the
# maximum-likelihood bigram. Both are counted on the training windows. Then both broken models are
# trained: one whose b_q alone is updated, and the same run with T = 1, where every character
# begins from a zero state and W_hh is never used.

# %%
train = run.trainer.sampler
pairs = np.lib.stride_tricks.sliding_window_view(ids, T + 1)[: train.count]
unigram, bigram = (
    NGramModel(k, V, "maximum-likelihood").fit(*pairs).perplexity_windows(train.X, train.Y)
    for k in (1, 2)
)

T_1 = dataclasses.replace(PRESETS["book"], num_steps=1)
only_b_q = prepare(T_1)
for _ in range(30):
    for X_1, Y_1 in only_b_q.trainer.sampler.epoch(rng):
        _, grads, _ = only_b_q.model.loss_and_gradients(X_1, Y_1)
        only_b_q.model.params["b_q"][...] -= grads["b_q"]
nll, _ = only_b_q.model.negative_log_likelihood(train.X.T, train.Y.T)
stuck_unigram = loss.perplexity(nll)

no_state = prepare(dataclasses.replace(T_1, epochs=300), device=style.DEVICE)
assert no_state.trainer.run()
stuck_bigram = no_state.trainer.history[-1]["train_perplexity"]
print(f"only b_q: {stuck_unigram:.2f}, the unigram {unigram:.2f}")
print(f"no state: {stuck_bigram:.2f}, the bigram   {bigram:.2f}")

np.testing.assert_allclose((unigram, bigram), (17.07, 9.42), rtol=0, atol=0.005)
assert unigram <= stuck_unigram < unigram + 0.2
assert bigram < stuck_bigram < bigram + 0.4
W_hh = no_state.model.to("cpu").params["W_hh"]
assert (W_hh == only_b_q.model.params["W_hh"]).all(), "both have the W_hh that they began with"
assert last["train_perplexity_book"] < bigram - 3, "the whole network is beyond both"

# %% [markdown]
# **Statement 31.** During training the book's figure and the perplexity of the same batches differ
# by less than 1 %, as the batches are large and alike. On the training windows it is at times even
# the smaller: the last batch of an epoch has 784 windows in place of 1,024, and weighs as much. On
# small batches it depends on n as well as on the model.

# %%
epoch = [r["epoch"] for r in history]
with style.grid_of(1, 2, width=8.6, height=3.4) as axes:
    curves, ratios = axes[0]
    for split, name, dash in (("train", "training", "-"), ("valid", "validation", "--")):
        exact = np.array([r[f"{split}_perplexity"] for r in history])
        book = np.array([r[f"{split}_perplexity_book"] for r in history])
        curves.plot(epoch, exact, dash, marker="", color="0.05", label=name)
        curves.plot(epoch[4::10], book[4::10], "o", color="0.5", mfc="none")
        higher = 100 * (book / exact - 1)
        ratios.plot(epoch, higher, dash, marker="", color="0.05", label=name)
        assert np.abs(higher).max() < 1
        assert (higher < 0).any() if split == "train" else (higher[50:] > 0).all()
    curves.plot([], [], "o", color="0.5", mfc="none", label="the book's figures")
    for level, name in ((unigram, "only b_q"), (bigram, "no state")):
        curves.axhline(level, color="0.7", linewidth=1)
        curves.text(100, level * 1.015, f"{name}: {level:.2f}", ha="right", va="bottom")
    curves.set_yscale("log")
    curves.set_yticks([6, 8, 10, 15, 20, 28], ["6", "8", "10", "15", "20", "28"])
    curves.minorticks_off()
    curves.set(xlabel="epoch", ylabel="perplexity", ylim=(5.8, 40))
    curves.legend(loc="upper right", ncols=2)
    ratios.axhline(0, color="0.7", linewidth=1)
    ratios.set(xlabel="epoch", ylabel="the book's figure is higher by (%)")
    ratios.legend()

# %%
valid = run.trainer.validation.windows
nll, _ = lm.negative_log_likelihood(valid.X.T, valid.Y.T)  # (T, 5,000)
of_windows = nll.mean(axis=0, dtype=np.float64)
sizes = (1, 10, 100, 1000, 5000)
book = [loss.book_perplexity(of_windows.reshape(-1, n).mean(axis=1)) for n in sizes]
exact = loss.perplexity(nll)
print(f"validation perplexity {exact:.3f}, {loss.bits_per_token(nll):.3f} bits per character")
for n, figure in zip(sizes, book, strict=True):
    print(f"the book's figure, n = {n:5}: {figure:.3f}")

np.testing.assert_allclose(exact, last["valid_perplexity"], rtol=1e-4)
np.testing.assert_allclose(book[-1], exact, rtol=1e-6)
np.testing.assert_allclose(loss.bits_per_token(nll), math.log2(exact), rtol=1e-12)
assert (np.diff(book) < 0).all() and book[0] > 1.03 * exact, "the smaller n, the larger"

# %% [markdown]
# ### Counting beside it
#
# A figure says little until something simple stands beside it. Witten-Bell n-grams, counted on the
# text of the same training windows, predict the same validation targets from what their window has
# shown so far, as the network does. From order 3 on they beat it: 10,000 characters are few, and
# h = 32 is small.

# %%
ngrams = ngram_perplexities(run, orders=(1, 2, 3, 4, 5))
for order, figure in ngrams.items():
    print(f"n-gram of order {order}: {figure:.2f}")
print(f"network:           {exact:.2f}")
with style.figure("order n (characters)", "validation perplexity", height=2.6) as axes:
    axes.plot(list(ngrams), list(ngrams.values()), "-", marker="o", label="Witten-Bell n-gram")
    axes.axhline(exact, color="0.35", linestyle="--", label="network, h = 32")
    axes.set_xticks(list(ngrams))
    axes.set_ylim(0)

np.testing.assert_allclose(
    list(ngrams.values()), [16.67, 9.53, 6.54, 5.44, 5.49], rtol=0, atol=0.005
)
assert ngrams[2] > exact + 1, "it is beyond pairs"
assert max(ngrams[3], ngrams[4], ngrams[5]) < exact - 0.3, "but counting beats it"

# %% [markdown]
# ## Generation
#
# To continue a text, the network first reads it: the *prefix* warms up the state. Then it draws a
# token from softmax(O_t), reads that as the next input, and so on. `temperature` divides the
# scores before the softmax: 0 takes the likeliest token (*greedy*), 1 the model's own
# distribution. `top_k` keeps the k likeliest tokens, `top_p` the fewest likeliest whose
# probabilities add up to p.
#
# **Statement 32.** The prefix warms up the state; greedy generation is step by step the likeliest
# token; tokens are drawn as often as p says, by a χ² test; temperature, top-k and top-p do what
# they say; a seed decides the text.

# %%
prefix = "time travelle"
state = lm.init_state()
for token in lm.encode_prefix(prefix):
    state, O_t = lm.step(np.array([token]), state)
read = O_t
warm, _ = lm.forward(lm.encode_prefix(prefix)[:, None])
cold, _ = lm.forward(lm.encode_prefix("e")[:, None])
sampler = TokenSampler(never=vocabulary.reserved_ids)  # <unk> is never drawn
p_warm, p_cold = (sampler.probabilities(O[-1, 0]) for O in (warm, cold))
r = lm.vocabulary["r"]
print(f"p(r) after {prefix!r}: {p_warm[r]:.2f}; after 'e' alone: {p_cold[r]:.2f}")

greedy = []
for _ in range(60):
    scores = O_t[0].copy()
    scores[list(lm.vocabulary.reserved_ids)] = -np.inf
    greedy.append(int(scores.argmax()))
    state, O_t = lm.step(np.array([greedy[-1]]), state)
step_by_step = prefix + "".join(lm.vocabulary.decode(greedy))
print(step_by_step)

np.testing.assert_allclose(read, warm[-1], rtol=1e-5, atol=1e-6)
assert p_warm[r] > p_cold[r] + 0.1, "what came before the e counts"
assert lm.generate(prefix, 60, temperature=0) == step_by_step


# %% [markdown]
# χ² adds up (observed − expected)² / expected over the tokens, those expected less than five times
# as one. If p is right, it exceeds the bound below with a probability of one in a million. That the
# test can fail is shown by holding the same draws against the p of another temperature.


# %%
def chi_squared(counts, p):
    expected = counts.sum() * p
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    return ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum(), len(expected) - 1


def bound(df):  # Wilson and Hilferty's approximation of the quantile 1 − 10⁻⁶
    return df * (1 - 2 / (9 * df) + 4.75 * math.sqrt(2 / (9 * df))) ** 3


prefix, draws = "the ", 4000
O, _ = lm.forward(lm.encode_prefix(prefix)[:, None])
p = TokenSampler(1.0, never=lm.vocabulary.reserved_ids).probabilities(O[-1, 0])
softmax = np.exp(O[-1, 0, 1:].astype(np.float64))
np.testing.assert_allclose(p[1:], softmax / softmax.sum(), rtol=1e-12)

drawn = [made[-1] for made in lm.generate([prefix] * draws, 1, seed=3)]
counts = np.bincount(lm.vocabulary.encode(drawn), minlength=V)
statistic, df = chi_squared(counts, p)
sharper = TokenSampler(0.8, never=lm.vocabulary.reserved_ids).probabilities(O[-1, 0])
wrong, df_wrong = chi_squared(counts, sharper)
print(f"χ² = {statistic:.1f} with {df} degrees of freedom, bound {bound(df):.1f}")
print(f"against the p of temperature 0.8: {wrong:.0f}, bound {bound(df_wrong):.1f}")

shown = np.argsort(-p)[:12]
with style.figure("character after 'the '", "share", f"{draws:,} draws", height=2.6) as axes:
    places = np.arange(len(shown))
    axes.bar(places - 0.2, p[shown], 0.4, color="0.25", label="p of the model")
    axes.bar(places + 0.2, counts[shown] / draws, 0.4, color="0.7", label="drawn")
    axes.set_xticks(places, lm.vocabulary.decode(shown))
    axes.grid(visible=False)

assert statistic < bound(df)
assert wrong > bound(df_wrong)
assert counts[0] == 0, "<unk> is never drawn"

# %%
scores = O[-1, 0]
falling = np.sort(p)[::-1]
top_k = TokenSampler(1.0, top_k=3, never=(0,)).probabilities(scores)
top_p = TokenSampler(1.0, top_p=0.6, never=(0,)).probabilities(scores)
kept = int(np.count_nonzero(top_p))
print(f"top_k = 3 keeps {np.count_nonzero(top_k)} tokens, top_p = 0.6 keeps {kept}")
np.testing.assert_allclose(np.sort(top_k)[::-1][:3], falling[:3] / falling[:3].sum(), rtol=1e-12)
np.testing.assert_allclose(top_p[top_p > 0], p[top_p > 0] / p[top_p > 0].sum(), rtol=1e-12)
assert falling[:kept].sum() >= 0.6 > falling[: kept - 1].sum()
few = {made[-1] for made in lm.generate([prefix] * 300, 1, top_k=3, seed=4)}
assert few == set(lm.vocabulary.decode(np.argsort(-p)[:3]))

entropies = []
for temperature in (0, 0.4, 0.7, 1.0, 1.5):
    q = TokenSampler(temperature, never=(0,)).probabilities(scores)
    entropies.append(abs((q[q > 0] * np.log2(q[q > 0])).sum()))
    sample = lm.generate("time traveller ", 60, temperature=temperature, seed=1)
    print(f"{temperature:3}  {entropies[-1]:.2f} bits  {sample}")

assert entropies[0] == 0 and (np.diff(entropies) > 0.1).all(), "hotter is more random"
assert lm.generate(prefix, 60, seed=1) == lm.generate(prefix, 60, seed=1)
assert lm.generate(prefix, 60, seed=1) != lm.generate(prefix, 60, seed=2)

# %% [markdown]
# ## Words in place of characters
#
# The chapter's 2019 edition shows the same with words: "the time machine by h. g. wells". The word
# tokenizer keeps the period of initials; all other punctuation separates words and is dropped.
#
# **Statement 23.** Of this title the input is "the time machine by h. g." and the target "time
# machine by h. g. wells". O_3 depends on "the", "time" and "machine" only; its target is "by". A
# network over all words of the book, |V| = 4,580, trains: its perplexity on held-out text falls
# well below that of the unigram.

# %%
title = "The Time Machine, by H. G. Wells"
words = Tokenizer("word")
tokens = words.tokens(title)
small = LanguageModel(Vocabulary(tokens), words, hidden_size=16, dtype=np.float64, seed=1)
X, Y = shifted(small.encode(title))
inputs, targets = small.vocabulary.decode(X), small.vocabulary.decode(Y)
with style.grid_of(1, 1, width=6.6, height=2.6) as axes:
    draw_unrolled(axes[0, 0], inputs, targets)

O, _ = small.forward(X[:, None])
for s in range(6):
    changed = X.copy()
    changed[s] = 0  # <unk>
    moved = np.abs(small.forward(changed[:, None])[0] - O)[2].max()
    print(f"O_3 moves by {moved:.4f} where word {s + 1}, {inputs[s]!r}, is unknown")
    assert moved > 1e-4 if s < 3 else moved == 0

assert corpus.text.lower().startswith("the time machine, by h. g. wells")
assert inputs == ["the", "time", "machine", "by", "h.", "g."]
assert targets == ["time", "machine", "by", "h.", "g.", "wells"]
assert targets[2] == "by"

# %% [markdown]
# To compare words with characters, both are trained under equal conditions: the same text (the
# first 90 %, cut between two words), the same network but for |V| (tanh, h = 32), T = 32, n = 8
# streams with carried state, SGD with η rising to 2 and then falling to 0 along a cosine, clipping
# at norm 1, eight passes over the text, one seed. Both are measured on the remaining 10 %. As in
# the book, the vocabularies are those of the whole text.

# %%
cut = text.index(" ", round(0.9 * len(text)))
training_text, rest = text[:cut], text[cut + 1 :].strip()


def trained(unit):
    tokenizer = Tokenizer(unit, edition="book")
    vocabulary = Vocabulary(tokenizer.tokens(text))
    config = TrainingConfig(
        num_steps=32, batch_size=8, epochs=8, optimizer="sgd", lr=2.0, schedule="cosine", clip=1.0
    )
    model = LanguageModel(vocabulary, tokenizer, hidden_size=32, seed=0).to(style.DEVICE)
    sampler = SequentialPartition(model.encode(training_text), config.num_steps, config.batch_size)
    trainer = Trainer(model, sampler, config)
    assert trainer.run()
    return model.to("cpu"), trainer.history


models = {unit: trained(unit) for unit in ("char", "word")}
found = {unit: model.evaluate(rest) for unit, (model, _) in models.items()}
unigrams = {}
for unit, (model, _) in models.items():
    counted = NGramModel(1, len(model.vocabulary)).fit(model.encode(training_text))
    unigrams[unit] = loss.perplexity(counted.negative_log_likelihood(model.encode(rest))[1:])

model, history = models["word"]
print(f"|V| = {len(model.vocabulary):,}, {len(model.encode(text)):,} words")
print("training perplexity by pass:", *(f"{r['train_perplexity']:.0f}" for r in history))
print(f"held out: network {found['word'].perplexity:.0f}, unigram {unigrams['word']:.0f}")
print(model.generate("the time", 15, temperature=0.7, seed=2))

assert len(model.vocabulary) == 4_580 and len(model.encode(text)) == 32_775
assert history[-1]["train_loss"] < history[0]["train_loss"] - 1
assert found["word"].perplexity < 0.8 * unigrams["word"]

# %% [markdown]
# Words are many: nearly all parameters are in W_xh and W_hq, nearly all multiplications in the
# scores. That is why the chapter goes on with characters. Perplexities per token
# do not compare, as the tokens differ; bits per character do: −log₂ p of the whole text, divided
# by its characters (of words with the space between them).
#
# **Statement 24.** The word model has over a hundred times the parameters and needs over ten times
# the multiplications for a character of text. Its perplexity is far higher, yet it takes fewer bits
# per character.

# %%
print("              |V|  parameters  products per   seconds   perplexity     bits per character")
print("                               character     a pass    per token   network     unigram")
products, unigram_bits, outside = {}, {}, {}
for unit, (model, history) in models.items():
    e, q, h = found[unit], len(model.vocabulary), 32
    products[unit] = (h * h + h * q) * e.tokens / e.characters  # W_hh and W_hq, forward
    outside[unit] = 2 * h * q / model.num_parameters()  # share of W_xh and W_hq
    unigram_bits[unit] = math.log2(unigrams[unit]) * e.tokens / e.characters
    print(
        f"{unit:<10} {q:6,} {model.num_parameters():11,} {products[unit]:13,.0f}"
        f" {history[-1]['seconds'] / len(history):9.2f} {e.perplexity:12.2f}"
        f" {e.bits_per_character:9.3f} {unigram_bits[unit]:11.3f}"
    )
print("(seconds: this machine's)")

char, word = found["char"], found["word"]
parameters = [model.num_parameters() for model, _ in models.values()]
for e in (char, word):
    np.testing.assert_allclose(
        e.bits_per_character, math.log2(e.perplexity) * e.tokens / e.characters, rtol=1e-12
    )
assert char.characters == len(rest) - 1 and word.characters == len(rest) - len(rest.split()[0])
assert parameters == [2_876, 298_756] and parameters[1] > 100 * parameters[0]
assert products["word"] > 10 * products["char"]
assert outside["word"] > 0.97 and h * q / (h * h + h * q) > 0.99
assert word.perplexity > 20 * char.perplexity
assert 2.3 < char.bits_per_character < 2.8 and 1.5 < word.bits_per_character < 1.8
assert char.bits_per_character < unigram_bits["char"] - 1

# %% [markdown]
# The unit is the same now, the conditions are not quite. Most of the words' advantage is there
# before any training: whoever counts single words is already better than this network over
# characters, for a list of words is given and none need be spelled. And the list, taken from the
# whole text, holds words that the first 90 % do not; without them, a word model could only say
# `<unk>`.

# %%
seen = set(training_text.split())
new = Counter(word for word in rest.split() if word not in seen)
share = new.total() / len(rest.split())
print(f"{new.total()} of {len(rest.split()):,} held-out words ({share:.1%}) were not trained on")
print("among them:", ", ".join(sorted(new)[:8]))

assert unigram_bits["word"] < char.bits_per_character - 0.5
assert 0.05 < share < 0.2 and word.unknown == 0

# %% [markdown]
# ## How many outputs?
#
# The chapter asks: to predict the next character, what dimension must an output have?
#
# **Statement 25.** q = |V|, a score for every token, `<unk>` included; a target without a score is
# refused. One of the q is not free: adding a constant to b_q, and so to all scores, leaves the loss
# unchanged, and the gradient by b_q sums to 0.

# %%
X, Y = next(iter(Windows(ids, T, 8).epoch(np.random.default_rng(2))))
before, grads, _ = by_id.loss_and_gradients(X, Y)
by_id.params["b_q"][...] += 3.5
after, _, _ = by_id.loss_and_gradients(X, Y)
print(f"q = {by_id.params['W_hq'].shape[1]} = |V|; loss {before:.12f}, shifted {after:.12f}")
print(f"sum of the gradient by b_q: {grads['b_q'].sum():.1e}")
try:
    F.cross_entropy(np.zeros((T, 8, V - 1)), np.full((T, 8), V - 1))
    refused = ""
except ValueError as e:
    refused = str(e)
print("with q = |V| − 1:", refused)

assert by_id.params["W_hq"].shape == (32, V) and by_id.params["b_q"].shape == (V,)
np.testing.assert_allclose(after, before, rtol=1e-13)
assert abs(grads["b_q"].sum()) < 1e-15
assert refused

# %% [markdown]
# ## What was shown
#
# - Targets are the text shifted by one, as views of it; O_3 of "machin" sees m, a, c and is held
#   against h (16, 17).
# - A token is a vector: one-hot, picked by id, or embedded; rows of a batch do not touch each
#   other, steps do (18).
# - Softmax and cross-entropy at every step, finite for any finite scores; each row of the gradient
#   sums to 0 (9).
# - Perplexity is exp of the mean over tokens; the book's figure is another one, close to it where
#   batches are large and above it where they are small (31).
# - The gradient, clipping and three optimizers by hand (10); the book's run, which arrives in its
#   published window, where a model that learns only b_q, or has no state, does not (19). Counting
#   three characters beats it.
# - Generation warms up on its prefix; greedy is step by step; draws follow p (32).
# - The same over words: exact pairs, |V| = 4,580, below the unigram (23); over a hundred times the
#   parameters, and bits per character to compare by (24).
# - q = |V|, and one of these numbers is not free (25).
