"""What is looked at once per rollout: numbers that are not finite, observations that their space does not have."""

from __future__ import annotations

import math
from typing import Any

from gymnasium.spaces import Dict, Discrete, Space
from torch import Tensor

from ccrl.batched_env import Tree
from ccrl.buffer import RolloutBuffer
from ccrl.data import Data, tree_leaves

__all__ = ["check_finite", "check_states"]


def check_finite(buffer: RolloutBuffer, data: Data) -> None:
    """One check per rollout, before anything is learnt from it.

    Reports the first bad number in time: a NaN observation makes the next action NaN and that the next reward, and
    naming one of those would lead astray.
    """
    # a sum shows any bad number for one pass and one wait; it may also overflow, so it only says where to look closer
    total = buffer.reward.sum()
    for value in (*tree_leaves(buffer.obs), *tree_leaves(data.successors.rows), buffer.action):
        if value.is_floating_point() and value.numel():
            total = total + value.sum()
    if math.isfinite(float(total)):
        return
    ended = buffer.terminated | buffer.truncated
    columns: list[tuple[int, str, Tensor, Tensor | None]] = [
        (0, name, value, None) for name, value in _named(buffer.obs)
    ]
    columns += [(1, "action", buffer.action, None), (2, "reward", buffer.reward, None)]
    if buffer.final_obs is not None:
        columns += [(2, f"final {name}", value, ended) for name, value in _named(buffer.final_obs)]
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


def check_states(obs: Tree, space: Space[Any]) -> None:
    """Discrete observations that their space does not have: policies would take all of them for one state."""
    for name, value in _named(obs):
        leaf = space[name] if isinstance(space, Dict) else space
        if not isinstance(leaf, Discrete):
            continue
        bad = ((value < 0) | (value >= leaf.n)).nonzero()
        if len(bad):
            row, env = bad[0].tolist()
            raise ValueError(
                f"{name}: expected one of {leaf}, got {int(value[row, env])} from environment {env} (observation {row} "
                "of the rollout); mend the environment or its observation space"
            )


def _named(tree: Tree) -> list[tuple[str, Tensor]]:
    return list(tree.items()) if isinstance(tree, dict) else [("obs", tree)]
