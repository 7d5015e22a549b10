"""Fresh episodes: one per column, on environments and random numbers of their own."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest
import torch

from ccrl.batched_env import AutoresetMode
from ccrl.collect import Collector, Request
from ccrl.data import Data
from ccrl.policies import MLPPolicy
from ccrl.testing import ClockEnv, Episode

SCRIPT = [
    [Episode(0, 3, "terminate"), Episode(100, 5, "truncate")],
    [Episode(10, 2, "truncate"), Episode(200, 4, "both")],
]
FACTS = ("obs", "reward", "terminated", "truncated", "alive", "carry", "valid", "t")


def policy() -> MLPPolicy:
    torch.manual_seed(0)
    return MLPPolicy(gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2), hidden=(4,))


def snapshot(data: Data, names: tuple[str, ...] = FACTS) -> dict[str, torch.Tensor]:
    return {k: data[k].clone() for k in names} | {"next": data.next_obs().clone()}


def test_fresh_episodes_do_not_disturb_training_streams() -> None:
    actor = policy()
    names = (*FACTS, "action", "log_prob")

    def run(fresh: bool) -> list[dict[str, torch.Tensor]]:
        collector = Collector(ClockEnv(SCRIPT), seed=1, make_env=lambda n: ClockEnv([SCRIPT[i % 2] for i in range(n)]))
        out = []
        for _ in range(3):
            out.append(snapshot(collector.collect(Request(steps=5), actor), names))
            if fresh:
                collector.collect(Request("probe", episodes=3, horizon=4), actor)
        assert collector.total_steps == 30
        return out

    for with_probe, without in zip(run(True), run(False)):
        for name in with_probe:
            torch.testing.assert_close(with_probe[name], without[name], rtol=0, atol=0)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_fresh_episodes_hold_one_episode_per_column(mode: AutoresetMode) -> None:
    def make(n: int) -> ClockEnv:
        return ClockEnv([SCRIPT[i % 2] for i in range(n)], autoreset_mode=mode)

    collector, actor = Collector(make(2), make_env=make), policy()
    for _ in range(2):  # the second request starts from a reset again
        data = collector.collect(Request(episodes=3, horizon=4), actor)
        assert data["valid"].T.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
        assert data["carry"].T.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
        assert data["obs"][0].flatten().tolist() == [0, 10, 0]
        assert data.next_obs()[2, 0].tolist() == [3.0]
        assert collector.stats.returns.tolist() == [3.0, 2.0, 3.0]
        assert collector.stats.lengths.tolist() == [3, 2, 3]
    assert collector.total_steps == 0
    assert collector.fresh_steps == 16


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_fresh_episodes_start_at_step_zero(mode: AutoresetMode) -> None:
    """Whatever the request before left behind: an episode cut by the horizon (column 0), one that ended on its last row
    (column 1)."""

    def make(n: int) -> ClockEnv:
        return ClockEnv([[Episode(0, 5)], [Episode(10, 3, "truncate")]], autoreset_mode=mode)

    collector, actor = Collector(make(2), make_env=make), policy()
    for _ in range(2):
        data = collector.collect(Request(episodes=2, horizon=3), actor)
        assert data["t"].T.tolist() == [[0, 1, 2], [0, 1, 2]]
        assert data["valid"].eq(1).all()
        assert data["carry"].T.tolist() == [[1, 1, 1], [1, 1, 0]]
        assert collector.stats.returns.tolist() == [3.0, 3.0]


def test_groups_of_fresh_episodes() -> None:
    collector = Collector(ClockEnv(SCRIPT), make_env=lambda n: ClockEnv([[Episode(0, 2)]] * n))
    data = collector.collect(Request(episodes=6, horizon=3, groups=2), policy())
    assert data["group"].tolist() == [0, 1, 0, 1, 0, 1]
    assert "group" in data.sequence
    assert data.next_obs()[1].flatten().tolist() == [2.0] * 6, "successors survive"
    with pytest.raises(ValueError, match="multiple of groups"):
        Request(episodes=6, horizon=3, groups=4)


def test_fresh_episodes_have_random_numbers_of_their_own() -> None:
    """Neither the noise of the streams again nor, at the next request, their own."""

    class Seeds(ClockEnv):
        seeds: list[int | None]

        def reset(self, seed: int | None = None, mask: torch.Tensor | None = None) -> Any:
            if mask is None:
                self.seeds.append(seed)
            return super().reset(seed, mask)

    def make(n: int) -> ClockEnv:
        Seeds.seeds = []
        return Seeds([[Episode(0, 40)]] * n)

    collector, actor = Collector(ClockEnv([[Episode(0, 40)]] * 2), seed=3, make_env=make), policy()
    assert collector.generator.initial_seed() != collector.fresh_generator.initial_seed()
    rollouts = [collector.collect(Request(steps=40), actor)["action"].clone()]
    rollouts += [collector.collect(Request(episodes=2, horizon=40), actor)["action"].clone() for _ in range(2)]
    state = collector.state_dict()
    rollouts.append(collector.collect(Request(episodes=2, horizon=40), actor)["action"].clone())
    assert len({tuple(r.flatten().tolist()) for r in rollouts}) == 4
    seeds = list(Seeds.seeds)
    assert len(set(seeds)) == 3
    resumed = Collector(ClockEnv([[Episode(0, 40)]] * 2), seed=8, make_env=make)
    resumed.load_state_dict(state)
    again = resumed.collect(Request(episodes=2, horizon=40), actor)["action"]
    assert torch.equal(again, rollouts[-1])
    assert Seeds.seeds == seeds[-1:]


def test_another_number_of_fresh_episodes() -> None:
    collector = Collector(ClockEnv(SCRIPT), make_env=lambda n: ClockEnv([SCRIPT[i % 2] for i in range(n)]))
    for episodes in (2, 3, 2):
        assert collector.collect(Request(episodes=episodes, horizon=4), policy()).shape == (4, episodes)


def test_rollouts_of_different_tags_do_not_overwrite_each_other() -> None:
    collector = Collector(ClockEnv(SCRIPT), make_env=lambda n: ClockEnv([SCRIPT[i % 2] for i in range(n)]))
    actor = policy()
    first = collector.collect(Request("on", episodes=2, horizon=4), actor)
    kept = snapshot(first, (*FACTS, "action"))
    collector.collect(Request("line", episodes=2, horizon=4), actor)
    for name, value in snapshot(first, (*FACTS, "action")).items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0)


def test_fresh_episodes_have_a_clock_and_statistics_of_their_own() -> None:
    """Columns go on after their episodes; neither their steps nor their further episodes are counted."""
    collector = Collector(ClockEnv(SCRIPT), seed=1, make_env=lambda n: ClockEnv([[Episode(0, 2)], [Episode(0, 9)]]))
    collector.collect(Request(episodes=2, horizon=7), policy())
    assert collector.fresh_steps == 2 + 7
    assert collector.stats.returns.tolist() == [2.0, 7.0]
    assert collector.stats.lengths.tolist() == [2, 7]
    resumed = Collector(ClockEnv(SCRIPT), seed=1)
    resumed.load_state_dict(collector.state_dict())
    assert resumed.fresh_steps == 9


def test_requests_of_two_tags_do_not_share_memory() -> None:
    collector, actor = Collector(ClockEnv(SCRIPT), seed=1, make_env=lambda n: ClockEnv([[Episode(0, 5)]] * n)), policy()
    first = collector.collect(Request("on", episodes=2, horizon=5), actor)
    before = first["action"].clone()
    for _ in range(3):
        second = collector.collect(Request("line", episodes=2, horizon=5), actor)
        assert torch.equal(first["action"], before)
    assert not torch.equal(second["action"], before)


def test_fresh_episodes_stop_when_all_have_ended() -> None:
    """The rows after that keep nothing of the longer rollout before."""
    lengths = [[Episode(0, 9), Episode(0, 2)], [Episode(0, 9, "truncate"), Episode(0, 3, "truncate")]]

    class Counting(ClockEnv):
        steps = 0

        def reset(self, seed: int | None = None, mask: torch.Tensor | None = None) -> Any:
            obs = super().reset(seed, mask)
            if mask is None and self.steps:  # ClockEnv starts its script anew: go to the second episodes
                self._episode = [1, 1]
            return obs

        def step(self, action: torch.Tensor) -> Any:
            self.steps += 1
            return super().step(action)

    env = Counting(lengths)
    collector = Collector(ClockEnv(SCRIPT), seed=1, make_env=lambda n: env)
    collector.collect(Request(episodes=2, horizon=9), policy())
    assert env.steps == 9
    data = collector.collect(Request(episodes=2, horizon=9), policy())
    assert env.steps == 9 + 3
    assert data["valid"].sum(0).tolist() == [2.0, 3.0]
    assert data["reward"][3:].eq(0).all()
    assert not (data["terminated"] | data["truncated"])[3:].any()
    assert collector.stats.returns.tolist() == [2.0, 3.0]


def test_closing_closes_all_environments() -> None:
    closed: list[int] = []

    class Closing(ClockEnv):
        def close(self) -> None:
            closed.append(self.num_envs)

    collector = Collector(Closing(SCRIPT), make_env=lambda n: Closing([[Episode(0, 2)]] * n))
    for episodes in (3, 4, 3):  # built once for each number
        collector.collect(Request(episodes=episodes, horizon=2), policy())
    collector.close()
    assert sorted(closed) == [2, 3, 4]


def test_random_episodes_are_not_the_policys() -> None:
    collector = Collector(ClockEnv(SCRIPT), make_env=lambda n: ClockEnv([SCRIPT[0]] * n))
    data = collector.collect(Request(episodes=2, horizon=3, params="random"), policy())
    assert "log_prob" not in data
