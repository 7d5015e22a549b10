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
from typing import Any, ClassVar

import torch
from torch import Tensor

from agents.base import Agent
from agents.on_policy import VALUE, ActorCriticConfig, OnPolicyEstimator, Updaters, check_standardised, cut
from ccrl.data import Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.stages import Standardise
from ccrl.estimators.terms import Term
from ccrl.learn import Learner
from ccrl.policies import MLPPolicy
from ccrl.settings import Count, Positive
from ccrl.updaters import FlatUpdater

__all__ = ["MDPO", "MDPOConfig", "step_size"]


@dataclass(frozen=True)
class MDPOConfig(ActorCriticConfig):
    """The paper's on-policy runs, in its "loaded" setting, at 16 x 128 = 2,048 steps per iteration (docs/mdpo.md)."""

    search: ClassVar[dict[str, Any]] = {
        "inner_steps": {"choice": [5, 10, 20]},
        "critic_epochs": {"choice": [2, 5, 10]},
    }
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


def step_size(progress: Tensor, share: Tensor) -> Tensor:
    """``t_k = max(1 - p + s, 2 s)`` with p the progress and s the share of one iteration: with ``p = k / K`` and
    ``s = 1 / K`` it is ``1 - (k - 1) / K``: 1 + 1/K at the first iteration (k = 0), 2 / K at the last, never less."""
    return torch.maximum(1.0 - (progress - share), 2.0 * share)


class MDPOEstimator(OnPolicyEstimator):
    """Policy phase (linear term + KL / t_k), then critic phase."""

    inv_t: Tensor

    def __init__(self, config: MDPOConfig, policy: MLPPolicy, updaters: Updaters) -> None:
        super().__init__(config, policy)
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
        self.inv_t.copy_(1.0 / step_size(ctx.progress, ctx.share))
        return super().prepare(have, ctx)

    def advantages(self, data: Data) -> Data:
        return Standardise(ddof=0)(super().advantages(data))

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


def _flat_advantages(data: Data, ctx: Context) -> bool:
    """No spread in the advantages: no policy step (Adam's momentum would move the policy on a zero gradient)."""
    return not bool((data["advantage"] != 0).any())


class MDPO(Agent):
    """Mirror Descent Policy Optimization, on-policy."""

    name = "mdpo"
    paper = "Tomar et al. 2020, arXiv 2005.09814"
    Config = MDPOConfig

    def build(self) -> Learner:
        c: MDPOConfig = self.config
        policy = self.make_policy({"value": ()})
        updaters: Updaters = {
            name: FlatUpdater(
                policy, prefixes=[prefix], lr=c.learning_rate, max_grad_norm=c.max_grad_norm, eps=c.adam_eps
            )
            for name, prefix in (("policy", "actor."), ("critic", "critic."))
        }
        return self.rollouts(policy, MDPOEstimator(c, policy, updaters), updaters)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "prepare": "values, GAE, standardise",
            "ratio": "token",
            "loss": "ratio * A + KL(new || old) / t_k; clipped value",
            "aggregate": "full-batch mean",
        }
