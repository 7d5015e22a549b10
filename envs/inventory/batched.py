"""Inventory networks as a :class:`ccrl.batched_env.BatchedEnv`, for agents that do not differentiate the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ccrl.batched_env import AutoresetMode, StepResult, as_autoreset_mode
from ccrl.inventory.functional_env import Network, Split, State
from ccrl.seeding import restore_generator, stream_seed
from ccrl.settings import Count, checked
from envs.inventory.demand import Recorded
from envs.inventory.simulator import InventoryEnv
from envs.inventory.tasks import Task, make_task

__all__ = ["InventoryVector"]

TERMS = ("holding", "underage", "edge_cost", "lead_time", "fixed_cost", "minimum", "lot", "capacity")
"""Constants of a product that an agent is shown where products differ in them."""


class InventoryVector:
    """``num_envs`` copies of an inventory task.

    * Observation ``[N, D]`` float32: node by node the slots of its inventory (as many as its longest lead time). Where
      demand is recorded also the past demand of each store, the days from Christmas over 182, and the price and the
      lead time if they differ by series. Of demand of one's own (``own_demand``) stocks and past demand are in units
      of the product's usual demand, and in place of the last two: the log of that unit, the season, costs, lead times
      and terms that differ from product to product, and what is planned (promotions, prices) for this period and those
      that an order of it will meet.
    * Action ``[N, E]`` in [-1, 1], one per edge of the network: the desired quantity is ``flow (a + 1)^2``, where
      ``flow`` is the mean flow of the edge if every node spread its orders evenly over its suppliers: 0 asks for the
      mean, 1 for four times as much. Where demand is recorded, the mean is that of the observed past (plus a tenth of
      the mean of all series). What cannot be shipped shrinks, see :meth:`InventoryEnv.feasible`.
    * Reward: minus the cost of the period per store. The horizon is a time limit: truncation, never termination.

    In ``DISABLED`` mode a finished copy stays as it is: ``step`` repeats its last observation and flags with reward 0
    until ``reset(mask=...)``.

    Args:
        task: a name of :data:`envs.inventory.TASKS`, or a task.
        num_envs: number of copies ``N``.
        device: where the simulation runs. Scenarios are drawn on the CPU, the same on every device.
        autoreset_mode: see :class:`ccrl.batched_env.BatchedEnv`.
        split: whose horizon and weeks.
        max_episode_steps: another horizon.
        id: how messages call it; ``None`` is the name of the task.
        task_options: of the task's function, if ``task`` is a name.

    Raises:
        ValueError: no copy, an unknown task or split, a horizon below one.
        TypeError: options for a task that is already built.
    """

    @checked
    def __init__(
        self,
        task: str | Task,
        num_envs: Count = 1,
        *,
        device: torch.device | str = "cpu",
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        split: Split = "train",
        max_episode_steps: Count | None = None,
        id: str | None = None,
        **task_options: Any,
    ) -> None:
        if isinstance(task, Task) and task_options:
            raise TypeError(f"{task.name} is built already; expected no options, got {sorted(task_options)}")
        built = task if isinstance(task, Task) else make_task(task, **task_options)
        self.env = InventoryEnv(built, split, periods=max_episode_steps)
        self.id, self._periods = id or built.name, max_episode_steps
        self.max_episode_steps = self.env.periods
        self.num_envs, self.device = num_envs, torch.device(device)
        self.autoreset_mode = as_autoreset_mode(autoreset_mode, where=self.id)
        self.provides_final_obs = self.autoreset_mode == AutoresetMode.SAME_STEP
        net = built.network
        columns = [node * net.slots + slot for node in range(net.nodes) for slot in range(net.node_slots[node])]
        self._columns = torch.tensor(columns, device=self.device)
        self._flow = mean_flow(net).to(self.device)
        self._mean = torch.tensor(built.demand.mean, device=self.device)
        self._recorded = isinstance(built.demand, Recorded)
        self._differs = tuple(k for k, v in built.by_series.items() if k in TERMS and bool((v != v[:1]).any()))
        if built.by_series and (built.vary_lead_time or built.earliest is not None):
            self._differs = tuple(dict.fromkeys((*self._differs, "lead_time")))
        self._never = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
        self._generator = torch.Generator()
        self._generator.seed()
        self._pool: State = {}
        # what is random beside recorded demand is drawn in every episode, from the stream that a seed decides
        if self.env.available and built.earliest is None and not built.random_stock:
            self._pool = self.env.sample(self.env.available, self._generator, device=self.device)
        self._state: State = {}
        # The clocks live on the host: all that ends an episode is time, so no step waits for the device.
        self._clock = np.zeros(num_envs, dtype=np.int64)
        size = self._observe(self.env.initial(self._scenarios())).shape[1]
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.single_action_space = spaces.Box(-1.0, 1.0, (len(net.edges),), np.float32)

    def held_out(self, split: Split) -> InventoryVector:
        """Copies on the weeks of ``split``, where demand is recorded; elsewhere these: demand is drawn anew anyway.

        Raises:
            ValueError: ``max_episode_steps`` is more than the weeks of that split.
        """
        if not self._recorded:
            return self
        task, options = self.env.task, {"device": self.device, "autoreset_mode": self.autoreset_mode}
        periods = self.env.split(split).periods if self._periods is None else self._periods
        return InventoryVector(task, self.num_envs, split=split, max_episode_steps=periods, id=self.id, **options)

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tensor:
        """Start episodes everywhere, or where ``mask`` ``[N]`` bool is set. Returns ``[N, D]``.

        Raises:
            ValueError: ``mask`` of another shape or type, or given at the very first reset.
        """
        if mask is not None and (mask.shape != (self.num_envs,) or mask.dtype != torch.bool or not self._state):
            raise ValueError(
                f"{self.id}: mask must be bool of shape ({self.num_envs},), and not at the first reset; got "
                f"{mask.dtype} of shape {tuple(mask.shape)}"
            )
        if seed is not None:
            self._generator.manual_seed(stream_seed(seed, "scenarios"))
        self._start(np.ones(self.num_envs, dtype=bool) if mask is None else mask.cpu().numpy())
        return self._observe(self._state)

    def step(self, action: Tensor) -> StepResult:
        """One period of every copy.

        Raises:
            ValueError: actions of another shape or kind.
            RuntimeError: no reset yet.
        """
        shape = (self.num_envs, *self.single_action_space.shape)
        if action.shape != shape or not action.is_floating_point():
            raise ValueError(
                f"{self.id}: expected floating-point actions of shape {shape}, got {action.dtype} of shape "
                f"{tuple(action.shape)}"
            )
        if not self._state:
            raise RuntimeError(f"{self.id}: call reset() before step()")
        over = self._clock >= self.env.periods
        clock = torch.from_numpy(np.minimum(self._clock, self.env.periods - 1)).to(self.device)
        demand = self._demand[clock, self._rows]
        with torch.no_grad():
            shipped = self.env.feasible(self._state, self._desired(action.detach().float()))
            state, cost = self.env.step(self._state, shipped, demand)
        reward = cost / -self.env.network.stores
        if over.any():
            reward = torch.where(self._mask(over), 0.0, reward)
            state = _merge(self._mask(over), self._state, state)
        self._state = state
        self._clock = np.where(over, self._clock, self._clock + 1)
        if self.autoreset_mode == AutoresetMode.NEXT_STEP and over.any():
            self._start(over)
        done = self._clock >= self.env.periods
        truncated = self._mask(done) if done.any() else self._never
        obs = self._observe(self._state)
        if self.autoreset_mode != AutoresetMode.SAME_STEP:
            return StepResult(obs, reward, self._never, truncated)
        final = obs
        if done.any():
            self._start(done)
            obs = self._observe(self._state)
        return StepResult(obs, reward, self._never, truncated, final)

    def close(self) -> None:
        """Nothing to release."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future, as tensors.

        Raises:
            RuntimeError: no reset yet.
        """
        if not self._state:
            raise RuntimeError(f"{self.id}: there is no state before the first reset()")
        return {
            "state": {name: value.clone() for name, value in self._state.items()},
            "demand": self._demand.clone(),
            "clock": torch.from_numpy(self._clock.copy()),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of an environment of the same task, size and horizon.

        Raises:
            ValueError: another number of copies, network or horizon.
        """
        net = self.env.network
        expected = [(self.num_envs, net.nodes, net.slots), (self.env.periods, self.num_envs, net.stores)]
        got = [tuple(values["state"]["inventory"].shape), tuple(values["demand"].shape)]
        if got != expected:
            raise ValueError(f"{self.id}: expected inventory and demand of shapes {expected}, got {got}")
        self._state = {name: value.to(self.device, copy=True) for name, value in values["state"].items()}
        self._demand = values["demand"].to(self.device, copy=True)
        self._clock = values["clock"].cpu().numpy().copy()
        self._rows = torch.arange(self.num_envs, device=self.device)
        restore_generator(self._generator, values["generator"])

    def _scenarios(self) -> State:
        if not self.env.available:
            return self.env.sample(self.num_envs, self._generator, device=self.device)
        rows = torch.randint(self.env.available, (self.num_envs,), generator=self._generator)
        if not self._pool:
            return self.env.draw(rows, self._generator, device=self.device)
        rows = rows.to(self.device)
        return {name: value[rows] for name, value in self._pool.items()}

    def _start(self, chosen: np.ndarray) -> None:
        """New episodes where ``chosen`` ``[N]``. Scenarios are drawn for all copies, whichever are used, so that the
        random stream does not depend on who ended."""
        scenarios = self._scenarios()
        state, demand = self.env.initial(scenarios), self.env.noise(scenarios)
        if self._state:
            mask = self._mask(chosen)
            state = _merge(mask, state, self._state)
            demand = torch.where(mask[:, None], demand, self._demand)
        self._state, self._demand = state, demand
        self._rows = torch.arange(self.num_envs, device=self.device)
        self._clock = np.where(chosen, 0, self._clock)

    def _desired(self, action: Tensor) -> Tensor:
        mean = self._mean
        if self._recorded:
            mean = self._state["past_demand"].mean(2) + 0.1 * mean
        return mean @ self._flow * (action.clamp(-1.0, 1.0) + 1.0).square()

    def _observe(self, state: State) -> Tensor:
        parts = [state["inventory"].flatten(1)[:, self._columns]]
        if "scale" in state:
            return self._observe_own(state, parts[0])
        if self._recorded:
            parts += [state["past_demand"].flatten(1), self.env.observe(state)["days_from_christmas"] / 182.0]
            parts += [state[name] for name in ("underage", "lead_time") if name in state]
        return torch.cat(parts, 1)

    def _observe_own(self, state: State, inventory: Tensor) -> Tensor:
        """See the class; amounts of an order in the same unit, a capacity as 1 / (1 + it), which is 0 for none."""
        seen, unit = self.env.observe(state), state["scale"].mean(1, keepdim=True)
        parts = [inventory / unit, state["past_demand"].flatten(1) / unit, seen["days_from_christmas"] / 182.0]
        parts += [(0.1 + unit).log(), seen["season"]]
        for name in self._differs:
            value = state[name]
            if name in ("minimum", "lot", "capacity"):
                value = value / unit
            parts.append(1.0 / (1.0 + value) if name == "capacity" else value)
        if "ages" in seen:
            parts.append((seen["ages"] / unit[:, :, None]).flatten(1))
        if "planned" in seen:
            parts.append(seen["planned"].flatten(1))
        return torch.cat([part.to(inventory.dtype) for part in parts], 1)

    def _mask(self, host: np.ndarray) -> Tensor:
        return torch.from_numpy(host).to(self.device)


def mean_flow(network: Network) -> Tensor:
    """``[K, E]``: units that pass each edge per unit of demand at each store, if every node spreads its orders evenly
    over its suppliers."""
    source, target = network.source(), network.target()
    suppliers = torch.bincount(target, minlength=network.nodes)
    passing = torch.zeros(network.nodes, network.stores)
    stores = torch.eye(network.stores)
    flow = torch.zeros(len(source), network.stores)
    for _ in range(network.nodes):  # one pass per stage would do; a network has at most as many stages as nodes
        passing[network.first_store :] = stores
        flow = (passing / suppliers[:, None])[target]
        passing = torch.zeros_like(passing)
        passing.index_add_(0, source[: network.internal], flow[: network.internal])
    return flow.T.contiguous()


def _merge(mask: Tensor, chosen: State, other: State) -> State:
    return {
        name: torch.where(mask.view(-1, *[1] * (value.dim() - 1)), value, other[name]) for name, value in chosen.items()
    }
