"""BNPO against the numbers of its equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.llm.bnpo import BNPO, BetaNormaliser, BNPOConfig, fit_beta, log_density, optimal_normaliser
from ccrl.data import Data
from ccrl.estimators import losses, ratios
from ccrl.estimators.groups import Groups
from ccrl.testing.recipe_contract import RecipeContract


def rollout(rewards: list[list[float]], steps: int = 2) -> Data:
    """One row per prompt; ``[steps, N]``, float64."""
    score = torch.tensor(rewards, dtype=torch.float64).flatten()
    group = torch.arange(len(rewards)).repeat_interleave(len(rewards[0]))
    valid = torch.ones(steps, len(score), dtype=torch.float64)
    return Data(
        {"valid": valid, "episode_reward": score, "group": group}, sequence=frozenset({"episode_reward", "group"})
    )


def advantages(rewards: list[list[float]], **options: float) -> Tensor:
    """``[Q, G]``."""
    return BetaNormaliser(**options)(rollout(rewards))["advantage"][0].view(len(rewards), -1)


def test_the_fit_and_the_weights_of_four_prompts() -> None:
    rewards = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]]
    p = torch.tensor(rewards, dtype=torch.float64).mean(1)
    assert p.mean() == 0.5
    assert float(p.var()) == pytest.approx(0.0416667, abs=1e-7)
    a, b = fit_beta(p)  # s = 0.25 / 0.0416667 - 1 = 5
    assert (float(a), float(b)) == (pytest.approx(2.5), pytest.approx(2.5))
    alpha, beta = optimal_normaliser(a, b)
    assert (float(alpha), float(beta)) == (pytest.approx(1.8333333), pytest.approx(1.8333333))
    f = log_density(p, alpha, beta).exp()
    np.testing.assert_allclose(f, [1.123800, 1.428251, 1.123800, 1.428251], atol=1e-6)
    np.testing.assert_allclose(1 / f, [0.889838, 0.700157, 0.889838, 0.700157], atol=1e-6)
    found = advantages(rewards)
    np.testing.assert_allclose(found[0], [0.667379, -0.222460, -0.222460, -0.222460], atol=1e-6)
    np.testing.assert_allclose(found[1], [0.350079, 0.350079, -0.350079, -0.350079], atol=1e-6)


def test_prompts_without_success_or_failure_are_exactly_zero() -> None:
    rewards = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    data = BetaNormaliser()(rollout(rewards))
    np.testing.assert_allclose(data["normaliser"][0, 0], [1.0510, 1.0656], atol=5e-5)
    found = data["advantage"][0].view(4, 4)
    assert found[[0, 2]].eq(0.0).all()
    np.testing.assert_allclose(found[1], [0.7309, -0.2436, -0.2436, -0.2436], atol=5e-5)
    np.testing.assert_allclose(found[3], [0.4830, 0.4830, -0.4830, -0.4830], atol=5e-5)


def test_special_cases_grpo_and_reinforce() -> None:
    reward = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.float64)
    p = reward.mean(1)
    groups = Groups(torch.arange(3).repeat_interleave(5))
    at = lambda shape: (  # noqa: E731
        BetaNormaliser().advantage(reward.flatten(), groups, p, *torch.tensor([shape, shape]).double()).view(3, 5)
    )
    z = (reward - p[:, None]) / (p * (1 - p)).sqrt()[:, None]
    torch.testing.assert_close(at(1.5), math.pi / 8 * z)
    torch.testing.assert_close(at(1.0), reward - p[:, None])
    three = torch.tensor(0.3, dtype=torch.float64), *torch.tensor([1.5, 1.5]).double()
    assert float(log_density(*three).exp()) == pytest.approx(1.1669433, abs=1e-7)


def test_rates_that_vary_more_than_a_beta_give_reinforce() -> None:
    rewards = [[1, 1], [0, 0], [1, 1], [0, 0]]
    a, b = fit_beta(torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64))  # v = 1/3 > m (1 - m) = 1/4
    assert (float(a), float(b)) == (pytest.approx(-0.125), pytest.approx(-0.125))
    data = BetaNormaliser()(rollout(rewards))
    assert data["normaliser"].eq(1.0).all()
    assert data["advantage"].eq(0.0).all()


@pytest.mark.parametrize("rewards", [[[1, 0, 0]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]], ids=["one prompt", "equal rates"])
def test_no_spread_of_rates_gives_reinforce(rewards: list[list[float]]) -> None:
    data = BetaNormaliser()(rollout(rewards))
    assert data["normaliser"].eq(1.0).all()
    np.testing.assert_allclose(data["advantage"][0].view(-1, 3).sort(1).values[0], [-1 / 3, -1 / 3, 2 / 3])


def test_order_does_not_matter_and_failure_mirrors_success() -> None:
    rewards = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    found = advantages(rewards.tolist())
    torch.testing.assert_close(advantages(rewards[[2, 0, 3, 1]].tolist()), found[[2, 0, 3, 1]])
    torch.testing.assert_close(advantages(rewards.flip(1).tolist()), found.flip(1))
    one, other = BetaNormaliser()(rollout(rewards.tolist())), BetaNormaliser()(rollout((1 - rewards).tolist()))
    torch.testing.assert_close(other["advantage"], -one["advantage"])
    torch.testing.assert_close(other["normaliser"], one["normaliser"].flip(-1))
    assert not one["normaliser"][0, 0, 0].isclose(one["normaliser"][0, 0, 1])


def test_components_are_normalised_apart_and_averaged() -> None:
    data = rollout([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    score = data["episode_reward"]
    with_scores = lambda *columns: data.derive_sequence(reward_components=torch.stack(columns, 1))  # noqa: E731
    alone = BetaNormaliser()(data)["advantage"]
    torch.testing.assert_close(BetaNormaliser()(with_scores(score, score))["advantage"], alone)
    other = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 1, 1.0], dtype=torch.float64)
    second = BetaNormaliser()(Data({**data, "episode_reward": other}, sequence=data.sequence))["advantage"]
    torch.testing.assert_close(BetaNormaliser()(with_scores(score, other))["advantage"], (alone + second) / 2)
    torch.testing.assert_close(BetaNormaliser(decompose=False)(with_scores(score, other))["advantage"], alone)


def test_density_of_beta_two_two() -> None:
    two = torch.tensor(2.0, dtype=torch.float64)
    p = torch.tensor([0.1, 0.25, 0.5, 0.0, 1.0], dtype=torch.float64)
    np.testing.assert_allclose(log_density(p, two, two).exp(), [0.54, 1.125, 1.5, 0.0, 0.0], rtol=1e-12)


def test_weights_are_bounded() -> None:
    # rates of 1/2 but one: f is narrow, and the group far from 1/2 has a weight above 1000 without a bound
    rewards = [[1.0, 0.0] * 20] * 200 + [[1.0] + [0.0] * 39]
    assert float(advantages(rewards)[-1, 0]) > 100.0
    assert float(advantages(rewards, max_weight=2.0)[-1, 0]) == pytest.approx(2.0 * 39 / 40)


def test_rewards_outside_the_range_widen_it() -> None:
    unit = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    scaled = [[500 * r - 100 for r in row] for row in unit]
    torch.testing.assert_close(advantages(scaled), advantages(unit))
    half = [[0.5 * r for r in row] for row in unit]
    # a rollout without the largest reward stays on the given scale
    assert not torch.allclose(advantages(half), advantages(unit))
    torch.testing.assert_close(advantages(half, reward_max=0.5), advantages(unit))


def test_a_group_of_one_has_no_advantage_and_does_not_move_the_fit() -> None:
    data = rollout([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    columns = {
        "valid": torch.ones(2, 13, dtype=torch.float64),
        "episode_reward": torch.cat([data["episode_reward"], data["episode_reward"].new_ones(1)]),
        "group": torch.cat([data["group"], torch.tensor([7])]),
    }
    found = BetaNormaliser()(Data(columns, sequence=data.sequence))["advantage"]
    torch.testing.assert_close(found[:, :12], BetaNormaliser()(data)["advantage"])
    assert found[:, 12].eq(0.0).all()


def test_dual_clip_bounds_the_loss_of_bad_actions_only() -> None:
    log_prob = torch.tensor([[5.0, 5.0, 1.5]]).log().requires_grad_()
    level = ratios.token({"log_prob": log_prob}, Data({"log_prob": torch.zeros(1, 3), "valid": torch.ones(1, 3)}))
    advantage = torch.tensor([[-1.0, 1.0, -1.0]])
    loss = losses.clip(0.2, 0.2, 3.0)(level, advantage, {}, Data({}))
    torch.testing.assert_close(loss, torch.tensor([[3.0, -1.2, 1.5]]))  # PPO alone: 5, -1.2, 1.5
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 1.5]]))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"reward_max": 0.0}, "reward_min"), ({"max_weight": 0.0}, "max_weight"), ({"dual_clip": 1.0}, "dual_clip")],
)
def test_bad_config(options: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        BNPOConfig(**options)


# -- contract -----------------------------------------------------------------------------------------------------


class TestBNPOContract(RecipeContract):
    method = BNPO
    published = {
        "reward_min": 0.0,
        "reward_max": 1.0,
        "max_weight": 1000000.0,
        "decompose": True,
        "dual_clip": 10.0,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "aggregate": "sequence_mean",
    }
    matters = (
        ({}, {"reward_min": -1.0}),
        ({}, {"reward_max": 3.0}),
        ({}, {"max_weight": 0.1}),
        ({}, {"decompose": False}),
        ({}, {"dual_clip": 1.01}),
    )
