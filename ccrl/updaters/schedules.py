"""Step sizes over a training: warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Shape", "rate_factor"]

Shape = Literal["constant", "linear", "cosine"]


def rate_factor(progress: Tensor, share: Tensor, shape: Shape, warmup: float) -> Tensor:
    """What a step size is multiplied by, in [0, 1].

    :param progress: done share of training in [0, 1], 0 in the first iteration.
    :param share: of the training that one iteration is: the first one takes a step too, not one of size 0.
    :param warmup: share of the training over which it rises linearly to 1; ``shape`` says how it goes on from there:
        to 0 along a line or half a cosine.
    """
    done = ((progress - warmup) / max(1.0 - warmup, 1e-12)).clamp(0.0, 1.0)
    if shape == "linear":
        factor = 1.0 - done
    elif shape == "cosine":
        factor = 0.5 * (1.0 + torch.cos(math.pi * done))
    else:
        factor = torch.ones_like(done)
    if warmup == 0.0:
        return factor
    return torch.where(progress < warmup, ((progress + share) / warmup).clamp_max(1.0), factor)
