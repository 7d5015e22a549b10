"""n-step rows: sums that end with the episode, and survive a resume."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch

from ccrl.data import Data
from ccrl.n_step import NStepReturns
from ccrl.replay import ReplayBuffer

OBS, ACT = gym.spaces.Box(-100, 100, (1,)), gym.spaces.Discrete(2)


def rollout(first: int, last: int, end: int | None = None, kind: str = "truncated") -> Data:
    """Steps ``first..last`` of one environment: observation t, reward t + 1, successor t + 1; an end at ``end``."""
    steps = torch.arange(first, last + 1).unsqueeze(-1)
    at_end = steps == (-1 if end is None else end)
    flags = {k: at_end if k == kind else torch.zeros_like(at_end) for k in ("terminated", "truncated")}
    columns = {
        "obs": steps.unsqueeze(-1).float(), "action": torch.zeros_like(steps), "reward": steps + 1.0,
        "next_obs": steps.unsqueeze(-1) + 1.0, "valid": torch.ones_like(steps, dtype=torch.float32),
        "alive": (~flags["terminated"]).float(), **flags,
    }  # fmt: skip
    return Data(columns)


def targets(data: Data, gamma: float = 0.9) -> dict[int, float]:
    """Start -> R + gamma^k alive V(next), V(x_t) = 10 t."""
    y = data["reward"] + gamma * data["alive"] * data["power"] * 10 * data["next_obs"].squeeze(-1)
    kept = data["valid"] > 0
    return dict(zip(data["obs"].squeeze(-1)[kept].int().tolist(), y[kept].tolist()))


def make(n: int = 3) -> NStepReturns:
    return NStepReturns(n, 0.9, 1, OBS, ACT)


def test_sums_end_with_the_episode() -> None:
    # gamma .9, n = 3, truncated at step 2: 1 + .9 * 2 + .81 * 3 + .729 * 30 = 27.1; 2 + .9 * 3 + .81 * 30 = 29;
    # 3 + .9 * 30 = 30; what crosses the boundary would give 40.951
    found = targets(make()(rollout(0, 5, end=2)))
    assert found == pytest.approx({0: 27.1, 1: 29.0, 2: 30.0, 3: 4 + 0.9 * 5 + 0.81 * 6 + 0.729 * 60})
    assert targets(make()(rollout(0, 2, end=2, kind="terminated"))) == pytest.approx({0: 5.23, 1: 4.7, 2: 3.0})
    assert targets(make(5)(rollout(0, 5, end=2)))[0] == pytest.approx(27.1), "n longer than the episode"


def test_one_step_is_the_rollout_itself() -> None:
    found = make(1)(rollout(0, 5, end=2))
    assert found["reward"].flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert found["power"].eq(1).all()


def test_rows_wait_for_the_next_rollout_and_survive_a_resume() -> None:
    whole = targets(make()(rollout(0, 9, end=6)))
    first = make()
    found = targets(first(rollout(0, 3, end=6)))
    assert set(found) == {0, 1}, "starts 2 and 3 have fewer than three rewards"
    second = make()
    second.load_state_dict(first.state_dict())
    found |= targets(second(rollout(4, 9, end=6)))
    assert found == pytest.approx(whole)


def test_a_full_ring_holds_whole_rows_only() -> None:
    ring = ReplayBuffer(4, OBS, ACT, fields=NStepReturns.fields)
    returns = make()
    for step in range(8):
        ring.add(returns(rollout(step, step)))
    columns = ring.state_dict()["rows"]
    starts = columns["obs"].flatten().tolist()
    assert starts == [2, 3, 4, 5], "the last four whole rows, wherever the write pointer is"
    for start, reward, successor in zip(starts, columns["reward"], columns["next_obs"].flatten()):
        assert float(reward) == pytest.approx(start + 1 + 0.9 * (start + 2) + 0.81 * (start + 3))
        assert float(successor) == start + 3
    assert columns["power"].tolist() == pytest.approx([0.81] * 4)


def test_dummy_rows_are_skipped() -> None:
    data = rollout(0, 4, end=1)
    dummy = data["valid"].clone()
    dummy[2] = 0.0  # after the episode's end, before the next one's first step
    found = targets(make(2)(Data({k: data[k] for k in data} | {"valid": dummy})))
    assert found == pytest.approx({0: 1 + 0.9 * 2 + 0.81 * 20, 1: 2 + 0.9 * 20, 3: 4 + 0.9 * 5 + 0.81 * 50})


def test_less_than_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="expected n >= 1"):
        make(0)
