"""Options of environments: numbers that are none, and choices that are not there, are refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

import envs
from ccrl.settings import ConfigError


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("CartPole-v1", {"sutton_barto_reward": "no"}, "sutton_barto_reward: expected bool, got 'no'"),
        ("CartPole-v1", {"max_episode_steps": -3}, "max_episode_steps: expected >= 1, got -3"),
        ("CartPole-v1", {"max_episode_steps": 1.5}, "max_episode_steps: expected int, got 1.5"),
        ("CartPole-v1", {"max_episode_steps": 2**63}, "max_episode_steps: expected >= 1, of 64 bits"),
        ("Pendulum-v1", {"g": math.nan}, "g: expected a finite number, got nan"),
        ("ccrl/LQR-v0", {"horizon": -0.5}, "horizon: expected int"),
        ("ccrl/LQR-v0", {"gamma": 1.5}, r"gamma: expected a number in \[0, 1\], got 1.5"),
        ("ccrl/Bandit-v0", {"kind": "cubic"}, "kind: expected one of 'linear', 'quadratic', got 'cubic'"),
        ("ccrl/RandomMDP-v0", {"concentration": 0.0}, "concentration: expected > 0, got 0.0"),
        ("ccrl/RandomWalk-v0", {"states": 1}, "states: expected >= 2, got 1"),
        ("ccrl/InventoryOneStoreLost-v0", {"underage": -1.0}, "underage: expected >= 0, got -1.0"),
        ("ccrl/InventoryTransshipment-v0", {"correlation": math.nan}, r"correlation: expected a number in \[0, 1\]"),
        ("HalfCheetah-v5", {"ctrl_cost_weight": math.inf}, "ctrl_cost_weight: expected a finite number, got inf"),
        ("HalfCheetah-v5", {"frame_skip": 0}, "frame_skip: expected >= 1, got 0"),
        ("Hopper-v5", {"healthy_z_range": (math.nan, 1.0)}, r"healthy_z_range\[0\]: expected a finite number"),
        ("Hopper-v5", {"terminate_when_unhealthy": "yes"}, "terminate_when_unhealthy: expected bool"),
        ("CartPole-v1", {"num_envs": "2"}, "num_envs: expected int, got '2'"),
        ("ccrl/PointMazeU-v0", {"dense": "no"}, "dense: expected bool, got 'no'"),
        ("ccrl/GridCoverage-v0", {"stochasticity": math.nan}, r"stochasticity: expected a number in \[0, 1\]"),
        ("ccrl/GridFacility-v0", {"width": -1.0}, "width: expected > 0, got -1.0"),
        ("ccrl/PointGoal-v0", {"label_noise": math.inf}, "label_noise: expected >= 0"),
        ("ccrl/PointCoverage-v0", {"radius": ""}, "radius: expected float"),
    ],
)
def test_refused_by_name(id: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        envs.make(id, **{"num_envs": 2} | options)


def test_ends_of_ranges_may_be_open() -> None:
    assert envs.make("Hopper-v5", 1, healthy_z_range=(0.7, math.inf)).num_envs == 1


def test_unknown_options_name_those_there_are() -> None:
    known = "compile, dtype, max_episode_steps, sutton_barto_reward"
    with pytest.raises(TypeError, match=f"CartPole-v1: expected options among {known}, got masscart"):
        envs.make("CartPole-v1", masscart=2.0)
