"""Classic control against Gymnasium's environments, and against numbers worked out by hand."""

from __future__ import annotations

import importlib.util
import math
import shutil

import gymnasium
import numpy as np
import pytest
import torch

from ccrl.batched_env import AutoresetMode
from ccrl.testing import sample_actions
from envs.classic import Acrobot, CartPole, MountainCar, MountainCarContinuous, Pendulum

TASKS = [CartPole, Pendulum, MountainCar, MountainCarContinuous, Acrobot]
# One rounding error of 1e-7 grows tenfold in a few steps near the unstable equilibria of these two, in any program.
CHAOTIC = [Pendulum, Acrobot]


class Pair:
    """Copies of a task beside Gymnasium's environments in the same states."""

    def __init__(self, task, dtype, seed, num_envs=2):
        self.env = task(num_envs, dtype=dtype)
        self.env.reset(seed=seed)
        self.theirs = [gymnasium.make(task.id) for _ in range(num_envs)]
        self.generator = torch.Generator().manual_seed(seed)
        self.first_obs = [self.equalise(row) for row in range(num_envs)]

    def equalise(self, row):
        """Start Gymnasium's episode in the state of ours and return its observation of it."""
        self.theirs[row].reset()
        inner = self.theirs[row].unwrapped
        state = self.env.state_dict()["state"][:, row].numpy()
        # Acrobot's reset, unlike its step, leaves a float32 state.
        inner.state = state.astype(np.float32 if inner.spec.id == "Acrobot-v1" else np.float64)
        observe = getattr(inner, "_get_ob", None) or getattr(inner, "_get_obs", None)
        return observe() if observe else np.array(inner.state, dtype=np.float32)

    def step(self):
        """Our step, its float64 reward and successor state, and Gymnasium's results."""
        env, actions = self.env, sample_actions(self.env.single_action_space, self.env.num_envs, self.generator)
        rows = (actions.t() if actions.is_floating_point() else actions).numpy()
        state = env.state_dict()["state"].numpy()
        successor = env.dynamics(state, rows)
        reward = env.reward(state, rows, env.terminated(successor))
        theirs = [other.step(action) for other, action in zip(self.theirs, actions.numpy())]
        return env.step(actions), reward, successor, theirs


@pytest.mark.parametrize("task", TASKS)
def test_float64_is_gymnasium_bit_for_bit(task):
    pair, ends = Pair(task, torch.float64, seed=0), 0
    for row, obs in enumerate(pair.first_obs):
        assert np.array_equal(obs, pair.env.state_dict()["obs"][:, row].numpy())
    for step in range(1500):
        result, reward, successor, theirs = pair.step()
        for row, (obs, their_reward, terminated, truncated, _) in enumerate(theirs):
            where = f"step {step}, copy {row}"
            assert np.array_equal(np.asarray(pair.theirs[row].unwrapped.state), successor[:, row]), where
            assert np.array_equal(obs, result.final_obs[row].numpy()), where
            assert float(their_reward) == float(reward[row]), where
            assert (terminated, truncated) == (bool(result.terminated[row]), bool(result.truncated[row])), where
            if terminated or truncated:
                assert np.array_equal(pair.equalise(row), result.obs[row].numpy()), where
                ends += 1
    assert ends >= 2


@pytest.mark.parametrize("task", TASKS)
def test_float32_is_gymnasium_to_1e_5_over_200_steps(task):
    pair = Pair(task, torch.float32, seed=1)
    for _ in range(200):
        result, _, _, theirs = pair.step()
        for row, (obs, their_reward, terminated, truncated, _) in enumerate(theirs):
            np.testing.assert_allclose(result.final_obs[row].numpy(), obs, atol=1e-5, rtol=0)
            assert float(result.reward[row]) == pytest.approx(float(their_reward), abs=1e-5)
            assert (terminated, truncated) == (bool(result.terminated[row]), bool(result.truncated[row]))
            if terminated or truncated:
                pair.equalise(row)
            elif task in CHAOTIC:
                elapsed = pair.theirs[row]._elapsed_steps
                pair.equalise(row)
                pair.theirs[row]._elapsed_steps = elapsed


def test_options_are_gymnasiums():
    for task, option in [
        (CartPole, {"sutton_barto_reward": True}),
        (Pendulum, {"g": 3.7}),
        (MountainCar, {"goal_velocity": 0.02}),
        (MountainCarContinuous, {"goal_velocity": 0.02}),
    ]:
        env, theirs = task(1, dtype=torch.float64, **option), gymnasium.make(task.id, **option)
        env.reset(seed=0)
        theirs.reset()
        # A state from which the next step ends the task, where the task can end.
        start = {CartPole: [2.39, 3.0, 0.0, 0.0], Pendulum: [1.0, 0.5]}.get(task, [0.49, 0.015])
        env.load_state_dict(env.state_dict() | {"state": torch.tensor(start, dtype=torch.float64)[:, None]})
        theirs.unwrapped.state = np.array(start)
        action = sample_actions(env.single_action_space, 1, torch.Generator().manual_seed(0))
        obs, reward, terminated, _, _ = theirs.step(action[0].numpy())
        result = env.step(action)
        assert np.array_equal(result.final_obs[0].numpy(), obs)
        assert float(result.reward[0]) == pytest.approx(float(reward), abs=1e-6)
        assert bool(result.terminated[0]) == terminated


def test_cartpole_by_hand():
    env = CartPole(1, dtype=torch.float64)
    env.reset(seed=0)
    env.load_state_dict(env.state_dict() | {"state": torch.zeros(4, 1, dtype=torch.float64)})
    result = env.step(torch.tensor([1]))
    # push = 10 / 1.1; theta_acc = -push / (0.5 (4/3 - 0.1 / 1.1)); x_acc = push - 0.05 theta_acc / 1.1; positions wait.
    push = 10 / 1.1
    theta_acc = -push / (0.5 * (4 / 3 - 0.1 / 1.1))
    x_acc = push - 0.05 * theta_acc / 1.1
    np.testing.assert_allclose(result.obs[0].numpy(), [0, 0.02 * x_acc, 0, 0.02 * theta_acc], rtol=1e-6)
    assert result.reward.tolist() == [1.0]


def test_acrobot_wraps_angles_and_bounds_speeds():
    env = Acrobot(2, dtype=torch.float64)
    start = np.array([[3.1, -3.1], [3.1, -3.1], [12.0, -12.0], [28.0, -28.0]])
    end = env.dynamics(start, np.array([2, 0]))
    assert (abs(end[:2]) <= math.pi).all()
    assert (abs(end[2]) <= 4 * math.pi).all()
    assert (abs(end[3]) <= 9 * math.pi).all()
    np.testing.assert_allclose(end[:, 0], -end[:, 1], rtol=1e-9)


def test_copies_do_not_depend_on_each_other():
    """Copy 0 of two goes the same way whatever the other one does."""
    actions = torch.tensor([[0, 1, 1, 0, 1] * 4, [1, 0, 0, 0, 0] * 4]).t()
    ends = []
    for other in (0, 1):
        env = CartPole(2, dtype=torch.float64)
        env.reset(seed=0)
        rows = [env.step(torch.stack((action[0], action[0] * (1 - other) + other * action[1]))) for action in actions]
        ends.append(torch.stack([row.final_obs[0] for row in rows[:8]]))
    assert torch.equal(*ends)


def test_the_time_limit_can_fall_together_with_a_termination():
    env = CartPole(1, max_episode_steps=1)
    env.reset(seed=0)
    env.load_state_dict(env.state_dict() | {"state": torch.tensor([[2.39], [3.0], [0.0], [0.0]])})
    result = env.step(torch.tensor([1]))
    assert (bool(result.terminated[0]), bool(result.truncated[0])) == (True, True)


def test_returned_observations_are_not_the_state():
    env = CartPole(2)
    first, result = env.reset(seed=0), env.step(torch.tensor([0, 1]))
    for obs in (first, result.obs, result.final_obs):
        before = env.state_dict()["state"]
        obs += 1.0
        assert torch.equal(env.state_dict()["state"], before)


def test_the_state_can_be_saved_without_pickling_objects(tmp_path):
    env = Pendulum(3)
    env.reset(seed=4)
    torch.save(env.state_dict(), tmp_path / "env.pt")
    other = Pendulum(3)
    other.load_state_dict(torch.load(tmp_path / "env.pt", weights_only=True))
    assert torch.equal(env.reset(), other.reset())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_torch_steps_agree_with_numpy_steps(task, mode):
    """What runs on other devices: ``compile`` selects torch on the CPU too, and eager mode is the same code."""
    numpy, other = (
        task(4, dtype=torch.float64, autoreset_mode=mode, max_episode_steps=20, compile=compiled)
        for compiled in (False, True)
    )
    other._advance = other._whole_step
    torch.testing.assert_close(numpy.reset(seed=0), other.reset(seed=0), atol=1e-6, rtol=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(45):
        action = sample_actions(numpy.single_action_space, 4, generator)
        ours, theirs = numpy.step(action), other.step(action)
        torch.testing.assert_close(ours.obs, theirs.obs, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.reward, theirs.reward, atol=1e-5, rtol=0)
        assert torch.equal(ours.terminated, theirs.terminated)
        assert torch.equal(ours.truncated, theirs.truncated)
    torch.testing.assert_close(numpy.state_dict()["state"], other.state_dict()["state"], atol=1e-9, rtol=0)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="needs a C++ compiler")
def test_compiled_steps_agree_with_the_others():
    plain, compiled = CartPole(4), CartPole(4, compile=True)
    plain.reset(seed=0)
    compiled.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        action = sample_actions(plain.single_action_space, 4, generator)
        ours, theirs = plain.step(action), compiled.step(action)
        torch.testing.assert_close(ours.obs, theirs.obs, atol=1e-5, rtol=0)
        assert torch.equal(ours.terminated, theirs.terminated)


@pytest.mark.gpu
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu(task):
    env, cuda = task(8, dtype=torch.float64), task(8, dtype=torch.float64, device="cuda")
    env.reset(seed=0)
    cuda.reset(seed=0)
    cuda.load_state_dict(env.state_dict() | {"generator": cuda.state_dict()["generator"]})
    action = sample_actions(env.single_action_space, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(env.step(action).final_obs, cuda.step(action.cuda()).final_obs.cpu())


def test_render(monkeypatch):
    env = CartPole(2)
    env.reset(seed=0)
    if importlib.util.find_spec("pygame") is None:
        with pytest.raises(ImportError, match=r"gymnasium\[classic-control\]"):
            env.render(1)
        return
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    frame = env.render(1)
    assert frame.shape == (400, 600, 3)
    assert frame.std() > 0
    env.close()


def test_bad_input():
    for wrong in ({"num_envs": 0}, {"max_episode_steps": 0}, {"dtype": torch.float16}):
        with pytest.raises(ValueError, match=r"CartPole-v1|num_envs: expected >= 1|max_episode_steps: expected >= 1"):
            CartPole(**wrong)
    env = CartPole(3)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="reset"):
        env.state_dict()
    with pytest.raises(ValueError, match="first reset"):
        env.reset(mask=torch.ones(3, dtype=torch.bool))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"integer actions of shape \(3,\), got torch.float32"):
        env.step(torch.zeros(3))
    with pytest.raises(ValueError, match="mask must be bool"):
        env.reset(mask=torch.ones(3))
    with pytest.raises(ValueError, match="same id, num_envs and dtype"):
        CartPole(4).load_state_dict(env.state_dict())
    pendulum = Pendulum(3, autoreset_mode=AutoresetMode.DISABLED)
    pendulum.reset(seed=0)
    with pytest.raises(ValueError, match=r"floating-point actions of shape \(3, 1\)"):
        pendulum.step(torch.zeros(3))
