"""A checkpoint on another backend, and what an early stop counts."""

from __future__ import annotations

import numpy as np
import pytest

import envs
from agents import PPO

CONFIG = PPO.Config(num_envs=4, n_steps=32, batch_size=32, n_epochs=4, hidden=(8,), compile="off")


def test_a_checkpoint_loads_onto_an_environment_without_state(tmp_path):
    agent = PPO("CartPole-v1", CONFIG, seed=0)
    agent.learn(256)
    agent.save(tmp_path / "agent.pt")
    with pytest.warns(UserWarning, match="starts fresh episodes"):
        loaded = PPO.load(tmp_path / "agent.pt", env=envs.make("CartPole-v1", 4, backend="sync"))
    obs = np.linspace(-0.1, 0.1, 40, dtype=np.float32).reshape(10, 4)
    np.testing.assert_array_equal(*(a.predict(obs, deterministic=True)[0] for a in (agent, loaded)))
    loaded.learn(384)  # and trains on: from fresh episodes, on the clock of the checkpoint
    assert loaded.num_timesteps == 384
    assert loaded.iteration == agent.iteration + 1


def test_an_early_stop_counts_the_steps_it_took():
    agent = PPO("CartPole-v1", PPO.Config(**{**vars(CONFIG), "target_kl": 1e-9, "learning_rate": 1e-2}), seed=0)
    agent.learn(128)
    # the first minibatch is at the old parameters (KL 0), the second is not
    assert agent.n_updates == 2
    assert agent.gradient_steps() == 16
