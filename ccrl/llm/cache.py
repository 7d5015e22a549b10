"""Key/value caches of Hugging Face models: which can be shared by completions, and one that grows by blocks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["BLOCK", "BlockLayer", "is_shareable", "make_blocks", "repeated"]

BLOCK = 8
"""Tokens per block."""


def is_shareable(cache: Any) -> bool:
    """Whether a cache is the keys and values of tokens alone: no recurrent state, which later tokens overwrite."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def repeated(cache: Any, rows: Tensor) -> Any:
    """A cache of ``rows`` of another one, which stays as it is; gradients flow to it."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    made.reorder_cache(rows)  # named after beam search; it repeats rows as well
    return made


def make_blocks(cache: Any) -> int:
    """Let full-attention layers grow by blocks, for generation without gradients; others stay as they are.
    Returns ``BLOCK``."""
    cache.layers[:] = [BlockLayer(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return BLOCK


class BlockLayer(DynamicLayer):
    """Keys and values ``[N, H, L, D]``, ``L`` a multiple of ``BLOCK`` from the first ``update`` on. What lies after the
    last token is 0 and must be masked, as in the library's static cache.

    The library's dynamic layer copies all tokens to append one. Views into a static layer are no faster on a CPU: the
    gaps between heads defeat its prefetcher.

    :param layer: a filled ``DynamicLayer``.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(layer.keys, layer.values)
        self.keys: Tensor = layer.keys
        self.values: Tensor = layer.values
        self._seen: int = layer.keys.shape[-2]

    def get_seq_length(self) -> int:
        """Tokens."""
        return self._seen

    def get_mask_sizes(self, *query: Any) -> tuple[int, int]:
        """``L`` after the query's tokens, and the first token's place; versions differ in how they say the query."""
        length, first = super().get_mask_sizes(*query)
        return _whole(length), first

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[N, H, L', D]``, in place while the last block has room; all keys and values."""
        start, self._seen = self._seen, self._seen + key_states.shape[-2]
        self.keys, self.values = _put(self.keys, key_states, start), _put(self.values, value_states, start)
        return self.keys, self.values


def _whole(tokens: int) -> int:
    """Length of the blocks that hold them."""
    return -(-tokens // BLOCK) * BLOCK


def _put(old: Tensor, new: Tensor, start: int) -> Tensor:
    end = start + new.shape[-2]
    if end > old.shape[-2]:
        tail = new.new_zeros(*old.shape[:2], _whole(end) - end, old.shape[-1])
        return torch.cat([old[:, :, :start], new, tail], 2)
    old[:, :, start:end] = new
    return old
