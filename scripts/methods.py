"""The table of methods, from the code: paper, what each puts into the slots of the one estimator, status and command.

python scripts/methods.py                    # plain
python scripts/methods.py --format markdown  # for the docs
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from ccrl.packages import ROOT, check_siblings

check_siblings("agents", "envs")

import agents

__all__ = ["Entry", "Options", "main", "methods"]

ELSEWHERE = "its page with the verdict is in docs/ of the project's source tree"


@dataclass(frozen=True)
class Options:
    """How to print the table."""

    format: Literal["plain", "markdown"] = "plain"
    """plain or markdown."""


@dataclass(frozen=True)
class Entry:
    """One agent."""

    slug: str
    paper: str
    slots: dict[str, str]
    page: str | None
    """Its page, from the root of the project; None: undocumented, or the pages are not here."""
    command: str
    pages: bool = True
    """Whether the pages are here: they are in the project's folder and not in what pip installs."""

    @property
    def status(self) -> str:
        """documented, undocumented, or where the pages are."""
        if not self.pages:
            return ELSEWHERE
        return "undocumented" if self.page is None else "documented"


def methods() -> list[Entry]:
    """Every agent in the order of its name, those for language models after the others."""
    found, here = [], (ROOT / "docs").is_dir()
    for slug in (*sorted(agents.AGENTS | agents.FLOW_METHODS), *sorted(agents.METHODS)):
        cls = agents.get_agent(slug)
        text = slug in agents.METHODS
        # baselines share a page
        pages = (
            [f"docs/llm/{slug}.md", "docs/llm/baselines.md"]
            if text
            else [f"docs/{slug}.md", "docs/offline.md", "docs/flow.md"]
        )
        page = next((p for p in pages if (ROOT / p).exists() and slug in (ROOT / p).read_text(encoding="utf-8")), None)
        command = (
            f"llm --method {slug} --task TASK"
            if text
            else f"{slug} --env {'TASK' if slug in agents.FLOW_METHODS else 'ID'}"
        )
        command += " --dataset DATASET" if hasattr(cls.Config, "dataset") else ""
        program = "python scripts/train.py" if here else "ccrl train"
        found.append(Entry(slug, cls.paper, cls.slots(), page, f"{program} {command}", here))
    return found


def table(found: list[Entry], format: str) -> str:
    """Markdown, or plain text with a line per slot."""
    if format == "markdown":
        lines = ["| method | paper | slots | status | command |", "|---|---|---|---|---|"]
        for m in found:
            # a bar, as in |rho - 1|, would end the cell
            slots = "<br>".join(f"**{k}**: {v}" for k, v in m.slots.items()).replace("|", "\\|")
            name = m.slug if m.page is None else f"[{m.slug}]({m.page})"
            lines.append(f"| {name} | {m.paper} | {slots} | {m.status} | `{m.command}` |")
        return "\n".join(lines) + "\n"
    blocks = []
    for m in found:
        width = max(map(len, m.slots), default=0)
        filled = [f"    {k:<{width}}  {v}" for k, v in m.slots.items()]
        blocks.append("\n".join([f"{m.slug}  ({m.status})  {m.paper}", *filled, f"    $ {m.command}"]))
    return "\n\n".join(blocks) + "\n"


def main(options: Options) -> str:
    """Print the table, and return it."""
    text = table(methods(), options.format)
    print(text, end="")
    return text


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
