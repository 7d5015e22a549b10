"""REAL: numbers by hand, bounds, invariances, groups as the unit, learning, resume."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm.real import REAL, Labels, REALConfig, REALRecipe
from ccrl.data import Batching
from ccrl.testing.recipe_contract import RecipeContract

LOG_PROB = [[-1.0, -0.5, -2.0], [-0.3, -1.2, 0.0], [-0.7, -0.7, -0.7], [-1.5, -0.4, 0.0]]
OLD = [[-1.2, -0.5, -1.9], [-0.3, -1.0, 0.0], [-0.7, -0.9, -0.6], [-1.1, -0.4, 0.0]]
MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]]
LABELS = [1.0, 0.0, 0.0, 1.0]


@pytest.fixture
def at(recipe: Any, batch: Any, value_and_gradient: Any) -> Any:
    """Loss and its gradient ``[B]`` at logits ``s``, with one token per completion."""

    def compute(s: Any, labels: list[float], group: list[int] | None = None, **options: Any) -> tuple[float, Tensor]:
        options = {"group_size": 1} | options
        s = torch.as_tensor(s, dtype=torch.float64)
        columns = {"label": torch.tensor(labels, dtype=torch.float64)}
        if group is not None:
            columns["group"] = torch.tensor(group)
        data = batch(torch.zeros(len(s), 1), torch.ones(len(s), 1), "group", **columns)
        value, gradient = value_and_gradient(recipe(REALRecipe, REALConfig(**options)), s.unsqueeze(1), data)
        return value, gradient.squeeze(1)

    return compute


S, SIDES = [0.10, -0.20, 0.05, -0.30], [1.0, 1.0, 0.0, 0.0]


def test_four_logits(at: Any) -> None:
    value, gradient = at(S, SIDES)
    assert value == pytest.approx(2.173177, abs=6e-7)
    expected = torch.tensor([-0.494618, -0.901253, 0.832840, 0.413576], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, atol=6e-7, rtol=0)
    assert at(S, SIDES, comparison="bce")[0] == pytest.approx(0.673260, abs=6e-7)
    assert at(S, SIDES, comparison="product")[0] == pytest.approx(1.573109, abs=1e-6)


@pytest.mark.parametrize(
    ("right", "value", "up", "down"),
    [(1, 2.772589, -1.0, 0.25), (2, 3.044522, -0.666667, 0.285714), (4, 3.218876, -0.4, 0.4), (7, 2.772589, -0.25, 1)],
)
def test_on_policy(at: Any, right: int, value: float, up: float, down: float) -> None:
    labels = [1.0] * right + [0.0] * (8 - right)
    found, gradient = at([0.0] * 8, labels)
    assert found == pytest.approx(value, abs=6e-7)
    expected = torch.tensor([up] * right + [down] * (8 - right), dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, atol=6e-7, rtol=0)


def test_tokens_of_one_prompt(recipe: Any, batch: Any, value_and_gradient: Any) -> None:
    made = recipe(REALRecipe, REALConfig())
    labels = torch.tensor(LABELS, dtype=torch.float64)
    data = batch(OLD, MASK, "group", label=labels)
    level = made.ratio({"log_prob": torch.tensor(LOG_PROB, dtype=torch.float64).t()}, data)
    expected = torch.tensor([[0.033333, -0.1, 0.033333, -0.2]], dtype=torch.float64)
    torch.testing.assert_close(level.log_ratio, expected, atol=6e-7, rtol=0)
    value, _ = value_and_gradient(made, LOG_PROB, data)
    assert value == pytest.approx(2.292232, abs=6e-7)


def test_a_prompt_without_both_labels_counts_and_has_no_gradient(
    recipe: Any, batch: Any, value_and_gradient: Any
) -> None:
    labels = torch.tensor(LABELS + [1.0] * 4, dtype=torch.float64)
    group = torch.tensor([3] * 4 + [9] * 4)
    data = batch(OLD * 2, MASK * 2, "group", label=labels, group=group)
    value, gradient = value_and_gradient(recipe(REALRecipe, REALConfig()), LOG_PROB * 2, data)
    assert value == pytest.approx(1.146116, abs=6e-7)
    rows = torch.tensor([-0.090985, 0.141763, 0.123391, -0.217636], dtype=torch.float64)
    expected = torch.cat([rows.unsqueeze(1) * torch.tensor(MASK), torch.zeros(4, 3)])
    torch.testing.assert_close(gradient, expected, atol=6e-7, rtol=0)


def test_weights_are_bounded(at: Any) -> None:
    far = torch.tensor([-1e3, -50.0, 0.0, 50.0, 1e3], dtype=torch.float64)
    up = torch.stack([at([s, 0.0, 0.0], [1.0, 1.0, 0.0])[1][0] for s in far.tolist()])
    down = torch.stack([at([0.0, 0.0, s], [1.0, 0.0, 0.0])[1][2] for s in far.tolist()])
    assert float(up.abs().max()) <= 2.0
    assert float(down.abs().max()) <= 2.0
    torch.testing.assert_close(up[[0, 4]], torch.tensor([-2.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(down[[4, 0]], torch.tensor([2.0, 0.0], dtype=torch.float64))


def test_gradient_is_the_closed_form_and_that_of_differences(at: Any) -> None:
    s, labels, tau = torch.randn(8, dtype=torch.float64), [1.0] * 3 + [0.0] * 5, 0.7
    _, gradient = at(s, labels, tau=tau)
    for k in range(8):
        sign = -1.0 if k < 3 else 1.0
        others = [i for i in (range(3) if k < 3 else range(3, 8)) if i != k]
        rest = 1.0 + sum(math.exp(sign * float(s[i]) / tau) for i in others)
        expected = sign / tau / (1.0 + rest * math.exp(-sign * float(s[k]) / tau))
        assert float(gradient[k]) == pytest.approx(expected, abs=1e-12)
        step = torch.zeros(8, dtype=torch.float64)
        step[k] = 1e-6
        difference = (at(s + step, labels, tau=tau)[0] - at(s - step, labels, tau=tau)[0]) / 2e-6
        assert float(gradient[k]) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("comparison", ["anchored", "bce", "product"])
def test_order_and_group_numbers_do_not_matter(at: Any, comparison: str) -> None:
    s, labels, group = torch.randn(8, dtype=torch.float64), [1.0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]
    value, gradient = at(s, labels, group, comparison=comparison)
    order = torch.randperm(8)
    shuffled = [[labels[i] for i in order], [7 - 5 * group[i] for i in order]]
    # batches of groups sort the columns by group, so that the leaf is compared through the value alone
    sorted_back = torch.argsort(torch.tensor(shuffled[1]), stable=True)
    found, other = at(s[order][sorted_back], *shuffled_by(shuffled, sorted_back), comparison=comparison)
    assert found == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(other.sort().values, gradient.sort().values, atol=1e-12, rtol=0)


def shuffled_by(lists: list[list[Any]], order: Tensor) -> list[list[Any]]:
    return [[row[i] for i in order] for row in lists]


def test_high_temperature(at: Any) -> None:
    _, gradient = at([3.0, -2.0, 1.0, 0.5, -4.0], [1.0, 1.0, 0.0, 0.0, 0.0], tau=1e7)
    expected = torch.tensor([-1 / 3, -1 / 3, 0.25, 0.25, 0.25], dtype=torch.float64)
    torch.testing.assert_close(1e7 * gradient, expected, atol=1e-5, rtol=0)


def test_one_against_one_is_two_logistic_losses(at: Any) -> None:
    value, _ = at([0.3, -0.8], [1.0, 0.0])
    expected = math.log1p(math.exp(-0.3 / 0.5)) + math.log1p(math.exp(-0.8 / 0.5))
    assert value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("comparison", ["anchored", "bce", "product"])
@pytest.mark.parametrize("labels", [[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0], [1.0, -1.0]])
def test_nothing_to_compare_is_zero_and_finite(at: Any, labels: list[float], comparison: str) -> None:
    value, gradient = at([1.0, 500.0], labels, comparison=comparison)
    assert value == 0.0
    assert not gradient.any()


def test_labels(rollout: Any) -> None:
    score = torch.tensor([1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 7.0, 7.0], dtype=torch.float64)
    data = rollout(
        torch.zeros(8, 1), torch.ones(8, 1), episode_reward=score, group=torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    )
    assert Labels()(data)["label"].tolist() == [1, 0, -1, 1, -1, -1, -1, -1]
    assert Labels("group_mean")(data)["label"].tolist() == [1, 0, 0, 1, 0, 1, 0, 0]


def test_the_rule_of_means_ignores_affine_changes(rollout: Any) -> None:
    score = torch.tensor(LABELS, dtype=torch.float64)
    for changed in (score, 3.0 * score - 1.0):
        label = Labels("group_mean")(rollout(OLD, MASK, episode_reward=changed))["label"]
        assert label.tolist() == LABELS


def test_empty_completions_are_left_out(recipe: Any, batch: Any, value_and_gradient: Any) -> None:
    made, labels = recipe(REALRecipe, REALConfig()), torch.tensor([*LABELS, 1.0], dtype=torch.float64)
    alone = batch(OLD, MASK, "group", label=labels[:4])
    longer = batch([*OLD, [0.0] * 3], [*MASK, [0, 0, 0]], "group", label=labels)
    value, gradient = value_and_gradient(made, [*LOG_PROB, [-math.inf] * 3], longer)
    expected, rows = value_and_gradient(made, LOG_PROB, alone)
    assert value == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(gradient, torch.cat([rows, torch.zeros(1, 3)]), atol=1e-12, rtol=0)


def test_padding_and_microbatches_change_nothing(recipe: Any, rollout: Any, value_and_gradient: Any) -> None:
    made = recipe(REALRecipe, REALConfig(group_size=4))
    labels = torch.tensor(LABELS + LABELS[::-1] + LABELS, dtype=torch.float64)
    data = rollout(OLD * 3, MASK * 3, label=labels, group=torch.arange(3).repeat_interleave(4))
    whole = data.epoch(Batching("group", "full"), None)[0]
    value, gradient = value_and_gradient(made, LOG_PROB * 3, whole)
    pieces = [value_and_gradient(made, LOG_PROB, piece) for piece in whole.microbatches(4)]
    assert sum(v for v, _ in pieces) == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(torch.cat([g for _, g in pieces]), gradient, atol=1e-12, rtol=0)
    # two groups per batch: the second batch is padded with invalid columns
    last = data.epoch(Batching("group", 2), torch.Generator().manual_seed(0))[-1]
    assert last.shape == (3, 8)
    log_prob = last["log_prob"].t() + 0.1 * torch.arange(8, dtype=torch.float64).unsqueeze(1)
    padded, gradient = value_and_gradient(made, log_prob, last)
    (small,) = last.take(torch.arange(4)).microbatches(4)
    assert padded == pytest.approx(value_and_gradient(made, log_prob[:4], small)[0], abs=1e-12)
    assert not gradient[4:].any()


def test_control_episodes_need_no_tokens(recipe: Any, rollout: Any, value_and_gradient: Any) -> None:
    made = recipe(REALRecipe, REALConfig(labels="group_mean"))
    reward = torch.tensor([[9.0, 0, 0], [1, 1, 0], [1, 0, 0], [3, 5, 0]], dtype=torch.float64)
    data = rollout(OLD, MASK, reward=reward, carry=torch.tensor([[1.0, 1, 0]] * 4, dtype=torch.float64))
    prepared = made.prepare({"on": data}, None)["on"].epoch(Batching("group", "full"), None)[0]
    assert value_and_gradient(made, LOG_PROB, prepared)[0] == pytest.approx(2.292232, abs=6e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "tau: expected > 0, got 0.0"),
        ({"comparison": "hinge"}, r"comparison: expected one of 'anchored', 'bce', 'product', got 'hinge'"),
        ({"labels": "median"}, "labels: expected one of 'binary', 'group_mean', got 'median'"),
        ({"group_size": 8, "microbatch": 12}, "microbatch: expected a multiple of group_size = 8, got 12"),
        ({"comparison": "bce", "microbatch": 8}, "microbatch: expected 0 with comparison='bce'"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REALConfig(**options)


SMALL = {"model": "tabular", "n_prompts": 8, "group_size": 8, "n_epochs": 4, "learning_rate": 0.1}


@pytest.mark.parametrize("comparison", ["anchored", "bce", "product"])
def test_learns_and_reports(comparison: str) -> None:
    config = REAL.Settings(**SMALL, comparison=comparison)
    agent = REAL("easy_hard", config, seed=0, env_kwargs={"questions": 4, "symbols": 5, "easy": 2})
    before = agent.pass_at([1], questions=4, samples=64)["pass@1"]
    agent.learn(until=agent.samples_per_iteration)
    assert 0.5 < float(agent.scalars["train/compared_prompts"]) <= 1.0
    agent.learn(until=20 * agent.samples_per_iteration)
    assert before < 0.5
    assert agent.pass_at([1], questions=4, samples=64)["pass@1"] > 0.85


def test_resumes_exactly(resumes: Any, tmp_path: Any) -> None:
    resumes(REAL, "modsum", REAL.Settings(**SMALL, batch_size=3, microbatch=16, kl_coef=0.01), tmp_path / "agent.pt")


# -- contract -----------------------------------------------------------------------------------------------------


class TestREALContract(RecipeContract):
    method = REAL
    published = {"tau": 0.5, "comparison": "anchored", "labels": "binary", "group_size": 8}
    graded = False
    matters = (
        ({}, {"tau": 1.0}),
        ({}, {"comparison": "bce"}),
        ({}, {"comparison": "product"}),
    )
    refused = {"trl": "compares completions of one group", "verl": "compares completions of one group"}
