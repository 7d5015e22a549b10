"""Policies of inventory networks: what every node orders, from what it may know. Deterministic and differentiable.

Each maps an observation (``FunctionalEnv.observe``: a dict of ``[B, ...]``) to feasible quantities ``[B, E]``, one per
edge of the network. Inputs are raw, and layers keep PyTorch's initialisation, as in the published code.

Source: HDPO, arXiv 2306.11246, and its code; deviations are in ``docs/hdpo.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.inventory import feasibility
from ccrl.inventory.functional_env import Network, State
from ccrl.policies.encoders import mlp
from ccrl.policies.gnn import EdgeNet

__all__ = ["DataDrivenPolicy", "GNNPolicy", "OrderPolicy", "SymmetryAwarePolicy", "VanillaPolicy"]

PLANS = ("season", "planned")
"""Observations of the calendar and of planned promotions and prices, which demand of one's own has."""
Layer = Callable[[Tensor, Tensor], Tensor]
"""``(wanted [B, k], on_hand [B]) -> shipments [B, k]`` of one node."""


class OrderPolicy(nn.Module):
    """What the policies share: the network as index tensors, features, shipments node by node.

    :param network: nodes and edges.
    :param like: an observation of the environment, for the widths of what it shows.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    """Observations needed besides ``inventory``."""
    foresight: int = 0
    """How many future periods of demand an oracle sees, in ``future_demand`` ``[B, K, foresight]``; 0: none."""
    used: Tensor
    source: Tensor
    target: Tensor

    def __init__(self, network: Network, like: State) -> None:
        super().__init__()
        self.network = network
        self.need(like, *self.reads)
        slots = like["inventory"].shape[2]
        # slots beyond a node's longest lead time are always 0: they would only widen the first layer
        used = [n * slots + j for n, length in enumerate(network.node_slots) for j in range(length)]
        self.all_used = len(used) == network.nodes * slots
        sources = [s for s, _ in network.edges[: network.internal]]
        self.shippers = sorted(set(sources))
        self.counts = [sources.count(s) for s in self.shippers]
        for name, value in (
            ("used", torch.tensor(used)), ("source", network.source()), ("target", network.target())
        ):  # fmt: skip
            self.register_buffer(name, value, persistent=False)

    def need(self, like: State, *names: str) -> None:
        """:raises ValueError: if the environment does not show one of ``names``."""
        missing = [k for k in names if k not in like]
        if missing:
            raise ValueError(
                f"{type(self).__name__}: expected the observations {list(names)}, got {sorted(like)} without "
                f"{missing}; choose another policy or another instance"
            )

    def inventories(self, obs: State) -> Tensor:
        """All inventory slots in use, ``[B, F]``."""
        flat = obs["inventory"].flatten(1)
        return flat if self.all_used else flat.index_select(1, self.used)

    def ship(self, layer: Layer, wanted: Tensor, inventory: Tensor) -> Tensor:
        """Shipments ``[B, E_internal]`` from wanted ones: ``layer`` on every shipping node."""
        on_hand = inventory[:, :, 0]
        pieces = torch.split(wanted, self.counts, -1)  # internal edges are sorted by source
        return torch.cat([layer(piece, on_hand[:, node]) for node, piece in zip(self.shippers, pieces)], -1)

    def softmax(self, logits: Tensor, inventory: Tensor) -> Tensor:
        """Shipments of every node by the softmax layer."""
        return self.ship(
            lambda x, stock: feasibility.softmax(x, stock, hold=self.network.keeps_stock), logits, inventory
        )

    def proportional(self, wanted: Tensor, inventory: Tensor) -> Tensor:
        """Shipments of every node by the proportional layer."""
        return self.ship(
            lambda x, stock: feasibility.proportional(x, stock, hold=self.network.keeps_stock), wanted, inventory
        )

    def forward(self, obs: State) -> Tensor:
        """Feasible quantities ``[B, E]``."""
        raise NotImplementedError


def order_bound(obs: State) -> Tensor:
    """``[B, 1]``: four times the mean demand of all stores, the largest order of a sigmoid output."""
    return 4.0 * obs["mean"].sum(-1, keepdim=True)


class VanillaPolicy(OrderPolicy):
    """One perceptron from all inventories to all orders.

    * Stores alone: ``softplus(o + 1)``.
    * Serial chain: every stage asks for a share ``sigmoid(o)`` of the stock upstream; the first orders
      ``bound * sigmoid(o)``.
    * Warehouses: each one's stock is split by the softmax layer; they order ``bound * sigmoid(o)``.

    :param hidden: None: 32 x 3 for stores, 32 x 2 for chains, 512 x 3 for warehouses (256 x 3 in transshipment).
    """

    def __init__(self, network: Network, like: State, hidden: Sequence[int] | None = None) -> None:
        super().__init__(network, like)
        if network.internal:
            self.need(like, "mean")  # for the bound of upstream orders
        if hidden is None:
            hidden = self._published_sizes(network)
        self.net = mlp([len(self.used), *hidden, len(network.edges)], "elu")

    @staticmethod
    def _published_sizes(network: Network) -> tuple[int, ...]:
        if not network.internal:
            return (32, 32, 32)
        if network.echelons:
            return (32, 32)
        return (512, 512, 512) if network.keeps_stock else (256, 256, 256)

    def forward(self, obs: State) -> Tensor:
        out = self.net(self.inventories(obs))
        network = self.network
        if not network.internal:
            return F.softplus(out + 1.0)
        wanted, supply = out.split([network.internal, len(network.edges) - network.internal], -1)
        if network.echelons:
            shipped = wanted.sigmoid() * obs["inventory"][:, self.source[: network.internal], 0]
        else:
            shipped = self.softmax(wanted, obs["inventory"])
        return torch.cat([shipped, order_bound(obs) * supply.sigmoid()], -1)


class DataDrivenPolicy(OrderPolicy):
    """One perceptron on inventories, past demand, the calendar, prices and lead times, and on what is planned for the
    coming periods where that is shown; no law of demand is known.

    Outputs are ReLU with an initial bias of 1; a node short of stock ships in proportion.
    """

    reads = ("past_demand", "days_from_christmas", "underage", "holding", "lead_time")

    def __init__(self, network: Network, like: State, hidden: Sequence[int] | None = None) -> None:
        super().__init__(network, like)
        self.seen = (*self.reads, *(k for k in PLANS if k in like))
        width = len(self.used) + sum(like[k][0].numel() for k in self.seen)
        self.net = mlp([width, *((64, 64) if hidden is None else hidden), len(network.edges)], "elu")
        nn.init.constant_(self.net[-1].bias, 1.0)  # type: ignore[arg-type]

    def forward(self, obs: State) -> Tensor:
        inventory = self.inventories(obs)
        features = torch.cat([inventory, *(obs[k].flatten(1).to(inventory.dtype) for k in self.seen)], -1)
        wanted = F.relu(self.net(features))
        internal = self.network.internal
        if not internal:
            return wanted
        return torch.cat([self.proportional(wanted[:, :internal], obs["inventory"]), wanted[:, internal:]], -1)


class SymmetryAwarePolicy(OrderPolicy):
    """One network for all stores and one for all warehouses, which share a context: a perceptron of all inventories.

    The context reads the inventories in their order, so permuted stores do *not* get permuted orders.
    """

    reads = ("mean", "std", "underage", "lead_time")

    def __init__(self, network: Network, like: State, context: int = 256) -> None:
        super().__init__(network, like)
        if network.echelons or (
            network.internal and bool((self.target[network.internal :] >= network.first_store).any())
        ):
            raise ValueError(
                "SymmetryAwarePolicy: expected stores alone, or stores supplied by warehouses alone; take the GNN"
            )
        slots = like["inventory"].shape[2]
        self.context = nn.Sequential(mlp([len(self.used), context, context], "elu"), nn.Sigmoid())
        # orders of stores, and (where there are any) of warehouses
        self.store = mlp([slots + 4 + context, 32, 32, 1], "elu")
        if network.internal:
            self.warehouse = mlp([slots + context, 16, 16, 1], "elu")

    def forward(self, obs: State) -> Tensor:
        network, inventory = self.network, obs["inventory"]
        into_stores = len(network.edges) if not network.internal else network.internal
        target = self.target[:into_stores]
        store = target - network.first_store
        context = self.context(self.inventories(obs)).unsqueeze(1)
        known = [obs[k].index_select(1, store) for k in ("mean", "std", "underage")]
        known.append(obs["lead_time"][:, :into_stores].to(inventory.dtype))
        rows = [inventory.index_select(1, target), torch.stack(known, -1), context.expand(-1, into_stores, -1)]
        wanted = F.softplus(self.store(torch.cat(rows, -1)).squeeze(-1))
        if not network.internal:
            return wanted
        stock = inventory.index_select(1, self.target[into_stores:])
        share = self.warehouse(torch.cat([stock, context.expand(-1, stock.shape[1], -1)], -1)).squeeze(-1).sigmoid()
        return torch.cat([self.proportional(wanted, inventory), order_bound(obs) * share], -1)


class GNNPolicy(OrderPolicy):
    """The topology-aligned network: message passing on the inventory network itself (:class:`EdgeNet`).

    Nodes know their inventory and attributes, edges their lead time. Besides the network's edges there is one to the
    customer from every store, and a self-loop of every node that can hold stock: its output is what the node wants to
    keep. Parameters do not depend on the number of nodes.

    :param rounds: rounds of message passing; None: one more than there are extra echelons.
    """

    reads = ("holding", "underage", "lead_time", "edge_cost")

    def __init__(self, network: Network, like: State, rounds: int | None = None, hidden: int = 32) -> None:
        super().__init__(network, like)
        if not ({"mean", "std"} <= like.keys() or {"past_demand", "days_from_christmas"} <= like.keys()):
            raise ValueError(
                f"GNNPolicy: expected mean and std, or past_demand and days_from_christmas, of demand among the "
                f"observations, got {sorted(like)}"
            )
        customers = [(node, -1) for node in range(network.first_store, network.nodes)]
        keeping = [(node, node) for node in self.shippers] if network.keeps_stock else []
        edges = [*network.edges, *keeping, *customers]
        self.silent = len(edges) - len(network.edges)  # edges without a lead time
        width = like["inventory"].shape[2] + 1 + self._store_attributes(like).shape[-1]
        rounds = network.echelons + 1 if rounds is None else rounds
        self.net = EdgeNet(edges, network.nodes, width, hidden=hidden, rounds=rounds, unread=len(customers))

    @staticmethod
    def _store_attributes(obs: State) -> Tensor:
        """``[B, K, F]``: underage, then the law of demand, or its history, the calendar and what is planned."""
        if "mean" in obs:
            return torch.stack([obs["underage"], obs["mean"], obs["std"]], -1)
        past = obs["past_demand"]
        days = obs["days_from_christmas"].to(past.dtype).unsqueeze(1).expand(-1, past.shape[1], -1)
        found = [obs["underage"].unsqueeze(-1), past, days]
        if "season" in obs:
            found.append(obs["season"].to(past.dtype).unsqueeze(1).expand(-1, past.shape[1], -1))
        if "planned" in obs:
            found.append(obs["planned"].to(past.dtype))
        return torch.cat(found, -1)

    def features(self, obs: State) -> Tensor:
        """``[B, N, F]``: slots, holding cost, then a store's attributes or the cost of a warehouse's orders, padded."""
        inventory, first = obs["inventory"], self.network.first_store
        attributes = self._store_attributes(obs).to(inventory.dtype)
        if first:
            cost = inventory.new_zeros(inventory.shape[0], self.network.nodes)
            internal = self.network.internal
            cost = cost.index_copy(1, self.target[internal:], obs["edge_cost"][:, internal:].to(inventory.dtype))
            attributes = torch.cat([F.pad(cost[:, :first, None], (0, attributes.shape[-1] - 1)), attributes], 1)
        return torch.cat([inventory, obs["holding"].unsqueeze(-1).to(inventory.dtype), attributes], -1)

    def forward(self, obs: State) -> Tensor:
        network, inventory = self.network, obs["inventory"]
        lead = F.pad(obs["lead_time"].to(inventory.dtype), (0, self.silent))
        out: Tensor = self.net(self.features(obs), lead)
        if not network.internal:
            return out
        wanted, supply = out[:, : network.internal], out[:, network.internal : len(network.edges)]
        if not network.keeps_stock:
            return torch.cat([self.proportional(wanted, inventory), supply], -1)
        keep = out[:, -len(self.shippers) :].unbind(-1)
        pieces = zip(self.shippers, torch.split(wanted, self.counts, -1), keep)
        shipped = [feasibility.retention(piece, own, inventory[:, node, 0]) for node, piece, own in pieces]
        return torch.cat([*shipped, supply], -1)
