"""Kernels of the language model, compiled many at once."""

from collections.abc import Sequence

from gpurnn import planning
from gpurnn.bench.ahead import compile_ahead, specs_of
from gpurnn.bench.common import Shape
from gpurnn.bench.lm.runs import GenerateRun, LMRun, TrainRun
from gpurnn.cuda.engines import cupy, limits_of
from gpurnn.cuda.losses import ONE_BLOCK, softmax_sizes
from gpurnn.cuda.operations import specs_of_sum
from gpurnn.cuda.specs import KernelSpec
from gpurnn.slots import Updating

__all__ = ["compile_lm", "spec_of_generation", "specs_of_training"]

DTYPE = "float32"


def specs_of_training(run: TrainRun, q: int, device: planning.Limits) -> list[KernelSpec]:
    """Return the kernels of a training step with Adam, without a carried state."""

    def other(kind: str, sizes: object) -> KernelSpec:
        return KernelSpec(kind, sizes, "identity", DTYPE)  # type: ignore[arg-type]

    scatter = planning.scatter_plan(run.T * run.n, q, run.h, DTYPE, device)
    whole = scatter.parts == 1
    return [
        *specs_of(Shape(run.T, run.n, q, run.h), DTYPE, None, device, by_id=True),
        other("take_batch", None),
        other("cross_entropy", softmax_sizes(q, biased=True)),
        other("loss_mean", ONE_BLOCK),
        *specs_of_sum(run.T * run.n, DTYPE),
        other("scatter" if whole else "scatter_parts", scatter.tile),
        *([] if whole else [other("scatter_parts_added", None)]),
        other("update_norm", Updating("adamw")),
        other("update_apply", Updating("adamw")),
    ]


def spec_of_generation(run: GenerateRun, q: int, device: planning.Limits) -> KernelSpec:
    """Return the kernel of a generation."""
    plan = planning.generation_plan(rows=run.n, h=run.h, q=q, layers=1, dtype=DTYPE, device=device)
    kind = "generate_group" if plan.kernel == "group" else "generate_rows"
    return KernelSpec(kind, plan.tile, "tanh", DTYPE, exchange=plan.exchange)  # type: ignore[arg-type]


def compile_lm(runs: Sequence[LMRun], q: int, *, limit: float | None = None) -> list[str]:
    """Compile what training and generation take on CuPy's current device; return what failed.

    What is not compiled here is when it is first needed. ``q``: tokens of the vocabulary.
    ``limit``: seconds after which no further compilation is begun.
    """
    device = limits_of(cupy().cuda.Device().id)
    specs = [s for r in runs if isinstance(r, TrainRun) for s in specs_of_training(r, q, device)]
    specs += [spec_of_generation(r, q, device) for r in runs if isinstance(r, GenerateRun)]
    return compile_ahead(specs, device.compute_capability, limit=limit)
