"""ETR (a reconstruction): ranges and losses by hand, what they follow, limits, learning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm.etr import ETR, ElasticRange, ETRConfig, ETRRecipe, elastic_clip, make_factor
from ccrl.data import Batching, Data
from ccrl.estimators import aggregates
from ccrl.estimators.losses import weighted_ratio
from ccrl.estimators.recipe import Recipe
from ccrl.estimators.stages import GroupBaseline
from ccrl.estimators.terms import LogRatio
from ccrl.testing.recipe_contract import RecipeContract

WIDE: dict[str, Any] = {"micro": 5.0, "macro": 5.0, "clip_low": 0.01, "clip_high": 0.01, "range_min": 1e-3}
FORMS = ("additive", "multiplicative", "implicit_abs", "implicit_sq")


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def eps(advantage: float, p: float, **options: Any) -> float:
    """The upper range of a completion in a group with share ``p`` of right ones, by advantage alone."""
    c = ETRConfig(**options)
    centred = doubles((1.0 - p) if advantage > 0 else -p)
    factor = make_factor(c.form, c.micro, c.macro, c.neutral)(
        doubles(advantage), centred, doubles(p), doubles(p * (1 - p))
    )
    return float((c.clip_high * factor).clamp(c.range_min, c.range_max))


def ranges(right: int, of: int = 8, **options: Any) -> Data:
    """A whole group: the advantages are population z-scores without eps, as the numbers below."""
    reward = torch.zeros(of, dtype=torch.float64)
    reward[:right] = 1.0
    data = Data({"episode_reward": reward, "group": torch.zeros(of, dtype=torch.int64),
                 "valid": torch.ones(1, of).double()}, sequence=frozenset({"episode_reward", "group"}))  # fmt: skip
    z = GroupBaseline(scale="std", ddof=0, eps=0.0, single="zero")
    config = ETRConfig(**options)
    return ElasticRange(config, make_factor(config.form, config.micro, config.macro, config.neutral))(z(data))


def test_ranges_by_hand() -> None:
    """0.2 (1 + 0.5 tanh|A| + 0.5 * 4 p (1 - p)): tanh 1 = 0.761594, 4 * 0.125 * 0.875 = 0.4375."""
    assert eps(1.0, 0.5) == pytest.approx(0.376159, abs=6e-7)
    assert eps(2.645751, 0.125) == pytest.approx(0.342748, abs=6e-7)
    assert eps(-0.377964, 0.125) == pytest.approx(0.279844, abs=6e-7)
    assert eps(0.0, 0.0) == pytest.approx(0.2)
    found = ranges(1)
    assert found["advantage"][0, :2].tolist() == pytest.approx([2.645751, -0.377964], abs=6e-7)
    assert found["range_high"][0, :2].tolist() == pytest.approx([0.342748, 0.279844], abs=6e-7)
    assert torch.equal(found["range_low"], found["range_high"])
    assert found["reward_spread"].tolist() == pytest.approx([0.4375] * 8)


def losses_at(advantage: Tensor, ratio: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    log_prob = ratio.log()[None].requires_grad_()
    level = LogRatio(log_prob, torch.zeros_like(log_prob), torch.ones_like(log_prob))
    element = elastic_clip(level, advantage[None], {}, Data({"range_low": low[None], "range_high": high[None]}))
    (gradient,) = torch.autograd.grad(element.sum(), log_prob)
    return element.detach()[0], gradient[0]


def test_token_losses_by_hand() -> None:
    advantage, ratio = doubles(2.645751, -0.377964), doubles(1.35, 0.70)
    high = doubles(0.342748, 0.279844)
    value, _ = losses_at(advantage, ratio, high, high)
    # -1.342748 * 2.645751; (1 - 0.279844) * 0.377964
    torch.testing.assert_close(value, doubles(-3.552578, 0.272193), atol=2e-6, rtol=0)
    plain = doubles(0.2, 0.2)
    torch.testing.assert_close(losses_at(advantage, ratio, plain, plain)[0], doubles(-3.174902, 0.302372), atol=2e-6,
                               rtol=0)  # fmt: skip


def batch_of(rollout: Any, made: Recipe) -> Data:
    generator = torch.Generator().manual_seed(0)
    reward = (torch.rand(24, generator=generator) < 0.4).double()
    mask = torch.arange(5) < torch.randint(1, 6, (24, 1), generator=generator)
    data = rollout(torch.zeros(24, 5), mask, episode_reward=reward, group=torch.arange(24) % 4)
    return made.prepare({"on": data}, None)["on"].epoch(Batching("sequence", "full"), None)[0]


def moved() -> Tensor:
    return 0.4 * torch.randn(24, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Population(Recipe):
    """GRPO with the population deviation."""

    def stages(self) -> Any:
        return (GroupBaseline(scale="std", ddof=0, eps=1e-6, single="zero"),)


def test_without_coupling_it_is_grpo(recipe: Any, rollout: Any, value_and_gradient: Any) -> None:
    plain = recipe(Population, ETRConfig(clip_high=0.28))
    expected = value_and_gradient(plain, moved(), batch_of(rollout, plain))
    for form in FORMS[:2]:
        made = recipe(ETRRecipe, ETRConfig(form=form, micro=0.0, macro=0.0, clip_high=0.28))
        value, gradient = value_and_gradient(made, moved(), batch_of(rollout, made))
        assert value == pytest.approx(expected[0], abs=1e-15)
        assert torch.equal(gradient, expected[1])


def test_an_infinite_range_is_weighted_reinforce(recipe: Any, rollout: Any, value_and_gradient: Any) -> None:
    class Open(Population):
        def loss(self) -> Any:
            return weighted_ratio

    made = recipe(ETRRecipe, ETRConfig(clip_low=1.0, clip_high=math.inf, range_max=math.inf))
    data = batch_of(rollout, made)
    assert bool(data["range_high"].isinf().all())
    ours = value_and_gradient(made, 5.0 * moved(), data)
    theirs = value_and_gradient(recipe(Open, ETRConfig()), 5.0 * moved(), data)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_rewards_swapped_swap_the_advantages_alone(form: str) -> None:
    for right in range(9):
        first, second = ranges(right, form=form), ranges(8 - right, form=form)
        torch.testing.assert_close(second["advantage"].flip(1), -first["advantage"], atol=1e-9, rtol=0)
        torch.testing.assert_close(second["range_high"].flip(1), first["range_high"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("form", FORMS[:2])
def test_ranges_grow_with_advantage_and_spread(form: str) -> None:
    options = {"form": form, "range_max": 9.0, "range_min": 1e-9}
    for p in (0.1, 0.5, 0.8):
        assert (torch.tensor([eps(a, p, **options) for a in torch.linspace(0, 4, 30).tolist()]).diff() > 0).all()
    for a in (0.0, 0.7, -2.0):
        slope = torch.tensor([eps(a, p, **options) for p in torch.linspace(0, 1, 41).tolist()]).diff()
        assert (slope[:20] > 0).all()
        assert (slope[20:] < 0).all()


def test_no_gradient_reaches_the_range() -> None:
    """-r A inside the range and 0 outside, for both signs."""
    advantage, ratio = doubles(1, 1, 1, -1, -1, -1), doubles(1.2, 1.3, 0.5, 0.8, 0.6, 1.7)
    low, high = torch.full((6,), 0.3).double(), torch.full((6,), 0.25).double()
    _, gradient = losses_at(advantage, ratio, low, high)
    torch.testing.assert_close(gradient, doubles(-1.2, 0.0, -0.5, 0.8, 0.0, 1.7))


def test_implicit_by_advantage() -> None:
    options = {"form": "implicit_abs", "range_min": 1e-9, "range_max": 9.0}
    found = ranges(1, **options)["range_high"][0]
    assert found[:2].tolist() == pytest.approx([0.298998, 0.236094], abs=6e-7)
    assert float(found.mean()) == pytest.approx(0.243957, abs=6e-7)
    assert ranges(4, **options)["range_high"][0].tolist() == pytest.approx([0.276159] * 8, abs=6e-7)
    mirrored = ranges(7, **options)["range_high"][0]
    assert mirrored[[0, 7]].tolist() == pytest.approx([0.236094, 0.298998], abs=6e-7)


def test_implicit_by_distance() -> None:
    """0.2 (1 + 2 * 0.875^2) and 0.2 (1 + 2 * 0.125^2); on average 0.2 (1 + 0.5 * 4 * 0.109375)."""
    options = {"form": "implicit_sq", "range_min": 1e-9, "range_max": 9.0}
    found = ranges(1, **options)["range_high"][0]
    assert found[:2].tolist() == pytest.approx([0.506250, 0.206250], abs=6e-7)
    assert float(found.mean()) == pytest.approx(0.2 * (1.0 + 0.5 * 4.0 * 0.109375))
    assert float(ranges(1, form="implicit_sq")["range_high"][0, 0]) == pytest.approx(0.5)
    assert ranges(4, **options)["range_high"][0].tolist() == pytest.approx([0.3] * 8)


def test_means_over_groups() -> None:
    for right, size, high in ((1, 0.661438, 0.287707), (2, 0.866025, None), (4, 1.0, 0.376159)):
        found = ranges(right)
        assert float(found["advantage"].abs().mean()) == pytest.approx(size, abs=6e-7)
        assert float(found["advantage"].square().mean()) == pytest.approx(1.0)
        if high is not None:
            assert float(found["range_high"].mean()) == pytest.approx(high, abs=6e-7)


def test_low_variance_groups_shrink_with_a_neutral_variance() -> None:
    options = {"form": "multiplicative", "neutral": 0.5}
    # 0.2 (1 + 0.5 tanh A) (1 + 0.5 (v - 0.5)) at v = 0, and at v = 1
    assert eps(0.0, 0.0, **options) == pytest.approx(0.15)
    assert eps(1.0, 0.5, **options) == pytest.approx(0.2 * 1.380797 * 1.25, abs=1e-6)
    assert ranges(8, **options)["range_high"][0].tolist() == pytest.approx([0.15] * 8)


def test_rewards_of_another_scale_and_groups_of_one() -> None:
    config = ETRConfig(reward_min=-3.0, reward_max=3.0)
    reward, group = doubles(3, -3, -3, 3, 1.5), torch.tensor([0, 0, 0, 0, 1])
    data = Data({"episode_reward": reward, "group": group, "valid": torch.ones(1, 5).double()},
                sequence=frozenset({"episode_reward", "group"}))  # fmt: skip
    stages = (
        GroupBaseline(scale="std", ddof=0, single="zero"),
        ElasticRange(config, make_factor("additive", 0.5, 0.5)),
    )
    for stage in stages:
        data = stage(data)
    assert data["reward_spread"].tolist() == pytest.approx([1, 1, 1, 1, 0])
    assert data["range_high"][0].tolist() == pytest.approx([0.376159] * 4 + [0.2], abs=1e-6)


def test_ranges_are_those_of_whole_groups_in_every_minibatch(recipe: Any, rollout: Any) -> None:
    made = recipe(ETRRecipe, ETRConfig())
    reward = doubles(1, 0, 0, 0, 1, 1, 0, 0)
    data = rollout(torch.zeros(8, 2), torch.ones(8, 2), episode_reward=reward, group=torch.arange(8) // 4,
                   number=torch.arange(8))  # fmt: skip
    whole = made.prepare({"on": data}, None)["on"]
    for piece in whole.epoch(Batching("sequence", 3), torch.Generator().manual_seed(0)):
        assert torch.equal(piece["range_high"], whole["range_high"][:, piece["number"]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "product"}, "form: expected one of 'additive', 'multiplicative', .*got 'product'"),
        ({"micro": -0.1}, "micro: expected >= 0, got -0.1"),
        ({"range_min": 0.6}, "expected range_min <= range_max, got 0.6, 0.5"),
        ({"reward_min": 1.0}, "expected reward_min < reward_max, got 1.0, 1.0"),
        ({"form": "implicit_sq", "macro": 0.1}, "macro: expected 0.5 with form='implicit_sq', which does not read it"),
        ({"neutral": 0.5}, "neutral: expected 0 with form='additive'"),
        ({"form": "multiplicative", "neutral": 1.0, "macro": 1.0}, r"expected macro \* neutral < 1"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ETRConfig(**options)


def test_another_reading_is_another_function(recipe: Any, rollout: Any) -> None:
    class Constant(ETRRecipe):
        def factor(self) -> Any:
            return lambda advantage, centred, mean, variance: torch.full_like(advantage, 2.0)

    data = rollout(torch.zeros(2, 2), torch.ones(2, 2), episode_reward=doubles(1, 0))
    found = recipe(Constant, ETRConfig(clip_high=0.1)).prepare({"on": data}, None)["on"]
    assert float(found["range_low"][0, 0]) == pytest.approx(0.4)
    assert float(found["range_high"][0, 0]) == pytest.approx(0.2)


def test_learns_and_reports() -> None:
    options = {"model": "tabular", "n_prompts": 8, "n_epochs": 4, "learning_rate": 0.1}
    agent = ETR("easy_hard", seed=0, env_kwargs={"questions": 4, "symbols": 5, "easy": 2}, **options)
    before = agent.pass_at([1], questions=4, samples=64)["pass@1"]
    agent.learn(until=25 * agent.samples_per_iteration)
    assert before < 0.5
    assert agent.pass_at([1], questions=4, samples=64)["pass@1"] > 0.9
    low, mean, high = (float(agent.scalars[f"train/clip_range{end}"]) for end in ("_min", "", "_max"))
    assert 0.2 <= low <= mean + 1e-6 <= high + 2e-6 <= 0.5 + 3e-6
    assert {"train/clipped_up", "train/clipped_down", "train/clip_fraction"} <= agent.scalars.keys()


# -- contract -----------------------------------------------------------------------------------------------------


class TestETRContract(RecipeContract):
    method = ETR
    published = {  # of the reconstruction
        "form": "additive",
        "micro": 0.5,
        "macro": 0.5,
        "neutral": 0.0,
        "range_min": 0.05,
        "range_max": 0.5,
        "reward_min": 0.0,
        "reward_max": 1.0,
        "aggregate": "sequence_mean_token_mean",
    }
    options = {"clip_low": 0.1, "clip_high": 0.1}
    on_policy = staticmethod(aggregates.sequence_mean_token_mean)
    matters = (
        ({}, {"form": "implicit_sq"}),
        ({}, {"form": "implicit_abs"}),
        (WIDE, WIDE | {"form": "multiplicative"}),
        ({}, {"micro": 0.0}),
        ({}, {"macro": 0.0}),
        ({}, {"range_max": 0.06}),
        ({}, {"range_min": 0.4}),
        ({}, {"reward_max": 9.0}),
        ({}, {"reward_min": -9.0}),
        ({"form": "multiplicative"}, {"form": "multiplicative", "neutral": 1.0}),
    )
    refused = {"verl": "reads the columns ['range_high', 'range_low']"}
