"""GBPO: targets and weights of the group, gradients, invariances, learning, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm.gbpo import GBPO, BoundedGroupTarget, GBPOConfig, GBPORecipe, bounded_regression
from ccrl.data import Batching, Data
from ccrl.estimators.terms import LogRatio, surrogate
from ccrl.testing.recipe_contract import RecipeContract

LOG_PROB = [[-1.0, -0.5, -2.0], [-0.3, -1.2, 0.0], [-0.7, -0.7, -0.7], [-1.5, 0.0, 0.0]]
OLD = [[-1.2, -0.5, -1.9], [-0.3, -1.6, 0.0], [-0.7, -0.9, -0.3], [-1.1, 0.0, 0.0]]
MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
SCORE = [1.0, 0.0, 0.0, 1.0]


def target(
    scores: list[float], low: float = 0.2, high: float = 0.2, threshold: Any = "quantile"
) -> tuple[Tensor, Tensor]:
    """``advantage`` and ``ratio_target`` ``[N]`` of one group."""
    score = torch.tensor(scores, dtype=torch.float64)
    columns = {
        "valid": torch.ones(1, len(score)).double(),
        "episode_reward": score,
        "group": torch.zeros(len(score)).long(),
    }
    data = BoundedGroupTarget(low, high, 1e-4, threshold)(
        Data(columns, sequence=frozenset({"episode_reward", "group"}))
    )
    return data["advantage"][0], data["ratio_target"]


def close(found: Tensor, expected: list[float], atol: float = 5e-5) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def prepared(recipe: Any, rollout: Any, score: Any = SCORE, **options: Any) -> tuple[Any, Data]:
    made = recipe(GBPORecipe, GBPOConfig(**options))
    data = rollout(OLD, MASK, episode_reward=torch.tensor(score, dtype=torch.float64))
    return made, made.prepare({"on": data}, None)["on"]


# -- the group's targets ----------------------------------------------------------------------------------------------


def test_two_four_and_six_of_eight() -> None:
    advantage, found = target([1, 1, 0, 0, 0, 0, 0, 0])
    close(advantage, [1.6202] * 2 + [-0.5401] * 6)
    close(found, [1.2] * 2 + [(8 - 2 * 1.2) / 6] * 6)  # the eight add up to 8
    close(target([1, 0, 1, 0, 1, 0, 1, 0])[1], [1.2, 0.8] * 4)
    close(target([1] * 6 + [0] * 2)[1], [(8 - 2 * 0.8) / 6] * 6 + [0.8] * 2)
    # as released: the median's ties get the middle of the bounds, whatever that makes of the mean
    close(target([1, 1, 0, 0, 0, 0, 0, 0], threshold="median")[1], [1.2] * 2 + [1.0] * 6)
    close(target([1] * 6 + [0] * 2, threshold="median")[1], [1.0] * 6 + [0.8] * 2)


def test_a_lone_right_answer_pushes_the_wrong_ones_down() -> None:
    """The 0.58-quantile is 0, so that wrong answers sit at it: the middle of the bounds is 1.04, and the mean 1.088."""
    close(target([1, 0, 0, 0, 0], 0.2, 0.28)[1], [1.28] + [(5 - 1.28) / 4] * 4)
    close(target([1, 0, 0, 0, 0], 0.2, 0.28, "median")[1], [1.28] + [1.04] * 4)
    assert pytest.approx(1.088) == (1.28 + 4 * 1.04) / 5


def test_graded_scores() -> None:
    advantage, found = target([1, 0, 0.5, 0.25])
    close(advantage, [1.3175, -1.0247, 0.1464, -0.4392])
    close(found, [1.2, 0.8, 1.2, 0.8])


def test_the_logged_gap_is_that_of_all_informative_tokens(recipe: Any, rollout: Any) -> None:
    """Of both signs of the advantage, and of none where it is 0."""
    made = recipe(GBPORecipe, GBPOConfig())
    columns = {"episode_reward": torch.tensor([1.0, 0.0, 1.0, 1.0]).double(), "group": torch.tensor([0, 0, 1, 1])}
    data = made.prepare({"on": rollout(OLD, MASK, **columns)}, None)["on"]
    batch = data.epoch(Batching("sequence", "full"), None)[0]
    _, stats = surrogate(made.phases()[0].terms, {"log_prob": torch.tensor(LOG_PROB).double().t()}, batch)
    ratio = (torch.tensor(LOG_PROB) - torch.tensor(OLD)).double().exp()
    gap = (ratio - data["ratio_target"].unsqueeze(1)).abs() * torch.tensor(MASK)
    gap = gap[data["advantage"][0] != 0]
    assert float(stats["target_gap"]) == pytest.approx(float(gap.sum()) / 9.0)


def test_equal_scores_have_no_loss_and_a_group_of_one_keeps_its_score() -> None:
    advantage, found = target([0.5] * 4)
    assert advantage.eq(0).all()
    close(found, [1.0] * 4, 1e-12)
    advantage, found = target([1.0])  # mean 0, deviation 1; its one ratio averages to 1
    close(advantage, [1.0])
    close(found, [1.0])
    close(target([1.0], threshold="median")[1], [1.2])  # as released: threshold 0


def test_groups_do_not_mix() -> None:
    score = torch.tensor([1.0, 0.0, 5.0, 7.0]).double()
    columns = {"valid": torch.ones(1, 4).double(), "episode_reward": score, "group": torch.tensor([3, 3, 1, 1])}
    data = BoundedGroupTarget(0.2, 0.2, 1e-4)(Data(columns, sequence=frozenset({"episode_reward", "group"})))
    close(data["ratio_target"], [1.2, 0.8, 0.8, 1.2])


def test_asymmetric_bounds_quantile_and_cross_entropy_elite() -> None:
    graded = [float(i) for i in range(10)]
    close(target(graded, 1.0, 4.0)[1], [0.0] * 8 + [5.0] * 2)
    # 6 lies on the threshold and gets what is left of 10: 10 - 6 * 0.5 - 3 * 2 = 1
    close(target(graded, 0.5, 1.0)[1], [0.5] * 6 + [1.0] + [2.0] * 3)


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "sign", "expected"),
    [(0.6, 1, -0.6), (0.6, -1, -0.6), (0.75, -1, 0.75), (1.25, 1, -1.25), (1.4, 1, 1.4), (1.4, -1, 1.4)],
)
def test_gradient_pulls_back_from_both_sides(rho: float, sign: int, expected: float) -> None:
    x = torch.tensor([[rho]], dtype=torch.float64).log().requires_grad_()
    level = LogRatio(x, torch.zeros_like(x), torch.ones_like(x))
    batch = Data({"valid": level.valid, "ratio_target": torch.tensor([1.0 + 0.3 * sign]).double()})
    bounded_regression(level, torch.full_like(x, float(sign)), {}, batch).sum().backward()
    assert x.grad is not None
    assert float(x.grad) == pytest.approx(expected)


def test_at_the_target_and_far_beyond_the_exponential_there_is_no_gradient() -> None:
    x = torch.tensor([[0.0, 800.0]], dtype=torch.float64).requires_grad_()
    level = LogRatio(x, torch.zeros_like(x), torch.ones_like(x))
    batch = Data({"valid": level.valid, "ratio_target": torch.ones(2).double()})
    loss = bounded_regression(level, torch.ones_like(x), {}, batch)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert x.grad is not None
    assert x.grad.eq(0).all()


def test_the_first_step_is_a_policy_gradient_step(recipe: Any, rollout: Any, value_and_gradient: Any) -> None:
    made, data = prepared(recipe, rollout)
    batch = data.epoch(Batching("sequence", "full"), None)[0]
    _, gradient = value_and_gradient(made, OLD, batch)
    torch.testing.assert_close(gradient, -(data["advantage"] / 9.0).t())


def test_value_on_the_canonical_batch_and_its_invariances(recipe: Any, rollout: Any, value_and_gradient: Any) -> None:
    made, data = prepared(recipe, rollout)
    batch = data.epoch(Batching("sequence", "full"), None)[0]
    value, gradient = value_and_gradient(made, LOG_PROB, batch)
    ratio = (torch.tensor(LOG_PROB) - torch.tensor(OLD)).double().exp()
    goal = torch.tensor([1.2, 0.8, 0.8, 1.2]).double().unsqueeze(1)
    weight = 0.5 / (1 / 3**0.5 + 1e-6)
    expected = (ratio - goal).abs() * weight * torch.tensor(MASK)
    assert value == pytest.approx(float(expected.sum() / 9), abs=1e-7)
    numeric = torch.zeros(4, 3).double()
    for i in range(4):
        for t in range(3):
            bump = torch.zeros(4, 3).double()
            bump[i, t] = 1e-6
            up = value_and_gradient(made, torch.tensor(LOG_PROB).double() + bump, batch)[0]
            down = value_and_gradient(made, torch.tensor(LOG_PROB).double() - bump, batch)[0]
            numeric[i, t] = (up - down) / 2e-6
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)
    order = torch.tensor([2, 0, 3, 1])  # permuted, and two padded columns of garbage
    index = torch.cat([order, order[:2]])
    more = data.take(index)
    log_prob = torch.tensor(LOG_PROB).double()[index]
    log_prob[4:] = -torch.inf
    padded = dict(more) | {"valid": more["valid"] * torch.tensor([1, 1, 1, 1, 0, 0])}
    again = Data(padded, sequence=more.sequence).epoch(Batching("sequence", "full"), None)[0]
    other, moved = value_and_gradient(made, log_prob, again)
    assert other == pytest.approx(value)
    torch.testing.assert_close(moved[:4], gradient[order])
    assert moved[4:].eq(0).all()


def test_microbatches_add_up(recipe: Any, rollout: Any, value_and_gradient: Any) -> None:
    made, data = prepared(recipe, rollout)
    batch = data.epoch(Batching("sequence", "full"), None)[0]
    whole, _ = value_and_gradient(made, LOG_PROB, batch)
    log_prob = torch.tensor(LOG_PROB).double()
    pieces = [value_and_gradient(made, log_prob[i : i + 2], p)[0] for i, p in zip((0, 2), batch.microbatches(2))]
    assert sum(pieces) == pytest.approx(whole)


# -- config, learning, resume -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"clip_low": 0.0}, {"clip_high": 0.0}, {"target_temperature": 0.0}, {"threshold": "mean"}, {"clip_low": 1.5}],
)
def test_bad_config(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        GBPOConfig(**options)


SMALL = {"model": "tabular", "n_prompts": 8, "group_size": 8, "n_epochs": 4, "learning_rate": 0.1}


def test_it_learns() -> None:
    agent = GBPO("easy_hard", GBPO.Settings(**SMALL), env_kwargs={"questions": 4, "symbols": 5, "easy": 2})
    before = agent.pass_at([1], questions=4, samples=64)["pass@1"]
    agent.learn(until=40 * agent.samples_per_iteration)
    assert before < 0.5
    assert agent.pass_at([1], questions=4, samples=64)["pass@1"] > 0.85


def test_exact_resume(resumes: Any, tmp_path: Path) -> None:
    resumes(GBPO, "easy_hard", GBPO.Settings(**SMALL, batch_size=16), tmp_path / "a.pt")


# -- contract -----------------------------------------------------------------------------------------------------


class TestGBPOContract(RecipeContract):
    method = GBPO
    published = {
        "target_temperature": 0.0001,
        "threshold": "quantile",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregate": "token_mean",
    }
    matters = (
        ({}, {"target_temperature": 1.0}),
        ({"clip_high": 0.4}, {"clip_high": 0.4, "threshold": "median"}),
    )
    refused = {"verl": "reads the columns ['ratio_target']"}
