"""The collector on the scripted clock: borders, fresh episodes, statistics, bad numbers, resume."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest
import torch

from ccrl.batched_env import AutoresetMode, StepResult
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


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_rollout_borders_lose_nothing(mode: AutoresetMode) -> None:
    actor = policy()
    whole = snapshot(Collector(ClockEnv(SCRIPT, autoreset_mode=mode)).collect(Request(steps=24), actor))
    collector = Collector(ClockEnv(SCRIPT, autoreset_mode=mode))
    pieces, ended = [], 0
    for steps in (1, 5, 2, 9, 7):
        pieces.append(snapshot(collector.collect(Request(steps=steps), actor)))
        ended += len(collector.stats.returns)
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([p[name] for p in pieces]), value, rtol=0, atol=0)
    assert collector.total_steps == int(whole["valid"].sum())
    assert ended == int((whole["terminated"] | whole["truncated"]).sum())


def test_dict_observations_are_collected() -> None:
    env = ClockEnv(SCRIPT, groups=True)
    actor = MLPPolicy(env.single_observation_space, gym.spaces.Discrete(2), hidden=(4,))
    data = Collector(env).collect(Request(steps=4), actor)
    assert data["obs"]["critic"][:, 0].tolist() == [[0, 0], [1, 1], [2, 2], [100, 0]]
    assert data.next_obs()["critic"][2, 0].tolist() == [3, 3]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_episode_statistics_by_hand(mode: AutoresetMode) -> None:
    env = ClockEnv([[Episode(0, 3, "terminate")], [Episode(10, 5, "truncate")]], autoreset_mode=mode, reward=2.0)
    collector, actor = Collector(env), policy()
    collector.collect(Request(steps=2), actor)
    assert len(collector.stats.returns) == 0
    collector.collect(Request(steps=3), actor)  # copy 0 ends at its 3rd step, copy 1 at its 5th
    assert collector.stats.returns.tolist() == [6.0, 10.0]
    assert collector.stats.lengths.tolist() == [3, 5]


def test_behaviour_columns_are_those_of_the_policy_that_acted() -> None:
    actor = policy()
    data = Collector(ClockEnv(SCRIPT)).collect(Request(steps=6), actor)
    again = actor.evaluate(data, frozenset({"log_prob", "dist"}))
    torch.testing.assert_close(data["log_prob"], again["log_prob"])
    torch.testing.assert_close(data["old_logits"], again["logits"])


def test_seeds_decide_the_actions() -> None:
    def actions(seed: int) -> list[list[int]]:
        result: list[list[int]] = (
            Collector(ClockEnv(SCRIPT), seed=seed).collect(Request(steps=30), policy())["action"].tolist()
        )
        return result

    assert actions(3) == actions(3)
    assert actions(3) != actions(4)


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


def test_rollouts_of_different_tags_do_not_overwrite_each_other() -> None:
    collector = Collector(ClockEnv(SCRIPT), make_env=lambda n: ClockEnv([SCRIPT[i % 2] for i in range(n)]))
    actor = policy()
    first = collector.collect(Request("on", episodes=2, horizon=4), actor)
    kept = snapshot(first, (*FACTS, "action"))
    collector.collect(Request("line", episodes=2, horizon=4), actor)
    for name, value in snapshot(first, (*FACTS, "action")).items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0)


class Broken(ClockEnv):
    """Writes a number into copy 1 at one step."""

    def __init__(self, where: str, value: float, at: int) -> None:
        super().__init__(SCRIPT)
        self.where, self.value, self.at, self.steps = where, value, at, 0

    def step(self, action: torch.Tensor) -> StepResult:
        result = super().step(action)
        if self.steps == self.at:
            getattr(result, self.where)[1] = self.value
        self.steps += 1
        return result


@pytest.mark.parametrize(
    ("where", "value", "at", "name"),
    [
        ("reward", float("nan"), 3, "reward"),
        ("reward", float("inf"), 0, "reward"),
        ("obs", float("nan"), 3, "obs"),
        ("final_obs", float("nan"), 1, "final obs"),  # copy 1 ends there; elsewhere the clock itself writes NaN
    ],
)
def test_bad_numbers_name_environment_and_step(where: str, value: float, at: int, name: str) -> None:
    with pytest.raises(FloatingPointError, match=rf"^{name} is not finite: environment 1, step {at} "):
        Collector(Broken(where, value, at)).collect(Request(steps=6), policy())


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_resume_equals_an_uninterrupted_run(mode: AutoresetMode) -> None:
    actor, names = policy(), (*FACTS, "action", "log_prob")

    def make() -> Collector:
        return Collector(ClockEnv(SCRIPT, autoreset_mode=mode), seed=7)

    straight = make()
    straight.collect(Request(steps=7), actor)
    state: dict[str, Any] = straight.state_dict()
    expected = snapshot(straight.collect(Request(steps=11), actor), names)
    returns = straight.stats.returns
    resumed = make()
    resumed.load_state_dict(state)
    got = snapshot(resumed.collect(Request(steps=11), actor), names)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)
    assert resumed.stats.returns.tolist() == returns.tolist()
    assert resumed.total_steps == straight.total_steps


class Forgetful(ClockEnv):
    """An environment without state: resuming starts fresh episodes, not the very first ones again."""

    state_dict = property()  # type: ignore[assignment]

    def reset(self, seed: int | None = None, mask: torch.Tensor | None = None) -> Any:
        if mask is None:
            self.seed = seed
        return super().reset(seed, mask)


def test_resume_without_environment_state_uses_another_seed() -> None:
    first, actor = Collector(Forgetful(SCRIPT), seed=5), policy()
    first.collect(Request(steps=4), actor)
    assert first.env.seed == 5  # type: ignore[attr-defined]
    assert not first.exact
    second = Collector(Forgetful(SCRIPT), seed=5)
    second.load_state_dict(first.state_dict())
    assert second.env.seed == 5 + first.total_steps  # type: ignore[attr-defined]
    assert second.collect(Request(steps=1), actor)["t"].tolist() == [[0, 0]]


def test_requests_are_checked() -> None:
    with pytest.raises(ValueError, match="steps or episodes"):
        Request()
    with pytest.raises(ValueError, match="steps or episodes"):
        Request(steps=4, episodes=2, horizon=3)
    with pytest.raises(ValueError, match="horizon"):
        Request(episodes=2)
    with pytest.raises(ValueError, match="make_env"):
        Collector(ClockEnv(SCRIPT)).collect(Request(episodes=2, horizon=3), policy())


@pytest.mark.parametrize("what", [{"source": "on"}, {"demonstrations": True}])
def test_what_only_language_models_have_is_refused(what: dict[str, Any]) -> None:
    collector = Collector(ClockEnv(SCRIPT), make_env=lambda n: ClockEnv([SCRIPT[0]] * n))
    with pytest.raises(ValueError, match="no prompts to repeat and no demonstrations"):
        collector.collect(Request(episodes=2, horizon=3, **what), policy())


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
    lengths = [[Episode(0, 9), Episode(0, 2)], [Episode(0, 9), Episode(0, 3)]]

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
