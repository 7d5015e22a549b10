"""G2RPO: the paper's Figure 2, and two tasks of different reward scales under one policy."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Generator, Tensor

from ccrl.data import Batching
from ccrl.estimators.groups import Groups
from ccrl.llm.task import Prompts, Split
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement

check_siblings("agents", "envs")

from agents.llm.agent import LLMMethod
from agents.llm.baselines import GRPO, DrGRPO
from agents.llm.g2rpo import G2RPO, rank_normal
from envs.text.bandits import TokenBandit

FIGURE = {
    (0.0, 0.0, 0.0, 0.0, 1.0): (-0.320388, -0.320388, -0.320388, -0.320388, 1.281552),
    (0.1, 0.1, 0.1, 0.2, 1.0): (-0.601984, -0.601984, -0.601984, 0.524401, 1.281552),
    (0.0, 0.0, 1.0, 1.0, 1.0): (-0.902976, -0.902976, 0.601984, 0.601984, 0.601984),
    (0.81, 0.81, 0.82, 0.82, 0.83): (-0.902976, -0.902976, 0.262200, 0.262200, 1.281552),
}
"""Rewards of a group -> advantages."""
GROUP, ROLLOUTS = 8, 200


class TwoScales(TokenBandit):
    """Two tasks for one policy, which cannot tell them apart: even questions pay 1 for half of the symbols, odd ones
    log-normal rewards of about 0.01."""

    name = "two_scales"

    def __init__(self, seed: int) -> None:
        super().__init__(questions=64, fixed_length=1, symbols=64)
        generator = Generator().manual_seed(seed)
        right = torch.rand(self.questions, self.symbols, generator=generator).argsort(1) < self.symbols // 2
        outliers = 0.01 * torch.randn(self.questions, self.symbols, generator=generator).exp()
        odd = torch.arange(self.questions)[:, None] % 2 == 1
        self.paid = torch.where(odd, outliers, right.float())

    def prompts(self, n: int, generator: Generator | None, split: Split = "train") -> Prompts:
        """All questions look like number 0."""
        found = super().prompts(n, generator, split)
        return replace(found, tokens=torch.zeros_like(found.tokens))

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return self.paid[question, tokens[0]]


def measure(method: LLMMethod, seed: int, **options: object) -> dict[str, float]:
    """Of ``ROLLOUTS`` rollouts with the uniform policy: advantages of both tasks, and spikes of the gradient of the
    second (largest norm over the median)."""
    config = method.Settings(
        model="tabular", n_prompts=4, group_size=GROUP, aggregate="sequence_mean", max_grad_norm=0.0, **options
    )  # fmt: skip
    agent = method(TwoScales(seed), config, seed=seed)
    advantages: tuple[list[Tensor], list[Tensor]] = ([], [])
    norms = []
    for _ in range(ROLLOUTS):
        raw = agent.collector.collect(agent.estimator.parts.request, agent.policy)
        with torch.no_grad():
            on = agent.estimator.prepare({"on": raw}, agent.ctx)["on"]
        odd = on["index"] % 2 == 1
        for which, found in ((~odd, advantages[0]), (odd, advantages[1])):
            found.append(on["advantage"][0, which])
        if odd.any():
            batch = on.take(odd.nonzero().squeeze(1)).epoch(Batching("sequence", "full"), None)[0]
            # a sum over groups: their number differs from rollout to rollout
            groups = int(odd.sum()) / GROUP
            estimate = agent.updaters["policy"].gradient(agent.estimator.phases()[0].terms, batch)
            norms.append(estimate.mean.norm() * groups**0.5)
    a, b = (torch.cat(found) for found in advantages)
    norm = torch.stack(norms)
    return {
        "rms": float(a.square().mean().sqrt() / b.square().mean().sqrt()), "max A": float(a.abs().max()),
        "max B": float(b.abs().max()), "spike": float(norm.max() / norm.median()),
    }  # fmt: skip


def scales(seed: int) -> float:
    """The ratio of both tasks' root mean square advantages, less a group's mean, under the uniform policy: from the
    rewards that the symbols pay. (Log-normal rewards of about 0.01 deviate by 0.022, not by 0.01.)"""
    spread = TwoScales(seed).paid.var(1, correction=0)
    return float((spread[::2].mean() / spread[1::2].mean()).sqrt())


def run(seeds: list[int]) -> list[Measurement]:
    """Exact advantages, then scales and spikes."""
    error = 0.0
    for rewards, expected in FIGURE.items():
        reward = torch.tensor(rewards, dtype=torch.float64)
        found = rank_normal(reward, Groups(torch.zeros(len(reward), dtype=torch.int64)))
        error = max(error, float((found - torch.tensor(expected, dtype=torch.float64)).abs().max()))
    rows = [
        Measurement("largest error of the 20 advantages of Figure 2", "0 (paper, to 6 decimals)", (0, 1e-6), (error,))
    ]
    plain = [measure(DrGRPO, seed) for seed in seeds]
    grpo = [measure(GRPO, seed) for seed in seeds]
    # nothing is dropped: the advantages of the rest would be scaled up by the share that is left
    ranked = [measure(G2RPO, seed, drop_unanimous=False) for seed in seeds]

    def pick(runs: list[dict[str, float]], name: str) -> tuple[float, ...]:
        return tuple(one[name] for one in runs)

    def square(reward: Tensor) -> float:
        return float(rank_normal(reward, one).square().mean())

    one = Groups(torch.zeros(GROUP, dtype=torch.int64))
    binary = [math.comb(GROUP, k) / 2**GROUP * square((torch.arange(GROUP) < k).float()) for k in range(GROUP + 1)]
    near = math.sqrt(sum(binary) / square(torch.arange(GROUP)))
    bound, outlier = 1.534121, (GROUP - 1) / math.sqrt(GROUP)
    rms = "RMS advantage, binary over log-normal task"
    rows += [
        Measurement(f"{rms}, Dr.GRPO, in units of the rewards' own ratio (22 to 28)",
                    "1: Dr.GRPO keeps the rewards' scales", (0.9, 1.1),
                    tuple(found / scales(seed) for seed, found in zip(seeds, pick(plain, "rms")))),
        Measurement(f"{rms}, GRPO", "1: every group is standardised", (0.95, 1.05), pick(grpo, "rms")),
        Measurement("the same, G2RPO", f"{near:.3f}: the quantiles of binomial successes over those without ties",
                    (near - 0.02, near + 0.02), pick(ranked, "rms")),
        Measurement("largest advantage, log-normal task, GRPO", f"up to {outlier:.3f}: (G - 1) / sqrt(G)",
                    (outlier - 0.02, outlier + 1e-4), pick(grpo, "max B")),
        Measurement("largest advantage, log-normal task, G2RPO", "1.534121: the normal quantile of 7.5 / 8",
                    (bound - 2e-6, bound + 2e-6), pick(ranked, "max B")),
        Measurement("largest advantage, binary task, G2RPO", "1.534121: the same quantile",
                    (bound - 2e-6, bound + 2e-6), pick(ranked, "max A")),
        Measurement("largest over median gradient norm, log-normal task, Dr.GRPO minus G2RPO", "> 0 (paper)",
                    (0.0, math.inf), tuple(a - b for a, b in zip(pick(plain, "spike"), pick(ranked, "spike")))),
        Measurement("largest over median gradient norm, log-normal task, GRPO minus G2RPO", "> 0 (paper)",
                    (0.0, math.inf), tuple(a - b for a, b in zip(pick(grpo, "spike"), pick(ranked, "spike")))),
    ]  # fmt: skip
    return rows
