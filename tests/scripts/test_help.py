"""``--help`` of every command: whole, and no error."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import tyro

from ccrl.packages import ROOT
from scripts.fuzzing.cases import SCRIPTS

FOLDER = ROOT / "scripts"
FILES = [path for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")]
COMMANDS = sorted([*FILES, FOLDER / "bench", FOLDER / "studies" / "redraw.py",
                   *(path.parent for path in FOLDER.glob("studies/*/__main__.py"))])  # fmt: skip


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_help_is_whole(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str(path if path.is_dir() else path.parent), *sys.path])
    code: object = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    said = capsys.readouterr()
    assert code == 0
    assert "usage" in said.out.lower()
    assert said.err == ""


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_that_the_fuzzing_changes_are_valid(name: str) -> None:
    """Three were not: every change of theirs was refused, for another reason."""
    module = importlib.import_module(f"scripts.{name}")
    (options,) = re.findall(r"tyro\.cli\((\w+)", (FOLDER / f"{name}.py").read_text("utf-8"))
    tyro.cli(getattr(module, options), args=SCRIPTS[name])
