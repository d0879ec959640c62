"""The benchmark: it checks before it times, compares like with like, and sums up rightly."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gpurnn import functional as F
from gpurnn.bench import CPU_SHAPES, Shape, common, cpu, environment, measure_cpu, summary
from gpurnn.cli import app

TINY = (Shape(3, 2, 4, 5), Shape(1, 1, 1, 1))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PAUSE", 0.0)
    monkeypatch.setattr(cpu, "BLOCKS", 2)


def measured(shapes: tuple[Shape, ...] = TINY) -> list[dict[str, Any]]:
    return list(measure_cpu(seconds=0.001, threads=1, shapes=shapes))


def test_records() -> None:
    records = measured()
    assert [record["shape"] for record in records] == [vars(shape) for shape in TINY]
    for record in records:
        assert 0 <= record["error"] <= cpu.ERROR_LIMIT
        for what in ("forward", "forward_backward"):
            figures = record[f"gpurnn_{what}_ms"]
            low, high = figures["quartiles"]
            assert 0 < low <= figures["median"] <= high
            assert figures["passes"] >= cpu.BLOCKS * cpu.LEAST_PASSES
            per_step = 1e3 * figures["median"] / record["shape"]["T"]
            assert record[f"{what}_us_per_step"] == pytest.approx(per_step)


def test_torch_computes_the_same() -> None:
    """Weights, biases and every gradient are matched: its error is as small as our own."""
    pytest.importorskip("torch", reason="torch is not installed")
    for record in measured():
        assert 0 <= record["torch_error"] <= cpu.ERROR_LIMIT
        ratio = record["torch_forward_backward_ms"]["median"]
        ratio /= record["gpurnn_forward_backward_ms"]["median"]
        assert record["forward_backward_speedup"] == pytest.approx(ratio)


@pytest.mark.parametrize("spoil", [1.001, math.nan])
@pytest.mark.parametrize("place", range(6))
def test_wrong_result_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, spoil: float, place: int
) -> None:
    """Spoil one result of the float32 pass: H, dX, dh_0, dW_xh, dW_hh or db_h."""
    right = cpu._gpurnn_pass

    def spoilt(arguments: Any, dH: Any, backward: bool) -> Any:
        found = right(arguments, dH, backward)
        if dH.dtype == np.float32 and backward:
            found[place] = found[place] * np.float32(spoil)
        return found

    monkeypatch.setattr(cpu, "_gpurnn_pass", spoilt)
    monkeypatch.setattr(cpu, "_in_turn", lambda *_: pytest.fail("timed a wrong result"))
    with pytest.raises(ArithmeticError, match=r"Shape\(T=3, n=2, d=4, h=5\): relative error"):
        measured(TINY[:1])


def test_sides_take_turns() -> None:
    calls: list[str] = []
    passes = {name: lambda name=name: calls.append(name) for name in ("gpurnn", "torch")}
    times = cpu._in_turn(passes, 0.0)
    block = 1 + cpu.LEAST_PASSES  # the first of a block is not timed
    assert calls == (["gpurnn"] * block + ["torch"] * block) * cpu.BLOCKS
    assert {name: len(t) for name, t in times.items()} == {"gpurnn": 4, "torch": 4}


def test_summary() -> None:
    records = [{"forward_backward_speedup": ratio} for ratio in (2.0, 8.0, 0.5)]
    assert summary(records) == {
        "geometric_mean_speedup": pytest.approx(2.0),
        "least_speedup": 0.5,
    }
    assert summary([{"shape": {}}]) == {}


def test_environment_names_what_a_figure_depends_on() -> None:
    found = environment(2)
    assert found["threads"] == 2
    assert found["versions"]["numpy"] == np.__version__
    assert found["processor"]
    assert found["python"].startswith("3.")
    json.dumps(found, allow_nan=False)


def test_result_file_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_cpu, "__kwdefaults__", {"seconds": 1, "threads": 1, "shapes": TINY})
    out = tmp_path / "figures.json"
    command = [
        "bench",
        "--device",
        "cpu",
        "--seconds",
        "0.001",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    records = json.loads(out.read_text())["records"]
    assert [record["shape"] for record in records] == [vars(shape) for shape in TINY]
    assert "speed-up" in done.stdout


def test_shapes_of_the_benchmark() -> None:
    assert [tuple(vars(shape).values()) for shape in CPU_SHAPES] == [
        (32, 1024, 28, 32),
        (35, 32, 128, 256),
        (35, 32, 512, 512),
        (100, 1, 64, 64),
        (1000, 8, 64, 128),
        (256, 64, 256, 256),
        (64, 64, 1024, 1024),
    ]


def test_problem_is_one_that_the_library_takes() -> None:
    problem = common.Problem(TINY[0])
    H, _ = F.rnn_forward(*problem.arguments(np.float32))
    assert H.shape == problem.dH.shape == (3, 2, 5)
