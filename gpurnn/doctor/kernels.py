"""Kernels against the reference, on tiny problems: under the emulator, and on the GPU.

The rule is that of the library's own tests, a little wider:

    error ≤ FACTOR · (error of the float32 reference + √length · u · largest value of the truth)

against the float64 reference; u is the unit roundoff of the dtype, length the number of additions
behind one number. For float64 the second term stands alone. Half types are summed as float32, so u
is float32's, and ROUNDED · unit roundoff of the half type · largest value comes on top: each number
is rounded to it once or twice on its way.
"""

import contextvars
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurnn import compiler
from gpurnn import functional as F
from gpurnn.activation import Activation
from gpurnn.cuda.engines import cupy, emulated
from gpurnn.doctor import language_model
from gpurnn.doctor.device import describe, why_no_gpu
from gpurnn.doctor.findings import Finding, found_by
from gpurnn.planning import Group

__all__ = ["compiled", "emulated_checks", "gpu_checks", "within"]

Array = NDArray[Any]

FACTOR = 8
ROUNDED = 4
NAMES = ("H", "dX", "dh_0", "dW_xh", "dW_hh", "db_h")
KERNELS: tuple[str | Group, ...] = (
    "resident",
    "step",
    "concatenated",
    "gemm",
    Group(2, "flags"),
    Group(2, "counter"),
    Group(2, "cluster"),
)
# T, n, d, h: odd, and on a GPU past a warp
EMULATED_SIZES = (4, 3, 5, 9)
WIDE_SIZES = (2, 5, 7, 33)
GPU_SIZES = (9, 5, 7, 33)


def within(
    found: Array, truth: Array, baseline: Array | None, length: int, u: float, stored: float = 0.0
) -> tuple[bool, float, float]:
    """Hold a result against the rule above; return whether it holds, its error and the limit.

    ``stored`` is the unit roundoff of a half type, 0 for others.
    """
    error = float(np.max(np.abs(found - truth), initial=0.0))
    lost = 0.0 if baseline is None else float(np.max(np.abs(baseline - truth), initial=0.0))
    largest = float(np.max(np.abs(truth), initial=0.0))
    limit = FACTOR * (lost + length**0.5 * u * largest) + ROUNDED * stored * largest
    return error <= limit, error, limit  # so written, NaN fails


def half_types() -> tuple[str, ...]:
    """Return the half types that there are: bfloat16 is that of ml_dtypes."""
    there = importlib.util.find_spec("ml_dtypes") is not None
    return ("float16", "bfloat16") if there else ("float16",)


def user_activation() -> Activation:
    """Return an activation that no kernel knows."""
    return Activation(
        lambda z: 0.9 * math.tanh(z) + 0.1 * z, lambda z: 1 - 0.9 * math.tanh(z) ** 2, name="leaky"
    )


def compiled() -> Iterator[Finding]:
    """Yield whether a kernel compiles to machine code for sm_80, sm_90 and the GPU that is there.

    This needs no GPU.
    """
    if any(importlib.util.find_spec(name) is None for name in ("numba", "numba_cuda", "cuda")):
        yield Finding("compiling", "missing", "not tried: numba-cuda is not installed")
        return
    from gpurnn.cuda.specs import KernelSpec, build, signature

    targets = [(8, 0), (9, 0)]
    if why_no_gpu() is None:
        major, minor = describe()["compute_capability"]
        if (major, minor) not in targets:
            targets.append((major, minor))
    spec = KernelSpec("layer_backward", None, "tanh", "float32")
    for major, minor in targets:

        def compile_one(target: tuple[int, int] = (major, minor)) -> Iterator[Finding]:
            begun = time.perf_counter()
            made = compiler.compile_kernel(build(spec), signature(spec), target, spec.threads)
            taken = time.perf_counter() - begun
            name = f"compiling for sm_{target[0]}{target[1]}"
            yield Finding(name, "ok", f"{len(made.cubin):,} bytes in {taken:.2f} s")

        yield from found_by(f"compiling for sm_{major}{minor}", compile_one)


def emulated_checks() -> Iterator[Finding]:
    """Yield kernels run by the emulator against the reference."""
    for name, install in (("numba_cuda", "numba-cuda"), ("greenlet", "greenlet")):
        if importlib.util.find_spec(name) is None:
            advice = "pip install 'gpurnn[emulator]'"
            yield Finding("emulator", "missing", f"not tried: {install} is missing", advice)
            return
    wanted = [(kernel, "float32", EMULATED_SIZES) for kernel in KERNELS]
    for kernel in ("resident", Group(2, "flags")):
        wanted += [(kernel, dtype, EMULATED_SIZES) for dtype in half_types()]
    wanted.append(("step", "float32", WIDE_SIZES))
    for kernel, dtype, sizes in wanted:
        name = f"emulator, {kernel}"
        name += "" if dtype == "float32" else f", {dtype}"
        name += ", past a tile" if sizes is WIDE_SIZES else ""

        def check(
            name: str = name,
            kernel: str | Group = kernel,
            dtype: str = dtype,
            sizes: tuple[int, int, int, int] = sizes,
        ) -> Iterator[Finding]:
            with emulated():
                yield _checked(name, np.asarray, sizes, dtype, kernel, "tanh", False)

        yield from found_by(name, check)
    yield from language_model.emulated_checks()


def gpu_checks() -> Iterator[Finding]:
    """Yield kernels run on the GPU against the reference: kernels, dtypes, ids, own activation."""
    if why_no_gpu() is not None:
        return
    clusters = tuple(describe()["compute_capability"]) >= (9, 0)
    kernels = [k for k in KERNELS if clusters or k != Group(2, "cluster")]
    wanted: list[tuple[str | Group, str, Any, bool]] = [
        (kernel, dtype, "tanh", by_id)
        for kernel in kernels
        for dtype in ("float32", "float64", *half_types())
        for by_id in (False, True)
        if not (by_id and kernel == "concatenated")  # its product is of floats
        and not (dtype == "float64" and isinstance(kernel, Group))
    ]
    wanted += [(kernel, "float32", user_activation(), False) for kernel in kernels]
    for kernel, dtype, activation, by_id in wanted:
        told = "own activation" if isinstance(activation, Activation) else activation
        name = f"GPU, {kernel}, {dtype}, {told}, {'ids' if by_id else 'floats'}"

        def check(
            name: str = name,
            kernel: str | Group = kernel,
            dtype: str = dtype,
            activation: Any = activation,
            by_id: bool = by_id,
        ) -> Iterator[Finding]:
            yield _checked(name, cupy().asarray, GPU_SIZES, dtype, kernel, activation, by_id)

        yield from found_by(name, check)
    yield from language_model.gpu_checks()


def _checked(
    name: str,
    place: Callable[[Array], Any],
    sizes: tuple[int, int, int, int],
    dtype: str,
    kernel: str | Group,
    activation: str | Activation,
    by_id: bool,
) -> Finding:
    T, n, d, h = sizes
    rng = np.random.default_rng(0)
    stored_as, roundoff = _type(dtype)
    half = dtype in ("float16", "bfloat16")

    def draw(*shape: int, scale: float = 1.0) -> Array:
        drawn: Array = (scale * rng.standard_normal(shape)).astype(np.float32).astype(stored_as)
        return drawn

    X: Array = rng.integers(0, d, (T, n)) if by_id else draw(T, n, d)
    arguments = [X, draw(n, h), draw(d, h, scale=d**-0.5), draw(h, h, scale=0.9 * h**-0.5), draw(h)]
    dH = draw(T, n, h)

    def results(convert: Callable[[Array], Any], kernel: str | Group | None) -> list[Any]:
        H, residuals = F.rnn_forward(
            *(convert(a) for a in arguments), activation=activation, kernel=kernel
        )
        found = [H, *F.rnn_backward(convert(dH), residuals)]
        return [a if isinstance(a, np.ndarray) or a is None else a.get() for a in found]

    found = results(place, kernel)
    truth = _by_reference(lambda: results(_as(np.float64), None))
    single = _by_reference(lambda: results(_as(np.float32), None)) if dtype == "float32" else None
    u, stored = (_type("float32")[1], roundoff) if half else (roundoff, 0.0)
    length = T * (n + d + h + 8)
    worst = 0.0
    for i, (label, a, exact) in enumerate(zip(NAMES, found, truth, strict=True)):
        if a is None:
            continue
        baseline = None if single is None else single[i]
        right, error, limit = within(a.astype(np.float64), exact, baseline, length, u, stored)
        if not right:
            detail = f"wrong numbers: {label} is off by {error:.2e}, at most {limit:.2e} is right"
            advice = (
                "do not use this kernel here; report it with the output of gpurnn doctor --json"
            )
            return Finding(name, "failed", detail, advice)
        worst = max(worst, error / limit)
    return Finding(name, "ok", f"forward and backward as the reference ({worst:.0%} of the limit)")


def _type(name: str) -> tuple[np.dtype[Any], float]:
    """Return a dtype by its name, and its unit roundoff."""
    if name != "bfloat16":
        return np.dtype(name), float(np.finfo(name).eps) / 2
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16), float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps) / 2


def _as(dtype: type) -> Callable[[Array], Array]:
    return lambda a: a if a.dtype.kind in "iu" else a.astype(dtype)


def _by_reference(compute: Callable[[], list[Any]]) -> list[Any]:
    """Compute outside an ``emulated()`` that may be around: NumPy arrays take the reference."""
    return contextvars.Context().run(compute)
