"""What policies have done: contexts and pairs to learn from, and how good predictions are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from ccrl.data import Batching, Data
from ccrl.llm.reward_metrics import auc

__all__ = ["OutcomeLog", "intra_auc", "outcome_pairs", "residuals"]


def outcome_pairs(label: Tensor, generator: Generator | None = None) -> Tensor:
    """``[2 max(n+, n-)]``: numbers of solved and unsolved prompts in turn, every one at least once; the rarer kind is
    repeated. Empty without both."""
    order = torch.randperm(len(label), generator=generator)
    high, low = (order[(label[order] >= 0.5) == kind] for kind in (True, False))
    if not len(high) or not len(low):
        return order[:0]
    place = torch.arange(max(len(high), len(low)))
    return torch.stack([high[place % len(high)], low[place % len(low)]], 1).flatten()


class OutcomeLog:
    """Outcomes by policy, ``{key: (states [n, L, d], mask [n, L], reward [n])}``, as a ``Source`` of contexts.

    A draw is ``spec.size`` policies, each with ``context`` of its prompts and pairs of others.

    :param sizes: a draw's contexts have one of these sizes, or half of what a policy has.
    :param queries: prompts that are asked about, an even number.
    :raises ValueError: no policy has both outcomes.
    """

    def __init__(
        self, rows: Mapping[Any, tuple[Tensor, Tensor, Tensor]], *, sizes: Sequence[int] = (256,), queries: int = 32
    ) -> None:
        self.rows = {k: r for k, r in rows.items() if 0 < int((r[2] >= 0.5).sum()) < len(r[2]) and len(r[2]) >= 4}
        if not self.rows:
            raise ValueError("OutcomeLog: expected policies with solved and unsolved prompts (four or more), got none")
        if queries < 2 or queries % 2:
            raise ValueError(f"queries: expected an even number of at least 2, got {queries}")
        self.sizes, self.queries, self._keys = tuple(sizes), queries, list(self.rows)

    def sample(self, spec: Batching, generator: Generator | None) -> Data:
        size = self.sizes[int(torch.randint(len(self.sizes), (), generator=generator))]
        count = len(self._keys) if spec.size == "full" else spec.size
        chosen = torch.randint(len(self._keys), (count,), generator=generator).tolist()
        size = min(size, *(len(self.rows[self._keys[i]][2]) // 2 for i in chosen))
        found = [self._task(self.rows[self._keys[i]], size, generator) for i in chosen]
        names = ("context", "context_mask", "context_label", "query", "query_mask", "query_label")
        columns = {name: torch.stack([row[i] for row in found]) for i, name in enumerate(names)}
        device = columns["context"].device
        data = Data(columns | {"valid": torch.ones(1, count, device=device)}, sequence=frozenset(names))
        return data.epoch(Batching("sequence", "full"), None)[0]

    def _task(self, row: tuple[Tensor, Tensor, Tensor], size: int, generator: Generator | None) -> list[Tensor]:
        states, mask, reward = row
        for _ in range(100):  # a part of few prompts may have one class alone
            order = torch.randperm(len(reward), generator=generator)
            context, rest = order[:size], order[size:]
            pairs = outcome_pairs(reward[rest], generator)
            if len(pairs) and 0 < int((reward[context] >= 0.5).sum()) < size:
                break
        else:
            raise ValueError("OutcomeLog: found no context and queries with both outcomes in 100 tries")
        pick = torch.arange(self.queries) % len(pairs)
        asked = rest[pairs[pick]]
        return [states[context], mask[context], reward[context], states[asked], mask[asked], reward[asked]]


def intra_auc(groups: Sequence[tuple[Tensor, Tensor]]) -> float:
    """AUC of predictions ``[n]`` of outcomes ``[n]`` within each policy, averaged with the groups' sizes; groups of one
    outcome are left out."""
    found = [(auc(said, (y >= 0.5).double()), len(y)) for said, y in groups if 0 < int((y >= 0.5).sum()) < len(y)]
    total = sum(n for _, n in found)
    return sum(a * n for a, n in found) / total if total else float("nan")


def residuals(said: Tensor, truth: Tensor, context_mean: Tensor, prompt_mean: Tensor) -> tuple[float, float]:
    """Spearman's correlation of ``said - truth`` with the context's mean label and with the prompt's; 0 at best."""
    error = said - truth

    def rank(x: Tensor) -> Tensor:
        _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
        place: Tensor = counts.cumsum(0) - 0.5 * (counts - 1)
        return place.double()[inverse]

    one, other = (float(torch.corrcoef(torch.stack([rank(error), rank(x)]))[0, 1]) for x in (context_mean, prompt_mean))
    return one, other
