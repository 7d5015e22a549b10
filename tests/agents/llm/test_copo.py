"""COPO: entropies, two advantages and their blend by hand, what each mode is, the global gradient, learning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.grouped import Grouped
from agents.llm.baselines import GRPOConfig
from agents.llm.copo import COPO, Consistency, COPOConfig, COPORecipe, answer_entropy, blended, consistency_coefficient
from ccrl.data import Batching, Data
from ccrl.estimators.groups import Groups
from ccrl.estimators.losses import clip
from ccrl.estimators.recipe import Recipe
from ccrl.estimators.terms import LogRatio
from ccrl.testing.recipe_contract import RecipeContract

REWARD = [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]]
ANSWER = [[0, 0, 0, 0], [1, 2, 3, 4], [0, 1, 0, 2]]


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def prepared(
    recipe: Any, rollout: Any, reward: Any = REWARD, answer: Any = ANSWER, steps: int = 1, **options: Any
) -> Data:
    """Groups of four completions of ``steps`` tokens."""
    reward = torch.tensor(reward, dtype=torch.float64).flatten()
    group = torch.arange(len(reward)) // 4
    data = rollout(torch.zeros(len(reward), steps), torch.ones(len(reward), steps), episode_reward=reward, group=group,
                   answer=torch.tensor(answer).flatten())  # fmt: skip
    return made(recipe, **options).prepare({"on": data}, None)["on"]


def made(recipe: Any, **options: Any) -> Any:
    policy = torch.nn.Identity()
    policy.register_buffer("temperature", torch.ones(()))  # of a token policy
    return recipe(COPORecipe, COPOConfig(**options), policy)


def blend(data: Data) -> Tensor:
    """``w A_l + (1 - w) A_g`` ``[Q, 4]``."""
    weight = data["local_weight"]
    return (weight * data["advantage"][0] + (1.0 - weight) * data["global_advantage"]).view(-1, 4)


def per_group(x: Tensor) -> list[float]:
    assert bool((x.view(-1, 4) == x.view(-1, 4)[:, :1]).all())
    return x.view(-1, 4)[:, 0].tolist()


def test_three_groups_by_hand(recipe: Any, rollout: Any) -> None:
    data = prepared(recipe, rollout, gamma=3.0)
    # one answer; four; shares 1/2, 1/4, 1/4: 1/2 + 2/4 + 2/4 bits
    assert per_group(data["answer_entropy"]) == pytest.approx([0.0, 2.0, 1.5])
    # means 1, 0, 0.5: deviation 0.5
    assert per_group(data["global_advantage"]) == pytest.approx([1.0, -1.0, 0.0], abs=1e-5)
    assert data["advantage"][0, 8:].tolist() == pytest.approx([0.8660, -0.8660, 0.8660, -0.8660], abs=5e-5)
    assert not data["advantage"][0, :8].any()
    # sigmoid(3 (H - 1)) at -3, 3, 1.5
    assert per_group(data["local_weight"]) == pytest.approx([0.0474, 0.9526, 0.8176], abs=5e-5)
    expected = [[0.9526] * 4, [-0.0474] * 4, [0.7080, -0.7080, 0.7080, -0.7080]]
    torch.testing.assert_close(blend(data), torch.tensor(expected, dtype=torch.float64), atol=6e-5, rtol=0)


def test_three_groups_with_the_coefficient(recipe: Any, rollout: Any) -> None:
    """lam = (3/4) / 2; 0.5 (1 - 0.375 * 1.5) = 0.21875."""
    data = prepared(recipe, rollout, gamma=3.0, coefficient=True)
    assert per_group(data["global_advantage"]) == pytest.approx([1.1294, -0.7728, -0.3567], abs=5e-5)
    expected = [[1.0759] * 4, [-0.0366] * 4, [0.6430, -0.7731, 0.6430, -0.7731]]
    torch.testing.assert_close(blend(data), torch.tensor(expected, dtype=torch.float64), atol=6e-5, rtol=0)


def test_the_coefficient() -> None:
    """``lam`` is what 1 bit takes away."""
    for size, lam in ((2, 0.5), (4, 0.375), (6, 0.322377), (8, 0.291667)):
        found = consistency_coefficient(doubles(0.0, 1.0, math.log2(size)), doubles(size, size, size))
        assert found.tolist() == pytest.approx([1.0, 1.0 - lam, 1.0 / size], abs=5e-7)
    found = consistency_coefficient(doubles(0, 1, 1.5, 2), doubles(4, 4, 4, 4))
    assert found.tolist() == pytest.approx([1.0, 0.625, 0.4375, 0.25])
    assert consistency_coefficient(doubles(0.0), doubles(1.0)).tolist() == [1.0]


@pytest.mark.parametrize(
    ("gamma", "rho", "entropy", "weight"),
    [
        (20.0, 1.5, 0.0, 9.4e-14), (20.0, 1.5, 1.0, 4.54e-5), (20.0, 1.5, 1.5, 0.5), (20.0, 1.5, 2.0, 0.999955),
        (5.0, 1.0, 0.0, 0.006693), (5.0, 1.0, 1.0, 0.5), (0.0, 1.0, 0.0, 0.5), (0.0, 1.0, 2.0, 0.5),
        (5.0, -math.inf, 0.0, 1.0), (5.0, math.inf, 2.0, 0.0),
    ],
)  # fmt: skip
def test_the_weight(gamma: float, rho: float, entropy: float, weight: float) -> None:
    found = Consistency(COPOConfig(gamma=gamma, rho=rho)).weight(doubles(entropy), torch.tensor([False]))
    assert float(found) == pytest.approx(weight, rel=5e-3, abs=1e-300)


def loss_and_gradient(value_and_gradient: Any, data: Data, whole: Any) -> tuple[float, Tensor]:
    moved = 0.5 * torch.randn(12, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return value_and_gradient(whole, moved, data.epoch(Batching("sequence", "full"), None)[0])


def test_limits_of_rho_are_grpo_and_the_global_loss(recipe: Any, rollout: Any, value_and_gradient: Any) -> None:
    def found(cls: Any = COPORecipe, **options: Any) -> tuple[float, Tensor]:
        data = prepared(recipe, rollout, steps=2, **options)
        whole = made(recipe, **options) if cls is COPORecipe else recipe(cls, COPOConfig(**options))
        return loss_and_gradient(value_and_gradient, data, whole)

    class Dual(Recipe):
        def loss(self) -> Any:
            return clip(0.2, 0.2, 3.0)

    grpo = found(Dual, mode="local")
    for value, gradient in (found(rho=-math.inf), found(mode="local")):
        assert value == pytest.approx(grpo[0], abs=1e-12)
        torch.testing.assert_close(gradient, grpo[1], atol=1e-12, rtol=0)
    (value, gradient), shared = found(rho=math.inf), found(mode="global")
    assert value == pytest.approx(shared[0], abs=1e-12)
    torch.testing.assert_close(gradient, shared[1], atol=1e-12, rtol=0)
    assert (gradient - grpo[1]).abs().max() > 1e-3


def test_each_advantage_is_clipped_for_itself() -> None:
    ratio, local, shared = doubles(0.7, 1.0, 1.4)[None], doubles(1, 1, -1)[None], doubles(-0.5, -0.5, 0.8)
    level = LogRatio(ratio.log(), torch.zeros_like(ratio), torch.ones_like(ratio))
    batch = Data({"local_weight": torch.full((3,), 0.3).double(), "global_advantage": shared})
    clipped = clip(0.2, 0.2, 3.0)
    # -0.7 and 0.8 * 0.5; -1 and 0.5; 1.4 and -1.2 * 0.8
    torch.testing.assert_close(blended(clipped)(level, local, {}, batch), doubles(0.07, 0.05, -0.252)[None])
    other = clipped(level, 0.3 * local + 0.7 * shared, {}, batch)
    torch.testing.assert_close(other, doubles(0.04, 0.05, -0.312)[None])


def test_names_of_answers_and_order_do_not_matter(recipe: Any, rollout: Any) -> None:
    first = prepared(recipe, rollout)
    renamed = prepared(recipe, rollout, answer=[[7, 7, 7, 7], [9, 4, 2, 0], [5, 8, 5, 6]])
    for name in ("answer_entropy", "local_weight", "global_advantage"):
        torch.testing.assert_close(renamed[name], first[name], atol=1e-12, rtol=0)
    permuted = prepared(recipe, rollout, reward=[row[::-1] for row in REWARD], answer=[row[::-1] for row in ANSWER])
    for name in ("answer_entropy", "local_weight"):
        torch.testing.assert_close(permuted[name], first[name], atol=1e-12, rtol=0)
    twice = prepared(recipe, rollout, reward=REWARD * 2, answer=ANSWER * 2)
    for name in ("answer_entropy", "local_weight"):
        torch.testing.assert_close(twice[name], first[name].repeat(2), atol=1e-12, rtol=0)
    # the sample deviation of 1, 0, 0.5 is 0.5; of the six sqrt(1 / 5)
    torch.testing.assert_close(twice["global_advantage"], first["global_advantage"].repeat(2) * (0.5 * 5**0.5),
                               atol=1e-5, rtol=0)  # fmt: skip


def test_the_global_gradient_is_a_gth_of_the_exact_one(recipe: Any, rollout: Any) -> None:
    """``E[(1/G) sum_j s_j mean_k R_k] = grad J / G``: pairs of two completions have expectation 0. The global advantage
    divides by the deviation of ``mean_k R_k``, and its mean adds nothing in expectation."""
    theta, reward = doubles(0.3, -0.2, 0.1, 0.0, 0.5), doubles(1, 0, 0, 1, 0)
    p = theta.softmax(0)
    exact = p * (reward - p @ reward) / 4
    torch.testing.assert_close(exact, doubles(0.0344, -0.0137, -0.0185, 0.0255, -0.0276), atol=6e-5, rtol=0)
    arm = torch.multinomial(p, 4 * 25_000, replacement=True, generator=torch.Generator().manual_seed(0))
    data = rollout(torch.zeros(len(arm), 1), torch.ones(len(arm), 1), episode_reward=reward[arm],
                   group=torch.arange(len(arm)) // 4)  # fmt: skip
    advantage = made(recipe, mode="global").prepare({"on": data}, None)["on"]["global_advantage"]
    deviation = reward[arm].view(-1, 4).mean(1).std()
    scores = torch.nn.functional.one_hot(arm, 5).double() - p
    found = deviation * (scores * advantage[:, None]).mean(0)
    torch.testing.assert_close(found, exact, atol=2e-3, rtol=0)


def test_forced_modes_leave_unanimous_groups_to_the_global_loss(recipe: Any, rollout: Any) -> None:
    for mode, mixed in (("forced", 1.0), ("soft_forced", 0.924142)):  # sigmoid(5 (1.5 - 1))
        assert per_group(prepared(recipe, rollout, mode=mode)["local_weight"]) == pytest.approx([0, 0, mixed], abs=1e-6)


def test_forced_loss_of_a_unanimous_group_is_the_global_one(recipe: Any, rollout: Any, value_and_gradient: Any) -> None:
    blind = made(recipe, mode="soft_forced")
    data = prepared(recipe, rollout, steps=2, mode="soft_forced").take(torch.arange(8))
    leaf = 0.5 * torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, gradient = value_and_gradient(blind, leaf, data.epoch(Batching("sequence", "full"), None)[0])
    alone = data.derive(advantage=data["global_advantage"].expand(2, -1)).derive_sequence(local_weight=torch.ones(8))
    other = value_and_gradient(blind, leaf, alone.epoch(Batching("sequence", "full"), None)[0])
    assert value == other[0] != 0.0
    assert torch.equal(gradient, other[1])


def test_zero_modes_look_at_single_completions(recipe: Any, rollout: Any) -> None:
    assert prepared(recipe, rollout, mode="zero")["local_weight"].tolist() == [1.0] * 4 + [0.0] * 4 + [1, 0, 1, 0]
    soft = prepared(recipe, rollout)["local_weight"]
    found = prepared(recipe, rollout, mode="soft_zero")["local_weight"]
    torch.testing.assert_close(found, soft * torch.tensor(REWARD).flatten())


def test_missing_answers() -> None:
    answer, groups = torch.tensor([-1, -1, -1, 5, 5, -1]), Groups(torch.tensor([0, 0, 0, 0, 1, 1]))
    assert answer_entropy(answer, groups).tolist() == pytest.approx([0.811278, 1.0], abs=1e-6)  # 3/4 and 1/4
    assert answer_entropy(answer, groups, "distinct").tolist() == pytest.approx([2.0, 1.0])


def test_prompts_that_do_not_differ_have_no_global_advantage(recipe: Any, rollout: Any) -> None:
    """Nor does one prompt alone, whose sample deviation would be NaN; groups of other sizes round their means
    differently."""
    assert not prepared(recipe, rollout, reward=[[1, 0, 0, 0]], answer=[[0, 1, 2, 3]])["global_advantage"].any()
    assert not prepared(recipe, rollout, reward=[[0.1] * 4] * 3)["global_advantage"].any()
    reward = torch.full((11,), 0.1)
    data = rollout(torch.zeros(11, 1), torch.ones(11, 1), episode_reward=reward, answer=torch.zeros(11).long(),
                   group=torch.tensor([0] * 5 + [1] * 6))  # fmt: skip
    assert not made(recipe).prepare({"on": data}, None)["on"]["global_advantage"].any()


def test_a_group_of_one_keeps_its_reward(recipe: Any, rollout: Any) -> None:
    data = rollout(torch.zeros(2, 1), torch.ones(2, 1), episode_reward=doubles(1, 0), answer=torch.tensor([0, 1]),
                   group=torch.tensor([0, 1]))  # fmt: skip
    found = made(recipe, coefficient=True).prepare({"on": data}, None)["on"]
    assert found["advantage"][0].tolist() == pytest.approx([1.0, 0.0], abs=1e-5)
    assert found["global_advantage"].tolist() == pytest.approx([0.7071, -0.7071], abs=5e-5)


def test_failures_that_are_raised_are_counted(recipe: Any, rollout: Any) -> None:
    """Three of four right with one answer each: nearly unanimous, so the wrong one gets the prompt's advantage."""
    found = made(recipe, gamma=20.0, rho=1.5)
    data = prepared(recipe, rollout, reward=[[1, 1, 1, 0], [0, 0, 0, 0]], answer=[[0, 0, 0, 1], [0, 1, 2, 3]],
                    gamma=20.0, rho=1.5)  # fmt: skip
    stats: dict[str, Tensor] = {}
    found.after_update({"on": data}, stats, None)
    assert float(stats["raised_failures"]) == 1 / 8
    assert float(stats["answer_entropy"]) == pytest.approx((0.811278 + 2.0) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "soft with zero"}, "mode: expected one of 'soft', .*got 'soft with zero'"),
        ({"gamma": -1.0}, "gamma: expected >= 0, got -1.0"),
        ({"rho": float("nan")}, "rho: expected a finite number or inf or -inf, got nan"),
        ({"gamma": 0.0, "rho": math.inf}, "rho: expected a finite number with gamma = 0"),
        ({"mode": "forced", "gamma": 3.0}, "gamma: expected 5.0 with mode='forced', which does not read it, got 3.0"),
        ({"mode": "global", "missing": "distinct"}, "missing: expected 'one' with mode='global'"),
        ({"mode": "local", "coefficient": True}, "coefficient: expected False with mode='local'"),
        ({"dual_clip": 1.0}, "dual_clip: expected > 1, got 1.0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        COPOConfig(**options)


def test_control_episodes_have_no_answers() -> None:
    options = {"method": "copo", "n_groups": 2, "group_size": 4, "n_steps": 30, "hidden": (8,), "seed": 0}
    with pytest.raises(ValueError, match="'copo' does not fit control tasks: mode='soft' compares final answers"):
        Grouped("CartPole-v1", **options)
    agent = Grouped("CartPole-v1", mode="forced", **options)
    agent.learn(until=agent.samples_per_iteration)
    assert 0.0 < float(agent.scalars["train/local_weight"]) <= 1.0


def test_defaults_are_grpos_elsewhere() -> None:
    assert (COPOConfig().clip_low, COPOConfig().clip_high) == (GRPOConfig().clip_low, GRPOConfig().clip_high)


def test_learns_and_reports() -> None:
    options = {"model": "tabular", "n_prompts": 8, "n_epochs": 4, "learning_rate": 0.1}
    agent = COPO("easy_hard", seed=0, env_kwargs={"questions": 4, "symbols": 5, "easy": 2}, **options)
    before = agent.pass_at([1], questions=4, samples=64)["pass@1"]
    agent.learn(until=30 * agent.samples_per_iteration)
    assert before < 0.5
    assert agent.pass_at([1], questions=4, samples=64)["pass@1"] > 0.9
    assert 0.0 <= float(agent.scalars["train/local_weight"]) <= 1.0
    assert {"train/answer_entropy", "train/raised_failures"} <= agent.scalars.keys()


# -- contract -----------------------------------------------------------------------------------------------------


class TestCOPOContract(RecipeContract):
    method = COPO
    published = {
        "group_size": 6,
        "mode": "soft",
        "gamma": 5.0,
        "rho": 1.0,
        "coefficient": False,
        "missing": "one",
        "dual_clip": 3.0,
        "aggregate": "sequence_mean_token_mean",
    }
    matters = (
        ({}, {"gamma": 1.0}),
        ({}, {"rho": 2.0}),
        ({}, {"mode": "local"}),
        ({}, {"mode": "global"}),
        ({}, {"mode": "forced"}),
        ({"clip_high": 0.0, "mode": "global"}, {"clip_high": 0.0, "mode": "global", "dual_clip": 1.0001}),
    )
    refused = {"trl": "no column 'answer'", "verl": "compares final answers"}
    hosted = {"trl": {"mode": "forced"}}
