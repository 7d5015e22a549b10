"""Gradients from whole fresh episodes: ``g(tau, theta) = grad sum_t psi_t log pi_theta(a_t|s_t)``, unbiased and plain.

What the update rules that evaluate gradients at points of their own (look-ahead, line) share: docs/npg_igt.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.collect import Request
from ccrl.data import Data, masked, tree_map
from ccrl.estimators.base import Context, Estimator
from ccrl.estimators.rollouts import concatenate
from ccrl.estimators.updates import GradientEstimate
from ccrl.returns import discounted_sum

__all__ = ["LinearBaseline", "TrajectoryEstimator"]


class LinearBaseline(nn.Module):
    """``b(s_t, t)``, linear in ``x, x^2, t/100, (t/100)^2, (t/100)^3, 1`` (Duan et al. 2016): ridge regression on the
    reward to go of the rollouts BEFORE the ones it is subtracted from, so that it is a constant for their gradient.

    :param features: observations ``[K, ...]`` -> ``x [K, width]``.
    """

    coef: Tensor

    def __init__(self, features: Callable[[Tree], Tensor], width: int, ridge: float = 1e-5) -> None:
        super().__init__()
        self._features, self.ridge = features, ridge
        self.register_buffer("coef", torch.zeros(2 * width + 4, dtype=torch.float64))

    def forward(self, data: Data) -> Tensor:
        """``[T, N]``; 0 before the first fit."""
        return (self._design(data) @ self.coef).reshape(data.shape)

    @torch.no_grad()
    def fit(self, data: Data, target: Tensor) -> None:
        """Least squares on the valid rows of ``target [T, N]``."""
        keep = (data["valid"] > 0).reshape(-1, 1)
        # chosen, not multiplied: what padding holds may be NaN
        x, y = (torch.where(keep, rows, 0.0) for rows in (self._design(data), target.double().reshape(-1, 1)))
        gram = x.T @ x + self.ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        self.coef.copy_(torch.linalg.solve(gram, x.T @ y).squeeze(-1))

    def _design(self, data: Data) -> Tensor:
        x = self._features(tree_map(lambda leaf: leaf.flatten(0, 1), data["obs"])).double()
        time = data["t"].double().reshape(-1, 1) / 100.0
        return torch.cat([x, x * x, time, time**2, time**3, torch.ones_like(time)], 1)


class TrajectoryEstimator(Estimator):
    """Averages ``g(tau, theta)`` over fresh episodes, at as many points as the update rule names.

    ``psi_t = sum_{h>=t} gamma^h r_h - gamma^t b_t`` (docs/npg_igt.md). Rewards after an episode's end are 0; at the
    horizon nothing is bootstrapped (the bias is of order ``gamma^H``).

    :param episodes: fresh episodes per rollout.
    :param min_steps: further rollouts at the same point until an estimate rests on so many environment steps.
    :param discount_from_start: False drops the factor ``gamma^t``, as most code does (biased for ``gamma < 1``).
    """

    def __init__(
        self,
        *,
        episodes: int,
        horizon: int,
        gamma: float,
        min_steps: int = 0,
        discount_from_start: bool = True,
        baseline: LinearBaseline | None = None,
    ) -> None:
        super().__init__()
        self.episodes, self.horizon, self.gamma, self.min_steps = episodes, horizon, gamma, min_steps
        self.discount_from_start, self.baseline = discount_from_start, baseline

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        requests = []
        for tag, point in points.items():
            rounds = _rounds(tag, have)
            if not rounds or sum(int(data["valid"].sum()) for data in rounds) < self.min_steps:
                name = tag if not rounds else f"{tag}/{len(rounds)}"
                requests.append(Request(name, point, episodes=self.episodes, horizon=self.horizon))
        return requests

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        tags = [tag for tag in have if "/" not in tag]
        return {tag: self.weigh(concatenate(_rounds(tag, have))) for tag in tags}

    def weigh(self, data: Data) -> Data:
        """``psi`` and ``reward_to_go`` (discounted from its own step), ``[T, N]``."""
        reward = masked(data["reward"], data["valid"])
        to_go = discounted_sum(reward, self.gamma, data["carry"])
        psi = to_go if self.baseline is None else to_go - self.baseline.forward(data).to(to_go)
        if self.discount_from_start:
            psi = psi * self.gamma ** data["t"].to(psi.dtype)  # of integers it would be float32
        return data.derive(psi=torch.where(data["valid"] > 0, psi, 0.0), reward_to_go=to_go)

    def gradient(self, theta: Tensor, data: Data, ctx: Context) -> GradientEstimate:
        """``grad J`` at ``theta``, from episodes sampled with ``theta``."""
        mean = ctx.scores(theta, data, "step").vjp(data["psi"] / data.shape[1])
        return GradientEstimate(mean, {"gradient_norm": mean.norm()})

    def after_update(self, data: dict[str, Data], stats: dict[str, Tensor], ctx: Context) -> None:
        if self.baseline is not None:
            self.baseline.fit(data["on"], data["on"]["reward_to_go"])


def _rounds(tag: str, have: dict[str, Data]) -> list[Data]:
    return [data for name, data in have.items() if name == tag or name.startswith(f"{tag}/")]
