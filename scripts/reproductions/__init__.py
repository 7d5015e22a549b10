"""The papers' small experiments, one module per paper with ``run(seeds) -> list[Measurement]``.

``python scripts/reproduce.py`` runs them and writes ``docs/llm_reproductions.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["PAPERS", "Measurement"]

PAPERS: dict[str, str] = {
    "bnpo": "variance of the gradient under three normalisers",
    "copg": "the regularised optimum from any behaviour policies; a sequence bandit offline",
    "d3s": "what the selection keeps; learning per gradient token on sums of mixed difficulty",
    "dcpo": "the pull toward a hotter policy; entropy held at its target on ModSum",
    "empg": "a chain of ten decisions: gradient norms by the kind of state",
    "g2rpo": "Figure 2; two tasks of different reward scales",
    "gbpo": "the exact optimum on a bandit; many epochs and wide bounds on ModSum",
    "gdpo": "a reward of small scale beside a large one",
    "hpt": "questions that exploration does not solve: success, entropy, share of imitation",
    "mhpo": "how large the gradient multiplier can be; parity with GRPO on ModSum",
    "r2vpo": "the exact solution on a bandit; the ratio variance held at its budget on ModSum and in PPO on CartPole",
    "real": "the shape of its gradient weights; REAL and GRPO on ModSum",
    "riskpo": "entropy kept and accuracy paid on independent questions, beside GRPO",
}
"""Slug -> what the experiment shows, in a few words; the module has the slug's name."""


@dataclass(frozen=True)
class Measurement:
    """One number of an experiment beside the one that is expected."""

    quantity: str
    """What is measured, with its unit."""
    expected: str
    """The expected number, and where it is from (paper, formula, or docs/reference_runs.md)."""
    accept: tuple[float, float]
    """The range that counts as agreement; infinite where one side is open."""
    values: tuple[float, ...]
    """One per seed; exact results have one."""

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def error(self) -> float:
        """Standard error over seeds; nan with one."""
        n = len(self.values)
        if n < 2:
            return math.nan
        return math.sqrt(sum((v - self.mean) ** 2 for v in self.values) / (n - 1) / n)

    @property
    def agrees(self) -> bool:
        return self.accept[0] <= self.mean <= self.accept[1]
