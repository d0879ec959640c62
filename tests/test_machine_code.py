"""Kernels as machine code: parameters as the host packs them, compiled once, kept on disk."""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kernel_setup  # noqa: F401  (skips without what compiles kernels)
import pytest

import gpurnn
import gpurnn.kernels
from gpurnn import compiler, planning
from gpurnn.cuda import machine_code
from gpurnn.cuda.specs import ARGUMENTS, KernelSpec, build, signature
from gpurnn.slots import Updating
from gpurnn.tile import Columns, Scatter, Share, Softmax

pytest.importorskip("cuda.core", reason="machine code needs cuda-core")

TILE = planning.resident_tiles(5, "float32")[0]
SHARE = Share(5, 2, 2, 2, 1, 1, 4)
SCATTER = Scatter(32, 4, 2)
BY_ID = ("resident_forward", "group_forward", "step_forward", "tail_forward")
CHEAP = KernelSpec("layer_backward", None, "relu", "float32")


def spec_of(kind: Any, scaled: bool = False, by_id: bool = False) -> KernelSpec:
    if kind.startswith("generate"):
        wish = planning.Group(2, "flags") if kind == "generate_group" else None
        found = planning.generation_plan(
            rows=1,
            h=5,
            q=6,
            layers=1,
            dtype="float32",
            device=planning.DEVICES["H100"],
            kernel=wish,
        )
        return KernelSpec(kind, found.tile, "tanh", "float32", False, found.exchange)
    sizes: Any = TILE if kind.startswith("resident") else None if kind == "layer_backward" else 16
    exchange = None
    if kind.startswith("group"):
        sizes, exchange = SHARE, "flags"
    if kind in ("scatter", "scatter_parts"):
        sizes = SCATTER
    if kind == "cross_entropy":
        return KernelSpec(kind, Softmax(1, 256), "identity", "float32")
    if kind.startswith("column"):
        sizes = Columns(8)
    if kind.startswith("update"):
        sizes = Updating("adamw")
    return KernelSpec(kind, sizes, "tanh", "float32", scaled, exchange, by_id)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("GPURNN_CACHE", str(tmp_path / "cache"))
    machine_code.cubin.cache_clear()
    yield tmp_path / "cache" / "kernels"
    machine_code.cubin.cache_clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are compiled during a test."""
    names: list[str] = []
    compile_kernel = compiler.compile_kernel

    def noting(function, *arguments):  # type: ignore[no-untyped-def]
        names.append(function.__name__)
        return compile_kernel(function, *arguments)

    monkeypatch.setattr(compiler, "compile_kernel", noting)
    return names


@pytest.mark.parametrize(
    ("kind", "scaled", "by_id"),
    [
        *((kind, False, False) for kind in ARGUMENTS),
        *((kind, True, False) for kind in ("resident_backward", "group_backward", "step_backward")),
        *((kind, False, True) for kind in BY_ID),
    ],
)
def test_the_kernel_s_parameters_are_those_the_host_packs(
    kind: str, scaled: bool, by_id: bool
) -> None:
    spec = spec_of(kind, scaled, by_id)
    _, ptx = compiler.ptx_of(build(spec), signature(spec), (9, 0), spec.threads)
    declared = re.search(r"\.entry[^(]*\(([^)]*)\)", ptx)
    assert declared is not None
    parameters = re.findall(r"\.param \.(\w+)", declared[1])
    packed = sum(
        1 if a is None else len(compiler.packed((1,) * a.ndim, 4, 0)) for a in signature(spec)
    )
    assert parameters == ["u64"] * packed
    assert f".maxntid {spec.threads}" in ptx


def test_an_array_is_packed_in_c_order() -> None:
    assert compiler.packed((2, 3, 5), 4, 1000) == (0, 0, 30, 4, 1000, 2, 3, 5, 60, 20, 4)
    assert compiler.packed((7,), 8, 16) == (0, 0, 7, 8, 16, 7, 8)
    assert compiler.packed((3, 2**31, 2), 2, 0)[-3:] == (2**33, 4, 2)


def test_a_kernel_is_compiled_once_and_kept(folder: Path, compilations: list[str]) -> None:
    first = machine_code.cubin(CHEAP, (9, 0))
    assert first[:4] == b"\x7fELF"
    assert machine_code.cubin(CHEAP, (9, 0)) is first
    machine_code.cubin.cache_clear()  # as another process
    assert machine_code.cubin(CHEAP, (9, 0)) == first
    assert compilations == ["layer_backward"]
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]


@pytest.mark.parametrize("damage", [b"", b"short", None], ids=["empty", "short", "flipped"])
def test_a_damaged_file_is_compiled_anew(
    folder: Path, compilations: list[str], damage: bytes | None
) -> None:
    code = machine_code.cubin(CHEAP, (9, 0))
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    machine_code.cubin.cache_clear()
    assert machine_code.cubin(CHEAP, (9, 0))[:4] == code[:4]
    assert len(compilations) == 2 and path.read_bytes() != damage


def test_threads_that_want_one_kernel_compile_it_once(
    folder: Path, compilations: list[str]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda _: machine_code.cubin(CHEAP, (9, 0)), range(8)))
    assert len(set(codes)) == 1 and compilations == ["layer_backward"]


def test_every_part_of_a_specification_tells_kernels_apart() -> None:
    spec = spec_of("resident_backward")
    others = [
        dataclasses.replace(spec, kind="resident_forward"),
        dataclasses.replace(spec, sizes=TILE._replace(rows=2)),
        dataclasses.replace(spec, activation="relu"),
        dataclasses.replace(spec, dtype="float64"),
        dataclasses.replace(spec, scaled=True),
        dataclasses.replace(spec, exchange="flags"),
        dataclasses.replace(spec, by_id=True),
    ]
    assert len(others) == len(dataclasses.fields(spec))
    keys = {machine_code._key(s, (9, 0)) for s in (spec, *others)}
    assert len(keys | {machine_code._key(spec, (8, 0))}) == 9


def test_the_sources_that_machine_code_depends_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All that a kernel's modules import of the library; a change in any is another origin."""
    names = {path.name for path in machine_code.sources()}
    kernels = {path.name for path in Path(gpurnn.kernels.__path__[0]).glob("*.py")}
    others = {"compiler.py", "specs.py", "dense.py", "tile.py", "narrowing.py", "slots.py"}
    assert kernels | others == names
    imported = {
        name
        for path in machine_code.sources()
        for name in re.findall(r"^from gpurnn\.(\w+)\S* import", path.read_text(), re.MULTILINE)
    }
    # an activation is the user's own, whose kernels are not kept
    others = {"dense", "tile", "narrowing", "compiler", "slots"}
    assert imported - {"kernels", "activation"} == others
    file = tmp_path / "tile.py"
    monkeypatch.setattr(machine_code, "sources", lambda: [file])
    origins = set()
    for text in ("one", "other"):
        file.write_text(text)
        machine_code._origin.cache_clear()
        origins.add(machine_code._origin())
    machine_code._origin.cache_clear()
    assert len(origins) == 2


def test_machine_code_of_two_kernels_is_none() -> None:
    assert compiler.entry_of(b"x\0.text.kernel_1\0.rest\0") == "kernel_1"
    with pytest.raises(ValueError, match="machine code with 2 kernels: expected one"):
        compiler.entry_of(b"\0.text.a\0.text.b\0")
    with pytest.raises(ValueError, match="machine code with 0 kernels: expected one"):
        compiler.entry_of(b"nothing")


def test_another_architecture_or_type_is_another_kernel(
    folder: Path, compilations: list[str]
) -> None:
    machine_code.cubin(CHEAP, (9, 0))
    machine_code.cubin(CHEAP, (8, 0))
    machine_code.cubin(KernelSpec("layer_backward", None, "relu", "float64"), (9, 0))
    machine_code.cubin(KernelSpec("layer_backward", None, "tanh", "float32"), (9, 0))
    assert len(compilations) == 4 == len(list(folder.iterdir()))


def test_a_change_of_the_source_or_the_compiler_is_another_kernel(
    folder: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_code.cubin(CHEAP, (9, 0))
    machine_code.cubin.cache_clear()
    monkeypatch.setattr(compiler, "toolchain", lambda: "another")
    machine_code._origin.cache_clear()
    machine_code.cubin(CHEAP, (9, 0))
    machine_code._origin.cache_clear()
    assert len(compilations) == 2


def test_a_kernel_with_one_s_own_activation_is_kept_for_the_process(
    folder: Path, compilations: list[str]
) -> None:
    own = gpurnn.Activation(lambda z: math.tanh(z), lambda z: 1.0 - math.tanh(z) ** 2)
    spec = KernelSpec("layer_backward", None, own, "float32")
    assert machine_code.cubin(spec, (9, 0)) is machine_code.cubin(spec, (9, 0))
    assert compilations == ["layer_backward"]
    assert not folder.exists()


def test_an_activation_numba_cannot_compile_is_named(folder: Path) -> None:
    def f(z: float) -> float:
        return {"z": [z]}["z"].copy()[0] + sum(x for x in (0.0, 0.0))

    own = gpurnn.Activation(f, lambda z: 1.0, name="mine")
    spec = KernelSpec("layer_forward", 16, own, "float32")
    with pytest.raises(
        TypeError, match=r"^activation is <gpurnn.Activation mine>, which Numba cann"
    ):
        machine_code.cubin(spec, (9, 0))


def test_a_cache_that_cannot_be_written_is_warned_of(folder: Path, compilations: list[str]) -> None:
    folder.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="compiled kernels cannot be kept in .*GPURNN_CACHE names"):
        code = machine_code.cubin(CHEAP, (9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine_code.cubin(CHEAP, (9, 0)) is code
    assert len(compilations) == 1
