"""The study of return distributions: tiny runs, files, what a row says."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccrl.experiment.csv_table import read_rows
from scripts.studies.stock import study


def test_pictures(tmp_path: Path) -> None:
    rows = {row["objective"]: row for row in study.main(["pictures", "--figures", str(tmp_path)])}
    assert rows["CVaR at .25"]["value"] == pytest.approx(0.31875)
    assert rows["CVaR at .5"]["value of the best mean"] == pytest.approx(-0.048)
    # gamma^8 / (1 - gamma): the bound is met with equality at the border of what can be reached
    assert rows["gap, gamma 0.5"]["value"] == pytest.approx(0.5**7, rel=1e-6)
    for name in ("stock_objectives.png", "stock_gap.png", "stock_pictures.md"):
        assert (tmp_path / name).stat().st_size > 100


def test_chain_resumes_and_compares(tmp_path: Path) -> None:
    command = ["chain", "--out", str(tmp_path), "--figures", str(tmp_path), "--seeds", "1", "--tasks", "1.0", "2",
               "--updates", "80", "--batch-size", "32"]  # fmt: skip
    rows = study.main(command)
    assert [row["tau"] for row in rows] == list(study.LEVELS)
    assert all(row["best"] <= row["optimum"] + 1e-9 for row in rows), "no policy beats the optimum"
    assert rows[0]["optimum"] == pytest.approx(0.0), "at tau = .1 playing safe is best"
    assert rows[0]["largest gap"] == pytest.approx(-rows[0]["worst"])
    assert rows[-1]["optimum"] == rows[-1]["no stock"] == pytest.approx(2.0)
    before = (tmp_path / "chain.csv").read_text()
    assert study.main(command) == rows
    assert (tmp_path / "chain.csv").read_text() == before, "a finished cell was run again"


def test_tail(tmp_path: Path) -> None:
    rows = study.main([
        "tail", "--out", str(tmp_path), "--figures", str(tmp_path), "--seeds", "1", "--steps", "1024",
        "--episodes", "50",
    ])  # fmt: skip
    assert [row["trained for"] for row in rows] == ["mean", "cvar", "cvar less mean", "optimum of each"]
    for row in rows[:2]:
        assert row["cvar"] <= row["mean"]
        assert row["mean"] <= rows[3]["mean"] + 0.3
    assert rows[2]["cvar"] == pytest.approx(rows[1]["cvar"] - rows[0]["cvar"])
    runs = read_rows(tmp_path / "tail.csv")
    assert [run["seed"] for run in runs] == ["100", "100"]
    assert all(run["torch"] and run["threads"] == "1" for run in runs)
