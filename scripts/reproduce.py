"""Run the papers' small experiments and write the page that compares them with what is expected.

python scripts/reproduce.py                       # all of them, 3 seeds
python scripts/reproduce.py --papers bnpo mhpo --seeds 1 --page /tmp/page.md
"""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from ccrl.experiment.files import write_atomic
from ccrl.packages import ROOT, check_siblings

check_siblings("agents", "envs")

from scripts.reproductions import PAPERS, Measurement

__all__ = ["Options", "main", "page"]


@dataclass(frozen=True)
class Options:
    """What to run."""

    papers: tuple[str, ...] = ()
    """Slugs; none: all."""
    seeds: int = 3
    """Seeds 0, 1, ... of each experiment that draws random numbers."""
    page: Path = ROOT / "docs" / "llm_reproductions.md"
    """Where the page is written."""


def page(found: dict[str, list[Measurement]], seconds: dict[str, float], seeds: int) -> str:
    """Markdown: one table per paper."""
    total = sum(len(rows) for rows in found.values())
    good = sum(row.agrees for rows in found.values() for row in rows)
    lines = [
        "# The papers' small experiments", "",
        f"Made by `python scripts/reproduce.py` ({seeds} seeds, one CPU thread): {good} of {total} numbers agree with "
        "what is expected. Mean over seeds, with the standard error where there are several; exact results have one "
        "value. Expected numbers are those of the paper where it says so, else of a formula or of a "
        "[reference run](reference_runs.md), an independent implementation.",
    ]  # fmt: skip
    for slug, rows in found.items():
        lines += ["", f"## {slug}: {PAPERS[slug]}", "", f"{seconds[slug]:.0f} s.", "",
                  "| quantity | expected | measured | agrees |", "|---|---|---|---|"]  # fmt: skip
        for row in rows:
            error = f" +- {row.error:.2g}" if len(row.values) > 1 else ""
            verdict = "yes" if row.agrees else "**no**"
            lines.append(f"| {row.quantity} | {row.expected} | {row.mean:.5g}{error} | {verdict} |")
    return "\n".join(lines) + "\n"


def main(options: Options) -> dict[str, list[Measurement]]:
    """Run, print, write the page; returns the measurements by slug."""
    unknown = set(options.papers) - set(PAPERS)
    if unknown or options.seeds < 1:
        sys.exit(f"expected papers among {sorted(PAPERS)} and seeds >= 1, got {sorted(unknown)}, {options.seeds}")
    torch.set_num_threads(1)
    found: dict[str, list[Measurement]] = {}
    seconds: dict[str, float] = {}
    for slug in options.papers or sorted(PAPERS):
        start = time.perf_counter()
        module = importlib.import_module(f"scripts.reproductions.{slug}")
        found[slug] = module.run(list(range(options.seeds)))
        seconds[slug] = time.perf_counter() - start
        for row in found[slug]:
            print(f"{slug}: {row.quantity}: {row.mean:.5g} (expected {row.expected}): "
                  f"{'agrees' if row.agrees else 'DIFFERS'}", flush=True)  # fmt: skip
    text = page(found, seconds, options.seeds)
    write_atomic(options.page, lambda file: file.write(text.encode()))
    return found


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
