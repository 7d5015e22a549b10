"""GDPO: a reward of small scale starves under GRPO, which sees only the sum (the paper's Figure 4, on tables)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ccrl.estimators.base import Stage
from ccrl.estimators.outcomes import SequenceWhiten
from ccrl.estimators.stages import GroupBaseline
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.llm.task import Prompts, Score
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement
from scripts.reproductions.tables import train

check_siblings("agents", "envs")

from agents.llm.agent import LLM, LLMMethod
from agents.llm.baselines import GRPO
from agents.llm.gdpo import GDPO
from ccrl.estimators.recipe import Recipe
from envs.text.bandits import TokenBandit

ARMS, PROMPTS, STEP, FORMATTED = 8, 16, 0.5, 0.12
"""Arms of the answer, prompts per update, step size for a prompt's mean, initial probability of the format."""


class AnswerAndFormat(TokenBandit):
    """The first token answers (3 if it is the question's arm, else -3), the second is the format (1 if it is 0)."""

    name = "answer_and_format"
    components = ("correct", "format")

    def __init__(self) -> None:
        super().__init__(questions=64, fixed_length=2, symbols=ARMS)

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return torch.where(tokens[0] == question % ARMS, 3.0, -3.0)

    def score(self, prompts: Prompts, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        first = super().score(prompts, question, tokens, length)
        return Score(torch.cat([first.components, (tokens[1] == 0).float()[:, None]], 1), first.answer)

    def initial_logits(self) -> Tensor:
        """Uniform answers; two formats, the other symbols are out of reach."""
        logits = torch.zeros(self.questions, 2, ARMS)
        logits[:, 1] = -50.0
        logits[:, 1, 0], logits[:, 1, 1] = math.log(FORMATTED), math.log(1.0 - FORMATTED)
        return logits


class _SumRecipe(Recipe):
    """GRPO without its deviation inside groups, standardised over the rollout instead."""

    def stages(self) -> tuple[Stage, ...]:
        return (SequenceWhiten(GroupBaseline()),)


Sum = replace(GRPO, name="sum", Recipe=_SumRecipe)


def probabilities(method: LLMMethod, seed: int) -> list[tuple[float, float]]:
    """P(correct), P(format), averaged over the questions, after 100 and 200 updates."""
    task, found = AnswerAndFormat(), []
    config = method.Settings(
        n_prompts=PROMPTS, group_size=4, optimiser="sgd", learning_rate=STEP * PROMPTS, max_grad_norm=0.0,
        aggregate="sequence_mean",
    )  # fmt: skip

    def look(agent: LLM) -> None:
        if agent.iteration in (100, 200):
            p = agent.policy.logits.detach().softmax(-1)
            right = p[:, 0].gather(1, torch.arange(task.questions)[:, None] % ARMS).mean()
            found.append((float(right), float(p[:, 1, 0].mean())))

    table = lambda task: TabularTokenPolicy(task.questions, 2, ARMS, init=task.initial_logits())  # noqa: E731
    train(method, task, config, 200, seed, table, look)
    return found


EXPECTED = {
    "GRPO": (GRPO, ((0.82, 0.83), (0.58, 0.64)), ((0.96, 0.96), (0.95, 0.95))),
    "sum without deviation": (Sum, ((0.93, 0.93), (0.33, 0.40)), None),
    "GDPO": (GDPO, ((0.84, 0.86), (0.94, 0.95)), ((0.98, 0.98), (0.99, 0.99))),
}
"""Method -> P(correct), P(format) after 100 and after 200 updates: the ranges of three reference runs
(docs/reference_runs.md)."""
MARGIN = 0.03
"""Around those ranges: three seeds of a stochastic run."""


def run(seeds: list[int]) -> list[Measurement]:
    """The experiment of the reference run, and the order of the methods that the paper claims."""
    rows, formats = [], {}
    for name, (method, *expected) in EXPECTED.items():
        runs = [probabilities(method, seed) for seed in seeds]
        formats[name] = [one[0][1] for one in runs]
        for at, (updates, ranges) in enumerate(zip((100, 200), expected)):
            for what, quantity in enumerate(("correct", "format")):
                if ranges is not None:
                    low, high = ranges[what]
                    numbers = f"{low}-{high}" if low < high else f"{low}"
                    rows.append(Measurement(
                        f"P({quantity}) after {updates} updates, {name}", f"{numbers} (reference run)",
                        (low - MARGIN, high + MARGIN), tuple(one[at][what] for one in runs),
                    ))  # fmt: skip
    for better, worse in (("GDPO", "GRPO"), ("GRPO", "sum without deviation")):
        gap = tuple(a - b for a, b in zip(formats[better], formats[worse]))
        rows.append(Measurement(f"P(format) after 100 updates, {better} minus {worse}", "> 0.1 (paper: Figure 4)",
                                (0.1, math.inf), gap))  # fmt: skip
    return rows
