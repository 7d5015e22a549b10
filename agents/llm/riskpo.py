"""RiskPO: Risk-based Policy Optimization (Ren et al. 2025, arXiv 2510.00911; code RTkenny/RiskPO).

Rewards of ``B`` questions are summed to bundle rewards, and the mean is replaced by a mixture of quantile bands:

    J    = (1 + omega) int_0^alpha F^-1(u) du + int_alpha^beta F^-1(u) du
    A(R) = -(1 + omega) (q_a - R)^+ + clip(R, q_a, q_b) - q_b,       grad J = E[A(R) grad log pi]
    q_s <- q_s + lr (s - share of the rollout's bundles with R < q_s),  s = alpha, beta
    loss = -min(s A, clip(s) A), s = (pi / pi_old)^(1 / length), mean over sequences

``A <= 0``, and 0 from ``q_b`` on: hard questions weigh more, solved ones nothing. A bundle takes one response of each
of its questions, so that every response is in one bundle, and all members share the bundle's advantage.

The released code weighs the bands otherwise, spreads the advantage over the members and has a token ratio
(``form="released"`` and the fields below it). Reads ``episode_reward``, ``group``, ``valid``, ``log_prob``: episodes of
control
tasks do as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators import aggregates, ratios
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.groups import Groups, per_step
from ccrl.estimators.recipe import MethodConfig, Parts, Recipe
from ccrl.estimators.stages import with_episode_reward
from ccrl.estimators.terms import Term
from ccrl.settings import Count, Nonnegative, Unit
from ccrl.updaters import Stats

__all__ = [
    "RiskPO", "RiskPOConfig", "RiskPORecipe", "bundled", "credit", "released_advantage", "risk_advantage", "track",
]  # fmt: skip


@dataclass(frozen=True)
class RiskPOConfig(MethodConfig):
    """The paper's setting. Its clip range is not known."""

    alpha: Unit = 0.2
    """Scores below this quantile weigh more."""
    beta: Unit = 0.8
    """Scores above this quantile do not matter."""
    omega: Nonnegative = 0.5
    """The lowest band has this extra weight."""
    bundle: Count = 5
    """B: a bundle has this many questions, fewer where the rollout has fewer. Prompts that do not fill a bundle are
    dropped, at random."""
    quantiles: Literal["track", "bundle"] = "track"
    """Quantiles are kept between iterations (track, the paper), or are those of the rewards of the same B questions
    (bundle: what the released trainer falls back to)."""
    quantile_lr: Nonnegative = 0.1
    """The tracked quantiles move with this step size."""
    form: Literal["paper", "released"] = "paper"
    """The advantage is the gradient of J (paper), or averages the bands over their widths (released)."""
    band_weight: Nonnegative = 1.5
    """With form released, the lowest band has this weight, over 1 for the other."""
    natural: bool = False
    """With form released, the band from alpha to beta is shifted so that its advantage is 0 from q_b on."""
    standardise: bool = False
    """Advantages are divided by the deviation of the rewards of the same B questions (released)."""
    credit: Literal["uniform", "std", "sum_mean", "correctness"] = "uniform"
    """A member gets all the bundle's advantage (uniform), that over its question's deviation (std), by how far it is
    above its question's mean (sum_mean), or half of it if right and one and a half if not (correctness)."""
    level: Literal["sequence", "token"] = "sequence"
    """The ratio is the sequence's (the paper, a mean over sequences) or the token's (released, the configured
    aggregate)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.alpha < self.beta <= 1.0:
            raise ValueError(f"expected 0 < alpha < beta <= 1, got {self.alpha}, {self.beta}")


# -- bundles --------------------------------------------------------------------------------------------------------


def bundled(data: Data, size: int, generator: Generator | None) -> Data:
    """Every column in one bundle: ``bundle_reward`` ``[N]`` its sum of rewards, ``bundle`` ``[N]`` its number, and
    ``questions`` ``[N]`` the number of the set of ``size`` questions that it is of. A set of groups of ``G`` has ``G``
    bundles. Groups that do not fill a set are left out.

    :param generator: decides which questions and which of their responses go together; None: in their order.
    :raises ValueError: if the groups are not of one size.
    """
    groups = Groups(data["group"])
    count = groups.count.long()
    if bool((count != count[0]).any()):
        raise ValueError(f"bundles need as many responses to each question; got groups of {count.unique().tolist()}")
    n, device = len(count), count.device
    size = min(size, n)
    responses = groups.index.argsort(stable=True).view(n, -1)
    if generator is not None:
        responses = responses[torch.randperm(n, generator=generator, device=device)]
        keys = torch.rand(responses.shape, generator=generator, device=device)
        responses = responses.gather(1, keys.argsort(1))
    sets = n // size
    responses = responses[: sets * size].view(sets, size, -1)
    total = data["episode_reward"][responses].sum(1, keepdim=True)
    questions = torch.arange(sets, device=device).view(-1, 1, 1)
    number = questions * total.shape[2] + torch.arange(total.shape[2], device=device)

    def spread(values: Tensor) -> Tensor:  # [sets, 1, ...] -> [N]
        out = values.new_zeros(data.shape[1])
        out[responses.flatten()] = values.expand_as(responses).flatten()
        return out

    data = data.derive_sequence(bundle_reward=spread(total), bundle=spread(number), questions=spread(questions))
    return data if sets * size == n else data.take(responses.flatten().sort().values)


def bundle_rewards(data: Data) -> Tensor:
    """``[M]`` float64: one reward per bundle."""
    return Groups(data["bundle"]).mean(data["bundle_reward"])


def _per_set(data: Data) -> Tensor:
    """``[sets, G]`` float64: the rewards of the bundles of each set of questions, in the order of their numbers."""
    return bundle_rewards(data).view(int(data["questions"].max()) + 1, -1)


# -- advantage ------------------------------------------------------------------------------------------------------


def risk_advantage(reward: Tensor, low: Tensor, high: Tensor, omega: float) -> Tensor:
    """``A(R)`` of the paper at quantiles ``low <= high``."""
    return -(1.0 + omega) * (low - reward).clamp_min(0.0) + reward.clamp(low, high) - high


def released_advantage(
    reward: Tensor, low: Tensor, high: Tensor, alpha: float, beta: float, weight: float = 1.5, natural: bool = False
) -> Tensor:
    """``(w cvar + rvar) / (w + 1)``, both bands divided by their widths."""
    band = reward.clamp(low, high) - (high if natural else low)
    tail = -(low - reward).clamp_min(0.0)
    return (weight * tail / (alpha + 1e-6) + band / (beta - alpha + 1e-6)) / (weight + 1.0)


def credit(mode: str, reward: Tensor, group: Tensor, bundle: Tensor) -> Tensor:
    """``[N]``: what share of its bundle's advantage a response gets, from rewards, groups (questions) and bundles
    ``[N]``."""
    if mode == "uniform":
        return torch.ones_like(reward, dtype=torch.float64)
    if mode == "correctness":
        return torch.where(reward >= 1.0, 0.5, 1.5).double()
    groups = Groups(group)
    above = reward.double() - groups.mean(reward)[groups.index]
    if mode == "std":
        std = (groups.sum(above.square()) / (groups.count - 1.0).clamp_min(1.0)).sqrt()[groups.index]
        return torch.where(std > 1e-3, 1.0 / std, 1.0)
    bundles = Groups(bundle)
    total, members = bundles.sum(above)[bundles.index], bundles.count[bundles.index]
    some = total.abs() > 1e-6
    return torch.where(some, above / torch.where(some, total, 1.0), 1.0 / members)


def track(quantiles: Tensor, levels: Tensor, reward: Tensor, lr: float) -> Tensor:
    """One step of stochastic approximation of the quantiles ``[K]`` at ``levels`` ``[K]``, from rewards ``[M]``."""
    below = (reward.unsqueeze(0) < quantiles.unsqueeze(1)).double().mean(1)
    return quantiles + lr * (levels - below)


# -- recipe ---------------------------------------------------------------------------------------------------------


class RiskPORecipe(Recipe):
    """Bundles, tracked quantiles, the risk measure's advantage, a clipped sequence ratio."""

    levels: Tensor
    quantiles: Tensor
    started: Tensor

    def __init__(self, config: Any, parts: Parts) -> None:
        super().__init__(config, parts)
        # "levels" is no state, yet must follow the device
        self.register_buffer("levels", torch.tensor([config.alpha, config.beta], dtype=torch.float64), persistent=False)
        self.register_buffer("quantiles", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def start(self, data: Data, ctx: Context) -> Data:
        """The generator decides the bundles; then ``episode_reward`` and ``ref_log_prob`` as everywhere."""
        return super().start(bundled(with_episode_reward(data), self.config.bundle, ctx.generator), ctx)

    def stages(self) -> tuple[Stage, ...]:
        return (self.advantage,)

    def advantage(self, data: Data) -> Data:
        """``advantage`` ``[T, N]`` and ``sequence_advantage`` ``[N]``."""
        c, reward = self.config, data["bundle_reward"].double()
        low, high = self.current(data)
        if c.form == "paper":
            found = risk_advantage(reward, low, high, c.omega)
        else:
            found = released_advantage(reward, low, high, c.alpha, c.beta, c.band_weight, c.natural)
        if c.standardise:
            table = _per_set(data)
            # released: divides by 1e-6 where the rewards are equal
            constant = table.amax(1) == table.amin(1)
            found = found / torch.where(constant, 1.0, table.std(1) + 1e-6)[data["questions"]]
        found = found * credit(c.credit, data["episode_reward"], data["group"], data["bundle"])
        return per_step(data.derive_sequence(sequence_advantage=found.to(data["episode_reward"].dtype)), found)

    def current(self, data: Data) -> tuple[Tensor, Tensor]:
        """The quantiles that this rollout's rewards are compared with, 0-d or ``[N]``; trackers that have crossed are
        put in order."""
        if self.config.quantiles == "bundle":
            found = torch.quantile(_per_set(data), self.levels, dim=1)[:, data["questions"]]
            return found[0], found[1]
        first = torch.quantile(bundle_rewards(data), self.levels)
        low, high = torch.where(self.started, self.quantiles, first).sort().values
        return low, high

    def terms(self) -> tuple[Term, ...]:
        if self.config.level == "token":
            return (self.policy_term(self.loss()), *self.penalties())
        term = self.policy_term(
            self.loss(), ratios.sequence, aggregates.sequence_mean, advantage="sequence_advantage"
        )  # fmt: skip
        return (term, *self.penalties())

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """The trackers move after they were used: to the first rollout's quantiles, then step by step."""
        rewards = bundle_rewards(data["on"])
        moved = track(self.quantiles, self.levels, rewards, self.config.quantile_lr)
        self.quantiles.copy_(torch.where(self.started, moved, torch.quantile(rewards, self.levels)))
        self.started.fill_(True)
        stats |= {
            "bundle_reward": rewards.mean(), "quantile_low": self.quantiles[0].clone(),
            "quantile_high": self.quantiles[1].clone(),
            "ignored_share": (data["on"]["sequence_advantage"] == 0).double().mean(),
        }  # fmt: skip


RiskPO = LLMMethod(
    "riskpo",
    "Ren et al. 2025, arXiv 2510.00911",
    RiskPOConfig,
    RiskPORecipe,
    {
        "data": "bundles of questions",
        "advantage": "mixed range value at risk, tracked quantiles",
        "ratio": "sequence mean",
        "loss": "clip",
        "aggregate": "sequence mean",
    },
    {"n_prompts": 20},
)
"""Risk-based Policy Optimization (Ren et al. 2025): low quantiles of the rewards of bundles of questions."""
