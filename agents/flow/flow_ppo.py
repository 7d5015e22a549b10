"""Flow PPO: PPO over denoising steps, which fine-tunes a cloned flow actor (DPPO; Ren et al. 2024, arXiv 2409.00588).

An action is made by K Gaussian transitions. They are steps of a Markov decision process inside the environment's: the
reward comes after the last, so every transition of an action has the action's advantage, discounted over denoising,

    L = - mean over steps and k of min(rho_k A_k, clip(rho_k, 1 - eps, 1 + eps) A_k),   A_k = g^(K - 1 - k) A
    rho_k = p(x_{k+1} | x_k, s) / p_old(x_{k+1} | x_k, s),   A by GAE on environment steps

The actor is first cloned by flow matching from a data set (``clone_from``), and the critic learns alone for some
iterations: a critic that knows nothing would undo the clone. What is claimed is fine-tuning, not learning from scratch.

Slots: ratio = transition; advantage = GAE, discounted over denoising; loss = clip and value, each with its updater.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from agents.base import Agent
from agents.on_policy import VALUE, OnPolicyEstimator, Updaters, check_standardised, check_unused
from ccrl.data import Batching, Data
from ccrl.diffusion.flow import flow_point, matching_error
from ccrl.estimators import aggregates, losses
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.stages import standardise
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.learn import Learner
from ccrl.offline import Dataset, load_dataset
from ccrl.policies.flow_actor import FlowActor
from ccrl.seeding import named_generator
from ccrl.settings import Compile, Count, Natural, Positive, Settings, TimeLimit, Unit
from ccrl.updaters import FlatUpdater

__all__ = ["FlowPPO", "FlowPPOConfig"]


@dataclass(frozen=True)
class FlowPPOConfig(Settings):
    """Fine-tuning of a small actor."""

    num_envs: Count = 16
    """The number of parallel environments."""
    n_steps: Count = 128
    """Every iteration takes this many steps in each environment; the rollout holds num_envs * n_steps."""
    gamma: Unit = 0.99
    """Rewards are discounted by this factor per step."""
    gae_lambda: Unit = 0.95
    """Lambda of generalised advantage estimation: 0 trusts the critic, 1 the returns."""
    time_limit: TimeLimit = "bootstrap"
    """At a time limit the critic's value goes on (bootstrap), or the task ends (terminal: older code, biased)."""
    normalise_reward: bool = False
    """Rewards are divided by the running deviation of the discounted return, in training only: logs stay raw."""
    normalise_obs: bool = True
    """Observations are normalised: by the data set's statistics, which stay, or without one by running ones."""
    clip_norm: Positive = 10.0
    """Normalised observations and rewards are clipped to plus or minus this number."""
    hidden: tuple[Count, ...] = (128, 128)
    """These are the widths of the velocity network's hidden layers."""
    critic_hidden: tuple[Count, ...] = (128, 128)
    """These are the widths of the critic's hidden layers."""
    denoising_steps: Count = 8
    """An action takes this many transitions."""
    sampler: Literal["flow_sde", "dance_sde"] = "flow_sde"
    """Transitions are those of Flow-GRPO's SDE or of DanceGRPO's; the others have no noise in the last step."""
    noise_level: Positive = 0.5
    """The amount of noise in a transition."""
    denoising_discount: Unit = 0.99
    """The advantage of a transition is discounted by this factor per denoising step that follows."""
    learning_rate: Positive = 1e-3
    """This is Adam's step size for the actor."""
    critic_learning_rate: Positive = 1e-3
    """This is Adam's step size for the critic."""
    batch_size: Count = 256
    """A minibatch has this many environment steps, all their transitions included."""
    n_epochs: Count = 10
    """The update passes this many times over each rollout."""
    clip_range: Positive = 0.1
    """The ratio of a transition is clipped to 1 plus or minus this number."""
    max_grad_norm: Positive = 0.5
    """Gradients are scaled down to this norm."""
    adam_eps: Positive = 1e-5
    """Adam adds this epsilon to the root of its second moment."""
    critic_warmup: Natural = 5
    """In the first iterations, this many, the critic learns alone."""
    clone_from: str = ""
    """The actor is first cloned from this data set (minari:ID, d4rl:FILE, ogbench:FILE, or a file of one's own); empty:
    it begins as it is made."""
    clone_steps: Natural = 5000
    """Cloning takes this many steps of flow matching."""
    clone_batch: Count = 256
    """A step of cloning reads this many rows."""
    clone_learning_rate: Positive = 1e-3
    """This is Adam's step size in cloning, which falls linearly to 0."""
    vf_coef: Positive = 1.0
    """The critic's loss has this weight."""
    compile: Compile = "auto"
    """Updates are fused into compiled graphs: always (on), never (off), or from 1,000 gradient steps on where there
    is a C++ compiler (auto)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_standardised(self, "FlowPPO", self.batch_size)
        if not (self.normalise_obs or self.normalise_reward):
            check_unused(self, "it clips what is normalised, and nothing is", "clip_norm")


class FlowPPOEstimator(OnPolicyEstimator):
    """A clipped term on transitions, a value term; each its own phase."""

    def __init__(self, config: FlowPPOConfig, policy: FlowActor, updaters: Updaters) -> None:
        super().__init__(config, policy)
        c = config
        self._policy = (policy,)
        place = torch.arange(policy.steps - 1, -1, -1.0)
        self.register_buffer("discount", (c.denoising_discount**place).unsqueeze(1), persistent=False)
        clip = losses.clip(c.clip_range, c.clip_range)

        def loss(level: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
            spread = standardise(advantage, batch["valid"])  # [1, B], inside the minibatch as PPO does
            return clip(level, self.discount * spread, outputs, batch)  # type: ignore[operator]

        def whole(valid: Tensor, batch: Data) -> Tensor:
            return valid / (policy.steps * batch["n_valid"]).clamp_min(1.0)

        actor = Term("policy_gradient_loss", loss, whole, transitions, frozenset({"step_log_prob"}),
                     stats=losses.ratio_stats(c.clip_range, c.clip_range))  # fmt: skip
        value = Term("value_loss", losses.value_loss(), aggregates.mean, want=VALUE, advantage=None, coef=c.vf_coef)
        batching = Batching(size=c.batch_size, epochs=c.n_epochs)
        self._phases = (
            Phase("actor", (actor,), batching, updaters["policy"], skip=self._warming),
            Phase("critic", (value,), batching, updaters["critic"]),
        )

    def _warming(self, data: Data, ctx: Context) -> bool:
        return bool(int(ctx.k) < self.config.critic_warmup)

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        have = super().prepare(have, ctx)
        data = have["on"]
        old = self._policy[0].chain_log_prob(data["old_chain"], data["old_means"])
        return have | {"on": data.derive(old_step_log_prob=old)}

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


def transitions(outputs: Outputs, batch: Data) -> LogRatio:
    """One element per transition and environment step, ``[K, B]``, of a batch of steps ``[1, B]``."""
    new, old = (x.squeeze(0).t() for x in (outputs["step_log_prob"], batch["old_step_log_prob"]))
    return LogRatio(new, old, batch["valid"].expand(new.shape))


class FlowPPO(Agent):
    """PPO over denoising steps; see the module's docstring."""

    name = "flow_ppo"
    actions = "continuous"
    paper = "DPPO: Ren et al. 2024, arXiv 2409.00588"
    Config = FlowPPOConfig

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "prepare": "values, GAE; a clone first",
            "ratio": "denoising transition",
            "loss": "clip + value, each its updater",
            "aggregate": "mean over transitions",
        }

    def build(self) -> Learner:
        c: FlowPPOConfig = self.config
        policy = self.make_policy(
            {"value": ()}, default=FlowActor, steps=c.denoising_steps, solver=c.sampler, noise=c.noise_level
        )
        if not isinstance(policy, FlowActor):
            raise ValueError(f"policy: expected a FlowActor or a class derived from it, got {type(policy).__name__}")
        rates = {"policy": ("actor", c.learning_rate), "critic": ("critic", c.critic_learning_rate)}
        updaters: Updaters = {
            name: FlatUpdater(policy, lr=lr, prefixes=[part], max_grad_norm=c.max_grad_norm, eps=c.adam_eps)
            for name, (part, lr) in rates.items()
        }
        learner = self.rollouts(policy, FlowPPOEstimator(c, policy, updaters), updaters)
        self._cloned = torch.zeros((), dtype=torch.bool)
        learner.state.register("cloned", self._cloned)
        return learner

    def before_learning(self) -> None:
        """The clone, once."""
        if bool(self._cloned):
            return
        if self.config.clone_from:
            self.clone(load_dataset(self.config.clone_from))
        self._cloned.fill_(True)

    def clone(self, data: Dataset) -> float:
        """Flow matching on the data's actions, given their observations; mean loss of the last tenth of the steps.

        :raises ValueError: data of other shapes than the environment's.
        """
        c: FlowPPOConfig = self.config
        policy: FlowActor = self.policy
        shapes = (self.env.single_observation_space.shape, self.env.single_action_space.shape)
        if (data.obs.shape[1:], data.action.shape[1:]) != shapes:
            raise ValueError(f"{data.name}: expected observations and actions of shapes {shapes[0]} and {shapes[1]}, "
                             f"got {data.obs.shape[1:]} and {data.action.shape[1:]}")  # fmt: skip
        obs, action = (torch.as_tensor(np.asarray(x), dtype=torch.float32, device=self.device)
                       for x in (data.obs, data.action))  # fmt: skip
        if c.normalise_obs:
            policy.fix_normaliser(obs)
        seen = policy.features(obs, "actor").detach()
        action = policy.unit_action(action)
        generator = named_generator(self.seed, "clone", self.device)
        optimiser = torch.optim.Adam(policy.actor.parameters(), lr=c.clone_learning_rate, fused=True)
        found: list[Tensor] = []
        for i in range(c.clone_steps):
            optimiser.param_groups[0]["lr"] = c.clone_learning_rate * (1.0 - i / c.clone_steps)
            rows = torch.randint(len(obs), (c.clone_batch,), generator=generator, device=self.device)
            time = torch.rand(c.clone_batch, generator=generator, device=self.device)
            noise = torch.randn(c.clone_batch, policy.n_out, generator=generator, device=self.device)
            x, target = flow_point(action[rows], noise, time)
            loss = matching_error(policy.actor(x, time, seen[rows]), target).mean()
            policy.actor.zero_grad(set_to_none=False)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            found.append(loss.detach())
        policy.actor.zero_grad(set_to_none=False)
        self._cloned.fill_(True)
        return float(torch.stack(found[-max(1, c.clone_steps // 10) :]).mean()) if found else float("nan")
