"""G2RPO - Gaussian GRPO (OpenVLThinkerV2; Hu et al. 2026, arXiv 2604.08539).

    reward  R = reward + w_len trapezoid_task(length)
    rank    p_i = (rank(R_i) - 1/2) / G, rank 1 the smallest of the group
    A_i     = mean of Phi^-1(p) over the ranks of the rewards equal to R_i  (optimal transport to N(0, 1))
    loss    = -min(rho A, clip(rho) A), mean over each sequence's tokens, then over sequences
              + c_ent mean over tasks of [max(0, H_task - H_max) + max(0, H_min - H_task)]

Every group's advantages have the same distribution whatever the scale and the outliers of its rewards. Tasks are told
apart by the sequence column ``kind`` (integers from 0); without one, everything is one task.

Reads ``episode_reward`` (``reward_components[:, 0]`` for the filter), ``group``, ``valid``, ``log_prob``: episodes
of control tasks do as
well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators import aggregates, ratios
from ccrl.estimators.base import Stage
from ccrl.estimators.groups import Groups, per_step
from ccrl.estimators.outcomes import informative
from ccrl.estimators.recipe import Aggregation, MethodConfig, Recipe
from ccrl.estimators.rollouts import evaluate_columns
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.settings import Finite, Nonnegative

__all__ = [
    "G2RPO", "Corridor", "DropUnanimous", "G2RPOConfig", "G2RPORecipe", "LengthReward", "RankNormal", "corridor",
    "rank_normal", "trapezoid",
]  # fmt: skip


@dataclass(frozen=True)
class G2RPOConfig(MethodConfig):
    """The paper states neither the bounds nor their weights: both shapings are off until bounds are given."""

    pool: Literal["group", "kind"] = "group"
    """Rewards are ranked together in each group (appendix B), or in each task of the rollout (kind)."""
    tie: Nonnegative = 1e-6
    """Rewards that are equal when rounded to multiples of it are tied."""
    drop_unanimous: bool = True
    """Groups whose first reward component is the same everywhere (all right, all wrong) are not trained on."""
    length_bounds: tuple[tuple[float, float, float, float], ...] = ()
    """The length reward starts to rise, is 1, starts to fall and is 0 at these lengths, one row for all tasks or one
    per `kind`; empty gives none."""
    length_coef: Finite = 1.0
    """The length reward has this weight."""
    entropy_bounds: tuple[tuple[float, float], ...] = ()
    """A mean entropy per token (nats) between these two is not penalised, one row for all tasks or one per `kind`;
    empty penalises none."""
    corridor_coef: Nonnegative = 0.01
    """The penalty of entropies outside the bounds has this weight."""
    entropy_estimate: Literal["full", "sampled"] = "full"
    """The entropy is that of the whole distribution (full), or -log-probability of the tokens as the paper writes
    (sampled; its gradient is the score's direction, not the entropy's)."""
    aggregate: Aggregation = "sequence_mean_token_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length_bounds", "entropy_bounds"):
            for row in getattr(self, name):
                if list(row) != sorted(row):
                    raise ValueError(f"{name}: expected rows of numbers that do not decrease, got {row}")


# -- rewards ----------------------------------------------------------------------------------------------------------


def trapezoid(length: Tensor, bounds: Tensor) -> Tensor:
    """0 up to ``L_min``, rising to 1 at ``L_low``, 1 up to ``L_high``, falling to 0 at ``L_max``.

    :param bounds: these four, ``[..., 4]``; equal ones are a step, whose edge counts as inside.
    """
    least, low, high, most = bounds.unbind(-1)
    rise = (length - least) / torch.where(low > least, low - least, 1.0)
    fall = (most - length) / torch.where(most > high, most - high, 1.0)
    value = torch.where(length < low, rise, torch.where(length > high, fall, 1.0))
    return torch.where((length < least) | (length > most), 0.0, value)


def kinds(data: Data) -> Tensor:
    """``[N]`` int64: the task of every column."""
    return data["kind"] if "kind" in data else torch.zeros_like(data["group"])


def per_kind(rows: tuple[tuple[float, ...], ...], kind: Tensor) -> Tensor:
    """``[N, ...]``: the row of each column's task."""
    if len(rows) == 1:
        return torch.tensor(rows, dtype=torch.float64, device=kind.device).expand(len(kind), -1)
    if int(kind.max()) >= len(rows):
        raise ValueError(f"bounds: expected one row or one for each of {int(kind.max()) + 1} kinds, got {len(rows)}")
    return torch.tensor(rows, dtype=torch.float64, device=kind.device)[kind]


@dataclass(frozen=True)
class LengthReward:
    """``shaped_episode_reward`` ``[N]``: the reward plus ``coef`` times the trapezoid of the number of valid steps."""

    bounds: tuple[tuple[float, float, float, float], ...]
    coef: float = 1.0

    def __call__(self, data: Data) -> Data:
        bonus = trapezoid(data["valid"].double().sum(0), per_kind(self.bounds, kinds(data)))
        return data.derive_sequence(shaped_episode_reward=data["episode_reward"] + self.coef * bonus)


# -- advantage --------------------------------------------------------------------------------------------------------


def rank_normal(reward: Tensor, groups: Groups, tie: float = 1e-6) -> Tensor:
    """``[N]`` float64: the normal quantiles of the ranks inside groups, averaged (not the ranks) where rewards tie."""
    reward = reward.double()
    if tie:
        reward = (reward / tie).round()
    order = reward.argsort(stable=True)
    order = order[groups.index[order].argsort(stable=True)]  # by group, inside it by reward
    group, ordered = groups.index[order], reward[order]
    size = groups.count[group]
    start = groups.count.cumsum(0) - groups.count
    rank = torch.arange(len(order), device=reward.device) - start[group]
    quantile = math.sqrt(2.0) * torch.erfinv(2.0 * (rank + 0.5) / size - 1.0)
    new = torch.ones_like(group)
    new[1:] = (group[1:] != group[:-1]) | (ordered[1:] != ordered[:-1])
    ties = Groups(new.cumsum(0))
    averaged = ties.mean(quantile)[ties.index]
    # the quantiles of a whole group cancel up to rounding only
    averaged = torch.where(ties.count[ties.index] == size, 0.0, averaged)
    return torch.empty_like(averaged).scatter(0, order, averaged)


@dataclass(frozen=True)
class RankNormal:
    """``advantage`` ``[T, N]`` from the ranks of ``shaped_episode_reward`` (or ``episode_reward``) in each group, or
    in each task."""

    pool: str = "group"
    tie: float = 1e-6

    def __call__(self, data: Data) -> Data:
        label = data["group"] if self.pool == "group" else kinds(data)
        reward = data["shaped_episode_reward" if "shaped_episode_reward" in data else "episode_reward"]
        return per_step(data, rank_normal(reward, Groups(label), self.tie))


@dataclass(frozen=True)
class DropUnanimous:
    """Advantage 0 where a group's first component is the same everywhere, the others scaled so that the mean is over
    the sequences that are left, or (``tokens``) over their tokens.

    Told by that component alone: with a length reward, ranks would give unanimous groups advantages of full size.
    """

    tokens: bool = False

    def __call__(self, data: Data) -> Data:
        kept = informative(data).to(data["episode_reward"].dtype)
        size = data["valid"].sum(0) if self.tokens else torch.ones_like(kept)
        scale = kept * (size.sum() / (size * kept).sum().clamp_min(1.0))
        return data.derive(advantage=data["advantage"] * scale)


# -- entropy ----------------------------------------------------------------------------------------------------------


def corridor(entropy: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``max(0, H - high) + max(0, low - H)``."""
    return (entropy - high).clamp_min(0.0) + (low - entropy).clamp_min(0.0)


@dataclass(frozen=True)
class Corridor:
    """The corridor as a sum over tokens, so that micro-batches add up: outside it, the hinge of a task's mean entropy
    is linear in every token's.

    ``side`` ``[N]`` is 1 above, -1 below, 0 inside, ``edge`` ``[N]`` the bound that is left, ``share`` ``[N]`` the
    weight of a task's tokens for means over the valid tokens of the rollout. All are measured with the sampling policy.
    """

    bounds: tuple[tuple[float, float], ...]
    entropy: Callable[[Data], Tensor]

    def __call__(self, data: Data) -> Data:
        groups, valid = Groups(kinds(data)), data["valid"].double()
        tokens = groups.sum(valid.sum(0))
        entropy = torch.where(valid > 0, self.entropy(data).double(), 0.0).sum(0)
        mean = (groups.sum(entropy) / tokens.clamp_min(1.0))[groups.index]
        low, high = per_kind(self.bounds, kinds(data)).unbind(1)
        side = (mean > high).double() - (mean < low).double()
        edge = torch.where(side > 0, high, torch.where(side < 0, low, 0.0))
        share = valid.sum() / (len(tokens) * tokens.clamp_min(1.0))[groups.index]
        dtype = data["valid"].dtype
        return data.derive_sequence(side=side.to(dtype), edge=edge.to(dtype), share=share.to(dtype))


def sampled_entropy(ratio: LogRatio, outputs: Outputs) -> Tensor:
    """``-log pi`` of the chosen tokens."""
    return -ratio.log_prob


def full_entropy(ratio: LogRatio, outputs: Outputs) -> Tensor:
    """Of the whole distribution."""
    return outputs["entropy"]


class G2RPORecipe(Recipe):
    """Rank-normal advantages, PPO's clipped token ratio, entropy corridor."""

    def stages(self) -> tuple[Stage, ...]:
        c, found = self.config, list[Stage]()
        if c.length_bounds:
            found.append(LengthReward(c.length_bounds, c.length_coef))
        found.append(RankNormal(c.pool, c.tie))
        if c.drop_unanimous:
            found.append(DropUnanimous(tokens=c.aggregate == "token_mean"))
        if c.entropy_bounds:
            found.append(Corridor(c.entropy_bounds, self.entropy))
        return tuple(found)

    def entropy(self, data: Data) -> Tensor:
        """``[T, N]`` of the sampling policy."""
        if self.config.entropy_estimate == "sampled":
            return -data["log_prob"]
        want = frozenset({"entropy"})
        return evaluate_columns(self.parts.policy, data, want, self.config.microbatch or None)["entropy"]

    def penalties(self) -> tuple[Term, ...]:
        c = self.config
        if not c.entropy_bounds:
            return super().penalties()
        full = c.entropy_estimate == "full"
        measure = full_entropy if full else sampled_entropy

        def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
            return batch["side"] * (measure(ratio, outputs) - batch["edge"])

        term = Term(
            "corridor_loss", loss, aggregates.mean, None if full else ratios.token,
            frozenset({"entropy" if full else "log_prob"}), advantage=None, weight="share", coef=c.corridor_coef,
        )  # fmt: skip
        return (*super().penalties(), term)


G2RPO = LLMMethod(
    "g2rpo",
    "Hu et al. 2026, arXiv 2604.08539",
    G2RPOConfig,
    G2RPORecipe,
    {
        "reward": "length trapezoid",
        "advantage": "normal quantiles of ranks",
        "ratio": "token",
        "loss": "clip + entropy corridor",
        "aggregate": "sequence means",
    },
)
"""Gaussian GRPO (Hu et al. 2026): rewards become normal quantiles of their ranks."""
