"""The papers' central claims, tested.

    python scripts/studies/claims                       # all of them, and the page
    python scripts/studies/claims gbpo mdpo --jobs 2    # these; the page keeps the others' results
    python scripts/studies/claims --page-only           # the page again

A claim's cells are added one by one to ``docs/figures/claims/NAME.csv``: the same command goes on where it stopped, and
the page is made from these files. Settings are chosen on the seeds 1000, 1001, ... and reported on 100, 101, ...
(docs/protocol.md).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.files import write_atomic
from ccrl.packages import ROOT
from scripts.studies.claims import bayesian, control, elsewhere, language
from scripts.studies.claims.claim import Claim, Result, chosen, edge, judge, run

__all__ = ["CLAIMS", "Options", "main", "page", "play"]

CLAIMS: dict[str, Claim] = {claim.name: claim for claim in (*control.CLAIMS, *bayesian.CLAIMS, *language.CLAIMS)}
RESULTS = ROOT / "docs" / "figures" / "claims"


@dataclass(frozen=True)
class Options:
    """Which claims are tested."""

    papers: tyro.conf.Positional[tuple[str, ...]] = ()
    """These papers' claims are tested; none named: all."""
    results: Path = RESULTS
    """Each claim's cells are kept in this folder, in NAME.csv."""
    page: Path | None = None
    """The page is written here; by default docs/claims.md, or beside the results if those are elsewhere."""
    page_only: bool = False
    """Nothing runs; the page is made from the results."""
    jobs: int = 1
    """So many cells run at a time, each a process with one thread."""


def play(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """The score of one cell, and whether anything was compiled on the way, which makes another run of a seed."""
    arm, before = CLAIMS[cell["claim"]].arm(cell["arm"]), _graphs()
    assert arm.play is not None
    score = float(arm.play(cell["seed"], **json.loads(cell["settings"])))
    return [{"score": score, "compile": "on" if _graphs() > before else "off"}]


def _graphs() -> int:
    """How many graphs this process has compiled."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported before something is compiled
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def main(options: Options) -> dict[str, list[Result]]:
    """Run what is missing and write the page; returns the comparisons of the claims that are complete.

    Raises:
        ValueError: papers without a claim here.
    """
    papers = sorted({claim.paper for claim in CLAIMS.values()})
    if unknown := set(options.papers) - set(papers):
        raise ValueError(f"expected papers among {papers}, got {sorted(unknown)}")
    torch.set_num_threads(1)
    # in the order they were named: the quick ones first, where a study may be cut short
    for paper in () if options.page_only else options.papers or papers:
        for claim in (claim for claim in CLAIMS.values() if claim.paper == paper):
            run(claim, options.results / f"{claim.name}.csv", play, options.jobs)
    found = {name: result for name in CLAIMS if (result := _result(options.results / f"{name}.csv", CLAIMS[name]))}
    usual = ROOT / "docs" / "claims.md" if options.results == RESULTS else options.results / "claims.md"
    text = page(found, options.results)
    write_atomic(options.page or usual, lambda file: file.write(text.encode()))
    return found


def _result(path: Path, claim: Claim) -> list[Result] | None:
    """None while runs are missing."""
    rows = read_rows(path) if path.exists() else []
    settings = chosen(claim, rows)
    have = {(r["arm"], r["settings"], int(r["seed"])) for r in rows if r["purpose"] == "test"}
    wanted = {(arm.name, settings[arm.name], seed) for arm in claim.arms for seed in claim.seeds("test")}
    tried = {(r["arm"], r["settings"], int(r["seed"])) for r in rows if r["purpose"] == "tune"}
    wanted_tries = {
        (arm.name, json.dumps(grid, sort_keys=True), seed)
        for arm in claim.arms for grid in arm.grid for seed in claim.seeds("tune") if len(arm.grid) > 1
    }  # fmt: skip
    if not wanted_tries <= tried:
        return None
    return judge(claim, rows) if wanted <= have else None


def page(found: dict[str, list[Result]], folder: Path) -> str:
    """Markdown: the table of claims, then each with its setting and the settings chosen."""
    lines = [
        "# The papers' claims, tested", "",
        "Each paper's central claim as a difference of scores between two methods in one setting: settings chosen on "
        "the seeds 1000, 1001, ..., with as many tries on both sides, reported on 100, 101, ... with shared seeds "
        "([protocol](protocol.md)). Effects are mean paired differences with Student's 95 % interval; p is two-sided, "
        "with Holm's correction over the comparisons of a claim. **Supported**: p below .05 in the claimed direction. "
        "**Contradicted**: p below .05 in the other. Nothing here speaks of the papers' own, larger settings. On "
        "tables most methods prefer the largest step size tried, however wide the grid: effects are those at it. What "
        "holds on tables need not on a language model: [on a small one](llm/separate.md), in six settings made for "
        "it, most of these methods are not better than GRPO.", "",
        "Made by `python scripts/studies/claims`; every run is a line of `docs/figures/claims/NAME.csv`. Minutes are "
        "those of all its runs, of the processor or, of studies that did not keep those, wall time on a core that "
        "others used too.", "",
        "| paper | comparison | n | effect | p | verdict | minutes |", "|---|---|--:|---|--:|---|--:|",
    ]  # fmt: skip
    for name, results in found.items():
        rows = read_rows(folder / f"{name}.csv")
        for i, r in enumerate(results):
            d = r.difference
            lines.append(
                f"| [{name}](#{name.replace('.', '-')}) | {r.better} - {r.worse} | {CLAIMS[name].test_seeds} | "
                f"{d.difference:+.3g} [{d.low:.3g}, {d.high:.3g}] | {r.adjusted:.2g} | {r.verdict} | "
                f"{'' if i else _minutes(rows)} |"
            )
    if missing := sorted(set(CLAIMS) - set(found)):
        lines += ["", f"Written, and not run to the end yet: {', '.join(missing)} (the same command goes on)."]
    lines += [
        "", "## Papers without such a test", "",
        "What small experiments say: settings as they come, seeds 0, 1, ..., Student's 95 % interval over n of them "
        "(of three runs that are not normal it covers less, [statistics](statistics.md)); the number is the claim's "
        "own in [the papers' small experiments](llm_reproductions.md), or its study's. **Not testable here**: what is "
        "missing.", "", *elsewhere.lines(ROOT / "docs" / "figures"),
    ]  # fmt: skip
    for name, results in found.items():
        claim = CLAIMS[name]
        lines += [
            "", f"## {name}", "", f"Claim: {claim.text}.", "",
            f"{claim.setting}. Score: {claim.score}. {_tuning(claim)}, {claim.test_seeds} test seeds. "
            f"`python scripts/studies/claims {claim.paper}`", "",
            "| arm | setting chosen | mean score |", "|---|---|--:|",
        ]  # fmt: skip
        arms = {r.better: (r.settings[0], r.scores[0]) for r in results}
        arms |= {r.worse: (r.settings[1], r.scores[1]) for r in results}
        for arm, (settings, score) in arms.items():
            lines.append(f"| {arm} | `{settings}`{edge(claim.arm(arm), settings)} | {score:.4g} |")
    return "\n".join(lines) + "\n"


def _tuning(claim: Claim) -> str:
    settings = len(claim.arms[0].grid)
    return (
        f"{settings} settings x {claim.tuning_seeds} tuning seeds for each arm" if settings > 1 else "No setting tuned"
    )


def _minutes(rows: list[dict[str, str]]) -> str:
    """Of all runs, of the processor where every row has them."""
    if all(row.get("cpu_seconds") for row in rows):
        return f"{sum(float(row['cpu_seconds']) for row in rows) / 60:.1f} CPU"
    return f"{sum(float(row['seconds']) for row in rows) / 60:.1f} wall"
