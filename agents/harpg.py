"""HARPG and N-HARPG: policy gradient with momentum and a Hessian correction; STORM-PG as their baseline.

Fatkhullin, Barakat, Kireeva, He 2023, ICML, arXiv 2302.01734. Ascent on ``J``; two independent rollouts per iteration,
one at theta_t and one at a random point of the last move. With ``c_t = 2 / (t + 2)`` at iteration t = 0, 1, 2 ...

    HARPG      theta^_t = q theta_t + (1 - q) theta_{t-1},  q ~ U(0, 1)
               v_t = B(tau^, theta^_t) (theta_t - theta_{t-1}),  tau^ sampled with theta^_t
               d_t = (1 - eta_t) (d_{t-1} + v_t) + eta_t g(tau, theta_t)
               theta_{t+1} = theta_t + gamma_t d_t                gamma_t = gamma_0 c_t^(1/2), eta_t = eta_0 c_t
    N-HARPG    the same d_t, theta_t + gamma_t d_t / |d_t|        gamma_t = gamma_0 c_t,       eta_t = eta_0 c_t
    STORM-PG   w = p(tau|theta_{t-1}) / p(tau|theta_t)
               d_t = g(tau, theta_t) + (1 - eta_t) (d_{t-1} - w g(tau, theta_{t-1}))
               theta_{t+1} = theta_t + gamma_t d_t                gamma_t = gamma_0 c_t^(1/3), eta_t = eta_0 c_t^(2/3)

    B(tau, theta) v = hess Phi v + grad Phi <grad log p(tau|theta), v>,     Phi = sum_t psi_t log pi(a_t|s_t)

``B`` is unbiased for the Hessian of ``J`` only with its second term, taken per trajectory: the sampling moves with
theta.

Slots: plan = fresh episodes at theta and on the line; gradient = sum of psi_t times scores; direction = update rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from agents.npg_igt import MomentumDirection, Rule, TrajectoryAgent, TrajectoryConfig
from ccrl.data import Data
from ccrl.estimators.base import Context
from ccrl.updaters import GradientEstimate

__all__ = ["HARPG", "HARPGConfig"]


@dataclass(frozen=True)
class HARPGConfig(TrajectoryConfig):
    """One of the update rules that correct the momentum for the last move."""

    variant: Literal["nharpg", "harpg", "storm"] = "nharpg"
    """The update rule is nharpg, harpg (not normalised) or storm (importance weights instead of the Hessian; one
    rollout)."""


class HARPGEstimator(MomentumDirection):
    """(N-)HARPG and STORM-PG."""

    rules: ClassVar[dict[str, Rule]] = {
        "nharpg": Rule(1.0, 1.0, True),
        "harpg": Rule(1 / 2, 1.0, False),
        "storm": Rule(1 / 3, 2 / 3, False),
    }

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._line = self.prev

    def points(self, theta: Tensor, ctx: Context) -> dict[str, Tensor]:
        if self.config.variant == "storm" or bool(ctx.k == 0):
            return {"on": theta}
        q = torch.rand((), generator=ctx.generator, device=theta.device)
        self._line = q * theta + (1.0 - q) * self.prev
        return {"on": theta, "line": self._line}

    def step(
        self, theta: Tensor, gradient: Callable[[str], GradientEstimate], have: dict[str, Data], ctx: Context
    ) -> Tensor:
        eta, g = self.eta(ctx.k).to(theta), gradient("on").mean
        if bool(ctx.k == 0):
            d = g
        elif self.config.variant == "storm":
            d = g + (1.0 - eta) * (self.d - self._old_gradient(theta, have["on"], ctx))
        else:
            line = have["line"]
            v = ctx.scores(self._line, line, "trajectory").hvp(line["psi"], theta - self.prev)
            d = (1.0 - eta) * (self.d + v) + eta * g
        return self.advance(theta, d, ctx)

    def _old_gradient(self, theta: Tensor, data: Data, ctx: Context) -> Tensor:
        """``grad J`` at the previous parameters from the present ones' trajectories."""
        paths = ctx.scores(theta, data, "trajectory")
        with torch.no_grad():
            weight = (paths.log_prob(self.prev) - paths.log_prob(theta)).exp()
        return ctx.scores(self.prev, data, "step").vjp(data["psi"] * weight / data.shape[1])


class HARPG(TrajectoryAgent):
    """Hessian-aided recursive policy gradient."""

    name = "harpg"
    paper = "Fatkhullin et al. 2023, arXiv 2302.01734"
    Config = HARPGConfig
    Direction = HARPGEstimator

    @property
    def samples_per_iteration(self) -> int:
        """Environment steps per iteration, at most: of both rollouts."""
        return super().samples_per_iteration * (1 if self.config.variant == "storm" else 2)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "plan": "fresh episodes at theta and at a point of the last move",
            "prepare": "reward to go",
            "gradient": "sum of psi_t times scores",
            "direction": "momentum with a Hessian-vector correction, normalised or plain step",
        }
