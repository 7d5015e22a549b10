"""The tuned settings of ``agents/settings/``, run: ppo on twelve environments, mdpo and bpo on four, sac on four.

    python scripts/studies/tuned --out results/tuned            # all, cheap pairs first
    python scripts/studies/tuned --out results/tuned --only ppo # one agent's; sb3:ppo: SB3 with the same settings
    python scripts/studies/tuned --page-only                    # the page again, from whatever there is
    python scripts/plot.py docs/figures/tuned.csv --out figures/tuned      # curves, also beside your own

The same command goes on where it stopped, a run from its last checkpoint. Whenever a pair of agent and environment has
ended, its evaluations are added to ``--rows`` (env, agent, seed, step, return, ...), the page is written from what
the rows have, and ``Reached here`` in the settings' files from the same numbers. ``--page-only`` does so too with runs
of a pair that was broken off.

SAC on HalfCheetah, Hopper and Walker2d is not run again: ``scripts/studies/offpolicy`` trains it with the same settings
(which is checked), and its rows count.

An estimate, not a measurement: 6 CPU hours on cores that others use too, four on quiet ones, five seeds each, compiled,
a twelfth of it evaluation. Minutes a run: under 1 the four on CartPole and Pendulum without SAC, 1 to 2 mdpo's and
bpo's InvertedPendulum, Acrobot, MountainCar and SAC's Pendulum (the first hour has all of these), 2 to 5 most others, 6
ppo's Hopper and HalfCheetah, 12 its Walker2d (625,000 gradient steps); SB3's are three to four times as long. Measured,
on a busy core: ppo's Hopper 3,560 steps in a CPU second, HalfCheetah 2,915, evaluations .8 and .4 minutes a run; the
others by their gradient steps (.9 ms there) and their environments' steps.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ccrl.experiment import config as configs
from ccrl.experiment.csv_table import read_columns
from ccrl.experiment.files import write_atomic
from ccrl.packages import ROOT
from ccrl.settings import Count, Settings
from scripts import benchmark
from scripts.benchmark_study import Study
from scripts.studies.offpolicy.study import rows_of
from scripts.studies.tuned.page import page
from scripts.studies.tuned.pairs import BESIDE, PAIRS, ROWS, Pair, all_rows, heading, reached, rows_in

__all__ = ["Options", "main"]

COLUMNS = ("env", "agent", "seed", "settings", "step", "return", "stochastic", "commit", "torch", "threads", "compile",
           "cpu_seconds")  # fmt: skip


@dataclass(frozen=True)
class Options(Settings):
    """What is run."""

    out: Path = Path("results/tuned")
    """The run folders are in this folder."""
    rows: Path = ROWS
    """The evaluations of finished runs are kept in this file."""
    page: Path | None = None
    """The page is written here; by default docs/tuned.md, or beside the rows if those are elsewhere."""
    only: tuple[str, ...] = ()
    """Pairs of these agents or environments; none named: all."""
    seeds: Count = 5
    """Every pair of ours is run with this many seeds, from 100 on; SB3's have three."""
    jobs: Count = 1
    """So many runs go at a time."""
    page_only: bool = False
    """Nothing runs: rows of the finished runs in OUT, if there are any, join the others, and the page is made."""


def main(options: Options) -> int:
    """Run what is missing and write the page; returns the number of runs that failed.

    Raises:
        ValueError: a name in ``only`` that no pair has, or settings that are not those of the off-policy study.
    """
    names = {name for pair in (*PAIRS, *BESIDE) for name in (pair.agent, pair.env)}
    if unknown := set(options.only) - names:
        raise ValueError(f"only: expected some of {', '.join(sorted(names))}, got {', '.join(sorted(unknown))}")
    chosen = [
        pair for pair in (*PAIRS, *BESIDE)
        if not pair.elsewhere and (not options.only or {pair.agent, pair.env} & set(options.only))
    ]  # fmt: skip
    failed = 0
    for pair in chosen:
        if not options.page_only:
            failed += _run(pair, options)
        _keep(pair, options)
        if not options.page_only:
            _write(options)
    _write(options)
    return failed


def _folder(pair: Pair, options: Options) -> Path:
    return options.out.resolve() / f"{pair.agent.replace(':', '-')}__{pair.env}__{pair.mark}"


def _run(pair: Pair, options: Options) -> int:
    """The runs of a pair that are missing; returns how many failed."""
    values, mine = pair.study(options.seeds), filter(pair.owns, rows_in(options.rows))
    if {int(row["seed"]) for row in mine} >= set(values["seeds"]):
        return 0
    out = _folder(pair, options)
    out.mkdir(parents=True, exist_ok=True)
    study = out / "study.yaml"
    study.write_text(yaml.safe_dump(values), encoding="utf-8")
    return benchmark.main(benchmark.Options(out, study=study, jobs=options.jobs))


def _keep(pair: Pair, options: Options) -> None:
    """The rows of the pair's finished runs, in place of older ones of the same runs and of those of other settings."""
    out = _folder(pair, options)
    if not out.is_dir():
        return
    found: dict[str, list[dict[str, Any]]] = {}
    for spec in configs.from_dict(Study, pair.study(options.seeds)).specs():
        run = spec.find(out)
        if run is not None and "finished" in run.info:
            stochastic = read_columns(run.path / "eval.csv")["eval_stochastic/mean_reward"]
            found[str(spec.values["seed"])] = [
                {name: str(cell) for name, cell in row.items()} | {"settings": pair.mark, "stochastic": f"{value:.6g}"}
                for row, value in zip(rows_of(run), stochastic, strict=True)
            ]
    if not found:
        return
    before = rows_in(options.rows)
    kept = [row for row in before if pair.owns(row) and row["seed"] not in found]
    others = [row for row in before if (row["agent"], row["env"]) != (pair.agent, pair.env)]
    place = {(p.agent, p.env): i for i, p in enumerate((*PAIRS, *BESIDE))}
    rows = [*others, *kept, *(row for run in found.values() for row in run)]
    rows.sort(key=lambda row: (place.get((row["agent"], row["env"]), -1), int(row["seed"]), int(row["step"])))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.rows, lambda file: file.write(text.getvalue().encode()))


def _write(options: Options) -> None:
    """The page, and the head of every file of settings, from the rows."""
    rows = all_rows(options.rows)
    ours = options.rows.resolve() == ROWS.resolve()
    target = options.page or (ROOT / "docs" / "tuned.md" if ours else options.rows.with_suffix(".md"))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, lambda file: file.write(page(rows).encode()))
    if not ours:  # a trial of this command must not change what the package says
        return
    for pair in PAIRS:
        text = pair.file.read_text(encoding="utf-8")
        says = heading(reached(pair, rows))
        new = re.sub(r"^# Reached here: .*$", f"# Reached here: {says}.", text, count=1, flags=re.MULTILINE)
        if new != text:
            write_atomic(pair.file, lambda file, new=new: file.write(new.encode()))  # type: ignore[misc]
