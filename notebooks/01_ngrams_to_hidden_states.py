# %% [markdown]
# # 1. From n-grams to hidden states
#
# A language model gives a text x_1, x_2, … its probability token by token: P(x_t | x_{t−1}, …,
# x_1). At the end one will know how good counting is at this, why it cannot look far back, what a
# hidden state is and how it differs from a hidden layer, and what one step of a recurrent network
# computes.
#
# It follows the beginning of section 9.4 of *Dive into Deep Learning*, and 9.4.1 and 9.4.2 there,
# whose equation numbers are in brackets, and the chapter's 2019 edition. What begins with
# **Statement** is shown by the code after it, which fails if it does not hold; the numbers are
# those of this project's list of statements. It runs in half a minute, on NumPy. Only one
# comparison of speed uses a GPU, if there is one.

# %%
import math
import time
from functools import partial

import numpy as np
import style
from matplotlib.colors import PowerNorm

import gpurnn
from gpurnn import RNN, LanguageModel, MLPModel, NGramModel, Tokenizer, Vocabulary
from gpurnn import functional as F
from gpurnn.batches import Windows
from gpurnn.loss import perplexity
from gpurnn.optimizers import AdamW, scheduled

print(f"gpurnn {gpurnn.__version__}, NumPy {np.__version__}")

# %% [markdown]
# ## Counting
#
# A Markov model assumes that a few last tokens tell as much as all: an n-gram model of order n
# predicts x_t from the context c = (x_{t−n+1}, …, x_{t−1}) of n − 1 tokens. It counts. With
# count(c, w) how often the token w followed c, count(c) the sum of that over w, and |V| the size
# of the vocabulary:
#
# - *maximum likelihood*: p(w | c) = count(c, w) / count(c). What never occurred is impossible.
# - *Witten-Bell*: with N(c) the number of different tokens that followed c, and c′ the context
#   without its oldest token,
#
#       p(w | c) = (count(c, w) + N(c) p(w | c′)) / (count(c) + N(c)),
#
#   which leaves the share N(c) / (count(c) + N(c)) to the shorter context. Below the empty one
#   stands 1 / |V|.
#
# A text is judged by its *perplexity*, exp of the mean of −log p: 1 is perfect, |V| is guessing.
#
# **Statement 1.** `NGramModel` counts as the formulas say, each of its distributions sums to 1,
# and on *The Time Machine* it has the perplexities that were published for the book's windows:
# Witten-Bell of order 1 to 5 in validation 16.67, 9.53, 6.47, 5.31, 5.36; maximum likelihood in
# training 17.07 (single characters) and 9.42 (pairs), in validation 16.67 and, with a correction,
# 9.66.
#
# First by hand. In "abracadabra" the letter a is followed four times: by b twice, by c and d
# once.

# %%
toy = Vocabulary("abracadabra")  # five letters, and <unk> for anything else: |V| = 6
letters = toy.encode("abracadabra")
exact = NGramModel(2, len(toy), "maximum-likelihood").fit(letters)
smooth = NGramModel(2, len(toy), "witten-bell").fit(letters)

# Of 11 letters 2 are b, and 5 are different: p(b) = (2 + 5 · 1/6) / (11 + 5) = 17/96. So is p(r).
by_hand = {"b": (2 / 4, (2 + 3 * 17 / 96) / (4 + 3)), "r": (0 / 4, (0 + 3 * 17 / 96) / (4 + 3))}
for letter, expected in by_hand.items():
    found = [np.exp(m.log_prob(toy.encode("a"), np.array(toy[letter]))) for m in (exact, smooth)]
    print(f"p({letter} | a): maximum likelihood {found[0]:.4f}, Witten-Bell {found[1]:.4f}")
    np.testing.assert_allclose(found, expected, rtol=1e-14)

abra = toy.encode("abra")  # p(a) p(b | a) p(r | b) p(a | r) = 5/11 · 2/4 · 1 · 1
np.testing.assert_allclose(exact.perplexity(abra), (5 / 11 * 2 / 4) ** (-1 / 4), rtol=1e-14)
assert exact.perplexity(toy.encode("ara")) == math.inf, "no r ever followed an a"

# %% [markdown]
# Now the book's text: only letters and spaces, lower case. Its *windows* are all runs of T = 32
# characters, each with the 32 characters one step later as targets; the first 10,000 train, the
# next 5,000 validate.

# %%
corpus = gpurnn.load_corpus("time-machine")
text = "".join(Tokenizer("char", edition="book").tokens(corpus.text))
vocabulary = Vocabulary(text)
ids, V = vocabulary.encode(text), len(vocabulary)
print(f"{corpus.name}, sha256 {corpus.sha256[:16]}…: {len(ids):,} characters, |V| = {V}")

T, N_train, N_valid = 32, 10_000, 5_000
train = Windows(ids, T, n=1, count=N_train)
valid = Windows(ids, T, n=1, start=N_train, count=N_valid)
train_text = ids[: N_train + T - 1]  # the characters that the windows' inputs cover
valid_text = ids[N_train : N_train + N_valid + T - 1]

rng = np.random.default_rng(1)
worst = 0.0
for smoothing in ("maximum-likelihood", "additive", "witten-bell"):
    for order in range(1, 6):
        model = NGramModel(order, V, smoothing).fit(train_text)
        seen = [train_text[s : s + 4] for s in rng.integers(0, len(train_text) - 4, 20)]
        never_seen = vocabulary.encode("zzqq")
        for context in [*seen, never_seen, never_seen[:0]]:
            worst = max(worst, abs(model.distribution(context).sum() - 1))
print(f"largest |Σ p − 1| over 3 smoothings, 5 orders, 22 contexts: {worst:.1e}")
assert worst <= 1e-12

# %% [markdown]
# The published Witten-Bell figures read the characters of the windows as one stream. A network
# that starts each window from nothing sees less, so beside it belongs the last column, where each
# window's characters are predicted from that window alone.

# %%
orders = (1, 2, 3, 4, 5)
models = [NGramModel(order, V, "witten-bell").fit(train_text) for order in orders]
on_train = [model.perplexity(train_text) for model in models]
on_valid = [model.perplexity(valid_text) for model in models]
by_window = [model.perplexity_windows(valid.X, valid.Y) for model in models]
print("Witten-Bell  training  validation  by window")
for row in zip(orders, on_train, on_valid, by_window, strict=True):
    print("    order {}  {:8.2f}  {:10.2f}  {:9.2f}".format(*row))

with style.figure("order n (characters)", "perplexity", "Witten-Bell n-grams") as axes:
    axes.plot(orders, on_train, label="training text")
    axes.plot(orders, on_valid, label="validation text", marker="o")
    axes.set_xticks(orders)

np.testing.assert_allclose(on_valid, [16.67, 9.53, 6.47, 5.31, 5.36], rtol=0, atol=0.005)
np.testing.assert_allclose(by_window, [16.67, 9.53, 6.54, 5.44, 5.49], rtol=0, atol=0.005)
assert all(np.diff(on_train) < -0.5), "each further character helps on the text that was counted"
assert on_valid[4] - on_valid[3] > 0.03, "but the fifth does not help on another text"

# %% [markdown]
# The published maximum-likelihood figures count window by window, most characters many times. On
# the validation windows pairs are infinitely bad, as some never occurred in training; the
# published 9.66 gives each of these half a count of its context, after which the probabilities
# sum to more than 1.

# %%
rows = np.lib.stride_tricks.sliding_window_view(ids, T + 1)[:N_train]  # inputs and last target
unigram, bigram = (NGramModel(k, V, "maximum-likelihood").fit(*rows) for k in (1, 2))
found = [m.perplexity_windows(w.X, w.Y) for m in (unigram, bigram) for w in (train, valid)]
nll = bigram.negative_log_likelihood_windows(valid.X, valid.Y)
impossible = np.isinf(nll)
half = 0.5 / np.maximum(np.bincount(train.X.ravel(), minlength=V), 1)  # of each context
corrected = np.where(impossible, -np.log(half[valid.X]), nll)
print("maximum likelihood  training  validation")
print(f"characters          {found[0]:8.2f}  {found[1]:10.2f}")
print(f"pairs               {found[2]:8.2f}  {found[3]:10.2f}")
print(
    f"{impossible.sum():,} of {nll.size:,} targets given half a count: {perplexity(corrected):.2f}"
)

np.testing.assert_allclose(found[:3], [17.07, 16.67, 9.42], rtol=0, atol=0.005)
assert found[3] == math.inf and impossible.sum() == 1_024
np.testing.assert_allclose(perplexity(corrected), 9.66, rtol=0, atol=0.005)
p = bigram.distribution(np.array([vocabulary["q"]]))
assert p.sum() + half[vocabulary["q"]] * (p == 0).sum() > 1.01, "no distribution any more"

# %% [markdown]
# The models write, too: each character is drawn from the distribution after those before it. The
# longer the context, the more of the words are words of the book. What maximum likelihood writes
# has no pair that the text has not.

# %%
begin = vocabulary.encode("time ")
book_words, real = set(text.split()), []
for model in models:
    written = "".join(vocabulary.decode(model.sample(begin, 1_500, seed=5)))
    written_words = written.split()[:-1]  # the last may be cut off
    real.append(sum(word in book_words for word in written_words) / len(written_words))
    print(f"order {model.order}, {real[-1]:4.0%} words: {written[:64]!r}")


def pairs_of(tokens):
    """The set of neighbours in a text."""
    return set(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))


written = np.concatenate([begin[-1:], bigram.sample(begin, 2_000, seed=5)])
print(f"{len(pairs_of(written))} different pairs of the text's {len(pairs_of(train_text))} written")
assert pairs_of(written) <= pairs_of(train_text)
assert (np.diff(real) > 0.05).all()

# %% [markdown]
# ## What the table costs
#
# To look one token further back, n grows by one, and the table of all p(w | c) by the factor |V|.
#
# **Statement 2.** A table of all n-grams holds |V|ⁿ numbers: 28² = 784 for pairs of characters,
# and 4,580² = 20,976,400 for pairs of words, of which the whole book has 20,234. A text shows no
# more n-grams than it has tokens, so nearly all of a large table stays empty.

# %%
words = Tokenizer("word", edition="book").tokens(corpus.text)
word_vocabulary = Vocabulary(words)
word_pairs = NGramModel(2, len(word_vocabulary)).fit(word_vocabulary.encode(words))
print(f"{len(words):,} words, |V| = {len(word_vocabulary):,}")
print(
    f"pairs: {word_pairs.dense_table_size():,} in a table, {word_pairs.num_observed():,} observed"
)

depth = range(1, 8)
longest = NGramModel(max(depth), V).fit(ids)
dense = [NGramModel(n, V).dense_table_size() for n in depth]
observed = [longest.num_observed(n) for n in depth]
with style.figure("order n (characters)", "n-grams (number)", "What a table holds") as axes:
    axes.semilogy(depth, dense, label="all: |V|ⁿ, |V| = 28")
    axes.semilogy(depth, observed, label="observed in the book", marker="o")
    axes.axhline(len(ids), color="0.6", linestyle=":", label="characters in the book")

assert dense == [V**n for n in depth] and dense[1] == 784
assert len(word_vocabulary) == 4_580 and word_pairs.dense_table_size() == 20_976_400
assert word_pairs.num_observed() == 20_234
assert word_pairs.num_observed() / word_pairs.dense_table_size() < 1 / 1_000
assert max(observed) < len(ids), "a text of N tokens has no more than N n-grams"
assert observed[6] / dense[6] < 1e-5, "of 28⁷ runs of seven characters"

# %% [markdown]
# ## A network in place of the table
#
# A *multilayer perceptron* (MLP) computes what the table stores. X holds what it is shown, here a
# vector for the last token; a hidden layer H = φ(X W_xh + b_h) (9.4.3) and an output layer O = H
# W_hq + b_q (9.4.4) give a number for each of the |V| tokens, and softmax(O) makes them the
# probabilities of the next one. Both layers are taken apart below. It learns from pairs (x_t,
# x_{t+1}) drawn at random, by gradient descent.
#
# **Statement 3.** With one token of context this is the first-order Markov model again: trained
# on random pairs, `MLPModel(context=1)` converges to the perplexity of the pairs' maximum
# likelihood, within 1 %. The text is the first 10,000 characters of the book.

# %%
pairs_text = ids[:10_000]


def counted(order):
    """Perplexity of all characters but the first, by counts of these very characters."""
    model = NGramModel(order, V, "maximum-likelihood").fit(pairs_text)
    return perplexity(model.negative_log_likelihood(pairs_text)[1:])


mlp = MLPModel(V, context=1, embedding_size=16, hidden_size=64, seed=0)
optimizer, rng = AdamW(mlp.params), np.random.default_rng(0)
pairs = Windows(pairs_text, T=1, n=512)  # windows of one step are pairs
epochs, learned, update = 50, [], 0
for _ in range(epochs):
    for X, Y in pairs.epoch(rng):
        _, gradients = mlp.loss_and_gradients(X, Y)
        rate = scheduled(0.03, "cosine", update, epochs * pairs.num_batches)
        optimizer.step(mlp.params, gradients, rate)
        update += 1
    nll = mlp.negative_log_likelihood(pairs_text[:-1, None], pairs_text[1:, None])
    learned.append(perplexity(nll))

limit = counted(order=2)
print(
    f"{update} updates: perplexity {learned[-1]:.3f}, {learned[-1] / limit - 1:.2%} above counting"
)
with style.figure("epochs", "training perplexity", "An MLP that sees one character") as axes:
    axes.plot(range(1, epochs + 1), learned, label="MLP, context 1")
    axes.axhline(
        counted(1), color="0.6", linestyle="--", label=f"characters, counted: {counted(1):.2f}"
    )
    axes.axhline(limit, color="0.6", linestyle=":", label=f"pairs, counted: {limit:.2f}")
    axes.set_ylim(9, 17.9)

assert limit * 0.999 < learned[-1] < limit * 1.01, "no better than counting, and within 1 %"
assert learned[-1] < 0.6 * counted(1), "it does use the character that it sees"

# %% [markdown]
# Its probabilities are those of the table: below, counted and learned side by side, a row for
# each character, by falling frequency.

# %%
shown = np.arange(1, V)  # all but <unk>, which has id 0 and does not occur
model = NGramModel(2, V, "maximum-likelihood").fit(pairs_text)
table = np.array([model.distribution(np.array([c])) for c in shown])
O = mlp(shown[:, None])[:, 0].astype(np.float64)
softmax = np.exp(O) / np.exp(O).sum(axis=1, keepdims=True)

names = [token.replace(" ", "␣") for token in vocabulary.decode(shown)]
with style.grid_of(1, 2, width=8.6, height=4.2) as grid:
    for axes, p, title in zip(grid[0], (table, softmax), ("counted", "learned"), strict=True):
        style.heat(axes, p[:, 1:], "p(next | this)", norm=PowerNorm(0.5, vmin=0, vmax=1))
        axes.set(title=title, xlabel="next character", ylabel="this character")
        axes.set_xticks(range(V - 1), names, fontsize=7)
        axes.set_yticks(range(V - 1), names, fontsize=7)

how_often = np.bincount(pairs_text[:-1], minlength=V)[shown]
distance = np.average(np.abs(softmax - table).sum(axis=1) / 2, weights=how_often)
print(f"probability placed elsewhere than by counting, on average: {distance:.3f}")
assert distance < 0.03

# %% [markdown]
# ## A state
#
# To see further back, an MLP needs a longer context. The other way is to remember: a *latent
# variable model* replaces all that came before by a *hidden state*,
#
#     P(x_t | x_{t−1}, …, x_1) ≈ P(x_t | h_{t−1})   (9.4.1),      h_t = f(x_t, h_{t−1})   (9.4.2),
#
# and f is the same for every t. Nothing need be lost by that: notebook 3 has a state from which
# the whole text is read off. `LanguageModel` is such a model: it reads x_t, updates the state,
# and gives O_t, numbers that softmax makes the probabilities of x_{t+1}. What its f is comes
# below. Its weights are drawn at random here: nothing in the rest of this notebook is trained.
#
# **Statement 4.** As h_t is all that is carried from step to step, a sequence may be computed
# step by step, whole, or in chunks with the state handed on: on NumPy with the same bits.

# %%
lm = LanguageModel(vocabulary, Tokenizer("char", edition="book"), hidden_size=32, seed=1)
X = np.stack([ids[:48], ids[500:548]], axis=1)  # T = 48 steps of n = 2 texts, side by side

O, final = lm.forward(X)  # the whole sequence, from the zero state

state, one_by_one = lm.init_state(n=2), []
for X_t in X:
    state, O_t = lm.step(X_t, state)  # h_t = f(x_t, h_{t−1})
    one_by_one.append(O_t)

chunk_state, in_chunks = None, []
for chunk in np.split(X, [7, 27]):  # 7, 20 and 21 steps
    O_chunk, chunk_state = lm.forward(chunk, chunk_state)
    in_chunks.append(O_chunk)

O_forgotten, _ = lm.forward(X[27:])  # the last chunk from a zero state
changed = np.abs(O_forgotten - O[27:]).max()
print(f"O {O.shape}, state {final.shape} after {len(X)} steps as after one")
print(f"without the state handed on, O changes by up to {changed:.2f}")

assert state.shape == final.shape == lm.init_state(2).shape == (2, 32)
assert np.stack(one_by_one).tobytes() == O.tobytes() == np.concatenate(in_chunks).tobytes()
assert state.tobytes() == final.tobytes() == chunk_state.tobytes()
assert changed > 0.01, "the state does matter"

# %% [markdown]
# ## Hidden layer, hidden state
#
# The names are alike, the things are not. A hidden *layer* is a matter of where: between input and
# output of one step, and gone after it. A hidden *state* is a matter of when: the step before has
# left it, and without that step there is none.
#
# **Statement 6.** An MLP has no state, and its output does not notice any change of a token
# outside its context; that of a recurrent network (RNN) notices a change of any token that it has
# read.
#
# Below, token x_s is replaced by another, for each s in turn, and the change of each output O_t
# measured: dark where it is large, white where not one bit of O_t changed.

# %%
steps, context = 14, 3
mlp = MLPModel(V, context=context, hidden_size=32, dtype=np.float64, seed=2)
rnn = LanguageModel(vocabulary, hidden_size=32, dtype=np.float64, seed=2)
outputs = {f"MLP, context {context}": mlp, "RNN": lambda X: rnn.forward(X)[0]}


def noticed(output):
    """[t − 1, s − 1]: how much O_t changes with x_s."""
    X = ids[1_000 : 1_000 + steps, None]
    found = np.zeros((steps, steps))
    for s in range(steps):
        other = X.copy()
        other[s] = (X[s] + 1) % V
        found[:, s] = np.abs(output(other) - output(X)).max(axis=(1, 2))
    return found


changes = {name: noticed(output) for name, output in outputs.items()}
with style.grid_of(1, 2, width=7.2, height=3.2) as grid:
    for axes, (name, change) in zip(grid[0], changes.items(), strict=True):
        scale = np.log10(np.where(change > 0, change, np.nan))
        edges = (0.5, steps + 0.5)
        style.heat(
            axes, scale, "log₁₀ largest |ΔO_t|", vmin=-6, vmax=0, extent=(*edges, *edges[::-1])
        )
        axes.set(title=name, xlabel="s (the token changed)", ylabel="t (the output looked at)")
        axes.set_xticks(range(1, steps + 1, 3))
        axes.set_yticks(range(1, steps + 1, 3))

t, s = np.indices((steps, steps))
from_mlp, from_rnn = changes.values()
inside = (s <= t) & (t - s < context)
assert (from_mlp[~inside] == 0).all() and (from_mlp[inside] > 1e-3).all()
assert (from_rnn[s > t] == 0).all() and (from_rnn[s <= t] > 1e-6).all()
traces = [from_rnn.diagonal(-lag).mean() for lag in range(steps)]
assert (np.diff(traces[:10]) < 0).all() and traces[-1] < traces[0] / 100, "fainter with time"
assert all(hasattr(LanguageModel, name) for name in ("init_state", "step"))
assert not any(hasattr(MLPModel, name) for name in ("init_state", "step")), "no state, no step"

# %% [markdown]
# An older token leaves a fainter trace in an RNN with random weights; what becomes of it over
# long sequences, and of its gradient, is the subject of a later notebook.
#
# ## The hidden layer
#
# Now the two layers of the MLP. X (n, d) has a row of d numbers for each of n examples; W_xh (d,
# h) and the bias b_h (h,) are parameters, h the number of hidden units, φ a function of one
# number.
#
# **Statement 7.** `hidden_layer` is H = φ(X W_xh + b_h) (9.4.3), H (n, h), where b_h is added to
# each of the n rows (broadcasting), for φ = tanh, relu, sigmoid, softplus and identity, and
# `hidden_layer_backward` gives its derivatives.
#
# They are checked in float64 against finite differences: a number θ of X, W_xh or b_h is moved up
# and down by ε, and (L(θ + ε) − L(θ − ε)) / 2ε compared with ∂L/∂θ. L is any function of H: a sum
# of its numbers, weighted by random numbers dH, so that ∂L/∂H is dH.

# %%
rng = np.random.default_rng(7)
n, d, h, q = 5, 4, 3, 6
X, W_xh, b_h = rng.standard_normal((n, d)), rng.standard_normal((d, h)), rng.standard_normal(h)
dH = rng.standard_normal((n, h))
PHI = {
    "tanh": np.tanh,
    "relu": lambda Z: np.maximum(Z, 0),
    "sigmoid": lambda Z: 1 / (1 + np.exp(-Z)),
    "softplus": lambda Z: np.log(1 + np.exp(Z)),
    "identity": lambda Z: Z,
}


def differences(L, theta, epsilon=1e-5):
    """∂L/∂θ by central differences, number by number of an array θ that L() reads."""
    found = np.zeros_like(theta)
    for i in np.ndindex(theta.shape):
        kept = theta[i]
        theta[i] = kept + epsilon
        ahead = L()
        theta[i] = kept - epsilon
        found[i] = (ahead - L()) / (2 * epsilon)
        theta[i] = kept
    return found


def errors(run, dY, gradients, arguments):
    """Largest error of each gradient of L = Σ dY Y, where run() gives (Y, …)."""
    return [
        np.abs(gradient - differences(lambda: np.vdot(run()[0], dY), theta)).max()
        for gradient, theta in zip(gradients, arguments, strict=True)
    ]


Z = X @ W_xh + np.ones((n, 1)) @ b_h[None, :]  # the bias in each row, spelled out
assert np.abs(Z).min() > 1e-3, "relu has no derivative at 0, and none is asked for near it"
print("largest error of  ∂L/∂X  ∂L/∂W_xh  ∂L/∂b_h")
for name, phi in PHI.items():
    layer = partial(F.hidden_layer, X, W_xh, b_h, activation=name)
    H, residuals = layer()
    found = errors(layer, dH, F.hidden_layer_backward(dH, residuals), (X, W_xh, b_h))
    print(f"{name:14}  {found[0]:7.0e}  {found[1]:8.0e}  {found[2]:7.0e}")
    np.testing.assert_allclose(H, phi(Z), rtol=0, atol=1e-14)
    assert H.shape == (n, h) and max(found) < 1e-8, name

# %% [markdown]
# ## The output layer
#
# **Statement 8.** `linear` is the output layer O = H W_hq + b_q (9.4.4), W_hq (h, q), b_q (q,), O
# (n, q): for a whole sequence (9.4.6) the same for each of the T · n rows, so that the gradients
# of W_hq and b_q are sums over all of them.

# %%
H, W_hq, b_q = rng.standard_normal((T, n, h)), rng.standard_normal((h, q)), rng.standard_normal(q)
O = F.linear(H, W_hq, b_q)
dO = rng.standard_normal(O.shape)
dH, dW_hq, db_q = F.linear_backward(dO, H, W_hq)
found = errors(lambda: (F.linear(H, W_hq, b_q),), dO, (dH, dW_hq, db_q), (H, W_hq, b_q))
print(f"O is {O.shape}; largest errors of ∂L/∂H, ∂L/∂W_hq, ∂L/∂b_q:", *(f"{e:.0e}" for e in found))

row_by_row = [[H[t, i] @ W_hq + b_q for i in range(n)] for t in range(T)]
np.testing.assert_allclose(O, row_by_row, rtol=0, atol=1e-13)
sum_of_rows = sum(np.outer(H[t, i], dO[t, i]) for t in range(T) for i in range(n))
np.testing.assert_allclose(dW_hq, sum_of_rows, rtol=0, atol=1e-11)
np.testing.assert_allclose(db_q, dO.sum(axis=(0, 1)), rtol=0, atol=1e-11)
assert O.shape == (T, n, q) and max(found) < 1e-7

# %% [markdown]
# ## The recurrence
#
# One more term makes the hidden layer remember: the layer's own output of the step before, times
# a new parameter W_hh (h, h).
#
# **Statement 11.** `rnn_forward` is H_t = φ(X_t W_xh + H_{t−1} W_hh + b_h) (9.4.5) for t = 1, …,
# T, from a state H_0: an f as in (9.4.2). Without W_hh it is the hidden layer (9.4.3) in each
# step. `rnn_backward` gives the gradients of all it takes. `LanguageModel` is this and an output
# layer on top, where a token is a row of |V| numbers, all 0 but a 1 at its id, which picks a row
# of W_xh.

# %%
steps = 8
X, H_0 = rng.standard_normal((steps, n, d)), rng.standard_normal((n, h))
W_hh = rng.standard_normal((h, h)) / 2
layer = partial(F.rnn_forward, X, H_0, W_xh, W_hh, b_h, activation="tanh")
H, residuals = layer()

H_t, by_loop = H_0, []
for X_t in X:
    H_t = np.tanh(X_t @ W_xh + H_t @ W_hh + b_h)
    by_loop.append(H_t)
np.testing.assert_allclose(H, by_loop, rtol=0, atol=1e-13)

H_without, _ = F.rnn_forward(X, H_0, W_xh, 0 * W_hh, b_h, activation="tanh")
np.testing.assert_allclose(H_without, F.hidden_layer(X, W_xh, b_h)[0], rtol=0, atol=1e-14)

p, some = lm.params, ids[:48, None]
one_hot = np.eye(V, dtype=np.float32)[some]
H_lm, _ = F.rnn_forward(one_hot, None, p["W_xh"], p["W_hh"], p["b_h"], activation="tanh")
O_lm = F.linear(H_lm, p["W_hq"], p["b_q"])
np.testing.assert_allclose(lm.forward(some)[0], O_lm, rtol=0, atol=1e-5)

dH = rng.standard_normal(H.shape)
gradients = F.rnn_backward(dH, residuals)
found = errors(layer, dH, gradients, (X, H_0, W_xh, W_hh, b_h))
print("largest errors by X, H_0, W_xh, W_hh, b_h:", *(f"{error:.0e}" for error in found))
assert max(found) < 1e-8

# %% [markdown]
# ## As many parameters for any length
#
# W_xh, W_hh, b_h, W_hq and b_q are the same in every step. So a network that looks back on more
# tokens is no larger.
#
# **Statement 13.** The number of parameters does not grow with T: 2,876 for |V| = 28 and h = 32.
# The gradient of a parameter that T steps share is the sum of what each of them contributes.
#
# For the sum, the sequence is gone through once more, backwards, a step at a time: each step is a
# sequence of length 1, with its own gradients, and hands ∂L/∂H_{t−1} to the one before.

# %%
lm = LanguageModel(vocabulary, hidden_size=32)
print("tokens seen  n-gram table      MLP    RNN")
for seen in (1, 2, 4, 8, 16, 32, 1_000):
    table = NGramModel(seen + 1, V).dense_table_size()
    mlp_size = MLPModel(V, context=seen, embedding_size=16, hidden_size=32).num_parameters()
    _, rnn_gradients, _ = lm.loss_and_gradients(ids[:seen, None], ids[1 : seen + 1, None])
    size = sum(gradient.size for gradient in rnn_gradients.values())
    power = f"10^{math.log10(table):.1f}"
    print(f"{seen:11,}  {power:>12}  {mlp_size:7,}  {size:5,}")
    assert table == V ** (seen + 1), "exponential"
    assert mlp_size == (V + 1) * 16 + seen * 16 * 32 + 32 + 32 * V + V, "linear"
    assert size == lm.num_parameters() == V * 32 + 32 * 32 + 32 + 32 * V + V == 2_876

states = np.concatenate([H_0[None], H])
dH_t, totals = np.zeros_like(H_0), [0.0, 0.0, 0.0]
for t in reversed(range(steps)):
    _, step = F.rnn_forward(X[t : t + 1], states[t], W_xh, W_hh, b_h, activation="tanh")
    _, dH_t, *contributions = F.rnn_backward(dH[t : t + 1] + dH_t, step)
    totals = [total + part for total, part in zip(totals, contributions, strict=True)]
for name, total, gradient in zip(("W_xh", "W_hh", "b_h"), totals, gradients[2:], strict=True):
    np.testing.assert_allclose(total, gradient, rtol=0, atol=1e-12, err_msg=name)

# %% [markdown]
# ## Three steps
#
# Unrolled in time, three steps of the network look like this. The arrows of one kind are one and
# the same matrix. Each H_t is made of X_t and H_{t−1}, and goes two ways: up into O_t = H_t W_hq
# + b_q (9.4.6), and on into H_{t+1}.
#
# **Statement 14.** What x_2 changes are the outputs O_2 and O_3; O_1 stays as it is, to the bit.
#
# The network in the picture is run twice, the second time with another X_2. Dark are the arrays
# that changed, with the largest change beside them.

# %%
X = rng.standard_normal((3, n, d))
moved = X.copy()
moved[1] += 1


def arrays(X):
    """All that the three steps compute."""
    H, _ = F.rnn_forward(X, H_0, W_xh, W_hh, b_h)
    return {"X": X, "H": H, "O": F.linear(H, W_hq, b_q)}


before, after = arrays(X), arrays(moved)
change = {name: np.abs(after[name] - before[name]).max(axis=(1, 2)) for name in before}

LEVELS = {"X": 0, "H": 1.3, "O": 2.6}
with style.grid_of(1, 1, width=6.6, height=3.6) as grid:
    axes = grid[0, 0]
    axes.axis("off")
    axes.set(xlim=(-0.5, 6.6), ylim=(-0.5, 3.1))
    arrow = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 15, "shrinkB": 15}

    def node(x, y, label, delta):
        """A box; dark if its array changed."""
        dark = delta > 0
        box = {"boxstyle": "round,pad=0.45", "fc": "0.3" if dark else "1", "ec": "0.3"}
        axes.text(x, y, label, ha="center", va="center", bbox=box, color="1" if dark else "0")
        axes.text(x + 0.27, y - 0.24, f"{delta:.2f}" if dark else "0", ha="left", fontsize=8)

    def link(start, end, label, dx, dy):
        """An arrow between two boxes."""
        axes.annotate("", end, start, arrowprops=arrow)
        axes.text((start[0] + end[0]) / 2 + dx, (start[1] + end[1]) / 2 + dy, label, fontsize=8.5)

    node(0, LEVELS["H"], "H₀", 0)
    for t in range(3):
        x = 2 * (t + 1)
        for name, y in LEVELS.items():
            node(x, y, name + "₁₂₃"[t], change[name][t])
        link((x, LEVELS["X"]), (x, LEVELS["H"]), "W_xh", -0.56, 0)
        link((x, LEVELS["H"]), (x, LEVELS["O"]), "W_hq", -0.56, 0)
        link((x - 2, LEVELS["H"]), (x, LEVELS["H"]), "W_hh", -0.25, 0.12)

assert before["O"][0].tobytes() == after["O"][0].tobytes(), "O_1 came before x_2"
assert (change["O"][1:] > 0.05).all() and (change["H"][1:] > 0.05).all()
assert change["H"][0] == 0 and (change["X"] > 0).tolist() == [False, True, False]

# %% [markdown]
# ## One product or two
#
# X_t W_xh + H_{t−1} W_hh is one product as well: of [X_t, H_{t−1}], side by side, with W_xh and
# W_hh, one above the other.
#
# **Statement 15.** With X (3, 1), W_xh (1, 4), H (3, 4) and W_hh (4, 4), the product (3, 5)(5, 4)
# of the concatenations is the sum of the two products, to 1e-6 in float32 and 1e-14 in float64:
# on NumPy, and in the two CUDA kernels that compute a step in one way and in the other, `step`
# and `concatenated`, which run here under the emulator.

# %%
for dtype, bound in ((np.float32, 1e-6), (np.float64, 1e-14)):
    rng = np.random.default_rng(0)
    X_1, W_x, H_1, W_h = (
        rng.standard_normal(shape).astype(dtype) for shape in ((3, 1), (1, 4), (3, 4), (4, 4))
    )
    joined, stacked = np.concatenate((X_1, H_1), axis=1), np.concatenate((W_x, W_h), axis=0)
    two, one = X_1 @ W_x + H_1 @ W_h, joined @ stacked
    kernels = partial(F.rnn_forward, X_1[None], H_1, W_x, W_h, None, activation="identity")
    with gpurnn.emulated():  # T = 1, no bias, φ = identity: nothing but the products
        by_kernel = [kernels(kernel=name)[0][0] for name in ("step", "concatenated")]
    found = [np.abs(result - two).max() for result in (one, *by_kernel)]
    print(f"{np.dtype(dtype)}: largest differences", *(f"{error:.1e}" for error in found))
    assert joined.shape == (3, 5) and stacked.shape == (5, 4) and one.shape == (3, 4)
    assert max(found) <= bound and np.abs(two).max() > 1

# %% [markdown]
# Which is faster is another matter. One product is one call, but [X_t, H_{t−1}] has to be put
# together in every step, and whoever has all of X beforehand can multiply it by W_xh at once, for
# all steps, as `step` does. The times are this machine's, and nothing is claimed of them. Where
# there is a GPU, the two kernels ([docs/kernels.md](../docs/kernels.md)) are timed as well.

# %%
sizes = ((3, 1, 4), (32, 28, 256), (1024, 28, 32), (64, 512, 512))  # n, d, h


def draw(*shape):
    """Random numbers, always the same."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def two_products(X_t, H_t, W_x, W_h):
    """The sum of (9.4.5), without b_h and φ."""
    return X_t @ W_x + H_t @ W_h


def one_product(X_t, H_t, stacked):
    """The same, with W_xh and W_hh stacked once and for all."""
    return np.concatenate((X_t, H_t), axis=1) @ stacked


def product_and_sum(XW_t, H_t, W_h):
    """The same, where X W_xh is there already."""
    return XW_t + H_t @ W_h


def microseconds(run, *arguments, calls=20, tries=7):
    """Time of a call: the best of some tries."""
    best = math.inf
    for _ in range(tries):
        begun = time.perf_counter()
        for _ in range(calls):
            run(*arguments)
        best = min(best, time.perf_counter() - begun)
    return 1e6 * best / calls


print("µs a step, NumPy, float32   two products  one  X W_xh beforehand")
for n, d, h in sizes:
    X_t, H_t, W_x, W_h = draw(n, d), draw(n, h), draw(d, h), draw(h, h)
    two = microseconds(two_products, X_t, H_t, W_x, W_h)
    one = microseconds(one_product, X_t, H_t, np.concatenate((W_x, W_h)))
    ahead = microseconds(product_and_sum, X_t @ W_x, H_t, W_h)
    print(f"n {n:4}, d {d:3}, h {h:3}  {two:21.0f}  {one:4.0f}  {ahead:16.0f}")

if style.DEVICE == "cuda":
    import cupy

    from gpurnn.bench.clocks import GPUClock

    print("\nµs a step, kernels, float32   step  concatenated")
    for n, d, h in sizes:
        arguments = [cupy.asarray(a) for a in (draw(64, n, d), draw(n, h), draw(d, h), draw(h, h))]
        found = []
        for kernel in ("step", "concatenated"):
            run = partial(F.rnn_forward, *arguments, None, kernel=kernel)
            found.append(GPUClock().device(run, seconds=0.05)["median"] / 64)
        print(f"n {n:4}, d {d:3}, h {h:3}  {found[0]:12.1f}  {found[1]:12.1f}")
else:
    print(f"\nThe kernels are not timed here ({style.BACKEND_NOTE}).")

n, d, h = 64, 512, 512  # the largest of these: the two ways still agree
X_t, H_t, W_x, W_h = draw(n, d), draw(n, h), draw(d, h), draw(h, h)
one = np.concatenate((X_t, H_t), axis=1) @ np.concatenate((W_x, W_h))
np.testing.assert_allclose(one, X_t @ W_x + H_t @ W_h, rtol=0, atol=1e-5 * np.abs(one).max())

# %% [markdown]
# ## The network of 2019
#
# The 2019 edition shows a smaller network: relu for φ, no bias, and relu on the outputs as well,
#
#     H_t = relu(X_t W_xh + H_{t−1} W_hh),      O_t = relu(H_t W_hq).
#
# **Statement 20.** With X (3, 1), H (3, 2), W_xh (1, 2), W_hh (2, 2) and W_hq (2, 3) it gives H
# (3, 2) and O (3, 3), without a negative number in either; and it is the library's cell without
# bias, with relu, and a hidden layer in the place of the output layer.

# %%
rng = np.random.default_rng(30)
X, H_0 = rng.standard_normal((3, 1)), np.maximum(rng.standard_normal((3, 2)), 0)
W_xh, W_hh, W_hq = (rng.standard_normal(shape) for shape in ((1, 2), (2, 2), (2, 3)))


def net_2019(X, H):
    """The two formulas above."""
    H = np.maximum(X @ W_xh + H @ W_hh, 0)
    return H, np.maximum(H @ W_hq, 0)


cell = RNN(1, 2, activation="relu", bias=False, dtype=np.float64)
cell.params["W_xh"][...], cell.params["W_hh"][...] = W_xh, W_hh
H = cell.step(X, H_0)
O, _ = F.hidden_layer(H, W_hq, None, activation="relu")
print(f"H\n{H.round(4)}\nO\n{O.round(4)}")

H_net, O_net = net_2019(X, H_0)
np.testing.assert_allclose(H, H_net, rtol=0, atol=1e-14)
np.testing.assert_allclose(O, O_net, rtol=0, atol=1e-14)
assert set(cell.params) == {"W_xh", "W_hh"} and H.shape == (3, 2) and O.shape == (3, 3)
assert (H >= 0).all() and (O >= 0).all()
assert (H > 0.1).any() and (O > 0.1).any() and (H == 0).any() and (O == 0).any(), "relu did act"

# %% [markdown]
# ## One state update
#
# **Statement 21.** `LanguageModel.step` takes the ids of one step and a state, and returns (H,
# O): the next state and the outputs. Two updates with weights chosen by hand, from the zero
# state, give the numbers below.
#
# The vocabulary is `<unk>`, a, b, and each letter picks its row of W_xh. After a, H_1 = tanh(0.5,
# −0.5). After b, H_2 = tanh((1, 0.25) + H_1 W_hh + (0, 0.5)), where H_1 W_hh = tanh(0.5) · (−0.5,
# −0.75).

# %%
lm = LanguageModel(Vocabulary("ab"), hidden_size=2, dtype=np.float64)
weights = {
    "W_xh": [[9, 9], [0.5, -1], [1, 0.25]],
    "W_hh": [[0.5, -0.25], [1, 0.5]],
    "b_h": [0, 0.5],
    "W_hq": [[0, 1, -1], [0, 2, 1]],
    "b_q": [-3, 0, 0.25],
}
lm.load_params({name: np.array(numbers, float) for name, numbers in weights.items()})
H = lm.init_state(n=1)
golden = {
    "a": ([0.462117157260, -0.462117157260], [-3, -0.462117157260, -0.674234314520]),
    "b": ([0.646313484120, 0.382864723371], [-3, 1.412042930863, -0.013448760749]),
}
for letter, (golden_H, golden_O) in golden.items():
    H, O = lm.step(np.array([lm.vocabulary[letter]]), H)
    print(f"{letter}:  H = {H[0].round(6)}   O = {O[0].round(6)}")
    np.testing.assert_allclose(H, [golden_H], rtol=0, atol=1e-11)
    np.testing.assert_allclose(O, [golden_O], rtol=0, atol=1e-11)

u = math.tanh(0.5)
np.testing.assert_allclose(H, [[math.tanh(1 - 0.5 * u), math.tanh(0.75 - 0.75 * u)]], rtol=1e-14)

# %% [markdown]
# ## What was shown
#
# - Counting reaches a validation perplexity of 5.31 at order 4 (1), but its table has |V|ⁿ
#   numbers, of which a text fills few (2).
# - A network without state learns the table of pairs, to within 1 % (3), from a hidden layer (7)
#   and an output layer (8), and sees nothing outside its context (6).
# - A hidden state is carried from step to step, and is all that need be carried (4). It makes an
#   output depend on everything read so far, and on nothing that follows (6, 11, 14).
# - A recurrent network has 2,876 parameters for |V| = 28 and h = 32, whether it reads one token
#   or a thousand (13).
# - A step is two products or one, of concatenated matrices (15); the network of 2019 is a special
#   case of the library's cell (20), and one update gives the numbers that one computes by hand
#   (21).
