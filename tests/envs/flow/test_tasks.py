"""Generation tasks: exact densities and velocities, rewards by hand, reward models that can be hacked."""

import itertools
import math

import pytest
import torch

import envs  # noqa: F401  (registers its tasks)
from ccrl.flow import ExactTask, FlowTask, resolve_flow_task
from envs.flow import TASKS, make_flow_task
from envs.flow.gridworld import MOVES
from envs.flow.shapes import draw_shape

each = pytest.mark.parametrize("name", sorted(TASKS))


@each
def test_protocol_and_shapes(name):
    task = resolve_flow_task(name)
    assert isinstance(task, FlowTask)
    assert isinstance(task, ExactTask)
    label = torch.arange(7) % task.conditions
    x = task.data(label, torch.Generator().manual_seed(0))
    assert x.shape == (7, task.size)
    assert torch.equal(x, task.data(label, torch.Generator().manual_seed(0)))
    assert task.score(x, label).shape == (7, len(task.components))
    assert {"gold", "distance"} <= task.measure(x, label).keys()
    assert all(value.shape == (7,) for value in task.measure(x, label).values())


@each
def test_euler_steps_along_the_exact_velocity_give_the_data(name):
    """Distances to the modes and the log-density of 40 steps are those of the data, within a few percent of noise."""
    task = make_flow_task(name)
    label = torch.arange(600) % task.conditions
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, task.size, generator=generator)
    times = torch.linspace(1.0, 0.0, 41)
    for t, after in itertools.pairwise(times):
        x = x + (after - t) * task.velocity(x, t.expand(600), label)
    data = task.data(label, generator)
    made, real = (task.measure(sample, label)["distance"].mean() for sample in (x, data))
    assert float(made) == pytest.approx(float(real), rel=0.12)


def test_density_integrates_to_one():
    for name in ("ring2d", "moons"):
        task = make_flow_task(name)
        axis = torch.linspace(-4.0, 4.0, 201)
        grid = torch.cartesian_prod(axis, axis)
        density = task.log_density(grid, torch.zeros(len(grid), dtype=torch.int64)).exp().sum() * 0.04**2
        assert float(density) == pytest.approx(1.0, abs=1e-3)


class TestRing:
    def test_reward_by_hand(self):
        """Condition 1 wants mode 2, at (0, 2): at the mode 1, half a width away exp(-1/2)."""
        task = make_flow_task("ring2d")
        x = torch.tensor([[0.0, 2.0], [0.5, 2.0]])
        expected = torch.tensor([1.0, math.exp(-0.5)])
        torch.testing.assert_close(task.reward(x, torch.ones(2, dtype=torch.int64)), expected)
        assert float(task.distance(torch.tensor([[2.3, 0.0]]), torch.tensor([0]))) == pytest.approx(0.3, abs=1e-6)

    def test_outward_pays_for_leaving_the_data(self):
        task = make_flow_task("ring2d", reward="both")
        assert task.components == ("mode", "outward")
        found = task.score(torch.tensor([[2.0, 0.0], [8.0, 0.0]]), torch.zeros(2, dtype=torch.int64))
        torch.testing.assert_close(found[:, 1], torch.tensor([1.0, 4.0]))
        assert float(found[1, 0]) < 1e-6

    def test_expected_reward_of_the_data(self):
        """Of the wanted mode 1 / (1 + .15^2 / .5^2) = .917, an eighth of the data; neighbours 1.53 away add .0019."""
        task = make_flow_task("ring2d")
        label = torch.zeros(40_000, dtype=torch.int64)
        found = task.reward(task.data(label, torch.Generator().manual_seed(0)), label).mean()
        assert float(found) == pytest.approx(0.917 / 8 + 0.0025, abs=0.005)


class TestRewardModel:
    def test_on_the_data_the_proxy_ranks_the_modes_right(self):
        task = make_flow_task("mixture16")
        for c in range(task.conditions):
            found = task.reward(task.means, torch.full((len(task.means),), c))
            assert int(found.argmax()) == c

    def test_beyond_the_data_it_rises_while_gold_falls(self):
        task = make_flow_task("mixture16")
        label = torch.zeros(2, dtype=torch.int64)
        way = task.coefficients[0, :-1] / task.coefficients[0, :-1].norm()
        x = task.means[0] + torch.tensor([[0.0], [10.0]]) * way
        proxy, gold = task.reward(x, label), task.gold(x, label)
        assert proxy[1] > proxy[0] + 0.5
        assert gold[1] < 1e-3 < gold[0]

    def test_gold_is_an_option(self):
        task = make_flow_task("mixture16", reward="gold")
        x = task.data(torch.zeros(4, dtype=torch.int64), None)
        label = torch.zeros(4, dtype=torch.int64)
        torch.testing.assert_close(task.reward(x, label), task.gold(x, label))


class TestShapes:
    def test_images_are_different_and_inside(self):
        images = [draw_shape(name) for name in ("square", "frame", "cross", "triangle", "disc")]
        assert all((image > 0).sum() >= 8 for image in images)
        assert all((a != b).sum() >= 6 for i, a in enumerate(images) for b in images[:i])
        moved = draw_shape("cross", 1, 1).view(8, 8)
        assert torch.equal(moved[1:, 1:], draw_shape("cross").view(8, 8)[:-1, :-1])

    def test_clean_images_are_gold_and_white_ones_are_bright(self):
        task = make_flow_task("shapes", reward="bright")
        label = torch.arange(5)
        clean, white = task.means[::4], torch.ones(5, 64)
        assert float(task.gold(clean, label).min()) > 0.85
        assert float(task.gold(white, label).max()) < 0.5
        assert (task.reward(white, label) > task.reward(clean, label)).all()


class TestGridworld:
    def test_right_moves(self):
        """From (0, 1) only left leads to the goal at (0, 0); from (2, 2), as far from both goals, all four are
        right."""
        task = make_flow_task("gridworld")
        cells = task.cells.tolist()
        assert [0, 0] not in cells
        assert task.right[cells.index([0, 1])].tolist() == [False, False, True, False]
        assert task.right[cells.index([2, 2])].tolist() == [True] * 4
        assert task.right[cells.index([1, 1])].tolist() == [False, False, True, True]

    def test_rewards_and_shares(self):
        task = make_flow_task("gridworld")
        label = torch.full((3,), task.cells.tolist().index([1, 1]))
        x = torch.stack([MOVES[2], 0.5 * MOVES[3], MOVES[0]])  # left, half a step up, right
        torch.testing.assert_close(task.reward(x, label), torch.tensor([1.0, math.exp(-2.0), 0.0]))
        every = torch.arange(task.conditions).repeat(4)
        moves = MOVES.repeat_interleave(task.conditions, 0)
        torch.testing.assert_close(task.both(moves, every), torch.full_like(task.both(moves, every), 0.5))
        assert not task.both(MOVES[2].expand(len(every), 2), every).any()


def test_bad_names_and_options():
    with pytest.raises(ValueError, match="did you mean ring2d"):
        make_flow_task("ring2")
    with pytest.raises(TypeError, match="did you mean modes"):
        make_flow_task("ring2d", mode=3)
    for options in ({"modes": 0}, {"std": 0.0}, {"reward": "best"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make_flow_task("ring2d", **options)
    with pytest.raises(ValueError, match="conditions"):
        make_flow_task("mixture16", modes=2, conditions=3)
    with pytest.raises(TypeError, match="FlowTask"):
        resolve_flow_task(object())


def test_rewards_of_different_sizes():
    """At their wanted modes samples earn their condition's factor; gold stays 1."""
    task = make_flow_task("ring2d", conditions=2, scales=(1.0, 0.05))
    label = torch.tensor([0, 1])
    torch.testing.assert_close(task.score(task.wanted, label), torch.tensor([[1.0], [0.05]]))
    torch.testing.assert_close(task.gold(task.wanted, label), torch.ones(2))
    for scales in ((1.0,), (1.0, 0.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="scale"):
            make_flow_task("ring2d", conditions=2, scales=scales)
