"""The doctor: says what is there, what is missing, what is broken, and raises nothing."""

import importlib.metadata
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gpurnn.cli import app
from gpurnn.cuda import engines
from gpurnn.doctor import Finding, broken, device, examine, kernels, packages, storage
from gpurnn.doctor import __main__ as doctor_module
from gpurnn.doctor.findings import found_by


class FakeRuntimeError(RuntimeError):
    """What the fake CUDA runtime raises."""


class FakeRuntime:
    """CUDA's runtime, with some answers."""

    CUDARuntimeError = FakeRuntimeError

    def __init__(self, driver: int = 13_020, runtime: int = 13_020, count: int = 1) -> None:
        self.driver, self.runtime, self.count = driver, runtime, count

    def driverGetVersion(self) -> int:
        return self.driver

    def runtimeGetVersion(self) -> int:
        return self.runtime

    def getDeviceCount(self) -> int:
        if self.count < 0:
            name = "InsufficientDriver: too old" if self.count == -1 else "NoDevice: none"
            raise FakeRuntimeError(f"cudaError{name}")
        return self.count

    def memGetInfo(self) -> tuple[int, int]:
        return 70 << 30, 80 << 30


class FakeDevice:
    """A device that is none."""

    def __init__(self, index: int = 0) -> None:
        self.id = index

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a CuPy with a runtime that answers as told."""

    def install(**answers: int) -> None:
        cuda = types.SimpleNamespace(runtime=FakeRuntime(**answers), Device=FakeDevice)
        fake = types.SimpleNamespace(cuda=cuda, asarray=np.asarray)
        monkeypatch.setattr(engines, "cupy", lambda: fake)
        monkeypatch.setattr(kernels, "cupy", lambda: fake)
        limits = __import__("gpurnn.planning", fromlist=["DEVICES"]).DEVICES["H100"]
        monkeypatch.setattr(engines, "limits_of", lambda _: limits)
        monkeypatch.setattr(device, "nvidia_smi", lambda: {"driver_version": "580.1"})
        monkeypatch.setattr(device, "listed_gpus", list)

    return install


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_everything_that_is_installed_here_works() -> None:
    found = by_name(examine())
    assert [f for f in found.values() if f.status == "failed"] == []
    assert found["gpurnn"].status == found["Python"].status == found["NumPy"].status == "ok"
    assert found["NumPy"].detail == np.__version__
    assert all(
        f.advice for f in found.values() if f.status not in ("ok",) and f.name != "compiling"
    )


def test_kernels_under_the_emulator_and_compiled() -> None:
    pytest.importorskip("greenlet", reason="the emulator needs greenlet")
    pytest.importorskip("numba.cuda", reason="the kernels need numba-cuda")
    found = by_name(examine())
    for name in (
        "emulator, resident",
        "emulator, step",
        "emulator, concatenated",
        "emulator, gemm",
        "emulator, Group(blocks=2, exchange='flags')",
        "emulator, Group(blocks=2, exchange='counter')",
        "emulator, Group(blocks=2, exchange='cluster')",
        "emulator, resident, float16",
        "emulator, resident, bfloat16",
        "emulator, Group(blocks=2, exchange='flags'), float16",
        "emulator, step, past a tile",
    ):
        assert found[name].status == "ok"
        assert "as the reference" in found[name].detail
    for name in ("compiling for sm_80", "compiling for sm_90"):
        assert found[name].status == "ok", found[name]


def test_looking_only() -> None:
    names = set(by_name(examine(checks=False)))
    assert not [n for n in names if n.startswith(("emulator", "compiling", "GPU,"))]


def test_missing_package_comes_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = by_name(packages.packages())
    assert found["CuPy"] == Finding(
        "CuPy", "missing", "not installed; for arrays on a GPU", "pip install 'gpurnn[cuda13]'"
    )
    assert found["greenlet"].advice == "pip install 'gpurnn[emulator]'"
    assert found["gpurnn"].status == "ok"
    assert {f.status for f in found.values()} == {"ok", "missing"}
    assert [f.status for f in kernels.compiled()] == ["missing"]
    assert [f.status for f in kernels.emulated_checks()] == ["missing"]


def test_package_whose_module_is_gone_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_findable", lambda name: name != "numpy")
    found = by_name(packages.packages())["NumPy"]
    assert (found.status, found.advice) == ("failed", "pip install numpy --force-reinstall")
    assert "the module numpy cannot be found" in found.detail


@pytest.mark.parametrize(("toolkit", "status"), [(13, "ok"), (12, "warning")])
def test_majors_of_cupy_and_compiler(
    monkeypatch: pytest.MonkeyPatch, toolkit: int, status: str
) -> None:
    monkeypatch.setattr(packages, "_compilers", lambda: iter(()))
    monkeypatch.setattr(packages, "_cupy_major", lambda: 13)
    monkeypatch.setattr(packages, "_toolkit_major", lambda: toolkit)
    (found,) = packages.versions_fit()
    assert found.status == status
    assert (found.advice == "pip install cupy-cuda12x") == (status == "warning")


def test_package_that_cannot_be_imported_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "libcublas.so.13: cannot open shared object file"
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text(f"raise ImportError({text!r})")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] in ("cupy", "cupy_backends")]:
        monkeypatch.delitem(sys.modules, name)
    engines.cupy.cache_clear()
    found = by_name(examine(checks=False))
    engines.cupy.cache_clear()
    assert found["CuPy"].status == found["GPU"].status == "failed"
    assert f"cupy cannot be imported: ImportError: {text}" in found["CuPy"].detail
    assert text in found["GPU"].detail and "cannot be imported" in found["GPU"].detail
    assert found["GPU"].advice.endswith("--force-reinstall")
    assert broken(found.values())


def test_major_of_a_cupy_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built from source, or conda's: no distribution's name says it, so CuPy is asked."""
    runtime = types.SimpleNamespace(runtimeGetVersion=lambda: 12_080)
    fake = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(packages.compiler, "installed", lambda *_: None)
    monkeypatch.setattr(packages, "_findable", lambda _: True)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    assert packages._cupy_major() == 12
    monkeypatch.setitem(sys.modules, "cupy", None)  # cannot be imported
    assert packages._cupy_major() is None


@pytest.mark.parametrize(
    ("answers", "why", "status"),
    [
        ({"driver": 0}, "no NVIDIA driver is installed", "missing"),
        ({"count": 0}, "the driver sees no device", "missing"),
        ({"count": -2}, "the driver sees no device", "missing"),
        ({"driver": 12_080, "count": -1}, "too old); the driver is for CUDA 12.8", "failed"),
    ],
)
def test_why_there_is_no_gpu(
    fake_cuda: Any, answers: dict[str, int], why: str, status: str
) -> None:
    fake_cuda(**answers)
    assert why in str(device.why_no_gpu())
    (found,) = device.devices()
    assert found.status == status
    assert found.detail.startswith("no GPU: kernels run in the emulator only (")
    assert why in found.detail
    assert list(kernels.gpu_checks()) == []


@pytest.mark.parametrize("answers", [{"driver": 0}, {"count": 0}, {"count": -2}])
def test_gpu_that_nvidia_smi_lists_and_cupy_cannot_use(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch, answers: dict[str, int]
) -> None:
    fake_cuda(**answers)
    monkeypatch.setattr(device, "listed_gpus", lambda: ["GPU 0: NVIDIA H100"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    (found,) = device.devices()
    assert found.status == "failed"
    assert "nvidia-smi lists GPU 0: NVIDIA H100, but CuPy cannot use it" in found.detail
    assert "CUDA_VISIBLE_DEVICES is '7'" in found.detail


def test_no_cupy_is_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def cupy() -> Any:
        raise ImportError("No module named 'cupy'")

    monkeypatch.setattr(engines, "cupy", cupy)
    monkeypatch.setattr(device, "installed", lambda *_: False)
    (found,) = device.devices()
    assert found.status == "missing"
    assert "CuPy is missing" in found.detail
    assert found.advice == "pip install 'gpurnn[cuda13]'"


@pytest.mark.parametrize(
    ("answers", "status", "told"),
    [
        ({}, "ok", "driver 580.1, for CUDA 13.2; CuPy's runtime is CUDA 13.2"),
        ({"driver": 13_000}, "warning", "for CUDA 13.0"),
        ({"driver": 12_080}, "failed", "for CUDA 12.8"),
    ],
)
def test_driver_and_runtime(
    fake_cuda: Any, answers: dict[str, int], status: str, told: str
) -> None:
    fake_cuda(**answers)
    found = by_name(device.devices())
    assert found["driver"].status == status
    assert told in found["driver"].detail
    assert bool(found["driver"].advice) == (status != "ok")
    assert found["GPU 0"].detail == (
        "NVIDIA H100, compute capability 9.0, 132 multiprocessors at 1.75 GHz, "
        "80 GiB of memory (70 free), 227 KiB of shared memory a block"
    )


def test_gpu_checks_run_all_kinds(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the emulator for a GPU: kernels, dtypes, ids and floats, an activation of one's own."""
    pytest.importorskip("greenlet", reason="the emulator needs greenlet")
    pytest.importorskip("numba.cuda", reason="the kernels need numba-cuda")
    from gpurnn import emulated

    fake_cuda()
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    monkeypatch.setattr(kernels, "GPU_SIZES", kernels.EMULATED_SIZES)
    # This GPU is none that could train.
    monkeypatch.setattr(kernels.language_model, "gpu_checks", lambda: iter(()))
    with emulated(check_races=False):
        found = by_name(kernels.gpu_checks())
    assert {f.status for f in found.values()} == {"ok"}, found
    assert len(found) == 53
    assert "GPU, resident, float16, tanh, ids" in found
    assert "GPU, step, float32, own activation, floats" in found
    assert "GPU, concatenated, bfloat16, tanh, floats" in found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_type_that_is_off_by_little_is_wrong(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Five of its roundings are too many: sums are float32, and only what is stored is rounded."""
    pytest.importorskip("greenlet", reason="the emulator needs greenlet")
    pytest.importorskip("numba.cuda", reason="the kernels need numba-cuda")
    pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    from gpurnn.cuda import operations

    right = operations.rnn_backward

    def spoilt(*arguments: Any) -> Any:
        *others, dW_hh, db_h = right(*arguments)
        factor = 1 + 6 * kernels._type(dtype)[1]
        return (*others, (dW_hh.astype(np.float32) * factor).astype(dW_hh.dtype), db_h)

    monkeypatch.setattr(operations, "rnn_backward", spoilt)
    found = by_name(kernels.emulated_checks())
    assert found[f"emulator, resident, {dtype}"].status == "failed"
    assert "dW_hh is off by" in found[f"emulator, resident, {dtype}"].detail


def test_wrong_numbers_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("greenlet", reason="the emulator needs greenlet")
    pytest.importorskip("numba.cuda", reason="the kernels need numba-cuda")
    from gpurnn.cuda import operations

    right = operations.rnn_backward

    def spoilt(*arguments: Any) -> Any:
        dX, dh_0, dW_xh, dW_hh, db_h = right(*arguments)
        return dX, dh_0, dW_xh, dW_hh * np.float32(1.001), db_h

    monkeypatch.setattr(operations, "rnn_backward", spoilt)
    found = by_name(kernels.emulated_checks())
    assert found["emulator, step"].status == "failed"
    assert found["emulator, step"].detail.startswith("wrong numbers: dW_hh is off by ")
    assert broken(found.values())


def test_rule_of_the_checks() -> None:
    truth = np.array([1.0, -2.0])
    u = 2.0**-24
    limit = kernels.FACTOR * (1e-7 + 3 * u * 2)
    for off, right in ((0.99 * limit, True), (1.01 * limit, False), (np.nan, False)):
        result, baseline = np.array([1.0, -2 + off]), np.array([1 + 1e-7, -2.0])
        found = kernels.within(result, truth, baseline, 9, u)
        assert found[0] is right
        assert found[2] == pytest.approx(limit, rel=1e-6)
    empty = np.empty(0)
    assert kernels.within(empty, empty, None, 9, u)[0]


def test_error_is_a_finding() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("first", "ok", "fine")
        raise OSError("libnvvm.so is not there")

    found = list(found_by("second", check))
    assert [f.status for f in found] == ["ok", "failed"]
    assert found[1].name == "second"
    assert found[1].detail == "OSError: libnvvm.so is not there"
    assert broken(found)
    assert not broken(found[:1])


def test_kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPURNN_CACHE", str(tmp_path / "there" / "is" / "none"))
    (found,) = storage.kernel_cache()
    assert (found.status, found.detail.partition(": ")[2]) == ("ok", "0 kept, 0.0 MiB")
    assert not (tmp_path / "there").exists()
    kept = tmp_path / "kernels"
    kept.mkdir()
    (kept / "a.cubin").write_bytes(bytes(1 << 20))
    monkeypatch.setenv("GPURNN_CACHE", str(tmp_path))
    (found,) = storage.kernel_cache()
    assert found.detail == f"{kept}: 1 kept, 1.0 MiB"


def test_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("GPURNN_CACHE", str(tmp_path))
    monkeypatch.setattr(storage.tempfile, "TemporaryFile", refuse)
    (found,) = storage.kernel_cache()
    assert found.status == "warning"
    assert "cannot be written: [Errno 13]" in found.detail
    assert "GPURNN_CACHE" in found.advice


def test_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for text, told in (
        ("580.1, 1980 MHz, 2619 MHz, 1980 MHz, 700.00 W, 31", "1980 MHz"),
        ("what is this", None),
    ):
        program.write_text(f"#!/bin/sh\necho '{text}'\n")
        program.chmod(0o755)
        answer = device.nvidia_smi()
        assert (None if answer is None else answer["clocks.sm"]) == told
    program.write_text("#!/bin/sh\n[ $1 = -L ] && echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    assert device.listed_gpus() == ["GPU 0: NVIDIA H100 (UUID: GPU-1)"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert device.nvidia_smi() is None
    assert device.listed_gpus() == []


def run(monkeypatch: pytest.MonkeyPatch, findings: list[Finding], *options: str) -> Any:
    monkeypatch.setattr("gpurnn.doctor.examine", lambda *, checks: iter(findings))
    return CliRunner().invoke(app, ["doctor", *options])


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("missing", 0)])
def test_command_is_content(monkeypatch: pytest.MonkeyPatch, status: Any, code: int) -> None:
    done = run(monkeypatch, [Finding("thing", status, "as it [is]", "do that")])
    assert done.exit_code == code
    assert done.stdout.split("\n")[:2] == [f"{status:<7}  thing: as it [is]", "         → do that"]


def test_command_fails_if_something_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("a", "ok", "fine"), Finding("b", "failed", "not", "mend it")]
    done = run(monkeypatch, findings, "--json", "--skip-checks")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["works"] is False
    assert found["findings"][1] == {
        "name": "b",
        "status": "failed",
        "detail": "not",
        "advice": "mend it",
    }


def test_module_without_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding("a", "ok", "fine"), Finding("b", "failed", "not", "mend it")]
    monkeypatch.setattr(doctor_module, "examine", lambda *, checks: iter(findings))
    assert doctor_module.main(["--json"]) == 1
    assert [f["status"] for f in json.loads(capsys.readouterr().out)["findings"]] == [
        "ok",
        "failed",
    ]
    assert doctor_module.main([]) == 1
    assert capsys.readouterr().out == "ok       a: fine\nfailed   b: not\n         → mend it\n"
