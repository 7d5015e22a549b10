"""OBLR-PO: baselines weighted by scores and the gradient's variance on bandits; steps that follow the noise."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from ccrl.estimators.groups import Groups
from ccrl.packages import check_siblings
from ccrl.seeding import named_generator
from scripts.reproductions import Measurement

check_siblings("agents", "envs")

from agents.llm.oblr_po import GradientNoise, weighted_advantages

ARMS, DRAWS, SAMPLES = 10, 20, 4000
"""Arms of a bandit, bandits, gradients per bandit and estimator."""
TABLE = {
    4: (1.29, 1.13, 0.49, 0.70, 0.30),
    8: (1.26, 1.00, 0.61, 0.70, 0.14),
    16: (1.68, 0.97, 0.82, 0.86, 0.07),
    64: (1.28, 0.90, 0.86, 0.87, 0.02),
}
"""Group size -> variance without a baseline, with the weighted one of the others, of all, and the exact one, each over
that of the mean of the others; relative bias of the one of all (docs/reference_runs.md, one set of 20 bandits)."""
COLUMNS = ("no baseline", "weighted, others", "weighted, all", "exact optimum")


def bandit(generator: Generator) -> tuple[Tensor, Tensor]:
    """Probabilities and rewards: logits N(0, 1.5^2), an arm pays 1 with probability 0.3; some do and some do not."""
    p = (1.5 * torch.randn(ARMS, generator=generator, dtype=torch.float64)).softmax(0)
    while True:
        reward = (torch.rand(ARMS, generator=generator) < 0.3).double()
        if 0 < float(reward.sum()) < ARMS:
            return p, reward


def variances(size: int, generator: Generator) -> tuple[list[float], float]:
    """The columns of the table for one bandit."""
    p, reward = bandit(generator)
    scores = torch.eye(ARMS, dtype=torch.float64) - p
    weight = scores.square().sum(1)
    best = (p * weight) @ reward / (p @ weight)
    exact = p * (reward - p @ reward)
    arm = torch.multinomial(p, SAMPLES * size, replacement=True, generator=generator).view(SAMPLES, size)
    r, w = reward[arm], weight[arm]
    inside, groups = torch.ones_like(r, dtype=torch.bool), Groups(torch.zeros(size))
    of = {
        "mean": weighted_advantages(r, torch.ones_like(w), inside, groups, True), "no baseline": r,
        "weighted, others": weighted_advantages(r, w, inside, groups, True),
        "weighted, all": weighted_advantages(r, w, inside, groups, False), "exact optimum": r - best,
    }  # fmt: skip
    gradient = {k: (scores[arm] * a.unsqueeze(-1)).mean(1) for k, a in of.items()}
    spread = {k: float(g.var(0).sum()) for k, g in gradient.items()}
    bias = float((gradient["weighted, all"].mean(0) - exact).norm() / exact.norm())
    return [spread[k] / spread["mean"] for k in COLUMNS], bias


def bowl(seed: int, scheduled: bool, steps: int = 400) -> tuple[float, float]:
    """``J = -x' H x / 2``, H = diag(1, 10), 8 gradients with noise N(0, 1) per step of at most 1 / L: the loss after 10
    steps, and its mean over the last 100."""
    generator = Generator().manual_seed(seed)
    curvature, x = torch.tensor([1.0, 10.0], dtype=torch.float64), torch.tensor([5.0, 5.0], dtype=torch.float64)
    noise, losses = GradientNoise(), list[float]()
    for _ in range(steps):
        g = -curvature * x + torch.randn(8, 2, generator=generator, dtype=torch.float64)
        mean, share = g.mean(0), torch.full((8,), 1.0 / 8.0, dtype=torch.float64)
        variance = GradientNoise.variance(mean @ mean, (g / 8.0).square().sum(1), share)
        rho = noise.move(mean @ mean, variance)
        x = x + 0.1 * (rho if scheduled else 1.0) * mean
        losses.append(float(0.5 * curvature @ x.square()))
    return losses[9], sum(losses[-100:]) / 100.0


def run(seeds: list[int]) -> list[Measurement]:
    """The table, what it says, and the bowl."""
    rows = []
    for size, expected in TABLE.items():
        means: list[list[float]] = []
        for seed in seeds:
            generator = named_generator(seed, f"bandits, groups of {size}")
            found = [variances(size, generator) for _ in range(DRAWS)]
            bias = torch.tensor([b for _, b in found]).median()
            means.append([*torch.tensor([row for row, _ in found]).mean(0).tolist(), float(bias)])
        for at, name in enumerate(COLUMNS):
            room = 0.5 if name == "no baseline" else 0.15
            rows.append(Measurement(
                f"variance over that of the mean of the others, groups of {size}: {name}",
                f"{expected[at]:g} (reference run, 20 bandits)", (expected[at] - room, expected[at] + room),
                tuple(row[at] for row in means),
            ))  # fmt: skip
        rows += [
            Measurement(f"the same, groups of {size}: exact optimum, at most 1", "< 1 (theory)", (-math.inf, 1.0),
                        tuple(row[3] for row in means)),
            Measurement(f"relative bias of weighted, all, groups of {size} (median)",
                        f"{expected[4]:g} (reference run)", (0.5 * expected[4] - 0.01, 1.5 * expected[4] + 0.01),
                        tuple(row[4] for row in means)),
        ]  # fmt: skip
    runs = [(bowl(seed, True), bowl(seed, False)) for seed in seeds]
    return [
        *rows,
        Measurement("bowl: loss after 10 steps, schedule over constant step", "1: equal early progress (theory)",
                    (0.5, 2.0), tuple(a[0] / b[0] for a, b in runs)),
        Measurement("bowl: loss over the last 100 of 400 steps, schedule over constant step",
                    "< 1: a lower floor (theory)", (-math.inf, 1.0), tuple(a[1] / b[1] for a, b in runs)),
    ]  # fmt: skip
