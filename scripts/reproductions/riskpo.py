"""RiskPO: the entropy that is kept, and what shared credit costs, on independent questions, half of them hard.

Tables share nothing between questions: an advantage in accuracy cannot show here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement
from scripts.reproductions.tables import train

check_siblings("agents", "envs")

from agents.llm.agent import LLM, LLMMethod
from agents.llm.baselines import GRPO
from agents.llm.riskpo import RiskPO
from envs.text import make_task

UPDATES = 600
# a step of 0.3 per question: the gradient is a mean over 40 of them
SHAPE: dict[str, Any] = {"n_prompts": 40, "group_size": 8, "optimiser": "sgd", "learning_rate": 12.0,
                         "max_grad_norm": 0.0, "model": "tabular"}  # fmt: skip


class Point(NamedTuple):
    """Exact expectations under the policy."""

    entropy: float
    """Nats, mean over questions."""
    hard: float
    """Accuracy on the questions with one right answer of 20."""
    accuracy: float


def curve(method: LLMMethod, config: Any, seed: int) -> list[Point]:
    """One point per update."""
    task: Any = make_task("easy_hard")
    found: list[Point] = []

    def look(agent: LLM) -> None:
        p = agent.policy.logits.detach()[:, 0].softmax(-1)
        right = (p * task.allowed).sum(-1)
        entropy = torch.special.entr(p).sum(-1).mean()
        found.append(Point(float(entropy), float(right[task.hard].mean()), float(right.mean())))

    train(method, task, config, UPDATES, seed, lambda t: TabularTokenPolicy(t.questions, 1, t.symbols), look)
    return found


def run(seeds: list[int]) -> list[Measurement]:
    """Both methods on the same questions."""
    grpo = [curve(GRPO, GRPO.Settings(**SHAPE), seed) for seed in seeds]
    risk = [curve(RiskPO, RiskPO.Settings(**SHAPE), seed) for seed in seeds]

    def at(curves: list[list[Point]], update: int, what: str) -> tuple[float, ...]:
        return tuple(getattr(points[update - 1], what) for points in curves)

    def gap(update: int, what: str) -> tuple[float, ...]:
        return tuple(a - b for a, b in zip(at(risk, update, what), at(grpo, update, what)))

    def matched(points: list[Point]) -> float:
        return next(p.entropy for p in points if p.accuracy >= 0.9)

    return [
        Measurement("entropy after 150 updates, RiskPO minus GRPO (nats)", "positive (paper); 1.09 (reference run)",
                    (0.0, math.inf), gap(150, "entropy")),
        Measurement("entropy after 300 updates, RiskPO minus GRPO (nats)", "positive (paper); 1.33 (reference run)",
                    (0.0, math.inf), gap(300, "entropy")),
        Measurement("entropy when the accuracy first is 0.9, RiskPO minus GRPO (nats)", "positive (paper)",
                    (0.0, math.inf), tuple(matched(a) - matched(b) for a, b in zip(risk, grpo))),
        Measurement("hard questions after 300 updates, GRPO", "0.98 (reference run)",
                    (0.96, 1.0), at(grpo, 300, "hard")),
        Measurement("hard questions after 300 updates, RiskPO", "0.23-0.26 (reference run, optimiser not noted)",
                    (0.2, 0.3), at(risk, 300, "hard")),
        Measurement("hard questions after 150 updates, RiskPO minus GRPO", "negative: shared credit (reference run)",
                    (-math.inf, 0.0), gap(150, "hard")),
        Measurement("hard questions after 600 updates, RiskPO", "0.97 (reference run)",
                    (0.95, 0.99), at(risk, 600, "hard")),
    ]  # fmt: skip
