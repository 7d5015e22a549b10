"""A language-model recipe on a control task: a start is a prompt, an episode a completion, a step a token.

Every iteration plays ``group_size`` fresh episodes from each of ``n_groups`` starts with the current policy; the recipe
of ``method`` (``agents.llm.METHODS``, or ``module:name`` of somebody else's) does the rest, unchanged: it reads
``episode_reward`` (the episode's return), ``group``, ``log_prob`` and ``valid``. Its settings stand beside those of the
rollout, the network and the optimiser here:

    Grouped("CartPole-v1", method="sapo", tau_positive=2.0, n_groups=4, learning_rate=1e-3)

A reference (``kl_coef``, DPO, IPO) is the policy at the start. Methods that need tokens or demonstrations are refused:
sft, dcpo, hpt (unless ``gate=-1``), dpo and ipo with ``pairs="demonstrations"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from agents.base import Agent
from agents.llm import get_method
from agents.on_policy import check_unused
from ccrl.batched_env import BatchedEnv, resolve_env
from ccrl.collect import Request
from ccrl.estimators.recipe import MethodConfig, Parts
from ccrl.experiment import checkpoint
from ccrl.experiment.flat import join, unpack
from ccrl.learn import Learner
from ccrl.settings import Activation, Compile, Count, Finite, Positive, Settings
from ccrl.updaters import FlatUpdater
from ccrl.wrappers import StackedEnv

__all__ = ["Grouped", "GroupedConfig"]


@dataclass(frozen=True)
class GroupedConfig(Settings):
    """Rollout, network and optimiser of a recipe on a control task; the recipe's own settings follow."""

    search: ClassVar[dict[str, Any]] = {"n_steps": None}  # the longest episode
    method: str = "grpo"
    """The recipe is that of the method with this name, or at module:name in another package."""
    n_groups: Count = 8
    """An iteration starts episodes from this many starts."""
    n_steps: Count = 500
    """An episode has at most this many steps."""
    hidden: tuple[Count, ...] = (64, 64)
    """These are the widths of the policy's hidden layers."""
    activation: Activation = "tanh"
    """This function follows every hidden layer."""
    log_std_init: Finite = 0.0
    """Gaussian policies start with this log standard deviation."""
    orthogonal: bool = True
    """Weights start orthogonal, with gain sqrt 2 in hidden layers and 0.01 at the policy's output."""
    squash: bool = False
    """Gaussian actions go through tanh onto the bounds; otherwise they are clipped, for the environment only."""
    normalise_obs: bool = False
    """Observations are normalised by running statistics, which belong to the policy and move once per iteration."""
    clip_norm: Positive = 10.0
    """Normalised observations are clipped to plus or minus this number."""
    learning_rate: Positive = 1e-3
    """This is Adam's step size."""
    max_grad_norm: Positive = 0.5
    """Gradients are scaled down to this global norm."""
    adam_eps: Positive = 1e-5
    """Adam adds this epsilon to the root of its second moment."""
    compile: Compile = "auto"
    """Updates are fused into compiled graphs: always (on), never (off), or from 1,000 gradient steps on where there
    is a C++ compiler (auto)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.normalise_obs:
            check_unused(self, "it clips normalised observations, normalise_obs is off", "clip_norm")
        if isinstance(self, MethodConfig) and self.imitates:
            raise ValueError(
                f"method: expected one that learns from episodes alone, got {self.method!r} with settings that need "
                "demonstrations, and control tasks have none; choose another method, settings without demonstrations, "
                "or a text task (train.py llm)"
            )

    @property
    def num_envs(self) -> int:
        """Episodes per iteration."""
        return self.n_groups * int(self.group_size)  # type: ignore[attr-defined]


class Grouped(Agent):
    """Grouped episodes through a method's recipe; the class for another method than grpo is ``Grouped.of(method)``.

    :param env: an id, or a ``BatchedEnv`` of ``n_groups * group_size`` copies of which those of one group start alike.
    :param method: name of the method. :param settings: settings by name, laid over ``config``.
    """

    name = "grouped"
    paper = "the recipes of agents.llm on control tasks (the other way round)"
    method: ClassVar[str] = "grpo"
    episodic = True

    @classmethod
    @cache
    def of(cls, method: str) -> type[Grouped]:
        """The agent's class for a method, the same at every call.

        :raises ValueError: for an unknown name.
        """
        found = get_method(method)
        settings = join(f"Grouped{found.Config.__name__}", (found.Config, GroupedConfig), {"method": method},
                        doc=f"{GroupedConfig.__doc__} Recipe: {found.Config.__doc__}")  # fmt: skip
        return type(f"Grouped[{method}]", (cls,), {"Config": settings, "method": method})

    def __new__(cls, env: Any, config: Any = None, *, method: str | None = None, **options: Any) -> Self:
        """An agent of another method is of the class for it."""
        method = method or getattr(config, "method", cls.method)
        return super().__new__(cls if method == cls.method else cast("type[Self]", cls.of(method)))

    def __init__(self, env: Any, config: Any = None, *, method: str | None = None, **options: Any) -> None:
        super().__init__(env, config, **options)

    @classmethod
    def configure(cls, config: Any, settings: dict[str, Any]) -> Any:
        return super().configure(*unpack(cls.Config, config, settings))

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
        parts = Parts(policy, updater, request, c.n_steps)
        try:
            estimator = get_method(c.method).Recipe(c, parts)
        except ValueError as error:
            raise ValueError(f"method: {c.method!r} does not fit control tasks: {error}; choose another method, or a "
                             "text task (train.py llm)") from error  # fmt: skip
        learner = self.rollouts(policy, estimator, {"policy": updater})
        if estimator.wants_reference:
            learner.ctx.bank.refresh("ref")
        return learner

    @classmethod
    def load(cls, path: str | Path, *args: Any, **options: Any) -> Self:
        """As ``Agent.load``, whatever the method."""
        method = checkpoint.load(path, map_location="cpu").get("config", {}).get("method", cls.method)
        found = cls if method == cls.method else cls.of(method)
        return super(Grouped, found).load(path, *args, **options)  # type: ignore[return-value]

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"plan": "fresh episodes in groups from one start", "the rest": "the recipe's"}


Grouped.Config = Grouped.of("grpo").Config
