"""Learning from what is better: DPO and IPO on pairs, SFT on demonstrations.

    D = (log pi(w) - log ref(w)) - (log pi(l) - log ref(l))          preferred w, rejected l, sums over tokens
    dpo   -log sigmoid(beta D)          ipo   (D - 1 / (2 tau))^2          sft   -log pi(demonstration)

Pairs are made online, one per prompt: the best and the worst of a group's samples (``pairs="samples"``), or the task's
demonstration and the worst sample (``pairs="demonstrations"``). Prompts whose completions score alike make none, and an
iteration without pairs changes nothing. A pair is a group of two columns told apart by the column ``preferred`` ``[N]``
(+1, -1); a group without a pair has 0. Pairs of samples may be control episodes of one start (``agents/grouped.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.collect import Request
from ccrl.data import Data, masked
from ccrl.estimators import losses, ratios
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.recipe import MethodConfig, Recipe
from ccrl.estimators.rollouts import concatenate
from ccrl.estimators.stages import with_episode_reward
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Ratio, Term
from ccrl.settings import Count, Positive

__all__ = ["DPO", "IPO", "SFT", "best_and_worst", "dpo", "ipo", "pair", "per_pair"]


# -- pairs ----------------------------------------------------------------------------------------------------------


def pair(mean: bool = False) -> Ratio:
    """A pair's log-ratio ``(logp_w - ref_w) - (logp_l - ref_l)`` on the column of the preferred sequence, ``[1, B]``,
    not valid elsewhere; log-probabilities are summed over tokens, or averaged with ``mean`` (TRL's IPO)."""

    def ratio(outputs: Outputs, batch: Data) -> LogRatio:
        valid, group = batch["valid"], batch["group"]
        # a padded column repeats a member of a pair: without valid rows it is in none
        sign = batch["preferred"].to(valid.dtype) * (valid > 0).any(0)
        count = valid.sum(0).clamp_min(1.0) if mean else torch.ones_like(sign)
        partners = (group.unsqueeze(0) == group.unsqueeze(1)).to(valid.dtype)

        def signed(log_prob: Tensor) -> Tensor:
            total = masked(log_prob, valid).sum(0)
            return ((sign * total / count) @ partners).unsqueeze(0)

        whole = (sign > 0) & ((sign < 0).to(valid.dtype) @ partners > 0)
        return LogRatio(signed(outputs["log_prob"]), signed(batch["ref_log_prob"]), whole.to(valid.dtype).unsqueeze(0))

    return ratio


def dpo(beta: float) -> Loss:
    """``-log sigmoid(beta D)`` of a pair's log-ratio ``D`` (Rafailov et al. 2023, eq. 7)."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        return -F.logsigmoid(beta * ratio.log_ratio)

    return loss


def ipo(tau: float) -> Loss:
    """``(D - 1 / (2 tau))^2`` (Azar et al. 2023, eq. 17): a margin to reach, not one to grow for ever."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        return (ratio.log_ratio - 0.5 / tau).square()

    return loss


def per_pair(valid: Tensor, batch: Data) -> Tensor:
    """Mean over the pairs of the batch."""
    return valid / batch["n_groups"]


def best_and_worst(reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Columns ``[P]`` int64 of the highest and of the lowest reward ``[N]`` of every group ``[N]`` where they differ.
    Among equals the first counts: samples of one prompt are exchangeable."""
    order = reward.argsort(stable=True)
    descending = reward.argsort(stable=True, descending=True)
    worst = _first_of_groups(order, group)
    best = _first_of_groups(descending, group)
    differ = reward[best] > reward[worst]
    return best[differ], worst[differ]


def _first_of_groups(order: Tensor, group: Tensor) -> Tensor:
    """Of the columns in ``order`` the first of every group, groups ascending."""
    by_group = order[group[order].argsort(stable=True)]
    _, counts = torch.unique(group, return_counts=True)
    return by_group[counts.cumsum(0) - counts]


# -- the methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceConfig(MethodConfig):
    """What methods on pairs share."""

    unread: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high")
    pairs: Literal["samples", "demonstrations"] = "samples"
    """A pair is a group's best and worst sample, or the task's demonstration and the group's worst sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.microbatch % 2:
            raise ValueError(f"microbatch: expected an even number (pairs stay together), got {self.microbatch}")
        if self.pairs == "samples" and self.group_size < 2:
            raise ValueError(f"group_size: expected >= 2 to make pairs of samples, got {self.group_size}")

    @property
    def imitates(self) -> bool:
        return self.pairs == "demonstrations"


class PreferenceRecipe(Recipe):
    """Pairs from groups, the reference's log-probabilities of both members, a loss on the pair's log-ratio.

    ``batch_size`` counts pairs.
    """

    unit = "group"
    mean: bool = False
    """Whether log-probabilities are averaged over tokens."""

    def idle(self, data: Data, ctx: Context) -> bool:
        return not bool(data["preferred"].any())

    @property
    def wants_reference(self) -> bool:
        return True

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        if not have:
            return [self.parts.request]
        if self.config.pairs == "samples" or len(have) > 1:
            return []
        assert self.parts.request.counts is not None
        ones = torch.ones_like(self.parts.request.counts)
        return [Request(tag="demonstrations", counts=ones, source="on", demonstrations=True)]

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        on = with_episode_reward(have["on"])
        rollouts = [on, *(data for tag, data in have.items() if tag != "on")]
        return super().prepare({"sampled": on, "on": self.pairs(rollouts)}, ctx)

    def pairs(self, rollouts: list[Data]) -> Data:
        """The members of the pairs side by side, ``preferred`` ``[N]`` +1 or -1; without any pair one group of 0."""
        reward = rollouts[0]["episode_reward"]
        data, rank = rollouts[0], reward
        if len(rollouts) > 1:
            data = concatenate(rollouts, same_prompts=True)
            reward, shown = data["episode_reward"], (data["demonstration"] > 0) & (data["valid"] > 0).any(0)
            # a demonstration is the best whatever the samples score; a prompt without one makes no pair
            rank = torch.where(shown, torch.inf, reward)
            rank = torch.where((data["demonstration"] > 0) & ~shown, -torch.inf, rank)
        best, worst = best_and_worst(rank, data["group"])
        good = reward[best] > reward[worst]
        if len(rollouts) > 1:
            good &= shown[best]
        columns = torch.stack([best[good], worst[good]], 1).flatten()
        sign = torch.tensor([1.0, -1.0], device=reward.device).repeat(columns.shape[0] // 2)
        if not columns.numel():
            columns, sign = torch.zeros_like(data["group"][:2]), torch.zeros_like(reward[:2])
        return data.take(columns).derive_sequence(preferred=sign)

    def stages(self) -> tuple[Stage, ...]:
        return ()

    def terms(self) -> tuple[Term, ...]:
        term = Term("preference_loss", self.loss(), per_pair, pair(self.mean), advantage=None, stats=_margin)
        return (term, *self.penalties())


def _margin(ratio: Any, advantage: Tensor, outputs: Any, batch: Data) -> dict[str, Tensor]:
    return {"margin": ratio.log_ratio, "pair_accuracy": (ratio.log_ratio > 0).to(ratio.log_ratio.dtype)}


@dataclass(frozen=True)
class DPOConfig(PreferenceConfig):
    """DPO as published."""

    beta: Positive = 0.1
    """The implied KL penalty has this weight: the inverse strength of a preference."""


class DPORecipe(PreferenceRecipe):
    """``-log sigmoid(beta D)``."""

    def loss(self) -> Loss:
        return dpo(self.config.beta)


DPO = LLMMethod(
    "dpo",
    "Rafailov et al. 2023, arXiv 2305.18290",
    DPOConfig,
    DPORecipe,
    {"data": "pairs of a group", "ratio": "pair, to the reference", "loss": "-log sigmoid", "aggregate": "pairs"},
)
"""Direct Preference Optimization (Rafailov et al. 2023)."""


@dataclass(frozen=True)
class IPOConfig(PreferenceConfig):
    """IPO as published; ``length_normalised`` is TRL's."""

    search: ClassVar[dict[str, Any]] = {"tau": {"around": 10}}
    tau: Positive = 0.1
    """The margin to reach is 1 / (2 tau)."""
    length_normalised: bool = False
    """Log-ratios are averaged over the tokens of a sequence before they are compared."""


class IPORecipe(PreferenceRecipe):
    """``(D - 1 / (2 tau))^2``."""

    @property
    def mean(self) -> bool:  # type: ignore[override]
        return bool(self.config.length_normalised)

    def loss(self) -> Loss:
        return ipo(self.config.tau)


IPO = LLMMethod(
    "ipo",
    "Azar et al. 2023, arXiv 2310.12036",
    IPOConfig,
    IPORecipe,
    {"data": "pairs of a group", "ratio": "pair, to the reference", "loss": "squared margin", "aggregate": "pairs"},
)
"""Identity Preference Optimization (Azar et al. 2023)."""


# -- demonstrations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SFTConfig(MethodConfig):
    """Every prompt's demonstration once per iteration."""

    search: ClassVar[dict[str, Any]] = {"group_size": None}
    imitates: ClassVar[bool] = True  # type: ignore[misc]
    unread: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high")
    group_size: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size != 1:
            raise ValueError(f"group_size: expected 1 (a prompt has one demonstration), got {self.group_size}")


def only_shown(data: Data) -> Data:
    """Without the columns of prompts that have no demonstration; as it is where none has one."""
    shown = (data["valid"] > 0).any(0).nonzero().squeeze(-1)
    return data.take(shown) if 0 < len(shown) < data.shape[1] else data


class SFTRecipe(Recipe):
    """Maximum likelihood. Prompts without a demonstration count nowhere, and an iteration without any changes
    nothing."""

    ratio = staticmethod(ratios.plain)
    clock_unit = "demonstrations"

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        return [] if have else [replace(self.parts.request, demonstrations=True)]

    def stages(self) -> tuple[Stage, ...]:
        return (only_shown,)

    def idle(self, data: Data, ctx: Context) -> bool:
        return not bool((data["valid"] > 0).any())

    def terms(self) -> tuple[Term, ...]:
        term = Term("sft_loss", losses.neg_log_prob, self.aggregate(), type(self).ratio, advantage=None)
        return (term, *self.penalties())


SFT = LLMMethod(
    "sft",
    "maximum likelihood",
    SFTConfig,
    SFTRecipe,
    {"data": "demonstrations", "ratio": "none", "loss": "-log pi", "aggregate": "token mean"},
    {"n_prompts": 128},
)
"""Supervised fine-tuning on the task's demonstrations. The clock counts demonstrations; nothing is sampled, so
there is no training reward: evaluate."""
