"""Plans of a generation: where the weights lie, and how many blocks generate a row of the batch.

Three kernels generate (``gpurnn.kernels.generate``, ``generate_group``), all in one launch:

* *resident*: a block a row, all weights in its registers and shared memory;
* *streamed*: the same, but what the block cannot hold it reads from the L2 cache in each step;
* *group*: several blocks a row, each with a part of W_hh, for one layer in float32.
"""

from functools import lru_cache

from gpurnn.planning.generation_group import group_plans, why_no_group
from gpurnn.planning.generation_rows import row_plan, row_sizes, streaming
from gpurnn.planning.group import Group
from gpurnn.planning.limits import Limits
from gpurnn.planning.plans import MOST_ROWS, Plan

__all__ = ["GENERATORS", "generation_plan"]

GENERATORS = ("resident", "streamed", "group")
"""Kernels that ``kernel=`` of a generation may name."""

DTYPES = ("float32", "float64")
WORTH_A_GROUP = 0.8  # of the time without: the model of a group is the rougher


def generation_plan(
    *,
    rows: int,
    h: int,
    q: int,
    layers: int,
    dtype: str,
    device: Limits,
    kernel: str | Group | None = None,
) -> Plan:
    """Choose a kernel for texts of a language model.

    Args:
        rows: texts at once. h: hidden units. q: tokens. layers: recurrent layers.
        dtype: "float32" or "float64".
        device: what the GPU can hold.
        kernel: one of ``GENERATORS``, or a ``Group`` with some of its sizes (one row each), to have
            that one; None chooses.

    Raises:
        ValueError: an argument is out of range, or the kernel named cannot hold this model; the
            message says what would.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    if kernel is not None and not isinstance(kernel, Group) and kernel not in GENERATORS:
        raise ValueError(
            f"kernel is {kernel!r}: expected None, a Group, or one of {', '.join(GENERATORS)}"
        )
    weights = (2 * layers - 1) * h * h + h * q
    if 2 * weights >= MOST_ROWS:  # with padding
        raise ValueError(
            f"h is {h}, q {q} and layers {layers}: expected less than 2³⁰ weights in all, as "
            "they are counted in 32 bits"
        )
    return _plan(rows, h, q, layers, dtype, device, kernel)


@lru_cache(maxsize=1024)
def _plan(
    rows: int,
    h: int,
    q: int,
    layers: int,
    dtype: str,
    device: Limits,
    kernel: str | Group | None,
) -> Plan:
    if kernel == "group" or isinstance(kernel, Group):
        wish = kernel if isinstance(kernel, Group) else Group()
        groups = list(group_plans(rows, h, q, layers, dtype, device, wish))
        if not groups:
            raise ValueError(f"kernel is {wish}: {why_no_group(h, layers, dtype, device, wish)}")
        return min(groups, key=lambda found: found[0])[1]
    sizes, resident = row_sizes(h, q, layers, dtype, device)
    if layers > 1 and not resident:  # several matrices are streamed, and want the registers
        sizes, resident = row_sizes(h, q, layers, dtype, device, registers=False)
    if kernel == "streamed" and resident:
        sizes, resident = streaming(sizes), False
    if kernel == "resident" and not resident:
        raise ValueError(
            f"kernel is 'resident', h is {h}, q {q}, layers {layers}, dtype {dtype}: one block of "
            f"{device.name} cannot hold all weights; expected a smaller model, or kernel "
            "'streamed' or 'group'"
        )
    cost, alone = row_plan(rows, sizes, dtype, device, resident=resident)
    found = [(cost * WORTH_A_GROUP, alone)]
    if kernel is None:
        found += group_plans(rows, h, q, layers, dtype, device, Group())
    return min(found, key=lambda one: one[0])[1]
