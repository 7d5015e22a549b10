"""What the contract of environments measures with: random actions, copies of observations, checks of one result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import Space, spaces
from torch import Tensor

from ccrl.batched_env import BatchedEnv, StepResult, StepRows, Tree
from ccrl.buffer import RolloutBuffer
from ccrl.data import tree_leaves

__all__ = [
    "check_obs",
    "check_result",
    "copy_of",
    "dirty_rows",
    "equal",
    "error_of",
    "row_of",
    "rows_of",
    "sample_actions",
    "snapshot",
]


def sample_actions(space: Space[Any], num_envs: int, generator: torch.Generator) -> Tensor:
    """``[N, *shape]`` random actions on the CPU: uniform, in an unbounded ``Box`` standard normal."""
    if isinstance(space, spaces.Discrete):
        return torch.randint(int(space.n), (num_envs,), generator=generator)
    shape = (num_envs, *(space.shape or ()))
    if isinstance(space, spaces.MultiBinary):
        return torch.randint(2, shape, generator=generator)
    if isinstance(space, spaces.MultiDiscrete):
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * torch.from_numpy(space.nvec)).long()
    assert isinstance(space, spaces.Box), f"expected a Box or discrete actions, got {space}"
    if not space.is_bounded():
        return torch.randn(shape, generator=generator)
    low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
    return low + (high - low) * torch.rand(shape, generator=generator)


def check_obs(obs: Tree, env: BatchedEnv) -> None:
    space = env.single_observation_space
    leaves = obs if isinstance(obs, dict) else {"": obs}
    expected = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    assert set(leaves) == set(expected)
    for key, leaf in leaves.items():
        assert leaf.shape == (env.num_envs, *(expected[key].shape or ())), f"observation {key}: {tuple(leaf.shape)}"
        assert leaf.device == env.device
        if leaf.is_floating_point():
            assert leaf.dtype == torch.float32


def check_result(result: StepResult, env: BatchedEnv) -> None:
    assert isinstance(result, StepResult)
    check_obs(result.obs, env)
    assert result.reward.shape == (env.num_envs,)
    assert result.reward.dtype == torch.float32
    for flag in (result.terminated, result.truncated):
        assert flag.shape == (env.num_envs,)
        assert flag.dtype == torch.bool
    for tensor in (result.reward, result.terminated, result.truncated):
        assert tensor.device == env.device
    assert (result.final_obs is not None) == env.provides_final_obs
    if result.final_obs is not None:
        check_obs(result.final_obs, env)


def snapshot(result: StepResult) -> dict[str, Tensor]:
    obs = result.obs if isinstance(result.obs, dict) else {"obs": result.obs}
    flags = {"reward": result.reward, "terminated": result.terminated, "truncated": result.truncated}
    return {key: value.cpu().clone() for key, value in (obs | flags).items()}


def copy_of(tree: Tree) -> Any:
    return {key: leaf.cpu().clone() for key, leaf in tree.items()} if isinstance(tree, dict) else tree.cpu().clone()


def row_of(tree: Any, row: int) -> Any:
    if isinstance(tree, dict):
        return {key: row_of(leaf, row) for key, leaf in tree.items()}
    return np.array(tree[row].cpu().numpy())[()]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(equal(a[key], b[key]) for key in a)
    return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True))


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    raise AssertionError("expected a ValueError or a TypeError")


def dirty_rows(env: BatchedEnv) -> StepRows:
    """Rows of a new rollout buffer, full of numbers that no step returns."""
    buffer = RolloutBuffer(
        1, env.num_envs, env.single_observation_space, env.single_action_space, device=env.device,
        keep_final_obs=env.provides_final_obs,
    )  # fmt: skip
    (rows,) = buffer.rows
    finals = [] if rows.final_obs is None else tree_leaves(rows.final_obs)
    for leaf in (*tree_leaves(rows.obs), rows.reward, rows.terminated, rows.truncated, *finals):
        leaf.fill_(123)
    return rows


def rows_of(result: StepResult | StepRows, done: Tensor) -> dict[str, Any]:
    """What a step returned or wrote, by name, in the types of a buffer; of the last observations those in ``done``."""
    found: dict[str, Any] = {"obs": copy_of(result.obs), "terminated": result.terminated, "truncated": result.truncated}
    found["reward"] = result.reward.float().clone()
    if result.final_obs is not None:
        leaves = result.final_obs if isinstance(result.final_obs, dict) else {"": result.final_obs}
        found |= {f"final_obs {key}".strip(): leaf[done].cpu().clone() for key, leaf in leaves.items()}
    return found
