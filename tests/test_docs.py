"""The Python on the pages of docs/ runs, at small sizes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize(
    "page",
    [
        "index",
        "inventory_planning",
        "llm/div_prec",
        "llm/polar",
        "llm/reward_models",
        "llm/v0",
        "own_agent",
        "running",
        "statistics",
        "tuning",
    ],
)
def test_the_python_runs(page, tmp_path, monkeypatch):
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text("utf-8"), flags=re.DOTALL))
    assert code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text(code)
    runpy.run_path("page.py")
