"""The adapter of Isaac Lab and mjlab, on a stand-in that keeps their habits."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents import PPO
from ccrl.adapters.lab import LabEnv
from ccrl.batched_env import AutoresetMode
from ccrl.collect import Collector, Request
from ccrl.experiment.evaluation import evaluate
from ccrl.policies import MLPPolicy
from ccrl.testing import EnvContract, sample_actions
from ccrl.testing.lab import FakeLab, LabCfg

LIMIT = 12


def make(num_envs=3, **settings):
    options = {k: settings.pop(k) for k in ("clip_actions", "random_ages") if k in settings}
    return LabEnv(FakeLab(LabCfg(num_envs=num_envs, limit=LIMIT, **settings)), **options)


class TestContract(EnvContract):
    autoreset_modes = (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED)
    time_limit = LIMIT
    resumable = False

    def make_env(self, num_envs, autoreset_mode):
        return make(num_envs, auto_reset=autoreset_mode == AutoresetMode.SAME_STEP)


class TestNestedGroups(TestContract):
    autoreset_modes = (AutoresetMode.SAME_STEP,)

    def make_env(self, num_envs, autoreset_mode):
        return make(num_envs, nested=True, actor_name="actor", clip_actions=1.0)


def test_groups_are_concatenated_in_their_own_order_and_the_actor_sees_its_own():
    env = make(nested=True, actor_name="actor")
    assert list(env.single_observation_space) == ["actor", "critic"]
    obs = env.reset(seed=0)
    # z before a, as the environment has them: x, clock, 7
    assert obs["critic"][:, 2].tolist() == [7.0, 7.0, 7.0]
    policy = MLPPolicy(env.single_observation_space, env.single_action_space, hidden=(4,))
    assert (policy.observed("actor"), policy.observed("critic")) == (["actor"], ["critic"])
    assert isinstance(make(critic=False).single_observation_space, spaces.Box)


def test_stored_rows_do_not_move_with_the_simulators_buffers():
    env = make(random_ages=False)
    policy = MLPPolicy(env.single_observation_space, env.single_action_space, hidden=(4,))
    data = Collector(env, seed=0).collect(Request(steps=8), policy)
    assert data["obs"]["policy"][:, 0, 1].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    kept = data["obs"]["policy"].clone(), data["reward"].clone()
    env.step(torch.ones(3, 1))
    assert torch.equal(kept[0], data["obs"]["policy"])
    assert torch.equal(kept[1], data["reward"])


def test_the_row_after_a_time_out_continues_the_trajectory():
    """The critic's observation has no noise: its clock counts on to the limit, and x is where reward says."""
    env = make()
    env.reset(seed=5)
    for _ in range(LIMIT):
        result = env.step(torch.full((3, 1), 0.1))
    assert result.truncated.all()
    assert result.final_obs["critic"][:, 1].tolist() == [LIMIT] * 3
    torch.testing.assert_close(1.0 - result.final_obs["critic"][:, 0].abs(), result.reward)
    assert result.obs["critic"][:, 1].tolist() == [0.0] * 3


def test_without_final_observations_the_collector_is_told():
    env = make(compute_final_obs=False)
    assert not env.provides_final_obs
    policy = MLPPolicy(env.single_observation_space, env.single_action_space, hidden=(4,))
    data = Collector(env, seed=0).collect(Request(steps=LIMIT + 2), policy)
    assert data["reward"].isfinite().all()


def test_finite_horizons_make_time_outs_terminal():
    env = make(is_finite_horizon=True)
    env.reset(seed=0)
    for _ in range(LIMIT):
        result = env.step(torch.zeros(3, 1))
    assert result.terminated.all()
    assert not result.truncated.any()


def test_unbounded_actions_are_clipped_only_on_demand():
    for clip, expected in ((None, 3.0), (1.0, 1.0)):
        env = make(clip_actions=clip)
        env.reset(seed=0)
        before = env.unwrapped.x.clone()
        env.step(torch.full((3, 1), 3.0))
        moved = env.unwrapped.x - before
        torch.testing.assert_close(moved, torch.full((3,), 0.1 * expected), atol=0.06, rtol=0.0)  # noise 0.01
        assert float(env.single_action_space.high[0]) == (np.inf if clip is None else clip)
    with pytest.raises(ValueError, match="clip_actions"):
        make(clip_actions=0.0)


@pytest.mark.parametrize("settings", [{"fresh_log": True}, {"fresh_log": False}, {"auto_reset": False}])
def test_the_log_is_the_mean_over_steps_with_resets(settings):
    """Two copies end at different steps: the mean is over those two. A log that is left over from an earlier reset
    does not count again."""
    env = make(2, random_ages=False, **settings)
    policy = MLPPolicy(env.single_observation_space, env.single_action_space, hidden=(4,))
    collector = Collector(env, seed=0)
    collector.collect(Request(steps=1), policy)
    env.unwrapped.episode_length_buf.copy_(torch.tensor([LIMIT - 2, LIMIT - 4]))
    collector.log = {}
    wrote = []
    inner = env.unwrapped._restart

    def restart(rows):
        inner(rows)
        wrote.append(float(env.unwrapped.extras["log"]["Episode_Reward/x"]))

    env.unwrapped._restart = restart
    collector.collect(Request(steps=6), policy)
    assert len(wrote) == 2
    assert float(collector.log["Episode_Reward/x"]) == pytest.approx(sum(wrote) / 2, rel=1e-5)
    assert collector.log["Episode_Termination/count"] == 1.0
    assert "not a scalar" not in collector.log
    collector.log = {}
    collector.collect(Request(steps=2), policy)
    assert collector.log == {}


def test_inference_mode_changes_nothing():
    rows = []
    for mode in (False, True):
        env = make(random_ages=False, clip_actions=1.0)
        env.reset(seed=0)
        with torch.inference_mode(mode):
            env.step(torch.full((3, 1), 0.5))  # tells of the reset
            rows.append([])
            for _ in range(LIMIT + 1):
                result = env.step(torch.full((3, 1), 0.5))
                rows[-1].append((result.obs["policy"].clone(), bool(result.log)))
    for (obs, told), (other, also) in zip(*rows):
        assert torch.equal(obs, other)
        assert told == also
    assert sum(told for _, told in rows[0]) == 1


def test_the_log_reaches_the_training_log_under_its_own_names():
    agent = PPO(make(2), num_envs=2, n_steps=16, hidden=(4,), batch_size=16, n_epochs=1)
    agent.learn(32)
    assert 0.0 < float(agent.scalars["Episode_Reward/x"]) < 2.0


def test_the_callers_random_numbers_are_left_alone():
    simulator = FakeLab(LabCfg())
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    env = LabEnv(simulator)
    env.reset(seed=3)
    for _ in range(2 * LIMIT):
        env.step(torch.zeros(3, 1))
    env.randomise_ages()
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert states[2] == random.getstate()


def test_training_begins_at_random_ages_and_a_resumed_one_does_not(tmp_path):
    """Else every copy would meet its time limit in the same step."""
    env = make(16)
    policy = MLPPolicy(env.single_observation_space, env.single_action_space, hidden=(4,))
    collector = Collector(env, seed=0)
    data = collector.collect(Request(steps=LIMIT), policy)
    ends = data["truncated"].float().sum(1)
    assert ends.sum() == 16
    assert (ends > 0).sum() > 4
    resumed = Collector(make(16), seed=0)
    with pytest.warns(UserWarning, match="starts fresh episodes"):
        resumed.load_state_dict(collector.state_dict())
    data = resumed.collect(Request(steps=LIMIT), policy)
    assert data["truncated"].float().sum(1).tolist() == [0.0] * (LIMIT - 1) + [16.0]
    # and never in an evaluation
    result = evaluate(lambda obs, _: torch.zeros(16, 1), make(16), episodes=16)
    assert result.lengths.tolist() == [LIMIT] * 16


def test_an_evaluation_shares_the_simulation_and_training_begins_fresh_episodes():
    """The rollout after it starts at the beginning of episodes, and no step is taken from where they were before."""
    env = make(3, one_per_process=True, random_ages=False)
    with pytest.raises(RuntimeError, match="already exists"):
        make(3, one_per_process=True)
    policy = MLPPolicy(env.single_observation_space, env.single_action_space, hidden=(4,))
    collector = Collector(env, seed=0)
    first = collector.collect(Request(steps=5), policy)
    assert first["t"][:, 0].tolist() == [0, 1, 2, 3, 4]
    shared = env.share()
    assert not env.interrupted
    result = evaluate(lambda obs, _: torch.zeros(3, 1), shared, episodes=6, seed=1)
    assert result.lengths.tolist() == [LIMIT] * 6
    assert env.interrupted
    assert not shared.interrupted
    with pytest.raises(RuntimeError, match="reset it first"):
        env.step(torch.zeros(3, 1))
    second = collector.collect(Request(steps=5), policy)
    assert second["t"][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert second["obs"]["critic"][0, :, 1].tolist() == [0.0, 0.0, 0.0]
    shared.close()
    env.step(torch.zeros(3, 1))
    env.close()
    make(3, one_per_process=True).close()  # the last user has closed the simulation


def test_an_evaluation_in_between_changes_nothing_for_the_evaluation():
    """Seeded: two evaluations of one policy are equal, whatever training did in between."""
    env = make(3)
    shared = env.share()
    returns = []
    for steps in (3, 7):
        env.reset()
        for _ in range(steps):
            env.step(sample_actions(env.single_action_space, 3, torch.Generator().manual_seed(steps)))
        returns.append(evaluate(lambda obs, _: 0.1 * obs["policy"][:, :1], shared, episodes=3, seed=9).returns)
    assert (returns[0] == returns[1]).all()


def test_discrete_actions_are_refused():
    env = FakeLab(LabCfg())
    env.single_action_space = spaces.Discrete(3)
    with pytest.raises(ValueError, match="expected a Box, got Discrete"):
        LabEnv(env)
