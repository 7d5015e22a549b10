"""Knapsack RL: a budget of rollouts divided among prompts (Li et al. 2025, arXiv 2509.25849).

A group whose completions are all right or all wrong has no GRPO gradient. With ``p_i`` the success rate of prompt ``i``
so far, its number of completions ``N_i`` is the solution of

    max  sum_i (1 - p_i^N_i - (1 - p_i)^N_i) p_i (1 - p_i)^2      P(gradient) times what it is worth
    s.t. sum_i N_i = prompts * n,  low <= N_i <= high

Prompts without enough history get ``n`` (so the first epoch is uniform), those always or never solved a minimum. What
the others have no use for, ``N_alpha = ln(1 - alpha) / ln max(p, 1 - p)`` or ``1 / (p (1 - p)) - 1`` each, goes to
those never solved. Groups then differ in size: advantages are ``(r - mean) / std`` of each group, cut at +-5; the loss
is DAPO's clip, a token mean. Slot: plan = counts per prompt.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from agents.llm.agent import LLMMethod
from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.groups import Groups
from ccrl.estimators.outcomes import informative
from ccrl.estimators.recipe import ClipHigh, MethodConfig, Parts, Recipe
from ccrl.estimators.terms import Term
from ccrl.llm.budget import allocate, gradient_value, knapsack, spread
from ccrl.settings import Count, Natural, Positive, Range
from ccrl.updaters import Stats

__all__ = ["KnapsackRL", "KnapsackRLConfig", "KnapsackRLRecipe", "SuccessStats", "divide", "needed"]


@dataclass(frozen=True)
class KnapsackRLConfig(MethodConfig):
    """The released settings; ``group_size`` is the mean number of completions per prompt."""

    batch_size: Natural = 256
    """An optimiser step takes this many sequences, an eighth of the published rollout; 0 takes all of it."""
    clip_high: ClipHigh = 0.28
    min_rollouts: Count = 2
    """A prompt solved sometimes gets at least this many completions."""
    max_rollouts: Count = 128
    """No prompt gets more completions than this."""
    unsolved_rollouts: Count = 2
    """A prompt never solved so far gets this many completions, and what the others have no use for."""
    solved_rollouts: Count = 2
    """A prompt always solved so far gets this many completions."""
    history_size: Count = 16
    """Success rates are those of the latest visit, or of this many latest completions where it had fewer."""
    history_needed: Count = 8
    """A prompt with fewer completions so far than this gets group_size of them."""
    cost: Literal["probability", "expectation"] = "probability"
    """A prompt has use for as many completions as give both outcomes with the probability cost_confidence
    (probability), or as are tried until both were seen, on average (expectation)."""
    cost_confidence: Annotated[float, Range(0.0, 1.0, above=True, below=True)] = 0.9
    """With cost = probability both outcomes are seen with this probability."""
    objective: Literal["paper", "released"] = "paper"
    """The sum of the values is made largest (paper), or the released code's sum, which counts a prompt's minimum for
    nothing and its further completions in full (for comparison)."""
    prompt_weight: Literal["rollouts", "equal"] = "rollouts"
    """A prompt weighs in the loss as its completions do (rollouts), or as every other prompt (equal)."""
    advantage_clip: Positive = 5.0
    """Advantages stay within plus and minus this number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = max(self.min_rollouts, self.unsolved_rollouts, self.solved_rollouts)
        if not least <= self.group_size <= self.max_rollouts:
            raise ValueError(
                "group_size: expected at least min_rollouts, unsolved_rollouts and solved_rollouts (the budget would "
                f"not reach for the minima) and at most max_rollouts, got {self.group_size} with "
                f"{self.min_rollouts}, {self.unsolved_rollouts}, {self.solved_rollouts} and {self.max_rollouts}"
            )


# -- what is known of a prompt ----------------------------------------------------------------------------------------


class SuccessStats(nn.Module):
    """Outcomes per prompt: the latest ones, how many there were, the latest visit's share of successes.

    Prompts appear as training goes on, so they are no buffers of fixed shape; the checkpoint holds them as the module's
    extra state.

    :param size: outcomes that an estimate looks back on. :param needed: outcomes before there is one.
    """

    def __init__(self, size: int = 16, needed: int = 8) -> None:
        super().__init__()
        self.size, self.needed = size, needed
        self._latest: dict[int, deque[int]] = {}
        self._rate: dict[int, float] = {}
        self._count: dict[int, int] = {}

    def update(self, prompt: int, rewards: list[float]) -> None:
        """One visit: the rewards of its completions, of which those of 1 and more are successes."""
        outcomes = [int(reward >= 1.0) for reward in rewards]
        if not outcomes:
            return
        latest = self._latest.setdefault(prompt, deque(maxlen=self.size))
        latest.extend(outcomes)
        looked_at = outcomes if len(outcomes) >= self.size else list(latest)
        self._rate[prompt] = sum(looked_at) / len(looked_at)
        self._count[prompt] = self._count.get(prompt, 0) + len(outcomes)

    def state(self, prompt: int) -> tuple[bool, float, int]:
        """Whether there is enough to go by, the success rate (0 without any outcome), the number of outcomes."""
        count = self._count.get(prompt, 0)
        return count >= self.needed, self._rate.get(prompt, 0.0), count

    def states(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """``[Q]`` bool and ``[Q]`` float64 of the prompts ``[Q]``: enough to go by, success rate."""
        found = [self.state(prompt) for prompt in prompts.tolist()]
        known = torch.tensor([f[0] for f in found], device=prompts.device)
        return known, torch.tensor([f[1] for f in found], dtype=torch.float64, device=prompts.device)

    def get_extra_state(self) -> dict[str, Tensor]:
        names = list(self._latest)
        latest = [[*self._latest[name], *[-1] * (self.size - len(self._latest[name]))] for name in names]
        with torch.device("cpu"):
            return {
                "prompt": torch.tensor(names, dtype=torch.int64),
                "latest": torch.tensor(latest, dtype=torch.int8).view(len(names), self.size),
                "rate": torch.tensor([self._rate[name] for name in names], dtype=torch.float64),
                "count": torch.tensor([self._count[name] for name in names], dtype=torch.int64),
            }

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        names = state["prompt"].tolist()
        rows = [[x for x in row if x >= 0] for row in state["latest"].tolist()]
        self._latest = {name: deque(row, maxlen=self.size) for name, row in zip(names, rows, strict=True)}
        self._rate = dict(zip(names, state["rate"].tolist(), strict=True))
        self._count = dict(zip(names, state["count"].tolist(), strict=True))


# -- how the budget is divided ----------------------------------------------------------------------------------------


def needed(p: Tensor, cost: str = "probability", confidence: float = 0.9) -> Tensor:
    """Completions (a real number) that a prompt with success rate ``0 < p < 1`` has use for."""
    if cost == "expectation":
        return 1.0 / (p * (1.0 - p)) - 1.0
    return math.log(1.0 - confidence) / torch.maximum(p, 1.0 - p).log()


def divide(config: KnapsackRLConfig, known: Tensor, rate: Tensor) -> Tensor:
    """Completions ``[Q]`` int64 per prompt, ``group_size * Q`` together.

    :param known: ``[Q]`` bool, whether the prompt has enough history. :param rate: ``[Q]`` float64, its success rate.
    """
    c = config
    total = c.group_size * len(rate)
    unsolved, sometimes = known & (rate <= 0.0), known & (rate > 0.0) & (rate < 1.0)
    counts = torch.full(rate.shape, c.group_size, dtype=torch.int64, device=rate.device)
    counts[unsolved], counts[known & (rate >= 1.0)], counts[sometimes] = (
        c.unsolved_rollouts, c.solved_rollouts, c.min_rollouts
    )  # fmt: skip
    if not bool((unsolved | sometimes).any()):
        return torch.full_like(counts, c.group_size)
    others = unsolved if bool(unsolved.any()) else ~sometimes
    wanted = int(needed(rate[sometimes], c.cost, c.cost_confidence).clamp_max(c.max_rollouts).long().sum())
    counts = spread(counts, others, total - int(counts.sum()) - wanted, c.max_rollouts)
    room = int(sometimes.sum()) * (c.max_rollouts - c.min_rollouts)
    units = min(total - int(counts.sum()), room)
    if units:
        counts[sometimes] = _solve(c, rate[sometimes], units)
    for rest in (unsolved, torch.ones_like(unsolved)):  # where everybody solved sometimes is full
        counts = spread(counts, rest, total - int(counts.sum()), c.max_rollouts)
    assert int(counts.sum()) == total, f"{counts.tolist()} do not sum to {total}"
    return counts


def _solve(c: KnapsackRLConfig, rate: Tensor, units: int) -> Tensor:
    if c.objective == "paper":
        total = c.min_rollouts * len(rate) + units
        return allocate(rate, total, c.min_rollouts, c.max_rollouts, gradient_value)
    n = torch.arange(c.min_rollouts, c.max_rollouts + 1, dtype=torch.float64, device=rate.device)
    table = gradient_value(n, rate.unsqueeze(1))
    table[:, 0] = 0.0
    return c.min_rollouts + knapsack(table, units)


# -- recipe -----------------------------------------------------------------------------------------------------------


class KnapsackRLRecipe(Recipe):
    """Counts per prompt before anything is written; groups of any size after."""

    config: KnapsackRLConfig

    def __init__(self, config: Any, parts: Parts) -> None:
        if parts.request.counts is None:
            raise ValueError("knapsack_rl divides completions among prompts that come again; starts of control "
                             "episodes do not: choose another method or a text task")  # fmt: skip
        super().__init__(config, parts)
        self.history = SuccessStats(config.history_size, config.history_needed)

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        """:raises ValueError: without prompts to divide the budget among (``ctx.prompts``)."""
        if have:
            return []
        if ctx.prompts is None:
            raise ValueError("it divides completions among prompts that it sees first, and there are none in "
                             "ctx.prompts")  # fmt: skip
        counts = divide(self.config, *self.history.states(ctx.prompts.index))
        return [replace(self.parts.request, counts=counts, prompts=ctx.prompts)]

    def stages(self) -> tuple[Stage, ...]:
        return (*super().stages(), self.weigh)

    def weigh(self, data: Data) -> Data:
        """``advantage`` ``[T, N]`` within its bounds; ``prompt_weight`` ``[N]``, of mean 1 over the rollout."""
        bound, valid = self.config.advantage_clip, data["valid"]
        size = valid.sum(0) if self.config.aggregate == "token_mean" else (valid.sum(0) > 0).to(valid.dtype)
        weight = torch.ones_like(size)
        if self.config.prompt_weight == "equal":
            groups = Groups(data["group"])
            per_prompt = groups.sum(size)
            share = size.sum().double() / (per_prompt > 0).sum() / per_prompt.clamp_min(1.0)
            weight = share[groups.index].to(weight.dtype)
        return data.derive(advantage=data["advantage"].clamp(-bound, bound)).derive_sequence(prompt_weight=weight)

    def terms(self) -> tuple[Term, ...]:
        return (replace(self.policy_term(self.loss()), weight="prompt_weight"), *self.penalties())

    def fit(self, have: dict[str, Data], ctx: Context) -> Stats:
        """The history grows by what was sampled. Of the division: share of the completions in groups with both
        outcomes, largest and median count, share given to prompts never solved, mean error of the estimated rates."""
        sampled = have["on"]
        groups = Groups(sampled["group"])
        first = torch.full_like(groups.count, len(groups.index), dtype=torch.int64).scatter_reduce(
            0, groups.index, torch.arange(len(groups.index), device=groups.index.device), "amin"
        )
        prompts = sampled["index"][first]
        known, rate = self.history.states(prompts)
        right = sampled["reward_components"][:, 0]
        stats = {
            "effective_share": informative(sampled).double().mean(),
            "largest_budget": groups.count.max(), "median_budget": groups.count.median(),
            "unsolved_share": groups.count[known & (rate <= 0.0)].sum() / groups.count.sum(),
        }  # fmt: skip
        if bool(known.any()):
            found = groups.mean((right >= 1.0).double())
            stats["rate_error"] = (found - rate)[known].abs().mean()
        order, sizes = groups.index.argsort(stable=True), groups.count.long().tolist()
        for prompt, rewards in zip(prompts.tolist(), torch.split(right[order], sizes), strict=True):
            self.history.update(prompt, rewards.tolist())
        return stats


KnapsackRL = LLMMethod(
    "knapsack_rl",
    "Li et al. 2025, arXiv 2509.25849",
    KnapsackRLConfig,
    KnapsackRLRecipe,
    {
        "plan": "completions per prompt by a knapsack over success rates",
        "advantage": "group z-score, cut",
        "ratio": "token",
        "loss": "clip, higher above",
        "aggregate": "token mean",
    },
    {"n_prompts": 256},
)
"""Knapsack RL (Li et al. 2025): rollouts go where a gradient is probable and worth something."""
