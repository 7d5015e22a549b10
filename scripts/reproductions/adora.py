"""ADORA: questions that longer completions answer better, beside others where length does not matter."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.llm.task import Prompts, Score, Split
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement
from scripts.reproductions.tables import train

check_siblings("agents", "envs")

from agents.llm.adora import ADORA
from agents.llm.agent import LLM

QUESTIONS, ANSWERS, LONGEST, PROMPTS, STEP = 32, 8, 8, 16, 0.5
"""Questions, answers, most tokens before the end, prompts per update, step size for a prompt's mean."""
EARLY, UPDATES = 75, 300
END = ANSWERS
ATTENUATE: dict[str, Any] = {"criterion": "length", "advantaged_weight": 1.0, "other_weight": 0.1}
AMPLIFY: dict[str, Any] = {"criterion": "both", "advantaged_weight": 2.0, "other_weight": 1.0}
PLAIN: dict[str, Any] = {"advantaged_weight": 1.0, "other_weight": 1.0}


class _Vocabulary:
    size, pad, bos, eos = ANSWERS + 1, -1, -1, END

    def encode(self, text: str) -> list[int]:
        return [int(c) for c in text]

    def decode(self, tokens: Any) -> str:
        return "".join(str(t) for t in tokens if t < END)


class Lengths:
    """The first token is the answer; those after it, up to the end, are thought. A right answer counts with probability
    l / 8 on the odd questions (``l`` tokens before the end) and 0.6 on the even ones."""

    name = "lengths"
    components = ("accuracy",)
    fixed_length = max_new_tokens = LONGEST + 1
    vocab = _Vocabulary()

    def __init__(self, seed: int) -> None:
        self.generator = Generator().manual_seed(seed)

    def initial_logits(self) -> Tensor:
        """Uniform answers; then the end has probability 1/4 until it must come."""
        logits = torch.zeros(QUESTIONS, LONGEST + 1, ANSWERS + 1)
        logits[:, 0, END] = -40.0
        logits[:, 1:, END] = math.log(ANSWERS / 3.0)
        logits[:, LONGEST, END] = 40.0
        return logits

    def prompts(self, n: int, generator: Generator | None, split: Split = "train") -> Prompts:
        index = torch.randint(QUESTIONS, (n,), generator=generator)
        return Prompts(index[:, None], torch.ones(n, 1), index, tuple(index.tolist()))

    def score(self, prompts: Prompts, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        number = prompts.index[question]
        chance = torch.where(number % 2 == 1, (length - 1) / LONGEST, 0.6)
        lucky = torch.rand(len(number), generator=self.generator) < chance
        right = (tokens[0] == number % ANSWERS) & lucky
        return Score(right.float()[:, None], tokens[0])


class Point(NamedTuple):
    """Exact expectations under a policy: tokens before the end on hard and on easy questions, and the reward."""

    hard: float
    easy: float
    reward: float


def expectations(logits: Tensor) -> Point:
    """Of a table of logits."""
    p = logits.softmax(-1)
    going = torch.cat([torch.ones(QUESTIONS, 1), (1.0 - p[:, 1:, END]).cumprod(1)[:, :-1]], 1)
    stop = going * p[:, 1:, END]  # after 1, ..., 8 tokens
    place = torch.arange(1.0, LONGEST + 1)
    length = stop @ place
    number = torch.arange(QUESTIONS)
    chance = torch.where(number % 2 == 1, length / LONGEST, 0.6)
    right = p[number, 0, number % ANSWERS] * chance
    return Point(float(length[1::2].mean()), float(length[::2].mean()), float(right.mean()))


def curve(options: dict[str, Any], seed: int) -> list[Point]:
    """After ``EARLY`` updates and after all."""
    task, found = Lengths(seed), list[Point]()
    config = ADORA.Settings(
        n_prompts=PROMPTS, group_size=8, optimiser="sgd", learning_rate=STEP * PROMPTS, max_grad_norm=0.0, kl_coef=0.0,
        aggregate="sequence_mean", **options,
    )  # fmt: skip

    def look(agent: LLM) -> None:
        if agent.iteration in (EARLY, UPDATES):
            found.append(expectations(agent.policy.logits.detach()))

    table = lambda task: TabularTokenPolicy(QUESTIONS, LONGEST + 1, ANSWERS + 1, init=task.initial_logits())  # noqa: E731
    train(ADORA, task, config, UPDATES, seed, table, look)
    return found


def run(seeds: list[int]) -> list[Measurement]:
    """Both strategies beside GRPO."""
    grpo = [curve(PLAIN, seed) for seed in seeds]
    rows = []
    for name, options in (("attenuation", ATTENUATE), ("amplification", AMPLIFY)):
        ours = [curve(options, seed) for seed in seeds]

        def gap(at: int, what: str, ours: list[list[Point]] = ours) -> tuple[float, ...]:
            return tuple(getattr(a[at], what) - getattr(b[at], what) for a, b in zip(ours, grpo))

        if name == "amplification":
            twice = [curve({"advantaged_weight": 2.0, "other_weight": 2.0}, seed) for seed in seeds]
            rows.append(Measurement(
                f"tokens on hard questions after {EARLY} updates, {name} minus GRPO with twice the step",
                "> 0: more than a larger step (the claim)", (0.0, math.inf),
                tuple(a[0].hard - b[0].hard for a, b in zip(ours, twice)),
            ))  # fmt: skip

        for at, updates in enumerate((EARLY, UPDATES)):
            rows.append(Measurement(
                f"tokens on hard questions after {updates} updates, {name} minus GRPO", "> 0: longer (the claim)",
                (0.0, math.inf), gap(at, "hard"),
            ))  # fmt: skip
        rows += [
            Measurement(f"tokens on easy questions after {UPDATES} updates, {name} minus GRPO",
                        "0: their length does not matter (the claim)", (-0.25, 0.25), gap(1, "easy")),
            Measurement(f"expected reward after {UPDATES} updates, {name} minus GRPO", "0: within 0.02 (the claim)",
                        (-0.02, 0.02), gap(1, "reward")),
        ]  # fmt: skip
    return rows
