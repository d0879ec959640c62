"""Speed, after the result has been checked: on NumPy, and on a GPU.

``common`` holds what both share, ``cpu`` and ``gpu`` measure, ``ahead`` compiles many kernels at
once, ``peers`` are what they are compared with, ``floors`` says how fast it could be, ``plots``
draws.
"""

from gpurnn.bench.ahead import compile_ahead, compile_runs, specs_of
from gpurnn.bench.common import Shape
from gpurnn.bench.cpu import CPU_SHAPES, environment, measure_cpu, summary
from gpurnn.bench.gpu import measure_gpu
from gpurnn.bench.overhead import measure_overhead
from gpurnn.bench.plots import plot
from gpurnn.bench.report import gpu_environment, gpu_summary
from gpurnn.bench.runs import GPU_RUNS, Run

__all__ = [
    "CPU_SHAPES",
    "GPU_RUNS",
    "Run",
    "Shape",
    "compile_ahead",
    "compile_runs",
    "environment",
    "gpu_environment",
    "gpu_summary",
    "measure_cpu",
    "measure_gpu",
    "measure_overhead",
    "plot",
    "specs_of",
    "summary",
]
