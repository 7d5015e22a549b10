"""Prepare stages: derived columns from raw ones, in the order a recipe lists them. No gradients, no done flags.

What papers disagree on (ddof, eps, leave-one-out, groups of one, zero variance) is an explicit switch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.data import Data, masked
from ccrl.estimators.groups import Groups
from ccrl.policies.normaliser import RunningNorm
from ccrl.returns import discounted_sum, forward_scan, gae

__all__ = [
    "EpisodeReturn",
    "Gae",
    "GroupBaseline",
    "GroupThreshold",
    "RewardNorm",
    "Standardise",
    "Values",
    "with_episode_reward",
]

ValueFn = Callable[[Tree], Tensor]


@dataclass(frozen=True)
class Values:
    """``value``, ``next_value`` ``[T, N]``: the critic at every state and at its true successor."""

    critic: ValueFn

    def __call__(self, data: Data) -> Data:
        value, next_value = data.state_values(self.critic)
        return data.derive(value=value, next_value=next_value)


@dataclass(frozen=True)
class Gae:
    """``advantage`` (GAE) and ``return = advantage + value`` from ``value, next_value`` and the reward column."""

    gamma: float
    lam: float
    time_limit: Literal["bootstrap", "terminal"] = "bootstrap"
    reward: str = "reward"

    def __post_init__(self) -> None:
        if not (0.0 <= self.gamma <= 1.0 and 0.0 <= self.lam <= 1.0):
            raise ValueError(f"Gae: expected gamma and lam in [0, 1], got {self.gamma}, {self.lam}")

    def __call__(self, data: Data) -> Data:
        discount, valid = data.discount(self.gamma, self.time_limit), data["valid"]
        advantage = gae(data[self.reward], data["value"], data["next_value"], discount, data["carry"], self.lam)
        # dummy rows of NEXT_STEP autoreset hold garbage deltas; carry already keeps them out of their neighbours
        advantage = masked(advantage, valid)
        return data.derive(advantage=advantage, **{"return": advantage + data["value"]})


class RewardNorm(nn.Module):
    """``shaped_reward``: rewards divided by the running deviation of the discounted return, clipped.

    The statistics move once per rollout, before it is scaled, so all its rewards share one scale (SB3's VecNormalize
    moves them at every step). The discounted return restarts after every episode's end.
    """

    running: Tensor

    def __init__(self, num_envs: int, gamma: float, clip: float = 10.0, eps: float = 1e-8) -> None:
        super().__init__()
        self.gamma, self.clip, self.eps = gamma, clip, eps
        self.norm = RunningNorm(())
        self.register_buffer("running", torch.zeros(num_envs, dtype=torch.float64))

    def __call__(self, data: Data) -> Data:
        reward, carry = data["reward"].double(), data["carry"].double()
        # fresh episodes, as after a resume without the environment's state: nothing goes on into them
        going = (data["t"][:1] > 0).double() if "t" in data else torch.ones_like(carry[:1])
        before = torch.cat([going, carry[:-1]])
        returns = forward_scan(reward, self.gamma * before, self.running)
        self.running.copy_(returns[-1] * carry[-1])
        self.norm.update(returns, data["valid"])
        scale = (self.norm.var + self.eps).rsqrt()
        return data.derive(shaped_reward=(reward * scale).clamp(-self.clip, self.clip).to(data["reward"].dtype))


@dataclass(frozen=True)
class Standardise:
    """``(x - mean) / (std + eps)`` of a derived column over the valid rows of the whole rollout."""

    column: str = "advantage"
    ddof: int = 1
    eps: float = 1e-8

    def __call__(self, data: Data) -> Data:
        return data.derive(**{self.column: standardise(data[self.column], data["valid"], self.ddof, self.eps)})


def standardise(x: Tensor, valid: Tensor, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """Masked standardisation; invalid rows become 0. One valid row, or rows equal up to rounding: zeros."""
    invalid = valid == 0
    x = x.masked_fill(invalid, 0.0)
    n = valid.sum()
    mean = x.sum() / n.clamp_min(1.0)
    centred = (x - mean).masked_fill(invalid, 0.0)
    std = torch.linalg.vector_norm(centred) / (n - ddof).clamp_min(1.0).sqrt()
    # the rounded mean of n equal numbers may differ from them: dividing by that spread would give ones, not zeros
    noise = 8.0 * torch.finfo(x.dtype).eps * mean.abs()
    return centred * torch.where(std > noise, 1.0 / (std + eps), torch.zeros_like(std))


@dataclass(frozen=True)
class EpisodeReturn:
    """``episode_reward`` ``[N]``: the discounted return of every column's first episode (fresh episodes: of the
    episode)."""

    gamma: float = 1.0
    reward: str = "reward"

    def __call__(self, data: Data) -> Data:
        reward = masked(data[self.reward], data["valid"])
        return data.derive_sequence(episode_reward=discounted_sum(reward, self.gamma, data["carry"])[0])


def with_episode_reward(data: Data) -> Data:
    """With ``episode_reward`` ``[N]``: as it is where a verifier gave one, else the episodes' returns."""
    return data if "episode_reward" in data else EpisodeReturn()(data)


@dataclass(frozen=True)
class GroupBaseline:
    """``advantage`` ``[T, N]`` from per-column rewards compared inside their group.

    * GRPO: ``baseline="mean", scale="std"`` (ddof 1, eps 1e-6); Dr.GRPO: ``scale=None``; RLOO: ``leave_one_out``.
    * A group of one keeps its reward (mean 0, std 1) with ``single="keep"``, or gets 0 with ``single="zero"``.
    * Equal rewards give 0 in every variant (the deviation is 0; eps only guards the division).
    """

    reward: str = "episode_reward"
    baseline: Literal["mean", "leave_one_out"] = "mean"
    scale: Literal["std"] | None = None
    ddof: int = 1
    eps: float = 1e-6
    single: Literal["keep", "zero"] = "keep"

    def __post_init__(self) -> None:
        if self.baseline == "leave_one_out" and self.scale is not None:
            raise ValueError("GroupBaseline: leave_one_out is unscaled; use scale=None or baseline='mean'")

    def __call__(self, data: Data) -> Data:
        advantage = self.advantages(data[self.reward], data["group"])
        steps = data.shape[0]
        return data.derive(advantage=advantage.expand(steps, *advantage.shape) * data["valid"])

    def advantages(self, reward: Tensor, group: Tensor) -> Tensor:
        """``[N]`` from rewards ``[N]`` and integer group labels ``[N]``."""
        groups = Groups(group)
        if self.scale == "std":
            return groups.z_score(reward, ddof=self.ddof, eps=self.eps, single=self.single).to(reward.dtype)
        n = groups.count[groups.index]
        # the rounded mean of n equal numbers may differ from them
        centred = torch.where(
            groups.constant(reward)[groups.index], 0.0, reward.double() - groups.mean(reward)[groups.index]
        )
        if self.baseline == "leave_one_out":
            centred = centred * n / (n - 1.0).clamp_min(1.0)
        alone = n == 1 if self.single == "keep" else torch.zeros_like(n, dtype=torch.bool)
        return torch.where(alone, reward.double(), centred).to(reward.dtype)


@dataclass(frozen=True)
class GroupThreshold:
    """``threshold`` ``[N]``: a quantile of every group's rewards, linearly interpolated (GBPO: the median).

    ``level = 1 - kappa`` keeps the target ratios of asymmetric bounds at mean 1 (docs/bpo.md). A group of one
    has threshold 0, like its mean in ``GroupBaseline``.
    """

    reward: str = "episode_reward"
    level: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.level <= 1.0:
            raise ValueError(f"GroupThreshold: expected a level in [0, 1], got {self.level}")

    def __call__(self, data: Data) -> Data:
        return data.derive_sequence(threshold=self.thresholds(data[self.reward], data["group"]))

    def thresholds(self, reward: Tensor, group: Tensor) -> Tensor:
        """``[N]`` from rewards ``[N]`` and integer group labels ``[N]``."""
        _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
        order = reward.argsort(stable=True)
        order = order[index[order].argsort(stable=True)]  # by group, inside it by reward
        ordered, start = reward[order], counts.cumsum(0) - counts
        place = self.level * (counts - 1).to(reward.dtype)
        below = place.floor().long()
        above = (below + 1).minimum(counts - 1)
        quantile = torch.lerp(ordered[start + below], ordered[start + above], place - below)
        return torch.where(counts > 1, quantile, torch.zeros_like(quantile))[index]
