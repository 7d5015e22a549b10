"""Anchors of bounded ratio targets: the targets of a group average to 1."""

from __future__ import annotations

import math

import pytest
import torch

from ccrl.estimators.balance import balanced_anchor, balanced_target

ONE = torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (1.0, 4.0)])
@pytest.mark.parametrize("temperature", [1e-4, 0.3, 10.0])
def test_targets_average_to_one(low: float, high: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([3, 1, 1, 3, 2, 1, 3, 3])
    x = torch.randint(0, 3, (8,), generator=generator).double()  # with ties
    found = balanced_target(x, group, low, high, temperature)
    for label in (1, 2, 3):
        assert float(found[group == label].mean()) == pytest.approx(1.0, abs=1e-9)
    assert found.min() >= 1.0 - low - 1e-12
    assert found.max() <= 1.0 + high + 1e-12


def test_the_anchor_by_hand() -> None:
    """One right of five, bounds 0.2 and 0.28: the right one's target is 1.28, so that the others are at
    (5 - 1.28) / 4 = 0.93 = 0.8 + 0.48 p, p = 13 / 48, and the anchor lies at -T log(p / (1 - p)) above their 0."""
    x = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    (anchor,) = balanced_anchor(x, ONE, 0.2, 0.28, 1e-3).tolist()
    assert anchor == pytest.approx(1e-3 * math.log(35 / 13), abs=1e-12)
    torch.testing.assert_close(balanced_target(x, ONE, 0.2, 0.28, 1e-3), torch.tensor([1.28] + [0.93] * 4).double())
    # equal bounds, two values of one probability: halfway
    assert float(balanced_anchor(x[:2], ONE[:2], 0.2, 0.2, 1e-3)) == pytest.approx(0.5)


def test_probabilities_weigh() -> None:
    """A value of probability 3/4 is three equal ones."""
    x, w = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75])
    weighed = balanced_anchor(x, ONE[:2], 0.2, 0.28, 0.05, 2.0 * w)
    assert float(weighed) == pytest.approx(
        float(balanced_anchor(torch.tensor([1.0, 0, 0, 0]), ONE[:4], 0.2, 0.28, 0.05))
    )


def test_moving_values_moves_the_anchor() -> None:
    x = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.1], dtype=torch.float64)
    first, second = (float(balanced_anchor(x + shift, ONE, 0.1, 0.3, 0.2)) for shift in (0.0, 7.0))
    assert second - first == pytest.approx(7.0)


@pytest.mark.parametrize("bad", [(0.0, 0.2, 1.0), (1.1, 0.2, 1.0), (0.2, 0.0, 1.0), (0.2, 0.2, 0.0)])
def test_bounds_on_both_sides_and_a_temperature(bad: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 < low <= 1, high > 0 and temperature > 0"):
        balanced_anchor(torch.zeros(5), ONE, *bad)
