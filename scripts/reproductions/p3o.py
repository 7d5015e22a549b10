"""P3O on a bandit whose observed rewards are shifted per context: the shift moves PPO without a baseline, not P3O."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.packages import check_siblings
from ccrl.seeding import named_generator
from scripts.reproductions import Measurement
from scripts.reproductions.tables import train

check_siblings("agents", "envs")

from agents.llm.agent import LLMMethod
from agents.llm.p3o import P3O
from agents.llm.reinforce import PPO, RLOO
from envs.text.bandits import TokenBandit

CONTEXTS, ACTIONS, UPDATES = 10, 10, 200
SHIFTS = (0.0, 3.0, 10.0)
SHAPE: dict[str, Any] = {"n_prompts": 64, "group_size": 2, "n_epochs": 2, "optimiser": "sgd", "learning_rate": 0.5,
                         "max_grad_norm": 0.0, "model": "tabular", "kl_coef": 0.0}  # fmt: skip


class Shifted(TokenBandit):
    """Rewards ``N(0, 1)`` per context and action, observed with ``shift * N(0, 1)`` added per context."""

    name = "shifted"

    def __init__(self, shift: float, seed: int) -> None:
        super().__init__(CONTEXTS, 1, ACTIONS)
        generator = named_generator(seed, "bandit")
        self.true = torch.randn(CONTEXTS, ACTIONS, generator=generator, dtype=torch.float64)
        offset = torch.randn(CONTEXTS, 1, generator=generator, dtype=torch.float64)
        self.observed = self.true + shift * offset

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return self.observed[question, tokens[0]].float()


def _run(method: LLMMethod, shift: float, seed: int, **options: Any) -> tuple[Tensor, float]:
    """Final logits ``[contexts, actions]`` and the share of the best true reward that the policy has."""
    task: Any = Shifted(shift, seed)
    config = method.Settings(**SHAPE | options)
    # float64: the gradient is the same, the rounding of larger rewards should not decide
    table = lambda t: TabularTokenPolicy(CONTEXTS, 1, ACTIONS).double()  # noqa: E731
    logits = train(method, task, config, UPDATES, seed, table).agent.policy.logits.detach()[:, 0]
    reward = (logits.softmax(-1) * task.true).sum(-1).mean() / task.true.amax(-1).mean()
    return logits, float(reward)


def run(seeds: list[int]) -> list[Measurement]:
    """Three methods at three sizes of shift, and RLOO where it is P3O."""
    plain = [[_run(PPO, shift, seed, baseline="none", whiten=False)[1] for seed in seeds] for shift in SHIFTS]
    rows = []
    for name, form in (("P3O-V1", "separate"), ("P3O-V2", "joint")):
        still, moved = ([_run(P3O, shift, seed, form=form) for seed in seeds] for shift in (SHIFTS[0], SHIFTS[-1]))
        # 1.436 of 1.568, the best there is; four seeds have an interval of 0.03
        rows.append(Measurement(f"{name}, no shift: share of the best reward", "0.916 (reference run)",
                                (0.886, 0.946), tuple(share for _, share in still)))  # fmt: skip
        rows.append(Measurement(f"{name}: largest difference of logits between shifts 0 and 10",
                                "the rounding of the rewards (reference run: below 3e-6)", (0.0, 1e-5),
                                (_apart(still, moved),)))  # fmt: skip
        rows.append(Measurement(f"share of the best reward at shift 10, {name} minus PPO without a baseline",
                                "positive (reference run: 0.154)", (0.0, math.inf),
                                tuple(a - b for (_, a), b in zip(moved, plain[-1], strict=True))))  # fmt: skip
    for low, high in ((0, 1), (1, 2)):
        gap = tuple(a - b for a, b in zip(plain[low], plain[high], strict=True))
        rows.append(Measurement(f"PPO without a baseline: share lost from shift {SHIFTS[low]:g} to {SHIFTS[high]:g}",
                                "positive (reference run: 0.013, 0.140)", (0.0, math.inf), gap))  # fmt: skip
    ours, theirs = ([_run(m, 0.0, s, n_epochs=1, group_size=4) for s in seeds] for m in (P3O, RLOO))
    rows.append(Measurement("P3O and RLOO, one epoch, groups of 4: largest difference of logits", "the rounding of the "
                            "advantages", (0.0, 1e-6), (_apart(ours, theirs),)))  # fmt: skip
    return rows


def _apart(one: list[tuple[Tensor, float]], other: list[tuple[Tensor, float]]) -> float:
    """The largest difference between logits, over all seeds."""
    return max(float((a - b).abs().max()) for (a, _), (b, _) in zip(one, other, strict=True))
