"""TD3: Twin Delayed Deep Deterministic policy gradient (Fujimoto, van Hoof, Meger 2018, arXiv 1802.09477).

DDPG with the minimum of two critics, smoothed targets and a delayed actor:

    a'      = clip(mu-(s') + clip(sigma eps, -c, c), low, high)                (noise in units of half the range)
    y       = r + gamma (1 - d) min_i Q-_i(s', a')                             (d: terminated only)
    critics   0.5 sum_i mean (Q_i(s, a) - y)^2
    actor     -mean Q_1(s, mu(s)),  at every second gradient step; both targets move only then

Actions explore with normal noise of 0.1 of half the range. Deviations: docs/td3.md.

Slots: data = replay ring; target = smoothed minimum of two, one or n steps; loss = squared TD, -Q1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from agents.off_policy import ActorCriticReplayConfig, OffPolicyAgent, discount, mean_term, rows
from agents.on_policy import check_unused
from ccrl.data import Batching, Data
from ccrl.estimators import q_losses
from ccrl.estimators.base import Context, Phase
from ccrl.learn import Cycle, Learner, Polyak
from ccrl.policies import DeterministicActorQ
from ccrl.settings import Count, Natural, Nonnegative, Positive, Unit
from ccrl.updaters import Updater

__all__ = ["TD3", "TD3Config", "TD3Cycle"]


@dataclass(frozen=True)
class TD3Config(ActorCriticReplayConfig):
    """The released code's MuJoCo runs."""

    search: ClassVar[dict[str, Any]] = {"exploration_noise": {"choice": [0.05, 0.1, 0.2, 0.4]}}
    learning_starts: Natural = 25_000
    """Actions are uniform and nothing is learnt before this many environment steps."""
    tau: Unit = 0.005
    """When the targets move, they move by this share towards the networks."""
    critic_learning_rate: Positive | None = None
    """This is Adam's step size for the critics; unset, it is the actor's."""
    exploration_noise: Nonnegative = 0.1
    """Actions in training get normal noise with this deviation, in units of half the action range."""
    target_noise: Nonnegative = 0.2
    """The target actor's actions get normal noise with this deviation, in units of half the action range."""
    target_noise_clip: Nonnegative = 0.5
    """The target actor's noise is clipped to plus or minus this number, in the same units."""
    actor_every: Count = 2
    """The actor is updated, and the targets move, at every so many gradient steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_noise == 0:
            check_unused(self, "the target actor has no noise", "target_noise_clip")


class TD3Cycle(Cycle):
    """Critic at every step; actor and targets at every ``actor_every``-th."""

    one_graph = True

    def __init__(self, config: TD3Config, updaters: dict[str, Updater]) -> None:
        super().__init__()
        self.config, whole = config, Batching(size=config.batch_size)
        self.averages = (Polyak("target", config.tau, ("actor.", "critic.", "norm."), every=config.actor_every),)
        critic = mean_term("critic_loss", q_losses.squared_td, "q")
        actor = mean_term("actor_loss", q_losses.deterministic_actor, "new_q1")
        self._phases = (
            Phase("critic", (critic,), whole, updaters["critic"]),
            Phase("actor", (actor,), whole, updaters["actor"], every=config.actor_every),
        )

    def noise(self, draw: Data, ctx: Context) -> Data:
        action = draw["action"]
        noise = torch.randn(action.shape, generator=ctx.generator, device=action.device, dtype=action.dtype)
        return draw.derive(next_noise=noise)

    def targets(self, draw: Data, ctx: Context) -> Data:
        c, target = self.config, ctx.bank.policy("target")
        following = rows(draw["next_obs"])
        noise = (c.target_noise * draw["next_noise"][0]).clamp(-c.target_noise_clip, c.target_noise_clip)
        action = target.perturbed(target.params(following)["mean"], noise)  # type: ignore[operator]
        factor = discount(draw, c)
        value = (factor * target.q(following, action).amin(0)).masked_fill(factor == 0, 0.0)  # type: ignore[operator]
        return draw.derive(target=draw["reward"] + value)

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


class TD3(OffPolicyAgent):
    """Twin delayed DDPG."""

    name = "td3"
    actions = "continuous"
    paper = "Fujimoto et al. 2018, arXiv 1802.09477"
    Config = TD3Config

    def build(self) -> Learner:
        c: TD3Config = self.config
        policy = self.make_policy({"q": ()}, default=DeterministicActorQ, exploration=c.exploration_noise)
        updaters: dict[str, Updater] = {
            "actor": self.updater(policy, "actor."),
            "critic": self.updater(policy, "critic.", lr=c.critic_learning_rate or c.learning_rate),
        }
        return self.replay(policy, TD3Cycle(c, updaters), updaters)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"data": "replay ring", "target": "smoothed minimum of two", "loss": "squared TD; -Q1"}
