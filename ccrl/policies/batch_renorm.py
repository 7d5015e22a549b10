"""Batch renormalisation (Ioffe 2017, arXiv 1702.03275) for perceptrons and critics, as CrossQ uses it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ccrl.policies.encoders import ACTIVATIONS
from ccrl.policies.q import Ensemble

__all__ = ["BatchRenorm", "RenormEnsemble", "RenormMLP"]


class BatchRenorm(nn.Module):
    """Normalises ``[..., B, width]`` over the rows ``B``.

    With the batch's mean m and biased variance v, the running M and V of before this batch, ``sd = sqrt(v + eps)`` and
    ``SD = sqrt(V + eps)``:

        training    y = (x - m) / sd * r + d,   r = clip(sd / SD, 1/3, 3),  d = clip((m - M) / SD, -5, 5)
        else        y = (x - M) / SD

    then scale and shift. No gradient flows through r, d, M, V. During the first ``warm_up`` training batches r = 1 and
    d = 0: plain batch normalisation.

    :param lead: leading axes with statistics of their own (one per critic).
    :param rate: of the running statistics, ``M <- M + rate (m - M)``.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(
        self, width: int, lead: tuple[int, ...] = (), *, rate: float = 0.01, eps: float = 1e-3, warm_up: int = 100_000
    ) -> None:
        super().__init__()
        self.rate, self.eps, self.warm_up = rate, eps, warm_up
        shape = (*lead, 1, width)
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor, training: bool = False) -> Tensor:
        running = (self.var + self.eps).rsqrt()
        if not training:
            return (x - self.mean) * (running * self.weight) + self.bias
        mean = x.mean(-2, keepdim=True)
        centred = x - mean
        var = centred.square().mean(-2, keepdim=True)
        # not folded into one mean and one variance: sqrt(var) there has an infinite gradient at a constant column
        inverse = (var + self.eps).rsqrt()
        with torch.no_grad():
            warm = self.count < self.warm_up
            r = torch.where(warm, 1.0, (running / inverse).clamp(1.0 / 3.0, 3.0))
            d = torch.where(warm, 0.0, ((mean - self.mean) * running).clamp(-5.0, 5.0))
        out = (centred * inverse * r + d) * self.weight + self.bias
        with torch.no_grad():
            self.mean.lerp_(mean.detach(), self.rate)
            self.var.lerp_(var.detach(), self.rate)
            self.count.add_(1)
        return out


class RenormMLP(nn.Module):
    """A perceptron with a ``BatchRenorm`` before every linear layer, the first one included."""

    def __init__(self, sizes: Sequence[int], activation: str, warm_up: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(BatchRenorm(n, warm_up=warm_up) for n in sizes[:-1])
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor, training: bool = False) -> Tensor:
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers)):
            x = layer(norm(self.act(x) if i else x, training))
        return x


class RenormEnsemble(Ensemble):
    """``Ensemble`` with a ``BatchRenorm`` before every layer, the first one included; statistics per member."""

    def __init__(self, n: int, inputs: int, hidden: Sequence[int], activation: str, warm_up: int) -> None:
        super().__init__(n, inputs, hidden, activation)
        self.norms = nn.ModuleList(BatchRenorm(size, (n,), warm_up=warm_up) for size in (inputs, *hidden))

    def forward(self, x: Tensor, first: int | None = None, training: bool = False) -> Tensor:
        if first is not None:
            raise ValueError("RenormEnsemble: expected all members, whose statistics move together")
        x = x.expand(self.last_bias.shape[0], *x.shape)
        for norm, weight, bias in zip(self.norms, self.weights, self.biases):
            x = self.act(torch.baddbmm(bias, norm(x, training), weight))
        out: Tensor = (self.norms[-1](x, training) * self.last_weight).sum(-1) + self.last_bias
        return out
