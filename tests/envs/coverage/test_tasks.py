"""Gridworlds, their rewards over whole episodes, and paths of known quality."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ccrl.batched_env import AutoresetMode
from ccrl.wrappers import SetReward
from envs.coverage import (
    Coverage,
    GridWorld,
    LogDet,
    PointMass,
    ant_coverage,
    best_path,
    greedy_path,
    grid_coverage,
    grid_facility,
    grid_items,
    two_rooms,
)
from envs.coverage.priors import gp_covariance, gp_density


def play(env, actions) -> list[float]:
    env.reset(seed=0)
    return [float(env.step(torch.tensor([a])).reward) for a in actions]


def test_a_path_on_a_small_grid():
    # 0 -> 1 (+y) -> 4 (+x) -> 4 (stay) -> 7 (+x): 7 covers {7, 8}, which 4 covered
    assert play(grid_coverage(size=(3, 3), max_episode_steps=4), [1, 2, 0, 2]) == [2.0, 2.0, 0.0, 0.0]


def test_the_additive_reward_pays_every_visit():
    env = grid_coverage(size=(3, 3), max_episode_steps=4, paid="modular")
    assert play(env, [1, 2, 0]) == [4.0, 4.0, 4.0]
    result = env.step(torch.tensor([2]))
    assert float(result.reward) == 2.0
    assert float(result.log["rollout/set_value"]) == 8.0, "4 + 2 + 2 + 0 + 0: F itself is logged, whatever is paid"
    assert bool(env.step(torch.tensor([2])).log["rollout/set_value"].isnan()), "nothing ended in this step"


@pytest.mark.parametrize("observation", ["raw", "scaled", "history"])
def test_observations_show_the_cell(observation):
    env = GridWorld(5, size=(3, 4), start=5, observation=observation, max_episode_steps=6)
    obs, cell = env.reset(seed=0), torch.full((5,), 5)
    assert torch.equal(env.element(obs), cell)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        action = torch.randint(5, (5,), generator=generator)
        result = env.step(action)
        cell = env.moves[cell, action]
        shown = result.final_obs if bool(result.truncated[0]) else result.obs
        assert torch.equal(env.element(shown), cell)


def test_walls_and_borders_stop():
    env = GridWorld(size=(2, 3), walls=[4], start=3)
    assert env.moves[3].tolist() == [3, 3, 3, 3, 0], "+y is the wall 4, +x and -y the border"
    rooms = two_rooms()
    # rooms of 28 cells each and a corridor of 12
    assert int(rooms.env.free.sum()) == 68
    covered = rooms.function.footprints
    walls = (~rooms.env.free).nonzero().squeeze(1)
    assert not torch.isin(covered, walls).any()


def test_random_moves_are_as_frequent_as_they_should_be():
    env = GridWorld(4000, size=(3, 3), start=4, stochasticity=0.5)
    obs = env.reset(seed=0)
    obs = env.step(torch.full((4000,), 2)).obs
    share = (env.element(obs) == 7).float().mean()
    assert abs(float(share) - 0.6) < 0.03, "0.5 + 0.5 / 5"


def test_sets_begin_anew_with_episodes_in_every_mode():
    """A path of 2 moves, again and again, pays the same every time."""
    for mode in AutoresetMode:
        env = grid_coverage(2, size=(3, 3), max_episode_steps=2, autoreset_mode=mode)
        env.reset(seed=0)
        rows = []
        for step in range(7):
            action = torch.tensor([1 + step % 2, 1 + step % 2])
            result = env.step(action)
            rows.append(result.reward[0].item())
            if mode == AutoresetMode.DISABLED and bool(result.truncated.any()):
                env.reset(mask=result.truncated)
        if mode == AutoresetMode.NEXT_STEP:  # +y +x dummy(+y) +x +y dummy
            assert rows == [2.0, 2.0, 0.0, 2.0, 2.0, 0.0, 2.0]
        else:
            assert rows == [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_greedy_and_exact_paths():
    env = grid_coverage(size=(3, 3), max_episode_steps=3)
    best = best_path(env)
    assert best.exact
    brute = max(
        float(env.function.value(torch.tensor([cells(env.env, actions)])))
        for actions in itertools.product(range(5), repeat=3)
    )
    assert best.value == brute
    assert float(env.function.value(torch.tensor([best.cells]))) == best.value
    assert greedy_path(env).value <= best.value


def cells(world, actions) -> list[int]:
    path = [world.start]
    for a in actions:
        path.append(int(world.moves[path[-1], a]))
    return path


def test_greedy_is_myopic():
    """Weights 1, 1 to the right and 0, 10 below: one step ahead shows the 1 only."""
    world = GridWorld(size=(3, 3), start=0, max_episode_steps=2)
    weights = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 10.0, 0.0, 0.0])
    env = SetReward(world, Coverage(torch.arange(9).unsqueeze(1), weights))
    assert greedy_path(env).value == 2.0
    assert best_path(env).value == 10.0
    assert not best_path(env, width=2).exact


def test_the_published_demands_bound_the_items():
    env = grid_items()
    assert float(env.function.demands.sum()) == 21.0
    assert int(env.function.members.sum()) == 93
    assert not torch.equal(env.function.members, grid_items(instance=1).function.members)
    found = best_path(grid_items(max_episode_steps=6, start=34), width=200)
    assert 0.0 < found.value <= 7.0


def test_the_bimodal_density_has_two_high_corners():
    weights = grid_coverage(size=(5, 5), density="bimodal").function.weights[:25].view(5, 5)
    assert weights[0, 0] == weights[4, 4] == weights.max()
    assert weights[0, 4] == weights[4, 0] == weights.min()
    assert float(weights[0, 0]) == pytest.approx(0.7310586), "1 / (1 + exp(-1))"


def test_gaussian_process_priors():
    pytest.importorskip("gpytorch")
    prior, posterior = gp_covariance((3, 3), 0, given=0), gp_covariance((3, 3), 0)
    # Matern-5/2 at distance 0.1, scale log 2: (1 + sqrt5 r + 5/3 r^2) exp(-sqrt5 r) log 2
    s = math.sqrt(5.0) * 0.1
    expected = (1.0 + s + s * s / 3.0) * math.exp(-s) * math.log(2.0)
    assert float(prior[0, 1]) == pytest.approx(expected, abs=1e-7)
    assert float(torch.linalg.eigvalsh(prior - posterior).min()) > -1e-9, "observations add information"
    density = gp_density((3, 3), 0)
    assert bool((density >= 0).all())
    assert not torch.equal(density, gp_density((3, 3), 1))


def test_the_ant_marks_blocks():
    env = ant_coverage(2, max_episode_steps=3, cells=100, block=5)
    obs = env.reset(seed=0)
    assert obs.shape == (2, 29)
    assert env.memory["covered"][:, :-1].sum(1).tolist() == [25, 25]
    result = env.step(torch.zeros(2, 8))
    assert bool((result.reward >= 0).all())
    assert bool((result.reward <= 2.5).all())
    with pytest.raises(ValueError, match="CPU"):
        ant_coverage(1, device="cuda")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grid_coverage(1, size=(1, 2), start=None, walls=[0, 1]), "no wall, got walls everywhere"),
        (lambda: GridWorld(size=(2, 2), start=4), "start"),
        (lambda: GridWorld(size=(2, 2), start=1, walls=[1]), "start"),
        (lambda: GridWorld(size=(2, 2), walls=[7]), "walls"),
        (lambda: GridWorld(stochasticity=1.5), "stochasticity"),
        (lambda: GridWorld(observation="pixels"), "observation"),
        (lambda: grid_coverage(density="none"), "density"),
        (lambda: grid_coverage(disc="huge"), "disc"),
        (lambda: grid_coverage(paid="never"), "paid"),
        (lambda: grid_items(demands=(1,)), "demand"),
        (lambda: grid_facility(customers=0), "customers"),
        (lambda: PointMass(cells=0), "cells"),
        (lambda: ant_coverage(half_width=0.0), "half_width"),
        (lambda: best_path(grid_coverage(stochasticity=0.1)), "stochasticity"),
        (lambda: best_path(grid_coverage(), width=0), "width"),
        (lambda: SetReward(GridWorld(), LogDet(torch.eye(100), 0.1, 5)), "capacity"),
        (lambda: SetReward(GridWorld(), Coverage(torch.zeros(100, 1).long(), torch.ones(1)), scale=0.0), "scale"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
