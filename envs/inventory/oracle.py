"""What is optimal, computed: exact average costs and bounds to measure policies against.

All costs are per period and store, in the accounting of :class:`envs.inventory.InventoryEnv`. Everything is float64.

* :func:`lost_sales_optimum`, :func:`lost_sales_policy_cost`: dynamic programming on integer states (Zipkin 2008).
* :func:`backlog_optimum`: the newsvendor over the lead time plus one period.
* :func:`serial_optimum`: the recursion of Clark and Scarf 1960.
* :func:`transshipment_bound`: the relaxation that lets allocations be negative (Federgruen and Zipkin 1984).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccrl.inventory.pathwise import Unrolled, average_cost
from envs.inventory.demand import Normal, Poisson
from envs.inventory.simulator import InventoryEnv
from envs.inventory.tasks import Task

__all__ = [
    "BaseStock",
    "Serial",
    "backlog_optimum",
    "best_base_stock",
    "lost_sales_optimum",
    "lost_sales_policy_cost",
    "oracle_cost",
    "search_base_stock",
    "serial_optimum",
    "transshipment_bound",
]

_NORMAL: Any = torch.distributions.Normal(
    torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
)


_LARGEST = 2**29
"""Numbers in the largest array of a lost-sales store: four gigabytes."""


class BaseStock(NamedTuple):
    """A base-stock policy ``order = min(max(level - inventory position, 0), cap)`` and its average cost."""

    cost: float
    level: float
    cap: float = math.inf


class Serial(NamedTuple):
    """The optimal cost of a serial system and its echelon base-stock levels per node: the most upstream stage first, as
    in the network and in ``EchelonStockPolicy.levels``."""

    cost: float
    levels: tuple[float, ...]


def _positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}")


# Lost sales, integer demand.


class _LostSales:
    """The decision process of a lost-sales store with Poisson demand. A value function is indexed by the inventory
    slots ``[x_0, x_1, ..., x_{L-1}]``; stock beyond ``top`` is cut off, orders go up to ``orders``."""

    def __init__(self, lead_time: int, underage: float, mean: float, holding: float, orders: int, top: int) -> None:
        if lead_time < 1 or orders < 1 or top < 1:
            raise ValueError(f"expected lead_time, orders and top of at least 1, got {lead_time}, {orders}, {top}")
        _positive(underage=underage, mean=mean, holding=holding)
        if (top + 1) * (orders + 1) ** lead_time > _LARGEST:
            raise ValueError(
                f"lead_time: expected at most {_LARGEST} pairs of a state and an order, got lead_time={lead_time} with "
                f"orders up to {orders} and stocks up to {top}; there is no exact cost, simulate"
            )
        self.lead_time, self.orders, self.top = lead_time, orders, top
        stock = torch.arange(top + 1, dtype=torch.float64)
        pmf = torch.exp(stock * math.log(mean) - mean - torch.lgamma(stock + 1))
        served = torch.stack([torch.minimum(stock, s) @ pmf + s * (1 - pmf.sum()) for s in stock])  # E min(s, D)
        self.cost = holding * (stock - served) + underage * (mean - served)
        # left[x, r]: chance to have r left of x; all that demand exceeds x ends at 0
        steps = (stock[:, None] - stock).long()
        self.left = torch.where(steps >= 0, pmf[steps.clamp_min(0)], 0.0)
        self.left[:, 0] += 1.0 - self.left.sum(1)

    def ahead(self, value: Tensor) -> Tensor:
        """``[x_0, ..., x_{L-1}, q]``: expected value of the successor when ``q`` is ordered."""
        size = self.top + 1
        stock = torch.arange(size)
        arrive = self.orders + 1
        columns = []
        for incoming in range(arrive):  # x_1, or the order itself at lead time 1
            shifted = value[(stock + incoming).clamp_max(self.top)].reshape(size, -1)
            columns.append((self.left @ shifted).reshape(size, *value.shape[1:]))
        return torch.stack(columns, 1)

    def solve(self, choose: Callable[[Tensor], Tensor], tolerance: float) -> tuple[float, Tensor]:
        """Relative value iteration until the bounds on the average cost are ``tolerance`` apart."""
        shape = (self.top + 1, *(self.orders + 1,) * (self.lead_time - 1))
        value = torch.zeros(shape, dtype=torch.float64)
        cost = self.cost.view(-1, *[1] * (self.lead_time - 1))
        for _ in range(100_000):
            updated = cost + choose(self.ahead(value))
            change = updated - value
            low, high = float(change.min()), float(change.max())
            value = updated - updated.flatten()[0]
            if high - low < tolerance:
                return (low + high) / 2, value
        raise RuntimeError("value iteration did not converge in 100000 sweeps; raise the tolerance")

    def positions(self) -> Tensor:
        """Inventory position of every state."""
        axes = [torch.arange(self.top + 1)] + [torch.arange(self.orders + 1)] * (self.lead_time - 1)
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).sum(0)


def lost_sales_optimum(
    lead_time: int,
    underage: float,
    mean: float = 5.0,
    holding: float = 1.0,
    *,
    orders: int | None = None,
    top: int | None = None,
    tolerance: float = 1e-6,
) -> float:
    """Optimal average cost of one store with lost sales and Poisson demand, by relative value iteration.

    Args:
        orders: largest order considered; ``None``: mean plus 2.7 standard deviations (11 at mean 5), twice the
            deviations at lead time 1, where it costs nothing.
        top: largest stock on hand; ``None``: five times the mean plus 2.4 deviations of demand in five periods (37 at
            mean 5).
        tolerance: distance of the lower and the upper bound between which the returned cost lies.

    Raises:
        ValueError: a lead time, order or stock limit below one, a mean or a cost that is not positive, or more states
            than fit (at mean 5 from lead time 7 on).
    """
    _positive(mean=mean)
    wide = 5.4 if lead_time == 1 else 2.7
    orders = round(mean + wide * mean**0.5) if orders is None else orders
    top = math.ceil(mean * 5 + 2.4 * (mean * 5) ** 0.5) if top is None else top
    process = _LostSales(lead_time, underage, mean, holding, orders, top)
    return process.solve(lambda ahead: ahead.amin(-1), tolerance)[0]


def lost_sales_policy_cost(
    lead_time: int,
    underage: float,
    level: int,
    cap: int | None = None,
    mean: float = 5.0,
    holding: float = 1.0,
    *,
    tolerance: float = 1e-5,
) -> float:
    """Exact average cost of ``order = min(max(level - position, 0), cap)`` for one store with lost sales and Poisson
    demand. Without ``cap`` orders end at mean plus 4 standard deviations: more is asked for once in 10,000 periods.

    Raises:
        ValueError: a level or a cap below one.
    """
    if level < 1 or (cap is not None and cap < 1):
        raise ValueError(f"expected a level and a cap of at least 1, got {level} and {cap}")
    orders = min(round(mean + 4 * mean**0.5) if cap is None else cap, level)
    process = _LostSales(lead_time, underage, mean, holding, orders, top=level)
    asked = (level - process.positions()).clamp(0, orders)[..., None]
    return process.solve(lambda ahead: ahead.gather(-1, asked).squeeze(-1), tolerance)[0]


def best_base_stock(
    lead_time: int, underage: float, mean: float = 5.0, holding: float = 1.0, *, capped: bool = False
) -> BaseStock:
    """The best (``capped``) base-stock policy for one store with lost sales and Poisson demand: exact costs, descent
    over neighbouring integers from the newsvendor level of the backlogged store.

    Raises:
        ValueError: a lead time below one, a mean or a cost that is not positive.
    """
    _positive(underage=underage, mean=mean, holding=holding)
    spread = math.sqrt(mean * (lead_time + 1))
    ratio = torch.tensor(underage / (underage + holding), dtype=torch.float64)
    start = round(mean * (lead_time + 1) + float(_NORMAL.icdf(ratio)) * spread - 0.5 * (lead_time - 1))
    known: dict[tuple[int, int | None], float] = {}

    def cost(point: tuple[int, int | None]) -> float:
        if point not in known:
            known[point] = lost_sales_policy_cost(lead_time, underage, *point, mean, holding)
        return known[point]

    best: tuple[int, int | None] = (max(start, 1), round(mean + 1) if capped else None)
    while True:
        level, cap = best
        caps = (None,) if cap is None else (cap, max(cap - 1, 1), cap + 1)
        around = [(max(level + step, 1), c) for c in caps for step in (0, -1, 1)]
        nearest = min(around, key=cost)
        if cost(nearest) >= cost(best):
            return BaseStock(cost(best), level, math.inf if cap is None else cap)
        best = nearest


# Demand on a grid.


class _Grid(NamedTuple):
    """Probabilities ``mass`` of the values ``(first + i) * step``."""

    mass: Tensor
    first: int
    step: float


def _normal_on_grid(mean: float, std: float, clip: bool, periods: int, step: float) -> _Grid:
    """Total demand of ``periods`` periods: each interval of width ``step`` is moved to its middle, the one below zero
    to zero if demand is clipped; the sum is a product of Fourier transforms."""
    low = 0 if clip else math.floor((mean - 9 * std) / step)
    high = math.ceil((mean + 9 * std) / step)
    edges = _NORMAL.cdf(((torch.arange(low, high, dtype=torch.float64) + 0.5) * step - mean) / std)
    whole = torch.cat((torch.zeros(1), edges, torch.ones(1))).diff()
    size = (high - low) * periods + 1
    mass = torch.fft.irfft(torch.fft.rfft(whole, 2 * size) ** periods, 2 * size)[:size].clamp_min(0.0)
    return _Grid(mass / mass.sum(), low * periods, step)


def _clipped_mean(mean: float, std: float) -> float:
    z = torch.tensor(mean / std, dtype=torch.float64)
    return float(mean * _NORMAL.cdf(z) + std * _NORMAL.log_prob(z).exp())


def _expected(values: Tensor, demand: _Grid) -> Tensor:
    """``E values(y - D)`` on the grid of ``values``, which is continued as straight lines on both sides."""
    last, back = len(demand.mass) - 1 + demand.first, demand.first
    before, after = max(last, 0), max(-back, 0)
    left = values[0] + (values[1] - values[0]) * torch.arange(-before, 0)
    right = values[-1] + (values[-1] - values[-2]) * torch.arange(1, after + 1)
    line = torch.cat((left, values, right))
    size = len(line) + len(demand.mass)
    product: Tensor = torch.fft.irfft(torch.fft.rfft(line, size) * torch.fft.rfft(demand.mass, size), size)
    start = before - demand.first
    return product[start : start + len(values)]


# Backlogged demand.


def backlog_optimum(
    lead_time: int,
    underage: float,
    mean: float = 5.0,
    std: float = 1.6,
    holding: float = 1.0,
    *,
    clip: bool = False,
    step: float = 0.005,
) -> BaseStock:
    """Optimal cost and level of one store with backlogged normal demand: the newsvendor cost of the demand of
    ``lead_time + 1`` periods. In closed form, or with ``clip`` (demand cut at zero) on a grid of width ``step``.

    Raises:
        ValueError: a lead time below one, a cost or a deviation that is not positive.
    """
    if lead_time < 1:
        raise ValueError(f"expected a lead time of at least 1, got {lead_time}")
    _positive(underage=underage, holding=holding, std=std)
    ratio = underage / (underage + holding)
    z = _NORMAL.icdf(torch.tensor(ratio, dtype=torch.float64))
    spread = std * math.sqrt(lead_time + 1)
    if not clip:
        cost = (holding + underage) * float(_NORMAL.log_prob(z).exp()) * spread
        return BaseStock(cost, mean * (lead_time + 1) + float(z) * spread)
    demand = _normal_on_grid(mean, std, True, lead_time + 1, step)
    values = (torch.arange(len(demand.mass), dtype=torch.float64) + demand.first) * step
    place = int(torch.searchsorted(demand.mass.cumsum(0), ratio))
    rest = values[place] - values
    cost = float((demand.mass * (holding * rest.clamp_min(0.0) + underage * (-rest).clamp_min(0.0))).sum())
    return BaseStock(cost, float(values[place]))


def serial_optimum(task: Task, *, step: float = 0.02) -> Serial:
    """Optimal cost of a serial system with backlogged normal demand, by the recursion of Clark and Scarf on a grid::

        C_1(y)     = E[ h max(y - D, 0) + p max(D - y, 0) ] - h' y                    D over L_1 + 1 periods
        C_{j+1}(y) = E[ C_j(min(S_j, y - D)) ] + (h_{j+1} - h_{j+1}') y                D over L_{j+1} periods

    with ``y`` the echelon inventory position after ordering, ``S_j = argmin C_j`` and ``h'`` the holding cost one stage
    up (0 above the last). Stage ``j`` has ``y_j - D - y_{j-1}`` on hand, ``D`` over ``L_j`` periods; the recursion
    leaves out that demand, so ``E[D] sum_j h_j L_j`` over the stages above the store is taken off the minimum. Nothing
    in transit costs anything.

    Raises:
        ValueError: a task that is no serial system with backlogged normal demand clipped at zero.
    """
    net, demand = task.network, task.demand
    chain = (*((i, i + 1) for i in range(net.nodes - 1)), (-1, 0))
    if net.edges != chain or task.lost or not isinstance(demand, Normal) or not demand.clip or any(task.edge_cost):
        raise ValueError(
            f"{task.name}: expected nodes in a row with backlogged normal demand clipped at zero and no edge cost"
        )
    # From the store upwards: lead time into the stage, its holding cost, the next one's.
    leads = [*reversed(net.lead_times[:-1]), net.lead_times[-1]]
    holding = [*reversed(task.holding), 0.0]
    mean, std, average = demand.mean[0], demand.std[0], _clipped_mean(demand.mean[0], demand.std[0])
    horizon = sum(leads) + 1
    far = mean * horizon + 8 * std * math.sqrt(horizon)
    y = torch.arange(-math.ceil(far / step), math.ceil(far / step) + 1, dtype=torch.float64) * step
    value = holding[0] * y.clamp_min(0.0) + task.underage[0] * (-y).clamp_min(0.0)
    levels: list[float] = []
    for stage, lead in enumerate(leads):
        value = _expected(value, _normal_on_grid(mean, std, True, lead + (stage == 0), step))
        value = value + ((holding[stage] if stage else 0.0) - holding[stage + 1]) * y
        lowest = int(value.argmin())
        levels.append(float(y[lowest]))
        optimum = float(value[lowest])
        value = torch.cat((value[:lowest], value[lowest].expand(len(y) - lowest)))
    counted = average * sum(h * lead for h, lead in zip(holding[1:-1], leads[1:], strict=True))
    return Serial(optimum - counted, tuple(reversed(levels)))


def transshipment_bound(task: Task) -> float:
    """Lower bound on the cost per store of allocating from a warehouse without stock: the stores pooled, as if
    allocations could be negative::

        (h + p) phi(z) sqrt( L_w Var(D_total) + (L_s + 1) (sum_k sigma_k)^2 )

    Raises:
        ValueError: a task whose stores differ in lead time or costs, or that is no such network.
    """
    net, demand = task.network, task.demand
    fan = (*((0, k) for k in range(1, net.stores + 1)), (-1, 0))
    fits = net.edges == fan and not net.keeps_stock and not task.lost and not any(task.edge_cost)
    leads, costs = set(net.lead_times[: net.stores]), set(zip(task.holding[-net.stores :], task.underage, strict=True))
    if not fits or len(leads) > 1 or len(costs) > 1 or not isinstance(demand, Normal) or demand.clip:
        raise ValueError(
            f"{task.name}: expected a warehouse without stock, backlogged unclipped normal demand and stores with "
            "equal lead times and costs, orders free"
        )
    std, lead, (holding, underage) = torch.tensor(demand.std, dtype=torch.float64), leads.pop(), costs.pop()
    pooled = float(std.sum() ** 2)
    variance = demand.correlation * pooled + (1 - demand.correlation) * float((std**2).sum())
    spread = math.sqrt(net.lead_times[-1] * variance + (lead + 1) * pooled)
    z = _NORMAL.icdf(torch.tensor(underage / (underage + holding), dtype=torch.float64))
    return (holding + underage) * float(_NORMAL.log_prob(z).exp()) * spread / net.stores


# For any task.


def oracle_cost(task: Task) -> float | None:
    """The optimal cost per period and store of a task, its lower bound for transshipment, ``None`` where neither is
    known."""
    net, demand, store = task.network, task.demand, task.network.nodes == 1
    if task.profit or any(task.edge_cost):
        return None
    known = task.underage[0], demand.mean[0]
    try:
        if store and task.lost and isinstance(demand, Poisson):
            return lost_sales_optimum(net.slots, *known, task.holding[0])
        if store and not task.lost and isinstance(demand, Normal):
            return backlog_optimum(net.slots, *known, demand.std[0], task.holding[0], clip=demand.clip).cost
        return serial_optimum(task).cost if net.keeps_stock else transshipment_bound(task)
    except ValueError:  # another network, law of demand or costs
        return None


def search_base_stock(
    env: InventoryEnv, scenarios: dict[str, Tensor], levels: Tensor, caps: Tensor | None = None
) -> BaseStock:
    """The best (capped) base-stock policy of a one-store task on these scenarios, by trying every level with every cap:
    for tasks without an exact cost, such as recorded demand.

    Raises:
        ValueError: a network of more than one store.
    """
    if env.network.nodes > 1:
        raise ValueError(f"{env.task.name}: expected a network of one store, got {env.network.nodes} nodes")
    best = BaseStock(math.inf, math.nan)
    for level in levels.tolist():
        for cap in [math.inf] if caps is None else caps.tolist():

            def order(seen: dict[str, Tensor], level: float = level, cap: float = cap) -> Tensor:
                return (level - seen["inventory"].sum(2)).clamp(0.0, cap)

            best = min(best, BaseStock(float(average_cost(Unrolled(env, order), scenarios).mean()), level, cap))
    return best
