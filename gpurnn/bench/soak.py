"""Many launches of random shapes: nothing may hang, differ from one run to the next, or be wrong.

A trial draws a shape, and runs rnn_forward and rnn_backward on it twice; all results must be the
same bits. Now and then they are held against the float64 reference as well. Everything follows from
the seed and the trial's number.

A kernel takes seconds to compile, so trials are drawn from so many configurations (rows n, units h,
dtype, precision, activation, kernel); steps, inputs and all numbers are each trial's own.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpurnn import functional as F
from gpurnn import planning, reference, validate
from gpurnn.bench.common import ERROR_LIMITS
from gpurnn.bench.data import dtype_of, on_host
from gpurnn.cuda.engines import Engine, GPUEngine, cupy
from gpurnn.planning import Group

__all__ = [
    "EVERY",
    "LARGE",
    "SMALL",
    "SMALL_CARD",
    "Configuration",
    "Outcome",
    "Sizes",
    "SoakError",
    "Trial",
    "configurations",
    "configurations_for",
    "run_soak",
    "trial",
]

EVERY = 50
"""A trial in so many is held against the reference."""
FEW, MANY = 32, 256  # configurations
MANY_TRIALS = 10_000  # from which on there are as many

DTYPES = ("float32", "float32", "float32", "float16", "bfloat16", "float64")
PRECISIONS = ("ieee", "ieee", "tf32")
ACTIVATIONS = ("tanh", "tanh", "sigmoid", "relu", "softplus")
NAMES = ("H", "dX", "dh_0", "dW_xh", "dW_hh", "db_h")
SUMMED = ("dW_xh", "dW_hh", "db_h")  # over all rows of all steps


@dataclass(frozen=True)
class Sizes:
    """Largest sizes, of each dimension, of a (T, n, h) array, and of a group's blocks."""

    T: int
    n: int
    d: int
    h: int
    elements: int
    blocks: tuple[int, ...]


LARGE = Sizes(256, 128, 64, 2048, 1 << 20, (2, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64))
SMALL = Sizes(4, 3, 4, 9, 1 << 22, (2, 3, 4))

SMALL_CARD = planning.Limits("a small card", (9, 0), 4, 232_448, 233_472, 1.755)
"""What the emulator stands for: few multiprocessors, so that a launch has few threads."""


@dataclass(frozen=True)
class Configuration:
    """What decides which kernel is compiled."""

    n: int
    h: int
    dtype: str
    precision: str
    activation: str
    kernel: str | Group | None

    def refusal(self, device: planning.Limits) -> str:
        """Return why plan() refuses it, empty if it does not."""
        try:
            self.plan(device)
        except ValueError as e:
            return str(e)
        return ""

    def plan(self, device: planning.Limits) -> planning.Plan:
        """Return its plan, which does not depend on T and d."""
        return planning.plan(
            T=1,
            n=self.n,
            d=1,
            h=self.h,
            dtype=self.dtype,
            device=device,
            kernel=self.kernel,
            precision=self.precision,
        )


@dataclass(frozen=True)
class Trial:
    """One configuration with a shape and numbers; the same ``seed`` and ``index``, the same."""

    seed: int
    index: int
    configuration: Configuration
    T: int
    d: int
    ids: bool

    def __str__(self) -> str:
        c = self.configuration
        kernel = "chosen by plan()" if c.kernel is None else str(c.kernel)
        return (
            f"T {self.T}, n {c.n}, d {self.d}{' (ids)' if self.ids else ''}, h {c.h}, {c.dtype}, "
            f"{c.precision}, {c.activation}, kernel {kernel}; seed {self.seed}, index {self.index}"
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: why plan() refused it, or whether the reference was asked too."""

    trial: Trial
    refused: str = ""
    checked: bool = False


class SoakError(Exception):
    """A trial failed; the message says which, and how."""


def configurations(
    seed: int, count: int, kernel: str | None = None, *, sizes: Sizes = LARGE,
    dtypes: Sequence[str] = DTYPES, precisions: Sequence[str] = PRECISIONS,
) -> list[Configuration]:  # fmt: skip
    """Draw configurations, each from the seed and its number.

    ``kernel`` is that of all; "group" comes with wishes as well. None draws the kernel too.
    """
    found = []
    for number in range(count):
        rng = np.random.default_rng([seed, 0, number])
        dtype = str(rng.choice(dtypes))
        precision = str(rng.choice(precisions)) if dtype == "float32" else "ieee"
        found.append(
            Configuration(
                n=_size(rng, sizes.n),
                h=_size(rng, sizes.h),
                dtype=dtype,
                precision=precision,
                activation=str(rng.choice(ACTIVATIONS)),
                kernel=_kernel(rng, kernel, sizes),
            )
        )
    return found


def configurations_for(count: int) -> int:
    """Return how many configurations so many trials are drawn from."""
    return FEW if count < MANY_TRIALS else MANY


def trial(seed: int, index: int, pool: Sequence[Configuration], *, sizes: Sizes = LARGE) -> Trial:
    """Draw a trial from the configurations."""
    rng = np.random.default_rng([seed, 1, index])
    configuration = pool[int(rng.integers(len(pool)))]
    most = max(1, min(sizes.T, sizes.elements // (configuration.n * configuration.h)))
    T, d = _size(rng, most), _size(rng, sizes.d)
    ids = bool(rng.random() < 0.3) and configuration.kernel != "concatenated"
    return Trial(seed, index, configuration, T, d, ids)


def run_soak(
    count: int,
    *,
    seed: int = 0,
    kernel: str | None = None,
    engine: Engine | None = None,
    sizes: Sizes = LARGE,
    pool: Sequence[Configuration] | None = None,
    every: int = EVERY,
    limit: float | None = None,
) -> Iterator[Outcome]:
    """Run so many trials; yield what became of each.

    Args:
        count: trials. seed: of all that is drawn.
        kernel: one of ``planning.KERNELS``, or None to draw it.
        engine: where; CuPy's current device by default. The emulator's must be the ``emulated()``
            around.
        sizes: the largest.
        pool: configurations; by default 32, or 256 for 10,000 trials and more.
        every: how many trials of which one is held against the reference.
        limit: seconds after which no further trial is begun.

    Raises:
        SoakError: a trial failed.
    """
    engine = engine or GPUEngine(cupy().cuda.Device().id)
    if pool is None:
        pool = configurations(seed, configurations_for(count), kernel, sizes=sizes)
    refusals = {c: c.refusal(engine.limits) for c in pool}
    begun = time.monotonic()
    for index in range(count):
        if limit is not None and time.monotonic() - begun > limit:
            break
        drawn = trial(seed, index, pool, sizes=sizes)
        refused = refusals[drawn.configuration]
        checked = not refused and index % every == 0
        if not refused:
            _run(drawn, engine, checked=checked)
        yield Outcome(drawn, refused, checked)


def _size(rng: np.random.Generator, most: int) -> int:
    """Draw a size: each as likely, or each order of magnitude; now and then a power of two."""
    size = int(rng.integers(1, most + 1))
    if rng.random() < 0.5:
        size = int(np.exp(rng.uniform(0, np.log(most + 1))))
    if rng.random() < 0.3:
        size = 1 << (size.bit_length() - 1)
    return max(1, min(most, size))


def _kernel(rng: np.random.Generator, name: str | None, sizes: Sizes) -> str | Group | None:
    chosen = name
    if name is None:
        kernels = (None, *planning.KERNELS, "group", "group")
        chosen = kernels[int(rng.integers(len(kernels)))]
    if chosen != "group" or rng.random() < 0.2:
        return chosen
    exchange = (None, *planning.EXCHANGES)[int(rng.integers(1 + len(planning.EXCHANGES)))]
    rows = int(rng.integers(1, 5)) if rng.random() < 0.5 else None
    return Group(int(rng.choice(sizes.blocks)), exchange, rows)


@contextmanager
def _failing(what: object) -> Iterator[None]:
    """Make a ``SoakError`` that says in which trial of whatever is raised."""
    try:
        yield
    except SoakError:
        raise
    except Exception as e:
        raise SoakError(f"{what}: {type(e).__name__}: {e}") from e


def _run(drawn: Trial, engine: Engine, *, checked: bool) -> None:
    with _failing(drawn), engine.here():
        arguments, dH = _numbers(drawn)
        there = [None if a is None else engine.xp.asarray(a) for a in arguments]
        there_dH = engine.xp.asarray(dH)
        once, again = (_both(drawn, there, there_dH) for _ in range(2))
        for name, a, b in zip(NAMES, once, again, strict=True):
            if a is not None and not _same_bits(a, b):
                raise SoakError(f"{drawn}: {name} differs from one run to the next")
        engine.check_reports()  # what was compared has been waited for
        if checked:
            _compare(drawn, once, arguments, dH)


def _numbers(drawn: Trial) -> tuple[list[Any], Any]:
    """Return X, h_0, W_xh, W_hh, b_h and dH; states neither vanish nor explode."""
    c = drawn.configuration
    T, n, d, h, dtype = drawn.T, c.n, drawn.d, c.h, dtype_of(c.dtype)
    rng = np.random.default_rng([drawn.seed, 2, drawn.index])

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return (scale * rng.standard_normal(shape, np.float32)).astype(dtype)

    X = rng.integers(0, d, (T, n)) if drawn.ids else normal(T, n, d)
    h_0 = normal(n, h, scale=0.5) if rng.random() < 0.8 else None
    W_xh, W_hh = normal(d, h, scale=d**-0.5), normal(h, h, scale=0.9 * h**-0.5)
    b_h = normal(h, scale=0.5) if rng.random() < 0.8 else None
    return [X, h_0, W_xh, W_hh, b_h], normal(T, n, h)


def _both(drawn: Trial, arguments: Sequence[Any], dH: Any) -> tuple[Any, ...]:
    c = drawn.configuration
    H, residuals = F.rnn_forward(
        *arguments, activation=c.activation, kernel=c.kernel, precision=c.precision
    )
    return (H, *F.rnn_backward(dH, residuals))


def _same_bits(a: Any, b: Any) -> bool:
    words = np.dtype(f"u{a.itemsize}")
    return a.dtype == b.dtype and bool((a.view(words) == b.view(words)).all())


def _compare(drawn: Trial, found: Sequence[Any], arguments: Sequence[Any], dH: Any) -> None:
    """Hold results against the reference, in float64 on the very numbers.

    ‖result − reference‖ may be ``ERROR_LIMITS`` of the dtype (float16's for TF32) times
    ‖reference‖, or times that of numbers of size 1 (of size √(T n) where so many are summed) if
    that is more. Of relu only H is compared: rounding carries what it is applied to across its
    kink.
    """
    c = drawn.configuration
    limit = ERROR_LIMITS["float16" if c.precision == "tf32" else c.dtype]
    X, h_0, W_xh, W_hh, b_h = (
        a if a is None or a.dtype.kind == "i" else a.astype(np.float64) for a in arguments
    )
    phi = validate.activation(c.activation)
    states, Z = reference.rnn_forward(X, h_0, W_xh, W_hh, b_h, phi)
    gradients = reference.rnn_backward(dH.astype(np.float64), X, states, Z, W_xh, W_hh, phi, None)
    truth = (states[1:], *gradients)
    for name, a, b in zip(NAMES, found, truth, strict=True):
        if a is None or b is None or (c.activation == "relu" and name != "H"):
            continue
        usual = b.size**0.5 * ((drawn.T * c.n) ** 0.5 if name in SUMMED else 1)
        error = float(np.linalg.norm(on_host(a) - b))
        allowed = limit * max(float(np.linalg.norm(b)), usual)
        if not error <= allowed:
            raise SoakError(
                f"{drawn}: {name} is off the reference by {error:.3g}, expected at most "
                f"{allowed:.3g}"
            )
