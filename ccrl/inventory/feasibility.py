"""Feasibility layers: desired shipments in, shipments that never exceed the stock on hand out.

One node ships to ``K`` successors. ``on_hand`` is its stock ``[...]`` and ``desired`` what the successors ask for,
``[..., K]``, both non-negative; every layer is differentiable and works on any leading shape and dtype. What a node
cannot hold (a transshipment point) it ships completely.

Source: HDPO, arXiv 2306.11246, section "feasibility enforcement", and its published code.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["proportional", "retention", "softmax"]

_TINY = 1e-10
"""Keeps ``0 / 0`` out of the gradient where nothing is asked for."""


def proportional(desired: Tensor, on_hand: Tensor, *, hold: bool = True) -> Tensor:
    """``desired * min(1, on_hand / sum(desired))``: requests are cut by one common factor when stock is short.

    :param hold: False: the node cannot hold stock, so the factor may exceed 1 and all of ``on_hand`` is shipped.
        Nothing is shipped where nothing is asked for, in both cases.
    """
    share = on_hand / (desired.sum(-1) + _TINY)
    return desired * (share.clamp_max(1.0) if hold else share).unsqueeze(-1)


def retention(desired: Tensor, keep: Tensor, on_hand: Tensor) -> Tensor:
    """As ``proportional`` with one more request ``keep`` ``[...]``, the node's own: what it wants to hold back."""
    share = on_hand / (desired.sum(-1) + keep + _TINY)
    return desired * share.clamp_max(1.0).unsqueeze(-1)


def softmax(logits: Tensor, on_hand: Tensor, *, hold: bool = True) -> Tensor:
    """``on_hand`` split by the softmax of ``logits`` ``[..., K]`` (any sign).

    :param hold: the node keeps the share of one more logit, the constant 1; False: all is shipped.
    """
    if hold:
        logits = torch.cat([logits, torch.ones_like(logits[..., :1])], -1)
        return on_hand.unsqueeze(-1) * logits.softmax(-1)[..., :-1]
    return on_hand.unsqueeze(-1) * logits.softmax(-1)
