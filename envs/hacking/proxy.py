"""A true and a proxy reward in one environment: the agent is paid the proxy, the log tells the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ccrl.batched_env import BatchedEnv, Tree
from ccrl.wrappers import RewardWrapper
from envs.hacking.exact import Agreement

__all__ = ["Proxy", "ProxyReward", "agreement"]

Proxy = Callable[[Tree, Tensor, Tree], Tensor]
"""``(observation, action, true successor) -> reward [N]``."""


class ProxyReward(RewardWrapper):
    """Pays ``proxy`` in place of the environment's own reward, which is the true one.

    ``log`` of a step has ``rollout/true_return`` and ``rollout/proxy_return``: means over the episodes that ended
    in it (NaN: none did). ``memory`` has ``true`` and ``proxy`` ``[N]``, the rewards of the last step. No
    agent reads them.

    Args:
        env: pays the true reward.
        proxy: ``None``: the environment's method ``proxy``.
        paid: ``proxy``, or ``true`` (to train a reference).

    Raises:
        ValueError: something else to be paid.
    """

    def __init__(self, env: BatchedEnv, proxy: Proxy | None = None, paid: Literal["proxy", "true"] = "proxy") -> None:
        super().__init__(env)
        if paid not in ("proxy", "true"):
            raise ValueError(f"ProxyReward: expected paid 'proxy' or 'true', got {paid!r}")
        self.paid = paid
        self.proxy: Proxy = env.proxy if proxy is None else proxy  # type: ignore[attr-defined]
        zero = torch.zeros(self.num_envs, device=self.device)
        self.memory = {"true_return": zero, "proxy_return": zero, "true": zero, "proxy": zero}
        self.live = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        """Copies ``[N]`` that took the last step: not those that began anew in it, or had ended."""

    def begin(self, obs: Tree, where: Tensor) -> None:
        for name in ("true_return", "proxy_return"):
            self.memory[name] = self.memory[name].masked_fill(where, 0.0)

    def pay(self, obs: Tree, action: Tensor, successor: Tree, reward: Tensor, live: Tensor) -> Tensor:
        self.live = live
        rewards = {"true": reward.clone(), "proxy": self.proxy(obs, action, successor)}
        for name, x in rewards.items():
            self.memory[name] = torch.where(live, x, torch.zeros_like(x))
            self.memory[f"{name}_return"] = self.memory[f"{name}_return"] + self.memory[name]
        return rewards[self.paid]

    def log(self, done: Tensor) -> dict[str, Any]:
        names = ("true_return", "proxy_return")
        return {f"rollout/{n}": self.memory[n].masked_fill(~done, float("nan")).nanmean() for n in names}


@torch.no_grad()
def agreement(env: ProxyReward, act: Callable[[Tree], Tensor], steps: int, seed: int = 0) -> Agreement:
    """Correlation and deviations of the two rewards over ``steps`` steps of every copy under ``act``, a function from
    observations ``[N, ...]`` to actions; every visit counts alike.

    Raises:
        ValueError: fewer than 2 steps in all.
    """
    if steps * env.num_envs < 2:
        raise ValueError(f"agreement: expected at least 2 steps in all, got {steps} of {env.num_envs} copies")
    obs, rows = env.reset(seed=seed), []
    for _ in range(steps):
        obs = env.step(act(obs)).obs
        rows.append(torch.stack([env.memory["true"], env.memory["proxy"]])[:, env.live])
    pairs = torch.cat(rows, 1).double()
    centred = pairs - pairs.mean(1, keepdim=True)
    covariance = centred @ centred.T / pairs.shape[1]
    sigma = covariance.diagonal().sqrt()
    return Agreement(float(covariance[0, 1] / (sigma[0] * sigma[1])), float(sigma[0]), float(sigma[1]))
