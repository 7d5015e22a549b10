"""Run the papers' small experiments, keep the number of every seed, and write the page that compares them with what is
expected.

python scripts/reproduce.py                       # all of them, 5 seeds
python scripts/reproduce.py --papers bnpo mhpo    # these two; the page keeps the others' numbers
python scripts/reproduce.py --page-only           # the page again, from the numbers that are there
"""

from __future__ import annotations

import csv
import importlib
import io
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.files import write_atomic
from ccrl.experiment.run import describe
from ccrl.packages import ROOT, check_siblings

check_siblings("agents", "envs")

from scripts.reproductions import PAPERS, Measurement
from scripts.reproductions.noes import NOES, OPENS

__all__ = ["Kept", "Options", "embed", "embed_page", "load", "main", "page", "save", "table"]


@dataclass(frozen=True)
class Options:
    """What to run."""

    papers: tuple[str, ...] = ()
    """These papers' experiments run, by slug; none named: all."""
    seeds: int = 5
    """Experiments that draw random numbers run with the seeds 0, 1, ..., so many of them."""
    results: Path = ROOT / "docs" / "figures" / "reproductions"
    """Each paper's numbers are written to <slug>.csv in this folder; the page is made from all that are there."""
    page: Path | None = None
    """The page is written here; by default docs/llm_reproductions.md, or beside the results if those are elsewhere."""
    page_only: bool = False
    """Nothing runs; the page is made from the results."""


class Kept(NamedTuple):
    """What is in the repository of a paper's experiment."""

    numbers: list[Measurement]
    seconds: int
    """Of the whole run."""
    commit: str
    """Of the code that ran, with a ``+`` where files differed from it; of runs before that was kept, the commit that
    added their numbers."""


def save(path: Path, rows: list[Measurement], seconds: float, commit: str = "") -> None:
    """One line per number: text, range, the values of all seeds; the seconds of the paper's run and its commit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["quantity", "expected", "low", "high", "values", "seconds", "commit"])
    for row in rows:
        values = " ".join(f"{v:.7g}" for v in row.values)
        span = (f"{x:.7g}" for x in row.accept)
        writer.writerow([row.quantity, row.expected, *span, values, round(seconds), commit])
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))


def load(path: Path) -> Kept:
    """What :func:`save` wrote."""
    rows = read_rows(path)
    found = [
        Measurement(
            row["quantity"],
            row["expected"],
            (float(row["low"]), float(row["high"])),
            tuple(float(v) for v in row["values"].split()),
        )
        for row in rows
    ]
    return Kept(found, int(rows[0]["seconds"]), rows[0]["commit"])


def _commit() -> str:
    git = describe()["git"] or {"commit": "", "dirty": False}
    return str(git["commit"])[:7] + "+" * bool(git["dirty"])


def table(numbers: list[Measurement]) -> list[str]:
    """Markdown: a line per number."""
    lines = ["| quantity | expected | range | measured | kind | holds |", "|---|---|---|---|---|---|"]
    for row in numbers:
        verdict = row.verdict if row.verdict == "yes" else f"**{row.verdict}**"
        low, high = row.interval
        measured = f"{row.mean:.5g}" + (f" [{low:.4g}, {high:.4g}]" if len(row.values) > 1 else "")
        span = f"{row.accept[0]:.5g} to {row.accept[1]:.5g}"
        lines.append(f"| {' | '.join(map(_cell, (row.quantity, row.expected, span, measured, row.kind, verdict)))} |")
    return lines


def _command(slug: str, seeds: int) -> str:
    """What makes as many seeds as are kept."""
    return f"python scripts/reproduce.py --papers {slug}" + (f" --seeds {seeds}" if seeds != Options.seeds else "")


def _cell(text: str) -> str:
    return text.replace("|", chr(92) + "|")


def embed(text: str, slug: str, found: Kept) -> str:
    """``text`` of a method's page with its table between the two comments that name the slug; without them as it is."""
    begin, end = f"<!-- reproduction: {slug} -->", "<!-- end of reproduction -->"
    head, mark, rest = text.partition(begin)
    _, close, tail = rest.partition(end)
    if not mark or not close:
        return text
    seeds = max(len(row.values) for row in found.numbers)
    said = f"Means over {seeds} seeds with Student's 95 % interval (`{_command(slug, seeds)}`, commit {found.commit}):"
    return "\n".join([head + begin, "", said, "", *table(found.numbers), "", end]) + tail


def page(folder: Path) -> str:
    """Markdown: what holds by kind of number, and one table per paper."""
    found = {slug: load(folder / f"{slug}.csv") for slug in sorted(PAPERS) if (folder / f"{slug}.csv").exists()}
    rows = [row for numbers, *_ in found.values() for row in numbers]
    count = Counter((row.kind, row.verdict) for row in rows)
    total = Counter(row.kind for row in rows)
    noes = [(slug, row) for slug, (numbers, *_) in found.items() for row in numbers if row.verdict == "no"]
    lines = [
        "# The papers' small experiments", "",
        "Made by `python scripts/reproduce.py` on one CPU thread; the number of every seed is in "
        "`docs/figures/reproductions/`. Expected numbers "
        "are the paper's where it says so, else of a formula or of a [reference run](reference_runs.md), an "
        "independent implementation. A table's commit is that of the code that made its numbers, or that added them.",
        "",
        "* An *identity* is computed without chance, and must hold.",
        "* An *estimate* is the mean over seeds of a number with a known value; its range is that value's own "
        "uncertainty.",
        "* A *claim* is of a direction.", "",
        "**yes**: the whole 95 % interval over seeds (Student's) lies in the range. **no**: all of it lies outside. "
        "**open**: it crosses an end of the range, so these seeds cannot tell.", "",
        "| | yes | open | no | all |", "|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    for kind in ("identity", "estimate", "claim"):
        counts = [count[kind, verdict] for verdict in ("yes", "open", "no")]
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} | {total[kind]} |")
    if missing := sorted(set(PAPERS) - set(found)):
        lines += ["", f"No numbers are kept yet of: {', '.join(missing)}."]
    if noes:
        lines += ["", "## What does not hold, and why", "", "| paper | quantity | reason |", "|---|---|---|"]
        lines += [f"| {slug} | {_cell(row.quantity)} | {NOES.get((slug, row.quantity), 'not examined yet')} |"
                  for slug, row in noes]  # fmt: skip
    opens = Counter(slug for slug, (numbers, *_) in found.items() for row in numbers if row.verdict == "open")
    if opens:
        lines += ["", "## What stays open, and why", "", "| paper | open numbers | reason |", "|---|--:|---|"]
        lines += [f"| {slug} | {n} | {OPENS.get(slug, 'not examined yet')} |" for slug, n in opens.items()]
    for slug, (numbers, seconds, commit) in found.items():
        seeds = max(len(row.values) for row in numbers)
        lines += ["", f"## {slug}: {PAPERS[slug]}", "", f"{seeds} seeds, {seconds} s, commit {commit}. "
                  f"`{_command(slug, seeds)}`", "", *table(numbers)]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(options: Options) -> dict[str, list[Measurement]]:
    """Run, print, write; returns the measurements by slug."""
    unknown = set(options.papers) - set(PAPERS)
    if unknown or options.seeds < 2:
        sys.exit(f"expected papers among {sorted(PAPERS)} and seeds >= 2 (an interval needs two), got "
                 f"{sorted(unknown)}, {options.seeds}")  # fmt: skip
    torch.set_num_threads(1)
    found: dict[str, list[Measurement]] = {}
    commit = _commit()  # before results change files
    options.results.mkdir(parents=True, exist_ok=True)
    for slug in () if options.page_only else options.papers or sorted(PAPERS):
        start = time.perf_counter()
        module = importlib.import_module(f"scripts.reproductions.{slug}")
        found[slug] = module.run(list(range(options.seeds)))
        save(options.results / f"{slug}.csv", found[slug], time.perf_counter() - start, commit)
        for row in found[slug]:
            print(f"{slug}: {row.quantity}: {row.mean:.5g} (expected {row.expected}): {row.verdict}", flush=True)
    docs = ROOT / "docs"
    ours = options.results.resolve() == (docs / "figures" / "reproductions").resolve()
    usual = (docs if ours else options.results) / "llm_reproductions.md"
    text = page(options.results)
    write_atomic(options.page or usual, lambda file: file.write(text.encode()))
    if ours:
        for path in sorted((docs / "llm").glob("*.md")):
            embed_page(path, options.results)
    return found


def embed_page(path: Path, folder: Path) -> None:
    """Put today's numbers of ``folder`` into a method's page."""
    old = text = path.read_text(encoding="utf-8")
    for slug in PAPERS:
        if f"<!-- reproduction: {slug} -->" in text and (folder / f"{slug}.csv").exists():
            text = embed(text, slug, load(folder / f"{slug}.csv"))
    if text != old:
        write_atomic(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
