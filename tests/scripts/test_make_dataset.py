"""Data sets from controllers and agents: exact rows, files that load, sets that Minari opens, training on them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from agents.dqn import DQN
from agents.ppo import PPO
from agents.sac import SAC
from ccrl.experiment.saved import save_without_memory
from ccrl.offline import load_dataset
from ccrl.testing.clock import ClockEnv, Episode
from scripts import make_dataset as script
from scripts import train


def test_the_maze_recipe(tmp_path: Path) -> None:
    """One endless walk per point: the successor of a time-out is the next row, and rewards are for the fixed goal."""
    out = str(tmp_path / "u.npz")
    made = script.main(script.Maze(out=out, steps=4000, num_envs=10, reference=10))
    data = load_dataset(out)
    assert len(data) == len(made) == 4000
    np.testing.assert_array_equal(data.obs, made.obs)
    assert not data.terminated.any()
    walks = data.obs.reshape(10, 400, 4), data.next_obs.reshape(10, 400, 4)
    np.testing.assert_array_equal(walks[0][:, 1:], walks[1][:, :-1])
    near = np.linalg.norm(data.next_obs[:, :2] - [1.0, 1.0], axis=-1) <= 0.5
    assert data.reward.tolist() == near.astype(float).tolist()
    assert 0.02 < data.reward.mean() < 0.3
    assert data.truncated.sum() > 20
    assert made.scores is not None
    low, high = made.scores
    assert low < 80 < 180 < high
    again = script.main(script.Maze(out=out, steps=4000, num_envs=10, reference=10))
    np.testing.assert_array_equal(again.action, made.action)


def test_corridor_and_pendulum(tmp_path: Path) -> None:
    corridor = script.main(script.Corridor(out=str(tmp_path / "c.npz"), episodes=20))
    assert len(corridor) == 2000
    assert 4.0 < corridor.returns().mean() < 5.5
    bad = script.main(script.Pendulum(out=str(tmp_path / "p.npz"), gain=0.3, steps=2000))
    assert 20 < bad.returns().mean() < 60
    # the simulator writes the next observation over the last one, and a true successor only where an episode ends
    goes_on = ~(bad.terminated | bad.truncated)[:-1]
    np.testing.assert_array_equal(bad.next_obs[:-1][goes_on], bad.obs[1:][goes_on])
    assert (bad.obs != bad.next_obs).any(1).all()
    assert np.abs(bad.next_obs[bad.terminated, 1]).min() > 0.2, "an episode ends where the pole leans"
    good = script.main(script.Pendulum(out=str(tmp_path / "g.npz"), gain=1.0, noise=0.0, steps=1000, num_envs=2))
    assert good.returns().tolist() == [1000.0] * 2
    assert good.truncated.sum() == 2


def test_minari_opens_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    made = script.main(script.Maze(out="minari:mine/u-v0", steps=1000, num_envs=5, reference=5))
    source = minari.load_dataset("mine/u-v0", download=False)
    assert source.total_steps == 1000
    data = load_dataset("minari:mine/u-v0")
    np.testing.assert_array_equal(data.next_obs, made.next_obs)
    assert data.scores == pytest.approx(made.scores)
    env = source.recover_environment()
    assert env.observation_space.shape == (4,)
    monkeypatch.setattr(script.Maze, "make", None)  # what Minari cannot take is said before hours of making
    with pytest.raises(ValueError, match=r"expected a new name, got minari:mine/u-v0, which Minari has"):
        script.main(script.Maze(out="minari:mine/u-v0"))
    with pytest.raises(ValueError, match=r"Minari stores an environment by Gymnasium's id, and here is none"):
        script.main(script.OGBench(out="minari:mine/og-v0"))


def test_agents_and_replay_memories(tmp_path: Path) -> None:
    random = script.main(script.Agent(out=str(tmp_path / "r.npz"), env="Pendulum-v1", steps=300, num_envs=2))
    assert len(random) == 400
    assert random.truncated.sum() == 2
    assert random.returns().max() < -500
    agent = SAC(
        "Pendulum-v1", num_envs=2, hidden=(8,), learning_starts=50, buffer_size=300, batch_size=8, compile="off"
    )
    agent.learn(400)
    agent.save(tmp_path / "a.pt")
    own = script.main(script.Agent(out=str(tmp_path / "o.npz"), checkpoint=tmp_path / "a.pt", steps=200, num_envs=1))
    assert len(own) == 200
    assert np.abs(own.action).max() <= 2.0
    replay = script.main(script.Replay(out=str(tmp_path / "m.npz"), checkpoint=tmp_path / "a.pt"))
    assert len(replay) == 300
    assert np.abs(replay.action).max() <= 2.0
    same = replay.episode[1:] == replay.episode[:-1]
    np.testing.assert_array_equal(replay.next_obs[:-1][same], replay.obs[1:][same])
    # two environments of 200 steps took turns in the memory, which has the last 150 of each
    assert replay.starts.tolist() == [0, 150]
    save_without_memory(agent, tmp_path / "best.pt")
    with pytest.raises(ValueError, match=r"expected rows in the memory, got none; best.pt has no memory"):
        script.main(script.Replay(out=str(tmp_path / "m.npz"), checkpoint=tmp_path / "best.pt"))
    with pytest.raises(ValueError, match="expected env or checkpoint"):
        script.main(script.Agent(out=str(tmp_path / "x.npz")))


def test_numbers_as_observations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several copies: a flag per copy must not be broadcast against their observations [N]."""
    walk = script.main(script.Agent(out=str(tmp_path / "gain0.3"), env="FrozenLake-v1", steps=20, num_envs=3))
    assert walk.obs.shape == walk.next_obs.shape == (len(walk), 1)
    goes_on = walk.episode[1:] == walk.episode[:-1]
    np.testing.assert_array_equal(walk.next_obs[:-1][goes_on], walk.obs[1:][goes_on])
    assert [path.name for path in tmp_path.iterdir()] == ["gain0.3.npz"], "a number is no suffix"
    assert re.search(r"left out [12] episodes \(\d+ transitions\) that were under way", capsys.readouterr().out)
    agent = DQN("FrozenLake-v1", num_envs=2, hidden=(4,), learning_starts=10, buffer_size=200, compile="off")
    agent.learn(40).save(tmp_path / "d.pt")
    memory = script.main(script.Replay(out=str(tmp_path / "m.npz"), checkpoint=tmp_path / "d.pt"))
    ends = np.flatnonzero(memory.terminated | memory.truncated).tolist()
    # an episode begins with each copy's first row and where another ended, nowhere else
    assert set(memory.starts) == {0, len(memory) // 2, *(row + 1 for row in ends)} - {len(memory)}
    assert not memory.obs[memory.starts].any()
    with pytest.raises(ValueError, match="expected observations of one array, got Dict"):
        script.collect(ClockEnv([[Episode(0, 3)]], groups=True), lambda obs: obs, 3, 0, "x")


def test_a_policy_with_a_memory_begins_anew_with_every_episode(tmp_path: Path) -> None:
    agent = PPO("CartPole-v1", num_envs=2, n_steps=8, hidden=(4,), recurrent="gru", recurrent_size=4, compile="off")
    agent.save(tmp_path / "a.pt")
    made = script.main(script.Agent(
        out=str(tmp_path / "x.npz"), checkpoint=tmp_path / "a.pt", steps=60, num_envs=2, deterministic=True
    ))  # fmt: skip
    assert len(made.starts) > 2
    for rows in np.split(np.arange(len(made)), made.starts[1:]):
        state = None
        for row in rows:
            action, state = agent.predict(made.obs[row], state, deterministic=True)
            assert action == made.action[row].item()


def test_a_run_on_a_data_set_is_trained_evaluated_and_resumed(tmp_path: Path) -> None:
    out = str(tmp_path / "u.npz")
    script.main(script.Maze(out=out, steps=500, num_envs=5, reference=2))
    run = train.main([
        "td3_bc", "--env", "ccrl/PointMazeU-v0", "--dataset", out, "--total-timesteps", "40", "--updates", "20",
        "--batch-size", "8", "--hidden", "8", "--compile", "off", "--eval-every", "20", "--eval-episodes", "2",
        "--checkpoint-every", "20", "--run-root", str(tmp_path / "runs"), "--no-progress", "--no-tensorboard",
    ])  # fmt: skip
    assert run.info["finished"]["step"] == 40
    text = (run.path / "config.yaml").read_text().replace("total_timesteps: 40", "total_timesteps: 60")
    (run.path / "config.yaml").write_text(text)
    assert train.main(["--resume", str(run.path)]).info["finished"]["step"] == 60
