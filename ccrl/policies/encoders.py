"""Encoders: modules that turn one observation key ``[B, *shape]`` into features ``[B, width]``.

Any ``nn.Module`` with an integer attribute ``width`` is one. Policies build them per key, once for the actor and once
for the critic: ``encoders={"image": MyCNN}`` with a function of the key's space, or with a module, which the critic
copies. Keys without one use :func:`default_encoder`, or are concatenated as they are (vectors) or one-hot (Discrete).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS",
    "CNN",
    "MLP",
    "Encoders",
    "FastTanh",
    "OneHotFactors",
    "Pixels",
    "default_encoder",
    "make_encoder",
    "mlp",
]


class FastTanh(nn.Module):
    """``tanh``, which compiled updates compute by one exponential, as ``2 sigmoid(2 x) - 1``: its absolute error is
    1e-7, where the library's is in the last bit. Collection and eager updates compute the library's."""

    def forward(self, x: Tensor) -> Tensor:
        # through sigmoid, not 1 - 2 / (1 + exp(2 x)): the gradient of that is 0 * inf for large x
        return 2.0 * torch.sigmoid(2.0 * x) - 1.0 if torch.compiler.is_compiling() else torch.tanh(x)


ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU, "fast_tanh": FastTanh}

Encoders = Callable[[gym.Space[Any]], nn.Module] | nn.Module
"""An encoder, or a function from the key's space to one."""


class Perceptron(nn.Sequential):
    """A ``Sequential`` without module calls where no layer has hooks: for 16 rows and two hidden layers of 64 the calls
    took 12 of 31 us."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._modules.values():
            assert layer is not None
            if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
                x = layer(x)
            elif type(layer) is nn.Linear:  # not a parametrised one, whose weight is computed
                own = layer._parameters
                x = nn.functional.linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
            else:
                x = layer.forward(x)
        return x


def mlp(
    sizes: Sequence[int], activation: str, gains: Sequence[float] | None = None, linear: type[nn.Linear] = nn.Linear
) -> nn.Sequential:
    """Linear layers with ``activation`` between them; orthogonal weights of the given gains, zero biases.

    ``gains=None`` keeps PyTorch's own initialisation. ``linear``: the layers' class.
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        layer = linear(fan_in, fan_out)
        if gains is not None:
            nn.init.orthogonal_(layer.weight, gains[i])
            nn.init.zeros_(layer.bias)
        layers += [layer, ACTIVATIONS[activation]()]
    return Perceptron(*layers[:-1])


class MLP(nn.Module):
    """A perceptron on the flattened key, with an activation after every layer.

    :raises ValueError: without layers, or for a space that is not a Box.
    """

    def __init__(self, space: gym.Space[Any], sizes: Sequence[int] = (64,), activation: str = "tanh") -> None:
        super().__init__()
        if not isinstance(space, gym.spaces.Box) or not sizes:
            raise ValueError(f"MLP: expected a Box and at least one layer, got {space} and {tuple(sizes)}")
        self.width = sizes[-1]
        widths = [math.prod(space.shape), *sizes]
        self.net = Perceptron(*mlp(widths, activation, [math.sqrt(2.0)] * len(sizes)), ACTIVATIONS[activation]())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1).to(_dtype(self)))  # type: ignore[no-any-return]


class CNN(nn.Module):
    """Convolutions over an image ``[B, C, H, W]`` or ``[B, H, W, C]``, ReLU after each, flattened.

    Images of at least 36 pixels a side get the three layers of Mnih et al. 2015 (kernels 8, 4, 3, strides 4, 2, 1);
    smaller ones 3 x 3 kernels of stride 2 until at most four pixels a side are left. uint8 pixels are scaled to [0, 1].

    :param channels: of the layers; None: 32, 64, 64 or, for small images, 16, 32, 32, ...
    :param channels_last: None finds the axis: the shortest of the three.
    :raises ValueError: for a space that is no image of three axes, or whose channel axis is not plain to see.
    """

    def __init__(
        self,
        space: gym.Space[Any],
        channels: Sequence[int] | None = None,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__()
        shape: Sequence[int] = tuple(space.shape or ())
        if not isinstance(space, gym.spaces.Box) or len(shape) != 3:
            raise ValueError(f"CNN: expected a Box of three axes (C, H, W) or (H, W, C), got {space}")
        if channels_last is None:
            if shape[0] == shape[2] or min(shape) == shape[1]:
                raise ValueError(
                    f"CNN: cannot see which axis of {shape} holds the channels; pass an encoder for this key, "
                    "encoders={key: lambda space: CNN(space, channels_last=True)}"
                )
            channels_last = shape[2] < shape[0]
        self.channels_last = channels_last
        depth, *sides = (shape[2], *shape[:2]) if channels_last else shape
        self.scale = 1.0 / 255.0 if space.dtype == np.uint8 else 1.0
        layers: list[nn.Module] = []
        for out, kernel, stride in _plan(sides, channels):
            padding = 1 if kernel == 3 and stride == 2 else 0
            conv = nn.Conv2d(depth, out, kernel, stride, padding)
            nn.init.orthogonal_(conv.weight, math.sqrt(2.0))
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [conv, nn.ReLU()]
            depth, sides = out, [(side + 2 * padding - kernel) // stride + 1 for side in sides]
        self.net = nn.Sequential(*layers)
        self.width = depth * math.prod(sides)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(_dtype(self))
        x = x if self.scale == 1.0 else x * self.scale
        return self.net(x.permute(0, 3, 1, 2) if self.channels_last else x).flatten(1)  # type: ignore[no-any-return]


def _plan(sides: Sequence[int], channels: Sequence[int] | None) -> list[tuple[int, int, int]]:
    """``(channels, kernel, stride)`` of every layer."""
    if min(sides) >= 36 and (channels is None or len(channels) == 3):
        return [(c, k, s) for c, k, s in zip(channels or (32, 64, 64), (8, 4, 3), (4, 2, 1), strict=True)]
    layers = len(channels) if channels is not None else max(1, math.ceil(math.log2(max(*sides, 8) / 4)))
    return [(c, 3, 2) for c in channels or [16, *[32] * (layers - 1)]]


class Pixels(nn.Module):
    """uint8 numbers, flattened and scaled to [0, 1]: a network fed with 0..255 saturates."""

    def __init__(self, space: gym.Space[Any]) -> None:
        super().__init__()
        self.width = math.prod(space.shape or ())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).to(torch.get_default_dtype()) / 255.0


class OneHotFactors(nn.Module):
    """MultiDiscrete ``[B, F]``: the indicators of all factors side by side."""

    def __init__(self, space: gym.spaces.MultiDiscrete) -> None:
        super().__init__()
        if space.nvec.ndim != 1 or space.start.any():
            raise ValueError(f"observation space: expected MultiDiscrete of one axis starting at 0, got {space}")
        self.sizes = [int(n) for n in space.nvec]
        self.width = sum(self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.cat([torch.arange(n, device=x.device) for n in self.sizes])
        factor = torch.cat([torch.full((n,), i, device=x.device) for i, n in enumerate(self.sizes)])
        return (x[:, factor] == places).to(torch.get_default_dtype())


def default_encoder(space: gym.Space[Any]) -> Callable[[gym.Space[Any]], nn.Module] | None:
    """What a key gets without a setting: a CNN for uint8 images, scaling for other uint8 Boxes (bounds 0 and 255),
    indicators for MultiDiscrete; None where concatenation does."""
    if isinstance(space, gym.spaces.MultiDiscrete):
        return OneHotFactors  # type: ignore[return-value]
    if isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and (space.high == 255).all():
        return CNN if len(space.shape) == 3 else Pixels
    return None


def make_encoder(encoder: Encoders, space: gym.Space[Any], key: str) -> nn.Module:
    """A new encoder for ``key``: the function's, or a copy of the module.

    :raises TypeError: if the result is no module, or has no integer ``width``.
    """
    made = copy.deepcopy(encoder) if isinstance(encoder, nn.Module) else encoder(space)
    if not isinstance(made, nn.Module) or not isinstance(getattr(made, "width", None), int):
        raise TypeError(
            f"encoders[{key!r}]: expected a module with an integer attribute width (features per row), or a function "
            f"from the key's space to one, got {made!r}"
        )
    return made


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
