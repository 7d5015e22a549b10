"""What a search is worth: 40 trials of PPO's settings, then the best of them against the default on five fresh seeds.

    python scripts/studies/tuning cartpole            # 40 trials of 100,000 steps, 10 runs; about 25 CPU minutes
    python scripts/studies/tuning hopper --jobs 2
    python scripts/studies/tuning --page-only         # the table again, from the rows

The same command goes on where it stopped: trials are in ``OUT/TASK/study.db``, runs in ``ROWS/TASK.csv``. Trials are
worth their last evaluation on seed 1000; the runs that are reported have the seeds 100 to 104 (docs/protocol.md) and
50 deterministic evaluation episodes at the end.
"""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from ccrl.experiment import config as configs
from ccrl.experiment.cells import complete
from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.files import write_atomic
from ccrl.experiment.protocol import SEEDS, check_seeds
from ccrl.packages import ROOT
from ccrl.settings import Count, Settings
from ccrl.stats import paired_t, t_interval
from scripts import tune
from scripts.studies.tables import markdown

__all__ = ["TASKS", "Options", "main", "play", "table"]

TASKS = {"cartpole": "CartPole-v1", "hopper": "Hopper-v5"}
TUNING_SEED = SEEDS["tune"].start
ROWS = ROOT / "docs" / "figures" / "tuning"


@dataclass(frozen=True)
class Options(Settings):
    """What is searched."""

    tasks: tyro.conf.Positional[tuple[str, ...]] = ()
    """These tasks (cartpole, hopper) are searched; none named: all."""
    out: Path = Path("results/tuning")
    """The databases of the searches are in this folder."""
    rows: Path = ROWS
    """The results are kept in this folder: TASK.csv (runs), TASK_trials.csv, TASK_budget.csv, TASK.yaml (the best)."""
    agent: str = "ppo"
    """This agent is tuned."""
    total_timesteps: Count = 100_000
    """Every training takes this many steps."""
    trials: Count = 40
    """A search has this many trials."""
    seeds: Count = 5
    """The best and the default are compared on this many seeds."""
    jobs: Count = 1
    """So many processes work at a time."""
    page_only: bool = False
    """Nothing runs; the table is made from the rows."""


def play(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """The last evaluation of one run."""
    options = tune.Options(cell["agent"], cell["env"], Path(), total_timesteps=cell["total_timesteps"],
                           evaluations=cell["evaluations"], eval_episodes=cell["eval_episodes"])  # fmt: skip
    return [{"return": tune.train_once(options, json.loads(cell["settings"]), cell["seed"])}]


def main(options: Options) -> list[dict[str, Any]]:
    """Run what is missing, write the table ``ROWS/README.md``, and return its rows.

    Raises:
        ValueError: an unknown task.
    """
    if unknown := set(options.tasks) - TASKS.keys():
        raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    if not options.page_only:
        for name in options.tasks or TASKS:
            _search(options, name)
            _compare(options, name)
    found = table(options.rows)
    text = f"`python scripts/studies/tuning`\n\n{markdown(found)}" if found else "Not run yet.\n"
    options.rows.mkdir(parents=True, exist_ok=True)
    write_atomic(options.rows / "README.md", lambda file: file.write(text.encode()))
    print(text)
    return found


def _search(options: Options, name: str) -> None:
    out = options.out / name
    best = tune.main(tune.Options(options.agent, TASKS[name], out, total_timesteps=options.total_timesteps,
                                  trials=options.trials, jobs=options.jobs, seeds=(TUNING_SEED,)))  # fmt: skip
    options.rows.mkdir(parents=True, exist_ok=True)
    text = best.read_text(encoding="utf-8").replace(str(best), f"docs/figures/tuning/{name}.yaml")
    (options.rows / f"{name}.yaml").write_text(text, encoding="utf-8")
    for kind in ("trials", "budget"):
        shutil.copy(out / f"{kind}.csv", options.rows / f"{name}_{kind}.csv")
    if (out / "importance.png").exists():
        shutil.copy(out / "importance.png", options.rows / f"{name}_importance.png")


def _compare(options: Options, name: str) -> None:
    seeds = range(SEEDS["test"].start, SEEDS["test"].start + options.seeds)
    check_seeds("test", seeds)
    arms = {"default": {}, "best": configs.load_yaml(options.rows / f"{name}.yaml")["agent"]}
    cells = [
        {"agent": options.agent, "env": TASKS[name], "arm": arm, "seed": seed,
         "settings": json.dumps(settings, sort_keys=True), "total_timesteps": options.total_timesteps,
         "evaluations": 5, "eval_episodes": 50}
        for seed in seeds for arm, settings in arms.items()
    ]  # fmt: skip
    complete(options.rows / f"{name}.csv", cells, play, jobs=options.jobs, name=name)


def table(folder: Path) -> list[dict[str, Any]]:
    """A row for every task of which the folder has runs: returns of both on the seeds that both have, the paired
    difference with Student's 95 % interval, and what it cost."""
    found = []
    for name, env in TASKS.items():
        path = folder / f"{name}.csv"
        rows = read_rows(path) if path.exists() else []
        returns: dict[str, dict[int, float]] = {"default": {}, "best": {}}
        for row in rows:
            returns[row["arm"]][int(row["seed"])] = float(row["return"])
        seeds = sorted(returns["default"].keys() & returns["best"].keys())
        if len(seeds) < 2:
            continue
        default, best = ([returns[arm][seed] for seed in seeds] for arm in ("default", "best"))
        difference = paired_t(best, default)
        with (folder / f"{name}_trials.csv").open(newline="") as file:
            trials = list(csv.DictReader(file))
        values = [float(t["value"]) for t in trials if t["state"] == "COMPLETE"]
        found.append({
            "task": env, "trials": len(trials), "whole": len(values), "best trial's value": max(values),
            "runs": len(seeds),
            "default": _interval(default), "best": _interval(best),
            "difference": f"{difference.difference:+.4g} [{difference.low:.4g}, {difference.high:.4g}]",
            "p": difference.p, "CPU minutes of the runs": sum(float(row["seconds"]) for row in rows) / 60,
        })  # fmt: skip
    return found


def _interval(values: list[float]) -> str:
    found = t_interval(values)
    return f"{float(found.point):.4g} [{float(found.low):.4g}, {float(found.high):.4g}]"
