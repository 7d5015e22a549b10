"""The matched comparison: seeds apart, equal budgets, censoring by hand, a page from whatever runs there are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ccrl.experiment.csv_table import read_rows
from ccrl.packages import ROOT
from scripts.studies.control import report
from scripts.studies.control.runs import ARMS, play
from scripts.studies.control.study import Options, best, cells, main
from scripts.studies.control.tasks import TASKS

CARTPOLE = TASKS["CartPole-v1"]


def row(arm: str, seed: int, returns: str, **other: Any) -> dict[str, str]:
    found = {
        "task": "CartPole-v1", "arm": arm, "purpose": "test", "setting": "learning_rate", "value": "0.001",
        "seed": seed, "steps": 51_200, "at": "10 20 30", "returns": returns, "cpu_seconds": 5.12,
    }  # fmt: skip
    return {k: str(v) for k, v in (found | other).items()}


def test_every_method_has_as_many_tries_on_seeds_that_are_not_reported() -> None:
    assert {len(arm.values) for arm in ARMS.values()} == {4}
    tuning = cells(CARTPOLE, "tune", {arm: ARMS[arm].values for arm in ARMS})
    assert len(tuning) == 8 * 4 * 2
    assert {cell["seed"] for cell in tuning} == {1000, 1001}
    tests = cells(CARTPOLE, "test", {"PPO": (1e-3,), "A2C": (3e-3,)})
    assert [(cell["arm"], cell["seed"]) for cell in tests[:3]] == [("PPO", 100), ("A2C", 100), ("PPO", 101)]


def test_steps_are_those_of_the_first_evaluation_at_the_threshold() -> None:
    learnt = row("PPO", 100, "1 480 470")
    assert report.first(learnt, 475.0) == 20.0  # where it was reached, though not kept
    assert report.first(learnt, 481.0) == math.inf
    assert report.area(learnt) == 317.0  # 951 / 3
    assert report.final(learnt) == 470.0


def test_the_best_value_learns_fast_and_stays() -> None:
    found = {1e-4: "0 0 500", 3e-4: "0 200 450", 1e-3: "300 0 0", 3e-3: "0 0 0"}
    rows = [row("PPO", 1000, returns, value=value) for value, returns in found.items()]
    assert best(rows, "PPO") == 3e-4  # means 166.7, 216.7, 100, 0


def test_a_page_says_what_is_there_and_what_is_missing() -> None:
    assert "CartPole-v1: 0 of 80 test runs, 0 of 64 tuning runs" in report.page([])
    rows = [row("PPO", 100 + i, text) for i, text in enumerate(("1 480 500", "1 2 480", "1 2 3"))]
    text = report.page(rows)
    assert "CartPole-v1: 3 of 80 test runs" in text
    # medians over all runs, censored ones counted as never: 20, 30, inf
    assert "| 3 | 327.7 [" in text  # (500 + 480 + 3) / 3
    assert "| 2 | 30 |" in text
    assert "| 10.0 |" in text  # 5.12 s for 51,200 steps


@pytest.mark.parametrize("arm", ["PPO", "TRPO, sb3-contrib"])
def test_a_run_of_either_kind(arm: str) -> None:
    if arm.startswith("TRPO"):
        pytest.importorskip("sb3_contrib")
    cell = {"task": "CartPole-v1", "arm": arm, "value": ARMS[arm].values[1], "seed": 1000, "num_envs": 16,
            "steps": 2048, "points": 1}  # fmt: skip
    (found,) = play(cell)
    assert found["at"] == "2048"
    assert float(found["returns"]) > 5
    assert found["threads"] == 1


def test_unknown_tasks_are_refused_and_nothing_runs_for_the_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected some of CartPole-v1"):
        Options(tasks=("CartPole",))
    assert "0 of 80 test runs" in main(Options(out=tmp_path, page_only=True))
    assert (tmp_path / "control.md").exists()


def test_the_page_is_that_of_the_kept_runs() -> None:
    path = ROOT / "docs" / "figures" / "control.csv"
    made = report.page(read_rows(path) if path.exists() else [])
    assert made == (ROOT / "docs" / "control.md").read_text(encoding="utf-8"), "scripts/studies/control --page-only"
