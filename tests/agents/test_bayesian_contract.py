"""BPG, BAC and DBQPG keep the contract of agents."""

from __future__ import annotations

from functools import partial

import gymnasium
import pytest
import torch

import envs  # noqa: F401  (registers ids)
from agents.bac import BAC, BACConfig, StateScale
from agents.bpg import BPG, BPGConfig
from agents.dbqpg import DBQPG, DBQPGConfig
from agents.npg_igt import NPGIGT
from ccrl.policies import GibbsPolicy
from ccrl.testing import AgentContract, ClockEnv, Episode

pytest.importorskip("gpytorch")

# episodes of 3 steps: the shorter script of the contract's clock ends there, the longer one is cut by the horizon
EPISODIC = {"num_envs": 2, "n_steps": 3, "hidden": (4,), "compile": "off"}


class TestBPG(AgentContract):
    agent = BPG
    config = BPGConfig(normalise_obs=True, **EPISODIC)
    env_id = "Pendulum-v1"
    single_env = partial(gymnasium.make, "Pendulum-v1")


class TestBPGNatural(TestBPG):
    config = BPGConfig(model=1, baseline=False, natural=True, fisher="mean", damping=1e-2, sparsity=1e-6, **EPISODIC)
    env_id = "CartPole-v1"
    single_env = partial(gymnasium.make, "CartPole-v1")


class TestBAC(AgentContract):
    agent = BAC
    config = BACConfig(solver="sparse", nu=1e-3, normalise_obs=True, **EPISODIC)
    env_id = "Pendulum-v1"
    single_env = partial(gymnasium.make, "Pendulum-v1")


class TestBACNatural(TestBAC):
    config = BACConfig(solver="cg", natural=True, discounted=True, fisher="mean", **EPISODIC)
    env_id = "CartPole-v1"
    single_env = partial(gymnasium.make, "CartPole-v1")


STREAM = {"num_envs": 2, "n_steps": 15, "hidden": (4,), "compile": "off", "rank": 3, "kernel_hidden": (4,)}


class TestDBQPG(AgentContract):
    agent = DBQPG
    config = DBQPGConfig(update="natural", **STREAM)
    env_id = "CartPole-v1"
    single_env = partial(gymnasium.make, "CartPole-v1")


class TestUAPGVanilla(TestDBQPG):
    config = DBQPGConfig(update="vanilla", uncertainty=True, solver="low_rank", **STREAM)
    env_id = "Pendulum-v1"
    single_env = partial(gymnasium.make, "Pendulum-v1")


class TestUAPGTrust(TestDBQPG):
    config = DBQPGConfig(update="trpo", uncertainty=True, solver="cg", targets="returns", **STREAM)
    env_id = "Pendulum-v1"
    single_env = partial(gymnasium.make, "Pendulum-v1")


@pytest.mark.parametrize(("agent", "config"), [(BPG, BPGConfig), (BAC, BACConfig)])
def test_the_clock_counts_the_steps_of_episodes_only(agent: type, config: type) -> None:
    env = ClockEnv([[Episode(0, 3)], [Episode(1, 5, "truncate")]], groups=True)
    learner = agent(env, config(num_envs=2, n_steps=9))
    learner.learn(until=9)
    assert learner.num_timesteps == 2 * (3 + 5)
    assert learner.ep_rew_mean == 4.0
    assert learner.iteration == 2


@pytest.mark.parametrize("config", [BPGConfig, BACConfig])
@pytest.mark.parametrize("name", ["gae_lambda", "normalise_reward", "adam_eps"])
def test_settings_without_a_meaning_are_refused(name: str, config: type) -> None:
    with pytest.raises(ValueError, match=name):
        config(**{name: True if name == "normalise_reward" else 0.5})
    with pytest.raises(ValueError, match="collection_lag: this agent"):
        config(collection_lag=1)
    with pytest.raises(ValueError, match="time_limit: returns of whole paths"):
        BPGConfig(time_limit="terminal")


def test_what_reads_features_refuses_policies_without() -> None:
    """Before, an AttributeError or a TypeError in the middle of a build or of the first update."""
    for agent, options in ((DBQPG, {}), (NPGIGT, {"baseline": "linear"})):
        with pytest.raises(ValueError, match=r"policy: .* what the actor sees"):
            agent("CartPole-v1", policy=lambda obs, action, heads: GibbsPolicy(obs, action), **options)
    with pytest.raises(ValueError, match=r"policy: .* what the actor sees of Discrete\(3\)"):
        StateScale(gymnasium.spaces.Discrete(3), torch.nn.Linear(1, 1))


def test_resume_is_exact(tmp_path) -> None:
    for cls, config in ((BPG, TestBPG.config), (BAC, TestBAC.config), (DBQPG, TestUAPGTrust.config)):
        straight = cls("Pendulum-v1", config, seed=3)
        straight.learn(until=4 * straight.samples_per_iteration)
        first = cls("Pendulum-v1", config, seed=3)
        first.learn(until=2 * first.samples_per_iteration)
        first.save(tmp_path / "a.pt")
        second = cls.load(tmp_path / "a.pt")
        second.learn(until=4 * second.samples_per_iteration)
        assert torch.equal(straight.updaters["policy"].flat, second.updaters["policy"].flat), cls.name
