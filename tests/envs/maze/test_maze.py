"""Point mazes and the corridor: the contract, the dynamics by hand, walls, controllers."""

from __future__ import annotations

import pytest
import torch

import envs
from ccrl.testing import EnvContract
from envs.maze import HazardCorridor, PointMaze, Tour, Waypoints, cautious_action, overconfident_action
from envs.maze.point import MAPS, integrate


class TestUMaze(EnvContract):
    env = PointMaze
    options = {"max_episode_steps": 12}
    time_limit = 12


class TestMediumById(EnvContract):
    env = "ccrl/PointMazeMedium-v0"
    options = {"max_episode_steps": 9, "dense": True}
    time_limit = 9


class TestCorridor(EnvContract):
    env = HazardCorridor
    time_limit = 100


def test_the_mass_moves_as_mujoco_moves_it() -> None:
    """From rest with a force of 0.1 x 100 N: v after 1 to 4 steps, and the way of four steps."""
    p, v, a = torch.zeros(1, 2).double(), torch.zeros(1, 2).double(), torch.tensor([[0.1, 0.0]]).double()
    speeds = []
    for _ in range(4):
        p, v = integrate(p, v, a)
        speeds.append(float(v[0, 0]))
    # m = 4.18879020; v1 = 10 * 0.01 / (m + 0.01) = .1 / 4.19879020
    assert speeds == pytest.approx([0.02381638, 0.04757605, 0.07127912, 0.09492574], abs=1e-8)
    assert float(p[0, 0]) == pytest.approx(0.00237597, abs=1e-8)
    assert float(v[0, 1]) == 0.0
    _, fast = integrate(p, torch.full((1, 2), 9.0).double(), a * 0)
    # clipped to 5 before the step: 5 m / (m + .01)
    assert float(fast[0, 0]) == pytest.approx(5.0 * 4.18879020 / 4.19879020, abs=1e-6)


def test_walls_stop_the_disc_axis_by_axis() -> None:
    env = PointMaze(1)
    # cell (1, 1) begins at 0.3; moving up against the wall row 0 while sliding along it
    state = torch.tensor([[0.42, 1.0, -4.0, 1.0]])
    for _ in range(30):
        state, _, ended = env.transition(state, torch.tensor([[-1.0, 0.0]]), None)
    assert not ended.any()
    assert 0.4 <= float(state[0, 0]) <= 0.42, "the disc of radius 0.1 must stay outside of the wall at 0.3"
    assert float(state[0, 2]) == 0.0
    assert float(state[0, 1]) > 1.25, "the wall must not stop the motion along it"


@pytest.mark.parametrize(("maze", "least"), [("u_maze", 120.0), ("medium", 250.0), ("large", 250.0)])
def test_the_controller_finds_the_goal_from_everywhere(maze: str, least: float) -> None:
    env = PointMaze(60, maze=maze)
    obs, control = env.reset(seed=0), Waypoints(env)
    total = torch.zeros(60)
    for _ in range(MAPS[maze][1]):
        result = env.step(control(obs, env.goal.expand(60, 2)))
        obs, total = result.obs, total + result.reward
        assert not env.walls[tuple(env.cell(obs[:, :2]).unbind(-1))].any(), "in a wall"
    assert bool(result.truncated.all())
    assert float(total.min()) > least


def test_a_tour_passes_every_place_before_the_next() -> None:
    """From (3, 1) to the goal at (1, 1) of the U: (3, 2), (3, 3), (2, 3), (1, 3), (1, 2), each less U(0, .2)."""
    env, cells = PointMaze(1), [(3, 2), (3, 3), (2, 3), (1, 3), (1, 2), (1, 1)]
    tour, state, target = Tour(env, torch.Generator().manual_seed(0)), torch.tensor([[3.0, 1.0, 0.0, 0.0]]), env.goal
    places = []
    for _ in range(300):
        action = tour(state, target.expand(1, 2))
        if not places or places[-1] != tour._place[0].tolist():
            assert not places or float((state[0, :2] - torch.tensor(places[-1])).norm()) < 0.1
            places.append(tour._place[0].tolist())
        state, _, _ = env.transition(state, action, None)
    assert [tuple(round(x + 0.1) for x in p) for p in places] == cells
    assert places[-1] == [1.0, 1.0]
    assert all(0.0 <= c - x <= 0.2 for p, cell in zip(places, cells) for x, c in zip(p, cell))
    assert float((state[0, :2] - target).norm()) < 0.1
    # far away the action is full, and another target starts another tour from here
    assert tour(state, torch.tensor([[3.0, 1.0]])).abs().max() == 1.0
    assert tuple(round(x + 0.1) for x in tour._place[0].tolist()) == (1, 2)


def test_rewards() -> None:
    sparse, dense = PointMaze(1), PointMaze(1, dense=True)
    assert sparse.goal.tolist() == [1.0, 1.0]
    places = torch.tensor([[1.0, 1.5], [1.0, 1.51], [4.0, 5.0]])
    assert sparse.reward(places).tolist() == [1.0, 0.0, 0.0]
    # 3-4-5 triangle: e^-5
    torch.testing.assert_close(dense.reward(places), torch.tensor([-0.5, -0.51, -5.0]).exp())


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="maze: expected one of"):
        PointMaze(1, maze="spiral")  # type: ignore[arg-type]
    assert envs.make("ccrl/PointMazeLarge-v0").max_episode_steps == 800


def test_the_corridor_by_hand() -> None:
    env = HazardCorridor(2)
    state = torch.tensor([[0.0, 0.45, 0.5, 0.8], [0.0, 0.0, 0.95, 0.0]])
    after, reward, _ = env.transition(state, torch.tensor([[0.0, 2.0], [1.0, 0.0]]), None)
    # v_y = .8 + .1, y = .45 + .09 = .54: in the hazard, .05 - .5; v_x = min(.95 + .1, 1), progress .1
    torch.testing.assert_close(after, torch.tensor([[0.05, 0.54, 0.5, 0.9], [0.1, 0.0, 1.0, 0.0]]))
    torch.testing.assert_close(reward, torch.tensor([-0.45, 0.1]))


def test_the_overconfident_policy_ends_in_the_hazard() -> None:
    def play(policy: object) -> torch.Tensor:
        env = HazardCorridor(400)
        obs, total = env.reset(seed=0), torch.zeros(400)
        for _ in range(100):
            result = env.step(policy(obs))  # type: ignore[operator]
            obs, total = result.obs, total + result.reward
        return total

    careful, reckless = play(cautious_action), play(overconfident_action)
    assert 4.5 < float(careful.mean()) < 5.1
    assert -15.5 < float(reckless.mean()) < -13.0
    assert float(reckless.quantile(0.05)) < -19.0
