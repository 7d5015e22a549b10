"""A scripted environment, whose every number can be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import Space, spaces
from torch import Tensor

from ccrl.batched_env import AutoresetMode, StepResult, Tree, as_autoreset_mode

__all__ = ["ClockEnv", "Episode"]

_ENDINGS = ("terminate", "truncate", "both")


class Episode(NamedTuple):
    """One scripted episode: observations ``base, base + 1, ..., base + length``, then ``ending``."""

    base: float
    length: int
    ending: Literal["terminate", "truncate", "both"] = "terminate"


class ClockEnv:
    """An environment whose observation is the clock of a scripted episode, so that every row of a buffer can be checked
    by hand. Copy ``i`` plays the episodes ``script[i]`` over and over; actions change nothing.

    It returns its own buffers and writes them in place, so that whoever keeps a reference instead of a copy is caught.
    In ``SAME_STEP`` mode the rows of ``final_obs`` where no episode ended are NaN: nobody may read them.

    Args:
        script: for each copy, its episodes.
        autoreset_mode: all three are supported.
        reward: of every step.
        groups: ``False`` observes ``[N, 1]``; ``True`` a dict of ``"policy"`` (the same) and ``"critic"`` ``[N, 2]``
            (the same and the step in the episode).
        action_space: of one copy; ``None`` is ``Discrete(2)``.
        provides_final_obs: ``False`` hides ``final_obs`` in ``SAME_STEP`` mode, as some simulators do.

    Raises:
        ValueError: a copy without episodes, an episode without steps, or an unknown ending.
    """

    def __init__(
        self,
        script: Sequence[Sequence[Episode]],
        *,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
        reward: float = 1.0,
        groups: bool = False,
        action_space: Space[Any] | None = None,
        provides_final_obs: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        for episodes in script:
            if not episodes or any(e.length < 1 or e.ending not in _ENDINGS for e in episodes):
                raise ValueError(
                    f"expected at least one Episode per copy, of length >= 1, ending in {_ENDINGS}; got {episodes}"
                )
        self.script = script
        self.num_envs = len(script)
        self.device = torch.device(device)
        self.autoreset_mode = as_autoreset_mode(autoreset_mode, where="ClockEnv")
        self.provides_final_obs = provides_final_obs and self.autoreset_mode == AutoresetMode.SAME_STEP
        self.single_action_space = spaces.Discrete(2) if action_space is None else action_space
        policy = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        critic = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.single_observation_space = spaces.Dict({"policy": policy, "critic": critic}) if groups else policy
        self.groups = groups
        self.reward = reward
        self._episode = [0] * self.num_envs
        self._step = [0] * self.num_envs
        self._obs = torch.zeros(self.num_envs, 2, device=self.device)
        self._final_obs = torch.full_like(self._obs, torch.nan)
        self._reward = torch.zeros(self.num_envs, device=self.device)
        self._terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self._truncated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self._started = False

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tree:
        """Without ``mask`` the script starts over; with it the chosen copies go on to their next episodes."""
        if mask is None:
            self._episode = [-1] * self.num_envs
            self._started = True
        for row in range(self.num_envs):
            if mask is None or bool(mask[row]):
                self._next_episode(row)
        return self._tree(self._obs)

    def step(self, action: Tensor) -> StepResult:
        """See :class:`ccrl.batched_env.BatchedEnv`. In ``DISABLED`` mode, stepping a finished copy raises
        ``RuntimeError``: a collector that forgets to reset is found out."""
        shape = (self.num_envs, *(self.single_action_space.shape or ()))
        if tuple(action.shape) != shape:
            raise ValueError(f"ClockEnv: expected actions of shape {shape}, got {tuple(action.shape)}")
        if not self._started:
            raise RuntimeError("ClockEnv: call reset() before step()")
        self._final_obs.fill_(torch.nan)
        for row in range(self.num_envs):
            self._step_row(row)
        final = self._tree(self._final_obs) if self.provides_final_obs else None
        return StepResult(self._tree(self._obs), self._reward, self._terminated, self._truncated, final)

    def close(self) -> None:
        """Nothing to release."""

    def state_dict(self) -> dict[str, Any]:
        """The position of every copy in its script."""
        flags = {"terminated": self._terminated.clone(), "truncated": self._truncated.clone()}
        return {"episode": list(self._episode), "step": list(self._step), **flags}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Go on from ``state_dict()`` of an environment with the same script."""
        self._episode, self._step, self._started = list(values["episode"]), list(values["step"]), True
        self._terminated.copy_(values["terminated"])
        self._truncated.copy_(values["truncated"])
        for row in range(self.num_envs):
            self._write(self._obs, row)

    def _step_row(self, row: int) -> None:
        ended = bool(self._terminated[row] | self._truncated[row])
        if ended and self.autoreset_mode == AutoresetMode.DISABLED:
            raise RuntimeError(f"ClockEnv: copy {row} has finished; call reset(mask=...) before the next step")
        if ended and self.autoreset_mode == AutoresetMode.NEXT_STEP:
            self._next_episode(row)
            self._reward[row] = 0.0
            return
        episode = self._current(row)
        self._step[row] += 1
        done = self._step[row] == episode.length
        self._reward[row] = self.reward
        self._write(self._obs, row)
        if done and self.autoreset_mode == AutoresetMode.SAME_STEP:
            self._write(self._final_obs, row)
            self._next_episode(row)
        self._terminated[row] = done and episode.ending != "truncate"
        self._truncated[row] = done and episode.ending != "terminate"

    def _next_episode(self, row: int) -> None:
        self._episode[row] = (self._episode[row] + 1) % len(self.script[row])
        self._step[row] = 0
        self._terminated[row] = self._truncated[row] = False
        self._write(self._obs, row)

    def _current(self, row: int) -> Episode:
        return self.script[row][self._episode[row]]

    def _write(self, buffer: Tensor, row: int) -> None:
        buffer[row, 0] = self._current(row).base + self._step[row]
        buffer[row, 1] = self._step[row]

    def _tree(self, buffer: Tensor) -> Tree:
        return {"policy": buffer[:, :1], "critic": buffer} if self.groups else buffer[:, :1]
