"""A linear layer by oneDNN's product: ``torch.nn.Linear``'s numbers but for their last digits (``ccrl.onednn``)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.onednn import AVAILABLE, onednn_linear

__all__ = ["Dense", "dense", "make_dense"]

WORK, WIDTH = 2**20, 16
"""Products of fewer multiplications, or with a narrower factor, take longer this way."""


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN where neither factor is narrow."""
    if min(weight.shape) < WIDTH:
        return F.linear(x, weight, bias)
    found: Tensor = (torch.ops.ccrl.dense if torch.compiler.is_compiling() else onednn_linear)(x, weight, bias)
    return found


class _Dense(torch.autograd.Function):
    # without setup_context: transforms of torch.func, under which the opaque operator is differentiated wrongly when
    # compiled, refuse it
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        # the product itself has no derivative: a gradient of gradients goes through PyTorch's own
        multiply = F.linear if torch.is_grad_enabled() else _product
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        by_weight = None
        if needs_weight and inputs.shape[1] < WIDTH:  # the other way round a narrow factor takes eight times as long
            by_weight = (inputs.t() @ rows).t()
        elif needs_weight and (rows.shape[1] < WIDTH or _work(x, weight) < 2 * WORK):
            by_weight = rows.t() @ inputs
        elif needs_weight and rows.shape[1] > inputs.shape[1]:  # the first factor is copied: the smaller one
            by_weight = multiply(inputs.t(), rows.t(), None).t()
        elif needs_weight:
            by_weight = multiply(rows.t(), inputs.t(), None)
        by_x = multiply(grad, weight.t(), None) if needs_x else None
        return by_x, by_weight, rows.sum(0) if ctx.biased and needs_bias else None


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` ``[..., O]`` of ``x`` ``[..., I]`` and ``weight`` ``[O, I]``.

    By oneDNN for float32 on a CPU where the product is large enough to gain, by ``torch.nn.functional.linear`` else.
    Gradients of gradients work; transforms of ``torch.func`` raise.
    """
    large = max(weight.shape) >= WIDTH and _work(x, weight) >= WORK
    whole = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not (AVAILABLE and large and whole and x.device.type == "cpu"):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)
    found: Tensor = _Dense.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


def _work(x: Tensor, weight: Tensor) -> int:
    """Multiplications of their product."""
    return x.numel() * weight.shape[0]


class Dense(nn.Linear):
    """``torch.nn.Linear`` by :func:`dense`: the same parameters under the same names."""

    def forward(self, x: Tensor) -> Tensor:
        return dense(x, self.weight, self.bias)


def make_dense(module: nn.Module) -> nn.Module:
    """``module``, with every layer that is a ``torch.nn.Linear`` and no subclass of it a ``Dense``, in place:
    parameters, their names and hooks stay."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Dense
    return module
