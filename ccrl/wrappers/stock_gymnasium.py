"""Stock augmentation of one Gymnasium environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from ccrl.distributional.objectives import Objective
from ccrl.wrappers.stock import STOCK, TIME, _check_objective

__all__ = ["StockWrapper"]

Array = NDArray[np.float64]


class StockWrapper(gymnasium.Wrapper):  # type: ignore[misc]
    """As :class:`ccrl.wrappers.StockEnv` for one environment with NumPy arrays.

    :param start: ``c_0``, or ``rng -> c_0`` with the environment's random numbers; ``reset(options={"start": c_0})``
        sets that of one episode.
    :param rewards: key of ``info`` that holds the reward vector of a step, of ``dims`` numbers.
    :raises ValueError: as there.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        gamma: float,
        start: float | Sequence[float] | Callable[[np.random.Generator], Any] = 0.0,
        *,
        rewards: str | None = None,
        dims: int = 0,
        objective: Objective | None = None,
        horizon: int | None = None,
    ) -> None:
        super().__init__(env)
        if not 0.0 < gamma <= 1.0:
            raise ValueError(f"gamma: expected a number in (0, 1], got {gamma}")
        if (rewards is None) != (dims == 0):
            raise ValueError(f"expected rewards and dims together, got {rewards!r} and {dims}")
        self.shape = (dims,) if dims else ()
        if objective is not None:
            _check_objective(objective, gamma, self.shape)
        inner = env.observation_space
        leaves = dict(inner.spaces) if isinstance(inner, gymnasium.spaces.Dict) else {"obs": inner}
        if taken := {STOCK, TIME} & leaves.keys():
            raise ValueError(f"expected an observation without {sorted(taken)}: is the environment wrapped already?")
        limit = None if env.spec is None else env.spec.max_episode_steps
        self.gamma, self.starts, self.rewards, self.objective = float(gamma), start, rewards, objective
        self.horizon = float(horizon or limit or 1)
        box = gymnasium.spaces.Box
        self.observation_space = gymnasium.spaces.Dict(
            {**leaves, STOCK: box(-np.inf, np.inf, self.shape, np.float32), TIME: box(0.0, np.inf, (1,), np.float32)}
        )
        self.stock: Array = np.zeros(self.shape)
        self.start: Array = np.zeros(self.shape)
        self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """``options={"start": c_0}`` begins this episode there."""
        options = dict(options or {})
        chosen = options.pop("start", None)
        obs, info = self.env.reset(seed=seed, options=options or None)
        start = self.starts if chosen is None else chosen
        if callable(start):
            start = start(self.unwrapped.np_random)
        value = np.asarray(start, dtype=np.float64)
        if value.shape not in ((), self.shape):
            raise ValueError(f"start: expected a number or {self.shape} of them, got shape {value.shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"start: expected finite numbers, got {start}")
        self.start = np.broadcast_to(value, self.shape).copy()
        self.stock, self.t = self.start.copy(), 0
        return self._shown(obs), self._told(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        earned = np.asarray(reward if self.rewards is None else info[self.rewards], dtype=np.float64)
        before, total = self.stock, np.asarray(self.stock + earned)
        self.stock, self.t = np.asarray(total / self.gamma), self.t + 1
        if self.objective is not None:
            f = self.objective.utility
            # as there: not gamma f(c'), which rounds by more than R where the stock has grown
            reward = float(f(torch.from_numpy(total)) - f(torch.from_numpy(before)))
        return self._shown(obs), float(reward), terminated, truncated, self._told(info)

    def _shown(self, obs: Any) -> dict[str, Any]:
        seen = obs if isinstance(obs, dict) else {"obs": obs}
        time = np.array([self.t / self.horizon], dtype=np.float32)
        return {**seen, STOCK: np.asarray(self.stock, dtype=np.float32), TIME: time}

    def _told(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, STOCK: self.stock.copy(), "start": self.start.copy(), "t": self.t}
