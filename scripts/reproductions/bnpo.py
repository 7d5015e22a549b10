"""BNPO: the variance of the gradient under three normalisers, by formula, by sampling and in training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings()

from agents.llm.bnpo import log_density, optimal_normaliser
from scripts.reproductions import Measurement

__all__ = ["run", "variance"]

SAMPLES = 2_000_000
RATES = {(3.0, 3.0): (0.13889, 0.15421, 0.21429), (2.0, 6.0): (0.07764, 0.15421, 0.16667)}
"""(a, b) of the success rates -> expected variance under BNPO's normaliser, GRPO's shape and none."""


def variance(a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``E[p (1 - p) / f(p; alpha, beta)^2]`` for ``p ~ Beta(a, b)``, in closed form; finite for
    ``alpha < (a + 3) / 2, beta < (b + 3) / 2``."""
    log_beta = lambda x, y: torch.lgamma(x) + torch.lgamma(y) - torch.lgamma(x + y)  # noqa: E731
    return (2 * log_beta(alpha, beta) + log_beta(a + 3 - 2 * alpha, b + 3 - 2 * beta) - log_beta(a, b)).exp()


def run(seeds: list[int]) -> list[Measurement]:
    """Closed form and a Monte-Carlo mean of ``SAMPLES`` success rates per seed."""
    found = []
    for shape, expected in RATES.items():
        a, b = torch.tensor(shape, dtype=torch.float64)
        normalisers = {
            "BNPO": optimal_normaliser(a, b), "GRPO's shape": torch.full((2,), 1.5, dtype=torch.float64),
            "REINFORCE": torch.ones(2, dtype=torch.float64),
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
            found.append(Measurement(f"{where}, closed form", f"{number} (sheet)", near, (exact,)))
            terms = [p * (1 - p) * torch.exp(-2 * log_density(p, alpha, beta)) for p in draws]
            # four standard errors of the mean over seeds
            width = 4 * float(terms[0].std()) / math.sqrt(SAMPLES * len(seeds))
            sampled = tuple(float(t.mean()) for t in terms)
            found.append(
                Measurement(f"{where}, sampled", f"{number} (sheet)", (number - width, number + width), sampled)
            )
    return found
