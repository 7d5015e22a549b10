"""ADORA: which prompts are advantageous, weights by hand, what they leave alone, learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm.adora import ADORA, ADORAConfig, ADORARecipe, Utility, advantaged
from agents.llm.baselines import GRPOConfig
from ccrl.data import Data
from ccrl.estimators import aggregates
from ccrl.estimators.evaluate import loss_of
from ccrl.estimators.recipe import Recipe
from ccrl.estimators.stages import GroupBaseline
from ccrl.testing.recipe_contract import RecipeContract

ATTENUATE: dict[str, Any] = {"criterion": "length", "advantaged_weight": 1.0, "other_weight": 0.1}


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weighted(reward: Any, length: Any, group: Any = None, cap: int = 4094, **options: Any) -> Data:
    """One token per completion, whose mask holds the length: the stage reads sums of masks."""
    reward = doubles(*reward)
    group = torch.zeros(len(reward), dtype=torch.int64) if group is None else torch.tensor(group)
    data = Data({"episode_reward": reward, "group": group, "valid": doubles(*length)[None]},
                sequence=frozenset({"episode_reward", "group"}))  # fmt: skip
    data = data.derive(advantage=GroupBaseline(scale="std").advantages(reward, group)[None])
    return Utility(ADORAConfig(**options), cap)(data)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        # longest success 350, failures (300 + 500) / 2 = 400: 350 > 400 is false
        ((200, 300, 500, 350), 0.0866),
        # failures (300 + 100) / 2 = 200: 350 > 200
        ((200, 300, 100, 350), 0.8660),
        # 4096 is beyond the cap, so failures 300; longest success 250
        ((200, 300, 4096, 250), 0.0866),
    ],
)
def test_attenuation_by_length(length: Any, expected: float) -> None:
    found = weighted((1, 0, 0, 1), length, **ATTENUATE)["advantage"]
    torch.testing.assert_close(found, expected * doubles(1, -1, -1, 1)[None], atol=5e-5, rtol=0)


def test_scores_of_several_levels() -> None:
    """Failures (400 + 380 + 420) / 3 = 400, longest success 120. Mean 0.4, sample deviation 2.3822: 2.6 / 2.3822 / 10
    = 0.1091, -1.4 / 2.3822 / 10 = -0.0588, -1.9 / 2.3822 / 10 = -0.0798."""
    found = weighted(
        (3, -1, -1.5, -1.5, 3), (120, 400, 380, 420, 90), correct_above=1.01, failure_cap=3900, **ATTENUATE
    )
    expected = doubles(0.1091, -0.0588, -0.0798, -0.0798, 0.1091)[None]
    torch.testing.assert_close(found["advantage"], expected, atol=5e-5, rtol=0)


def test_equal_weights_are_the_base_bit_for_bit() -> None:
    reward, group = doubles(3, -1, 0.5, 1, 0, 0, 1, 1), torch.arange(8) // 4
    base = GroupBaseline(scale="std").advantages(reward, group)[None]
    found = weighted(reward, range(1, 9), group.tolist(), advantaged_weight=1.0, other_weight=1.0)
    assert torch.equal(found["advantage"], base)


def test_a_tie_is_no_advantage() -> None:
    """Longest success 300 and failures (200 + 400) / 2 = 300; one token more decides."""
    assert not weighted((1, 0, 0, 1), (300, 200, 400, 100), **ATTENUATE)["advantaged"].any()
    assert weighted((1, 0, 0, 1), (301, 200, 400, 100), **ATTENUATE)["advantaged"].all()


def test_the_weight_keeps_means_and_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    reward = (torch.rand(60, generator=generator) < 0.5).double()
    length = torch.randint(1, 99, (60,), generator=generator)
    group = torch.arange(60) % 12  # not contiguous
    base = GroupBaseline(scale="std").advantages(reward, group)
    found = weighted(reward, length, group.tolist())
    assert 0 < int(found["advantaged"].sum()) < 60
    torch.testing.assert_close(found["advantage"][0].sign(), base.sign())
    for label in range(12):
        assert float(found["advantage"][0, group == label].sum()) == pytest.approx(0.0, abs=1e-9)
        assert len(found["utility_weight"][group == label].unique()) == 1


@pytest.mark.parametrize(
    ("reward", "long", "weight"),
    [((1, 1, 0, 0), True, 2.0), ((1, 1, 1, 0), True, 1.0), ((1, 1, 0, 0), False, 1.0)],
)
def test_amplification_needs_length_and_difficulty(reward: Any, long: bool, weight: float) -> None:
    """Share of right ones 2/4 is at most 0.5, 3/4 is not."""
    length = [9 if (r == 1) == long else 3 for r in reward]
    assert weighted(reward, length)["utility_weight"].tolist() == [weight] * 4


@pytest.mark.parametrize(
    ("criterion", "found"),
    [
        ("both", [True, False, False, False]),
        ("either", [True, True, True, False]),
        ("length", [True, True, False, False]),
        ("difficulty", [True, False, True, False]),
    ],
)
def test_criteria(criterion: Any, found: list[bool]) -> None:
    """Groups that are long and hard, long, hard, neither."""
    right = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0]]).flatten() > 0
    length = torch.tensor([[9, 3, 3], [9, 9, 3], [3, 9, 9], [3, 3, 9]]).flatten()
    group = torch.arange(4).repeat_interleave(3)
    said, known = advantaged(right, length, group, criterion=criterion, cap=99)
    assert said[::3].tolist() == found
    assert known.all()


def test_the_share_of_right_ones_is_compared_as_counts() -> None:
    """3 of 5 is at most 0.6, whatever the rounding."""
    right = torch.tensor([True, True, True, False, False])
    for dtype in (torch.float32, torch.float64):
        said, _ = advantaged(right, torch.ones(5, dtype=dtype), torch.zeros(5), criterion="difficulty", tau=0.6, cap=9)
        assert said.all()


def test_scaled_lengths_change_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    reward = (torch.rand(40, generator=generator) < 0.4).double()
    length = torch.randint(1, 60, (40,), generator=generator)
    group = (torch.arange(40) // 5).tolist()
    found = weighted(reward, length, group, cap=50, **ATTENUATE)["advantage"]
    assert torch.equal(found, weighted(reward, 7 * length, group, cap=350, **ATTENUATE)["advantage"])


@pytest.mark.parametrize("reward", [(0.2, 0.1, 0.0, 0.3), (1, 1, 0.9, 1)])
def test_groups_of_one_kind_keep_their_advantages(reward: Any) -> None:
    """No success, or no failure: the length says nothing. With partial credit the advantages are not 0."""
    base = GroupBaseline(scale="std").advantages(doubles(*reward), torch.zeros(4))
    for options in (ATTENUATE, {}, {"criterion": "either"}):
        found = weighted(reward, (9, 3, 5, 7), **options)
        assert torch.equal(found["advantage"][0], base)
        assert not found["advantaged"].any()


def test_failures_beyond_the_cap_alone_say_nothing() -> None:
    assert weighted((1, 0, 0, 1), (5, 9, 10, 6), cap=9, **ATTENUATE)["utility_weight"].tolist() == [1.0] * 4
    assert weighted((1, 0, 0, 1), (5, 8, 10, 6), cap=9, **ATTENUATE)["utility_weight"].tolist() == [0.1] * 4


def test_the_cap_is_that_of_completions_unless_given(recipe: Any) -> None:
    assert recipe(ADORARecipe, ADORAConfig())._prepared[-1].max_length == 8  # of the fixture's parts
    old, mask = torch.zeros(3, 4, dtype=torch.float64), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0.0]])
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0])  # lengths 1, 2, 3, 2: successes at most 2, failures 2 and 3
    config = ADORAConfig(kl_coef=0.0, **ATTENUATE)
    for length, weight in ((4, 0.1), (3, 0.1), (2, 1.0)):  # failures 2.5; 2 (a tie); none below the cap
        found = loss_of(ADORA, config, old, old, mask, reward, max_length=length).advantage
        assert found is not None
        assert float(found[0, 0]) == pytest.approx(weight * 0.8660, abs=5e-5)


def test_values_are_those_of_grpo_with_weighted_advantages(recipe: Any, rollout: Any) -> None:
    valid = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]])
    data = rollout(torch.zeros(4, 3), valid, episode_reward=doubles(1, 0, 0, 1))
    ours = recipe(ADORARecipe, ADORAConfig(kl_coef=0.0)).prepare({"on": data}, None)["on"]
    theirs = recipe(Recipe, GRPOConfig()).prepare({"on": data}, None)["on"]
    torch.testing.assert_close(ours["advantage"], 2.0 * theirs["advantage"])  # 3 > (1 + 2) / 2, and 2/4 <= 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.5}, "tau: expected a number in .0, 1., got 1.5"),
        ({"advantaged_weight": -1.0}, "advantaged_weight: expected >= 0, got -1.0"),
        ({"other_weight": 3.0}, "other_weight: expected at most advantaged_weight = 2.0 .*got 3.0"),
        ({"criterion": "all"}, "criterion: expected one of 'both', 'either', 'length', 'difficulty', got 'all'"),
        ({"correct_above": float("nan")}, "correct_above: expected .*got nan"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ADORAConfig(**options)


def test_learns_and_reports() -> None:
    options = {"model": "tabular", "n_prompts": 8, "group_size": 8, "n_epochs": 4, "learning_rate": 0.1}
    agent = ADORA("easy_hard", seed=0, env_kwargs={"questions": 4, "symbols": 5, "easy": 2}, criterion="difficulty",
                  **options)  # fmt: skip
    before = agent.pass_at([1], questions=4, samples=64)["pass@1"]
    agent.learn(until=agent.samples_per_iteration)
    assert 0.0 < float(agent.scalars["train/advantaged_share"]) <= 1.0
    agent.learn(until=25 * agent.samples_per_iteration)
    assert before < 0.5
    assert agent.pass_at([1], questions=4, samples=64)["pass@1"] > 0.9


# -- contract -----------------------------------------------------------------------------------------------------


class TestADORAContract(RecipeContract):
    method = ADORA
    published = {
        "group_size": 5,
        "criterion": "both",
        "advantaged_weight": 2.0,
        "other_weight": 1.0,
        "tau": 0.5,
        "correct_above": 0.5,
        "failure_cap": 0,
        "kl_coef": 0.001,
    }
    options = {"kl_coef": 0.0, "n_prompts": 9}
    on_policy = staticmethod(aggregates.mean)
    matters = (
        ({"criterion": "difficulty"}, {"criterion": "difficulty", "advantaged_weight": 3.0}),
        ({"criterion": "difficulty"}, {"criterion": "difficulty", "tau": 0.0}),
        ({"n_prompts": 30}, {"n_prompts": 30, "criterion": "difficulty"}),
        ({}, {"criterion": "either"}),
        ({"criterion": "difficulty"}, {"criterion": "difficulty", "correct_above": 1.2}),
        ({"criterion": "length"}, {"criterion": "length", "failure_cap": 3}),
        ({"tau": 0.0}, {"tau": 0.0, "other_weight": 0.5}),
    )
    refused = {"verl": "compares with a reference policy"}
    hosted = {"verl": {"kl_coef": 0.0}}
