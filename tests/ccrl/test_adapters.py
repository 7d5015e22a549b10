"""The adapters beyond the contract (tests/envs/test_contract.py): numbers, types, refusals; and the scripted clock."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv, VectorEnv

from ccrl.adapters import GymnasiumEnv, SB3Env, as_vector_env, from_gymnasium
from ccrl.adapters.seeds import copy_seeds
from ccrl.batched_env import AutoresetMode, check_device, resolve_env
from ccrl.testing import ClockEnv, Episode

A, B = Episode(0.0, 3, "terminate"), Episode(10.0, 2, "truncate")


class Scripted(gymnasium.Env):
    """A single environment with observations ``[base + step]``, float64, and the endings of an ``Episode``."""

    action_space = spaces.Discrete(2)
    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)

    def __init__(self, episode):
        self.episode, self.clock = episode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.clock = 0
        return np.array([self.episode.base]), {}

    def step(self, action):
        self.clock += 1
        done = self.clock == self.episode.length
        obs = np.array([self.episode.base + self.clock])
        return obs, 0.1, done and self.episode.ending == "terminate", done and self.episode.ending == "truncate", {}


def rows(env, steps):
    """Observation, final observation where one is due, and flags of each step, as plain numbers."""
    table = [env.reset(seed=0)[:, 0].tolist()]
    for _ in range(steps):
        result = env.step(torch.zeros(env.num_envs, dtype=torch.int64))
        done = result.terminated | result.truncated
        final = [float(result.final_obs[i, 0]) if result.final_obs is not None and done[i] else None for i in range(2)]
        flags = ["T" * bool(a) + "t" * bool(b) for a, b in zip(result.terminated, result.truncated)]
        table.append((result.obs[:, 0].tolist(), final, flags))
        if env.autoreset_mode == AutoresetMode.DISABLED and done.any():
            table.append(env.reset(mask=done)[:, 0].tolist())
    return table


EXPECTED = {
    AutoresetMode.SAME_STEP: [
        [0, 10],
        ([1, 11], [None, None], ["", ""]),
        ([2, 10], [None, 12], ["", "t"]),
        ([0, 11], [3, None], ["T", ""]),
        ([1, 10], [None, 12], ["", "t"]),
    ],
    AutoresetMode.NEXT_STEP: [
        [0, 10],
        ([1, 11], [None, None], ["", ""]),
        ([2, 12], [None, None], ["", "t"]),
        ([3, 10], [None, None], ["T", ""]),
        ([0, 11], [None, None], ["", ""]),
    ],
    AutoresetMode.DISABLED: [
        [0, 10],
        ([1, 11], [None, None], ["", ""]),
        ([2, 12], [None, None], ["", "t"]),
        [2, 10],
        ([3, 11], [None, None], ["T", ""]),
        [0, 11],
        ([1, 12], [None, None], ["", "t"]),
        [1, 10],
    ],
}


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_clock_and_adapter_tell_the_same_story(mode):
    clock = ClockEnv([[A], [B]], autoreset_mode=mode)
    vector = SyncVectorEnv([lambda: Scripted(A), lambda: Scripted(B)], autoreset_mode=mode, copy=False)
    adapted = GymnasiumEnv(vector)
    assert rows(clock, 4) == EXPECTED[mode]
    assert rows(adapted, 4) == EXPECTED[mode]
    assert rows(GymnasiumEnv(as_vector_env(clock)), 4) == EXPECTED[mode]


def test_clock_overwrites_its_buffers_and_hides_what_nobody_may_read():
    env = ClockEnv([[A], [B]])
    obs = env.reset()
    kept = obs.clone()
    result = env.step(torch.zeros(2, dtype=torch.int64))
    assert torch.equal(obs, result.obs)
    assert not torch.equal(kept, obs)
    assert result.final_obs.isnan().all()
    hidden = ClockEnv([[A]], provides_final_obs=False)
    hidden.reset()
    assert hidden.step(torch.zeros(1, dtype=torch.int64)).final_obs is None


def test_clock_plays_scripts_and_groups():
    env = ClockEnv([[A, B]], groups=True, reward=2.0)
    assert env.reset()["policy"].tolist() == [[0.0]]
    action = torch.zeros(1, dtype=torch.int64)
    results = []
    for _ in range(5):
        result = env.step(action)
        results.append((result.obs["critic"].tolist()[0], float(result.reward[0])))
    assert results == [([1, 1], 2), ([2, 2], 2), ([10, 0], 2), ([11, 1], 2), ([0, 0], 2)]
    with pytest.raises(ValueError, match="length >= 1"):
        ClockEnv([[Episode(0.0, 0)]])


def test_each_copy_gets_a_seed_of_its_own_and_numbers_are_gymnasiums():
    env = from_gymnasium("Pendulum-v1", 3)
    obs = env.reset(seed=10)
    theirs = [gymnasium.make("Pendulum-v1") for _ in range(3)]
    expected = np.stack([other.reset(seed=s)[0] for s, other in zip(copy_seeds(10, 3), theirs)])
    assert np.array_equal(obs.numpy(), expected)
    result = env.step(torch.full((3, 1), 0.5))
    steps = [other.step(np.array([0.5], dtype=np.float32)) for other in theirs]
    assert np.array_equal(result.obs.numpy(), np.stack([step[0] for step in steps]))
    np.testing.assert_allclose(result.reward.numpy(), [step[1] for step in steps], rtol=1e-6)


def test_neighbouring_seeds_share_no_copy():
    """With seeds s + i, 15 of 16 copies of run 0 were also copies of run 1."""
    seeds = [seed for run in range(50) for seed in copy_seeds(run, 16)]
    assert len(set(seeds)) == 50 * 16
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert copy_seeds(3, 4) == copy_seeds(3, 9)[:4]
    with pytest.raises(ValueError, match="seed: expected an integer >= 0, got -1"):
        copy_seeds(-1, 2)
    for make in (
        lambda: from_gymnasium("CartPole-v1", 16),
        lambda: GymnasiumEnv(gymnasium.make_vec("CartPole-v1", 16, "vector_entry_point")),
        lambda: GymnasiumEnv(
            gymnasium.wrappers.vector.ClipReward(gymnasium.make_vec("CartPole-v1", 16, "sync"), -1, 1)
        ),
    ):
        first, second = (make().reset(seed=seed).clone() for seed in (0, 1))
        assert not any(bool((second == row).all(1).any()) for row in first)


def test_refusals_of_the_gymnasium_adapter():
    with pytest.raises(TypeError, match="from_gymnasium"):
        GymnasiumEnv(gymnasium.make("CartPole-v1"))
    with pytest.raises(ValueError, match="need an id"):
        from_gymnasium(lambda: Scripted(A), 1, g=3.0)
    env = from_gymnasium(lambda: Scripted(A), 2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="DISABLED"):
        env.reset(mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"integer actions of shape \(2,\), got torch.float32"):
        env.step(torch.zeros(2))


def test_environments_in_place_of_functions_that_make_them():
    single = Scripted(A)
    with pytest.raises(TypeError, match=r"got the environment .*use from_gymnasium\(lambda"):
        from_gymnasium(single, 2)
    with pytest.raises(TypeError, match=r"use GymnasiumEnv\(env\)"):
        from_gymnasium(VectorClock(True, AutoresetMode.SAME_STEP))
    for twice in (lambda: single, lambda: gymnasium.wrappers.TimeLimit(single, 9)):
        with pytest.raises(ValueError, match="2 times the same"):
            from_gymnasium(twice, 2)
    assert from_gymnasium(lambda: single, 1).num_envs == 1
    with pytest.raises(ValueError, match="num_envs: expected >= 1, got 0"):
        from_gymnasium(lambda: single, 0)


@pytest.mark.parametrize(
    ("env", "how"),
    [
        (lambda: Scripted(A), r"from_gymnasium\(lambda: make_it\(\), num_envs\)"),
        (lambda: VectorClock(True, AutoresetMode.SAME_STEP), r"GymnasiumEnv\(env\)"),
        (lambda: FakeVecEnv(), r"SB3Env\(env\)"),
        (lambda: object(), "ccrl.adapters"),
    ],
)
def test_an_environment_of_another_library_is_told_its_adapter(env, how):
    with pytest.raises(TypeError, match=f"expected an id or a BatchedEnv, got .*{how}"):
        resolve_env(env(), 2)


def test_an_id_is_built_with_its_options():
    env = resolve_env("Pendulum-v1", 3, g=1.0, max_episode_steps=5)
    assert (env.num_envs, env.g, env.max_episode_steps) == (3, 1.0, 5)
    made = ClockEnv([[A]])
    assert resolve_env(made, 7) is made


@pytest.mark.parametrize(("device", "gpus", "there"), [("cuda", 0, False), ("cuda", 1, True), ("cuda:1", 1, False)])
def test_devices_that_are_here(monkeypatch, device, gpus, there):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if there:
        assert check_device(device) == torch.device(device)
        return
    with pytest.raises(ValueError, match=f"expected one that is here, got {device!r}.*finds {gpus} CUDA GPUs"):
        check_device(device)


def test_a_mask_that_is_empty_changes_nothing():
    """Collectors ask with one after every step; Gymnasium's environments refuse it."""
    env = from_gymnasium(lambda: Scripted(A), 2, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    obs = env.step(torch.zeros(2, dtype=torch.int64)).obs.clone()
    assert torch.equal(env.reset(mask=torch.zeros(2, dtype=torch.bool)), obs)


def test_options_for_an_environment_that_is_made():
    with pytest.raises(ValueError, match=r"env_kwargs: options go with an id, got \['length'\]"):
        resolve_env(ClockEnv([[A]]), 1, length=3)


def test_resets_of_another_shape_are_refused_and_not_broadcast():
    env = VectorClock(True, AutoresetMode.SAME_STEP)
    env.single_observation_space = spaces.Box(-9, 9, (3,), np.float32)
    with pytest.raises(ValueError, match=r"expected observations of shape \(2, 3\) from reset\(\).*got \(2, 1\)"):
        GymnasiumEnv(env).reset()
    env.single_observation_space = spaces.Dict({"a": spaces.Box(-9, 9, (1,), np.float32)})
    with pytest.raises(ValueError, match=r"expected observations 'a' of shape \(2, 1\).*got none"):
        GymnasiumEnv(env).reset()
    vec_env = FakeVecEnv()
    vec_env.observation_space = spaces.Box(-9, 9, (3,), np.float32)
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        SB3Env(vec_env).reset()

    class Short(gymnasium.Env):
        observation_space, action_space = spaces.Box(-1, 1, (3,)), spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, np.float32), {}

    with pytest.raises(ValueError) as caught:  # Gymnasium's own message, with a note
        from_gymnasium(Short, 2).reset()
    assert "check_env" in caught.value.__notes__[0]


class VectorClock(VectorEnv):
    """A vector entry point in SAME_STEP mode: with dense final observations, or without any."""

    def __init__(self, dense, mode):
        self.num_envs, self.dense, self.metadata = 2, dense, {} if mode is None else {"autoreset_mode": mode}
        self.single_observation_space = spaces.Box(-9, 9, (1,), np.float32)
        self.single_action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros((2, 1), dtype=np.float32), {}

    def step(self, actions):
        infos = {"final_obs": np.array([[5.0], [6.0]], dtype=np.float32)} if self.dense else {}
        return np.zeros((2, 1), dtype=np.float32), np.ones(2), np.array([True, False]), np.zeros(2, dtype=bool), infos


def test_vector_entry_points_with_dense_or_missing_final_observations():
    env = GymnasiumEnv(VectorClock(True, AutoresetMode.SAME_STEP))
    env.reset()
    assert env.step(torch.tensor([0, 0])).final_obs.tolist() == [[5.0], [6.0]]
    env = GymnasiumEnv(VectorClock(False, AutoresetMode.SAME_STEP))
    env.reset()
    with pytest.raises(RuntimeError, match="NEXT_STEP"):
        env.step(torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="autoreset_mode"):
        GymnasiumEnv(VectorClock(True, None))


class FakeVecEnv:
    """What SB3's ``VecEnv`` hands out, without SB3: copy 0 terminates, copy 1 is cut by the time limit."""

    num_envs = 2
    observation_space = spaces.Box(-9, 9, (1,), np.float32)
    action_space = spaces.Discrete(2)
    seeds = ()

    def seed(self, seed):
        self.seeds = (*self.seeds, seed)

    def reset(self):
        return np.zeros((2, 1), dtype=np.float32)

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        infos = [
            {"terminal_observation": np.array([3.0]), "TimeLimit.truncated": False},
            {"terminal_observation": np.array([4.0]), "TimeLimit.truncated": True},
        ]
        return np.zeros((2, 1), dtype=np.float32), np.array([1.0, 2.0]), np.array([True, True]), infos

    def close(self):
        pass


def test_sb3_import_needs_no_sb3():
    vec_env = FakeVecEnv()
    env = SB3Env(vec_env)
    env.reset(seed=5)
    assert vec_env.seeds == (copy_seeds(5, 1)[0],)
    result = env.step(torch.tensor([0, 1]))
    assert vec_env.actions.tolist() == [0, 1]
    assert result.final_obs.tolist() == [[3.0], [4.0]]
    assert (result.terminated.tolist(), result.truncated.tolist()) == ([True, False], [False, True])
    assert result.reward.tolist() == [1.0, 2.0]
    step_wait = vec_env.step_wait

    def without_time_limits():
        obs, reward, done, infos = step_wait()
        for info in infos:
            del info["TimeLimit.truncated"]
        return obs, reward, done, infos

    vec_env.step_wait = without_time_limits
    result = env.step(torch.tensor([0, 1]))
    assert (result.terminated.tolist(), result.truncated.tolist()) == ([True, True], [False, False])
    with pytest.raises(ValueError, match="without a mask"):
        env.reset(mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="expected an SB3 VecEnv"):
        SB3Env(object())


def test_options_that_an_environment_does_not_take():
    with pytest.raises(ValueError, match=r"FrozenLake-v1: expected options .*'map_name': '9x9'.*KeyError"):
        from_gymnasium("FrozenLake-v1", 2, map_name="9x9")
