"""SubPO: submodular policy optimisation (Prajapat, Mutny, Zeilinger, Krause, ICLR 2024, arXiv 2307.13372).

The return is ``F(tau)``, a set function of the visited states. The environment pays marginal gains
``m_h = F(s_{h+1} | s_0 .. s_h)`` (``ccrl.wrappers.SetReward``), and an action is credited with all gains after it:

    grad J = E sum_i grad log pi(a_i | .) (sum_{j >= i} m_j - b(s_0 .. s_i))

``b`` may depend on the whole prefix. ``credit`` has two others: ``greedy``, the gain of the step alone, and
``cumulative``, the weight ``F(tau_{0:i+1})`` of the released code, whose expectation is that of ``greedy`` at a much
larger variance (docs/subpo.md). ``gae`` is the actor-critic form of the paper's continuous tasks, and with
``surrogate=clip`` PPO's. F need not be submodular: gains of general rewards may grow or be negative; then no
guarantee holds.

A Markovian policy (SubPO-M) sees the state and the time; a non-Markovian one (SubPO-NM) the history, by ``recurrent``
or by an observation that holds it (``observation="history"`` of the grid tasks). ModPO, the baseline, is the same agent
on the additive reward: ``env_kwargs={"paid": "modular"}``.

Slots: prepare = credit, baseline; ratio = plain (token); loss = ratio * A (clip), entropy; aggregate = mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from agents.base import Agent
from agents.on_policy import VALUE, ActorCriticConfig, OnPolicyEstimator, Updaters, check_unused, cut
from ccrl.data import Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.stages import Standardise
from ccrl.estimators.terms import Term
from ccrl.learn import Learner
from ccrl.policies import MLPPolicy
from ccrl.returns import discounted_sum, forward_scan
from ccrl.settings import Count, Nonnegative, Positive, Unit
from ccrl.updaters import FlatUpdater

__all__ = ["Credit", "SubPO", "SubPOConfig", "credited", "without_mean"]

Credit = Literal["togo", "greedy", "cumulative"]


@dataclass(frozen=True)
class SubPOConfig(ActorCriticConfig):
    """Defaults: those of the grid tasks, one gradient step per batch of whole episodes."""

    search: ClassVar[dict[str, Any]] = {"n_steps": None, "gamma": None, "max_grad_norm": None}  # whole episodes
    num_envs: Count = 200
    """The number of parallel environments, that is of episodes in a batch."""
    n_steps: Count = 19
    """Every iteration takes this many steps in each environment: whole episodes, unless credit is gae."""
    gamma: Unit = 1.0
    """Gains are discounted by this factor per step; 1 is the paper's objective."""
    hidden: tuple[Count, ...] = (64, 32)
    """These are the widths of the hidden layers of the actor, and of the critic unless it has its own."""
    orthogonal: bool = False
    """Weights start orthogonal; otherwise as PyTorch draws them, as in the released code."""
    credit: Literal["togo", "greedy", "cumulative", "gae"] = "togo"
    """An action is credited with all later marginal gains (togo), with its own gain alone (greedy), with the value of
    the set so far (cumulative, the released grid code), or with the advantage that a critic gives it (gae)."""
    baseline: Literal["mean", "none"] = "mean"
    """The mean over the batch at the same time in the episode is subtracted from the credit, or nothing is."""
    surrogate: Literal["reinforce", "clip"] = "reinforce"
    """Each rollout is used for one full-batch policy gradient step (reinforce), or for n_epochs of PPO's clipped
    surrogate over minibatches (clip), which large tasks need."""
    normaliser: Positive = 1.0
    """The policy's loss is divided by this number, such as the best coverage there can be; it sets the balance with the
    entropy bonus."""
    normalise_advantage: bool = False
    """Advantages are standardised over the rollout; where all of them are equal they become 0."""
    learning_rate: Positive = 0.01
    """This is Adam's step size."""
    anneal_lr: bool = False
    """The learning rate falls linearly to 0."""
    ent_coef: Nonnegative = 0.0
    """The entropy of the policy is added to the objective with this weight."""
    ent_decay: Literal["harmonic", "none"] = "harmonic"
    """The weight of the entropy is divided by the number of the iteration (harmonic), or stays as it is."""
    batch_size: Count = 64
    """A minibatch of the clipped surrogate has this many environment steps."""
    n_epochs: Count = 10
    """The clipped surrogate passes this many times over each rollout."""
    clip_range: Positive = 0.2
    """The clipped surrogate keeps the probability ratio within 1 plus or minus this number."""
    vf_coef: Positive = 0.5
    """The value loss of the critic has this weight."""
    max_grad_norm: Positive = 1e9
    """Gradients are scaled down to this norm; the default leaves them alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.credit == "gae":
            check_unused(self, "credit='gae' has the critic as its baseline", "baseline")
        else:
            why = f"credit={self.credit!r} has no critic"
            check_unused(self, why, "gae_lambda", "vf_coef", "critic_hidden", "critic_obs", "time_limit")
        if self.surrogate == "reinforce":
            check_unused(
                self, "surrogate='reinforce' takes one full-batch step", "batch_size", "n_epochs", "clip_range"
            )
        if self.ent_coef == 0.0:
            check_unused(self, "ent_coef is 0", "ent_decay")
        if self.credit in ("greedy", "cumulative") and self.gamma != 1.0:
            raise ValueError(f"gamma: credit={self.credit!r} discounts nothing; expected 1.0, got {self.gamma}")


def credited(gain: Tensor, carry: Tensor, credit: Credit, gamma: float = 1.0) -> Tensor:
    """The weight ``[T, N]`` of every action from marginal gains ``[T, N]``.

    :param carry: 0 at the last step of an episode, ``[T, N]``.
    :param credit: ``togo``: ``sum_{j >= i} gamma^{j-i} m_j``; ``greedy``: ``m_i``; ``cumulative``:
        ``sum_{j <= i} m_j``, which is ``F(tau_{0:i+1}) - F({s_0})``.
    """
    if credit == "togo":
        return discounted_sum(gain, gamma, carry)
    if credit == "greedy":
        return gain
    before = torch.cat([torch.zeros_like(carry[:1]), carry[:-1]])
    return forward_scan(gain, before, torch.zeros_like(gain[0]))


def without_mean(weight: Tensor, time: Tensor, valid: Tensor) -> Tensor:
    """``weight`` ``[T, N]`` minus its mean over the valid rows at the same time in the episode (``time`` int64)."""
    index, valid = time.flatten(), valid.to(weight.dtype)
    size = int(time.max()) + 1
    total = weight.new_zeros(size).index_add(0, index, (weight * valid).flatten())
    count = weight.new_zeros(size).index_add(0, index, valid.flatten())
    return (weight - (total / count.clamp_min(1.0))[index].view_as(weight)) * valid


class SubPOEstimator(OnPolicyEstimator):
    """Credit, baseline, and one surrogate."""

    ent_coef: Tensor

    def __init__(self, config: SubPOConfig, policy: MLPPolicy, updaters: Updaters) -> None:
        super().__init__(config, policy, critic=config.credit == "gae")
        c = config
        self.register_buffer("ent_coef", torch.tensor(c.ent_coef))
        clipped = c.surrogate == "clip"
        terms = [
            Term(
                "policy_gradient_loss",
                losses.clip(c.clip_range, c.clip_range) if clipped else losses.weighted_ratio,
                aggregates.mean, ratios.token if clipped else ratios.plain, coef=1.0 / c.normaliser,
                stats=losses.ratio_stats(c.clip_range, c.clip_range) if clipped else None,
            )
        ]  # fmt: skip
        if c.ent_coef:
            want = frozenset({"entropy"})
            terms.append(
                Term("entropy_loss", losses.neg_entropy, aggregates.mean, want=want, advantage=None, coef=self.ent_coef)
            )
        if c.credit == "gae":
            terms.append(
                Term("value_loss", losses.value_loss(), aggregates.mean, want=VALUE, advantage=None, coef=c.vf_coef)
            )
        batching = cut(policy, c.n_steps, c.batch_size if clipped else "full", c.n_epochs if clipped else 1)
        self._phases = (Phase("policy", tuple(terms), batching, updaters["policy"]),)

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        if self.config.ent_decay == "harmonic":
            self.ent_coef.fill_(self.config.ent_coef).div_(ctx.k + 1.0)
        return super().prepare(have, ctx)

    @torch.no_grad()
    def advantages(self, data: Data) -> Data:
        c = self.config
        if c.credit == "gae":
            data = super().advantages(data)
        else:
            reward = data["shaped_reward" if c.normalise_reward else "reward"]
            weight = credited(torch.where(data["valid"] > 0, reward, 0.0), data["carry"], c.credit, c.gamma)
            if c.baseline == "mean":
                weight = without_mean(weight, data["t"], data["valid"])
            data = data.derive(advantage=weight)
        return Standardise()(data) if c.normalise_advantage else data

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


class SubPO(Agent):
    """Submodular policy optimisation.

    :raises ValueError: besides what every agent refuses, rollouts that cut episodes whose gains are added up.
    """

    name = "subpo"
    paper = "Prajapat et al. 2024, arXiv 2307.13372"
    Config = SubPOConfig
    example_env = "ccrl/GridCoverage-v0"
    """What the command line offers: an id that this agent accepts."""

    def build(self) -> Learner:
        c: SubPOConfig = self.config
        limit: Any = getattr(self.env, "max_episode_steps", None)
        if c.credit in ("togo", "cumulative") and limit is not None and c.n_steps % limit:
            raise ValueError(
                f"n_steps: credit={c.credit!r} adds up the gains of whole episodes; expected a multiple of the task's "
                f"{limit} steps, got {c.n_steps}; or take credit='gae'"
            )
        policy = self.make_policy({"value": ()} if c.credit == "gae" else {})
        updaters: Updaters = {
            "policy": FlatUpdater(policy, lr=c.learning_rate, max_grad_norm=c.max_grad_norm, eps=c.adam_eps)
        }
        return self.rollouts(policy, SubPOEstimator(c, policy, updaters), updaters)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "prepare": "marginal gains to go, mean per time step (or values, GAE)",
            "ratio": "plain, or token",
            "loss": "ratio * A, or clip; entropy",
            "aggregate": "mean",
        }
