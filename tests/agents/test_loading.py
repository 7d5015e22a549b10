"""Checkpoints on other backends, tasks and devices; what agents refuse; what an early stop counts."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

import envs
from agents import BPO, MDPO, PPO, CrossQ
from ccrl.adapters import from_gymnasium
from ccrl.experiment import checkpoint
from ccrl.experiment.callbacks import CheckpointCallback
from ccrl.seeding import stream_seed

CONFIG = PPO.Config(num_envs=4, n_steps=32, batch_size=32, n_epochs=4, hidden=(8,), compile="off")


def test_a_checkpoint_loads_onto_an_environment_without_state(tmp_path):
    agent = PPO("CartPole-v1", CONFIG, seed=0)
    agent.learn(until=256)
    agent.save(tmp_path / "agent.pt")
    with pytest.warns(UserWarning, match="starts fresh episodes"):
        loaded = PPO.load(tmp_path / "agent.pt", env=envs.make("CartPole-v1", 4, backend="sync"))
    obs = np.linspace(-0.1, 0.1, 40, dtype=np.float32).reshape(10, 4)
    np.testing.assert_array_equal(*(a.predict(obs, deterministic=True)[0] for a in (agent, loaded)))
    loaded.learn(until=384)  # and trains on: from fresh episodes, on the clock of the checkpoint
    assert loaded.num_timesteps == 384
    assert loaded.iteration == agent.iteration + 1


def test_an_early_stop_counts_the_steps_it_took():
    agent = PPO("CartPole-v1", PPO.Config(**{**vars(CONFIG), "target_kl": 1e-9, "learning_rate": 1e-2}), seed=0)
    agent.learn(until=128)
    # the first minibatch is at the old parameters (KL 0), the second is not
    assert agent.n_updates == 2
    assert agent.learner.gradient_steps() == 16


def test_another_id_starts_fresh_episodes_and_keeps_none_of_the_old_state(tmp_path):
    agent = PPO("HalfCheetah-v5", CONFIG, env_kwargs={"reset_noise_scale": 0.0}).learn(until=128)
    agent.save(tmp_path / "agent.pt")
    # of equal spaces and of simulator states of one size
    loaded = PPO.load(tmp_path / "agent.pt", env="Walker2d-v5")
    assert loaded.env_kwargs == {}
    fresh = envs.make("Walker2d-v5", 4)
    torch.testing.assert_close(
        loaded.collector._stream.obs, fresh.reset(seed=stream_seed(0, "resumed at 128")), rtol=0, atol=0
    )
    with pytest.warns(UserWarning, match="the saved state is of a HalfCheetah, the environment is a Walker2d"):
        given = PPO.load(tmp_path / "agent.pt", env=envs.make("Walker2d-v5", 4))
    assert torch.equal(given.collector._stream.obs, loaded.collector._stream.obs)
    same = PPO.load(tmp_path / "agent.pt", env="ccrl/HalfCheetah-v5")
    assert torch.equal(same.collector._stream.obs, agent.collector._stream.obs)
    assert same.env_kwargs == {"reset_noise_scale": 0.0}


class _Line(gymnasium.Env):
    """A point that walks from ``start`` to the right, without an end."""

    observation_space, action_space, start = (
        gymnasium.spaces.Box(-np.inf, np.inf, (1,)),
        gymnasium.spaces.Discrete(2),
        0,
    )

    def reset(self, *, seed=None, options=None):
        self.x = self.start
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x += 1
        return np.array([self.x], np.float32), 1.0, False, False, {}


class _FarLine(_Line):
    start = 1000


def test_another_class_of_gymnasiums_starts_fresh_episodes(tmp_path):
    agent = PPO(from_gymnasium(_Line, 4), CONFIG).learn(until=128)
    agent.save(tmp_path / "agent.pt")
    assert PPO.load(tmp_path / "agent.pt", env=from_gymnasium(_Line, 4)).collector._stream.obs[0].item() == 32
    with pytest.warns(UserWarning, match="of a _Line, the environment is a _FarLine"):
        loaded = PPO.load(tmp_path / "agent.pt", env=from_gymnasium(_FarLine, 4))
    assert loaded.collector._stream.obs[0].item() == 1000


def test_devices_that_are_not_here_are_refused(tmp_path):
    PPO("CartPole-v1", CONFIG).save(tmp_path / "agent.pt")
    for call in (
        lambda device: PPO("CartPole-v1", CONFIG, device=device),
        lambda device: PPO.load(tmp_path / "agent.pt", device=device),
    ):
        with pytest.raises(ValueError, match="device: expected one that is here, got 'cuda:99'"):
            call("cuda:99")
        with pytest.raises(ValueError, match="device: expected one of PyTorch's"):
            call("gpu")


def test_float64_observations_and_wrong_ones():
    agent = PPO("Hopper-v5", CONFIG, env_kwargs={"dtype": torch.float64}).learn(until=128)
    obs = agent.env.reset(seed=0)
    assert obs.dtype == torch.float64
    assert agent.act(obs, deterministic=True).dtype == torch.float32
    np.testing.assert_array_equal(agent.predict(obs.numpy(), deterministic=True)[0], agent.act(obs, True).numpy())
    with pytest.raises(
        ValueError, match=r"observation: expected shape \(11,\) or a batch of shape \(n, 11\), got \(3,\)"
    ):
        agent.predict(np.zeros(3))


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (PPO, {"learning_rate": 0.0}),
        (PPO, {"batch_size": 0}),
        (PPO, {"n_epochs": 0}),
        (PPO, {"clip_range": -0.1}),
        (PPO, {"clip_range_vf": 0.0}),
        (PPO, {"max_grad_norm": 0.0}),
        (PPO, {"target_kl": -1.0}),
        (PPO, {"clip_norm": 0.0}),
        (PPO, {"adam_eps": 0.0}),
        (PPO, {"hidden": (8, 0)}),
        (MDPO, {"inner_steps": 0}),
        (MDPO, {"critic_epochs": 0}),
        (MDPO, {"critic_batch_size": 0}),
        (MDPO, {"learning_rate": -1.0}),
        (BPO, {"temperature": 0.0}),
        (BPO, {"median_temperature": 0.0}),
        (BPO, {"batch_size": -1}),
        (BPO, {"median_hidden": (0,)}),
        (PPO, {"learning_rate": 10**400}),
        (CrossQ, {"adam_beta1": 1.0}),
    ],
)
def test_settings_that_cannot_train_are_refused_by_name(cls, wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}(\[\d\])?: expected "):
        cls.Config(**wrong)


def test_states_that_a_discrete_space_does_not_have():
    class Lost(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Discrete(3), gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return 0, {}

        def step(self, action):
            return 3, 1.0, False, False, {}

    agent = PPO(from_gymnasium(Lost, 4), CONFIG)
    message = r"obs: expected one of Discrete\(3\), got 3 from environment 0 \(observation 1 of the rollout\)"
    with pytest.raises(ValueError, match=message):
        agent.learn(until=128)


@pytest.mark.parametrize("options", [float("inf"), "no", ["gravity"]])
def test_options_of_an_environment_that_are_none(options):
    with pytest.raises(TypeError, match="env_kwargs: expected options by name"):
        PPO("CartPole-v1", env_kwargs=options)


def test_the_state_of_a_callback_with_other_names(tmp_path):
    agent = PPO("CartPole-v1", CONFIG)
    agent.learn(128, callback=CheckpointCallback(tmp_path / "a", 128))
    state = agent.state_dict()
    (key,) = state["callbacks"]
    state["callbacks"] = {key: {"following": 64}}
    other = PPO("CartPole-v1", CONFIG)
    other.load_state_dict(state)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"not one of CheckpointCallback.*got the keys \['following'\]"
    ):
        other.learn(128, callback=CheckpointCallback(tmp_path / "b", 128))
