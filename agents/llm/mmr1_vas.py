"""MMR1's variance-aware sampling of prompts (Leng et al. 2025, "MMR1: Enhancing Multimodal Reasoning with
Variance-Aware Sampling and Open Resources", arXiv 2509.21268).

A prompt whose completions are all right or all wrong has no GRPO gradient. Every ``refresh_every`` iterations ``N``
completions of every prompt are tried; the Variance Promotion Score of a prompt is

    P(x)   = mean_i V(x, y_i)                                       pass rate
    OVS(x) = P (1 - P)                                              variance of the outcome, up to 1/4
    TDS(x) = diversity of y_1 .. y_N                                1 - self-BLEU, distinct n-grams, or edit distance
    VPS(x) = alpha OVS + beta TDS

and a batch of ``B`` prompts has ``floor(lambda B)`` drawn with replacement in proportion to VPS, the rest from a fixed
random order of all. The loss is GRPO's. Slot: data = which prompts.

Why variance: a step of size eta <= c / (4 L Gamma) raises J by at least (eta c / 4) Var_y[R(x, y)] in expectation
(theorem 1, with c a bound of the squared gradient by the variance and ``Gamma = E |grad log pi|^2``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators.base import Context
from ccrl.estimators.groups import Groups
from ccrl.estimators.recipe import MethodConfig, Parts, Recipe
from ccrl.settings import Count, Nonnegative, Unit
from ccrl.updaters import Stats

__all__ = ["MMR1", "MMR1Config", "MMR1Recipe", "distinct", "diversity", "edit_distance", "probabilities", "promotion",
           "self_bleu"]  # fmt: skip

Tokens = Sequence[int]
Diversity = Literal["self_bleu", "distinct", "edit", "similarity"]


@dataclass(frozen=True)
class MMR1Config(MethodConfig):
    """The settings of the paper's main run; its appendix has 16 probes and a refresh every 56 iterations."""

    kl_coef: Nonnegative = 0.01
    mixture: Unit = 0.5
    """lambda: this share of an iteration's prompts is drawn in proportion to the score, the rest evenly; 0 probes
    none and takes all prompts in turn."""
    outcome_weight: Nonnegative = 0.8
    """alpha: the variance of the outcome has this weight in the score."""
    diversity_weight: Nonnegative = 0.2
    """beta: the diversity of the completions has this weight in the score."""
    diversity: Diversity = "self_bleu"
    """Diversity is 1 minus self-BLEU of one to three tokens (self_bleu), the share of distinct runs of three tokens
    (distinct), the mean edit distance of two completions in tokens (edit), or, as released, self-BLEU itself
    (similarity), which favours completions that are alike."""
    probe_rollouts: Count = 32
    """N: so many completions of every prompt are tried at a refresh; they count as samples and train nothing."""
    refresh_every: Count = 35
    """Scores are computed again after this many iterations, before the prompts of the next one are chosen."""
    pool_size: Count = 512
    """There are at most this many training prompts: all of a task's list, or a fixed sample of its questions."""
    scaling: Literal["none", "min_max"] = "none"
    """Scores are taken as they are (the paper), or scaled from 0 to 1 over the prompts (released), which leaves the
    lowest out of the weighted part."""
    momentum: Unit = 0.0
    """A refresh keeps this share of the old scores; 1 keeps the first ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixture and not (self.outcome_weight or self.diversity_weight):
            raise ValueError("outcome_weight, diversity_weight: expected one of them above 0 (every score is 0 else), "
                             "got 0 and 0")  # fmt: skip


# -- diversity --------------------------------------------------------------------------------------------------------


def _runs(tokens: Tokens, n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def distinct(completions: Sequence[Tokens], n: int = 3) -> float:
    """Different runs of ``n`` tokens over all of them, in all completions together; 0 without any."""
    found: Counter[tuple[int, ...]] = Counter()
    for tokens in completions:
        found.update(_runs(tokens, n))
    return len(found) / found.total() if found else 0.0


def self_bleu(completions: Sequence[Tokens], n: int = 3) -> float:
    """Mean over completions of BLEU (Papineni et al. 2002) against the others, with equal weights on runs of 1 to ``n``
    tokens; a precision of 0 counts as 0.1 / its denominator (Chen and Cherry 2014, method 1). 0 for fewer than two."""
    if len(completions) < 2:
        return 0.0
    logs = [0.0] * len(completions)
    dead = [False] * len(completions)
    for size in range(1, n + 1):
        counts = [_runs(tokens, size) for tokens in completions]
        # the largest count of a run among the others: the largest of all, or the second where that is one's own
        top: dict[tuple[int, ...], tuple[int, int]] = {}
        for found in counts:
            for run, number in found.items():
                first, second = top.get(run, (0, 0))
                top[run] = (number, first) if number > first else (first, max(number, second))
        for i, found in enumerate(counts):
            matches = 0
            for run, number in found.items():
                first, second = top[run]
                matches += min(number, second if number == first else first)
            total = max(1, found.total())
            dead[i] |= size == 1 and matches == 0
            logs[i] += math.log((matches or 0.1) / total) / n
    lengths = [len(tokens) for tokens in completions]
    scores = []
    for i, own in enumerate(lengths):
        closest = min((abs(other - own), other) for j, other in enumerate(lengths) if j != i)[1]
        brevity = 1.0 if own > closest else math.exp(1.0 - closest / own) if own else 0.0
        scores.append(0.0 if dead[i] else brevity * math.exp(logs[i]))
    return sum(scores) / len(scores)


def edit_distance(completions: Sequence[Tokens]) -> float:
    """Mean Levenshtein distance of two completions, in tokens; 0 for fewer than two."""
    pairs = [(a, b) for i, a in enumerate(completions) for b in completions[:i]]
    return sum(_levenshtein(a, b) for a, b in pairs) / len(pairs) if pairs else 0.0


def _levenshtein(a: Tokens, b: Tokens) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def diversity(completions: Sequence[Tokens], kind: Diversity) -> float:
    """The trajectory diversity score of a prompt's completions."""
    if kind == "distinct":
        return distinct(completions)
    if kind == "edit":
        return edit_distance(completions)
    alike = self_bleu(completions)
    # rounding may take the mean of equal completions above 1
    return alike if kind == "similarity" else max(0.0, 1.0 - alike)


# -- score ------------------------------------------------------------------------------------------------------------


def promotion(rate: Tensor, tds: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha P (1 - P) + beta TDS`` of pass rates and diversities, of any shape."""
    return alpha * rate * (1.0 - rate) + beta * tds


def probabilities(score: Tensor, scaling: str = "none") -> Tensor:
    """``[P]`` with sum 1, in proportion to ``score`` ``[P]``; all alike where every score is 0."""
    if scaling == "min_max":
        score = (score - score.min()) / (score.max() - score.min() + 1e-8)
    total = score.sum()
    return torch.where(total > 0, score / torch.where(total > 0, total, 1.0), 1.0 / len(score))


# -- recipe -----------------------------------------------------------------------------------------------------------


def share_of(mixture: float, batch: int) -> int:
    """Of how many of a batch's prompts the score decides."""
    return math.floor(mixture * batch + 1e-9)  # with slack: 0.29 * 100 is 28.999999999999996


class MMR1Recipe(Recipe):
    """Probes of all prompts where scores are due, then the prompts of the iteration."""

    config: MMR1Config
    score: Tensor
    rate: Tensor
    order: Tensor
    position: Tensor

    def __init__(self, config: Any, parts: Parts) -> None:
        if parts.request.counts is None:
            raise ValueError("mmr1_vas chooses among prompts; control episodes have starts: choose another method or a "
                             "text task")  # fmt: skip
        batch = len(parts.request.counts)
        if config.mixture and not share_of(config.mixture, batch):
            raise ValueError(f"mixture: expected 0, or at least one prompt of an iteration's {batch} (else all prompts "
                             f"are probed and none is drawn by its score), got {config.mixture}")  # fmt: skip
        super().__init__(config, parts)
        self.pool = None if parts.questions is None else parts.questions(config.pool_size)
        size = 0 if self.pool is None else len(self.pool)
        self.register_buffer("score", torch.full((size,), -1.0, dtype=torch.float64))  # negative: never probed
        self.register_buffer("rate", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("order", torch.arange(size))
        self.register_buffer("position", torch.full((), -1, dtype=torch.int64))  # negative: not yet shuffled

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        """:raises ValueError: where there is no list of prompts to choose from."""
        if self.pool is None:
            raise ValueError("it chooses the prompts itself, and there is no list of them (parts.questions)")
        if "on" in have:
            return []
        c = self.config
        if c.mixture and not have and int(ctx.k) % c.refresh_every == 0:
            counts = torch.full((len(self.pool),), c.probe_rollouts, dtype=torch.int64, device=self.score.device)
            return [Request(tag="probe", prompts=self.pool, counts=counts)]
        if "probe" in have:
            self.refresh(have["probe"])
        return [replace(self.parts.request, prompts=self.pool.select(self.choose(ctx)))]

    def refresh(self, probes: Data) -> None:
        """New scores from ``probe_rollouts`` completions of every prompt."""
        c, groups = self.config, Groups(probes["group"])
        rate = groups.mean((probes["reward_components"][:, 0] >= 1.0).double())
        tds = torch.zeros_like(rate)
        if c.diversity_weight:
            rows = [row[:n] for row, n in zip(probes["action"].t().tolist(), probes["length"].tolist(), strict=True)]
            texts: list[list[Tokens]] = [[] for _ in range(len(rate))]
            for prompt, tokens in zip(groups.index.tolist(), rows, strict=True):
                texts[prompt].append(tokens)
            tds = torch.tensor([diversity(text, c.diversity) for text in texts], dtype=rate.dtype, device=rate.device)
        new = promotion(rate, tds, c.outcome_weight, c.diversity_weight)
        self.rate.copy_(rate)
        self.score.copy_(torch.where(self.score < 0, new, c.momentum * self.score + (1.0 - c.momentum) * new))

    def choose(self, ctx: Context) -> Tensor:
        """Numbers ``[B]`` of the iteration's prompts: the weighted ones first."""
        c, device = self.config, self.score.device
        assert self.parts.request.counts is not None
        batch, size = len(self.parts.request.counts), len(self.score)
        weighted = share_of(c.mixture, batch)
        if self.position < 0:
            self.order.copy_(torch.randperm(size, generator=ctx.generator, device=device))
            self.position.zero_()
        ahead = (self.position + torch.arange(batch - weighted, device=device)) % size
        self.position.add_(batch - weighted).remainder_(size)
        if not weighted:
            return self.order[ahead]
        drawn = torch.multinomial(
            probabilities(self.score, c.scaling), weighted, replacement=True, generator=ctx.generator
        )  # fmt: skip
        return torch.cat([drawn, self.order[ahead]])

    def fit(self, have: dict[str, Data], ctx: Context) -> Stats:
        """Nothing is fitted: mean variance of the outcome in the groups to be trained on, share of groups whose
        outcomes differ; of all prompts at the last refresh the pass rate and the score."""
        sampled = have["on"]
        rate = Groups(sampled["group"]).mean((sampled["reward_components"][:, 0] >= 1.0).double())
        stats = {
            "outcome_variance": (rate * (1.0 - rate)).mean(),
            "informative_share": ((rate > 0) & (rate < 1)).double().mean(),
        }
        probed = {"pool_success": self.rate.mean(), "pool_score": self.score.mean()} if self.config.mixture else {}
        return stats | probed


MMR1 = LLMMethod(
    "mmr1_vas",
    "Leng et al. 2025, arXiv 2509.21268",
    MMR1Config,
    MMR1Recipe,
    {
        "plan": "probes of all prompts, then prompts in proportion to variance and diversity",
        "advantage": "group z-score",
        "ratio": "token",
        "loss": "clip, k3",
        "aggregate": "token mean",
    },
)
"""GRPO on prompts whose completions differ (Leng et al. 2025): variance-aware sampling."""
