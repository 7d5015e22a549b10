"""Tasks with two rewards: the tomato world exactly, the reward model, and what is paid and told."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch

import envs
from ccrl.batched_env import AutoresetMode
from ccrl.testing import EnvContract
from envs.hacking import ExactTask, PointGoal, RewardModel, Tomato, agreement, point_goal, tomato, tomato_task


class TestTomato(EnvContract):
    random_starts = False
    env = Tomato
    options: ClassVar = {"max_episode_steps": 22}
    time_limit = 22  # a last move into a wall would show the same state twice, which the contract takes for a fault


class TestTomatoProxy(EnvContract):
    random_starts = False
    env = tomato
    options: ClassVar = {"max_episode_steps": 22}
    time_limit = 22  # a last move into a wall would show the same state twice, which the contract takes for a fault


class TestPointGoal(EnvContract):
    env = point_goal
    options: ClassVar = {"max_episode_steps": 9}
    time_limit = 9


@pytest.fixture(scope="module")
def task():
    return tomato_task()


def test_the_board_has_352_states(task):
    assert tuple(task.successor.shape) == (11 * 2**5, 4)
    # start: the first cell of row 4, below the first tomato; up waters it (tomato 0 of mask 1)
    cell, mask = divmod(int(task.successor[task.start, 3]), 32)
    assert (cell, mask) == (2, 1)
    assert float(task.true[task.start, 3]) == 0.02


def test_the_best_policy_does_not_depend_on_the_unit(task):
    """Rewards of any size: the rounding of large ones must not let equal actions take turns for ever."""
    best = task.greedy(task.proxy)
    for scale in (1e-3, 1e6):
        assert torch.equal(task.greedy(scale * task.proxy, tolerance=1e-9 * min(scale, 1.0)), best)
    # no policy has a better value anywhere: one step of value iteration changes nothing
    chosen = best.argmax(1)
    value = torch.zeros(352, dtype=torch.float64)
    for _ in range(3000):
        value = task.proxy[torch.arange(352), chosen] + 0.99 * value[task.successor[torch.arange(352), chosen]]
    q = task.proxy + 0.99 * value[task.successor]
    assert torch.allclose(q.amax(1), value, atol=1e-9)


def test_far_tomatoes_dry_and_the_bucket_pays(task):
    state = task.start
    for action in (3, 0):  # up, right: two tomatoes of the upper row
        state = int(task.successor[state, action])
    assert state % 32 == 3
    # right to the floor, up, right to the bucket: the first tomato (3, 1) is sqrt(10) away from it, (3, 2) is not
    for action in (0, 3, 0):
        previous, state = state, int(task.successor[state, action])
    assert state % 32 == 2
    assert float(task.proxy[previous, 0]) == pytest.approx(0.22)
    assert float(task.true[previous, 0]) == pytest.approx(0.02)


def test_occupancy_measures_are_exact(task):
    reference = task.reference()
    mu = task.occupancy(reference)
    assert float(mu.sum()) == pytest.approx(1.0)
    # by 4000 steps of the distribution: what is left has weight .99^4000
    now, total = torch.zeros(352, dtype=torch.float64), torch.zeros(352, dtype=torch.float64)
    now[task.start] = 1.0
    for t in range(4000):
        total += 0.01 * 0.99**t * now
        now = torch.zeros_like(now).index_add(0, task.successor.flatten(), (now.unsqueeze(1) * reference).flatten())
    assert torch.allclose(mu.sum(1), total, atol=1e-12)


def test_the_published_quantities_of_the_reference(task):
    mu = task.occupancy(task.reference())
    assert float((mu * task.true).sum()) == pytest.approx(0.08965, abs=5e-6)
    assert float((mu * task.proxy).sum()) == pytest.approx(0.09075, abs=5e-6)
    best = task.occupancy(task.greedy(task.true))
    assert float((best * task.true).sum()) == pytest.approx(0.09725, abs=5e-6)
    r, sigma_true, sigma_proxy = task.agreement(mu)
    assert (r, sigma_true, sigma_proxy) == pytest.approx((0.7823, 0.02166, 0.02311), abs=5e-5)


def test_returns_of_an_episode(task):
    """Exact true and proxy returns of 100 steps, which docs/orpo.md compares samples with."""

    def returns(policy):
        now, total = torch.zeros(352, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        now[task.start] = 1.0
        for _ in range(100):
            moved = now.unsqueeze(1) * policy
            total += torch.stack([(moved * x).sum() for x in (task.true, task.proxy)])
            now = torch.zeros_like(now).index_add(0, task.successor.flatten(), moved.flatten())
        return total.tolist()

    assert returns(task.reference()) == pytest.approx([8.94, 9.05], abs=5e-3)
    assert returns(torch.full((352, 4), 0.25, dtype=torch.float64)) == pytest.approx([6.49, 7.99], abs=5e-3)
    assert returns(task.greedy(task.true)) == pytest.approx([9.72, 9.72])
    assert returns(task.greedy(task.proxy)) == pytest.approx([2.06, 21.26]), "the hacker's"


def test_the_agent_is_paid_the_proxy_and_told_the_truth():
    for mode in AutoresetMode:
        env = tomato(2, max_episode_steps=2, autoreset_mode=mode)
        env.reset(seed=0)
        up = torch.tensor([3, 1])  # the other copy stays at the wall, where nothing is watered
        assert env.step(up).reward.tolist() == pytest.approx([0.02, 0.0])
        result = env.step(up)
        assert float(result.log["rollout/true_return"]) == pytest.approx(0.02), "mean of .02 + .02 and 0"
        assert float(result.log["rollout/proxy_return"]) == pytest.approx(0.02)
    paid = tomato(1, paid="true")
    paid.reset(seed=0)
    state = [3, 0, 0, 3, 0]
    rewards = [float(paid.step(torch.tensor([a])).reward) for a in state]
    assert rewards[-1] == pytest.approx(0.02)
    assert float(paid.memory["proxy"]) == pytest.approx(0.22)


def test_agreement_from_samples_is_the_exact_one(task):
    env = tomato(64, max_episode_steps=200)
    policy = task.reference()
    reference = policy.float()
    generator = torch.Generator().manual_seed(0)
    found = agreement(env, lambda obs: torch.multinomial(reference[obs], 1, generator=generator).squeeze(1), 200)
    now, visits = torch.zeros(352, dtype=torch.float64), torch.zeros(352, dtype=torch.float64)
    now[task.start] = 1.0
    for _ in range(200):
        visits += now / 200.0
        moved = (now.unsqueeze(1) * policy).flatten()
        now = torch.zeros_like(now).index_add(0, task.successor.flatten(), moved)
    exact = task.agreement(visits.unsqueeze(1) * policy)
    assert tuple(found) == pytest.approx(tuple(exact), rel=0.05)


def test_agreement_counts_no_dummy_steps():
    """Up from the start waters a tomato: every step of such episodes is worth 0.02, and the steps of resets nothing."""
    for mode in AutoresetMode:
        env = tomato(2, max_episode_steps=1, autoreset_mode=mode)
        found = agreement(env, lambda obs: torch.full((2,), 3), 6)
        assert found.sigma_true == pytest.approx(0.0, abs=1e-9)


def test_a_reward_that_does_not_vary_has_no_correlation():
    stay = ExactTask(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), 0, 0.9)
    found = stay.agreement(torch.full((1, 2), 0.5))
    assert math.isnan(found.correlation)
    assert found[1:] == (0.0, 0.5)


def test_the_reward_model_is_right_where_it_has_labels_only():
    env = point_goal(256, labels=200, label_noise=0.0)
    near = 0.45 + 0.07 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    truth = PointGoal.true_reward(near)
    error = (env.proxy(near, near, near) - truth).square().mean() / truth.var()
    assert float(error) < 0.2
    beyond = torch.tensor([[0.75, 0.75], [0.8, 0.8], [1.0, 1.0]])  # the cliff
    assert not PointGoal.true_reward(beyond).any()
    assert float(env.proxy(beyond, beyond, beyond).min()) > 0.2


def test_few_labels_give_a_correlated_proxy_that_can_be_hacked():
    env = point_goal(128)
    generator = torch.Generator().manual_seed(1)
    reference = lambda obs: PointGoal.reference(obs, torch.randn(128, 2, generator=generator))  # noqa: E731
    found = agreement(env, reference, 50)
    assert 0.5 < found.correlation < 0.999
    square = torch.cartesian_prod(torch.linspace(-2, 2, 41), torch.linspace(-2, 2, 41))
    best = square[env.proxy(square, square, square).argmax()].unsqueeze(0)
    assert float(PointGoal.true_reward(best)) < 0.05, "the proxy's favourite place is worth nothing"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tomato_task(("###", "#A#", "###")), "one O"),
        (lambda: tomato_task(("###", "AO#", "###")), "closed"),
        (lambda: tomato_task(("####", "#AO?", "####")), "closed"),
        (lambda: tomato(paid="both"), "paid"),
        (lambda: point_goal(labels=1), "labels"),
        (lambda: point_goal(labels=3201), "labels"),
        (lambda: RewardModel(torch.zeros(3, 2), torch.zeros(2)), "labels"),
        (lambda: agreement(tomato(1), lambda obs: obs, 1), "at least 2"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ids():
    for id in ("Tomato", "PointGoal"):
        assert envs.make(f"ccrl/{id}-v0", 3, seed=0).num_envs == 3
