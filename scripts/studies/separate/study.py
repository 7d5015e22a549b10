"""Methods for language models in settings where they can differ, each against GRPO, and how large a difference a
setting can show.

    python scripts/studies/separate --out results/separate                       # all settings, and the page
    python scripts/studies/separate stale proxy --out results/separate           # these
    python scripts/studies/separate --out results/separate --page-only           # the page again
    python scripts/studies/separate --out results/separate --check               # each method trains, one rollout

Runs are added one by one to ``docs/figures/separate/NAME.csv``: the same command goes on where it stopped, and the page
is made from these files. Warm starts and reward models are kept in ``--out``. Settings are chosen on the seeds 1000,
1001, ... and reported on 100, 101, ... (docs/protocol.md).
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from ccrl.experiment.cells import complete
from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.files import write_atomic
from ccrl.packages import ROOT
from ccrl.stats.student import t_quantile
from scripts.studies.claims.claim import Result, chosen, edge, judge, run
from scripts.studies.separate.setting import Setting, look
from scripts.studies.separate.settings import SETTINGS

__all__ = ["Options", "detectable", "main", "page", "play"]

RESULTS = ROOT / "docs" / "figures" / "separate"
PILOT = 6


@dataclass(frozen=True)
class Options:
    """Which settings run."""

    out: Path
    """Warm starts and reward models are kept in this folder."""
    settings: tyro.conf.Positional[tuple[str, ...]] = ()
    """These settings run; none named: all."""
    results: Path = RESULTS
    """Each setting's runs are kept in this folder, in NAME.csv."""
    page: Path | None = None
    """The page is written here; by default docs/llm/separate.md, or beside the results if those are elsewhere."""
    page_only: bool = False
    """Nothing runs; the page is made from the results."""
    check: bool = False
    """Every method of the settings does one rollout, and nothing is kept."""
    jobs: int = 1
    """So many runs at a time, each a process with one thread."""


def play(cell: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """One run."""
    return [SETTINGS[cell["claim"]].play(cell["arm"], cell["seed"], json.loads(cell["settings"]), out)]


def main(options: Options) -> dict[str, list[Result]]:
    """Run what is missing and write the page; returns the comparisons that are complete.

    Raises:
        ValueError: unknown settings.
    """
    if unknown := set(options.settings) - set(SETTINGS):
        raise ValueError(f"expected settings among {sorted(SETTINGS)}, got {sorted(unknown)}")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in SETTINGS if not options.settings or name in options.settings]
    if options.check:
        for name in names:
            check(SETTINGS[name], options.out)
        return {}
    for name in names if not options.page_only else []:
        setting = SETTINGS[name]
        _prepare(setting, options.out)
        pilot(setting, options.out, options.results)
        run(setting.claim, options.results / f"{name}.csv", partial(play, out=options.out), options.jobs)
    found = {name: compared(setting, _rows(options.results, name)) for name, setting in SETTINGS.items()}
    usual = ROOT / "docs" / "llm" / "separate.md" if options.results == RESULTS else options.results / "separate.md"
    text = page(found, options.results)
    write_atomic(options.page or usual, lambda file: file.write(text.encode()))
    return found


def _rows(results: Path, name: str) -> list[dict[str, str]]:
    path = results / f"{name}.csv"
    return read_rows(path) if path.exists() else []


def check(setting: Setting, out: Path) -> None:
    """Every method does one iteration.

    Raises:
        ValueError: settings that do not go together.
    """
    for name, entry in setting.entries.items():
        grid = entry.grid or setting.grid
        agent = setting.agent(name, 1000, grid[0], out)
        agent.learn(1)
        print(f"[{setting.name}] {name}: the clock of an iteration shows {agent.num_timesteps}", flush=True)
    print(f"[{setting.name}] start: {look(setting.start.agent(out))}", flush=True)


def _prepare(setting: Setting, out: Path) -> None:
    """Models are made before the runs, whose processes would each make them."""
    for entry in setting.entries.values():
        (entry.start or setting.start).folder(out)
    if setting.judge is not None:
        setting.judge.reward(setting.start, out)


def compared(setting: Setting, rows: list[dict[str, str]]) -> list[Result]:
    """Of the methods whose runs are complete with the first one's; none before those are."""
    claim = setting.claim
    settings = chosen(claim, rows)
    have = {(row["arm"], row["purpose"], row["settings"], int(row["seed"])) for row in rows}
    complete = {
        arm.name
        for arm in claim.arms
        if all((arm.name, "test", settings[arm.name], seed) in have for seed in claim.seeds("test"))
        and all((arm.name, "tune", json.dumps(grid, sort_keys=True), seed) in have
                for grid in arm.grid if len(arm.grid) > 1 for seed in claim.seeds("tune"))
    }  # fmt: skip
    pairs = tuple(pair for pair in claim.pairs if set(pair) <= complete)
    part = replace(claim, arms=tuple(arm for arm in claim.arms if arm.name in complete), pairs=pairs)
    return judge(part, [row for row in rows if row["arm"] in complete]) if pairs else []


# -- power ------------------------------------------------------------------------------------------------------------


def pilot(setting: Setting, out: Path, results: Path) -> None:
    """The first method at the middle of its grid, on tuning seeds that nothing is chosen on: how far runs scatter."""
    first = next(iter(setting.entries))
    grid = setting.entries[first].grid or setting.grid
    cells = [{"claim": setting.name, "arm": first, "settings": json.dumps(grid[len(grid) // 2]), "seed": seed}
             for seed in range(1100, 1100 + PILOT)]  # fmt: skip
    complete(results / f"pilot_{setting.name}.csv", cells, partial(play, out=out), name=f"pilot {setting.name}")


def detectable(deviation: float, n: int) -> float:
    """The difference of means that a two-sided test at .05 with ``n`` pairs finds with probability .8, where each side
    scatters by ``deviation``, independently: ``(t_.975 + z_.8) sqrt(2 / n) deviation``, a little less than exact."""
    normal = statistics.NormalDist()
    return (t_quantile(0.975, n - 1) + normal.inv_cdf(0.8)) * math.sqrt(2.0 / n) * deviation


# -- page -------------------------------------------------------------------------------------------------------------


def page(found: dict[str, list[Result]], results: Path) -> str:
    """Markdown: how far each setting can tell methods apart, and the table of differences to the first method."""
    lines = [
        "# Where methods for language models differ", "",
        "With one pass over each rollout every ratio is 1 and most methods are GRPO ([study](study.md)). Here are six "
        "settings, each made so that something the papers change can matter. All start from one model of 0.13 million "
        "parameters that supervised steps have brought to a part of the task, share completions and optimiser "
        "(AdamW), and choose their step size (or a coefficient and a step size) from six on 2 tuning seeds; other "
        "settings are the method's defaults. (A first grid of three began at 1e-4, which nearly every method took in "
        "the first setting: it was widened for all, and the second and third setting made three times as long, since "
        "nothing but demonstrations was learnt in the second.) Score: the mean of 6 evaluations spread over the "
        "training, each 8 samples of 128 held-out questions. Differences to GRPO are paired by seed, over 10 fresh "
        "seeds, with Student's 95 % interval; p is two-sided with Holm's correction over the comparisons of a "
        "setting. Differences hold for this warm start (of a method that is about the supervised steps: its own).",
        "", "Made by `python scripts/studies/separate --out results/separate`; every run is a line of "
        "`docs/figures/separate/NAME.csv`. Minutes are the runs' processor time, one thread each, tuning "
        "included.",
    ]  # fmt: skip
    for name, setting in SETTINGS.items():
        rows = _rows(results, name)
        minutes = sum(float(row["cpu_seconds"]) for row in rows) / 60
        lines += ["", f"## {name}", "", f"{setting.text[0].upper()}{setting.text[1:]}. {setting.claim.setting}; "
                  f"`{json.dumps(dict(setting.shape))}`."]  # fmt: skip
        trial = results / f"pilot_{name}.csv"
        if trial.exists():
            scores = [float(row["score"]) for row in read_rows(trial)]
            deviation = statistics.stdev(scores)
            first = next(iter(setting.entries))
            lines += ["", f"Power, from {len(scores)} runs of {first} on other seeds before the study (score "
                      f"{statistics.fmean(scores):.3f}, deviation {deviation:.3f}): {setting.test_seeds} pairs find a "
                      f"difference of {detectable(deviation, setting.test_seeds):.3f} with probability .8 (one "
                      "comparison, runs of a pair independent)."]  # fmt: skip
        differences = found.get(name, [])
        if not differences:
            lines += ["", f"Not run yet to a comparison: {len(rows)} runs."]
            continue
        lines += ["", f"{len(rows)} runs, {minutes:.0f} CPU minutes. {setting.remark}".rstrip(), "",
                  "| method | chosen | score | score - first | p | verdict | pass@1 | pass@8 | entropy |",
                  "|---|---|--:|---|--:|---|--:|--:|--:|"]  # fmt: skip
        head = differences[0]
        lines.append(_row(rows, head.worse, head.settings[1], head.scores[1], "", "", ""))
        words = {"supported": "better", "contradicted": "worse", "not supported": "no difference shown"}
        for r in differences:
            d = r.difference
            gap = f"{d.difference:+.3f} [{d.low:.3f}, {d.high:.3f}]"
            lines.append(_row(rows, r.better, r.settings[0], r.scores[0], gap, f"{r.adjusted:.2g}", words[r.verdict]))
        ends = [r.better for r in differences if edge(setting.claim.arm(r.better), r.settings[0])]
        ends += [head.worse] if edge(setting.claim.arm(head.worse), head.settings[1]) else []
        if ends:
            lines += [
                "",
                f"Chosen at the end of what was tried, so perhaps not at its best: {', '.join(sorted(ends))}.",
            ]
        if missing := set(setting.entries) - {head.worse} - {r.better for r in differences}:
            lines += ["", f"Not finished: {', '.join(sorted(missing))}."]
    return "\n".join(lines) + "\n"


def _row(rows: list[dict[str, str]], arm: str, settings: str, score: float, gap: str, p: str, verdict: str) -> str:
    """With means of the last evaluations of the test runs."""
    mine = [row for row in rows if (row["purpose"], row["arm"], row["settings"]) == ("test", arm, settings)]
    last = " | ".join(f"{statistics.fmean(float(row[c]) for row in mine):.3f}" for c in ("pass1", "pass8", "entropy"))
    return f"| {arm} | `{settings}` | {score:.3f} | {gap} | {p} | {verdict} | {last} |"
