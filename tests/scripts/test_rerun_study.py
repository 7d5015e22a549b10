"""The independent re-run: the draw, the interval for a further run by hand, the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccrl.experiment.csv_table import read_rows
from ccrl.packages import ROOT
from scripts.studies.rerun.study import Options, cells, drawn, fresh, main, prediction, table

NAMES = [("claim", f"arm {i}", "{}") for i in range(30)]


def test_a_commit_draws_its_own_cells_and_always_the_same() -> None:
    first = drawn(NAMES, "e748a8a4372d", 12)
    assert len(set(first)) == 12
    assert drawn(NAMES[::-1], "e748a8a4372d", 12) == first  # whatever the order of the files
    assert drawn(NAMES, "e748a8a4372e", 12) != first
    with pytest.raises(ValueError, match="at most the 30 cells there are, got 31"):
        drawn(NAMES, "ab", 31)


def test_a_new_draw_has_seeds_that_no_earlier_one_had(tmp_path: Path) -> None:
    path = tmp_path / "rerun.csv"
    assert fresh(path, "aa") == 500
    path.write_text("seed,commit\n500,aa\n501,aa\n502,bb\n")
    assert [fresh(path, commit) for commit in ("aa", "bb", "cc")] == [
        500,
        502,
        503,
    ]  # a draw that goes on keeps its own


def test_the_interval_for_a_further_run_by_hand() -> None:
    # mean 2, deviation 1, t with 2 degrees of freedom 4.3027: 4.3027 * (4 / 3)^.5 = 4.9683
    assert prediction([1.0, 2.0, 3.0]) == pytest.approx((-2.9683, 6.9683), abs=1e-3)


def test_the_table_counts_what_is_inside() -> None:
    row = {"claim": "x", "arm": "A", "settings": '{"learning_rate": 0.1}', "seed": "500", "commit": "abcdef0123456789",
           "runs": "10", "mean": "1", "low": "0.5", "high": "1.5"}  # fmt: skip
    other = row | {"commit": "0" * 16, "score": "9"}  # of an earlier draw: no part of this one
    text = table([other, row | {"score": "1.5"}, row | {"score": "1.6"}])
    assert "**1 of 2**" in text
    assert "of all draws so far, 1 of 3" in text
    # at most one of two inside with probability .95 each: 1 - .95^2
    assert "probability 0.098" in text
    assert "learning_rate 0.1" in text


def test_the_repositorys_results_have_cells_to_draw(tmp_path: Path) -> None:
    assert len(cells(Options().results)) > 30
    with pytest.raises(ValueError, match="expected at most the 0 cells"):
        main(Options(results=tmp_path, out=tmp_path, commit="ab"))


def test_the_table_is_that_of_the_kept_runs() -> None:
    folder = ROOT / "docs" / "figures"
    assert table(read_rows(folder / "rerun.csv")) == (folder / "rerun.md").read_text(encoding="utf-8")
