"""The environment around the tasks: autoreset, resume, threads, instability, options, pictures."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ccrl.batched_env import AutoresetMode, BatchedEnv
from envs.mujoco import TASKS, MujocoEnv, RenderOptions, make_mujoco
from envs.mujoco.render import _context
from envs.mujoco.tasks.runners import HalfCheetah, Hopper

MODES = list(AutoresetMode)


def random_actions(env, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.as_tensor(env.single_action_space.low), torch.as_tensor(env.single_action_space.high)
    return torch.rand(steps, env.num_envs, len(low), generator=generator) * (high - low) + low


def record(env, actions):
    """Copies of everything ``step`` returns; of ``final_obs`` the rows where an episode ended."""
    rows = []
    for action in actions:
        result = env.step(action)
        row = [x.clone() for x in (result.obs, result.reward, result.terminated, result.truncated)]
        if result.final_obs is not None:
            done = (result.terminated | result.truncated)[:, None]
            row.append(torch.where(done, result.final_obs, 0.0))
        rows.append(row)
    return [torch.stack(column) for column in zip(*rows)]


@pytest.mark.parametrize("mode", MODES)
def test_is_a_batched_env(mode):
    env = make_mujoco("Hopper-v5", 3, autoreset_mode=mode)
    assert isinstance(env, BatchedEnv)
    assert env.provides_final_obs == (mode is AutoresetMode.SAME_STEP)
    obs = env.reset(seed=0)
    result = env.step(torch.zeros(3, 3))
    assert obs.dtype == result.obs.dtype == result.reward.dtype == torch.float32
    assert result.obs.shape == (3, *env.single_observation_space.shape)
    assert result.terminated.dtype == result.truncated.dtype == torch.bool
    assert (result.final_obs is not None) == env.provides_final_obs


@pytest.mark.parametrize("task_id", ["HalfCheetah-v5", "Hopper-v5", "Ant-v5", "Humanoid-v5"])
def test_results_do_not_depend_on_nthread(task_id):
    streams = []
    for nthread in (1, 2, 5):
        env = make_mujoco(task_id, 7, seed=3, nthread=nthread, max_episode_steps=12)
        env.reset()
        streams.append(record(env, random_actions(env, 30)))
    for other in streams[1:]:
        for a, b in zip(streams[0], other):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task_id", TASKS)
def test_state_dict_resumes_bit_for_bit(task_id, mode):
    """A new environment that loads a stored state goes on exactly, also after rows whose episode just ended."""
    env = make_mujoco(task_id, 5, seed=0, autoreset_mode=mode, max_episode_steps=9)
    actions = random_actions(env, 34)
    env.reset()
    record(env, actions[:9])  # the ninth step ends every episode that is still alive
    stored = io.BytesIO()
    torch.save(env.state_dict(), stored)
    stored.seek(0)

    def future(env):
        if mode is AutoresetMode.DISABLED:
            mask = torch.tensor([True, True, False, True, False])
            return [env.reset(mask=mask).clone(), *record(env, actions[9:])]
        return record(env, actions[9:])

    expected = future(env)
    resumed = make_mujoco(task_id, 5, seed=99, autoreset_mode=mode, max_episode_steps=9)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    for a, b in zip(expected, future(resumed)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_state_dict_in_the_middle_of_episodes_into_a_used_environment():
    env = make_mujoco("Ant-v5", 4, seed=0)
    actions = random_actions(env, 60)
    env.reset()
    record(env, actions[:30])
    state = env.state_dict()
    first = record(env, actions[30:])
    env.load_state_dict(state)
    for a, b in zip(first, record(env, actions[30:])):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_autoreset_modes_show_the_same_first_episode():
    """Hopper falls at different steps in different copies; until then the modes agree, and then each does its own."""
    streams = {}
    for mode in MODES:
        env = make_mujoco("Hopper-v5", 6, seed=1, autoreset_mode=mode, max_episode_steps=25)
        env.reset()
        actions = random_actions(env, 25)
        streams[mode] = record(env, actions)
    obs, reward, terminated, truncated, final_obs = streams[AutoresetMode.SAME_STEP]
    done = terminated | truncated
    ends = done.int().argmax(0)
    assert len(ends.unique()) > 1
    for i, end in enumerate(ends.tolist()):
        for mode in MODES:
            other = streams[mode]
            torch.testing.assert_close(other[0][:end, i], obs[:end, i], rtol=0, atol=0)
            torch.testing.assert_close(other[1][: end + 1, i], reward[: end + 1, i], rtol=0, atol=0)
            assert other[2][end, i] == terminated[end, i]
            assert other[3][end, i] == truncated[end, i]
        # The true successor: final_obs in one mode, the observation itself in the others.
        for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED):
            torch.testing.assert_close(streams[mode][0][end, i], final_obs[end, i], rtol=0, atol=0)
        assert not torch.equal(obs[end, i], final_obs[end, i])
        assert obs[end, i, 0] > 1.24  # Hopper starts at a height of 1.25 +- 0.005
        if end + 1 < 25:
            obs_n, reward_n, terminated_n, truncated_n = (x[end + 1, i] for x in streams[AutoresetMode.NEXT_STEP])
            assert obs_n[0] > 1.24
            assert (reward_n, terminated_n, truncated_n) == (0, False, False)
            obs_d, reward_d, terminated_d, truncated_d = (x[end + 1, i] for x in streams[AutoresetMode.DISABLED])
            torch.testing.assert_close(obs_d, final_obs[end, i], rtol=0, atol=0)
            assert (reward_d, terminated_d, truncated_d) == (0, terminated[end, i], truncated[end, i])


def test_time_limit_counts_the_steps_of_each_episode():
    env = make_mujoco("HalfCheetah-v5", 2, seed=0, max_episode_steps=4, autoreset_mode=AutoresetMode.SAME_STEP)
    env.reset()
    actions = random_actions(env, 10)
    env.step(actions[0])
    env.reset(mask=torch.tensor([False, True]))
    truncated = record(env, actions[1:])[3]
    assert truncated[:, 0].tolist() == [False, False, True, False, False, False, True, False, False]
    assert truncated[:, 1].tolist() == [False, False, False, True, False, False, False, True, False]


def test_the_time_limit_follows_set_state_and_masked_resets():
    env = make_mujoco("HalfCheetah-v5", 2, max_episode_steps=4, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    action = torch.zeros(2, 6)
    env.step(action)
    env.set_state(env.engine.state.qpos[:1].clone(), env.engine.state.qvel[:1].clone(), torch.tensor([0]))
    env.step(action)
    env.reset(mask=torch.tensor([False, True]))
    ends = [env.step(action).truncated.tolist() for _ in range(4)]
    assert ends == [[False, False], [False, False], [True, False], [True, True]]


def test_a_loaded_state_does_not_write_into_shared_flags():
    mode = AutoresetMode.DISABLED
    old, new = (make_mujoco("HalfCheetah-v5", 2, max_episode_steps=2, autoreset_mode=mode) for _ in range(2))
    for env in (old, new):
        env.reset(seed=0)
        first = env.step(torch.zeros(2, 6))
    old.step(torch.zeros(2, 6))
    new.load_state_dict(old.state_dict())
    assert not first.truncated.any()
    new.reset(seed=1)
    assert not new.step(torch.zeros(2, 6)).truncated.any()


def test_reset_with_a_mask_leaves_the_others():
    env = make_mujoco("Humanoid-v5", 3, seed=0)
    env.reset()
    before = env.step(random_actions(env, 1)[0]).obs.clone()
    after = env.reset(mask=torch.tensor([False, True, False]))
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=0, atol=0)
    assert not torch.equal(after[1], before[1])


def test_seed_makes_resets_repeatable_and_none_continues():
    env = make_mujoco("HalfCheetah-v5", 2)
    first, second = env.reset(seed=5).clone(), env.reset().clone()
    assert not torch.equal(first, second)
    torch.testing.assert_close(env.reset(seed=5), first, rtol=0, atol=0)
    torch.testing.assert_close(make_mujoco("HalfCheetah-v5", 2, seed=5).reset(), first, rtol=0, atol=0)
    assert not torch.equal(make_mujoco("HalfCheetah-v5", 2).reset(), make_mujoco("HalfCheetah-v5", 2).reset())


def test_float32_is_the_rounded_float64():
    streams = []
    for dtype in (torch.float64, torch.float32):
        env = make_mujoco("Walker2d-v5", 4, seed=0, dtype=dtype, max_episode_steps=15)
        env.reset()
        streams.append(record(env, random_actions(env, 30)))
    for a, b in zip(*streams):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=0, atol=0)


@pytest.mark.parametrize("culprit", ["state", "action"])
@pytest.mark.parametrize("task_id", ["HalfCheetah-v5", "Humanoid-v5"])
def test_an_unstable_simulation_shows_in_the_reward_of_its_row(task_id, culprit, tmp_path, monkeypatch):
    """MuJoCo repairs a huge velocity and ignores a NaN control, so that the next step is sound again."""
    monkeypatch.chdir(tmp_path)  # MuJoCo appends its warnings to MUJOCO_LOG.TXT
    finite = {}
    for unstable in ("nan", "continue"):
        env = make_mujoco(task_id, 3, seed=0, unstable=unstable)
        env.reset()
        actions = random_actions(env, 2)
        if culprit == "state":
            env.engine.state.qvel[1, 4] = 1e11
        else:
            actions[0, 1, 2] = torch.nan
        finite[unstable] = env.step(actions[0]).reward.isfinite().tolist()
        assert env.step(actions[1]).reward.isfinite().all()
    assert finite["nan"] == [True, False, True]
    # A NaN control reaches the control cost in any case.
    assert finite["continue"] == [True, culprit == "state", True]


def test_set_state_starts_given_rows():
    env = make_mujoco("Reacher-v5", 3, seed=0)
    qpos = torch.tensor([[torch.pi / 2, 0.0, 0.1, -0.1]], dtype=torch.float64)
    with pytest.raises(ValueError, match="before the first reset"):
        env.set_state(qpos, qpos, torch.tensor([2]))
    before = env.reset().clone()
    obs = env.set_state(qpos, torch.ones(1, 4, dtype=torch.float64), torch.tensor([2]))
    torch.testing.assert_close(obs[:2], before[:2], rtol=0, atol=0)
    torch.testing.assert_close(obs[2, :8], torch.tensor([0.0, 1.0, 1.0, 0.0, 0.1, -0.1, 1.0, 1.0]), atol=1e-7, rtol=0)
    with pytest.raises(ValueError, match=r"expected qpos, qvel of shapes .*\(3, 4\).*received .*\(1, 4\)"):
        env.set_state(qpos, qpos)


def test_set_state_starts_every_copy_if_no_rows_are_given():
    env = make_mujoco("Reacher-v5", 3, seed=0, max_episode_steps=3)
    env.reset()
    env.step(torch.zeros(3, 2))
    qpos = torch.arange(12.0, dtype=torch.float64).reshape(3, 4) / 100
    obs = env.set_state(qpos, torch.zeros(3, 4, dtype=torch.float64))
    torch.testing.assert_close(obs[:, :2], qpos[:, :2].cos().float())
    ends = [env.step(torch.zeros(3, 2)).truncated.all().item() for _ in range(3)]
    assert ends == [False, False, True], "the clock did not restart"


def bad_shape(self, state):
    return state.qpos


def bad_dtype(self, state):
    return state.qpos[:, 0]


@pytest.mark.parametrize(
    ("method", "replacement", "message"),
    [
        ("reward", bad_shape, r"HalfCheetah.reward\(state\): expected shape \(2,\)"),
        ("terminated", bad_dtype, r"HalfCheetah.terminated\(state\): expected shape \(2,\) and torch.bool"),
        ("observe", bad_dtype, r"HalfCheetah.observe\(state\): expected shape"),
        ("reset", lambda self, n, g: (torch.zeros(n, 3), torch.zeros(n, 9)), r"reset\(n, generator\)\[0\]: expected"),
    ],
)
def test_a_task_with_wrong_shapes_fails_at_construction(monkeypatch, method, replacement, message):
    monkeypatch.setattr(HalfCheetah, method, replacement)
    with pytest.raises(ValueError, match=message):
        MujocoEnv(HalfCheetah(), 2)


def test_actions_with_a_gradient_leave_no_graph_behind():
    @dataclass
    class Paid(HalfCheetah):
        def reward(self, state):
            return -state.ctrl.square().sum(1)

    env = MujocoEnv(Paid(), 2)
    env.reset()
    assert not env.step(torch.zeros(2, 6, requires_grad=True)).reward.requires_grad
    assert not env.engine.state.ctrl.requires_grad


def test_a_task_that_reads_an_undeclared_field_is_told_so():
    @dataclass
    class Reads(Hopper):
        def observe(self, state):
            return state.xpos.flatten(1)

    with pytest.raises(AttributeError, match="not 'xpos': name derived MjData arrays in the task's `fields`"):
        MujocoEnv(Reads(), 2)
    Reads.fields = ("xpoz",)
    with pytest.raises(ValueError, match="xpoz"):
        MujocoEnv(Reads(), 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"healthy_reward": 2.0}, TypeError, "HalfCheetah-v5: expected options among .*received healthy_reward"),
        ({"nthreads": 2}, TypeError, "received nthreads"),
        ({"num_envs": 0}, ValueError, "num_envs: expected a positive integer, received 0"),
        ({"nthread": 0}, ValueError, "nthread: expected"),
        ({"max_episode_steps": 0}, ValueError, "max_episode_steps: expected"),
        ({"frame_skip": 2.5}, ValueError, "frame_skip: expected"),
        ({"dtype": torch.float16}, TypeError, "dtype: expected"),
        ({"autoreset_mode": "same"}, ValueError, "as autoreset_mode, got 'same'"),
        ({"unstable": "raise"}, ValueError, "unstable: expected"),
        ({"xml_file": "cheetah.xml"}, FileNotFoundError, "not one of Gymnasium's MJCF files"),
        ({"xml_file": "./cheetah.xml"}, FileNotFoundError, "expected an MJCF file at"),
        ({"width": 0}, ValueError, "width: expected"),
        ({"camera_id": 0, "camera_name": "track"}, ValueError, "drop one"),
    ],
)
def test_bad_options_fail_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        make_mujoco(**{"id": "HalfCheetah-v5", "num_envs": 2, **options})


def test_bad_calls():
    with pytest.raises(ValueError, match=r"expected one of Ant-v5, .*received 'HalfCheetah-v9'"):
        make_mujoco("HalfCheetah-v9", 2)
    env = make_mujoco("HalfCheetah-v5", 2)
    with pytest.raises(RuntimeError, match="before the first reset"):
        env.step(torch.zeros(2, 6))
    with pytest.raises(RuntimeError, match="before the first reset"):
        env.reset(mask=torch.tensor([True, False]))
    env.reset()
    with pytest.raises(ValueError, match=r"expected shape \(2, 6\), received \(6,\)"):
        env.step(torch.zeros(6))
    with pytest.raises(ValueError, match=r"mask: expected bool of shape \(2,\), received torch.float32"):
        env.reset(mask=torch.ones(2))
    with pytest.raises(ValueError, match="state: expected"):
        env.load_state_dict(make_mujoco("HalfCheetah-v5", 3).state_dict())
    with pytest.raises(ValueError, match="state: expected"):
        env.load_state_dict(make_mujoco("Hopper-v5", 2).state_dict())


def opengl_works() -> bool:
    try:
        _context(8, 8).free()
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not opengl_works(), reason="no OpenGL backend on this machine")
@pytest.mark.parametrize("task_id", TASKS)
def test_pictures(task_id):
    env = make_mujoco(task_id, 2, seed=0, width=64, height=48)
    env.reset()
    state = env.state_dict()
    picture = env.render(1)
    assert picture.shape == (48, 64, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 5  # not a blank image
    for action in random_actions(env, 8):
        env.step(action)
    assert (env.render(1) != picture).any()
    env.load_state_dict(state)
    np.testing.assert_array_equal(env.render(1), picture)
    env.close()
    env.close()


@pytest.mark.skipif(not opengl_works(), reason="no OpenGL backend on this machine")
def test_cameras_of_the_model_and_flags():
    pictures = [
        make_mujoco("HalfCheetah-v5", 1, seed=0, width=64, height=64, **options).render()
        for options in ({}, {"camera_name": "track"}, {"default_camera_config": {"distance": 9.0}})
    ]
    assert (pictures[0] != pictures[1]).any()
    assert (pictures[0] != pictures[2]).any()
    with pytest.raises(ValueError, match=r"camera: expected one of \['track'\].*received 'front'"):
        make_mujoco("HalfCheetah-v5", 1, camera_name="front").render()
    with pytest.raises(ValueError, match="received 'zoom'"):
        MujocoEnv(HalfCheetah(), 1, render=RenderOptions(default_camera_config={"zoom": 2})).render()


def test_no_opengl_says_what_to_install(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.setattr("envs.mujoco.render.importlib.import_module", lambda name: 1 / 0)
    with pytest.raises(RuntimeError, match=r"glfw: division by zero.*install EGL .*MUJOCO_GL=egl"):
        make_mujoco("HalfCheetah-v5", 1).render()


def test_contact_forces_see_forces_applied_from_outside():
    """In the air cfrc_ext is zero, and a push of 3 N through the torso's centre of mass is all there is to see."""
    env = make_mujoco("Ant-v5", 2, seed=0, dtype=torch.float64, contact_force_range=(-10.0, 10.0))
    env.reset()
    assert env.step(torch.zeros(2, 8)).obs[:, 27:].abs().max() == 0
    env.engine._batch.bind("xfrc_applied")[1, 1, 2] = 3.0
    forces = env.step(torch.zeros(2, 8)).obs[:, 27:].reshape(2, 13, 6)
    assert forces[0].abs().max() == 0
    assert forces[1, 0, 5] == pytest.approx(3.0)
    assert forces[1, 1:].abs().max() == 0
