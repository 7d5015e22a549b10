"""Knapsack RL: how many rollouts have a gradient; learning at equal rollouts on sums of mixed difficulty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccrl.llm.budget import gradient_probability
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement
from scripts.reproductions.d3s import SharedPolicy
from scripts.reproductions.tables import train

check_siblings("agents", "envs")

from agents.llm.agent import LLM
from agents.llm.knapsack_rl import KnapsackRL, KnapsackRLConfig, divide
from envs.text import make_task

DRAWS, PROMPTS = 50, 128
UPDATES, EVERY = 120, 10
SHAPE: dict[str, Any] = {"n_prompts": 64, "group_size": 8, "learning_rate": 0.03, "batch_size": 0, "model": "tabular"}
TASK = {"questions": 256, "fixed_length": 4, "symbols": 32}
UNIFORM = {"min_rollouts": 8, "max_rollouts": 8, "unsolved_rollouts": 8, "solved_rollouts": 8}


def run(seeds: list[int]) -> list[Measurement]:
    """The division alone, then training."""
    return [*_division(seeds), *_training(seeds)]


def effective(counts: Tensor, p: Tensor) -> float:
    """Expected share of the rollouts that are in groups with both outcomes."""
    return float((counts * gradient_probability(counts.double(), p)).sum() / counts.sum())


def _division(seeds: list[int]) -> list[Measurement]:
    config, known = KnapsackRLConfig(), torch.ones(PROMPTS, dtype=torch.bool)
    rows: list[list[float]] = []
    for seed in seeds:
        found = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            half = torch.tensor(0.4, dtype=torch.float64)
            for p in torch.distributions.Beta(half, half).sample((DRAWS, PROMPTS)):
                uniform = torch.full((PROMPTS,), config.group_size)
                estimate = torch.distributions.Binomial(16, p).sample() / 16.0
                knapsack, guessed = divide(config, known, p), divide(config, known, estimate)
                prompts = float(gradient_probability(knapsack.double(), p).mean())
                found.append([effective(uniform, p), effective(knapsack, p), effective(guessed, p), prompts])
        rows.append(torch.tensor(found).mean(0).tolist())
    cases = (
        # 1 - 2 B(8.4, 0.4) / B(0.4, 0.4); one draw of 128 prompts has the deviation 0.026
        ("share of rollouts with a gradient, 8 per prompt", "0.54545 (closed form)", 0.54545, 0.005),
        ("share of rollouts with a gradient, knapsack, true rates", "0.82 (reference run, one draw)", 0.82, 0.035),
        ("share of rollouts with a gradient, knapsack, rates of 16 rollouts", "0.78 (reference run)", 0.78, 0.013),
        ("share of prompts with a gradient, knapsack", "0.52 (reference run, one draw)", 0.52, 0.05),
    )
    return [
        Measurement(name, expected, (value - room, value + room), tuple(row[i] for row in rows))
        for i, (name, expected, value, room) in enumerate(cases)
    ]


@dataclass
class Curves:
    """Of one run."""

    success: list[float]
    """Mean success on all questions, every ``EVERY`` updates."""
    hard: float
    """Final success on the questions that the uniform policy solves with probability below 5 %."""
    effective: float
    """Mean share of the rollouts with a gradient, from the second epoch on."""


def _train(seed: int, **options: Any) -> Curves:
    task: Any = make_task("sum_rule", **TASK)
    curves = Curves([], 0.0, 0.0)

    def look(agent: LLM) -> None:
        if agent.iteration % EVERY == 0:
            curves.success.append(agent.pass_at([1], questions=256, samples=4)["pass@1"])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = KnapsackRL.Settings(**SHAPE | options)
        history = train(KnapsackRL, task, config, UPDATES, seed, lambda t: SharedPolicy(256, 4, 32), look)
    agent = history.agent
    hard = (task.allowed.sum(1) / task.symbols < 0.05).nonzero().squeeze(-1)
    prompts = agent.collector.test_prompts(task.questions, 0)
    question = torch.isin(prompts.index, hard).nonzero().squeeze(-1).repeat_interleave(64)
    with torch.no_grad():
        curves.hard = float(agent.collector.sample(agent.policy, prompts, question)["episode_reward"].mean())
    shares = [row["train/effective_share"] for row in history.stats[4:]]
    curves.effective = sum(shares) / len(shares)
    return curves


def _until(curves: Curves, level: float) -> float:
    """Share of the run until the success is ``level``; 1 where it never is."""
    reached = (i for i, success in enumerate(curves.success, 1) if success >= level)
    return next(reached, len(curves.success)) / len(curves.success)


def _training(seeds: list[int]) -> list[Measurement]:
    knapsack, uniform = ([_train(seed, **options) for seed in seeds] for options in ({}, UNIFORM))
    pairs = list(zip(knapsack, uniform))
    level = [0.9 * b.success[-1] for _, b in pairs]
    return [
        Measurement("in training: share of rollouts with a gradient, knapsack minus uniform", "positive (paper: 0.2 to "
                    "0.4)", (0.0, math.inf), tuple(a.effective - b.effective for a, b in pairs)),
        Measurement("share of the run until 90 % of uniform's final success, knapsack minus uniform",
                    "negative (claim)", (-math.inf, 0.0),
                    tuple(_until(a, x) - _until(b, x) for (a, b), x in zip(pairs, level))),
        Measurement("final success on questions of initial success below 5 %, knapsack minus uniform",
                    "positive (claim)", (0.0, math.inf), tuple(a.hard - b.hard for a, b in pairs)),
        Measurement("final success on all questions, knapsack minus uniform", "positive (paper: 2 to 4 points)",
                    (0.0, math.inf), tuple(a.success[-1] - b.success[-1] for a, b in pairs)),
    ]  # fmt: skip
