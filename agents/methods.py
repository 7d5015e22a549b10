"""What agents of a ``Method`` share, whatever it trains: language models (agents.llm), flows (agents.flow).

GRPO("arithmetic", group_size=8)      # a method that can be called builds its agent from settings by keyword
LLM.of(GRPO)                          # or names the agent's class, for what wants one
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from agents.base import Agent
from ccrl.estimators.recipe import Method, Recipe
from ccrl.experiment.flat import join, unpack
from ccrl.learn import RolloutLearner
from ccrl.updaters import Updater
from ccrl.updaters.schedules import rate_factor

__all__ = ["CallableMethod", "GroupLearner", "MethodAgent"]


class CallableMethod(Method):
    """A method that can be called: ``GRPO(task, group_size=8)`` is the agent that trains with it."""

    def agent(self, name: str | None = None) -> type[Any]:
        """The class of its agents. :param name: what runs and checkpoints call it; None: the method's own name."""
        raise NotImplementedError

    @property
    def Settings(self) -> type[Any]:
        """All settings side by side: its own and those of what hosts it."""
        found: type[Any] = self.agent().Config
        return found

    def __call__(self, task: Any, config: Any = None, **options: Any) -> Any:
        """The agent. :param config: ``Settings``, or one of their parts such as ``Config``; None: the defaults.
        :param options: settings by name, and ``seed, device, env_kwargs`` of the agent."""
        return self.agent()(task, config, **options)

    def load(self, *args: Any, **options: Any) -> Any:
        """The agent in a checkpoint, as ``Agent.load``."""
        return self.agent().load(*args, **options)  # type: ignore[attr-defined]


class MethodAgent(Agent):
    """An agent whose recipe is a method's; the class for one is ``of(method)``."""

    method: ClassVar[Method]
    beside: ClassVar[tuple[type[Any], ...]] = ()
    """Dataclasses whose settings stand beside those of the method."""

    @classmethod
    def of(cls, method: Method, name: str | None = None) -> type[Self]:
        """The agent's class for ``method``, the same at every call.

        :param name: what runs and checkpoints call it; None: the method's own name.
        """
        return cls._of(method, name or method.name)

    @classmethod
    @cache
    def _of(cls, method: Method, name: str) -> type[Self]:
        config: Any = method.Config
        settings = _settings(config, cls.beside, tuple(method.defaults.items()))
        members = {"method": method, "name": name, "paper": method.paper, "Config": settings}
        return type(f"{cls.__name__}[{method.name}]", (cls,), members)

    def __init__(self, env: Any, config: Any = None, *, policy: Any = None, **options: Any) -> None:
        if policy is not None:
            raise TypeError(
                f"policy: expected None, got {policy!r}; to train a model of your own, override make_model in a class "
                f"derived from {type(self).__name__}"
            )
        super().__init__(env, config, **options)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return dict(cls.method.slots)

    @classmethod
    def configure(cls, config: Any, settings: dict[str, Any]) -> Any:
        return super().configure(*unpack(cls.Config, config, settings))


class GroupLearner(RolloutLearner):
    """``n_prompts`` groups of ``group_size`` samples per iteration; prompts are drawn before the recipe plans."""

    def __init__(self, agent: Any, policy: nn.Module, estimator: Recipe, updater: Updater) -> None:
        c = agent.config
        samples = c.n_prompts * c.group_size
        follows = c.lr_warmup > 0 or c.lr_schedule != "constant"
        super().__init__(
            agent.collector, policy, estimator, {"policy": updater}, samples=samples, columns=samples,
            clock_unit=estimator.clock_unit, seed=agent.seed, device=agent.device,
            compile=getattr(c, "compile", "off"),
            anneal=partial(rate_factor, shape=c.lr_schedule, warmup=c.lr_warmup) if follows else False,
        )  # fmt: skip
        self._n_prompts = c.n_prompts
        self.warm = torch.zeros((), dtype=torch.bool, device=self.device)
        """Whether the supervised phase (if any) is over."""
        self.state.register("warm", self.warm)

    def points(self) -> dict[str, Tensor]:
        # before plan is asked, so that a budget sees the prompts
        self.ctx.prompts = self.source.draw(self._n_prompts)  # type: ignore[attr-defined]
        return {}


@cache  # a method with another recipe has the same settings
def _settings(config: Any, beside: tuple[type[Any], ...], defaults: tuple[tuple[str, Any], ...]) -> type[Any]:
    name = f"{config.__name__.removesuffix('Config')}Settings"
    return join(name, (config, *beside), dict(defaults), doc=config.__doc__ or "")
