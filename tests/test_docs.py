"""The figures of docs/kernels.md are those of tests/resources.json, and the plan fits them."""

import json
import math
import re
from pathlib import Path
from typing import Any

from gpurnn import planning

ROOT = Path(__file__).parents[1]
KERNELS: dict[str, dict[str, Any]] = json.loads((ROOT / "tests" / "resources.json").read_text())[
    "kernels"
]
TEXT = (ROOT / "docs" / "kernels.md").read_text()


def test_the_table_is_that_of_the_compiler() -> None:
    rows = re.findall(
        r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \+ ([\d,]+) \| ([\d,]+) \| (\d+)% \|$",
        TEXT,
        re.MULTILINE,
    )
    assert len(rows) == 20
    for kind, h, r, *figures in rows:
        k = KERNELS[f"resident_{kind} float32 h={h} rows={r} tanh sm_90"]
        expected = [k["registers"], k["shared"], k["dynamic_shared"], k["loop"]]
        assert [int(figure.replace(",", "")) for figure in figures[:4]] == expected
        assert figures[4] == f"{100 * k['useful']:.0f}"
    eight = KERNELS["resident_forward float32 h=128 rows=8 tanh sm_90"]["loop"]
    assert f"in {eight:,} + about 250 cycles" in TEXT


def test_the_table_of_groups_is_that_of_the_compiler() -> None:
    rows = re.findall(
        r"^\| (\w+) \| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\w+) \| (\d+) \| ([\d,]+) \| "
        r"([\d,]+) \| (\d+)% \|$",
        TEXT,
        re.MULTILINE,
    )
    assert len(rows) == 22
    for kind, dtype, h, blocks, r, exchange, *figures in rows:
        dtype = "float32 tf32" if dtype == "TF32" else dtype
        key = f"group_{kind} {dtype} h={h} blocks={blocks} rows={r} {exchange} tanh sm_90"
        k = KERNELS[key]
        expected = [k["registers"], k["dynamic_shared"], k["loop"]]
        assert [int(figure.replace(",", "")) for figure in figures[:3]] == expected, key
        assert figures[3] == f"{100 * k['useful']:.0f}"


def test_the_times_of_groups_are_those_of_the_plan() -> None:
    rows = re.findall(r"^\| (\d+) \| ((?:[\d.]+ \(\w+, \d+ blocks\) \| ){4})", TEXT, re.MULTILINE)
    assert [int(h) for h, _ in rows] == [300, 384, 512, 640, 1024]
    for h, cells in rows:
        for n, cell in zip((1, 8, 32, 64), cells.split(" | "), strict=False):
            plan = planning.plan(
                T=1000, n=n, d=1, h=int(h), device=planning.DEVICES["H100"], kernel=None
            )
            assert plan.tile is not None
            time, exchange, blocks = re.match(r"([\d.]+) \((\w+), (\d+) blocks\)", cell).groups()  # type: ignore[union-attr]
            assert (plan.exchange, plan.tile.blocks) == (exchange, int(blocks))
            assert f"about {time} µs a step" in str(plan)


def test_the_plan_guesses_registers_well_enough() -> None:
    """To within a quarter of what backward kernels take: they hold most."""
    pattern = r"resident_backward (\w+) h=(\d+) rows=(\d+) tanh sm_90"
    checked = 0
    for key, measured in KERNELS.items():
        match = re.fullmatch(pattern, key)
        if match is None:
            continue
        dtype, h, rows = match[1], int(match[2]), int(match[3])
        tile = next(t for t in planning.resident_tiles(h, dtype) if t.rows == rows)
        guess = planning.registers_guess(tile, 2 if dtype == "float64" else 1)
        assert 0.75 <= guess / measured["registers"] <= 1.25, f"{key}: {guess}"
        checked += 1
    assert checked > 40


def test_the_times_of_generations_are_those_of_the_plan() -> None:
    text = (ROOT / "docs" / "language-model.md").read_text()
    cell = r"([\d.]+) \((\w+)(?:, (\w+), (\d+) blocks)?\)"
    rows = re.findall(rf"^\| (\d+) \| {cell} \| {cell} \|$", text, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [128, 200, 512, 1024]
    for h, *cells in rows:
        for q, (time, kernel, exchange, blocks) in ((28, cells[:4]), (4580, cells[4:])):
            plan = planning.generation_plan(
                rows=1,
                h=int(h),
                q=q,
                layers=1,
                dtype="float32",
                device=planning.DEVICES["H100"],
            )
            assert (plan.kernel, plan.exchange or "") == (kernel, exchange)
            assert math.prod(plan.grid) == int(blocks or 1)
            assert f"about {time} µs a token" in str(plan)
