"""The value model: a frozen embedding, the adapter, and two heads that read a context; its loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ccrl.data import Data
from ccrl.estimators.terms import LogRatio, Outputs, Term

__all__ = [
    "Adapter", "ContextHead", "ContextLogistic", "TokenStates", "ValueModel", "loss_terms", "rank_loss",
    "soft_cross_entropy",
]  # fmt: skip


class TokenStates(nn.Module):
    """Stands in for a frozen text embedding: a fixed random vector for every token, ``[..., P, width]``; tokens from
    ``rows`` up share one with a smaller one."""

    table: Tensor

    def __init__(self, width: int = 32, *, rows: int = 4096, seed: int = 0) -> None:
        super().__init__()
        generator = Generator().manual_seed(seed)
        self.register_buffer("table", torch.randn(rows, width, generator=generator))

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        known = torch.where(valid > 0, tokens, 0) % len(self.table)
        return self.table[known] * valid.unsqueeze(-1)


class Adapter(nn.Module):
    """``z`` ``[..., queries * width]`` of token states ``[..., L, inputs]`` and their mask ``[..., L]``.

    :param dynamic: queries depend on the prompt. The generator ends in zeros, so at the start they do not.
    """

    def __init__(self, inputs: int, *, queries: int = 168, width: int = 6, heads: int = 3, bottleneck: int = 128,
                 dropout: float = 0.2, dynamic: bool = True) -> None:  # fmt: skip
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.kv = nn.Linear(inputs, width)
        self.norm_query, self.norm_key = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.generate = nn.Sequential(
            nn.Linear(inputs, bottleneck), nn.LayerNorm(bottleneck), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(bottleneck, queries * width),
        )  # fmt: skip
        # orthogonal: three random matrices in a row would hide most of what a prompt says
        for weight in (self.kv.weight, *self.attention.in_proj_weight.chunk(3), self.attention.out_proj.weight):
            nn.init.orthogonal_(weight)
        last: Any = self.generate[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.dynamic, self.outputs = dynamic, queries * width

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        lead, (length, inputs) = states.shape[:-2], states.shape[-2:]
        h, here = states.reshape(-1, length, inputs), mask.reshape(-1, length) > 0
        queries = self.queries.expand(len(h), -1, -1)
        if self.dynamic:
            pooled = (h * here.unsqueeze(-1)).sum(1) / here.sum(1, keepdim=True).clamp_min(1)
            queries = queries + self.generate(pooled).view_as(queries)
        kv = self.kv(h)
        z, _ = self.attention(
            self.norm_query(queries), self.norm_key(kv), kv, key_padding_mask=~here, need_weights=False
        )
        return z.reshape(*lead, self.outputs)  # type: ignore[no-any-return]


class ContextHead(nn.Module):
    """A set transformer in the place of the paper's pretrained tabular classifier: the context is encoded without
    positions, prompts read it twice. ``s`` ``[B, Q]`` from ``[B, N, D]``, labels ``[B, N]`` and ``[B, Q, D]``."""

    def __init__(self, inputs: int, *, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.label = nn.Linear(inputs, width), nn.Embedding(2, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.reads = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, context: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        # as tabular models do: the adapter's outputs begin small and of any size
        mean, deviation = context.mean(1, keepdim=True), context.std(1, keepdim=True, correction=0) + 1e-6
        context, query = (context - mean) / deviation, (query - mean) / deviation
        memory = self.encoder(self.embed(context) + self.label((labels >= 0.5).long()))
        x = self.embed(query)
        for norm, read in zip(self.norms, self.reads):
            x = x + read(norm(x), memory, memory, need_weights=False)[0]
        return self.mlp(x).squeeze(-1)  # type: ignore[no-any-return]


class ValueModel(nn.Module):
    """Adapter and head. As a policy of a ``DatasetLearner`` on an ``OutcomeLog`` its output is ``score``
    ``[1, B, Q]``."""

    def __init__(self, inputs: int, *, adapter: Adapter | None = None, head: nn.Module | None = None) -> None:
        super().__init__()
        self.adapter = Adapter(inputs) if adapter is None else adapter
        self.head = ContextHead(self.adapter.outputs) if head is None else head

    def outputs(self) -> frozenset[str]:
        return frozenset({"score"})

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        names = ("context", "context_mask", "context_label", "query", "query_mask")
        return {"score": self.score(*(batch[name] for name in names)).unsqueeze(0)}

    def score(self, context: Tensor, context_mask: Tensor, labels: Tensor, query: Tensor, query_mask: Tensor) -> Tensor:
        """``s`` ``[B, Q]``: prompts ``[B, N, L, d]`` with labels ``[B, N]``, and ``[B, Q, L, d]`` without."""
        found: Tensor = self.head(self.adapter(context, context_mask), labels, self.adapter(query, query_mask))
        return found

    @torch.no_grad()
    def predict(
        self, context: Tensor, context_mask: Tensor, labels: Tensor, query: Tensor, query_mask: Tensor
    ) -> Tensor:
        """``[Q]``: success rates on prompts ``[Q, L, d]``, from the outcomes of ``[N, L, d]``. A context of one class
        gives its smoothed frequency (k + 1) / (n + 2)."""
        high = labels >= 0.5
        if bool(high.all()) or not bool(high.any()):
            rate = (high.sum() + 1.0) / (len(high) + 2.0)
            return rate.expand(len(query)).clone()
        self.eval()
        return self.score(context[None], context_mask[None], labels[None], query[None], query_mask[None])[0].sigmoid()


class ContextLogistic(nn.Module):
    """A regularised logistic regression on the context's mean token states, fitted anew for every context."""

    def __init__(self, ridge: float = 1.0, steps: int = 20) -> None:
        super().__init__()
        self.ridge, self.steps = ridge, steps

    @torch.no_grad()
    def predict(
        self, context: Tensor, context_mask: Tensor, labels: Tensor, query: Tensor, query_mask: Tensor
    ) -> Tensor:
        """As ``ValueModel.predict``; labels may be success rates."""
        both = [(x.sum(-2) / m.sum(-1, keepdim=True).clamp_min(1)).double() for x, m in
                ((context, context_mask), (query, query_mask))]  # fmt: skip
        mean, deviation = both[0].mean(0), both[0].std(0, correction=0) + 1e-6
        x, new = (torch.cat([torch.ones_like(z[:, :1]), (z - mean) / deviation], 1) for z in both)
        penalty = self.ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        penalty[0, 0] = 1e-3  # a context of one class keeps finite logits
        w = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
        for _ in range(self.steps):  # Newton
            p = (x @ w).sigmoid()
            slope = x.t() @ (p - labels.double()) + penalty @ w
            w = w - torch.linalg.solve((x * (p * (1 - p)).unsqueeze(1)).t() @ x + penalty, slope)
        return (new @ w).sigmoid().to(query.dtype)


# -- its training -----------------------------------------------------------------------------------------------------


def rank_loss(score: Tensor) -> Tensor:
    """``-mean log sigmoid(s+ - s-)`` ``[...]`` of scores ``[..., Q]`` of pairs (solved, unsolved, solved, ...)."""
    return -F.logsigmoid(score[..., 0::2] - score[..., 1::2]).mean(-1)


def soft_cross_entropy(score: Tensor, label: Tensor) -> Tensor:
    """Cross entropy ``[...]`` of logits (0, s) with labels ``[..., Q]`` in [0, 1]."""
    return F.binary_cross_entropy_with_logits(score, label, reduction="none").mean(-1)


def loss_terms(alpha: float = 0.25) -> tuple[Term, ...]:
    """``alpha L_rank + (1 - alpha) L_CE``, averaged over contexts."""

    def level(outputs: Outputs, batch: Data) -> LogRatio:
        zero = torch.zeros_like(batch["valid"])
        return LogRatio(zero, zero, batch["valid"])

    def term(name: str, coef: float, loss: Any) -> Term:
        def element(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
            return loss(outputs["score"][0], batch["query_label"]).unsqueeze(0)  # type: ignore[no-any-return]

        weigh = lambda valid, batch: valid / batch["n_sequences"]  # noqa: E731
        return Term(name, element, weigh, level, frozenset({"score"}), None, coef=coef)

    return (term("rank_loss", alpha, lambda s, y: rank_loss(s)), term("ce_loss", 1.0 - alpha, soft_cross_entropy))
