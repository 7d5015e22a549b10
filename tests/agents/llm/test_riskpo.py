"""RiskPO: advantages of the risk measure, its exact gradient, bundles, trackers, the released variant."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.grouped import Grouped
from agents.llm.riskpo import (
    RiskPO,
    RiskPOConfig,
    RiskPORecipe,
    bundle_rewards,
    bundled,
    credit,
    released_advantage,
    risk_advantage,
    track,
)
from ccrl.data import Batching, Data
from ccrl.testing.recipe_contract import RecipeContract


def double(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def context(seed: int = 0) -> Any:
    return SimpleNamespace(generator=torch.Generator().manual_seed(seed))


def questions(rewards: Any) -> Data:
    """One token per response; ``rewards`` ``[Q, G]``."""
    rewards = double(rewards)
    group = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    one = torch.ones(1, len(group), dtype=torch.float64)
    return Data(
        {"log_prob": -one, "valid": one, "episode_reward": rewards.flatten(), "group": group},
        sequence=frozenset({"episode_reward", "group"}),
    )


# -- risk measure ---------------------------------------------------------------------------------------------------

LOW, HIGH, SCORES = double(1.0), double(4.0), double([0, 1, 2, 3, 4, 5])


def test_advantages_by_hand() -> None:
    assert risk_advantage(SCORES, LOW, HIGH, 0.5).tolist() == [-4.5, -3, -2, -1, 0, 0]
    assert risk_advantage(SCORES, LOW, HIGH, -1.0).tolist() == [-3, -3, -2, -1, 0, 0]  # the band alone


@pytest.mark.parametrize(
    ("natural", "expected"),
    [(True, [-5.0, -2.0, -1.3333, -0.6667, 0.0, 0.0]), (False, [-3.0, 0.0, 0.6667, 1.3333, 2.0, 2.0])],
)
def test_released_advantages(natural: bool, expected: list[float]) -> None:
    found = released_advantage(SCORES, LOW, HIGH, 0.2, 0.8, 1.5, natural)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def objective(p: Tensor, reward: Tensor, alpha: float, beta: float, omega: float) -> Tensor:
    """``J`` by integrating the quantile function of sorted, distinct rewards."""
    upper = p.cumsum(0)
    lower = upper - p
    tail = (upper.clamp(max=alpha) - lower.clamp(max=alpha)) @ reward
    band = (upper.clamp(alpha, beta) - lower.clamp(alpha, beta)) @ reward
    return (1.0 + omega) * tail + band


def quantile(p: Tensor, reward: Tensor, level: float) -> Tensor:
    """The smallest reward whose distribution function is at least ``level``."""
    return reward[int((p.cumsum(0) < level).sum())]


@pytest.mark.parametrize("omega", [0.0, 0.5, 2.0])
def test_advantage_is_the_exact_gradient(omega: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
        reward = torch.rand(7, generator=generator, dtype=torch.float64).sort().values * 5.0
        p = logits.softmax(0)
        (expected,) = torch.autograd.grad(objective(p, reward, 0.2, 0.8, omega), logits)
        p = p.detach()
        low, high = quantile(p, reward, 0.2), quantile(p, reward, 0.8)
        advantage = risk_advantage(reward, low, high, omega)
        found = p * advantage - p * (p @ advantage)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_value_identity() -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(7, generator=generator, dtype=torch.float64)
    p, reward = p / p.sum(), torch.rand(7, generator=generator, dtype=torch.float64).sort().values
    alpha, beta, omega = 0.2, 0.8, 0.5
    below = lambda q: p @ (q - reward).clamp_min(0.0)  # noqa: E731
    low, high = quantile(p, reward, alpha), quantile(p, reward, beta)
    tail, whole = alpha * low - below(low), beta * high - below(high)
    expected = (1.0 + omega) * tail + whole - tail
    assert float(objective(p, reward, alpha, beta, omega)) == pytest.approx(float(expected), abs=1e-12)


def test_without_risk_it_is_reinforce_up_to_a_constant() -> None:
    found = risk_advantage(SCORES, SCORES.min(), SCORES.max(), 0.0)
    assert torch.equal(found, SCORES - 5.0)


def test_translation_and_scale() -> None:
    found = risk_advantage(SCORES, LOW, HIGH, 0.5)
    torch.testing.assert_close(risk_advantage(SCORES + 3.0, LOW + 3.0, HIGH + 3.0, 0.5), found)
    torch.testing.assert_close(risk_advantage(2.5 * SCORES, 2.5 * LOW, 2.5 * HIGH, 0.5), 2.5 * found)


# -- bundles --------------------------------------------------------------------------------------------------------


def test_a_bundle_by_hand(recipe: Any) -> None:
    data = bundled(questions([[1, 0, 0, 1], [1, 0, 1, 1]]), 2, None)
    assert bundle_rewards(data).tolist() == [2, 0, 1, 2]
    assert data["bundle"].tolist() == [0, 1, 2, 3] * 2
    assert data["bundle_reward"].tolist() == [2, 0, 1, 2] * 2
    made = recipe(RiskPORecipe, RiskPOConfig(bundle=2))
    assert [float(q) for q in made.current(data)] == pytest.approx([0.6, 2.0], abs=1e-12)
    found = made.advantage(data)
    assert found["sequence_advantage"].tolist() == pytest.approx([0, -2.3, -1, 0] * 2, abs=1e-12)
    assert torch.equal(found["advantage"], found["sequence_advantage"].unsqueeze(0))


def test_every_response_is_in_one_bundle_with_one_of_each_question() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    data = bundled(questions(rewards), 3, generator)
    assert data.shape[1] == 24
    assert float(bundle_rewards(data).sum()) == pytest.approx(float(rewards.sum()))
    for number in range(8):
        members = data["bundle"] == number
        assert data["group"][members].unique().numel() == 3
        assert data["questions"][members].unique().numel() == 1
        assert float(data["bundle_reward"][members][0]) == pytest.approx(float(data["episode_reward"][members].sum()))
    # another draw, other bundles
    assert not torch.equal(bundled(questions(rewards), 3, generator)["bundle"], data["bundle"])


def test_questions_that_fill_no_bundle_are_left_out() -> None:
    generator, seen = torch.Generator().manual_seed(0), set[int]()
    for _ in range(20):
        data = bundled(questions(torch.eye(5)), 2, generator)
        assert data.shape[1] == 20
        assert bundle_rewards(data).shape == (10,)
        seen |= {0, 1, 2, 3, 4} - set(data["group"].tolist())
    assert seen == {0, 1, 2, 3, 4}  # not always the same ones
    assert bundled(questions(torch.eye(3)), 5, generator)["bundle_reward"].shape == (9,)


def test_ragged_groups_are_refused() -> None:
    data = questions(torch.eye(3)).take(torch.arange(8))
    with pytest.raises(ValueError, match=r"as many responses to each question; got groups of \[2, 3\]"):
        bundled(data, 2, None)


@pytest.mark.parametrize("size", [1, 3])
def test_labels_of_groups_do_not_matter(size: int) -> None:
    data = questions(torch.rand(3, 4))
    shuffled = Data(
        {k: data[k] for k in ("log_prob", "valid", "episode_reward")} | {"group": 7 * data["group"] + 2},
        sequence=frozenset({"episode_reward", "group"}),
    )
    first, second = (bundled(d, size, torch.Generator().manual_seed(2)) for d in (data, shuffled))
    assert torch.equal(first["bundle_reward"], second["bundle_reward"])


# -- trackers -------------------------------------------------------------------------------------------------------


def test_tracking_step() -> None:
    score = double([0, 1, 2, 2, 3, 3, 4, 5])
    found = track(double([2.5]), double([0.2]), score, 0.1)
    assert float(found) == pytest.approx(2.47, abs=1e-12)
    # strictly below: at an atom the tracker counts what is under it
    assert float(track(double([2.0]), double([0.2]), score, 0.1)) == pytest.approx(2.0 + 0.1 * (0.2 - 0.25))


def test_trackers_start_at_the_first_rollout_and_move_after_use(recipe: Any) -> None:
    made = recipe(RiskPORecipe, RiskPOConfig(bundle=2))
    first = questions([[1, 0, 0, 1], [1, 0, 1, 1]])
    prepared = made.prepare({"on": first}, context())
    scores = bundle_rewards(prepared["on"])
    levels = double([0.2, 0.8])
    expected = torch.quantile(scores, levels)
    assert not bool(made.started)
    made.after_update(prepared, {}, None)
    torch.testing.assert_close(made.quantiles, expected)
    second = made.prepare({"on": questions(torch.ones(2, 4))}, context())
    assert second["on"]["sequence_advantage"].tolist() == [0.0] * 8  # above the tracked q_b: intended
    zeros = made.prepare({"on": questions(torch.zeros(2, 4))}, context())
    low, high = expected.tolist()
    assert zeros["on"]["sequence_advantage"].tolist() == pytest.approx([-1.5 * low + low - high] * 8)
    made.after_update(zeros, {}, None)
    torch.testing.assert_close(made.quantiles, expected + 0.1 * (levels - (expected > 0).double()))


def test_crossed_trackers_are_put_in_order(recipe: Any) -> None:
    made = recipe(RiskPORecipe, RiskPOConfig(bundle=2))
    made.started.fill_(True)
    made.quantiles.copy_(double([1.5, 0.5]))
    assert [float(q) for q in made.current(bundled(questions(torch.eye(2)), 2, None))] == [0.5, 1.5]
    assert made.quantiles.tolist() == [1.5, 0.5]  # each goes on tracking its own level


def test_trackers_find_the_quantiles() -> None:
    generator, q, levels = torch.Generator().manual_seed(0), double([0.0, 0.0]), double([0.2, 0.8])
    tail = []
    for i in range(2000):
        q = track(q, levels, torch.rand(64, generator=generator, dtype=torch.float64), 0.1)
        tail += [q] if i >= 1000 else []
    assert torch.stack(tail).mean(0).tolist() == pytest.approx([0.2, 0.8], abs=0.01)


# -- released variant -----------------------------------------------------------------------------------------------


def test_shares_of_the_members() -> None:
    # members 1, 0, 1 of one bundle; their questions' means are .4, .2, .8
    score = double([1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0])
    group, bundle = torch.arange(3).repeat_interleave(5), torch.arange(5).repeat(3)
    found = credit("sum_mean", score, group, bundle)
    assert found[[0, 5, 10]].tolist() == pytest.approx([1.0, -1 / 3, 1 / 3])
    assert torch.bincount(bundle, found).tolist() == pytest.approx([1.0] * 5)
    assert credit("uniform", score, group, bundle).tolist() == [1.0] * 15
    assert credit("correctness", score, group, bundle)[[0, 5]].tolist() == [0.5, 1.5]
    std = math.sqrt((2 * 0.36 + 3 * 0.16) / 4)
    assert float(credit("std", score, group, bundle)[0]) == pytest.approx(1 / std)
    equal = double([1, 1, 0, 0])
    assert credit("std", equal, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])).tolist() == [1.0] * 4
    assert credit("sum_mean", equal, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])).tolist() == [0.5] * 4


def test_quantiles_and_deviation_of_a_bundles_own_scores(recipe: Any) -> None:
    made = recipe(RiskPORecipe, RiskPOConfig(bundle=2, quantiles="bundle", standardise=True))
    data = bundled(questions([[1, 0, 0, 1], [1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]), 2, None)
    low, high = made.current(data)
    assert low.tolist() == pytest.approx([0.6] * 8 + [1.0] * 8)
    assert high.tolist() == pytest.approx([2.0] * 8 + [1.0] * 8)
    std = float(double([2, 0, 1, 2]).std()) + 1e-6
    found = made.advantage(data)["sequence_advantage"].tolist()
    assert found[:8] == pytest.approx([0, -2.3 / std, -1 / std, 0] * 2)
    assert found[8:] == [0.0] * 8  # equal scores: no division by 1e-6


def test_released_setting_runs(recipe: Any) -> None:
    options = {"form": "released", "natural": False, "standardise": True, "credit": "sum_mean", "level": "token"}
    made = recipe(RiskPORecipe, RiskPOConfig(bundle=2, **options))
    data = made.prepare({"on": questions(torch.eye(4))}, context())["on"]
    assert data["advantage"].isfinite().all()
    assert data["advantage"].any()
    assert made.phases()[0].terms[0].advantage == "advantage"


# -- loss -----------------------------------------------------------------------------------------------------------


def test_sequence_ratio_and_its_gradient(recipe: Any, batch: Any, value_and_gradient: Any) -> None:
    made = recipe(RiskPORecipe, RiskPOConfig())
    old, new, mask = [[-1.2, -0.6], [-0.5, 9.0]], [[-1.0, -0.5], [-0.5, -math.inf]], [[1, 1], [1, 0]]
    data = batch(old, mask, sequence_advantage=double([-2.0, 0.0]))
    value, gradient = value_and_gradient(made, new, data)
    assert math.exp(0.3 / 2) == pytest.approx(1.161834, abs=1e-6)
    assert value == pytest.approx(2.0 * 1.161834 / 2, abs=1e-6)
    torch.testing.assert_close(gradient, double([[0.5, 0.5], [0, 0]]) * 1.161834, atol=1e-6, rtol=0)
    # a bad sequence that became less probable than the clip range allows has no gradient
    _, gradient = value_and_gradient(made, [[-2.0, -1.6], [-0.5, 0.0]], data)
    assert not gradient.any()


def test_equal_rewards_have_no_gradient(recipe: Any, value_and_gradient: Any) -> None:
    for value in (0.0, 1.0):
        made = recipe(RiskPORecipe, RiskPOConfig(bundle=2))
        data = made.prepare({"on": questions(torch.full((4, 3), value))}, context())["on"]
        assert not value_and_gradient(made, [[-0.9]] * 12, data.epoch(Batching("sequence", "full"), None)[0])[1].any()


def test_padding_and_microbatches_change_nothing(recipe: Any, value_and_gradient: Any) -> None:
    made = recipe(RiskPORecipe, RiskPOConfig(bundle=2))
    data = made.prepare({"on": questions(torch.eye(4)[:, :3])}, context())["on"]
    whole = data.epoch(Batching("sequence", "full"), None)[0]
    value, gradient = value_and_gradient(made, [[-0.9]] * 12, whole)
    pieces = [value_and_gradient(made, [[-0.9]] * piece.shape[1], piece) for piece in whole.microbatches(5)]
    assert sum(v for v, _ in pieces) == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(torch.cat([g for _, g in pieces]), gradient, atol=1e-12, rtol=0)


def test_control_episodes_need_no_tokens() -> None:
    agent = Grouped("CartPole-v1", method="riskpo", n_groups=5, group_size=4, n_steps=20)
    agent.learn(until=agent.samples_per_iteration)
    assert agent.n_updates == agent.iteration >= 1
    assert float(agent.estimator.quantiles[1]) > 5 * 5  # five returns of more than five steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "expected 0 < alpha < beta <= 1, got 0.0, 0.8"),
        ({"alpha": 0.8}, "expected 0 < alpha < beta <= 1, got 0.8, 0.8"),
        ({"omega": -1.0}, "omega: expected >= 0, got -1.0"),
        ({"bundle": 0}, "bundle: expected >= 1, got 0"),
        ({"credit": "mean"}, r"credit: expected one of 'uniform', 'std', 'sum_mean', 'correctness', got 'mean'"),
        ({"level": "group"}, r"level: expected one of 'sequence', 'token', got 'group'"),
        ({"quantiles": "batch"}, r"quantiles: expected one of 'track', 'bundle', got 'batch'"),
        ({"form": "code"}, r"form: expected one of 'paper', 'released', got 'code'"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RiskPOConfig(**options)


SMALL = {"model": "tabular", "n_prompts": 10, "group_size": 8, "learning_rate": 0.1}


def test_learns_and_reports() -> None:
    task = {"questions": 5, "symbols": 4, "easy": 2}
    agent = RiskPO("easy_hard", RiskPO.Settings(**SMALL), seed=0, env_kwargs=task)
    before = agent.pass_at([1], questions=5, samples=64)["pass@1"]
    agent.learn(until=40 * agent.samples_per_iteration)
    assert agent.pass_at([1], questions=5, samples=64)["pass@1"] > before + 0.25
    assert 0.0 < float(agent.scalars["train/quantile_low"]) < float(agent.scalars["train/quantile_high"]) < 5.5


def test_resumes_exactly(resumes: Any, tmp_path: Any) -> None:
    resumes(RiskPO, "modsum", RiskPO.Settings(**SMALL, batch_size=7, microbatch=3, n_epochs=2, kl_coef=0.01),
            tmp_path / "agent.pt")  # fmt: skip


# -- contract -----------------------------------------------------------------------------------------------------


class TestRiskPOContract(RecipeContract):
    method = RiskPO
    published = {
        "n_prompts": 20,
        "alpha": 0.2,
        "beta": 0.8,
        "omega": 0.5,
        "bundle": 5,
        "quantiles": "track",
        "quantile_lr": 0.1,
        "form": "paper",
        "band_weight": 1.5,
        "natural": False,
        "standardise": False,
        "credit": "uniform",
        "level": "sequence",
        "clip_low": 0.2,
        "clip_high": 0.2,
    }
    matters = (
        ({}, {"alpha": 0.5}),
        ({}, {"beta": 0.5}),
        ({}, {"omega": 3.0}),
        ({}, {"bundle": 1}),
        ({"bundle": 1}, {"bundle": 1, "quantiles": "bundle"}),
        ({}, {"level": "token"}),
        ({}, {"form": "released"}),
        ({"form": "released", "bundle": 2}, {"form": "released", "bundle": 2, "band_weight": 5.0}),
        ({"form": "released", "bundle": 2}, {"form": "released", "bundle": 2, "natural": True}),
        ({}, {"standardise": True}),
        ({}, {"credit": "std"}),
        ({}, {"credit": "sum_mean"}),
        ({}, {"credit": "correctness"}),
    )
    refused = {"verl": "learns between updates"}
    exceptions = {"test_order_of_the_sequences_does_not_matter": "bundles are drawn by where responses stand"}
