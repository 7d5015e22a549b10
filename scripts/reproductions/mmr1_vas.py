"""MMR1's sampling of prompts: the variance of what is sampled; learning on prompts of mixed difficulty."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.packages import check_siblings
from ccrl.seeding import stream_seed
from scripts.reproductions import Measurement
from scripts.reproductions.tables import train

check_siblings("agents", "envs")

from agents.llm.agent import LLM
from agents.llm.mmr1_vas import MMR1, probabilities, promotion
from envs.text.bandits import TokenBandit

PROMPTS, DRAWS = 2000, 40
QUESTIONS, UPDATES = 512, 120
SHAPE: dict[str, Any] = {
    "n_prompts": 64, "group_size": 8, "learning_rate": 20.0, "optimiser": "sgd", "max_grad_norm": 0.0, "kl_coef": 0.0,
    "model": "tabular", "diversity_weight": 0.0, "pool_size": 8192,
}  # fmt: skip
PROBES = 32
"""A refresh takes as many completions, 512 x 32, as so many updates of 64 x 8."""
MIXTURES = (0.0, 0.5, 1.0)


class Coins(TokenBandit):
    """One of two tokens; the second is right."""

    name = "coins"

    def __init__(self) -> None:
        super().__init__(QUESTIONS, 1, 2)

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return tokens[0].float()


def rates(shape: tuple[int, ...], generator_seed: int) -> Tensor:
    """Success rates of Beta(0.4, 0.4)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_seed)
        a = torch.tensor(0.4, dtype=torch.float64)
        return torch.distributions.Beta(a, a).sample(shape)  # type: ignore[no-untyped-call, no-any-return]


def run(seeds: list[int]) -> list[Measurement]:
    """The sampler alone, then training."""
    return [*_sampling(seeds), *_training(seeds)]


def _sampling(seeds: list[int]) -> list[Measurement]:
    rows = []
    for seed in seeds:
        score = promotion(p := rates((DRAWS, PROMPTS), seed), torch.zeros_like(p), 1.0, 0.0)
        weighted = float(torch.stack([probabilities(row) @ row for row in score]).mean())
        uniform = float(score.mean())
        rows.append([uniform + mixture * (weighted - uniform) for mixture in MIXTURES])
    # E v = 1/9 and E v^2 / E v = 7/38 with v = p (1 - p), by Beta integrals
    closed = (1 / 9, (1 / 9 + 7 / 38) / 2, 7 / 38)
    found = [
        Measurement(f"reward variance of a sampled prompt, lambda {mixture:g}", f"{value:.4f} (closed form)",
                    (value - 0.001, value + 0.001), tuple(row[i] for row in rows))
        for i, (mixture, value) in enumerate(zip(MIXTURES, closed, strict=True))
    ]  # fmt: skip
    for i, value in ((1, 1.33), (2, 1.66)):
        found.append(Measurement(f"the same over that of lambda 0, lambda {MIXTURES[i]:g}", f"{value:g} (closed form)",
                                 (value - 0.01, value + 0.01), tuple(row[i] / row[0] for row in rows)))  # fmt: skip
    return found


def _train(mixture: float, seed: int, refresh_every: int = 35) -> dict[str, float]:
    """Success over all questions, exact: after a quarter of the updates, after all, and (without probes) after as many
    completions as 0.5 takes with them; squared gradient norm, share of informative groups."""
    init = torch.zeros(QUESTIONS, 1, 2)
    init[:, 0, 1] = rates((QUESTIONS,), stream_seed(seed, "questions to learn")).clamp(1e-3, 1 - 1e-3).logit()
    curve: list[float] = []

    def look(agent: LLM) -> None:
        curve.append(float(agent.policy.logits.detach()[:, 0].softmax(-1)[:, 1].mean()))

    config = MMR1.Settings(**SHAPE, mixture=mixture, refresh_every=refresh_every)
    table = lambda t: TabularTokenPolicy(QUESTIONS, 1, 2, init=init)  # noqa: E731
    # the clock counts probes: with them it ends after as many updates, without them it goes on
    total = UPDATES + PROBES * math.ceil(UPDATES / min(refresh_every, UPDATES))
    history = train(MMR1, Coins(), config, total, seed, table, look)
    quarter = UPDATES // 4
    return {
        "early": curve[quarter - 1], "final": curve[UPDATES - 1], "equal": curve[-1],
        "norm": sum(x**2 for x in history.grad_norm[:quarter]) / quarter,
        "informative": sum(row["train/informative_share"] for row in history.stats[:quarter]) / quarter,
    }  # fmt: skip


def _training(seeds: list[int]) -> list[Measurement]:
    plain, half, whole = ([_train(mixture, seed) for seed in seeds] for mixture in MIXTURES)
    stale = [_train(1.0, seed, refresh_every=10 * UPDATES) for seed in seeds]

    def gap(name: str, one: list[dict[str, float]], other: list[dict[str, float]] = plain) -> tuple[float, ...]:
        return tuple(a[name] - b[name] for a, b in zip(one, other, strict=True))

    up, down = (0.0, math.inf), (-math.inf, 0.0)
    ratio = tuple(a["norm"] / b["norm"] for a, b in zip(whole, plain, strict=True))
    quarter, end = "after a quarter of the updates", "after all updates"
    return [
        Measurement(f"informative groups {quarter}, lambda 0.5 minus 0", "positive (paper)", up,
                    gap("informative", half)),
        Measurement(f"informative groups {quarter}, lambda 1 minus 0", "positive (paper)", up,
                    gap("informative", whole)),
        Measurement(f"squared gradient norm {quarter}, lambda 1 over 0", "above 1 (paper)", (1.0, math.inf), ratio),
        Measurement(f"success {quarter}, lambda 0.5 minus 0", "positive (paper: earlier)", up, gap("early", half)),
        Measurement(f"success {quarter}, lambda 1 minus 0", "positive (paper: earlier)", up, gap("early", whole)),
        Measurement(f"success {end}, lambda 0.5 minus 0", "positive (paper)", up, gap("final", half)),
        Measurement(f"success {end}, lambda 1 minus 0", "positive (paper)", up, gap("final", whole)),
        Measurement(f"success {end}, lambda 1, scores of the start minus refreshed", "negative (claim)", down,
                    gap("final", stale, whole)),
        Measurement("success at equal completions, probes counted, lambda 0.5 minus 0", "negative: 52 % are probes",
                    down, gap("equal", half)),
    ]  # fmt: skip
