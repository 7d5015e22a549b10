"""The rollout buffer: preallocated time-major storage of facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ccrl.batched_env import StepResult, StepRows, Tree
from ccrl.data import Data, Field, tree_leaves, tree_map
from ccrl.returns import forward_scan
from ccrl.successors import Successors

__all__ = ["RolloutBuffer", "space_like"]


def space_like(space: gym.Space[Any], lead: tuple[int, ...], device: torch.device) -> Tree:
    """Zeros ``[*lead, *space.shape]`` in the dtype of the space (float64 becomes float32; discrete ones are int64)."""
    if isinstance(space, gym.spaces.Dict):
        return {k: space_like(s, lead, device) for k, s in space.items()}  # type: ignore[misc]
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete | gym.spaces.MultiBinary):
        return torch.zeros((*lead, *(space.shape or ())), dtype=torch.int64, device=device)
    if isinstance(space, gym.spaces.Box):
        dtype = torch.from_numpy(np.zeros(0, space.dtype)).dtype
        dtype = torch.float32 if dtype.is_floating_point else dtype
        return torch.zeros((*lead, *space.shape), dtype=dtype, device=device)
    raise ValueError(
        f"expected a Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict of these, got {space}; flatten it with a "
        "wrapper"
    )


class RolloutBuffer:
    """``T`` steps of ``N`` environments, reused for every rollout: ``write`` rows in order, then read ``data()``.

    Rows hold copies: environments may overwrite the tensors they returned. Masks and step counters are computed once,
    for the whole rollout, from the flags; a step costs a handful of copies and no host sync.

    :param fields: extra per-step or per-sequence raw columns (behaviour parameters, ids ...).
    """

    def __init__(
        self,
        steps: int,
        num_envs: int,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        fields: tuple[Field, ...] = (),
        device: torch.device | str = "cpu",
        keep_final_obs: bool = True,
    ) -> None:
        if steps < 1 or num_envs < 1:
            raise ValueError(f"RolloutBuffer: expected steps, num_envs >= 1, got {steps}, {num_envs}")
        self.steps, self.num_envs, self.device = steps, num_envs, torch.device(device)
        lead = (steps, num_envs)
        self.obs = space_like(observation_space, (steps + 1, num_envs), self.device)
        action = space_like(action_space, lead, self.device)
        if isinstance(action, dict):
            raise ValueError(f"RolloutBuffer: expected an action space that is no Dict, got {action_space}")
        self.action = action
        self.reward = torch.zeros(lead, device=self.device)
        self.terminated = torch.zeros(lead, dtype=torch.bool, device=self.device)
        self.truncated = torch.zeros(lead, dtype=torch.bool, device=self.device)
        self.final_obs = space_like(observation_space, lead, self.device) if keep_final_obs else None
        self.extra = {
            f.name: torch.zeros((*(lead if f.per == "step" else lead[1:]), *f.shape), dtype=f.dtype, device=self.device)
            for f in fields
        }
        self.written: dict[str, str] = {}
        """Columns that every step writes -> their names among the policy's outputs; set by the collector."""
        self._step: _StepColumns | None = None
        self._per_sequence = frozenset(f.name for f in fields if f.per == "sequence")
        # views of every row, made once: indexing costs as much as the copy into a row of 16 environments
        self._obs_rows = _rows(self.obs)
        self._final_rows = None if self.final_obs is None else _rows(self.final_obs)
        facts = zip(self._obs_rows[1:], self.reward, self.terminated, self.truncated)
        finals: Sequence[Tree | None] = self._final_rows or (None,) * steps
        self.rows = [StepRows(*fact, final_obs=final) for fact, final in zip(facts, finals)]
        """Row ``t``: where step ``t`` goes, its observation in row ``t + 1``."""
        self.action_rows = self.action.unbind()
        self.extra_rows = {f.name: self.extra[f.name].unbind() for f in fields if f.per == "step"}

    def begin(self, obs: Tree) -> None:
        """Set the first observation ``[N, ...]``."""
        self.write_obs(0, obs)

    def write_obs(self, t: int, obs: Tree) -> None:
        """Set observation ``t``; after manual resets it replaces the one that ``write`` stored."""
        row = self._obs_rows[t]
        torch._foreach_copy_(tree_leaves(row), tree_leaves(obs, row))

    def row(self, t: int) -> Tree:
        """Observation ``t`` as stored, ``[N, ...]``."""
        return self._obs_rows[t]

    def write(self, t: int, action: Tensor, result: StepResult, extra: dict[str, Tensor]) -> None:
        """Store step ``t``; ``result.obs`` becomes the start of row ``t + 1``."""
        self.write_action(t, action, extra)
        self.rows[t].write(result)

    def write_action(self, t: int, action: Tensor, extra: dict[str, Tensor]) -> None:
        """Store what was done in step ``t``."""
        torch._foreach_copy_([self.action_rows[t], *(self.extra_rows[k][t] for k in extra)], [action, *extra.values()])

    def keep_final(self, t: int) -> None:
        """Observation ``t + 1`` is the last of its episode wherever one ended in step ``t``."""
        if self._final_rows is not None:
            final = self._final_rows[t]
            torch._foreach_copy_(tree_leaves(final), tree_leaves(self._obs_rows[t + 1], final))

    def clear(self, start: int) -> None:
        """Rows from ``start`` on hold no facts: no reward, no episode end (what else they hold is an older rollout's).

        For rollouts that end before the buffer is full; whoever reads them masks these rows."""
        for column in (self.reward, self.terminated, self.truncated):
            column[start:].zero_()

    def data(self, *, step: Tensor, ended: Tensor, next_step_reset: bool = False, hidden_final: bool = False) -> Data:
        """The rollout as columns.

        :param step: ``[N]`` int64, steps of the current episode before this rollout.
        :param ended: ``[N]`` bool, did the row before this rollout end an episode.
        :param next_step_reset: NEXT_STEP autoreset: the row after an episode's end is a dummy (``valid = 0``).
        :param hidden_final: the environment resets in the same step and hides the final observation: the state itself
            stands in for its successor there.
        """
        done = self.terminated | self.truncated
        before = torch.cat([ended.unsqueeze(0), done[:-1]])
        valid = (~before).float() if next_step_reset else torch.ones_like(self.reward)
        carry = valid * (~done).float()
        # steps since the episode's start: +1 per valid row, restarted after an end
        counted = forward_scan(valid.double(), (~before).double(), step.double())
        columns: dict[str, Tree] = {
            "obs": tree_map(lambda x: x[:-1], self.obs),
            "action": self.action,
            "reward": self.reward,
            "terminated": self.terminated,
            "truncated": self.truncated & ~self.terminated,
            "alive": (~self.terminated).float(),
            "carry": carry,
            "valid": valid,
            "t": (counted.long() - 1).clamp_min(0),
            "group": torch.arange(self.num_envs, device=self.device),
            **self.extra,
        }
        return Data(
            columns,
            sequence=self._per_sequence | {"group"},
            successors=self._successors(done, next_step_reset, hidden_final),
        )

    def step_data(self, step: Tensor, hidden_final: bool) -> tuple[Data, Tensor | None]:
        """As ``data`` for a buffer of one step without dummy rows: its columns, and where episodes ended (``[N]`` bool;
        None: nowhere). Columns are the buffer's own tensors, overwritten by the next step.

        :param step: ``[N]`` int64, steps of the current episode before this one (0 after an end).
        """
        own = self._step = _StepColumns(self) if self._step is None else self._step
        torch.logical_or(self.terminated, self.truncated, out=own.done)
        own.t.copy_(step)
        if not bool(own.done.any()):
            return own.running, None
        torch.logical_not(self.terminated, out=own.alive)
        torch.logical_not(own.done, out=own.carry)
        torch.gt(self.truncated, self.terminated, out=own.truncated)
        if hidden_final or self._final_rows is None:
            after = Successors(self.obs, own.nothing, torch.where(own.done, -2, -1))
        else:
            # a row for every environment, read only where an episode ended: picking them costs more than the rest
            after = Successors(self.obs, self._final_rows[0], torch.where(own.done, own.group, -1))
        return Data(own.columns, sequence=own.sequence, successors=after), own.done[0]

    def _successors(self, done: Tensor, next_step_reset: bool, hidden_final: bool) -> Successors:
        slot = torch.full(done.shape, -1, dtype=torch.int64, device=self.device)
        empty = tree_map(lambda x: x[:0, 0], self.obs)
        if next_step_reset:
            return Successors(self.obs, empty, slot)
        if hidden_final or self.final_obs is None:
            return Successors(self.obs, empty, torch.where(done, -2, slot))
        ends = done.flatten().nonzero().squeeze(-1)
        slot.view(-1)[ends] = torch.arange(ends.shape[0], device=self.device)
        rows = tree_map(lambda x: x.flatten(0, 1).index_select(0, ends), self.final_obs)
        return Successors(self.obs, rows, slot)


class _StepColumns:
    """Derived columns of a buffer of one step, allocated once: a rollout of one step would spend more on them than on
    the step."""

    def __init__(self, buffer: RolloutBuffer) -> None:
        n, device = buffer.num_envs, buffer.device
        ones = torch.ones_like(buffer.reward)
        self.done, self.truncated = torch.zeros_like(buffer.terminated), torch.zeros_like(buffer.terminated)
        self.alive, self.carry = torch.ones_like(ones), torch.ones_like(ones)
        self.t = torch.zeros((1, n), dtype=torch.int64, device=device)
        self.group = torch.arange(n, device=device)
        self.nothing = tree_map(lambda x: x[:0, 0], buffer.obs)
        self.sequence = buffer._per_sequence | {"group"}
        self.columns: dict[str, Tree] = {
            "obs": tree_map(lambda x: x[:-1], buffer.obs),
            "action": buffer.action,
            "reward": buffer.reward,
            "terminated": buffer.terminated,
            "truncated": self.truncated,
            "alive": self.alive,
            "carry": self.carry,
            "valid": ones,
            "t": self.t,
            "group": self.group,
            **buffer.extra,
        }
        # where no episode ends, both flags are False and both masks 1
        same = self.columns | {"truncated": buffer.truncated, "alive": ones, "carry": ones}
        after = Successors(buffer.obs, self.nothing, torch.full_like(self.t, -1))
        self.running = Data(same, sequence=self.sequence, successors=after)


def _rows(tree: Tree) -> list[Tree]:
    """The rows of all leaves, as trees."""
    if isinstance(tree, dict):
        columns = {k: x.unbind() for k, x in tree.items()}
        return [dict(zip(columns, row)) for row in zip(*columns.values())]
    return list(tree.unbind())
