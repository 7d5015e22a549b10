"""EMPG: numbers by hand, where steps begin and end, what the modulation leaves alone, learning, resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.llm.baselines import GRPOConfig
from agents.llm.empg import EMPG, EMPGConfig, EMPGRecipe, ModulateSteps, modulate
from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators.recipe import Recipe
from ccrl.estimators.steps import find_steps
from ccrl.estimators.terms import surrogate
from ccrl.llm.policy import token_outputs
from ccrl.testing.recipe_contract import RecipeContract


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


ADVANTAGE, ENTROPY = doubles(1, 1, 1, -1, -1), doubles(0.2, 0.6, 1.0, 0.4, 0.2)
LAST = torch.tensor([False, False, True, False, True])


def test_five_steps_of_two_trajectories() -> None:
    final, factor = modulate(ADVANTAGE, ENTROPY, LAST)
    torch.testing.assert_close(factor, doubles(1.332193, 0.808016, 0.490086, 1.037513, 1.332193), atol=6e-7, rtol=0)
    expected = doubles(1.301240, 0.753198, 0.398480, -1.029119, -1.423799)
    torch.testing.assert_close(final, expected, atol=6e-7, rtol=0)
    before = doubles(1.392846, 0.844804, 0.490086, -0.937513, -1.332193)
    torch.testing.assert_close(final, before - before.mean(), atol=1e-6, rtol=0)


def test_equal_entropies() -> None:
    final, factor = modulate(doubles(1, 1, -1), torch.full((3,), 0.7).double(), torch.tensor([False, True, True]))
    torch.testing.assert_close(factor, torch.ones(3).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(final, doubles(0.733333, 0.633333, -1.366667), atol=6e-7, rtol=0)


def test_without_scale_and_bonus_it_only_centres() -> None:
    final, factor = modulate(ADVANTAGE, ENTROPY, LAST, scale=0.0, zeta=0.0)
    torch.testing.assert_close(factor, torch.ones(5).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(final, ADVANTAGE - ADVANTAGE.mean(), atol=1e-7, rtol=0)


def test_the_factors_average_to_one_and_fall_with_entropy() -> None:
    entropy = torch.rand(200, dtype=torch.float64) * 3
    final, factor = modulate(torch.randn(200).double(), entropy, torch.rand(200) < 0.3)
    assert float(factor.mean()) == pytest.approx(1.0, abs=1e-7)
    assert (factor[entropy.argsort()].diff() < 0).all()
    assert float(final.sum()) == pytest.approx(0.0, abs=1e-12)


def test_scale_and_origin_of_the_entropies_do_not_matter() -> None:
    final, _ = modulate(ADVANTAGE, ENTROPY, LAST)
    other, _ = modulate(ADVANTAGE, 7.0 * ENTROPY - 3.0, LAST)
    torch.testing.assert_close(final, other, atol=1e-7, rtol=0)


def test_the_last_step_gets_no_bonus() -> None:
    (a, _), (b, _) = (modulate(ADVANTAGE, ENTROPY, LAST, zeta=zeta) for zeta in (0.0, 0.4))
    ahead = torch.exp(-doubles(0.5, 1.0, 0.0))  # of the entropies that follow steps 0, 1 and 3
    bonus = 0.4 * doubles(ahead[0], ahead[1], 0.0, ahead[2], 0.0)
    torch.testing.assert_close(b - a, bonus - bonus.mean(), atol=1e-7, rtol=0)


def test_expected_squared_score_is_one_minus_the_collision_probability() -> None:
    uniform = torch.zeros(5, dtype=torch.float64)
    for logits, expected in ((doubles(0.7, 0.2, 0.1).log(), 0.46), (uniform, 0.8), (torch.randn(7).double(), None)):
        pi = logits.softmax(0)
        scores = torch.eye(len(pi), dtype=torch.float64) - pi
        size = float((pi * scores.square().sum(1)).sum())
        out = token_outputs(logits, torch.tensor(0), frozenset({"sum_pi2"}), 1.0, 1)
        assert size == pytest.approx(1.0 - float(out["sum_pi2"]), abs=1e-12)
        assert expected is None or size == pytest.approx(expected, abs=1e-12)


# -- steps ------------------------------------------------------------------------------------------------------------

VALID = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]]).t()


def test_turns_are_stretches_of_valid_tokens() -> None:
    steps = find_steps(VALID.float(), None)
    assert steps.tokens.tolist() == [2, 2, 4, 2, 1]
    assert steps.last.tolist() == [False, True, True, False, True]
    assert steps.number.t().tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, 0], [0] * 5, [0, 3, 3, 0, 4]]


def test_delimiters_cut_turns_and_belong_to_the_step_they_end() -> None:
    token = torch.tensor([[5, 9, 1, 9, 1], [9, 1, 9, 9, 1], [9, 9, 9, 9, 9], [9, 1, 2, 9, 1]]).t()
    steps = find_steps(VALID.float(), token, "delimiter", 9)
    assert steps.tokens.tolist() == [2, 1, 1, 1, 2, 1, 2, 1]
    assert steps.last.tolist() == [False, False, True, False, False, True, False, True]


def test_every_token_is_a_step() -> None:
    steps = find_steps(VALID.float(), None, "token")
    assert steps.tokens.tolist() == [1] * 11
    assert steps.last.nonzero().flatten().tolist() == [3, 7, 10]


def example(rollout: Any, **columns: Tensor) -> Data:
    """The five steps of the first test, of one to three tokens; garbage where nothing is valid."""
    valid = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 0, 0, 0]], dtype=torch.float64)
    entropy = torch.stack([doubles(0.1, 0.3, 9, 0.6, -9, 0.5, 1.0, 1.5), doubles(0.4, 9, 0.2, 0.2, 9, 9, 9, 9)])
    return rollout(torch.zeros(2, 8), valid, entropy=entropy, **columns)


def test_tokens_get_the_advantage_of_their_step_however_long_it_is(rollout: Any) -> None:
    data = example(rollout)
    data = data.derive(advantage=doubles(1, -1).expand(8, 2) * data["valid"])
    found = ModulateSteps(EMPGConfig())(data)
    a, b, c, d, e = 1.301240, 0.753198, 0.398480, -1.029119, -1.423799
    expected = torch.stack([doubles(a, a, 0, b, 0, c, c, c), doubles(d, 0, e, e, 0, 0, 0, 0)], 1)
    torch.testing.assert_close(found["advantage"], expected, atol=6e-7, rtol=0)
    assert float(found["step_scale"][0, 0]) == pytest.approx(1.332193, abs=6e-7)
    padded = example(rollout)
    padded = Data({k: torch.cat([padded[k], padded[k][:1] * 0]) for k in ("valid", "entropy", "log_prob")})
    padded = padded.derive(advantage=doubles(1, -1).expand(9, 2) * padded["valid"])
    torch.testing.assert_close(ModulateSteps(EMPGConfig())(padded)["advantage"][:8], expected, atol=6e-7, rtol=0)


def test_a_rollout_without_steps_is_left_alone(rollout: Any) -> None:
    data = rollout(torch.zeros(2, 3), torch.zeros(2, 3), entropy=torch.zeros(2, 3)).derive(advantage=torch.zeros(3, 2))
    assert ModulateSteps(EMPGConfig())(data) is data


def test_one_step_is_centred_to_nothing_and_said_so(rollout: Any) -> None:
    data = rollout(torch.zeros(1, 3), torch.ones(1, 3), entropy=torch.rand(1, 3)).derive(advantage=torch.ones(3, 1))
    with pytest.warns(UserWarning, match="one step"):
        assert not ModulateSteps(EMPGConfig())(data)["advantage"].any()


def test_delimiters_need_tokens(rollout: Any) -> None:
    data = example(rollout).derive(advantage=torch.ones(8, 2))
    with pytest.raises(ValueError, match="expected a column of tokens 'action'"):
        ModulateSteps(EMPGConfig(step="delimiter", delimiter=3))(data)


# -- the recipe -------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A policy whose log-probability and entropy are a parameter."""

    unit = "sequence"

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(steps, width, dtype=torch.float64))

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        return dict.fromkeys(want, self.table * 1.0)


def test_advantages_are_constants_of_the_rollout(recipe: Any, rollout: Any, value_and_gradient: Any) -> None:
    """Other parameters change the ratio, not the advantage; on policy the gradient is ``-A / (tokens sequences)``."""
    policy = Fixed(8, 2)
    made = recipe(EMPGRecipe, EMPGConfig(), policy)
    data = example(rollout, episode_reward=doubles(1, 0))
    first = made.prepare({"on": data}, None)["on"]
    with torch.no_grad():
        policy.table.add_(1.0)
    second = made.prepare({"on": data}, None)["on"]
    assert torch.equal(first["advantage"], second["advantage"])
    assert not first["advantage"].requires_grad
    batch = first.epoch(Batching("sequence", "full"), None)[0]
    _, gradient = value_and_gradient(made, torch.zeros(2, 8), batch)
    lengths = batch["valid"].sum(0)
    torch.testing.assert_close(gradient.t(), -batch["advantage"] / lengths / 2, atol=1e-12, rtol=0)


def test_equal_scores_are_not_free_of_gradient(recipe: Any, rollout: Any) -> None:
    """Unlike GRPO's: the bonus does not look at the outcome."""
    data = example(rollout, episode_reward=doubles(1, 1))
    found = recipe(EMPGRecipe, EMPGConfig()).prepare({"on": data}, None)["on"]["advantage"]
    assert found.any()
    silent = recipe(EMPGRecipe, EMPGConfig(zeta=0.0)).prepare({"on": data}, None)["on"]["advantage"]
    assert not silent.any()


def test_control_episodes_take_the_entropy_of_their_policy(recipe: Any, rollout: Any) -> None:
    """Environment steps store none: the policy that sampled them is asked. One step of the episode is one step."""
    valid = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.float64)
    reward, carry = torch.ones(2, 3, dtype=torch.float64), torch.tensor([[1.0, 1, 0], [1, 0, 0]], dtype=torch.float64)
    policy = Fixed(3, 2)
    data = rollout(torch.zeros(2, 3), valid, reward=reward, carry=carry)
    made = recipe(EMPGRecipe, EMPGConfig(step="token"), policy)
    prepared = made.prepare({"on": data}, None)["on"]
    entropy = policy.table.detach()
    order = torch.cat([entropy[:, 0], entropy[:2, 1]])
    advantage = doubles(1, 1, 1, -1, -1) * 0.5 / (0.5**0.5 + 1e-6)
    expected, _ = modulate(advantage, order, torch.tensor([False, False, True, False, True]))
    torch.testing.assert_close(torch.cat([prepared["advantage"][:, 0], prepared["advantage"][:2, 1]]), expected)
    batch = prepared.epoch(Batching("sequence", "full"), None)[0]
    value, _ = surrogate(made.phases()[0].terms, {"log_prob": torch.zeros(3, 2)}, batch)
    assert bool(value.isfinite())


def test_single_turns_without_bonus_are_grpo_rescaled(recipe: Any, rollout: Any) -> None:
    data = rollout(torch.zeros(2, 3), torch.ones(2, 3), entropy=torch.tensor([[0.5] * 3, [2.0] * 3]).double(),
                   episode_reward=doubles(1, 0))  # fmt: skip
    ours = recipe(EMPGRecipe, EMPGConfig()).prepare({"on": data}, None)["on"]["advantage"][0]
    grpo = recipe(Recipe, GRPOConfig()).prepare({"on": data}, None)["on"]["advantage"][0]
    factor = torch.exp(-doubles(0, 1)) / torch.exp(-doubles(0, 1)).mean()
    torch.testing.assert_close(ours, grpo * factor - (grpo * factor).mean(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, "scale: expected >= 0, got -1.0"),
        ({"clarity": float("nan")}, "clarity: expected >= 0 and finite, got nan"),
        ({"zeta": -0.1}, "zeta: expected >= 0, got -0.1"),
        ({"step": "word"}, "step: expected one of 'turn', 'delimiter', 'token', got 'word'"),
        ({"step": "delimiter"}, r"delimiter: expected a token \(>= 0\)"),
        ({"delimiter": 3}, "and -1 without, got 3 with step='turn'"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMPGConfig(**options)


SMALL = {"model": "tabular", "n_prompts": 8, "group_size": 8, "n_epochs": 4, "learning_rate": 0.1}


def test_learns() -> None:
    agent = EMPG("modsum", EMPG.Settings(**SMALL, step="token"), seed=0,
                 env_kwargs={"questions": 3, "fixed_length": 2, "symbols": 3})  # fmt: skip
    before = agent.pass_at([1], questions=3, samples=64)["pass@1"]
    agent.learn(until=30 * agent.samples_per_iteration)
    assert before < 0.5
    assert agent.pass_at([1], questions=3, samples=64)["pass@1"] > 0.9


def test_turns_of_a_conversation() -> None:
    """The sampler's replies separate steps: a new model is asked to go on in some of 256 games."""
    config = EMPG.Settings(model_layers=1, model_width=16, model_heads=1, n_prompts=4, group_size=4)
    agent = EMPG("guessing", config, seed=0)
    agent.learn(until=agent.samples_per_iteration)
    data = agent.collector.collect(Request(counts=torch.full((4,), 64)), agent.policy)
    steps = find_steps(data["valid"], None)
    replies = (data["present"] - data["valid"]).sum(0)
    assert 256 < len(steps.tokens) <= 256 + int(replies.sum())
    for column in replies.nonzero().flatten().tolist():
        numbers = steps.number[data["valid"][:, column] > 0, column].unique()
        assert 1 <= len(numbers) <= 1 + int(replies[column])


def test_resumes_exactly(resumes: Any, tmp_path: Any) -> None:
    resumes(EMPG, "modsum", EMPG.Settings(**SMALL, step="token", batch_size=16), tmp_path / "agent.pt")


# -- contract -----------------------------------------------------------------------------------------------------


class TestEMPGContract(RecipeContract):
    method = EMPG
    published = {
        "scale": 1.0,
        "clarity": 1.0,
        "zeta": 0.1,
        "step": "turn",
        "delimiter": -1,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregate": "sequence_mean_token_mean",
    }
    matters = (
        ({"step": "token"}, {"step": "token", "scale": 0.1}),
        ({"step": "token"}, {"step": "token", "clarity": 3.0}),
        ({"step": "token"}, {"step": "token", "zeta": 1.0}),
        ({}, {"step": "token"}),
        ({}, {"step": "delimiter", "delimiter": 2}),
    )
    refused = {"verl": "wants ['entropy'] of the policy"}
