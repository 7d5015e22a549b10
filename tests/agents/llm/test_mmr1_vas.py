"""MMR1's sampling of prompts: diversity and scores by hand, which prompts are asked, when they are probed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from agents.grouped import Grouped
from agents.llm.baselines import GRPO
from agents.llm.mmr1_vas import (
    MMR1,
    MMR1Config,
    MMR1Recipe,
    distinct,
    diversity,
    edit_distance,
    probabilities,
    promotion,
    self_bleu,
)
from ccrl.collect import Request
from ccrl.estimators.recipe import Parts
from ccrl.llm.task import Prompts
from ccrl.testing.recipe_contract import RecipeContract
from envs.text.bandits import SequenceMatch

THREE = [[1, 2, 3, 4], [1, 2, 3, 5], [7, 8, 9]]
BANDIT = {"questions": 6, "fixed_length": 2, "symbols": 3}
SMALL: dict[str, Any] = {"n_prompts": 4, "group_size": 4, "probe_rollouts": 8, "kl_coef": 0.0, "model": "tabular"}


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- diversity --------------------------------------------------------------------------------------------------------


def test_distinct_runs() -> None:
    """Pairs: 12 23 34, 12 23 35, 78 89: 6 of 8; triples: 123 234, 123 235, 789: 4 of 5."""
    assert distinct(THREE, 2) == 0.75
    assert distinct(THREE, 3) == 0.8
    assert distinct([[1, 2], [3]], 3) == 0.0
    assert distinct([], 1) == 0.0


def test_self_bleu() -> None:
    """The first two: precisions 3/4, 2/3, 1/2, product 1/4, cube root 0.629961; the third shares nothing."""
    assert self_bleu(THREE) == pytest.approx(2 * 0.25 ** (1 / 3) / 3, abs=1e-12)
    assert self_bleu([[1, 2, 3, 4]] * 5) == pytest.approx(1.0)
    assert self_bleu([[1, 2, 3]]) == self_bleu([]) == 0.0
    assert self_bleu([[], [1, 2]]) == 0.0


def test_self_bleu_of_short_and_repeated_tokens() -> None:
    """[1, 1] against [1, 2, 3]: one of two 1s, no pair (0.1 / 1), no triple (0.1 / 1), a brevity of exp(1 - 3/2);
    [1, 2, 3] against [1, 1]: 1/3, 0.1 / 2, 0.1 / 1."""
    first = (0.5 * 0.1 * 0.1) ** (1 / 3) * 2.718281828**-0.5
    second = (1 / 3 * 0.05 * 0.1) ** (1 / 3)
    assert self_bleu([[1, 1], [1, 2, 3]]) == pytest.approx((first + second) / 2, abs=1e-9)


def test_edit_distance() -> None:
    """One substitution; against the third all of four (a substitution each of three, and one more)."""
    assert edit_distance(THREE[:2]) == 1.0
    assert edit_distance(THREE) == pytest.approx((1 + 4 + 4) / 3)
    assert edit_distance([[1], []]) == 1.0
    assert edit_distance([[1]]) == 0.0


def test_kinds_of_diversity() -> None:
    assert diversity(THREE, "self_bleu") == 1.0 - self_bleu(THREE)
    assert diversity(THREE, "similarity") == self_bleu(THREE)  # as released: more where they are alike
    assert diversity(THREE, "distinct") == 0.8
    assert diversity(THREE, "edit") == 3.0
    for size in range(2, 9):
        assert 0.0 <= diversity([[1, 2, 3]] * size, "self_bleu") < 1e-12


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores() -> None:
    rate = double(0.0, 0.5, 1.0)
    assert promotion(rate, torch.zeros(3), 1.0, 0.0).tolist() == [0.0, 0.25, 0.0]
    # 0.8 * 0.25 * 0.75 + 0.2 * 0.6
    assert float(promotion(double(0.25), double(0.6), 0.8, 0.2)) == pytest.approx(0.27)


def test_probabilities() -> None:
    torch.testing.assert_close(probabilities(double(0.32, 0.16, 0.0, 0.16)), double(0.5, 0.25, 0.0, 0.25))
    scaled = probabilities(double(0.32, 0.16, 0.0, 0.16), "min_max")
    torch.testing.assert_close(scaled, double(0.5, 0.25, 0.0, 0.25))
    # the smallest is not 0: scaled it is
    torch.testing.assert_close(probabilities(double(0.4, 0.2, 0.2, 0.2)), double(0.4, 0.2, 0.2, 0.2))
    torch.testing.assert_close(probabilities(double(0.4, 0.2, 0.2, 0.2), "min_max"), double(1.0, 0.0, 0.0, 0.0))
    for scaling in ("none", "min_max"):
        assert probabilities(torch.zeros(4), scaling).tolist() == [0.25] * 4


def test_total_variance_of_two_kinds_of_chains() -> None:
    """Rates 0.2 and 0.8 alike: 0.16 inside and 0.09 between make 0.25 = p (1 - p) at 0.5."""
    rate = double(0.2, 0.8)
    inside, between = promotion(rate, torch.zeros(2), 1.0, 0.0).mean(), rate.var(correction=0)
    assert float(inside) == pytest.approx(0.16)
    assert float(between) == pytest.approx(0.09)
    assert float(inside + between) == pytest.approx(float(promotion(rate.mean(), double(0.0), 1.0, 0.0)))


@pytest.mark.parametrize("logit", [-2.0, 0.0, 0.7])
def test_one_parameter_has_the_variance_as_gradient(logit: float) -> None:
    """Bernoulli in its logit, rewarded for 1: grad J = p (1 - p) = Var R = E (d log pi / d theta)^2."""
    theta = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    p = theta.sigmoid()
    (slope,) = torch.autograd.grad(p, theta)
    variance = promotion(p.detach(), double(0.0), 1.0, 0.0)
    gamma = p * (1 - p) ** 2 + (1 - p) * p**2
    assert float(slope) == pytest.approx(float(variance), abs=1e-12)
    assert float(gamma.detach()) == pytest.approx(float(variance), abs=1e-12)


# -- choice -----------------------------------------------------------------------------------------------------------


def pool(size: int) -> Prompts:
    index = torch.arange(size)
    return Prompts(index[:, None], torch.ones(size, 1), index, tuple(range(size)))


def chooser(size: int, batch: int, **settings: Any) -> tuple[MMR1Recipe, Any]:
    request = Request(counts=torch.full((batch,), 4))
    parts = Parts(torch.nn.Identity(), None, request, 3, questions=lambda most: pool(size))  # type: ignore[arg-type]
    made = MMR1Recipe(MMR1Config(**settings), parts)
    return made, SimpleNamespace(generator=Generator().manual_seed(0), k=torch.zeros(()))


@pytest.mark.parametrize(
    ("mixture", "batch", "weighted"), [(0.3, 10, 3), (1.0, 10, 10), (0.0, 10, 0), (0.29, 100, 29), (0.5, 7, 3)]
)
def test_how_many_are_weighted(mixture: float, batch: int, weighted: int) -> None:
    made, ctx = chooser(50, batch, mixture=mixture)
    made.score.zero_()[7] = 1.0  # drawn whenever weights decide
    chosen = made.choose(ctx).tolist()
    assert len(chosen) == batch
    assert chosen[:weighted] == [7] * weighted
    assert int(made.position) == (batch - weighted) % 50


def test_frequencies_are_the_scores() -> None:
    made, ctx = chooser(4, 100_000, mixture=1.0)
    made.score.copy_(double(0.32, 0.16, 0.0, 0.16))
    found = torch.bincount(made.choose(ctx), minlength=4) / 100_000
    expected = double(0.5, 0.25, 0.0, 0.25)
    error = (expected * (1 - expected) / 100_000).sqrt()
    assert bool(((found - expected).abs() <= 3.0 * error).all())


def test_the_rest_is_every_prompt_in_turn() -> None:
    """Through all of them, from where the last iteration stopped, again in the same order."""
    made, ctx = chooser(10, 8, mixture=0.5)
    made.score.zero_()[3] = 1.0
    walked = [x for _ in range(5) for x in made.choose(ctx)[4:].tolist()]
    assert sorted(walked[:10]) == list(range(10))
    assert walked[:10] == walked[10:]
    plain, ctx = chooser(10, 5, mixture=0.0)
    assert sorted([*plain.choose(ctx).tolist(), *plain.choose(ctx).tolist()]) == list(range(10))


def test_scores_of_0_choose_evenly() -> None:
    made, ctx = chooser(4, 40_000, mixture=1.0)
    made.score.zero_()
    found = torch.bincount(made.choose(ctx), minlength=4) / 40_000
    torch.testing.assert_close(found, torch.full((4,), 0.25), atol=0.01, rtol=0)


def probes(rates: list[int], completions: int = 4) -> Any:
    """``rates[q]`` of the completions of every question are right; all are alike."""
    right = torch.tensor([float(i < r) for r in rates for i in range(completions)])
    n = len(right)
    return {
        "group": torch.arange(n) // completions, "reward_components": right[:, None],
        "action": torch.ones(3, n, dtype=torch.int64), "length": torch.full((n,), 3),
    }  # fmt: skip


@pytest.mark.parametrize(("momentum", "expected"), [(0.0, [0.2, 0.0]), (1.0, [0.0, 0.15]), (0.5, [0.1, 0.075])])
def test_momentum(momentum: float, expected: list[float]) -> None:
    """Of rates 0 and 1/4 (0.8 * 3/16 = 0.15), then 1/2 (0.8 / 4 = 0.2) and 1."""
    made, _ = chooser(2, 2, momentum=momentum)
    made.refresh(probes([0, 1]))
    assert made.score.tolist() == pytest.approx([0.0, 0.15])
    made.refresh(probes([2, 4]))
    assert made.score.tolist() == pytest.approx(expected)
    assert made.rate.tolist() == [0.5, 1.0]


# -- life cycle -------------------------------------------------------------------------------------------------------


def test_probes_come_before_the_prompts_of_every_so_many_iterations() -> None:
    agent = MMR1("sequence_match", env_kwargs=BANDIT, seed=0, refresh_every=3, pool_size=64, **SMALL)
    clocks: list[int] = []
    agent.learn(callback=lambda a: clocks.append(a.collector.clock) or a.iteration < 7, until=10_000)
    # all six questions are among 64 draws; a refresh takes 6 x 8 completions, an iteration 16
    assert len(agent.estimator.pool) == 6
    taken = [b - a for a, b in zip([0, *clocks], clocks)]
    assert taken == [64, 16, 16, 64, 16, 16, 64]
    assert float(agent.scalars["train/pool_success"]) == float(agent.estimator.rate.mean())
    assert 0.0 <= float(agent.scalars["train/outcome_variance"]) <= 0.25


def test_a_prompt_drawn_twice_is_two_groups() -> None:
    agent = MMR1("sequence_match", env_kwargs=BANDIT, seed=0, mixture=1.0, **SMALL)
    agent.estimator.score.zero_()[2] = 1.0
    (request,) = agent.estimator.plan({}, {}, SimpleNamespace(k=torch.ones(()), generator=agent.ctx.generator))
    data = agent.collector.collect(request, agent.policy)
    assert torch.bincount(data["group"]).tolist() == [4] * 4
    assert len(set(data["index"].tolist())) == 1


class Listed(SequenceMatch):
    """With a list of its questions."""

    def count(self, split: Any) -> int:
        return self.questions

    def ask(self, numbers: Tensor, split: Any) -> Prompts:
        return Prompts(numbers[:, None], torch.ones(len(numbers), 1), numbers, tuple(numbers.tolist()))


def test_questions_of_a_list_and_of_none() -> None:
    """All of a list, or some of it; else a fixed sample, none twice."""

    def found(task: Any, most: int, seed: int = 0) -> list[int]:
        agent = GRPO(task, seed=seed, n_prompts=2, model="tabular")
        first, again = agent.questions(most).index.tolist(), agent.questions(most).index.tolist()
        assert first == again
        return list(first)

    assert found(Listed(9, 1, 2), 9) == found(Listed(9, 1, 2), 512) == list(range(9))
    some = found(Listed(9, 1, 2), 5)
    assert len(some) == len(set(some)) == 5
    assert found(Listed(90, 1, 2), 50) != found(Listed(90, 1, 2), 50, seed=1)
    drawn = found(SequenceMatch(9, 1, 2), 200)
    assert sorted(drawn) == list(range(9))
    assert len(set(found(SequenceMatch(90, 1, 2), 50))) == len(found(SequenceMatch(90, 1, 2), 50)) < 50


def test_without_weights_no_prompt_is_probed() -> None:
    agent = MMR1("sequence_match", env_kwargs=BANDIT, seed=0, mixture=0.0, **SMALL)
    agent.learn(until=3 * 16)
    assert agent.collector.clock == 48
    assert "train/pool_score" not in agent.scalars
    assert bool((agent.estimator.score == -1.0).all())


def test_varied_prompts_are_asked_more() -> None:
    """Three questions are solved for sure, three half the time."""
    agent = MMR1("sequence_match", env_kwargs={"questions": 6, "fixed_length": 1, "symbols": 2}, seed=0, mixture=1.0,
                 diversity_weight=0.0, learning_rate=1e-9, **SMALL)  # fmt: skip
    with torch.no_grad():
        agent.policy.logits[:3, 0] = 40.0 * torch.nn.functional.one_hot(agent.task.targets[:3, 0], 2)
    agent.learn(until=48 + 16)
    asked = agent.collector.prompts["on"].index
    assert bool((asked >= 3).all())


def test_control_episodes_have_no_prompts() -> None:
    with pytest.raises(ValueError, match="does not fit control tasks: mmr1_vas chooses among prompts"):
        Grouped("CartPole-v1", method="mmr1_vas")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"outcome_weight": 0.0, "diversity_weight": 0.0}, "expected one of them above 0"),
        ({"mixture": 1.5}, "mixture"),
        ({"momentum": -0.1}, "momentum"),
        ({"probe_rollouts": 0}, "probe_rollouts"),
        ({"diversity": "bleu"}, "diversity"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MMR1Config(**settings)


def test_a_mixture_that_draws_no_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mixture: expected 0, or at least one prompt .* 3 .* got 0\.3"):
        chooser(10, 3, mixture=0.3)
    chooser(10, 3, mixture=0.34)


class TestMMR1Contract(RecipeContract):
    method = MMR1
    published = {
        "kl_coef": 0.01,
        "mixture": 0.5,
        "outcome_weight": 0.8,
        "diversity_weight": 0.2,
        "diversity": "self_bleu",
        "probe_rollouts": 32,
        "refresh_every": 35,
        "pool_size": 512,
        "scaling": "none",
        "momentum": 0.0,
    }
    options = {"probe_rollouts": 4, "refresh_every": 2, "pool_size": 8}
    many = {"mixture": 1.0, "n_prompts": 12}
    matters = (({}, {"mixture": 1.0}), (many, many | {"scaling": "min_max"}))
    refused = {"trl": "chooses the prompts itself", "verl": "chooses the prompts itself"}
    exceptions = {"test_equal_rewards_have_no_gradient": "the KL to the reference is in the loss"}
