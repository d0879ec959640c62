"""The doctor: says what is there, what is missing, what is broken, and raises nothing."""

import importlib.metadata
import importlib.util
import json
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
            raise FakeRuntimeError("cudaErrorInsufficientDriver: too old")
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
    for name in ("emulator, resident", "emulator, step"):
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
    monkeypatch.setattr(packages, "_importable", lambda name: name != "numpy")
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


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ({"driver": 0}, "no NVIDIA driver is installed"),
        ({"count": 0}, "the driver sees no device"),
        ({"driver": 12_080, "count": -1}, "too old); the driver is for CUDA 12.8"),
    ],
)
def test_why_there_is_no_gpu(fake_cuda: Any, answers: dict[str, int], why: str) -> None:
    fake_cuda(**answers)
    assert why in str(device.why_no_gpu())
    (found,) = device.devices()
    assert found.status == "missing"
    assert found.detail.startswith("no GPU: kernels run in the emulator only (")
    assert why in found.detail
    assert list(kernels.gpu_checks()) == []


def test_no_cupy_is_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def cupy() -> Any:
        raise ImportError("No module named 'cupy'")

    monkeypatch.setattr(engines, "cupy", cupy)
    (found,) = device.devices()
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
    monkeypatch.setattr(kernels, "GPU_SIZES", kernels.EMULATED_SIZES)
    with emulated(check_races=False):
        found = by_name(kernels.gpu_checks())
    assert {f.status for f in found.values()} == {"ok"}, found
    assert len(found) == 14
    assert "GPU, resident, float16, tanh, ids" in found
    assert "GPU, step, float32, own activation, floats" in found


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
    program.write_text("#!/bin/sh\nexit 9\n")
    assert device.nvidia_smi() is None


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
