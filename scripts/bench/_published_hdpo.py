"""HDPO unrolled as the authors' code does it (arXiv 2306.11246, code of August 2025), for one store: what ours is timed
beside.

A data set gives a dict per scenario and a loader collates them; the simulator holds a dict of observations and replaces
its entries period by period; a shift of stock is a stack of columns, and orders are put into the flattened batch at
offset + lead time, which serves lead times that differ by scenario and store. Written from that description; settings,
network and arithmetic are those of our agent, and so are the losses (a test compares them).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ccrl.inventory.functional_env import State

__all__ = ["ScenarioSet", "Simulator", "Trainer"]


class ScenarioSet(Dataset[State]):
    """A dict per scenario: demands ``[K, T]``, initial inventories ``[K, L]``, costs and lead times ``[K]``."""

    def __init__(self, columns: State) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["demands"])

    def __getitem__(self, index: int) -> State:
        return {name: value[index] for name, value in self.columns.items()}


class Simulator:
    """One store per scenario or several, no warehouse; costs, not profits."""

    def __init__(self, lost: bool) -> None:
        self.lost = lost
        self.observation: State = {}
        self.demands = self.offset = torch.zeros(0)

    def reset(self, batch: State) -> State:
        stock = batch["initial_inventories"]
        count, stores, slots = stock.shape
        self.demands = batch["demands"]
        self.offset = torch.arange(count)[:, None] * (slots * stores) + torch.arange(stores) * slots
        self.observation = {
            "inventories": stock, "period": torch.tensor([0]), "holding": batch["holding"],
            "underage": batch["underage"], "lead_times": batch["lead_times"],
        }  # fmt: skip
        return self.observation

    def step(self, action: State) -> tuple[State, Tensor]:
        """The next observation and the cost ``[B]``."""
        seen = self.observation
        stock, demand = seen["inventories"], self.demands[:, :, int(seen["period"].item())]
        post = stock[:, :, 0] - demand
        cost = seen["underage"] * torch.clip(-post, min=0) + seen["holding"] * torch.clip(post, min=0)
        if self.lost:
            post = torch.clip(post, min=0)
        seen["inventories"] = self._moved(stock, post, action["stores"], seen["lead_times"])
        seen["period"] += 1
        return seen, cost.sum(1)

    def _moved(self, stock: Tensor, post: Tensor, orders: Tensor, lead_times: Tensor) -> Tensor:
        rest = [stock[:, :, j] for j in range(2, stock.shape[2])]
        moved = torch.stack([post + stock[:, :, 1], *rest, torch.zeros_like(orders)], dim=2)
        places = (self.offset + lead_times.long() - 1).flatten()
        return moved.put(places, orders.flatten(), accumulate=True)


class Trainer:
    """One update per batch of the loader.

    :param net: from inventories ``[B, K L]`` to orders before the softplus.
    """

    def __init__(
        self, net: nn.Module, columns: State, *, lost: bool, periods: int, batch_size: int, rate: float
    ) -> None:
        self.net, self.periods, self.simulator = net, periods, Simulator(lost)
        self.loader = DataLoader(ScenarioSet(columns), batch_size=batch_size, shuffle=True)
        self.optimiser = torch.optim.Adam(net.parameters(), lr=rate)

    def order(self, observation: State) -> State:
        """What the network orders."""
        wanted = self.net(observation["inventories"].flatten(start_dim=1))
        return {"stores": nn.functional.softplus(wanted + 1)}

    def cost(self, batch: State) -> Tensor:
        """Of all scenarios, stores and periods together."""
        observation, total = self.simulator.reset(batch), torch.zeros(())
        for _ in range(self.periods):
            action = self.order(dict(observation))
            observation, cost = self.simulator.step(action)
            total = total + cost.sum()
        return total

    def update(self, batch: State) -> float:
        """One step of Adam on the cost per scenario, period and store."""
        self.optimiser.zero_grad()
        total = self.cost(batch)
        seen = float(total.item())
        (total / batch["demands"][..., 0].numel() / self.periods).backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        return seen

    def epoch(self, after: Callable[[], bool]) -> bool:
        """Updates over all scenarios, until ``after`` an update says stop; whether it did."""
        for batch in self.loader:
            self.update(batch)
            if after():
                return True
        return False
