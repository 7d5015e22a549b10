"""Off-policy curves: rows from run folders, the rule by hand, a page from whatever there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccrl.experiment.csv_table import read_rows
from ccrl.packages import ROOT
from scripts.studies.offpolicy import report
from scripts.studies.offpolicy.pages import CONTINUOUS, DISCRETE, PAGES
from scripts.studies.offpolicy.study import COLUMNS, FIGURES, Options, main


def folder(out: Path, env: str, agent: str, seed: int, label: str, finished: bool, compile: str = "off") -> Path:
    path = out / label / f"{env}__{agent}__{seed}"
    path.mkdir(parents=True)
    info: dict[str, Any] = {
        "env": env, "agent": agent, "seed": seed, "versions": {"torch": "2.13.0+cpu"}, "threads": {"torch": 1},
        "git": {"commit": "0123456789abcdef"},
    }  # fmt: skip
    if finished:
        info["finished"] = {"step": 100_000, "since": 0, "cpu_seconds": 60.0}
    (path / "run.json").write_text(json.dumps(info))
    (path / "config.yaml").write_text(f"agent:\n  compile: '{compile}'\n")
    (path / "eval.csv").write_text("step,eval/mean_reward\n50000,1.5\n" + ("100000,2000.25\n" if finished else ""))
    return path


def test_runs_become_rows_and_a_page_that_names_what_is_missing(tmp_path: Path) -> None:
    folder(tmp_path, "Hopper-v5", "mdpo_off_policy", 0, "mdpo_off_policy__tsallis=1.4", finished=True)
    run = folder(tmp_path, "HalfCheetah-v5", "sac", 3, "sac", finished=False, compile="auto")
    (folder(tmp_path, "HalfCheetah-v5", "sac", 4, "sac", finished=False) / "eval.csv").write_text("")  # only begun
    text = main(Options(tmp_path, tmp_path / "out"))
    rows = read_rows(tmp_path / "out/offpolicy_runs.csv")
    assert [tuple(r) for r in rows] == [COLUMNS] * 3
    assert list(rows[-1].values()) == [
        "Hopper-v5", "mdpo_off_policy tsallis=1.4", "0", "100000", "2000.25", "1", "0123456789ab", "2.13.0", "1", "off",
        "60",
    ]  # fmt: skip
    assert (rows[0]["finished"], rows[0]["compile"], rows[0]["cpu_seconds"]) == ("0", "auto", "")
    assert "**1 of 25 runs are finished.**" in text
    assert "* sac on HalfCheetah-v5: seeds 0, 1, 2, 3 (at 50,000 steps), 4" in text
    assert "| HalfCheetah-v5 | `sac` | 0 of 5 |" in text
    assert "open (0 of 5 runs)" in text
    assert (tmp_path / "out/offpolicy_curves.png").stat().st_size > 1000
    # again from the numbers alone, and after the run was compiled and finished
    assert main(Options(None, tmp_path / "out")) == text
    (run / "log.txt").write_text("[ccrl] updates are compiled with g++\n")
    main(Options(tmp_path, tmp_path / "out"))
    assert read_rows(tmp_path / "out/offpolicy_runs.csv")[0]["compile"] == "on"


def test_without_runs_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected runs with evaluations, found none"):
        main(Options(tmp_path, tmp_path / "out"))
    with pytest.raises(ValueError, match="name the folder of the runs"):
        main(Options(None, tmp_path / "out"))


def test_the_rule_by_hand() -> None:
    theirs = [4.0, 5.0, 6.0]
    # mean 5, standard deviation 1: 5 +- 4.303 / sqrt(3) = [2.52, 7.48]
    assert report.verdict([4.0, 5.0, 6.0], theirs, 3) == "agrees"
    assert report.verdict([1.0, 1.1, 1.2], theirs, 3) == "below"
    assert report.verdict([8.0, 8.1, 8.2], theirs, 3) == "above"
    # the interval meets the range, the mean 7 is outside it
    assert report.verdict([6.0, 7.0, 8.0], theirs, 3) == "open"
    # the mean is in the range, the interval 5.9 +- .25 does not hold the published mean 5
    assert report.verdict([5.8, 5.9, 6.0], theirs, 3) == "open"
    assert report.verdict([4.0, 5.0], theirs, 3) == "open (2 of 3 runs)"
    assert report.verdict([4.0, 5.0], theirs, 2) == "two runs: no interval"


def test_runs_are_compared_at_a_step_or_over_the_second_half() -> None:
    run = report.Run(
        "CartPole-v1", "dqn", 100, np.array([2e4, 3e4, 6e4, 1.2e5]), np.array([9.0, 100.0, 400.0, 460.0]), True
    )
    assert CONTINUOUS.score(run) == pytest.approx(440.0)  # two thirds of the way from 400 to 460
    assert DISCRETE.score(run) == pytest.approx(320.0)  # (100 + 400 + 460) / 3


@pytest.mark.parametrize("which", sorted(PAGES))
def test_the_page_is_what_its_numbers_make(which: str) -> None:
    about = PAGES[which]
    runs = report.runs_of(read_rows(FIGURES / f"{about.name}_runs.csv"))
    theirs = report.published(FIGURES / "offpolicy_published.csv")
    assert (ROOT / "docs" / about.file).read_text(encoding="utf-8") == report.page(about, runs, theirs)
    assert {(r.env, r.agent, r.seed) for r in runs} <= set(about.planned())


def test_what_the_page_says_of_the_published_runs() -> None:
    theirs = report.published(FIGURES / "offpolicy_published.csv")
    assert all(len(curves) == 10 for curves in theirs.values())
    cheetah = theirs["sac", "HalfCheetah-v4"]
    for at, mean in ((50_000, 4212), (100_000, 6156)):
        assert np.mean([np.interp(at, *curve) for curve in cheetah]) == pytest.approx(mean, abs=1)
    assert np.diff(cheetah[0][0])[1:] == pytest.approx(5_000_000 // 300)
    assert (len(CONTINUOUS.planned()), len(DISCRETE.planned())) == (25, 18)
