"""The inventory network as pure functions: a :class:`ccrl.inventory.functional_env.FunctionalEnv`.

Order of events in a period: observe; all nodes order and ship at once; demand meets what is on hand (an order of this
period never serves it); costs; what is in transit moves up one slot and the orders enter at their lead time::

    post     = on hand - demand           (stores)        post = on hand - shipments       (other nodes)
    cost     = p max(-post, 0) + h max(post, 0)           with profit: -p min(on hand, demand) + h max(post, 0)
    post     = max(post, 0)                               where demand is lost
    x'_0     = post + x_1,   x'_j = x_{j+1},   then   x'_{L-1} += order

Source: Alvo et al. 2023 (arXiv 2306.11246) and their published code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ccrl.inventory.functional_env import Split, State
from ccrl.inventory.stores import StoresAlone
from envs.inventory.demand import Recorded, days_from_christmas, seasons
from envs.inventory.tasks import Task
from envs.inventory.terms import EDGE_TERMS, expire, fixed_charge, place

__all__ = ["InventoryEnv", "Policy", "Trace", "simulate"]

_SEEN = (
    "inventory", "past_demand", "holding", "underage", "edge_cost", "lead_time", "scale", "series", "ages", *EDGE_TERMS
)  # fmt: skip
"""What policies see of the state, where it is there."""


class InventoryEnv:
    """A task with the horizon of one split; see :class:`ccrl.inventory.functional_env.FunctionalEnv` for the shapes.

    Beyond the protocol the state holds ``week`` ``[B]`` and ``past_demand`` where demand is recorded, and ``underage``
    ``[B, 1]`` and ``lead_time`` ``[B, 1]`` where they differ by series.

    Args:
        task: from :func:`envs.inventory.make_task`, or your own.
        split: ``"train"``, ``"dev"`` or ``"test"``: horizon, warm-up and weeks.
        periods: another horizon than that of the split; :meth:`split` keeps it for all splits. For horizons that differ
            give the task its ``horizons``.
        ignore: another warm-up, kept in the same way.

    Raises:
        ValueError: an unknown split, no period after the warm-up, or more weeks than are recorded.
    """

    def __init__(
        self, task: Task, split: Split = "train", *, periods: int | None = None, ignore: int | None = None
    ) -> None:
        if split not in task.split_horizons:
            raise ValueError(f"split: expected one of {', '.join(task.split_horizons)}, got {split!r}")
        self.task, self.network, self._split = task, task.network, split
        self._override = {"periods": periods, "ignore": ignore}
        self.first_week, self.periods, self.ignore = task.split_horizons[split]
        self.periods = self.periods if periods is None else periods
        self.ignore = min(self.ignore, self.periods - 1) if ignore is None else ignore
        if not 0 <= self.ignore < self.periods:
            raise ValueError(f"periods: expected more than the warm-up of {self.ignore}, got {self.periods}")
        if isinstance(task.demand, Recorded):
            longest = task.demand.series.shape[1] - self.first_week - task.demand.history
            if self.periods > longest:
                raise ValueError(f"periods: the series have {longest} weeks after the history, got {self.periods}")
        self.recorded = isinstance(task.demand, Recorded)
        self.shelf_life = task.terms.shelf_life if task.terms else 0
        edge_cost = task.edge_cost or (0.0,) * len(task.network.edges)
        constants = {"holding": task.holding, "underage": task.underage, "edge_cost": edge_cost}
        if not isinstance(task.demand, Recorded):
            constants |= {"mean": task.demand.mean, "std": task.demand.std}
        self.static: State = {name: torch.tensor([value], dtype=torch.float64) for name, value in constants.items()}
        self.static["lead_time"] = torch.tensor([task.network.lead_times], dtype=torch.float64)
        if task.underage_by_series:
            del self.static["underage"]
        if task.lead_time_by_series:
            del self.static["lead_time"]
        for name in task.by_series:
            self.static.pop(name, None)
        self._tables: dict[tuple[torch.device, torch.dtype], State] = {}

    @property
    def available(self) -> int | None:
        """How many scenarios there are, those of recorded series (in training and development as often as there are
        lead times, see ``Task.vary_lead_time``); ``None`` where they are drawn."""
        if not isinstance(self.task.demand, Recorded):
            return None
        copies = 1 if self._split == "test" else 2 * self.task.vary_lead_time + 1
        return copies * len(self.task.demand.series)

    def split(self, name: Split) -> InventoryEnv:
        """The same task with the weeks and the horizon of another split; ``periods`` and ``ignore`` given at
        construction stay.

        Raises:
            ValueError: as the constructor, where those do not fit the other split.
        """
        return InventoryEnv(self.task, name, **self._override)

    def sample(
        self,
        count: int,
        generator: torch.Generator,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> State:
        """``count`` scenarios; recorded demand gives its first ``count`` series, and draws nothing.

        Raises:
            ValueError: no scenario, or more than there are series.
        """
        limit = self.available or count
        if not 1 <= count <= limit:
            series = f" (there are {limit} series; of hdpo set n_train and n_dev)" if count > limit else ""
            raise ValueError(f"{self.task.name}: expected 1 to {max(limit, 1)} scenarios, got {count}{series}")
        return self.draw(torch.arange(count), generator, device=device, dtype=dtype)

    def draw(
        self,
        numbers: Tensor,
        generator: torch.Generator,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> State:
        """One scenario for each of ``numbers`` ``[B]`` int64, which choose among those that there are
        (:attr:`available`); scenarios of a known law are drawn anew, whatever their numbers."""
        demand, net, count = self.task.demand, self.network, len(numbers)
        scenarios: State = {}
        stock = torch.zeros(count, net.nodes, net.slots)
        if self.task.random_stock:
            slots = max(net.node_slots[net.first_store :])
            share = torch.rand(count, net.stores, slots, generator=generator)
            filled = torch.arange(slots) < torch.tensor(net.node_slots[net.first_store :])[:, None]
            stock[:, net.first_store :, :slots] = share * filled * torch.tensor(demand.mean)[:, None]
        scenarios["inventory"] = stock
        if isinstance(demand, Recorded):
            rows = numbers % len(demand.series)
            weeks = slice(self.first_week, self.first_week + demand.history + self.periods)
            scenarios["demand"] = demand.series[rows, weeks]
            if demand.features is not None:
                scenarios["features"] = self._features(demand)[rows]
            scenarios |= self._by_series(rows, numbers // len(demand.series), generator)
            if self.task.underage_by_series:
                scenarios["underage"] = torch.tensor(self.task.underage_by_series)[rows, None]
            if self.task.lead_time_by_series:
                scenarios["lead_time"] = torch.tensor(self.task.lead_time_by_series)[rows, None]
        else:
            scenarios["demand"] = demand.draw(count, self.periods, generator)
        return {name: value.to(device=device, dtype=dtype) for name, value in scenarios.items()}

    def _features(self, demand: Recorded) -> Tensor:
        """``[S, T + L + 1, K, F]``: of every period, and those after it that an order of it meets; of the period after
        the last one too, which the last observation is of."""
        assert demand.features is not None
        first, periods = self.first_week + demand.history, self.periods + self.network.slots + 1
        given = demand.features[:, first : first + periods]
        missing = periods - given.shape[1]
        return torch.cat((given, demand.beyond.expand(-1, missing, -1, -1)), 1) if missing else given

    def _by_series(self, rows: Tensor, copy: Tensor, generator: torch.Generator) -> State:
        """Constants of the series ``rows`` ``[B]``; lead times of copy 1, 2, 3, 4 ... are 1 shorter, 1 longer, 2
        shorter, 2 longer ... than given."""
        task, net = self.task, self.network
        found = {name: value[rows] for name, value in task.by_series.items()}
        if not found:
            return {}
        found["series"] = rows
        shift = torch.where(copy % 2 == 1, -(copy + 1) // 2, copy // 2)[:, None]
        if "stock" in found:
            found["inventory"] = found.pop("stock")
        if task.vary_lead_time:
            found["lead_time"] = (found["lead_time"] + shift).clamp_min(1)
        if task.earliest is not None:
            latest = found["lead_time"]
            early = (task.earliest[rows] + shift).clamp_min(1).minimum(latest)
            draw = torch.rand(len(rows), self.periods, len(net.edges), generator=generator)
            found["arrival"] = early[:, None] + torch.floor(draw * (latest - early + 1)[:, None])
            found["lead_time"] = (early + latest) / 2
        return found

    def today(self, stock: Tensor) -> tuple[InventoryEnv, State]:
        """The present: the period after the last recorded one, with ``stock`` ``[S, N, L]`` of every series, and the
        environment whose ``observe``, ``feasible`` and ``placed`` know it. Its demand is not known: it has no ``step``.

        Raises:
            ValueError: demand that is not recorded, or a stock of another shape.
        """
        demand, net = self.task.demand, self.network
        if not isinstance(demand, Recorded):
            raise ValueError(f"{self.task.name}: expected recorded demand, whose last period is the past; got a law")
        shape = (len(demand.series), net.nodes, net.slots)
        if tuple(stock.shape) != shape:
            raise ValueError(f"stock: expected [series, nodes, slots] {shape}, got {tuple(stock.shape)}")
        here = InventoryEnv(self.task, "test")
        rows = torch.arange(shape[0])
        here.first_week, here.periods = demand.series.shape[1] - demand.history, 1
        state = here._by_series(rows, torch.zeros_like(rows), torch.Generator())
        if demand.features is not None:
            state["features"] = here._features(demand)
        state["past_demand"] = demand.series[:, here.first_week :].transpose(1, 2)
        state |= {"week": torch.full(shape[:1], demand.series.shape[1]), "inventory": stock}
        if here.shelf_life:
            fresh = stock[:, net.first_store :, :1]
            state["ages"] = torch.cat((fresh.new_zeros(*fresh.shape[:2], here.shelf_life - 1), fresh), 2)
        return here, state

    def initial(self, scenarios: State) -> State:
        """The state before the first period."""
        state = {name: value for name, value in scenarios.items() if name != "demand"}
        if self.shelf_life:
            fresh = state["inventory"][:, self.network.first_store :, :1]
            state["ages"] = torch.cat((fresh.new_zeros(*fresh.shape[:2], self.shelf_life - 1), fresh), 2)
        demand = scenarios["demand"]
        if self.recorded:
            history = demand.shape[1] - self.periods
            state["past_demand"] = demand[:, :history].transpose(1, 2)
            state["week"] = torch.full(demand.shape[:1], self.first_week + history, device=demand.device)
        self._on(state["inventory"])  # fills the table here, outside compiled periods
        return state

    def noise(self, scenarios: State) -> Tensor:
        """``[T, B, K]`` contiguous demand of the periods."""
        return scenarios["demand"][:, -self.periods :].transpose(0, 1).contiguous()

    def observe(self, state: State) -> State:
        """What policies may know; see the protocol."""
        inventory, table = state["inventory"], self._on(state["inventory"])
        seen = {name: table[name].expand(len(inventory), -1) for name in self.static}
        seen |= {name: state[name] for name in _SEEN if name in state}
        if self.recorded:
            week = state["week"].long()
            seen["days_from_christmas"] = table["calendar"][week][:, None]
            if self.task.by_series:
                seen["season"] = table["season"][week]
                seen["week"] = state["week"]
        if "features" in state:
            ahead = self._clock(state)[:, None] + torch.arange(self.network.slots + 1, device=inventory.device)
            rows = torch.arange(len(inventory), device=inventory.device)[:, None]
            seen["planned"] = state["features"][rows, ahead].permute(0, 2, 1, 3).flatten(2)
        return seen

    def _clock(self, state: State) -> Tensor:
        """Periods since the first one, ``[B]``."""
        assert isinstance(self.task.demand, Recorded)
        return state["week"].long() - (self.first_week + self.task.demand.history)

    def feasible(self, state: State, desired: Tensor) -> Tensor:
        """``[B, E]`` quantities; see the protocol. The outside supplier delivers everything."""
        inner, first = self.network.internal, self.network.first_store
        if not inner:
            return desired
        leaves = self._on(state["inventory"])["leaves"]
        wanted = desired[:, :inner]
        share = state["inventory"][:, :first, 0].clamp_min(0.0) / (wanted @ leaves + 1e-10)
        if self.network.keeps_stock:
            share = share.clamp_max(1.0)
        return torch.cat((wanted * (share @ leaves.T), desired[:, inner:]), 1)

    def placed(self, state: State, action: Tensor) -> Tensor:
        """``[B, E]``: what is ordered of feasible quantities, by the terms of :mod:`envs.inventory.terms`."""
        terms = self.task.terms
        return place(action, state, self.network.internal) if terms and terms.whole_units else action

    def step(self, state: State, action: Tensor, noise: Tensor) -> tuple[State, Tensor]:
        """One period; see the protocol and the head of this file."""
        task, first, inner = self.task, self.network.first_store, self.network.internal
        stock = state["inventory"]
        table = self._on(stock) | state
        holding, underage = table["holding"], table["underage"]
        action = self.placed(state, action)
        on_hand = stock[:, first:, 0]
        post = on_hand - noise
        left = post.clamp_min(0.0)
        missed = -underage * torch.minimum(on_hand, noise) if task.profit else underage * (-post).clamp_min(0.0)
        cost = (missed + holding[:, first:] * left).sum(1)
        if task.lost:
            post = left
        if first:
            upstream = stock[:, :first, 0]
            if inner:
                upstream = upstream - action[:, :inner] @ table["leaves"]
            cost = cost + (holding[:, :first] * upstream.clamp_min(0.0)).sum(1)
            post = torch.cat((upstream, post), 1)
        if task.edge_cost or "edge_cost" in state:
            cost = cost + (table["edge_cost"] * action).sum(1)
        if task.terms:
            usual = state["scale"].mean(1, keepdim=True)
            cost = cost + fixed_charge(action, table, torch.maximum(table["lot"], 0.5 * usual))
        if self.shelf_life:
            older, waste = expire(state["ages"], noise)
            cost = cost + task.terms.waste_cost * waste.sum(1) if task.terms else cost
            post = torch.cat((post[:, :first], post[:, first:] - waste), 1)
        if "lead_time" in state:
            lead = state["lead_time"]
            if "arrival" in state:
                # a step of a copy that has finished, which nobody reads, must not leave the table
                now = self._clock(state).clamp_max(state["arrival"].shape[1] - 1)
                lead = state["arrival"][torch.arange(len(stock), device=stock.device), now]
            entering = action[:, :, None] * (lead[:, :, None] == table["slot"])
            arriving = torch.einsum("bel,en->bnl", entering, table["into"]) if self.network.nodes > 1 else entering
            arriving = arriving + (post @ table["stays"]).view(stock.shape)
        else:
            arriving = (torch.cat((post, action), 1) @ table["enters"]).view(stock.shape)
        following = state | {"inventory": stock @ table["shift"] + arriving}
        if self.shelf_life:
            fresh = following["inventory"][:, first:, 0] - older.sum(2)
            following["ages"] = torch.cat((older[:, :, :-1], fresh[:, :, None]), 2)
        if self.recorded:
            following["past_demand"] = torch.cat((state["past_demand"][:, :, 1:], noise[:, :, None]), 2)
            following["week"] = state["week"] + 1
        return following, cost

    def stores_alone(self) -> StoresAlone | None:
        """Costs of stores without warehouses, drawn demand and no terms, of which a kernel may compute the horizon."""
        task = self.task
        more = task.by_series or task.terms or task.edge_cost or task.profit or task.earliest is not None
        if self.network.nodes > self.network.stores or self.recorded or more:
            return None
        return StoresAlone(task.holding, task.underage, task.lost)

    def _on(self, like: Tensor) -> State:
        """The constants and the routing matrices on the device and in the type of ``like``:

        ``leaves`` ``[I, F]`` is 1 where internal edge ``i`` starts at node ``f``; ``stays`` ``[N, N * L]`` is 1 at slot
        0 of a node, ``enters`` ``[N + E, N * L]`` has below it a 1 at the target node and lead-time slot of an edge;
        ``shift`` ``[L, L]`` moves what is in transit up one slot. Products with them need no index kernels, slices or
        copies, forward or backward.
        """
        key = (like.device, like.dtype)
        if key not in self._tables:
            net = self.network
            table = dict(self.static)
            leaves = torch.zeros(net.internal, net.first_store)
            leaves[torch.arange(net.internal), net.source()[: net.internal]] = 1.0
            enters = torch.zeros(len(net.edges), net.nodes, net.slots)
            enters[torch.arange(len(net.edges)), net.target(), torch.tensor(net.lead_times) - 1] = 1.0
            stays = torch.zeros(net.nodes, net.nodes, net.slots)
            stays[:, :, 0] = torch.eye(net.nodes)
            into = torch.nn.functional.one_hot(net.target(), net.nodes).float()
            shift = torch.diag(torch.ones(net.slots - 1), -1)
            table |= {"leaves": leaves, "slot": torch.arange(1.0, net.slots + 1), "into": into, "shift": shift}
            table |= {"stays": stays.flatten(1), "enters": torch.cat((stays, enters)).flatten(1)}
            if isinstance(self.task.demand, Recorded):
                known = self.task.demand.series.shape[1] + 1
                table["calendar"] = days_from_christmas(self.task.demand.first_day, known, self.task.demand.step_days)
                table["season"] = seasons(self.task.demand.first_day, known, self.task.demand.step_days)
            self._tables[key] = {name: value.to(like) for name, value in table.items()}
        return self._tables[key]


class Trace(NamedTuple):
    """All of a simulation, time first."""

    inventory: Tensor
    """``[T + 1, B, N, L]``."""
    action: Tensor
    """``[T, B, E]``."""
    demand: Tensor
    """``[T, B, K]``."""
    cost: Tensor
    """``[T, B]``."""
    seen: State
    """What a policy saw before the first period: costs and lead times of each scenario."""


Policy = Callable[[State], Tensor]
"""From an observation to feasible quantities ``[B, E]``."""


@torch.no_grad()
def simulate(env: InventoryEnv, policy: Policy, scenarios: State) -> Trace:
    """Play ``policy`` through all periods. What it asks for is made feasible by :meth:`InventoryEnv.feasible`."""
    state = env.initial(scenarios)
    inventory, actions, costs = [state["inventory"]], [], []
    demand, seen = env.noise(scenarios), env.observe(state)
    for noise in demand:
        action = env.placed(state, env.feasible(state, policy(env.observe(state))))
        state, cost = env.step(state, action, noise)
        inventory.append(state["inventory"])
        actions.append(action)
        costs.append(cost)
    return Trace(torch.stack(inventory), torch.stack(actions), demand, torch.stack(costs), seen)
