"""PF-PPO: ranks and their weights, what is drawn, the choice of a filter, and limits in which it is PPO."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from agents.llm.pf_ppo import (
    FILTERS,
    PFPPO,
    Filter,
    PFPPOConfig,
    Ranked,
    batch_weights,
    draw,
    rank_weights,
    reliability,
    subset,
)
from agents.llm.reinforce import PPO, PPOConfig
from ccrl.data import Data
from ccrl.estimators.evaluate import loss_of
from ccrl.testing.recipe_contract import RecipeContract

RANKS: tuple[Filter, ...] = ("none", "best", "best_random", "best_worst")


def double(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weights(kind: Filter, reward: Sequence[float], group: Sequence[int] | None = None, **options: Any) -> list[float]:
    x = double(reward)
    label = torch.zeros(len(reward), dtype=torch.int64) if group is None else torch.tensor(group)
    found: list[float] = rank_weights(Ranked(x, label), kind, x, **options).tolist()
    return found


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_of_five() -> None:
    reward = [0.1, 0.9, -0.3, 0.5, 0.0]  # ranks 2, 0, 4, 1, 3
    assert weights("best", reward) == [0, 1, 0, 0, 0]
    assert weights("best_random", reward) == [0.125, 0.5, 0.125, 0.125, 0.125]
    assert weights("best_worst", reward) == [0, 0.5, 0.5, 0, 0]
    assert weights("none", reward) == [0.2] * 5
    # squares 0.01, 0.81, 0.09, 0.25, 0 of 1.16
    assert weights("power", reward) == pytest.approx([0.01 / 1.16, 0.81 / 1.16, 0.09 / 1.16, 0.25 / 1.16, 0], abs=1e-7)
    assert weights("power", reward, power=1.0)[1] == pytest.approx(0.9 / 1.8, abs=1e-7)


def test_released_constants_are_those_of_five() -> None:
    """0.4 for the best, 0.1 for each other: 0.4 / 0.8 = 1/2 of five, 0.4 / 1.1 of eight."""
    five = batch_weights(double([0.1, 0.9, -0.3, 0.5, 0.0]), "best_random")
    torch.testing.assert_close(five, double([0.125, 0.5, 0.125, 0.125, 0.125]), atol=1e-7, rtol=0)
    eight = batch_weights(torch.arange(8.0), "best_random")
    assert float(eight[-1]) == pytest.approx(0.4 / 1.1, abs=1e-6)
    assert weights("best_random", range(8))[-1] == 0.5


def test_the_released_filter_keeps_two_of_a_whole_rollout() -> None:
    reward = torch.arange(12.0)
    drawn = torch.multinomial(
        batch_weights(reward, "best_worst"), 12, replacement=True, generator=Generator().manual_seed(0)
    )
    assert set(drawn.tolist()) == {0, 11}


def test_ties_small_groups_and_several_prompts() -> None:
    # the first of equals is the best, the last the worst
    assert weights("best", [1.0, 1.0, 1.0]) == [1, 0, 0]
    assert weights("best_worst", [1.0, 1.0, 1.0]) == [0.5, 0, 0.5]
    for kind in FILTERS:
        assert weights(kind, [0.7]) == [1.0]
    assert weights("best_random", [0.2, 0.7]) == weights("best_worst", [0.2, 0.7]) == [0.5, 0.5]
    # prompts 5 and 2, in any order
    assert weights("best_worst", [1.0, 9.0, 2.0, 8.0, 3.0], [5, 2, 5, 2, 5]) == [0.5, 0.5, 0, 0.5, 0.5]


def test_ranks_ignore_increasing_transforms_and_powers_do_not() -> None:
    generator = Generator().manual_seed(0)
    reward = torch.rand(20, generator=generator, dtype=torch.float64) - 0.5
    group = torch.arange(20) // 5
    for change in (torch.exp, torch.tanh, lambda x: x**3 + 7.0):
        for kind in RANKS:
            one, other = (rank_weights(Ranked(x, group), kind, x) for x in (reward, change(reward)))
            assert torch.equal(one, other)
    one, other = (rank_weights(Ranked(x, group), "power", x) for x in (reward, reward + 7.0))
    assert float((one - other).abs().max()) > 0.05


# -- draws ------------------------------------------------------------------------------------------------------------


def test_as_many_are_drawn_of_every_prompt_as_there_are() -> None:
    reward, group = torch.rand(9, generator=Generator().manual_seed(1)), torch.tensor([3, 0, 0, 3, 3, 0, 0, 0, 7])
    ranked = Ranked(reward, group)
    for kind in FILTERS:
        columns = draw(ranked, rank_weights(ranked, kind, reward), Generator().manual_seed(2))
        assert torch.bincount(group[columns], minlength=8).tolist() == torch.bincount(group, minlength=8).tolist()
    best = draw(ranked, rank_weights(ranked, "best"), None)
    assert set(best.tolist()) == {int(reward.where(group == g, torch.tensor(-1.0)).argmax()) for g in (0, 3, 7)}


def test_frequencies_are_the_weights() -> None:
    reward = double([0.1, 0.9, -0.3, 0.5, 0.0]).repeat(4000)
    ranked = Ranked(reward, torch.arange(20_000) // 5)
    for kind in FILTERS:
        weight = rank_weights(ranked, kind, reward)
        found = torch.bincount(draw(ranked, weight, Generator().manual_seed(3)) % 5, minlength=5) / 20_000
        # three deviations of sqrt(w (1 - w) / 20000) are 0.011 at most
        torch.testing.assert_close(found.double(), weight[:5], atol=0.011, rtol=0)


@pytest.mark.parametrize("kind", RANKS)
def test_subsets(kind: Filter) -> None:
    reward = double([0.1, 0.9, -0.3, 0.5, 0.0, 0.4, 0.2])
    ranked = Ranked(reward, torch.tensor([0, 0, 0, 0, 0, 1, 2]))  # the last two prompts have one completion
    seen = set()
    for seed in range(60):
        columns = subset(ranked, kind, Generator().manual_seed(seed)).tolist()
        assert columns == sorted(set(columns))
        assert columns[-2:] == [5, 6]
        seen.add(tuple(columns[:-2]))
    expected = {"none": {(0, 1, 2, 3, 4)}, "best": {(1,)}, "best_worst": {(1, 2)}}
    assert seen == expected.get(kind, {(0, 1), (1, 2), (1, 3), (1, 4)})


def test_the_best_of_several() -> None:
    """Three draws from p = (0.2, 0.5, 0.3) with rewards by arm: the top arm is kept with 1 - (1 - 0.2)^3, exactly."""
    p, total = (0.2, 0.5, 0.3), 0.0
    for arms in itertools.product(range(3), repeat=3):
        kept = weights("best", [(2.0, 1.0, 0.0)[a] for a in arms])
        total += p[arms[0]] * p[arms[1]] * p[arms[2]] * sum(w for a, w in zip(arms, kept) if a == 0)
    assert total == pytest.approx(1.0 - 0.8**3, abs=1e-12)


# -- which filter -----------------------------------------------------------------------------------------------------


def test_r_squared_by_hand() -> None:
    """Covariance 0.26 (sum 1.3), variances 0.5 and 0.1416: 0.0676 / 0.0708 = 0.9548022599."""
    found = reliability(double([-1, -0.5, 0, 0.5, 1]), double([0, 0.1, 0.6, 0.7, 1]), torch.zeros(5))
    assert found["none"] == pytest.approx(0.9548022599, abs=5e-11)
    # of the two extremes a line explains all
    assert found["best_worst"] == pytest.approx(1.0)


def test_r_squared_of_filters_and_bins() -> None:
    """Rewards that are right where they are large: the extremes are explained best, and means of bins better still."""
    generator = Generator().manual_seed(0)
    quality = 2.0 * torch.rand(2000, generator=generator, dtype=torch.float64) - 1.0
    noise = torch.randn(2000, generator=generator, dtype=torch.float64) * 0.8 * (1.0 - quality.abs())
    group = torch.arange(2000) // 5
    found = reliability(quality + noise, quality, group)
    assert found["best"] < found["best_random"] < found["best_worst"]
    assert found["none"] < found["best_worst"]
    binned = reliability(quality + noise, quality, group, bins=10)
    assert found["none"] < binned["none"] <= 1.0
    with pytest.raises(ValueError, match="bins: expected 0 or at least 2, got 1"):
        reliability(quality, quality, group, bins=1)


# -- recipe -----------------------------------------------------------------------------------------------------------


def given(count: int = 8, size: int = 4) -> dict[str, Any]:
    generator = Generator().manual_seed(5)
    old = -1.0 - torch.rand(3, count, generator=generator, dtype=torch.float64)
    return {
        "log_prob": old + 0.3 * torch.randn(3, count, generator=generator, dtype=torch.float64), "old_log_prob": old,
        "mask": torch.arange(3)[:, None] < torch.tensor([3, 1, 2, 3] * (count // 4)),
        "reward": torch.rand(count, generator=generator, dtype=torch.float64), "group": torch.arange(count) // size,
    }  # fmt: skip


def test_without_a_filter_it_is_ppo() -> None:
    ours = loss_of(PFPPO, PFPPOConfig(filter="none", sampling="subset"), **given())
    theirs = loss_of(PPO, PPOConfig(), **given())
    assert ours.loss == theirs.loss != 0.0
    assert torch.equal(ours.gradient, theirs.gradient)
    # pairs: best and random, best and worst are both completions
    for kind in ("best_random", "best_worst"):
        pair = loss_of(PFPPO, PFPPOConfig(filter=kind, sampling="subset"), **given(size=2))
        assert torch.equal(pair.gradient, loss_of(PPO, PPOConfig(), **given(size=2)).gradient)


@pytest.mark.parametrize("kind", ["best_random", "best_worst"])
def test_pairs_with_replacement_are_a_bootstrap(kind: Filter) -> None:
    """Advantages as they are: the mean gradient over many draws is that of both."""
    rows = given(size=2)
    config = PFPPOConfig(filter=kind, whiten=False, aggregate="sequence_mean")
    drawn = torch.stack([loss_of(PFPPO, config, **rows, seed=seed).gradient for seed in range(200)])
    whole = loss_of(PPO, PPOConfig(whiten=False, aggregate="sequence_mean"), **rows).gradient
    error = drawn.std(0) / 200**0.5
    assert bool(((drawn.mean(0) - whole).abs() <= 4.0 * error + 1e-12).all())
    assert float(error.max()) > 1e-3


def test_advantages_are_of_all_and_standardised_of_what_is_left(recipe: Any, rollout: Any) -> None:
    """Rewards 4, 1, 1, 0 of mean 1.5 leave 2.5 and -1.5: standardised (two tokens) they are +-1 / sqrt 2."""
    reward = double([4.0, 1.0, 1.0, 0.0])
    data: Data = rollout([[-1.0]] * 4, [[1.0]] * 4, episode_reward=reward, reward=reward[:, None],
                         carry=torch.zeros(4, 1))  # fmt: skip
    made = recipe(PFPPO.Recipe, PFPPOConfig(filter="best_worst", sampling="subset"))
    context: Any = type("Context", (), {"generator": Generator().manual_seed(0)})()
    found = made.prepare({"on": data}, context)
    assert found["sampled"]["advantage"][0].tolist() == [2.5, -0.5, -0.5, -1.5]
    assert found["on"]["advantage"][0].tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])
    stats: dict[str, Tensor] = {}
    made.after_update(found, stats, context)
    assert float(stats["filtered_share"]) == 0.5
    assert float(stats["filtered_reward"]) == 2.0


def test_learns() -> None:
    agent = PFPPO("sequence_match", env_kwargs={"questions": 4, "fixed_length": 2, "symbols": 4}, n_prompts=16,
                  model="tabular", learning_rate=0.05, seed=0)  # fmt: skip
    agent.learn(until=30 * agent.samples_per_iteration)
    assert agent.pass_at([1], questions=4, samples=64)["episode_reward"] > 0.9
    assert 0.2 < float(agent.scalars["train/filtered_share"]) < 0.9


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"power": 3.0}, r"power: expected 2\.0 \(filter='best_random' does not read it\)"),
        ({"filter": "power", "sampling": "subset"}, "sampling: expected 'replace' with filter='power'"),
        ({"scope": "batch", "sampling": "subset"}, "scope='batch'"),
        ({"filter": "worst"}, "filter"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PFPPOConfig(**settings)


class TestPFPPOContract(RecipeContract):
    method = PFPPO
    published = {
        "group_size": 5,
        "n_epochs": 3,
        "filter": "best_random",
        "power": 2.0,
        "sampling": "replace",
        "scope": "prompt",
        "baseline": "group",
        "whiten": True,
        "dual_clip": 0.0,
    }
    matters = (
        ({}, {"filter": "best_worst"}),
        ({}, {"filter": "power"}),
        ({"filter": "power"}, {"filter": "power", "power": 0.5}),
        ({}, {"sampling": "subset"}),
        ({"filter": "best_worst"}, {"filter": "best_worst", "scope": "batch"}),
    )
    refused = {
        "trl": "trains on a selection of the completions or repeats some",
        "verl": "trains on a selection of the completions or repeats some",
    }
    hosted = {name: {"filter": "none", "sampling": "subset"} for name in ("trl", "verl")}
