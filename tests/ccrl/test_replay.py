"""The ring of transitions: what enters, in which order, what is drawn."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from ccrl import segments
from ccrl.batched_env import AutoresetMode
from ccrl.buffer import space_like
from ccrl.collect import Collector, Request
from ccrl.data import Batching, Data, Field
from ccrl.policies import MLPPolicy
from ccrl.replay import Mixture, ReplayBuffer
from ccrl.testing import ClockEnv, Episode

OBS, ACT = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)
SCRIPT = [[Episode(0, 3, "terminate"), Episode(100, 4, "truncate")], [Episode(50, 2, "truncate")]]


def rollout(steps: int = 9, mode: AutoresetMode = AutoresetMode.SAME_STEP, groups: bool = False) -> Data:
    env = ClockEnv(SCRIPT, autoreset_mode=mode, groups=groups)
    policy = MLPPolicy(env.single_observation_space, ACT, hidden=(4,))
    return Collector(env).collect(Request(steps=steps), policy)


def ring(capacity: int = 64) -> ReplayBuffer:
    return ReplayBuffer(capacity, OBS, ACT)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def held(buffer: ReplayBuffer) -> list[tuple[float, float]]:
    """``(obs, next_obs)`` of everything in it, by exhaustive drawing."""
    draw = buffer.sample(Batching(size=4000), generator())
    return sorted(set(zip(draw["obs"].flatten().tolist(), draw["next_obs"].flatten().tolist())))


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_only_true_transitions_enter(mode: AutoresetMode) -> None:
    buffer = ring()
    data = rollout(mode=mode)
    buffer.add(data)
    assert len(buffer) == int(data["valid"].sum())
    true = {(b + i, b + i + 1) for b, n in ((0, 3), (100, 4), (50, 2)) for i in range(n)}
    assert set(held(buffer)) == true, "a reset observation became a successor"
    draw = buffer.sample(Batching(size=500), generator())
    for obs, alive, cut in zip(*(draw[k].flatten().tolist() for k in ("obs", "alive", "truncated")), strict=True):
        assert alive == (0.0 if obs == 2 else 1.0)
        assert cut == (obs in (103, 51))
    assert draw["reward"].eq(1).all()


def test_oldest_rows_are_overwritten_in_time_order() -> None:
    buffer = ring(5)
    for start in (0, 3, 6):
        obs = torch.arange(start, start + 3.0).view(3, 1, 1)
        buffer.add(transitions(obs))
    assert sorted(o for o, _ in held(buffer)) == [4, 5, 6, 7, 8]
    assert len(buffer) == 5


def transitions(obs: torch.Tensor, valid: torch.Tensor | None = None) -> Data:
    lead = obs.shape[:2]
    flag = torch.zeros(lead, dtype=torch.bool)
    columns = {
        "obs": obs,
        "next_obs": obs + 1,
        "action": torch.zeros(lead, dtype=torch.int64),
        "reward": torch.zeros(lead),
        "terminated": flag,
        "truncated": flag,
        "alive": torch.ones(lead),
        "valid": torch.ones(lead) if valid is None else valid,
    }
    return Data(columns)


def test_invalid_rows_take_no_place() -> None:
    buffer = ring(3)
    obs = torch.arange(3.0).view(3, 1, 1)
    buffer.add(transitions(obs, torch.tensor([[1.0], [0.0], [1.0]])))
    assert held(buffer) == [(0, 1), (2, 3)]
    buffer.add(transitions(obs + 10, torch.tensor([[0.0], [1.0], [1.0]])))
    assert [o for o, _ in held(buffer)] == [2, 11, 12]


def test_draws_are_uniform_with_replacement_and_repeatable() -> None:
    buffer = ring(8)
    buffer.add(transitions(torch.arange(4.0).view(4, 1, 1)))
    draw = buffer.sample(Batching(size=4000), generator())
    assert draw.shape == (1, 4000)
    assert float(draw["n_valid"]) == 4000
    counts = Counter(draw["obs"].flatten().tolist())
    assert set(counts) == {0, 1, 2, 3}, "empty slots are never drawn"
    assert all(abs(n - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for n in counts.values())
    again = buffer.sample(Batching(size=4000), generator())
    assert again["obs"].tolist() == draw["obs"].tolist()


def test_relabelling_changes_the_draw_and_not_the_ring() -> None:
    buffer = ring()
    buffer.add(transitions(torch.arange(4.0).view(4, 1, 1)))
    draw = buffer.sample(
        Batching(size=8, microbatch=2),
        generator(),
        lambda d: d.derive(reward=d["obs"].squeeze(-1) + 1, obs=d["obs"] * 0),
    )
    assert draw["obs"].eq(0).all()
    torch.testing.assert_close(draw["reward"], draw.next_obs().squeeze(-1))
    assert draw.microbatch == 2
    assert buffer.sample(Batching(size=64), generator())["reward"].eq(0).all()


def test_dict_observations_and_extra_fields() -> None:
    data = rollout(groups=True)
    env = ClockEnv(SCRIPT, groups=True)
    buffer = ReplayBuffer(
        32, env.single_observation_space, ACT, fields=(Field("t", (), torch.int64), Field("old_logits", (2,)))
    )
    buffer.add(data)
    draw = buffer.sample(Batching(size=200), generator())
    assert draw["t"].dtype == torch.int64
    torch.testing.assert_close(draw["obs"]["critic"][..., 1], draw["t"].float())
    torch.testing.assert_close(draw["next_obs"]["policy"], draw["obs"]["policy"] + 1)
    assert draw["old_logits"].shape == (1, 200, 2)


def arrays(count: int = 6, base: float = 0.0) -> dict[str, np.ndarray]:
    obs = base + np.arange(count, dtype=np.float64)[:, None]
    return {
        "obs": obs,
        "next_obs": obs + 1,
        "action": np.zeros((count, 1)),
        "reward": np.ones(count),
        "terminated": np.arange(count) == 2,
        "truncated": np.arange(count) >= 2,
    }


def test_a_data_set_is_a_full_ring() -> None:
    buffer = ReplayBuffer.from_arrays(arrays())
    assert (len(buffer), buffer.capacity) == (6, 6)
    draw = buffer.sample(Batching(size=300), generator())
    assert draw["obs"].dtype == draw["reward"].dtype == torch.float32
    assert set(draw["obs"].flatten().tolist()) == set(range(6))
    for obs, alive, cut in zip(*(draw[k].flatten().tolist() for k in ("obs", "alive", "truncated")), strict=True):
        assert (alive, cut) == ((0.0, False) if obs == 2 else (1.0, obs > 2))
    with pytest.raises(ValueError, match=r"missing columns \['next_obs'\]"):
        ReplayBuffer.from_arrays({k: v for k, v in arrays().items() if k != "next_obs"})
    with pytest.raises(ValueError, match="expected 6 rows in 'obs'"):
        ReplayBuffer.from_arrays(arrays() | {"obs": np.zeros((5, 1))})


def test_replace_starts_over() -> None:
    buffer = ReplayBuffer.from_arrays(arrays())
    rows = {k: buffer.sample(Batching(size=2), generator())[k][0] for k in buffer.names}
    buffer.replace(rows | {"obs": torch.tensor([[-1.0], [-2.0]])})
    assert len(buffer) == 2
    assert {o for o, _ in held(buffer)} == {-1, -2}
    with pytest.raises(ValueError, match="missing columns"):
        buffer.replace({"obs": torch.zeros(1, 1), "reward": torch.zeros(1)})


def test_mixture_draws_fixed_counts() -> None:
    few, many = ReplayBuffer.from_arrays(arrays(base=100)), ReplayBuffer.from_arrays(arrays(6))
    draw = Mixture({many: 240, few: 16}).sample(
        Batching(size=256), generator(), lambda d: d.derive(reward=d["reward"] * 2)
    )
    assert (draw["obs"] >= 100).flatten().tolist() == [False] * 240 + [True] * 16
    assert draw["reward"].eq(2).all()
    assert float(draw["n_valid"]) == 256
    with pytest.raises(ValueError, match="size 256"):
        Mixture({many: 240, few: 16}).sample(Batching(size=64), generator())
    with pytest.raises(ValueError, match="equal columns"):
        Mixture({many: 1, ReplayBuffer(4, OBS, ACT, fields=(Field("t"),)): 1})
    with pytest.raises(ValueError, match="positive"):
        Mixture({many: 0})


def test_state_round_trip_through_a_safe_file() -> None:
    buffer = ring(5)
    buffer.add(transitions(torch.arange(4.0).view(4, 1, 1)))
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    other = ring(5)
    other.load_state_dict(torch.load(file, weights_only=True))
    for b in (buffer, other):
        b.add(transitions(torch.arange(10.0, 13).view(3, 1, 1)))
    spec = Batching(size=32)
    assert other.sample(spec, generator())["obs"].tolist() == buffer.sample(spec, generator())["obs"].tolist()
    with pytest.raises(ValueError, match=r"capacity of 7, got 5"):
        ring(7).load_state_dict(buffer.state_dict())


def test_a_loaded_ring_can_be_drawn_from_at_once() -> None:
    buffer, other = ring(5), ring(5)
    empty = buffer.state_dict()
    buffer.add(transitions(torch.arange(4.0).view(4, 1, 1)))
    other.load_state_dict(buffer.state_dict())
    assert held(other) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    other.load_state_dict(empty)
    with pytest.raises(ValueError, match="empty"):
        other.sample(Batching(size=4), generator())


def test_a_saved_state_does_not_follow_the_ring() -> None:
    buffer, other = ring(5), ring(5)
    buffer.add(transitions(torch.arange(4.0).view(4, 1, 1)))
    state = buffer.state_dict()
    buffer.add(transitions(torch.arange(10.0, 14).view(4, 1, 1)))
    other.load_state_dict(state)
    assert held(other) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_every_row_of_a_large_ring_is_reached() -> None:
    """float32 has 2^24 numbers in [0, 1): times 2^25 they are all even."""
    buffer, rows = ring(1), 2**25
    parity = torch.zeros(rows, dtype=torch.uint8)
    parity[1::2] = 1
    buffer._columns = {"reward": parity}
    buffer._size.fill_(rows)
    buffer._empty = False
    odd = int(torch.as_tensor(buffer._draw(1000, generator())["reward"]).sum(dtype=torch.int64))
    assert abs(odd - 500) < 5 * 250**0.5


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"folder: expected one that can be made or written, got .*file \("):
        ReplayBuffer(64, OBS, ACT, folder=tmp_path / "file")
    with pytest.raises(ValueError, match="capacity"):
        ring(0)
    with pytest.raises(ValueError, match="per-sequence"):
        ReplayBuffer(4, OBS, ACT, fields=(Field("prompt", per="sequence"),))
    with pytest.raises(ValueError, match="empty"):
        ring().sample(Batching(size=4), generator())
    with pytest.raises(ValueError, match="18 rows at once"):
        ring(17).add(rollout())
    full = ReplayBuffer.from_arrays(arrays())
    for spec in (Batching(size="full"), Batching("sequence", 4)):
        with pytest.raises(ValueError, match="transition"):
            full.sample(spec, generator())


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("terminated", np.zeros((3, 1)), r"terminated: expected a number per row \[M\], got shape \(3, 1\)"),
        ("reward", np.float32(2.0), r"expected columns \[M, ...\], got the number"),
        ("action", "x", "expected columns of numbers, got str"),
    ],
)
def test_columns_that_are_no_rows_are_refused(column: str, value: Any, message: str) -> None:
    """Flags ``[M, 1]`` would be compared with values ``[M]`` as ``[M, M]``."""
    rows: dict[str, Any] = {"obs": np.zeros((3, 2)), "action": np.zeros((3, 1)), "reward": np.zeros(3)}
    rows |= {"next_obs": np.zeros((3, 2)), "terminated": np.zeros(3, bool)}
    with pytest.raises((TypeError, ValueError), match=message):
        ReplayBuffer.from_arrays(rows | {column: value})


def test_what_has_no_row_is_not_drawn_from() -> None:
    buffer = ring()
    buffer.add(transitions(torch.zeros(1, 3, 1), valid=torch.zeros(1, 3)))
    with pytest.raises(ValueError, match="the ring is empty"):
        buffer.sample(Batching(size=2), None)
    buffer.add(rollout())
    buffer.replace({name: column[:0] for name, column in buffer.rows().items()})  # type: ignore[index]
    with pytest.raises(ValueError, match="the ring is empty"):
        buffer.sample(Batching(size=2), None)
    with pytest.raises(ValueError, match="at least one transition"):
        ReplayBuffer.from_arrays(arrays(0))


def test_that_rows_were_left_out_is_saved_again() -> None:
    """A memory that was left out of a checkpoint is missed by whoever loads what was saved before it had rows again."""
    buffer, second, third = ring(), ring(), ring()
    buffer.add(rollout())
    buffer.refills = True
    with segments.leaving_out():
        second.load_state_dict(buffer.state_dict())
    third.load_state_dict(second.state_dict())
    assert second.lost
    assert third.lost


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_rows_of_unsigned_numbers_go_around_the_ring(kind: type) -> None:
    space = gym.spaces.Box(0, 60_000, (1,), kind)  # a depth camera's
    buffer, again = (ReplayBuffer(4, space, ACT) for _ in range(2))
    for start in (0, 59_000):
        data = transitions(torch.arange(start, start + 3).view(3, 1, 1))
        buffer.add(Data({k: v.to(buffer.rows()[k].dtype) if k in buffer.names else v for k, v in data.items()}))  # type: ignore[union-attr]
    again.load_state_dict(buffer.state_dict())
    for ring_ in (buffer, again):
        assert ring_.rows()["obs"].tolist() == [[2], [59_000], [59_001], [59_002]]  # type: ignore[union-attr]


def test_a_box_of_one_whole_number_has_a_buffer() -> None:
    assert space_like(gym.spaces.Box(0, 9, (), np.int32), (2,), torch.device("cpu")).dtype == torch.int32  # type: ignore[union-attr]
