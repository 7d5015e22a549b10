"""Networks ``(x, level) -> x``: perceptrons on vectors, a U-Net on sequences; ``level [B]`` is a number per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ccrl.policies.encoders import mlp

__all__ = ["FourierFeatures", "ResidualMLP", "ScoreMLP", "Sinusoid", "UNet1d", "VelocityMLP"]


class Sinusoid(nn.Module):
    """Sines and cosines of a level at ``n`` frequencies from 1 down to 1e-4, equal ratios: ``[B] -> [B, 2 n]``."""

    frequencies: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.width = 2 * n
        self.register_buffer("frequencies", torch.logspace(0, -4, n) if n > 1 else torch.ones(1))

    def forward(self, level: Tensor) -> Tensor:
        angle = level.unsqueeze(-1) * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], -1)


class FourierFeatures(nn.Module):
    """As ``Sinusoid`` at ``n`` frequencies drawn once from ``N(0, scale^2)`` (Tancik et al. 2020), in turns."""

    frequencies: Tensor

    def __init__(self, n: int, scale: float = 16.0) -> None:
        super().__init__()
        self.width = 2 * n
        self.register_buffer("frequencies", 2.0 * math.pi * scale * torch.randn(n))

    def forward(self, level: Tensor) -> Tensor:
        angle = level.unsqueeze(-1) * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], -1)


class ScoreMLP(nn.Module):
    """A perceptron (SiLU) on ``x [B, D]`` and the level as one more number."""

    def __init__(self, size: int, hidden: Sequence[int] = (256, 256, 256)) -> None:
        super().__init__()
        self.net = mlp([size + 1, *hidden, size], "silu")

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.net(torch.cat([x, level.unsqueeze(-1)], -1))  # type: ignore[no-any-return]


class ResidualMLP(nn.Module):
    """Residual layers of one width (SynthER: Lu et al. 2023, table 4: no normalisation, ReLU), ``[B, D] -> [B, D]``."""

    def __init__(self, size: int, width: int = 1024, layers: int = 6, time_width: int = 128) -> None:
        super().__init__()
        fourier = FourierFeatures(8)
        self.time = nn.Sequential(
            fourier, nn.Linear(fourier.width, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        self.inside = nn.Linear(size + time_width, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.outside = nn.Linear(width, size)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.inside(torch.cat([x, self.time(level)], -1))
        for layer in self.layers:
            h = h + layer(h.relu())
        return self.outside(h.relu())  # type: ignore[no-any-return]


class VelocityMLP(nn.Module):
    """A perceptron (SiLU) on ``x [B, D]``, the time ``[B]`` in [0, 1] and a condition ``[B, C]``, for flow matching.

    The time is given as itself and as sines and cosines of ``pi t`` to ``4 pi t``. The first layer is applied to the
    three inputs one by one, so that times and conditions that many rows share are multiplied once: ``x [T, B, D]`` goes
    with times ``[T, 1]`` and conditions ``[B, C]``.

    :param zero: the last layer starts at 0, for a network that is added to a known velocity.
    :param linear: class of the layers that rows of ``x`` go through.
    """

    def __init__(
        self, size: int, condition: int = 0, hidden: Sequence[int] = (96, 96, 96), zero: bool = False,
        linear: type[nn.Linear] = nn.Linear,
    ) -> None:  # fmt: skip
        super().__init__()
        self.size, self.condition = size, condition
        self.x = linear(size, hidden[0])
        self.t = nn.Linear(9, hidden[0], bias=False)
        self.c = nn.Linear(condition, hidden[0], bias=False) if condition else None
        self.rest = mlp([hidden[0], *hidden[1:], size], "silu", linear=linear)
        if zero:
            last = self.rest[-1]
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.at(x, self.shared(time, condition))

    def shared(self, time: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the first layer adds for times and conditions: a sampler computes it once for all its steps."""
        angle = math.pi * time.unsqueeze(-1) * torch.arange(1, 5, dtype=time.dtype, device=time.device)
        h: Tensor = self.t(torch.cat([time.unsqueeze(-1), angle.sin(), angle.cos()], -1))
        return h if self.c is None or condition is None else h + self.c(condition)

    def at(self, x: Tensor, shared: Tensor) -> Tensor:
        """The output at ``x``, given ``shared``."""
        return self.rest(nn.functional.silu(self.x(x) + shared))  # type: ignore[no-any-return]

    @torch.no_grad()
    def steps(self, times: Tensor, condition: Tensor | None) -> Callable[[Tensor, int], Tensor]:
        """``(x [B, D], i) -> [B, D]`` at the i-th of ``times`` ``[T]``, for samplers: ``at`` with fewer operators."""
        shared = (self.shared(times.unsqueeze(-1), condition) + self.x.bias).unbind()
        weight = self.x.weight.t()
        silu = nn.functional.silu
        return lambda x, i: self.rest(silu(torch.addmm(shared[i], x, weight), inplace=True))


class UNet1d(nn.Module):
    """Convolutions over time, ``[B, T, D] -> [B, T, D]`` for any ``T``: the network of Policy-Guided Diffusion.

    Every level doubles the features and halves the time; blocks are a convolution of kernel 3 plus the level's
    embedding, group normalisation, ReLU and a second convolution. Times that are no multiple of ``2^levels`` are
    padded with their last row and cut again.

    :raises ValueError: features that are no multiple of 8, which group normalisation and the embedding need.
    """

    def __init__(self, size: int, features: int = 256, levels: int = 3) -> None:
        super().__init__()
        if features < 8 or features % 8 or levels < 1:
            raise ValueError(f"UNet1d: expected features a multiple of 8 and levels >= 1, got {features} and {levels}")
        sinusoid = Sinusoid(features // 8)
        self.time = nn.Sequential(
            sinusoid, nn.Linear(sinusoid.width, features), nn.SiLU(), nn.Linear(features, features)
        )
        widths = [features * 2**i for i in range(levels + 1)]
        self.down = nn.ModuleList(_Block(size if i == 0 else widths[i - 1], widths[i], features) for i in range(levels))
        self.middle = _Block(widths[-2], widths[-1], features)
        self.up = nn.ModuleList(_Block(2 * widths[i], widths[i], features) for i in reversed(range(levels)))
        self.grow = nn.ModuleList(nn.Conv1d(widths[i + 1], widths[i], 2) for i in reversed(range(levels)))
        self.last = nn.Conv1d(features, size, 1)
        self.factor = 2**levels

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        steps = x.shape[1]
        h = x.transpose(1, 2)
        if extra := -steps % self.factor:
            h = torch.cat([h, h[..., -1:].expand(-1, -1, extra)], -1)
        time = self.time(level)
        kept = []
        for block in self.down:
            h = block(h, time)
            kept.append(h)
            h = nn.functional.max_pool1d(h, 2)
        h = self.middle(h, time)
        for block, grow in zip(self.up, self.grow):
            # a kernel of two keeps the length with one more column at the end
            h = grow(nn.functional.pad(h.repeat_interleave(2, -1), (0, 1)))
            h = block(torch.cat([kept.pop(), h], 1), time)
        return self.last(h)[..., :steps].transpose(1, 2)  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, time: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv1d(n, outside, 3, padding=1) for n in (inside, outside))
        self.norms = nn.ModuleList(nn.GroupNorm(8, outside) for _ in range(2))
        self.shift = nn.Linear(time, outside)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(x) + self.shift(nn.functional.silu(time)).unsqueeze(-1)
        h = self.norms[0](h).relu()
        return self.norms[1](self.second(h)).relu()  # type: ignore[no-any-return]
