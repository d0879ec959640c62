"""Which GPUs there are, and whether driver and CUDA runtime fit each other."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpurnn.doctor.findings import Finding
from gpurnn.doctor.packages import PACKAGES, installed

__all__ = ["NoGPU", "describe", "devices", "listed_gpus", "no_gpu", "nvidia_smi", "why_no_gpu"]

DRIVER_ADVICE = "on a machine with an NVIDIA GPU: install or update its driver"

QUERY = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.limit",
    "temperature.gpu",
)


@dataclass(frozen=True)
class NoGPU:
    """Why no GPU can be used; ``broken``: something is there that should work, and does not."""

    why: str
    broken: bool
    advice: str


def why_no_gpu() -> str | None:
    """Return why no GPU can be used (CuPy, driver or device missing), or None where one can."""
    found = no_gpu()
    return None if found is None else found.why


def no_gpu() -> NoGPU | None:
    """Return why no GPU can be used and whether that is a fault, or None where one can be used.

    Not a fault: CuPy is not installed, there is no driver, or there is no device. A fault: CuPy is
    installed but cannot be imported, the CUDA runtime refuses the driver that is there, or
    nvidia-smi lists a GPU that CuPy does not see.
    """
    from gpurnn.cuda.engines import cupy

    module, distributions, _, install = PACKAGES["CuPy"]
    try:
        runtime = cupy().cuda.runtime
    except Exception as e:  # a broken installation may raise anything
        if not installed(module, distributions):
            return NoGPU(f"CuPy is missing: {e}", False, install)
        told = f"CuPy is installed but cannot be imported: {type(e).__name__}: {e}"
        return NoGPU(told, True, f"{install} --force-reinstall")
    driver = 0
    try:
        driver = int(runtime.driverGetVersion())
        count = int(runtime.getDeviceCount()) if driver else 0
    except runtime.CUDARuntimeError as e:
        if "NoDevice" not in str(e):
            told = f"; the driver is for CUDA {version_of(driver)}" if driver else ""
            return NoGPU(f"the CUDA runtime refuses ({e}){told}", True, DRIVER_ADVICE)
        count = 0
    if count:
        return None
    why = "the driver sees no device" if driver else "no NVIDIA driver is installed"
    if listed := listed_gpus():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        told = "" if hidden is None else f"; CUDA_VISIBLE_DEVICES is {hidden!r}"
        told = f"nvidia-smi lists {listed[0]}, but CuPy cannot use it: {why}{told}"
        return NoGPU(told, True, DRIVER_ADVICE)
    return NoGPU(why, False, DRIVER_ADVICE)


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
    missing = no_gpu()
    if missing is not None:
        detail = f"no GPU: kernels run in the emulator only ({missing.why})"
        yield Finding("GPU", "failed" if missing.broken else "missing", detail, missing.advice)
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


def listed_gpus() -> list[str]:
    """Return the GPUs that nvidia-smi lists, none where it is not there or does not answer."""
    answer = _asked_smi("-L")
    lines = [] if answer is None else [line.strip() for line in answer.splitlines()]
    return [line for line in lines if line.startswith("GPU ")]


def nvidia_smi() -> dict[str, str] | None:
    """Return driver version, clocks, power limit and temperature of GPU 0 by nvidia-smi.

    None where nvidia-smi is not there or does not answer.
    """
    answer = _asked_smi(f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0")
    values = [] if answer is None else [value.strip() for value in answer.strip().split(",")]
    return dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else None


def _asked_smi(*options: str) -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *options], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _runtime_version() -> int:
    from gpurnn.cuda.engines import cupy

    return int(cupy().cuda.runtime.runtimeGetVersion())
