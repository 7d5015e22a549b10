"""The aggregation slot: element weights from the valid mask. A term is ``sum(weights * loss)``.

Counts come from the batch (``n_valid, n_sequences``: the whole optimiser batch), so that micro-batches add up exactly.
"""

from __future__ import annotations

from torch import Tensor

from ccrl.data import Data
from ccrl.estimators.terms import Aggregate

__all__ = ["fixed", "length_constant", "mean", "sequence_mean", "sequence_mean_token_mean"]


def mean(valid: Tensor, batch: Data) -> Tensor:
    """Mean over all valid steps or tokens of the optimiser batch (token mean)."""
    return valid / batch["n_valid"].clamp_min(1.0)


def sequence_mean(valid: Tensor, batch: Data) -> Tensor:
    """Sum over tokens, mean over sequences; for sequence-level terms ``[1, B]`` the plain mean."""
    return valid / batch["n_sequences"]


def sequence_mean_token_mean(valid: Tensor, batch: Data) -> Tensor:
    """Mean over each sequence's tokens, then over sequences (GRPO)."""
    return valid / valid.sum(0, keepdim=True).clamp_min(1.0) / batch["n_sequences"]


def fixed(count: float) -> Aggregate:
    """Sum divided by a constant (Dr.GRPO's length constant, SubPO's ``B H Z``)."""
    if count <= 0:
        raise ValueError(f"fixed: expected a positive count, got {count}")
    return lambda valid, batch: valid / count


def length_constant(length: int) -> Aggregate:
    """Sum over tokens divided by a constant, mean over sequences (Dr.GRPO: the longest completion there can be)."""
    if length < 1:
        raise ValueError(f"length_constant: expected >= 1, got {length}")
    return lambda valid, batch: valid / (batch["n_sequences"] * length)
