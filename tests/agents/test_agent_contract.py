"""Every agent keeps the contract, on Discrete and on Box actions."""

from __future__ import annotations

from functools import partial

import gymnasium
import pytest

import envs  # noqa: F401  (registers ids)
from agents import BPO, MDPO, PPO, QRDQN, SAC, TD3, CrossQ
from agents.bpo import BPOConfig
from agents.crossq import CrossQConfig
from agents.dqn import QRDQNConfig
from agents.mdpo import MDPOConfig, OffPolicyMDPO, OffPolicyMDPOConfig
from agents.ppo import PPOConfig
from agents.sac import SACConfig
from agents.td3 import TD3Config
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


REPLAY = {
    "num_envs": 2, "n_steps": 15, "rounds": 1, "learning_starts": 10, "updates": 2, "batch_size": 8,
    "buffer_size": 100, "hidden": (8,), "compile": "off",
}  # fmt: skip


class TestSAC(AgentContract):
    agent = SAC
    config = SACConfig(normalise_obs=True, **REPLAY)
    env_id = "Pendulum-v1"
    single_env = partial(gymnasium.make, "Pendulum-v1")


class TestSACOnThreeSteps(TestSAC):
    config = SACConfig(n_step_returns=3, actor_every=2, alpha_learning_rate=None, **REPLAY)


class TestTD3(TestSAC):
    agent = TD3
    config = TD3Config(**REPLAY)


class TestCrossQ(TestSAC):
    agent = CrossQ
    config = CrossQConfig(critic_hidden=(8,), actor_every=2, warm_up=3, **REPLAY)


class TestOffPolicyMDPO(TestSAC):
    agent = OffPolicyMDPO
    config = OffPolicyMDPOConfig(tsallis=1.4, reference_every=3, **REPLAY)


class TestQRDQN(AgentContract):
    agent = QRDQN
    config = QRDQNConfig(n_quantiles=4, double=True, target_every=3, **REPLAY)
    env_id = "CartPole-v1"
    single_env = partial(gymnasium.make, "CartPole-v1")


def test_the_table_of_agents_is_complete() -> None:
    from agents import AGENTS, get_agent

    for name in AGENTS:
        cls = get_agent(name)
        assert cls.name == name
        assert cls.paper
        assert cls.slots()
    with pytest.raises(ValueError, match=r"did you mean .*mdpo"):
        get_agent("mdop")
