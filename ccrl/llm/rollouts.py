"""What is said of a set of sampled completions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pass_at_k"]


def pass_at_k(samples: int, right: Tensor, k: int) -> Tensor:
    """Probability that one of ``k`` of the ``samples`` is right, per question: ``1 - C(n - c, k) / C(n, k)``, unbiased
    (Chen et al. 2021). ``right`` ``[Q]`` counts.

    :raises ValueError: unless ``1 <= k <= samples``.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: expected 1 <= k <= {samples} samples, got k = {k}")
    wrong = samples - right.double()
    miss = torch.ones_like(wrong)
    for i in range(k):  # as a product: the binomials overflow
        miss = miss * (wrong - i).clamp_min(0.0) / (samples - i)
    return 1.0 - miss
