"""Which agents are run on which environments with their tuned settings, and what their runs reached."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ccrl.packages import ROOT, check_siblings

check_siblings("agents")

import agents
from agents import tuned
from ccrl.experiment import config as configs
from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.logger import digits
from ccrl.experiment.protocol import SEEDS
from ccrl.stats import t_interval

__all__ = [
    "BESIDE", "PAIRS", "ROWS", "Pair", "Result", "all_rows", "heading", "reached", "rows_in", "same_settings",
]  # fmt: skip

ROWS = ROOT / "docs" / "figures" / "tuned.csv"
ELSEWHERE = ROOT / "docs" / "figures" / "offpolicy_runs.csv"
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
    seeds: int | None = None
    """It is run with so many seeds; None: as many as the command says."""

    @property
    def ours(self) -> str:
        """The agent of ours whose settings it has."""
        return self.agent.removeprefix("sb3:")

    @property
    def file(self) -> Path:
        """Its tuned settings."""
        return tuned.find(self.ours, self.env)

    def study(self, seeds: int) -> dict[str, Any]:
        """What benchmark.py reads."""
        values = configs.load_yaml(self.file)
        settings = values.get("agent") or {}
        if self.agent != self.ours:  # SB3's arguments are not converted, so that 3e-4, in YAML a text, would stay one
            settings = {k: v for k, v in asdict(self.config()).items() if k in settings}
        entry = {"agents": [self.agent], "envs": [self.env], "total_timesteps": self.steps or values["total_timesteps"],
                 "settings": {self.agent: settings},
                 "env_kwargs": values.get("env_kwargs") or {}}  # fmt: skip
        first, seeds = SEEDS["test"].start, self.seeds or seeds
        return {"entries": [entry], "seeds": list(range(first, first + seeds)), "purpose": "test", "evals": EVALS}

    def config(self) -> Any:
        """The settings of our agent."""
        return configs.from_dict(agents.get_agent(self.ours).Config, configs.load_yaml(self.file).get("agent") or {})

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

BESIDE = (
    Pair("sb3:ppo", "Hopper-v5", seeds=3), Pair("sb3:ppo", "InvertedPendulum-v5", seeds=3),
    Pair("sb3:ppo", "Ant-v5", seeds=3), Pair("sb3:ppo", "Walker2d-v5", seeds=3),
)  # fmt: skip
"""Where ours returned little: SB3's agents with the same settings on the same environments."""


def rows_in(path: Path) -> list[dict[str, str]]:
    """The rows of a file that may not be there yet."""
    return read_rows(path) if path.exists() else []


def all_rows(path: Path = ROWS) -> list[dict[str, str]]:
    """The rows of ``path``, and those of the off-policy study for the pairs that it ran.

    Raises:
        ValueError: a pair's settings are not those that it ran.
    """
    found, there = rows_in(path), rows_in(ELSEWHERE)
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
    says = pair.config()
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


def heading(found: Result | None) -> str:
    """What a file of settings says of its runs."""
    if found is None:
        return "not yet run here"
    count = f"{len(found.seeds)} seed{'s' if len(found.seeds) > 1 else ''}"
    return f"{found.text(found.returns)} at {found.step:,} steps ({count}; docs/tuned.md)"
