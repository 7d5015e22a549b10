"""The offline studies run, resume and report, with the smallest settings."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from scripts.studies.offline import layout, report
from scripts.studies.offline.report import REPORTS
from scripts.studies.offline.study import STUDIES, main

TINY = ["--seeds", "1", "--updates", "100", "--episodes", "4", "--steps", "400", "--denoiser-steps", "5",
        "--trajectories", "4", "--score-updates", "100", "--online", "200", "--every", "100"]  # fmt: skip


def files(tmp_path: Path) -> list[str]:
    return [*TINY, "--out", str(tmp_path / "out"), "--figures", str(tmp_path)]


def test_a_study_runs_resumes_and_is_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["corridor", *files(tmp_path)]
    table = main(argv)
    # behaviour, base and seven strengths; without the behaviour for the second density
    assert len(table[0]) == 9 + 8
    page = (tmp_path / "offline_corridor.md").read_text()
    assert "VaR 5%" in page
    assert (tmp_path / "offline_corridor.png").stat().st_size > 1000
    assert len(list(csv.DictReader((tmp_path / "offline_corridor.csv").open()))) == 17
    capsys.readouterr()
    assert main(argv) == table
    assert "2 cells, 2 of them finished before" in capsys.readouterr().out
    # one of two cells: pages say what is there
    path = tmp_path / "out/corridor.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:10]) + "\n")
    assert len(main([*argv, "--report"])[0]) == 9


@pytest.mark.parametrize("name", ["guidance", "online"])
def test_others_run(name: str, tmp_path: Path) -> None:
    assert main([name, *files(tmp_path)])[0]
    assert (tmp_path / f"offline_{name}.png").exists()


def test_every_study_has_a_page_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    assert REPORTS.keys() == STUDIES.keys()
    with pytest.raises(ValueError, match="expected one of score"):
        main(["cheetah"])
    with pytest.raises(ValueError, match="found none; run it without --report"):
        main(["rows", "--report", "--out", str(tmp_path), "--figures", str(tmp_path)])


def test_nothing_is_decided_while_runs_are_missing() -> None:
    table = [layout.line("mean return >= 8", [True], "9"), layout.line("none", [False], "7"), {"controller": "base"}]
    assert [row.get("holds") for row in layout.undecided(table, 3, 3)] == ["yes", "no", None]
    assert [row.get("holds") for row in layout.undecided(table, 1, 3)] == ["open (1 of 3 runs)"] * 2 + [None]


def test_a_page_says_what_made_it_and_what_is_missing() -> None:
    rows = [{"commit": "abc", "torch": "2.13.0"}, {"commit": "", "torch": ""}]
    assert layout.made_by(rows[:1], 3, 3) == "All 3 runs. Commit: abc; PyTorch 2.13.0, one thread."
    assert layout.made_by(rows, 1, 3).startswith("**1 of 3 runs are there.** Commit: abc, of older rows unknown")
    assert layout.undecided([{"verdict": "guided is better"}], 1, 3) == [{"verdict": "open (1 of 3 runs)"}]


def test_the_gain_of_the_best_strength_is_paired() -> None:
    rows = [
        {"base": "bc", "seed": s, "k_a": a, "k_s": k} | dict.fromkeys(("return", "VaR 5%", "CVaR 5%"), r + s)
        for s in (0.0, 1.0) for a, k, r in ((0.0, 0.0, 1.0), (0.5, 0.0, 3.0), (1.0, 0.0, 2.0), (0.0, 1.0, 0.0))
    ]  # fmt: skip
    (first, *_) = report.strengths(rows)[1]
    assert first["holds"] == "yes"
    # both seeds gain exactly 2 and 1
    assert first["found"] == "best at 0.5: 3.5; less that at 0: 2 [2, 2], at the largest: 1 [1, 1]"
