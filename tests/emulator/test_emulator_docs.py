"""The page on the emulator: its examples run and print what it says."""

import contextlib
import io
import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "emulator.md").read_text(encoding="utf-8")


def test_examples():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, "example.py", "exec"), names)
    shown = re.findall(r"^    (.*)$", PAGE.split("## Launching")[0].split("```")[2], re.M)
    assert printed.getvalue().split() == " ".join(shown).split()


def test_every_public_name_and_operation_is_there():
    from gpurnn import emulator
    from gpurnn.emulator.operations import Operations

    errors = [n for n in emulator.__all__ if n.endswith("Error")]
    operations = [n for n in vars(Operations) if not n.startswith("_")]
    assert [n for n in errors + operations if f"`{n}" not in PAGE] == []
