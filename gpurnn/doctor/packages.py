"""What is installed, in which version, and whether the versions fit each other."""

import importlib
import importlib.util
import platform
import warnings
from collections.abc import Iterator

import gpurnn
from gpurnn import compiler
from gpurnn.doctor.findings import Finding

__all__ = ["PACKAGES", "import_error", "installed", "packages", "versions_fit"]

CUDA = "pip install 'gpurnn[cuda13]'"
EMULATOR = "pip install 'gpurnn[emulator]'"

# Module, distributions that bring it, what it is for, what to install, in one place.
PACKAGES: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "NumPy": ("numpy", ("numpy",), "everything", "pip install numpy"),
    "safetensors": ("safetensors", ("safetensors",), "model files", "pip install safetensors"),
    "pooch": ("pooch", ("pooch",), "the cache folder", "pip install pooch"),
    "numba": ("numba", ("numba",), "kernels and your own activations", EMULATOR),
    "numba-cuda": ("numba_cuda", ("numba-cuda",), "compiling kernels", EMULATOR),
    "greenlet": ("greenlet", ("greenlet",), "running kernels without a GPU", EMULATOR),
    "cuda-bindings": ("cuda.bindings", ("cuda-bindings",), "compiling kernels", EMULATOR),
    "cuda-core": ("cuda.core", ("cuda-core",), "compiling kernels", EMULATOR),
    "CuPy": ("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy"), "arrays on a GPU", CUDA),
    "ml_dtypes": ("ml_dtypes", ("ml_dtypes",), "bfloat16", "pip install ml_dtypes"),
    "torch": ("torch", ("torch",), "comparison only", "pip install torch"),
}


def packages() -> Iterator[Finding]:
    """Yield gpurnn, Python, and each package: its version, that it is missing, or its error."""
    yield Finding("gpurnn", "ok", gpurnn.__version__)
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for name, (module, distributions, purpose, install) in PACKAGES.items():
        found = compiler.installed(*distributions)
        known = found or "version unknown"
        again = f"{install} --force-reinstall"
        if not installed(module, distributions):
            yield Finding(name, "missing", f"not installed; for {purpose}", install)
        elif not _findable(module):
            detail = f"{known} is installed, but the module {module} cannot be found"
            yield Finding(name, "failed", detail, again)
        elif (error := import_error(module)) is not None:
            detail = f"{known} is installed, but {module} cannot be imported: {error}"
            yield Finding(name, "failed", detail, again)
        else:
            yield Finding(name, "ok", known)


def installed(module: str, distributions: tuple[str, ...]) -> bool:
    """Whether a package is there: its module is found or a distribution of it is installed."""
    return _findable(module) or compiler.installed(*distributions) is not None


def import_error(module: str) -> str | None:
    """Import a module; return the error in words if that fails, None if it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it is not content with is not what is asked
            importlib.import_module(module)
    except Exception as e:  # a broken package may raise anything
        return f"{type(e).__name__}: {e}"
    return None


def versions_fit() -> Iterator[Finding]:
    """Yield whether CuPy and numba-cuda are made for one major version of CUDA; NVVM, nvJitLink."""
    yield from _compilers()
    cupy_major = _cupy_major()
    toolkit = _toolkit_major()
    if cupy_major is None or toolkit is None:
        return
    if cupy_major == toolkit:
        yield Finding("CUDA majors", "ok", f"CuPy and the compiler are both for CUDA {toolkit}")
    else:
        yield Finding(
            "CUDA majors",
            "warning",
            f"CuPy is for CUDA {cupy_major}, the compiler for CUDA {toolkit}: a driver for "
            "the higher one runs both",
            f"pip install cupy-cuda{toolkit}x",
        )


def _compilers() -> Iterator[Finding]:
    if not _findable("numba_cuda") or not _findable("cuda.bindings"):
        return
    from cuda.bindings import nvjitlink, nvvm

    for name, library, package in (
        ("NVVM", nvvm, "nvidia-nvvm"),
        ("nvJitLink", nvjitlink, "nvidia-nvjitlink"),
    ):
        try:
            found = ".".join(str(part) for part in library.version())
        except Exception as e:  # what a missing library raises is the bindings' own
            yield Finding(
                name, "failed", f"{type(e).__name__}: {e}", f"{EMULATOR}, which brings {package}"
            )
            continue
        known = compiler.installed(package)
        origin = f"{package} {known}" if known else "from the CUDA toolkit on this machine"
        yield Finding(name, "ok", f"{found} ({origin})")


def _cupy_major() -> int | None:
    """Return the CUDA major that CuPy is made for: by its package's name, else it is asked.

    One built from source, or conda's, is called cupy alone.
    """
    for major in (13, 12, 11):
        if compiler.installed(f"cupy-cuda{major}x") is not None:
            return major
    if not _findable("cupy") or import_error("cupy") is not None:
        return None  # told by packages()
    runtime = importlib.import_module("cupy").cuda.runtime
    return int(runtime.runtimeGetVersion()) // 1000


def _toolkit_major() -> int | None:
    """Return the CUDA major of the toolkit that kernels are compiled with: nvJitLink's version."""
    if not _findable("cuda.bindings"):
        return None
    from cuda.bindings import nvjitlink

    return int(nvjitlink.version()[0])


def _findable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that should hold it is not there
        return False
