"""What is looked at once per rollout: numbers that are not finite, observations that their space does not have."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from gymnasium.spaces import Dict, Discrete, MultiDiscrete, Space
from torch import Tensor

from ccrl.batched_env import Tree
from ccrl.buffer import RolloutBuffer
from ccrl.data import Data

__all__ = ["check_finite", "check_states"]


def check_finite(buffer: RolloutBuffer, data: Data, reads: Collection[str] | None = None) -> None:
    """One check per rollout, before anything is learnt from it.

    :param reads: keys of a Dict observation that the policy reads; None: all.

    Reports the first bad number in time: a NaN observation makes the next action NaN and that the next reward, and
    naming one of those would lead astray.
    """
    # a sum shows any bad number for one pass and one wait; it may also overflow, so it only says where to look closer
    total = buffer.reward.sum()
    rows = [*_named(buffer.obs, reads), *_named(data.successors.rows, reads)]
    for value in (*(leaf for _, leaf in rows), buffer.action):
        if value.is_floating_point() and value.numel():
            total = total + value.sum()
    if math.isfinite(float(total)):
        return
    ended = buffer.terminated | buffer.truncated
    columns: list[tuple[int, str, Tensor, Tensor | None]] = [
        (0, name, value, None) for name, value in _named(buffer.obs, reads)
    ]
    columns += [(1, "action", buffer.action, None), (2, "reward", buffer.reward, None)]
    if buffer.final_obs is not None:
        columns += [(2, f"final {name}", value, ended) for name, value in _named(buffer.final_obs, reads)]
    found: list[tuple[int, str, str, list[float]]] = []
    for place, name, value, where in columns:
        if not value.is_floating_point():
            continue
        bad = (~value.isfinite()).reshape(*value.shape[:2], -1).any(-1)
        bad = bad if where is None else bad & where
        if bool(bad.any()):
            row, env = bad.nonzero()[0].tolist()
            # observation t + 1 is what step t returned
            step = row - 1 if place == 0 else row
            when = f"environment {env}, " + (f"step {step} of the rollout" if step >= 0 else "at its first reset")
            found.append((3 * row + place, name, when, value[row, env].flatten()[:8].tolist()))
    if found:
        _, name, when, numbers = min(found)
        raise FloatingPointError(f"{name} is not finite: {when} (value {numbers})")


def check_states(obs: Tree, space: Space[Any], reads: Collection[str] | None = None) -> None:
    """Discrete and MultiDiscrete observations that their space does not have: policies would take all of them for one
    state. ``reads`` as of :func:`check_finite`."""
    for name, value in _named(obs, reads):
        leaf = space[name] if isinstance(space, Dict) else space
        if not isinstance(leaf, Discrete | MultiDiscrete):
            continue
        count = leaf.n if isinstance(leaf, Discrete) else torch.as_tensor(leaf.nvec, device=value.device)
        bad = ((value < 0) | (value >= count)).nonzero()
        if len(bad):
            row, env = bad[0, :2].tolist()
            raise ValueError(
                f"{name}: expected one of {leaf}, got {value[row, env].tolist()} from environment {env} (observation "
                f"{row} of the rollout); mend the environment or its observation space"
            )


def _named(tree: Tree, reads: Collection[str] | None) -> list[tuple[str, Tensor]]:
    if not isinstance(tree, dict):
        return [("obs", tree)]
    return [(key, value) for key, value in tree.items() if reads is None or key in reads]
