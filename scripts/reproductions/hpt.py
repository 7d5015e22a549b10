"""HPT's small experiment: questions that exploration does not solve, among others that it does, one demonstration each.

A table of logits per question, so nothing carries over from one question to another. All methods get 400 steps of 64
prompts; probabilities of success and entropies are exact.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.llm.agent import LLM
from agents.llm.hpt import HPT
from envs.text.bandits import DeadPrompts
from scripts.reproductions import Measurement

__all__ = ["METHODS", "Outcome", "outcome", "run"]

STEPS = 400
SHARED: dict[str, Any] = {
    "model": "tabular", "n_prompts": 64, "group_size": 8, "learning_rate": 0.05, "max_grad_norm": 0.0,
    "entropy_coef": 0.0, "rl_norm": "len_const",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "GRPO": {"gate": -1.0},
    "SFT": {"gate": 1.0},
    "SFT->GRPO": {"gate": -1.0, "warm_start_steps": STEPS // 2, "warm_start_batch": 64, "warm_start_lr": 0.05},
    "fixed mix 0.5/0.5": {"mixture": "fixed", "rl_norm": "token_mean"},
    "LUFFY": {"mixture": "luffy"},
    "HPT gate 0": {"gate": 0.0},
    "HPT gate 2/8": {"gate": 0.25},
}
"""SFT -> GRPO halves the steps; the prompts of its first half come from a stream of their own. The fixed mixture is of
two means: with the released norm, a sum over samples, it would be nearly all reinforcement."""


class Outcome(NamedTuple):
    """Of one run; exact but for the shares."""

    dead: float
    """Share of the dead questions with a probability of success above 1/2."""
    rest: float
    """Mean probability of success of the others."""
    entropy: float
    """Of the completions to the others, in nats."""
    distinct: float
    """Distinct right completions among 64 samples of one of the others."""
    first: float
    """Share of imitated questions in the first 20 steps."""
    last: float
    """In the last 20."""


@torch.no_grad()
def outcome(agent: LLM, shares: list[float]) -> Outcome:
    """What the table of an agent on ``DeadPrompts`` has become."""
    task: DeadPrompts = agent.task  # type: ignore[assignment]
    log_prob: Tensor = agent.policy.logits.log_softmax(-1)
    success = (log_prob.exp() * task.allowed).sum(-1).prod(1)
    entropy = -(log_prob.exp() * log_prob).sum((1, 2))
    prompts = agent.collector.test_prompts(task.questions, 0)
    alive = (~task.dead[prompts.index]).nonzero().squeeze(1)
    data = agent.collector.sample(agent.policy, prompts, alive.repeat_interleave(64), tag="distinct")
    answers = torch.where(data["episode_reward"] >= 1.0, data["answer"], -1).view(-1, 64).sort(1).values
    distinct = (answers[:, 1:] != answers[:, :-1]).sum(1) + (answers[:, 0] >= 0)
    return Outcome(
        float((success[task.dead] > 0.5).float().mean()), float(success[~task.dead].mean()),
        float(entropy[~task.dead].mean()), float(distinct.float().mean()),
        sum(shares[:20]) / 20, sum(shares[-20:]) / 20,
    )  # fmt: skip


def train(settings: dict[str, Any], seed: int) -> Outcome:
    """One run."""
    agent, shares = HPT(DeadPrompts(seed=seed), HPT.Settings(**SHARED | settings), seed=seed), list[float]()
    steps = STEPS - settings.get("warm_start_steps", 0)

    def note(agent: Any) -> None:
        shares.append(float(agent.scalars["train/sft_share"]))

    agent.learn(steps * agent.samples_per_iteration, note)
    return outcome(agent, shares)


INDEPENDENT = {"GRPO": (0.0, 0.976, 7.6), "SFT": (1.0, 0.968, 0.82), "fixed mix 0.5/0.5": (1.0, 0.981, 0.94),
               "HPT gate 0": (1.0, 0.974, 7.7)}  # fmt: skip
"""Dead questions solved, success and entropy on the rest, in a reference run (docs/reference_runs.md)."""


def run(seeds: list[int]) -> list[Measurement]:
    """Solved dead questions, success and diversity on the rest, and the share of imitation over training."""
    found = {name: [train(settings, seed) for seed in seeds] for name, settings in METHODS.items()}

    def values(name: str, field: str) -> tuple[float, ...]:
        return tuple(getattr(o, field) for o in found[name])

    rows = list[Measurement]()
    for name in METHODS:
        # all methods but GRPO see demonstrations of the dead questions
        dead, rest, entropy = INDEPENDENT.get(name, (1.0, None, None))
        source = "reference run" if name in INDEPENDENT else "claim: demonstrations solve them"
        accept = (0.0, 0.02) if dead == 0 else (0.95, 1.0)
        rows.append(
            Measurement(f"{name}: dead questions solved", f"{dead:.2f} ({source})", accept, values(name, "dead"))
        )
        expected = "0.97 (reference run, of the four methods in it)" if rest is None else f"{rest} (reference run)"
        near = 0.97 if rest is None else rest
        accept_rest = (near - 0.01, near + 0.01)
        rows.append(Measurement(f"{name}: success on the rest", expected, accept_rest, values(name, "rest")))
        if entropy is not None:
            # the claim: imitation leaves about one nat, reinforcement several
            accept = (0.9 * entropy, 1.1 * entropy)
            rows.append(
                Measurement(
                    f"{name}: entropy on the rest, nats", f"{entropy} (reference run)", accept, values(name, "entropy")
                )
            )
    diversity = tuple(h.entropy / g.entropy for h, g in zip(found["HPT gate 0"], found["GRPO"]))
    rows.append(Measurement("HPT's entropy over GRPO's", "1 (reference run: 7.7 / 7.6)", (0.95, 1.05), diversity))
    answers = tuple(h.distinct / s.distinct for h, s in zip(found["HPT gate 0"], found["SFT"]))
    rows.append(
        Measurement("distinct right answers in 64 samples, HPT over SFT", "> 1 (claim)", (1.0, math.inf), answers)
    )
    rows.append(
        Measurement(
            "HPT: imitated share, first 20 steps",
            "0.46-0.49 (reference run)",
            (0.44, 0.51),
            values("HPT gate 0", "first"),
        )
    )
    rows.append(
        Measurement(
            "HPT: imitated share, last 20 steps", "0 (reference run)", (0.0, 0.01), values("HPT gate 0", "last")
        )
    )
    return rows
