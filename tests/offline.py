"""Compiling kernels on a machine that need not have a GPU."""

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

cuda = pytest.importorskip("numba.cuda", reason="compiling kernels needs numba-cuda")

__all__ = ["assemble", "each_target", "ptx_of"]

Target = tuple[int, int]

each_target = pytest.mark.parametrize("target", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])


def ptx_of(kernel: Callable[..., None], signature: tuple[Any, ...], target: Target) -> str:
    """Return the PTX of a kernel, for a compute capability."""
    device = SimpleNamespace(compute_capability=target)
    with mock.patch("numba.cuda.dispatcher.get_current_device", return_value=device):
        ptx, _ = cuda.compile(kernel, signature, cc=target, output="ptx", device=False, abi="numba")
    return str(ptx)


def assemble(ptx: str, target: Target) -> None:
    """Have ptxas accept the PTX."""
    ptxas = _ptxas()
    if ptxas is None:
        pytest.skip("ptxas is not installed: pip install nvidia-cuda-nvcc")
    command = [ptxas, f"-arch=sm_{target[0]}{target[1]}", "-o", "/dev/null", "-"]
    done = subprocess.run(command, input=ptx, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{done.stderr}\n{ptx}"


def _ptxas() -> str | None:
    for package in ("nvidia.cu13", "nvidia.cuda_nvcc"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # nothing of NVIDIA's is installed
            break
        for folder in (spec and spec.submodule_search_locations) or ():
            if (Path(folder) / "bin" / "ptxas").exists():
                return str(Path(folder) / "bin" / "ptxas")
    return shutil.which("ptxas")
