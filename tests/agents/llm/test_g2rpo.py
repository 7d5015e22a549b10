"""G2RPO against the numbers of its equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents.llm.g2rpo import (
    G2RPO,
    Corridor,
    DropUnanimous,
    G2RPOConfig,
    G2RPORecipe,
    LengthReward,
    RankNormal,
    corridor,
    rank_normal,
    trapezoid,
)
from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators.groups import Groups
from ccrl.estimators.recipe import Parts
from ccrl.testing.recipe_contract import RecipeContract
from envs.text import make_task


def ranks(*rewards: float, tie: float = 1e-6) -> Tensor:
    reward = torch.tensor(rewards, dtype=torch.float64)
    return rank_normal(reward, Groups(torch.zeros(len(reward), dtype=torch.int64)), tie)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0, 0, 0, 0, 1], [-0.320388] * 4 + [1.281552]),
        ([0.1, 0.1, 0.1, 0.2, 1.0], [-0.601984] * 3 + [0.524401, 1.281552]),
        ([0, 0, 1, 1, 1], [-0.902976] * 2 + [0.601984] * 3),
        ([0.81, 0.81, 0.82, 0.82, 0.83], [-0.902976] * 2 + [0.262200] * 2 + [1.281552]),
        ([3, 1, 2, 4], [0.318639, -1.150349, -0.318639, 1.150349]),
        ([0, 1], [-0.674490, 0.674490]),
        ([1, 0, 0, 0, 0, 0, 0, 0], [1.534121] + [-0.219160] * 7),
        ([1, 1, 0, 0, 0, 0, 0, 0], [1.210634] * 2 + [-0.403545] * 6),
        ([1, 1, 1, 1, 0, 0, 0, 0], [0.766839] * 4 + [-0.766839] * 4),
        ([1, 1, 1, 1, 1, 1, 1, 0], [0.219160] * 7 + [-1.534121]),
    ],
)
def test_quantiles(rewards: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(ranks(*rewards), expected, atol=1e-6)


def test_equal_rewards_and_groups_of_one_are_exactly_zero() -> None:
    assert ranks(*[0.3] * 7).eq(0.0).all()
    assert ranks(5.0).tolist() == [0.0]


def test_symmetry_and_monotone_invariance() -> None:
    generator = torch.Generator().manual_seed(0)
    reward = torch.randint(0, 6, (9,), generator=generator).double()
    found = ranks(*reward.tolist())
    assert abs(float(found.sum())) < 1e-14
    torch.testing.assert_close(ranks(*(-reward).tolist()), -found)
    torch.testing.assert_close(ranks(*reward.exp().tolist()), found)
    order = torch.randperm(9, generator=generator)
    torch.testing.assert_close(ranks(*reward[order].tolist()), found[order])


@pytest.mark.parametrize(
    ("size", "square", "largest"),
    [
        (2, 0.454936, None), (4, 0.712417, None), (5, 0.766948, None), (8, 0.851051, 1.534121),
        (16, 0.923681, 1.862732), (64, 0.980312, None), (256, 0.994983, None),
    ],
)  # fmt: skip
def test_mean_square_and_maximum(size: int, square: float, largest: float | None) -> None:
    found = ranks(*range(size))
    assert float(found.square().mean()) == pytest.approx(square, abs=1e-6)
    assert largest is None or float(found.max()) == pytest.approx(largest, abs=1e-6)


def test_rewards_that_differ_by_rounding_are_tied() -> None:
    assert ranks(0.3, 0.1 + 0.2).eq(0.0).all()  # 0.30000000000000004
    assert ranks(0.3, 0.1 + 0.2, tie=0.0).abs().min() > 0.6


def test_groups_of_different_sizes_have_grids_of_their_own() -> None:
    label = torch.tensor([9, 4, 9, 4, 4, 9, 9])
    reward = torch.tensor([3.0, 0.0, 1.0, 0.0, 1.0, 2.0, 4.0])
    found = rank_normal(reward, Groups(label))
    np.testing.assert_allclose(found[label == 9], [0.318639, -1.150349, -0.318639, 1.150349], atol=1e-6)
    torch.testing.assert_close(found[label == 4], ranks(0.0, 0.0, 1.0))


def test_trapezoid() -> None:
    length = torch.tensor([99, 100, 200, 300, 450, 600, 601, 800, 1000, 1001], dtype=torch.float64)
    found = trapezoid(length, torch.tensor([100, 300, 600, 1000], dtype=torch.float64))
    np.testing.assert_allclose(found, [0, 0, 0.5, 1, 1, 1, 0.9975, 0.5, 0, 0])
    step = trapezoid(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 2.0, 3.0, 3.0]))
    assert step.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_the_hinge_and_its_gradient() -> None:
    entropy = torch.tensor([0.1, 0.5, 1.1], dtype=torch.float64, requires_grad=True)
    value = corridor(entropy, torch.tensor(0.2), torch.tensor(0.8))
    np.testing.assert_allclose(value.detach(), [0.1, 0.0, 0.3], atol=1e-7)
    (gradient,) = torch.autograd.grad(value.sum(), entropy)
    assert gradient.tolist() == [-1.0, 0.0, 1.0]


# -- stages -----------------------------------------------------------------------------------------------------------


def rollout(score: list[float], group: list[int], **columns: Any) -> Data:
    found = {"episode_reward": torch.tensor(score), "group": torch.tensor(group)} | columns
    valid = columns.get("valid", torch.ones(3, len(score)))
    return Data(found | {"valid": valid}, sequence=frozenset(found) - {"valid", "log_prob"})


def test_unanimous_groups_are_told_by_accuracy_alone() -> None:
    scores = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])  # accuracy, length
    data = RankNormal()(rollout(scores.sum(1).tolist(), [0, 0, 1, 1], reward_components=scores))
    assert data["advantage"][0, :2].abs().min() > 0.6
    found = DropUnanimous()(data)["advantage"]
    # two of four sequences are left: their mean is twice their share of the mean over four
    torch.testing.assert_close(found, data["advantage"] * torch.tensor([0.0, 0.0, 2.0, 2.0]))
    nothing = RankNormal()(rollout([1.0, 1.0], [0, 0], reward_components=torch.ones(2, 1)))
    assert DropUnanimous()(nothing)["advantage"].eq(0.0).all()


def test_a_token_mean_is_over_the_tokens_that_are_left() -> None:
    """Lengths 4, 4, 1, 1, of which the long group is unanimous: 2 of 10 tokens are left, so the others weigh 5 times as
    much in a mean over ten tokens; in a mean over four sequences it is twice."""
    valid = (torch.arange(4)[:, None] < torch.tensor([4, 4, 1, 1])).float()
    data = RankNormal()(rollout([1.0, 1.0, 1.0, 0.0], [0, 0, 1, 1], valid=valid))
    weight = 1.0 * torch.tensor([0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(DropUnanimous(tokens=True)(data)["advantage"], data["advantage"] * 5.0 * weight)
    torch.testing.assert_close(DropUnanimous()(data)["advantage"], data["advantage"] * 2.0 * weight)
    for aggregate in ("token_mean", "sequence_mean", "sequence_mean_token_mean"):
        config = G2RPOConfig(aggregate=aggregate)
        parts = Parts(nn.Identity(), None, Request(counts=torch.tensor([2, 2])), 4)  # type: ignore[arg-type]
        made = G2RPORecipe(config, parts)
        batch = made.prepare({"on": data}, None)["on"].epoch(Batching("sequence", "full"), None)[0]
        # the mean loss of the informative group alone, whatever there was beside it
        alone = made.prepare({"on": data.take(torch.tensor([2, 3]))}, None)["on"]
        alone = alone.epoch(Batching("sequence", "full"), None)[0]
        assert float(batch["advantage"].abs().sum()) > 0.0
        found = [
            float((made.aggregate()(b["valid"], b) * b["advantage"].abs()).sum()) for b in (batch, alone)
        ]  # fmt: skip
        assert found[0] == pytest.approx(found[1]), aggregate


def test_length_reward_by_kind() -> None:
    valid = (torch.arange(4)[:, None] < torch.tensor([1, 4, 1, 4])).float()
    data = rollout([1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1], valid=valid, kind=torch.tensor([0, 0, 1, 1]))
    bounds = ((0.0, 1.0, 2.0, 6.0), (1.0, 4.0, 8.0, 9.0))
    found = LengthReward(bounds, coef=0.5)(data)["shaped_episode_reward"]
    np.testing.assert_allclose(found, [1.5, 1.25, 0.0, 0.5])  # (6 - 4) / (6 - 2) = 0.5
    with pytest.raises(ValueError, match="each of 3 kinds, got 2"):
        LengthReward(bounds)(rollout([1.0], [0], kind=torch.tensor([2])))


def test_ranks_over_a_kind() -> None:
    data = rollout([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1])
    torch.testing.assert_close(RankNormal("kind")(data)["advantage"][0].double(), ranks(1.0, 2.0, 3.0, 4.0))
    apart = rollout([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1], kind=torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(RankNormal("kind")(apart)["advantage"][0].double(), ranks(1.0, 2.0).repeat(2))


@pytest.mark.parametrize("estimate", ["full", "sampled"])
@pytest.mark.parametrize("bounds", [(0.5, 1.0), (2.5, 3.0), (1.0, 4.0)], ids=["above", "below", "inside"])
def test_the_corridor_term_is_the_hinge(estimate: str, bounds: tuple[float, float]) -> None:
    """Value and gradient on policy, also in micro-batches, with two kinds of different lengths."""
    config = G2RPO.Settings(
        model="tabular", entropy_bounds=(bounds, (1.0, 1.2)), entropy_estimate=estimate, corridor_coef=1.0, n_prompts=6
    )
    agent = G2RPO(make_task("modsum"), config)
    with torch.no_grad():
        agent.policy.logits.copy_(torch.randn(agent.policy.logits.shape))
    data = agent.collector.collect(agent.estimator.parts.request, agent.policy)
    kind = data["group"] % 2
    valid = data["valid"] * (torch.arange(data.shape[0])[:, None] < 2 + 2 * kind)
    columns = {
        **{k: data[k] for k in data},
        "valid": valid,
        "kind": kind,
        "episode_reward": torch.zeros_like(data["episode_reward"]),
    }
    data = Data(columns, sequence=data.sequence | {"kind"})
    with torch.no_grad():
        on = agent.estimator.prepare({"on": data}, agent.ctx)["on"]
    terms = agent.estimator.phases()[0].terms
    batch = on.epoch(Batching("sequence", "full"), None)[0]
    estimated = agent.updaters["policy"].gradient(terms, batch)

    out = agent.policy(data, frozenset({"entropy", "log_prob"}))
    element = out["entropy"] if estimate == "full" else -out["log_prob"]
    rows = zip((0, 1), (torch.tensor(bounds), torch.tensor([1.0, 1.2])))
    means = [((element * valid)[:, kind == k].sum() / valid[:, kind == k].sum(), b) for k, b in rows]
    expected = sum(corridor(h, b[0], b[1]) for h, b in means) / 2
    torch.testing.assert_close(estimated.stats["corridor_loss"], expected.detach(), atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(expected, agent.policy.logits)
    torch.testing.assert_close(estimated.mean.view_as(gradient), gradient, atol=1e-7, rtol=1e-4)
    assert gradient.abs().max() > 1e-4  # the second kind is outside in every case
    pieces = on.epoch(Batching("sequence", "full", microbatch=5), None)[0]
    torch.testing.assert_close(agent.updaters["policy"].gradient(terms, pieces).mean, estimated.mean)


def test_the_corridor_of_one_kind_without_a_column() -> None:
    data = rollout([0.0, 0.0], [0, 0], log_prob=-torch.ones(3, 2))
    found = Corridor(((0.2, 0.8),), lambda d: -d["log_prob"])(data)
    assert found["side"].tolist() == [1.0, 1.0]
    assert found["share"].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(found["edge"], 0.8)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"pool": "batch"}, "pool"), ({"tie": -1.0}, "tie"), ({"entropy_estimate": "exact"}, "entropy_estimate"),
        ({"entropy_bounds": ((0.8, 0.2),)}, "entropy_bounds"), ({"length_bounds": ((0, 3, 2, 4),)}, "length_bounds"),
    ],
)  # fmt: skip
def test_bad_config(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        G2RPOConfig(**options)


# -- contract -----------------------------------------------------------------------------------------------------


class TestG2RPOContract(RecipeContract):
    method = G2RPO
    published = {
        "pool": "group",
        "tie": 1e-06,
        "drop_unanimous": True,
        "length_bounds": (),
        "length_coef": 1.0,
        "entropy_bounds": (),
        "corridor_coef": 0.01,
        "entropy_estimate": "full",
        "aggregate": "sequence_mean_token_mean",
    }
    matters = (
        ({}, {"pool": "kind"}),
        ({}, {"tie": 0.5}),
        ({"group_size": 2, "n_prompts": 12}, {"group_size": 2, "n_prompts": 12, "drop_unanimous": False}),
        ({}, {"length_bounds": ((2.0, 3.0, 4.0, 6.0),)}),
        ({"length_bounds": ((2.0, 3.0, 4.0, 6.0),)}, {"length_bounds": ((2.0, 3.0, 4.0, 6.0),), "length_coef": 0.01}),
        ({}, {"entropy_bounds": ((0.0, 0.5),)}),
        ({"entropy_bounds": ((0.0, 0.5),)}, {"entropy_bounds": ((0.0, 0.5),), "corridor_coef": 1.0}),
        ({"entropy_bounds": ((0.0, 0.5),)}, {"entropy_bounds": ((0.0, 0.5),), "entropy_estimate": "sampled"}),
    )
