"""The offline studies run, resume and report, with the smallest settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.studies.offline.study import main

TINY = ["--seeds", "1", "--updates", "100", "--episodes", "4", "--steps", "400"]


@pytest.mark.parametrize(
    ("name", "flags", "rows"),
    [
        ("baselines", ["--methods", "bc", "td3_bc", "--data", "maze"], 2),
        ("cdsa", ["--strengths", "0.1", "--action-strengths", "0.5"], 4),
        ("guidance", ["--strengths", "0", "1", "--denoiser-steps", "5", "--trajectories", "4"], 2),
    ],
)
def test_a_study_runs_and_resumes(
    name: str, flags: list[str], rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--out", str(tmp_path / "out"), "--figures", str(tmp_path)]
    argv = [name, *where, *(TINY if name != "guidance" else ["--steps", "400"]), *flags]
    table = main(argv)
    assert len(table) == rows
    assert (tmp_path / f"offline_{name}.md").read_text().count("\n") == rows + 2
    capsys.readouterr()
    assert main(argv) == table
    out = capsys.readouterr().out
    assert "cells, " in out
    assert "FAILED" not in out


def test_unknown_studies_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of baselines"):
        main(["hopper"])
