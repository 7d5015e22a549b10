"""Our environments as those of Gymnasium and SB3; what the adapters close; stacked environments."""

from __future__ import annotations

import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from ccrl.adapters import GymnasiumEnv, SB3Env, SingleEnv, as_vec_env, as_vector_env
from ccrl.batched_env import AutoresetMode
from ccrl.testing import ClockEnv, Episode
from ccrl.wrappers import StackedEnv
from envs.classic import CartPole, Pendulum

A, B = Episode(0.0, 3, "terminate"), Episode(10.0, 2, "truncate")


def test_a_vector_environment_shows_every_copy():
    class Pictured(ClockEnv):
        def render(self, index):
            return np.full((2, 2, 3), index, np.uint8)

    first, second = as_vector_env(Pictured([[A], [B]]), "rgb_array").render()
    assert (first[0, 0, 0], second[0, 0, 0]) == (0, 1)
    assert as_vector_env(Pictured([[A], [B]])).render() is None


def test_exported_final_observations_are_marked():
    env = as_vector_env(ClockEnv([[A], [B], [Episode(20.0, 9)]]))
    env.reset()
    found = [env.step(np.zeros(3, dtype=np.int64))[4] for _ in range(3)]
    assert found[0] == {}
    for infos, expected in zip(found[1:], ([None, 12.0, None], [3.0, None, None])):
        assert [None if x is None else x.item() for x in infos["final_obs"]] == expected
        assert infos["_final_obs"].tolist() == infos["_final_info"].tolist() == [x is not None for x in expected]


def test_single_env_wants_one_copy_without_autoreset():
    with pytest.raises(ValueError, match="num_envs=2"):
        SingleEnv(ClockEnv([[A], [B]], autoreset_mode=AutoresetMode.DISABLED))
    env = SingleEnv(ClockEnv([[A]], autoreset_mode=AutoresetMode.DISABLED))
    assert env.reset()[0].tolist() == [0.0]
    assert [env.step(0)[2:4] for _ in range(3)] == [(False, False), (False, False), (True, False)]
    assert env.reset()[0].tolist() == [0.0]
    limited = SingleEnv(ClockEnv([[B]], autoreset_mode=AutoresetMode.DISABLED))
    limited.reset()
    assert [limited.step(0)[2:4] for _ in range(2)] == [(False, False), (False, True)]
    for wrong in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        with pytest.raises(ValueError, match="DISABLED"):
            SingleEnv(ClockEnv([[A]], autoreset_mode=wrong))


def test_sb3_export_reports_episodes_and_endings():
    pytest.importorskip("stable_baselines3")
    env = as_vec_env(ClockEnv([[A], [B]], reward=0.5))
    first = env.reset()
    assert first.tolist() == [[0.0], [10.0]]
    reports = []
    for _ in range(3):
        _, _, dones, infos = env.step(np.array([0, 0]))
        for row in np.flatnonzero(dones):
            info = infos[row]
            episode = (info["episode"]["r"], info["episode"]["l"])
            reports.append((int(row), *episode, info["terminal_observation"].tolist(), info["TimeLimit.truncated"]))
    assert reports == [(1, 1.0, 2, [12.0], True), (0, 1.5, 3, [3.0], False)]
    assert first.tolist() == [[0.0], [10.0]], "the first observation changed with the environment's buffer"
    with pytest.raises(ValueError, match="SAME_STEP"):
        as_vec_env(ClockEnv([[A]], autoreset_mode=AutoresetMode.NEXT_STEP))
    with pytest.raises(ValueError, match="final_obs"):
        as_vec_env(ClockEnv([[A]], provides_final_obs=False))


def test_sb3_export_counts_every_episode_anew():
    pytest.importorskip("stable_baselines3")
    env = as_vec_env(ClockEnv([[A], [B]], reward=0.5))
    env.reset()
    env.step(np.array([0, 0]))
    for _ in range(2):
        env.reset()  # in the middle of episodes
        reports = [[], []]
        for _ in range(6):
            _, _, dones, infos = env.step(np.array([0, 0]))
            for row in np.flatnonzero(dones):
                reports[row].append((infos[row]["episode"]["r"], infos[row]["episode"]["l"]))
        assert reports == [[(1.5, 3)] * 2, [(1.0, 2)] * 3]
        env.step(np.array([0, 0]))


def test_sb3_export_calls_an_end_at_the_time_limit_an_end():
    """SB3 bootstraps where ``TimeLimit.truncated`` is set: not where the task ended as well."""
    pytest.importorskip("stable_baselines3")
    env = as_vec_env(ClockEnv([[Episode(0.0, 1, "both")], [Episode(0.0, 1, "truncate")]]))
    env.reset()
    _, _, dones, infos = env.step(np.array([0, 0]))
    assert dones.all()
    assert [info["TimeLimit.truncated"] for info in infos] == [False, True]


def test_sb3_export_takes_a_seed_for_one_reset():
    pytest.importorskip("stable_baselines3")
    env, native = as_vec_env(Pendulum(2)), Pendulum(2)
    env.seed(5)
    assert np.array_equal(env.reset(), native.reset(seed=5).numpy())
    assert np.array_equal(env.reset(), native.reset().numpy()), "the second reset goes on in the stream"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sb3_trains_on_our_environments():
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.PPO("MlpPolicy", as_vec_env(CartPole(4)), n_steps=64, batch_size=64, n_epochs=1, seed=0, device="cpu")
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(512)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters()))
    assert 8 <= np.mean([episode["l"] for episode in model.ep_info_buffer]) <= 500


def test_missing_sb3_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)  # makes its import fail
    with pytest.raises(ImportError, match=r"\[sb3\]"):
        as_vec_env(ClockEnv([[A]]))


class Closes(ClockEnv):
    closed = 0

    def close(self):
        self.closed += 1


def test_closing_an_adapter_closes_what_it_wraps():
    """Else simulators and processes outlive every training run."""
    pytest.importorskip("stable_baselines3")
    disabled = Closes([[A]], autoreset_mode=AutoresetMode.DISABLED)
    exported, sb3, parts = Closes([[A]]), Closes([[A]]), [Closes([[A]]) for _ in range(2)]
    SingleEnv(disabled).close()
    as_vector_env(exported).close()
    SB3Env(as_vec_env(sb3)).close()
    StackedEnv(parts).close()
    assert [env.closed for env in (disabled, exported, sb3, *parts)] == [1] * 5
    vector = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")])
    GymnasiumEnv(vector).close()
    assert vector.closed


def test_stacked_parts_keep_their_own_actions_masks_and_states():
    """Parts that go different ways: what was handed to the wrong one would show."""

    def make():
        return StackedEnv([CartPole(2, autoreset_mode=AutoresetMode.DISABLED) for _ in range(3)])

    env, alone = make(), [CartPole(2, autoreset_mode=AutoresetMode.DISABLED) for _ in range(3)]
    env.reset(seed=5)
    for part in alone:
        part.reset(seed=5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        action = torch.randint(2, (6,), generator=generator)
        mine = env.step(action)
        theirs = [part.step(action[2 * i : 2 * i + 2]) for i, part in enumerate(alone)]
        assert torch.equal(mine.obs, torch.cat([row.obs for row in theirs]))
    assert len(mine.obs.unique(dim=0)) == 6
    other = make()
    other.reset(seed=1)
    other.load_state_dict(env.state_dict())
    mask = torch.tensor([True, False, False, False, False, True])
    after = env.reset(mask=mask)
    assert (after != mine.obs).any(1).tolist() == mask.tolist()
    other.reset(mask=mask)
    assert torch.equal(env.step(action).obs, other.step(action).obs)
