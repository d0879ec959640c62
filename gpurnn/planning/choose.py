"""The choice of a kernel."""

from dataclasses import replace
from functools import lru_cache

from gpurnn import tuned
from gpurnn.planning.gemm import gemm_plan
from gpurnn.planning.group import Group, group_plans, why_no_group
from gpurnn.planning.limits import Limits
from gpurnn.planning.plans import DTYPES, MOST_ROWS, PRECISIONS, SIDE, Plan, tiled_grid
from gpurnn.planning.resident import largest_resident, resident_plans

__all__ = ["KERNELS", "plan"]

KERNELS = ("step", "resident", "group", "concatenated", "gemm")
"""Kernels that ``kernel=`` may name."""

IEEE_ONLY = ("step", "resident", "concatenated")

WORTH_A_GROUP = 0.8
"""A group must promise so much of the resident kernel's time, or less: its model is the rougher."""


def plan(
    *,
    T: int,
    n: int,
    d: int,
    h: int,
    dtype: str = "float32",
    device: Limits,
    kernel: str | Group | None = None,
    precision: str = "ieee",
) -> Plan:
    """Choose a kernel for a sequence of T steps of n rows, d inputs and h units.

    Args:
        T: time steps. n: rows of the batch. d: inputs (the choice does not depend on them).
        h: hidden units.
        dtype: "float32", "float64", "float16" or "bfloat16", of the arrays; products of half types
            are summed as float32.
        device: what the GPU can hold.
        kernel: the name of one of ``KERNELS``, or a ``Group`` with some of its sizes, to have that
            one; None chooses.
        precision: "ieee"; "tf32" allows the recurrence to multiply float32 rounded to 10 bits, on
            tensor cores, and a kernel that is named to do nothing else.

    Raises:
        TypeError: a size is no integer.
        ValueError: an argument is out of range; the kernel named cannot hold this shape, or does
            not compute in this precision; the message says what would.
    """
    for name, size, least in (("T", T, 0), ("n", n, 0), ("d", d, 0), ("h", h, 1)):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} is {size!r}: expected an integer")
        if not least <= size < MOST_ROWS:
            raise ValueError(f"{name} is {size}: expected at least {least} and less than 2³¹")
    if T * n >= MOST_ROWS:
        raise ValueError(
            f"T · n is {T} · {n}: expected less than 2³¹, the rows of one matrix product"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: expected one of {', '.join(PRECISIONS)}")
    major, minor = device.compute_capability
    if dtype == "bfloat16" and not device.tensor_cores:
        raise ValueError(
            f"dtype is 'bfloat16' and {device.name} has compute capability {major}.{minor}: "
            "expected 8.0 or higher, or another dtype"
        )
    if precision == "tf32" and dtype != "float32":
        raise ValueError(
            f"precision is 'tf32' and dtype {dtype}: expected dtype float32, or 'ieee'"
        )
    if precision == "tf32" and not device.tensor_cores:
        raise ValueError(
            f"precision is 'tf32' and {device.name} has compute capability {major}.{minor}: "
            "expected 8.0 or higher, or 'ieee'"
        )
    if kernel is not None and not isinstance(kernel, Group) and kernel not in KERNELS:
        raise ValueError(
            f"kernel is {kernel!r}: expected None, a Group, or one of {', '.join(KERNELS)}"
        )
    if precision == "tf32" and kernel in IEEE_ONLY:
        raise ValueError(
            f"precision is 'tf32' and kernel {kernel!r}, which multiplies as IEEE float32 does: "
            "expected kernel 'group' or 'gemm', or 'ieee'"
        )
    return _plan(T, n, h, dtype, device, kernel, precision)


@lru_cache(maxsize=4096)
def _plan(
    T: int,
    n: int,
    h: int,
    dtype: str,
    device: Limits,
    kernel: str | Group | None,
    precision: str,
) -> Plan:
    if kernel in ("step", "concatenated"):
        return _step_plan(T, n, h, device, str(kernel), "asked for by name")
    if kernel == "gemm":
        return gemm_plan(T, n, h, dtype, precision, device, "asked for by name")[1]
    if kernel == "resident":
        return _resident(n, h, dtype, device)
    if kernel == "group" or isinstance(kernel, Group):
        wish = kernel if isinstance(kernel, Group) else Group()
        return _group(n, h, dtype, precision, device, wish)
    measured = tuned.choice(device.name, dtype=dtype, precision=precision, n=n, h=h)
    if measured is not None:
        try:
            best = _plan(T, n, h, dtype, device, _named(measured), precision)
        except ValueError as e:
            raise ValueError(
                f"the table of measured choices names for {device.name}, n = {n}, h = {h} what "
                f"cannot be: {e}"
            ) from e
        return replace(best, why=("the fastest measured on this GPU, by its table", *best.why))
    found = list(group_plans(n, h, dtype, precision, device, Group()))
    for cost, resident in resident_plans(n, h, dtype, device):
        if precision == "tf32":
            resident = replace(resident, why=("IEEE, as it takes no longer", *resident.why))
        found.append((cost * WORTH_A_GROUP, resident))
    why = f"W_hh ({h}, {h}) of {dtype} is more than blocks of {device.name} hold at once"
    if found:
        why = f"W_hh ({h}, {h}) times {n} rows is more than blocks that hold it take less time for"
    found.append(gemm_plan(T, n, h, dtype, precision, device, why))
    return min(found, key=lambda candidate: candidate[0])[1]


def _named(choice: tuned.Choice) -> str | Group:
    if choice.kernel != "group":
        return choice.kernel
    return Group(choice.blocks, choice.exchange, choice.rows)


def _resident(n: int, h: int, dtype: str, device: Limits) -> Plan:
    candidates = resident_plans(n, h, dtype, device)
    if not candidates:
        raise ValueError(
            f"kernel is 'resident', h is {h}, dtype {dtype}: one block of {device.name} holds "
            f"W_hh up to h = {largest_resident(dtype, device)}; expected a smaller h, or "
            "kernel 'group' or 'gemm'"
        )
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _group(n: int, h: int, dtype: str, precision: str, device: Limits, wish: Group) -> Plan:
    candidates = group_plans(n, h, dtype, precision, device, wish)
    if not candidates:
        raise ValueError(f"kernel is {wish}: {why_no_group(h, dtype, device, wish)}")
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _step_plan(T: int, n: int, h: int, device: Limits, kernel: str, why: str) -> Plan:
    reasons = (
        why,
        f"W_hh ({h}, {h}) is read again in every step, in tiles of {SIDE} × {SIDE}",
        "a launch for each step",
    )
    return Plan(kernel, tiled_grid(n, h), (SIDE, SIDE, 1), 0, T, None, reasons)
