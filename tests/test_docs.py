"""The Python on the pages of docs/ runs, at small sizes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

ELSEWHERE = {
    "export": "tests/scripts/test_export.py",
    "llm/README": "tests/test_readme.py",
    "loss_of": "tests/ccrl/test_loss_of.py",
    "new_mujoco_task": "tests/envs/mujoco/test_mujoco_docs.py",
    "new_torch_env": "tests/ccrl/test_torch_env.py",
    "own_language_model": "tests/scripts/test_llm_command.py",
}
"""Pages whose code another test reads and runs."""

NOT_RUN = {"llm/bridges": "with a model and data of the reader's", "robots": "needs a CUDA device"}

SMALLER = {"detan": ("34_000", "1_000")}
"""Sizes of a page that would take long, and what runs in their place."""


def code(page: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text("utf-8"), re.DOTALL | re.M))


PAGES = sorted(name for path in DOCS.rglob("*.md") if code(name := path.relative_to(DOCS).with_suffix("").as_posix()))


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE and page not in NOT_RUN])
def test_the_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text(code(page).replace(*SMALLER.get(page, ("", ""))))
    runpy.run_path("page.py")


def test_no_page_is_forgotten():
    assert set(PAGES) >= ELSEWHERE.keys() | NOT_RUN.keys() | SMALLER.keys()
    for page, test in ELSEWHERE.items():
        assert f"{Path(page).name}.md" in (ROOT / test).read_text("utf-8")


def test_the_commands_exist():
    """Every script that a page or the README calls is there, and its flags are names in the code."""
    source = "\n".join(
        p.read_text("utf-8") for d in ("scripts", "agents", "ccrl", "envs") for p in (ROOT / d).rglob("*.py")
    )
    words, wrong = set(re.findall(r"\w+", source)), []
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")):
        text = re.sub(r"\\\n\s*", " ", path.read_text("utf-8"))
        for script, rest in re.findall(r"python (scripts/[\w/]+(?:\.py)?)([^\n`#|]*)", text):
            flags = [flag.replace("-", "_") for flag in re.findall(r"(?<= --)[a-z][\w-]*", rest)]
            unknown = [flag for flag in flags if flag not in words and flag.removeprefix("no_") not in words]
            if unknown or not (ROOT / script).exists():
                wrong.append(f"{path.relative_to(ROOT)}: {script} {unknown}")
    assert not wrong
