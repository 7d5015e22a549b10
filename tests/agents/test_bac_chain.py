"""The chain of points that BAC's critic reads, from rollouts of every kind."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch

from agents.bac.chain import chain_rows
from ccrl.batched_env import AutoresetMode
from ccrl.collect import Collector, Request
from ccrl.policies import MLPPolicy
from ccrl.testing import ClockEnv, Episode

SCRIPT = [[Episode(0, 3, "terminate"), Episode(100, 2, "truncate")], [Episode(10, 4, "truncate")]]


def policy(groups: bool = False) -> MLPPolicy:
    space: gym.Space = gym.spaces.Box(-1, 1, (1,))
    if groups:
        space = gym.spaces.Dict({"policy": space, "critic": gym.spaces.Box(-1, 1, (2,))})
    return MLPPolicy(space, gym.spaces.Discrete(2), hidden=(4,))


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED, AutoresetMode.NEXT_STEP])
def test_the_chain_of_a_stream(mode: AutoresetMode) -> None:
    """Terminated, truncated and unfinished episodes; dummy rows of NEXT_STEP are left out."""
    steps = 8 if mode == AutoresetMode.NEXT_STEP else 6
    data = Collector(ClockEnv(SCRIPT, autoreset_mode=mode)).collect(Request(steps=steps), policy())
    rows = chain_rows(data, policy(), torch.Generator().manual_seed(0))
    first = [0, 1, 2, 100, 101, 102, 0]  # 102 is the truncated episode's last observation, not the reset that follows
    rewarded, follows = [1, 1, 1, 1, 1, 0, 1], [1, 1, 0, 1, 1, 0, 1]
    if mode == AutoresetMode.NEXT_STEP:  # two of the eight rows of the first environment are dummies
        first, rewarded, follows = [*first[:6], 0, 1], [*rewarded[:6], 1, 0], [*follows[:6], 1, 0]
    else:
        first, rewarded, follows = [*first, 1], [*rewarded, 0], [*follows, 0]
    n = len(first)
    assert rows["obs"][0, :n, 0].tolist() == first
    assert rows["rewarded"][0, :n].tolist() == [bool(x) for x in rewarded]
    assert rows["follows"][0, :n].tolist() == [bool(x) for x in follows]
    assert rows["obs"][0, n : n + 5, 0].tolist() == [10, 11, 12, 13, 14]
    assert rows["t"][0, n : n + 5].tolist() == [0, 1, 2, 3, 4]
    assert bool((rows["reward"][0][rows["rewarded"][0]] == 1.0).all())
    assert bool((rows["reward"][0][~rows["rewarded"][0]] == 0.0).all())


def test_actions_of_bootstrap_pairs_are_drawn_from_the_policy() -> None:
    """Not its mode, and with the generator that is given: Q of the closing point stands for V there."""
    data = Collector(ClockEnv(SCRIPT)).collect(Request(steps=6), policy())
    acting = policy()
    rows = chain_rows(data, acting, torch.Generator().manual_seed(1))
    closing = ~rows["rewarded"][0]
    noise = acting.draw_noise(int(closing.sum()), torch.Generator().manual_seed(1), torch.device("cpu"))
    with torch.no_grad():
        expected = acting.act(rows["obs"][0, closing], noise)["action"]
    assert torch.equal(rows["action"][0, closing], expected)
    assert not torch.equal(expected, acting.act(rows["obs"][0, closing], None)["action"])
    played = data["action"].T[data["valid"].T > 0]
    assert torch.equal(rows["action"][0, ~closing], played)


def test_time_limits_may_count_as_terminations() -> None:
    data = Collector(ClockEnv(SCRIPT)).collect(Request(steps=6), policy())
    rows = chain_rows(data, policy(), torch.Generator().manual_seed(0), "terminal")
    # the truncated episodes of both environments have no tail, the rollout's end still cuts
    assert rows["obs"][0, :, 0].tolist() == [0, 1, 2, 100, 101, 0, 1, 10, 11, 12, 13, 10, 11, 12]


def test_fresh_episodes_and_dict_observations() -> None:
    script = [[Episode(0, 2)], [Episode(5, 9)]]
    collector = Collector(ClockEnv(script, groups=True), make_env=lambda n: ClockEnv(script, groups=True))
    data = collector.collect(Request(episodes=2, horizon=4), policy(groups=True))
    rows = chain_rows(data, policy(groups=True), torch.Generator().manual_seed(0))
    assert rows["obs"]["policy"][0, :, 0].tolist() == [0, 1, 5, 6, 7, 8, 9]
    assert rows["rewarded"][0].tolist() == [True] * 6 + [False]
    assert rows["follows"][0].tolist() == [True, False, True, True, True, True, False]
