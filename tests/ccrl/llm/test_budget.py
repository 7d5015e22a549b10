"""Budgets: what completions are worth, exact and greedy division, and what does not fit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ccrl.llm.budget import (
    Solver,
    allocate,
    gradient_probability,
    gradient_value,
    information_gain,
    knapsack,
    spread,
)

SOLVERS: tuple[Solver, ...] = ("dp", "greedy")


def double(values: float | Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def worth(counts: Tensor, p: Tensor) -> float:
    return float(gradient_value(counts.double(), p).sum())


@pytest.mark.parametrize(
    ("n", "p", "expected"),
    [(8, 0.5, 0.9921875), (8, 0.05, 0.3365795687), (8, 0.95, 0.3365795687), (8, 0.01, 0.0772553056),
     (16, 0.1, 0.8146979811)],
)  # fmt: skip
def test_probability_of_a_gradient(n: int, p: float, expected: float) -> None:
    # 1 - 0.5^8 - 0.5^8 = 1 - 1/128 in the first case
    assert float(gradient_probability(double(n), double(p))) == pytest.approx(expected, abs=5e-11)


@pytest.mark.parametrize(
    ("n", "p", "expected"),
    [(8, 0.5, 0.1240234375), (8, 0.05, 0.0151881530), (8, 0.95, 0.0007993765), (2, 1 / 3, 0.0658436214)],
)  # fmt: skip
def test_value(n: int, p: float, expected: float) -> None:
    # 0.9921875 * 0.5 * 0.25 in the first case; 4/9 * 4/27 in the last
    assert float(gradient_value(double(n), double(p))) == pytest.approx(expected, abs=5e-11)


def test_hard_prompts_are_worth_more_than_easy_ones() -> None:
    p = torch.linspace(0.0, 1.0, 301, dtype=torch.float64)
    torch.testing.assert_close(gradient_probability(double(8), p), gradient_probability(double(8), 1.0 - p))
    hard = (p > 0) & (p < 0.499)
    assert bool((gradient_value(double(8), p) > gradient_value(double(8), 1.0 - p))[hard].all())
    gain = information_gain(p)
    assert float(gain.max()) == pytest.approx(4 / 27, abs=1e-15)
    assert float(p[gain.argmax()]) == pytest.approx(1 / 3, abs=1e-15)


@pytest.mark.parametrize(
    ("p", "total", "high", "expected", "value"),
    [
        ([0.1, 0.3, 0.5, 0.9], 16, 8, [3, 6, 5, 2], 0.270275934),
        ([0.1, 0.3, 0.5, 0.9], 24, 16, [8, 8, 6, 2], 0.307362003),
        ([0.1, 0.3, 0.5, 0.9], 32, 16, [14, 9, 7, 2], 0.328201799),
        ([0.02, 0.3, 0.5, 0.98], 16, 10, [2, 7, 5, 2], 0.252817589),
        ([0.02, 0.4, 0.97], 9, 8, [2, 5, 2], 0.1321317622),
    ],
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_optimal_divisions(
    p: list[float], total: int, high: int, expected: list[int], value: float, solver: Solver
) -> None:
    counts = allocate(double(p), total, 2, high, gradient_value, solver)
    assert counts.tolist() == expected
    assert worth(counts, double(p)) == pytest.approx(value, abs=5e-10)


def test_uniform_is_worth_less() -> None:
    p = double([0.1, 0.3, 0.5, 0.9])
    assert worth(torch.full((4,), 4), p) == pytest.approx(0.2508316, abs=5e-8)


def test_no_division_is_worth_more() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        count, high = int(torch.randint(2, 5, (), generator=generator)), 6
        p = torch.rand(count, generator=generator, dtype=torch.float64)
        total = int(torch.randint(count, count * high + 1, (), generator=generator))
        every = (n for n in itertools.product(range(1, high + 1), repeat=count) if sum(n) == total)
        best = max(worth(torch.tensor(n), p) for n in every)
        for solver in SOLVERS:
            counts = allocate(p, total, 1, high, gradient_value, solver)
            assert int(counts.sum()) == total
            assert 1 <= int(counts.min()) <= int(counts.max()) <= high
            assert worth(counts, p) == pytest.approx(best, abs=1e-14)


def test_what_is_not_concave_needs_the_exact_solver() -> None:
    """Values of 0, 1, 9 against 0, 4, 5: the first unit of the first is worth less, both are worth most."""
    table = double([[0.0, 1.0, 9.0], [0.0, 4.0, 5.0]])
    assert knapsack(table, 2, "dp").tolist() == [2, 0]
    assert knapsack(table, 2, "greedy").tolist() == [1, 1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_equal_prompts_get_equally_many(solver: Solver) -> None:
    counts = allocate(torch.full((5,), 0.3, dtype=torch.float64), 23, 2, 16, gradient_value, solver)
    assert int(counts.max() - counts.min()) <= 1
    assert int(counts.sum()) == 23


def test_no_completion_has_no_gradient() -> None:
    """Of 3 completions all go to p = 1/2, value (1 - 2/8) / 8 = 3/32; of none the formula says -1, which is no
    probability, and a first one would be worth more than a third."""
    assert gradient_probability(double([0.0]), double([0.5])).tolist() == [0.0]
    assert allocate(double([0.5, 0.1]), 3, 0, 3, gradient_value, "dp").tolist() == [3, 0]


def test_worthless_prompts_are_filled_too() -> None:
    """The total is spent whatever it is worth; the greedy order takes no unit before those below it."""
    for solver in SOLVERS:
        assert int(allocate(double([0.0, 1.0, 1.0]), 12, 2, 5, gradient_value, solver).sum()) == 12
    assert allocate(double([]), 0, 2, 5, gradient_value).tolist() == []


def test_spread_is_even_and_keeps_the_bound() -> None:
    counts, among = torch.tensor([2, 7, 2, 2]), torch.tensor([True, True, True, False])
    assert spread(counts, among, 5, 8).tolist() == [4, 8, 4, 2]
    assert spread(counts, among, 4, 8).tolist() == [4, 8, 3, 2]
    assert spread(counts, among, 100, 8).tolist() == [8, 8, 8, 2]
    assert spread(counts, among, -3, 8).tolist() == [2, 7, 2, 2]
    assert counts.tolist() == [2, 7, 2, 2]


@pytest.mark.parametrize(
    ("p", "total", "low", "high", "match"),
    [
        ([0.5, 0.5], 3, 2, 8, "low=2, high=8, total=3; lower low"),
        ([0.5, 0.5], 17, 2, 8, "total=17"),
        ([0.5, 0.5], 8, 5, 4, "low=5, high=4"),
        ([0.5, 1.5], 8, 2, 8, "expected rates from 0 to 1"),
        ([0.5, float("nan")], 8, 2, 8, "expected rates from 0 to 1"),
    ],
)
def test_what_no_division_can_keep(p: list[float], total: int, low: int, high: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        allocate(double(p), total, low, high, gradient_value)


def test_more_units_than_fit() -> None:
    with pytest.raises(ValueError, match="units: expected 0 to 4 for 2 rows of up to 2, got 5"):
        knapsack(torch.zeros(2, 3), 5)
