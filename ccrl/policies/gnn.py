"""Message passing on one fixed graph, the same for every row of the batch.

Plain index operations, not torch_geometric: the graph is known at construction and shared by the whole batch, so
tensors are dense ``[B, N, H]`` and ``[B, E, H]``. A library for ragged graphs would flatten them to ``B * E`` rows and
scatter, once per simulated period, with index tensors ``B`` times as long, and bring a dependency.

Source: HDPO, arXiv 2306.11246, the topology-aligned network of its published code.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EdgeNet"]


def _mlp(width: int, hidden: int, out: int, last: bool) -> nn.Sequential:
    """Two hidden layers, ELU; ``last`` puts one behind the output as well."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((width, hidden, hidden, out)):
        layers += [nn.Linear(a, b), nn.ELU()]
    return nn.Sequential(*(layers if last else layers[:-1]))


class EdgeNet(nn.Module):
    """Node features in, one non-negative number per directed edge out; permuting nodes permutes edges and outputs.

        n = node_in(x),  e = edge_in([n_src, n_dst, w]),  then in every round
        n <- n + node([n, in, out]),  e <- e + edge([e, n_src, n_dst]) with the new n
        out = softplus(head(e))

    ``in`` and ``out`` are the sums over a node's incoming and outgoing edges over the square root of their number; a
    self-loop counts in both. Virtual nodes (index -1: the outside supplier, the customer) have a zero embedding that is
    never updated.

    :param edges: ``(source, destination)`` pairs, ``-1`` for a virtual end.
    :param unread: so many edges, the last ones, send messages but have no output: their last update would be a waste (a
        third of all work where every store has an edge to its customer).
    :param nodes: number of nodes ``N``.
    :param features: node features.
    :param rounds: rounds of message passing; weights are shared among them.
    :param bias: initial bias of the head: orders are generous at first, which keeps gradients alive.
    :raises ValueError: for edges outside the graph, or none.
    """

    src: Tensor
    dst: Tensor
    into: Tensor
    outof: Tensor

    def __init__(
        self,
        edges: Sequence[tuple[int, int]],
        nodes: int,
        features: int,
        *,
        unread: int = 0,
        hidden: int = 32,
        rounds: int = 1,
        bias: float = 5.0,
    ) -> None:
        super().__init__()
        bad = [e for e in edges if not all(-1 <= end < nodes for end in e)]
        if bad or not 0 <= unread < len(edges) or rounds < 1:
            raise ValueError(
                f"EdgeNet: expected edges between nodes -1..{nodes - 1}, some of them read, and rounds >= 1, got "
                f"{bad or list(edges)}, {unread} unread, {rounds} rounds"
            )
        self.nodes, self.rounds, self.read = nodes, rounds, len(edges) - unread
        src, dst = (torch.tensor(end) % (nodes + 1) for end in zip(*edges))
        degree = (torch.bincount(end, minlength=nodes + 1).clamp_min(1)[end].rsqrt() for end in (src, dst))
        out_scale, in_scale = degree
        # row N stands for every virtual node: zeros, appended to the embeddings before they are gathered
        for name, value in (("src", src), ("dst", dst), ("outof", out_scale), ("into", in_scale)):
            self.register_buffer(name, value, persistent=False)
        self.node_in = _mlp(features, hidden, hidden, last=True)
        self.edge_in = _mlp(2 * hidden + 1, hidden, hidden, last=True)
        self.node = _mlp(3 * hidden, hidden, hidden, last=True)
        self.edge = _mlp(3 * hidden, hidden, hidden, last=True)
        self.head = _mlp(hidden, hidden, 1, last=False)
        nn.init.constant_(self.head[-1].bias, bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """``[B, E - unread]`` from node features ``[B, N, features]`` and one number per edge, ``[B, E]``."""
        return F.softplus(self.head(self.embed(x, weight)).squeeze(-1))

    def embed(self, x: Tensor, weight: Tensor) -> Tensor:
        """The edges' last embeddings ``[B, E - unread, hidden]``, which a head of the caller's own may read."""
        n = self.node_in(x)
        e: Tensor = self.edge_in(torch.cat([*self._ends(n, len(self.src)), weight.unsqueeze(-1)], -1))
        for round in range(self.rounds):
            n = n + self.node(torch.cat([n, self._sum(e, self.dst, self.into), self._sum(e, self.src, self.outof)], -1))
            e = e if round < self.rounds - 1 else e[:, : self.read]
            e = e + self.edge(torch.cat([e, *self._ends(n, e.shape[1])], -1))
        return e

    def _ends(self, n: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Embeddings at both ends of the first ``count`` edges."""
        padded = F.pad(n, (0, 0, 0, 1))
        return padded.index_select(1, self.src[:count]), padded.index_select(1, self.dst[:count])

    def _sum(self, e: Tensor, end: Tensor, scale: Tensor) -> Tensor:
        """Sum of edges at their end node, scaled; the virtual row is dropped. ``[B, N, H]``."""
        total = e.new_zeros(e.shape[0], self.nodes + 1, e.shape[2])
        return total.index_add(1, end, e * scale.to(e.dtype).unsqueeze(-1))[:, : self.nodes]
