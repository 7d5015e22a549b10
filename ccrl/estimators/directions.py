"""Update rules on the flat parameter vector: plain ascent, the natural step, the trust region's line search."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ccrl.data import Data
from ccrl.estimators.base import Context
from ccrl.estimators.updates import GradientEstimate

__all__ = ["Ascent", "line_search", "natural_step", "trust_region_step"]


class Ascent:
    """``theta + lr_j g`` at the current parameters, with ``lr_j = lr0 c / (c + j)`` at iteration j = 0, 1, ..., or
    constant.

    :param lr: 0-d, written in place: what the agent logs and checkpoints.
    :param decay: ``c``, in iterations; None: constant.
    :raises ValueError: ``c`` not positive.
    """

    def __init__(self, lr: Tensor, decay: float | None = None) -> None:
        if decay is not None and decay <= 0.0:
            raise ValueError(f"Ascent: expected decay > 0 or None, got {decay}")
        self.lr, self.decay, self._first = lr, decay, float(lr)

    def points(self, theta: Tensor, ctx: Context) -> dict[str, Tensor]:
        return {"on": theta}

    def step(
        self, theta: Tensor, gradient: Callable[[str], GradientEstimate], have: dict[str, Data], ctx: Context
    ) -> Tensor:
        if self.decay is not None:
            self.lr.copy_(self._first * self.decay / (self.decay + ctx.k))
        return theta + (self.lr * gradient("on").mean).to(theta.dtype)


def natural_step(
    fisher: Callable[[Tensor], Tensor], gradient: Tensor, *, damping: float, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """The natural gradient ``(F + damping I)^-1 g`` (Kakade 2001) by conjugate gradients, ended early by design: after
    ``iterations``, or once the squared residual is ``tolerance`` times that of the start.

    :param fisher: ``F v`` for ``v [n]``, as ``Scores.fvp``.
    :param gradient: ``g [n]``.
    :returns: ``[n]``; zeros for a gradient of zeros.
    """
    x, r = torch.zeros_like(gradient), gradient.clone()
    p, rr = r, r @ r
    limit = tolerance * rr
    for _ in range(iterations):
        if not bool(rr > limit):
            break
        product = fisher(p) + damping * p
        alpha = rr / (p @ product)
        x, r = x + alpha * p, r - alpha * product
        new = r @ r
        p, rr = r + (new / rr) * p, new
    return x


def trust_region_step(
    fisher: Callable[[Tensor], Tensor], direction: Tensor, *, damping: float, max_kl: float
) -> Tensor:
    """``direction`` scaled so that the quadratic model of the KL, ``x^T (F + damping I) x / 2``, is ``max_kl`` (TRPO;
    Schulman et al. 2015, appendix C).

    :param fisher, direction: ``F v`` for ``v [n]``, and ``[n]``. Zeros stay zeros.
    :param max_kl: in nats.
    """
    curvature = direction @ (fisher(direction) + damping * direction)
    scale = torch.where(curvature > 0, (2.0 * max_kl / curvature.clamp_min(1e-300)).sqrt(), 0.0)
    return scale * direction


def line_search(
    theta: Tensor,
    step: Tensor,
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    max_kl: float,
    backtracks: int = 10,
    shrink: float = 0.5,
) -> tuple[Tensor, float]:
    """The longest of ``theta + shrink^i step`` that improves the surrogate within the KL; ``theta`` if none does.

    :param theta, step: ``[n]``.
    :param evaluate: parameters -> (improvement over ``theta``, KL from ``theta``), 0-d.
    :param backtracks: candidates, each ``shrink`` times as far as the one before.
    :returns: parameters ``[n]``, and the share of ``step`` that was taken (0: none improves).
    """
    share = 1.0
    for _ in range(backtracks):
        candidate = theta + share * step
        improvement, kl = evaluate(candidate)
        if bool((improvement > 0) & (kl <= max_kl)):
            return candidate, share
        share *= shrink
    return theta, 0.0
