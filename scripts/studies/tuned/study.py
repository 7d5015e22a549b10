"""The tuned settings of ``agents/settings/``, run: ppo on twelve environments, mdpo and bpo on four, sac on four.

    python scripts/studies/tuned --out results/tuned            # all, cheap pairs first
    python scripts/studies/tuned --out results/tuned --only ppo # one agent's
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
ppo's Hopper and HalfCheetah, 12 its Walker2d (625,000 gradient steps). Measured, on a busy core: ppo's Hopper 3,560
steps in a CPU second, HalfCheetah 2,915, evaluations .8 and .4 minutes a run; the others by their gradient steps (.9 ms
there) and their environments' steps.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ccrl.packages import ROOT, check_siblings

check_siblings("agents")

import agents
from agents import tuned
from ccrl.experiment import config as configs
from ccrl.experiment.csv_table import read_columns, read_rows
from ccrl.experiment.files import write_atomic
from ccrl.experiment.logger import digits
from ccrl.experiment.protocol import SEEDS
from ccrl.settings import Count, Settings
from ccrl.stats import t_interval
from scripts import benchmark
from scripts.benchmark_study import Study
from scripts.studies.offpolicy.study import rows_of

__all__ = ["PAIRS", "Options", "Pair", "Result", "all_rows", "heading", "main", "page", "reached", "same_settings"]

ROWS = ROOT / "docs" / "figures" / "tuned.csv"
ELSEWHERE = ROOT / "docs" / "figures" / "offpolicy_runs.csv"
COLUMNS = ("env", "agent", "seed", "settings", "step", "return", "stochastic", "commit", "torch", "threads", "compile",
           "cpu_seconds")  # fmt: skip
EVALS = 20


@dataclass(frozen=True)
class Pair:
    """An agent on an environment."""

    agent: str
    env: str
    steps: int | None = None
    """Trained for this long; None: as the file says."""
    elsewhere: bool = False
    """Its runs are those of the off-policy study, which trains with the same settings."""

    @property
    def file(self) -> Path:
        """Its tuned settings."""
        return tuned.find(self.agent, self.env)

    def study(self, seeds: int) -> dict[str, Any]:
        """What benchmark.py reads."""
        values = configs.load_yaml(self.file)
        entry = {"agents": [self.agent], "envs": [self.env], "total_timesteps": self.steps or values["total_timesteps"],
                 "settings": {self.agent: values.get("agent") or {}},
                 "env_kwargs": values.get("env_kwargs") or {}}  # fmt: skip
        first = SEEDS["test"].start
        return {"entries": [entry], "seeds": list(range(first, first + seeds)), "purpose": "test", "evals": EVALS}

    @functools.cached_property
    def mark(self) -> str:
        """Names the settings: rows of others are not of this file."""
        text = json.dumps(self.study(1)["entries"], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def owns(self, row: Mapping[str, str]) -> bool:
        """Whether a row is of this pair with the settings as they are now."""
        return (row["agent"], row["env"], row["settings"]) == (self.agent, self.env, self.mark)


PAIRS = (
    Pair("sac", "HalfCheetah-v5", 100_000, elsewhere=True), Pair("sac", "Hopper-v5", 100_000, elsewhere=True),
    Pair("sac", "Walker2d-v5", 100_000, elsewhere=True),
    Pair("ppo", "CartPole-v1"), Pair("mdpo", "CartPole-v1"), Pair("bpo", "CartPole-v1"), Pair("ppo", "Pendulum-v1"),
    Pair("mdpo", "InvertedPendulum-v5"), Pair("bpo", "InvertedPendulum-v5"), Pair("ppo", "Acrobot-v1"),
    Pair("ppo", "MountainCar-v0"), Pair("sac", "Pendulum-v1"), Pair("bpo", "Swimmer-v5"), Pair("ppo", "Reacher-v5"),
    Pair("ppo", "InvertedDoublePendulum-v5"), Pair("ppo", "Swimmer-v5"), Pair("mdpo", "Hopper-v5"),
    Pair("mdpo", "Walker2d-v5"), Pair("ppo", "InvertedPendulum-v5"), Pair("ppo", "Ant-v5"), Pair("bpo", "Hopper-v5"),
    Pair("ppo", "Hopper-v5"), Pair("ppo", "HalfCheetah-v5"), Pair("ppo", "Walker2d-v5"),
)  # fmt: skip
"""In this order: cheap ones first."""


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
    """Every pair is run with this many seeds, from 100 on."""
    jobs: Count = 1
    """So many runs go at a time."""
    page_only: bool = False
    """Nothing runs: rows of the finished runs in OUT, if there are any, join the others, and the page is made."""


def main(options: Options) -> int:
    """Run what is missing and write the page; returns the number of runs that failed.

    Raises:
        ValueError: a name in ``only`` that no pair has, or settings that are not those of the off-policy study.
    """
    names = {name for pair in PAIRS for name in (pair.agent, pair.env)}
    if unknown := set(options.only) - names:
        raise ValueError(f"only: expected some of {', '.join(sorted(names))}, got {', '.join(sorted(unknown))}")
    chosen = [p for p in PAIRS if not p.elsewhere and (not options.only or {p.agent, p.env} & set(options.only))]
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
    return options.out.resolve() / f"{pair.agent}__{pair.env}__{pair.mark}"


def _run(pair: Pair, options: Options) -> int:
    """The runs of a pair that are missing; returns how many failed."""
    values, mine = pair.study(options.seeds), filter(pair.owns, _rows(options.rows))
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
    before = _rows(options.rows)
    kept = [row for row in before if pair.owns(row) and row["seed"] not in found]
    others = [row for row in before if (row["agent"], row["env"]) != (pair.agent, pair.env)]
    place = {(p.agent, p.env): i for i, p in enumerate(PAIRS)}
    rows = [*others, *kept, *(row for run in found.values() for row in run)]
    rows.sort(key=lambda row: (place.get((row["agent"], row["env"]), -1), int(row["seed"]), int(row["step"])))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.rows, lambda file: file.write(text.getvalue().encode()))


def _rows(path: Path) -> list[dict[str, str]]:
    return read_rows(path) if path.exists() else []


def all_rows(path: Path = ROWS) -> list[dict[str, str]]:
    """The rows of ``path``, and those of the off-policy study for the pairs that it ran.

    Raises:
        ValueError: a pair's settings are not those that it ran.
    """
    found, there = _rows(path), _rows(ELSEWHERE)
    for pair in PAIRS:
        if pair.elsewhere:
            same_settings(pair)
            found += [
                row | {"settings": pair.mark, "stochastic": "nan"} for row in there
                if (row["agent"], row["env"], row["finished"]) == (pair.agent, pair.env, "1")
            ]  # fmt: skip
    return found


def same_settings(pair: Pair) -> None:
    """Raises ``ValueError`` unless the off-policy study trains the pair as its file says, and as long."""
    cls, path = agents.get_agent(pair.agent).Config, ROOT / "scripts" / "studies" / "offpolicy" / "study.yaml"
    study = configs.load_yaml(path)
    lengths = {entry["total_timesteps"] for entry in study["entries"]
               if pair.agent in entry["agents"] and pair.env in entry["envs"]}  # fmt: skip
    ran = configs.from_dict(cls, (study.get("settings") or {}).get(pair.agent) or {})
    says = configs.from_dict(cls, configs.load_yaml(pair.file).get("agent") or {})
    different = [f"{f.name}: {getattr(says, f.name)} here, {getattr(ran, f.name)} there" for f in fields(cls)
                 if getattr(says, f.name) != getattr(ran, f.name)]  # fmt: skip
    if different or lengths != {pair.steps}:
        different += [f"steps: {pair.steps} here, {sorted(lengths)} there"] * (lengths != {pair.steps})
        raise ValueError(f"{pair.file}: expected the settings of {path}, got other ones ({'; '.join(different)}); "
                         "make them equal, or run the pair here")  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What the runs of a pair reached."""

    seeds: list[int]
    step: int
    returns: list[float]
    """Of every run, the mean of its last two evaluations (of twenty, ten deterministic episodes each)."""
    stochastic: list[float]
    cpu_minutes: float
    """Median of the runs that were not broken off; NaN without one."""

    def text(self, values: list[float]) -> str:
        """The mean and Student's 95 % interval; of one run the number, and nothing where there are none."""
        if any(math.isnan(value) for value in values):
            return ""
        if len(values) == 1:
            return f"{digits(values[0])} (one run)"
        found = t_interval(values)
        return f"{digits(float(found.point))} [{digits(float(found.low))}, {digits(float(found.high))}]"


def reached(pair: Pair, rows: list[dict[str, str]]) -> Result | None:
    """None without runs of the settings as they are now."""
    of: dict[int, list[dict[str, str]]] = {}
    for row in filter(pair.owns, rows):
        of.setdefault(int(row["seed"]), []).append(row)
    if not of:
        return None
    runs = [sorted(of[seed], key=lambda row: int(row["step"])) for seed in sorted(of)]

    def last(column: str) -> list[float]:
        return [sum(float(row[column]) for row in run[-2:]) / len(run[-2:]) for run in runs]

    minutes = [float(run[0]["cpu_seconds"]) / 60 for run in runs if run[0]["cpu_seconds"]]
    usual = statistics.median(minutes) if minutes else math.nan
    return Result(sorted(of), int(runs[0][-1]["step"]), last("return"), last("stochastic"), usual)


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


def heading(found: Result | None) -> str:
    """What a file of settings says of its runs."""
    if found is None:
        return "not yet run here"
    count = f"{len(found.seeds)} seed{'s' if len(found.seeds) > 1 else ''}"
    return f"{found.text(found.returns)} at {found.step:,} steps ({count}; docs/tuned.md)"


def page(rows: list[dict[str, str]]) -> str:
    """Markdown: what was reached with each file of settings, and those that were not run."""
    found = {(pair.agent, pair.env): reached(pair, rows) for pair in PAIRS}
    lines = [HEAD, *_missing(found), "",
             "| agent | environment | steps | seeds | deterministic | stochastic | CPU minutes a run | source |",
             "|---|---|--:|---|--:|--:|--:|---|"]  # fmt: skip
    for agent, files in tuned.tuned().items():
        for env, path in files.items():
            result, cells = found.get((agent, env)), ["", "", "not yet run here", "", ""]
            if result is not None:
                minutes = "" if math.isnan(result.cpu_minutes) else f"{result.cpu_minutes:.1f}"
                cells = [f"{result.step:,}", _span(result.seeds), result.text(result.returns),
                         result.text(result.stochastic), minutes]  # fmt: skip
            lines.append(f"| {agent} | {env} | {' | '.join(cells)} | {tuned.head(path)['Source']} |")
    made = sorted({row["commit"] for row in rows if row["commit"]})
    how = sorted({f"PyTorch {row['torch']}, {row['threads']} thread" for row in rows})
    if made:
        lines += ["", f"Runs were made by {'; '.join(how)}, one process each; commits {', '.join(made)}."]
    return "\n".join(lines) + "\n"


def _span(seeds: list[int]) -> str:
    whole = len(seeds) > 1 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{len(seeds)}: {seeds[0]} to {seeds[-1]}" if whole else f"{len(seeds)}: {', '.join(map(str, seeds))}"


def _missing(found: dict[tuple[str, str], Result | None]) -> list[str]:
    """Which pairs of the study have no runs, or fewer than the others."""
    none = [f"{agent} on {env}" for (agent, env), result in found.items() if result is None]
    few = [f"{agent} on {env} ({len(result.seeds)})" for (agent, env), result in found.items()
           if result is not None and len(result.seeds) < 3]  # fmt: skip
    if not none:
        lines = [f"All {len(found)} pairs of the study are run."]
    else:
        lines = [f"**{len(found) - len(none)} of the study's {len(found)} pairs are run.** Not yet: {', '.join(none)}."]
    if few:
        lines.append(f"Of fewer than three seeds, so that their intervals say little: {', '.join(few)}.")
    return [" ".join([*lines, "The other files, of simulators and humanoids, are no part of it."])]


HEAD = """# Tuned settings

```bash
python scripts/train.py ppo --env Hopper-v5 --tuned                      # flags win over the file
python scripts/train.py ppo --env Hopper-v5 --tuned --learning-rate 3e-4 --seed 1
```

Settings per agent and environment are YAML files of the package, `agents/settings/AGENT/ENVIRONMENT.yaml`; a pair that
has none is refused, and the message names those that exist. A file says where its settings are from: published ones of
rl-baselines3-zoo where the algorithm is the same, the paper's, or a search here ([Tuning](tuning.md)).

## What was reached here

Returns are means over seeds of each run's last two evaluations of twenty, ten episodes each, with Student's 95 %
interval. Seeds are from 100 on ([protocol](protocol.md)), but for SAC on HalfCheetah, Hopper and Walker2d: those are
the runs of the [off-policy study](off_policy_curves.md), which trains with the same settings on seeds from 0, tuned
nothing, and kept no stochastic evaluations. Where fewer steps were trained than the file says, the column says so. CPU
minutes are without evaluation, the median of the runs that were not broken off.

```bash
python scripts/studies/tuned --out results/tuned        # goes on where it stopped
python scripts/studies/tuned --page-only                # this page from the rows
python scripts/plot.py docs/figures/tuned.csv --out figures/tuned
```

Every evaluation is a row of `docs/figures/tuned.csv`, or, for SAC's three, of `docs/figures/offpolicy_runs.csv`.
`plot.py` and `report.py` take both as they are: put your own rows beside them, or them beside your own runs. Settings
that were published for v2 and v3 tasks are used on v5 as they are: where an interval is wide, or PPO is below MDPO and
BPO on the same task, a search may be worth its cost.
"""
