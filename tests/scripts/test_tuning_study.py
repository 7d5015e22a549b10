"""The table of the search's worth, by hand, and what the study refuses."""

from __future__ import annotations

import pytest

from scripts.studies.tuning import study
from scripts.studies.tuning.study import TASKS, Options, main, section, table


def test_the_table_by_hand(tmp_path):
    assert table(tmp_path) == []
    runs = [("default", 100, 10, "{}"), ("best", 100, 30, "b"), ("default", 101, 20, "{}"), ("best", 101, 7, "earlier"),
            ("best", 101, 50, "b"), ("default", 102, 9, "{}")]  # fmt: skip
    lines = ["arm,seed,return,settings", *(",".join(map(str, run)) for run in runs)]
    (tmp_path / "hopper.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "hopper_trials.csv").write_text("trial,state,value\n0,COMPLETE,4\n1,PRUNED,9\n2,COMPLETE,7\n3,FAIL,\n")
    (row,) = table(tmp_path)
    # seeds that both have: 30 - 10 and 50 - 20; Student with one degree of freedom: 25 -+ 12.706 * 5
    assert row["difference"] == "+25 [-38.53, 88.53]"
    assert (row["task"], row["runs"], row["trials"], row["whole"]) == ("Hopper-v5", 2, 4, 2)
    assert row["best trial's value"] == 7.0
    assert row["default"].startswith("15 [")


def test_the_page_says_how_far_each_search_is(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- search -->\nold\n<!-- end of search -->\nAfter.\n")
    options = Options(out=tmp_path / "out", rows=tmp_path / "rows", page=page, page_only=True)
    text = main(options)
    assert text.count("**not run yet**") == 2
    assert page.read_text() == f"Before.\n<!-- search -->\n\n{text}\n<!-- end of search -->\nAfter.\n"
    trials = tmp_path / "out/cartpole/trials.csv"
    trials.parent.mkdir(parents=True)
    trials.write_text("trial,state,value\n0,COMPLETE,40\n1,PRUNED,90\n")
    text = main(options)
    assert "* CartPole-v1: **not compared yet**; 2 trials so far, 1 of them whole, the best 40 " in text
    (trials.parent / "runs.csv").write_text(
        "arm,seed,return,settings\ndefault,100,1,{}\nbest,100,2,b\ndefault,101,1,{}\nbest,101,3,b\n"
    )
    text = main(options)
    assert "| CartPole-v1 | 2 | 1 | 40 | 2 |" in text
    assert text in page.read_text()


def test_the_page_of_the_documentation():
    assert section(study.ROWS) in study.PAGE.read_text("utf-8")


def test_an_unknown_task(tmp_path):
    with pytest.raises(ValueError, match=f"expected some of {', '.join(TASKS)}, got pendulum"):
        main(Options(("pendulum",), rows=tmp_path))
