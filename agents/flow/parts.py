"""What recipes on flows are made of: advantages, references, penalties, and what they need of a rollout.

A method says with ``needs`` what it reads:

* ``log_prob``: transitions with a density and the log-probability of every one (coupled to the sampler): flow_grpo,
  grpo_guard. An ODE sampler is refused.
* ``clean``: the finished sample and its reward alone, from any sampler: awm, diffusion_nft.
* ``states``: the states that the policy walked through, with or without noise, and no reward: diffusion_opd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ccrl.data import Data
from ccrl.estimators import aggregates
from ccrl.estimators.base import Context
from ccrl.estimators.groups import Groups, per_step
from ccrl.estimators.recipe import MethodConfig, Recipe
from ccrl.estimators.rollouts import evaluate_columns
from ccrl.estimators.stages import with_episode_reward
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Term
from ccrl.settings import Above, Range

__all__ = [
    "ClippedAdvantage",
    "Divisor",
    "FlowConfig",
    "FlowRecipe",
    "Needs",
    "mean_distance",
    "reference_term",
    "step_divisor",
]

Needs = Literal["log_prob", "clean", "states"]
Divisor = Literal["sbar", "sigma"]


@dataclass(frozen=True)
class FlowConfig(MethodConfig):
    """What methods on rewarded samples share; numbers as in the released Flow-GRPO code unless a method says other."""

    group_size: Annotated[int, Range(2)] = 24
    """A group has this many samples of one condition."""
    advantage_std: Literal["group", "batch"] = "group"
    """Advantages are divided by the standard deviation of the group's rewards, or of all rewards of the rollout."""
    max_advantage: Annotated[float, Above(0.0)] = 5.0
    """Advantages are cut at plus and minus this number."""

    unread: ClassVar[tuple[str, ...]] = ("entropy_coef", "aggregate")


@dataclass(frozen=True)
class ClippedAdvantage:
    """``advantage`` ``[T, N]``: ``(R - mean of the group) / (std + 1e-4)``, cut at ``limit``, divided by ``scale``.

    Deviations are of the population (n, not n - 1), of the group or of the whole batch. Equal rewards in a group give
    exactly 0.
    """

    std: Literal["group", "batch"] = "group"
    limit: float = 5.0
    scale: float = 1.0
    eps: float = 1e-4

    def __call__(self, data: Data) -> Data:
        return per_step(data, self.advantages(data["episode_reward"], data["group"]))

    def advantages(self, reward: Tensor, group: Tensor) -> Tensor:
        """``[N]`` from rewards ``[N]`` and integer labels ``[N]``."""
        groups = Groups(group)
        if self.std == "group":
            found = groups.z_score(reward, ddof=0, eps=self.eps)
        else:
            x = reward.double()
            centred = torch.where(groups.constant(x)[groups.index], 0.0, x - groups.mean(x)[groups.index])
            found = centred / (x.std(correction=0) + self.eps)
        return (found.clamp(-self.limit, self.limit) / self.scale).to(reward.dtype)


class FlowRecipe(Recipe):
    """A recipe whose rows are denoising steps."""

    needs: ClassVar[Needs]
    clock_unit: ClassVar[str] = "samples"

    @property
    def versions(self) -> tuple[str, ...]:
        """Copies of the policy that are taken when training begins, by their names in the bank."""
        return ("ref",) if self.wants_reference else ()

    def start(self, data: Data, ctx: Context) -> Data:
        """With ``ref_mean`` ``[T, N, D]`` where a reference is wanted."""
        data = with_episode_reward(data)
        if self.wants_reference:
            data = data.derive(ref_mean=self.evaluated(ctx, "ref", data, "mean"))
        return data

    def evaluated(self, ctx: Context, version: str, data: Data, name: str) -> Tensor:
        """A forward output of a version of the policy on ``data``, no gradient."""
        columns = self.config.microbatch or None
        return evaluate_columns(ctx.bank.policy(version), data, frozenset({name}), columns)[name]


def step_divisor(batch: Data, divisor: Divisor) -> Tensor:
    """``2 s^2`` ``[T, B]`` under which squared distances of means stand: ``s`` the deviation of the transition (sbar,
    which gives the KL), or the noise level that released code divides by (sigma). Transitions without noise have 2."""
    scale = batch["std"] if divisor == "sbar" else batch["sigma"]
    return 2.0 * torch.where(scale > 0.0, scale.square().clamp_min(1e-8), torch.ones_like(scale))


def mean_distance(column: str, divisor: Divisor, reduce: Literal["mean", "sum"] = "mean") -> Loss:
    """``||mean - column||^2 / (2 s^2)`` per step, over dimensions the mean or the sum: with ``sbar`` and the sum the KL
    of the two transitions."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        squared = (outputs["mean"] - batch[column]).square()
        return (squared.mean(-1) if reduce == "mean" else squared.sum(-1)) / step_divisor(batch, divisor)

    return loss


def reference_term(coef: float, divisor: Divisor) -> Term:
    """The KL to the reference's transitions."""
    return Term("kl", mean_distance("ref_mean", divisor), aggregates.mean, want=frozenset({"mean"}), advantage=None,
                coef=coef)  # fmt: skip
