"""The guard against slower code, and the growth of costs, in small."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from scripts.bench import growth, guard


def test_a_ratio_may_fall_by_the_tolerance_and_no_more() -> None:
    committed = {"a": 2.0, "b": 1.0, "c": 3.0}
    # .85 of 2.0 is 1.70, of 1.0 is .85; a row that was never committed cannot fall
    found = {"a": 1.71, "b": 0.84, "c": 9.0, "new": 0.1}
    assert guard.below(found, committed, 0.15) == ["b"]
    assert guard.below({"a": 1.69}, committed, 0.15) == ["a"]
    assert guard.below({"a": float("nan")}, {"a": 1.0}, 0.15) == ["a"]


def test_the_command_fails_where_a_ratio_fell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "guard.json"
    monkeypatch.setattr(guard, "COMMITTED", file)
    monkeypatch.setattr(guard, "ROWS", {"sums": lambda: (lambda: sum(range(20_000)), lambda: sum(range(60_000)))})
    guard.main(guard.Config(rounds=1, write=True))
    assert 0.5 < json.loads(file.read_text())["sums"] < 20.0
    file.write_text('{"sums": 1000.0}')
    with pytest.raises(SystemExit, match="slower than committed by more than 15%: sums"):
        guard.main(guard.Config(rounds=1))
    file.write_text('{"sums": 0.001}')
    guard.main(guard.Config(rounds=1))
    assert "| sums |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="sums"):
        guard.main(guard.Config(rows=("none",)))


def test_every_row_has_a_committed_ratio() -> None:
    assert json.loads(guard.COMMITTED.read_text()).keys() == guard.ROWS.keys()


def test_a_slope_by_hand() -> None:
    # 3 n^.5 at 1, 4, 16: 3, 6, 12; the logarithms lie on a line of slope 1/2
    assert growth.slope({1: 3.0, 4: 6.0, 16: 12.0}) == pytest.approx(0.5)
    assert growth.slope({10: 7.0, 100: 7.0}) == 0.0
    assert growth.slope({10: 7.0}) == 0.0


def test_growth_writes_its_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    growth.main(growth.Config(verticals=("transitions",), transitions=(20, 40), repeats=1, out=tmp_path, figure=False))
    assert not (tmp_path / "growth.png").exists()
    growth.main(growth.Config(verticals=("ring",), ring=(50, 100), repeats=1, out=tmp_path))
    rows = list(csv.DictReader((tmp_path / "growth.csv").open()))
    assert [(row["vertical"], row["size"]) for row in rows] == [
        ("ring", "50"), ("ring", "100"), ("transitions", "20"), ("transitions", "40"),
    ]  # fmt: skip
    assert all(float(row["microseconds_per_unit"]) > 0 for row in rows)
    assert (tmp_path / "growth.png").stat().st_size > 1000
    assert "| ring | row drawn |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="transitions"):
        growth.main(growth.Config(verticals=("planets",)))
