"""COPO: questions whose first answer is nearly always the same wrong one, so that most groups are unanimous."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement
from scripts.reproductions.tables import train

check_siblings("agents", "envs")

from agents.llm.agent import LLM
from agents.llm.copo import COPO
from envs.text.bandits import TokenBandit

QUESTIONS, SYMBOLS, PROMPTS, STEP, BIAS = 64, 20, 32, 0.5, 4.0
"""Questions, answers, prompts per update, step size for a prompt's mean, first logit of the wrong answer."""
UPDATES = (100, 200, 300)
EXPECTED: dict[str, tuple[tuple[float, float], ...]] = {
    "local": ((0.26, 0.39), (0.88, 0.94), (0.99, 0.99)),
    "soft": ((0.30, 0.43), (0.95, 0.96), (0.99, 0.99)),
    "soft_forced": ((0.24, 0.36), (0.89, 0.95), (0.95, 0.99)),
    "global": ((0.03, 0.05), (0.06, 0.10), (0.17, 0.22)),
}
"""Mode -> P(right) on the biased questions after 100, 200 and 300 updates: the ranges of three reference runs
(docs/reference_runs.md). local is GRPO."""
NAMES = {"local": "GRPO", "soft": "soft blend", "soft_forced": "soft blend, unanimous groups global",
         "global": "global loss alone"}  # fmt: skip


class Biased(TokenBandit):
    """One token of 20, one of them right; on the odd questions another one has a first logit of 4."""

    name = "biased"

    def __init__(self) -> None:
        super().__init__(QUESTIONS, 1, SYMBOLS)
        self.right = torch.arange(QUESTIONS) % SYMBOLS
        self.biased = torch.arange(QUESTIONS) % 2 == 1

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return (tokens[0] == self.right[question]).float()

    def initial_logits(self) -> Tensor:
        logits = torch.zeros(QUESTIONS, 1, SYMBOLS)
        logits[self.biased, 0, (self.right[self.biased] + 1) % SYMBOLS] = BIAS
        return logits


def curve(mode: str, seed: int, **options: Any) -> tuple[float, ...]:
    """P(right) on the biased questions after the updates of ``UPDATES``."""
    task, found = Biased(), list[float]()
    config = COPO.Settings(mode=mode, n_prompts=PROMPTS, optimiser="sgd", learning_rate=STEP * PROMPTS,
                           max_grad_norm=0.0, **options)  # fmt: skip

    def look(agent: LLM) -> None:
        if agent.iteration in UPDATES:
            p = agent.policy.logits.detach()[:, 0].softmax(-1)
            found.append(float(p[torch.arange(QUESTIONS), task.right][task.biased].mean()))

    table = lambda task: TabularTokenPolicy(QUESTIONS, 1, SYMBOLS, init=task.initial_logits())  # noqa: E731
    train(COPO, task, config, UPDATES[-1], seed, table, look)
    return tuple(found)


def run(seeds: list[int]) -> list[Measurement]:
    """The modes on the same questions."""
    found = {mode: [curve(mode, seed) for seed in seeds] for mode in (*EXPECTED, "forced")}
    rows = []
    for mode, expected in EXPECTED.items():
        for at, (low, high) in enumerate(expected):
            rows.append(Measurement(
                f"P(right) on biased questions after {UPDATES[at]} updates, {NAMES[mode]}",
                f"{low:g}-{high:g} (reference run)" if low < high else f"{low:g} (reference run)",
                (low - 0.05, high + 0.05), tuple(one[at] for one in found[mode]),
            ))  # fmt: skip

    def gap(first: str, second: str, at: int = 1) -> tuple[float, ...]:
        return tuple(a[at] - b[at] for a, b in zip(found[first], found[second]))

    rows += [
        Measurement("the same after 200 updates, soft blend minus GRPO", "at least 0 (reference run: 0.04)",
                    (0.0, math.inf), gap("soft", "local")),
        Measurement("the same after 200 updates, global loss alone minus GRPO",
                    "below -0.5: a signal 6 times smaller (reference run)", (-math.inf, -0.5), gap("global", "local")),
        Measurement("the same after 100 updates, forced minus soft blend",
                    "> 0: groups of different wrong answers are pushed down too (conjecture)", (0.0, math.inf),
                    gap("forced", "soft", 0)),
    ]  # fmt: skip
    return rows
