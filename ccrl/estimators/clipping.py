"""Ways to bound a ratio's pull beyond ``losses.clip`` and ``losses.cispo`` (language-model baselines)."""

from __future__ import annotations

import torch
from torch import Tensor

from ccrl.data import Data
from ccrl.estimators import losses
from ccrl.estimators.terms import LogRatio, Loss, Outputs

__all__ = ["capped_weight", "k3_plus", "sigmoid_gate"]


def capped_weight(bound: float) -> Loss:
    """CISPO with one absolute bound: ``-sg(min(rho, bound)) A log pi`` (TRL; ``losses.cispo`` is the band)."""

    def loss(level: LogRatio, advantage: Tensor, evaluation: Outputs, batch: Data) -> Tensor:
        return -level.ratio.detach().clamp(max=bound) * advantage * level.log_prob

    return loss


def sigmoid_gate(positive: float, negative: float) -> Loss:
    """SAPO: ``-A (4 / tau) sigmoid(tau (rho - 1))``, temperature ``positive`` where ``A > 0``, else ``negative`` (Gao
    et al. 2025). Its slope in ``rho`` is 1 at ``rho = 1`` and fades on both sides."""
    if positive <= 0 or negative <= 0:
        raise ValueError(f"sigmoid_gate: expected temperatures > 0, got {positive}, {negative}")

    def loss(level: LogRatio, advantage: Tensor, evaluation: Outputs, batch: Data) -> Tensor:
        rho = level.ratio
        tau = torch.where(advantage > 0, positive, negative).to(rho.dtype)
        return -advantage * (4.0 / tau) * torch.sigmoid(tau * (rho - 1.0))

    return loss


def k3_plus(level: LogRatio, advantage: Tensor, evaluation: Outputs, batch: Data) -> Tensor:
    """The value of ``k3`` with the gradient of ``k2``, which is that of KL(policy || reference) (verl)."""
    value, slope = (k(level, advantage, evaluation, batch) for k in (losses.k3, losses.k2))
    return slope + (value - slope).detach()
