"""Offline data: files made on the spot, exact successors and ends, windows, scores, messages that name the row."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import gymnasium
import numpy as np
import pytest
import torch

from ccrl.data import Batching
from ccrl.offline import (
    DataError,
    Dataset,
    Windows,
    from_arrays,
    load_d4rl,
    load_dataset,
    load_minari,
    load_ogbench,
    make_ogbench,
    navigate_ogbench,
    normalised_score,
    qlearning_rows,
    reference_scores,
    select_windows,
    valid_windows,
    write_minari,
)


def columns(count: int = 10) -> dict[str, np.ndarray]:
    return {
        "obs": np.arange(count, dtype=np.float64)[:, None],
        "action": np.zeros((count, 2)),
        "reward": np.ones(count),
        "terminated": np.arange(count) == 2,
        "truncated": np.arange(count) == 6,
    }


# -- the flat form ----------------------------------------------------------------------------------------------------


def test_rows_without_a_successor_are_left_out() -> None:
    data = from_arrays(columns())
    # 2 is terminal and stays; 6 is a time-out and 9 the end of the recording: what came after is not in the arrays
    assert data.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 7, 8]
    assert data.next_obs[:, 0].tolist() == [1, 2, 2, 4, 5, 6, 8, 9]
    assert data.terminated.tolist() == [False, False, True, False, False, False, False, False]
    assert data.episode.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    given = from_arrays(columns() | {"next_obs": columns()["obs"] + 1})
    assert len(given) == 10
    assert given.truncated.tolist() == [i == 6 for i in range(10)]


def test_a_ring_bootstraps_at_time_outs_and_not_at_terminals() -> None:
    ring = from_arrays(columns() | {"next_obs": columns()["obs"] + 1}).ring()
    draw = ring.sample(Batching(size=400), torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw["next_obs"], draw["obs"] + 1)
    for row, alive in zip(draw["obs"].flatten().tolist(), draw["alive"].flatten().tolist()):
        assert alive == (row != 2)


def test_returns_and_the_best_episodes() -> None:
    reward = np.array([1.0, 1, 1, 5, 0, 0, 0, 0, 4, 0])
    data = from_arrays(columns() | {"reward": reward, "next_obs": columns()["obs"] + 1})
    assert data.returns().tolist() == [3.0, 5.0, 4.0]
    # gamma .5: 1 + .5 + .25, 5, 4 * .5
    assert data.returns(0.5).tolist() == [1.75, 5.0, 2.0]
    assert data.best(0.7, 1.0).obs[:, 0].tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert set(data.best(0.1).episode) == {1}
    hundred = from_arrays({"obs": np.zeros(100), "action": np.zeros(100), "reward": np.arange(100.0),
                           "next_obs": np.zeros(100), "terminated": np.ones(100)})  # fmt: skip
    assert len(hundred.best(0.29)) == 29  # .29 * 100 is 28.999999999999996
    with pytest.raises(ValueError, match="share"):
        data.best(0.0)


def test_next_actions_stay_inside_their_episode() -> None:
    action = np.arange(10.0)[:, None]
    data = from_arrays(columns() | {"action": action, "next_obs": columns()["obs"] + 1})
    following, there = data.next_action()
    assert there.tolist() == [1, 1, 0, 1, 1, 1, 0, 1, 1, 0]
    assert following[there > 0, 0].tolist() == [1, 2, 4, 5, 6, 8, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"obs": np.array([[0.0], [np.nan], *[[1.0]] * 8])}, r"row 1, column 'obs\[0\]': expected a finite number"),
        ({"reward": np.r_[np.ones(9), np.inf]}, "row 9, column 'reward': expected a finite number, got inf"),
        ({"terminated": np.r_[np.zeros(9), 2.0]}, "row 9, column 'terminated': expected 0 or 1, got 2"),
        ({"episode": np.array([0, 0, 0, 1, 1, 0, 1, 1, 1, 1])}, "row 5, column 'episode': expected a number >= 1"),
        ({"episode": np.zeros(10)}, "row 2, column 'terminated': expected the last row of episode 0"),
        ({"action": np.zeros((9, 2))}, "expected 10 rows in every column"),
        ({"obs": np.array(["a"] * 10)}, "column 'obs': expected numbers"),
        ({"obs": np.zeros((10, 2, 2))}, "column 'obs': expected 2 axes"),
    ],
)
def test_bad_rows_are_named(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_arrays(columns() | change)


def test_missing_columns_and_empty_sets() -> None:
    with pytest.raises(DataError, match=r"missing \['terminated'\]"):
        from_arrays({k: v for k, v in columns().items() if k != "terminated"})
    with pytest.raises(DataError, match="at least one transition"):
        from_arrays({k: v[:0] for k, v in columns().items()})


# -- files ------------------------------------------------------------------------------------------------------------


def test_own_episodes_in_npz_and_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    np.savez(tmp_path / "mine.npz", **columns())
    lists = {k: v.tolist() for k, v in columns().items()}
    pq.write_table(pa.table(lists), tmp_path / "lists.parquet")
    flat = {k: v for k, v in lists.items() if k not in ("obs", "action")}
    split = flat | {"obs_0": columns()["obs"][:, 0], "action_0": np.zeros(10), "action_1": np.zeros(10)}
    pq.write_table(pa.table(split), tmp_path / "split.parquet")
    for name in ("mine.npz", "lists.parquet", "split.parquet"):
        data = load_dataset(str(tmp_path / name))
        assert data.obs.tolist() == from_arrays(columns()).obs.tolist(), name
        assert data.action.shape == (8, 2)
    ragged = lists | {"action": [[0.0, 0.0]] * 7 + [[0.0]] + [[0.0, 0.0]] * 2}
    pq.write_table(pa.table(ragged), tmp_path / "ragged.parquet")
    with pytest.raises(DataError, match="row 7, column 'action': expected 2 numbers, got 1"):
        load_dataset(str(tmp_path / "ragged.parquet"))
    pq.write_table(pa.table(lists | {"reward": [1.0] * 4 + [None] + [1.0] * 5}), tmp_path / "holes.parquet")
    with pytest.raises(DataError, match="row 4, column 'reward': expected a value"):
        load_dataset(str(tmp_path / "holes.parquet"))


def test_names_of_data_sets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected minari:ID"):
        load_dataset("hopper-medium-v2")
    with pytest.raises(DataError, match="found none"):
        load_dataset(str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="of plain arrays"):
        load_dataset(str(tmp_path / "text.npz"))


def d4rl_file(path: Path, **changes: np.ndarray) -> Path:
    h5py = pytest.importorskip("h5py")
    raw = {
        "observations": columns()["obs"].astype(np.float32),
        "actions": np.zeros((10, 2), np.float32),
        "rewards": np.ones((10, 1), np.float32),
        "terminals": columns()["terminated"],
        "timeouts": columns()["truncated"],
        "infos/qpos": np.zeros((10, 3)),
    } | changes
    with h5py.File(path, "w") as file:
        for name, value in raw.items():
            if value is not None:
                file[name] = value
    return path


def test_d4rl_conversions(tmp_path: Path) -> None:
    """10 rows, terminal at 2, time-out at 6: rows 0 1 2 3 4 5 7 8 with successors + 1, as qlearning_dataset."""
    path = d4rl_file(tmp_path / "hopper-medium-v2.hdf5")
    kept = [0, 1, 2, 3, 4, 5, 7, 8]
    data = load_d4rl(path, parity=True)
    assert data.obs[:, 0].tolist() == kept
    assert data.next_obs[:, 0].tolist() == [i + 1 for i in kept]
    assert data.reward.shape == (8,)
    assert data.scores == (-20.272305, 3234.3)
    ends = load_d4rl(path, parity=True, terminate_on_end=True)
    assert ends.obs[:, 0].tolist() == list(range(9))
    assert ends.terminated.tolist() == [i == 2 for i in range(9)], "a time-out is no terminal"
    exact = load_dataset(f"d4rl:{path}")
    assert exact.obs[:, 0].tolist() == kept
    assert exact.next_obs[:, 0].tolist() == [1, 2, 2, 4, 5, 6, 8, 9], "the successor of a terminal is not a reset"


def test_d4rl_files_without_time_outs(tmp_path: Path) -> None:
    """Version 0. The counter starts again at 0 after a row left out and at 1 after a terminal row: with a horizon of 4
    and a terminal at 2, the episode 3 4 5 is cut after three steps."""
    path = d4rl_file(tmp_path / "old.hdf5", timeouts=None)
    assert load_d4rl(path, parity=True, horizon=4).obs[:, 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    rows, _ = qlearning_rows(np.zeros(9, bool), None, 3)
    assert rows.tolist() == [0, 1, 3, 4, 6, 7]
    # by what happened: 3 4 5 6 is the second episode and 6 its time-out
    assert load_d4rl(path, horizon=4).obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 7, 8]


def test_d4rl_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing \['terminals'\]"):
        load_d4rl(d4rl_file(tmp_path / "a.hdf5", terminals=None))
    bad = np.zeros((10, 2), np.float32)
    bad[3, 1] = np.nan
    with pytest.raises(DataError, match=r"row 3, column 'action\[1\]': expected a finite number, got nan"):
        load_d4rl(d4rl_file(tmp_path / "b.hdf5", actions=bad))
    (tmp_path / "c.hdf5").write_text("no file of this kind")
    with pytest.raises(DataError, match="expected an HDF5 file"):
        load_d4rl(tmp_path / "c.hdf5")


def test_minari_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Episodes of 50, 34, 50 and 27 steps: 161 in all, two terminations and two truncations, equal arrays."""
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng = np.random.default_rng(0)
    episodes = []
    for length in (50, 34, 50, 27):
        end = np.arange(length) == length - 1
        episodes.append({
            "obs": rng.normal(size=(length + 1, 4)).astype(np.float32),
            "action": rng.uniform(-3, 3, size=(length, 1)).astype(np.float32), "reward": np.arange(length, dtype=float),
            "terminated": end & (length != 50), "truncated": end & (length == 50),
        })  # fmt: skip
    env = gymnasium.make("InvertedPendulum-v5")
    write_minari(
        "mine/pendulum-v0", episodes, env, scores=(5.0, 50.0), algorithm_name="none", description="random numbers"
    )
    source = minari.load_dataset("mine/pendulum-v0", download=False)
    assert (source.total_steps, source.total_episodes) == (161, 4)
    assert [len(e.observations) for e in source.iterate_episodes()] == [51, 35, 51, 28]
    assert minari.get_normalized_score(source, np.array([5.0, 27.5, 50.0])).tolist() == [0.0, 0.5, 1.0]
    data = load_dataset("minari:mine/pendulum-v0")
    assert len(data) == 161
    assert (data.terminated.sum(), data.truncated.sum()) == (2, 2)
    for name, cut in (("obs", slice(None, -1)), ("next_obs", slice(1, None))):
        np.testing.assert_array_equal(getattr(data, name), np.concatenate([e["obs"][cut] for e in episodes]))
    np.testing.assert_array_equal(data.action, np.concatenate([e["action"] for e in episodes]))
    assert data.scores == (5.0, 50.0)
    with pytest.raises(DataError, match="minari download"):
        load_minari("mine/other-v0")
    with pytest.raises(DataError, match="episode 0, row 49: expected terminated or truncated"):
        write_minari("mine/x-v0", [episodes[0] | {"truncated": np.zeros(50, bool)}], env)


def test_ogbench_files(tmp_path: Path) -> None:
    """Two trajectories of four observations: three transitions each, the last of them a time-out."""
    ends = np.array([0, 0, 0, 1, 0, 0, 0, 1.0])
    raw = {"observations": columns(8)["obs"], "actions": np.zeros((8, 2)), "terminals": ends}
    np.savez(tmp_path / "a.npz", **raw)
    data = load_ogbench(tmp_path / "a.npz", reward=lambda x: (x[:, 0] > 2).astype(float))
    assert data.obs[:, 0].tolist() == [0, 1, 2, 4, 5, 6]
    assert data.next_obs[:, 0].tolist() == [1, 2, 3, 5, 6, 7]
    assert data.truncated.tolist() == [False, False, True] * 2
    assert not data.terminated.any()
    assert data.reward.tolist() == [0, 0, 1, 1, 1, 1]
    with pytest.raises(DataError, match="expected 'rewards' in the file"):
        load_dataset(f"ogbench:{tmp_path / 'a.npz'}")
    np.savez(tmp_path / "b.npz", rewards=np.ones(8), masks=np.array([1, 0, 1, 1, 1, 1, 1, 1.0]), **raw)
    single = load_ogbench(tmp_path / "b.npz")
    assert single.terminated.tolist() == [False, True, False, False, False, False]
    assert single.episode.tolist() == [0, 0, 1, 2, 2, 2]


def test_ogbench_environments_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package: what is asked of it."""
    asked: list[tuple[str, dict[str, object]]] = []
    fake = ModuleType("ogbench")
    fake.make_env_and_datasets = lambda name, **options: asked.append((name, options))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ogbench", fake)
    make_ogbench("pointmaze-medium-navigate-v0", width=64)
    assert asked == [("pointmaze-medium-navigate-v0", {"env_only": True, "width": 64})]
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(ImportError, match=r"extra 'ogbench'"):
        make_ogbench("x")


class Hall(gymnasium.Env):  # type: ignore[type-arg]
    """Three cells in a row, 4 apart, with the names of OGBench's mazes; a step moves by the action."""

    action_space = gymnasium.spaces.Box(-1, 1, (2,))
    maze_map = np.array([[1] * 5, [1, 0, 0, 0, 1], [1] * 5])
    task_infos = ({"goal_ij": (1, 3)},)

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
        self.xy = np.zeros(2)
        return self.xy, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        self.xy = self.xy + action
        return self.xy, 0.0, False, False, {}

    def ij_to_xy(self, ij: tuple[int, int]) -> tuple[float, float]:
        return 4.0 * ij[1], 4.0 * ij[0]

    def xy_to_ij(self, xy: np.ndarray) -> tuple[int, int]:
        return int(xy[1] / 4 + 0.5), int(xy[0] / 4 + 0.5)

    def get_oracle_subgoal(self, xy: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, None]:
        (i, j), (_, to) = self.xy_to_ij(xy), self.xy_to_ij(goal)
        return np.array(self.ij_to_xy((i, j + int(np.sign(to - j))))), None

    def get_xy(self) -> np.ndarray:
        return self.xy

    get_ob = get_xy

    def set_xy(self, xy: np.ndarray) -> None:
        self.xy = xy


def test_the_navigate_recipe_of_ogbench() -> None:
    """Without noise actions have length 1 towards the next cell or the goal; arrival within 1 of (12, 4) ends an
    episode and not the walk."""
    data = navigate_ogbench(Hall(), 250, noise=0.0, length=100)
    assert len(data) == 300
    assert np.abs(np.linalg.norm(data.action, axis=1) - 1.0).max() < 1e-3
    there = np.linalg.norm(data.next_obs - [12.0, 4.0], axis=1) <= 1.0
    assert there.any()
    assert data.reward.tolist() == (there - 1.0).tolist()
    assert data.terminated.tolist() == there.tolist()
    assert np.flatnonzero(data.truncated).tolist() == [i for i in (99, 199, 299) if not there[i]]
    walk = np.arange(299) % 100 != 99
    np.testing.assert_array_equal(data.obs[1:][walk], data.next_obs[:-1][walk])
    np.testing.assert_array_equal(data.action, navigate_ogbench(Hall(), 250, noise=0.0, length=100).action)
    noisy = navigate_ogbench(Hall(), 100, seed=1, length=100)
    assert np.abs(noisy.action).max() == 1.0
    for wrong, message in ((gymnasium.make("Pendulum-v1"), "expected a point maze"), (Hall(), "task: expected 1 to 1")):
        with pytest.raises(ValueError, match=message):
            navigate_ogbench(wrong, 10, task=2)


# -- windows ----------------------------------------------------------------------------------------------------------


def test_windows_of_policy_guided_diffusion() -> None:
    """14 rows, terminal at 4, time-out at 10, T = 3, stride 2; the last row has no successor, so 13 are left. Valid are
    windows whose first two rows do not end an episode: 0 1 2 | 5 6 7 8. Every second of them: 0 2 6 8; the start of an
    episode: 5; the end in the terminal: 2; the end in the time-out, 8, is out."""
    terminated, truncated = np.arange(13) == 4, np.arange(13) == 10
    assert valid_windows(terminated | truncated, 3).tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert select_windows(terminated, truncated, 3, 2).tolist() == [0, 2, 5, 6]
    # with stride 4 of the valid ones 0 and 6 are left, and what starts an episode or ends in the terminal
    assert select_windows(terminated, truncated, 3, 4).tolist() == [0, 2, 5, 6]
    assert select_windows(terminated, truncated, 3, 100).tolist() == [0, 2, 5]
    assert valid_windows(np.zeros(2, bool), 3).tolist() == []
    assert valid_windows(np.ones(2, bool), 1).tolist() == [0, 1]


def test_draws_of_windows_are_consecutive_rows_of_one_episode() -> None:
    data = from_arrays(columns(40) | {"next_obs": columns(40)["obs"] + 1})
    windows = Windows(data, 4)
    draw = windows.sample(Batching("sequence", 500), torch.Generator().manual_seed(0))
    assert draw["obs"].shape == (4, 500, 1)
    assert draw.shape == (4, 500)
    assert float(draw["n_sequences"]) == 500
    assert draw["obs"].diff(dim=0).eq(1).all()
    assert draw["episode"].diff(dim=0).eq(0).all(), "a window crosses an episode's end"
    assert set(draw["obs"][0].flatten().tolist()) == {3, *range(7, 37)}
    with pytest.raises(ValueError, match="at least 50 rows"):
        Windows(data, 50)
    with pytest.raises(ValueError, match="sequence"):
        windows.sample(Batching(size=4), None)


# -- scores -----------------------------------------------------------------------------------------------------------


def test_normalised_scores() -> None:
    for task, value, expected in (
        ("halfcheetah-medium-v2", 5000, 42.530027),
        ("hopper", 1500, 46.711892),
        ("walker2d-expert-v2", 3000, 65.314439),
        ("maze2d-umaze-v1", 100, 55.177161),
        ("ant-medium-v2", 1000, 31.522127),
        ("antmaze-large-play-v0", 0.5, 50.0),
    ):
        assert normalised_score(float(value), task) == pytest.approx(expected, abs=1e-6)
        pair = reference_scores(task)
        assert pair is not None
        assert normalised_score(np.array(pair), task).tolist() == [0.0, 100.0]
    assert reference_scores("maze2d-umaze-dense-v1") == (68.537689, 193.662856)
    # as the files are called
    for file, task in (("hopper_medium_expert-v2", "hopper"), ("maze2d-large-sparse-v1", "maze2d-large"),
                       ("Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse", "antmaze")):  # fmt: skip
        assert reference_scores(file) == reference_scores(task)
    with pytest.raises(ValueError, match="pass the pair"):
        normalised_score(1.0, "pong")
    with pytest.raises(ValueError, match="above the random one"):
        normalised_score(1.0, (2.0, 2.0))


def test_a_set_refuses_successors_of_another_shape() -> None:
    good = from_arrays(columns())
    with pytest.raises(DataError, match="'next_obs': expected shape"):
        Dataset(**good.columns() | {"next_obs": np.zeros((8, 2), np.float32)})
