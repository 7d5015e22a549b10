"""A2C: advantage actor-critic, the synchronous form of A3C (Mnih et al. 2016, arXiv 1602.01783).

    L = -mean(A log pi) + 0.5 mean (V - R)^2,    one full-batch step per rollout; A by GAE, with lambda 1 the paper's

The shortest agent there is: a config, an estimator that names its terms, and the learner that an agent builds.

Slots: ratio = token; loss = ratio * A (at the old parameters the policy gradient) + value; aggregate = mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from agents.base import Agent
from agents.on_policy import VALUE, ActorCriticConfig, OnPolicyEstimator, Updaters
from ccrl.data import Batching
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.base import Phase
from ccrl.estimators.terms import Term
from ccrl.learn import Learner
from ccrl.policies import MLPPolicy
from ccrl.settings import Count, Positive, Unit
from ccrl.updaters import FlatUpdater

__all__ = ["A2C", "A2CConfig"]


@dataclass(frozen=True)
class A2CConfig(ActorCriticConfig):
    """Defaults: short rollouts of 8 environments."""

    search: ClassVar[dict[str, Any]] = {"n_steps": {"choice": [5, 8, 16, 32, 64]}}
    num_envs: Count = 8
    """The number of parallel environments."""
    n_steps: Count = 5
    """Every iteration takes this many steps in each environment."""
    gae_lambda: Unit = 1.0
    """Lambda of generalised advantage estimation; 1 is the paper's n-step advantage."""
    learning_rate: Positive = 7e-4
    """This is Adam's step size (the paper's RMSProp differs)."""
    anneal_lr: bool = False
    """The learning rate falls linearly to 0."""
    vf_coef: Positive = 0.5
    """The value loss has this weight."""
    max_grad_norm: Positive = 0.5
    """Gradients are scaled down to this norm."""


class A2CEstimator(OnPolicyEstimator):
    """One phase of two terms."""

    def __init__(self, config: A2CConfig, policy: MLPPolicy, updaters: Updaters) -> None:
        super().__init__(config, policy)
        terms = (
            Term("policy_gradient_loss", losses.weighted_ratio, aggregates.mean, ratios.token),
            Term("value_loss", losses.value_loss(), aggregates.mean, want=VALUE, advantage=None, coef=config.vf_coef),
        )
        self._phases = (Phase("policy", terms, Batching(size="full"), updaters["policy"]),)

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


class A2C(Agent):
    """Advantage actor-critic."""

    name = "a2c"
    paper = "Mnih et al. 2016, arXiv 1602.01783"
    Config = A2CConfig

    def build(self) -> Learner:
        c: A2CConfig = self.config
        policy = self.make_policy({"value": ()})
        updaters: Updaters = {
            "policy": FlatUpdater(policy, lr=c.learning_rate, max_grad_norm=c.max_grad_norm, eps=c.adam_eps)
        }
        return self.rollouts(policy, A2CEstimator(c, policy, updaters), updaters)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"prepare": "values, GAE", "ratio": "token", "loss": "ratio * A + value", "aggregate": "mean"}
