"""MDPO: Mirror Descent Policy Optimization, on-policy (Tomar, Shani, Efroni, Ghavamzadeh 2020, arXiv 2005.09814).

Each iteration takes ``m`` full-batch gradient steps on the linearised objective with a KL proximal term:

    theta_{k+1} ~ argmax  E_{s, a ~ pi_k}[ rho A ] - (1 / t_k) E_s KL( pi_theta || pi_k )      (NEW policy first)
    L_pi = -mean(rho A) + (1 / t_k) mean KL,      t_k = 1 - (k - 1) / K  for  k = 0 .. K - 1

KL in closed form from the stored parameters of the behaviour policy; no ratio clip, no entropy bonus. At theta_k the
KL's gradient is 0, so m = 1 is one vanilla policy-gradient step. The critic is its own network with clipped values.

Slots: penalty = closed-form KL; schedule = t_k; phases = policy (full batch), then critic (minibatches).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.base import Agent
from agents.on_policy import VALUE, ActorCriticConfig, OnPolicyEstimator, check_standardised, cut
from ccrl.data import Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.stages import Standardise
from ccrl.estimators.terms import Term
from ccrl.policies import MLPPolicy
from ccrl.settings import Count, Positive
from ccrl.updaters import FlatUpdater

__all__ = ["MDPO", "MDPOConfig", "step_size"]


@dataclass(frozen=True)
class MDPOConfig(ActorCriticConfig):
    """The paper's on-policy runs, in its "loaded" setting, at 16 x 128 = 2,048 steps per iteration (docs/mdpo.md)."""

    normalise_obs: bool = True
    """Observations are normalised by running statistics (part of the paper's "loaded" setting, as the next one)."""
    normalise_reward: bool = True
    """Rewards are scaled: without it, value clipping at 0.2 lets the critic move by 0.2 an iteration."""
    inner_steps: Count = 10
    """m: every iteration takes this many full-batch gradient steps."""
    learning_rate: Positive = 3e-4
    """This is Adam's step size for the policy and for the critic."""
    anneal_lr: bool = False
    """The learning rate falls linearly to 0 (the released code keeps it constant)."""
    max_grad_norm: Positive = 0.5
    """Gradients of the policy and of the critic are scaled down to this global norm."""
    critic_epochs: Count = 5
    """The critic passes this many times over each rollout."""
    critic_batch_size: Count = 128
    """A minibatch of the critic has this many environment steps."""
    clip_range_vf: Positive | None = 0.2
    """New values are clipped to the old ones plus or minus this number; None does not clip them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_standardised(self, "MDPO")


def step_size(k: Tensor, K: Tensor) -> Tensor:
    """``t_k = 1 - (k - 1) / K``: 1 + 1/K at the first iteration (k = 0), 2 / K at the last, never 0."""
    return 1.0 - (k - 1.0) / K


class MDPOEstimator(OnPolicyEstimator):
    """Policy phase (linear term + KL / t_k), then critic phase."""

    inv_t: Tensor

    def __init__(self, config: MDPOConfig, policy: MLPPolicy, updaters: dict[str, FlatUpdater]) -> None:
        super().__init__(config, policy, updaters)
        c = config
        self.register_buffer("inv_t", torch.ones((), device=next(policy.parameters()).device))
        kl = losses.closed_form_kl(policy.distribution)
        policy_terms = (
            Term(
                "policy_gradient_loss", losses.weighted_ratio, aggregates.mean, ratios.token,
                stats=losses.ratio_stats(0.2, 0.2),
            ),
            Term(
                "kl", kl, aggregates.mean, want=frozenset({"dist"}), advantage=None, coef=self.inv_t,
                stats=lambda *of: {"kl": kl(*of)},
            ),
        )  # fmt: skip
        value = losses.value_loss(clip_range=c.clip_range_vf)
        critic_terms = (Term("value_loss", value, aggregates.mean, want=VALUE, advantage=None),)
        policy_batching = cut(policy, c.n_steps, "full", c.inner_steps)
        critic_batching = cut(policy, c.n_steps, c.critic_batch_size, c.critic_epochs)
        self._phases = (
            Phase("policy", policy_terms, policy_batching, updaters["policy"], skip=_flat_advantages),
            Phase("critic", critic_terms, critic_batching, updaters["critic"]),
        )

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        # a run that goes on past its planned K keeps the last step size: t_k would become 0, then negative
        self.inv_t.copy_(1.0 / step_size(torch.minimum(ctx.k, ctx.K - 1.0), ctx.K))
        if self.config.anneal_lr:
            self.anneal(ctx)
        return super().prepare(have, ctx)

    def advantages(self, data: Data) -> Data:
        return Standardise(ddof=0)(super().advantages(data))

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


def _flat_advantages(data: Data) -> bool:
    """No spread in the advantages: no policy step (Adam's momentum would move the policy on a zero gradient)."""
    return not bool((data["advantage"] != 0).any())


class MDPO(Agent):
    """Mirror Descent Policy Optimization, on-policy."""

    name = "mdpo"
    paper = "Tomar et al. 2020, arXiv 2005.09814"
    Config = MDPOConfig

    def build(self) -> None:
        c: MDPOConfig = self.config
        self.policy = self.make_policy({"value": ()})
        self.updaters = {
            name: FlatUpdater(
                self.policy, prefixes=[prefix], lr=c.learning_rate, max_grad_norm=c.max_grad_norm, eps=c.adam_eps
            )
            for name, prefix in (("policy", "actor."), ("critic", "critic."))
        }
        self.estimator = MDPOEstimator(c, self.policy, self.updaters)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "prepare": "values, GAE, standardise",
            "ratio": "token",
            "loss": "ratio * A + KL(new || old) / t_k; clipped value",
            "aggregate": "full-batch mean",
        }
