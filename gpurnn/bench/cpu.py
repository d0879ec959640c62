"""Speed of whole sequences on NumPy, forward and backward, against PyTorch in the same run.

The result is checked before anything is timed. The sides take turns, so that a change in the
machine's speed hits both; figures are medians over all passes.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import functional as F
from gpurnn.bench import common
from gpurnn.bench.common import ERROR_LIMITS, Problem, Shape, relative_error

__all__ = ["CPU_SHAPES", "environment", "measure_cpu", "summary"]

Floats = NDArray[Any]

ERROR_LIMIT = ERROR_LIMITS["float32"]

BLOCKS = 4  # turns of each side
LEAST_PASSES = 2  # timed in a block
PAUSE = 0.3  # seconds before a block, for the other side's threads to fall asleep

CPU_SHAPES = (
    Shape(32, 1024, 28, 32),
    Shape(35, 32, 128, 256),
    Shape(35, 32, 512, 512),
    Shape(100, 1, 64, 64),
    Shape(1000, 8, 64, 128),
    Shape(256, 64, 256, 256),
    Shape(64, 64, 1024, 1024),
)


def _gpurnn_pass(arguments: tuple[Floats, ...], dH: Floats, backward: bool) -> list[Floats | None]:
    H, residuals = F.rnn_forward(*arguments)
    return [H, *F.rnn_backward(dH, residuals)] if backward else [H]


class _Torch:
    """The same problem on torch.nn.RNN."""

    def __init__(self, problem: Problem) -> None:
        import torch

        d, h = problem.W_xh.shape
        self.module = torch.nn.RNN(d, h)
        with torch.no_grad():
            for name, a in (
                ("weight_ih_l0", problem.W_xh.T),
                ("weight_hh_l0", problem.W_hh.T),
                ("bias_ih_l0", problem.b_h),
                ("bias_hh_l0", np.zeros_like(problem.b_h)),
            ):
                getattr(self.module, name).copy_(torch.from_numpy(np.ascontiguousarray(a)))
        self.X = torch.from_numpy(problem.X).requires_grad_()
        self.h_0 = torch.from_numpy(problem.h_0[None]).requires_grad_()
        self.dH = torch.from_numpy(problem.dH)
        self.no_grad = torch.no_grad

    def forward(self) -> Floats:
        with self.no_grad():
            H, _ = self.module(self.X, self.h_0)
        return H.numpy()  # type: ignore[no-any-return]

    def both(self) -> list[Floats]:
        wanted = [self.X, self.h_0, *self.module.parameters()]
        for tensor in wanted:
            tensor.grad = None
        H, _ = self.module(self.X, self.h_0)
        H.backward(self.dH)
        grads = [t.grad for t in wanted]
        dX, dh_0, dW_xh, dW_hh, db_h, _ = (g.numpy() for g in grads if g is not None)
        return [H.detach().numpy(), dX, dh_0[0], dW_xh.T, dW_hh.T, db_h]


def measure_cpu(
    *, seconds: float = 2.0, threads: int = 2, shapes: tuple[Shape, ...] = CPU_SHAPES
) -> Iterator[dict[str, Any]]:
    """Yield one record per shape: errors, and times of both sides.

    Args:
        seconds: to spend on each figure of a shape.
        threads: of the matrix products, on both sides.
        shapes: what to measure.

    Raises:
        ImportError: threadpoolctl, which sets the number of threads, is not installed.
        ArithmeticError: a result is wrong; it is not timed.
    """
    from threadpoolctl import threadpool_limits

    with_torch = importlib.util.find_spec("torch") is not None
    if with_torch:
        import torch

        torch.set_num_threads(threads)
    with threadpool_limits(threads):
        for shape in shapes:
            yield _measure(shape, seconds, with_torch)


def _measure(shape: Shape, seconds: float, with_torch: bool) -> dict[str, Any]:
    problem = Problem(shape)
    single, double = problem.arguments(np.float32), problem.arguments(np.float64)
    exact = _gpurnn_pass(double, problem.dH.astype(np.float64), True)
    record: dict[str, Any] = {"shape": vars(shape)}
    found = _gpurnn_pass(single, problem.dH, True)
    record["error"] = relative_error(found, exact, shape, ERROR_LIMIT)
    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "gpurnn": (
            lambda: _gpurnn_pass(single, problem.dH, False),
            lambda: _gpurnn_pass(single, problem.dH, True),
        )
    }
    if with_torch:
        peer = _Torch(problem)
        record["torch_error"] = relative_error(peer.both(), exact, shape, ERROR_LIMIT)
        sides["torch"] = (peer.forward, peer.both)
    for column, what in enumerate(("forward", "forward_backward")):
        times = _in_turn({name: passes[column] for name, passes in sides.items()}, seconds)
        for name, taken in times.items():
            record[f"{name}_{what}_ms"] = common.figure([1e3 * t for t in taken], len(taken))
        record[f"{what}_us_per_step"] = 1e6 * float(np.median(times["gpurnn"])) / shape.T
        if with_torch:
            ratio = np.median(times["torch"]) / np.median(times["gpurnn"])
            record[f"{what}_speedup"] = float(ratio)
    return record


def _in_turn(passes: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Time every pass for about ``seconds``, in blocks that take turns.

    Within a block one side runs alone, and its first pass is not timed: the threads of the other
    side's pool go on spinning for a while after their last product, and would be measured.
    """
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(BLOCKS):
        for name, run in passes.items():
            time.sleep(PAUSE)
            run()
            spent, count = 0.0, 0
            while spent < seconds / BLOCKS or count < LEAST_PASSES:
                before = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - before)
                spent += times[name][-1]
                count += 1
    return times


def summary(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return geometric mean and minimum of the speed-ups over PyTorch (none without it)."""
    ratios = [r["forward_backward_speedup"] for r in records if "forward_backward_speedup" in r]
    if not ratios:
        return {}
    return {
        "geometric_mean_speedup": float(np.exp(np.mean(np.log(ratios)))),
        "least_speedup": min(ratios),
    }


def environment(threads: int) -> dict[str, Any]:
    """Return what a figure depends on: processor, versions, BLAS, commit."""
    from threadpoolctl import threadpool_info

    return {
        **common.machine(),
        "versions": common.versions(("gpurnn", "numpy", "torch")),
        "blas": [
            f"{i['internal_api']} {i.get('version')} {i.get('architecture', '')}".strip()
            for i in threadpool_info()
            if i["user_api"] == "blas"
        ],
        "threads": threads,
        "commit": common.commit(),
    }
