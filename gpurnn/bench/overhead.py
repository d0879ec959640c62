"""What a launch and a call cost, whatever the work."""

from typing import Any

import numpy as np

from gpurnn import functional as F
from gpurnn.bench.clocks import Clock, GPUClock
from gpurnn.bench.common import Problem, Shape
from gpurnn.cuda.engines import Engine, GPUEngine, cupy
from gpurnn.cuda.specs import KernelSpec

__all__ = ["measure_overhead"]


def measure_overhead(
    *, engine: Engine | None = None, clock: Clock | None = None, seconds: float = 0.3
) -> dict[str, Any]:
    """Return what a launch and a call cost, in microseconds.

    ``launch``: the smallest kernel there is, three arrays of one number, time on the GPU and on the
    host. ``rnn_forward``: the host's time of a call, T = n = d = 1, h = 32.
    """
    engine = engine or GPUEngine(cupy().cuda.Device().id)
    clock = clock or GPUClock()
    with engine.here():
        xp = engine.xp
        arrays = [xp.ones(1, np.float32) for _ in range(3)]
        spec = KernelSpec("layer_backward", None, "tanh", "float32")

        def launch() -> None:
            engine.launch(spec, (1, 1, 1), (32, 1, 1), arrays)

        shape = Shape(1, 1, 1, 32)
        arguments = [xp.asarray(a) for a in Problem(shape).arguments(np.float32)]
        return {
            "launch_device": clock.device(launch, seconds),
            "launch_host": clock.host(launch, seconds),
            "rnn_forward_host": clock.host(lambda: F.rnn_forward(*arguments), seconds),
        }
