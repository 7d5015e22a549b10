"""The table of methods says what is there."""

from __future__ import annotations

import agents
from ccrl.packages import ROOT
from scripts import methods


def test_every_method_has_slots_a_paper_and_a_page():
    found = {m.slug: m for m in methods.methods()}
    assert found.keys() == agents.AGENTS.keys() | agents.FLOW_METHODS.keys() | agents.METHODS.keys()
    for method in found.values():
        assert method.paper
        assert method.slots
        assert method.page is not None, f"{method.slug}: write docs/{method.slug}.md or docs/llm/{method.slug}.md"
        assert (ROOT / method.page).exists()


def test_the_table_is_markdown(capsys):
    text = methods.main(methods.Options(format="markdown"))
    assert capsys.readouterr().out == text
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(rows) == len(agents.AGENTS | agents.FLOW_METHODS | agents.METHODS)
    # five cells: a bar inside one must be escaped
    assert all(line.replace("\\|", "").count("|") == 6 for line in rows)
    assert any("llm --method bnpo --task TASK" in line for line in rows)


def test_installed_without_the_pages_it_says_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "ROOT", tmp_path)  # a wheel has no docs/
    text = methods.main(methods.Options())
    assert "documented)" not in text
    assert text.count("docs/ of the project's source tree") == len(methods.methods())
    assert "$ ccrl train llm --method grpo --task TASK" in text
