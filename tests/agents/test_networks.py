"""PPO, MDPO and BPO with memories, convolutions and factored actions: they learn, and they resume bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from agents.base import Agent
from agents.bpo import BPO
from agents.mdpo import MDPO
from agents.ppo import PPO
from ccrl.experiment.evaluation import evaluate_agent
from ccrl.policies import CNN, MLPPolicy, RecurrentPolicy, build_actor_critic
from ccrl.testing import ClockEnv, Episode, FactorTask, PixelTask, RecallTask

SHARED = {"num_envs": 32, "n_steps": 8, "hidden": (16,), "learning_rate": 1e-2, "gamma": 0.9, "compile": "off"}
OWN: dict[type[Agent], dict[str, Any]] = {
    PPO: {"batch_size": 64, "n_epochs": 4},
    MDPO: {"inner_steps": 5, "critic_batch_size": 64, "critic_epochs": 2},
    BPO: {"batch_size": 64, "n_epochs": 4, "median_hidden": (16,)},
}
GRU = {"recurrent": "gru", "recurrent_size": 16}
AGENTS = pytest.mark.parametrize("cls", list(OWN), ids=lambda cls: cls.name)


def make(cls: type[Agent], env: Any, **settings: Any) -> Agent:
    return cls(env, cls.Config(**SHARED | OWN[cls] | settings), seed=0)


def trained(cls: type[Agent], env: Callable[[], Any], iterations: int, **settings: Any) -> float:
    """Mean return of 200 episodes with the most likely actions."""
    agent = make(cls, env(), **settings)
    agent.learn(iterations * agent.samples_per_iteration)
    return float(evaluate_agent(agent, env(), episodes=200).returns.mean())


# -- learning --------------------------------------------------------------------------------------------------------


@AGENTS
def test_a_memory_solves_what_needs_one(cls: type[Agent]) -> None:
    assert trained(cls, lambda: RecallTask(32), 20, **GRU) == 1.0


def test_an_lstm_remembers_and_a_perceptron_guesses() -> None:
    assert trained(PPO, lambda: RecallTask(32), 30, recurrent="lstm", recurrent_size=16) == 1.0
    # whatever it answers: 200 fair coins have a standard error of .035
    assert trained(PPO, lambda: RecallTask(32), 20) == pytest.approx(0.5, abs=0.12)


@AGENTS
def test_convolutions_see_where_a_square_lies(cls: type[Agent]) -> None:
    assert trained(cls, lambda: PixelTask(32), 15, learning_rate=3e-3) > 0.9


@AGENTS
@pytest.mark.parametrize("binary", [False, True])
def test_factored_actions_are_learnt_factor_by_factor(cls: type[Agent], binary: bool) -> None:
    assert trained(cls, lambda: FactorTask(32, binary=binary), 15) > 0.95


# -- resuming --------------------------------------------------------------------------------------------------------


@AGENTS
@pytest.mark.parametrize(
    ("env", "settings"),
    [
        (lambda: RecallTask(32), GRU | {"n_steps": 5}),  # a border in the middle of episodes
        (lambda: RecallTask(32), {"recurrent": "lstm", "recurrent_size": 4, "n_steps": 5, "normalise_obs": True}),
        (lambda: PixelTask(32), {}),
        (lambda: FactorTask(32), {}),
    ],
    ids=["gru", "lstm", "cnn", "factors"],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    cls: type[Agent], env: Callable[[], Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = make(cls, env(), **settings)
    size = whole.samples_per_iteration
    whole.learn(until=3 * size)
    half = make(cls, env(), **settings)
    half.learn(until=3 * size, callback=lambda agent: agent.iteration < 2)
    half.save(tmp_path / "half.pt")
    loaded = cls.load(tmp_path / "half.pt", env=env())
    loaded.learn(until=3 * size)
    assert loaded.num_timesteps == whole.num_timesteps
    for (name, a), b in zip(whole.policy.state_dict().items(), loaded.policy.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# -- settings --------------------------------------------------------------------------------------------------------


def test_minibatches_of_a_memory_are_whole_columns() -> None:
    agent = make(PPO, RecallTask(32), **GRU)
    assert (agent.estimator.phases()[0].batching.unit, agent.estimator.phases()[0].batching.size) == ("sequence", 8)
    assert make(PPO, RecallTask(32), **GRU, batch_size=9).estimator.phases()[0].batching.size == 2
    policy, critic = make(MDPO, RecallTask(32), **GRU).estimator.phases()
    assert (policy.batching.unit, policy.batching.size) == ("sequence", "full")
    assert (critic.batching.unit, critic.batching.size) == ("sequence", 8)


def test_settings_that_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="recurrent_size"):
        make(PPO, RecallTask(32), recurrent_size=8)
    with pytest.raises(ValueError, match="compile"):
        make(PPO, RecallTask(32), **GRU | {"compile": "on"})
    for wrong in ({"recurrent": "rnn"}, {"critic_hidden": (0,)}, {"recurrent": "gru", "recurrent_size": 0}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            make(PPO, RecallTask(32), **wrong)


def test_acting_without_the_state_is_refused() -> None:
    agent = make(PPO, RecallTask(32), **GRU)
    obs = agent.env.reset(seed=0)
    with pytest.raises(ValueError, match="memory"):
        agent.act(obs)
    agent.learn(1)
    before = agent.collector.state_dict()["policy_state"]
    evaluate_agent(agent, RecallTask(4), episodes=4)
    assert torch.equal(agent.collector.state_dict()["policy_state"], before), "evaluation moved training's state"
    action, state = agent.predict(np.zeros((3, 2), np.float32))
    assert action.shape == (3,)
    assert state[0].shape == (3, 32)


def test_groups_and_layers_reach_the_networks() -> None:
    env = ClockEnv([[Episode(0, 3)], [Episode(1, 5, "truncate")]], groups=True)
    shared = {"num_envs": 2, "critic_hidden": (5,)}
    agent = make(PPO, env, **shared)
    assert agent.policy.actor.net[0].weight.shape == (16, 1), "the actor sees the critic's privileged group"
    assert agent.policy.critic.trunk[0].weight.shape == (5, 2)
    agent = make(PPO, env, **shared, actor_obs=("critic", "policy"), critic_obs=("policy",))
    assert agent.policy.actor.net[0].weight.shape == (16, 3)
    assert agent.policy.critic.trunk[0].weight.shape == (5, 1)
    agent.learn(1)
    with pytest.raises(ValueError, match="groups: expected keys"):
        make(PPO, env, **shared, actor_obs=("camera",))


def test_state_dependent_deviations_train() -> None:
    env = ClockEnv([[Episode(0, 3)], [Episode(1, 5)]], action_space=gym.spaces.Box(-1, 1, (1,)))
    agent = make(PPO, env, num_envs=2, state_dependent_std=True, squash=True, ent_coef=0.1)
    before = agent.policy.params(torch.zeros(1, 1))["log_std"].item()
    agent.learn(5 * agent.samples_per_iteration)
    after = agent.policy.params(torch.zeros(1, 1))["log_std"].item()
    # rewards do not depend on actions: the entropy bonus alone moves it, towards the widest squashed distribution,
    # whose log_std is about -.13 (below 0, where it starts)
    assert after < before


# -- the caller's own policies ---------------------------------------------------------------------------------------


def test_a_policy_of_the_callers_own() -> None:
    env, config = PixelTask(2), PPO.Config(hidden=(7,))
    spaces = env.single_observation_space, env.single_action_space
    heads = {"value": ()}

    class Mine(MLPPolicy):
        pass

    assert build_actor_critic(config, *spaces, heads, policy=Mine).actor.net[0].out_features == 7
    encoder = CNN(spaces[0], channels=(4,))
    made = build_actor_critic(config, *spaces, heads, encoders={"obs": encoder})
    assert made.actor.encoders["obs"].net[0].out_channels == 4
    assert build_actor_critic(config, *spaces, heads, policy=made) is made
    made = build_actor_critic(PPO.Config(), *spaces, heads, policy=RecurrentPolicy)
    assert made.actor.memory.kind == "gru"
    plain = build_actor_critic(
        config, *spaces, {}, policy=lambda obs, action, heads: MLPPolicy(obs, action, heads=heads)
    )
    assert not plain.heads
    with pytest.raises(ValueError, match=r"value heads \['value'\]"):
        build_actor_critic(config, *spaces, heads, policy=plain)
    with pytest.raises(TypeError, match="without"):
        build_actor_critic(config, *spaces, heads, policy=nn.Linear(1, 1))
    with pytest.raises(TypeError, match="encoders"):
        build_actor_critic(config, *spaces, {}, policy=plain, encoders={"obs": CNN})
    with pytest.raises(ValueError, match="recurrent"):
        build_actor_critic(PPO.Config(recurrent="gru"), *spaces, heads, policy=Mine)


@pytest.mark.parametrize("name", ["squash", "state_dependent_std"])
def test_what_only_numbers_as_actions_have_is_refused_for_others(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=True needs a Box action space, got Discrete"):
        PPO("CartPole-v1", num_envs=2, n_steps=8, **{name: True})
