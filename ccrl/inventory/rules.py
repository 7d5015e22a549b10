"""Rules that planners use, tuned product by product: base stock, (s, S), (r, Q), a seasonal newsvendor.

A rule is a function of what policies see, with one set of parameters per product. Tuning is exhaustive (one store) or a
coordinate search (networks) on the scenarios that it is given, all products and candidates in one simulated batch.

In networks every store orders from one of its suppliers, chosen per product and store; a warehouse's position counts
the stores that order from it (echelon stock: Clark and Scarf 1960). Requests beyond the stock are cut in proportion and
not remembered.

Sources: Zipkin, "Foundations of Inventory Management", 2000, chapters 6 and 9; Axsater, "Inventory Control", 2006.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ccrl.inventory.functional_env import FunctionalEnv, Network, State
from ccrl.inventory.pathwise import Unrolled, average_cost

__all__ = ["Rule", "RuleName", "seasonal_forecast", "tune"]

RuleName = Literal["base_stock", "s_S", "r_Q", "seasonal_newsvendor", "promotion_base_stock", "promotion_s_S"]

GAPS = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
"""``S - s``; larger ones are added where orders have a fixed cost."""
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99)
LIFTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Units of usual demand that a planned promotion adds to the level."""
_LEVELS = 60
_FACTORS = torch.tensor((0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0))
_ROUNDS = 5


@dataclass(frozen=True)
class Rule:
    """Orders ``[B, E]`` of the products in ``obs["series"]``.

    A node orders when its inventory position is at most ``level - gap``: up to ``level``, or with ``lot`` that many
    units (whole multiples of them, until the position is above it). ``forecast`` adds what is expected until the order
    is followed by the next.
    """

    name: RuleName
    network: Network
    level: Tensor
    """``[S, N]``."""
    gap: Tensor
    """``[S, N]``."""
    share: Tensor
    """``[S, E]``: 1 on the edge that a node orders by, 0 on its others."""
    lot: Tensor | None = None
    """``[S, N]``, ``Q``."""
    forecast: Tensor | None = None
    """``[S, W, N]`` by week."""
    lift: Tensor | None = None
    """``[S, N]`` units per planned promotion."""

    def __call__(self, obs: State) -> Tensor:
        rows = obs["series"].long()
        level = self.level[rows]
        if self.forecast is not None:
            level = level + self.forecast[rows, obs["week"].long()]
        if self.lift is not None:
            level = level + self.lift[rows] * promotions(obs, self.network)
        wanted = level - positions(obs["inventory"], self.share[rows], self.network)
        if self.lot is None:
            order = torch.where(wanted >= self.gap[rows], wanted, 0.0).clamp_min(0.0)
        else:
            lot = self.lot[rows]
            order = torch.where(wanted >= 0.0, (torch.floor(wanted / lot) + 1.0) * lot, 0.0)
        target = self.network.target(order.device)
        return ration(order[:, target] * self.share[rows], obs["inventory"], self.network)

    def repeat(self, times: int) -> Rule:
        """The same with ``times`` candidates per product, product by product."""

        def many(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.repeat_interleave(times, 0)

        found = {k: many(getattr(self, k)) for k in ("level", "gap", "share", "lot", "forecast", "lift")}
        return replace(self, **found)  # type: ignore[arg-type]


def positions(inventory: Tensor, share: Tensor, network: Network) -> Tensor:
    """Inventory positions ``[B, N]``: on hand and on the way, of warehouses with those of the stores that order there.

    Args:
        inventory: ``[B, N, L]``.
        share: ``[B, E]``: which part of a node's orders goes by each edge.
    """
    own = inventory.sum(2)
    if not network.internal:
        return own
    inner = network.internal
    source, target = network.source(own.device)[:inner], network.target(own.device)[:inner]
    share = share[:, :inner].to(own.dtype)
    passed = share * own[:, target]
    found = own.index_add(1, source, passed)
    for _ in range(network.echelons):  # what lies below those that order from a node, too
        passed = share * torch.zeros_like(own).index_add(1, source, passed)[:, target]
        found = found.index_add(1, source, passed)
    return found


def _upwards(network: Network) -> list[tuple[int, int, int]]:
    """Number, source and target of the internal edges, those of the lowest stage first."""
    inner = [(i, *edge) for i, edge in enumerate(network.edges[: network.internal])]
    return sorted(inner, key=lambda edge: -edge[1])


def ration(wanted: Tensor, inventory: Tensor, network: Network) -> Tensor:
    """Orders ``[B, E]`` with the internal ones cut in proportion where a node has less than is asked of it."""
    inner = network.internal
    if not inner:
        return wanted
    source = network.source(wanted.device)[:inner]
    asked = wanted.new_zeros(len(wanted), network.nodes).index_add(1, source, wanted[:, :inner])
    factor = (inventory[:, :, 0].clamp_min(0.0) / (asked + 1e-10)).clamp_max(1.0)
    return torch.cat((wanted[:, :inner] * factor[:, source], wanted[:, inner:]), 1)


def promotions(obs: State, network: Network) -> Tensor:
    """``[B, N]``: the first planned feature added up over the periods until an order is followed by the next, at each
    store by its shortest lead time; at a warehouse the sum of the stores'."""
    planned, stores = obs["planned"], network.stores
    span = obs["inventory"].shape[2] + 1
    ahead = planned.view(len(planned), stores, span, -1)[..., 0]
    lead = torch.full((len(planned), stores), float(span), device=planned.device)
    for edge, (_, node) in enumerate(network.edges):
        if node >= network.first_store:
            k = node - network.first_store
            lead[:, k] = torch.minimum(lead[:, k], obs["lead_time"][:, edge])
    inside = torch.arange(span, device=planned.device) <= lead[..., None]
    store = (ahead * inside).sum(2)
    upstream = store.sum(1, keepdim=True).expand(-1, network.first_store)
    return torch.cat((upstream, store), 1)


def tune(
    name: RuleName, env: FunctionalEnv, scenarios: State, *, forecast: Tensor | None = None, fixed_cost: bool = False
) -> Rule:
    """The rule that costs least on these scenarios, product by product.

    Args:
        env: at the split whose periods are counted; its scenarios show ``series``, ``scale`` and ``lead_time``.
        scenarios: one per product, in the order of the products.
        forecast: ``[S, W, N]`` of the seasonal newsvendor, with its deviation in :func:`seasonal_forecast`.
        fixed_cost: also gaps of whole periods' demand, for (s, S).

    Raises:
        ValueError: an unknown rule, a forecast or planned promotions that are missing, the newsvendor in networks.
    """
    if name not in get_args(RuleName):
        raise ValueError(f"rule: expected one of {', '.join(get_args(RuleName))}, got {name!r}")
    planned = name.startswith("promotion")
    if planned and "features" not in scenarios:
        raise ValueError(f"{name}: expected sales with planned promotions, got none")
    scenarios = {k: v for k, v in scenarios.items() if k != "features" or planned}
    network = env.network
    seen = env.observe(env.initial(scenarios))
    usual, share, span = node_demand(seen, network)
    start = torch.ceil(1.2 * usual * span)
    rule = Rule(name, network, start, torch.zeros_like(start), share)
    largest = _largest(env, scenarios, span, network)
    steps = torch.linspace(0.0, 1.0, _LEVELS)
    levels = torch.unique_consecutive(steps) * largest.unsqueeze(-1)  # [S, N, C]
    levels = torch.where(largest.unsqueeze(-1) < _LEVELS, torch.arange(float(_LEVELS)), levels.round())
    gaps = torch.tensor(GAPS).expand(*start.shape, len(GAPS))
    if fixed_cost:
        periods = torch.tensor((1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0))
        gaps = torch.cat((gaps, (usual.unsqueeze(-1) * periods).round()), -1)
    if name == "seasonal_newsvendor":
        if network.nodes > 1:
            raise ValueError(f"seasonal_newsvendor: expected one store, got a network of {network.nodes} nodes")
        if forecast is None:
            raise ValueError("seasonal_newsvendor: expected a forecast, got none; see seasonal_forecast")
        mean, deviation = forecast.unbind(-1)
        z = torch.special.ndtri(torch.tensor(QUANTILES))
        rule = replace(rule, level=torch.zeros_like(start), forecast=mean)
        options = [mean + value * deviation for value in z.tolist()]
        return _best_forecast(env, scenarios, rule, options)
    search = _exhaustive if network.nodes == 1 else _coordinates
    searches: list[tuple[str, Tensor]] = [("level", levels)]
    if name in ("s_S", "promotion_s_S"):
        searches.append(("gap", gaps))
    if name == "r_Q":
        quantities = torch.tensor((0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 0.25))
        lots = (usual.unsqueeze(-1) * quantities).round().clamp_min(1.0)
        rule = replace(rule, lot=lots[..., 0])
        searches.append(("lot", lots))
    lifts = ("lift", usual.unsqueeze(-1) * torch.tensor(LIFTS))
    if name == "promotion_base_stock":
        rule = replace(rule, lift=torch.zeros_like(start))
        searches.append(lifts)
    rule = search(env, scenarios, rule, searches)
    if name == "promotion_s_S":  # all three at once would be too many candidates
        rule = search(env, scenarios, replace(rule, lift=torch.zeros_like(start)), [("level", levels), lifts])
    return rule


def node_demand(seen: State, network: Network) -> tuple[Tensor, Tensor, Tensor]:
    """Usual demand ``[S, N]`` that passes each node, where orders go ``[S, E]`` (by the cheapest way, the shortest of
    these), and how many periods ``[S, N]`` an order must last: the lead times down to the customer, and one."""
    count, lead = len(seen["scale"]), seen["lead_time"].float()
    share = torch.zeros(count, len(network.edges))
    span = torch.ones(count, network.nodes)
    usual = torch.cat((torch.zeros(count, network.first_store), seen["scale"].float()), 1)
    for node in range(network.nodes):
        inbound = [i for i, (_, target) in enumerate(network.edges) if target == node]
        cheapest = seen["edge_cost"].float()[:, inbound] * 1e3 + lead[:, inbound]
        chosen = torch.tensor(inbound)[cheapest.argmin(1)]
        share[torch.arange(count), chosen] = 1.0
        span[:, node] += lead[torch.arange(count), chosen]
    for edge, source, target in _upwards(network):
        usual[:, source] += share[:, edge] * usual[:, target]
    beyond = torch.zeros(count, network.nodes)  # from a node down to the customer
    for warehouse in reversed(range(network.first_store)):
        below = [i for i, (source, _) in enumerate(network.edges[: network.internal]) if source == warehouse]
        if below:
            nodes = [network.edges[i][1] for i in below]
            beyond[:, warehouse] = (lead[:, below] + beyond[:, nodes]).mean(1)
            span[:, warehouse] += beyond[:, warehouse]
            # nobody may order there at first; the search needs a size
            all_below = sum(usual[:, node] for node in nodes)
            usual[:, warehouse] = torch.where(usual[:, warehouse] > 0, usual[:, warehouse], 0.5 * all_below)
    return usual, share, span


def _largest(env: FunctionalEnv, scenarios: State, span: Tensor, network: Network) -> Tensor:
    """``[S, N]``: the largest demand below each node over its span, in the history and the periods."""
    demand = scenarios["demand"].float()  # [S, W, K]
    reach = torch.zeros(network.nodes, network.stores)
    reach[network.first_store :] = torch.eye(network.stores)
    for _, source, target in _upwards(network):
        reach[source] = torch.maximum(reach[source], reach[target])
    through = torch.cat((demand.new_zeros(len(demand), 1, network.nodes), (demand @ reach.T).cumsum(1)), 1)
    found = torch.zeros(len(demand), network.nodes)
    for length in sorted(set(span.ceil().flatten().tolist())):
        window = min(int(length), through.shape[1] - 1)
        most = (through[:, window:] - through[:, :-window]).amax(1)
        found = torch.where(span.ceil() == length, most, found)
    return found.clamp_min(1.0)


def _costs(env: FunctionalEnv, scenarios: State, rule: Rule, times: int) -> Tensor:
    """``[S, times]`` costs of the candidates in ``rule``, which holds them product by product."""
    wide = {k: v.repeat_interleave(times, 0) for k, v in scenarios.items()}
    wide["series"] = torch.arange(len(wide["demand"])).to(scenarios["series"].dtype)
    policy: Callable[[State], Tensor] = rule
    return average_cost(Unrolled(env, policy), wide).view(-1, times)


def _exhaustive(env: FunctionalEnv, scenarios: State, rule: Rule, searches: Sequence[tuple[str, Tensor]]) -> Rule:
    """Every combination of the candidates ``[S, 1, C]``, one node."""
    size = math.prod(values.shape[-1] for _, values in searches)
    index = torch.arange(size)
    many, chosen = rule.repeat(size), {}
    for name, values in searches:
        chosen[name] = values[:, :, index % values.shape[-1]]  # [S, 1, size]
        index = index // values.shape[-1]
        many = replace(many, **{name: chosen[name].permute(0, 2, 1).reshape(-1, 1)})  # type: ignore[arg-type]
    best = _costs(env, scenarios, many, size).argmin(1)
    rows = torch.arange(len(best))
    return replace(rule, **{name: values[rows, :, best] for name, values in chosen.items()})  # type: ignore[arg-type]


def _coordinates(env: FunctionalEnv, scenarios: State, rule: Rule, searches: Sequence[tuple[str, Tensor]]) -> Rule:
    """First every pair of a factor for the stores' levels and one for the warehouses'; then one node's parameter after
    the other, and the supplier of every node that has several, until nothing changes."""
    network = rule.network
    pairs = torch.cartesian_prod(_FACTORS, _FACTORS)
    upstream = torch.arange(network.nodes) < network.first_store
    factors = torch.where(upstream, pairs[:, :1], pairs[:, 1:])  # [C, N]
    wide = (rule.level[:, None] * factors).round().flatten(0, 1)
    best = _costs(env, scenarios, replace(rule.repeat(len(pairs)), level=wide), len(pairs)).argmin(1)
    rule = replace(rule, level=(rule.level * factors[best]).round())
    rows = torch.arange(len(rule.level))
    for _ in range(_ROUNDS):
        before = rule
        for node in range(network.nodes):
            inbound = [i for i, (_, target) in enumerate(network.edges) if target == node]
            if len(inbound) > 1:
                rule = _supplier(env, scenarios, rule, inbound)
            for name, values in searches:
                candidates = torch.cat((getattr(rule, name)[:, node, None], values[:, node]), 1)
                times = candidates.shape[1]
                wide = getattr(rule, name).repeat_interleave(times, 0).clone()
                wide[:, node] = candidates.flatten()
                many = replace(rule.repeat(times), **{name: wide})  # type: ignore[arg-type]
                best = _costs(env, scenarios, many, times).argmin(1)
                found = getattr(rule, name).clone()
                found[:, node] = candidates[rows, best]
                rule = replace(rule, **{name: found})  # type: ignore[arg-type]
        if all(torch.equal(getattr(before, name), getattr(rule, name)) for name in ("level", "gap", "share")):
            break
    return rule


def _supplier(env: FunctionalEnv, scenarios: State, rule: Rule, inbound: list[int]) -> Rule:
    times = len(inbound)
    wide = rule.share.repeat_interleave(times, 0).clone()
    wide[:, inbound] = torch.eye(times).repeat(len(rule.share), 1)
    best = _costs(env, scenarios, replace(rule.repeat(times), share=wide), times).argmin(1)
    found = rule.share.clone()
    found[:, inbound] = torch.eye(times)[best]
    return replace(rule, share=found)


def _best_forecast(env: FunctionalEnv, scenarios: State, rule: Rule, options: list[Tensor]) -> Rule:
    costs = []
    for option in options:
        costs.append(average_cost(Unrolled(env, replace(rule, forecast=option)), scenarios))
    best = torch.stack(costs).argmin(0)
    return replace(rule, forecast=torch.stack(options)[best, torch.arange(len(best))])


def seasonal_forecast(series: Tensor, lead_time: Tensor, fitted: int, year: int = 52, recent: int = 16) -> Tensor:
    """Mean and deviation of the demand of the next ``L + 1`` periods, ``[S, W + 1, 1, 2]``, by what was known then: the
    same periods of last year times the ratio of the last ``recent`` periods to theirs a year ago; where there is no
    such year, the mean of the last ``recent`` periods. The deviation is that of its errors in the first ``fitted``
    periods.

    Args:
        series: ``[S, W]``.
        lead_time: ``[S]``, ``L``.
    """
    count, periods = series.shape
    padded = torch.cat((series.new_zeros(count, 1), series.double().cumsum(1)), 1)

    def total(start: Tensor, stop: Tensor) -> Tensor:
        return padded.gather(1, stop.clamp(0, periods)) - padded.gather(1, start.clamp(0, periods))

    now = torch.arange(periods + 1).expand(count, -1)
    horizon = lead_time.round().long()[:, None] + 1
    back = torch.minimum(now, torch.tensor(recent))
    latest = total(now - back, now) / back.clamp_min(1)
    flat = latest * horizon
    past = total(now - year, now - year + horizon)
    then = total(now - year - back, now - year) / back.clamp_min(1)
    known = (now - year - recent >= 0) & (then > 0)
    mean = torch.where(known, past * (latest / then.clamp_min(1e-9)).clamp(0.25, 4.0), flat)
    truth = total(now, now + horizon)
    usable = (now >= recent) & (now + horizon <= fitted)
    error = torch.where(usable, mean - truth, 0.0)
    deviation = (error.square().sum(1) / usable.sum(1).clamp_min(1)).sqrt()
    return torch.stack((mean, deviation[:, None].expand_as(mean)), -1).unsqueeze(2).float()
