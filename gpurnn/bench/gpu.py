"""Speed of the kernels on a GPU, after their results have been checked, and of others beside them.

Everything is written against an ``Engine`` and a ``Clock``, so that it also runs in the emulator.

A check runs the whole pass, forward and backward, on the first steps of the same problem, and holds
it against the float64 reference. The problem that is timed repeats those steps along time.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpurnn.bench.clocks import Clock, GPUClock, NotCapturedError, Pass
from gpurnn.bench.common import ERROR_LIMITS, Figure, Problem, Shape, relative_error
from gpurnn.bench.data import Data, exact_results, on_host
from gpurnn.bench.due import Due, LateError
from gpurnn.bench.floors import estimate, floor
from gpurnn.bench.launches import RecordingEngine
from gpurnn.bench.peers import MakePeer, peers_for
from gpurnn.bench.runs import GPU_RUNS, Run
from gpurnn.cuda import operations
from gpurnn.cuda.engines import Engine, GPUEngine, cupy

__all__ = ["measure_gpu"]

SAME = "the same floats"
ONE_HOT = "one-hot floats of our ids, made before the clock starts; no gradient of them"
TF32_LIMIT = ERROR_LIMITS["float16"]  # TF32's products have as many digits as float16
CHECKED_WORK = 1 << 28  # n h² of all checked steps
MOST_CHECKED_STEPS = 64


def measure_gpu(
    *,
    seconds: float = 0.15,
    limit: float | None = None,
    runs: Sequence[Run] = GPU_RUNS,
    engine: Engine | None = None,
    clock: Clock | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one record per run: error, times, floor, peers and the ratios to them.

    What fails, or is wrong, is not timed: a run or a peer then has ``failed``, the reason, in place
    of its figures.

    Args:
        seconds: to spend on each figure.
        limit: seconds after which nothing new is begun, no run, figure or peer; what was left out
            is told by ``left_out``, in place of a run's, a peer's or a graph's figures.
        runs: what to measure.
        engine: where; CuPy's current device by default.
        clock: what times; CUDA events and the host's clock by default.
    """
    engine = engine or GPUEngine(cupy().cuda.Device().id)
    clock = clock or GPUClock()
    due = Due(limit)
    clock = _Punctual(clock, due)
    for run in runs:
        try:
            due.check()
            with engine.here():
                record = _measure(run, engine, clock, due, seconds)
        except LateError as e:
            record = {**run.about(), "left_out": str(e)}
        except Exception as e:  # one run must not lose the others' figures
            record = {**run.about(), "failed": f"{type(e).__name__}: {e}"}
        yield record
        _free(engine)


class _Punctual:
    """A clock that begins no figure when the time is used up."""

    def __init__(self, clock: Clock, due: Due) -> None:
        self.clock, self.due = clock, due

    def device(self, run: Pass, seconds: float) -> Figure:
        self.due.check()
        return self.clock.device(run, seconds)

    def wall(self, run: Pass, seconds: float) -> Figure:
        self.due.check()
        return self.clock.wall(run, seconds)

    def host(self, run: Pass, seconds: float) -> Figure:
        self.due.check()
        return self.clock.host(run, seconds)

    def graph(self, run: Pass, seconds: float) -> Figure:
        self.due.check()
        return self.clock.graph(run, seconds)


def _measure(run: Run, engine: Engine, clock: Clock, due: Due, seconds: float) -> dict[str, Any]:
    shape, limit = run.shape, _error_limit(run)
    steps = min(
        shape.T,
        max(4, min(MOST_CHECKED_STEPS, CHECKED_WORK // (shape.n * shape.h**2))),
    )
    problem = Problem(Shape(steps, shape.n, shape.d, shape.h))
    short = Data.of(problem, run, engine, steps)
    exact = exact_results(problem, run)
    found = [on_host(a) for a in short.both(run.kernel) if a is not None]
    record: dict[str, Any] = {
        **run.about(),
        "error": relative_error(found, exact, f"{shape}, {run.dtype}", limit),
        "checked_steps": steps,
    }
    long = Data.of(problem, run, engine, shape.T)
    times = _times(run, long, engine, clock, seconds, record)
    record["us_per_step"] = {
        name: f["median"] / shape.T for name, f in times.items() if "median" in f
    }
    record["times_us"] = times
    half = run.precision == "ieee" and run.dtype in ("float16", "bfloat16")
    on_tensor_cores = record["kernel"] in ("group", "gemm")  # the others know none
    tensor = on_tensor_cores and (half or run.precision == "tf32")
    bound = floor(shape.n, shape.h, run.dtype, engine.limits, tensor=tensor)
    by_hand = None if tensor else estimate(shape.n, shape.h, run.dtype, engine.limits)
    record["floor"] = {
        **vars(bound),
        "assumes": "tensor cores" if tensor else "no tensor cores",
        "estimate_us_per_step": by_hand,
    }
    if record["kernel"] != "concatenated":  # whose kernel makes the input's product too
        record["over_floor"] = {
            name: taken / bound.us_per_step
            for name, taken in record["us_per_step"].items()
            if name.startswith("recurrence_")
        }
    if run.peers:
        record["peers"] = _peers(run, short, long, exact, engine, clock, due, seconds)
        record["ratios"] = _ratios(times, record["peers"])
    return record


def _error_limit(run: Run) -> float:
    return TF32_LIMIT if run.precision == "tf32" else ERROR_LIMITS[run.dtype]


def _times(
    run: Run, data: Data, engine: Engine, clock: Clock, seconds: float, record: dict[str, Any]
) -> dict[str, Any]:
    def forward() -> object:
        return data.forward(run.kernel)

    def both() -> object:
        return data.both(run.kernel)

    _, residuals = data.forward(run.kernel)
    record["plan"] = str(residuals.plan)
    record["kernel"] = residuals.plan.kernel
    ahead, back = RecordingEngine(engine), RecordingEngine(engine)
    phi = residuals.activation
    X, h_0, W_xh, W_hh, b_h = data.arguments
    operations.rnn_forward(ahead, run.kernel, X, h_0, W_xh, W_hh, b_h, phi, run.precision)
    r = residuals
    operations.rnn_backward(back, r.plan, data.dH, r.X, r.states, r.Z, r.W_xh, r.W_hh, phi, None)
    record["launches"] = {"forward": ahead.count, "backward": back.count}
    times = {
        "recurrence_forward": clock.device(ahead.replay, seconds),
        "recurrence_backward": clock.device(back.replay, seconds),
        "forward": clock.device(forward, seconds),
        "forward_backward": clock.device(both, seconds),
        "forward_wall": clock.wall(forward, seconds),
        "forward_backward_wall": clock.wall(both, seconds),
        "forward_host": clock.host(forward, seconds),
    }
    graphs: dict[str, Callable[[], object]] = {}
    if ahead.count > 1 or run.group == "book":
        graphs = {
            "recurrence_forward_graph": ahead.replay,
            "recurrence_backward_graph": back.replay,
        }
    if run.group == "book":
        graphs |= {"forward_graph": forward, "forward_backward_graph": both}
    for name, replayed in graphs.items():
        try:
            times[name] = clock.graph(replayed, seconds)
        except NotCapturedError as e:
            times[name] = {"failed": str(e)}
        except LateError as e:
            times[name] = {"left_out": str(e)}
    return times


def _peers(
    run: Run,
    short: Data,
    long: Data,
    exact: list[Any],
    engine: Engine,
    clock: Clock,
    due: Due,
    seconds: float,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, make in peers_for(run.dtype).items():
        if name == "jax_scan" and not run.jax:
            continue
        try:
            due.check()
            found[name] = _peer(name, make, run, short, long, exact, engine, clock, seconds)
        except LateError as e:
            found[name] = {"left_out": str(e)}
        except Exception as e:  # whatever another library raises: our own figures must not be lost
            found[name] = {"failed": f"{type(e).__name__}: {e}"}
        _free(engine)
    return found


def _peer(
    name: str,
    make: MakePeer,
    run: Run,
    short: Data,
    long: Data,
    exact: list[Any],
    engine: Engine,
    clock: Clock,
    seconds: float,
) -> dict[str, Any]:
    wants_dX = not run.ids  # what we do not compute either is not asked for
    small = make(short.as_floats(engine), short.dH, wants_dX)
    with small.setting():
        came = small.results()
    limit = TF32_LIMIT if name == "torch_tf32" else ERROR_LIMITS[run.dtype]
    record: dict[str, Any] = {
        "error": relative_error(came, exact[: len(came)], name, limit),
        "input": ONE_HOT if run.ids else SAME,
    }
    peer = make(long.as_floats(engine), long.dH, wants_dX)
    timed = clock.device if peer.on_stream else clock.wall
    with peer.setting():
        record["forward"] = timed(peer.forward, seconds)
        if peer.both is not None:
            record["forward_backward"] = timed(peer.both, seconds)
    record["timed"] = "device" if peer.on_stream else "wall"
    return record


def _ratios(times: dict[str, Any], peers: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return peer's time / our time for each peer and pass; above 1 we are the faster."""
    found: dict[str, dict[str, float]] = {}
    for name, peer in peers.items():
        if "timed" not in peer:
            continue  # failed, or left out
        suffix = "_wall" if peer["timed"] == "wall" else ""
        found[name] = {
            what: peer[what]["median"] / times[f"{what}{suffix}"]["median"]
            for what in ("forward", "forward_backward")
            if what in peer
        }
    return found


def _free(engine: Engine) -> None:
    """Give memory that is free in CuPy's pool back, for the peers, and theirs for us."""
    if isinstance(engine, GPUEngine):
        cupy().get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
