"""Tasks computed in place give the bits of their methods; a task that changes a method is computed by that."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ccrl.batched_env import AutoresetMode
from ccrl.testing import EnvContract
from ccrl.testing.env_checks import dirty_rows
from envs.mujoco import TASKS, MujocoEnv, make_mujoco
from envs.mujoco.tasks.runners import HalfCheetah
from envs.mujoco.tasks.sweeping_ant import SweepingAnt

LIMITS = {"forward_reward_weight": 1.7, "ctrl_cost_weight": 0.3, "exclude_current_positions_from_observation": False}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TASKS),
    ("Swimmer-v5", LIMITS),
    ("Hopper-v5", {**LIMITS, "healthy_state_range": (-2.0, 2.5), "terminate_when_unhealthy": False}),
    ("Walker2d-v5", {**LIMITS, "healthy_reward": 0.1, "healthy_angle_range": (-0.1, 0.15)}),
    ("Ant-v5", {**LIMITS, "contact_force_range": (-0.2, 0.4), "healthy_reward": 0.3, "main_body": 5}),
    ("Ant-v5", {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0, "healthy_z_range": (0.5, 0.8)}),
    ("Ant-v5", {"include_cfrc_ext_in_observation": False, "terminate_when_unhealthy": False}),
    ("Humanoid-v5", {**LIMITS, "include_cvel_in_observation": False, "contact_cost_range": (0.1, 0.2)}),
    ("Humanoid-v5", {"include_cfrc_ext_in_observation": False, "terminate_when_unhealthy": False}),
    ("HumanoidStandup-v5", {"impact_cost_weight": 1e-4, "include_cinert_in_observation": False}),
    ("Reacher-v5", {"reward_dist_weight": 3.0, "reward_control_weight": 0.7}),
    ("Pusher-v5", {"reward_near_weight": 0.7, "reward_dist_weight": 3.0}),
]


@pytest.mark.parametrize(("task_id", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_are_those_of_the_methods(task_id: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """40 steps beyond the actuators' ranges, with restarts."""
    env = make_mujoco(task_id, 5, seed=0, dtype=dtype, nthread=1, **options)
    task, state, generator = env.task, env.engine.state, torch.Generator().manual_seed(0)
    assert env._write is not None
    env.reset()
    for _ in range(40):
        action = 2.4 * torch.rand(env._action_shape, generator=generator) - 1.2
        state.ctrl.copy_(action)
        env.engine.step(task.frame_skip)
        env._write()
        found = env._obs.clone(), env._reward.clone(), env._ended.clone()
        state.terminated = task.terminated(state)
        assert torch.equal(found[0], task.observe(state).to(dtype))
        assert torch.equal(found[1], task.reward(state).to(dtype))
        assert torch.equal(found[2], state.terminated)
        env._remember()
        if env._before is not None:
            assert torch.equal(env._before, env._remembered(state))
        if bool(found[2].any()):
            env._begin(found[2].nonzero().squeeze(1))


def test_a_task_that_changes_a_method_is_computed_by_its_methods() -> None:
    class Still(HalfCheetah):
        def reward(self, state: Any) -> Any:
            return -state.qvel[:, 0].abs()

    env = MujocoEnv(Still(), 2, seed=0, nthread=1)
    env.reset()
    result = env.step(torch.zeros(env._action_shape))
    assert torch.equal(result.reward, -env.engine.state.qvel[:, 0].abs().float())
    assert MujocoEnv(SweepingAnt(), 2, nthread=1)._write is None
    patched = HalfCheetah()
    patched.observe = patched.observe  # type: ignore[method-assign]
    assert MujocoEnv(patched, 2, nthread=1)._write is None


class TestHopper(EnvContract):
    """Falls, the time limit and all modes, through ``step_into`` as well."""

    env = "Hopper-v5"
    options = {"max_episode_steps": 25, "nthread": 1}
    time_limit = 25
    num_envs = 3


@pytest.mark.parametrize("task_id", ["HalfCheetah-v5", "Walker2d-v5"])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_state_after_step_into_is_that_after_step(task_id: str, mode: AutoresetMode) -> None:
    envs = [make_mujoco(task_id, 2, seed=0, nthread=1, max_episode_steps=4, autoreset_mode=mode) for _ in range(2)]
    action = torch.full(envs[0]._action_shape, 0.4)
    for env in envs:
        env.reset()
    for _ in range(6):
        envs[0].step_into(action, dirty_rows(envs[0]))
        envs[1].step(action)
        found, expected = (env.state_dict() for env in envs)
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(found[name], value), name
        assert torch.equal(found["simulator"]["integration_state"], expected["simulator"]["integration_state"])


def test_a_simulation_that_breaks_down_is_paid_nan() -> None:
    env = make_mujoco("HalfCheetah-v5", 2, seed=0, nthread=1)
    env.reset()
    env.engine.state.qvel[1] = 1e12
    rows = dirty_rows(env)
    env.step_into(torch.zeros(2, 6), rows)
    assert rows.reward.isnan().tolist() == [False, True]
