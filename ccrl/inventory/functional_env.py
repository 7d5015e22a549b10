"""Simulators as pure functions, for agents that differentiate through them (pathwise gradients).

A :class:`FunctionalEnv` has no memory: ``step`` maps a state, an action and the noise of the period to the next state
and a cost, so autograd sees the whole horizon. A batch is a set of *scenarios* (initial state, noise, constants), drawn
once and kept on the device. One rollout is::

    state, costs = env.initial(scenarios), []
    for demand in env.noise(scenarios):                         # [T, B, K]
        action = env.feasible(state, policy(env.observe(state)))
        state, cost = env.step(state, action, demand)
        costs.append(cost)

Everything is a flat ``dict[str, Tensor]`` with the batch first, so ``{k: v[rows] for k, v in scenarios.items()}`` is a
minibatch. No method writes in place, reads a value back or branches on data: they run in float32 and float64, on any
device, under autograd and inside ``torch.compile``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Integral
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ccrl import registry

__all__ = ["FunctionalEnv", "Network", "Split", "State", "resolve_functional_env"]

State = dict[str, Tensor]
"""Tensors ``[B, ...]`` by name."""

Split = Literal["train", "dev", "test"]


@lru_cache(maxsize=256)
def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: policies ask for it in every period, and on a device each would be a copy from the host."""
    return torch.tensor(numbers, device=device)


@dataclass(frozen=True)
class Network:
    """Who ships to whom. Nodes are numbered ``[echelons, warehouses, stores]``, echelon 0 being the most upstream.

    An action is one quantity per edge, ``[B, E]``, in the order of ``edges``: first the internal edges, row by row of
    the adjacency matrix (sorted by source, then target), then the edges of the outside supplier, sorted by target.

    Raises:
        ValueError: no store, edges out of order or twice, a node out of range, lead times that are no integers of at
            least one, a node without supply, a store that ships.
    """

    echelons: int
    warehouses: int
    stores: int
    edges: tuple[tuple[int, int], ...]
    """``(source, target)`` node numbers; the source of the unlimited outside supplier is -1."""
    lead_times: tuple[int, ...]
    """Periods from order to use, per edge, at least 1. The longest where they differ by scenario."""
    keeps_stock: bool = True
    """False: warehouses pass on all that arrives (transshipment)."""

    def __post_init__(self) -> None:
        if self.stores < 1 or min(self.echelons, self.warehouses) < 0:
            raise ValueError(
                f"stores: expected at least 1 and no negative counts, got {self.echelons} echelons, {self.warehouses} "
                f"warehouses and {self.stores} stores"
            )
        internal = [edge for edge in self.edges if edge[0] >= 0]
        supply = [edge for edge in self.edges if edge[0] < 0]
        if list(self.edges) != sorted(set(internal)) + sorted(set(supply)):
            raise ValueError(
                f"edges: expected internal edges sorted by (source, target), then (-1, target) sorted by target, each "
                f"once; got {self.edges}"
            )
        if any(not -1 <= s < self.nodes or not 0 <= t < self.nodes or s == t for s, t in self.edges):
            raise ValueError(f"edges: expected two different nodes below {self.nodes}, or source -1; got {self.edges}")
        if len(self.lead_times) != len(self.edges) or not all(
            isinstance(lead, Integral) and lead >= 1 for lead in self.lead_times
        ):
            raise ValueError(
                f"lead_times: expected {len(self.edges)} integers of at least 1 (an order never serves the demand of "
                f"its own period), got {self.lead_times}"
            )
        orphans = set(range(self.nodes)) - {target for _, target in self.edges}
        if orphans:
            raise ValueError(f"edges: expected every node to have a supplier, got none for nodes {sorted(orphans)}")
        if any(source >= self.first_store for source, _ in self.edges):
            raise ValueError(f"edges: stores (nodes {self.first_store} and up) serve demand and do not ship")

    @property
    def nodes(self) -> int:
        """Number of nodes ``N``."""
        return self.echelons + self.warehouses + self.stores

    @property
    def first_store(self) -> int:
        """Number of the first store: the stores are the nodes from here on."""
        return self.echelons + self.warehouses

    @cached_property
    def internal(self) -> int:
        """How many edges are internal: they come first."""
        return sum(source >= 0 for source, _ in self.edges)

    @cached_property
    def slots(self) -> int:
        """Inventory slots ``L`` per node: the longest lead time."""
        return max(self.lead_times)

    @cached_property
    def node_slots(self) -> tuple[int, ...]:
        """Per node, the slots that can be other than zero: the longest lead time of the edges into it."""
        return tuple(
            max(lead for (_, target), lead in zip(self.edges, self.lead_times, strict=True) if target == node)
            for node in range(self.nodes)
        )

    def source(self, device: torch.device | str = "cpu") -> Tensor:
        """``[E]`` int64 sources of the edges, -1 for the outside supplier."""
        return _index(tuple(source for source, _ in self.edges), torch.device(device))

    def target(self, device: torch.device | str = "cpu") -> Tensor:
        """``[E]`` int64 targets of the edges."""
        return _index(tuple(target for _, target in self.edges), torch.device(device))


@runtime_checkable
class FunctionalEnv(Protocol):
    """A differentiable inventory network. ``B`` scenarios, ``N`` nodes, ``K`` stores, ``E`` edges, ``L`` slots, ``T``
    periods."""

    network: Network
    periods: int
    """``T``: periods of one rollout."""
    ignore: int
    """Warm-up: reported costs are those of the periods ``t >= ignore``, per period and store."""
    static: dict[str, Tensor]
    """Constants that are the same in all scenarios, ``[1, ...]``, under their names in :meth:`observe`."""

    @property
    def available(self) -> int | None:
        """How many scenarios are recorded (:meth:`sample` gives the first ones); ``None``: any number can be drawn."""
        ...

    def split(self, name: Split) -> FunctionalEnv:
        """The same task with the horizon, warm-up and (for recorded demand) the weeks of this split."""
        ...

    def sample(
        self,
        count: int,
        generator: torch.Generator,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> State:
        """``count`` scenarios: ``"demand"`` ``[B, H + T, K]`` (``H`` weeks of history before the first period, 0 where
        policies see none), ``"inventory"`` ``[B, N, L]`` and the constants that differ by scenario. ``generator`` lives
        on the CPU: the scenarios do not depend on ``device``."""
        ...

    def initial(self, scenarios: State) -> State:
        """The state before the first period; holds the inventory and the constants that differ by scenario."""
        ...

    def noise(self, scenarios: State) -> Tensor:
        """``[T, B, K]`` contiguous: the demand of every period."""
        ...

    def observe(self, state: State) -> State:
        """All that a policy may know, each ``[B, ...]`` (expanded views where constant):

        * ``inventory`` ``[B, N, L]``: slot 0 is on hand, slot ``j`` arrives at the start of the ``j``-th next period;
        * ``holding`` ``[B, N]``; ``underage`` ``[B, K]`` (the price where profit is maximised);
        * ``lead_time`` ``[B, E]`` and ``edge_cost`` ``[B, E]`` (per unit shipped);
        * where demand has a known law: ``mean`` and ``std`` ``[B, K]``;
        * where it is recorded: ``past_demand`` ``[B, K, H]`` (latest last) and ``days_from_christmas`` ``[B, 1]``.
        """
        ...

    def feasible(self, state: State, desired: Tensor) -> Tensor:
        """``[B, E]`` quantities from desired ones ``>= 0``: where a node is asked for more than it has on hand, all its
        shipments shrink by one factor; a node that cannot keep stock ships all of it in those proportions."""
        ...

    def step(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor]:
        """One period: ``action`` ``[B, E]`` feasible quantities, ``noise`` ``[B, K]`` the demand. Returns the next
        state and the cost ``[B]``, summed over nodes and edges."""
        ...


def resolve_functional_env(env: FunctionalEnv | str, **options: Any) -> FunctionalEnv:
    """A ``FunctionalEnv`` from one (returned as it is) or from an id of ``ccrl.registry.functional_environments``.

    Raises:
        TypeError: ``env`` is neither a string nor has the members of the protocol, or options come with an object.
        ValueError: an unknown id.
    """
    if isinstance(env, str):
        return resolve_functional_env(registry.functional_environments.get(env)(**options))
    missing = [m for m in ("network", "periods", "sample", "initial", "observe", "step") if not hasattr(env, m)]
    if missing or options:
        raise TypeError(
            f"env: expected an id with options, or a FunctionalEnv without, got {type(env).__name__} without {missing} "
            f"and with options {sorted(options)}"
        )
    return env
