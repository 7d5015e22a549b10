"""A study: which agents train on which environments, with which seeds and settings, as a YAML file or as flags.

evals: 20
seeds: [0, 1, 2]
settings: {ppo: {batch_size: 256}, "sb3:ppo": {num_envs: 16, batch_size: 256}}
entries:
  - {agents: [ppo, "sb3:ppo"], envs: [Hopper-v5, Walker2d-v5], total_timesteps: 1_000_000}
  - {agents: [mdpo], envs: [CartPole-v1], total_timesteps: 50_000, sweep: {inner_steps: [1, 10]}}
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
import envs  # noqa: F401  (registers its ids)
from ccrl import registry
from ccrl.batched_env import resolve_env
from ccrl.experiment import config as configs
from ccrl.experiment.config import ConfigError
from ccrl.experiment.protocol import Purpose, check_seeds
from ccrl.experiment.run import RunFolder, find_runs
from ccrl.llm.task import resolve_task
from ccrl.settings import Count, Natural, Settings
from scripts import benchmark_sb3 as sb3
from scripts import training
from scripts.whole_paths import whole_paths

__all__ = ["Entry", "Spec", "Study"]


@dataclass(frozen=True)
class Entry(Settings):
    """Agents times environments times seeds times the values of a sweep."""

    agents: tuple[str, ...]
    """These agents train: names of ours, module:Class, sb3:NAME and sb3-contrib:NAME."""
    envs: tuple[str, ...]
    """They train on these environments, of language models text tasks."""
    total_timesteps: Count
    """Each run takes so many units of its agent's clock (environment steps, completions)."""
    seeds: tuple[Natural, ...] | None = None
    """The runs have these seeds; None takes the study's."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings by agent are laid over the study's."""
    sweep: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Each setting here takes these values, one run each (all combinations of several)."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """These constructor options go to the environments."""


@dataclass(frozen=True)
class Study(Settings):
    """All runs of a study and how they are evaluated."""

    entries: tuple[Entry, ...]
    """These entries are run."""
    seeds: tuple[Natural, ...] = (0, 1, 2, 3, 4)
    """Entries that name no seeds have these."""
    purpose: Purpose | None = None
    """The runs choose settings (tune: seeds from 1000) or are reported (test: seeds from 100 to 999); other seeds are
    then refused. None is for a first look: no seed is refused, and nothing should be claimed from it."""
    evals: Natural = 20
    """Each run is evaluated so many times, evenly spaced; 0 never evaluates."""
    eval_episodes: Count = 10
    """An evaluation plays this many episodes, deterministic and stochastic each."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings by agent are fields of the agent's config, or for SB3's its argument names or ours (num_envs, hidden,
    ...). What is not named keeps the agent's default."""

    def specs(self) -> list[Spec]:
        """Every run once, all of the first seed before the second: a study that is stopped is balanced.

        Raises ``ConfigError`` or ``ValueError`` for agents, environments and settings that do not exist.
        """
        used = {name for entry in self.entries for name in entry.agents}
        for where, settings in [("settings", self.settings), *(("entry settings", e.settings) for e in self.entries)]:
            if unused := sorted(settings.keys() - used):
                raise ConfigError(f"{where}: expected agents of the study ({', '.join(sorted(used))}), got {unused}")
        found = [spec for entry in self.entries for spec in self._of(entry)]
        keys = [spec.key for spec in found]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ConfigError(f"expected each agent, environment and seed once; twice in the study: {twice}")
        return sorted(found, key=lambda spec: spec.order)

    def _of(self, entry: Entry) -> Iterator[Spec]:
        kinds = {agent: sb3.is_sb3(agent) or not training.is_text(agents.get_agent(agent)) for agent in entry.agents}
        for env, plays in itertools.product(entry.envs, sorted(set(kinds.values()))):
            if plays:
                resolve_env(env, 1, **entry.env_kwargs).close()
            else:
                resolve_task(env, **entry.env_kwargs)
        seeds = self.seeds if entry.seeds is None else entry.seeds
        if self.purpose is not None:
            try:
                check_seeds(self.purpose, seeds)
            except ValueError as error:
                raise ConfigError(str(error)) from error
        combinations = list(itertools.product(*entry.sweep.values()))
        for (k, seed), env, agent, values in itertools.product(
            enumerate(seeds), entry.envs, entry.agents, combinations
        ):
            swept = dict(zip(entry.sweep, values))
            settings = self.settings.get(agent, {}) | entry.settings.get(agent, {}) | swept
            plain = {
                "env": env, "total_timesteps": entry.total_timesteps, "seed": seed, "env_kwargs": entry.env_kwargs,
                # not 0 for a run that is shorter than its number of evaluations: that would be none of them
                "eval_every": max(1, entry.total_timesteps // self.evals) if self.evals else 0,
                "eval_episodes": self.eval_episodes, "agent": settings,
            }  # fmt: skip
            label = "__".join([agent, *(f"{name}={value}" for name, value in swept.items())])
            spec = Spec(agent, label, plain, k)
            spec.config()
            yield spec


@dataclass(frozen=True)
class Spec:
    """One run: plain values, so that it can be handed to another process as JSON."""

    agent: str
    label: str
    """The agent, and the values of the sweep."""
    values: dict[str, Any]
    """Fields of the run's configuration."""
    order: int = 0

    @property
    def key(self) -> str:
        """What tells the run from the others of its study."""
        return f"{self.values['env']} {self.label} seed {self.values['seed']}"

    @property
    def foreign(self) -> bool:
        """Whether SB3 trains it."""
        return sb3.is_sb3(self.agent)

    @property
    def trust(self) -> list[str]:
        """What the study names by module: it may import, whatever a run folder says besides."""
        names = [self.agent, *configs.flatten(self.values).values()]
        return [name for name in names if isinstance(name, str) and registry.is_module_name(name)]

    def root(self, out: Path) -> Path:
        """Folder of the runs that differ in environment and seed alone."""
        return out / re.sub(r"[^\w.=+-]+", "-", self.label)

    def config(self, **values: Any) -> Any:
        """The configuration, of ``training.run_config(agent)`` or ``SB3Config``; ``values`` are laid over it."""
        if self.foreign:
            config = configs.from_dict(sb3.SB3Config, self.values | values)
            sb3.check(self.agent, config)
            return config
        own = {"progress": False}
        if self.values["eval_every"]:
            own["checkpoint_every"] = self.values["eval_every"]
        return configs.from_dict(training.run_config(self.agent, self.values["agent"]), self.values | own | values)

    def find(self, out: Path) -> RunFolder | None:
        """The run of this spec under ``out``: the finished one, else the newest.

        Raises ``ConfigError`` if it was made with other settings.
        """
        runs = [run for run in find_runs([self.root(out)]) if self._is(run)]
        if not runs:
            return None
        run = max(runs, key=lambda run: ("finished" in run.info, run.path.stat().st_mtime))
        mine = self.config()
        # a run's folder has its files by their whole paths
        both = [configs.to_dict(whole_paths(config)) for config in (mine, configs.from_dict(type(mine), run.config()))]
        mine, other = (configs.flatten({k: config[k] for k in self.values}) for config in both)
        for values in (mine, other):
            values.pop("env_kwargs.nthread", None)  # results do not depend on it
        if different := sorted(k for k in mine.keys() | other.keys() if mine.get(k) != other.get(k)):
            pairs = ", ".join(f"{k}: {mine.get(k)!r} here, {other.get(k)!r} there" for k in different)
            raise ConfigError(f"{run.path} was made with other settings ({pairs}); choose another --out or move it")
        return run

    def _is(self, run: RunFolder) -> bool:
        info = run.info
        mine = (self.values["env"], self.agent, self.values["seed"])
        return bool((info["env"], info["agent"], info["seed"]) == mine)
