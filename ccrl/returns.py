"""Discounted sums over time-major streams: pure functions on ``[T, N]`` tensors.

Names carry their time: ``r_t`` is the reward of step t, ``v_t`` the value of its observation, ``v_tp1`` that of the
true successor (which is not row t + 1 where an episode ends). Episode ends enter only through two masks that the
collector computed once (``ccrl.data``):

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
    "n_step_returns",
]

_NARROW = 512
"""Up to this many parallel streams the log-depth scan wins over the row loop (measured on CPU, ``bench gae``)."""


def backward_scan(x: Tensor, w: Tensor) -> Tensor:
    """``y_t = x_t + w_t y_{t+1}`` with ``y_T = 0``.

    Two routes, same result up to rounding: narrow streams use doubling (``log2 T`` vectorised passes), wide ones a
    loop over rows with one fused multiply-add each.

    :param x, w: ``[T, ...]`` of one shape; they are not changed.
    :returns: ``[T, ...]``, a new tensor.
    :raises ValueError: shapes that differ.

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
    """``y_t = x_t + w_t y_{t-1}`` with ``y_{-1} = first [N]``, for ``x, w [T, N]``: running returns and counts."""
    x = torch.cat([(x[0] + w[0] * first).unsqueeze(0), x[1:]])
    w = torch.cat([torch.zeros_like(w[:1]), w[1:]])
    return backward_scan(x.flip(0), w.flip(0)).flip(0)


def discounted_sum(r_t: Tensor, gamma: float, carry_t: Tensor) -> Tensor:
    """Rewards to go ``G_t = r_t + gamma carry_t G_{t+1}``, ``G_T = 0``: nothing is bootstrapped at the rollout's end.

    :param r_t, carry_t: ``[T, ...]`` of one shape.
    :returns: ``[T, ...]``. ``gamma = 1``: the sum of the episode's rewards to come; ``gamma = 0``: the reward.
    :raises ValueError: shapes that differ.
    """
    return backward_scan(r_t, gamma * carry_t)


def gae(r_t: Tensor, v_t: Tensor, v_tp1: Tensor, discount_t: Tensor, carry_t: Tensor, lambda_: float) -> Tensor:
    """Generalised advantage estimate (Schulman et al. 2016, eq. 16), exact over time limits::

        delta_t = r_t + discount_t v_tp1 - v_t,      A_t = delta_t + discount_t lambda carry_t A_{t+1},      A_T = 0

    ``lambda = 0``: the one-step error ``delta_t``. ``lambda = 1``: ``sum_h gamma^h r_{t+h} - v_t`` up to the episode's
    or the rollout's end, plus the discounted value of the true successor there unless it is terminal.
    ``A_t + v_t`` is the lambda return.

    :param r_t, v_t: reward of step t and value of its observation, ``[T, N]``.
    :param v_tp1: value of the true successor, never of a reset observation, ``[T, N]``.
    :param discount_t: ``gamma``, 0 where the episode terminates (``data.discount(gamma)``), ``[T, N]``.
    :param carry_t: 0 at the last step of every episode, terminated or truncated, ``[T, N]``.
    :returns: ``[T, N]``, a new tensor.
    """
    delta_t = torch.addcmul(r_t, discount_t, v_tp1).sub_(v_t)
    if delta_t.shape != carry_t.shape or not len(delta_t) or _narrow(delta_t):
        return backward_scan(delta_t, (discount_t * carry_t).mul_(lambda_))
    # In place, and the weights a row at a time: first touches of fresh memory cost wide rollouts more than arithmetic.
    weight, rows = torch.empty_like(delta_t[0]), delta_t.unbind(0)
    factors = list(zip(discount_t.unbind(0), carry_t.unbind(0)))
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(torch.mul(*factors[t], out=weight), rows[t + 1], value=lambda_)
    return delta_t


def n_step_returns(r_t: Tensor, v_tp1: Tensor, discount_t: Tensor, carry_t: Tensor, n: int) -> Tensor:
    """Up to ``n`` rewards, then the value of the state reached (Sutton and Barto 2018, eq. 7.1)::

        G^1_t = r_t + discount_t v_tp1,      G^k_t = r_t + discount_t (G^{k-1}_{t+1} if carry_t else v_tp1)

    Shorter where an episode or the rollout ends. ``n = 1``: the one-step target.

    :param r_t, v_tp1, discount_t, carry_t: as of :func:`gae`, ``[T, N]``.
    :raises ValueError: ``n`` below 1.
    """
    if n < 1:
        raise ValueError(f"n_step_returns: expected n >= 1, got {n}")
    total = r_t + discount_t * v_tp1
    last = torch.zeros_like(carry_t)
    last[-1] = 1.0
    for _ in range(n - 1):
        shifted = torch.cat([total[1:], torch.zeros_like(total[-1:])])
        go_on = carry_t * (1.0 - last)
        total = r_t + discount_t * torch.where(go_on > 0, shifted, v_tp1)
    return total


def explained_variance(value: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """``1 - Var(R - V) / Var(R)`` over valid rows, 0-d; NaN where the returns are constant, as in Stable-Baselines3.

    :param value, target, valid: ``V``, ``R`` and 0 or 1, ``[T, N]``.
    """
    n = valid.sum()

    def var(x: Tensor) -> Tensor:
        mean = (x * valid).sum() / n
        return ((x - mean).square() * valid).sum() / n

    total = var(target)
    return torch.where(total > 0, 1.0 - var(target - value) / total, torch.nan)
