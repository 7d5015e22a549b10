"""Frozen versions of a policy act as the live one does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from agents import PPO, get_agent
from ccrl.policies.distributions import CATEGORICAL, GAUSSIAN, SQUASHED


@pytest.mark.parametrize("distribution", [CATEGORICAL, GAUSSIAN, SQUASHED])
def test_distributions_are_one_object_each(distribution: Any) -> None:
    assert copy.deepcopy(distribution) is distribution
    assert pickle.loads(pickle.dumps(distribution)) is distribution


@pytest.mark.parametrize(("env", "squash"), [("CartPole-v1", False), ("Pendulum-v1", False), ("Pendulum-v1", True)])
def test_a_bank_version_acts_like_the_policy(env: str, squash: bool) -> None:
    agent = PPO(env, PPO.Config(num_envs=2, n_steps=8, hidden=(8,), squash=squash, log_std_init=2.0))
    agent.ctx.bank.refresh("old")
    old = agent.ctx.bank.policy("old")
    obs = torch.randn(64, *agent.env.single_observation_space.shape)
    noise = agent.policy.draw_noise(64, None, torch.device("cpu"))
    live = agent.policy.to_env(agent.policy.act(obs, noise)["action"])
    frozen = old.to_env(old.act(obs, noise)["action"])
    assert torch.equal(live, frozen)
    if env == "Pendulum-v1":
        assert float(frozen.detach().abs().max()) <= 2.0


@pytest.mark.parametrize("name", ["ppo", "mdpo", "bpo"])
def test_versions_survive_a_checkpoint(name: str, tmp_path: Any) -> None:
    cls = get_agent(name)
    agent = cls("CartPole-v1", cls.Config(num_envs=2, n_steps=8, hidden=(8,), compile="off"))
    agent.ctx.bank.refresh("ref")
    agent.learn(until=2 * agent.samples_per_iteration)
    agent.save(tmp_path / "a.pt")
    loaded = cls.load(tmp_path / "a.pt")
    versions = [dict(a.ctx.bank.policy("ref").named_parameters()) for a in (agent, loaded)]
    live = dict(loaded.policy.named_parameters())
    for key, value in versions[0].items():
        assert torch.equal(value, versions[1][key])
    assert any(not torch.equal(value, live[key]) for key, value in versions[1].items())
