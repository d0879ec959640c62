"""What a GPU takes for the things that a step of a group kernel is made of, measured by probes.

Each probe (``gpurnn.kernels.probes``) runs with few and with many repetitions in one launch; a
repetition takes the difference of the two over the difference in number, so that launches, and the
clearing of counters between, do not count. Its result is checked before it is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpurnn import tuned
from gpurnn.bench.clocks import Clock, GPUClock
from gpurnn.bench.common import Figure
from gpurnn.cuda import reports
from gpurnn.cuda.engines import Engine, GPUEngine, cupy
from gpurnn.cuda.specs import KernelSpec, Kind
from gpurnn.tile import LINE
from gpurnn.tuned import CLUSTERS, Latencies

__all__ = ["FEW", "MANY", "Probed", "measure_probes", "write_probes"]

FEW, MANY = 256, 4096
PLACES = 4096  # of the chain through L2, each in a line of its own: 512 KiB
THREADS = 256  # of a block at barriers
PORTABLE = 8

Note = Callable[[str], None]


@dataclass(frozen=True)
class Probed:
    """What has been found: latencies as the table has them, and the figures behind them.

    A figure, by name, is {"ns": median, "quartiles": [from, to]}, or why there is none: {"failed":
    …}, {"left_out": …}. Where there is none, the latency is an estimate. cluster_stores_… is a
    barrier behind a store of each thread to global memory; no latency is made of it.
    """

    name: str
    clock_ghz: float
    latencies: Latencies
    figures: dict[str, dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {"gpu": self.name, "clock_ghz": self.clock_ghz, "figures": self.figures}


def measure_probes(
    *,
    seconds: float = 0.1,
    engine: Engine | None = None,
    clock: Clock | None = None,
    few: int = FEW,
    many: int = MANY,
    threads: int = THREADS,
    note: Note = lambda _: None,
) -> Probed:
    """Run all probes.

    Args:
        seconds: to spend on each of a probe's two timings.
        engine: where; CuPy's current device by default.
        clock: what times; CUDA events by default.
        few, many: repetitions in a launch. threads: of a block, where a barrier is timed.
        note: is told of what cannot be measured.

    Raises:
        RuntimeError: a probe does not do what it is timed for.
    """
    engine = engine or GPUEngine(cupy().cuda.Device().id)
    clock = clock or GPUClock()
    limits = engine.limits
    guess = tuned.latencies(limits.name, limits.clock_ghz)
    with engine.here():
        timing = _Timing(engine, clock, seconds, few, many, threads)
        figures: dict[str, dict[str, Any]] = {"launch": timing.launch(), "l2": timing.l2()}
        figures["flag"] = timing.flag()
        sizes = [b for b in (2, 8, 32) if b < limits.multiprocessors]
        for blocks in (*sizes, limits.multiprocessors):
            figures[f"counter_{blocks}"] = timing.counter(blocks)
        for size in CLUSTERS:
            names = f"cluster_{size}", f"cluster_stores_{size}"
            if size > limits.largest_cluster:
                left_out = f"{limits.name} has no clusters of {size}"
                figures |= {name: {"left_out": left_out} for name in names}
                continue
            try:
                for name, stores in zip(names, (False, True), strict=True):
                    figures[name] = timing.cluster(size, stores=stores)
            except RuntimeError as e:
                if size <= PORTABLE:
                    raise
                # larger ones a GPU may refuse: some have parts with too few multiprocessors
                figures |= {name: {"failed": str(e)} for name in names}
                note(f"no clusters of {size}: {e}")
        if limits.largest_cluster:
            figures["remote_shared"] = timing.remote()
        else:
            figures["remote_shared"] = {"left_out": f"{limits.name} has no clusters"}
    return Probed(limits.name, limits.clock_ghz, _latencies(figures, guess), figures)


def write_probes(probed: Probed, path: Any, environment: dict[str, Any]) -> None:
    """Write what has been found into a table (``gpurnn.tuned``), with what it depends on.

    Raises:
        ValueError: the file is there and is no such table.
        OSError: it cannot be written.
    """
    about = {"environment": environment, "figures": probed.figures}
    tuned.write(path, probed.name, probed.latencies, clock_ghz=probed.clock_ghz, about=about)


def _latencies(figures: dict[str, dict[str, Any]], guess: Latencies) -> Latencies:
    def of(kind: str) -> tuple[tuple[int, float], ...]:
        found = ((name.rpartition("_"), f) for name, f in figures.items() if "ns" in f)
        return tuple(sorted((int(at), f["ns"]) for (what, _, at), f in found if what == kind))

    return Latencies(
        launch=figures["launch"]["ns"],
        l2=figures["l2"]["ns"],
        remote_shared=figures["remote_shared"].get("ns", guess.remote_shared),
        flag=figures["flag"]["ns"],
        counter=of("counter"),
        cluster=of("cluster"),
        measured=True,
    )


def _spec(kind: Kind) -> KernelSpec:
    return KernelSpec(kind, None, "tanh", "float32")


@dataclass(frozen=True)
class _Timing:
    """Probes in one place, by one clock."""

    engine: Engine
    clock: Clock
    seconds: float
    few: int
    many: int
    threads: int

    def launch(self) -> dict[str, Any]:
        def nothing() -> None:
            self.engine.launch(_spec("probe_launch"), (1, 1, 1), (32, 1, 1), ())

        figure = self.clock.device(nothing, self.seconds)
        low, high = figure["quartiles"]
        return {"ns": 1e3 * figure["median"], "quartiles": [1e3 * low, 1e3 * high]}

    def l2(self) -> dict[str, Any]:
        xp = self.engine.xp
        order = np.random.default_rng(0).permutation(np.arange(1, PLACES))
        order = np.concatenate([[0], order])
        line = 2 * LINE  # uint32 of a line
        lines = np.zeros((PLACES, line), np.uint32)
        lines[order, 0] = np.roll(order, -1) * line
        chain, found = xp.asarray(lines.reshape(-1)), xp.zeros(1, np.uint32)

        def run(steps: int) -> None:
            self.engine.launch(_spec("probe_l2"), (1, 1, 1), (1, 1, 1), (chain, found), [(steps,)])

        run(self.few)
        _check("probe_l2", found, order[self.few % PLACES] * line)
        return self._per_step(run)

    def remote(self) -> dict[str, Any]:
        from gpurnn.kernels.probes import REMOTE_LENGTH, REMOTE_STRIDE

        found = self.engine.xp.zeros(2, np.uint32)

        def run(steps: int) -> None:
            self.engine.launch(
                _spec("probe_remote"), (2, 1, 1), (32, 1, 1), (found,), [(steps,)], cluster=2
            )

        run(self.few)
        _check("probe_remote", found, self.few * REMOTE_STRIDE % REMOTE_LENGTH)
        return self._per_step(run)

    def cluster(self, size: int, *, stores: bool) -> dict[str, Any]:
        kind: Kind = "probe_cluster_stores" if stores else "probe_cluster"
        found = self.engine.xp.zeros(size * (self.threads if stores else 1), np.uint32)

        def run(steps: int) -> None:
            grid, block = (size, 1, 1), (self.threads, 1, 1)
            self.engine.launch(_spec(kind), grid, block, (found,), [(steps,)], cluster=size)

        run(self.few)
        _check(kind, found, self.few)
        return self._per_step(run)

    def flag(self) -> dict[str, Any]:
        """One way: half of there and back."""
        words = self.engine.xp.zeros(LINE + 1, np.uint64)
        run = self._with_words("probe_flag", words, 2, 1)
        run(self.few)
        _check("probe_flag", words[::LINE], np.array([-1, 0]) + 2 * self.few + (self.few << 32))
        found = self._per_step(run)
        return {
            "ns": found["ns"] / 2,
            "quartiles": [ns / 2 for ns in found["quartiles"]],
        }

    def counter(self, blocks: int) -> dict[str, Any]:
        words = self.engine.xp.zeros(1, np.uint64)
        run = self._with_words("probe_counter", words, blocks, self.threads)
        run(self.few)
        _check("probe_counter", words, blocks * self.few)
        return self._per_step(run)

    def _with_words(
        self, kind: Kind, words: Any, blocks: int, threads: int
    ) -> Callable[[int], None]:
        report = self.engine.xp.zeros(blocks, np.uint32)

        def run(steps: int) -> None:
            words.fill(0)
            self.engine.launch(
                _spec(kind),
                (blocks, 1, 1),
                (threads, 1, 1),
                (words, report),
                [(steps, reports.PATIENCE)],
                cooperative=True,
            )

        return run

    def _per_step(self, run: Callable[[int], None]) -> dict[str, Any]:
        few = self.clock.device(lambda: run(self.few), self.seconds)
        many = self.clock.device(lambda: run(self.many), self.seconds)
        return _difference(few, many, self.many - self.few)


def _difference(few: Figure, many: Figure, steps: int) -> dict[str, Any]:
    """Return nanoseconds of a step; quartiles as far apart as those of both may be.

    Raises:
        RuntimeError: many repetitions take no longer than few.
    """
    ns = 1e3 / steps
    (few_low, few_high), (many_low, many_high) = few["quartiles"], many["quartiles"]
    median = ns * (many["median"] - few["median"])
    if not median > 0:
        raise RuntimeError(
            f"{steps} more repetitions of a probe take {median * steps:.0f} ns: expected more than "
            "none"
        )
    return {
        "ns": median,
        "quartiles": [ns * (many_low - few_high), ns * (many_high - few_low)],
    }


def _check(name: str, found: Any, expected: Any) -> None:
    there = found if isinstance(found, np.ndarray) else found.get()
    if not (there == expected).all():
        raise RuntimeError(f"{name} wrote {there}: expected {expected}; it is not timed")
