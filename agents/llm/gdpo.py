"""GDPO - Group reward-Decoupled Normalization Policy Optimization (Liu et al. 2026, arXiv 2601.05242).

    r_k    <- r_k where r_l >= t, else 0                     (optional: an easy reward counts only with the hard one)
    A_k    = (r_k - mean_group r_k) / (std_group r_k + eps)  one z-score per reward component
    S      = sum_k w_k A_k
    A      = (S - mean_rollout S) / (std_rollout S + eps)
    loss   = -min(rho A, clip(rho) A), mean over each sequence's tokens, then over sequences

GRPO z-scores the sum of the rewards: different combinations of rewards get one advantage, and a reward of small scale
has none of its own. Weights multiply z-scores; multiplied into rewards they would cancel.

Reads ``reward_components`` (or ``episode_reward`` alone, then with one component), ``group``, ``valid``,
``log_prob``: episodes of control
tasks do as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators.base import Stage
from ccrl.estimators.groups import Groups, components, per_step
from ccrl.estimators.recipe import Aggregation, ClipHigh, MethodConfig, Recipe
from ccrl.settings import Finite, Nonnegative

__all__ = ["GDPO", "Conditioned", "Decoupled", "GDPOConfig", "GDPORecipe", "whiten"]


@dataclass(frozen=True)
class GDPOConfig(MethodConfig):
    """Defaults: equal weights, no conditioning, statistics over samples as in the paper."""

    weights: tuple[float, ...] = ()
    """The z-scores of the reward components are multiplied by these, one each; empty weighs all by 1."""
    conditioned: tuple[str, ...] = ()
    """These components count only where the component `condition` reaches `threshold`, else are 0."""
    condition: str = ""
    """The component of this name is the hard one."""
    threshold: Finite = 1.0
    """The hard component has to reach this."""
    batch_norm: Literal["sample", "token", "none"] = "sample"
    """Summed z-scores are normalised by mean and deviation over sequences (sample), over valid tokens (token: long
    sequences weigh more, and groups of equal rewards get an advantage where length and reward go together), or not."""
    group_eps: Nonnegative = 1e-4
    """Deviations inside groups are increased by this."""
    batch_eps: Nonnegative = 1e-4
    """The deviation over samples is increased by this."""
    single: Literal["zero", "keep"] = "zero"
    """A group of one has advantage 0, or (keep) its raw reward passes, as in the verl code."""
    clip_high: ClipHigh = 0.28
    """Ratios above 1 + clip_high are clipped; 0.28 is that of the paper's runs on mathematics and code (table 7)."""
    aggregate: Aggregation = "sequence_mean_token_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.conditioned) != bool(self.condition) or self.condition in self.conditioned:
            raise ValueError("expected `conditioned` components and another one as `condition`, or neither, got "
                             f"{self.conditioned}, {self.condition!r}")  # fmt: skip
        if self.weights and not any(self.weights):
            raise ValueError(f"weights: expected one that is not 0, got {self.weights}")


@dataclass(frozen=True)
class Conditioned:
    """``rewards`` ``[N, C]``: components with easy ones set to 0 where component ``hard`` is below ``threshold``."""

    easy: tuple[int, ...]
    hard: int
    threshold: float

    def __call__(self, data: Data) -> Data:
        rewards = components(data).clone()
        met = rewards[:, self.hard] >= self.threshold
        for k in self.easy:
            rewards[:, k] = torch.where(met, rewards[:, k], 0.0)
        return data.derive_sequence(rewards=rewards)


@dataclass(frozen=True)
class Decoupled:
    """``advantage`` ``[T, N]`` from ``rewards`` (where a stage made some) or the reward's components."""

    weights: tuple[float, ...] = ()
    batch_norm: str = "sample"
    group_eps: float = 1e-4
    batch_eps: float = 1e-4
    single: str = "zero"

    def __call__(self, data: Data) -> Data:
        total = self.sums(data["rewards"] if "rewards" in data else components(data), data["group"])
        if self.batch_norm == "token":
            valid = data["valid"].double()
            # the verl code's divisor: sqrt(var + 1e-8)
            advantage = whiten(total.expand_as(valid), valid, inside=1e-8)
            return data.derive(advantage=advantage.to(data["episode_reward"].dtype))
        if self.batch_norm == "sample":
            total = whiten(total, torch.ones_like(total), outside=self.batch_eps)
        return per_step(data, total)

    def sums(self, rewards: Tensor, group: Tensor) -> Tensor:
        """``S`` ``[N]`` in float64 from rewards ``[N, C]`` and labels ``[N]``."""
        groups = Groups(group)
        scores = [groups.z_score(r, eps=self.group_eps, single=self.single) for r in rewards.unbind(1)]
        weights = self.weights or (1.0,) * len(scores)
        return torch.stack([w * z for w, z in zip(weights, scores, strict=True)]).sum(0)


def whiten(x: Tensor, valid: Tensor, *, inside: float = 0.0, outside: float = 0.0) -> Tensor:
    """``(x - mean) / (sqrt(var + inside) + outside)`` over the valid elements, unbiased variance; 0 elsewhere, and
    where they do not vary."""
    x = torch.where(valid > 0, x, 0.0)
    n = valid.sum()
    centred = torch.where(valid > 0, x - x.sum() / n.clamp_min(1.0), 0.0)
    std = (centred.square().sum() / (n - 1.0).clamp_min(1.0) + inside).sqrt() + outside
    return torch.where(centred.abs().amax() > 1e-12, centred / torch.where(std > 0, std, 1.0), 0.0)


class GDPORecipe(Recipe):
    """Decoupled advantages, PPO's clipped token ratio."""

    def stages(self) -> tuple[Stage, ...]:
        c, names = self.config, self.parts.components
        if c.weights and len(c.weights) != len(names):
            raise ValueError(f"weights: expected {len(names)}, one for each of {names}, got {c.weights}")
        unknown = {*c.conditioned, *filter(None, [c.condition])} - set(names)
        if unknown:
            raise ValueError(f"conditioned, condition: expected components among {names}, got {sorted(unknown)}")
        decoupled = Decoupled(c.weights, c.batch_norm, c.group_eps, c.batch_eps, c.single)
        if not c.conditioned:
            return (decoupled,)
        easy = tuple(names.index(name) for name in c.conditioned)
        return Conditioned(easy, names.index(c.condition), c.threshold), decoupled


GDPO = LLMMethod(
    "gdpo",
    "Liu et al. 2026, arXiv 2601.05242",
    GDPOConfig,
    GDPORecipe,
    {
        "reward": "conditioned components",
        "advantage": "z-score per component, batch norm",
        "ratio": "token",
        "loss": "clip (+ k3)",
        "aggregate": "sequence means",
    },
)
"""Group reward-Decoupled Normalization Policy Optimization (Liu et al. 2026): several rewards, one z-score each."""
