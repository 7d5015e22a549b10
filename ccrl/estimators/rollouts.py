"""Rollouts of whole episodes or completions, joined and evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.data import Data, tree_map

__all__ = ["concatenate", "evaluate_columns"]


def concatenate(rollouts: Sequence[Data], *, same_prompts: bool = False) -> Data:
    """One rollout ``[max T, sum N]`` of several; shorter ones get steps that are neither present nor valid, shorter
    prompts padding on the left. ``next_obs`` does not survive it.

    :param same_prompts: the rollouts answer the same questions (demonstrations, probes), so ``group`` keeps its
        numbers; else groups of different rollouts are kept apart. Columns that not all rollouts have are dropped.
    :raises ValueError: without any rollout.
    """
    if not rollouts:
        raise ValueError("concatenate: expected at least one rollout, got none")
    first = rollouts[0]
    if len(rollouts) == 1:
        return first
    names = [name for name in first if all(name in r for r in rollouts)]
    sequence = first.sequence & set(names)
    steps, offset = max(r.shape[0] for r in rollouts), 0
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for rollout in rollouts:
        for name in names:
            value = rollout[name]
            if name == "group":
                value = value + offset
            columns[name].append(value if name in sequence else tree_map(lambda x: _longer(x, steps), value))
        if "group" in names and not same_prompts:
            offset += int(rollout["group"].max()) + 1
    for name in {"prompt", "prompt_valid"} & set(names):
        width = max(v.shape[1] for v in columns[name])
        columns[name] = [F.pad(v, (width - v.shape[1], 0)) for v in columns[name]]
    joined = {name: _beside(v, 0 if name in sequence else 1) for name, v in columns.items()}
    return Data(joined, raw=first.raw & set(names), sequence=frozenset(sequence))


def _longer(x: Tensor, steps: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, steps - x.shape[0])) if x.shape[0] < steps else x


def _beside(values: Sequence[Any], dim: int) -> Tree:
    if isinstance(values[0], dict):
        return {key: torch.cat([v[key] for v in values], dim) for key in values[0]}
    return torch.cat(list(values), dim)


@torch.no_grad()
def evaluate_columns(
    policy: nn.Module, data: Data, want: frozenset[str], columns: int | None = None
) -> dict[str, Tensor]:
    """Forward outputs ``[T, N, ...]`` of ``policy`` on a rollout, without gradient, at most ``columns`` at a time."""
    rows = [policy(piece, want) for piece in data.microbatches(columns)]
    return {name: torch.cat([row[name] for row in rows], 1) for name in want}
