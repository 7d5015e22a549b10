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
from collections.abc import Callable, Mapping
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
from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators.base import Context, Estimator, Phase
from ccrl.experiment.evaluation import EvalResult
from ccrl.inventory.base_stock import BaseStockPolicy, CappedBaseStockPolicy, EchelonStockPolicy, JustInTimePolicy
from ccrl.inventory.functional_env import FunctionalEnv, Network, Split, State, resolve_functional_env
from ccrl.inventory.newsvendor import NewsvendorPolicy, demand_windows, fit_forecaster
from ccrl.inventory.pathwise import Scenarios, Unrolled, average_cost, cost_term, scenario_data
from ccrl.inventory.planner import PlannerPolicy, ScaledBySeries
from ccrl.inventory.policies import DataDrivenPolicy, GNNPolicy, OrderPolicy, SymmetryAwarePolicy, VanillaPolicy
from ccrl.inventory.stores import StoresKernel
from ccrl.learn import Learner, RolloutLearner
from ccrl.seeding import named_generator
from ccrl.settings import Count, Positive, Settings
from ccrl.updaters import ModuleUpdater, Stats, Updater, can_compile

__all__ = ["HDPO", "HDPOConfig"]

COMPILED = {
    "period": "one period is compiled: half a minute at the first update, a fifth faster after it on a CPU",
    "horizon": "the whole horizon is compiled as ONE graph: minutes at the first update (190 s measured at 50 "
    "periods), about three times as fast as eager after it",
    "kernel": "the whole horizon is one kernel: a second at the first update",
}

PolicyName = Literal[
    "vanilla", "data_driven", "gnn", "symmetry_aware", "base_stock", "capped_base_stock", "echelon_stock",
    "just_in_time", "planner", "quantile_nv", "transformed_nv", "fixed_quantile", "returns_nv",
]  # fmt: skip
"""The keys of ``_POLICIES``."""


@dataclass(frozen=True)
class HDPOConfig(Settings):
    """Defaults: the vanilla network, 8,192 traces in batches of 512."""

    policy: PolicyName = "vanilla"
    """The policy is a network (vanilla, gnn, symmetry_aware, data_driven), order-up-to levels that a network moves from
    the best rule of each product (planner, of your own demand), a base-stock rule (base_stock,
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
    """Training ends after this many epochs without a better score, one of them scored."""
    whole_units: bool = False
    """Orders are rounded to integers in scores and evaluations (Poisson demand), never in training."""
    forecaster_steps: Count = 2000
    """Quantile policies take this many steps on the pinball loss before training."""
    compile: Literal["off", "period", "horizon", "kernel"] = "off"
    """One period is compiled (half a minute), or the whole horizon (minutes), or nothing (off); kernel takes C++ of our
    own (a second) for stores alone under the vanilla policy on a CPU."""

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
    "planner": (PlannerPolicy, 3e-3, ("rounds",)),
    "quantile_nv": (partial(NewsvendorPolicy, rule="quantile_nv"), 3e-2, ()),
    "transformed_nv": (partial(NewsvendorPolicy, rule="transformed_nv"), 3e-2, ()),
    "fixed_quantile": (partial(NewsvendorPolicy, rule="fixed_quantile"), 3e-2, ()),
    "returns_nv": (partial(NewsvendorPolicy, rule="returns_nv"), 3e-2, ()),
}
"""Name -> constructor, published learning rate, settings that it takes."""


def published_rate(policy: PolicyName, network: Network) -> float:
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

    def __init__(self, config: HDPOConfig, unrolled: Unrolled, updater: Updater | None) -> None:
        super().__init__()
        policy = unrolled.policy
        self._forecast = None  # a function: holding the policy would save it twice
        if isinstance(policy, NewsvendorPolicy):
            self._forecast = partial(_fit, unrolled.env, policy, config.forecaster_steps)
        self.register_buffer("fitted", torch.tensor(self._forecast is None))
        batching = Batching("sequence", config.batch_size, microbatch=config.microbatch)
        terms = (cost_term(unrolled.env.network.stores),)
        self._phases = () if updater is None else (Phase("policy", terms, batching, updater),)

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        return [] if have else [Request(steps=1)]

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


@dataclass
class Best:
    """The lowest development cost so far, where it was found, and the newest one."""

    cost: float = float("inf")
    iteration: int = 0
    newest: float = float("inf")

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class HDPOLearner(RolloutLearner):
    """One iteration is one epoch over the scenarios; then, when it is due, the score on the development scenarios."""

    source: Scenarios

    def __init__(
        self, agent: HDPO, source: Scenarios, unrolled: Unrolled, estimator: Estimator, updaters: dict[str, Updater]
    ) -> None:
        c, policy = agent.config, unrolled.policy
        assert isinstance(policy, OrderPolicy)
        super().__init__(
            source, policy, estimator, updaters, samples=c.n_train * source.periods, columns=c.n_train,
            clock_unit="scenario periods", anneal=c.anneal_lr, seed=agent.seed, device=agent.device,
            remember=1,
        )  # fmt: skip
        self._agent, self.unrolled, self.best = agent, unrolled, Best()
        self.state.register("best", self.best)
        self.ctx.bank.refresh("best")

    def outputs(self) -> frozenset[str]:
        return self.unrolled.outputs()

    def _iterate(self) -> tuple[dict[str, Data], Stats, dict[str, float]]:
        data, stats, seconds = super()._iterate()
        if "cost" in stats:  # minus cost per store, as the batched environment pays, and the horizon
            periods = self.source.periods
            self.episodes.extend(
                -stats["cost"].reshape(1).double() * periods, torch.full((1,), periods, device=self.device)
            )
        return data, stats, seconds

    def _log(self, data: Mapping[str, Any], stats: Stats, seconds: dict[str, float]) -> None:
        start = time.perf_counter()
        if self.iteration % self._agent.config.dev_every == 0 or self.iteration == 1 or not self.updaters:
            self.judge()
        super()._log(data, stats, seconds | {"dev": time.perf_counter() - start})
        self.scalars |= {"dev/cost": self.best.newest, "dev/best_cost": self.best.cost}

    def judge(self) -> None:
        """The cost on the development scenarios; the best parameters are kept."""
        self.best.newest = self._agent.average(self.policy, "dev", self._agent.dev).mean().item()
        if self.best.newest < self.best.cost:
            self.best.cost, self.best.iteration = self.best.newest, self.iteration
            self.ctx.bank.refresh("best")


class HDPO(Agent):
    """Hindsight Differentiable Policy Optimization.

    :param env: an inventory id (``"ccrl/InventoryOneStoreLost-v0"``, options in ``env_kwargs``) or a ``FunctionalEnv``.
    """

    name = "hdpo"
    paper = "Alvo, Russo, Kanoria, Lee 2023, arXiv 2306.11246"
    Config = HDPOConfig
    example_env = "ccrl/InventoryOneStoreLost-v0"
    """What the command line offers: an id that this agent accepts."""
    learner: HDPOLearner

    def connect(self, env: str | FunctionalEnv) -> None:
        c = self.config
        simulator = resolve_functional_env(env, **(self.env_kwargs if isinstance(env, str) else {}))
        self.simulator = simulator.split("train")
        self.data = scenario_data(self.simulator, self.scenarios("train", c.n_train, self.seed))
        self.dev = self.scenarios("dev", c.n_dev, self.seed)
        self.collector = Scenarios(self.data, self.simulator.periods)

    def build(self) -> Learner:
        c: HDPOConfig = self.config
        if self.own_policy is not None:
            raise TypeError(f"policy: expected the name of one, {', '.join(_POLICIES)}, got {self.own_policy!r}")
        make, _, settings = _POLICIES[c.policy]
        own = {k: getattr(c, k) for k in settings}
        if make is PlannerPolicy:
            policy: OrderPolicy = PlannerPolicy.for_env(self.simulator, self._observed(), **own)
        else:
            policy = make(self.simulator.network, self._observed(), **own)
            if "scale" in self._observed() and not isinstance(policy, NewsvendorPolicy):
                policy = ScaledBySeries(policy, self._observed())
        policy = policy.to(self.device)
        possible, why = can_compile()
        if c.compile != "off":
            print(f"[ccrl] {COMPILED[c.compile] if possible else why}", flush=True)
        kernel = StoresKernel(self.simulator, policy) if c.compile == "kernel" else None
        by_period, kernel = c.compile == "period" and possible, kernel if possible else None
        unrolled = Unrolled(self.simulator, policy, compile_period=by_period, kernel=kernel)
        updaters: dict[str, Updater] = {}
        if any(p.requires_grad for p in policy.parameters()):
            clip = 1.0 if c.max_grad_norm is None and c.policy in ("gnn", "planner") else c.max_grad_norm
            updaters["policy"] = ModuleUpdater(
                unrolled, lambda params: torch.optim.Adam(params, lr=self.step_size, fused=True), max_grad_norm=clip,
                compile=c.compile == "horizon" and possible,
            )  # fmt: skip
        estimator = PathwiseEstimator(c, unrolled, updaters.get("policy"))
        return HDPOLearner(self, self.collector, unrolled, estimator, updaters)

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
        generator = named_generator(seed, f"{split} scenarios")
        return self.simulator.split(split).sample(count, generator, device=self.device)

    @property
    def finished(self) -> bool:
        """Whether ``patience`` epochs and a score passed without a better one, or there is nothing to train."""
        best, now = self.learner.best.iteration, self.iteration
        scored = now - now % self.config.dev_every
        return now > 0 and (not self.updaters or (scored > best and now - best >= self.config.patience))

    def before_learning(self) -> None:
        policy = self.policy
        if isinstance(policy, PlannerPolicy) and not bool(policy.fitted):
            products = self.simulator.split("test").available
            assert products is not None
            policy.begin(self.simulator, self.simulator.sample(products, named_generator(self.seed, "rule")))
            self.learner.judge()  # the rule itself: training keeps only what is better than it
        if self.finished:
            since = self.learner.best.iteration
            print(f"[ccrl] hdpo: nothing better since epoch {since}; training is over", flush=True)

    def average(self, policy: torch.nn.Module, split: Split, scenarios: State) -> Tensor:
        """Cost per period and store of each scenario ``[B]``, after the warm-up."""
        unrolled = Unrolled(self.simulator.split(split), policy)
        return average_cost(unrolled, scenarios, whole_units=self.config.whole_units)

    @property
    def unrolled(self) -> Unrolled:
        """The simulator under the policy that is trained."""
        return self.learner.unrolled

    @property
    def best_cost(self) -> float:
        """The best development cost so far."""
        return self.learner.best.cost

    @property
    def best_iteration(self) -> int:
        """Where it was found."""
        return self.learner.best.iteration

    # -- acting -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Tree, deterministic: bool = False) -> Tensor:
        """Quantities ``[B, E]`` of the best policy from ``FunctionalEnv.observe``, a dict of ``[B, ...]``; whole units
        with ``whole_units``."""
        if not isinstance(obs, dict):
            raise TypeError(
                "act: expected the observations of FunctionalEnv.observe (a dict), got a tensor; the batched form of "
                "the environment hides what this policy reads"
            )
        orders: Tensor = self.ctx.bank.policy("best")(obs)
        return self.simulator.feasible(obs, orders.round()) if self.config.whole_units else orders

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
        count = (self.simulator.split(split).available or 2000) if count is None else count
        costs = self.average(self.ctx.bank.policy("best"), split, self.scenarios(split, count, 10**6 + seed))
        return costs.mean().item(), (costs.std() / count**0.5).item() if count > 1 else float("nan")

    def evaluate(self, env: BatchedEnv | None, episodes: int, seed: int, deterministic: bool = True) -> EvalResult:
        """Returns (minus the cost per store, warm-up included) of ``episodes`` new scenarios over the training horizon;
        of the first recorded series in the weeks of the split ``"test"``, never trained on. ``env`` is not needed."""
        split: Split = "test" if self.simulator.available else "train"
        simulator = self.simulator.split(split)
        episodes = min(episodes, simulator.available or episodes)
        found, periods = self.scenarios(split, episodes, 10**6 + seed), simulator.periods
        unrolled = Unrolled(simulator, self.ctx.bank.policy("best"))
        costs = average_cost(unrolled, found, whole_units=self.config.whole_units, ignore=0)
        return EvalResult((-costs * periods).cpu().numpy(), torch.full((episodes,), periods).numpy())
