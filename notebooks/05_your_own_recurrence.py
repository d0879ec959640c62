# %% [markdown]
# # 5. Your own recurrence
#
# How to give the recurrence an activation of your own, on NumPy and in the kernels alike; which
# leaky units of neuroscience are the plain recurrence, and how to train their weights; how to see
# which kernel runs, and how fast. Fifteen minutes to read, about a minute to run.
#
# Equation numbers in brackets are those of *Dive into Deep Learning*, section 9.4. What begins
# with **Statement** is shown by the code after it, which fails if it does not hold; the numbers
# are those of this project's list of statements.

# %%
import importlib.util
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import style

os.environ.pop("GPURNN_TUNED", None)  # which kernel runs is told by the plan's own figures
import gpurnn
from gpurnn import compiler, resources
from gpurnn import functional as F
from gpurnn.cuda.arrays import library_of, on_host
from gpurnn.cuda.specs import KernelSpec, build, signature
from gpurnn.optimizers import Momentum, clip_global_norm, scheduled

if style.DEVICE == "cuda":
    import cupy as xp
else:
    xp = np
print("trained", style.BACKEND_NOTE)

# %% [markdown]
# ## An activation of your own
#
# The recurrence (9.4.5) of one layer is
#
# H_t = φ(X_t W_xh + H_{t−1} W_hh + b_h),
#
# with inputs X_t (n, d) and states H_t (n, h) of n rows. φ acts on each number by itself. It is
# given as two Python functions of one float, φ and its derivative φ′, made of arithmetic,
# comparisons and functions of `math`. The φ of this notebook lets numbers up to ±1 pass as they
# are, so that what a state holds need not fade, and bends towards ±2 beyond, so that it cannot
# grow without bound.
#
# φ′ may take the number z that φ is applied to, or φ's output r = φ(z) (`of_output=True`).


# %%
def bounded_function(z):
    """Return φ(z)."""
    if abs(z) <= 1:
        return z
    return 2 - 1 / z if z > 1 else -2 - 1 / z


def slope_by_input(z):
    """Return φ′(z)."""
    return 1.0 if abs(z) <= 1 else 1 / z**2


def slope_by_output(r):
    """Return φ′(z) for r = φ(z): beyond ±1 it is 1/z², and |r| = 2 − 1/|z|."""
    return 1.0 if abs(r) <= 1 else (2 - abs(r)) ** 2


bounded = gpurnn.Activation(bounded_function, slope_by_output, of_output=True, name="bounded")
by_input = gpurnn.Activation(bounded_function, slope_by_input, name="bounded, by its input")

# The library's own hidden layer, with the weight 1, gives φ and φ′ at as many points as one likes.
z = np.linspace(-4, 4, 401)
one = np.ones((1, 1))
r, residuals = F.hidden_layer(z[:, None], one, None, activation=bounded)
slope, _, _ = F.hidden_layer_backward(np.ones_like(r), residuals)
with style.figure("z", "φ(z), φ′(z)", "An activation of one's own") as axes:
    axes.plot(z, r, marker="", label="φ")
    axes.plot(z, slope, marker="", label="φ′")
    axes.plot(z, np.tanh(z), marker="", label="tanh, to compare")
assert np.abs(r).max() < 2 and np.array_equal(r[np.abs(z) <= 1, 0], z[np.abs(z) <= 1])
assert slope.min() > 0 and slope.max() == 1.0

# %% [markdown]
# **Statement 7.** H = φ(X W_xh + b_h) (9.4.3), the product, the broadcast bias and φ, is one
# operation, forward and backward, with a φ of one's own as well: its gradients are those that
# central differences in float64 give, whichever way φ′ is written. Where φ′ takes the output, no
# pre-activation is kept.


# %%
def differences(loss, a):
    """Return the central differences of loss() by each number of the float64 array a."""
    step = np.finfo(np.float64).eps ** (1 / 3)
    found = np.empty_like(a)
    for i in np.ndindex(a.shape):
        kept = a[i]
        a[i] = kept + step
        above = loss()
        a[i] = kept - step
        below = loss()
        a[i] = kept
        found[i] = (above - below) / (2 * step)
    return found


def assert_slopes(gradients, arguments, loss):
    """Hold gradients against differences, which are right to about ε^⅔ of the loss's size."""
    for name, a in arguments.items():
        found = differences(loss, a)
        limit = 64 * np.finfo(np.float64).eps ** (2 / 3) * max(abs(loss()), np.abs(found).max())
        error = np.abs(gradients[name] - found).max()
        assert error <= limit, f"{name}: {error:.2g} off, {limit:.2g} allowed"
        print(f"{name:6} {found.size:3} numbers, largest error {error:.1e} of {limit:.1e} allowed")


rng = np.random.default_rng(5)
layer = {"X": rng.normal(size=(6, 4)), "W_xh": rng.normal(size=(4, 5)), "b_h": rng.normal(size=5)}
dH = rng.normal(size=(6, 5))  # the loss is the sum of dH ∘ H

for phi in (bounded, by_input):
    H, residuals = F.hidden_layer(**layer, activation=phi)
    gradients = dict(zip(layer, F.hidden_layer_backward(dH, residuals), strict=True))
    print(phi, "keeps H alone" if residuals.Z is None else "keeps H and the pre-activations")
    assert (residuals.Z is None) == phi.of_output
    assert 0.2 < (np.abs(H) > 1).mean() < 0.8, "both branches of φ should be in use"
    assert_slopes(
        gradients, layer, lambda phi=phi: np.sum(dH * F.hidden_layer(**layer, activation=phi)[0])
    )

# %% [markdown]
# A wrong derivative would train something, only worse, and nobody would see why. So φ′ is held
# against differences of φ when the pair is made. Here is a slope of the output that is passed
# as one of the input, a wrong sign, a φ that is not defined everywhere, and a function that is
# not Python's.

# %%
refused = (
    ("φ′ of the output as φ′ of z", bounded_function, slope_by_output, ValueError),
    ("wrong sign", lambda z: math.tanh(z), lambda z: math.tanh(z) ** 2 - 1, ValueError),
    ("√z", lambda z: math.sqrt(z), lambda z: 0.5 / math.sqrt(z), ValueError),
    ("NumPy's tanh", np.tanh, lambda z: 1 - np.tanh(z) ** 2, TypeError),
)
said = {}
for mistake, f, df, kind in refused:
    try:
        gpurnn.Activation(f, df)
    except kind as error:
        said[mistake] = str(error)
        print(f"{mistake}: {error}\n")
assert len(said) == len(refused), "a wrong pair was accepted"
by_differences = r"expected \S+ to within \S+, the slope of f at z = \S+ by central differences"
for mistake in ("φ′ of the output as φ′ of z", "wrong sign"):
    assert re.search(by_differences, said[mistake])
    assert said[mistake].endswith("(df takes the pre-activation z)")
assert "raises ValueError" in said["√z"] and "expected a finite number" in said["√z"]
assert "expected a Python function of one float" in said["NumPy's tanh"]

# %% [markdown]
# ## The same function inside the kernels
#
# A kernel is compiled around φ and φ′: they become part of the loop over the steps. Under
# `gpurnn.emulated()` NumPy arrays take that path, host code, kernels and all, and every access to
# memory is watched for races and for reads of what nobody wrote.
#
# **Statements 7, 11.** With a φ of one's own the kernels compute (9.4.5), H and the gradients of
# every input, about as exactly as NumPy does: their distance from the float64 result is at most 4
# times the sum of NumPy's own distance in float32 and of what rounding does in that many
# additions.

# %%
T, n, d, h = 5, 3, 4, 8
X, h_0, W_xh, W_hh, b_h, dH = (
    rng.normal(scale=scale, size=shape)
    for scale, shape in (
        (0.7, (T, n, d)),
        (0.7, (n, h)),
        (0.5, (d, h)),
        (0.35, (h, h)),
        (0.3, h),
        (1.0, (T, n, h)),
    )
)
NAMES = ("H", "dX", "dh_0", "dW_xh", "dW_hh", "db_h")


def both_passes(dtype, put=np.asarray, **options):
    """Return H and all gradients, on the host, and the name of the kernel, if one ran."""
    arguments = [put(a.astype(dtype)) for a in (X, h_0, W_xh, W_hh, b_h)]
    H, residuals = F.rnn_forward(*arguments, activation=bounded, **options)
    found = (H, *F.rnn_backward(put(dH.astype(dtype)), residuals))
    plan = residuals.plan
    return [on_host(a) for a in found], None if plan is None else plan.kernel


truth, _ = both_passes(np.float64)
numpy_32, _ = both_passes(np.float32)
assert 0.1 < (np.abs(truth[0]) > 1).mean() < 0.9, "both branches of φ should be in use"


def assert_as_exact(where, found):
    """Hold float32 results against the float64 ones, and print how far off they are."""
    errors = []
    for name, a, b, exact in zip(NAMES, found, numpy_32, truth, strict=True):
        lost, error = np.abs(b - exact).max(), np.abs(a - exact).max()
        rounding = (T * (n + d + h)) ** 0.5 * 2.0**-24 * np.abs(exact).max()
        assert error <= 4 * (lost + rounding), f"{where}, {name}: {error:.2g}"
        errors.append(error)
    print(f"{where:24}", *(f"{error:8.1e}" for error in errors))


print("largest error".ljust(24), *(f"{name:>8}" for name in NAMES))
assert_as_exact("NumPy", numpy_32)
for kernel in ("resident", "group", "step", "concatenated", "gemm"):
    with gpurnn.emulated():
        found, ran = both_passes(np.float32, kernel=kernel)
    assert ran == kernel
    assert_as_exact(f"{kernel}, emulated", found)

# %% [markdown]
# On a GPU the call is the same, with CuPy's arrays in place of NumPy's. Without one the same
# kernels can still be compiled, here for compute capability 9.0 (H100), and their machine code
# be read: how many registers a thread takes, and whether any number had to be *spilled* to
# memory because they did not suffice.

# %%
if style.DEVICE == "cuda":
    found, ran = both_passes(np.float32, put=xp.asarray)
    assert ran == "resident"
    assert_as_exact("resident, GPU", found)
else:
    print("no GPU here: compiled instead, not run")

try:
    print("kernel             activation  registers  spilled bytes  instructions a step")
    tile = gpurnn.plan(T=100, n=64, d=16, h=32, device="H100").tile
    for kind in ("resident_forward", "resident_backward"):
        for phi in (bounded, "tanh"):
            spec = KernelSpec(kind, tile, phi, "float32")
            code = compiler.compile_kernel(build(spec), signature(spec), (9, 0), spec.threads)
            took = resources.of_kernel(code)
            spilled = took.spill_stores + took.spill_loads
            name = phi if phi == "tanh" else phi.name
            print(f"{kind:18} {name:10} {took.registers:10} {spilled:14} {took.loop:20}")
            assert took.stack == 0 and spilled == 0, f"{kind} with {name} spills"
except resources.ToolMissing as missing:
    print(f"the machine code cannot be read here: {missing}")

# %% [markdown]
# ## A leaky unit
#
# A rate model of neurons keeps part of its state and adds what comes in. With a leak α per step,
# 0 < α ≤ 1, weights W (h, h) between the units and U (h, d) from the inputs, and b (h,), the state
# r_t (h,) of the *rectified leaky unit* is
#
# r_t = relu((1 − α) r_{t−1} + α (W r_{t−1} + U x_t + b)).
#
# What stands inside relu is an affine map of state and input, so this is (9.4.5), where a state is
# a row:
#
# W_xh = α Uᵀ,  W_hh = (1 − α) I + α Wᵀ,  b_h = α b.
#
# α may also be a vector, one leak for each unit: then it scales columns. Nothing asks for relu
# here: the identity gives the leaky linear unit, and `bounded` is as good.


# %%
def recurrence_of(alpha, W, U, b):
    """Return W_xh, W_hh, b_h of units with leak alpha, a number or (h,)."""
    identity = library_of(b).eye(len(b), dtype=b.dtype)
    return alpha * U.T, (1 - alpha) * identity + alpha * W.T, alpha * b


h, d, T, n = 5, 3, 7, 2
unit = {
    "alpha": rng.uniform(0.1, 0.9, h),
    "W": rng.normal(size=(h, h)),
    "U": rng.normal(size=(h, d)),
    "b": rng.normal(size=h),
}
alpha, W, U, b = unit.values()
x = rng.normal(size=(T, n, d))

for phi, applied in (
    ("relu", lambda z: np.maximum(0, z)),
    ("identity", lambda z: z),
    (bounded, np.vectorize(bounded_function)),
):
    H, _ = F.rnn_forward(x, None, *recurrence_of(**unit), activation=phi)
    r, by_definition = np.zeros((n, h)), []
    for x_t in x:
        r = applied((1 - alpha) * r + alpha * (r @ W.T + x_t @ U.T + b))
        by_definition.append(r)
    np.testing.assert_allclose(H, by_definition, rtol=1e-12, atol=1e-13)
    print(f"{phi}: equal to the definition; {(H == 0).mean():.0%} of the states are 0")
    assert phi != "relu" or 0.2 < (H == 0).mean() < 0.8, "units should be silent now and then"

# %% [markdown]
# With W = 0 and b = 0 a unit is a leaky integrator. If its input U x is 1 from the first step
# on, it rises as 1 − (1 − α)^t; if the input stops, it falls as (1 − α)^s in s steps. Its time
# constant is τ = −1 / ln(1 − α) steps: then 1 − 1/e of the way is made. Here one network has
# units with three different leaks; its input is 1 for 150 steps, then 0.

# %%
alphas = np.array([0.5, 0.1, 0.02])
on, T = 150, 300
x = (np.arange(T) < on).astype(float)[:, None, None]  # (T, 1, 1)
integrators = recurrence_of(alphas, np.zeros((3, 3)), np.ones((3, 1)), np.zeros(3))
H, _ = F.rnn_forward(x, None, *integrators, activation="relu")
rise, fall = H[:on, 0], H[on:, 0]

t = np.arange(1, on + 1)[:, None]
closed_rise = 1 - (1 - alphas) ** t
closed_fall = closed_rise[-1] * (1 - alphas) ** t
np.testing.assert_allclose(rise, closed_rise, rtol=1e-11)
np.testing.assert_allclose(fall, closed_fall, rtol=1e-11)

tau = -1 / np.log(1 - alphas)
with style.grid_of(1, 2, width=7.6, height=3.2) as ((left, right),):
    for k, a in enumerate(alphas):
        left.plot(t, rise[:, k], marker="", label=f"α = {a:g}, τ = {tau[k]:.1f} steps")
        right.semilogy(t, fall[:, k], marker="")
    left.plot(t[9::10], closed_rise[9::10, 2], "o", color="0.3", mfc="none", label="closed form")
    right.plot(t[9::10], closed_fall[9::10, 1:], "o", color="0.3", mfc="none")
    left.axhline(1 - 1 / math.e, color="0.6", linewidth=0.8)
    left.text(on, 1 - 1 / math.e, "1 − 1/e", ha="right", va="bottom", fontsize=8.5)
    left.set(xlabel="t, steps since the input began", ylabel="r_t", title="Input 1")
    right.set(xlabel="steps since it stopped", ylabel="r_t", title="Input 0", ylim=(1e-4, 2))
    left.legend(loc="lower right")
for k in range(3):
    reached = np.interp(tau[k], np.append(0, t), np.append(0, rise[:, k]))
    assert abs(reached - (1 - 1 / math.e)) < 0.05, "τ is not where 63 % are reached"

# %% [markdown]
# Gradients come back by W_xh, W_hh and b_h. Those by W, U, b and α follow by the chain rule, as
# each is a factor of what was put in:
#
# ∂W = (α ∂W_hh)ᵀ,  ∂U = (α ∂W_xh)ᵀ,  ∂b = α ∂b_h,
#
# and ∂α is ∂b_h ∘ b plus the sums over the rows of ∂W_hh ∘ (Wᵀ − I) and of ∂W_xh ∘ Uᵀ.
#
# So time constants can be learned like weights. Central differences agree, for relu and for the
# φ of the first section.


# %%
def gradients_of(alpha, W, U, b, dW_xh, dW_hh, db_h):
    """Return the gradients by alpha (h,), W, U, b."""
    by_alpha = (dW_hh * (W.T - np.eye(len(b)))).sum(0) + (dW_xh * U.T).sum(0) + db_h * b
    return {"alpha": by_alpha, "W": (alpha * dW_hh).T, "U": (alpha * dW_xh).T, "b": alpha * db_h}


x = rng.normal(size=(7, n, d))
dH = rng.normal(size=(7, n, h))
for phi in ("relu", bounded):
    print(phi)

    def states(phi=phi):
        """Return H and the residuals."""
        return F.rnn_forward(x, None, *recurrence_of(**unit), activation=phi)

    _, residuals = states()
    _, _, *found = F.rnn_backward(dH, residuals)
    assert_slopes(
        gradients_of(**unit, dW_xh=found[0], dW_hh=found[1], db_h=found[2]),
        unit,
        lambda: np.sum(dH * states()[0]),
    )

# %% [markdown]
# ### Which units are not of this form
#
# Two other units are as common: one whose leak is outside of φ, and one whose state is a
# voltage v_t that is passed on through φ,
#
# r_t = (1 − α) r_{t−1} + α φ(W r_{t−1} + U x_t + b),
#
# v_t = (1 − α) v_{t−1} + α (W φ(v_{t−1}) + U x_t + b).
#
# Neither is (9.4.5) with the same state, whatever φ that is given. One unit shows it: where
# r_t = φ(w r_{t−1} + u x_t + b), the slopes of r_t by r_{t−1} and by x_t are w φ′ and u φ′, and
# their ratio w/u is the same everywhere. With these two units it is not, here for tanh.

# %%
a, w, u = 0.2, 0.5, 1.0
updates = {
    "leak inside φ": lambda r, x: np.tanh((1 - a) * r + a * (w * r + u * x)),
    "leak outside φ": lambda r, x: (1 - a) * r + a * np.tanh(w * r + u * x),
    "voltage": lambda v, x: (1 - a) * v + a * (w * np.tanh(v) + u * x),
}
state, given = np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5))
step = 1e-5
ratios = {
    name: (f(state + step, given) - f(state - step, given))
    / (f(state, given + step) - f(state, given - step))
    for name, f in updates.items()
}
for name, ratio in ratios.items():
    print(f"{name:15} slope by state / slope by input: {ratio.min():.4f} to {ratio.max():.4f}")
assert np.ptp(ratios["leak inside φ"]) < 1e-6
np.testing.assert_allclose(ratios["leak inside φ"], (1 - a + a * w) / (a * u), rtol=1e-6)
assert np.ptp(ratios["leak outside φ"]) > 1 and np.ptp(ratios["voltage"]) > 0.1

# %% [markdown]
# With φ = relu and a state of 2h numbers both can be had all the same, because relu lets what
# is not negative pass as it is:
#
# - leak outside: keep [r_{t−1}, relu(W r_{t−1} + U x_t + b)]. Then r_t is a linear function of
#   the state, as is what the next state needs, and r is never negative;
# - voltage: keep [relu(v_t), relu(−v_t)], whose difference is v_t.
#
# W_hh is then (2h, 2h). The states are the same; of the gradients that holds only where no unit
# is at 0 exactly, since relu's slope, 0 there, cuts what the leak would carry on. For a φ like
# tanh no such form is at hand: then a leak outside of φ is not what this library computes.

# %%
alpha = 0.2
identity = np.eye(h)
x = rng.normal(size=(40, n, d))
W_stable = 0.8 * W / np.abs(np.linalg.eigvals(W)).max()

rates, voltages = [], []
r = v = np.zeros((n, h))
for x_t in x:
    r = (1 - alpha) * r + alpha * np.maximum(0, r @ W_stable.T + x_t @ U.T + b)
    v = (1 - alpha) * v + alpha * (np.maximum(0, v) @ W_stable.T + x_t @ U.T + b)
    rates.append(r)
    voltages.append(v)

leak = np.vstack([(1 - alpha) * identity, alpha * identity])  # r_t = state @ leak
S, _ = F.rnn_forward(
    x,
    None,
    np.hstack([np.zeros((d, h)), U.T]),
    np.hstack([leak, leak @ W_stable.T]),
    np.append(np.zeros(h), b),
    activation="relu",
)
np.testing.assert_allclose(F.linear(S, leak), rates, rtol=1e-10, atol=1e-12)

both_signs = np.hstack([identity, -identity])  # v_t = state @ both_signs.T
into_v = np.vstack([(1 - alpha) * identity + alpha * W_stable.T, -(1 - alpha) * identity])
S, _ = F.rnn_forward(
    x,
    None,
    alpha * U.T @ both_signs,
    into_v @ both_signs,
    alpha * b @ both_signs,
    activation="relu",
)
np.testing.assert_allclose(F.linear(S, both_signs.T), voltages, rtol=1e-10, atol=1e-12)
print("both equal their definitions, by (9.4.5) with relu and 2h numbers of state")

_, at_zero = F.hidden_layer(np.zeros((1, 1)), one, None, activation="relu")
assert F.hidden_layer_backward(one, at_zero)[0] == 0, "relu's slope at 0"

# %% [markdown]
# ## A task, with the leak and without
#
# *Delayed recall*: the first of T = 100 tokens is one of 8 symbols, the other 99 are drawn from
# 8 further symbols that mean nothing; after the last one the network is to say which came
# first. The baseline is exact: nothing after the first token tells anything about it, so
# whoever does not remember it can do no better than to give each of the 8 the probability 1/8,
# a loss of ln 8 = 2.079 nats.
#
# The network has h = 32 leaky units with φ = `bounded` and an output layer (9.4.6) at the last
# step; W, U, b, W_hq, b_q are trained by momentum, those of the unit through the chain rule
# above. It is trained twice from the same weights: with a leak of α = 0.02, and with α = 1, which
# is W_hh = Wᵀ. (With the leak it is a plain recurrence as well, one that begins with W_hh near
# the identity: what differs is where training begins, and in what coordinates.) W is drawn with a
# spectral radius of about ½, and U so that α U is drawn alike in both.

# %%
T, SYMBOLS, h, n, UPDATES = 100, 8, 32, 64, 800


def batch(rng, n):
    """Return ids (T, n) and the symbols to be recalled (n,)."""
    ids = rng.integers(SYMBOLS, 2 * SYMBOLS, (T, n))
    ids[0] = rng.integers(0, SYMBOLS, n)
    return xp.asarray(ids), xp.asarray(ids[0])


def initial(alpha, seed):
    """Return the parameters that training begins with."""
    rng = np.random.default_rng(seed)
    drawn = {
        "W": 0.5 / h**0.5 * rng.standard_normal((h, h)),
        "U": 0.1 / alpha * rng.standard_normal((h, 2 * SYMBOLS)),
        "b": np.zeros(h),
        "W_hq": rng.standard_normal((h, SYMBOLS)) / h**0.5,
        "b_q": np.zeros(SYMBOLS),
    }
    return {name: xp.asarray(a.astype(np.float32)) for name, a in drawn.items()}


def run(alpha, params, ids):
    """Return H and the residuals."""
    weights = recurrence_of(alpha, params["W"], params["U"], params["b"])
    return F.rnn_forward(ids, None, *weights, activation=bounded)


def train(alpha, seed):
    """Return trained parameters, and the loss of each batch."""
    params, rng, losses = initial(alpha, seed), np.random.default_rng([seed, 1]), []
    optimizer = Momentum(params)
    for update in range(UPDATES):
        ids, symbols = batch(rng, n)
        H, residuals = run(alpha, params, ids)
        dH = xp.zeros_like(H)
        loss, dH[-1], dW_hq, db_q = F.linear_cross_entropy(
            H[-1], params["W_hq"], params["b_q"], symbols
        )
        _, _, dW_xh, dW_hh, db_h = F.rnn_backward(dH, residuals)
        gradients = {
            "W": (alpha * dW_hh).T,
            "U": (alpha * dW_xh).T,
            "b": alpha * db_h,
            "W_hq": dW_hq,
            "b_q": db_q,
        }
        clip_global_norm(gradients, 1.0)
        optimizer.step(params, gradients, scheduled(0.1, "cosine", update, UPDATES, warmup=20))
        losses.append(float(loss))
    return params, losses


def tested(alpha, params):
    """Return loss and share of right answers on 2,000 sequences that were not trained on."""
    ids, symbols = batch(np.random.default_rng(2026), 2000)
    H, _ = run(alpha, params, ids)
    O = F.linear(H[-1], params["W_hq"], params["b_q"])
    right = on_host(O).argmax(1) == on_host(symbols)
    return float(F.cross_entropy(O, symbols)[0]), right.mean()


def reaching_back(alpha, seed):
    """Return what is left, at the start of training, of a gradient after T steps backward."""
    rng = np.random.default_rng(seed)
    H, residuals = run(alpha, initial(alpha, seed), batch(rng, n)[0])
    dH = xp.zeros_like(H)
    dH[-1] = xp.asarray(rng.standard_normal((n, h)).astype(np.float32))
    _, dh_0, *_ = F.rnn_backward(dH, residuals)
    after, before = (np.linalg.norm(on_host(a).astype(float)) for a in (dh_0, dH[-1]))
    return after / before


# %% [markdown]
# Before training: a gradient that goes back 100 steps keeps about 0.98^100 of its length with
# the leak, and nothing to speak of without. Momentum's steps are as small as the gradient is.
# Adam's are not, so what is shown here of α = 1 is shown for momentum alone.

# %%
radii = [np.abs(np.linalg.eigvals(on_host(initial(1.0, seed)["W"]))).max() for seed in range(3)]
assert 0.35 < min(radii) <= max(radii) < 0.65
baseline = math.log(SYMBOLS)
left = {alpha: reaching_back(alpha, 0) for alpha in (0.02, 1.0)}
print("spectral radius of W:", *(f"{radius:.2f}" for radius in radii))
print(f"of a gradient 100 steps back: α = 0.02 {left[0.02]:.3f}, α = 1 {left[1.0]:.1e}")
assert 0.5 < left[0.02] / 0.98**T < 2 and left[1.0] < 1e-20

curves, results = {}, {}
for seed in range(3):
    for alpha in (0.02, 1.0):
        params, curves[alpha, seed] = train(alpha, seed)
        results[alpha, seed] = loss, right = tested(alpha, params)
        print(f"seed {seed}, α = {alpha:4}: loss {loss:.4f} nats, {right:.1%} right, fresh data")

with style.figure("updates", "loss of a batch (nats)", "Recall after 100 steps") as axes:
    for (alpha, seed), losses in curves.items():
        means = np.reshape(losses, (-1, 20)).mean(1)
        shade, dash, kind = ("0.05", "-", "leak") if alpha < 1 else ("0.3", "--", "no leak")
        label = f"α = {alpha:g}, {kind}: three seeds" if seed == 0 else None
        x = 20 * np.arange(1, len(means) + 1)
        axes.plot(x, means, dash, color=shade, marker="", linewidth=1.2, label=label)
    axes.axhline(baseline, color="0.82", linewidth=6, zorder=0, label="ln 8, without memory")
    axes.set_ylim(bottom=0)

for (alpha, seed), (loss, right) in results.items():
    if alpha < 1:
        assert loss < baseline / 10 and right > 0.9, f"seed {seed} has not learned to recall"
    else:
        assert loss > 0.98 * baseline and right < 0.2, f"seed {seed} recalls without a leak?"

# %% [markdown]
# ## Which kernel runs, and how fast
#
# `gpurnn.plan` says which kernel a shape would get on a GPU, and why; no GPU is needed to ask. φ
# plays no part in the choice. The W_hh of the task above fits the registers of a block; a larger
# one is split over blocks, and with the largest each step is a product by cuBLAS.

# %%
plans = {h: gpurnn.plan(T=100, n=64, d=16, h=h, device="H100") for h in (32, 512, 4096)}
for h, plan in plans.items():
    print(f"h = {h}: {plan}\n")
assert [plan.kernel for plan in plans.values()] == ["resident", "group", "gemm"]
assert "activation" not in inspect.signature(gpurnn.plan).parameters
assert plans[32].launches == plans[512].launches == 1 < plans[4096].launches

# %% [markdown]
# `gpurnn bench` times forward and backward passes: with `--device cpu` against `torch.nn.RNN`,
# with `--device cuda` against it in two precisions, a loop in CuPy and JAX's scan, with a plot
# beside the JSON that `--out` names. `gpurnn bench --probe` measures a GPU's own latencies, for a
# table that `plan` then goes by; `gpurnn doctor` says what is installed and whether the kernels
# are right here. What a kernel's instructions wait for on a GPU is told by NVIDIA's Nsight
# Compute (`ncu`), which knows the kernels by the names of their functions. The benchmark's shapes
# take some minutes; from Python one can be had alone.
#
# **Statement 11.** A result is compared with the float64 reference before anything is timed: H
# and the gradients of every input. If one of them is off by more than 1e-4 of its size, that is
# an error and not a figure; here each is made wrong by one part in a thousand.

# %%
from gpurnn.bench import Shape, measure_cpu
from gpurnn.bench.common import ERROR_LIMITS


def benchmark():
    """Return the records of one shape, that of the task above."""
    return list(measure_cpu(seconds=0.05, threads=1, shapes=(Shape(T=100, n=64, d=16, h=32),)))


def spoiled(function, position):
    """Return the function with one of its results a thousandth too large, in float32."""

    def spoil(*arguments, **options):
        results = list(function(*arguments, **options))
        if results[position].dtype == np.float32:
            results[position] = results[position] * np.float32(1.001)
        return results

    return spoil


def missing(package):
    """Return whether a package is not installed; if so, say it."""
    lacks = importlib.util.find_spec(package) is None
    if lacks:
        print(f"{package} is not installed (pip install -e '.[bench]')")
    return lacks


records = []
if missing("threadpoolctl"):
    print("so nothing is timed here")
else:
    for name, function, position in (
        ("H", "rnn_forward", 0),
        *((name, "rnn_backward", k) for k, name in enumerate(NAMES[1:])),
    ):
        with mock.patch.object(F, function, spoiled(getattr(F, function), position)):
            try:
                benchmark()
            except ArithmeticError as error:
                refusal = str(error)
            else:
                raise AssertionError(f"a wrong {name} was timed")
        assert refusal.endswith("not timed")
        print(f"{name:6} wrong: {refusal}")
    records += benchmark()
if missing("torch"):
    print("so nothing is compared here")

# %% [markdown]
# Figures of seven shapes are in the repository, as `gpurnn bench --device cpu --out` wrote them.

# %%
published = json.loads(Path("../benchmarks/cpu-epyc-2-threads.json").read_text())
where = ["here, 1 thread"] * len(records)
records += published["records"]
where += [f"{published['environment']['processor']}, 2 threads"] * len(published["records"])

print("forward and backward    T     n     d     h    error       ms  torch ms  speed-up")
for place, record in zip(where, records, strict=True):
    sizes = "".join(f"{size:6}" for size in record["shape"].values())
    ours = record["gpurnn_forward_backward_ms"]["median"]
    line = f"{place:19}{sizes} {record['error']:8.1e} {ours:8.2f}"
    if "torch_error" in record:
        theirs = record["torch_forward_backward_ms"]["median"]
        line += f" {theirs:9.2f} {theirs / ours:9.2f}"
        assert abs(record["forward_backward_speedup"] * ours / theirs - 1) < 1e-9
        assert record["torch_error"] <= ERROR_LIMITS["float32"]
    print(line)
    assert record["error"] <= ERROR_LIMITS["float32"]
    assert record["gpurnn_forward_backward_ms"]["passes"] >= 8
assert ERROR_LIMITS["float32"] == 1e-4 and len(published["records"]) == 7

# %% [markdown]
# The row "here" is this machine's, whatever else it did meanwhile; nothing is asserted of its
# speed.
#
# On the command line, `gpurnn bench --soak N` runs N random shapes, kernels and types, each
# twice, and compares the bits of the two and the result with the reference: on a GPU, or small
# ones in the emulator.

# %%
command = [sys.executable, "-m", "gpurnn", "bench", "--soak", "2", "--device", "emulator"]
soaked = subprocess.run(command, capture_output=True, text=True, check=False)
print("gpurnn", *command[3:])
print(soaked.stdout.strip() or soaked.stderr.strip())
assert soaked.returncode == 0
assert "2 ran twice with the same bits, 2 of them compared with the reference" in soaked.stdout

# %% [markdown]
# ## What was shown
#
# - Two Python functions of one number, φ and φ′, are an activation: checked against each other
#   when they are paired, fused forward and backward, right by finite differences (Statement 7).
# - The kernels are compiled with them inside, without spills on sm_90, and under the emulator
#   give H and every gradient about as exactly as NumPy (Statements 7, 11).
# - The rectified leaky unit is (9.4.5) with W_hh = (1 − α) I + α Wᵀ; its step response is the
#   closed form, and the gradients by W, U, b and α are a chain rule away. A leak outside of φ
#   is not of this form, but with relu and twice the state it is.
# - Recall over 100 steps is learned by momentum with a leak of 0.02, to less than a tenth of the
#   baseline's ln 8 nats with each of three seeds; from the same weights without it, not at all.
# - `gpurnn.plan` tells which kernel runs; `gpurnn bench` checks a result before it times it
#   (Statement 11).
