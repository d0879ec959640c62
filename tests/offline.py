"""Compiling kernels on a machine that need not have a GPU."""

from collections.abc import Callable
from typing import Any

import pytest

from gpurnn import compiler, resources

cuda = pytest.importorskip("numba.cuda", reason="compiling kernels needs numba-cuda")

__all__ = ["assemble", "each_target", "ptx_of"]

Target = tuple[int, int]

each_target = pytest.mark.parametrize("target", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])


def ptx_of(kernel: Callable[..., None], signature: tuple[Any, ...], target: Target) -> str:
    """Return the PTX of a kernel, for a compute capability."""
    with compiler.compiling_for(target):
        ptx, _ = cuda.compile(kernel, signature, cc=target, output="ptx", device=False, abi="numba")
    return str(ptx)


def assemble(ptx: str, target: Target) -> None:
    """Have ptxas accept the PTX."""
    try:
        assert resources.assemble(ptx, target)
    except resources.ToolMissing as e:
        pytest.skip(str(e))
    except ValueError as e:
        pytest.fail(f"{e}\n{ptx}")
