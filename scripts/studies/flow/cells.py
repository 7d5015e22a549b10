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
from scripts.studies.flow.control import hopper, maze
from scripts.studies.flow.distil import opd, scales
from scripts.studies.tables import Rows

__all__ = ["CONTROL", "METHODS", "PLAY", "play"]

HACKED: dict[str, Any] = {
    "n_prompts": 8, "group_size": 16, "n_epochs": 4, "steps": 10, "time_shift": 3.0, "base": "exact", "hidden": (64,
    64), "learning_rate": 1e-3, "clip_low": 2e-3, "clip_high": 2e-3, "compile": "off",
}  # fmt: skip
PLAIN = {"sampler": "ode", "noise_level": 0.0}
GRID = {f"{name}, eps {eps:g}": (name, HACKED | {"clip_low": eps, "clip_high": eps})
        for name in ("flow_grpo", "grpo_guard") for eps in (2e-4, 6e-4, 2e-3, 6e-3, 2e-2)}  # fmt: skip
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
    "guard_grid": GRID,
    "guard_test": GRID,  # of which the study runs those that guard_grid chose
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
    "opd_scales": {
        "teachers": ("teachers", {}), "student": ("student", {}), "joint": ("joint", {}),
        "joint, deviation of the group": ("joint", {"advantage_std": "group"}), "cascade": ("cascade", {}),
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
    "guard": guard, "guard_grid": guard, "guard_test": guard, "awm": awm, "opd": opd, "opd_scales": scales,
    "gridworld": gridworld,
}  # fmt: skip
CONTROL = {"maze": maze, "hopper": hopper}


def play(cell: dict[str, Any], out: Path) -> Rows:
    """Run one cell. :param out: folder of data sets that cells share."""
    torch.set_num_threads(1)
    study = cell["study"]
    name, options = METHODS[study][cell["method"]]
    options = copy.deepcopy(options)
    return CONTROL[study](options, cell, out) if study in CONTROL else PLAY[study](name, options, cell)
