import importlib
import inspect
from pathlib import Path

import pytest

from ccrl.packages import ROOT
from scripts.docs import _header, _outside_links, _unrolled, broken_links, modules, verdict
from scripts.methods import Entry


def test_a_verdict_is_one_line():
    assert verdict("# A\n\nVerdict: **partly**. It\nlearns.\n\nMore.\n") == "**partly**. It learns."
    assert verdict("# A\n\n**Verdict: holds**: on six tasks.\n") == "**holds**: on six tasks."
    assert verdict("# A\n\n**Verdict:** on six tasks.\n") == "on six tasks."
    assert verdict("# A\n") == ""


def test_links_out_of_the_folder():
    text = "[`agents/ppo.py`](../agents/ppo.py), [speed](speed.md), [lab](../scripts/plot.py)"
    assert _outside_links(text, Path("x.md")) == (
        '<a href="api/agents.ppo.html"><code>agents/ppo.py</code></a>, [speed](speed.md), lab'
    )
    assert 'href="../api/agents.llm.html"' in _outside_links("[a](../../agents/llm)", Path("llm/x.md"))
    with pytest.raises(ValueError, match=r"docs/x.md: expected a file at ../agents/nothing.py"):
        _outside_links("[a](../agents/nothing.py)", Path("x.md"))


def test_the_head_of_a_page_leads_to_all_of_the_code(tmp_path):
    written = _unrolled(tmp_path / "unrolled", ["ppo", "sac"], ("bnpo",))
    assert written == {"bnpo", "grpo"}, "a page that names another's comes with it"
    bnpo = Entry("bnpo", "a paper", {}, "docs/llm/bnpo.md", "train")
    assert "(../unrolled/bnpo.md)" in _header(bnpo, "", False, written, "llm/bnpo.md")
    assert "unrolled" not in _header(bnpo, "", False, {"ppo"}, "llm/bnpo.md"), "the site of some agents: no broken link"
    own = (tmp_path / "unrolled" / "bnpo.md").read_text()
    assert "[grpo](grpo.md)" in own
    assert "**BetaNormaliser.advantage**" in own
    assert "**Learner.iterate**" not in own, "its source is on grpo's page"
    assert "  Learner.iterate\n" in own


def test_broken_links(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">1</a><a href="b.html#gone">2</a><a href="c.html">3</a><a href="https://x.org/d">4</a>'
    )
    (tmp_path / "b.html").write_text('<p id="here"></p><img src="missing.png">')
    assert broken_links(tmp_path) == ["a.html: b.html#gone", "a.html: c.html", "b.html: missing.png"]


def test_the_reference_has_every_public_module(tmp_path):
    (tmp_path / "c").mkdir()
    for name in ("__init__.py", "a.py", "_b.py", "c/__init__.py", "c/e.py"):
        (tmp_path / name).write_text("")
    assert dict(modules("p", tmp_path)) == {"p": ["a", "c"], "p.a": [], "p.c": ["e"], "p.c.e": []}


@pytest.mark.parametrize("package", ["ccrl", "envs", "agents"])
def test_no_function_of_a_package_hides_one_of_its_modules(package):
    for name, below in modules(package, ROOT / package):
        for child in below:
            assert inspect.ismodule(getattr(importlib.import_module(name), child, inspect)), f"{name}.{child}"
