"""As much of cuBLAS as the host's code uses, behind real C function pointers, on NumPy.

It is as strict as cuBLAS, and where that would read or write memory that is not its, it refuses. A
call that is not right returns a status, and the reason is the last of ``faults``.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["FakeCuBLAS"]

SUCCESS, NOT_INITIALIZED, INVALID_VALUE, NOT_SUPPORTED = 0, 1, 7, 15
TYPES = {0: np.float32, 1: np.float64, 2: np.float16, 14: ml_dtypes.bfloat16}
# computed with → (of A and B, of C)
SUPPORTED = {
    68: {(0, 0), (2, 2), (2, 0), (14, 14), (14, 0)},
    70: {(1, 1)},
    77: {(0, 0)},
}
WORKSPACE_ALIGNMENT = 256

P, I = ctypes.c_void_p, ctypes.c_int


class FakeCuBLAS:
    """The library: its functions are attributes, ``calls`` the names and arguments of all calls."""

    def __init__(self, fake: Any) -> None:
        self.fake = fake
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.faults: list[str] = []
        self.statuses: dict[str, int] = {}  # to be returned in place of doing anything
        self.devices: dict[int, int] = {}  # of handles
        self.streams: dict[int, int] = {}
        self.workspaces: dict[int, tuple[int, int] | None] = {}
        self.modes: dict[int, int] = {}
        matrix = (P, I, I)
        functions = {
            "cublasCreate_v2": (self._create, ctypes.POINTER(P)),
            "cublasSetStream_v2": (self._set_stream, P, P),
            "cublasSetWorkspace_v2": (self._set_workspace, P, P, ctypes.c_size_t),
            "cublasSetMathMode": (self._set_math_mode, P, I),
            "cublasGemmEx": (self._gemm, P, *5 * (I,), P, *matrix, *matrix, P, *matrix, I, I),
        }
        for name, (does, *arguments) in functions.items():
            setattr(self, name, self._function(name, does, *arguments))

    def _function(self, name: str, does: Callable[..., int], *arguments: Any) -> Any:
        def called(*given: Any) -> int:
            self.calls.append((name, given))
            if name in self.statuses:
                return self.statuses[name]
            try:
                return does(*given)
            except AssertionError as e:
                self.faults.append(str(e))
                return INVALID_VALUE

        return ctypes.CFUNCTYPE(I, *arguments)(called)

    def _create(self, handle: Any) -> int:
        handle[0] = 0x5000 + 16 * len(self.devices)
        self.devices[handle[0]] = self.fake.current.id
        return SUCCESS

    def _set_stream(self, handle: int, stream: int | None) -> int:
        if handle not in self.devices:
            return NOT_INITIALIZED
        self.streams[handle], self.workspaces[handle] = stream or 0, None
        return SUCCESS

    def _set_workspace(self, handle: int, address: int, nbytes: int) -> int:
        assert address % WORKSPACE_ALIGNMENT == 0, "a workspace off its alignment"
        assert self.fake.holds(address, nbytes), "a workspace that is no memory"
        self.workspaces[handle] = address, nbytes
        return SUCCESS

    def _set_math_mode(self, handle: int, mode: int) -> int:
        self.modes[handle] = mode
        return SUCCESS

    def _gemm(self, handle: int, *given: Any) -> int:
        if handle not in self.devices:
            return NOT_INITIALIZED
        op_A, op_B, m, n, k, alpha, A, type_A, lda, B, type_B, ldb, beta, C, type_C, ldc, *rest = (
            given
        )
        compute, algorithm = rest
        assert self.fake.current.id == self.devices[handle], "a handle of another device"
        assert self.streams[handle] == self.fake.stream.ptr, "not the current stream"
        assert self.modes[handle] == 16, "parts of a sum may be added as halves"
        assert algorithm == -1 and op_A in (0, 1) and op_B in (0, 1)
        if type_A != type_B or (type_A, type_C) not in SUPPORTED.get(compute, set()):
            return NOT_SUPPORTED
        scalar = ctypes.c_double if compute == 70 else ctypes.c_float
        assert scalar.from_address(alpha).value == 1 and scalar.from_address(beta).value == 0
        workspace = self.workspaces[handle]

        def run() -> None:
            # by rows: Cᵀ = op(B)ᵀ op(A)ᵀ, with the arrays lying as the caller's did
            left = self._matrix("B", B, type_B, ldb, *((n, k) if op_B == 0 else (k, n)))
            right = self._matrix("A", A, type_A, lda, *((k, m) if op_A == 0 else (m, k)))
            out = self._matrix("C", C, type_C, ldc, n, m)
            summed = np.float64 if compute == 70 else np.float32
            left, right = (a.astype(summed, copy=False) for a in (left, right))
            out[...] = (left if op_B == 0 else left.T) @ (right if op_A == 0 else right.T)
            if workspace is not None:  # as one that is used is left
                assert self.fake.holds(*workspace), "a workspace that was freed"
                ctypes.memset(workspace[0], 0xFF, min(workspace[1], 64))

        if self.fake.stream.captured is None:
            run()
        else:
            self.fake.queue(run)
        return SUCCESS

    def _matrix(self, name: str, address: int, kind: int, ld: int, rows: int, columns: int) -> Any:
        """Return what cuBLAS takes for a matrix of ``rows`` columns, as NumPy lays it out."""
        dtype = np.dtype(TYPES[kind])
        assert ld >= columns, f"{name} has the leading dimension {ld}, below {columns}"
        nbytes = ((rows - 1) * ld + columns) * dtype.itemsize
        assert address % dtype.itemsize == 0, f"{name} is off its alignment"
        assert self.fake.holds(address, nbytes), f"{name} reaches beyond its memory"
        flat = np.frombuffer((ctypes.c_byte * nbytes).from_address(address), dtype)
        strides = (ld * dtype.itemsize, dtype.itemsize)
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), strides)
