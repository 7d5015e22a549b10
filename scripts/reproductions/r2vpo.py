"""R2VPO: the exact solution on a bandit; the ratio's variance held at its budget on ModSum and in PPO on CartPole."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ccrl.bank import Bank
from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators import aggregates, ratios
from ccrl.estimators.base import Context
from ccrl.estimators.terms import LogRatio, Term
from ccrl.learn import Learner
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.packages import check_siblings
from ccrl.updaters import ModuleUpdater
from scripts.reproductions import Measurement
from scripts.reproductions.modsum import modsum_shape
from scripts.reproductions.tables import History, partial_sums, train

check_siblings("agents", "envs")

from agents.llm.agent import LLMMethod
from agents.llm.baselines import GRPO
from agents.llm.r2vpo import R2VPO, R2VPOConfig, R2VPORecipe, dual_step, lagrangian, ratio_variance
from agents.ppo import PPO, PPOConfig, PPOEstimator
from ccrl.estimators.recipe import Parts
from envs.text import make_task

OLD, ADVANTAGE = (0.5, 0.3, 0.2), (1.0, 0.0, -2.0)
UPDATES = 60
BUDGET = 0.04


class Solution(NamedTuple):
    """Of the constrained problem on a three-armed bandit."""

    ratio: Tensor
    dual: float
    gain: float


def bandit(steps: int, learning_rate: float, **options: float | str) -> Solution:
    """Exact expectations: ten columns in the old policy's proportions; SGD on the recipe's own terms."""
    old = torch.tensor(OLD, dtype=torch.float64)
    arm = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    policy = TabularTokenPolicy(1, 1, 3, init=old.log().view(1, 1, 3))
    updater = ModuleUpdater(policy, lambda params: torch.optim.SGD(params, lr=learning_rate))
    config = R2VPOConfig(dual_every="minibatch", **options)  # type: ignore[arg-type]
    recipe = R2VPORecipe(config, Parts(policy, updater, Request(counts=torch.ones(1, dtype=torch.int64)), 1))
    recipe.double()
    advantage = torch.tensor(ADVANTAGE, dtype=torch.float64)[arm].unsqueeze(0)
    columns = {
        "action": arm.unsqueeze(0), "log_prob": old.log()[arm].unsqueeze(0), "valid": torch.ones_like(advantage),
        "advantage": advantage, "prompt": torch.zeros(10, 1, dtype=torch.int64), "group": torch.zeros_like(arm),
    }  # fmt: skip
    batch = Data(columns, sequence=frozenset({"prompt", "group"})).epoch(Batching("sequence", "full"), None)[0]
    ctx = Context(torch.Generator(), Bank(policy), lambda *_: None)  # type: ignore[arg-type,return-value]
    for _ in range(steps):
        recipe.after_minibatch(updater.step(recipe.phases()[0].terms, batch), ctx)
    new = policy.logits.detach().softmax(-1).flatten()
    gain = float((new - old) @ torch.tensor(ADVANTAGE, dtype=torch.float64))
    return Solution(new / old, float(recipe.dual), gain)


def _variance(policy: nn.Module, on: Data) -> float:
    """``V`` of a rollout by the policy that its update made."""
    valid = on["valid"]
    level = LogRatio(policy(on, frozenset({"log_prob"}))["log_prob"], on["log_prob"], valid)
    return float((ratio_variance(level, valid, {}, on) * valid).sum() / valid.sum())


def _variances(method: LLMMethod, seed: int, **options: object) -> tuple[list[float], History]:
    """``V`` of every rollout after its inner epochs, by the policy that they made."""
    found: list[float] = []

    class Measured(method.Recipe):  # type: ignore[name-defined, misc]
        def after_update(self, data: dict[str, Data], stats: dict[str, Tensor], ctx: Context) -> None:
            super().after_update(data, stats, ctx)
            found.append(_variance(self.parts.policy, data["on"]))

    measured = replace(method, Recipe=Measured)
    config = method.Settings(**modsum_shape(learning_rate=0.2, n_epochs=8, **options))
    return found, train(measured, make_task("modsum"), config, UPDATES, seed, partial_sums)


# -- control ----------------------------------------------------------------------------------------------------------


class Clipped(PPOEstimator):
    """PPO, with ``V`` of every rollout after its last epoch."""

    budget = BUDGET

    def __init__(self, config: PPOConfig, policy: Any, updaters: Any) -> None:
        super().__init__(config, policy, updaters)
        self.policy = (policy,)  # in a tuple: an nn.Module attribute would be saved a second time
        self.variances: list[float] = []

    def after_update(self, data: dict[str, Data], stats: dict[str, Tensor], ctx: Context) -> None:
        super().after_update(data, stats, ctx)
        self.variances.append(_variance(self.policy[0], data["on"]))


class Held(Clipped):
    """The Lagrangian in place of the clip; the value and entropy terms stay. One dual step per gradient step: of one
    per rollout, lambda is 0 when a rollout's many epochs begin to drift, and the policy does not recover."""

    dual: Tensor

    def __init__(self, config: PPOConfig, policy: Any, updaters: Any) -> None:
        super().__init__(config, policy, updaters)
        self.register_buffer("dual", torch.tensor(0.5))
        (phase,) = self._phases
        surrogate = replace(phase.terms[0], loss=lagrangian(lambda: self.dual, BUDGET))
        variance = Term("ratio_variance", ratio_variance, aggregates.mean, ratios.token, advantage=None, coef=0.0)
        self._phases = (replace(phase, terms=(surrogate, *phase.terms[1:], variance)),)

    def after_minibatch(self, stats: dict[str, Tensor], ctx: Context) -> None:
        self.dual.copy_(dual_step(self.dual, stats["ratio_variance"], self.budget, rate=2.0, largest=100.0))


def control(
    estimator: type[Clipped],
    epochs: int,
    seed: int,
    iterations: int = 20,
    budget: float = BUDGET,
    clip_range: float = 0.2,
) -> tuple[float, float]:
    """Mean ``V`` over the rollouts and the return at the end, of PPO on CartPole with ``estimator``; ``budget`` is
    :class:`Held`'s, ``clip_range`` :class:`Clipped`'s."""

    class Agent(PPO):
        def build(self) -> Learner:
            found = super().build()
            made = estimator(self.config, found.policy, found.updaters)
            made.budget = budget
            return self.rollouts(found.policy, made, found.updaters)

    config = PPOConfig(
        num_envs=8, clip_range=clip_range, batch_size=256, n_epochs=epochs, normalise_advantage="batch", compile="off"
    )
    agent = Agent("CartPole-v1", config, seed=seed)
    agent.learn(iterations * agent.samples_per_iteration)
    return mean(agent.estimator.variances), float(agent.ep_rew_mean or 0.0)


def run(seeds: list[int]) -> list[Measurement]:
    """The exact bandit, ModSum, and PPO on CartPole."""
    exact = bandit(600, 0.3, dual_rate=2.0, dual_init=2.0)
    rows = [
        Measurement(f"bandit: ratio of arm {i}", f"{r} (closed form)", (r - 1e-4, r + 1e-4), (float(exact.ratio[i]),))
        for i, r in enumerate((1.158481, 0.982391, 0.630211))
    ]
    rows += [
        Measurement("bandit: lambda", "2.839454 (closed form)", (2.8385, 2.8405), (exact.dual,)),
        Measurement("bandit: gain", "0.227156 (closed form)", (0.22706, 0.22726), (exact.gain,)),
    ]
    free = {"clip_low": 1.0, "clip_high": math.inf}
    no_clip = [_variances(GRPO, s, **free)[0] for s in seeds]
    clipped = [_variances(GRPO, s)[0] for s in seeds]
    rollout = {"dual_every": "rollout"}  # as the reference run
    slow = [_variances(R2VPO, s, dual_rate=1.0, **rollout)[0] for s in seeds]
    fast = [_variances(R2VPO, s, dual_rate=5.0, **rollout) for s in seeds]
    replay = [_variances(R2VPO, s, replay=2, **rollout)[1] for s in seeds]
    rows += [
        Measurement("ModSum: V, updates 1-20, no clip", "0.37-0.41 (reference run)", (0.35, 0.45),
                    tuple(mean(v[:20]) for v in no_clip)),
        Measurement("ModSum: V, updates 1-20, GRPO, eps 0.2", "0.20-0.26 (reference run)", (0.18, 0.28),
                    tuple(mean(v[:20]) for v in clipped)),
        Measurement("ModSum: V, updates 1-20, R2VPO, eta 1", "0.10 (reference run)", (0.09, 0.11),
                    tuple(mean(v[:20]) for v in slow)),
        Measurement("ModSum: V, updates 1-20, R2VPO, eta 5", "0.055 (reference run)", (0.05, 0.06),
                    tuple(mean(v[:20]) for v, _ in fast)),
        Measurement("ModSum: V, updates 21-40, R2VPO, eta 5", "0.039-0.040 (reference run): the budget 0.04",
                    (0.035, 0.045), tuple(mean(v[20:40]) for v, _ in fast)),
        Measurement("ModSum: final reward, R2VPO, eta 5", "0.94-0.98 (reference run)", (0.93, 0.99),
                    tuple(h.final(10) for _, h in fast)),
        Measurement("ModSum: mean reward over training, 2 old rollouts minus none", "> 0: half the rollouts (paper)",
                    (0.0, math.inf), tuple(a.area - h.area for a, (_, h) in zip(replay, fast))),
    ]  # fmt: skip
    usual, many, held = ([control(e, n, s) for s in seeds] for e, n in ((Clipped, 10), (Clipped, 40), (Held, 40)))
    rows += [
        Measurement("CartPole: V of PPO, 40 epochs over 10", "> 1: nothing holds it (conjecture)",
                    (1.0, math.inf), tuple(m[0] / u[0] for m, u in zip(many, usual))),
        Measurement("CartPole: V of R2VPO, 40 epochs", "near the budget 0.04 (the constraint)", (0.03, 0.05),
                    tuple(h[0] for h in held)),
        Measurement("CartPole: return after 20,480 steps, R2VPO minus PPO, 40 epochs", "> 0 (paper: better)",
                    (0.0, math.inf), tuple(h[1] - m[1] for h, m in zip(held, many))),
    ]  # fmt: skip
    return rows
