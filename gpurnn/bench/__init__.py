"""Speed, after the result has been checked: on NumPy, and on a GPU.

``common`` holds what both share, ``cpu`` and ``gpu`` measure, ``ahead`` compiles many kernels at
once, ``peers`` are what they are compared with, ``floors`` says how fast it could be, ``plots``
draws. ``probe`` measures what a GPU's exchanges take, ``soak`` runs random shapes again and again.
"""

from gpurnn.bench.ahead import compile_ahead, compile_runs, compile_soak, specs_of
from gpurnn.bench.common import Shape
from gpurnn.bench.cpu import CPU_SHAPES, environment, measure_cpu, summary
from gpurnn.bench.gpu import measure_gpu
from gpurnn.bench.overhead import measure_overhead
from gpurnn.bench.plots import plot
from gpurnn.bench.probe import measure_probes, write_probes
from gpurnn.bench.report import gpu_environment, gpu_summary
from gpurnn.bench.runs import GPU_RUNS, GRIDS, GROUP_RUNS, Run
from gpurnn.bench.soak import SoakError, run_soak

__all__ = [
    "CPU_SHAPES",
    "GPU_RUNS",
    "GRIDS",
    "GROUP_RUNS",
    "Run",
    "Shape",
    "SoakError",
    "compile_ahead",
    "compile_runs",
    "compile_soak",
    "environment",
    "gpu_environment",
    "gpu_summary",
    "measure_cpu",
    "measure_gpu",
    "measure_overhead",
    "measure_probes",
    "plot",
    "run_soak",
    "specs_of",
    "summary",
    "write_probes",
]
