"""Statistics per group by hand."""

from __future__ import annotations

import pytest
import torch

from ccrl.data import Data
from ccrl.estimators.groups import Groups, components, per_step

LABEL = torch.tensor([7, 3, 7, 3, 7, 5])
X = torch.tensor([1.0, 4.0, 3.0, 4.0, 8.0, 2.0])


def test_sums_means_and_counts_in_the_order_of_labels() -> None:
    groups = Groups(LABEL)
    assert groups.count.tolist() == [2.0, 1.0, 3.0]  # labels 3, 5, 7
    assert groups.index.tolist() == [2, 0, 2, 0, 2, 1]
    assert groups.sum(X).tolist() == [8.0, 2.0, 12.0]
    assert groups.mean(X).tolist() == [4.0, 2.0, 4.0]
    assert groups.constant(X).tolist() == [True, True, False]
    assert groups.mean(X).dtype == torch.float64


def test_z_scores() -> None:
    # group 7: deviations -3, -1, 4; unbiased variance 26 / 2 = 13
    found = Groups(LABEL).z_score(X)
    assert found[[1, 3, 5]].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(found[[0, 2, 4]], torch.tensor([-3.0, -1.0, 4.0], dtype=torch.float64) / 13**0.5)
    population = Groups(LABEL).z_score(X, ddof=0, eps=1.0)
    assert float(population[4]) == pytest.approx(4.0 / ((26 / 3) ** 0.5 + 1.0))


def test_a_group_of_one_may_keep_its_value() -> None:
    assert Groups(LABEL).z_score(X, eps=1.0, single="keep")[5] == 1.0  # 2 / (1 + 1)


def test_equal_values_whose_mean_is_rounded() -> None:
    tenth = torch.full((3,), 0.1)
    assert Groups(torch.zeros(3, dtype=torch.int64)).z_score(tenth).eq(0.0).all()


def test_columns() -> None:
    data = Data({"valid": torch.tensor([[1.0, 1.0], [1.0, 0.0]]), "episode_reward": torch.tensor([2.0, 3.0])},
                sequence=frozenset({"episode_reward"}))  # fmt: skip
    assert components(data).tolist() == [[2.0], [3.0]]
    advantage = per_step(data, torch.tensor([5.0, 6.0], dtype=torch.float64))["advantage"]
    assert advantage.tolist() == [[5.0, 6.0], [5.0, 0.0]]
    assert advantage.dtype == torch.float32
    assert components(data.derive_sequence(reward_components=torch.ones(2, 3))).shape == (2, 3)
