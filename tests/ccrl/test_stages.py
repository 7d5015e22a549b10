"""Stages by hand: group baselines, normalised rewards, returns of episodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ccrl.data import Data
from ccrl.estimators.stages import EpisodeReturn, GroupBaseline, RewardNorm

F64 = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def test_group_baselines_on_the_canonical_rewards() -> None:
    score, group = tensor(1, 0, 0, 1), torch.zeros(4, dtype=torch.int64)
    assert GroupBaseline(scale="std").advantages(score, group).tolist() == pytest.approx(
        [0.866024, -0.866024, -0.866024, 0.866024], abs=1e-6
    )
    assert GroupBaseline(scale="std", ddof=0, eps=0.0).advantages(score, group).abs().tolist() == pytest.approx([1] * 4)
    assert GroupBaseline().advantages(score, group).abs().tolist() == pytest.approx([0.5] * 4)
    rloo = GroupBaseline(baseline="leave_one_out")
    assert rloo.advantages(score, group).tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    equal = torch.full((3,), 0.1, dtype=F64)  # their rounded mean is another number
    assert equal.mean() != 0.1
    for stage in (GroupBaseline(), rloo, GroupBaseline(scale="std")):
        assert stage.advantages(equal, group[:3]).eq(0).all()
    alone = torch.tensor([0, 1, 1, 1])
    assert float(rloo.advantages(score, alone)[0]) == 1.0
    assert float(replace(rloo, single="zero").advantages(score, alone)[0]) == 0.0
    with pytest.raises(ValueError, match="leave_one_out"):
        GroupBaseline(baseline="leave_one_out", scale="std")


def test_reward_normalisation_by_hand() -> None:
    # one environment, gamma .5: discounted returns 2, 2 + .5*2 = 3 | end | 4: mean 3, variance 2/3
    stage = RewardNorm(1, 0.5, clip=3.0, eps=0.0)
    data = Data(
        {
            "reward": tensor(2, 2, 4).unsqueeze(-1),
            "carry": tensor(1, 0, 1).unsqueeze(-1),
            "valid": torch.ones(3, 1, dtype=F64),
        }
    )
    scale = (2 / 3) ** -0.5
    assert stage(data)["shaped_reward"].flatten().tolist() == pytest.approx([2 * scale, 2 * scale, 3.0])  # 4.9: clipped
    assert stage.running.tolist() == [4.0]  # the last episode goes on in the next rollout


@pytest.mark.parametrize("dummies", [False, True])
def test_reward_normalisation_over_rollouts(dummies: bool) -> None:
    """Against a loop over steps: the discounted return goes on over a rollout's border, restarts after episodes, and
    dummy rows are no part of the statistics."""
    generator, gamma, copies = torch.Generator().manual_seed(0), 0.9, 3
    stage, running, seen = RewardNorm(copies, gamma, clip=1e9, eps=0.0), [0.0] * copies, list[float]()
    ended = torch.zeros(copies, dtype=torch.bool)
    for _ in range(4):
        reward = torch.randn(5, copies, generator=generator, dtype=F64)
        carry, valid = torch.ones(5, copies, dtype=F64), torch.ones(5, copies, dtype=F64)
        for t in range(5):
            for n in range(copies):
                if dummies and ended[n]:
                    reward[t, n] = carry[t, n] = valid[t, n] = 0.0
                    ended[n], running[n] = False, 0.0
                    continue
                running[n] = float(reward[t, n]) + gamma * running[n]
                seen.append(running[n])
                if t == 4 - n or torch.rand((), generator=generator) < 0.2:  # column 0 ends with the rollout
                    carry[t, n], running[n], ended[n] = 0.0, 0.0, True
        got = stage(Data({"reward": reward, "carry": carry, "valid": valid}))["shaped_reward"]
        scale = tensor(*seen).var(correction=0).sqrt()
        torch.testing.assert_close(got, reward / scale, rtol=1e-9, atol=1e-12)
        assert stage.running.tolist() == pytest.approx(running)


def test_episode_returns_by_hand() -> None:
    # column 0: 1 + .5*2 = 2, then its next episode; column 1: one step and rows without facts
    data = Data(
        {
            "reward": torch.tensor([[1.0, 4.0], [2.0, torch.nan], [8.0, torch.nan]]),
            "carry": torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]),
            "valid": torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]),
        }
    )
    got = EpisodeReturn(gamma=0.5)(data)
    assert got["episode_reward"].tolist() == [2.0, 4.0]
    assert "episode_reward" in got.sequence
    shaped = data.derive(shaped=torch.ones(3, 2))
    assert EpisodeReturn(reward="shaped")(shaped)["episode_reward"].tolist() == [2.0, 1.0]


def test_group_baselines_leave_invalid_rows_at_zero() -> None:
    columns = {
        "valid": torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        "episode_reward": torch.tensor([1.0, 4.0]),
        "group": torch.tensor([0, 0]),
    }
    data = Data(columns, sequence=frozenset({"episode_reward", "group"}))
    assert GroupBaseline()(data)["advantage"].tolist() == [[-1.5, 1.5], [-1.5, 0.0]]


def test_reward_normalisation_goes_on_into_no_fresh_episode() -> None:
    # copy 0 goes on from a return of 100; copy 1 has a fresh episode (loaded without its environment's state)
    stage = RewardNorm(2, 1.0)
    stage.running.fill_(100.0)
    one = torch.ones(1, 2, dtype=F64)
    stage(Data({"reward": one, "carry": one, "valid": one, "t": torch.tensor([[7, 0]])}))
    assert stage.running.tolist() == [101.0, 1.0]
