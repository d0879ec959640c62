"""Launches of which all blocks run at once, or in clusters: what CuPy's own launch cannot ask for.

They go through ``cuLaunchKernelEx`` (CUDA Driver API, "Execution Control"), as ``cuda.bindings``
has it.
"""

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from gpurnn.cuda.packages import needed

__all__ = ["PORTABLE_CLUSTER", "allow_clusters", "launch"]

PORTABLE_CLUSTER = 8
"""Blocks of a cluster that every GPU with clusters runs; more a kernel must be allowed to have."""


def launch(
    function_pointer: int,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: Sequence[int],
    *,
    shared: int,
    stream: int,
    cluster: int = 1,
    cooperative: bool = False,
) -> None:
    """Queue a kernel on a stream of the current context.

    Args:
        function_pointer: the kernel, a ``CUfunction``.
        grid: blocks along x, y and z, those of all clusters together.
        block: threads along x, y and z.
        arguments: its arguments, each of 64 bits.
        shared: bytes of dynamic shared memory.
        stream: a ``CUstream``; 0 is the default one.
        cluster: blocks of a cluster, along x.
        cooperative: run all blocks at once, or fail.

    Raises:
        ValueError: the cluster does not divide the grid.
        RuntimeError: CUDA refuses; the message has its name for the error, and what was asked for.
        ImportError: ``cuda.bindings`` is not installed.
    """
    if cluster < 1 or grid[0] % cluster:
        raise ValueError(
            f"cluster is {cluster} and grid {grid}: expected a cluster that divides the blocks "
            "along x"
        )
    driver = _driver()
    config = _config(grid, block, shared, stream, cluster, cooperative)
    parameters = (tuple(arguments), (ctypes.c_int64,) * len(arguments))
    (result,) = driver.cuLaunchKernelEx(config, driver.CUfunction(function_pointer), parameters, 0)
    if result != driver.CUresult.CUDA_SUCCESS:
        how = [f"clusters of {cluster}"] if cluster > 1 else []
        how += ["all at once"] if cooperative else []
        _check(
            driver,
            result,
            f"a launch of {math.prod(grid)} blocks{_listed(how)} of {math.prod(block)} threads, "
            f"{shared:,} bytes of dynamic shared memory",
        )


@lru_cache(maxsize=1024)
def _config(
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared: int,
    stream: int,
    cluster: int,
    cooperative: bool,
) -> Any:
    """Return a ``CUlaunchConfig``, kept: to make one takes longer than to launch."""
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes = shared
    config.hStream = driver.CUstream(stream)
    attributes = []
    if cluster > 1:
        size = driver.CUlaunchAttribute()
        size.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size.value.clusterDim.x = cluster
        size.value.clusterDim.y = 1
        size.value.clusterDim.z = 1
        attributes.append(size)
    if cooperative:
        at_once = driver.CUlaunchAttribute()
        at_once.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        at_once.value.cooperative = 1
        attributes.append(at_once)
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config


def allow_clusters(function_pointer: int, size: int) -> None:
    """Let a kernel have clusters of so many blocks: above 8 a GPU must be asked.

    Raises:
        RuntimeError: CUDA refuses; the message has its name for the error.
        ImportError: ``cuda.bindings`` is not installed.
    """
    if size <= PORTABLE_CLUSTER:
        return
    driver = _driver()
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    (result,) = driver.cuFuncSetAttribute(driver.CUfunction(function_pointer), attribute, 1)
    _check(driver, result, f"leave for clusters of {size} blocks")


def _driver() -> Any:
    return needed("cuda.bindings.driver", "group kernels are launched by cuda-bindings", "cuda13")


def _listed(how: Sequence[str]) -> str:
    return f" ({', '.join(how)})" if how else ""


def _check(driver: Any, result: Any, asked: str) -> None:
    if result != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA refuses {asked}: {result.name}")
