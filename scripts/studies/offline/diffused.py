"""Cells of PGD: likelihood and dynamics error of guided trajectories, agents on rows made in five ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.offline.pgd import PGD
from ccrl.offline import Dataset
from ccrl.seeding import named_generator
from envs.maze import PointMaze
from scripts.studies.offline.cells import SPARSE, compiled, returns_of, u_maze
from scripts.studies.tables import Rows

__all__ = ["STEPS", "play_guidance", "play_rows", "target_policy"]

SMALL: dict[str, Any] = {
    "window": 16, "generated": 15, "sampling_steps": 32, "denoiser_features": 48, "denoiser_levels": 2,
    "denoiser_batch": 64,
}  # fmt: skip
"""A denoiser for two cores."""
STEPS = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Coefficients of the guidance."""


def target_policy(obs: Tensor) -> tuple[Tensor, Tensor]:
    """``.7 tanh((1, 1) - p - .5 v)`` with unit variance."""
    mean = 0.7 * (1.0 - obs[:, :2] - 0.5 * obs[:, 2:]).tanh()
    return mean, torch.ones_like(mean)


def play_guidance(cell: dict[str, Any], out: Path) -> Rows:
    """One denoiser, the same noise for all coefficients; the data's own windows first."""
    data = u_maze(cell["steps"], cell["seed"])
    rows: Rows = [{"strength": "data"} | _judged(_windows(data, cell["trajectories"], cell["seed"]), data)]
    agent: Any = None
    for strength in STEPS:
        made = PGD(
            "ccrl/PointMazeU-v0", data=data, seed=cell["seed"], strength=strength, trajectories=1, compile="off",
            denoiser_steps=cell["denoiser_steps"], **SMALL,
        )  # fmt: skip
        if agent is None:
            made.before_learning()
            agent = made
        made.maker.load_state_dict(agent.maker.state_dict())
        made.actor = target_policy  # type: ignore[method-assign]
        made.ctx.generator.manual_seed(cell["seed"])
        rows.append({"strength": strength} | _judged(made.generate(cell["trajectories"], guided=True), data))
    return [row | {"compile": "off"} for row in rows]


def _windows(data: Dataset, count: int, seed: int) -> dict[str, Tensor]:
    """Stretches of 15 rows inside episodes."""
    ends = data.episode[15:] == data.episode[:-15]
    starts = torch.as_tensor(ends).nonzero().squeeze(-1)
    chosen = starts[torch.randint(len(starts), (count,), generator=named_generator(seed, "windows"))]
    index = (chosen.unsqueeze(-1) + torch.arange(15)).flatten()
    return {k: torch.as_tensor(getattr(data, k))[index] for k in ("obs", "action", "next_obs")}


def _judged(rows: dict[str, Tensor], data: Dataset) -> dict[str, float]:
    env = PointMaze(len(rows["obs"]))
    truth, _, _ = env.transition(rows["obs"], rows["action"], None)
    error = ((rows["next_obs"] - truth).square() / torch.as_tensor(data.obs.var(0))).mean(-1)
    mean, _ = target_policy(rows["obs"])
    ways = rows["obs"].view(-1, 15, 4)
    return {
        "log pi": float(-0.5 * (rows["action"] - mean).square().sum(-1).mean()), "error mean": float(error.mean()),
        "error median": float(error.median()),
        "displacement": float((ways[:, -1, :2] - ways[:, 0, :2]).norm(dim=-1).mean()),
    }  # fmt: skip


def play_rows(cell: dict[str, Any], out: Path) -> Rows:
    """TD3+BC or IQL on rows of one kind."""
    agent = PGD(
        "ccrl/PointMazeU-v0", data=u_maze(cell["steps"]), seed=cell["seed"], base=cell["base"], rows=cell["rows"],
        hidden=(128, 128), trajectories=cell["trajectories"], denoiser_steps=cell["denoiser_steps"],
        regenerate_every=max(100, cell["updates"] // 5), **SMALL, **SPARSE.get(cell["base"], {}),
    )  # fmt: skip
    agent.learn(cell["updates"])
    returns = returns_of(agent, "ccrl/PointMazeU-v0", cell["episodes"], cell["seed"])
    return [{"return": float(returns.mean())} | compiled(agent)]
