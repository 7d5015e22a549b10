"""The table of the search's worth, by hand, and what the study refuses."""

from __future__ import annotations

import pytest

from scripts.studies.tuning.study import TASKS, Options, main, table


def test_the_table_by_hand(tmp_path):
    assert table(tmp_path) == []
    runs = [("default", 100, 10), ("best", 100, 30), ("default", 101, 20), ("best", 101, 50), ("default", 102, 9)]
    lines = ["arm,seed,return,seconds", *(f"{arm},{seed},{value},30" for arm, seed, value in runs)]
    (tmp_path / "hopper.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "hopper_trials.csv").write_text("trial,state,value\n0,COMPLETE,4\n1,PRUNED,9\n2,COMPLETE,7\n3,FAIL,\n")
    (row,) = table(tmp_path)
    # seeds that both have: 30 - 10 and 50 - 20; Student with one degree of freedom: 25 -+ 12.706 * 5
    assert row["difference"] == "+25 [-38.53, 88.53]"
    assert (row["task"], row["runs"], row["trials"], row["whole"]) == ("Hopper-v5", 2, 4, 2)
    assert (row["best trial's value"], row["CPU minutes of the runs"]) == (7.0, 2.5)
    assert row["default"].startswith("15 [")
    main(Options(rows=tmp_path, page_only=True))
    assert "| Hopper-v5 | 4 | 2 | 7 |" in (tmp_path / "README.md").read_text()


def test_an_unknown_task(tmp_path):
    with pytest.raises(ValueError, match=f"expected some of {', '.join(TASKS)}, got pendulum"):
        main(Options(("pendulum",), rows=tmp_path))
