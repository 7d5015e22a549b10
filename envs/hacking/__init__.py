"""Tasks with a true and a proxy reward, on which reward hacking shows (docs/orpo.md)."""

from __future__ import annotations

from typing import Any, Literal

from ccrl.settings import Count, checked
from envs.hacking.board import Tomato, tomato_task
from envs.hacking.exact import Agreement, ExactTask
from envs.hacking.point import PointGoal, RewardModel, point_goal
from envs.hacking.proxy import ProxyReward, agreement

__all__ = [
    "Agreement", "ExactTask", "PointGoal", "ProxyReward", "RewardModel", "Tomato", "agreement", "point_goal", "tomato",
    "tomato_task",
]  # fmt: skip


@checked
def tomato(num_envs: Count = 1, *, paid: Literal["proxy", "true"] = "proxy", **options: Any) -> ProxyReward:
    """The tomato world, paid by the proxy."""
    return ProxyReward(Tomato(num_envs, **options), paid=paid)
