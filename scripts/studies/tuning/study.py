"""What a search is worth: 40 trials of PPO's settings, then the best of them against the default on five fresh seeds.

    python scripts/studies/tuning cartpole            # 40 trials of 100,000 steps, 10 runs
    python scripts/studies/tuning hopper --jobs 2
    python scripts/studies/tuning --page-only         # numbers and page again, from whatever there is

About 10 CPU minutes for CartPole and 30 for Hopper: 3 to 25 seconds a trial, most of them broken off; 20 to 40 a run.

The same command goes on where it stopped: trials are in ``OUT/TASK/study.db``, runs in ``OUT/TASK/runs.csv``; what is
published of them goes into ``ROWS``. Trials are worth their last evaluation on seed 1000, and those that fall below the
median of the others are broken off; the runs that are reported have the seeds 100 to 104 (docs/protocol.md) and 50
deterministic evaluation episodes at the end.
"""

from __future__ import annotations

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
from scripts.studies.tables import made, markdown

__all__ = ["TASKS", "Options", "main", "play", "section", "table"]

TASKS = {"cartpole": "CartPole-v1", "hopper": "Hopper-v5"}
TUNING_SEED = SEEDS["tune"].start
ROWS = ROOT / "docs" / "figures" / "tuning"
PAGE = ROOT / "docs" / "tuning.md"
BEGIN, END = "<!-- search -->", "<!-- end of search -->"


@dataclass(frozen=True)
class Options(Settings):
    """What is searched."""

    tasks: tyro.conf.Positional[tuple[str, ...]] = ()
    """These tasks (cartpole, hopper) are searched; none named: all."""
    out: Path = Path("results/tuning")
    """The databases of the searches and the runs are in this folder."""
    rows: Path = ROWS
    """The results are written to this folder: TASK.csv (runs), TASK_trials.csv, TASK_budget.csv, TASK.yaml (the best),
    TASK_importance.png."""
    page: Path | None = None
    """The section is written here, between its two marks; by default into docs/tuning.md, or to README.md beside the
    rows if those are elsewhere."""
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
    """Nothing runs: results and page are made of what OUT has, or if it has nothing of the rows."""


def play(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """The last evaluation of one run."""
    about = made()
    options = tune.Options(cell["agent"], cell["env"], Path(), total_timesteps=cell["total_timesteps"],
                           evaluations=cell["evaluations"], eval_episodes=cell["eval_episodes"])  # fmt: skip
    return [{"return": tune.train_once(options, json.loads(cell["settings"]), cell["seed"]), **about}]


def main(options: Options) -> str:
    """Run what is missing, and write the results and the page's section, which it returns.

    Raises:
        ValueError: an unknown task.
    """
    if unknown := set(options.tasks) - TASKS.keys():
        raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for name in options.tasks or TASKS:
        if not options.page_only:
            best = tune.main(_search(options, name))
            _publish(options, name)
            _write(options)
            _compare(options, name, configs.load_yaml(best)["agent"])
        _publish(options, name)
    text = _write(options)
    print(text)
    return text


def _search(options: Options, name: str) -> tune.Options:
    return tune.Options(options.agent, TASKS[name], options.out / name, total_timesteps=options.total_timesteps,
                        trials=options.trials, jobs=options.jobs, seeds=(TUNING_SEED,))  # fmt: skip


def _publish(options: Options, name: str) -> None:
    """What there is of the search and of the runs, into the folder of the results."""
    out, rows = options.out / name, options.rows
    rows.mkdir(parents=True, exist_ok=True)
    if (out / "study.db").exists():
        best = tune.write(_search(options, name))
        text = best.read_text(encoding="utf-8").replace(str(best), f"docs/figures/tuning/{name}.yaml")
        (rows / f"{name}.yaml").write_text(text, encoding="utf-8")
    for file, kept in (("trials.csv", f"{name}_trials.csv"), ("budget.csv", f"{name}_budget.csv"),
                       ("importance.png", f"{name}_importance.png"), ("runs.csv", f"{name}.csv")):  # fmt: skip
        if (out / file).exists():
            shutil.copyfile(out / file, rows / kept)


def _compare(options: Options, name: str, best: dict[str, Any]) -> None:
    seeds = range(SEEDS["test"].start, SEEDS["test"].start + options.seeds)
    check_seeds("test", seeds)
    cells = [
        {"agent": options.agent, "env": TASKS[name], "arm": arm, "seed": seed,
         "settings": json.dumps(settings, sort_keys=True), "total_timesteps": options.total_timesteps,
         "evaluations": 5, "eval_episodes": 50}
        for seed in seeds for arm, settings in {"default": {}, "best": best}.items()
    ]  # fmt: skip
    complete(options.out / name / "runs.csv", cells, play, jobs=options.jobs, name=name)


def _write(options: Options) -> str:
    """The section, on its page; returns it."""
    text = section(options.rows)
    ours = options.rows.resolve() == ROWS.resolve()
    page = options.page or (PAGE if ours else options.rows / "README.md")
    whole = page.read_text(encoding="utf-8") if page.exists() else ""
    head, mark, rest = whole.partition(BEGIN)
    _, close, tail = rest.partition(END)
    new = head + mark + "\n\n" + text + "\n" + close + tail if mark and close else text
    write_atomic(page, lambda file: file.write(new.encode()))
    return text


def section(folder: Path) -> str:
    """Markdown: the table of what was compared, and how far each search is that has not come to it."""
    found = table(folder)
    lines = [markdown(found)] if found else []
    done = {row["task"] for row in found}
    for name, env in TASKS.items():
        trials, best = _trials(folder, name), f"[{name}.yaml](figures/tuning/{name}.yaml)"
        rivals = f"[trials](figures/tuning/{name}_trials.csv), [budget](figures/tuning/{name}_budget.csv)"
        if env in done:
            lines.append(f"* {env}: best settings {best}, {rivals}, [runs](figures/tuning/{name}.csv).")
        elif trials:
            whole = [value for state, value in trials if state == "COMPLETE"]
            lines.append(f"* {env}: **not compared yet**; {len(trials)} trials so far, {len(whole)} of them whole, the "
                         f"best {max(whole):.4g} (too high by its choice): {best}, {rivals}.")  # fmt: skip
        else:
            lines.append(f"* {env}: **not run yet**, so nothing stands behind a search there.")
    return "\n".join(lines) + "\n"


def _trials(folder: Path, name: str) -> list[tuple[str, float]]:
    """State and value of every trial."""
    path = folder / f"{name}_trials.csv"
    if not path.exists():
        return []
    return [(row["state"], float(row["value"] or "nan")) for row in read_rows(path)]


def table(folder: Path) -> list[dict[str, Any]]:
    """A row for every task of which the folder has runs: returns of both on the seeds that both have, the paired
    difference with Student's 95 % interval, and what it cost."""
    found = []
    for name, env in TASKS.items():
        path = folder / f"{name}.csv"
        rows = read_rows(path) if path.exists() else []
        returns: dict[str, dict[int, float]] = {"default": {}, "best": {}}
        # of the best as it is now: an earlier search had another
        settings = next((row["settings"] for row in reversed(rows) if row["arm"] == "best"), "")
        for row in rows:
            if row["arm"] == "default" or row["settings"] == settings:
                returns[row["arm"]][int(row["seed"])] = float(row["return"])
        seeds = sorted(returns["default"].keys() & returns["best"].keys())
        if len(seeds) < 2:
            continue
        default, best = ([returns[arm][seed] for seed in seeds] for arm in ("default", "best"))
        difference, trials = paired_t(best, default), _trials(folder, name)
        values = [value for state, value in trials if state == "COMPLETE"]
        found.append({
            "task": env, "trials": len(trials), "whole": len(values), "best trial's value": max(values),
            "runs": len(seeds),
            "default": _interval(default), "best": _interval(best),
            "difference": f"{difference.difference:+.4g} [{difference.low:.4g}, {difference.high:.4g}]",
            "p": difference.p,
        })  # fmt: skip
    return found


def _interval(values: list[float]) -> str:
    found = t_interval(values)
    return f"{float(found.point):.4g} [{float(found.low):.4g}, {float(found.high):.4g}]"
