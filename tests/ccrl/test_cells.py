"""Studies as cells: what is there is not run again, what is added is whole."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ccrl.experiment.cells import CellsFailed, complete
from ccrl.experiment.csv_table import read_rows

CELLS = [{"method": m, "seed": s} for m in ("a", "b") for s in (0, 1)]


def play(cell: dict) -> list[dict]:
    return [{"step": t, "value": 10.0 * cell["seed"] + t} for t in range(2)]


def fails_at_b(cell: dict) -> list[dict]:
    if cell["method"] == "b" and cell["seed"] == 0:
        raise FloatingPointError("not finite")
    return play(cell)


def known(rows: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    return [(r["method"], r["seed"], r["value"]) for r in rows]


A = [("a", "0", "0.0"), ("a", "0", "1.0"), ("a", "1", "10.0"), ("a", "1", "11.0")]
B = [("b", "0", "0.0"), ("b", "0", "1.0"), ("b", "1", "10.0"), ("b", "1", "11.0")]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_goes_on_where_it_was(tmp_path: Path, jobs: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "study.csv"
    with pytest.raises(CellsFailed, match=r"1 cells failed\n.*method b, seed 0: FloatingPointError: not fin") as error:
        complete(path, CELLS, fails_at_b, jobs=jobs)
    assert error.value.count == 1
    assert "in fails_at_b" in capsys.readouterr().out, "the traceback of another process too"
    before = read_rows(path)
    assert sorted(known(before)) == A + B[2:], "a failure does not stop the others"
    rows = complete(path, CELLS, play, jobs=jobs)
    assert known(rows) == A + B, "in the order of the cells"
    assert "4 cells, 3 of them finished before" in capsys.readouterr().out
    assert [row for row in rows if row in before] == sorted(before, key=rows.index), "finished cells stay, with seconds"
    assert len(read_rows(path)) == 8


def test_a_cell_without_rows_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(CellsFailed, match=r"1 cells failed\n.*seed 0: expected at least one row of results, got \[\]"):
        complete(tmp_path / "study.csv", CELLS[:2], lambda cell: play(cell) if cell["seed"] else [])
    assert len(read_rows(tmp_path / "study.csv")) == 2, "the other is kept"


def test_two_that_add_to_one_file_lose_nothing(tmp_path: Path) -> None:
    """Both have read the file before either writes; one cell is of both."""
    path, meet = tmp_path / "study.csv", threading.Barrier(2)
    found: list[list[dict[str, str]]] = []

    def slow(cell: dict) -> list[dict]:
        if cell["seed"] == 0:
            meet.wait(timeout=60)
        return play(cell)

    parts = (CELLS[:2], [CELLS[2], CELLS[1]])
    both = [threading.Thread(target=lambda cells=cells: found.append(complete(path, cells, slow))) for cells in parts]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(known(read_rows(path))) == A + B[:2]
    assert sorted(map(known, found)) == [A, B[:2] + A[2:]]


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


def test_none_is_empty_and_results_may_have_their_own_seconds(tmp_path: Path) -> None:
    cells = [{"rate": None, "seed": 0}]
    for _ in range(2):
        rows = complete(tmp_path / "study.csv", cells, lambda cell: [{"seconds": 7.25, "cpu_seconds": 7, "text": None}])
        assert rows == [{"rate": "", "seed": "0", "seconds": "7.25", "cpu_seconds": "7", "text": ""}]
    assert len(read_rows(tmp_path / "study.csv")) == 1


def test_progress_names_what_varies_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [{"task": "t", "seed": s} for s in (0, 1)]
    complete(tmp_path / "s.csv", cells, lambda cell: [{"cost": 1 / 3, "n": 12345678, "curve": "1;2"}], name="x")
    assert "[x 2/2] seed 1: cost 0.333, n 12345678 (0 s)" in capsys.readouterr().out


def test_other_settings_are_other_cells_unless_names_tell_them_apart(tmp_path: Path) -> None:
    path, more = tmp_path / "s.csv", [cell | {"steps": 5} for cell in CELLS]
    complete(path, more, play)
    other = [cell | {"steps": 6} for cell in CELLS[:1]]
    with pytest.raises(ValueError, match="a 0 was run with steps=5, expected steps=6; choose another file"):
        complete(path, other, play, names=("method", "seed"))
    assert known(complete(path, more, fails_at_b, names=("method", "seed"))) == A + B
    assert {row["steps"] for row in complete(path, other, play)} == {"6"}


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jobs"):
        complete(tmp_path / "s.csv", CELLS, play, jobs=0)
    with pytest.raises(ValueError, match="in every cell"):
        complete(tmp_path / "s.csv", [CELLS[0], {"method": "a"}], play)
    complete(tmp_path / "s.csv", CELLS, play)
    with pytest.raises(ValueError, match="expected the columns"):
        complete(tmp_path / "s.csv", [{"rate": 1.0}], play)
