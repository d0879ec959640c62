"""How fast a recurrence could be: lower bounds on the time of a step, from the GPU's own limits.

A step is bounded three ways, each in cycles, and takes at least the largest of them:

- multiply-adds: n h² of them over the multiprocessors that work, each with 128 (float32 and half
  types), 64 or 2 (float64) a cycle;
- bytes that a multiprocessor must move on chip: the states it multiplies with, gathered where W_hh
  is split, and the part of W_hh that does not fit into registers, from shared memory;
- latency: from one step's states to the next's, whatever the sizes.

Rows of the batch are independent, so multiprocessors may work in groups: each group holds a copy of
W_hh and takes its share of the rows. The floor is that of the best size of group; a group of one
is the resident kernel's form. It belongs to the recurrence: the input's product and the gradients
of the weights come on top. It is one without tensor cores, for half types too, unless they are
asked for: then the states are 4 bytes on chip (TF32) or 2, and the multiply-adds take less.
"""

import math
from dataclasses import dataclass

from gpurnn.planning import LATENCY, Limits
from gpurnn.tuned import CLUSTERS

__all__ = ["ESTIMATES", "FORMULA", "Floor", "estimate", "floor"]

FORMULA = (
    "max(rows · h² / (128 · SMs of a group), bytes on chip / width, latency) / clock, "
    "rows = ⌈n / groups⌉, the best number of groups; without tensor cores, unless a record says so"
)
SHARED_BYTES = 128.0  # a cycle, of one multiprocessor
GATHER_BYTES = 64.0  # a cycle, of one multiprocessor from L2
EXCHANGE = 2 * 263.0  # cycles: to L2 and back
CLUSTER_EXCHANGE = 180.0  # cycles: to another block's shared memory
USABLE = 0.75  # of registers and shared memory; the rest is for everything but W_hh


@dataclass(frozen=True)
class Floor:
    """Least time of a step, what sets it, and over how many multiprocessors W_hh is split."""

    us_per_step: float
    bound: str
    group: int


ESTIMATES = (
    # h from, to; n to; µs per step from, to
    (1, 224, 8192, 0.2, 0.4),
    (256, 640, 64, 0.4, 0.7),
    (1024, 1024, 8, 0.5, 0.7),
    (1024, 1024, 32, 1.7, 1.7),
)
"""Floors estimated by hand for a forward step in float32 on an H100.

(132 SMs at 1.755 GHz; shared memory answers in 29 cycles, L2 in about 263, distributed shared
memory in about 180: published microbenchmarks, and one exchange of the states a step.)
"""


def estimate(n: int, h: int, dtype: str, device: Limits) -> tuple[float, float] | None:
    """Return the hand-made estimate in µs per step: float32 on an H100, and some sizes, only."""
    if dtype != "float32" or "H100" not in device.name:
        return None
    for h_from, h_to, n_to, low, high in ESTIMATES:
        if h_from <= h <= h_to and n <= n_to:
            return low, high
    return None


def floor(n: int, h: int, dtype: str, device: Limits, *, tensor: bool = False) -> Floor:
    """Return the least time of a step of n rows and h units on a device.

    ``tensor``: multiplied on tensor cores, float32 as TF32.
    """
    size = 8 if dtype == "float64" else 2 if tensor and dtype != "float32" else 4
    registers = 4 * device.registers_per_multiprocessor * USABLE
    held = registers + device.shared_per_multiprocessor * USABLE
    best: Floor | None = None
    for group in range(1, device.multiprocessors + 1):
        own = h * h * size / group  # bytes of W_hh of one multiprocessor
        if own > held and group < device.multiprocessors:
            continue
        groups = max(1, min(n, device.multiprocessors // group))
        rows = math.ceil(n / groups)
        bounds = {
            "multiply-adds": rows * h * h / group / _rate(dtype, device, tensor=tensor),
            "bytes on chip": max(0.0, own - registers) / SHARED_BYTES
            + (rows * h * size / GATHER_BYTES if group > 1 else 0.0),
            "latency": LATENCY + _exchange(group, device),
        }
        bound = max(bounds, key=lambda name: bounds[name])
        found = Floor(bounds[bound] / device.clock_ghz / 1e3, bound, group)
        if best is None or found.us_per_step < best.us_per_step:
            best = found
    if best is None:
        raise ValueError(f"device has {device.multiprocessors} multiprocessors: expected 1 or more")
    return best


def _exchange(group: int, device: Limits) -> float:
    """Cycles from one block's states to another's: through the cluster's shared memory, or L2."""
    if group == 1:
        return 0.0
    clusters = [size for size in CLUSTERS if size <= device.largest_cluster]
    return CLUSTER_EXCHANGE if group in clusters else EXCHANGE


def _rate(dtype: str, device: Limits, *, tensor: bool = False) -> float:
    """Multiply-adds that a multiprocessor begins in a cycle."""
    if tensor:
        halves = 2048.0 if device.compute_capability >= (9, 0) else 1024.0
        return halves / 2 if dtype == "float32" else halves
    if dtype != "float64":
        return 128.0
    return 64.0 if device.half_rate_float64 else 2.0
