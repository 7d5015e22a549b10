"""Knapsack RL: the history of a prompt, how a budget is divided, and groups of any size in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.grouped import Grouped
from agents.llm.baselines import GRPO
from agents.llm.knapsack_rl import KnapsackRL, KnapsackRLConfig, SuccessStats, divide, needed
from ccrl.estimators.evaluate import loss_of
from ccrl.llm.budget import gradient_value
from ccrl.testing.recipe_contract import RaggedTask, RecipeContract

UNIFORM = {"min_rollouts": 4, "max_rollouts": 4, "unsolved_rollouts": 4, "solved_rollouts": 4, "group_size": 4}


def double(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def divided(rates: Sequence[float], unknown: Sequence[int] = (), **settings: Any) -> list[int]:
    known = torch.ones(len(rates), dtype=torch.bool)
    known[list(unknown)] = False
    counts: list[int] = divide(KnapsackRLConfig(**settings), known, double(rates)).tolist()
    return counts


# -- history ----------------------------------------------------------------------------------------------------------


def test_an_estimate_needs_enough_outcomes() -> None:
    history = SuccessStats(size=16, needed=8)
    assert history.state(7) == (False, 0.0, 0)
    history.update(7, [1.0, 0.0, -1.0, 0.5])  # what is less than 1 is no success
    assert history.state(7) == (False, 0.25, 4)
    history.update(7, [1.0] * 4)
    assert history.state(7) == (True, 5 / 8, 8)
    assert history.state(8) == (False, 0.0, 0)


def test_short_visits_look_back_and_long_ones_do_not() -> None:
    history = SuccessStats(size=16, needed=8)
    history.update(0, [1.0] * 12)
    history.update(0, [0.0] * 8)  # the latest 16: 8 successes and 8 failures
    assert history.state(0) == (True, 0.5, 20)
    history.update(0, [1.0] * 5 + [0.0] * 15)  # a visit of 16 and more stands alone
    assert history.state(0) == (True, 0.25, 40)
    history.update(0, [])
    assert history.state(0) == (True, 0.25, 40)


def test_the_history_is_in_checkpoints() -> None:
    history, other = SuccessStats(4, 2), SuccessStats(4, 2)
    history.update(5, [1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    history.update(-2, [0.0])
    other.load_state_dict(history.state_dict())
    for each in (history, other):
        each.update(5, [0.0])  # the latest four: 1, 1, 1, 0
        each.update(-2, [1.0])
        assert each.state(5) == (True, 0.75, 7)
        assert each.state(-2) == (True, 0.5, 2)
    empty = SuccessStats(4, 2)
    empty.load_state_dict(SuccessStats(4, 2).state_dict())
    assert empty.state(5) == (False, 0.0, 0)


# -- division ---------------------------------------------------------------------------------------------------------


def test_completions_that_a_prompt_has_use_for() -> None:
    p = double([0.5, 0.1, 0.01])
    torch.testing.assert_close(needed(p, "expectation"), double([3.0, 10.1111, 100.0101]), atol=5e-5, rtol=0)
    # ln 0.1 / ln 0.5, ln 0.1 / ln 0.9, ln 0.1 / ln 0.99
    torch.testing.assert_close(needed(p), double([3.3219, 21.854, 229.105]), atol=5e-4, rtol=0)
    torch.testing.assert_close(needed(1.0 - p), needed(p))


def test_without_history_every_prompt_gets_as_many() -> None:
    assert divided([0.0, 0.3, 1.0], unknown=[0, 1, 2]) == [8, 8, 8]


def test_prompts_that_nothing_can_be_learned_from() -> None:
    assert divided([1.0, 1.0, 0.0], unknown=[2]) == [8, 8, 8]  # nobody to give to: uniform
    # two minima of 2 and 8 of the unknown one: the other 12 of 24 go to the unsolved one
    assert divided([1.0, 0.0, 0.0], unknown=[2]) == [2, 14, 8]
    assert divided([0.0, 0.0, 1.0]) == [11, 11, 2]


def test_the_knapsack_of_four_prompts() -> None:
    rates = [0.1, 0.3, 0.5, 0.9]
    # nobody else is there: what they do not need stays with them
    assert divided(rates, group_size=4, max_rollouts=8) == [3, 6, 5, 2]
    assert divided(rates, group_size=8, max_rollouts=16) == [14, 9, 7, 2]


def test_what_nobody_needs_goes_to_the_unsolved() -> None:
    # 16: minima of 2 and 2; a prompt solved half the time needs ln 0.1 / ln 0.5 = 3 more; 9 are left
    assert divided([0.5, 0.0]) == [5, 11]
    # with expectation it needs 1 / 0.25 - 1 = 3 as well
    assert divided([0.5, 0.0], cost="expectation") == [5, 11]
    # nobody is unsolved: to the solved ones and those without history; 9 = 24 - 2 - 2 - 8 - 3 are 5 and 4
    assert divided([0.5, 1.0, 1.0], unknown=[2]) == [5, 7, 12]
    # a bound of 9: two of the eleven come back to the prompt that is solved sometimes
    assert divided([0.5, 0.0], max_rollouts=9) == [7, 9]


def test_the_released_objective_is_worth_less() -> None:
    rates = [0.1, 0.3, 0.5, 0.9]
    counts = divided(rates, group_size=8, max_rollouts=16, objective="released")
    assert counts == [14, 9, 6, 3]
    value = float(gradient_value(double(counts), double(rates)).sum())
    assert value == pytest.approx(0.32706, abs=5e-6)
    assert value < 0.328201799


def test_equal_rates_and_tight_bounds_are_uniform() -> None:
    assert divided([0.3] * 6) == [8] * 6
    assert max(counts := divided([0.3, 0.3, 0.3, 0.3, 0.9])) - min(counts[:4]) <= 1
    generator = torch.Generator().manual_seed(0)
    rates = torch.rand(9, generator=generator, dtype=torch.float64).round(decimals=1).tolist()
    assert divided([*rates, 0.0, 1.0], unknown=[3], **UNIFORM) == [4] * 11


def test_every_budget_is_spent_within_its_bounds() -> None:
    generator = torch.Generator().manual_seed(1)
    for case in range(200):
        count = 1 + case % 12
        rates = (torch.rand(count, generator=generator, dtype=torch.float64) * 1.6 - 0.3).clamp(0, 1)
        known = torch.rand(count, generator=generator) < 0.8
        high = (8, 9, 20, 128)[case % 4]
        c = KnapsackRLConfig(max_rollouts=high, cost=("probability", "expectation")[case % 2])
        counts = divide(c, known, rates)
        assert int(counts.sum()) == 8 * count
        assert int(counts.max()) <= high
        assert int(counts.min()) >= 2
        assert counts.dtype == torch.int64


# -- groups of any size -----------------------------------------------------------------------------------------------


def shaped(sizes: Sequence[int], lengths: Sequence[int]) -> dict[str, Any]:
    """Old and new log-probabilities, mask and group labels of completions of these lengths."""
    generator = torch.Generator().manual_seed(2)
    steps, count = max(lengths), len(lengths)
    old = -1.0 - torch.rand(steps, count, generator=generator, dtype=torch.float64)
    mask = (torch.arange(steps)[:, None] < torch.tensor(lengths)).double()
    return {
        "log_prob": old.clone(), "old_log_prob": old, "mask": mask,
        "group": torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
    }  # fmt: skip


def test_advantages_of_ragged_groups() -> None:
    """Of three: mean 1/3, sample deviation sqrt(1/3). A group of one and one of equal rewards have none."""
    found = loss_of(KnapsackRL, None, **shaped([3, 1, 2], [1] * 6), reward=torch.tensor([1.0, 0, 0, 1, 1, 1]))
    assert found.advantage is not None
    std = (1 / 3) ** 0.5 + 1e-6
    expected = double([2 / 3 / std, -1 / 3 / std, -1 / 3 / std, 0, 0, 0])
    torch.testing.assert_close(found.advantage[0], expected)


def test_a_lone_success_among_many_is_cut() -> None:
    """One of 64: (63/64) / sqrt((63/64) / 63 ...) = 63 / sqrt(64) = 7.875, cut to 5."""
    reward = torch.zeros(64)
    reward[0] = 1.0
    given = shaped([64], [1] * 64)
    found = loss_of(KnapsackRL, None, **given, reward=reward).advantage
    wide = loss_of(KnapsackRL, KnapsackRLConfig(advantage_clip=100.0), **given, reward=reward).advantage
    assert found is not None
    assert wide is not None
    assert float(found[0, 0]) == 5.0
    assert float(wide[0, 0]) == pytest.approx(7.875, abs=1e-3)
    torch.testing.assert_close(found[:, 1:], wide[:, 1:])


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean_token_mean"])
def test_how_much_a_prompt_weighs(aggregate: Any) -> None:
    """On policy a sequence's gradient sums to -A times its weight: here those of the successes of each prompt."""
    sizes, lengths = [4, 2], [3, 1, 1, 1, 2, 2]
    given = shaped(sizes, lengths) | {"reward": torch.tensor([1.0, 0, 0, 0, 1, 0])}
    for weight in ("rollouts", "equal"):
        found = loss_of(KnapsackRL, KnapsackRLConfig(prompt_weight=weight, aggregate=aggregate), **given)
        assert found.advantage is not None
        share = -(found.gradient / torch.where(found.advantage == 0, 1.0, found.advantage)).sum(0)
        per_prompt = [float(share[:4].sum()), float(share[4:].sum())]
        if weight == "equal":
            assert per_prompt == pytest.approx([0.5, 0.5])
        elif aggregate == "token_mean":  # tokens: 6 and 4 of 10
            assert per_prompt == pytest.approx([0.6, 0.4])
        else:  # completions: 4 and 2 of 6
            assert per_prompt == pytest.approx([4 / 6, 2 / 6])


def test_tight_bounds_are_grpo() -> None:
    """The same completions and the same parameters, update after update."""
    shared = {"group_size": 4, "n_prompts": 6, "clip_high": 0.28, "aggregate": "token_mean", "model": "tabular",
              "learning_rate": 0.05, "batch_size": 0}  # fmt: skip
    ours = KnapsackRL("modsum", seed=2, **shared | UNIFORM)
    theirs = GRPO("modsum", seed=2, **shared)
    for agent in (ours, theirs):
        agent.learn(until=5 * 24)
    assert torch.equal(ours.policy.logits, theirs.policy.logits)
    assert float(ours.policy.logits.detach().abs().max()) > 0.05


# -- life cycle -------------------------------------------------------------------------------------------------------


def test_the_division_is_what_is_sampled() -> None:
    """Questions always, sometimes and never solved: minima of 2, 3 more for the second, the other 15 for the third."""
    agent = KnapsackRL(RaggedTask(), seed=0, n_prompts=3, group_size=8, model="tabular")
    history = agent.estimator.history
    for question, outcomes in enumerate(([1.0] * 8, [1.0, 0.0] * 4, [0.0] * 8)):
        history.update(question, outcomes)
    agent.ctx.prompts = agent.collector.draw(3)
    (request,) = agent.estimator.plan({}, {}, agent.ctx)
    assert request.prompts is agent.ctx.prompts
    data = agent.collector.collect(request, agent.policy)
    assert torch.bincount(data["group"]).tolist() == [2, 5, 17]
    assert torch.bincount(data["index"]).tolist() == [2, 5, 17]
    assert agent.estimator.plan({}, {"on": data}, agent.ctx) == []


def test_the_history_is_of_questions() -> None:
    agent = KnapsackRL(RaggedTask(), seed=0, n_prompts=4, group_size=4, model="tabular", learning_rate=1e-9)
    agent.learn(until=2 * 16)
    # the fourth prompt is the first question again
    assert [agent.estimator.history.state(q)[2] for q in (0, 1, 2, 3)] == [16, 8, 8, 0]
    agent.learn(until=3 * 16)
    assert sum(agent.estimator.history.state(q)[2] for q in (0, 1, 2)) == 48


def test_what_is_logged() -> None:
    agent = KnapsackRL("modsum", seed=0, env_kwargs={"questions": 3, "fixed_length": 1, "symbols": 3},
                       n_prompts=3, group_size=8, model="tabular", learning_rate=1e-3)  # fmt: skip
    agent.learn(until=24)
    assert "train/rate_error" not in agent.scalars  # nothing was known
    assert float(agent.scalars["train/largest_budget"]) == float(agent.scalars["train/median_budget"]) == 8.0
    agent.learn(until=6 * 24)
    assert 0.0 <= float(agent.scalars["train/rate_error"]) < 0.6
    assert 0.0 < float(agent.scalars["train/effective_share"]) <= 1.0
    assert float(agent.scalars["train/unsolved_share"]) < 1.0


def test_needs_prompts_that_come_again() -> None:
    with pytest.raises(ValueError, match=r"does not fit control tasks.*starts of control episodes do not"):
        Grouped("CartPole-v1", method="knapsack_rl")
    recipe = KnapsackRL(RaggedTask(), n_prompts=3, group_size=4, model="tabular").estimator
    with pytest.raises(ValueError, match=r"none in ctx\.prompts"):
        recipe.plan({}, {}, SimpleNamespace(prompts=None))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"group_size": 1}, "group_size: expected at least min_rollouts"),
        ({"min_rollouts": 9}, "at least min_rollouts.*got 8 with 9, 2, 2 and 128"),
        ({"solved_rollouts": 9}, "solved_rollouts"),
        ({"max_rollouts": 7}, "at most max_rollouts"),
        ({"cost_confidence": 1.0}, "cost_confidence"),
        ({"advantage_clip": 0.0}, "advantage_clip"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        KnapsackRLConfig(**settings)


class TestKnapsackRLContract(RecipeContract):
    method = KnapsackRL
    published = {
        "group_size": 8,
        "batch_size": 256,
        "n_prompts": 256,
        "clip_high": 0.28,
        "aggregate": "token_mean",
        "min_rollouts": 2,
        "max_rollouts": 128,
        "unsolved_rollouts": 2,
        "solved_rollouts": 2,
        "history_size": 16,
        "history_needed": 8,
        "cost": "probability",
        "cost_confidence": 0.9,
        "objective": "paper",
        "prompt_weight": "rollouts",
        "advantage_clip": 5.0,
    }
    matters = (({}, {"prompt_weight": "equal"}), ({}, {"advantage_clip": 0.5}))
    refused = {"trl": "prompts that it sees first", "verl": "prompts that it sees first"}
