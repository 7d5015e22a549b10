"""Pathwise gradients: the simulator, unrolled, is the policy's forward pass, and its cost the loss.

    J(theta) = E 1/T sum_t c_t(xi, theta),   descended by backpropagation through all T transitions

No likelihood, no advantage, no truncation and no detach: a batch is a set of scenarios ``xi`` (initial state, demand,
constants), and :class:`Unrolled` evaluates ``cost [T, B]`` on it, as other policies evaluate ``log_prob``.

Source: HDPO, arXiv 2306.11246, equation 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.collect import EpisodeStats, Request
from ccrl.data import Data, Unit
from ccrl.estimators.terms import Aggregate, LogRatio, Outputs, Term
from ccrl.inventory.functional_env import FunctionalEnv, State
from ccrl.inventory.stores import StoresKernel
from ccrl.updaters.check import unequal

__all__ = ["OrderModule", "Scenarios", "Unrolled", "average_cost", "cost_term", "per_period_and_store", "scenario_data"]


class OrderModule(Protocol):
    """What is differentiated: observations ``[B, ...]`` to feasible quantities ``[B, E]``. With ``foresight > 0`` (an
    oracle) the observations hold ``future_demand`` ``[B, K, foresight]`` from the present period on."""

    foresight: int

    def __call__(self, obs: State) -> Tensor: ...


class Unrolled(nn.Module):
    """A policy in its simulator, over a whole horizon.

    :param env: the simulator, at the split whose horizon is unrolled.
    :param policy: an :class:`OrderModule`, or a function without parameters from observations to feasible quantities.
    :param compile_period: compile one period (policy and simulator) and call it ``T`` times. Only under gradients:
        evaluation has other batch sizes, and each would compile once more.
    :param kernel: what computes the cost under gradients in its place; its first gradient is compared with this one's.
    """

    unit: Unit = "sequence"

    def __init__(
        self,
        env: FunctionalEnv,
        policy: nn.Module | Callable[[State], Tensor],
        *,
        compile_period: bool = False,
        kernel: StoresKernel | None = None,
    ) -> None:
        super().__init__()
        self.env, self.policy = env, policy
        self.foresight = int(getattr(policy, "foresight", 0))
        self._kernel, self._checked = kernel, False
        self._compiled: Callable[..., tuple[State, Tensor]] | None = None
        if compile_period:
            self._compiled = torch.compile(self.period, dynamic=False)

    def period(self, state: State, demand: Tensor, future: Tensor | None) -> tuple[State, Tensor]:
        """One period: the next state and the cost ``[B]``."""
        obs = self.env.observe(state)
        if future is not None:
            obs = obs | {"future_demand": future}
        action: Tensor = self.policy(obs)
        return self.env.step(state, action, demand)

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        """``{"cost": [T, B]}``, summed over nodes and edges, with the whole horizon's graph attached."""
        scenarios: State = {k: batch[k] for k in sorted(batch.sequence & batch.keys())}
        if self._kernel is not None and torch.is_grad_enabled():
            if not self._checked:
                self._check(self._kernel, scenarios)
                self._checked = True
            return {"cost": self._kernel(scenarios)}
        return {"cost": self._unroll(scenarios)}

    def _check(self, kernel: StoresKernel, scenarios: State) -> None:
        """:raises RuntimeError: if the kernel's gradient on the first scenarios is not the eager one."""
        few = {k: v[:32] for k, v in scenarios.items()}
        named = {k: p for k, p in self.named_parameters() if p.requires_grad}
        got, expected = (
            dict(zip(named, torch.autograd.grad(cost.mean(), list(named.values()))))
            for cost in (kernel(few), self._unroll(few))
        )
        floor = torch.stack([g.norm() for g in expected.values()]).norm() * 1e-6
        if wrong := unequal(got, expected, dict.fromkeys(expected, floor), 0.0, lambda moved: expected):
            raise RuntimeError(
                f"compile='kernel': its gradient of {', '.join(wrong)} is not the eager one: the environment does more "
                "than its stores_alone() says, or the compiler is at fault; train with compile='off'"
            )

    def _unroll(self, scenarios: State) -> Tensor:
        demand = self.env.noise(scenarios)
        state, costs = self.env.initial(scenarios), []
        period = self._compiled if self._compiled is not None and torch.is_grad_enabled() else self.period
        for t, now in enumerate(demand.unbind()):
            state, cost = period(state, now, self.future(demand, t))
            costs.append(cost)
        return torch.stack(costs)

    def future(self, demand: Tensor, t: int) -> Tensor | None:
        """What an oracle sees at ``t``, ``[B, K, foresight]``; 0 beyond the horizon."""
        if not self.foresight:
            return None
        ahead = demand[t : t + self.foresight].permute(1, 2, 0)
        return F.pad(ahead, (0, self.foresight - ahead.shape[2]))

    def outputs(self) -> frozenset[str]:
        """Names that ``forward`` computes."""
        return frozenset({"cost"})


def scenario_data(env: FunctionalEnv, scenarios: State) -> Data:
    """Scenarios as per-sequence columns, all periods valid: sequences for ``Batching(unit="sequence")``."""
    demand = scenarios["demand"]
    # a view of one number: a column of ones for every scenario and period would be as large as the demand
    valid = demand.new_ones(()).expand(env.periods, demand.shape[0])
    names = frozenset(scenarios)
    return Data({**scenarios, "valid": valid}, raw=names | {"valid"}, sequence=names)


class Scenarios:
    """A fixed set of scenarios as a source of rollouts: every iteration trains on all of them."""

    def __init__(self, data: Data, periods: int) -> None:
        self.data, self.periods, self.clock = data, periods, 0
        self.stats = EpisodeStats(torch.zeros(0), torch.zeros(0))
        self.log: dict[str, Any] = {}
        self.env_seconds = 0.0

    def collect(self, request: Request, policy: Any) -> Data:
        """All scenarios; the clock counts their periods."""
        self.clock += self.data.shape[1] * self.periods
        return self.data

    def state_dict(self) -> dict[str, Any]:
        """The scenarios are drawn again from the seed."""
        return {"clock": self.clock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clock = state["clock"]


def per_period_and_store(stores: int) -> Aggregate:
    """Mean over scenarios, periods and stores: ``1 / (B T K)``, the cost of all locations shared among the stores."""

    def weights(valid: Tensor, batch: Data) -> Tensor:
        return valid / (batch["n_sequences"] * (valid.shape[0] * stores))

    return weights


def cost_term(stores: int) -> Term:
    """The training loss: mean cost per period and store, all periods, warm-up included."""

    def cost(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        return outputs["cost"]

    return Term("cost", cost, per_period_and_store(stores), want=frozenset({"cost"}), advantage=None)


@torch.no_grad()
def average_cost(
    unrolled: Unrolled, scenarios: State, *, whole_units: bool = False, ignore: int | None = None, chunk: int = 4096
) -> Tensor:
    """Cost per period and store of each scenario, ``[B]`` float64, over the periods ``t >= ignore``.

    :param ignore: periods of warm-up; None: those of the simulator.
    :param whole_units: round orders to integers (an integer demand is served by integer stock), never above the stock.
    :param chunk: scenarios simulated together.
    """
    env, found = unrolled.env, []
    ignore = env.ignore if ignore is None else ignore
    count = scenarios["demand"].shape[0]
    for first in range(0, count, chunk):
        part: State = {k: v[first : first + chunk] for k, v in scenarios.items()}
        demand = env.noise(part)
        state = env.initial(part)
        total = torch.zeros(demand.shape[1], dtype=torch.float64, device=demand.device)
        for t, now in enumerate(demand.unbind()):
            obs, future = env.observe(state), unrolled.future(demand, t)
            action: Tensor = unrolled.policy(obs if future is None else obs | {"future_demand": future})
            if whole_units:
                action = env.feasible(state, action.round())
            state, cost = env.step(state, action, now)
            if t >= ignore:
                total += cost
        found.append(total / ((env.periods - ignore) * env.network.stores))
    return torch.cat(found)
