"""What the tests on a GPU have in common: the GPU, results on it, and what they must be."""

import sys
from typing import Any

import numpy as np
import pytest
from cases import CASES, Case, Draw
from numpy.typing import NDArray
from tolerance import assert_close

from gpurnn import functional as F
from gpurnn.bench import Shape, compile_ahead, specs_of
from gpurnn.cuda.engines import limits_of
from gpurnn.doctor.device import why_no_gpu

__all__ = [
    "GPU",
    "NAMES",
    "assert_as_reference",
    "assert_halves_as_reference",
    "cp",
    "gpu",
    "reference",
    "results",
]

Array = NDArray[Any]

NAMES = ("H", "dX", "dh_0", "dW_xh", "dW_hh", "db_h")
MANY = 50  # tests: from then on it is faster to compile all kernels beside each other
POISON = 0xFF  # every float whose bytes are all that is a NaN


class GPU:
    """The current GPU: brings arrays there and back. What CuPy allocates on it starts as NaN."""

    def __init__(self, cp: Any) -> None:
        self.cp = cp

    def put(self, a: Array | None) -> Any:
        return None if a is None else self.cp.asarray(a)

    def get(self, a: Any) -> Array:
        return self.cp.asnumpy(a)  # type: ignore[no-any-return]

    def free(self) -> int:
        self.cp.get_default_memory_pool().free_all_blocks()
        return int(self.cp.cuda.runtime.memGetInfo()[0])


@pytest.fixture(scope="session")
def cp(request: pytest.FixtureRequest) -> Any:
    """CuPy, where there is a GPU; for many tests, with the kernels they share compiled ahead."""
    missing = why_no_gpu()
    if missing is not None:
        pytest.skip(f"no GPU: {missing}")
    import cupy

    if request.session.testscollected > MANY:
        limits = limits_of(cupy.cuda.Device().id)
        specs = [
            spec
            for dtype in ("float32", "float64", "float16", "bfloat16")
            for case in CASES
            for spec in specs_of(Shape(case.T, case.n, case.d, case.h), dtype, "resident", limits)
        ]
        for failure in compile_ahead(specs, limits.compute_capability):
            # in text, as warnings are errors: the tests that need it fail on their own
            print(f"could not be compiled ahead: {failure}", file=sys.stderr)
    return cupy


@pytest.fixture
def gpu(cp: Any) -> Any:
    """The GPU, all new memory of which is NaN."""

    def poisoned(size: int) -> Any:
        memory = cp.get_default_memory_pool().malloc(size)
        if size:
            memory.memset_async(POISON, size)
        return memory

    with cp.cuda.using_allocator(poisoned):
        yield GPU(cp)


def results(
    gpu: GPU, drawn: Draw, activation: Any, kernel: str | None, **variant: bool
) -> dict[str, Array]:
    """Return H and all gradients of a pass on the GPU, on the host."""
    arguments = [gpu.put(a) for a in drawn.arguments(**variant)]
    H, residuals = F.rnn_forward(*arguments, activation=activation, kernel=kernel)
    assert residuals.plan is not None
    assert kernel in (None, residuals.plan.kernel)
    found = (H, *F.rnn_backward(gpu.put(drawn.dH), residuals))
    return {name: gpu.get(a) for name, a in zip(NAMES, found, strict=True) if a is not None}


def reference(drawn: Draw, activation: Any, dtype: Any, **variant: bool) -> dict[str, Array]:
    """Return the same by the reference, in float32 or float64."""
    drawn = drawn.astype(dtype)
    H, residuals = F.rnn_forward(*drawn.arguments(**variant), activation=activation)
    found = (H, *F.rnn_backward(drawn.dH, residuals))
    return {name: a for name, a in zip(NAMES, found, strict=True) if a is not None}


def assert_as_reference(
    gpu: GPU,
    case: Case,
    drawn: Draw,
    activation: Any = "tanh",
    *,
    kernel: str | None,
    **variant: bool,
) -> None:
    """Hold a pass on the GPU, float32 or float64, against the reference by the tests' rule."""
    found = results(gpu, drawn, activation, kernel, **variant)
    truth = reference(drawn, activation, np.float64, **variant)
    single = drawn.X.dtype == np.float32
    baseline = reference(drawn, activation, np.float32, **variant) if single else {}
    assert found.keys() == truth.keys()
    for name, a in found.items():
        assert a.dtype == drawn.X.dtype
        length, lost = case.length, baseline.get(name)
        assert_close(f"{kernel} {name}", a, truth[name], length=length, baseline=lost)


def assert_halves_as_reference(gpu: GPU, case: Case, drawn: Draw, kernel: str) -> None:
    """Hold float16 or bfloat16 against the reference: numbers are stored so, summed as float32."""
    import ml_dtypes

    found = results(gpu, drawn, "tanh", kernel)
    truth = reference(drawn, "tanh", np.float64)
    u = float(ml_dtypes.finfo(drawn.X.dtype).eps) / 2
    for name, a in found.items():
        assert a.dtype == drawn.X.dtype
        error = np.abs(a.astype(np.float64) - truth[name]).max(initial=0.0)
        limit = 4 * case.T**0.5 * u * np.abs(truth[name]).max(initial=0.0)
        assert error <= limit, f"{kernel} {name}: {error:.3g} > {limit:.3g}"
