"""BNPO - Beta Normalization Policy Optimization (Xiao, Zhang, Cao 2025, arXiv 2506.02864).

    p(q)   = mean reward of the prompt's completions, rewards mapped to [0, 1]
    (a, b) = moments of p over the prompts:  s = m (1 - m) / v - 1,  a = s m,  b = s (1 - m)
    alpha  = max(1, 1 + a / 3),  beta = max(1, 1 + b / 3)
    A      = w (R - p),  w = min(1 / f(p; alpha, beta), max_weight),  f the density of Beta(alpha, beta)
    loss   = -min(rho A, clip(rho) A), at most -dual A where A < 0; sums over tokens, mean over sequences

With p ~ Beta(a, b) these alpha, beta minimise the gradient's variance E[p (1 - p) / f(p)^2] among Beta densities.
alpha = beta = 1 is REINFORCE with the group's mean, alpha = beta = 3/2 is pi/8 times GRPO's advantage.

Several reward components (accuracy and format) are normalised on their own and averaged. Reads
``episode_reward`` or ``reward_components``,
``group``, ``valid``, ``log_prob``: episodes of control tasks do as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators import losses
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.groups import Groups, components, per_step
from ccrl.estimators.recipe import Aggregation, ClipHigh, MethodConfig, Recipe
from ccrl.estimators.terms import Loss
from ccrl.settings import Above, Finite, Positive
from ccrl.updaters import Stats

__all__ = ["BNPO", "BNPOConfig", "BNPORecipe", "BetaNormaliser", "fit_beta", "log_density", "optimal_normaliser"]


@dataclass(frozen=True)
class BNPOConfig(MethodConfig):
    """BNPO's clip range, dual clip and aggregation are those of its released script."""

    reward_min: Finite = 0.0
    """This reward counts as 0; a rollout with a smaller one widens the range for itself."""
    reward_max: Finite = 1.0
    """This reward counts as 1; a rollout with a larger one widens the range for itself."""
    max_weight: Positive = 1e6
    """The weight 1 / f is at most this; prompts of a rare success rate weigh more the more alike the others are."""
    decompose: bool = True
    """Every reward component is normalised on its own and the advantages are averaged; if false their sum is."""
    dual_clip: Annotated[float, Above(1.0)] = 10.0
    """The loss of a token with a negative advantage is at most this times its size."""
    clip_high: ClipHigh = 0.28
    """Ratios above 1 + clip_high are clipped; inf clips none."""
    aggregate: Aggregation = "sequence_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reward_min < self.reward_max:
            raise ValueError(f"expected reward_min < reward_max, got {self.reward_min}, {self.reward_max}")


def fit_beta(p: Tensor) -> tuple[Tensor, Tensor]:
    """``(a, b)`` of the Beta distribution with the mean and the unbiased variance of ``p`` ``[Q]``; not positive where
    ``p`` varies more than any Beta. One prompt, or equal rates (whose fit would be a point mass): zeros."""
    if p.shape[0] < 2:
        return p.new_zeros(()), p.new_zeros(())
    m, v = p.mean(), p.var()
    varies = p.max() > p.min()
    s = torch.where(varies, m * (1.0 - m) / torch.where(varies, v, 1.0) - 1.0, 0.0)
    return s * m, s * (1.0 - m)


def optimal_normaliser(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``(alpha, beta)`` of least gradient variance for success rates of ``Beta(a, b)``, at least 1."""
    return (1.0 + a / 3.0).clamp_min(1.0), (1.0 + b / 3.0).clamp_min(1.0)


def log_density(p: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Log of the ``Beta(alpha, beta)`` density at ``p`` in [0, 1]; ``-inf`` where the density is 0."""
    log_b = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return torch.xlogy(alpha - 1.0, p) + torch.xlogy(beta - 1.0, 1.0 - p) - log_b


@dataclass(frozen=True)
class BetaNormaliser:
    """``advantage`` ``[T, N]`` and ``normaliser`` ``[N, C, 2]``: the rollout's alpha and beta of every component.

    Moments are over groups, each counted once. A group of one has no baseline: advantage 0, not part of the fit.
    """

    reward_min: float = 0.0
    reward_max: float = 1.0
    max_weight: float = 1e6
    decompose: bool = True

    def __call__(self, data: Data) -> Data:
        rewards = components(data) if self.decompose else data["episode_reward"].unsqueeze(1)
        groups = Groups(data["group"])
        advantages, pairs = list[Tensor](), list[Tensor]()
        for reward in rewards.double().unbind(1):
            low, high = reward.min().clamp_max(self.reward_min), reward.max().clamp_min(self.reward_max)
            reward = (reward - low) / (high - low)
            p = groups.mean(reward)
            pair = optimal_normaliser(*fit_beta(p[groups.count > 1]))
            advantages.append(self.advantage(reward, groups, p, *pair))
            pairs.append(torch.stack(pair))
        normaliser = torch.stack(pairs).expand(data.shape[1], -1, -1)
        return per_step(data.derive_sequence(normaliser=normaliser), torch.stack(advantages).mean(0))

    def advantage(self, reward: Tensor, groups: Groups, p: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        """``[N]``, exactly 0 in groups of equal rewards."""
        # the bound before the product: where f = 0 the weight is infinite and the deviation 0
        weight = (-log_density(p, alpha, beta)).exp().clamp_max(self.max_weight)
        weight = torch.where(groups.constant(reward), 0.0, weight)
        return (weight[groups.index] * (reward - p[groups.index])).to(reward.dtype)


class BNPORecipe(Recipe):
    """Group-mean baseline, Beta normaliser of the whole rollout, clipped token ratio."""

    def stages(self) -> tuple[Stage, ...]:
        c = self.config
        return (BetaNormaliser(c.reward_min, c.reward_max, c.max_weight, c.decompose),)

    def loss(self) -> Loss:
        return losses.clip(self.config.clip_low, self.config.clip_high, self.config.dual_clip)

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """Log the normaliser: both 1 means that this rollout was plain REINFORCE with a baseline."""
        alpha, beta = data["on"]["normaliser"][0].unbind(-1)
        names = self.parts.components if len(alpha) > 1 else ("reward",)
        for name, first, second in zip(names, alpha, beta):
            stats |= {f"alpha_{name}": first, f"beta_{name}": second}


BNPO = LLMMethod(
    "bnpo",
    "Xiao et al. 2025, arXiv 2506.02864",
    BNPOConfig,
    BNPORecipe,
    {
        "advantage": "group mean / Beta density",
        "ratio": "token",
        "loss": "clip, dual clip",
        "aggregate": "sequence sums",
    },
)
"""Beta Normalization Policy Optimization (Xiao et al. 2025): weights from the density of success rates."""
