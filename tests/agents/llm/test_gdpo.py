"""GDPO against the numbers of its equations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.llm.gdpo import GDPO, Conditioned, Decoupled, GDPOConfig
from ccrl.data import Data
from ccrl.estimators.groups import Groups
from ccrl.estimators.stages import GroupBaseline
from ccrl.testing.recipe_contract import RecipeContract
from envs.text import make_task


def rollout(*components: Sequence[Sequence[float]], lengths: Sequence[int] | None = None) -> Data:
    """One table per component, one row per prompt; ``[T, N]``, float64."""
    scores = torch.stack([torch.tensor(c, dtype=torch.float64).flatten() for c in components], 1)
    group = torch.arange(len(components[0])).repeat_interleave(len(components[0][0]))
    length = torch.tensor(lengths or [2] * len(scores))
    valid = (torch.arange(int(length.max()))[:, None] < length).double()
    columns = {"valid": valid, "episode_reward": scores.sum(1), "reward_components": scores, "group": group}
    return Data(columns, sequence=frozenset({"episode_reward", "reward_components", "group"}))


def advantage(data: Data, **options: Any) -> Tensor:
    """``[N]``, of the first step."""
    return Decoupled(**options)(data)["advantage"][0]


def sums(*components: Sequence[Sequence[float]], **options: Any) -> Tensor:
    data = rollout(*components)
    return Decoupled(**options).sums(data["reward_components"], data["group"])


R1, R2 = [[3, 1, -1, -3], [2, 2, 2, 2]], [[1, 1, 0, 0], [1, 0, 1, 0]]


def test_two_rewards_are_more_than_one() -> None:
    np.testing.assert_allclose(sums([[1, 0]], [[1, 0]], group_eps=0), [1.4142, -1.4142], atol=5e-5)
    np.testing.assert_allclose(sums([[1, 0]], [[0, 0]], group_eps=0), [0.7071, -0.7071], atol=5e-5)
    grpo = GroupBaseline(scale="std", eps=0.0)
    for components in ([[1, 0]], [[1, 0]]), ([[1, 0]], [[0, 0]]):
        data = rollout(*components)
        np.testing.assert_allclose(grpo.advantages(data["episode_reward"], data["group"]), [0.7071, -0.7071], atol=5e-5)


@pytest.mark.parametrize(
    ("size", "n", "expected"),
    [
        (2, 2, (2, 3, 3)), (3, 2, (4, 6, 6)), (4, 2, (7, 10, 14)), (5, 2, (11, 15, 26)), (6, 2, (16, 21, 38)),
        (4, 3, (14, 20, 45)), (4, 1, (4, 4, 4)),
    ],
)  # fmt: skip
def test_number_of_distinct_advantages(size: int, n: int, expected: tuple[int, int, int]) -> None:
    """Multisets of advantages over all binary assignments: GRPO, GRPO without deviation, GDPO."""
    rows = list(itertools.product((0.0, 1.0), repeat=n))
    tables = torch.tensor(list(itertools.combinations_with_replacement(rows, size)), dtype=torch.float64)
    scores = tables.view(-1, n)
    group = torch.arange(len(tables)).repeat_interleave(size)
    total = scores.sum(1)
    found = (
        Groups(group).z_score(total),
        GroupBaseline().advantages(total, group),
        Decoupled(group_eps=0.0).sums(scores, group),
    )
    count = tuple(len(torch.unique(a.view(-1, size).sort(1).values.mul(1e6).round(), dim=0)) for a in found)
    assert count == expected


def test_sums_and_batch_norm() -> None:
    data, options = rollout(R1, R2), {"group_eps": 1e-4, "batch_eps": 1e-4}
    np.testing.assert_allclose(
        sums(R1, R2), [2.0277, 1.2532, -1.2532, -2.0277, 0.8659, -0.8659, 0.8659, -0.8659], atol=6e-5
    )
    np.testing.assert_allclose(
        advantage(data, **options), [1.4155, 0.8748, -0.8748, -1.4155, 0.6044, -0.6044, 0.6044, -0.6044], atol=6e-5
    )
    np.testing.assert_allclose(advantage(data, batch_norm="none"), sums(R1, R2))


def test_weights_multiply_z_scores() -> None:
    options = {"weights": (1.0, 0.25)}
    np.testing.assert_allclose(sums(R1, R2, **options)[:4], [1.3783, 0.6038, -0.6038, -1.3783], atol=6e-5)
    np.testing.assert_allclose(
        advantage(rollout(R1, R2), **options),
        [1.6790, 0.7355, -0.7355, -1.6790, 0.2637, -0.2637, 0.2637, -0.2637], atol=6e-5,
    )  # fmt: skip
    exact = {"group_eps": 0.0, "batch_eps": 0.0}
    torch.testing.assert_close(
        advantage(rollout(R1, R2), weights=(1.0, 0.25), **exact),
        advantage(rollout(R1, R2), weights=(8.0, 2.0), **exact),
    )


def test_scale_and_shift_of_a_reward_do_not_matter() -> None:
    exact = {"group_eps": 0.0, "batch_eps": 0.0}
    scaled = [[7.0 * r - 3.0 for r in row] for row in R2]
    torch.testing.assert_close(advantage(rollout(R1, scaled), **exact), advantage(rollout(R1, R2), **exact))
    one, other = rollout(R1, R2), rollout(R1, scaled)
    grpo = GroupBaseline(scale="std", eps=0.0)
    assert not torch.allclose(
        grpo.advantages(one["episode_reward"], one["group"]), grpo.advantages(other["episode_reward"], other["group"])
    )


def test_one_component_is_whitened_grpo() -> None:
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(3, 5, generator=generator).tolist()
    z = GroupBaseline(scale="std", eps=1e-4).advantages(rollout(reward)["episode_reward"], rollout(reward)["group"])
    torch.testing.assert_close(advantage(rollout(reward)), (z - z.mean()) / (z.std() + 1e-4))
    data = rollout(reward)
    alone = Data({k: data[k] for k in data if k != "reward_components"}, sequence=data.sequence - {"reward_components"})
    torch.testing.assert_close(advantage(alone), advantage(data))


def test_complementary_rewards_cancel() -> None:
    r1, r2 = [[1, 1, 0]], [[0, 0, 1]]
    np.testing.assert_allclose(sums(r1, r2), 0.0, atol=1e-15)
    assert advantage(rollout(r1, r2)).eq(0.0).all()
    assert sums(r1, r2, weights=(1.0, 0.5)).abs().min() > 0.1


def test_conditioning() -> None:
    correct, short = [[0, 1, 1, 0]], [[1, 1, 0, 0]]
    found = Conditioned((1,), 0, 1.0)(rollout(correct, short))["rewards"]
    assert found[:, 1].tolist() == [0.0, 1.0, 0.0, 0.0]  # short and wrong: nothing; short and right: kept
    assert found[:, 0].tolist() == [0.0, 1.0, 1.0, 0.0]


def test_equal_rewards_give_exactly_zero() -> None:
    third = [[0.1] * 3, [0.1] * 3]  # the rounded mean of three tenths is not a tenth
    assert advantage(rollout(third, third)).eq(0.0).all()
    assert advantage(rollout(third, [[0, 1, 0], [1, 1, 1]]))[3:].abs().max() < 1e-12


def test_groups_of_one() -> None:
    data = rollout([[0.5]], [[2.0]])
    assert Decoupled().sums(data["reward_components"], data["group"]).tolist() == [0.0]
    assert Decoupled(single="keep", group_eps=0.0).sums(data["reward_components"], data["group"]).tolist() == [2.5]


def test_token_statistics_weigh_long_sequences_more() -> None:
    lengths = [4, 1, 1, 1, 1, 2]
    data = rollout([[1, 0, 0], [2, 2, 2]], lengths=lengths)
    found = Decoupled(batch_norm="token")(data)["advantage"]
    total = Decoupled().sums(data["reward_components"], data["group"])
    tokens = total.repeat_interleave(torch.tensor(lengths))
    expected = (total - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
    torch.testing.assert_close(found, expected.expand_as(found) * data["valid"])
    assert found[0, 3] < -0.1  # equal rewards, and an advantage all the same: length and reward go together
    assert advantage(data)[3:].abs().max() < 1e-12


def test_token_statistics_have_their_constant_inside_the_root() -> None:
    """Weights of 1e-4 make a variance of the constant's size; the released trainer's divisor is sqrt(var + 1e-8)."""
    options: dict[str, Any] = {"weights": (1e-4,), "batch_norm": "token", "group_eps": 0.0}
    data = rollout([[1, 0]])
    z = torch.tensor([1.0, -1.0], dtype=torch.float64) * 1e-4 / 2**0.5
    tokens = z.repeat_interleave(2)
    torch.testing.assert_close(advantage(data, **options), z / (tokens.var() + 1e-8).sqrt())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch_norm": "group"}, "batch_norm"), ({"single": "drop"}, "single"), ({"group_eps": -1.0}, "group_eps"),
        ({"conditioned": ("format",)}, "condition"), ({"weights": (0.0,)}, "weights"),
        ({"conditioned": ("format",), "condition": "format"}, "condition"),
    ],
)  # fmt: skip
def test_bad_config(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        GDPOConfig(**options)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"weights": (1.0, 1.0)}, "weights: expected 1"),
        ({"conditioned": ("length",), "condition": "accuracy"}, r"expected components among .*'length'"),
    ],
)
def test_settings_that_do_not_fit_the_task(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        GDPO(make_task("modsum"), GDPO.Settings(model="tabular", **options))


# -- contract -----------------------------------------------------------------------------------------------------


class TestGDPOContract(RecipeContract):
    method = GDPO
    texts = ("condition",)
    published = {
        "weights": (),
        "conditioned": (),
        "condition": "",
        "threshold": 1.0,
        "batch_norm": "sample",
        "group_eps": 0.0001,
        "batch_eps": 0.0001,
        "single": "zero",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "aggregate": "sequence_mean_token_mean",
    }
    matters = (
        ({}, {"weights": (1.0, 0.25)}),
        ({}, {"conditioned": ("grade",), "condition": "accuracy"}),
        (
            {"conditioned": ("accuracy",), "condition": "grade"},
            {"conditioned": ("accuracy",), "condition": "grade", "threshold": 0.1},
        ),
        ({}, {"batch_norm": "token"}),
        ({}, {"batch_norm": "none"}),
        ({}, {"group_eps": 0.5}),
        ({}, {"batch_eps": 0.5}),
        ({"group_size": 1}, {"group_size": 1, "single": "keep"}),
    )
