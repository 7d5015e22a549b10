"""Less memory for an update: layers that are computed again in the backward pass instead of kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ccrl.packages import require

__all__ = ["checkpoint_layers"]


def checkpoint_layers(model: nn.Module) -> int:
    """Let every layer of a Hugging Face model keep its input alone where gradients are wanted; returns how many.

    The library's own switch acts in training mode only, in which dropout would make scores disagree with samples.

    :raises ValueError: the model names no layers that can be computed again.
    """
    layers = require("transformers.modeling_layers", "llm").GradientCheckpointingLayer
    found = [module for module in model.modules() if isinstance(module, layers)]
    if not found:
        raise ValueError(f"gradient_checkpointing: expected a model whose layers can be computed again, got "
                         f"{type(model).__name__}; leave it out")  # fmt: skip
    for layer in found:
        # as a class, not as an attribute: a copy of the model must not compute the layers of the first
        layer.__class__ = _again(type(layer))
    return len(found)


def _again(cls: type[Any]) -> type[Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return cls.forward(self, *args, **kwargs)
        return checkpoint(cls.forward, self, *args, use_reentrant=False, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
