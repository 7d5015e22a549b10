"""Cells of CDSA: the hazard corridor, and strengths of the correction on a point maze and on Hopper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
from agents.offline.cdsa import CDSA
from ccrl.diffusion import ScoreMLP, ScoreModel, dsm_optimum, gaussian_score, geometric_levels, score_matching_loss
from ccrl.offline import tail_mean, value_at_risk
from ccrl.seeding import named_generator, stream_seed
from envs.maze import HazardCorridor, cautious_action, overconfident_action
from scripts.make_dataset import Corridor
from scripts.studies.offline.cells import compiled, returns_of, u_maze
from scripts.studies.offline.data import SETS, opened
from scripts.studies.tables import Rows

__all__ = ["CORRIDOR", "FAR", "STRENGTHS", "play_corridor", "play_score", "play_strengths"]

CORRIDOR = [(0.0, 0.0), (0.0, 0.05), (0.0, 0.1), (0.0, 0.5), (0.0, 2.0), (0.5, 0.0), (2.0, 0.0), (5.0, 0.0)]
"""Strengths (k_a, k_s) beside the hazard."""
STRENGTHS = [
    (0.0, 0.0),
    *((k, 0.0) for k in (0.1, 0.25, 0.5, 1.0, 2.0)),
    *((0.0, k) for k in (0.05, 0.1, 0.25, 0.5, 1.0)),
]
"""Strengths (k_a, k_s) of the sweeps: each part alone."""
FAR = [(0.0, 0.0), *((k, 0.0) for k in (1.0, 2.0, 3.0, 5.0, 10.0)), *((0.0, k) for k in (0.01, 0.02, 0.05))]
"""Larger strengths of the action part, smaller ones of the state part."""


EIGENVALUES = (2.0, 1.0, 0.5, 0.2, 0.1)
"""Of the covariance of the normal distribution whose score is known."""


def play_score(cell: dict[str, Any], out: Path) -> Rows:
    """The score of a normal distribution learned by a small network, beside the exact one; a row per level."""
    torch.manual_seed(stream_seed(cell["seed"], "score"))
    generator, levels = named_generator(cell["seed"], "score: draws"), torch.tensor(geometric_levels(10))
    variance = torch.tensor(EIGENVALUES)
    model = ScoreModel(ScoreMLP(5, (128, 128)))
    optimiser, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    for _ in range(cell["updates"]):
        clean, noise = (torch.randn(512, 5, generator=generator) for _ in range(2))
        sigma = levels[torch.randint(10, (512,), generator=generator)]
        loss = score_matching_loss(model, clean * variance.sqrt(), noise, sigma)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.detach())
    found = float(torch.stack(losses[-max(1, len(losses) // 8) :]).mean())
    rows: Rows = []
    for sigma in (levels[-1], torch.tensor(0.5), levels[0]):
        x = torch.randn(20_000, 5, generator=generator) * (variance + sigma.square()).sqrt()
        exact = gaussian_score(x, torch.zeros(5), torch.diag(variance), float(sigma))
        with torch.no_grad():
            error = (model(x, sigma) - exact).norm() / exact.norm()
        rows.append({"sigma": round(float(sigma), 4), "error": float(error), "loss": found,
                     "least loss": dsm_optimum(EIGENVALUES, geometric_levels(10)), "compile": "off"})  # fmt: skip
    return rows


class Fixed(nn.Module):
    """A policy of a formula."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self._act = act

    def act(self, obs: Tensor, noise: Tensor | None, *rest: Any) -> dict[str, Tensor]:
        return {"action": self._act(obs)}

    def to_env(self, action: Tensor) -> Tensor:
        return action


def play_corridor(cell: dict[str, Any], out: Path) -> Rows:
    """One training of score and models, all strengths; the behaviour's own row where the density is the data's."""
    agent = CDSA(
        HazardCorridor(1), data=Corridor(seed=cell["seed"]).make(), policy=Fixed(overconfident_action),
        seed=cell["seed"], ignored=(0,), hidden=(128, 128), model_hidden=(128, 128), learning_rate=1e-3,
        density_of=cell["density"],
    )  # fmt: skip
    agent.learn(cell["updates"])
    rows, policy = Rows(), agent.policy
    if cell["density"] == "data":
        rows.append({"k_a": "", "k_s": "", "controller": "behaviour"} | _drive(Fixed(cautious_action), cell))
    for k_a, k_s in CORRIDOR:
        policy.config = replace(agent.config, action_strength=k_a, state_strength=k_s)
        rows.append(
            {"k_a": k_a, "k_s": k_s, "controller": "corrected" if k_a or k_s else "base"} | _drive(policy, cell)
        )
    return [row | compiled(agent) for row in rows]


@torch.no_grad()
def _drive(policy: Any, cell: dict[str, Any]) -> dict[str, float]:
    env = HazardCorridor(cell["episodes"])
    obs = env.reset(seed=stream_seed(cell["seed"], "evaluation"))
    total, hazard = torch.zeros(cell["episodes"], dtype=torch.float64), 0.0
    for _ in range(100):
        result = env.step(policy.to_env(policy.act(obs, None)["action"]).clamp(-1.0, 1.0))
        obs, total = result.obs, total + result.reward
        assert isinstance(result.final_obs, Tensor)
        hazard += float((result.final_obs[:, 1].abs() > 0.5).float().mean())
    return _risk(total.numpy()) | {"hazard steps": hazard}


def _risk(returns: Any) -> dict[str, float]:
    values = np.asarray(returns, dtype=np.float64)
    return {"return": float(values.mean()), "VaR 5%": value_at_risk(values, 0.05), "CVaR 5%": tail_mean(values, 0.05)}


def play_strengths(
    cell: dict[str, Any], out: Path, strengths: Sequence[tuple[float, float]] = tuple(STRENGTHS)
) -> Rows:
    """A base policy and a score of the data, trained apart; all strengths."""
    kind = SETS[cell["data"]]
    data = u_maze(cell["steps"]) if cell["data"] == "u_maze" else opened(cell["data"], out, cell["steps"])
    how = "on" if cell["updates"] >= 20_000 else "auto"
    base = agents.get_agent(cell["base"])(
        kind.env, data=data, seed=cell["seed"], hidden=kind.hidden, compile=how
    )  # fmt: skip
    base.learn(cell["updates"])
    agent = CDSA(
        kind.env, data=data, policy=base.policy, seed=cell["seed"], hidden=kind.hidden, model_hidden=kind.hidden,
        learning_rate=1e-3 if cell["data"] == "u_maze" else 3e-4,
    )  # fmt: skip
    agent.learn(cell["score_updates"])
    rows = Rows()
    for k_a, k_s in strengths:
        agent.policy.config = replace(agent.config, action_strength=k_a, state_strength=k_s)
        returns = returns_of(agent, kind.env, cell["episodes"], cell["seed"])
        rows.append({"k_a": k_a, "k_s": k_s} | _risk(returns) | compiled(base))
    return rows
