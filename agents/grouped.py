"""A language-model recipe on a control task: a start is a prompt, an episode a completion, a step a token.

Every iteration plays ``group_size`` fresh episodes from each of ``n_groups`` starts with the current policy; the recipe
of ``method`` (``agents.llm.METHODS``) does the rest, unchanged: it reads ``episode_reward`` (the episode's return),
``group``,
``log_prob`` and ``valid``. A reference (``kl_coef``, DPO, IPO) is the policy at the start. Methods that need tokens or
demonstrations are refused: sft, dcpo, hpt (unless ``gate=-1``), dpo and ipo with ``pairs="demonstrations"``.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, fields
from typing import Any

from agents.base import Agent
from agents.llm import METHODS
from ccrl.batched_env import BatchedEnv, resolve_env
from ccrl.collect import Request
from ccrl.estimators.recipe import Parts, Recipe, RecipeConfig
from ccrl.experiment.config import Options
from ccrl.learn import Learner
from ccrl.updaters import FlatUpdater
from ccrl.wrappers import StackedEnv

__all__ = ["Grouped", "GroupedConfig"]


@dataclass(frozen=True)
class GroupedConfig(RecipeConfig):
    """Defaults: 8 starts, 8 episodes each, GRPO."""

    method: str = "grpo"
    """Name of the recipe."""
    settings: Options = field(default_factory=dict)
    """The recipe's own settings, by the names they have in its config, as JSON."""
    n_groups: int = 8
    """Starts per iteration."""
    n_steps: int = 500
    """Longest episode."""
    hidden: tuple[int, ...] = (64, 64)
    """Hidden layers of the policy."""
    activation: str = "tanh"
    """tanh, relu, elu or silu."""
    log_std_init: float = 0.0
    """Initial log standard deviation of Gaussian policies."""
    orthogonal: bool = True
    """Orthogonal initialisation."""
    squash: bool = False
    """Gaussian actions through tanh onto the bounds; else clipped for the environment only."""
    normalise_obs: bool = False
    """Running observation statistics, part of the policy, moved once per iteration."""
    clip_norm: float = 10.0
    """Normalised observations are clipped to +- this."""
    learning_rate: float = 1e-3
    """Adam's step size."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    compile: str = "auto"
    """Fuse updates into compiled graphs: auto (from 1,000 gradient steps, where a C++ compiler is), on, off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_groups", "n_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")
        if self.compile not in ("auto", "on", "off"):
            raise ValueError(f"compile: expected auto, on or off, got {self.compile!r}")
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {sorted(METHODS)}, got {self.method!r}")
        self.recipe()

    @property
    def num_envs(self) -> int:
        """Episodes per iteration."""
        return self.n_groups * self.group_size

    def recipe(self) -> tuple[type[Recipe], Any]:
        """The recipe's class and its config: the shared fields from here, its own from ``settings``.

        :raises ValueError: for settings that the recipe does not have, and recipes that need demonstrations.
        """
        module, name = METHODS[self.method]
        agent = getattr(importlib.import_module(module), name)
        known = {f.name for f in fields(agent.Config)}
        unknown = set(self.settings) - known
        if unknown:
            raise ValueError(f"settings: {self.method} has no {sorted(unknown)}; expected some of {sorted(known)}")
        if agent.Config.imitates is True:  # whatever the settings, of which it may not take the shared ones
            raise ValueError(self._no_demonstrations("another method"))
        shared = {f.name: getattr(self, f.name) for f in fields(RecipeConfig)}
        config = agent.Config(**shared | self.settings)
        if config.imitates:
            raise ValueError(self._no_demonstrations(f"settings of {self.method} without demonstrations"))
        return agent.Recipe, config

    def _no_demonstrations(self, instead: str) -> str:
        return (f"method: expected one that learns from episodes alone, got {self.method!r} with settings "
                f"{dict(self.settings)}, which needs demonstrations, and control tasks have none; choose {instead}, or "
                "a text task (train.py llm)")  # fmt: skip


class Grouped(Agent):
    """Grouped episodes through a language-model recipe."""

    name = "grouped"
    paper = "the recipes of agents.llm on control tasks (the other way round)"
    Config = GroupedConfig
    episodic = True

    def connect(self, env: str | BatchedEnv) -> None:
        if isinstance(env, str):
            c = self.config
            made = [resolve_env(env, c.n_groups, device=self.device, **self.env_kwargs) for _ in range(c.group_size)]
            env = StackedEnv(made)
        super().connect(env)

    def build(self) -> Learner:
        c = self.config
        policy = self.make_policy({})
        updater = FlatUpdater(policy, lr=c.learning_rate, max_grad_norm=c.max_grad_norm, eps=c.adam_eps)
        request = Request(episodes=c.num_envs, horizon=c.n_steps, groups=c.n_groups)
        recipe, config = c.recipe()
        parts = Parts(policy, updater, request, c.n_steps)
        try:
            estimator = recipe(config, parts)
        except ValueError as error:
            raise ValueError(f"method: {c.method!r} does not fit control tasks: {error}; choose another method, or a "
                             "text task (train.py llm)") from error  # fmt: skip
        learner = self.rollouts(policy, estimator, {"policy": updater})
        if estimator.wants_reference:
            learner.ctx.bank.refresh("ref")
        return learner

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"plan": "fresh episodes in groups from one start", "the rest": "the recipe's"}
