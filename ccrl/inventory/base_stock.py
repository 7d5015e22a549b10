"""Classical heuristics as policies with a few parameters, trained by the same gradients: base stock, capped base stock,
echelon stock; and an oracle that sees the demand to come.

Levels are ``softplus(u + 10)`` with ``u = 0`` at the start: where a whole batch is stocked out under a clamp the
gradient is zero, and levels that start above the mean demand do not begin there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.inventory.functional_env import Network, State
from ccrl.inventory.policies import OrderPolicy

__all__ = ["BaseStockPolicy", "CappedBaseStockPolicy", "EchelonStockPolicy", "JustInTimePolicy"]

_START = 10.0


class _Levels(OrderPolicy):
    """Policies of stores that order from outside."""

    def __init__(self, network: Network, like: State) -> None:
        super().__init__(network, like)
        if network.internal:
            raise ValueError(
                f"{type(self).__name__}: expected stores that order from outside, got {network.internal} internal "
                "edges; take echelon_stock for a chain, gnn for any network"
            )

    def position(self, obs: State) -> Tensor:
        """Inventory position ``[B, K]``, on hand and on order, in the order of the edges."""
        return obs["inventory"].sum(-1).index_select(1, self.target)


class BaseStockPolicy(_Levels):
    """``max(S - position, 0)`` with one level per store."""

    def __init__(self, network: Network, like: State) -> None:
        super().__init__(network, like)
        self.u = nn.Parameter(torch.zeros(network.stores))

    @property
    def levels(self) -> Tensor:
        """``S`` ``[K]``."""
        return F.softplus(self.u + _START)

    def forward(self, obs: State) -> Tensor:
        return F.relu(self.levels - self.position(obs))


class CappedBaseStockPolicy(BaseStockPolicy):
    """``min(max(S - position, 0), r)``: no order exceeds a cap, which smooths them (best simple rule of lost sales)."""

    def __init__(self, network: Network, like: State) -> None:
        super().__init__(network, like)
        self.v = nn.Parameter(torch.zeros(network.stores))

    @property
    def caps(self) -> Tensor:
        """``r`` ``[K]``."""
        return F.softplus(self.v + _START)

    def forward(self, obs: State) -> Tensor:
        return torch.minimum(super().forward(obs), self.caps)


class EchelonStockPolicy(OrderPolicy):
    """Serial chains: stage ``k`` raises the position of itself and everything downstream to ``S_k``, as far as the
    stock upstream goes. ``S_k = sum_{j >= k} softplus(u_j + 10)``: increments, which avoid poor local minima."""

    def __init__(self, network: Network, like: State) -> None:
        super().__init__(network, like)
        chain = [(k, k + 1) for k in range(network.nodes - 1)] + [(-1, 0)]
        if list(network.edges) != chain:
            raise ValueError(f"EchelonStockPolicy: expected a chain {chain}, got {network.edges}; take the GNN")
        self.u = nn.Parameter(torch.zeros(network.nodes))

    @property
    def levels(self) -> Tensor:
        """``S`` ``[N]``, the most upstream stage first."""
        return F.softplus(self.u + _START).flip(0).cumsum(0).flip(0)

    def forward(self, obs: State) -> Tensor:
        inventory = obs["inventory"]
        position = inventory.sum(-1).flip(1).cumsum(1).flip(1)
        wanted = F.relu(self.levels - position)
        shipped = torch.minimum(wanted[:, 1:], inventory[:, :-1, 0])
        return torch.cat([shipped, wanted[:, :1]], 1)  # the edge from outside comes last


class JustInTimePolicy(OrderPolicy):
    """An oracle, not a policy one could run: orders exactly the demand of the period in which the order is of use.

    Every store is served by its supplier of shortest lead time; upstream nodes order what will be asked of them, ahead
    by the lead times between. Short stock is shared in proportion.
    """

    reads = ("lead_time",)
    store: Tensor
    edge: Tensor
    upto: Tensor

    def __init__(self, network: Network, like: State) -> None:
        super().__init__(network, like)
        store, edge, below = [], [], []
        longest = 0
        for node in range(network.first_store, network.nodes):
            path: list[int] = []
            at = node
            while at >= 0:
                inbound = [i for i, (_, target) in enumerate(network.edges) if target == at]
                path.append(min(inbound, key=lambda i: network.lead_times[i]))
                at = network.edges[path[-1]][0]
            for depth, i in enumerate(path):
                store.append(node - network.first_store)
                edge.append(i)
                below.append([float(j in path[: depth + 1]) for j in range(len(network.edges))])
            longest = max(longest, sum(network.lead_times[i] for i in path))
        self.foresight = longest + 1
        # every hop of every store's path: which store, which edge, and the edges whose lead times lie between
        self.register_buffer("store", torch.tensor(store), persistent=False)
        self.register_buffer("edge", torch.tensor(edge), persistent=False)
        self.register_buffer("upto", torch.tensor(below).T.contiguous(), persistent=False)

    def forward(self, obs: State) -> Tensor:
        inventory, future = obs["inventory"], obs["future_demand"]
        ahead = (obs["lead_time"].to(self.upto.dtype) @ self.upto).round().long()
        amount = future.index_select(1, self.store).gather(2, ahead.unsqueeze(-1)).squeeze(-1)
        wanted = inventory.new_zeros(inventory.shape[0], len(self.network.edges)).index_add(1, self.edge, amount)
        internal = self.network.internal
        if not internal:
            return wanted
        return torch.cat([self.proportional(wanted[:, :internal], inventory), wanted[:, internal:]], -1)
