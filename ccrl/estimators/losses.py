"""The loss slot: per-element losses (to be minimised) and penalties of the same type.

Every factory takes 0-d tensors for numbers that a schedule moves; plain floats stay compile-time constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ccrl.data import Data
from ccrl.estimators import ratios
from ccrl.estimators.terms import Diagnostics, LogRatio, Loss, Number, Outputs, Term
from ccrl.policies.distributions import Distribution

__all__ = [
    "bounded_ratio", "bounded_target", "capped_weight", "check_trainable", "cispo", "clip", "closed_form_kl",
    "cut_ratio", "k1", "k2", "k3", "k3_plus", "median_loss", "neg_entropy", "neg_log_prob",
    "ratio_stats", "sigmoid_gate", "value_loss", "weighted_ratio",
]  # fmt: skip


# -- policy losses --------------------------------------------------------------------------------------------------


def weighted_ratio(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """``-A * ratio``: the unified surrogate without a mask (MDPO; with ``ratios.plain`` REINFORCE)."""
    return -advantage * ratio.ratio


def cut_ratio(ratio: LogRatio) -> Tensor:
    """The ratio with its logarithm cut at +-20: beyond, exponentials and their squares overflow float32, and such a
    token has no information left."""
    return ratio.log_ratio.clamp(-20.0, 20.0).exp()


def neg_log_prob(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """``-log pi`` (behaviour cloning, SFT)."""
    return -ratio.log_prob


def clip(low: Number, high: Number, dual: Number | None = None) -> Loss:
    """PPO: ``-min(rho A, clamp(rho, 1 - low, 1 + high) A)`` (Schulman et al. 2017, eq. 7; DAPO: high > low).

    :param dual: for ``A < 0`` the loss is at most ``-dual A`` (dual clip, Ye et al. 2020): a huge ratio on a bad action
        has no gradient. None: unbounded.
    """

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        rho = ratio.ratio
        element = -torch.minimum(rho * advantage, _clamp(rho, 1.0 - low, 1.0 + high) * advantage)
        if dual is None:
            return element
        return torch.where(advantage < 0, torch.minimum(element, -dual * advantage), element)

    return loss


def cispo(low: Number, high: Number) -> Loss:
    """CISPO: ``-sg(clamp(rho)) A log pi``: clipped tokens keep a bounded gradient (MiniMax 2025)."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        weight = _clamp(ratio.ratio.detach(), 1.0 - low, 1.0 + high)
        return -weight * advantage * ratio.log_prob

    return loss


def capped_weight(bound: float) -> Loss:
    """CISPO with one absolute bound: ``-sg(min(rho, bound)) A log pi`` (TRL; ``cispo`` is the band)."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        return -ratio.ratio.detach().clamp(max=bound) * advantage * ratio.log_prob

    return loss


def sigmoid_gate(positive: float, negative: float) -> Loss:
    """SAPO: ``-A (4 / tau) sigmoid(tau (rho - 1))``, temperature ``positive`` where ``A > 0``, else ``negative`` (Gao
    et al. 2025). Its slope in ``rho`` is 1 at ``rho = 1`` and fades on both sides."""
    if positive <= 0 or negative <= 0:
        raise ValueError(f"sigmoid_gate: expected temperatures > 0, got {positive}, {negative}")

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        rho = ratio.ratio
        tau = torch.where(advantage > 0, positive, negative).to(rho.dtype)
        return -advantage * (4.0 / tau) * torch.sigmoid(tau * (rho - 1.0))

    return loss


def bounded_target(x: Tensor, low: Number, high: Number, temperature: Number) -> Tensor:
    """BPO's ratio target ``c_l + (c_h - c_l) sigmoid(x / lambda)`` with ``c_l = 1 - low, c_h = 1 + high``."""
    return (1.0 - low) + (low + high) * torch.sigmoid(x / temperature)


def bounded_ratio(
    low: Number, high: Number, temperature: Number, *, threshold: str = "median", weight: str | None = None
) -> Loss:
    """BPO: ``|(rho - rho*) w|``, an L1 regression of the ratio onto its bounded target (docs/bpo.md).

    Online weights ``w = R - V_phi(s)`` come from the critic being trained; ``weight`` names a stored column instead
    (the offline-advantage option). ``threshold`` is the forward output the return is compared with: the median head,
    or ``value`` (the ablation). Both are detached; the column ``return`` is fixed for the whole update.
    """

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        w = batch["return"] - outputs["value"].detach() if weight is None else batch[weight]
        x = batch["return"] - outputs[threshold].detach()
        return ((ratio.ratio - bounded_target(x, low, high, temperature)) * w).abs()

    return loss


# -- penalties ------------------------------------------------------------------------------------------------------


def closed_form_kl(distribution: Distribution) -> Loss:
    """``KL(pi_theta || pi_old)`` from the stored parameters ``old_*`` (MDPO; never a ratio estimate)."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        old: Mapping[str, Tensor] = {name: batch[f"old_{name}"] for name in distribution.names}
        return distribution.kl(outputs, old)

    return loss


def k1(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """Sampled ``KL(pi_old || pi_theta)``, unbiased, may be negative: ``-log rho``.

    With ``ratios.reference`` a statistic only: the gradient of ``log pi - log ref`` on the policy's own samples is the
    score, 0 in expectation, whatever the reference (``check_trainable`` refuses it).
    """
    return -ratio.log_ratio


def k2(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """``(log rho)^2 / 2``: low variance, biased."""
    return 0.5 * ratio.log_ratio.square()


def k3(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """``rho - 1 - log rho``: unbiased for ``KL(pi_old || pi_theta)`` and non-negative."""
    return ratio.ratio - 1.0 - ratio.log_ratio


def k3_plus(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """The value of ``k3`` with the gradient of ``k2``, which is that of KL(policy || reference) (verl)."""
    value, slope = (k(ratio, advantage, outputs, batch) for k in (k3, k2))
    return slope + (value - slope).detach()


def neg_entropy(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """``-H(pi)``: with a positive coefficient an entropy bonus."""
    return -outputs["entropy"]


def check_trainable(terms: Sequence[Term]) -> None:
    """``ValueError`` for a penalty that would do nothing: k1 of the KL to the reference, as a loss."""
    for term in terms:
        off = isinstance(term.coef, float | int) and term.coef == 0
        if term.loss is k1 and term.ratio is ratios.reference and not off:
            raise ValueError(
                f"term {term.name!r}: expected a penalty with an expected gradient, got k1 of the KL to the reference, "
                "whose gradient is the score: 0 in expectation. Use losses.k3, subtract k1 from the reward, or set "
                "coef=0.0 for the statistic alone"
            )


# -- critics --------------------------------------------------------------------------------------------------------


def value_loss(*, scale: float = 1.0, clip_range: Number | None = None, head: str = "value") -> Loss:
    """``scale (V - R)^2`` against the column ``return``; with ``clip_range`` the larger of it and the squared error of
    the old value moved by at most ``clip_range`` (column ``value`` holds the old one)."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        value, target = outputs[head], batch["return"]
        squared = (value - target).square()
        if clip_range is not None:
            old = batch["value"]
            clipped = old + _clamp(value - old, -clip_range, clip_range)
            squared = torch.maximum(squared, (clipped - target).square())
        return scale * squared

    return loss


def median_loss(*, kappa: float = 0.5, temperature: Number = 1.0, head: str = "median") -> Loss:
    """BPO's second critic: ``lambda softplus(x / lambda) - kappa x`` with ``x = R - U`` (docs/bpo.md).

    Its minimiser solves ``E sigmoid(x / lambda) = kappa``: the ``(1 - kappa)``-quantile where ``|x|`` is large against
    the temperature. ``temperature=1, kappa=1/2`` is the released ``softplus(x) - x/2`` (the median); for asymmetric
    ratio bounds ``kappa = (1 - c_l) / (c_h - c_l)`` makes the target ratios average to 1.
    """
    if not 0.0 < kappa < 1.0:
        raise ValueError(f"median_loss: expected 0 < kappa < 1, got {kappa}")

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        x = batch["return"] - outputs[head]
        return temperature * F.softplus(x / temperature) - kappa * x

    return loss


# -- diagnostics ----------------------------------------------------------------------------------------------------


def ratio_stats(low: Number, high: Number) -> Diagnostics:
    """SB3's ``approx_kl`` (k3) and ``clip_fraction`` for a term's ``stats``."""

    def stats(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> dict[str, Tensor]:
        log_ratio = ratio.log_ratio
        rho = log_ratio.exp()
        outside = (rho < 1.0 - low) | (rho > 1.0 + high)
        return {"approx_kl": rho - 1.0 - log_ratio, "clip_fraction": outside.to(rho.dtype)}

    return stats  # type: ignore[return-value]


def _clamp(x: Tensor, low: Number, high: Number) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (low, high))
        return torch.minimum(torch.maximum(x, low), high)
    return x.clamp(low, high)
