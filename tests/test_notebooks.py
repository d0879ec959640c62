"""The notebooks: pairs in step, with the outputs of this version, whose claims are asserted."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from timemachine import require_time_machine

import gpurnn

for needed in ("jupytext", "nbclient", "ipykernel"):
    pytest.importorskip(needed, reason="notebooks need pip install -e '.[notebooks]'")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"

# the chapter's statements that each is to show, by the numbers of the table in notebooks/README.md
SHOWN = {
    "01_ngrams_to_hidden_states": {1, 2, 3, 4, 6, 7, 8, 13, 14, 15, 20, 21},
    "02_language_models": {9, 10, 16, 17, 18, 19, 23, 24, 25, 31, 32},
    "03_gradients_through_time": {5, 22, 26, 27, 28, 29},
    "04_inside_the_kernels": {11},
    "05_your_own_recurrence": {7, 11},
}
STATEMENT = re.compile(r"\*\*Statements? ((?:\d+, )*\d+)\.\*\*")


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks = _script()


def pair(name: str) -> tuple[Path, dict[str, Any]]:
    script = FOLDER / f"{name}.py"
    return script, json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))


def statements_of(cells: list[dict[str, Any]]) -> list[tuple[set[int], str]]:
    """Return each statement's numbers, and the code up to the next one."""
    found: list[tuple[set[int], str]] = []
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            found += [
                ({int(n) for n in numbers.split(", ")}, "") for numbers in STATEMENT.findall(text)
            ]
        elif found:
            found[-1] = found[-1][0], f"{found[-1][1]}\n{text}"
    return found


def asserts(code: str) -> bool:
    """Say whether code asserts anything that is no constant."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
            return True
        if isinstance(node, ast.Attribute) and node.attr.startswith("assert_"):
            return True
    return False


def test_what_they_need_is_what_the_tests_install() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    names = {
        extra: {re.split(r"[\[<>=]", requirement)[0] for requirement in extras[extra]}
        for extra in ("notebooks", "test")
    }
    assert names["notebooks"] <= names["test"]


def test_there_are_these_and_no_others() -> None:
    for suffix in (".py", ".ipynb"):
        assert {p.stem for p in FOLDER.glob(f"[0-9]*{suffix}")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_a_pair_is_in_step_and_of_this_version(name: str) -> None:
    script, notebook = pair(name)
    expected = notebooks.unrun(script)
    assert notebook["metadata"]["gpurnn"] == {
        "version": gpurnn.__version__,
        "sha256": notebooks.sha256(script),
    }, f"run: python scripts/notebooks.py {name[:2]}"
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert cells == [(cell["cell_type"], cell["source"]) for cell in expected.cells]


@pytest.mark.parametrize("name", SHOWN)
def test_outputs_are_those_of_one_run_from_top_to_bottom(name: str) -> None:
    _, notebook = pair(name)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs), "warnings?"
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
    said = json.dumps(outputs)
    assert str(Path.home()) not in said or str(Path.home()) == "/"
    assert str(ROOT) not in said


@pytest.mark.parametrize("name", SHOWN)
def test_every_statement_is_asserted(name: str) -> None:
    _, notebook = pair(name)
    found = statements_of(notebook["cells"])
    assert SHOWN[name] <= set().union(*(numbers for numbers, _ in found))
    for numbers, code in found:
        assert asserts(code), f"statement {sorted(numbers)} is followed by no assertion"


def test_the_table_tells_where_each_statement_is_shown() -> None:
    rows = re.findall(
        r"^\| (\d+) \| .+ \| ((?:\[\d+\]\(\w+\.ipynb\)(?:, )?)+) \|$",
        (FOLDER / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    told = {int(n): set(re.findall(r"\((\w+)\.ipynb\)", where)) for n, where in rows}
    shown: dict[int, set[str]] = {}
    for name in SHOWN:
        for numbers, _ in statements_of(pair(name)[1]["cells"]):
            for n in numbers:
                shown.setdefault(n, set()).add(name)
    assert told == shown


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_it_runs(name: str) -> None:
    if "time-machine" in (FOLDER / f"{name}.py").read_text(encoding="utf-8"):
        require_time_machine()
    command = [sys.executable, str(ROOT / "scripts" / "notebooks.py"), "--check", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_cell_that_fails_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    (tmp_path / "01_wrong.py").write_text("# %%\nassert 1 + 1 == 3, 'sums'\n", encoding="utf-8")
    assert notebooks.main(["01"]) == 1
    assert "AssertionError" in capsys.readouterr().err
    assert not (tmp_path / "01_wrong.ipynb").exists()
    with pytest.raises(SystemExit):
        notebooks.main(["02"])
