"""Facts of a rollout from hand-made flags: masks, step counters, successors."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from ccrl.batched_env import StepResult
from ccrl.buffer import RolloutBuffer, space_like
from ccrl.data import Field

OBS = gym.spaces.Box(-1, 1, (1,))
ACT = gym.spaces.Discrete(2)


def fill(
    obs: list[float], terminated: list[int], truncated: list[int], final: dict[int, float] | None = None
) -> RolloutBuffer:
    """One environment; ``obs`` has one entry more than steps; ``final`` maps a step to its final observation."""
    steps = len(terminated)
    buffer = RolloutBuffer(steps, 1, OBS, ACT, keep_final_obs=final is not None)
    buffer.begin(torch.tensor([[obs[0]]]))
    for t in range(steps):
        last = None if final is None else torch.tensor([[final.get(t, float("nan"))]])
        flags = (torch.tensor([bool(terminated[t])]), torch.tensor([bool(truncated[t])]))
        buffer.write(
            t, torch.tensor([t % 2]), StepResult(torch.tensor([[obs[t + 1]]]), torch.ones(1), *flags, last), {}
        )
    return buffer


def facts(buffer: RolloutBuffer, *, step: int = 0, ended: bool = False, **modes: bool) -> dict[str, list[float]]:
    data = buffer.data(step=torch.tensor([step]), ended=torch.tensor([ended]), **modes)
    names = ("alive", "carry", "valid", "t", "truncated")
    return {k: data[k].flatten().tolist() for k in names} | {"next": data.next_obs().flatten().tolist()}


def test_same_step_successors_are_final_observations() -> None:
    # obs 0 1 | 10 11 | 20: the first episode terminates at 2, the second is cut at 12
    got = facts(fill([0, 1, 10, 11, 20], [0, 1, 0, 0], [0, 0, 0, 1], final={1: 2.0, 3: 12.0}))
    assert got == {
        "alive": [1, 0, 1, 1],
        "carry": [1, 0, 1, 0],
        "valid": [1, 1, 1, 1],
        "t": [0, 1, 0, 1],
        "truncated": [False, False, False, True],
        "next": [1, 2, 11, 12],
    }


def test_next_step_marks_the_reset_row_invalid() -> None:
    # obs 0 1 2 | dummy 2 -> 10 | 10 11 12: step 1 terminates, step 2 is the dummy, step 4 is cut
    got = facts(fill([0, 1, 2, 10, 11, 12], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]), next_step_reset=True)
    assert got["valid"] == [1, 1, 0, 1, 1]
    assert got["carry"] == [1, 0, 0, 1, 0]
    assert got["t"] == [0, 1, 0, 0, 1]
    assert got["alive"] == [1, 0, 1, 1, 1]
    assert [got["next"][i] for i in (0, 1, 3, 4)] == [1, 2, 11, 12]


def test_next_step_first_row_after_an_end_is_a_dummy() -> None:
    got = facts(fill([2, 10, 11], [0, 0], [0, 0]), next_step_reset=True, step=0, ended=True)
    assert got["valid"] == [0, 1]
    assert got["t"] == [0, 0]


def test_hidden_final_observation_is_replaced_by_the_state_itself() -> None:
    # rsl_rl's approximation: the state before the cut stands in; the reset observation 10 never does
    got = facts(fill([0, 1, 10], [0, 0], [0, 1]), hidden_final=True)
    assert got["next"] == [1, 1]
    # after a termination too: a replay that stores successors must not hold a reset observation
    got = facts(fill([0, 1, 10], [0, 1], [0, 0]), hidden_final=True)
    assert got["next"] == [1, 1]


def test_step_counter_continues_across_rollouts() -> None:
    got = facts(fill([5, 6, 7, 0], [0, 0, 1], [0, 0, 0], final={2: 8.0}), step=5)
    assert got["t"] == [5, 6, 7]


def test_termination_wins_over_truncation() -> None:
    got = facts(fill([0, 10], [1], [1], final={0: 1.0}))
    assert (got["alive"], got["carry"], got["truncated"]) == ([0], [0], [False])


def test_state_values_evaluates_every_state_once() -> None:
    buffer = fill([0, 1, 10, 11, 20], [0, 1, 0, 0], [0, 0, 0, 1], final={1: 2.0, 3: 12.0})
    data = buffer.data(step=torch.tensor([0]), ended=torch.tensor([False]))
    seen: list[float] = []

    def value(obs: torch.Tensor) -> torch.Tensor:
        seen.extend(obs.flatten().tolist())
        return 0.1 * obs.squeeze(-1)

    here, after = data.state_values(value)
    torch.testing.assert_close(here.flatten(), torch.tensor([0.0, 0.1, 1.0, 1.1]))
    torch.testing.assert_close(after.flatten(), torch.tensor([0.1, 0.2, 1.1, 1.2]))
    assert sorted(seen) == [0, 1, 2, 10, 11, 12, 20]


def test_rows_are_copies_of_persistent_environment_buffers() -> None:
    obs, reward, flag = torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, dtype=torch.bool)
    buffer = RolloutBuffer(3, 1, OBS, ACT)
    buffer.begin(obs)
    for t in range(3):
        obs.fill_(t + 1.0)  # the environment overwrites what it returned
        reward.fill_(t)
        buffer.write(t, torch.zeros(1, dtype=torch.int64), StepResult(obs, reward, flag, flag, obs), {})
    assert buffer.obs.flatten().tolist() == [0, 1, 2, 3]
    assert buffer.reward.flatten().tolist() == [0, 1, 2]


def test_dict_observations_and_declared_fields() -> None:
    space = gym.spaces.Dict({"policy": OBS, "critic": gym.spaces.Box(-1, 1, (2,))})
    buffer = RolloutBuffer(
        1, 2, space, ACT, fields=(Field("old_logits", (2,)), Field("prompt", (3,), torch.int64, "sequence"))
    )
    first = {"policy": torch.zeros(2, 1), "critic": torch.zeros(2, 2)}
    final = {"policy": torch.full((2, 1), 7.0), "critic": torch.full((2, 2), 8.0)}
    buffer.begin(first)
    flags = (torch.tensor([True, False]), torch.tensor([False, False]))
    buffer.write(
        0,
        torch.zeros(2),
        StepResult(first, torch.ones(2), *flags, final),
        {"old_logits": torch.tensor([[1.0, 2.0]] * 2)},
    )
    data = buffer.data(step=torch.zeros(2, dtype=torch.int64), ended=torch.zeros(2, dtype=torch.bool))
    after = data.next_obs()
    assert after["policy"].flatten().tolist() == [7, 0]
    assert after["critic"].tolist() == [[[8, 8], [0, 0]]]
    assert data["old_logits"].shape == (1, 2, 2)
    assert data["prompt"].shape == (2, 3)
    assert {"prompt", "group"} <= data.sequence
    assert data["group"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        (gym.spaces.Box(0, 255, (2,), np.uint8), torch.uint8),
        (gym.spaces.Box(-5, 5, (2,), np.int64), torch.int64),
        (gym.spaces.Box(-1, 1, (2,), np.float64), torch.float32),
        (gym.spaces.Discrete(3), torch.int64),
    ],
)
def test_columns_have_the_type_of_their_space(space: gym.Space[Any], dtype: torch.dtype) -> None:
    column = space_like(space, (4,), torch.device("cpu"))
    assert isinstance(column, torch.Tensor)
    assert column.dtype == dtype
    assert column.shape == (4, *(space.shape or ()))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="steps, num_envs"):
        RolloutBuffer(0, 1, OBS, ACT)
    with pytest.raises(ValueError, match="flatten it"):
        space_like(gym.spaces.Text(3), (1,), torch.device("cpu"))
