"""Discounted sums over time-major streams: pure functions on ``[T, N]`` tensors.

Episode ends enter only through two masks that the collector computed once (``ccrl.data``):

* ``discount_t = gamma * alive_t`` multiplies the value of the true successor, also at a time limit;
* ``carry_t`` cuts the backward recursion after the last step of an episode, terminated or truncated.

With ``discount`` alone, advantages of the next episode leak backwards over a truncation.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "backward_scan",
    "discounted_sum",
    "explained_variance",
    "forward_scan",
    "gae",
    "lambda_returns",
    "n_step_returns",
]

_NARROW = 512
"""Up to this many parallel streams the log-depth scan wins over the row loop (measured on CPU, ``bench.py gae``)."""


def backward_scan(x: Tensor, w: Tensor) -> Tensor:
    """``y_t = x_t + w_t * y_{t+1}`` with ``y_T = 0``. Shapes ``[T, N]``; returns a new tensor.

    Two routes, same result up to rounding: narrow streams use doubling (``log2 T`` vectorised passes), wide ones a
    loop over rows with one fused multiply-add each.

    >>> backward_scan(torch.ones(3, 1), torch.full((3, 1), 0.5)).flatten().tolist()
    [1.75, 1.5, 1.0]
    """
    if x.shape != w.shape or x.dim() < 1:
        raise ValueError(
            f"backward_scan: expected x and w of one shape [T, ...], got {tuple(x.shape)}, {tuple(w.shape)}"
        )
    steps = x.shape[0]
    if steps == 0:
        return x.clone()
    if _narrow(x):
        return _doubling(x, w)
    y = torch.empty_like(x)
    y[-1] = x[-1]
    rows_x, rows_w, rows_y = x.unbind(0), w.unbind(0), y.unbind(0)
    for t in range(steps - 2, -1, -1):
        torch.addcmul(rows_x[t], rows_w[t], rows_y[t + 1], out=rows_y[t])
    return y


def _narrow(x: Tensor) -> bool:
    return x.shape[0] > 8 and x[0].numel() <= _NARROW


def _doubling(x: Tensor, w: Tensor) -> Tensor:
    """After pass k every ``y_t`` holds its next ``2^k`` terms and ``w_t`` the product of as many weights."""
    y, w, k = x.clone(), w.clone(), 1
    while k < x.shape[0]:
        head = w[:-k]
        # the right-hand sides are materialised first: in-place on overlapping slices would read updated rows
        y[:-k] += head * y[k:]
        if 2 * k < x.shape[0]:
            head.copy_(head * w[k:])
        k *= 2
    return y


def forward_scan(x: Tensor, w: Tensor, first: Tensor) -> Tensor:
    """``y_t = x_t + w_t * y_{t-1}`` with ``y_{-1} = first [N]``. Shapes ``[T, N]``."""
    x = torch.cat([(x[0] + w[0] * first).unsqueeze(0), x[1:]])
    w = torch.cat([torch.zeros_like(w[:1]), w[1:]])
    return backward_scan(x.flip(0), w.flip(0)).flip(0)


def discounted_sum(reward: Tensor, gamma: float, carry: Tensor) -> Tensor:
    """Reward to go ``G_t = r_t + gamma * carry_t * G_{t+1}`` inside the rollout, no bootstrap. ``[T, N]``."""
    return backward_scan(reward, gamma * carry)


def gae(reward: Tensor, value: Tensor, next_value: Tensor, discount: Tensor, carry: Tensor, lam: float) -> Tensor:
    """Generalised advantage estimate (Schulman et al. 2016, eq. 16), exact over time limits. All ``[T, N]``.

    ``delta_t = r_t + discount_t * V(x_t) - V(o_t)`` with ``x_t`` the true successor (never a reset observation), and
    ``A_t = delta_t + discount_t * lam * carry_t * A_{t+1}``. ``lam=1``: Monte Carlo with bootstrap; ``lam=0``: TD(0).
    """
    delta = torch.addcmul(reward, discount, next_value).sub_(value)
    if delta.shape != carry.shape or not len(delta) or _narrow(delta):
        return backward_scan(delta, (discount * carry).mul_(lam))
    # In place, and the weights a row at a time: first touches of fresh memory cost wide rollouts more than arithmetic.
    weight, rows = torch.empty_like(delta[0]), delta.unbind(0)
    factors = list(zip(discount.unbind(0), carry.unbind(0)))
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(torch.mul(*factors[t], out=weight), rows[t + 1], value=lam)
    return delta


def lambda_returns(reward: Tensor, next_value: Tensor, discount: Tensor, carry: Tensor, lam: float) -> Tensor:
    """``G_t = r_t + discount_t * ((1 - lam * carry_t) * V(x_t) + lam * carry_t * G_{t+1})``. All ``[T, N]``.

    Where the rollout ends without an episode end (the last row), the whole weight lies on the bootstrap value.
    """
    mix = lam * carry
    mix = torch.cat([mix[:-1], torch.zeros_like(mix[-1:])])
    return backward_scan(reward + discount * (1.0 - mix) * next_value, discount * mix)


def n_step_returns(reward: Tensor, next_value: Tensor, discount: Tensor, carry: Tensor, n: int) -> Tensor:
    """Up to ``n`` rewards, then the value of the state reached; shorter at episode and rollout ends. All ``[T, N]``."""
    if n < 1:
        raise ValueError(f"n_step_returns: expected n >= 1, got {n}")
    total = reward + discount * next_value
    last = torch.zeros_like(carry)
    last[-1] = 1.0
    for _ in range(n - 1):
        shifted = torch.cat([total[1:], torch.zeros_like(total[-1:])])
        go_on = carry * (1.0 - last)
        total = reward + discount * torch.where(go_on > 0, shifted, next_value)
    return total


def explained_variance(value: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """``1 - Var(R - V) / Var(R)`` over valid rows; NaN if the returns are constant (SB3)."""
    n = valid.sum()

    def var(x: Tensor) -> Tensor:
        mean = (x * valid).sum() / n
        return ((x - mean).square() * valid).sum() / n

    total = var(target)
    return torch.where(total > 0, 1.0 - var(target - value) / total, torch.nan)
