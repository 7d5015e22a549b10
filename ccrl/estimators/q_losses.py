"""Losses of off-policy methods, per element: temporal differences, quantiles, actors, temperatures.

They read forward outputs of ``ccrl.policies.ActorQ`` and ``QuantilePolicy`` and the column ``target``, which the
cycle's ``targets`` derives.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ccrl.data import Data
from ccrl.estimators.terms import LogRatio, Loss, Outputs
from ccrl.policies.distributions import Reparameterised

__all__ = [
    "deterministic_actor",
    "huber",
    "log_q",
    "mean_log_prob",
    "mirror_descent_actor",
    "quantile_huber",
    "quantile_loss",
    "soft_actor",
    "squared_td",
    "temperature",
]


def squared_td(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """``0.5 sum_i (Q_i - y)^2`` over the critics ``q`` ``[T', B, n]`` with ``y`` the column ``target`` ``[T', B]``."""
    return 0.5 * (outputs["q"] - batch["target"].unsqueeze(-1)).square().sum(-1)


def soft_actor(reduce: Literal["min", "mean"] = "min") -> Loss:
    """``alpha log pi(a) - min_i Q_i(s, a)`` at ``a`` drawn from the policy (Haarnoja et al. 2018); ``alpha`` is a 0-d
    column, so the temperature is a constant here."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        q = outputs["new_q"]
        value = q.amin(-1) if reduce == "min" else q.mean(-1)
        return batch["alpha"] * outputs["new_log_prob"] - value

    return loss


def mean_log_prob(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Outputs:
    """``log pi`` at the policy's own sample, as a term's statistic: what ``temperature`` reads."""
    return {"mean_log_prob": outputs["new_log_prob"]}


def temperature(target_entropy: float) -> Loss:
    """``-log_alpha (log pi + H)`` with ``log pi`` the 0-d column ``mean_log_prob``: the gradient in ``log_alpha`` is
    how much the entropy falls short of ``target_entropy``."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        return -outputs["log_alpha"] * (batch["mean_log_prob"].detach() + target_entropy)

    return loss


def log_q(log_x: Tensor, index: float) -> Tensor:
    """The deformed logarithm ``(x^(1 - index) - 1) / (1 - index)`` of ``x = exp(log_x)``; index 1 is ``log x``, index 0
    is ``x - 1``."""
    return log_x if index == 1.0 else torch.expm1((1.0 - index) * log_x) / (1.0 - index)


def huber(x: Tensor, kappa: float) -> Tensor:
    """``0.5 x^2`` within ``kappa``, ``kappa (|x| - kappa / 2)`` outside."""
    size = x.abs()
    return torch.where(size <= kappa, 0.5 * x * x, kappa * (size - 0.5 * kappa))


def quantile_huber(theta: Tensor, target: Tensor, kappa: float = 1.0) -> Tensor:
    """``sum_i mean_j |tau_i - 1{u < 0}| Huber(u) / kappa`` with ``u = y_j - theta_i``, ``tau_i = (i + .5) / N`` (Dabney
    et al. 2018, eq. 10); ``kappa = 0`` is the pinball loss ``|tau_i - 1{u < 0}| |u|``.

    :param theta: quantiles ``[..., N]``. :param target: samples or quantiles ``[..., M]``, constants.
    """
    n = theta.shape[-1]
    tau = (torch.arange(n, dtype=theta.dtype, device=theta.device) + 0.5) / n
    u = target.detach().unsqueeze(-2) - theta.unsqueeze(-1)
    size = u.abs() if kappa == 0.0 else huber(u, kappa) / kappa
    return ((tau.unsqueeze(-1) - (u < 0).to(u.dtype)).abs() * size).mean(-1).sum(-1)


def quantile_loss(kappa: float = 1.0) -> Loss:
    """``quantile_huber`` of the quantiles of the stored action against the column ``target`` ``[T', B, M]``. One
    quantile has ``tau = 1/2``: the loss is doubled, so that it is DQN's Huber loss."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        quantiles = outputs["quantiles"]
        index = batch["action"].unsqueeze(-1).unsqueeze(-1).expand(*quantiles.shape[:-2], 1, quantiles.shape[-1])
        theta = quantiles.gather(-2, index).squeeze(-2)
        scale = 2.0 if quantiles.shape[-1] == 1 else 1.0
        return scale * quantile_huber(theta, batch["target"], kappa)

    return loss


def mirror_descent_actor(
    distribution: Reparameterised,
    coefficient: float,
    entropy: float,
    index: float = 1.0,
    reduce: Literal["q1", "min"] = "q1",
) -> Loss:
    """``c log_q pi + q (lambda - c) log_q pi_k - Q1`` at ``a`` drawn from the policy (Tomar et al. 2020, off-policy).

    ``pi_k`` has the constant parameters ``old_*`` (columns). For ``q = 1`` and ``c = lambda`` it is SAC's actor loss.
    For ``q > 1`` densities are floored at 1e-6 and ``log_q`` is that with index ``2 - q``.

    :param coefficient: c = 1 / t_k. :param entropy: lambda. :param index: q in [1, 2].
    """

    def deformed(log_prob: Tensor) -> Tensor:
        return log_prob if index == 1.0 else log_q(log_prob.clamp_min(_LOG_FLOOR), 2.0 - index)

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        old = {name: batch[f"old_{name}"] for name in distribution.names}
        log_old = distribution.log_prob(old, outputs["new_action"])
        value = outputs["new_q1"] if reduce == "q1" else outputs["new_q"].amin(-1)
        new = coefficient * deformed(outputs["new_log_prob"])
        return new + index * (entropy - coefficient) * deformed(log_old) - value

    return loss


_LOG_FLOOR = math.log(1e-6)


def deterministic_actor(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """``-Q_1(s, mu(s))`` (Fujimoto et al. 2018)."""
    return -outputs["new_q1"]
