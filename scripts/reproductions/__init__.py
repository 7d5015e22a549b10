"""The papers' small experiments, one module per paper with ``run(seeds) -> list[Measurement]``.

``python scripts/reproduce.py`` runs them, writes their numbers to ``docs/figures/reproductions/`` and all papers'
numbers to ``docs/llm_reproductions.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from ccrl.stats import t_interval

__all__ = ["PAPERS", "Measurement", "of_runs", "of_samples"]

PAPERS: dict[str, str] = {
    "adora": "lengths of completions where longer ones succeed more often, and where length does not matter",
    "awm": "a flow on eight Gaussians: reward by iteration, what keeps it stable, gradient variance beside Flow-GRPO",
    "bnpo": "variance of the gradient under three normalisers",
    "capo": "a linear bandit with loud random contexts: the tail of the policy's shift per update",
    "copg": "the regularised optimum from any behaviour policies; a sequence bandit offline",
    "copo": "questions with a dominant wrong answer: what unanimous groups can learn from other prompts",
    "d3s": "what the selection keeps; learning per gradient token on sums of mixed difficulty",
    "dcpo": "the pull toward a hotter policy; entropy held at its target on ModSum",
    "diffusion_opd": "three teachers of one task each, and a flow that learns all three from them",
    "div_prec": "entropy at nearly equal cross entropy on a Markov source; GRPO from each start",
    "empg": "a chain of ten decisions: gradient norms by the kind of state",
    "epo": "steadiness of the entropy over a chain of twelve decisions by one network",
    "etr": "elastic clip ranges on ModSum beside constant ones of the same mean",
    "g2rpo": "Figure 2; two tasks of different reward scales",
    "gbpo": "the exact optimum on a bandit; many epochs and wide bounds on ModSum",
    "gdpo": "a reward of small scale beside a large one",
    "grpo_guard": "ratios of denoising steps before and after normalisation, on exact data in 16 dimensions",
    "hpt": "questions that exploration does not solve: success, entropy, share of imitation",
    "knapsack_rl": "how many rollouts have a gradient; learning at equal rollouts on sums of mixed difficulty",
    "mhpo": "how large the gradient multiplier can be; parity with GRPO on ModSum",
    "oblr_po": "variance of the gradient under score-weighted baselines; steps that follow the noise on a bowl",
    "mmr1_vas": "the variance of what is sampled; learning on prompts of mixed difficulty, probes counted or not",
    "p3o": "a bandit whose rewards are shifted per context: the shift moves PPO without a baseline alone",
    "pf_ppo": "how far rewards of filtered completions explain true scores; PPO on noisy rewards with each filter",
    "polar": "a trained reward beside the exact one, unseen policies, reinforcement toward a policy",
    "r2vpo": "the exact solution on a bandit; the ratio variance held at its budget on ModSum and in PPO on CartPole",
    "real": "the shape of its gradient weights; REAL and GRPO on ModSum",
    "reward_models": "accuracy by number of labels; over-optimisation, in the verifier's reward",
    "riskpo": "entropy kept and accuracy paid on independent questions, beside GRPO",
    "rpo": "mass on an unseen response, and the likelihood of the preferred ones, under DPO and RPO",
    "v0": "success of unseen policies from outcomes in context, on simulated item responses",
}
"""Slug -> what the experiment shows, in a few words; the module has the slug's name."""


def of_runs(*values: float) -> tuple[float, float]:
    """The range of a number that several independent runs gave: their mean and two standard errors to each side."""
    mean, half = fmean(values), 2.0 * stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def of_samples(value: float, n: int) -> tuple[float, float]:
    """The range of a number that one run gave as the mean of ``n`` samples from [0, 1]: two standard errors to each
    side, at the largest variance that such samples can have. How runs differ is not in it: it is not known."""
    half = 2.0 * math.sqrt(value * (1.0 - value) / n)
    return value - half, value + half


@dataclass(frozen=True)
class Measurement:
    """One number of an experiment beside the range that is expected."""

    quantity: str
    """What is measured, with its unit."""
    expected: str
    """The expected number, and where it is from (paper, formula, or docs/reference_runs.md)."""
    accept: tuple[float, float]
    """The range that the number must lie in: the expected one's own uncertainty around it, or for a claim of direction
    one end and infinity."""
    values: tuple[float, ...]
    """One per seed; what is exact has one."""

    @property
    def kind(self) -> Literal["identity", "claim", "estimate"]:
        """An identity is computed and must hold; a claim is of a direction; an estimate is of a number."""
        if len(self.values) == 1:
            return "identity"
        return "claim" if math.inf in (-self.accept[0], self.accept[1]) else "estimate"

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Student's 95 % interval of the mean over seeds; an identity is its own."""
        if len(self.values) == 1:
            return self.mean, self.mean
        _, low, high = t_interval(self.values)
        return float(low), float(high)

    @property
    def verdict(self) -> Literal["yes", "no", "open"]:
        """``yes`` where the whole interval lies in the range, ``no`` where it lies outside, else ``open``: more seeds
        would tell. A wide interval can then never pass for agreement."""
        if not all(map(math.isfinite, self.values)):
            return "no"
        low, high = self.interval
        if self.accept[0] <= low and high <= self.accept[1]:
            return "yes"
        return "no" if high < self.accept[0] or low > self.accept[1] else "open"
