"""Products by cuBLAS through its C interface, with a handle and a workspace of our own.

CuPy refuses its products while a stream is captured in a CUDA graph; cuBLAS itself allows them.
Here it can also be given half types and write float32, and each product a workspace, without which
two graphs that run at once could share one. (cuBLAS Library: *cublasGemmEx*, *cublasSetWorkspace*,
*CUDA Graphs Support*.)
"""

import ctypes
import threading
from functools import cache
from typing import Any

from gpurnn.planning import MOST_ROWS, PRECISIONS, dtype_name

__all__ = ["WORKSPACE", "CuBLASError", "product"]


WORKSPACE = 8 << 20
"""Bytes of a workspace. 16 KiB are enough to run; more lets a long sum be made in parts."""

# cublasStatus_t
STATUS = {
    1: "CUBLAS_STATUS_NOT_INITIALIZED",
    3: "CUBLAS_STATUS_ALLOC_FAILED",
    7: "CUBLAS_STATUS_INVALID_VALUE",
    8: "CUBLAS_STATUS_ARCH_MISMATCH",
    11: "CUBLAS_STATUS_MAPPING_ERROR",
    13: "CUBLAS_STATUS_EXECUTION_FAILED",
    14: "CUBLAS_STATUS_INTERNAL_ERROR",
    15: "CUBLAS_STATUS_NOT_SUPPORTED",
    16: "CUBLAS_STATUS_LICENSE_ERROR",
}
TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # cudaDataType
# cublasComputeType_t: 32F and 64F are IEEE arithmetic, FAST_TF32 rounds factors to 10 bits
COMPUTE_32F, COMPUTE_64F, COMPUTE_32F_FAST_TF32 = 68, 70, 77
NOT_TRANSPOSED, TRANSPOSED = 0, 1  # cublasOperation_t
DEFAULT_ALGORITHM = -1  # cublasGemmAlgo_t
# cublasMath_t: default, and parts of a sum are added in the type computed with, not in a half type
MATH = 16

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasCreate_v2": (ctypes.POINTER(_POINTER),),
    "cublasSetStream_v2": (_POINTER, _POINTER),
    "cublasSetWorkspace_v2": (_POINTER, _POINTER, ctypes.c_size_t),
    "cublasSetMathMode": (_POINTER, _INT),
    "cublasGemmEx": (
        *(_POINTER, _INT, _INT, _INT, _INT, _INT),  # handle, operations, m, n, k
        *(_POINTER, _POINTER, _INT, _INT, _POINTER, _INT, _INT),  # α, A, B, types and strides
        *(_POINTER, _POINTER, _INT, _INT, _INT, _INT),  # β, C, computed with, algorithm
    ),
}

_ONE_AT_A_TIME = threading.Lock()  # stream, workspace and product of a handle belong together


class CuBLASError(RuntimeError):
    """cuBLAS refused or failed; the message has the function and the status."""


def product(
    device: int,
    stream: int,
    A: Any,
    B: Any,
    out: Any,
    *,
    workspace: Any = None,
    precision: str = "ieee",
) -> None:
    """Queue out = A B on a stream, which may be one that is captured.

    Args:
        device: CUDA index of the device where all lie; it must be the current one.
        stream: address of the stream, as in ``cupy.cuda.Stream.ptr``.
        A: (m, k) CuPy array of float32, float64, float16 or bfloat16, C-contiguous or the transpose
            of such an array.
        B: (k, n), of A's dtype, likewise.
        out: (m, n), C-contiguous; of A's dtype, or float32 where that is a half type. m, n and k
            are at least 1.
        workspace: C-contiguous array that nothing else uses until the product is made, in every
            replay of a graph too; None leaves cuBLAS its own (within a capture: the graph's).
        precision: "ieee", or "tf32" to let float32 factors be rounded to TF32 (11 significant
            bits). Sums are float32, of float64 float64.

    Raises:
        ValueError: an array is not as it should be, or the precision is not one of dtype.
        CuBLASError: a status other than success.
        RuntimeError: cuBLAS could not be loaded.
    """
    dtype = dtype_name(A.dtype)
    compute = _computed_with(dtype, precision)
    (m, k), n = A.shape, B.shape[1]
    if B.shape[0] != k or out.shape != (m, n):
        raise ValueError(f"product of {A.shape} and {B.shape} into {out.shape}: shapes do not fit")
    if min(m, n, k) < 1 or max(m, n, k) >= MOST_ROWS:
        raise ValueError(f"product of {A.shape} and {B.shape}: expected sizes from 1 to 2³¹ − 1")
    written = dtype_name(out.dtype)
    if B.dtype != A.dtype or (written != dtype and (written != "float32" or A.itemsize != 2)):
        raise ValueError(
            f"product of {dtype} and {dtype_name(B.dtype)} into {written}: expected one dtype, or "
            "float32 of a half type's product"
        )
    if not out.flags.c_contiguous:
        raise ValueError("out is not C-contiguous")
    # In cuBLAS's order, by columns, these arrays are outᵀ = Bᵀ Aᵀ.
    (of_A, stride_A), (of_B, stride_B) = _as_columns("A", A), _as_columns("B", B)
    scalar = ctypes.c_double if dtype == "float64" else ctypes.c_float
    one, zero = scalar(1), scalar(0)
    kind = TYPES[dtype]
    with _ONE_AT_A_TIME:
        handle = _handle(device)
        _call("cublasSetStream_v2", handle, stream)  # takes any workspace away
        if workspace is not None:
            _call("cublasSetWorkspace_v2", handle, workspace.data.ptr, workspace.nbytes)
        _call(
            "cublasGemmEx",
            *(handle, of_B, of_A, n, m, k, ctypes.byref(one)),
            *(B.data.ptr, kind, stride_B, A.data.ptr, kind, stride_A, ctypes.byref(zero)),
            *(out.data.ptr, TYPES[written], n, compute, DEFAULT_ALGORITHM),
        )


def _computed_with(dtype: str, precision: str) -> int:
    if dtype not in TYPES:
        raise ValueError(f"A has dtype {dtype}: expected one of {', '.join(TYPES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if precision == "tf32":
        if dtype != "float32":
            raise ValueError(f"precision is 'tf32' and A has dtype {dtype}: expected float32")
        return COMPUTE_32F_FAST_TF32
    return COMPUTE_64F if dtype == "float64" else COMPUTE_32F


def _as_columns(name: str, a: Any) -> tuple[int, int]:
    """Return how cuBLAS is to take a matrix, and elements from one row (or column) to the next."""
    if a.flags.c_contiguous:
        return NOT_TRANSPOSED, a.shape[1]
    if a.flags.f_contiguous:
        return TRANSPOSED, a.shape[0]
    raise ValueError(f"{name} is neither C-contiguous nor the transpose of such an array")


@cache
def _handle(device: int) -> int:
    """Return our handle on a device, which is kept until the process ends."""
    handle = _POINTER()
    _call("cublasCreate_v2", ctypes.byref(handle))
    if handle.value is None:
        raise CuBLASError(f"cublasCreate_v2: no handle on device {device}")
    _call("cublasSetMathMode", handle.value, MATH)
    return handle.value


def _call(name: str, *arguments: Any) -> None:
    status = _functions()[name](*arguments)
    if status:
        raise CuBLASError(f"{name}: {STATUS.get(status, 'unknown status')} ({status})")


@cache
def _functions() -> dict[str, Any]:
    library = _library()
    found = {}
    for name, signature in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = signature, _INT
        found[name] = function
    return found


def _library() -> Any:
    """Load cuBLAS: the one that CuPy uses, which finds it in the same way."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("cublas").abs_path
    except (ImportError, RuntimeError) as e:
        raise RuntimeError(
            f"cuBLAS could not be loaded ({e}): install the CUDA toolkit, or its part that comes "
            "from PyPI, nvidia-cublas, in the version that CuPy is made for"
        ) from e
    return ctypes.CDLL(path)
