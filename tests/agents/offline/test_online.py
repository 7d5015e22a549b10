"""An offline agent goes on in the environment: the same functions, a new clock, TD3's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from torch import Tensor

from agents.offline.bc import BC
from agents.offline.iql import IQL
from agents.offline.online import go_online
from agents.offline.rebrac import ReBRAC
from agents.offline.td3_bc import TD3BC
from agents.td3 import TD3
from ccrl.offline import Dataset
from ccrl.torch_env import TorchEnv

SMALL = {"hidden": (16, 16), "batch_size": 32, "updates": 5, "compile": "off"}
ONLINE = {"batch_size": 16, "rounds": 5, "buffer_size": 1000, "compile": "off"}


class Walk(TorchEnv):
    """The data's spaces: the action moves the first observation."""

    default_max_episode_steps = 10

    def __init__(self, num_envs: int = 1, **options: Any) -> None:
        super().__init__(num_envs, **options)
        self.single_observation_space = gymnasium.spaces.Box(-9, 9, (2,))
        self.single_action_space = gymnasium.spaces.Box(-2, 2, (1,))

    def initial(self, generator: torch.Generator, n: int) -> Tensor:
        return torch.randn((n, 2), generator=generator)

    def transition(self, state: Tensor, action: Tensor, noise: None) -> tuple[Tensor, Tensor, Tensor]:
        following = torch.cat([state[:, :1] + action, state[:, 1:]], -1).clamp(-9, 9)
        return following, -(action[:, 0] - 1.0).abs(), torch.zeros(len(state), dtype=torch.bool)


@pytest.mark.parametrize("cls", [TD3BC, IQL, BC, ReBRAC], ids=lambda c: c.name)
def test_actor_and_critics_are_carried_over(cls: Any, line_data: Dataset, tmp_path: Path) -> None:
    agent = cls(Walk(), data=line_data, seed=3, **SMALL)
    agent.learn(5)
    online = go_online(agent, Walk(), **ONLINE)
    obs, action = torch.randn(32, 2) * 3.0, torch.rand(32, 1) * 4.0 - 2.0
    with torch.no_grad():
        torch.testing.assert_close(online.act(obs, True), agent.act(obs, True))
        if cls in (TD3BC, IQL):
            old, new = agent.policy, online.policy
            expected = old.critic(old.features(obs), old.unit_action(action))
            torch.testing.assert_close(new.q(obs, action), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(online.ctx.bank.policy("target").q(obs, action), new.q(obs, action))
    assert online.num_timesteps == 0
    assert len(online.learner.ring) == len(line_data)
    assert len(go_online(agent, Walk(), keep_data=False, **ONLINE).learner.ring) == 0
    online.learn(10)
    assert online.num_timesteps == 10
    assert online.n_updates > 0
    online.save(tmp_path / "a.pt")
    again = TD3.load(tmp_path / "a.pt", env=Walk())
    torch.testing.assert_close(again.act(obs, True), online.act(obs, True), rtol=0, atol=0)


def test_rows_and_critics_of_other_units(line_data: Dataset) -> None:
    """Rows of the data are returns of one step; critics of rewards less 1 know nothing of raw ones, and start anew."""
    agent = TD3BC(Walk(), data=line_data, reward="minus_one", **SMALL)
    online = go_online(agent, Walk(), n_step_returns=3, **ONLINE)
    assert online.learner.ring.rows()["power"].eq(1.0).all()
    fresh = TD3(Walk(), hidden=(16, 16), **ONLINE)
    obs, action = torch.randn(4, 2), torch.randn(4, 1)
    torch.testing.assert_close(online.policy.q(obs, action), fresh.policy.q(obs, action), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(online.act(obs, True), agent.act(obs, True))


def test_what_cannot_go_on_is_refused(line_data: Dataset) -> None:
    agent = TD3BC(Walk(), data=line_data, **SMALL)
    with pytest.raises(ValueError, match=r"hidden=\(16, 16\)"):
        go_online(agent, Walk(), hidden=(8, 8))
    for wrong in ({"activation": "tanh"}, {"normalise_obs": True}):  # other functions of the same parameters
        with pytest.raises(ValueError, match=f"go_online: expected {next(iter(wrong))}="):
            go_online(agent, Walk(), **wrong)
    with pytest.raises(ValueError, match="do not fit a ring of 10"):
        go_online(agent, Walk(), buffer_size=10)
    with pytest.raises(ValueError, match=r"of \d and \d numbers as td3_bc has, got 3 and 1"):
        go_online(agent, "Pendulum-v1")
    with pytest.raises(ValueError, match="vector observations"):
        go_online(TD3(Walk(), hidden=(16, 16), buffer_size=100), Walk())  # type: ignore[arg-type]
