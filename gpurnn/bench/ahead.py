"""Compile many kernels at once, in processes beside each other, before they are needed.

A kernel takes seconds to compile, and a process compiles one at a time. What is compiled here is
found again in the folder of compiled kernels (``gpurnn.cuda.machine_code``).
"""

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from gpurnn import planning
from gpurnn.bench.common import Shape
from gpurnn.bench.runs import Run
from gpurnn.bench.soak import configurations, configurations_for
from gpurnn.cuda.engines import cupy, limits_of
from gpurnn.cuda.machine_code import cubin
from gpurnn.cuda.operations import specs_of_sum
from gpurnn.cuda.specs import KernelSpec, Kind

__all__ = ["compile_ahead", "compile_runs", "compile_soak", "specs_of"]

MOST_PROCESSES = 12

KINDS: dict[str, tuple[Kind, ...]] = {
    "resident": ("resident_forward", "resident_backward"),
    "group": ("group_forward", "group_backward"),
    "step": ("step_forward", "step_backward"),
    "concatenated": ("step_concatenated", "step_backward"),
    "gemm": ("tail_forward", "layer_backward", "tail_backward"),
}
BY_ID: tuple[Kind, ...] = ("resident_forward", "group_forward", "step_forward")


def specs_of(
    shape: Shape,
    dtype: str,
    kernel: str | planning.Group | None,
    device: planning.Limits,
    precision: str = "ieee",
    activation: str = "tanh",
    *,
    by_id: bool = False,
) -> list[KernelSpec]:
    """Return the kernels that a pass takes, forward and backward, but for the scatter of ids.

    ``by_id``: X holds token ids, whose rows of W_xh the forward kernel looks up itself.
    """
    plan = planning.plan(
        **vars(shape), dtype=dtype, device=device, kernel=kernel, precision=precision
    )
    sizes = None if plan.kernel == "gemm" else plan.tile or planning.SIDE
    found = [
        KernelSpec(
            kind, sizes, activation, dtype, exchange=plan.exchange, by_id=by_id and kind in BY_ID
        )
        for kind in KINDS[plan.kernel]
    ]
    rows = shape.T * shape.n
    if by_id and dtype in ("float32", "float64"):
        rows = min(rows, shape.d)
    return found + specs_of_sum(rows, dtype)


def compile_runs(runs: Sequence[Run], *, limit: float | None = None) -> list[str]:
    """Compile what runs of the benchmark take on CuPy's current device; return what failed.

    ``limit``: seconds after which no further compilation is begun.
    """
    device = limits_of(cupy().cuda.Device().id)
    specs = [
        spec
        for run in runs
        for spec in specs_of(run.shape, run.dtype, run.kernel, device, run.precision, by_id=run.ids)
    ]
    return compile_ahead(specs, device.compute_capability, limit=limit)


def compile_soak(
    count: int, seed: int, kernel: str | None, *, limit: float | None = None
) -> list[str]:
    """Compile what a soak (``gpurnn.bench.soak``) takes likewise."""
    device = limits_of(cupy().cuda.Device().id)
    specs = [
        spec
        for c in configurations(seed, configurations_for(count), kernel)
        if not c.refusal(device)
        for spec in specs_of(
            Shape(1, c.n, 1, c.h), c.dtype, c.kernel, device, c.precision, c.activation
        )
    ]
    return compile_ahead(specs, device.compute_capability, limit=limit)


def compile_ahead(
    specs: Iterable[KernelSpec],
    compute_capability: tuple[int, int],
    *,
    processes: int | None = None,
    limit: float | None = None,
) -> list[str]:
    """Compile each of these kernels, unless it is kept already; return what failed, in words.

    With one processor nothing is done: there is nothing to be gained. ``limit``: seconds after
    which no further one is begun; what is under way is waited for.
    """
    wanted = list(dict.fromkeys(specs))
    at_once = min(processes or os.cpu_count() or 1, MOST_PROCESSES, len(wanted))
    if at_once < 2:
        return []
    # not forked: a process that uses the GPU cannot be
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=context) as pool:
        jobs = [pool.submit(_compile_one, (spec, compute_capability)) for spec in wanted]
        try:
            wait(jobs, limit if limit is None else max(0.0, limit))
        finally:  # also where it is stopped: what has not been begun is not waited for
            for job in jobs:
                job.cancel()
        cut = sum(job.cancelled() for job in jobs)
        told = [_outcome(job) for job in jobs if not job.cancelled()]
    if cut:
        told.append(f"{cut} of {len(jobs)} kernels: the time limit was reached")
    return [failure for failure in told if failure]


def _outcome(job: Future[str]) -> str:
    try:
        return job.result()
    except BrokenProcessPool as e:  # a process was killed, for its memory say
        return f"{type(e).__name__}: {e}"


def _compile_one(job: tuple[KernelSpec, tuple[int, int]]) -> str:
    spec, compute_capability = job
    try:
        cubin(spec, compute_capability)
    except Exception as e:  # told to the parent, which goes on: whoever needs it fails again
        return f"{spec.kind} {_sizes(spec.sizes)} {spec.dtype}: {type(e).__name__}: {e}"
    return ""


def _sizes(sizes: object) -> str:
    return str(tuple(sizes)) if isinstance(sizes, Sequence) else str(sizes)
