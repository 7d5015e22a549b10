"""BNPO: the variance of the gradient under three normalisers, by formula, by sampling and in training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ccrl.data import Batching
from ccrl.estimators.base import Stage
from ccrl.estimators.stages import GroupBaseline
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement

check_siblings("agents", "envs")

from agents.llm.bnpo import BNPO, BetaNormaliser, log_density, optimal_normaliser
from envs.text.bandits import TokenBandit

__all__ = ["run", "size", "variance"]

SAMPLES, ROLLOUTS = 2_000_000, 200
RATES = {(3.0, 3.0): (0.13889, 0.15421, 0.21429), (2.0, 6.0): (0.07764, 0.15421, 0.16667)}
"""(a, b) of the success rates -> expected variance under BNPO's normaliser, GRPO's shape and none.

By hand for (3, 3): B(2, 2) / 36 B(3, 3) = 5 / 36 with the density 6 p (1 - p), pi^2 / 64 for every (a, b) with
(8 / pi) sqrt(p (1 - p)), and E[p (1 - p)] = 9 / 42 with 1.
"""


def variance(a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``E[p (1 - p) / f(p; alpha, beta)^2]`` for ``p ~ Beta(a, b)``, in closed form; finite for
    ``alpha < (a + 3) / 2, beta < (b + 3) / 2``."""
    return (2 * _log_beta(alpha, beta) + _log_beta(a + 3 - 2 * alpha, b + 3 - 2 * beta) - _log_beta(a, b)).exp()


def size(a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``E[p (1 - p) / f(p; alpha, beta)]``, half the mean size of an advantage."""
    return (_log_beta(alpha, beta) + _log_beta(a + 2 - alpha, b + 2 - beta) - _log_beta(a, b)).exp()


def _log_beta(x: Tensor, y: Tensor) -> Tensor:
    return torch.lgamma(x) + torch.lgamma(y) - torch.lgamma(x + y)


class Rates(TokenBandit):
    """One token of ten, symbol 0 is right; the initial success rates of the questions are from Beta(2, 6)."""

    name = "rates"

    def __init__(self, seed: int) -> None:
        super().__init__(questions=64, fixed_length=1, symbols=10)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.rate = torch.distributions.Beta(2.0, 6.0).sample((self.questions,))

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return (tokens[0] == 0).float()

    def initial_logits(self) -> Tensor:
        """The other symbols share the rest."""
        rest = ((1.0 - self.rate) / (self.symbols - 1)).log()
        return torch.cat([self.rate.log()[:, None], rest[:, None].expand(-1, self.symbols - 1)], 1).unsqueeze(1)


NORMALISERS: dict[str, Stage] = {
    "BNPO": BetaNormaliser(),
    "GRPO": GroupBaseline(scale="std", ddof=0),
    "REINFORCE": GroupBaseline(),
}


def norm_variation(seed: int) -> dict[str, float]:
    """Coefficient of variation of the gradient's norm over ``ROLLOUTS`` rollouts of the initial policy, advantages of
    every rollout scaled to the same mean size."""
    config = BNPO.Settings(model="tabular", n_prompts=64, group_size=16, max_grad_norm=0.0)
    agent = BNPO(Rates(seed), config, seed=seed)
    norms: dict[str, list[Tensor]] = {name: [] for name in NORMALISERS}
    for _ in range(ROLLOUTS):
        raw = agent.collector.collect(agent.estimator.parts.request, agent.policy)
        for name, stage in NORMALISERS.items():
            on = stage(raw)
            on = on.derive(advantage=on["advantage"] / on["advantage"].abs().mean())
            batch = on.epoch(Batching("sequence", "full"), None)[0]
            norms[name].append(agent.updaters["policy"].gradient(agent.estimator.phases()[0].terms, batch).mean.norm())
    stacked = {name: torch.stack(found) for name, found in norms.items()}
    return {name: float(norm.std() / norm.mean()) for name, norm in stacked.items()}


def run(seeds: list[int]) -> list[Measurement]:
    """Closed form, a Monte-Carlo mean of ``SAMPLES`` success rates per seed, and gradients of a table."""
    found = list[Measurement]()
    for shape, expected in RATES.items():
        a, b = torch.tensor(shape, dtype=torch.float64).unbind()
        normalisers: dict[str, tuple[Tensor, ...]] = {
            "BNPO": optimal_normaliser(a, b), "GRPO's shape": torch.full((2,), 1.5, dtype=torch.float64).unbind(),
            "REINFORCE": torch.ones(2, dtype=torch.float64).unbind(),
        }  # fmt: skip
        draws = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                draws.append(torch.distributions.Beta(a, b).sample((SAMPLES,)))
        for (name, (alpha, beta)), number in zip(normalisers.items(), expected):
            where = f"variance of the gradient, p ~ Beta({a:g}, {b:g}), {name}"
            exact = float(variance(a, b, alpha, beta))
            near = (number - 6e-6, number + 6e-6)  # the expected numbers have five decimals
            found.append(Measurement(f"{where}, closed form", f"{number} (closed form)", near, (exact,)))
            terms = [p * (1 - p) * torch.exp(-2 * log_density(p, alpha, beta)) for p in draws]
            # four standard errors of the mean over seeds
            width = 6e-6 + 4 * float(terms[0].std()) / math.sqrt(SAMPLES * len(seeds))
            sampled = tuple(float(t.mean()) for t in terms)
            found.append(
                Measurement(f"{where}, sampled", f"{number} (closed form)", (number - width, number + width), sampled)
            )
    a, b = torch.tensor((2.0, 6.0), dtype=torch.float64)
    one = torch.ones_like(a)
    first, second = (
        float(variance(a, b, *n) / size(a, b, *n) ** 2) for n in (optimal_normaliser(a, b), (one, one))
    )  # fmt: skip
    what = "variance over squared mean size of advantages, p ~ Beta(2, 6), BNPO minus REINFORCE"
    found.append(Measurement(what, "> 0 (Cauchy-Schwarz)", (0.0, math.inf), (first - second,)))
    variations = [norm_variation(seed) for seed in seeds]
    for other in ("GRPO", "REINFORCE"):
        gap = tuple(v["BNPO"] - v[other] for v in variations)
        what = f"variation of the gradient norm, rates from Beta(2, 6), BNPO minus {other}"
        found.append(Measurement(what, "< 0 (conjecture)", (-math.inf, 0.0), gap))
    return found
