"""The wheel holds everything, and works far from the source tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked and new sources, as a user's pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: the list of source files is taken from git")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, cwd=folder)
    (built,) = folder.glob("gpurnn-*.whl")
    return built


def expected_modules() -> set[str]:
    """Every module of the source tree by the name it is imported under."""
    modules = set()
    for folder, package in (("gpurnn", "gpurnn"), ("kernels", "gpurnn.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = (package, *path.relative_to(ROOT / folder).with_suffix("").parts)
            modules.add(".".join(parts).removesuffix(".__init__"))
    return modules


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    found = {
        name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for name in names
        if name.endswith(".py")
    }
    assert found == expected_modules()
    assert {"gpurnn/py.typed", "gpurnn/tuned.json"} <= set(names)
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "notebooks/"))]
    assert any(n.endswith("LICENSE") for n in names)


def test_wheel_installed_elsewhere_finds_every_module(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(wheel)], check=True, cwd=tmp_path)
    script = "import importlib, sys\n"
    script += "for name in sys.argv[1:]:\n"
    script += "    print(name, importlib.import_module(name).__file__)\n"
    modules = sorted(expected_modules())
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *modules],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == modules
    for name, file in lines:
        assert Path(file).is_relative_to(site), f"{name} came from {file}"
    table = "from gpurnn import tuned; print(tuned.latencies('NVIDIA H100 80GB HBM3', 1.98).l2)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", table],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) == 150


def test_kernels_folder_is_not_importable_by_its_own_name() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "is the source of the package gpurnn.kernels" in done.stderr
    assert "pip install -e ." in done.stderr


def test_import_is_light(tmp_path: Path) -> None:
    """Importing the library loads neither GPU packages nor what only the command line needs."""
    heavy = ["numba", "cupy", "torch", "matplotlib", "typer", "rich", "pooch"]
    script = f"import sys, gpurnn; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
