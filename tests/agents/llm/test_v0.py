"""V0 as a method: utility and division of a budget, its place in training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm.v0 import (
    V0,
    TokenStates,
    V0Config,
    ValueModel,
    divide,
    utility,
)
from ccrl.testing.recipe_contract import RecipeContract

F64 = torch.float64


def double(*x: float) -> Tensor:
    return torch.tensor(x, dtype=F64)


# -- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "p", "value"),
    [
        (2, 0.5, 0.5),
        (8, 0.25, 5.1990966797),
        (8, 0.5, 3.96875),
        (8, 0.05, 2.2926365497),
        (16, 0.05, 8.1579733016),
        (128, 0.01, 91.3597865),
        (8, 0.0, 0.0),
        (8, 1.0, 0.0),
        (1, 0.3, 0.0),
    ],
)
def test_the_utility_by_hand_and_by_the_binomial(n: int, p: float, value: float) -> None:
    found = float(utility(double(n), double(p)))
    assert found == pytest.approx(value, abs=1e-7)
    explicit = sum((n - k) * math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(1, n + 1))
    assert found == pytest.approx(explicit, abs=1e-9)
    assert 0.0 <= found < max(n * (1 - p), 1e-9)


def test_of_two_it_is_the_variance() -> None:
    p = torch.linspace(0, 1, 11, dtype=F64)
    torch.testing.assert_close(utility(double(2.0), p), 2 * p * (1 - p))


@pytest.mark.parametrize(("p", "bend"), [(0.05, 38.99), (0.25, 6.95)])
def test_it_is_convex_and_then_concave(p: float, bend: float) -> None:
    assert -2.0 / math.log(1.0 - p) == pytest.approx(bend, abs=5e-3)
    n = torch.arange(1, 80, dtype=F64)
    second = utility(n, double(p)).diff().diff()  # around n = 2, 3, ...
    middle = n[1:-1]
    assert (second[middle < bend - 1.0] > 0).all()
    assert (second[middle > bend + 1.0] < 0).all()


@pytest.mark.parametrize(
    ("p", "total", "high", "greedy", "exact"),
    [
        ((0.1, 0.4, 0.7), 24, 20, ((2, 20, 2), 12.5993), ((20, 2, 2), 16.4685)),
        ((0.05, 0.5), 40, 38, ((2, 38), 19.095), ((38, 2), 31.189)),
        ((0.05, 0.3, 0.6, 0.95), 32, 24, ((2, 24, 4, 2), 18.4830), ((2, 24, 4, 2), 18.4830)),
    ],
)
def test_greedy_division_is_not_the_best(p: Any, total: int, high: int, greedy: Any, exact: Any) -> None:
    for solver, (counts, value) in (("greedy", greedy), ("dp", exact)):
        found = divide(double(*p), total, 2, high, solver)
        assert found.tolist() == list(counts)
        assert float(utility(found.double(), double(*p)).sum()) == pytest.approx(value, abs=5e-4)


def test_exact_division_is_that_of_trying_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for total in (10, 13, 16):
        p = torch.rand(4, generator=generator, dtype=F64)
        best = max(
            float(utility(double(*counts), p).sum())
            for counts in itertools.product(range(2, 9), repeat=4)
            if sum(counts) == total
        )
        found = divide(p, total, 2, 8, "dp")
        assert int(found.sum()) == total
        assert float(utility(found.double(), p).sum()) == pytest.approx(best, abs=1e-12)


def test_greedy_takes_the_largest_next_gain() -> None:
    """Also where a gain is larger than the one before it."""
    p = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=F64)
    counts = torch.full((5,), 2)
    while int(counts.sum()) < 40:
        gain = utility(counts + 1.0, p) - utility(counts.double(), p)
        counts[torch.where(counts < 15, gain, -1.0).argmax()] += 1
    assert divide(p, 40, 2, 15, "greedy").tolist() == counts.tolist()


@pytest.mark.parametrize("solver", ["greedy", "dp"])
def test_budgets_that_cannot_be(solver: Any) -> None:
    for total in (3, 21):
        with pytest.raises(ValueError, match="expected 0 <= low <= high and 2 prompts"):
            divide(double(0.5, 0.5), total, 2, 10, solver)
    assert divide(double(0.0, 1.0), 4, 2, 10, solver).tolist() == [2, 2]
    assert int(divide(double(0.0, 1.0), 15, 2, 10, solver).sum()) == 15


# -- the method -------------------------------------------------------------------------------------------------------

TABLE: dict[str, Any] = {"model": "tabular", "learning_rate": 0.05}


def budget(agent: Any, n: int = 12) -> list[int]:
    agent.ctx.prompts = agent.collector.draw(n)
    counts: Sequence[int] = agent.estimator.plan({}, {}, agent.ctx)[0].counts.tolist()
    return list(counts)


def test_budgets_are_uniform_before_there_is_a_context_and_then_go_where_they_help() -> None:
    agent = V0("easy_hard", n_prompts=12, group_size=4, context_needed=20, max_rollouts=24, seed=0, **TABLE)
    assert budget(agent) == [4] * 12
    agent.learn(3 * agent.samples_per_iteration)
    counts = budget(agent)
    assert sum(counts) == 48
    assert min(counts) >= 2
    assert max(counts) <= 24
    assert len(set(counts)) > 1
    assert float(agent.scalars["train/value_error"]) < 0.6
    assert agent.scalars["train/largest_budget"] > 4


def test_a_budget_needs_prompts() -> None:
    agent = V0("easy_hard", n_prompts=12, group_size=4, **TABLE)
    agent.ctx.prompts = None
    with pytest.raises(ValueError, match="there are none in ctx"):
        agent.estimator.plan({}, {}, agent.ctx)


def test_a_trained_value_model_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ValueModel(4)
    torch.save(model.state_dict(), tmp_path / "value.pt")
    options = {"value": str(tmp_path / "value.pt"), "embedding_width": 4, "context_needed": 4, "max_rollouts": 16}
    agent = V0("easy_hard", n_prompts=6, group_size=4, **options, **TABLE)
    agent.learn(2 * agent.samples_per_iteration)
    assert not any(p.requires_grad for p in agent.estimator.value.parameters())
    assert sum(budget(agent, 6)) == 24
    with pytest.raises(ValueError, match=r"expected the state of a ValueModel\(8\)"):
        V0("easy_hard", n_prompts=6, group_size=4, **options | {"embedding_width": 8}, **TABLE)
    with pytest.raises(FileNotFoundError, match="value: expected 'logistic' or a file"):
        V0("easy_hard", n_prompts=6, group_size=4, value="logistics", **TABLE)


def test_token_states_are_fixed_and_masked() -> None:
    one, other = TokenStates(3), TokenStates(3)
    tokens, valid = torch.tensor([[-1, 2, 5000]]), torch.tensor([[0.0, 1.0, 1.0]])
    assert torch.equal(one(tokens, valid), other(tokens, valid))
    assert not one(tokens, valid)[0, 0].any()
    assert not list(one.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "group_size: expected min_rollouts to max_rollouts, 2 to 128, got 1"),
        ({"context_needed": 300}, "context_needed: expected at most context_size = 256, got 300"),
        ({"solver": "lp"}, "solver: expected one of"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        V0Config(**settings)


class TestV0Contract(RecipeContract):
    method = V0
    published = {
        "value": "logistic",
        "embedding_width": 32,
        "context_size": 256,
        "context_needed": 16,
        "min_rollouts": 2,
        "max_rollouts": 128,
        "solver": "greedy",
        "aggregate": "token_mean",
    }
    options = {"context_needed": 1}
    texts = ("value",)
    matters = (({}, {"clip_high": 0.01}),)
    refused = {"trl": "divides completions among prompts", "verl": "divides completions among prompts"}
