"""P3O: numbers by hand, invariance to shifts and order, the theorem's gradient, bounds, pairs of larger groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch

from agents.llm.p3o import P3O, P3OConfig
from agents.llm.reinforce import RLOO, RLOOConfig
from ccrl.estimators import aggregates
from ccrl.estimators.evaluate import Loss, loss_of
from ccrl.testing.recipe_contract import RecipeContract

OLD, NEW, REWARD = [-5.2, -5.7], [-5.0, -6.0], [2.0, 0.5]
Form = Literal["joint", "separate"]
FORMS: tuple[Form, ...] = ("joint", "separate")
INF = math.inf


def found(
    form: Form, eps: float = 0.2, *, new: Sequence[float] = NEW, old: Sequence[float] = OLD,
    reward: Sequence[float] = REWARD, group: Sequence[int] | None = None, **columns: Any,
) -> Loss:  # fmt: skip
    """Completions of one token, whose log-probability is the whole one's."""
    config = P3OConfig(form=form, clip_range=eps, kl_coef=columns.pop("kl_coef", 0.0))
    rows = [torch.tensor([x], dtype=torch.float64) for x in (new, old)]
    return loss_of(
        P3O, config, *rows, torch.ones_like(rows[0]), reward=torch.tensor(reward, dtype=torch.float64),
        group=torch.zeros(len(new), dtype=torch.int64) if group is None else torch.tensor(group), **columns,
    )  # fmt: skip


def near(loss: Loss, value: float, gradient: Sequence[float], atol: float = 6e-7) -> None:
    assert float(loss.loss) == pytest.approx(value, abs=atol)
    assert loss.gradient[0].tolist() == pytest.approx(list(gradient), abs=atol)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_without_bounds() -> None:
    """w = e^0.2, e^-0.3, their product e^-0.1 = 0.904837; 0.5 * 1.5 * 0.904837 = 0.678628, and d = 1."""
    near(found("joint", INF), -0.678628, (-0.678628, 0.678628))
    # V1's value: 1.5 w_1 w_2 and -1.5 w_1 w_2 add up to 0
    near(found("separate", INF), 0.0, (-0.678628, 0.678628))


def test_both_ratios_outside() -> None:
    """c_1 w_1 is 1.5 * 0.740818 * 1.221403, cut to 1.2; c_2 = -1.5 * 1.221403 weighs 0.740818, cut to 0.8:
    -0.5 (1.333473 - 1.465684) = 0.066105."""
    near(found("separate"), 0.066105, (0.0, 0.0))


def test_log_odds_outside_and_inside() -> None:
    """d moved from 0.5 to 1: beyond 0.2 the loss is -0.5 * 1.357256 * 0.7, within 0.6 that of no bound."""
    near(found("joint"), -0.475040, (0.0, 0.0))
    near(found("joint", 0.6), -0.678628, (-0.678628, 0.678628))


@pytest.mark.parametrize("form", FORMS)
def test_moves_in_the_wrong_direction_are_taken_back(form: Form) -> None:
    """The better completion became less probable, far beyond the bound: its gradient stays."""
    loss = found(form, reward=(0.5, 2.0))
    near(loss, float(loss.loss), (0.678628, -0.678628))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eps", [0.2, 0.6, INF])
def test_what_is_added_to_a_prompts_rewards_cancels(form: Form, eps: float) -> None:
    plain, shifted = found(form, eps), found(form, eps, reward=[r + 7.0 for r in REWARD])
    near(shifted, float(plain.loss), plain.gradient[0].tolist(), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_order_of_a_pair(form: Form) -> None:
    for eps in (0.2, 0.25, 0.6):
        one, other = found(form, eps), found(form, eps, new=NEW[::-1], old=OLD[::-1], reward=REWARD[::-1])
        near(other, float(one.loss), one.gradient[0].flip(0).tolist(), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_scale_of_the_rewards_is_that_of_the_gradient(form: Form) -> None:
    one = found(form, 0.6)
    near(found(form, 0.6, reward=[3.0 * r for r in REWARD]), 3.0 * float(one.loss), (3.0 * one.gradient[0]).tolist())


def test_on_policy() -> None:
    """V1's value is 0 there; the gradient is -0.5 * 1.5."""
    near(found("separate", new=OLD), 0.0, (-0.75, 0.75), 1e-12)
    near(found("joint", new=OLD), -0.75 * 0.5, (-0.75, 0.75), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_pairs_without_a_difference(form: Form) -> None:
    near(found(form, reward=(2.0, 2.0)), 0.0, (0.0, 0.0), 0.0)
    # two prompts of one completion make no pair
    near(found(form, group=(0, 1)), 0.0, (0.0, 0.0), 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_far_apart_policies_stay_finite(form: Form) -> None:
    loss = found(form, INF, new=(-5000.0, -1.0), old=(-1.0, -5000.0))
    assert bool(loss.loss.isfinite())
    assert bool(loss.gradient.isfinite().all())


# -- the theorem ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_expected_gradient_is_the_policy_gradient(form: Form) -> None:
    """All nine pairs of three arms with their probabilities; the vanilla one is p_a (r_a - E r)."""
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    reward = torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64)
    log_p = logits.log_softmax(0)
    p, total = log_p.exp(), torch.zeros(3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        arms = torch.tensor([a, b])
        rows = log_p[arms].tolist()
        gradient = found(form, new=rows, old=rows, reward=reward[arms].tolist()).gradient[0]
        score = torch.eye(3, dtype=torch.float64)[arms] - p
        total -= p[a] * p[b] * gradient @ score
    expected = torch.tensor([0.291287, -0.023396, -0.267891], dtype=torch.float64)
    torch.testing.assert_close(total, expected, atol=6e-7, rtol=0)
    torch.testing.assert_close(total, p * (reward - p @ reward))


@pytest.mark.parametrize("form", FORMS)
def test_larger_groups_on_policy_are_leave_one_out(form: Form) -> None:
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(3, 12, generator=generator, dtype=torch.float64)
    mask = torch.arange(3)[:, None] < torch.tensor([3, 1, 2, 3] * 3)
    given = {"reward": torch.rand(12, generator=generator), "group": torch.arange(12) // 4}
    ours = loss_of(P3O, P3OConfig(form=form, kl_coef=0.0, group_size=4), old, old, mask, **given)
    theirs = loss_of(RLOO, RLOOConfig(group_size=4), old, old, mask, **given)
    torch.testing.assert_close(ours.gradient, theirs.gradient, atol=1e-7, rtol=0)
    assert ours.advantage is not None
    assert theirs.advantage is not None
    torch.testing.assert_close(ours.advantage, theirs.advantage)


@pytest.mark.parametrize("form", FORMS)
def test_a_larger_group_is_the_mean_of_its_pairs(form: Form) -> None:
    new, old, reward = [-1.0, -2.3, -0.4], [-1.1, -2.0, -0.9], [1.0, 0.0, 0.3]
    whole, total, gradient = found(form, new=new, old=old, reward=reward), 0.0, torch.zeros(3, dtype=torch.float64)
    for a, b in itertools.combinations(range(3), 2):
        pair = found(form, new=[new[a], new[b]], old=[old[a], old[b]], reward=[reward[a], reward[b]])
        total += float(pair.loss) / 3
        gradient[[a, b]] += pair.gradient[0] / 3
    near(whole, total, gradient.tolist(), 1e-12)


def test_sums_over_tokens_not_means() -> None:
    """Two tokens against one: the ratio is of the sums."""
    rows = {"new": [[-2.0, -6.0], [-3.0, 0.0]], "old": [[-2.2, -5.7], [-3.0, 0.0]]}
    new, old = (torch.tensor(rows[name], dtype=torch.float64) for name in ("new", "old"))
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    loss = loss_of(P3O, P3OConfig(form="joint", clip_range=INF, kl_coef=0.0), new, old, mask,
                   reward=torch.tensor(REWARD))  # fmt: skip
    assert float(loss.loss) == pytest.approx(-0.678628, abs=6e-7)
    expected = torch.tensor([[-0.678628, 0.678628], [-0.678628, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(loss.gradient, expected, atol=6e-7, rtol=0)


def test_the_kl_is_in_the_reward() -> None:
    """2 - 0.1 (-5.2 + 6.2) = 1.9 and 0.5 - 0.1 (-5.7 + 4.7) = 0.6: a difference of 1.3 in place of 1.5."""
    reference = torch.tensor([[-6.2, -4.7]], dtype=torch.float64)
    loss = found("joint", 0.6, kl_coef=0.1, ref_log_prob=reference)
    near(loss, -0.678628 * 1.3 / 1.5, (-0.678628 * 1.3 / 1.5, 0.678628 * 1.3 / 1.5), 1e-6)


def test_what_is_logged() -> None:
    assert float(found("separate").stats["clip_fraction"]) == 1.0
    assert float(found("joint").stats["clip_fraction"]) == 1.0
    assert float(found("joint", 0.6).stats["clip_fraction"]) == 0.0
    assert float(found("separate", 0.25).stats["clip_fraction"]) == 0.5  # 1.22 is inside, 0.74 is not
    assert float(found("joint").stats["pair_difference"]) == pytest.approx(1.5)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_learns(form: Form) -> None:
    agent = P3O("sequence_match", env_kwargs={"questions": 4, "fixed_length": 2, "symbols": 4}, form=form, kl_coef=0.0,
                n_prompts=16, group_size=4, model="tabular", learning_rate=0.1, seed=0)  # fmt: skip
    agent.learn(until=40 * agent.samples_per_iteration)
    assert agent.pass_at([1], questions=4, samples=64)["episode_reward"] > 0.9


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"group_size": 1}, "group_size: expected at least two completions"),
        ({"microbatch": 3}, "microbatch: expected a multiple of group_size = 2"),
        ({"clip_range": 0.0}, "clip_range"),
        ({"clip_low": 0.1}, r"clip_low: expected 0\.2"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        P3OConfig(**settings)


class TestP3OContract(RecipeContract):
    method = P3O
    published = {
        "group_size": 2,
        "n_epochs": 2,
        "kl_coef": 0.1,
        "form": "joint",
        "clip_range": 0.2,
    }
    matters = (({}, {"form": "separate"}), ({}, {"clip_range": 0.01}), ({}, {"kl_coef": 0.5}))
    refused = {"trl": "compares completions of one group", "verl": "compares completions of one group"}
    on_policy = aggregates.sequence_mean
    exceptions = {
        "test_finite_differences": "the weights are detached: the value has another slope",
        "test_equal_rewards_have_no_gradient": "the KL to the reference differs between completions of one reward",
    }
