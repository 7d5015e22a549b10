"""What a cell of a study on flow policies runs: one method, one seed, a curve of measurements."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents import get_agent
from scripts.reproductions import awm as awm_test
from scripts.reproductions import diffusion_opd as opd_test
from scripts.studies.flow.control import hopper, maze
from scripts.studies.tables import Rows

__all__ = ["METHODS", "PLAY", "play"]

HACKED: dict[str, Any] = {
    "n_prompts": 8, "group_size": 16, "n_epochs": 4, "steps": 10, "time_shift": 3.0, "base": "exact", "hidden": (64,
    64), "learning_rate": 1e-3, "clip_low": 2e-3, "clip_high": 2e-3, "compile": "off",
}  # fmt: skip
PLAIN = {"sampler": "ode", "noise_level": 0.0}
METHODS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "guard": {
        "flow_grpo": ("flow_grpo", HACKED),
        "ratio normalised": ("grpo_guard", HACKED | {"step_weight": "none"}),
        "grpo_guard": ("grpo_guard", HACKED),
        "flow_grpo, eps 2e-2": ("flow_grpo", HACKED | {"clip_low": 2e-2, "clip_high": 2e-2}),
        "grpo_guard, eps 2e-4": ("grpo_guard", HACKED | {"clip_low": 2e-4, "clip_high": 2e-4}),
        "flow_grpo + KL": ("flow_grpo", HACKED | {"kl_coef": 0.02}),
        "grpo_guard + KL": ("grpo_guard", HACKED | {"kl_coef": 0.02}),
    },
    "awm": {
        "awm": ("awm", PLAIN),
        "diffusion_nft": ("diffusion_nft", PLAIN),
        "flow_grpo": ("flow_grpo", {}),
        "flow_grpo, rate 2e-3": ("flow_grpo", {"learning_rate": 2e-3}),
    },
    "opd": {
        "ode": ("ode", {}), "closed": ("closed", {}), "policy gradient": ("policy_gradient", {}),
        "joint awm": ("joint", {}), "cascade awm": ("cascade", {}),
    },
    "gridworld": {
        "awm": ("awm", PLAIN | {"learning_rate": 5e-3, "kl_coef": 0.0}),
        "flow_grpo": ("flow_grpo", {"learning_rate": 3e-3}),
    },
    "maze": {"flow_ppo": ("flow_ppo", {})},
    "hopper": {"flow_ppo": ("flow_ppo", {})},
}  # fmt: skip
"""Study -> method as shown -> agent, and settings beside the study's own."""


def curve(agent: Any, iterations: int, every: int, count: int = 512) -> Rows:
    """Measurements of the agent's samples before training and every ``every`` iterations."""
    agent.before_learning()
    found = [{"iteration": 0, **agent.measure(count)}]
    for k in range(every, iterations + 1, every):
        agent.learn(until=k * agent.samples_per_iteration)
        found.append({"iteration": k, **agent.measure(count)})
    return found


def guard(name: str, options: dict[str, Any], cell: dict[str, Any]) -> Rows:
    """A proxy that can be hacked, from the exact velocity of the data."""
    agent = get_agent(name)("mixture16", seed=cell["seed"], **options)
    return curve(agent, cell["iterations"], cell["every"])


def awm(name: str, options: dict[str, Any], cell: dict[str, Any]) -> Rows:
    """Eight Gaussians; equal samples and equal updates."""
    settings = {k: v for k, v in awm_test.SIZE.items() if k not in options} | options
    start = awm_test.base(cell["seed"])
    agent = get_agent(name)("ring2d", seed=cell["seed"], **settings)
    agent.policy.load_state_dict(start.policy.state_dict())
    return curve(agent, cell["iterations"], cell["every"])


def opd(name: str, options: dict[str, Any], cell: dict[str, Any]) -> Rows:
    """Rewards of the student on the three tasks, beside AWM on all tasks at once and on one after the other."""
    source = opd_test.start(cell["seed"])
    rounds = tuple(range(0, cell["iterations"] + 1, cell["every"]))
    if name in opd_test.FORMS:
        found = opd_test.distil(source, name, cell["seed"], rounds)
        return [{"iteration": k, **_tasks(rewards)} for k, rewards in zip(rounds, found)]
    settings = {**awm_test.SIZE, **awm_test.ODE, "steps": 10, "n_prompts": 3, "group_size": 128}
    agent = get_agent("awm")("ring2d", seed=cell["seed"], env_kwargs={"conditions": 3}, **settings)
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


def _only(agent: Any, task: int) -> Callable[[int], Any]:
    """Draws of one condition, which every column of a cascade's phase has."""

    def draw(n: int) -> Any:
        from ccrl.flow import Conditions

        agent.collector._drawn = Conditions(torch.full((n,), min(task, 2)))
        return agent.collector._drawn

    return draw


def _tasks(rewards: list[float]) -> dict[str, float]:
    return {"reward": sum(rewards) / 3, "lowest": min(rewards), **{f"task {i}": r for i, r in enumerate(rewards)}}


def gridworld(name: str, options: dict[str, Any], cell: dict[str, Any]) -> Rows:
    """Actions in the plane from the data of all four moves; ``both``: the smallest share of a right move where two
    are."""
    settings: dict[str, Any] = {"n_prompts": 23, "group_size": 16, "steps": 10, "learning_rate": 1e-3, "base": "exact",
                                "hidden": (64, 64), "compile": "off"}  # fmt: skip
    agent = get_agent(name)("gridworld", seed=cell["seed"], **(settings | options))
    rows = Rows()
    agent.before_learning()
    for k in range(0, cell["iterations"] + 1, cell["every"]):
        if k:
            agent.learn(until=k * agent.samples_per_iteration)
        label = torch.arange(agent.task.conditions).repeat(64)
        x = agent.samples(label, 0)
        shares = agent.task.both(x, label)
        rows.append({"iteration": k, "reward": float(agent.task.reward(x, label).mean()),
                     "gold": float(agent.task.gold(x, label).mean()), "both": float(shares.mean())})  # fmt: skip
    return rows


PLAY: dict[str, Callable[[str, dict[str, Any], dict[str, Any]], Rows]] = {
    "guard": guard, "awm": awm, "opd": opd, "gridworld": gridworld,
}  # fmt: skip
CONTROL = {"maze": maze, "hopper": hopper}


def play(cell: dict[str, Any], out: Path) -> Rows:
    """Run one cell. :param out: folder of data sets that cells share."""
    torch.set_num_threads(1)
    study = cell["study"]
    name, options = METHODS[study][cell["method"]]
    options = copy.deepcopy(options)
    return CONTROL[study](options, cell, out) if study in CONTROL else PLAY[study](name, options, cell)
