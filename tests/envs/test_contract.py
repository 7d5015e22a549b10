"""The contract, kept by the scripted environment, every classic task, a MuJoCo task and every adapter."""

from __future__ import annotations

import gymnasium
import pytest
import torch

import envs
from ccrl.adapters import GymnasiumEnv, SB3Env, as_vec_env, from_gymnasium
from ccrl.batched_env import AutoresetMode
from ccrl.testing import ClockEnv, EnvContract, Episode, sample_actions
from envs.classic import Acrobot, CartPole, MountainCar, MountainCarContinuous, Pendulum


class TestClock(EnvContract):
    random_starts = False

    def make_env(self, num_envs, autoreset_mode):
        script = [[Episode(100.0 * row, 3 + row), Episode(100.0 * row + 50, 2, "truncate")] for row in range(num_envs)]
        return ClockEnv(script, autoreset_mode=autoreset_mode)


class TestClockWithGroups(TestClock):
    def make_env(self, num_envs, autoreset_mode):
        script = [[Episode(10.0 * row, 4, "both")] for row in range(num_envs)]
        return ClockEnv(script, autoreset_mode=autoreset_mode, groups=True)


class TestCartPole(EnvContract):
    def make_env(self, num_envs, autoreset_mode):
        return CartPole(num_envs, autoreset_mode=autoreset_mode)


class TestCartPoleLimit(EnvContract):
    time_limit = 6

    def make_env(self, num_envs, autoreset_mode):
        return CartPole(num_envs, autoreset_mode=autoreset_mode, max_episode_steps=6)


class TestPendulum(EnvContract):
    time_limit = 12

    def make_env(self, num_envs, autoreset_mode):
        return Pendulum(num_envs, autoreset_mode=autoreset_mode, max_episode_steps=12)


class TestMountainCar(EnvContract):
    time_limit = 12

    def make_env(self, num_envs, autoreset_mode):
        return MountainCar(num_envs, autoreset_mode=autoreset_mode, max_episode_steps=12)


class TestMountainCarContinuous(EnvContract):
    time_limit = 12

    def make_env(self, num_envs, autoreset_mode):
        return MountainCarContinuous(num_envs, autoreset_mode=autoreset_mode, max_episode_steps=12)


class TestAcrobotFloat64(EnvContract):
    time_limit = 12

    def make_env(self, num_envs, autoreset_mode):
        return Acrobot(num_envs, autoreset_mode=autoreset_mode, max_episode_steps=12, dtype=torch.float64)


class TestHopper(EnvContract):
    """Some fall before the time limit."""

    time_limit = 25

    def make_env(self, num_envs, autoreset_mode):
        return envs.make("Hopper-v5", num_envs, autoreset_mode=autoreset_mode, max_episode_steps=25)


class TestSync(EnvContract):
    def make_env(self, num_envs, autoreset_mode):
        return envs.make("CartPole-v1", num_envs, backend="sync", autoreset_mode=autoreset_mode)


class TestSyncMujoco(EnvContract):
    def make_env(self, num_envs, autoreset_mode):
        return envs.make("InvertedPendulum-v5", num_envs, backend="sync", autoreset_mode=autoreset_mode)


class TestAsync(EnvContract):
    autoreset_modes = (AutoresetMode.SAME_STEP,)
    num_envs = 2

    def make_env(self, num_envs, autoreset_mode):
        return envs.make("CartPole-v1", num_envs, backend="async", autoreset_mode=autoreset_mode)


class TestAsyncWithoutAutoresetInOneStep(EnvContract):
    """Its processes know alone which copies wait for a reset."""

    resumable = False
    autoreset_modes = (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED)
    num_envs = 2

    def make_env(self, num_envs, autoreset_mode):
        return envs.make("CartPole-v1", num_envs, backend="async", autoreset_mode=autoreset_mode)


class TestVectorEntryPoint(EnvContract):
    resumable = False
    autoreset_modes = (AutoresetMode.NEXT_STEP,)

    def make_env(self, num_envs, autoreset_mode):
        return envs.make("CartPole-v1", num_envs, backend="gymnasium")


class DictPendulum(gymnasium.ObservationWrapper):
    """Pendulum with a flat dict observation of a float, an integer and a small-integer leaf."""

    def __init__(self):
        super().__init__(gymnasium.make("Pendulum-v1", max_episode_steps=9))
        box = gymnasium.spaces.Box(0, 255, (2, 2), "uint8")
        self.observation_space = gymnasium.spaces.Dict(
            {"state": self.env.observation_space, "side": gymnasium.spaces.Discrete(2), "image": box}
        )

    def observation(self, obs):
        return {"state": obs, "side": int(obs[1] > 0), "image": (abs(obs[0]) * 200 + [[0, 1], [2, 3]]).astype("uint8")}


class TestDictObservations(EnvContract):
    time_limit = 9

    def make_env(self, num_envs, autoreset_mode):
        return from_gymnasium(DictPendulum, num_envs, autoreset_mode=autoreset_mode)


class TestExportedAndImportedAgain(EnvContract):
    """A native environment through both Gymnasium adapters."""

    resumable = False

    def make_env(self, num_envs, autoreset_mode):
        vector = gymnasium.make_vec("ccrl/CartPole-v1", num_envs, autoreset_mode=autoreset_mode)
        return GymnasiumEnv(vector)


class TestSB3(EnvContract):
    resumable = False
    autoreset_modes = (AutoresetMode.SAME_STEP,)

    def make_env(self, num_envs, autoreset_mode):
        vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
        return SB3Env(vec_env.DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * num_envs))


class TestExportedToSB3AndImportedAgain(EnvContract):
    resumable = False
    autoreset_modes = (AutoresetMode.SAME_STEP,)
    time_limit = 5

    def make_env(self, num_envs, autoreset_mode):
        pytest.importorskip("stable_baselines3")
        return SB3Env(as_vec_env(Pendulum(num_envs, max_episode_steps=5)))


@pytest.mark.parametrize("id", ["CartPole-v1", "Pendulum-v1", "Hopper-v5", "ccrl/InventorySerial-v0"])
def test_finished_copies_of_native_environments_repeat_what_they_showed(id):
    """In DISABLED mode, however often they are stepped; whoever steps on sees no episode that nobody started."""
    env = envs.make(id, 3, autoreset_mode=AutoresetMode.DISABLED, max_episode_steps=4, seed=0)
    actions = [sample_actions(env.single_action_space, 3, torch.Generator().manual_seed(seed)) for seed in range(8)]
    for action in actions[:4]:
        last = env.step(action)
    obs, flags = last.obs.clone(), (last.terminated.clone(), last.truncated.clone())
    assert flags[1].all()
    for action in actions[4:]:
        result = env.step(action)
        assert torch.equal(result.obs, obs)
        assert torch.equal(result.terminated, flags[0])
        assert torch.equal(result.truncated, flags[1])
        assert not result.reward.any()
    assert not torch.equal(env.reset(mask=torch.tensor([False, True, False]))[1], obs[1])
