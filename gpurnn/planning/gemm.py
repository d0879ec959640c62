"""Plans of the gemm kernel: in each step a product by cuBLAS, and a kernel for what follows it."""

from gpurnn import tuned
from gpurnn.planning.limits import Limits
from gpurnn.planning.plans import SIDE, Plan, itemsize, tiled_grid

__all__ = ["gemm_plan"]

# Of the steps that are captured together. A graph works on memory of its own, so that it may be
# kept: copies of W_hh and of so many steps. What is larger takes longer than its launches do.
CHUNK = 32  # steps, at most
LEAST_CHUNK = 4  # for fewer no graph is worth the copies
CHUNK_BYTES = 8 << 20  # of each copied array
COPIED_WEIGHTS = 64 << 20  # bytes of W_hh

# Of a step, by the model.
NODE = 1_700.0  # nanoseconds of a small kernel in a graph
COPIES = 0.25  # of a node: what copying in and out adds to each step of a chunk
FLOPS_A_CYCLE = {"float64": 128.0, "ieee": 256.0, "tf32": 2048.0, "half": 4096.0}
UTILISATION = 0.5
L2_BYTES_A_CYCLE = 3_000.0
PASSES = 5  # over (n, h) numbers beside the product; a graph's copies are as many again


def gemm_plan(
    T: int, n: int, h: int, dtype: str, precision: str, device: Limits, why: str
) -> tuple[float, Plan]:
    """Return nanoseconds a step, and the plan; ``why`` is its first reason."""
    chunk = _chunk(n, h, dtype) if T >= LEAST_CHUNK else 0
    if chunk:
        launches = T // chunk + (T % chunk).bit_count()
        how = (
            f"up to {chunk} steps a launch, as CUDA graphs that are captured once for n = {n} and "
            f"h = {h}; what is left of T in powers of two"
        )
    else:
        launches = 2 * T
        reason = "a step is long against them, and large for a graph's own memory"
        how = f"two launches a step: {reason if T >= LEAST_CHUNK else 'too few for a graph'}"
    step = _step_ns(n, h, dtype, precision, device, in_graph=bool(chunk))
    reasons = (
        why,
        "in each step a product by cuBLAS, then bias and φ in one kernel",
        how,
        f"about {step / 1e3:.2f} µs a step by the model",
    )
    plan = Plan(
        "gemm",
        tiled_grid(n, h),
        (SIDE, SIDE, 1),
        0,
        launches,
        None,
        reasons,
        chunk=chunk,
        precision=precision,
    )
    return step, plan


def _step_ns(
    n: int, h: int, dtype: str, precision: str, device: Limits, *, in_graph: bool
) -> float:
    node = NODE if in_graph else tuned.latencies(device.name, device.clock_ghz).launch
    kind = {"float32": precision, "float64": "float64"}.get(dtype, "half")
    rate = FLOPS_A_CYCLE[kind] * device.multiprocessors * UTILISATION
    rows = -(-max(1, n) // 16) * 16  # a tile is not narrower
    cycles = max(2 * rows * h * h / rate, h * h * itemsize(dtype) / L2_BYTES_A_CYCLE)
    passes = PASSES * (2 if in_graph else 1)
    cycles += passes * n * h * itemsize(dtype) / L2_BYTES_A_CYCLE
    return (2 + (COPIES if in_graph else 0)) * node + cycles / device.clock_ghz


def _chunk(n: int, h: int, dtype: str) -> int:
    """Return the steps that are captured together, a power of two, or 0."""
    size = itemsize(dtype)
    if h * h * size > COPIED_WEIGHTS:
        return 0
    most = min(CHUNK, CHUNK_BYTES // max(1, n * h * size))
    return 1 << (most.bit_length() - 1) if most >= LEAST_CHUNK else 0
