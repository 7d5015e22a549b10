"""Steps of sequences, read off the mask: the turns of a conversation, their pieces, or single tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Steps", "find_steps"]


class Steps(NamedTuple):
    """``S`` steps, in order inside every column, columns one after another."""

    number: Tensor
    """``[T, N]`` int64: the step of every valid token; 0 elsewhere."""
    tokens: Tensor
    """``[S]``: tokens of the step."""
    last: Tensor
    """``[S]`` bool: whether it is its trajectory's last one."""

    def mean(self, x: Tensor, valid: Tensor) -> Tensor:
        """``[S]``: mean of ``x`` ``[T, N]`` over the tokens of each step."""
        inside = valid > 0
        zeros = torch.zeros(len(self.tokens), dtype=x.dtype, device=x.device)
        return zeros.index_add(0, self.number[inside], x[inside]) / self.tokens.to(x.dtype)

    def spread(self, x: Tensor, valid: Tensor) -> Tensor:
        """``[T, N]``: every token's entry of ``x`` ``[S]``, 0 where not valid."""
        return torch.where(valid > 0, x[self.number], 0.0)


def find_steps(valid: Tensor, token: Tensor | None, step: str = "turn", delimiter: int = -1) -> Steps:
    """The steps of a rollout; ``valid`` and ``token`` are ``[T, N]``, and only delimiters look at ``token``."""
    inside = valid > 0
    before = torch.cat([torch.zeros_like(inside[:1]), inside[:-1]])
    if step == "token":
        begins = inside
    else:
        begins = inside & ~before
        if step == "delimiter":
            assert token is not None
            begins[1:] |= inside[1:] & (token[:-1] == delimiter)
    per_column = begins.sum(0)
    offset = per_column.cumsum(0) - per_column
    number = torch.where(inside, begins.cumsum(0) - 1 + offset, 0)
    total = int(per_column.sum())
    tokens = torch.bincount(number[inside], minlength=total)
    last = torch.zeros(total, dtype=torch.bool, device=valid.device)
    last[(per_column.cumsum(0) - 1)[per_column > 0]] = True
    return Steps(number, tokens, last)
