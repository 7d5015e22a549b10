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

import torch
from torch import Tensor

from agents.llm.base import LLM, LLMConfig
from ccrl.data import Data
from ccrl.estimators.base import Stage
from ccrl.estimators.groups import Groups, components, per_step
from ccrl.estimators.recipe import Recipe

__all__ = ["GDPO", "Conditioned", "Decoupled", "GDPOConfig", "GDPORecipe", "whiten"]

BATCH_NORMS = ("sample", "token", "none")


@dataclass(frozen=True)
class GDPOConfig(LLMConfig):
    """Defaults: equal weights, no conditioning, statistics over samples as in the paper."""

    weights: tuple[float, ...] = ()
    """One per reward component, multiplied into its z-score; empty: all 1."""
    conditioned: tuple[str, ...] = ()
    """Components that count only where the component `condition` reaches `threshold`, else are 0."""
    condition: str = ""
    """Name of that hard component."""
    threshold: float = 1.0
    """What it has to reach."""
    batch_norm: str = "sample"
    """Second normalisation: sample (mean and deviation over sequences), token (over valid tokens: long sequences weigh
    more, and groups of equal rewards get an advantage where length and reward go together) or none."""
    group_eps: float = 1e-4
    """Added to deviations inside groups."""
    batch_eps: float = 1e-4
    """Added to the deviation over samples."""
    single: str = "zero"
    """Groups of one: zero, or keep (the raw reward passes, as in the verl code)."""
    aggregate: str = "sequence_mean_token_mean"
    """As GRPO; see RecipeConfig."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_norm not in BATCH_NORMS:
            raise ValueError(f"batch_norm: expected one of {BATCH_NORMS}, got {self.batch_norm!r}")
        if self.single not in ("zero", "keep"):
            raise ValueError(f"single: expected zero or keep, got {self.single!r}")
        if self.group_eps < 0 or self.batch_eps < 0:
            raise ValueError(f"expected group_eps and batch_eps >= 0, got {self.group_eps}, {self.batch_eps}")
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


class GDPO(LLM):
    """Group reward-Decoupled Normalization Policy Optimization (Liu et al. 2026): several rewards, one z-score each."""

    name = "gdpo"
    paper = "Liu et al. 2026, arXiv 2601.05242"
    Config = GDPOConfig
    Recipe = GDPORecipe

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "reward": "conditioned components", "advantage": "z-score per component, batch norm", "ratio": "token",
            "loss": "clip (+ k3)", "aggregate": "sequence means",
        }  # fmt: skip
