"""MHPO: numbers by hand, gradients against closed forms, limits, control episodes, learning, resume."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from agents.llm.baselines import GRPO, GRPOConfig
from agents.llm.mhpo import MHPO, Hazard, MHPOConfig, MHPORecipe, modulated
from ccrl.data import Batching, Data
from ccrl.estimators.losses import weighted_ratio
from ccrl.estimators.recipe import Recipe
from ccrl.estimators.terms import LogRatio, surrogate
from ccrl.testing.recipe_contract import RecipeContract

TABLE = {
    0.1: (-1.366929, 4.078122, 0.004318, 0.000732),
    0.5: (-0.647689, 2.057036, 0.066889, 0.054418),
    1.0: (0.0, 1.327791, 0.265062, 0.265062),
    2.0: (0.647689, 1.381288, 0.480178, 0.390651),
    10.0: (1.366929, 2.092985, 0.483813, 0.082034),
}
LOG_PROB = [[-1.0, -0.5, -2.0], [-0.3, -1.2, 0.0]]
OLD = [[-1.2, -0.5, -1.0], [-0.3, -2.2, 0.0]]
MASK = [[1, 1, 1], [1, 1, 0]]
ADVANTAGE = torch.tensor([1.0, -1.0], dtype=torch.float64)
OPEN = Hazard(scale_up=math.inf, scale_down=math.inf)


def example(batch: Any, old: Any = OLD) -> Data:
    return batch(old, MASK, advantage=ADVANTAGE)


def multiplier(hazard: Hazard, ratio: torch.Tensor) -> torch.Tensor:
    log_prob = ratio.log().unsqueeze(0).requires_grad_()
    level = LogRatio(log_prob, torch.zeros_like(log_prob), torch.ones_like(log_prob))
    element = modulated(hazard)(level, torch.ones_like(log_prob), {}, Data({}))
    return -torch.autograd.grad(element.sum(), log_prob)[0].squeeze(0)


@pytest.mark.parametrize("ratio", TABLE)
def test_the_maps_and_the_multiplier_at_some_ratios(ratio: float) -> None:
    r = torch.tensor([ratio], dtype=torch.float64)
    psi = Hazard().psi(r.log())
    zeta = Hazard().zeta(psi)
    found = torch.cat([psi, zeta, (psi - zeta).exp(), multiplier(Hazard(), r)])
    torch.testing.assert_close(found, torch.tensor(TABLE[ratio], dtype=torch.float64), atol=6e-7, rtol=0)


def test_value_and_gradient_of_the_example(recipe: Any, batch: Any, value_and_gradient: Any) -> None:
    value, gradient = value_and_gradient(recipe(MHPORecipe, MHPOConfig()), LOG_PROB, example(batch))
    assert value == pytest.approx(0.087815, abs=6e-7)
    expected = [[-0.055975, -0.044177, -0.003613], [0.066266, 0.084641, 0.0]]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), atol=6e-7, rtol=0)


def test_weights_of_the_example() -> None:
    x = torch.tensor(LOG_PROB, dtype=torch.float64) - torch.tensor(OLD, dtype=torch.float64)
    weight = (Hazard().psi(x) - Hazard().zeta(Hazard().psi(x))).exp()
    expected = [0.341857, 0.265062, 0.032823, 0.265062, 0.512693]
    torch.testing.assert_close(weight.flatten()[:5], torch.tensor(expected, dtype=torch.float64), atol=6e-7, rtol=0)


def test_without_the_stop_gradient_the_numbers_are_others(
    recipe: Any, batch: Any, value_and_gradient: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "detach", lambda self: self)
    made, data = recipe(MHPORecipe, MHPOConfig()), example(batch)
    leaf = torch.tensor(LOG_PROB, dtype=torch.float64, requires_grad=True)
    level = LogRatio(leaf.t(), data["log_prob"], data["valid"])
    element = made.loss()(level, data["advantage"], {}, data)
    weights = made.aggregate()(data["valid"], data)
    (gradient,) = torch.autograd.grad((weights * element).sum(), leaf)
    expected = [[-0.061942, -0.064438, -0.012412], [0.096657, 0.012725, 0.0]]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), atol=6e-7, rtol=0)


def test_the_weight_peaks_where_the_hazard_overtakes() -> None:
    r = torch.tensor([3.380082 - 1e-3, 3.380082, 3.380082 + 1e-3], dtype=torch.float64)
    weight = (Hazard().psi(r.log()) - Hazard().zeta(Hazard().psi(r.log()))).exp()
    assert weight[1] > weight[0]
    assert weight[1] > weight[2]
    assert float(weight[1]) == pytest.approx(0.517741, abs=6e-7)


def test_largest_multipliers() -> None:
    r = torch.linspace(0.01, 20.0, 400_000, dtype=torch.float64)
    for hazard, value, at in ((OPEN, 1.592512, 2.449907), (Hazard(), 0.395814, 1.782024)):
        found = multiplier(hazard, r)
        assert float(found.max()) == pytest.approx(value, abs=6e-7)
        assert float(r[found.argmax()]) == pytest.approx(at, abs=1e-2)
        assert float(found.max()) <= math.exp(1.5)


def test_without_bound_and_hazard_it_is_importance_weighted_reinforce(
    recipe: Any, batch: Any, value_and_gradient: Any
) -> None:
    config = MHPOConfig(bound=math.inf, scale_up=math.inf, scale_down=math.inf)

    class Plain(Recipe):
        def loss(self) -> Any:
            return weighted_ratio

    ours = value_and_gradient(recipe(MHPORecipe, config), LOG_PROB, example(batch))
    theirs = value_and_gradient(recipe(Plain, config), LOG_PROB, example(batch))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-12, rtol=0)


def test_limits_of_the_bound() -> None:
    r = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    assert float(multiplier(OPEN, r)[1]) == pytest.approx(1.0, abs=1e-12)
    tight = multiplier(replace(OPEN, bound=1e-2), r)
    assert float(tight[1]) == pytest.approx(1.0, abs=1e-12)
    assert float(tight[0].abs() + tight[2].abs()) < 1e-12
    far = multiplier(OPEN, torch.tensor([1e-300, 1e-30, 1e30, 1e300], dtype=torch.float64))
    assert far.isfinite().all()
    assert float(far.abs().max()) < 1e-6


def test_on_policy_it_is_grpo_times_the_survival_at_one(recipe: Any, batch: Any, value_and_gradient: Any) -> None:
    data = example(batch, LOG_PROB)
    _, ours = value_and_gradient(recipe(MHPORecipe, MHPOConfig()), LOG_PROB, data)
    _, grpo = value_and_gradient(recipe(Recipe, GRPOConfig()), LOG_PROB, data)
    torch.testing.assert_close(ours, 0.265062 * grpo, atol=2e-7, rtol=0)
    _, normalised = value_and_gradient(recipe(MHPORecipe, MHPOConfig(normalise_at_one=True)), LOG_PROB, data)
    torch.testing.assert_close(normalised, grpo, atol=1e-12, rtol=0)


def test_gradient_is_the_closed_form(recipe: Any, batch: Any, value_and_gradient: Any) -> None:
    log_prob = -torch.rand(6, 5, dtype=torch.float64) * 3
    old = -torch.rand(6, 5, dtype=torch.float64) * 3
    mask = (torch.rand(6, 5) < 0.7).double()
    mask[:, 0] = 1.0
    advantage = torch.randn(6, dtype=torch.float64)
    data = batch(old, mask, advantage=advantage)
    _, gradient = value_and_gradient(recipe(MHPORecipe, MHPOConfig()), log_prob, data)
    x = (log_prob - old) * mask
    psi = Hazard().psi(x)
    m = (psi - Hazard().zeta(psi)).exp() / torch.cosh(x / 1.5) ** 2
    expected = -advantage[:, None] * m * mask / mask.sum(1, keepdim=True) / 6
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)

    def frozen(z: torch.Tensor) -> torch.Tensor:
        """The loss with the hazard of ``log_prob``."""
        weight = (Hazard().psi((z - old) * mask) - Hazard().zeta(psi)).exp()
        return -(advantage[:, None] * weight * mask / mask.sum(1, keepdim=True)).sum() / 6

    step = torch.zeros_like(log_prob)
    step[2, 0] = 1e-6
    difference = (frozen(log_prob + step) - frozen(log_prob - step)) / 2e-6
    assert float(difference) == pytest.approx(float(gradient[2, 0]), rel=1e-6)


def test_hazard_at_one() -> None:
    zeta = Hazard().zeta(torch.zeros(1, dtype=torch.float64))
    assert float(zeta) == pytest.approx(math.log(2) ** 1.5 + (math.log(2) / 0.8) ** 2, abs=1e-12)
    assert float(zeta) == pytest.approx(0.577083 + 0.750708, abs=1e-6)
    assert float(Hazard(normalise_at_one=True).zeta(torch.zeros(1, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)


def test_padding_permutation_and_microbatches_change_nothing(recipe: Any, batch: Any, value_and_gradient: Any) -> None:
    made, data = recipe(MHPORecipe, MHPOConfig()), example(batch)
    value, gradient = value_and_gradient(made, LOG_PROB, data)
    wide = [[*row, -math.inf] for row in LOG_PROB]
    padded = batch([[*row, -math.inf] for row in OLD], [[*row, 0] for row in MASK], advantage=ADVANTAGE)
    padded_value, padded_gradient = value_and_gradient(made, wide, padded)
    assert padded_value == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(padded_gradient[:, :3], gradient, atol=1e-12, rtol=0)
    assert not padded_gradient[:, 3].any()
    swapped = batch(OLD[::-1], MASK[::-1], advantage=ADVANTAGE.flip(0))
    assert value_and_gradient(made, LOG_PROB[::-1], swapped)[0] == pytest.approx(value, abs=1e-12)
    pieces = [value_and_gradient(made, LOG_PROB[i : i + 1], piece) for i, piece in enumerate(data.microbatches(1))]
    assert sum(v for v, _ in pieces) == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(torch.cat([g for _, g in pieces]), gradient, atol=1e-12, rtol=0)


def test_equal_scores_and_empty_sequences_have_no_gradient(recipe: Any, rollout: Any, value_and_gradient: Any) -> None:
    made = recipe(MHPORecipe, MHPOConfig())
    data = rollout(OLD, [[1, 1, 1], [0, 0, 0]], episode_reward=torch.tensor([0.5, 0.5], dtype=torch.float64))
    prepared = made.prepare({"on": data}, None)["on"].epoch(Batching("sequence", "full"), None)[0]
    value, gradient = value_and_gradient(made, LOG_PROB, prepared)
    assert value == 0.0
    assert not gradient.any()


def test_control_episodes_give_what_tokens_give(recipe: Any, rollout: Any) -> None:
    """The recipe reads no tokens: rewards of steps become scores, and the same numbers the same loss."""
    made = recipe(MHPORecipe, MHPOConfig())
    score = torch.tensor([1.0, 0.0], dtype=torch.float64)
    tokens = rollout(OLD, MASK, episode_reward=score)
    carry = torch.tensor([[1.0, 1, 0], [1, 0, 0]], dtype=torch.float64)
    reward = torch.tensor([[0.25, 0.25, 0.5], [0.5, -0.5, 9.0]], dtype=torch.float64)
    episodes = rollout(OLD, MASK, reward=reward, carry=carry)
    losses = []
    for data in (tokens, episodes):
        prepared = made.prepare({"on": data}, None)["on"].epoch(Batching("sequence", "full"), None)[0]
        evaluation = {"log_prob": torch.tensor(LOG_PROB, dtype=torch.float64).t()}
        losses.append(float(surrogate(made.phases()[0].terms, evaluation, prepared)[0]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    # the z-scores of 1 and 0 are +-1 / sqrt(2), the loss is linear in them and 0.087815 at +-1 (the example above)
    assert losses[0] == pytest.approx(0.087815 / math.sqrt(2), abs=1e-6)


@pytest.mark.parametrize("name", ["bound", "shape_up", "scale_up", "shape_down", "scale_down"])
def test_settings_that_are_not_positive_are_refused(name: str) -> None:
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"{name}: expected > 0 .*got {value}|{name}: expected > 0, got {value}"):
            MHPOConfig(**{name: value})


SMALL = {"model": "tabular", "n_prompts": 8, "group_size": 8, "n_epochs": 4, "learning_rate": 0.1}


def test_learns_and_reports() -> None:
    agent = MHPO("easy_hard", MHPO.Settings(**SMALL), seed=0, env_kwargs={"questions": 4, "symbols": 5, "easy": 2})
    before = agent.pass_at([1], questions=4, samples=64)["pass@1"]
    agent.learn(until=25 * agent.samples_per_iteration)
    assert before < 0.5
    assert agent.pass_at([1], questions=4, samples=64)["pass@1"] > 0.9
    assert 0.0 < float(agent.scalars["train/survival"]) < 1.0
    assert {"train/psi", "train/zeta", "train/abs_log_ratio", "train/approx_kl"} <= agent.scalars.keys()


def test_first_adam_step_is_that_of_grpo() -> None:
    """Adam divides the constant 0.265 out, but for its eps."""
    options = SMALL | {"n_epochs": 1, "max_grad_norm": 0.0}
    ours, theirs = MHPO("modsum", **options), GRPO("modsum", **options)
    for agent in (ours, theirs):
        agent.learn(until=agent.samples_per_iteration)
    full = theirs.policy.logits.abs() > 0.0999  # gradients at rounding level are left out: their steps are Adam's eps
    assert int(full.sum()) > 50
    torch.testing.assert_close(ours.policy.logits[full], theirs.policy.logits[full], atol=1e-4, rtol=0)


def test_resumes_exactly(resumes: Any, tmp_path: Any) -> None:
    resumes(MHPO, "modsum", MHPO.Settings(**SMALL, batch_size=16, kl_coef=0.01), tmp_path / "agent.pt")


# -- contract -----------------------------------------------------------------------------------------------------


class TestMHPOContract(RecipeContract):
    method = MHPO
    published = {
        "bound": 1.5,
        "shape_up": 1.5,
        "scale_up": 1.0,
        "shape_down": 2.0,
        "scale_down": 0.8,
        "normalise_at_one": False,
        "aggregate": "sequence_mean_token_mean",
    }
    matters = (
        ({}, {"bound": 0.5}),
        ({}, {"shape_up": 3.0}),
        ({}, {"scale_up": 2.0}),
        ({}, {"shape_down": 3.0}),
        ({}, {"scale_down": 2.0}),
        ({}, {"normalise_at_one": True}),
    )
    exceptions = {"test_finite_differences": "a factor of its loss is detached: the value has another slope"}
