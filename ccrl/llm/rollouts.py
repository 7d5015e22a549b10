"""Rollouts of completions, joined and evaluated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.data import Data

__all__ = ["concatenate", "evaluate_columns", "pass_at_k"]


def concatenate(rollouts: Sequence[Data], *, same_prompts: bool = False) -> Data:
    """One rollout ``[max T, sum N]`` of several; shorter ones get steps that are neither present nor valid, shorter
    prompts padding on the left.

    :param same_prompts: the rollouts answer the same questions (demonstrations, probes), so ``group`` keeps its
        numbers; else groups of different rollouts are kept apart. Columns that not all rollouts have are dropped.
    """
    if not rollouts:
        raise ValueError("concatenate: expected at least one rollout, got none")
    names = set.intersection(*(set(r) for r in rollouts))
    steps, offset = max(r.shape[0] for r in rollouts), 0
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    for rollout in rollouts:
        for name in names:
            value = rollout[name]
            if name == "group":
                value = value + offset
            if name not in rollout.sequence:
                value = F.pad(value, (0, 0) * (value.dim() - 1) + (0, steps - value.shape[0]))
            columns[name].append(value)
        offset += 0 if same_prompts else int(rollout["group"].max()) + 1
    for name in {"prompt", "prompt_valid"} & names:
        width = max(v.shape[1] for v in columns[name])
        columns[name] = [F.pad(v, (width - v.shape[1], 0)) for v in columns[name]]
    sequence = rollouts[0].sequence & names
    joined = {name: torch.cat(v, 0 if name in sequence else 1) for name, v in columns.items()}
    return Data(joined, raw=rollouts[0].raw & names, sequence=frozenset(sequence))


@torch.no_grad()
def evaluate_columns(
    policy: nn.Module, data: Data, want: frozenset[str], columns: int | None = None
) -> dict[str, Tensor]:
    """Forward outputs ``[T, N, ...]`` of ``policy`` on a rollout, without gradient, at most ``columns`` at a time."""
    rows = [policy(piece, want) for piece in data.microbatches(columns)]
    return {name: torch.cat([row[name] for row in rows], 1) for name in want}


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
