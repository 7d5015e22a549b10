"""Figures drawn again from the kept files of single runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ccrl.packages import ROOT
from scripts.studies.redraw import FIGURES, Options, main


def test_every_figure_has_its_file_of_runs() -> None:
    folder = ROOT / "docs" / "figures"
    assert [name for name in FIGURES if not (folder / f"{name}.csv").exists()] == []


@pytest.mark.parametrize("name", ["hacking_tomato", "flow_awm", "momentum_cartpole"])
def test_a_figure_from_its_file(tmp_path: Path, name: str) -> None:
    shutil.copy(ROOT / "docs" / "figures" / f"{name}.csv", tmp_path)
    (path,) = main(Options(names=(name,), folder=tmp_path))
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size > 10_000


def test_unknown_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="expected some of momentum_cartpole, hacking_exact"):
        Options(names=("llm_study",))
