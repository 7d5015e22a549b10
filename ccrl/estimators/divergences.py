"""Divergences from a reference policy and what they cost: over occupancy measures (from the logits of a discriminator),
over actions (in closed form), and over whole sequences (from log-probabilities).

Occupancy measures: Laidlaw, Singhal, Dragan 2025 (arXiv 2403.03185); docs/orpo.md has the derivations. With
``w = mu_pi / mu_ref`` and ``d = log w``:  KL = E_pi d,  chi^2 = E_pi (w - 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ccrl.data import Data, masked
from ccrl.estimators.outcomes import kl_tokens
from ccrl.estimators.terms import LogRatio, Loss, Outputs
from ccrl.policies.distributions import CATEGORICAL, Distribution

__all__ = [
    "ChiSquarePenalty", "Kind", "OccupancyPenalty", "action_chi_square", "action_divergence", "chi_square",
    "occupancy_penalty", "reference_product", "sequence_chi_square", "sequence_divergences", "trimmed_mean",
]  # fmt: skip

Kind = Literal["sqrt_chi2", "chi2", "kl"]
_TAIL = 10.0


def trimmed_mean(x: Tensor, valid: Tensor | None = None, share: float = 0.01) -> Tensor:
    """Mean, 0-d, without the lowest and the highest ``share`` of the values; of fewer than ``1 / share`` values the
    plain mean."""
    values = x.flatten() if valid is None else x[valid > 0]
    cut = int(share * len(values))
    ordered = values.sort().values
    return ordered[cut : len(values) - cut].mean()


def chi_square(d: Tensor, valid: Tensor | None = None, share: float = 0.01) -> Tensor:
    """``E_pi (exp(d) - 1)``, 0-d, trimmed, from log-ratios ``d`` of the policy's own samples."""
    return trimmed_mean(torch.expm1(d), valid, share)


def occupancy_penalty(d: Tensor, valid: Tensor | None = None, kind: Kind = "sqrt_chi2", share: float = 0.01) -> Tensor:
    """What every sample of the policy is charged, in the shape of ``d``; where it is not finite, 0.

    ``sqrt_chi2``: ``(w - 1) / sqrt(chi^2)``, up to the constant ``1 / sqrt(chi^2)`` the derivative of the square root
    by the occupancy measure (``w - 1`` where the estimate of chi^2 is not positive). ``chi2``: ``w - 1``, half of the
    derivative. ``kl``: ``d``.
    """
    excess = torch.expm1(d)
    penalty = d if kind == "kl" else excess
    if kind == "sqrt_chi2":
        size = chi_square(d, valid, share)
        penalty = torch.where(size > 0, excess / size.clamp_min(torch.finfo(d.dtype).tiny).sqrt(), excess)
    return torch.where(penalty.isfinite(), penalty, torch.zeros_like(penalty))


@dataclass(frozen=True)
class OccupancyPenalty:
    """``shaped_reward`` ``[T, N]``: the reward minus ``coef`` times the penalty of every step (``occupancy_penalty`` of
    the column ``log_occupancy_ratio``, see ``occupancy.OccupancyRatio``), clipped to ``+- clip``. For any recipe whose
    advantage reads that column.

    :param coef: lambda, in units of the reward: ``c sigma_proxy``; a 0-d tensor where it moves.
    :raises ValueError: a negative coefficient or a clip that is not positive.
    """

    coef: Tensor | float
    kind: Kind = "sqrt_chi2"
    clip: float = 1e3
    reward: str = "reward"

    def __post_init__(self) -> None:
        known = isinstance(self.coef, Tensor) or 0.0 <= self.coef < math.inf
        if not (known and 0.0 < self.clip < math.inf):
            raise ValueError(f"OccupancyPenalty: expected coef >= 0 and clip > 0, got {self.coef} and {self.clip}")

    def __call__(self, data: Data) -> Data:
        penalty = self.coef * occupancy_penalty(data["log_occupancy_ratio"], data["valid"], self.kind)
        return data.derive(shaped_reward=data[self.reward] - penalty.clamp(-self.clip, self.clip))


# -- actions, in closed form ------------------------------------------------------------------------------------------


def action_chi_square(distribution: Distribution, new: Mapping[str, Tensor], ref: Mapping[str, Tensor]) -> Tensor:
    """``chi^2(new || ref)`` ``[...]`` of categorical or diagonal Gaussian actions; infinite where a Gaussian's variance
    is at least twice the reference's, and where it overflows (then without gradient)."""
    if distribution is CATEGORICAL:
        p, log_q = new["logits"].softmax(-1), ref["logits"].log_softmax(-1)
        log_ratio = new["logits"].log_softmax(-1) - log_q
        # masked before exp, whose gradient at infinity is NaN even where nothing asks for it
        over = (p > 0) & (log_ratio > _largest_log(p))
        ratio = torch.where(p > 0, log_ratio.masked_fill(over, 0.0).exp(), torch.zeros_like(p))
        found = (p * ratio).sum(-1) - 1.0
        return found.masked_fill(over.any(-1), math.inf)
    v1, v2 = (2.0 * new["log_std"]).exp(), (2.0 * ref["log_std"]).exp()
    rest = 2.0 * v2 - v1
    safe = torch.where(rest > 0, rest, torch.ones_like(rest))
    log = (
        torch.log(v2) - 0.5 * torch.log(v1) - 0.5 * torch.log(safe) + (new["mean"] - ref["mean"]).square() / safe
    ).sum(-1)
    infinite = (rest <= 0).any(-1) | (log > _largest_log(log))
    return torch.where(infinite, torch.full_like(log, math.inf), torch.expm1(log.masked_fill(infinite, 0.0)))


def _largest_log(like: Tensor) -> float:
    return math.log(torch.finfo(like.dtype).max)


def action_divergence(distribution: Distribution, kind: Kind) -> Loss:
    """Loss per step: the divergence of the policy's action distribution from the reference's, whose parameters are the
    columns ``ref_<name>``. A chi^2 whose square overflows is replaced by the KL; its root is that of at least 1e-4.

    :raises ValueError: chi^2 of other than categorical and Gaussian actions.
    """
    known = distribution is CATEGORICAL or "log_std" in distribution.names
    if kind != "kl" and not known:
        raise ValueError(f"{kind}: expected categorical or Gaussian actions, got {type(distribution).__name__}; use kl")

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        ref = {name: batch[f"ref_{name}"] for name in distribution.names}
        kl = distribution.kl(outputs, ref)
        if kind == "kl":
            return kl
        chi2 = action_chi_square(distribution, outputs, ref)
        # its gradient is as large, and the gradient's norm is a sum of squares
        chi2 = torch.where(chi2 < math.sqrt(torch.finfo(chi2.dtype).max), chi2, kl)
        return chi2 if kind == "chi2" else chi2.clamp_min(1e-4).sqrt()

    return loss


# -- whole sequences: language models, episodes as one action ---------------------------------------------------------


def _exp(x: Tensor) -> Tensor:
    """``exp``, continued by its tangent from 10 on: one sequence must not be the whole gradient."""
    inner = x.clamp_max(_TAIL)
    return inner.exp() * (1.0 + (x - inner))


def sequence_divergences(log_ratio: Tensor) -> dict[str, Tensor]:
    """Estimates, 0-d, from ``log pi - log ref`` of whole sequences ``[N]`` sampled by the policy: ``chi2``, the mean of
    ``(e^x - 1) + (e^-x - 1)``, and ``kl``, that of ``x + e^-x - 1``. The terms in ``e^-x`` have mean 0."""
    back = _exp(-log_ratio) - 1.0
    return {"chi2": (_exp(log_ratio) - 1.0 + back).mean(), "kl": (log_ratio + back).mean()}


def reference_product(outputs: Outputs, batch: Data) -> LogRatio:
    """The policy over the reference by whole sequences, ``[1, B]``, from the column ``ref_log_prob``."""
    valid = batch["valid"]
    sums = [masked(x, valid).sum(0, keepdim=True) for x in (outputs["log_prob"], batch["ref_log_prob"])]
    return LogRatio(sums[0], sums[1], (valid.sum(0, keepdim=True) > 0).to(valid.dtype))


def sequence_chi_square(kind: Literal["sqrt_chi2", "chi2"] = "sqrt_chi2") -> Loss:
    """Loss per sequence, with ``reference_product``: a term whose mean is ``sqrt(max(chi2_hat, 1e-4))`` or ``chi2_hat``
    (``sequence_divergences``), and whose gradient is that of it.

    On the policy's own samples the gradient of ``chi2_hat`` is that of ``chi^2 / 2 + KL(ref || pi)``, not of ``chi^2``.
    The root is taken over the minibatch: micro-batches would each take their own.
    """

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        x = ratio.log_ratio
        element = _exp(x) + _exp(-x) - 2.0
        if kind == "chi2":
            return element
        size = (masked(element, ratio.valid).sum() / ratio.valid.sum().clamp_min(1.0)).detach()
        root = size.clamp_min(1e-4).sqrt()
        # mean: size / (2 root) + root / 2 = root; gradient: that of size over 2 root
        return torch.where(size > 1e-4, element / (2.0 * root) + root / 2.0, root.expand_as(element))

    return loss


@dataclass(frozen=True)
class ChiSquarePenalty:
    """``shaped_episode_reward`` ``[N]``: the reward minus ``coef`` times the penalty of every sequence under the
    reference (``occupancy_penalty``: a whole answer is one action of a bandit, so ``d = log pi - log ref`` is known and
    needs no discriminator), clipped to ``+- clip``. For any recipe that reads that column.

    :raises ValueError: a negative coefficient or clip.
    """

    coef: float
    kind: Kind = "sqrt_chi2"
    clip: float = 1e3
    reward: str = "episode_reward"

    def __post_init__(self) -> None:
        if not (0.0 <= self.coef < math.inf and 0.0 < self.clip < math.inf):
            raise ValueError(f"ChiSquarePenalty: expected coef >= 0 and clip > 0, got {self.coef} and {self.clip}")

    def __call__(self, data: Data) -> Data:
        d = kl_tokens(data).sum(0).clamp(-50.0, 50.0)
        penalty = (self.coef * occupancy_penalty(d, kind=self.kind)).clamp(-self.clip, self.clip)
        return data.derive_sequence(shaped_episode_reward=data[self.reward] - penalty)
