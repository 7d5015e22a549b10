"""Studies as cells: what is there is not run again, what is added is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccrl.experiment.cells import complete
from ccrl.experiment.csv_table import read_rows

CELLS = [{"method": m, "seed": s} for m in ("a", "b") for s in (0, 1)]


def play(cell: dict) -> list[dict]:
    return [{"step": t, "value": 10.0 * cell["seed"] + t} for t in range(2)]


def fails_at_b(cell: dict) -> list[dict]:
    if cell["method"] == "b":
        raise RuntimeError("b")
    return play(cell)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_goes_on_where_it_was(tmp_path: Path, jobs: int) -> None:
    path = tmp_path / "new" / "study.csv"
    with pytest.raises(RuntimeError, match="b"):
        complete(path, CELLS, fails_at_b, jobs=1)
    before = read_rows(path)
    assert [(r["method"], r["seed"], r["step"]) for r in before] == [
        ("a", "0", "0"), ("a", "0", "1"), ("a", "1", "0"), ("a", "1", "1"),
    ]  # fmt: skip
    rows = complete(path, CELLS, play, jobs=jobs)
    assert rows[:4] == before, "finished cells are kept as they are, seconds included"
    assert sorted((r["method"], int(r["seed"]), float(r["value"])) for r in rows[4:]) == [
        ("b", 0, 0.0), ("b", 0, 1.0), ("b", 1, 10.0), ("b", 1, 11.0),
    ]  # fmt: skip


def test_only_the_wanted_cells_come_back(tmp_path: Path) -> None:
    complete(tmp_path / "study.csv", CELLS, play)
    rows = complete(tmp_path / "study.csv", CELLS[:1], fails_at_b)
    assert {(r["method"], r["seed"]) for r in rows} == {("a", "0")}
    assert len(read_rows(tmp_path / "study.csv")) == 8


def test_results_may_have_other_columns(tmp_path: Path) -> None:
    complete(tmp_path / "study.csv", CELLS[:1], play)
    complete(tmp_path / "study.csv", CELLS[1:2], lambda cell: [{"other": 3}])
    rows = read_rows(tmp_path / "study.csv")
    assert [r["other"] for r in rows] == ["", "", "3"]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jobs"):
        complete(tmp_path / "s.csv", CELLS, play, jobs=0)
    with pytest.raises(ValueError, match="in every cell"):
        complete(tmp_path / "s.csv", [CELLS[0], {"method": "a"}], play)
    complete(tmp_path / "s.csv", CELLS, play)
    with pytest.raises(ValueError, match="expected the columns"):
        complete(tmp_path / "s.csv", [{"rate": 1.0}], play)
