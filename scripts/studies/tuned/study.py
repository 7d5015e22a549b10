"""The tuned settings of ``agents/settings/``, run: ppo on twelve environments, mdpo and bpo on four, sac on four.

    python scripts/studies/tuned --out results/tuned            # all, about 12 CPU hours, cheap pairs first
    python scripts/studies/tuned --out results/tuned --only ppo # one agent's
    python scripts/studies/tuned --page-only                    # the page again, from the rows
    python scripts/plot.py docs/figures/tuned.csv --out figures/tuned      # curves, also beside your own

The same command goes on where it stopped, a run from its last checkpoint. Whenever a pair of agent and environment has
ended, its evaluations are added to ``--rows`` (env, agent, seed, step, return, ...), the page is written from what
the rows have, and ``Reached here`` in the settings' files from the same numbers.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ccrl.packages import ROOT, check_siblings

check_siblings("agents")

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

__all__ = ["PAIRS", "Options", "Pair", "main", "page", "reached"]

ROWS = ROOT / "docs" / "figures" / "tuned.csv"
COLUMNS = ("env", "agent", "seed", "settings", "step", "return", "stochastic", "cpu_seconds")


@dataclass(frozen=True)
class Pair:
    """An agent on an environment."""

    agent: str
    env: str
    steps: int | None = None
    """Trained for this long; None: as the file says."""

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
        return {"entries": [entry], "seeds": list(range(first, first + seeds)), "purpose": "test", "evals": 20}

    @property
    def mark(self) -> str:
        """Names the settings: rows of others are not of this file."""
        text = json.dumps(self.study(1)["entries"], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


PAIRS = (
    Pair("ppo", "CartPole-v1"), Pair("mdpo", "CartPole-v1"), Pair("bpo", "CartPole-v1"), Pair("ppo", "Pendulum-v1"),
    Pair("sac", "Pendulum-v1"), Pair("mdpo", "InvertedPendulum-v5"), Pair("bpo", "InvertedPendulum-v5"),
    Pair("ppo", "Acrobot-v1"), Pair("ppo", "MountainCar-v0"), Pair("ppo", "InvertedDoublePendulum-v5"),
    Pair("ppo", "InvertedPendulum-v5"), Pair("mdpo", "Hopper-v5"), Pair("mdpo", "Walker2d-v5"),
    Pair("bpo", "Swimmer-v5"), Pair("ppo", "Swimmer-v5"), Pair("ppo", "Reacher-v5"), Pair("ppo", "Hopper-v5"),
    Pair("bpo", "Hopper-v5"), Pair("ppo", "Ant-v5"), Pair("sac", "HalfCheetah-v5", 100_000),
    Pair("sac", "Hopper-v5", 100_000), Pair("sac", "Walker2d-v5", 100_000), Pair("ppo", "HalfCheetah-v5"),
    Pair("ppo", "Walker2d-v5"),
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
    """Nothing runs; the page is made from the rows."""


def main(options: Options) -> int:
    """Run what is missing and write the page; returns the number of runs that failed.

    Raises:
        ValueError: a name in ``only`` that no pair has.
    """
    names = {name for pair in PAIRS for name in (pair.agent, pair.env)}
    if unknown := set(options.only) - names:
        raise ValueError(f"only: expected some of {', '.join(sorted(names))}, got {', '.join(sorted(unknown))}")
    failed = 0
    for pair in PAIRS:
        if not options.page_only and (not options.only or {pair.agent, pair.env} & set(options.only)):
            failed += _run(pair, options)
            _write(options)
    _write(options)
    return failed


def _run(pair: Pair, options: Options) -> int:
    """The runs of a pair that are missing, and their rows; returns how many failed."""
    kept = [row for row in _rows(options.rows) if (row["agent"], row["env"]) != (pair.agent, pair.env)]
    mine = [row for row in _rows(options.rows) if (row["agent"], row["env"], row["settings"]) ==
            (pair.agent, pair.env, pair.mark)]  # fmt: skip
    values = pair.study(options.seeds)
    if {int(row["seed"]) for row in mine} >= set(values["seeds"]):
        return 0
    out = options.out.resolve() / f"{pair.agent}__{pair.env}__{pair.mark}"
    out.mkdir(parents=True, exist_ok=True)
    study = out / "study.yaml"
    study.write_text(yaml.safe_dump(values), encoding="utf-8")
    failed = benchmark.main(benchmark.Options(out, study=study, jobs=options.jobs))
    rows: list[dict[str, Any]] = []
    for spec in configs.from_dict(Study, values).specs():
        run = spec.find(out)
        if run is None or "finished" not in run.info:
            continue
        table = read_columns(run.path / "eval.csv")
        for step, value, stochastic in zip(
            table["step"], table["eval/mean_reward"], table["eval_stochastic/mean_reward"], strict=True
        ):
            rows.append({
                "env": pair.env, "agent": pair.agent, "seed": spec.values["seed"], "settings": pair.mark,
                "step": int(step), "return": f"{value:.6g}", "stochastic": f"{stochastic:.6g}",
                "cpu_seconds": f"{run.info['finished']['cpu_seconds']:.0f}",
            })  # fmt: skip
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])
        write_atomic(options.rows, lambda file: file.write(text.getvalue().encode()))
    return failed


def _rows(path: Path) -> list[dict[str, str]]:
    return read_rows(path) if path.exists() else []


@dataclass(frozen=True)
class Result:
    """What the runs of a pair reached."""

    runs: int
    step: int
    returns: list[float]
    """Of every run, the mean of its last two evaluations (of twenty, ten deterministic episodes each)."""
    stochastic: list[float]
    cpu_hours: float

    def text(self, values: list[float]) -> str:
        """The mean and Student's 95 % interval; of one run the number."""
        if self.runs == 1:
            return f"{digits(values[0])} (one run)"
        found = t_interval(values)
        return f"{digits(float(found.point))} [{digits(float(found.low))}, {digits(float(found.high))}]"


def reached(pair: Pair, rows: list[dict[str, str]]) -> Result | None:
    """None without runs of the settings as they are now."""
    mine = [row for row in rows if (row["agent"], row["env"], row["settings"]) == (pair.agent, pair.env, pair.mark)]
    seeds = sorted({row["seed"] for row in mine})
    if not seeds:
        return None
    of = {seed: [row for row in mine if row["seed"] == seed] for seed in seeds}

    def last(column: str) -> list[float]:
        return [sum(float(row[column]) for row in runs[-2:]) / len(runs[-2:]) for runs in of.values()]

    seconds = sum(float(runs[0]["cpu_seconds"]) for runs in of.values())
    return Result(len(seeds), int(mine[-1]["step"]), last("return"), last("stochastic"), seconds / 3600)


def page(rows: list[dict[str, str]]) -> str:
    """Markdown: what was reached with each file of settings, and those that were not run."""
    lines = [
        "# Tuned settings", "",
        "```bash", "python scripts/train.py ppo --env Hopper-v5 --tuned                      # flags win over the file",
        "python scripts/train.py ppo --env Hopper-v5 --tuned --learning-rate 3e-4 --seed 1", "```", "",
        "Settings per agent and environment are YAML files of the package, `agents/settings/AGENT/ENVIRONMENT.yaml`; a "
        "pair that has none is refused, and the message names those that exist. A file says where its settings are "
        "from: published ones of rl-baselines3-zoo where the algorithm is the same, the paper's, or a search here "
        "([Tuning](tuning.md)).", "",
        "Returns are means over seeds from 100 on ([protocol](protocol.md)) of each run's last two evaluations of "
        "twenty, ten episodes each, with Student's 95 % interval. Where fewer steps were trained than the file says, "
        "the column says so. Made by `python scripts/studies/tuned`; every evaluation is a row of "
        "`docs/figures/tuned.csv`, which `plot.py` and `report.py` take as it is: put your own rows beside it, or "
        "beside your own runs.", "",
        "| agent | environment | steps | runs | deterministic | stochastic | CPU hours | source |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    studied = {(pair.agent, pair.env): pair for pair in PAIRS}
    for agent, files in tuned.tuned().items():
        for env, path in files.items():
            pair = studied.get((agent, env), Pair(agent, env))
            found, source = reached(pair, rows), tuned.head(path)["Source"]
            cells = ["", "", "not yet run here", "", ""]
            if found is not None:
                cells = [f"{found.step:,}", str(found.runs), found.text(found.returns), found.text(found.stochastic),
                         f"{found.cpu_hours:.2f}"]  # fmt: skip
            lines.append(f"| {agent} | {env} | {' | '.join(cells)} | {source} |")
    return "\n".join(lines) + "\n"


def _write(options: Options) -> None:
    """The page, and the head of every file of settings, from the rows."""
    rows = _rows(options.rows)
    ours = options.rows.resolve() == ROWS.resolve()
    target = options.page or (ROOT / "docs" / "tuned.md" if ours else options.rows.with_suffix(".md"))
    write_atomic(target, lambda file: file.write(page(rows).encode()))
    if not ours:  # a trial of this command must not change what the package says
        return
    for pair in PAIRS:
        found = reached(pair, rows)
        says = "not yet run here" if found is None else (
            f"{found.text(found.returns)} at {found.step:,} steps ({found.runs} seeds; docs/tuned.md)"
        )  # fmt: skip
        text = pair.file.read_text(encoding="utf-8")
        new = re.sub(r"^# Reached here: .*$", f"# Reached here: {says}.", text, count=1, flags=re.MULTILINE)
        if new != text:
            write_atomic(pair.file, lambda file, new=new: file.write(new.encode()))  # type: ignore[misc]
