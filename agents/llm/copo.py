"""COPO: Consistency-Aware Policy Optimization (Han et al. 2025, arXiv 2508.04138).

A unanimous group has no advantage inside itself. So every prompt also has a global one, the same for all its
completions, and the two LOSSES are blended by how much the group's final answers differ:

    H(q)   = - sum_tau p(tau) log2 p(tau)                  p: share of each distinct answer among the G; bits
    R_g(q) = mean_j R_j c,   c = 1 or 1 - H (1 - 1/G) / log2 G
    A_g    = (R_g - mean_q R_g) / (std_q R_g + 1e-6),   A_l = (R - mean_j R) / (std_j R + 1e-6)
    w      = sigmoid(gamma (H - rho))
    loss   = w l(A_l) + (1 - w) l(A_g)                     l: clipped loss, dual clip at 3; mean over sequences

Where nothing is clipped that is the loss of ``w A_l + (1 - w) A_g``. Slots: stage = two advantages and a weight;
loss = a blend of two clipped losses. Other methods are called COPO too (count-based online preference optimisation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators import losses
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.groups import Groups
from ccrl.estimators.recipe import Aggregation, MethodConfig, Parts, Recipe
from ccrl.estimators.stages import GroupBaseline
from ccrl.estimators.terms import LogRatio, Loss, Outputs
from ccrl.settings import Above, ConfigError, Count, Nonnegative, Range
from ccrl.updaters import Stats

__all__ = ["COPO", "COPOConfig", "COPORecipe", "Consistency", "answer_entropy", "blended", "consistency_coefficient"]

Mode = Literal["soft", "soft_forced", "forced", "soft_zero", "zero", "global", "local"]


@dataclass(frozen=True)
class COPOConfig(MethodConfig):
    """The released script's settings, with the paper's soft blend."""

    search: ClassVar[dict[str, Any]] = {"gamma": None}
    group_size: Count = 6
    """A group has this many completions, or episodes from one start."""
    mode: Mode = "soft"
    """The local loss has weight w (soft), w but 0 in groups of equal rewards (soft_forced), 1 but 0 in such groups
    (forced), w but 0 for completions of reward 0 (soft_zero), 1 but 0 for those (zero), 0 (global), or 1 (local:
    GRPO)."""
    gamma: Nonnegative = 5.0
    """The weight w turns this sharply around the entropy rho."""
    rho: Annotated[float, Range(also=(math.inf, -math.inf))] = 1.0
    """At this entropy of a group's answers, in bits, both losses have the weight 1/2; -inf is GRPO, inf the global loss
    alone."""
    coefficient: bool = False
    """Whether a prompt's global reward falls with the entropy of its answers, down to 1/G of it where all differ."""
    missing: Literal["one", "distinct"] = "one"
    """Completions without an answer count as one answer (one: released), or as answers of their own (distinct)."""
    dual_clip: Annotated[float, Above(1.0)] = 3.0
    """Where an advantage is negative, its loss is at most this many times its size."""
    aggregate: Aggregation = "sequence_mean_token_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma and math.isinf(self.rho):
            raise ConfigError(f"rho: expected a finite number with gamma = 0 (w is 1/2 everywhere), got {self.rho}")
        if self.mode == "local" and self.coefficient:
            raise ConfigError("coefficient: expected False with mode='local', which has no global reward, got True")
        idle = [] if self.soft else ["gamma", "rho"]
        idle += [] if self.reads_answers else ["missing"]
        for name in idle:
            default = next(f.default for f in fields(self) if f.name == name)
            if getattr(self, name) != default:
                raise ConfigError(f"{name}: expected {default!r} with mode={self.mode!r}, which does not read it, got "
                                  f"{getattr(self, name)!r}")  # fmt: skip

    @property
    def soft(self) -> bool:
        """Whether the weight follows the entropy."""
        return self.mode.startswith("soft")

    @property
    def reads_answers(self) -> bool:
        """Whether the entropy of answers matters; else no column ``answer`` is needed."""
        return self.coefficient or self.soft


def answer_entropy(answer: Tensor, groups: Groups, missing: Literal["one", "distinct"] = "one") -> Tensor:
    """``H`` ``[Q]`` in bits of the answers ``[N]`` int64, -1 where there is none."""
    label = answer
    if missing == "distinct":
        own = answer.max() + 1 + torch.arange(len(answer), device=answer.device)
        label = torch.where(answer < 0, own, answer)
    _, index, count = torch.unique(torch.stack([groups.index, label], 1), dim=0, return_inverse=True,
                                   return_counts=True)  # fmt: skip
    share = count[index].double() / groups.count[groups.index]
    return groups.mean(-share.log2()).clamp_min(0.0)


def consistency_coefficient(entropy: Tensor, count: Tensor) -> Tensor:
    """``c`` ``[Q]`` of entropies in bits and group sizes: 1 for one answer, ``1/G`` where all differ; 1 for a group of
    one."""
    several = count.clamp_min(2.0)
    return torch.where(count > 1, 1.0 - entropy * (1.0 - 1.0 / several) / several.log2(), 1.0)


@dataclass(frozen=True)
class Consistency:
    """``advantage`` ``[T, N]`` (local), ``global_advantage``, ``local_weight``, ``answer_entropy`` ``[N]``, over the
    whole rollout: of a minibatch the global one would have another scale."""

    config: COPOConfig

    def __call__(self, data: Data) -> Data:
        c, reward, groups = self.config, data["episode_reward"], Groups(data["group"])
        entropy = torch.zeros_like(groups.count)
        if c.reads_answers:
            entropy = answer_entropy(data["answer"], groups, c.missing)
        equal = groups.constant(reward)
        # the rounded mean of equal rewards differs between groups of different sizes
        first = torch.zeros_like(groups.count).index_copy(0, groups.index, reward.double())
        mean = torch.where(equal, first, groups.mean(reward))
        if c.coefficient:
            mean = mean * consistency_coefficient(entropy, groups.count)
        among = Groups(torch.zeros_like(mean, dtype=torch.int64)).z_score(mean, eps=1e-6)
        weight = self.weight(entropy, equal)[groups.index]
        if c.mode in ("zero", "soft_zero"):
            weight = weight * (reward != 0)
        return data.derive_sequence(
            global_advantage=among[groups.index].to(reward.dtype), local_weight=weight.to(reward.dtype),
            answer_entropy=entropy[groups.index].to(reward.dtype),
        )  # fmt: skip

    def weight(self, entropy: Tensor, equal: Tensor) -> Tensor:
        """``[Q]`` of entropies in bits and whether the group's rewards are equal."""
        c = self.config
        if c.mode == "global":
            return torch.zeros_like(entropy)
        w = torch.sigmoid(c.gamma * (entropy - c.rho)) if c.soft else torch.ones_like(entropy)
        return torch.where(equal, 0.0, w) if c.mode.endswith("forced") else w


def blended(clipped: Loss) -> Loss:
    """``w l(A_l) + (1 - w) l(A_g)``: each advantage is clipped for itself."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        weight = batch["local_weight"]
        local = clipped(ratio, advantage, outputs, batch)
        shared = clipped(ratio, batch["global_advantage"].expand_as(advantage), outputs, batch)
        return weight * local + (1.0 - weight) * shared

    return loss


class COPORecipe(Recipe):
    """GRPO's advantages beside those of prompts, and the blend of their losses."""

    def __init__(self, config: Any, parts: Parts) -> None:
        if config.reads_answers and not hasattr(parts.policy, "temperature"):
            raise ValueError(f"mode={config.mode!r} compares final answers: expected a token policy on a task that has "
                             "them; use mode='forced', 'zero', 'global' or 'local' without coefficient")  # fmt: skip
        super().__init__(config, parts)

    def stages(self) -> tuple[Stage, ...]:
        return (GroupBaseline(scale="std", eps=1e-6, single="keep"), Consistency(self.config))

    def loss(self) -> Loss:
        c = self.config
        return blended(losses.clip(c.clip_low, c.clip_high, c.dual_clip))

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """``answer_entropy``, ``local_weight``: means over completions. ``raised_failures``: share of completions whose
        reward is below the best of their group and whose blended advantage is positive."""
        on = data["on"]
        groups, reward, weight = Groups(on["group"]), on["episode_reward"], on["local_weight"]
        best = torch.full_like(groups.count, -torch.inf).scatter_reduce(0, groups.index, reward.double(), "amax")
        local = on["advantage"].sum(0) / on["valid"].sum(0).clamp_min(1.0)
        up = weight * local + (1.0 - weight) * on["global_advantage"] > 0
        stats["answer_entropy"], stats["local_weight"] = on["answer_entropy"].mean(), weight.mean()
        stats["raised_failures"] = (up & (reward.double() < best[groups.index])).to(reward.dtype).mean()


COPO = LLMMethod(
    "copo",
    "Han et al. 2025, arXiv 2508.04138",
    COPOConfig,
    COPORecipe,
    {
        "advantage": "group z-score, and the prompt's z-score over the rollout",
        "ratio": "token",
        "loss": "dual clip of each, blended by the entropy of answers",
        "aggregate": "sequence means",
    },
)
"""Consistency-Aware Policy Optimization: unanimous groups learn from how their prompt compares with the others."""
