"""PF-PPO: Policy Filtration for PPO (Zhang et al. 2025, ICML, "Policy Filtration for RLHF to Mitigate Noise in Reward
Models", arXiv 2409.06957).

A reward model errs least where its rewards are extreme. Of the ``N`` completions of a prompt, ranked by reward, PPO
trains on those that a filter draws; rank ``i`` has the weight ``w_i``:

    best         w = (1, 0, ..., 0)                                  BoN
    best_random  w_1 = 1/2, the others 1 / (2 (N - 1))               BR
    best_worst   w_1 = w_N = 1/2                                     BW
    power        w proportional to |R|^k                             PPO-pow-k
    none         w = 1/N                                             PPO-M

Rewards, KL and advantages are computed of all completions, filtered, then standardised; what is drawn counts as the
policy's own samples. Which filter: the one with the largest R^2 of true scores on rewards among what it draws
(``reliability``), on a sample with known scores. Slot: data, between advantage and update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from agents.llm.agent import LLMMethod
from agents.llm.reinforce import PPOConfig, PPORecipe
from ccrl.data import Data
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.groups import Groups
from ccrl.estimators.stages import Standardise
from ccrl.settings import Count, Positive
from ccrl.updaters import Stats

__all__ = ["PFPPO", "Filter", "PFPPOConfig", "PFPPORecipe", "Ranked", "batch_weights", "rank_weights", "reliability"]

Filter = Literal["none", "best", "best_random", "best_worst", "power"]
FILTERS: tuple[Filter, ...] = ("none", "best", "best_random", "best_worst", "power")
SUBSET = {"none": 0, "best": 1, "best_random": 2, "best_worst": 2}
"""Completions that a filter keeps of a prompt without repetition; 0: all."""


@dataclass(frozen=True)
class PFPPOConfig(PPOConfig):
    """PPO's settings, five completions per prompt, each used about three times."""

    group_size: Count = 5
    n_epochs: Count = 3
    filter: Filter = "best_random"
    """Of a prompt's completions those are trained on that this filter draws: best (BoN), best_random (BR), best_worst
    (BW), power (in proportion to a power of the reward's size), or none (all alike)."""
    power: Positive = 2.0
    """With filter = power this is the exponent."""
    sampling: Literal["replace", "subset"] = "replace"
    """As many completions are drawn as there are, with replacement (replace), or each at most once (subset: the best;
    the best and another; the best and the worst; all)."""
    scope: Literal["prompt", "batch"] = "prompt"
    """The filter looks at each prompt's completions, or at the whole rollout's as one (batch, the released code: with
    rewards that all differ two completions are left)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.filter != "power" and self.power != 2.0:
            raise ValueError(f"power: expected 2.0 (filter={self.filter!r} does not read it), got {self.power}")
        if self.sampling == "subset" and (self.filter == "power" or self.scope == "batch"):
            raise ValueError(f"sampling: expected 'replace' with filter={self.filter!r} and scope={self.scope!r}: a "
                             "subset is one of a prompt's ranks")  # fmt: skip


# -- filters ----------------------------------------------------------------------------------------------------------


class Ranked:
    """Completions by prompt and reward.

    :param reward: ``[N]``. :param group: ``[N]``, equal numbers are completions of one prompt.
    """

    def __init__(self, reward: Tensor, group: Tensor) -> None:
        groups = Groups(group)
        self.group = groups.index
        self.count = groups.count.long()
        """``[Q]``: completions of each prompt."""
        best_first = reward.argsort(descending=True, stable=True)
        self.order = best_first[groups.index[best_first].argsort(stable=True)]
        """``[N]``: columns, by prompt and in it by reward, the best first; of equal ones the first."""
        start = self.count.cumsum(0) - self.count
        place = torch.arange(len(reward), device=reward.device) - start[groups.index[self.order]]
        self.rank = torch.empty_like(self.order).scatter_(0, self.order, place)
        """``[N]``: 0 for the best of a prompt."""

    def table(self, x: Tensor) -> Tensor:
        """``[Q, W]``: ``x`` ``[N]`` with a prompt's completions in a row, the best first, 0 beyond them."""
        width = int(self.count.max())
        return x.new_zeros(len(self.count), width).index_put((self.group, self.rank), x)


def rank_weights(ranked: Ranked, kind: Filter, reward: Tensor | None = None, power: float = 2.0) -> Tensor:
    """``[N]`` float64, 1 together in every prompt: with what probability a draw from the prompt is this completion."""
    n, rank = ranked.count[ranked.group].double(), ranked.rank
    if kind == "power":
        assert reward is not None
        size = reward.double().abs().pow(power) + 1e-8
        return size / Groups(ranked.group).sum(size)[ranked.group]
    first, last = (rank == 0).double(), (rank == n - 1).double()
    if kind == "best":
        return first
    if kind == "best_worst":
        return (first + last) / 2.0
    if kind == "best_random":
        return torch.where(n == 1, 1.0, torch.where(rank == 0, 0.5, 0.5 / (n - 1.0).clamp_min(1.0)))
    return 1.0 / n


def batch_weights(reward: Tensor, kind: Filter, power: float = 2.0) -> Tensor:
    """``[N]`` float64, 1 together: the released code's weights over the whole rollout."""
    best, worst = reward == reward.max(), reward == reward.min()
    weight = {
        "none": lambda: torch.ones_like(reward), "best": lambda: best, "best_worst": lambda: best | worst,
        "best_random": lambda: torch.where(best, 0.4, 0.1), "power": lambda: reward.double().abs().pow(power),
    }[kind]().double() + 1e-8  # fmt: skip
    return weight / weight.sum()


def draw(ranked: Ranked, weight: Tensor, generator: Generator | None) -> Tensor:
    """``[N]`` columns, of every prompt as many as it has completions, with replacement and probabilities ``weight``."""
    table = ranked.table(weight)
    rank = torch.multinomial(table, table.shape[1], replacement=True, generator=generator)
    start = (ranked.count.cumsum(0) - ranked.count).unsqueeze(1)
    wanted = torch.arange(table.shape[1], device=table.device) < ranked.count.unsqueeze(1)
    return ranked.order[(start + rank)[wanted]]


def subset(ranked: Ranked, kind: Filter, generator: Generator | None) -> Tensor:
    """Columns in their order, each at most once: the best, with the worst or a random other."""
    if not SUBSET[kind]:
        return torch.arange(len(ranked.rank), device=ranked.rank.device)
    count = ranked.count
    other = count - 1
    if kind == "best_random":
        uniform = torch.rand(count.shape, generator=generator, device=count.device, dtype=torch.float64)
        other = (1 + (uniform * (count - 1)).long()).minimum(count - 1)
    keep = ranked.rank == 0
    if SUBSET[kind] == 2:
        keep = keep | (ranked.rank == other[ranked.group])
    return keep.nonzero().squeeze(-1)


def reliability(
    reward: Tensor, score: Tensor, group: Tensor, *, bins: int = 0, power: float = 2.0
) -> Mapping[Filter, float]:
    """R^2 of the best line from rewards to true scores, among what each filter draws: which filter to take.

    :param reward, score, group: ``[N]`` of completions with known scores.
    :param bins: the line goes through the means of so many bins of equally many completions with similar rewards; 0:
        through the completions themselves (R^2 is then the squared correlation).
    :raises ValueError: fewer than two bins.
    """
    if bins == 1 or bins < 0:
        raise ValueError(f"bins: expected 0 or at least 2, got {bins}")
    ranked = Ranked(reward, group)
    return {kind: _r_squared(reward, score, rank_weights(ranked, kind, reward, power), bins) for kind in FILTERS}


def _r_squared(x: Tensor, y: Tensor, weight: Tensor, bins: int) -> float:
    x, y = x.double(), y.double()
    if bins:
        order = x.argsort(stable=True)
        share = weight[order].cumsum(0) / weight.sum()
        label = torch.empty_like(order).scatter_(0, order, (share * bins - 1e-9).long().clamp(0, bins - 1))
        groups = Groups(label)
        total = groups.sum(weight)
        x, y = groups.sum(weight * x) / total, groups.sum(weight * y) / total
        weight = total
    weight = weight / weight.sum()
    x, y = x - weight @ x, y - weight @ y
    return float((weight @ (x * y)).square() / ((weight @ x.square()) * (weight @ y.square())))


# -- recipe -----------------------------------------------------------------------------------------------------------


class PFPPORecipe(PPORecipe):
    """PPO on a filtered rollout."""

    config: PFPPOConfig

    def stages(self) -> tuple[Stage, ...]:
        """Up to the filter."""
        return (self.advantage,)

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        """``sampled``: all completions with their advantages; ``on``: what is drawn, standardised."""
        found = super().prepare(have, ctx)
        columns = self.filtered(found["on"], ctx.generator)
        drawn = found["on"].take(columns).derive_sequence(drawn=columns)
        return have | {"sampled": found["on"], "on": Standardise()(drawn) if self.config.whiten else drawn}

    def filtered(self, data: Data, generator: Generator | None) -> Tensor:
        """The columns that are trained on."""
        c, reward = self.config, data["episode_reward"]
        if c.scope == "batch":
            weight = batch_weights(reward, c.filter, c.power)
            return torch.multinomial(weight, len(weight), replacement=True, generator=generator)
        ranked = Ranked(reward, data["group"])
        if c.sampling == "subset":
            return subset(ranked, c.filter, generator)
        return draw(ranked, rank_weights(ranked, c.filter, reward, c.power), generator)

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """``filtered_share``: how many of the completions were drawn at least once; ``filtered_reward``: what was drawn
        was rewarded with, on average."""
        on, sampled = data["on"], data["sampled"]
        stats |= {
            "filtered_share": torch.tensor(torch.unique(on["drawn"]).numel() / sampled.shape[1]),
            "filtered_reward": on["episode_reward"].mean(),
        }


PFPPO = LLMMethod(
    "pf_ppo",
    "Zhang et al. 2025, arXiv 2409.06957",
    PFPPOConfig,
    PFPPORecipe,
    {
        "reward": "k1 per token",
        "advantage": "reward to go - group mean",
        "data": "completions drawn by rank, then whitened",
        "ratio": "token",
        "loss": "clip",
        "aggregate": "token mean",
    },
)
"""Policy Filtration for PPO (Zhang et al. 2025): best and random, best and worst, or powers of the reward."""
