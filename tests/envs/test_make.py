"""``envs.make`` and the ids registered with Gymnasium."""

from __future__ import annotations

import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import envs
from ccrl.adapters import GymnasiumEnv, TorchVectorEnv, as_vector_env
from ccrl.batched_env import AutoresetMode, BatchedEnv, resolve_env
from envs.classic import CartPole


@pytest.mark.parametrize("id", envs.NATIVE)
def test_every_native_id_builds_and_has_gymnasiums_spaces(id):
    env, theirs = envs.make(id, 2, seed=0), gymnasium.make(id)
    assert isinstance(env, BatchedEnv)
    assert not isinstance(env, GymnasiumEnv)
    assert env.single_action_space == theirs.action_space
    ours, reference = env.single_observation_space, theirs.observation_space
    assert ours.shape == reference.shape
    assert np.array_equal(ours.low, reference.low.astype(np.float32))
    assert np.array_equal(ours.high, reference.high.astype(np.float32))
    assert env.max_episode_steps == theirs.spec.max_episode_steps
    env.close()


def test_native_is_the_default_and_gymnasiums_id_stays_gymnasiums():
    assert isinstance(envs.make("CartPole-v1"), CartPole)
    assert isinstance(envs.make("ccrl/CartPole-v1", backend="native"), CartPole)
    assert gymnasium.spec("CartPole-v1").entry_point.startswith("gymnasium.")


@pytest.mark.parametrize(
    ("backend", "kind"), [("sync", "SyncVectorEnv"), ("async", "AsyncVectorEnv"), ("gymnasium", "CartPoleVectorEnv")]
)
def test_backends(backend, kind):
    env = envs.make("CartPole-v1", 2, backend=backend, seed=0)
    assert type(env.env.unwrapped).__name__ == kind
    expected = AutoresetMode.NEXT_STEP if backend == "gymnasium" else AutoresetMode.SAME_STEP
    assert env.autoreset_mode == expected
    env.close()


def test_seed_at_construction_is_the_seed_of_reset():
    first, second = envs.make("Pendulum-v1", 3, seed=7), envs.make("Pendulum-v1", 3)
    second.reset(seed=7)
    action = torch.zeros(3, 1)
    assert torch.equal(first.step(action).obs, second.step(action).obs)


def test_options_reach_the_environment():
    assert envs.make("Pendulum-v1", 1, g=1.0, max_episode_steps=5, dtype=torch.float64).g == 1.0
    sync = envs.make("Pendulum-v1", 1, backend="sync", g=1.0)
    assert sync.env.envs[0].unwrapped.g == 1.0
    with pytest.raises(
        TypeError, match=r"FrozenLake-v1: expected options that the environment takes, got \{'map_name'"
    ):
        resolve_env("FrozenLake-v1", 1, map_name={"a": 1})
    with pytest.raises(TypeError, match="gravity"):
        envs.make("Pendulum-v1", 1, gravity=1.0)


def test_a_module_in_front_is_imported(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('mine/Car-v0', gymnasium.spec('MountainCar-v0').entry_point, max_episode_steps=3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        env = envs.make("my_tasks:mine/Car-v0", 2, seed=0)
        assert isinstance(env, GymnasiumEnv)
        assert [bool(env.step(torch.tensor([1, 1])).truncated[0]) for _ in range(3)] == [False, False, True]
    finally:
        gymnasium.registry.pop("mine/Car-v0", None)
        sys.modules.pop("my_tasks", None)


def test_make_vec_builds_the_native_environment():
    env = gymnasium.make_vec("ccrl/CartPole-v1", num_envs=8)
    assert isinstance(env, TorchVectorEnv)
    assert isinstance(env.env, CartPole)
    env = RecordEpisodeStatistics(env)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (8, 4)
    assert obs.dtype == np.float32
    native = envs.make("CartPole-v1", 8, seed=0)
    episodes = []
    env.action_space.seed(0)
    for _ in range(60):
        action = env.action_space.sample()
        obs, reward, terminated, _, infos = env.step(action)
        result = native.step(torch.from_numpy(action))
        assert np.array_equal(obs, result.obs.numpy())
        assert np.array_equal(reward, result.reward.numpy())
        assert env.single_observation_space.contains(obs[0])
        for row in np.flatnonzero(terminated):
            assert np.array_equal(infos["final_obs"][row], result.final_obs[row].numpy())
            assert infos["episode"]["r"][row] == infos["episode"]["l"][row]
            episodes.append(infos["episode"]["l"][row])
        assert ("final_obs" in infos) == terminated.any()
    assert min(episodes) >= 8


def test_a_vector_entry_point_of_ours_is_taken_out_of_its_wrapping():
    """With its state, which the way through Gymnasium would lose."""
    gymnasium.register("mine/Pole-v0", vector_entry_point=lambda num_envs: as_vector_env(CartPole(num_envs)))
    try:
        env = envs.make("mine/Pole-v0", 3, seed=0)
        assert isinstance(env, CartPole)
        assert env.num_envs == 3
        with pytest.raises(ValueError, match="use backend='sync' or 'async' to choose it"):
            envs.make("mine/Pole-v0", 3, autoreset_mode=AutoresetMode.DISABLED)
    finally:
        gymnasium.registry.pop("mine/Pole-v0")


def test_make_vec_resets_single_copies():
    env = gymnasium.make_vec("ccrl/Pendulum-v1", num_envs=3, autoreset_mode=AutoresetMode.DISABLED)
    first, _ = env.reset(seed=0)
    second, _ = env.reset(options={"reset_mask": np.array([True, False, True])})
    assert (first != second).any(axis=1).tolist() == [True, False, True]


@pytest.mark.parametrize("id", ["ccrl/CartPole-v1", "ccrl/Pendulum-v1", "ccrl/HalfCheetah-v5"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_single_environments_pass_gymnasiums_checker(id):
    env = gymnasium.make(id)
    check_env(env.unwrapped, skip_render_check=True)
    assert env.reset(seed=0)[0].shape == env.observation_space.shape
    env.close()


def test_errors_name_the_fix():
    with pytest.raises(ValueError, match="did you mean CartPole-v1"):
        envs.make("CartPole-v11")
    with pytest.raises(ValueError, match="module:nobody/Knows-v0"):
        envs.make("nobody/Knows-v0")
    with pytest.raises(ModuleNotFoundError, match="expected a module 'no_such_module' that has"):
        envs.make("no_such_module:Env-v0")
    with pytest.raises(ValueError, match="expected backend None or one of native, sync"):
        envs.make("CartPole-v1", backend="fast")
    with pytest.raises(ValueError, match="there is no native 'FrozenLake-v1'"):
        envs.make("FrozenLake-v1", backend="native")
    with pytest.raises(ValueError, match="use Gymnasium's id 'CartPole-v1'"):
        envs.make("ccrl/CartPole-v1", backend="sync")
    with pytest.raises(ValueError, match="no vector entry point"):
        envs.make("Pendulum-v1", backend="gymnasium")
    with pytest.raises(ValueError, match="backend='sync'"):
        envs.make("CartPole-v1", backend="gymnasium", autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match="leave device at 'cpu'"):
        envs.make("Hopper-v5", device="cuda")


def test_render_modes_of_a_vector_environment_and_of_one():
    assert gymnasium.make_vec("ccrl/CartPole-v1", num_envs=2, render_mode="rgb_array").render_mode == "rgb_array"
    assert gymnasium.make_vec("ccrl/CartPole-v1", num_envs=2).render() is None
    for make in (gymnasium.make, gymnasium.make_vec):
        with pytest.raises(ValueError, match=r"render_mode: expected None or 'rgb_array', got 'ansi'"):
            make("ccrl/CartPole-v1", render_mode="ansi")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_envs": 0}, "num_envs: expected >= 1, got 0"),
        ({"num_envs": 0, "backend": "sync"}, "num_envs: expected >= 1, got 0"),
        ({"device": "gpu"}, "device: expected one of PyTorch's .*'gpu'"),
        ({"device": "gpu", "backend": "sync"}, "device: expected one of PyTorch's .*'gpu'"),
        ({"device": "cuda:99"}, r"got 'cuda:99', but PyTorch .* finds \d+ CUDA GPUs; use 'cpu'"),
        ({"autoreset_mode": "never"}, "'NextStep', 'SameStep', 'Disabled' as autoreset_mode, got 'never'"),
    ],
)
def test_options_that_no_environment_takes(options, message):
    with pytest.raises(ValueError, match=message):
        envs.make("CartPole-v1", **options)


def test_a_module_that_fails_inside_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "registers_things.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_dependency'"):
        envs.make("registers_things:My-v0")
    (tmp_path / "raises_inside.py").write_text("\nint('x')\n")
    with pytest.raises(ImportError, match=r"that can be imported, got ValueError at .*raises_inside\.py:2: invalid"):
        envs.make("raises_inside:My-v0")


@pytest.mark.parametrize("text", ["NextStep", "nextstep", "NEXT_STEP", "next_step"])
@pytest.mark.parametrize("id", ["CartPole-v1", "Hopper-v5", "ccrl/InventorySerial-v0"])
def test_autoreset_modes_can_be_given_as_text(id, text):
    env = envs.make(id, 2, autoreset_mode=text)
    assert env.autoreset_mode is AutoresetMode.NEXT_STEP
    assert not env.provides_final_obs
    if not id.startswith("ccrl/"):
        assert envs.make(id, 2, autoreset_mode=text, backend="sync").autoreset_mode is AutoresetMode.NEXT_STEP
    vector = gymnasium.make_vec(f"ccrl/{id.removeprefix('ccrl/')}", 2, autoreset_mode=text)
    assert vector.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP


def test_a_class_of_gymnasiums_is_an_environment_too(tmp_path, monkeypatch):
    (tmp_path / "own_class.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import CartPoleEnv as Pole\n"
        "class Late(Pole):\n"
        "    def reset(self):\n"
        "        return super().reset()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    env = resolve_env("own_class:Pole", 2, sutton_barto_reward=True)
    assert isinstance(env, GymnasiumEnv)
    assert env.reset(seed=0).shape == (2, 4)
    with pytest.raises(ValueError, match=r"Late: expected reset\(self, \*, seed=None, options=None\), got reset\(\)"):
        resolve_env("own_class:Late", 1)
    with pytest.raises(TypeError, match="expected a class or function at 'own_class:gymnasium', got module"):
        resolve_env("own_class:gymnasium", 1)
    with pytest.raises(ModuleNotFoundError, match=r"did you mean own_class:Pole\?"):
        resolve_env("own_class.py:Pole", 1)
