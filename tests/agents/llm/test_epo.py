"""EPO: the corridor, the schedule and nested means by hand, the history, limits, learning, resume."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm.epo import EPO, EPOConfig, EPORecipe, corridor, decay_factor, released_factor, turn_shares
from ccrl.bank import Bank
from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators.base import Context
from ccrl.estimators.recipe import Recipe
from ccrl.estimators.terms import surrogate
from ccrl.llm.policy import token_outputs
from ccrl.testing.recipe_contract import RecipeContract

PLAIN: dict[str, Any] = {"kl_coef": 0.0}


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def context(done: float = 0.0, total: float = 10.0) -> Context:
    """``done`` of ``total`` iterations of one sample each."""
    nothing: Any = None
    return Context(torch.Generator(), Bank(torch.nn.Identity()), nothing, clock=doubles(done).squeeze(),
                   end=doubles(total).squeeze())  # fmt: skip


def with_history(made: EPORecipe, *entropies: float) -> EPORecipe:
    made.double()
    made.entropy_sum.fill_(sum(entropies))
    made.count.fill_(len(entropies))
    return made


def test_the_corridor() -> None:
    entropy = doubles(0, 0.3, 0.5, 0.9, 1.5).requires_grad_()
    found = corridor(entropy, doubles(0.5).squeeze(), 0.6, 1.4, 1.0, "hinge")
    torch.testing.assert_close(found.detach(), doubles(0.3, 0, 0, 0.2, 0.8))
    (slope,) = torch.autograd.grad(found.sum(), entropy)
    assert slope.tolist() == [-1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("total", "k", "beta"),
    [(120, 0, 2.0), (120, 30, 1.223130), (120, 60, 1.049787), (120, 120, 1.002479), (125, 30, 1.234192),
     (150, 75, 1.049787), (150, 150, 1.002479), (1, 0, 1.0)],
)  # fmt: skip
def test_the_schedule(total: float, k: float, beta: float) -> None:
    assert float(decay_factor(doubles(k), doubles(total), 3.0)) == pytest.approx(beta, abs=6e-7)


def test_the_released_schedule_jumps() -> None:
    found = released_factor(doubles(0, 37, 75, 76, 112, 150))
    assert found.tolist() == pytest.approx([1.0, 0.874563, 0.827067, 0.768632, 0.182110, 0.039830], abs=6e-7)


ENTROPY = [[0.2, 0.4, 1.2], [0.6, 0.8, 7.0]]


def example(rollout: Any, made: EPORecipe, ctx: Context | None = None, valid: Any = ((1, 1, 1), (1, 1, 0))) -> Data:
    entropy = torch.tensor(ENTROPY, dtype=torch.float64)
    data = rollout(torch.zeros(2, 3), valid, entropy=entropy, episode_reward=doubles(1, 0))
    return made.prepare({"on": data}, ctx or context())["on"].epoch(Batching("sequence", "full"), None)[0]


def statistics(made: EPORecipe, batch: Data) -> dict[str, float]:
    outputs = {"log_prob": torch.zeros_like(batch["valid"]), "entropy": torch.tensor(ENTROPY, dtype=torch.float64).t()}
    return {k: float(v) for k, v in surrogate(made.phases()[0].terms, outputs, batch)[1].items()}


@pytest.mark.parametrize(
    ("options", "bonus", "smooth"),
    [
        # P = .05, 0, .45 and 0, .05: (.5 / 3 + .05 / 2) / 2 * .1; H: (1.8 / 3 + 1.4 / 2) / 2
        ({}, 0.65, 0.0095833),
        # .55 / 5 * .1, 3.2 / 5
        ({"aggregate": "token_mean"}, 0.64, 0.011),
        # outside: first and third, and the second of the other: (2 / 3 + 1 / 2) / 2 * .1, and 3 / 5 * .1
        ({"penalty": "indicator"}, 0.65, 0.0583333),
        ({"penalty": "indicator", "aggregate": "token_mean"}, 0.64, 0.06),
    ],
)
def test_two_rows_by_hand(recipe: Any, rollout: Any, options: Any, bonus: float, smooth: float) -> None:
    """Garbage in the padding; beta is 2 in the first iteration."""
    config = EPOConfig(kappa_low=0.5, kappa_high=1.5, alpha=0.1, entropy_coef=0.01, **PLAIN, **options)
    made = with_history(recipe(EPORecipe, config), 0.4, 0.6)
    found = statistics(made, example(rollout, made))
    assert found["entropy_loss"] == pytest.approx(-bonus)
    assert found["smoothing_loss"] == pytest.approx(0.01 * 2.0 * smooth, abs=1e-9)
    policy = found["policy_gradient_loss"]
    assert found["loss"] == pytest.approx(policy - 0.01 * (bonus - 2.0 * smooth), abs=1e-9)


def test_turns_count_once_however_long_they_are(rollout: Any) -> None:
    """Turns of 1 and 3 tokens, of 5, of none; sequences count once."""
    valid = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    share = turn_shares(rollout(torch.zeros(3, 5), valid))["turn_share"].t()
    expected = torch.tensor([[1 / 2, 0, 1 / 6, 1 / 6, 1 / 6], [1 / 5] * 5, [0] * 5], dtype=torch.float64)
    torch.testing.assert_close(share, expected)
    assert not turn_shares(rollout(torch.zeros(1, 2), torch.zeros(1, 2)))["turn_share"].any()


def loss_and_gradient(recipe: Any, rollout: Any, cls: Any, config: Any, *history: float) -> tuple[float, Tensor]:
    """By logits of three tokens: a policy whose entropies move with them."""
    made = recipe(cls, config)
    if history:
        with_history(made, *history)
    data = rollout([[-1.0] * 3, [-1.2] * 3], [[1, 1, 1], [1, 1, 0]], episode_reward=doubles(1, 0),
                   entropy=torch.ones(2, 3).double(), turn_share=torch.zeros(2, 3).double())  # fmt: skip
    data = Data(dict(data), raw=data.raw - {"turn_share"}, sequence=data.sequence)
    batch = turn_shares(made.prepare({"on": data}, context(3.0))["on"]).epoch(Batching("sequence", "full"), None)[0]
    logits = LOGITS.clone().requires_grad_()
    outputs = token_outputs(logits, TOKENS, frozenset({"log_prob", "entropy"}), 1.0, 1)
    loss, _ = surrogate(made.phases()[0].terms, outputs, batch)
    (gradient,) = torch.autograd.grad(loss, logits)
    return float(loss.detach()), gradient


LOGITS = torch.tensor([[[3.0, 0.0, -1.0], [0.5, 0.1, 0.0]], [[0.1, 0.0, 0.2], [2.0, 0.5, 0.0]],
                       [[1.0, 0.2, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)  # fmt: skip
"""``[T, N, V]``: entropies .26 1.07, 1.09 .68, .98 1.10."""
TOKENS = torch.tensor([[0, 1], [2, 0], [1, 0]])


class TurnMean(Recipe):
    """GRPO with means of turns."""

    def aggregate(self) -> Any:
        return lambda valid, batch: valid * batch["turn_share"] / batch["n_sequences"]


def test_open_corridors_are_entropy_regularisation(recipe: Any, rollout: Any) -> None:
    for options in ({"kappa_high": math.inf}, {"alpha": 0.0}):
        config = EPOConfig(entropy_coef=0.1, **PLAIN, **options)
        ours = loss_and_gradient(recipe, rollout, EPORecipe, config, 0.5)
        theirs = loss_and_gradient(recipe, rollout, TurnMean, config)
        assert ours[0] == pytest.approx(theirs[0], abs=1e-12)
        torch.testing.assert_close(ours[1], theirs[1], atol=1e-12, rtol=0)


def test_without_entropy_it_is_the_base_loss(recipe: Any, rollout: Any) -> None:
    config = EPOConfig(entropy_coef=0.0, **PLAIN)
    ours = loss_and_gradient(recipe, rollout, EPORecipe, config, 0.5)
    theirs = loss_and_gradient(recipe, rollout, TurnMean, config)
    assert ours[0] == theirs[0]
    assert torch.equal(ours[1], theirs[1])


def test_the_indicator_has_no_gradient(recipe: Any, rollout: Any) -> None:
    options = {"kappa_low": 0.5, "kappa_high": 1.5, "entropy_coef": 0.1, **PLAIN}
    ours = loss_and_gradient(recipe, rollout, EPORecipe, EPOConfig(penalty="indicator", **options), 0.6)
    without = loss_and_gradient(recipe, rollout, EPORecipe, EPOConfig(alpha=0.0, **options), 0.6)
    torch.testing.assert_close(ours[1], without[1], atol=1e-15, rtol=0)
    assert ours[0] > without[0]
    hinge = loss_and_gradient(recipe, rollout, EPORecipe, EPOConfig(**options), 0.6)
    assert (hinge[1] - without[1]).abs().max() > 1e-4


def test_finite_differences_across_the_corridor(recipe: Any, rollout: Any) -> None:
    """Mean 0.8: below 0.48 there is one token, above 0.96 there are three, one is inside."""
    config = EPOConfig(kappa_low=0.6, kappa_high=1.2, alpha=1.0, entropy_coef=0.3, **PLAIN)

    def value(logits: Tensor) -> tuple[float, Tensor]:
        global LOGITS
        kept, LOGITS = LOGITS, logits
        try:
            return loss_and_gradient(recipe, rollout, EPORecipe, config, 0.8)
        finally:
            LOGITS = kept

    gradient = value(LOGITS)[1]
    for place in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 0), (2, 0, 1)):
        step = torch.zeros_like(LOGITS)
        step[place] = 1e-6
        slope = (value(LOGITS + step)[0] - value(LOGITS - step)[0]) / 2e-6
        assert slope == pytest.approx(float(gradient[place]), rel=1e-6, abs=1e-9)


def test_the_history_is_the_mean_of_all_iterations_before(recipe: Any, rollout: Any) -> None:
    made = recipe(EPORecipe, EPOConfig(**PLAIN)).double()
    for k, mean in enumerate((1.0, 0.6, 0.8)):
        entropy = torch.tensor([[mean, mean + 0.1], [mean - 0.1, 99.0]], dtype=torch.float64)
        data = rollout(torch.zeros(2, 2), [[1, 1], [1, 0]], entropy=entropy, episode_reward=doubles(1, 0))
        have = made.prepare({"on": data}, context(float(k)))
        assert have["on"]["entropy_reference"].tolist() == pytest.approx([(0.0, 1.0, 0.8)[k]] * 2)
        assert bool((have["on"]["smoothing_weight"] > 0).all()) == (k > 0)
        stats: dict[str, Tensor] = {}
        made.after_update(have, stats, context(float(k)))
        assert float(stats["rollout_entropy"]) == pytest.approx(mean)
    found = made.start(data, context(3.0))
    assert float(found["entropy_reference"][0]) == pytest.approx(0.8)
    # 10 iterations: beta_3 = 1 + exp(-9 / 5)
    assert float(found["smoothing_weight"][0]) == pytest.approx(0.001 * (1.0 + math.exp(-1.8)))


def test_the_first_iteration_and_a_deterministic_past_have_no_corridor(recipe: Any, rollout: Any) -> None:
    for history in ((), (0.0, 0.0)):
        made = with_history(recipe(EPORecipe, EPOConfig(kappa_low=0.5, kappa_high=math.inf, **PLAIN)), *history)
        found = statistics(made, example(rollout, made))
        assert found["smoothing_loss"] == 0.0
        assert found["outside_corridor"] == 0.0


def test_schedules_of_the_weight(recipe: Any, rollout: Any) -> None:
    for schedule, factor in (("constant", 1.0), ("released", 1.0 - 0.2 * (1.0 - math.exp(-8.0 / 75.0)))):
        made = with_history(recipe(EPORecipe, EPOConfig(schedule=schedule, **PLAIN)), 0.5)
        weight = example(rollout, made, context(4.0))["smoothing_weight"]
        assert weight.tolist() == pytest.approx([0.001 * factor] * 2)


def test_equal_rewards_leave_the_entropy_terms_alone(recipe: Any, rollout: Any) -> None:
    made = with_history(recipe(EPORecipe, EPOConfig(entropy_coef=0.0, **PLAIN)), 0.5)
    data = rollout(torch.zeros(2, 3), torch.ones(2, 3), entropy=torch.ones(2, 3).double(), episode_reward=doubles(1, 1))
    assert not made.prepare({"on": data}, context())["on"]["advantage"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kappa_low": 1.2}, "kappa_low: expected a number in .0, 1., got 1.2"),
        ({"kappa_high": 0.9}, "kappa_high: expected >= 1 or inf, got 0.9"),
        ({"kappa_low": 1.0, "kappa_high": 1.0}, "expected kappa_low < kappa_high, got 1.0 and 1.0"),
        ({"entropy_coef": -0.1}, "entropy_coef: expected >= 0, got -0.1"),
        ({"schedule": "constant", "decay": 1.0}, "decay: expected 3.0 with schedule='constant'"),
        ({"aggregate": "turns"}, "aggregate: expected one of 'turn_mean', .*got 'turns'"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EPOConfig(**options)


SMALL = {"model": "tabular", "n_prompts": 8, "group_size": 8, "n_epochs": 4, "learning_rate": 0.1}


def test_learns_and_reports() -> None:
    agent = EPO("easy_hard", seed=0, env_kwargs={"questions": 4, "symbols": 5, "easy": 2}, **SMALL)
    before = agent.pass_at([1], questions=4, samples=64)["pass@1"]
    agent.learn(until=25 * agent.samples_per_iteration)
    assert before < 0.5
    assert agent.pass_at([1], questions=4, samples=64)["pass@1"] > 0.9
    assert float(agent.estimator.count) == 25
    names = ("rollout_entropy", "entropy_reference", "outside_corridor", "smoothing_loss", "entropy_loss")
    assert {f"train/{name}" for name in names} <= agent.scalars.keys()
    assert float(agent.scalars["train/entropy_reference"]) > float(agent.scalars["train/rollout_entropy"])


def test_turns_of_a_conversation() -> None:
    """Sequences weigh the same whatever their turns, and the update reads the column."""
    agent = EPO("guessing", seed=0, model_layers=1, model_width=16, model_heads=1, n_prompts=4, group_size=4)
    agent.learn(until=agent.samples_per_iteration)
    data = agent.collector.collect(Request(counts=torch.full((4,), 64)), agent.policy)
    share = turn_shares(data)["turn_share"]
    torch.testing.assert_close(share.sum(0), torch.ones(256))
    assert not share[data["valid"] == 0].any()
    replied = ((data["present"] - data["valid"]).sum(0) > 0).nonzero().flatten()
    assert len(replied) > 0
    assert "turn_share" in agent.estimator.read[agent.estimator.phases()[0].terms]


# -- contract -----------------------------------------------------------------------------------------------------


class TestEPOContract(RecipeContract):
    method = EPO
    published = {
        "kappa_low": 0.0,
        "kappa_high": 2.0,
        "alpha": 0.05,
        "decay": 3.0,
        "schedule": "paper",
        "penalty": "hinge",
        "entropy_coef": 0.001,
        "kl_coef": 0.01,
        "aggregate": "turn_mean",
    }
    options = {"kl_coef": 0.0, "entropy_coef": 0.5, "alpha": 1.0, "kappa_high": 1.1}
    matters = (
        ({}, {"kappa_high": 1.5}),
        ({}, {"kappa_low": 1.0}),
        ({}, {"alpha": 0.1}),
        ({}, {"penalty": "indicator"}),
        ({}, {"aggregate": "token_mean"}),
        ({}, {"entropy_coef": 0.1}),
    )
    refused = {"verl": "compares with a reference policy"}
    exceptions = {
        "test_equal_rewards_have_no_gradient": "an entropy bonus is part of the loss",
        "test_equal_rewards_leave_the_first_policy_alone": "an entropy bonus is part of the loss",
    }

    def made(self, dtype: torch.dtype = torch.float64, moved: bool = True, **settings: Any) -> Any:
        """With a history, so that the corridor is there: the bandit's entropies are near ln 4, ln 5 or 0."""
        agent = super().made(dtype, moved, **settings)
        agent.estimator.entropy_sum.fill_(1.39)
        agent.estimator.count.fill_(1.0)
        return agent
