"""Every agent keeps the contract, on Discrete and on Box actions."""

from __future__ import annotations

from functools import partial

import gymnasium
import pytest

import envs  # noqa: F401  (registers ids)
from agents import BPO, MDPO, PPO
from agents.bpo import BPOConfig
from agents.mdpo import MDPOConfig
from agents.ppo import PPOConfig
from ccrl.testing import AgentContract

SMALL = {"num_envs": 2, "n_steps": 15, "hidden": (8,), "compile": "off"}


class TestPPO(AgentContract):
    agent = PPO
    config = PPOConfig(batch_size=8, n_epochs=2, normalise_obs=True, normalise_reward=True, **SMALL)
    env_id = "CartPole-v1"
    single_env = partial(gymnasium.make, "CartPole-v1")


class TestPPOContinuous(TestPPO):
    env_id = "Pendulum-v1"
    single_env = partial(gymnasium.make, "Pendulum-v1")


class TestMDPO(AgentContract):
    agent = MDPO
    config = MDPOConfig(inner_steps=2, critic_epochs=1, critic_batch_size=16, **SMALL)
    env_id = "CartPole-v1"
    single_env = partial(gymnasium.make, "CartPole-v1")


class TestMDPOContinuous(TestMDPO):
    env_id = "Pendulum-v1"
    single_env = partial(gymnasium.make, "Pendulum-v1")


class TestBPO(AgentContract):
    agent = BPO
    config = BPOConfig(batch_size=8, n_epochs=2, median_hidden=(4,), **SMALL)
    env_id = "CartPole-v1"
    single_env = partial(gymnasium.make, "CartPole-v1")


class TestBPOContinuous(TestBPO):
    env_id = "Pendulum-v1"
    single_env = partial(gymnasium.make, "Pendulum-v1")


def test_the_table_of_agents_is_complete() -> None:
    from agents import AGENTS, get_agent

    for name in AGENTS:
        cls = get_agent(name)
        assert cls.name == name
        assert cls.paper
        assert cls.slots()
    with pytest.raises(ValueError, match=r"did you mean .*mdpo"):
        get_agent("mdop")
