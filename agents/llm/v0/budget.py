"""Where completions go by predicted success: the budget of a GRPO iteration, and which policy is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.llm.agent import LLMMethod
from agents.llm.v0.value import ContextLogistic, TokenStates, ValueModel
from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators.base import Context
from ccrl.estimators.groups import Groups
from ccrl.estimators.outcomes import informative
from ccrl.estimators.recipe import MethodConfig, Parts, Recipe
from ccrl.llm.budget import Solver, allocate
from ccrl.settings import Count
from ccrl.updaters import Stats

__all__ = ["V0", "V0Config", "V0Recipe", "divide", "route", "utility"]


def utility(n: Tensor, p: Tensor) -> Tensor:
    """``n (1 - p) (1 - (1 - p)^(n - 1)) = E[(n - k) 1{k >= 1}]``, k ~ Bin(n, p): convex for ``n < -2 / ln(1 - p)``, so
    greedy division of a budget is not the best one."""
    return n * (1.0 - p) * (1.0 - (1.0 - p) ** (n - 1.0).clamp_min(0.0))


def divide(p: Tensor, total: int, low: int, high: int, solver: Solver) -> Tensor:
    """Completions ``[Q]`` int64 of prompts with success rates ``p`` ``[Q]``, ``total`` together, by ``utility``:
    exactly (dp), or one after another to the largest next gain (greedy, as published).

    :raises ValueError: bounds that no division of ``total`` can keep.
    """
    if solver == "dp":
        return allocate(p, total, low, high, utility, "dp")
    allocate(p, total, low, high, utility)  # says what does not fit; its greedy order is that of concave values
    n = torch.arange(low, high + 1, dtype=torch.float64, device=p.device)
    gain = utility(n, p.double().unsqueeze(1)).diff(dim=1)
    gain = F.pad(gain, (0, 1), value=-torch.inf)  # a full one gains nothing
    taken, rows = torch.zeros(len(p), dtype=torch.int64, device=p.device), torch.arange(len(p), device=p.device)
    for _ in range(total - low * len(p)):
        taken[gain[rows, taken].argmax()] += 1
    return low + taken


def route(
    value: Any, query: Tensor, query_mask: Tensor, contexts: Sequence[tuple[Tensor, Tensor, Tensor]],
    cost: Sequence[float], beta: float = 1.0,
) -> Tensor:  # fmt: skip
    """Which of the policies to ask, ``[Q]`` int64, for prompts ``[Q, L, d]``.

    :param contexts: of every policy: states ``[N, L, d]``, mask ``[N, L]``, rewards ``[N]``.
    :param cost: of every policy, in [0, 1]. :param beta: weight of success; 1 minus it is that of cheapness.
    :raises ValueError: other numbers of policies and costs, or numbers outside [0, 1].
    """
    if len(contexts) != len(cost) or not contexts:
        raise ValueError(f"cost: expected one number per policy ({len(contexts)}), got {len(cost)}")
    if not all(0.0 <= c <= 1.0 for c in (*cost, beta)):
        raise ValueError(f"cost, beta: expected numbers in [0, 1], got {list(cost)} and {beta}")
    said = [value.predict(states, mask, beta * reward + (1.0 - beta) * (1.0 - c), query, query_mask)
            for (states, mask, reward), c in zip(contexts, cost)]  # fmt: skip
    return torch.stack(said).argmax(0)


@dataclass(frozen=True)
class V0Config(MethodConfig):
    """The published bounds of a budget; ``group_size`` is the mean number of completions per prompt."""

    value: str = "logistic"
    """Success rates are predicted by a value model in this file (torch.save of a ValueModel's state), or by logistic, a
    regression on the context that needs no training."""
    embedding_width: Count = 32
    """A token of a prompt has a fixed random vector of this size, in place of a text embedding."""
    context_size: Count = 256
    """So many of the latest outcomes of the policy are its context."""
    context_needed: Count = 16
    """With fewer outcomes than this every prompt gets group_size completions."""
    min_rollouts: Count = 2
    """Every prompt gets at least this many completions."""
    max_rollouts: Count = 128
    """No prompt gets more completions than this."""
    solver: Literal["greedy", "dp"] = "greedy"
    """The budget is divided by the largest next gain (greedy, as published), or exactly (dp)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.min_rollouts <= self.group_size <= self.max_rollouts:
            raise ValueError(f"group_size: expected min_rollouts to max_rollouts, {self.min_rollouts} to "
                             f"{self.max_rollouts}, got {self.group_size}")  # fmt: skip
        if self.context_needed > self.context_size:
            raise ValueError(f"context_needed: expected at most context_size = {self.context_size}, got "
                             f"{self.context_needed}")  # fmt: skip


class V0Recipe(Recipe):
    """GRPO with counts per prompt from predicted success rates."""

    config: V0Config

    def __init__(self, config: Any, parts: Parts) -> None:
        if parts.request.counts is None:
            raise ValueError("v0 divides completions among prompts that it reads; starts of control episodes have "
                             "none: choose another method or a text task")  # fmt: skip
        super().__init__(config, parts)
        self.embedding = TokenStates(config.embedding_width)
        self.value: Any = self.make_value()
        self._seen: list[tuple[list[int], float]] = []
        self._said: Tensor | None = None

    def make_value(self) -> nn.Module:
        """What predicts; override it for one of your own."""
        c = self.config
        if c.value == "logistic":
            return ContextLogistic()
        if not Path(c.value).is_file():
            raise FileNotFoundError(
                f"value: expected 'logistic' or a file with the state of a ValueModel, got {c.value!r}"
            )
        model = ValueModel(c.embedding_width)
        try:
            model.load_state_dict(torch.load(c.value, weights_only=True))
        except (RuntimeError, AttributeError, TypeError, UnpicklingError) as error:
            raise ValueError(f"value: expected the state of a ValueModel({c.embedding_width}) in {c.value!r}, as "
                             "embedding_width says; it has another one") from error  # fmt: skip
        return model.requires_grad_(False)

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        """:raises ValueError: without prompts to divide the budget among (``ctx.prompts``)."""
        c = self.config
        if have:
            return []
        if ctx.prompts is None:
            raise ValueError("it divides completions among prompts that it sees first, and there are none in "
                             "ctx.prompts")  # fmt: skip
        self._said = None
        if len(self._seen) < c.context_needed:
            return [replace(self.parts.request, prompts=ctx.prompts)]
        self._said = self.predict(ctx.prompts.tokens, ctx.prompts.valid)
        total = c.group_size * len(self._said)
        counts = divide(self._said, total, c.min_rollouts, c.max_rollouts, c.solver)
        return [replace(self.parts.request, counts=counts, prompts=ctx.prompts)]

    def predict(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Success rates ``[Q]`` of the current policy on prompts ``[Q, P]``."""
        width = max(len(row) for row, _ in self._seen)
        rows = [[-1] * (width - len(row)) + row for row, _ in self._seen]
        seen = torch.tensor(rows, device=tokens.device)
        mask = (seen >= 0).to(valid.dtype)
        labels = torch.tensor([rate for _, rate in self._seen], device=tokens.device, dtype=valid.dtype)
        context = self.embedding(seen, mask)
        found: Tensor = self.value.predict(context, mask, labels, self.embedding(tokens, valid), valid)
        return found.clamp(0.0, 1.0)

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """The context grows by what was sampled, one success rate per prompt."""
        sampled = data["sampled"]
        groups = Groups(sampled["group"])
        first = torch.full_like(groups.count, len(groups.index), dtype=torch.int64).scatter_reduce(
            0, groups.index, torch.arange(len(groups.index), device=groups.index.device), "amin"
        )
        rate = groups.mean((sampled["reward_components"][:, 0] >= 1.0).double())
        stats |= {
            "effective_share": informative(sampled).double().mean(), "largest_budget": groups.count.max(),
            "median_budget": groups.count.median(),
        }  # fmt: skip
        if self._said is not None and len(self._said) == len(rate):
            stats["value_error"] = (self._said.double() - rate).abs().mean()
        tokens, here = sampled["prompt"][first], sampled["prompt_valid"][first] > 0
        shown = [[t for t, v in zip(*row) if v] for row in zip(tokens.tolist(), here.tolist())]
        self._seen = [*self._seen, *zip(shown, rate.tolist())][-self.config.context_size :]

    def get_extra_state(self) -> dict[str, Any]:
        return {"prompts": [row for row, _ in self._seen], "rates": [rate for _, rate in self._seen]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._seen = list(zip((list(map(int, row)) for row in state["prompts"]), map(float, state["rates"])))


V0 = LLMMethod(
    "v0",
    "Zhang et al. 2026, arXiv 2602.03584",
    V0Config,
    V0Recipe,
    {"plan": "completions per prompt by predicted success", "advantage": "group z-score", "ratio": "token",
     "loss": "clip", "aggregate": "token mean"},
)  # fmt: skip
"""A generalist value model at state zero (Zhang et al. 2026), as the budget of GRPO."""
