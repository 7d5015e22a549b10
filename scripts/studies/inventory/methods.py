"""HDPO, PPO and REINFORCE on the same instances, scored on the same demand with the same cost.

* The cost is that of HDPO's test: per period and store over the periods after the warm-up of long scenarios. PPO and
  REINFORCE play the same scenarios in the batched environment, with the mean action, and the same periods of their
  rewards are counted. Orders are not rounded, for none of them.
* All train on the horizon of training (50 periods from random stock, warm-up included) and keep the parameters with the
  best score on development scenarios, the same scenarios and equally often for all.
* REINFORCE: the score times the discounted reward to go, less its mean over the batch in that period (all copies are in
  the same period), standardised; one Adam step per batch of whole episodes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.base import Agent
from agents.hdpo import HDPO, HDPOConfig
from agents.on_policy import OnPolicyConfig, OnPolicyEstimator, Updaters
from agents.ppo import PPO, PPOConfig
from ccrl.batched_env import AutoresetMode, Tree
from ccrl.data import Batching, Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.base import Phase
from ccrl.estimators.stages import Standardise
from ccrl.estimators.terms import Term
from ccrl.inventory.functional_env import Split, State
from ccrl.inventory.pathwise import Unrolled, average_cost
from ccrl.learn import Learner
from ccrl.policies import MLPPolicy
from ccrl.returns import discounted_sum
from ccrl.updaters import FlatUpdater
from envs import make_functional
from envs.inventory import InventoryEnv, InventoryVector, Task
from scripts.studies.inventory.cells import simulator

__all__ = ["Reinforce", "ReinforceConfig", "compare", "play"]

PERIODS = 50
"""Of a training episode; rollouts are whole episodes."""


@dataclass(frozen=True)
class ReinforceConfig(OnPolicyConfig):
    """Batches of whole episodes."""

    learning_rate: float = 1e-3
    """Adam's step size."""
    max_grad_norm: float = 0.5
    """Global gradient norm."""


class ReinforceEstimator(OnPolicyEstimator):
    """``-mean (G_t - mean over copies of G_t) log pi``, one step per rollout."""

    def __init__(self, config: ReinforceConfig, policy: MLPPolicy, updaters: Updaters) -> None:
        super().__init__(config, policy)
        term = Term("policy_gradient_loss", losses.weighted_ratio, aggregates.mean, ratios.plain)
        self._phases = (Phase("policy", (term,), Batching(size="full"), updaters["policy"]),)

    def advantages(self, data: Data) -> Data:
        reward = "shaped_reward" if self.config.normalise_reward else "reward"
        togo = discounted_sum(data[reward], self.config.gamma, data["carry"])
        return Standardise()(data.derive(advantage=togo - togo.mean(1, keepdim=True)))

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


class Reinforce(Agent):
    """Williams 1992, with a baseline per period."""

    name = "reinforce"
    paper = "Williams 1992"
    Config = ReinforceConfig

    def build(self) -> Learner:
        c: ReinforceConfig = self.config
        policy = self.make_policy({})
        updaters: Updaters = {"policy": FlatUpdater(policy, lr=c.learning_rate, max_grad_norm=c.max_grad_norm)}
        return self.rollouts(policy, ReinforceEstimator(c, policy, updaters), updaters)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"prepare": "reward to go less the batch's mean", "ratio": "plain", "loss": "weighted ratio"}


def compare(cell: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Train one method with one step size; the cost of its best parameters, and how the score went."""
    start, clock = time.process_time(), time.perf_counter()
    agent = _agent(cell, options)
    env = simulator(make_functional(cell["env"], **options))
    dev = _scenarios(env, "dev", cell["n_dev"], 10**6 + cell["seed"])
    test = _scenarios(env, "test", cell["tests"], 10**6 + 65)
    every = max(1, cell["samples"] // agent.samples_per_iteration // cell["scores"])
    curve: list[tuple[int, float, float]] = []
    best: dict[str, Tensor] = {}

    def score(agent: Agent) -> None:
        if agent.iteration % every:
            return
        cost = float(_costs(agent, env.task, "dev", dev).mean())
        if cost < min((c for *_, c in curve), default=float("inf")):
            best.update({k: v.clone() for k, v in agent.policy.state_dict().items()})
        curve.append((agent.num_timesteps, time.process_time() - start, cost))

    agent.learn(cell["samples"], score)
    agent.policy.load_state_dict(best)
    spent = {"CPU seconds": time.process_time() - start, "seconds": time.perf_counter() - clock}
    costs = _costs(agent, env.task, "test", test)
    return {
        "cost": float(costs.mean()), "se": float(costs.std() / len(costs) ** 0.5),
        "dev cost": min(c for *_, c in curve), "samples used": agent.num_timesteps, "updates": agent.n_updates, **spent,
        "curve": ";".join(f"{steps}:{seconds:.1f}:{cost:.5g}" for steps, seconds, cost in curve),
    }  # fmt: skip


def _agent(cell: dict[str, Any], options: dict[str, Any]) -> Agent:
    rate, common = cell["learning_rate"], {"seed": cell["seed"], "env_kwargs": options}
    if cell["method"] == "hdpo":
        # its own development scenarios are not used: one is the least there can be
        config = HDPOConfig(
            learning_rate=rate, anneal_lr=True, n_dev=1, dev_every=10**9, patience=10**9, n_train=cell["n_train"]
        )
        return HDPO(cell["env"], config, **common)
    shared: dict[str, Any] = {
        "n_steps": PERIODS, "normalise_obs": True, "normalise_reward": True, "log_std_init": -1.0, "compile": "off",
    }  # fmt: skip
    if cell["method"] == "ppo":
        shared |= {"num_envs": 256, "batch_size": 1280, "n_epochs": 5, "anneal_lr": True}
        return PPO(cell["env"], PPOConfig(learning_rate=rate, **shared), **common)
    if cell["method"] == "reinforce":
        return Reinforce(cell["env"], ReinforceConfig(num_envs=256, learning_rate=rate, **shared), **common)
    raise ValueError(f"method: expected hdpo, ppo or reinforce, got {cell['method']!r}")


def _costs(agent: Agent, task: Task, split: Split, scenarios: State) -> Tensor:
    if isinstance(agent, HDPO):
        return average_cost(Unrolled(agent.simulator.split(split), agent.policy), scenarios)
    return play(task, split, scenarios, lambda obs: agent.act(obs, deterministic=True))


@torch.no_grad()
def play(task: Task, split: Split, scenarios: State, act: Any) -> Tensor:
    """``[B]`` cost per period and store after the warm-up, in the batched environment: ``act`` maps its observations to
    its actions."""
    count = len(scenarios["demand"])
    env = InventoryVector(task, count, autoreset_mode=AutoresetMode.DISABLED, split=split)
    inner = env.env
    env.load_state_dict(
        {
            "state": inner.initial(scenarios),
            "demand": inner.noise(scenarios),
            "clock": torch.zeros(count, dtype=torch.int64),
            "generator": torch.Generator().get_state(),
        }
    )
    obs: Tree = env.reset(mask=torch.zeros(count, dtype=torch.bool))  # starts nothing, only observes
    total = torch.zeros(count, dtype=torch.float64)
    for period in range(inner.periods):
        result = env.step(act(obs))
        obs = result.obs
        if period >= inner.ignore:
            total -= result.reward
    return total / (inner.periods - inner.ignore)


def _scenarios(env: InventoryEnv, split: Split, count: int, seed: int) -> State:
    return env.split(split).sample(count, torch.Generator().manual_seed(seed))
