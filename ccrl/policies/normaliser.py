"""Running mean and variance as module buffers: saved with the policy, moved once per iteration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["RunningNorm"]


class RunningNorm(nn.Module):
    """``clip((x - mean) / sqrt(var + eps))`` over the last axes ``shape``.

    Statistics are float64 (a float32 count stops growing at 16.7 million rows) and merge batches with Chan's formula.
    They are read in collection and in the update and moved only by ``update``, which agents call after the update: a
    shift in between makes the ratio at the old parameters differ from 1.
    """

    mean: Tensor
    var: Tensor
    count: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0, eps: float = 1e-8) -> None:
        super().__init__()
        self.clip, self.eps = clip, eps
        self.merge: Callable[[Tensor], Tensor] | None = None
        """Sums over the processes of a training, where there are several."""
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.shift) * self.scale).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Merge a batch ``[..., *shape]``; rows with ``valid == 0`` (same leading shape) do not count."""
        rows = x.reshape(-1, *self.mean.shape).double()
        kept = torch.ones(rows.shape[0], device=x.device) if valid is None else valid.reshape(-1)
        keep = (kept > 0).view(-1, *(1,) * self.mean.dim())
        n, merge = (kept > 0).sum().double(), self.merge or _itself
        n, first = merge(n), merge(torch.where(keep, rows, 0.0).sum(0))
        safe = n.clamp_min(1.0)
        mean = first / safe
        var = merge(torch.where(keep, rows - mean, 0.0).square().sum(0)) / safe
        total = self.count + n
        delta, share = mean - self.mean, n / total.clamp_min(1.0)
        merged = self.var * (1.0 - share) + var * share + delta.square() * share * (1.0 - share)
        self.mean.copy_(torch.where(n > 0, self.mean + delta * share, self.mean))
        self.var.copy_(torch.where(n > 0, merged, self.var))
        self.count.copy_(total)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.var + self.eps).rsqrt())


def _itself(x: Tensor) -> Tensor:
    return x
