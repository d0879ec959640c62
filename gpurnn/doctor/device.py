"""Which GPUs there are, and whether driver and CUDA runtime fit each other."""

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from gpurnn.doctor.findings import Finding

__all__ = ["describe", "devices", "nvidia_smi", "why_no_gpu"]

QUERY = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.limit",
    "temperature.gpu",
)


def why_no_gpu() -> str | None:
    """Return why no GPU can be used (CuPy, driver or device missing), or None where one can."""
    from gpurnn.cuda.engines import cupy

    try:
        runtime = cupy().cuda.runtime
    except ImportError as e:
        return f"CuPy is missing: {e}"
    driver = int(runtime.driverGetVersion())
    if driver == 0:
        return "no NVIDIA driver is installed"
    try:
        count = int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError as e:
        return f"the CUDA runtime refuses ({e}); the driver is for CUDA {version_of(driver)}"
    return None if count else "the driver sees no device"


def version_of(number: int) -> str:
    """Return a CUDA version in words: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def describe(device: int | None = None) -> dict[str, Any]:
    """Return a GPU's name and sizes, and the versions of driver and runtime."""
    from gpurnn.cuda.engines import cupy, limits_of

    cuda = cupy().cuda
    index = int(cuda.Device().id) if device is None else device
    limits = limits_of(index)
    with cuda.Device(index):
        free, total = (int(size) for size in cuda.runtime.memGetInfo())
    return {
        "index": index,
        "name": limits.name,
        "compute_capability": list(limits.compute_capability),
        "multiprocessors": limits.multiprocessors,
        "memory_bytes": total,
        "memory_free_bytes": free,
        "shared_per_block": limits.shared_per_block,
        "shared_per_multiprocessor": limits.shared_per_multiprocessor,
        "clock_ghz": limits.clock_ghz,
        "driver_cuda": version_of(cuda.runtime.driverGetVersion()),
        "runtime_cuda": version_of(_runtime_version()),
    }


def devices() -> Iterator[Finding]:
    """Yield each GPU, and whether the driver is new enough for CuPy's CUDA runtime."""
    missing = why_no_gpu()
    if missing is not None:
        advice = "pip install 'gpurnn[cuda13]'" if missing.startswith("CuPy") else ""
        advice = advice or "on a machine with an NVIDIA GPU: install or update its driver"
        detail = f"no GPU: kernels run in the emulator only ({missing})"
        yield Finding("GPU", "missing", detail, advice)
        return
    from gpurnn.cuda.engines import cupy

    runtime = cupy().cuda.runtime
    driver, needed = int(runtime.driverGetVersion()), _runtime_version()
    smi = nvidia_smi()
    told = f"driver {smi['driver_version']}, " if smi else ""
    detail = f"{told}for CUDA {version_of(driver)}; CuPy's runtime is CUDA {version_of(needed)}"
    if driver >= needed:
        yield Finding("driver", "ok", detail)
    elif driver // 1000 == needed // 1000:
        advice = "works as far as minor versions are compatible; a newer driver removes the doubt"
        yield Finding("driver", "warning", detail, advice)
    else:
        advice = f"install a driver for CUDA {needed // 1000}, or cupy-cuda{driver // 1000}x"
        yield Finding("driver", "failed", detail, advice)
    for index in range(int(runtime.getDeviceCount())):
        found = describe(index)
        major, minor = found["compute_capability"]
        yield Finding(
            f"GPU {index}",
            "ok",
            f"{found['name']}, compute capability {major}.{minor}, "
            f"{found['multiprocessors']} multiprocessors at {found['clock_ghz']:.2f} GHz, "
            f"{found['memory_bytes'] / 2**30:.0f} GiB of memory "
            f"({found['memory_free_bytes'] / 2**30:.0f} free), "
            f"{found['shared_per_block'] // 1024} KiB of shared memory a block",
        )


def nvidia_smi() -> dict[str, str] | None:
    """Return driver version, clocks, power limit and temperature of GPU 0 by nvidia-smi.

    None where nvidia-smi is not there or does not answer.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else None


def _runtime_version() -> int:
    from gpurnn.cuda.engines import cupy

    return int(cupy().cuda.runtime.runtimeGetVersion())
