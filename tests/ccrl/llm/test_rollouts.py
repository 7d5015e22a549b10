"""Statistics of sampled completions."""

from __future__ import annotations

import itertools

import pytest
import torch

from ccrl.llm.rollouts import pass_at_k


@pytest.mark.parametrize(("n", "c", "k"), [(6, 2, 1), (6, 2, 3), (6, 0, 2), (6, 5, 2), (6, 6, 6), (5, 1, 5)])
def test_pass_at_k_counts_subsets(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    expected = sum(any(s) for s in subsets) / len(subsets)
    assert float(pass_at_k(n, torch.tensor(c), k)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [0, 7])
def test_pass_at_k_wants_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 <= k <= 6 samples, got k = {k}"):
        pass_at_k(6, torch.tensor(1), k)
