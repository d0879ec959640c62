"""Which kernel runs a shape, with what sizes, and why: arithmetic only, no device is asked.

``plan`` compares what the kernels would take by a rough model of a multiprocessor (instructions
issued, shared memory read, latency of a step) and explains its choice in words. The constants come
from compiled kernels (``tests/resources.json``: registers, instructions) and published latencies;
they decide between ways of cutting up the work and are not a promise of speed. A table of what has
been measured on a GPU (``gpurnn.tuned``) goes before the model.
"""

from gpurnn.planning.choose import KERNELS, plan
from gpurnn.planning.generation import GENERATORS, generation_plan
from gpurnn.planning.generation_group import generation_words
from gpurnn.planning.group import EXCHANGES, MOST_BLOCKS, Group, scratch_words
from gpurnn.planning.limits import DEVICES, Limits, limits
from gpurnn.planning.plans import (
    DTYPES,
    MOST_ROWS,
    PRECISIONS,
    SIDE,
    STATIC_SHARED,
    Plan,
    dtype_name,
    tiled_grid,
)
from gpurnn.planning.resident import (
    LATENCY,
    largest_resident,
    registers_guess,
    resident_tiles,
)
from gpurnn.planning.tokens import ScatterPlan, scatter_plan

__all__ = [
    "DEVICES",
    "DTYPES",
    "EXCHANGES",
    "GENERATORS",
    "KERNELS",
    "LATENCY",
    "MOST_BLOCKS",
    "MOST_ROWS",
    "PRECISIONS",
    "SIDE",
    "STATIC_SHARED",
    "Group",
    "Limits",
    "Plan",
    "ScatterPlan",
    "dtype_name",
    "generation_plan",
    "generation_words",
    "largest_resident",
    "limits",
    "plan",
    "registers_guess",
    "resident_tiles",
    "scatter_plan",
    "scratch_words",
    "tiled_grid",
]
