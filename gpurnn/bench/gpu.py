"""Speed of the kernels on a GPU, after their results have been checked, and of others beside them.

Everything is written against an ``Engine`` and a ``Clock``, so that it also runs in the emulator.

A check runs the whole pass, forward and backward, on the first steps of the same problem, and holds
it against the float64 reference. The problem that is timed repeats those steps along time.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpurnn.bench.clocks import Clock, GPUClock, NotCapturedError
from gpurnn.bench.common import ERROR_LIMITS, Problem, Shape, relative_error
from gpurnn.bench.data import Data, exact_results, on_host
from gpurnn.bench.floors import estimate, floor
from gpurnn.bench.launches import RecordingEngine
from gpurnn.bench.peers import Peer, peers_for
from gpurnn.bench.runs import GPU_RUNS, Run
from gpurnn.cuda import operations
from gpurnn.cuda.engines import Engine, GPUEngine, cupy

__all__ = ["measure_gpu"]

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
        limit: seconds after which nothing new is begun; what was left out is yielded as a record
            with ``left_out``.
        runs: what to measure.
        engine: where; CuPy's current device by default.
        clock: what times; CUDA events and the host's clock by default.
    """
    engine = engine or GPUEngine(cupy().cuda.Device().id)
    clock = clock or GPUClock()
    begun = time.perf_counter()
    for run in runs:
        if limit is not None and time.perf_counter() - begun > limit:
            yield {**run.about(), "left_out": f"the limit of {limit:g} seconds was reached"}
            continue
        try:
            with engine.here():
                record = _measure(run, engine, clock, seconds)
        except Exception as e:  # one run must not lose the others' figures
            record = {**run.about(), "failed": f"{type(e).__name__}: {e}"}
        yield record
        _free(engine)


def _measure(run: Run, engine: Engine, clock: Clock, seconds: float) -> dict[str, Any]:
    shape, limit = run.shape, ERROR_LIMITS[run.dtype]
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
    bound = floor(shape.n, shape.h, run.dtype, engine.limits)
    record["floor"] = {**vars(bound), "estimate_us_per_step": estimate(shape.n, shape.h)}
    record["over_floor"] = {
        name: record["us_per_step"][name] / bound.us_per_step
        for name in ("recurrence_forward", "recurrence_backward")
    }
    if run.peers:
        record["peers"] = _peers(run, short, long, exact, engine, clock, seconds)
        record["ratios"] = _ratios(times, record["peers"])
    return record


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
    operations.rnn_forward(ahead, run.kernel, X, h_0, W_xh, W_hh, b_h, phi)
    r = residuals
    operations.rnn_backward(back, r.plan, data.dH, r.X, r.states, r.Z, r.W_xh, r.W_hh, phi, None)
    record["launches"] = {"forward": len(ahead.launches), "backward": len(back.launches)}
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
    if len(ahead.launches) > 1 or run.group == "book":
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
    return times


def _peers(
    run: Run,
    short: Data,
    long: Data,
    exact: list[Any],
    engine: Engine,
    clock: Clock,
    seconds: float,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, make in peers_for(run.dtype).items():
        if name == "jax_scan" and not run.jax:
            continue
        try:
            found[name] = _peer(name, make, run, short, long, exact, engine, clock, seconds)
        except Exception as e:  # whatever another library raises: our own figures must not be lost
            found[name] = {"failed": f"{type(e).__name__}: {e}"}
        _free(engine)
    return found


def _peer(
    name: str,
    make: Callable[[tuple[Any, ...], Any], Peer],
    run: Run,
    short: Data,
    long: Data,
    exact: list[Any],
    engine: Engine,
    clock: Clock,
    seconds: float,
) -> dict[str, Any]:
    small = make(short.as_floats(engine), short.dH)
    with small.setting():
        came = small.results()
    if run.ids and len(came) > 1:
        del came[1]  # its gradient of the one-hot matrix, which ids do not have
    wide = ERROR_LIMITS["float16"]  # of TF32's products: as many digits as float16 has
    limit = wide if name == "torch_tf32" else ERROR_LIMITS[run.dtype]
    record: dict[str, Any] = {"error": relative_error(came, exact[: len(came)], name, limit)}
    peer = make(long.as_floats(engine), long.dH)
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
        if "failed" in peer:
            continue
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
