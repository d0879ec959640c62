# %% [markdown]
# # 4. Inside the kernels
#
# One step of a recurrent network is a small matrix product and a φ. At the end of this notebook
# one knows four ways of giving that step to the threads of a GPU, what each thread and barrier
# does and when, how often each way fetches W_hh, what the compiler makes of it, and what is then
# left as the least time of a step. NumPy is enough to follow it. It needs no GPU and takes less
# than a minute: the kernels run in `gpurnn.emulator`, which checks every access to memory.
#
# Equation numbers are those of *Dive into Deep Learning*, chapter 9. What begins with
# **Statement** is shown by the code after it, which fails if it does not hold; the numbers are
# those of this project's list of statements.

# %%
import linecache
import math
import os
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import style
from matplotlib.patches import Patch
from numba import cuda, float32, uint32, uint64

os.environ.pop("GPURNN_TUNED", None)  # the model's own figures, not some GPU's
import gpurnn
from gpurnn import Group, emulator
from gpurnn import functional as F

# %% [markdown]
# ## One step, in NumPy
#
# H_t = φ(X_t W_xh + H_{t−1} W_hh + b_h) (9.4.5). The input's part, Z_t = X_t W_xh + b_h, does not
# depend on the states: it is computed for all steps at once, before the recurrence. What remains,
# H_t = φ(Z_t + H_{t−1} W_hh), must go step by step. Here: T = 3 steps, a batch of n = 4 rows,
# h = 8 hidden units, φ = tanh. `states[0]` is H_0, and `states[t + 1]` what step t makes of
# `states[t]`.

# %%
T, n, d, h = 3, 4, 3, 8
rng = np.random.default_rng(4)


def numbers(*shape):
    return rng.standard_normal(shape, dtype=np.float32)


X, H_0 = numbers(T, n, d), numbers(n, h)
W_xh, W_hh, b_h = numbers(d, h) / 2, numbers(h, h) / 3, numbers(h) / 4
Z = X @ W_xh + b_h

reference = np.empty((T + 1, n, h))  # float64, so that its own error does not count
reference[0] = H_0
for t in range(T):
    H = X[t].astype(float) @ W_xh + reference[t] @ W_hh + b_h
    reference[t + 1] = np.tanh(H)

ours, _ = F.rnn_forward(X, H_0, W_xh, W_hh, b_h)
assert np.abs(ours - reference[1:]).max() < 1e-6, "three lines of NumPy are the library's result"

# %% [markdown]
# ## How to watch a kernel
#
# A *kernel* is a function that many *threads* run at once. Threads come in *blocks*; a thread
# knows its place by `cuda.threadIdx` and `cuda.blockIdx`. There are three places for numbers:
#
# | memory | who sees it | declared by |
# |---|---|---|
# | global | all threads; far away | the kernel's arguments |
# | shared | the threads of one block; near | `cuda.shared.array` |
# | registers | one thread; at hand | variables, and at best `cuda.local.array` (see below) |
#
# A block runs on one *multiprocessor*, of which a GPU has many; its shared memory and registers
# are there ("on the chip"). Global memory is reached through a cache that all share, *L2*.
#
# Threads wait for one another at a *barrier* (another way comes at the end of "Group"):
# `cuda.syncthreads()` is one for a block.
#
# The kernels below read, write and wait through four small functions. On a GPU those are what
# they say. For the emulator each has a *twin*, the attribute `emulated` (see `docs/emulator.md`),
# which also writes down who did what: everything counted and drawn here comes from these notes.


# %%
class Event(NamedTuple):
    block: int
    thread: int  # its number within the block
    what: str  # "read", "write" or "barrier"
    space: str  # "global", "shared" or "local"; at a barrier whom it is for: "block" or "grid"
    name: str  # of the kernel's argument
    place: object  # index in the array; at a barrier how many threads meet


events = []
inlined = cuda.jit(device=True, forceinline=True)


@inlined
def get(array, place):
    return array[place]


@inlined
def put(array, place, value):
    array[place] = value


@inlined
def meet():
    cuda.syncthreads()


@inlined
def meet_all():
    cuda.cg.this_grid().sync()


@inlined
def forgotten():
    pass


def note(cuda, what, space, name, place):
    threads, blocks, size, grid = cuda.threadIdx, cuda.blockIdx, cuda.blockDim, cuda.gridDim
    block, thread = blocks.x + blocks.y * grid.x, threads.x + threads.y * size.x
    if what == "barrier":
        place = size.x * size.y * (grid.x * grid.y if space == "grid" else 1)
    events.append(Event(block, thread, what, space, name.removeprefix("argument "), place))


def noted_get(cuda, array, place):
    note(cuda, "read", array.space, array.label, place)
    return array[place]


def noted_put(cuda, array, place, value):
    note(cuda, "write", array.space, array.label, place)
    array[place] = value


def noted_meet(cuda):
    note(cuda, "barrier", "block", "", None)
    cuda.syncthreads()


def noted_meet_all(cuda):
    note(cuda, "barrier", "grid", "", None)
    cuda.cg.this_grid().sync()


get.emulated, put.emulated = noted_get, noted_put
meet.emulated, meet_all.emulated = noted_meet, noted_meet_all


def watch(kernel, blocks, threads, *arguments, **options):
    """Run a kernel in the emulator; return what its threads did."""
    events.clear()
    emulator.launch(kernel, blocks, threads, arguments, **options)
    return list(events)


def flat(launches):
    return [event for launch in launches for event in launch]


# %% [markdown]
# Two ways of looking at the notes. `traffic` counts them, access by access; that threads
# share a fetch, and that caches answer some, comes on top (see "A warp reads together").
# `timeline` draws them, a row for each thread: its accesses one after another from the left, and
# where threads meet at a barrier, all go on together. Or, with `as_run`, in the order in which
# the emulator went through them, one thread at a time until it must wait.


# %%
def traffic(events):
    """Count accesses by memory, kind, and, in global memory, array."""
    return Counter(
        f"{e.space} {e.what} {e.name if e.space == 'global' else ''}".strip()
        for e in events
        if e.what != "barrier"
    )


def moments(events):
    """Give each event a moment: a thread's follow one another, and a barrier is one for all."""
    clock, waiting, placed = Counter(), {}, []
    for e in events:
        me = e.block, e.thread
        if e.what != "barrier":
            placed.append((clock[me], e))
            clock[me] += 1
            continue
        group = waiting.setdefault(e.block if e.space == "block" else "grid", {})
        group[me] = e
        if len(group) == e.place:  # the last one has come
            latest = max(clock[who] for who in group)
            placed += [(latest + 1, arrival) for arrival in group.values()]
            for who in group:
                clock[who] = latest + 3
            group.clear()
    return placed


GREY = {
    "global read of W_hh": 0.0,
    "other global read": 0.35,
    "global write": 0.55,
    "shared write": 0.75,
    "shared read": 0.9,
}


def kind(e):
    if e.space == "global" and e.what == "read":
        return "global read of W_hh" if e.name == "W_hh" else "other global read"
    return f"{e.space} {e.what}"


def timeline(events, *titles, height=2.9, until=None, as_run=False):
    """Draw what each thread does at each moment, of several runs side by side.

    What happens in registers is left out.
    """
    runs = [events] if len(titles) == 1 else events
    with style.grid_of(1, len(titles), width=7.6, height=height) as [panels]:
        for axes, run, title in zip(panels, runs, titles, strict=True):
            seen = [e for e in run if e.space != "local"]
            placed = list(enumerate(seen)) if as_run else moments(seen)
            threads = sorted({(e.block, e.thread) for e in seen})
            row = {who: i for i, who in enumerate(threads)}
            picture = np.full((len(row), 1 + max(moment for moment, _ in placed)), np.nan)
            for moment, e in placed:
                y = row[e.block, e.thread]
                if e.what == "barrier":
                    dashes = "-" if e.space == "grid" else ":"
                    axes.vlines(moment, y - 0.5, y + 0.5, "0", dashes, linewidth=1.2)
                else:
                    picture[y, moment] = GREY[kind(e)]
            axes.imshow(picture, "gray", aspect="auto", vmin=0, vmax=1, interpolation="nearest")
            axes.grid(visible=False)
            starts = [i for i, (_, thread) in enumerate(threads) if thread == 0]
            for start in starts[1:]:
                axes.axhline(start - 0.5, color="1", linewidth=2)
            named = range(len(threads)) if len(threads) <= 4 else starts
            axes.set_yticks(named, ["block {}, thread {}".format(*threads[i]) for i in named])
            axes.set_xlabel("moment" + " (emulator's order)" * as_run)
            axes.set_xlim(right=until)
            axes.set_title(title)
        patches = [Patch(facecolor=str(g), edgecolor="0.5", label=k) for k, g in GREY.items()]
        axes.figure.legend(handles=patches, loc="outside lower center", ncols=5, fontsize=8.5)


# %% [markdown]
# ## Naive: a thread for each number
#
# Each of the n · h numbers of H_t is given to a thread of its own, which walks along a row of
# H_{t−1} and down a column of W_hh. Nobody waits for anybody: the next step is another launch,
# and between launches everything written is there to be read. (Sizes are multiples of 4 here; the
# library's kernels ask at every edge.)
#
# **Statement 11.** The kernel computes H_t = φ(Z_t + H_{t−1} W_hh) (9.4.5), step by step. Each
# step reads n · h² numbers of W_hh from global memory, h² for each row of the batch, and as
# many of the states.


# %%
@cuda.jit
def naive(Z, states, W_hh, t):
    j, r = cuda.grid(2)  # this thread's place among all threads: column j, row r
    total = float32(0)
    for k in range(W_hh.shape[0]):
        total += get(states, (t, r, k)) * get(W_hh, (k, j))
    put(states, (t + 1, r, j), math.tanh(get(Z, (t, r, j)) + total))


SIDE = 4  # blocks of 4 × 4 threads: h / 4 of them side by side, n / 4 below one another
GRID, BLOCK = (h // SIDE, n // SIDE), (SIDE, SIDE)


def fresh():
    """Return H_0, and NaN where the states are to be written."""
    states = np.full((T + 1, n, h), np.nan, np.float32)
    states[0] = H_0
    return states


done, results = {}, {"naive": fresh()}
done["naive"] = [watch(naive, GRID, BLOCK, Z, results["naive"], W_hh, t) for t in range(T)]
timeline(done["naive"][0], "naive: one step (one launch)")

# %% [markdown]
# Sixteen reads of states and weights, from global memory, for eight multiply-adds: in every
# thread.

# %%
np.testing.assert_allclose(results["naive"], reference, rtol=0, atol=1e-6)
counted = {"naive": traffic(flat(done["naive"]))}
assert counted["naive"] == {
    "global read W_hh": T * n * h**2,
    "global read states": T * n * h**2,
    "global read Z": T * n * h,
    "global write states": T * n * h,
}, "what the naive kernel reads and writes"

# %% [markdown]
# ## Tiled: what many threads need, one of them fetches
#
# The four threads of a column read the same weights, the four of a row the same states. Here a
# block fetches a *tile* of each into shared memory, one number a thread, and then all multiply
# from there. That takes two barriers a tile: a tile must be whole before it is read (`filled`),
# and have been read before the next one overwrites it (`used`).
#
# **Statements 11, 15.** The kernel computes (9.4.5) as well, and of global memory it reads s
# times less for tiles of s × s: T · n · h² / s weights, and as many states. The library's
# kernels `step` ([kernels/step.py](../kernels/step.py)), which takes any size, and `concatenated`
# compute the same. The latter multiplies [X_t, H_{t−1}] with [W_xh; W_hh] in one product: on the
# chapter's shapes, (3, 1)(1, 4) and (3, 4)(4, 4), that equals the sum of two products, to 10⁻⁶ in
# float32 and 10⁻¹⁴ in float64.


# %%
def tiled(side, filled, used):
    @cuda.jit
    def step(Z, states, W_hh, t):
        tile_H = cuda.shared.array((side, side), float32)
        tile_W = cuda.shared.array((side, side), float32)
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        j, r = cuda.grid(2)
        total = float32(0)
        for k in range(0, W_hh.shape[0], side):
            put(tile_H, (y, x), get(states, (t, r, k + x)))
            put(tile_W, (y, x), get(W_hh, (k + y, j)))
            filled()
            for i in range(side):
                total += get(tile_H, (y, i)) * get(tile_W, (i, x))
            used()
        put(states, (t + 1, r, j), math.tanh(get(Z, (t, r, j)) + total))

    return step


step, results["tiled"] = tiled(SIDE, meet, meet), fresh()
done["tiled"] = [watch(step, GRID, BLOCK, Z, results["tiled"], W_hh, t) for t in range(T)]
timeline(done["tiled"][0], "tiled: one step (one launch); dotted: barriers of a block")


# %%
np.testing.assert_allclose(results["tiled"], reference, rtol=0, atol=1e-6)
counted["tiled"] = traffic(flat(done["tiled"]))
fetched = T * n * h**2 // SIDE
assert counted["tiled"] == {
    "global read W_hh": fetched,
    "global read states": fetched,
    "global read Z": T * n * h,
    "global write states": T * n * h,
    "shared write": 2 * fetched,
    "shared read": 2 * T * n * h**2,
}, "what the tiled kernel reads and writes"


# %%
def by_kernel(kernel, *arguments, **options):
    """Run the library's kernel of that name in the emulator; return H."""
    with gpurnn.emulated():
        return F.rnn_forward(*arguments, kernel=kernel, **options)[0]


H = by_kernel("step", X, H_0, W_xh, W_hh, b_h)
np.testing.assert_allclose(H, reference[1:], rtol=0, atol=1e-6)

for dtype, bound in ((np.float32, 1e-6), (np.float64, 1e-14)):
    small = [rng.standard_normal(s) / 2 for s in ((1, 3, 1), (3, 4), (1, 4), (4, 4), (4,))]
    x, h_0, w_x, w_h, b = (a.astype(dtype) for a in small)
    one = by_kernel("concatenated", x, h_0, w_x, w_h, b, activation="identity")[0]
    two = x[0] @ w_x + h_0 @ w_h + b
    together = np.hstack([x[0], h_0]) @ np.vstack([w_x, w_h]) + b  # (3, 5)(5, 4)
    print(f"{np.dtype(dtype)}: largest difference {np.abs(one - two).max():.1e}")
    assert max(np.abs(one - two).max(), np.abs(together - two).max()) <= bound

# %% [markdown]
# ## What the barriers are for
#
# Each of the two is left out in turn. The emulator does not look at results: it says that two
# accesses to one place are not ordered, in whatever order they happened to come, and names both.


# %%
def told(error):
    """Print an error, with the lines of code that it names."""
    text = str(error)
    for place in error.places:
        text = text.replace(place.file, "cell")
    print(textwrap.fill(f"{type(error).__name__}: {text}", 98), end="\n\n")
    for place in error.places:
        print(f"  line {place.line}, {place.who}:  {line_at(place)}")


def line_at(place):
    return linecache.getline(place.file, place.line).strip()


def caught(kind, kernel, blocks, threads, *arguments):
    """Run a kernel that is wrong; return the error that the emulator finds."""
    try:
        emulator.launch(kernel, blocks, threads, arguments)
    except kind as error:
        told(error)
        return error
    raise AssertionError(f"no {kind.__name__} found")


race = caught(emulator.RaceError, tiled(SIDE, meet, forgotten), GRID, BLOCK, Z, fresh(), W_hh, 0)
read, write = race.places  # the thread that was running comes first
assert line_at(write).startswith("put(tile_") and line_at(read).startswith("total += get(tile_H")
assert write.block == read.block and write.thread != read.thread
assert "write at" in str(race) and "read at" in str(race) and "no barrier" in str(race)

# %% [markdown]
# Without `used`, thread 0 fills its place of the second tile before the others have read the
# first. In the emulator's own order, with its checks turned off, this can be seen for the first
# four threads of a block. With both barriers, none fetches (dark) a second tile before all have
# multiplied from the first (light). Without `used` thread 1 is still to multiply when thread 0
# has fetched, and the numbers are wrong. Nobody says in which order a GPU takes its threads; so
# one looks for the race, and not at the numbers.

# %%
wrong = fresh()
broken = tiled(SIDE, meet, forgotten)
loose = watch(broken, GRID, BLOCK, Z, wrong, W_hh, 0, check_races=False)
few = [[e for e in run if e.block == 0 and e.thread < 4] for run in (done["tiled"][0], loose)]
timeline(few, "both barriers", "without `used`", as_run=True, height=2.4)


def fetches_too_early(run):
    """Whether thread 0 fills the second tile before thread 1 has read all of the first."""
    kinds = [(e.thread, kind(e)) for e in run]
    fills = [i for i, what in enumerate(kinds) if what == (0, "shared write")]
    reads = [i for i, what in enumerate(kinds) if what == (1, "shared read")]
    return fills[2] < reads[2 * SIDE - 1]


assert [fetches_too_early(run) for run in few] == [False, True]
assert np.abs(wrong[1] - reference[1]).max() > 0.01

# %% [markdown]
# Without `filled`, a thread reads where nobody has written yet:

# %%
unwritten = caught(
    emulator.UninitializedError, tiled(SIDE, forgotten, meet), GRID, BLOCK, Z, fresh(), W_hh, 0
)
assert line_at(unwritten.places[0]).startswith("total += get(tile_H")
assert "which nothing wrote" in str(unwritten)

# %% [markdown]
# A barrier is for all threads of a block. The usual way to get that wrong is an `if` for what
# lies beyond the array: the fourth thread below never comes. What a GPU then does depends on its
# generation, and on whether that thread has ended: the others go on without it, or wait for ever.
# The emulator refuses it.


# %%
@cuda.jit
def three_of_four(x):
    row = cuda.shared.array(4, float32)
    i = cuda.threadIdx.x
    if i < x.size:
        row[i] = x[i]
        cuda.syncthreads()
        x[i] = row[(i + 1) % x.size]


parted = caught(emulator.BarrierError, three_of_four, 1, 4, np.zeros(3, np.float32))
assert any(line_at(place) == "cuda.syncthreads()" for place in parted.places)

# %% [markdown]
# With both barriers in place the order of the threads changes no bit:

# %%
for seed in range(4):
    states = fresh()
    emulator.launch(step, GRID, BLOCK, (Z, states, W_hh, 0), seed=seed)
    assert np.array_equal(states[1], results["tiled"][1]), f"shuffled by seed {seed}"

# %% [markdown]
# ## A warp reads together
#
# Threads run in *warps* of 32, their *lanes*, which do one instruction together. Global memory
# answers in pieces of 32 bytes (*sectors*): neighbours that read neighbouring numbers share them.
# Shared memory has 32 *banks*, each good for one word at a time: lanes that want different words
# of one bank wait in line. The kernel below reads a row and a column of a matrix from global
# memory, and a column of a tile. With `measure=True` the emulator counts sectors and waits
# (*wavefronts*) by line.


# %%
def rows_and_columns(width):
    @cuda.jit
    def kernel(x, out):
        tile = cuda.shared.array((32, width), float32)
        i = cuda.threadIdx.x
        row = x[0, i]
        column = x[i, 0]
        for r in range(32):
            tile[r, i] = row + column
        cuda.syncthreads()
        value = tile[i, 0]
        out[i] = value

    return kernel


cost = {}
for width in (32, 33):
    report = emulator.launch(
        rows_and_columns(width), 1, 32, (numbers(32, 32), numbers(32)), measure=True
    )
    for line in report.traffic:
        if line.kind == "read":
            code = linecache.getline(line.file, line.line).strip()
            cost[code, width] = line.needed
            unit = "sectors" if line.space == "global" else "wavefronts"
            print(f"tile (32, {width})  {code:<18} {line.needed:>2} {unit}, least {line.ideal}")
assert cost["row = x[0, i]", 32] == 32 * 4 // 32, "32 floats in sectors of 32 bytes"
assert cost["column = x[i, 0]", 32] == 32, "each in a sector of its own"
assert cost["value = tile[i, 0]", 32] == 32, "all lanes want the same bank"
assert cost["value = tile[i, 0]", 33] == 1, "rows of 33: each lane another bank"

# %% [markdown]
# So the tiles of [kernels/tiled.py](../kernels/tiled.py) are one column wider than they need to
# be.
#
# ## Resident: W_hh is read once
#
# Rows of a batch never meet. A block can therefore take its rows through the whole sequence in
# one launch, and keep W_hh on the chip all that time: here a block has one row, and thread j the
# column j of W_hh, in a local array, which is to become registers. The state is exchanged in
# shared memory, through two buffers: while some still read the state of step t from one, others
# already write that of t + 1 into the other. So one barrier a step is enough.
#
# **Statement 11.** The kernel computes all of (9.4.5) in one launch. Each block reads each weight
# once, however long the sequence; no state but H_0 is read from global memory. So it is with the
# library's [kernels/resident.py](../kernels/resident.py).


# %%
def resident(h, buffers=2):
    @cuda.jit
    def sequence(Z, states, W_hh):
        w = cuda.local.array(h, float32)
        v = cuda.shared.array((buffers, h), float32)
        r, j = cuda.blockIdx.x, cuda.threadIdx.x
        for k in range(h):
            put(w, k, get(W_hh, (k, j)))
        put(v, (0, j), get(states, (0, r, j)))
        meet()
        for t in range(Z.shape[0]):
            total = float32(0)
            for k in range(h):
                total += get(v, (t % buffers, k)) * get(w, k)
            H = math.tanh(get(Z, (t, r, j)) + total)
            put(states, (t + 1, r, j), H)
            put(v, ((t + 1) % buffers, j), H)
            meet()

    return sequence


results["resident"] = fresh()
done["resident"] = [watch(resident(h), n, h, Z, results["resident"], W_hh)]
timeline(done["resident"][0], "resident: the whole sequence, three steps (one launch)", height=3.2)

# %%
np.testing.assert_allclose(results["resident"], reference, rtol=0, atol=1e-6)
counted["resident"] = traffic(done["resident"][0])
assert counted["resident"] == {
    "global read W_hh": n * h**2,  # n blocks of one row: not a word of T
    "global read states": n * h,
    "global read Z": T * n * h,
    "global write states": T * n * h,
    "shared write": (T + 1) * n * h,
    "shared read": T * n * h**2,
    "local write": n * h**2,
    "local read": T * n * h**2,
}, "what the resident kernel reads and writes"

# %% [markdown]
# With one buffer instead of two, the barrier of a step no longer keeps its writes from the reads
# of the same step:

# %%
race = caught(emulator.RaceError, resident(h, buffers=1), n, h, Z, fresh(), W_hh)
assert {line_at(place)[:10] for place in race.places} == {"total += g", "put(v, ((t"}

# %% [markdown]
# The library's kernel lets several lanes share a column and sums over them. It runs below through
# the same call as everything else, and once more by itself to be measured. The lines that fetch
# W_hh, and H_0 with b_h, ask for the same bytes in one step as in three; only Z grows.

# %%
from gpurnn import planning
from gpurnn.cuda.specs import KernelSpec, build

H = by_kernel("resident", X, H_0, W_xh, W_hh, b_h)
np.testing.assert_allclose(H, reference[1:], rtol=0, atol=1e-6)

H100 = planning.DEVICES["H100"]
size = 32
plan = gpurnn.plan(T=3, n=1, d=1, h=size, device=H100, kernel="resident")
kernel = build(KernelSpec("resident_forward", plan.tile, "tanh", "float32"))
moved = {}
for steps in (1, 3):
    inputs, states = numbers(steps * size), np.zeros((steps + 1) * size, np.float32)
    arrays = inputs, states, numbers(size, size) / 8, numbers(size)
    report = emulator.launch(
        kernel, plan.grid, plan.block, (*arrays, steps, 1), shared=plan.shared, measure=True
    )
    asked = Counter()
    for line in report.traffic:
        if line.space == "global" and line.kind == "read":
            asked[Path(line.file).name] += 32 * line.ideal  # bytes, in sectors of 32
    moved[steps] = asked
    weights, beside, of_z = (asked[f"{f}.py"] for f in ("product", "resident", "tokens"))
    print(f"T = {steps}: W_hh {weights:,} bytes, H_0 and b_h {beside:,}, Z {of_z:,}")
for steps, asked in moved.items():
    weights, beside, of_z = 4 * size**2, 2 * 4 * size, steps * 4 * size
    assert asked == {"product.py": weights, "resident.py": beside, "tokens.py": of_z}

# %% [markdown]
# ## Group: W_hh over several blocks
#
# What one block can hold ends at some h. Then W_hh is split by columns over the blocks of a
# *group*; each computes its columns of H_t, for all rows of the group, and needs all the others'
# for the next step. Below, two blocks of four threads; a thread holds a column. They exchange
# through global memory, and between steps a barrier of the whole grid (a solid line) makes sure
# that everything has been written. All blocks must run at once for that (a *cooperative* launch,
# which Numba makes of a kernel with such a barrier): a block that waits for one that has not begun
# would wait for ever. That bounds how many blocks there may be.
#
# **Statement 11.** The kernel computes (9.4.5) in one launch; the group reads each weight once,
# and in each step each of its G blocks reads all n · h numbers of the state. The library's
# [kernels/group.py](../kernels/group.py) computes it too, to the same bits whichever of its three
# ways of exchanging it takes, over two blocks or four.


# %%
def group(h, rows, blocks):
    width = h // blocks

    @cuda.jit
    def sequence(Z, states, W_hh):
        w = cuda.local.array(h, float32)
        v = cuda.shared.array((rows, h), float32)
        c = cuda.threadIdx.x
        j = cuda.blockIdx.x * width + c
        for k in range(h):
            put(w, k, get(W_hh, (k, j)))
        for t in range(Z.shape[0]):
            for i in range(c, rows * h, width):
                put(v, (i // h, i % h), get(states, (t, i // h, i % h)))
            meet()
            for r in range(rows):
                total = float32(0)
                for k in range(h):
                    total += get(v, (r, k)) * get(w, k)
                put(states, (t + 1, r, j), math.tanh(get(Z, (t, r, j)) + total))
            meet_all()

    return sequence


G = 2
results["group"] = fresh()
done["group"] = [watch(group(h, n, G), G, h // G, Z, results["group"], W_hh)]
timeline(done["group"][0], "group: the first step and the beginning of the second", until=100)

# %%
np.testing.assert_allclose(results["group"], reference, rtol=0, atol=1e-6)
counted["group"] = traffic(done["group"][0])
assert counted["group"] == {
    "global read W_hh": h**2,
    "global read states": T * G * n * h,
    "global read Z": T * n * h,
    "global write states": T * n * h,
    "shared write": T * G * n * h,
    "shared read": T * n * h**2,
    "local write": h**2,
    "local read": T * n * h**2,
}, "what the group kernel reads and writes"

exchanged = [
    by_kernel(Group(blocks, exchange), X, H_0, W_xh, W_hh, b_h)
    for exchange in ("cluster", "flags", "counter")
    for blocks in (2, 4)
]
for H in exchanged:
    np.testing.assert_allclose(H, reference[1:], rtol=0, atol=1e-6)
    assert np.array_equal(H, exchanged[0]), "the same bits"

# %% [markdown]
# A barrier of the grid is a journey to a counter and back, after the stores have arrived. The
# library's `flags` needs none: value and number of the step travel as one 64-bit word, and who
# waits reads the word until the number is right. Two words without fences would not do, as a
# reader may see the new flag and the old value:

# %%
from gpurnn.kernels.ptx import bits_float, float_bits, load_relaxed, store_relaxed


@cuda.jit
def two_words(values, flags):
    if cuda.blockIdx.x == 0:
        values[0] = float32(0.5)
        store_relaxed(flags, 0, uint64(1))
    else:
        while load_relaxed(flags, 0) != uint64(1):
            pass
        values[1] = values[0]


@cuda.jit
def one_word(values, words):
    if cuda.blockIdx.x == 0:
        store_relaxed(words, 0, uint64(1) << uint64(32) | uint64(float_bits(float32(0.5))))
    else:
        word = load_relaxed(words, 0)
        while word >> uint64(32) != uint64(1):
            word = load_relaxed(words, 0)
        values[1] = bits_float(uint32(word))


race = caught(emulator.RaceError, two_words, 2, 1, np.zeros(2, np.float32), np.zeros(1, np.uint64))
assert race.places[0].block != race.places[1].block
values = np.zeros(2, np.float32)
emulator.launch(one_word, 2, 1, (values, np.zeros(1, np.uint64)))
assert values[1] == 0.5

# %% [markdown]
# ## Side by side
#
# Above: which thread computes which number of H_1; the greys are blocks. Below: how often each
# weight is read from global memory in the three steps.

# %%
names = list(done)
with style.grid_of(2, 4, width=8.4, height=3.9) as axes:
    for (above, below), name in zip(axes.T, names, strict=True):
        owner, thread = np.full((n, h), -1), np.zeros((n, h), int)
        reads = np.zeros((h, h), int)
        for e in flat(done[name]):
            if e.what == "write" and e.name == "states" and e.place[0] == 1:
                owner[e.place[1:]], thread[e.place[1:]] = e.block, e.thread
            if e.what == "read" and e.name == "W_hh":
                reads[e.place] += 1
        for panel, shade, text in ((above, 0.18 * owner, thread), (below, reads / 16, reads)):
            panel.imshow(shade, vmin=0, vmax=1)
            panel.grid(visible=False)
            for place in np.ndindex(text.shape):
                dark = shade[place] > 0.5
                panel.text(
                    *place[::-1],
                    text[place],
                    size=7,
                    ha="center",
                    va="center",
                    color="1" if dark else "0",
                )
        blocks = owner.max() + 1
        above.set_title(f"{name}: {blocks} blocks")
        below.set_xlabel("j")
        assert owner.min() == 0, "every number has an owner"
        assert (reads == reads[0, 0]).all(), "no weight is read more often than another"
    axes[0, 0].set_ylabel("row r of H_1")
    axes[1, 0].set_ylabel("k of W_hh[k, j]")

# %%
columns = ["global read W_hh", "global read states", "shared write", "shared read", "local read"]
print(f"{'accesses, T = 3':<18}" + "".join(f"{c:>20}" for c in columns))
for name in names:
    print(f"{name:<18}" + "".join(f"{counted[name][c]:>20,}" for c in columns))
assert all(np.array_equal(results[k], results["naive"]) for k in names), "one order of sums"


# %%
def reads_of_a_weight(name, T):
    """Run a kernel for T steps; return how often each weight was read from global memory."""
    Z, states = numbers(T, n, h), np.zeros((T + 1, n, h), np.float32)
    if name in ("naive", "tiled"):
        kernel = naive if name == "naive" else step
        seen = flat(watch(kernel, GRID, BLOCK, Z, states, W_hh, t) for t in range(T))
    elif name == "resident":
        seen = watch(resident(h), n, h, Z, states, W_hh)
    else:
        seen = watch(group(h, n, G), G, h // G, Z, states, W_hh)
    return traffic(seen)["global read W_hh"] / h**2


lengths = (1, 2, 4, 8)
with style.figure("T (steps)", "global reads of a weight", f"counted, n = {n} rows") as axes:
    for name in names:
        axes.plot(lengths, [reads_of_a_weight(name, T) for T in lengths], label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(lengths, lengths)
    axes.set_yticks((1, 4, 16), (1, 4, 16))
for line, per_step, once in zip(axes.lines, (n, n / SIDE, 0, 0), (0, 0, n, 1), strict=True):
    assert list(line.get_ydata()) == [per_step * T + once for T in lengths]

# %% [markdown]
# ## How Python becomes registers
#
# Numba turns a kernel into PTX, NVIDIA's portable assembly; `ptxas` turns that into machine code,
# for one architecture, here the H100's (compute capability 9.0). Neither needs a GPU, and
# `gpurnn.resources` reads off what a thread takes (with two of NVIDIA's tools, `pip install
# nvidia-cuda-nvcc nvidia-cuda-nvdisasm`). Registers have no addresses: a local array can live
# there only if every index is known when compiling, which is so when all loops over it are
# unrolled; and only if it fits, as a thread has at most 255. At h = 256 neither holds: the loop
# stays a loop, and the array silently moves to *local memory*, which is as far away as global
# memory; `stack` is its size.

# %%
from gpurnn import resources
from gpurnn.compiler import ArraySpec, ptx_of
from gpurnn.cuda.specs import signature

SM_90 = (9, 0)
code, found, share = {}, {}, {}


def compiled(name, function, arguments, threads, product):
    """Compile a kernel; ``product``: multiply-adds of a step, None for a loop of nothing else."""
    _, ptx = ptx_of(function, arguments, SM_90, threads)
    listing = resources.listing_of(ptx, SM_90)
    found[name] = r = resources.of_listing(listing)
    code[name] = resources.recurrent_loop(resources.sass_of_listing(listing))
    product = r.multiply_adds if product is None else product
    unrolled = r.multiply_adds >= product
    share[name] = product / r.loop if unrolled else math.nan
    wide = resources.instruction_mix(code[name])["LDS.128"]
    table.append(
        f"{name:<26} {r.registers:>9} {r.stack:>6} {r.loop:>12} "
        + (f"{product:>8} {share[name]:>7.0%}" if unrolled else f"{'-':>8} {'-':>7}")
        + f" {wide:>8}"
    )


def library(name, kind, plan):
    spec = KernelSpec(kind, plan.tile, "tanh", "float32", exchange=plan.exchange)
    tile = plan.tile
    product = tile.rows * tile.depth * tile.columns
    compiled(name, build(spec), signature(spec), spec.threads, product)


cube, square = ArraySpec("float32", 3), ArraySpec("float32", 2)
table = [
    f"{'kernel':<26} {'registers':>9} {'stack':>6} {'instructions':>12} "
    f"{'product':>8} {'useful':>7} {'LDS.128':>8}"
]
compiled("naive", naive.py_func, (cube, cube, square, None), 256, None)
compiled("tiled", tiled(16, meet, meet).py_func, (cube, cube, square, None), 256, None)
for size in (32, 64, 128, 256):
    compiled(f"resident, h = {size}", resident(size).py_func, (cube, cube, square), size, size)
one_block = gpurnn.plan(T=1, n=1, d=1, h=128, device=H100, kernel="resident")
library("library resident, h = 128", "resident_forward", one_block)
eight = gpurnn.plan(T=1, n=1, d=1, h=512, device=H100, kernel=Group(8, "cluster", 1))
library("library group, h = 512", "group_forward", eight)
print("\n".join(table), resources.toolchain(), sep="\n")

# %% [markdown]
# From *instructions* on the columns tell of the loop that does the product, each line of machine
# code counted once: all its instructions, the product's multiply-adds among them, their share,
# and loads of 128 bits from shared memory. In the kernels that hold W_hh the loop is a whole
# step. For h = 256 the loop over the column is a loop still, and what is counted once says
# nothing. In the library's kernel for h = 128 a thread has as many weights as in ours, a piece of
# four columns in place of a whole one: so it reads a quarter of the state instead of all of it.

# %%
ours = found["resident, h = 128"]
for size in (32, 64, 128):
    r = found[f"resident, h = {size}"]
    assert r.stack == 0 and r.registers > size, "a column of W_hh is in registers"
    assert r.multiply_adds >= size, "and the loop over it is unrolled"
beyond = found["resident, h = 256"]
assert beyond.stack >= 4 * 256 and beyond.registers < ours.registers, "it moved to local memory"
assert all(found[k].stack == 0 for k in found if k.startswith("library"))
assert all(r.registers <= 255 for r in found.values())
assert share["naive"] < 0.1 < share["tiled"] < share["resident, h = 128"]
assert min(share[k] for k in share if k.endswith("h = 128")) > 0.45
assert share["library group, h = 512"] > 0.35

loads = {k: resources.instruction_mix(code[k])["LDS.128"] for k in code}
print(f"128-bit loads a thread and step, h = 128: ours {loads['resident, h = 128']}, ", end="")
print(f"the library's {loads['library resident, h = 128']}")
assert one_block.tile.depth * one_block.tile.columns == 128 == 4 * one_block.tile.depth
assert loads["library resident, h = 128"] <= loads["resident, h = 128"] / 3

with style.figure("multiply-adds of the product / instructions of the loop", "") as axes:
    shown = ["naive", "tiled", *(f"resident, h = {size}" for size in (32, 64, 128))]
    shown += ["library resident, h = 128", "library group, h = 512"]
    axes.barh(shown[::-1], [share[k] for k in shown[::-1]], color="0.45")
    axes.set_xlim(0, 1)
    axes.set_axisbelow(True)

# %% [markdown]
# What the naive loop does beside its few multiply-adds (`FFMA`) is mostly integers: addresses in
# 64 bits, and Numba's question whether an index is negative. In the library's loop a weight is an
# operand: what was `total += v * w` is one instruction.

# %%
naive_mix = resources.instruction_mix(code["naive"])
print("naive:", dict(naive_mix.most_common(6)))
products = [line for line in code["library resident, h = 128"].splitlines() if "FFMA" in line]
for line in products[8:11]:
    print("library resident:", " ".join(line.split("*/")[1].split(";")[0].split()))
integers = sum(naive_mix[name] for name in ("IMAD", "IADD3", "LEA", "ISETP", "SEL"))
assert integers > 10 * naive_mix["FFMA"]

# %% [markdown]
# ## Where the floor is
#
# Once W_hh stays on the chip, a step is short, and mostly waiting: the next one cannot begin
# before the states of this one are there. **What follows is a model's, the one by which
# `gpurnn.plan` chooses: instruction counts and published latencies of an H100 with 132
# multiprocessors, counted at 1.755 GHz (it may clock higher). It has not been seen on a GPU.**
# [gpurnn/bench/floors.py](../gpurnn/bench/floors.py) bounds a step by its multiply-adds, by the
# bytes it must move on chip, and by the chain from one step's states to the next's. Such a chain
# is made of

# %%
from gpurnn import tuned
from gpurnn.bench import floors
from gpurnn.planning.group import group_plans
from gpurnn.planning.resident import resident_plans

assert H100.multiprocessors == 132 and H100.clock_ghz == 1.755
latencies = tuned.latencies(H100.name, H100.clock_ghz)
assert not latencies.measured, "estimates"
assert abs(latencies.l2 - floors.EXCHANGE / 2 / H100.clock_ghz) < 1
chain = {
    "a load from shared memory, as published": 29,
    "a load that the L2 cache answers": floors.EXCHANGE / 2,
    "a step within a block: shared memory, sum over lanes, φ, barrier": planning.LATENCY,
    "on top: to another block's shared memory, within a cluster": floors.CLUSTER_EXCHANGE,
    "or: to another block through the L2 cache, there and back": floors.EXCHANGE,
    "a launch": latencies.launch * H100.clock_ghz,
}
for link, cycles in chain.items():
    print(f"{link:<66} {cycles:6,.0f} cycles {cycles / H100.clock_ghz:6,.0f} ns")


def floor(n, h, device=H100):
    return floors.floor(n, h, "float32", device)


def us(cycles, device=H100):
    return cycles / device.clock_ghz / 1e3


assert H100.registers_per_multiprocessor == 256**2, "W_hh of h = 256 would fill all registers"
one, cluster = us(planning.LATENCY), us(planning.LATENCY + floors.CLUSTER_EXCHANGE)
for rows in (1, 32):
    assert math.isclose(floor(rows, 128).us_per_step, one) and floor(rows, 128).group == 1
assert math.isclose(floor(1, 512).us_per_step, cluster) and floor(1, 512).group == 8
assert floor(32, 1024).bound == "multiply-adds" and floor(32, 1024).us_per_step > 4 * cluster
A100 = planning.DEVICES["A100"]  # has no clusters
through_l2 = us(planning.LATENCY + floors.EXCHANGE, A100)
assert math.isclose(floor(1, 512, A100).us_per_step, through_l2)
print(f"\n{'n':>3} {'h':>5}   floor (µs a step)   set by            multiprocessors a copy of W_hh")
for rows, size in ((1, 128), (32, 128), (1, 256), (1, 512), (32, 512), (1, 1024), (32, 1024)):
    f = floor(rows, size)
    print(f"{rows:>3} {size:>5}   {f.us_per_step:>17.2f}   {f.bound:<15} {f.group:>6}")

# %% [markdown]
# At h = 128 the floor is the chain inside a block, the same for 1 row as for 32, which go to
# blocks of their own. Splitting W_hh shortens the arithmetic and adds an exchange, so the model
# splits only where the arithmetic in one block takes longer than that, or W_hh does not fit.
#
# Below, bars are what the planning model expects of the kernels as they are. Of a launch a step
# it counts the least: the launch, one answer from the L2 cache, and the multiply-adds on all
# multiprocessors. Strokes are the floors.

# %%
assert floor(1, 224).group == 1 and floor(1, 224).us_per_step < cluster < us(256**2 / 128)
assert floor(1, 256).group > 1

sizes = (64, 128, 256, 384, 512, 1024)
places = np.arange(len(sizes))


def model(rows, size):
    """Return µs a step: of the best resident and group plan, and of a launch a step at least."""
    one = resident_plans(rows, size, "float32", H100)
    split = group_plans(rows, size, "float32", "ieee", H100, Group())
    work = us(rows * size**2 / (128 * H100.multiprocessors))
    return (
        min((ns for ns, _ in one), default=math.nan) / 1e3,
        min(ns for ns, _ in split) / 1e3,
        (latencies.launch + latencies.l2) / 1e3 + work,
    )


with style.grid_of(1, 2, width=8.0, height=3.4, sharey=True) as [panels]:
    for axes, rows in zip(panels, (1, 32), strict=True):
        expected = np.array([model(rows, size) for size in sizes]).T
        least = np.array([floor(rows, size).us_per_step for size in sizes])
        labels = ("resident", "group", "a launch a step, at least")
        for i, (label, grey) in enumerate(zip(labels, ("0.25", "0.55", "0.85"), strict=True)):
            axes.bar(places + 0.27 * (i - 1), expected[i], 0.25, color=grey, label=label)
        axes.hlines(least, places - 0.42, places + 0.42, "0", linewidth=2, label="floor")
        axes.set_axisbelow(True)
        axes.set_xticks(places, sizes)
        axes.set_xlabel("h")
        axes.set_title(f"n = {rows}: a model's figures for an H100")
        assert not (expected < least).any(), "no kernel is expected below the floor"
        assert not (expected[:2] >= expected[2]).any(), "a launch a step takes longest"
        assert np.isnan(expected[0, 3:]).all(), "beyond h = 256 no block holds W_hh"
    panels[0].set_ylabel("µs a step")
    handles = panels[0].get_legend_handles_labels()
    panels[0].figure.legend(*handles, loc="outside lower center", ncols=4)

for rows, size, kernel in ((32, 128, "resident"), (32, 512, "group")):
    plan = gpurnn.plan(T=1000, n=rows, d=28, h=size, device="H100")
    print(f"n = {rows}, h = {size}\n{plan}\n")
    assert plan.kernel == kernel

# %% [markdown]
# ## What was shown
#
# - Naive, tiled, resident, group: the same sums in the same order, the same bits; all equal (9.4.5)
#   in NumPy, and so do the library's kernels, whichever way their blocks exchange the states.
# - A weight is read from global memory T · n times by the naive kernel, T · n / s times by the
#   tiled, once by each block of the resident, once by the whole group.
# - A missing barrier is found where it is missing, with both lines and both threads; so are a
#   barrier that not all reach, a read of what nobody wrote, and a flag that comes before its value.
# - W_hh is in registers if the loops over it are unrolled and it fits the 255 of a thread: at
#   h = 128 half of a step's instructions are then the product; at h = 256, written the same way,
#   it is in local memory.
# - By the model, not seen on a GPU: at h = 128 a step is bounded by its chain, not by arithmetic;
#   a group adds its exchange to that; a launch a step costs more than either.
