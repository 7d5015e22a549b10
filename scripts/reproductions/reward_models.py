"""Reward models from few labels: accuracy on new pairs, and the verifier's reward while GRPO optimises the model's."""

from __future__ import annotations

import math
from typing import Any

import torch

from ccrl.collect import Request
from ccrl.llm.judged import Judged
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.packages import check_siblings
from ccrl.seeding import named_generator, stream_seed
from scripts.reproductions import Measurement

check_siblings("agents", "envs")

from agents.llm.baselines import GRPO
from agents.llm.reward_model import RewardTrainer, judged
from envs.text import make_task

__all__ = ["run"]

TASK: dict[str, Any] = {"questions": 8, "fixed_length": 4, "symbols": 8}
MODEL: dict[str, Any] = {
    "model_layers": 1,
    "model_width": 32,
    "model_heads": 2,
    "learning_rate": 3e-3,
    "batch_size": 32,
}
UPDATES, ITERATIONS, NOISE = 600, 80, 0.1
LABELS = (64, 4096)


def pairs(n: int, seed: int) -> Judged:
    """``n`` pairs of uniform completions, preferred by Bradley-Terry of the share of right tokens over ``NOISE``."""
    task = make_task("sequence_match", **TASK)
    policy = TabularTokenPolicy(TASK["questions"], TASK["fixed_length"], TASK["symbols"])
    data = TokenCollector(task, seed=seed).collect(Request(counts=torch.full((n,), 2)), policy)
    return Judged.pairs_of(data, data["episode_reward"], named_generator(seed, "preferences"), noise=NOISE)


def outcome(labels: int, seed: int) -> dict[str, float]:
    """Of a model from so many pairs, and of GRPO on what it says."""
    task = make_task("sequence_match", **TASK)
    trainer = RewardTrainer(task, data=pairs(labels, seed), seed=seed, **MODEL)
    trainer.learn(until=UPDATES)
    report = trainer.report(pairs(2000, stream_seed(seed, "new pairs")))
    settings = GRPO.Settings(model="tabular", n_prompts=8, group_size=8, learning_rate=0.1)
    agent = judged(GRPO, trainer.reward)(task, settings, seed=seed)
    said, true = list[float](), list[float]()

    def note(agent: Any) -> None:
        said.append(float(agent.scalars["train/judged_reward"]))
        true.append(float(agent.collector.stats.returns.mean()))

    agent.learn(ITERATIONS * agent.samples_per_iteration, callback=note)
    best = max(sum(true[i : i + 5]) / 5 for i in range(len(true) - 4))
    return {
        "accuracy": report["accuracy"], "calibration": report["calibration_error"], "said": said[-1] - said[0],
        "start": true[0], "end": sum(true[-5:]) / 5, "best": best,
    }  # fmt: skip


def run(seeds: list[int]) -> list[Measurement]:
    """By the number of labels."""
    rows = {n: [outcome(n, seed) for seed in seeds] for n in LABELS}
    few, many = (rows[n] for n in LABELS)
    found = list[Measurement]()
    for n in LABELS:
        found.append(Measurement(f"{n} labels: accuracy on new pairs, whose labels are drawn",
                                 "above 1/2", (0.5, math.inf), tuple(r["accuracy"] for r in rows[n])))  # fmt: skip
        found.append(Measurement(f"{n} labels: rise of the model's reward in GRPO", "positive", (0.0, math.inf),
                                 tuple(r["said"] for r in rows[n])))  # fmt: skip
        found.append(Measurement(f"{n} labels: the verifier's reward at its best minus at the end",
                                 "positive (by construction not negative)", (0.0, math.inf),
                                 tuple(r["best"] - r["end"] for r in rows[n])))  # fmt: skip
    for what in ("accuracy", "end"):
        gap = tuple(a[what] - b[what] for a, b in zip(many, few))
        name = {"accuracy": "accuracy", "end": "the verifier's reward at the end"}[what]
        found.append(Measurement(f"{name}, {LABELS[1]} minus {LABELS[0]} labels", "positive", (0.0, math.inf), gap))
    return found
