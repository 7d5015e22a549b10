"""Distillation beside joint training and a cascade: tasks that do not meet, and rewards of different sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents import get_agent
from agents.flow.diffusion_opd import DiffusionOPD
from ccrl.flow import Conditions
from scripts.reproductions import awm as awm_test
from scripts.reproductions import diffusion_opd as opd_test
from scripts.studies.tables import Rows

__all__ = ["opd", "scales"]

RL: dict[str, Any] = {**awm_test.SIZE, **awm_test.ODE, "steps": 10, "n_prompts": 3, "group_size": 128}
SCALED: dict[str, Any] = {"conditions": 3, "scales": (1.0, 0.3, 0.03)}
"""One reward is a thirtieth of another."""


def opd(name: str, options: dict[str, Any], cell: dict[str, Any]) -> Rows:
    """Rewards of the student on the three tasks, beside AWM on all tasks at once and on one after the other."""
    source = opd_test.start(cell["seed"])
    rounds = tuple(range(0, cell["iterations"] + 1, cell["every"]))
    if name in opd_test.FORMS:
        found = opd_test.distil(source, name, cell["seed"], rounds)
        return [{"iteration": k, **_tasks(rewards)} for k, rewards in zip(rounds, found)]
    agent = get_agent("awm")("ring2d", seed=cell["seed"], env_kwargs={"conditions": 3}, **RL)
    agent.policy.load_state_dict(source.policy.state_dict())
    agent.before_learning()
    draw, rows = agent.collector.draw, Rows()
    for k in rounds:
        if k:
            agent.collector.draw = draw if name == "joint" else _only(agent, 3 * (k - 1) // cell["iterations"])
            agent.learn(until=k * agent.samples_per_iteration)
        rewards = [opd_test.reward_of(agent, agent.policy, i) for i in range(3)]
        rows.append({"iteration": k, **_tasks(rewards)})
    return rows


def scales(name: str, options: dict[str, Any], cell: dict[str, Any]) -> Rows:
    """The same where the tasks' rewards are 1, 0.3 and 0.03 for the wanted mode, and teachers learned by AWM, each
    alone: gold rewards of the three tasks, which have one size. All see equally many samples: three teachers and the
    student a quarter each, joint training and the cascade as many as they together."""
    rows, total, often = Rows(), cell["iterations"], cell["every"]
    if name == "teachers":
        for k, states in enumerate(_alone(cell["seed"], total // 4, often)):
            agent = _awm(cell["seed"])
            rewards = []
            for task, state in enumerate(states):
                agent.policy.load_state_dict(state)
                rewards.append(_gold(agent, task))
            rows.append({"iteration": 3 * k * often, **_tasks(rewards)})
        return rows
    if name == "student":
        agent = DiffusionOPD("ring2d", seed=cell["seed"], env_kwargs=SCALED, **{**opd_test.SIZE, "teacher_steps": 0})
        agent.policy.load_state_dict(_start(cell["seed"]))
        for task, state in enumerate(_alone(cell["seed"], total // 4, often)[-1]):
            agent.ctx.bank.refresh(f"teacher/{task}")
            agent.ctx.bank.policy(f"teacher/{task}").load_state_dict(state)
        agent.learner.warm.fill_(True)
        first = 3 * (total // 4)
    else:
        agent, first = _awm(cell["seed"], **options), 0
    draw = agent.collector.draw
    for k in range(0, total - first + 1, often):
        if k:
            agent.collector.draw = _only(agent, 3 * (k - 1) // total) if name == "cascade" else draw
            agent.learn(until=k * agent.samples_per_iteration)
        rows.append({"iteration": first + k, **_tasks([_gold(agent, task) for task in range(3)])})
    return rows


@lru_cache(maxsize=1)
def _start(seed: int) -> dict[str, Any]:
    """The pre-trained policy."""
    agent = DiffusionOPD("ring2d", seed=seed, env_kwargs=SCALED, **{**opd_test.SIZE, "teacher_steps": 0})
    agent.before_learning()
    return {k: v.clone() for k, v in agent.policy.state_dict().items()}


def _awm(seed: int, **options: Any) -> Any:
    agent = get_agent("awm")("ring2d", seed=seed, env_kwargs=SCALED, **(RL | options))
    agent.policy.load_state_dict(_start(seed))
    agent.before_learning()
    return agent


@lru_cache(maxsize=1)  # two methods show them
def _alone(seed: int, iterations: int, every: int) -> list[list[dict[str, Any]]]:
    """The three teachers before and after every ``every`` iterations of AWM on their own task."""
    curves: list[list[dict[str, Any]]] = []
    for task in range(3):
        agent = _awm(seed)
        agent.collector.draw = _only(agent, task)
        curve = []
        for k in range(0, iterations + 1, every):
            if k:
                agent.learn(until=k * agent.samples_per_iteration)
            curve.append({name: value.clone() for name, value in agent.policy.state_dict().items()})
        curves.append(curve)
    return [list(states) for states in zip(*curves)]


@torch.no_grad()
def _gold(agent: Any, task: int, count: int = 256) -> float:
    label = torch.full((count,), task)
    return float(agent.task.gold(agent.samples(label, 0), label).mean())


def _only(agent: Any, task: int) -> Callable[[int], Any]:
    """Draws of one condition, which every column of a cascade's phase has."""

    def draw(n: int) -> Any:
        agent.collector._drawn = Conditions(torch.full((n,), min(task, 2)))
        return agent.collector._drawn

    return draw


def _tasks(rewards: list[float]) -> dict[str, float]:
    return {"reward": sum(rewards) / 3, "lowest": min(rewards), **{f"task {i}": r for i, r in enumerate(rewards)}}
