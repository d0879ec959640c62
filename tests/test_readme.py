"""The README is true: its commands, its example, its figures."""

import json
import re
from pathlib import Path

import pytest
from tolerance import assert_close
from typer.testing import CliRunner

from gpurnn.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_continuous_integration_runs_the_test_command_of_the_readme() -> None:
    (command,) = (b.strip() for b in blocks("sh") if "pytest" in b)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["H"].shape == (35, 32, 64)  # type: ignore[attr-defined]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("resident: 1 launch of 32 blocks × 128 threads")
    assert any(line.startswith("2876 ") for line in printed)
    H, truth = names["H_small"], names["H_reference"]
    assert_close("H", H, truth.astype(float), length=200)  # type: ignore[attr-defined,arg-type]


def test_commands_and_options_exist() -> None:
    lines = [line for b in blocks("sh") for line in b.splitlines() if line.startswith("gpurnn ")]
    assert len(lines) >= 5
    for line in lines:
        command, *words = line.partition("#")[0].split()[1:]
        result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [command, "--help"])
        assert result.exit_code == 0, line
        for option in (w for w in words if w.startswith("-")):
            assert option in result.output, f"{line}: {option}"


def test_figures_are_those_of_the_files() -> None:
    """Each speed-up in the table is the one in the file that the README names."""
    (name,) = set(re.findall(r"benchmarks/cpu-[\w.-]+\.json", README))
    measured = json.loads((ROOT / name).read_text())
    rows = re.findall(
        r"^\| \((\d+), (\d+), (\d+), (\d+)\) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", README, re.M
    )
    assert len(rows) == len(measured["records"]) == 7
    for row, record in zip(rows, measured["records"], strict=True):
        assert [int(size) for size in row[:4]] == list(record["shape"].values())
        ours = record["gpurnn_forward_backward_ms"]["median"]
        theirs = record["torch_forward_backward_ms"]["median"]
        assert row[4:] == (f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}")
    mean = measured["geometric_mean_speedup"]
    assert f"geometric mean {mean:.2f}" in README
