"""SAC: Soft Actor-Critic with a learned temperature (Haarnoja et al. 2018, arXiv 1801.01290 and 1812.05905).

Off-policy, twin critics, a squashed Gaussian actor ``a = tanh u``, ``u = mu(s) + sigma(s) eps``:

    y        = r + gamma (1 - d) [min_i Q-_i(s', a') - alpha log pi(a'|s')],    a' ~ pi(.|s')    (d: terminated only)
    critics    0.5 sum_i mean (Q_i(s, a) - y)^2
    actor      mean [alpha log pi(a_theta|s) - min_i Q_i(s, a_theta)]                            (the moved critics)
    alpha      -log alpha mean (log pi + H),  H = -dim A                        (the log pi of the actor's sample)
    Q-       <- (1 - tau) Q- + tau Q

One gradient step is: targets, critics, actor, temperature, average; all of it with the temperature of before. Density
and H are in [-1, 1] units of the action. Deviations: docs/sac.md.

Slots: data = replay ring; target = soft, one or n steps; loss = squared TD, alpha log pi - min Q; dual = temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from agents.off_policy import ActorCriticReplayConfig, OffPolicyAgent, discount, mean_term, rows
from agents.on_policy import check_unused
from ccrl.data import Batching, Data
from ccrl.estimators import q_losses
from ccrl.estimators.base import Context, Phase
from ccrl.learn import Cycle, Learner, Polyak
from ccrl.policies import ActorQ
from ccrl.settings import Count, Finite, Positive, Unit
from ccrl.updaters import Updater

__all__ = ["SAC", "SACConfig", "SACCycle"]


@dataclass(frozen=True)
class SACConfig(ActorCriticReplayConfig):
    """The second paper's MuJoCo runs."""

    tau: Unit = 0.005
    """After a gradient step the target critics move by this share towards the critics."""
    critic_learning_rate: Positive | None = None
    """This is Adam's step size for the critics; unset, it is the actor's."""
    alpha: Positive = 1.0
    """The temperature, the weight of the entropy, starts at this value."""
    alpha_learning_rate: Positive | None = 3e-4
    """This is Adam's step size for the temperature's logarithm; None keeps the temperature fixed."""
    target_entropy: Finite | None = None
    """The temperature is trained so that the entropy is this one; unset, minus the number of action dimensions."""
    actor_every: Count = 1
    """The actor and the temperature are updated at every so many gradient steps of the critics."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha_learning_rate is None:
            check_unused(self, "the temperature is fixed", "target_entropy")


class SACCycle(Cycle):
    """Critic, actor, temperature."""

    one_graph = True
    hands_on = ("mean_log_prob",)

    def __init__(self, config: SACConfig, policy: ActorQ, updaters: dict[str, Updater]) -> None:
        super().__init__()
        self.config = config
        self.averages = (Polyak("target", config.tau, ("critic.", "norm.")),)
        whole, every = Batching(size=config.batch_size), config.actor_every
        target = -float(policy.n_out) if config.target_entropy is None else config.target_entropy
        critic = mean_term("critic_loss", q_losses.squared_td, "q")
        actor = mean_term("actor_loss", q_losses.soft_actor(), "new_q", "new_log_prob", stats=q_losses.mean_log_prob)
        alpha = mean_term("alpha_loss", q_losses.temperature(target), "log_alpha")
        phases = [Phase("critic", (critic,), whole, updaters["critic"])]
        phases += [Phase("actor", (actor,), whole, updaters["actor"], every=every)]
        if "alpha" in updaters:
            phases += [Phase("alpha", (alpha,), whole, updaters["alpha"], every=every)]
        self._phases = tuple(phases)

    def noise(self, draw: Data, ctx: Context) -> Data:
        policy, n = ctx.policy, draw.shape[1]
        both = policy.draw_noise(2 * n, ctx.generator, draw["valid"].device)  # type: ignore[operator]
        return draw.derive(noise=both[:n].unsqueeze(0), next_noise=both[n:].unsqueeze(0))

    def targets(self, draw: Data, ctx: Context) -> Data:
        policy, target = cast(ActorQ, ctx.policy), cast(ActorQ, ctx.bank.policy("target"))
        action, log_prob = policy.draw(rows(draw["next_obs"]), draw["next_noise"][0])
        soft = target.q(rows(draw["next_obs"]), action).amin(0) - policy.alpha * log_prob
        factor = discount(draw, self.config)
        y = draw["reward"] + (factor * soft).masked_fill(factor == 0, 0.0)  # 0 * NaN would be NaN
        return draw.derive(target=y).with_scalars(alpha=policy.alpha)

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


class SAC(OffPolicyAgent):
    """Soft Actor-Critic."""

    name = "sac"
    actions = "continuous"
    paper = "Haarnoja et al. 2018, arXiv 1812.05905"
    Config = SACConfig

    def build(self) -> Learner:
        c: SACConfig = self.config
        policy: ActorQ = self.make_policy({"q": ()}, default=ActorQ)
        policy.log_alpha.data.fill_(math.log(c.alpha))
        updaters: dict[str, Updater] = {
            "actor": self.updater(policy, "actor."),
            "critic": self.updater(policy, "critic.", lr=c.critic_learning_rate or c.learning_rate),
        }
        if c.alpha_learning_rate is not None:
            updaters["alpha"] = self.updater(policy, "log_alpha", lr=c.alpha_learning_rate)
        return self.replay(policy, SACCycle(c, policy, updaters), updaters)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"data": "replay ring", "target": "soft minimum of two", "loss": "squared TD; alpha log pi - min Q"}
