"""What agents with a replay memory share: their settings, discounts, and the learner that an agent builds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from agents.base import Agent
from agents.on_policy import check_unused
from ccrl.batched_env import Tree
from ccrl.data import Data, tree_map
from ccrl.estimators import aggregates
from ccrl.estimators.terms import Loss, Term
from ccrl.learn import Cycle, ReplayLearner
from ccrl.n_step import NStepReturns
from ccrl.replay import ReplayBuffer
from ccrl.settings import Activation, Compile, Count, Natural, Positive, Settings, TimeLimit, Unit
from ccrl.updaters import FlatUpdater, Updater

__all__ = ["ActorCriticReplayConfig", "OffPolicyAgent", "OffPolicyConfig", "discount", "mean_term", "rows"]


@dataclass(frozen=True)
class OffPolicyConfig(Settings):
    """What every agent with a replay memory has."""

    search: ClassVar[dict[str, Any]] = {"n_steps": None}  # more of them alone are fewer gradient steps
    num_envs: Count = 1
    """The number of parallel environments."""
    n_steps: Count = 1
    """A round takes this many steps in each environment before its gradient steps."""
    updates: Count = 1
    """A round ends with this many gradient steps."""
    rounds: Count = 50
    """An iteration, after which training is logged, evaluated and saved, has this many rounds."""
    learning_starts: Natural = 10_000
    """Actions are uniform and nothing is learnt before this many environment steps."""
    buffer_size: Count = 1_000_000
    """The replay memory holds this many transitions; later ones overwrite the oldest."""
    buffer_folder: Path | None = None
    """The replay memory is memory-mapped files in this folder, which is overwritten; unset, it is in memory."""
    batch_size: Count = 256
    """A gradient step reads this many transitions, drawn with replacement."""
    gamma: Unit = 0.99
    """Rewards are discounted by this factor per step."""
    n_step_returns: Count = 1
    """Targets sum this many rewards before the critics' value; they end with the episode."""
    time_limit: TimeLimit = "bootstrap"
    """At a time limit the critics' value goes on (bootstrap), or the task ends (terminal: older code, biased)."""
    hidden: tuple[Count, ...] = (256, 256)
    """These are the widths of the hidden layers of the actor, and of the critics unless they have their own."""
    activation: Activation = "relu"
    """This function follows every hidden layer."""
    actor_obs: tuple[str, ...] | None = None
    """The actor sees these keys of a Dict observation; unset, it sees all but a privileged group called critic."""
    normalise_obs: bool = False
    """Observations are normalised by running statistics, which belong to the policy; the memory stores raw ones."""
    clip_norm: Positive = 10.0
    """Normalised observations are clipped to plus or minus this number."""
    learning_rate: Positive = 3e-4
    """This is Adam's step size, of every network that has none of its own."""
    adam_eps: Positive = 1e-8
    """Adam adds this epsilon to the root of its second moment."""
    compile: Compile = "auto"
    """Gradient steps are compiled graphs: always (on), never (off), or from 20,000 of them on where there is a C++
    compiler (auto)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.normalise_obs:
            check_unused(self, "it clips normalised observations, normalise_obs is off", "clip_norm")


@dataclass(frozen=True)
class ActorCriticReplayConfig(OffPolicyConfig):
    """What agents with an actor and action-value critics have."""

    critic_hidden: tuple[Count, ...] | None = None
    """These are the widths of the critics' hidden layers; unset, they are the actor's."""
    critic_obs: tuple[str, ...] | None = None
    """The critics see these keys of a Dict observation; unset, they see all, but critic in place of a group called
    policy."""


class OffPolicyAgent(Agent):
    """Builds replay learners."""

    def before_learning(self) -> None:
        if self.num_timesteps == 0:
            ring: ReplayBuffer = self.learner.ring  # type: ignore[attr-defined]
            where = self.config.buffer_folder or "memory"
            print(
                f"[ccrl] replay: {ring.capacity:,} transitions, {ring.nbytes / 2**20:,.0f} MiB in {where}", flush=True
            )

    def make_policy(self, heads: dict[str, Sequence[int]], **options: Any) -> Any:
        """As ``Agent.make_policy``. :raises ValueError: a policy of the caller's that is no ``default``."""
        made, expected = super().make_policy(heads, **options), options.get("default", nn.Module)
        if not isinstance(made, expected):
            raise ValueError(f"policy: {self.name} trains the networks of {expected.__name__}; expected it or a class "
                             f"derived from it, got {type(made).__name__}")  # fmt: skip
        return made

    def updater(self, policy: nn.Module, prefix: str, **options: Any) -> FlatUpdater:
        """Adam on the parameters whose names start with ``prefix``."""
        options = {"lr": self.config.learning_rate, "eps": self.config.adam_eps} | options
        return FlatUpdater(policy, prefixes=[prefix], **options)

    def replay(self, policy: nn.Module, cycle: Cycle, updaters: dict[str, Updater], **options: Any) -> ReplayLearner:
        """A learner on a new ring."""
        c, env = self.config, self.env
        spaces = env.single_observation_space, env.single_action_space
        returns = None
        if c.n_step_returns > 1:
            returns = NStepReturns(c.n_step_returns, c.gamma, c.num_envs, *spaces, device=self.device)
        ring = ReplayBuffer(
            c.buffer_size, *spaces, fields=NStepReturns.fields if returns else (), device=self.device,
            folder=c.buffer_folder,
        )  # fmt: skip
        return ReplayLearner(
            self.collector, policy, cycle, updaters, ring, batch_size=c.batch_size, n_steps=c.n_steps,
            updates=c.updates, learning_starts=c.learning_starts, rounds=c.rounds, returns=returns, seed=self.seed,
            device=self.device, compile=c.compile, **options,
        )  # fmt: skip


def discount(batch: Data, config: OffPolicyConfig) -> Tensor:
    """``[1, B]``: the factor of the successor's value, ``gamma^k`` after k steps and 0 after a termination."""
    one = batch.discount(config.gamma, config.time_limit)
    return one * batch["power"] if "power" in batch else one


def mean_term(name: str, loss: Loss, *want: str, coef: float = 1.0, stats: Any = None) -> Term:
    """A mean over the batch of a loss without ratio and advantage, of these forward outputs."""
    return Term(name, loss, aggregates.mean, want=frozenset(want), advantage=None, coef=coef, stats=stats)


def rows(tree: Tree) -> Tree:
    """A batch ``[1, B, ...]`` as rows ``[B, ...]``."""
    return tree_map(lambda x: x[0], tree)
