"""Set functions: values by hand, gains against the definition, and diminishing returns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from envs.coverage import Coverage, Facility, Groups, LogDet, curvature, grid_coverage, submodularity_ratio
from envs.coverage.tasks import footprints


def gains(function, path: list[int]) -> list[float]:
    state, found = function.initial(1), []
    for cell in path:
        element = torch.tensor([cell])
        found.append(float(function.gain(state, element)))
        state = function.insert(state, element)
    return found


def small_functions() -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    factor = torch.rand(6, 6, generator=generator, dtype=torch.float64)
    prints = torch.tensor([[0, 1, 2], [1, 2, -1], [3, -1, -1], [0, 4, 5], [5, 3, -1], [4, -1, -1]])
    members = torch.tensor([[1, 0], [1, 1], [1, 0], [0, 1], [0, 1], [0, 0]], dtype=torch.bool)
    return {
        "coverage": Coverage(prints, torch.rand(6, generator=generator)),
        "groups": Groups(members, torch.tensor([2, 1])),
        "facility": Facility(torch.rand(6, 4, generator=generator)),
        "logdet": LogDet(factor @ factor.T + 0.1 * torch.eye(6), 0.1, capacity=12),
    }


def test_gains_of_overlapping_footprints_by_hand():
    # 3 x 3, footprint +x, +y: s_0 = 0 covers {0, 1, 3, 4}; 1 adds {2, 5}; 4 adds {7, 8} ({4, 5} are covered); 4 again
    # adds nothing; 8 covers only itself, which is covered
    function = grid_coverage(size=(3, 3)).function
    assert gains(function, [0, 1, 4, 4, 8]) == [4.0, 2.0, 2.0, 0.0, 0.0]


def test_gains_of_items_by_hand():
    # groups {1, 2, 3} of demand 2 and {4, 5} of demand 1: the third of the first and the second of the other are not
    # wanted any more
    members = torch.zeros(6, 2, dtype=torch.bool)
    members[1:4, 0] = members[4:6, 1] = True
    assert gains(Groups(members, torch.tensor([2, 1])), [0, 1, 2, 3, 4, 5]) == [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]


def test_information_by_hand():
    # 1/2 log(1 + 1/.1) = 1.198948; det [[11, 8], [8, 11]] = 57, 1/2 log 57 = 2.021526; the same point twice:
    # det [[11, 10], [10, 11]] = 21, 1/2 log 21 - 1/2 log 11 = .323314
    function = LogDet(torch.tensor([[1.0, 0.8], [0.8, 1.0]]), 0.1, capacity=3)
    assert gains(function, [0, 1]) == pytest.approx([1.198948, 0.822578], abs=1e-6)
    assert gains(function, [0, 0]) == pytest.approx([1.198948, 0.323314], abs=1e-6)
    assert float(function.value(torch.tensor([[0, 1]]))) == pytest.approx(2.021526, abs=1e-6)


@pytest.mark.parametrize("name", ["coverage", "groups", "facility", "logdet"])
def test_gains_add_up_to_the_value_and_diminish(name):
    function = small_functions()[name]
    generator = torch.Generator().manual_seed(1)
    paths = torch.randint(6, (40, 5), generator=generator)
    state = function.initial(40)
    total = torch.zeros(40)
    for cell in paths.T:
        gain = function.gain(state, cell)
        assert bool((gain >= 0).all()), "not monotone"
        total, state = total + gain, function.insert(state, cell)
    assert torch.allclose(total, function.value(paths), atol=1e-5)
    for _ in range(20):  # A: the first k of a path, B: all of it
        k = int(torch.randint(5, (), generator=generator))
        extra = torch.randint(6, (40,), generator=generator)
        small, large = function.initial(40), function.initial(40)
        for cell in paths.T[:k]:
            small = function.insert(small, cell)
        for cell in paths.T:
            large = function.insert(large, cell)
        assert bool((function.gain(small, extra) >= function.gain(large, extra) - 1e-5).all())


@pytest.mark.parametrize("name", ["coverage", "groups", "facility", "logdet"])
def test_equal_keys_have_equal_gains(name):
    function = small_functions()[name]
    every = torch.arange(6)
    a, b = function.initial(6), function.initial(6)
    for cell in (1, 3, 0):
        a = function.insert(a, torch.full((6,), cell))
    for cell in (0, 1, 3):
        b = function.insert(b, torch.full((6,), cell))
    assert torch.equal(function.key(a), function.key(b))
    assert torch.allclose(function.gain(a, every), function.gain(b, every), atol=1e-6)


def test_names_of_cells_do_not_matter():
    """Relabelled cells with their weights pay the same: the gradient cannot see the labels."""
    prints = torch.tensor([[0, 1, 2], [1, 2, -1], [3, -1, -1], [0, 4, 5]])
    weights, order = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), torch.tensor([3, 5, 0, 1, 4, 2])
    renamed = torch.where(prints < 0, -1, order[prints])
    moved = torch.empty_like(weights).index_copy(0, order, weights)
    path = [0, 3, 1, 2]
    assert gains(Coverage(prints, weights), path) == gains(Coverage(renamed, moved), path)


class Squared:
    """``F(A) = |A|^2``: gains grow."""

    n, capacity = 4, None

    def initial(self, count: int) -> dict[str, Tensor]:
        return {"size": torch.zeros(count)}

    def gain(self, state, element):
        return 2.0 * state["size"] + 1.0

    def insert(self, state, element):
        return {"size": state["size"] + 1.0}


def test_curvature_by_hand():
    disjoint = Coverage(torch.tensor([[0], [1], [2]]), torch.tensor([1.0, 2.0, 3.0]))
    assert curvature(disjoint) == 0.0
    # element 1 covers half of what it does without 0: alone 2, last 1
    half = Coverage(torch.tensor([[0, -1], [0, 1]]), torch.tensor([1.0, 1.0]))
    assert curvature(half) == 1.0, "element 0 is worth nothing after 1"
    overlap = Coverage(torch.tensor([[0, 1], [1, 2]]), torch.ones(3))
    assert curvature(overlap) == 0.5
    assert submodularity_ratio(overlap) == 1.0
    # F(s | A) / F(s | B) = (2 |A| + 1) / (2 |B| + 1), smallest for |A| = 0, |B| = 3
    assert submodularity_ratio(Squared()) == pytest.approx(1.0 / 7.0)


def test_large_discs_are_three_by_three():
    env = grid_coverage(size=(4, 4), disc="large")
    assert sorted(footprints(env.env, "large")[0].tolist()) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert float(env.function.value(torch.tensor([[15]]))) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Coverage(torch.tensor([[0, 3]]), torch.ones(2)), "footprints"),
        (lambda: Coverage(torch.tensor([[0]]), -torch.ones(2)), ">= 0"),
        (lambda: Groups(torch.ones(3, 2, dtype=torch.bool), torch.ones(3)), "demands"),
        (lambda: Facility(-torch.ones(2, 2)), "weights"),
        (lambda: LogDet(torch.tensor([[1.0, 0.0], [0.5, 1.0]]), 0.1, 3), "symmetric"),
        (lambda: LogDet(torch.eye(2), 0.0, 3), "noise"),
        (lambda: curvature(LogDet(torch.eye(3), 0.1, 2)), "capacity"),
        (lambda: curvature(Facility(torch.zeros(2, 2))), "positive value"),
        (lambda: submodularity_ratio(Facility(torch.ones(11, 2))), "at most 10"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
