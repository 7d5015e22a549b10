"""A stand-in for Isaac Lab and mjlab that keeps their habits, so that the adapter is tested without a simulator."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

__all__ = ["FakeLab", "LabCfg"]


@dataclass
class LabCfg:
    """The fields of the simulators' configurations that an adapter reads."""

    num_envs: int = 3
    seed: int | None = 42
    limit: int = 12
    compute_final_obs: bool = True
    is_finite_horizon: bool = False
    auto_reset: bool = True
    nested: bool = False
    """The critic's group comes in parts."""
    critic: bool = True
    actor_name: str = "policy"
    fresh_log: bool = False
    """A new log at every reset (manager tasks); else one mapping, written in place (Direct tasks)."""
    one_per_process: bool = False


class FakeLab:
    """A point on a line: ``x += 0.1 action + noise``, ended beyond 2 or after ``cfg.limit`` steps; reward ``1 - |x|``.

    The habits: every returned tensor is a buffer that the next step overwrites; ``extras`` is one object for ever, its
    ``log`` stays as the last reset left it, and so do rows of ``final_obs`` that did not end; observations, starts and
    noise are drawn from the global random streams, which ``reset(seed=...)`` seeds; with ``auto_reset`` off nothing
    waits for a reset, and a step throws the log of the last reset away; a second environment may be refused.
    """

    _open: ClassVar[int] = 0

    def __init__(self, cfg: LabCfg) -> None:
        if cfg.one_per_process and FakeLab._open:
            raise RuntimeError("Simulation context already exists. Cannot create a new one.")
        FakeLab._open += cfg.one_per_process
        self.cfg, self.num_envs, self.device = cfg, cfg.num_envs, "cpu"
        self.max_episode_length = cfg.limit
        self.single_action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        n = cfg.num_envs
        self.x = torch.zeros(n)
        self.episode_length_buf = torch.zeros(n, dtype=torch.int64)
        self._policy, self._critic = torch.zeros(n, 2), torch.zeros(n, 3)
        self._reward = torch.zeros(n)
        self._terminated, self._truncated = (torch.zeros(n, dtype=torch.bool) for _ in range(2))
        self.extras: dict[str, Any] = {}
        if cfg.seed is not None:
            self._seed(cfg.seed)

    @property
    def unwrapped(self) -> FakeLab:
        return self

    @staticmethod
    def _seed(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)

    def reset(self, seed: int | None = None, options: Any = None, env_ids: Tensor | None = None) -> tuple[Any, Any]:
        if seed is not None:
            self._seed(seed)
        self._restart(torch.arange(self.num_envs) if env_ids is None else env_ids)
        return self._observe(), self.extras

    def step(self, action: Tensor) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        if not self.cfg.auto_reset:
            self.extras["log"] = {}
        self.x += 0.1 * action[:, 0] + 0.01 * torch.randn(self.num_envs)
        self.episode_length_buf += 1
        self._terminated.copy_(self.x.abs() > 2.0)
        self._truncated.copy_(self.episode_length_buf >= self.cfg.limit)
        self._reward.copy_(1.0 - self.x.abs())
        done = self._terminated | self._truncated
        if self.cfg.auto_reset and bool(done.any()):
            if self.cfg.compute_final_obs:
                final = {k: self._copy(v) for k, v in self._observe().items()}
                self.extras["final_obs"] = final
            self._restart(done.nonzero().squeeze(-1))
        return self._observe(), self._reward, self._terminated, self._truncated, self.extras

    def close(self) -> None:
        FakeLab._open -= self.cfg.one_per_process

    def _restart(self, rows: Tensor) -> None:
        mean = self.x[rows].mean()
        if self.cfg.fresh_log or "log" not in self.extras:
            self.extras["log"] = {}
        self.extras["log"]["Episode_Reward/x"] = mean
        self.extras["log"]["Episode_Termination/count"] = float(len(rows))
        self.extras["log"]["not a scalar"] = torch.zeros(3)
        # one draw for all rows, whichever they are: as real ones, copies share the stream
        self.x[rows] = torch.rand(self.num_envs)[rows] * (0.5 + 0.5 * random.random()) + 0.01 * float(np.random.rand())  # noqa: NPY002
        self.episode_length_buf[rows] = 0

    def _observe(self) -> dict[str, Any]:
        clock = self.episode_length_buf.float()
        self._policy.copy_(torch.stack([self.x + 0.001 * torch.randn(self.num_envs), clock], -1))
        self._critic.copy_(torch.stack([self.x, clock, torch.full_like(clock, 7.0)], -1))
        obs: dict[str, Any] = {self.cfg.actor_name: self._policy}
        if self.cfg.critic:
            obs["critic"] = {"z": self._critic[:, :2], "a": self._critic[:, 2:]} if self.cfg.nested else self._critic
        return obs

    @staticmethod
    def _copy(group: Any) -> Any:
        return group.clone() if isinstance(group, Tensor) else {k: v.clone() for k, v in group.items()}
