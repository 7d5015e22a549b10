"""HPT: the gate, weights by hand, limits, edge cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm.hpt import HPT, HPTConfig, HPTRecipe, Mix, self_rewarded, uncertainty_weighted
from ccrl.data import Batching, Data
from ccrl.estimators.stages import GroupBaseline
from ccrl.estimators.terms import LogRatio, surrogate
from ccrl.testing.recipe_contract import RecipeContract

F64 = torch.float64


# -- the gate -------------------------------------------------------------------------------------------------------


def mixed(rollout: Any, samples: list[list[float]], shown: list[bool], steps: int = 2, **columns: Any) -> Data:
    """Questions with samples of the given rewards, then a demonstration each (an empty one where not ``shown``)."""
    score = [r for rewards in samples for r in rewards] + [1.0 if s else 0.0 for s in shown]
    group = [q for q, rewards in enumerate(samples) for _ in rewards] + list(range(len(shown)))
    n, demo = len(score), len(shown)
    demonstration = [0.0] * (n - demo) + [1.0] * demo
    mask = [[1.0] * steps] * (n - demo) + [[1.0 if s else 0.0] * steps for s in shown]
    old = [[-1.0] * steps] * (n - demo) + [[0.0] * steps] * demo
    score = torch.tensor(score, dtype=F64)
    return rollout(old, mask, episode_reward=score, reward_components=score.unsqueeze(1).t(), group=torch.tensor(group),
                   demonstration=torch.tensor(demonstration, dtype=F64), **columns)  # fmt: skip


def with_scores(data: Data) -> Data:
    """``reward_components`` as per-sequence column ``[N, 1]``."""
    columns = {k: data[k] for k in data} | {"reward_components": data["episode_reward"].unsqueeze(1)}
    return Data(columns, sequence=data.sequence | {"reward_components"})


def mix(rollout: Any, samples: list[list[float]], shown: list[bool], **settings: Any) -> Data:
    return Mix(HPTConfig(**settings))(with_scores(mixed(rollout, samples, shown)))


@pytest.mark.parametrize(("solved", "gate", "imitated"), [(0, 0.0, 1), (1, 0.0, 0), (2, 0.25, 1), (3, 0.25, 0)])
def test_the_gate(rollout: Any, solved: int, gate: float, imitated: int) -> None:
    data = mix(rollout, [[1.0] * solved + [0.0] * (8 - solved)], [True], gate=gate)
    assert data.shape == (2, 1 if imitated else 8)
    assert data["demonstration"].tolist() == ([1.0] if imitated else [0.0] * 8)
    assert (data["sft_weight"] > 0).sum() == imitated


def test_a_gate_of_a_fifth_in_single_precision() -> None:
    config, n = HPTConfig(gate=0.2), torch.tensor([10.0])
    assert config.coefficients(torch.tensor([2.0]), n).tolist() == [[0.0, 0.0, 1.0]]
    assert config.coefficients(torch.tensor([3.0]), n).tolist() == [[1.0, 0.0, 0.0]]


def test_half_right_is_not_solved(rollout: Any) -> None:
    assert mix(rollout, [[0.5, 0.9]], [True])["demonstration"].tolist() == [1.0]
    assert mix(rollout, [[0.5, 1.0]], [True])["demonstration"].tolist() == [0.0, 0.0]


def test_coefficients_of_the_other_mixtures() -> None:
    solved, n = torch.arange(9.0), torch.full((9,), 8.0)
    soft = HPTConfig(mixture="soft").coefficients(solved, n)
    expected = [
        [0, 1, 1],
        [0.125, 1, 0.5],
        [0.25, 1, 0.25],
        [0.5, 1, 0.125],
        [1, 1, 0],
        [1, 1, 0],
        [1, 1, 0],
        [1, 1, 0],
    ]
    assert soft[1:].tolist() == expected
    assert HPTConfig(mixture="switch_off").coefficients(solved, n)[:2].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert HPTConfig(mixture="fixed", rl_share=0.25).coefficients(solved, n)[0].tolist() == [0.25, 0, 0.75]
    assert HPTConfig(mixture="luffy").coefficients(solved, n)[0].tolist() == [1, 1, 0]


def test_advantages_of_two_of_eight(rollout: Any) -> None:
    rewards = [1.0, 0, 0, 0, 1, 0, 0, 0]
    plain = mix(rollout, [rewards], [True])["advantage"][0]
    torch.testing.assert_close(plain, torch.tensor([0.75 if r else -0.25 for r in rewards], dtype=F64))
    scaled = mix(rollout, [rewards], [True], std=True)["advantage"][0]
    expected = torch.tensor([1.620182 if r else -0.540061 for r in rewards], dtype=F64)
    torch.testing.assert_close(scaled, expected, atol=5e-6, rtol=0)
    # the demonstration's reward is in the group where it is reinforced, and in nobody's where it is imitated
    union = GroupBaseline(scale="std").advantages(torch.tensor([*rewards, 1.0], dtype=F64), torch.zeros(9).long())
    torch.testing.assert_close(mix(rollout, [rewards], [True], mixture="luffy")["advantage"][0], union)


def test_edge_cases_of_groups(rollout: Any) -> None:
    # one sample: mean 0, deviation 1; all right or (not gated) all wrong: advantage 0, also over the deviation
    assert mix(rollout, [[1.0]], [True])["advantage"][0].tolist() == [1.0]
    data = mix(rollout, [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], [True, True], gate=-1.0, std=True)
    assert data.shape == (2, 6)
    assert not data["advantage"].any()
    # no demonstration: the samples stay, and imitation is a mean over the other question's
    data = mix(rollout, [[0.0, 0.0], [0.0, 0.0]], [False, True])
    assert data["demonstration"].tolist() == [0.0, 0.0, 1.0]
    assert data["group"].tolist() == [0, 0, 1]
    assert data["sft_weight"].tolist() == [0.0, 0.0, 3.0]


def value_of(recipe: Any, data: Data, seen: Tensor, config: HPTConfig, entropy: float = 0.5) -> tuple[float, Tensor]:
    made = recipe(HPTRecipe, config)
    prepared = made.prepare({"on": data}, None)["on"].epoch(Batching("sequence", "full"), None)[0]
    leaf = seen[: prepared.shape[0], : prepared.shape[1]].clone().requires_grad_()
    evaluation = {"log_prob": leaf, "entropy": torch.full_like(leaf, entropy)}
    total, _ = surrogate(made.phases()[0].terms, evaluation, prepared)
    return float(total.detach()), torch.autograd.grad(total, leaf, allow_unused=True)[0]


def test_both_parts_by_hand(recipe: Any, rollout: Any) -> None:
    """Question 0 is imitated; question 1 is reinforced with advantages 2/3, -1/3, -1/3; two tokens each."""
    data = with_scores(mixed(rollout, [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [True, True]))
    seen = torch.full((2, 4), -1.0, dtype=F64)
    seen[:, 3] = torch.tensor([-2.0, -3.0])
    config = HPTConfig(entropy_coef=0.0, sft_coef=0.3, rl_norm="token_mean")
    value, gradient = value_of(recipe, data, seen, config)
    assert value == pytest.approx(0.0 + 0.3 * 2.5, abs=1e-12)
    expected = torch.tensor([[-2 / 18, 1 / 18, 1 / 18, -0.15]] * 2, dtype=F64)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)
    _, gradient = value_of(recipe, data, seen, replace(config, rl_norm="seq_mean"))
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)
    _, gradient = value_of(recipe, data, seen, replace(config, rl_norm="len_const"))  # the cap is 8
    released = torch.tensor([[-2 / 24, 1 / 24, 1 / 24, -0.15]] * 2, dtype=F64)
    torch.testing.assert_close(gradient, released, atol=1e-12, rtol=0)
    with_bonus, _ = value_of(recipe, data, seen, replace(config, entropy_coef=0.1))
    assert with_bonus == pytest.approx(value - 0.1 * 0.5, abs=1e-12)


@pytest.mark.parametrize(("norm", "one", "three"), [("seq_mean", 1 / 2, 1 / 6), ("token_mean", 1 / 4, 1 / 4)])
def test_means_over_samples_of_different_lengths(
    recipe: Any, rollout: Any, norm: str, one: float, three: float
) -> None:
    """Of question 1 a right sample of one token, a wrong one of three; question 0 is imitated, in three tokens."""
    data = with_scores(mixed(rollout, [[0.0, 0.0], [1.0, 0.0]], [True, True], steps=3))
    valid = data["valid"].clone()
    valid[1:, 2] = 0.0
    data = Data({k: data[k] for k in data} | {"valid": valid}, sequence=data.sequence)
    config = HPTConfig(entropy_coef=0.0, rl_norm=norm)
    _, gradient = value_of(recipe, data, torch.full((3, 3), -1.0, dtype=F64), config)
    right, wrong, shown = gradient.unbind(1)
    torch.testing.assert_close(right, torch.tensor([-0.5 * one, 0.0, 0.0], dtype=F64))
    torch.testing.assert_close(wrong, torch.full((3,), 0.5 * three, dtype=F64))
    torch.testing.assert_close(shown, torch.full((3,), -1 / 3, dtype=F64))


def test_ratios_are_clipped_on_request_alone(recipe: Any) -> None:
    one = torch.ones(1, 1, dtype=F64)
    level = LogRatio(torch.log(3.0 * one), 0.0 * one, one)
    for settings, expected in (({}, -3.0), ({"clip": True, "clip_high": 0.4}, -1.4)):
        loss = recipe(HPTRecipe, HPTConfig(**settings)).loss()
        assert float(loss(level, one, {}, Data({}))) == pytest.approx(expected)


def test_the_log_describes_the_samples_alone(recipe: Any, rollout: Any) -> None:
    on = with_scores(mixed(rollout, [[0.0, 1.0]], []))
    demo = with_scores(mixed(rollout, [], [True]))
    found = recipe(HPTRecipe, HPTConfig()).prepare({"on": on, "demo": demo}, None)
    assert found["sampled"] is on


def test_parts_that_are_empty(recipe: Any, rollout: Any) -> None:
    """No demonstrations in a batch: no mean over nothing; and the other way round."""
    config, seen = HPTConfig(entropy_coef=0.0), torch.full((2, 8), -1.0, dtype=F64)
    solved = with_scores(mixed(rollout, [[1.0, 0.0]], [True]))
    value, gradient = value_of(recipe, solved, seen, config)
    assert value == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5 / 8, 0.5 / 8]] * 2, dtype=F64))
    failed = with_scores(mixed(rollout, [[0.0, 0.0]], [True]))
    assert value_of(recipe, failed, seen, config)[0] == pytest.approx(1.0, abs=1e-12)


def test_srft_weights() -> None:
    level = LogRatio(torch.tensor([[-1.0, -1.0]], dtype=F64), torch.tensor([[-1.0, -1.0]], dtype=F64), torch.ones(1, 2))
    batch = Data({"valid": torch.ones(1, 2, dtype=F64), "verified": torch.tensor([True, False])})
    evaluation = {"entropy": torch.full((1, 2), 0.5, dtype=F64)}
    imitation = uncertainty_weighted(level, level.valid, evaluation, batch)
    assert float(imitation[0, 0]) == pytest.approx(0.303265, abs=6e-7)
    samples = self_rewarded(level, level.valid, evaluation, batch)
    assert float(samples[0, 0]) == pytest.approx(-0.164872, abs=6e-7)
    assert float(samples[0, 1]) == 1.0


@pytest.mark.parametrize("mixture", ["switch", "switch_off", "soft", "fixed", "luffy", "srft"])
def test_padding_permutation_and_microbatches_change_nothing(recipe: Any, rollout: Any, mixture: str) -> None:
    config = HPTConfig(mixture=mixture, entropy_coef=0.01)
    data = with_scores(mixed(rollout, [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]], [True, False, True]))
    made = recipe(HPTRecipe, config)
    prepared = made.prepare({"on": data}, None)["on"]
    terms, (steps, width) = made.phases()[0].terms, prepared.shape
    seen = -0.1 - torch.rand(steps, width, dtype=F64)

    def gradient(batch: Data, log_prob: Tensor) -> Tensor:
        leaf = log_prob.clone().requires_grad_()
        entropy = torch.full_like(leaf, 0.5)
        total = surrogate(terms, {"log_prob": leaf, "entropy": entropy}, batch)[0]
        return torch.autograd.grad(total, leaf)[0]

    whole = prepared.epoch(Batching("sequence", "full"), None)[0]
    expected = gradient(whole, seen)
    order = torch.randperm(width)
    shuffled = prepared.take(order).epoch(Batching("sequence", "full"), None)[0]
    torch.testing.assert_close(gradient(shuffled, seen[:, order]), expected[:, order], atol=1e-12, rtol=0)
    pieces = [gradient(p, s) for p, s in zip(whole.microbatches(2), seen.split(2, 1))]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-12, rtol=0)
    longer = with_scores(mixed(rollout, [[0.0] * 3, [1.0, 0.0, 0.0], [1.0] * 3], [True, False, True], steps=3))
    valid = longer["valid"].clone()
    valid[2] = 0.0
    longer = Data({k: longer[k] for k in longer} | {"valid": valid}, sequence=longer.sequence)
    padded = made.prepare({"on": longer}, None)["on"].epoch(Batching("sequence", "full"), None)[0]
    garbage = torch.cat([seen, torch.full((1, width), -torch.inf, dtype=F64)])
    found = gradient(padded, garbage)
    torch.testing.assert_close(found[:2], expected, atol=1e-12, rtol=0)
    assert not found[2].any()


# -- contract -----------------------------------------------------------------------------------------------------


class TestHPTContract(RecipeContract):
    method = HPT
    published = {
        "mixture": "switch",
        "gate": 0.0,
        "rl_share": 0.5,
        "rl_norm": "len_const",
        "sft_coef": 1.0,
        "std": False,
        "clip": False,
        "shape": 0.1,
        "skip_grad_norm": 80.0,
        "group_size": 8,
        "max_grad_norm": 1.0,
        "entropy_coef": 0.001,
        "clip_low": 0.2,
        "clip_high": 0.2,
    }
    matters = (
        ({}, {"gate": 0.5}),
        ({"gate": 0.5}, {"gate": 0.5, "mixture": "switch_off"}),
        ({}, {"mixture": "soft"}),
        ({}, {"mixture": "fixed"}),
        ({}, {"mixture": "luffy"}),
        ({}, {"mixture": "srft"}),
        ({"mixture": "fixed"}, {"mixture": "fixed", "rl_share": 0.9}),
        ({}, {"rl_norm": "token_mean"}),
        ({"rl_norm": "token_mean"}, {"rl_norm": "seq_mean"}),
        ({"gate": 0.5}, {"gate": 0.5, "sft_coef": 0.3}),
        ({}, {"std": True}),
        ({}, {"clip": True, "clip_low": 0.01, "clip_high": 0.01}),
        ({"mixture": "luffy"}, {"mixture": "luffy", "shape": 1.0}),
        ({}, {"entropy_coef": 0.0}),
    )
    refused = {"trl": "second rollout ('demo': demonstrations)", "verl": "wants ['entropy']"}
    hosted = {"trl": {"gate": -1.0}}
    exceptions = {
        "test_equal_rewards_have_no_gradient": "a prompt without success is imitated",
        "test_equal_rewards_leave_the_first_policy_alone": "a prompt without success is imitated",
    }
