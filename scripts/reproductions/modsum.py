"""What a table on ModSum is worth, exactly.

The table sees the running sum, so that the first three of four tokens may stay uniform: a reward of 1 goes with any
entropy up to ``3/4 ln 10`` nats per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from scripts.reproductions.tables import StateTable

__all__ = ["Exact", "exact", "modsum_shape"]


class Exact(NamedTuple):
    """Expectations under the policy, over all questions equally."""

    reward: float
    entropy: float
    """Nats per token."""


@torch.no_grad()
def exact(table: StateTable) -> Exact:
    """By the distribution of the running sum, token by token."""
    questions, steps, symbols, _ = table.logits.shape
    sums = torch.arange(symbols)
    token = (sums.unsqueeze(0) - sums.unsqueeze(1)) % symbols  # [before, after]
    reached = torch.zeros(questions, symbols)
    reached[:, 0] = 1.0
    entropy = torch.zeros(questions)
    for t in range(steps):
        p = table.logits[:, t].softmax(-1)
        entropy += (reached * torch.special.entr(p).sum(-1)).sum(-1)
        reached = (reached.unsqueeze(-1) * p.gather(-1, token.expand_as(p))).sum(1)
    question = torch.arange(questions)
    return Exact(float(reached[question, question % symbols].mean()), float(entropy.mean() / steps))


def modsum_shape(**options: Any) -> dict[str, Any]:
    """Settings of the experiments: 16 prompts, 8 completions each, token means, gradients not scaled down."""
    return {"n_prompts": 16, "group_size": 8, "max_grad_norm": 0.0, "aggregate": "token_mean"} | options
