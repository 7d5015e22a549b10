"""Gymnasium's own environments are the reference: same states, actions and options in, same numbers out."""

from __future__ import annotations

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from envs.mujoco import TASKS, make_mujoco
from envs.mujoco.task import ASSETS

INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION


def simulator_state(reference) -> np.ndarray:
    model, data = reference.unwrapped.model, reference.unwrapped.data
    state = np.empty(mujoco.mj_stateSize(model, INTEGRATION))
    mujoco.mj_getState(model, data, state, INTEGRATION)
    return state


def start_equal(reference, qpos, qvel) -> np.ndarray:
    """Reset Gymnasium's environment and put it where ours starts; returns its observation."""
    reference.reset()
    raw = reference.unwrapped
    # Forget the forward pass from Gymnasium's own noise, which left a warm start behind.
    mujoco.mj_resetData(raw.model, raw.data)
    raw.set_state(qpos.numpy(), qvel.numpy())
    return raw._get_obs()


def check_parity(task_id: str, num_envs: int, steps: int, time_limit: int, options: dict, reach: float = 1.2) -> int:
    """Compares ``num_envs * steps`` random steps; returns the number of finished episodes."""
    env = make_mujoco(
        task_id,
        num_envs,
        seed=1,
        nthread=2,
        dtype=torch.float64,
        autoreset_mode=AutoresetMode.DISABLED,
        max_episode_steps=time_limit,
        **options,
    )
    references = [
        gymnasium.make(task_id, max_episode_steps=time_limit, disable_env_checker=True, **options)
        for _ in range(num_envs)
    ]
    space = references[0].action_space
    assert env.single_action_space == space
    assert env.single_observation_space == references[0].observation_space
    rng = np.random.default_rng(0)
    state, episodes = env.engine.state, 0
    obs = env.reset()
    started = range(num_envs)
    for _ in range(steps):
        for i in started:
            expected = start_equal(references[i], state.qpos[i], state.qvel[i])
            np.testing.assert_allclose(obs[i], expected, rtol=1e-12, atol=1e-12)
        # Beyond the actuators' range: physics clamps, the control cost does not.
        action = rng.uniform(reach * space.low, reach * space.high, (num_envs, *space.shape))
        result = env.step(torch.from_numpy(action))
        simulators = env.state_dict()["simulator"]["integration_state"].numpy()
        for i, reference in enumerate(references):
            expected_obs, expected_reward, terminated, truncated, _ = reference.step(action[i])
            np.testing.assert_array_equal(simulators[i], simulator_state(reference))
            assert (result.terminated[i].item(), result.truncated[i].item()) == (terminated, truncated)
            np.testing.assert_allclose(result.obs[i], expected_obs, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(result.reward[i], expected_reward, rtol=1e-12, atol=1e-12)
        done = result.terminated | result.truncated
        started = done.nonzero().squeeze(1).tolist()
        episodes += len(started)
        if started:
            obs = env.reset(mask=done)
    for reference in references:
        reference.close()
    return episodes


@pytest.mark.parametrize("task_id", TASKS)
def test_fifteen_hundred_random_steps(task_id):
    assert check_parity(task_id, num_envs=3, steps=500, time_limit=150, options={}) >= 9


RUNNER = {
    "forward_reward_weight": 2.0,
    "ctrl_cost_weight": 0.3,
    "reset_noise_scale": 0.2,
    "exclude_current_positions_from_observation": False,
    "frame_skip": 2,
}
LEGS = {"healthy_reward": 3.0, "healthy_z_range": (0.9, 1.5), "healthy_angle_range": (-0.1, 0.15)}
HUMAN = {"ctrl_cost_weight": 0.3, "reset_noise_scale": 0.05, "exclude_current_positions_from_observation": False}
OPTIONS = [
    ("InvertedPendulum-v5", {"reset_noise_scale": 0.1, "frame_skip": 1}),
    ("InvertedDoublePendulum-v5", {"healthy_reward": 3.0, "reset_noise_scale": 0.2, "frame_skip": 2}),
    ("Swimmer-v5", RUNNER),
    ("HalfCheetah-v5", RUNNER),
    ("Hopper-v5", {**RUNNER, **LEGS, "healthy_state_range": (-2.0, 2.5), "terminate_when_unhealthy": False}),
    ("Hopper-v5", {"healthy_state_range": (-2.0, 2.5)}),
    ("Walker2d-v5", {**RUNNER, **LEGS}),
    ("Walker2d-v5", {"terminate_when_unhealthy": False, "xml_file": "walker2d.xml"}),
    ("Ant-v5", {**RUNNER, "contact_cost_weight": 0.01, "contact_force_range": (-0.2, 0.4), "healthy_reward": 2.0}),
    ("Ant-v5", {"include_cfrc_ext_in_observation": False, "main_body": 5, "healthy_z_range": (0.4, 0.8)}),
    ("Ant-v5", {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0, "main_body": "torso"}),
    ("Ant-v5", {"terminate_when_unhealthy": False}),
    ("Humanoid-v5", {**HUMAN, "include_cinert_in_observation": False, "healthy_z_range": (1.2, 1.8)}),
    ("Humanoid-v5", {"include_cvel_in_observation": False, "include_cfrc_ext_in_observation": False}),
    ("Humanoid-v5", {"contact_cost_range": (0.1, 0.2), "contact_cost_weight": 1e-3, "forward_reward_weight": 3.0}),
    ("Humanoid-v5", {"terminate_when_unhealthy": False, "healthy_reward": 2.0}),
    ("HumanoidStandup-v5", {**HUMAN, "include_qfrc_actuator_in_observation": False}),
    ("HumanoidStandup-v5", {"impact_cost_weight": 1e-4, "impact_cost_range": (0.01, 0.5)}),
    ("Reacher-v5", {"reward_dist_weight": 3.0, "reward_control_weight": 0.2, "frame_skip": 3}),
    ("Pusher-v5", {"reward_near_weight": 2.0, "reward_dist_weight": 3.0, "reward_control_weight": 0.7}),
]


@pytest.mark.parametrize(("task_id", "options"), OPTIONS)
def test_constructor_options(task_id, options):
    check_parity(task_id, num_envs=2, steps=60, time_limit=40, options=options)


def test_xml_file_of_the_user(tmp_path):
    text = (ASSETS / "hopper.xml").read_text()
    assert 'timestep="0.002"' in text
    path = tmp_path / "hopper.xml"
    path.write_text(text.replace('timestep="0.002"', 'timestep="0.004"'))
    check_parity("Hopper-v5", num_envs=2, steps=60, time_limit=40, options={"xml_file": str(path)})


def test_standup_height_weight_is_applied():
    """Gymnasium accepts ``uph_cost_weight`` and ignores it, so there is no parity to test away from 1."""
    rewards = []
    for weight in (1.0, 2.0):
        env = make_mujoco("HumanoidStandup-v5", 2, seed=3, dtype=torch.float64, uph_cost_weight=weight)
        env.reset()
        rewards.append(env.step(torch.zeros(2, 17)).reward.clone())
    torch.testing.assert_close(rewards[1] - rewards[0], env.engine.state.qpos[:, 2] / 0.003)


@pytest.mark.parametrize("task_id", TASKS)
def test_reset_noise_has_gymnasiums_distribution(task_id):
    """Mean, spread and tails of 2,000 resets against 400 of Gymnasium's."""
    env = make_mujoco(task_id, 1)
    qpos, qvel = env.task.reset(2000, torch.Generator().manual_seed(0))
    ours = torch.cat((qpos, qvel), 1).numpy()
    reference = gymnasium.make(task_id, disable_env_checker=True).unwrapped
    draws = []
    for seed in range(400):
        reference.reset(seed=seed)
        draws.append(np.concatenate((reference.data.qpos, reference.data.qvel)))
    theirs = np.array(draws)
    spread = theirs.std(0)
    np.testing.assert_array_equal(ours.std(0) > 0, spread > 0)
    # 5 standard errors of a mean of 400 draws.
    np.testing.assert_array_less(np.abs(ours.mean(0) - theirs.mean(0)), 5 * spread / 20 + 1e-9)
    np.testing.assert_allclose(ours.std(0), spread, rtol=0.2, atol=1e-9)
    # Beyond 1.8 standard deviations lie 0 % of a uniform and 7.2 % of a normal distribution.
    tails = [(np.abs(x - x.mean(0)) > 1.8 * x.std(0) + 1e-12).mean(0) for x in (ours, theirs)]
    np.testing.assert_allclose(tails[0], tails[1], atol=0.05)
