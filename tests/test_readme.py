"""The README says what is there: its tests, files and scripts exist, and its Python runs."""

from __future__ import annotations

import dataclasses
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/features.md"])
def test_the_named_tests_exist(page):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 5
    missing = [f"{path}::{test}" for path, test in named
               if (f"def {test}(" if test else "def test_") not in (ROOT / path).read_text("utf-8")]  # fmt: skip
    assert not missing


def test_every_yes_of_ours_names_a_test():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", (ROOT / "docs/features.md").read_text("utf-8"), flags=re.MULTILINE)
    ours = {feature: said for feature, said in rows if said.startswith(("yes", "part"))}
    assert len(ours) > 25
    assert not [feature for feature, said in ours.items() if "`tests/" not in said]


def test_the_named_files_exist():
    named = re.findall(r"\]\((?!http)([^)]+)\)|python (scripts/\w+\.py)|^(\w+/) ", README, flags=re.MULTILINE)
    paths = {path for match in named for path in match if path}
    assert len(paths) > 8
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_method_of_your_own_runs(tmp_path):
    page = (ROOT / "docs" / "llm" / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    (tmp_path / "page.py").write_text(code.replace("10 * agent", "2 * agent"))
    found = runpy.run_path(str(tmp_path / "page.py"))
    assert found["agent"].iteration == 2

    judged = dataclasses.replace(found["MINE"], Recipe=found["JudgedRecipe"])
    size = {"model_layers": 1, "model_width": 16, "model_heads": 2, "n_prompts": 2, "group_size": 4}
    agent = judged("arithmetic", **size, seed=0)
    agent.learn(agent.samples_per_iteration)
    assert "judge.model" in dict(agent.estimator.named_modules())


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL), ids=["use", "agent"])
def test_the_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "readme.py").write_text(code.replace("20_000", "2_048"))
    names = runpy.run_path("readme.py")
    if "A2C" in names:
        assert names["agent"].num_timesteps == 10_000
    else:
        assert names["action"].shape == (16,)
        assert names["agent"].num_timesteps == 2_048
