"""Replay memories in checkpoints: rows are written once, pruning keeps what is in use, and a kill loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs  # noqa: F401  (registers the environments)
from agents import SAC
from ccrl import segments
from ccrl.data import Batching
from ccrl.experiment import checkpoint
from ccrl.experiment.checkpoint import REPLAY
from ccrl.experiment.saved import prune_segments, save_without_memory
from ccrl.replay import ReplayBuffer

OBS, ACT = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)


def ring(capacity: int = 10, folder: Path | None = None) -> ReplayBuffer:
    return ReplayBuffer(capacity, OBS, ACT, folder=folder)


def add(buffer: ReplayBuffer, first: int, last: int) -> None:
    """Rows ``first..last - 1``, reward = number."""
    if last - first > buffer.capacity:
        for i in range(first, last, buffer.capacity):
            add(buffer, i, min(i + buffer.capacity, last))
        return
    n = last - first
    numbers = torch.arange(first, last, dtype=torch.float32)
    never = torch.zeros(n, dtype=torch.bool)
    obs = torch.stack([numbers, -numbers], -1)
    rows = {
        "obs": obs, "action": torch.zeros(n, dtype=torch.int64), "reward": numbers, "next_obs": obs + 1,
        "terminated": never, "truncated": never, "alive": torch.ones(n),
    }  # fmt: skip
    buffer._write(rows, torch.ones(n, dtype=torch.bool))


def save(buffer: ReplayBuffer, folder: Path, step: int) -> None:
    with segments.into(folder / REPLAY):
        checkpoint.save(checkpoint.checkpoint_path(folder, step), {"ring": buffer.state_dict()})


def load(folder: Path, step: int, capacity: int = 10) -> ReplayBuffer:
    found = ring(capacity)
    saved = checkpoint.load(checkpoint.checkpoint_path(folder, step))
    found.load_state_dict(segments.resolve(saved, folder / REPLAY)["ring"])
    return found


def held(buffer: ReplayBuffer) -> list[float]:
    rewards: list[float] = buffer.state_dict()["rows"]["reward"].tolist()
    return rewards


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / REPLAY).glob("*"))


def test_a_checkpoint_writes_the_rows_since_the_last_one(tmp_path: Path) -> None:
    buffer = ring()
    add(buffer, 0, 4)
    save(buffer, tmp_path, 1)
    written = files(tmp_path)
    changed = (tmp_path / REPLAY / written[0]).stat().st_mtime_ns
    add(buffer, 4, 7)
    save(buffer, tmp_path, 2)
    assert files(tmp_path) == ["rows_000000000000_000000000004.segment", "rows_000000000004_000000000007.segment"]
    assert (tmp_path / REPLAY / written[0]).stat().st_mtime_ns == changed, "written once"
    save(buffer, tmp_path, 3)
    assert len(files(tmp_path)) == 2, "nothing new, no new file"
    assert held(load(tmp_path, 1)) == [0, 1, 2, 3]
    assert held(load(tmp_path, 3)) == [0, 1, 2, 3, 4, 5, 6]


def test_overwritten_rows_stay_in_checkpoints_that_have_them(tmp_path: Path) -> None:
    buffer = ring()
    add(buffer, 0, 8)
    save(buffer, tmp_path, 1)
    add(buffer, 8, 15)  # overwrites rows 0..4
    save(buffer, tmp_path, 2)
    add(buffer, 15, 24)  # a whole round later
    save(buffer, tmp_path, 3)
    assert held(load(tmp_path, 1)) == list(range(8))
    assert held(load(tmp_path, 2)) == list(range(5, 15))
    assert held(load(tmp_path, 3)) == list(range(14, 24))
    checkpoint.prune(tmp_path, 1)
    prune_segments(tmp_path)
    assert files(tmp_path) == ["rows_000000000008_000000000015.segment", "rows_000000000015_000000000024.segment"]
    assert held(load(tmp_path, 3)) == list(range(14, 24))


def test_segments_of_another_life_of_the_memory_are_left_alone(tmp_path: Path) -> None:
    """Rows that were replaced, and those of an agent that was loaded without its memory, have the old ones' numbers."""
    first = ring()
    add(first, 0, 4)
    save(first, tmp_path, 1)
    first.replace({name: x + 10 if name == "reward" else x for name, x in first.rows().items()})
    save(first, tmp_path, 2)
    other = ring()
    other.load_state_dict({"capacity": 10, "total": 4, "rows": {}})
    add(other, 50, 54)
    save(other, tmp_path, 3)
    for step, start in ((1, 0.0), (2, 10.0), (3, 50.0)):
        assert load(tmp_path, step).rows()["reward"].tolist() == [start, start + 1, start + 2, start + 3]


def test_a_loaded_ring_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    buffer = ring()
    add(buffer, 0, 13)
    save(buffer, tmp_path, 1)
    other = load(tmp_path, 1)
    for each in (buffer, other):
        add(each, 13, 17)
    draws = [b.sample(Batching(size=64), torch.Generator().manual_seed(0))["reward"] for b in (buffer, other)]
    assert torch.equal(*draws), "rows are where they were, so the same numbers draw the same rows"
    save(other, tmp_path, 2)
    assert held(load(tmp_path, 2)) == list(range(7, 17))


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_segment_leaves_the_checkpoint_before_it(tmp_path: Path, how: str) -> None:
    buffer = ring()
    for step in (1, 2, 3):
        add(buffer, 4 * step, 4 * step + 4)
        save(buffer, tmp_path, step)
    last = tmp_path / REPLAY / files(tmp_path)[-1]
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "missing":
        last.unlink()
    else:
        last.write_bytes(data if how == "flipped" else data[:-40])
    with pytest.warns(UserWarning, match=r"step_000000000003.*its segment replay/rows_.* is damaged or missing"):
        assert checkpoint.latest(tmp_path) == checkpoint.checkpoint_path(tmp_path, 2)
    assert held(load(tmp_path, 2)) == list(range(4, 12))


def test_a_file_that_acts_has_no_rows_and_the_memory_is_filled_again(tmp_path: Path) -> None:
    """``best.pt``: gradient steps wait for ``learning_starts`` more steps, also over a checkpoint in between."""
    small = {"num_envs": 2, "rounds": 5, "learning_starts": 20, "buffer_size": 1000, "batch_size": 4, "hidden": (4,)}
    agent = SAC("Pendulum-v1", compile="off", **small).learn(40)
    save_without_memory(agent, tmp_path / "best.pt")
    assert checkpoint.load(tmp_path / "best.pt")["state"]["learner"]["ring"]["rows"] == {}
    again = SAC.load(tmp_path / "best.pt")
    obs = np.ones((1, 3), np.float32)
    np.testing.assert_array_equal(again.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])
    before = again.learner.counters.n_updates
    again.learn(10)  # 10 of the 20 steps
    assert (len(again.learner.ring), again.learner.counters.n_updates) == (10, before)
    again.save(tmp_path / "whole.pt")
    whole = SAC.load(tmp_path / "whole.pt")
    for resumed in (again, whole):
        resumed.learn(20)
        assert (len(resumed.learner.ring), resumed.num_timesteps) == (30, 70)
        # from the 20th step after it was loaded, one gradient step for two environment steps
        assert resumed.learner.counters.n_updates == before + 3 * 6
    for x, y in zip(again.policy.parameters(), whole.policy.parameters()):
        assert torch.equal(x, y)


def test_a_missing_segment_and_another_capacity_are_named(tmp_path: Path) -> None:
    buffer = ring()
    add(buffer, 0, 3)
    save(buffer, tmp_path, 1)
    with pytest.raises(ValueError, match="capacity of 20, got 10"):
        load(tmp_path, 1, capacity=20)
    for path in (tmp_path / REPLAY).glob("*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"segment .*copy the folder replay"):
        load(tmp_path, 1)


def test_a_memory_map_is_the_same_ring(tmp_path: Path) -> None:
    mapped, plain = ring(10, tmp_path / "map"), ring()
    for buffer in (mapped, plain):
        add(buffer, 0, 13)
    assert held(mapped) == held(plain)
    assert sum(p.stat().st_size for p in (tmp_path / "map").glob("*")) >= mapped.nbytes
    assert mapped.nbytes == plain.nbytes == 11 * (4 * 2 + 8 + 4 + 4 * 2 + 1 + 1 + 4)
    with pytest.raises(ValueError, match="memory map needs device 'cpu'"):
        ReplayBuffer(4, OBS, ACT, folder=tmp_path, device="meta")


def test_kill_during_a_save_loses_nothing_older(tmp_path: Path) -> None:
    """The process dies with a segment written and the checkpoint half-way: the one before is whole."""
    script = """
        import os, signal, sys
        from pathlib import Path
        from ccrl.experiment import checkpoint
        sys.path.insert(0, {tests!r})
        from test_segments import add, ring, save
        folder = Path({folder!r})
        buffer = ring()
        add(buffer, 0, 8)
        save(buffer, folder, 1)
        add(buffer, 8, 12)
        write = checkpoint.write_atomic
        def dying(path, fn):
            if Path(path).name.startswith("step_"):
                with open(Path(path).with_name(f".{{Path(path).name}}.{{os.getpid()}}.tmp"), "wb") as file:
                    file.write(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, fn)
        checkpoint.write_atomic = dying
        save(buffer, folder, 2)
    """
    code = textwrap.dedent(script).format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    newest = checkpoint.latest(tmp_path)
    assert newest == checkpoint.checkpoint_path(tmp_path, 1)
    assert held(load(tmp_path, 1)) == list(range(8))
    checkpoint.prune(tmp_path, 1)
    prune_segments(tmp_path)
    assert files(tmp_path) == ["rows_000000000000_000000000008.segment"], "the orphan goes, what is in use stays"
