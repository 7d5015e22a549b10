"""Methods for language models in settings that separate them: a setting from warm start to page, resumed; power."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from agents.llm.baselines import GRPO, DrGRPO
from ccrl.experiment.csv_table import read_rows
from ccrl.packages import ROOT
from scripts.studies.separate import setting as rooms
from scripts.studies.separate import study
from scripts.studies.separate.setting import Entry, Judge, Setting, Start
from scripts.studies.separate.settings import SETTINGS

START = Start("sorting", {"digits": 2}, steps=120, layers=1, width=32)
SHAPE = {"n_prompts": 2, "group_size": 2}
TINY = Setting(
    "tiny", "nothing", START, SHAPE, 8, {"GRPO": Entry(GRPO), "Dr": Entry(DrGRPO), "KL": Entry(GRPO, {"kl_coef": 1.0})},
    grid=({"learning_rate": 1e-3},), tuning_seeds=1, test_seeds=2,
)  # fmt: skip


def test_a_setting_runs_to_a_page_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "QUESTIONS", 24)
    monkeypatch.setattr(study, "PILOT", 2)
    monkeypatch.setattr(study, "SETTINGS", {"tiny": TINY})
    options = study.Options(tmp_path / "out", results=tmp_path / "results")
    (first, second) = study.main(options)["tiny"]
    assert [(r.better, r.worse) for r in (first, second)] == [("Dr", "GRPO"), ("KL", "GRPO")]
    rows = read_rows(tmp_path / "results" / "tiny.csv")
    assert len(rows) == 3 * 2
    assert {int(row["seed"]) for row in rows} == {100, 101}
    assert any(float(row["pass1"]) > 0.0 for row in rows)
    assert all(float(row["pass1"]) <= float(row["pass8"]) <= 1.0 for row in rows)
    text = (tmp_path / "results" / "separate.md").read_text()
    assert "| Dr |" in text
    assert "2 runs of GRPO on other seeds" in text

    def never(*_: object) -> None:
        raise AssertionError("every run is in the file")

    monkeypatch.setattr(Setting, "play", never)
    assert study.main(options)["tiny"] == [first, second]
    # a method whose runs are not there yet leaves the others' comparisons
    kept = [row for row in rows if row["arm"] != "KL"]
    assert [r.better for r in study.compared(TINY, kept)] == ["Dr"]
    assert study.compared(TINY, [row for row in rows if row["arm"] != "GRPO"]) == []


def test_a_judge_is_kept_and_stands_in_for_the_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "QUESTIONS", 24)
    setting = Setting("judged", "nothing", START, SHAPE, 8, {"GRPO": Entry(GRPO)}, judge=Judge(8, 3, 1, 16))
    found = setting.play("GRPO", 100, {"learning_rate": 1e-3}, tmp_path)
    assert set(found) == {"score", "pass1", "pass8", "entropy"}
    assert len(list(tmp_path.glob("*_judge_8_3_1_16.pt"))) == 1
    assert setting.play("GRPO", 100, {"learning_rate": 1e-3}, tmp_path) == found
    agent = setting.agent("GRPO", 100, {"learning_rate": 1e-3}, tmp_path)
    agent.learn(4)
    assert "train/judged_reward" in agent.scalars


def test_power_of_a_paired_comparison() -> None:
    # n = 10: t_.975 of 9 degrees 2.2622, z_.8 .8416; sqrt(2 / 10) = .4472; times .05: .0694
    assert study.detectable(0.05, 10) == pytest.approx(0.0694, abs=1e-4)
    assert study.detectable(0.05, 40) < study.detectable(0.05, 10) / 2  # better than by the root: t falls too


def test_methods_have_equal_tuning_budgets_and_score_that_exists() -> None:
    for setting in SETTINGS.values():
        assert {len(arm.grid) for arm in setting.claim.arms} == {6}  # which Claim refuses otherwise
        assert setting.score in ("pass1", "pass8")
        assert math.isfinite(setting.completions)


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected settings among"):
        study.main(study.Options(tmp_path, settings=("stael",)))


PAGES = ROOT / "docs" / "llm"
QUOTED = re.compile(r"([+-][\d.]+ \[[^]]+\]), p (\S+), ([a-z ]+) \(\[\w+\]\((?:llm/)?separate\.md#(\w+)\)")


def test_the_page_is_that_of_the_kept_runs() -> None:
    found = {
        name: study.compared(setting, read_rows(study.RESULTS / f"{name}.csv")) for name, setting in SETTINGS.items()
    }
    assert study.page(found, study.RESULTS) == (PAGES / "separate.md").read_text("utf-8"), "separate --page-only"


def test_the_methods_pages_quote_the_page() -> None:
    sections = dict(re.findall(r"\n## (\w+)\n(.*?)(?=\n## |\Z)", (PAGES / "separate.md").read_text("utf-8"), re.DOTALL))
    count = 0
    for path in (*sorted(PAGES.glob("*.md")), ROOT / "docs" / "orpo.md"):
        for gap, p, verdict, name in QUOTED.findall(" ".join(path.read_text("utf-8").split())):
            assert f"| {gap} | {p} | {verdict} |" in sections[name], f"{path.name}: {gap}"
            count += 1
    assert count == sum(len(setting.entries) - 1 for setting in SETTINGS.values()) - 4, "all but the baselines' own"
