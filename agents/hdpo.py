"""HDPO: Hindsight Differentiable Policy Optimization on inventory networks (Alvo, Russo, Kanoria, Lee 2023, arXiv
2306.11246).

The simulator is known and differentiable, and demand is not controlled: a sampled or recorded trace can be replayed
under any policy, and the cost of the whole horizon differentiated with respect to the parameters.

    J(theta) = E_xi 1/T sum_t c_t(xi, theta),     s_{t+1} = f(s_t, pi_theta(o_t), D_t)
    loss     = 1/(B T K) sum over scenarios, periods and locations of the cost;   no detach, no truncation

Scenarios are drawn once. Every epoch shuffles them into minibatches, one Adam step each; every ``dev_every`` epochs the
policy is scored on development scenarios (periods after a warm-up), the best parameters are kept, and training ends
after ``patience`` epochs without a better score. What acts and is evaluated is the policy with the best parameters.

Slots: plan = nothing (scenarios, no rollouts); evaluation = the unrolled simulator; loss = its cost; aggregate = mean
over scenarios, periods and stores. The clock counts scenario periods.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from agents.base import Agent
from ccrl.adapters.spaces import numpy_act
from ccrl.batched_env import BatchedEnv, Tree
from ccrl.data import Batching, Data
from ccrl.estimators.base import Context, Estimator, Phase, run_phases
from ccrl.experiment.callbacks import Callback, FunctionCallback, as_callback
from ccrl.experiment.evaluation import EvalResult
from ccrl.inventory.base_stock import BaseStockPolicy, CappedBaseStockPolicy, EchelonStockPolicy, JustInTimePolicy
from ccrl.inventory.functional_env import FunctionalEnv, Network, Split, State, resolve_functional_env
from ccrl.inventory.newsvendor import NewsvendorPolicy, demand_windows, fit_forecaster
from ccrl.inventory.pathwise import Unrolled, average_cost, cost_term, scenario_data
from ccrl.inventory.policies import DataDrivenPolicy, GNNPolicy, OrderPolicy, SymmetryAwarePolicy, VanillaPolicy
from ccrl.settings import Count, Positive, Settings
from ccrl.updaters import ModuleUpdater, Stats, can_compile, linear_decay

__all__ = ["HDPO", "HDPOConfig"]

COMPILED = {
    "period": "one period is compiled: half a minute at the first update, a fifth faster after it on a CPU",
    "horizon": "the whole horizon is compiled as ONE graph: minutes at the first update (190 s measured at 50 "
    "periods), about three times as fast as eager after it",
}


PolicyName = Literal[
    "vanilla", "data_driven", "gnn", "symmetry_aware", "base_stock", "capped_base_stock", "echelon_stock",
    "just_in_time", "quantile_nv", "transformed_nv", "fixed_quantile", "returns_nv",
]  # fmt: skip
"""The keys of ``_POLICIES``."""


@dataclass(frozen=True)
class HDPOConfig(Settings):
    """Defaults: the vanilla network, 8,192 traces in batches of 512."""

    policy: PolicyName = "vanilla"
    """The policy is a network (vanilla, gnn, symmetry_aware, data_driven), a base-stock rule (base_stock,
    capped_base_stock, echelon_stock), a newsvendor on a forecast (quantile_nv, transformed_nv, fixed_quantile;
    returns_nv sends stock back and is inadmissible), or just_in_time, which sees the future."""
    n_train: Count = 8192
    """There are this many training scenarios (of recorded demand: the first series)."""
    n_dev: Count = 2048
    """There are this many development scenarios, others than those (of recorded demand: the same series, later on)."""
    batch_size: Count = 512
    """An update differentiates through this many scenarios."""
    microbatch: Count | None = None
    """A backward pass takes this many scenarios, to save memory; the gradients add up exactly."""
    learning_rate: Positive | None = None
    """This is Adam's step size; None takes the published one of this policy and network."""
    anneal_lr: bool = False
    """The step size falls linearly to 0 over the epochs of ``learn``'s total."""
    max_grad_norm: Positive | None = None
    """Gradients are scaled down to this global norm; None is 1 for the GNN (its first orders cost thousands) and no
    clipping otherwise."""
    hidden: tuple[Count, ...] | None = None
    """vanilla and data_driven: these are the widths of the hidden layers; None takes the published ones."""
    rounds: Count | None = None
    """gnn: there are this many rounds of message passing; None takes one more than there are extra echelons."""
    dev_every: Count = 10
    """Every this many epochs the development scenarios are scored."""
    patience: Count = 500
    """Training ends after this many epochs without a better score."""
    whole_units: bool = False
    """Orders are rounded to integers in scores and evaluations (Poisson demand), never in training."""
    forecaster_steps: Count = 2000
    """Quantile policies take this many steps on the pinball loss before training."""
    compile: Literal["off", "period", "horizon"] = "off"
    """One period is compiled (half a minute), or the whole horizon (minutes), or nothing (off)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "rounds"):
            takers = [policy for policy, (_, _, settings) in _POLICIES.items() if name in settings]
            if getattr(self, name) is not None and self.policy not in takers:
                raise ValueError(
                    f"{name}: expected None with policy {self.policy!r}, got {getattr(self, name)}; it is a setting of "
                    f"{', '.join(takers)}"
                )
        if self.compile != "off" and self.microbatch is not None:
            raise ValueError("microbatch: expected None with compile (one shape, one graph); leave one of them out")


_POLICIES: dict[PolicyName, tuple[Callable[..., OrderPolicy], float | None, tuple[str, ...]]] = {
    "vanilla": (VanillaPolicy, None, ("hidden",)),
    "data_driven": (DataDrivenPolicy, 3e-3, ("hidden",)),
    "gnn": (GNNPolicy, 1e-3, ("rounds",)),
    "symmetry_aware": (SymmetryAwarePolicy, 1e-3, ()),
    "base_stock": (BaseStockPolicy, 0.5, ()),
    "capped_base_stock": (CappedBaseStockPolicy, 1.0, ()),
    "echelon_stock": (EchelonStockPolicy, 0.5, ()),
    "just_in_time": (JustInTimePolicy, 1.0, ()),
    "quantile_nv": (partial(NewsvendorPolicy, rule="quantile_nv"), 3e-2, ()),
    "transformed_nv": (partial(NewsvendorPolicy, rule="transformed_nv"), 3e-2, ()),
    "fixed_quantile": (partial(NewsvendorPolicy, rule="fixed_quantile"), 3e-2, ()),
    "returns_nv": (partial(NewsvendorPolicy, rule="returns_nv"), 3e-2, ()),
}
"""Name -> constructor, published learning rate, settings that it takes."""


def published_rate(policy: str, network: Network) -> float:
    """Adam's step size as published; the vanilla network's depends on what it controls."""
    rate = _POLICIES[policy][1]
    if rate is not None:
        return rate
    if not network.internal:
        return 3e-3
    if network.echelons:
        return 1e-2
    return 3e-4 if network.keeps_stock else 1e-4


class PathwiseEstimator(Estimator):
    """One phase: descend the unrolled cost. Nothing to plan, nothing to prepare."""

    fitted: Tensor

    def __init__(self, config: HDPOConfig, unrolled: Unrolled, updater: ModuleUpdater | None) -> None:
        super().__init__()
        policy = unrolled.policy
        self._forecast = None  # a function: holding the policy would save it twice
        if isinstance(policy, NewsvendorPolicy):
            self._forecast = partial(_fit, unrolled.env, policy, config.forecaster_steps)
        self.register_buffer("fitted", torch.tensor(self._forecast is None))
        batching = Batching("sequence", config.batch_size, microbatch=config.microbatch)
        terms = (cost_term(unrolled.env.network.stores),)
        self._phases = () if updater is None else (Phase("policy", terms, batching, updater),)

    def phases(self) -> tuple[Phase, ...]:
        return self._phases

    def fit(self, have: dict[str, Data], ctx: Context) -> Stats:
        """Once, before the first update: the forecaster of quantile policies."""
        if self._forecast is None or bool(self.fitted):
            return {}
        self.fitted.fill_(True)
        return {"pinball_loss": self._forecast(have["on"], ctx.generator)}


def _fit(env: FunctionalEnv, policy: NewsvendorPolicy, steps: int, data: Data, generator: torch.Generator) -> Tensor:
    scenarios: State = {k: data[k] for k in data.sequence}
    windows = demand_windows(env, scenarios, policy.forecaster.leads)
    return fit_forecaster(policy.forecaster, windows, steps, generator)


class HDPO(Agent):
    """Hindsight Differentiable Policy Optimization.

    :param env: an inventory id (``"ccrl/InventoryOneStoreLost-v0"``, options in ``env_kwargs``) or a ``FunctionalEnv``.
    """

    name = "hdpo"
    paper = "Alvo, Russo, Kanoria, Lee 2023, arXiv 2306.11246"
    Config = HDPOConfig

    def __init__(
        self,
        env: str | FunctionalEnv,
        config: HDPOConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        env_kwargs: dict[str, Any] | None = None,
    ) -> None:
        config = HDPOConfig() if config is None else config
        if not isinstance(config, HDPOConfig):
            raise TypeError(f"config: expected HDPOConfig, got {type(config).__name__}")
        self.config, self.seed, self.env_kwargs = config, seed, dict(env_kwargs or {})
        self.env_id, self.env = env if isinstance(env, str) else None, None
        simulator = resolve_functional_env(env, **(self.env_kwargs if isinstance(env, str) else {}))
        self.simulator, self.device = simulator.split("train"), torch.device(device)
        self.data = scenario_data(self.simulator, self.scenarios("train", config.n_train, 2 * seed))
        self.dev = self.scenarios("dev", config.n_dev, 2 * seed + 1)
        self.collector = None
        self._begin()
        self.ctx.bank.refresh("best")
        self.best_cost, self.best_iteration, self._dev_cost, self._steps = float("inf"), 0, float("inf"), 0
        self.episodes = deque(maxlen=1)
        """Mean return of the last epoch's scenarios (minus cost per store) and the horizon."""

    def build(self) -> None:
        c: HDPOConfig = self.config
        make, _, settings = _POLICIES[c.policy]
        own = {k: getattr(c, k) for k in settings}
        self.policy = make(self.simulator.network, self._observed(), **own).to(self.device)
        self.unrolled = Unrolled(self.simulator, self.policy, compile_period=c.compile == "period" and can_compile()[0])
        self.updaters = {}
        if any(p.requires_grad for p in self.policy.parameters()):
            lr = self.step_size
            clip = 1.0 if c.max_grad_norm is None and c.policy == "gnn" else c.max_grad_norm
            self.updaters["policy"] = ModuleUpdater(
                self.unrolled, lambda params: torch.optim.Adam(params, lr=lr), max_grad_norm=clip,
                compile=c.compile == "horizon" and can_compile()[0],
            )  # fmt: skip
        self.estimator = PathwiseEstimator(c, self.unrolled, self.updaters.get("policy")).to(self.device)

    @property
    def step_size(self) -> float:
        """Adam's step size at the start."""
        rate: float | None = self.config.learning_rate
        return published_rate(self.config.policy, self.simulator.network) if rate is None else rate

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "plan": "nothing: a fixed set of scenarios",
            "evaluation": "the unrolled simulator",
            "loss": "its cost (pathwise gradient)",
            "aggregate": "mean over scenarios, periods and stores",
        }

    @property
    def spaces(self) -> str:
        """The network, in words."""
        return f"{self.simulator.network} with policy {self.config.policy!r}"

    def scenarios(self, split: Split, count: int, seed: int) -> State:
        """``count`` scenarios of a split on the agent's device, decided by ``seed`` alone (recorded demand: the first
        series, whatever the seed)."""
        generator = torch.Generator().manual_seed(seed)
        return self.simulator.split(split).sample(count, generator, device=self.device)

    def outputs(self) -> frozenset[str]:
        return self.unrolled.outputs()

    # -- learning -----------------------------------------------------------------------------------------------------

    @property
    def num_timesteps(self) -> int:
        """The agent's clock: scenario periods simulated under gradients so far."""
        return self._steps

    @property
    def samples_per_iteration(self) -> int:
        """Scenario periods per epoch, which is one iteration."""
        return self.config.n_train * self.simulator.periods

    @property
    def converged(self) -> bool:
        """Whether ``patience`` epochs passed without a better score, or there is nothing to train."""
        waited = self.iteration - self.best_iteration
        return self.iteration > 0 and (not self.updaters or waited >= self.config.patience)

    def learn(
        self,
        total_timesteps: int,
        callback: Callback | Callable[[Agent], bool | None] | Sequence[Callback] | None = None,
        progress_bar: bool = False,
    ) -> HDPO:
        """Train until the clock shows ``total_timesteps`` scenario periods, or no better policy is found."""
        if self.converged:
            print(f"[ccrl] hdpo: nothing better since epoch {self.best_iteration}; training is over", flush=True)
            return self
        stop = FunctionCallback(lambda agent: not agent.converged)
        super().learn(total_timesteps, [*as_callback(callback), stop], progress_bar)
        return self

    def _choose_compile(self, total_timesteps: int) -> None:
        if self.config.compile != "off":
            possible, why = can_compile()
            print(f"[ccrl] {COMPILED[self.config.compile] if possible else why}", flush=True)

    def _iterate(self) -> None:
        self.healthy = False
        start = time.perf_counter()
        have = {"on": self.data}
        if self.config.anneal_lr:
            linear_decay(self.updaters.values(), self.step_size, self.ctx.progress)
        stats = self.estimator.fit(have, self.ctx)
        update, steps = run_phases(self.estimator, have, self.ctx)
        stats |= update
        self._check_finite()
        middle = time.perf_counter()
        self.ctx.k += 1
        self.iteration += 1
        self.n_updates += steps
        self._steps += self.samples_per_iteration
        if self.iteration % self.config.dev_every == 0 or self.iteration == 1 or not self.updaters:
            self._score()
        self._log(stats, start, middle)
        self.healthy = True

    def _score(self) -> None:
        cost = self._average(self.policy, "dev", self.dev).mean().item()
        self._dev_cost = cost
        if cost < self.best_cost:
            self.best_cost, self.best_iteration = cost, self.iteration
            self.ctx.bank.refresh("best")

    def _average(self, policy: torch.nn.Module, split: Split, scenarios: State) -> Tensor:
        unrolled = Unrolled(self.simulator.split(split), policy)
        return average_cost(unrolled, scenarios, whole_units=self.config.whole_units)

    def _log(self, stats: dict[str, Tensor], start: float, middle: float) -> None:
        since, first = self._started
        now = time.perf_counter()
        if "cost" in stats:
            self.episodes.append((-float(stats["cost"]) * self.simulator.periods, self.simulator.periods))
        mean = self.ep_rew_mean
        self.scalars = {} if mean is None else {"rollout/ep_rew_mean": mean}
        self.scalars |= {
            "dev/cost": self._dev_cost,
            "dev/best_cost": self.best_cost,
            "time/fps": (self.num_timesteps - first) / max(now - since, 1e-9),
            "time/iterations": self.iteration,
            "time/time_elapsed": now - since,
            "time/total_timesteps": self.num_timesteps,
            "time/update": (middle - start) / (now - start),
            "time/dev": (now - middle) / (now - start),
            **{f"train/{k}": v for k, v in stats.items()},
            "train/n_updates": self.n_updates,
        }
        if self.updaters:
            self.scalars["train/learning_rate"] = self.updaters["policy"].lr.clone()

    # -- acting -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Tree, deterministic: bool = False) -> Tensor:
        """Quantities ``[B, E]`` of the best policy from ``FunctionalEnv.observe``, a dict of ``[B, ...]``."""
        if not isinstance(obs, dict):
            raise TypeError(
                "act: expected the observations of FunctionalEnv.observe (a dict), got a tensor; the batched form of "
                "the environment hides what this policy reads"
            )
        orders: Tensor = self.ctx.bank.policy("best")(obs)
        return orders

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> Any:
        """Quantities ``[E]`` or ``[B, E]`` in NumPy of what ``FunctionalEnv.observe`` tells, and ``state``."""
        space = spaces.Dict({k: spaces.Box(-np.inf, np.inf, tuple(x.shape[1:])) for k, x in self._observed().items()})
        return numpy_act(self.act, space, observation, self.device), state

    def _observed(self) -> State:
        return self.simulator.observe(self.simulator.initial({k: self.data[k][:1] for k in self.data.sequence}))

    def cost(self, split: Split = "test", count: int | None = None, seed: int = 65) -> tuple[float, float]:
        """Cost per period and store of the best policy after the warm-up: mean and standard error over ``count`` new
        scenarios (``None``: 2,000, or every recorded series), which ``seed`` decides alone: the same for all agents."""
        count = (self.simulator.available or 2000) if count is None else count
        costs = self._average(self.ctx.bank.policy("best"), split, self.scenarios(split, count, 10**6 + seed))
        return costs.mean().item(), (costs.std() / count**0.5).item() if count > 1 else float("nan")

    def evaluate(self, env: BatchedEnv | None, episodes: int, seed: int, deterministic: bool = True) -> EvalResult:
        """Returns (minus the cost per store, warm-up included) of ``episodes`` new scenarios over the training horizon;
        of the first recorded series in the weeks of the split ``"test"``, never trained on. ``env`` is not needed."""
        available = self.simulator.available
        split: Split = "test" if available else "train"
        episodes, simulator = min(episodes, available or episodes), self.simulator.split(split)
        found, periods = self.scenarios(split, episodes, 10**6 + seed), simulator.periods
        unrolled = Unrolled(simulator, self.ctx.bank.policy("best"))
        costs = average_cost(unrolled, found, whole_units=self.config.whole_units, ignore=0)
        return EvalResult((-costs * periods).cpu().numpy(), torch.full((episodes,), periods).numpy())

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that training reads; the scenarios are drawn again from the seed."""
        return super().state_dict() | {
            "steps": self._steps,
            "best": [self.best_cost, self.best_iteration, self._dev_cost],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict`` in place."""
        super().load_state_dict(state)
        self._steps = state["steps"]
        self.best_cost, self.best_iteration, self._dev_cost = state["best"]
