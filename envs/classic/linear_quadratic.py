"""Two tasks with Gaussian actions and exact gradients: a bandit and the linear-quadratic regulator of BPG.

Source: Ghavamzadeh and Engel 2006; Ghavamzadeh, Engel and Valko 2016. The constants of the LQR are quoted from memory
of these.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ccrl.settings import Count, Unit, checked
from envs.classic.base import Array, ClassicEnv
from envs.classic.exact import Exact, Params, as_theta

__all__ = ["LQR", "Bandit"]


class Bandit(Exact, ClassicEnv):
    """One state, one step, a real action; reward ``a`` or ``a^2``. Observation: 1, and 0 after the step.

    A policy ``N(m, s^2)`` has the return ``m`` (gradient ``(1, 0)`` in ``(m, s)``) or ``m^2 + s^2`` (``(2m, 2s)``).

    Args:
        kind: ``"linear"`` or ``"quadratic"``.
    """

    id = "ccrl/Bandit-v0"
    default_max_episode_steps = 10
    uniforms = 1
    gamma = 1.0

    @checked
    def __init__(self, num_envs: int = 1, *, kind: Literal["linear", "quadratic"] = "linear", **options: Any) -> None:
        super().__init__(num_envs, **options)
        self.single_observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.single_action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.kind = kind

    def initial_state(self, uniform: Array) -> Array:
        return self.xp.ones_like(uniform)

    def dynamics(self, state: Array, action: Array) -> Array:
        return self.xp.zeros_like(state)

    def terminated(self, state: Array) -> Array:
        return state[0] == 0

    def reward(self, state: Array, action: Array, terminated: Array) -> Array:
        return action[0] if self.kind == "linear" else action[0] * action[0]

    def objective(self, params: Params) -> Tensor:
        mean, std = _gaussian(params, 1.0)
        return mean if self.kind == "linear" else mean * mean + std * std

    def visits(self, params: Params) -> tuple[Tensor, Tensor]:
        return torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)


class LQR(Exact, ClassicEnv):
    """``x' = x + a + n``, reward ``-(x^2 + 0.1 a^2)`` for ``horizon`` steps; ``x_0 ~ N(0.3, 0.001)`` and
    ``n ~ N(0, 0.01)`` (variances). State and observation: ``x`` (the state also holds the clock). The end is a
    termination: the task is these steps.

    For ``a ~ N(lam x, sig^2)`` the second moment of ``x`` obeys ``e' = (1 + lam)^2 e + sig^2 + 0.01``.

    Args:
        horizon: steps per episode.
        gamma: discount of the exact return; the published task has none.
    """

    id = "ccrl/LQR-v0"
    default_max_episode_steps = 1000
    uniforms = 2
    noises = 2
    start_mean, start_variance, noise_variance, action_cost = 0.3, 0.001, 0.01, 0.1

    @checked
    def __init__(self, num_envs: int = 1, *, horizon: Count = 20, gamma: Unit = 1.0, **options: Any) -> None:
        super().__init__(num_envs, **options)
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.single_action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.horizon, self.gamma = horizon, gamma

    def initial_state(self, uniform: Array) -> Array:
        x = self.start_mean + math.sqrt(self.start_variance) * self._normal(uniform)
        return self.xp.stack((x, self.xp.zeros_like(x)))

    def dynamics(self, state: Array, action: Array, noise: Array) -> Array:
        x = state[0] + self.real(action[0]) + math.sqrt(self.noise_variance) * self._normal(noise)
        return self.xp.stack((x, state[1] + 1.0))

    def terminated(self, state: Array) -> Array:
        return state[1] >= self.horizon

    def reward(self, state: Array, action: Array, terminated: Array) -> Array:
        effort = self.real(action[0])
        return -(state[0] * state[0] + self.action_cost * effort * effort)

    def observe(self, state: Array) -> Array:
        return state[:1]

    def _normal(self, uniform: Array) -> Array:
        """``[N]`` standard normal numbers from ``[2, N]`` uniform ones in [0, 1) (Box and Muller)."""
        return self.xp.sqrt(-2.0 * self.xp.log(1.0 - uniform[0])) * self.xp.cos(2.0 * math.pi * uniform[1])

    def objective(self, params: Params) -> Tensor:
        gain, std, moments = self._moments(params)
        cost = (1.0 + self.action_cost * gain * gain) * moments + self.action_cost * std * std
        return -(self.gamma ** torch.arange(self.horizon, dtype=torch.float64) * cost).sum()

    def visits(self, params: Params) -> tuple[Tensor, Tensor]:
        # the Fisher matrix of a linear policy is A x^2 + B: one state at the root mean square stands for all
        moments = self._moments(params)[2]
        return moments.mean().sqrt().reshape(1, 1), torch.tensor([float(self.horizon)], dtype=torch.float64)

    def _moments(self, params: Params) -> tuple[Tensor, Tensor, Tensor]:
        """Gain, standard deviation (0-d) and ``E x_t^2`` ``[horizon]``."""
        gain, std = _gaussian(params, 1.0)
        second = torch.tensor(self.start_mean**2 + self.start_variance, dtype=torch.float64)
        moments = [second]
        for _ in range(self.horizon - 1):
            moments.append((1.0 + gain) ** 2 * moments[-1] + std * std + self.noise_variance)
        return gain, std, torch.stack(moments)

    def exact_return(self, policy: Any, theta: Tensor | None = None) -> Tensor:
        """``J(theta)``, 0-d.

        Raises:
            ValueError: a policy that is not linear with one standard deviation.
        """
        at = self._params(policy, as_theta(policy, theta), torch.tensor([[0.0], [1.0], [-3.0]]))
        mean, log_std = at["mean"].flatten(), at["log_std"].flatten()
        expected = torch.tensor([0.0, 1.0, -3.0], dtype=torch.float64) * mean[1]
        if not torch.allclose(mean, expected) or not torch.allclose(log_std, log_std[:1]):
            raise ValueError(f"{self.id}: the exact return is that of a ~ N(lam x, sig^2), got another kind of policy")
        return super().exact_return(policy, theta)


def _gaussian(params: Params, x: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (0-d) of the action at the observation ``x``."""
    at = params(torch.full((1, 1), x, dtype=torch.float64))
    return at["mean"].reshape(()), at["log_std"].exp().reshape(())
