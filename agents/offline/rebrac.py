"""ReBRAC: TD3 with penalties on actor and critic (Tarasov, Kurenkov, Nikulin, Kolesnikov 2023, arXiv 2305.09836).

    y      = r + gamma alive (min_i Q_t,i(s', a') - b2 || a' - a'_data ||^2)     a'_data: the action that followed
    critic = sum_i mean (Q_i(s, a) - y)^2
    actor  = mean b1 || pi(s) - a ||^2 - lam min_i Q_i(s, pi(s)),     lam = 1 / mean |min Q| (no gradient)

Critics have layer normalisation and all networks three hidden layers. A row that no action followed (a time-out, the
end of the recording) has no penalty in its target. Slots: source = the data set with next actions; targets = TD3's
with the penalty; phases = critic, actor. The clock counts updates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from agents.offline.base import OfflineAgent, Parts
from agents.offline.bc import term
from agents.offline.policy import OfflinePolicy
from agents.offline.td3_bc import TD3BCConfig, TD3BCCycle, critic_error, scale
from ccrl.data import Batching, Data
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.terms import LogRatio, Outputs
from ccrl.learn import Cycle, Polyak
from ccrl.offline import Dataset
from ccrl.offline.dataset import Array
from ccrl.settings import Count, Nonnegative, Positive
from ccrl.updaters import Updater

__all__ = ["ReBRAC", "ReBRACConfig"]


@dataclass(frozen=True)
class ReBRACConfig(TD3BCConfig):
    """Published defaults; the two penalties are chosen per data set (hopper-medium: .01 and .01, mazes .003, .001)."""

    batch_size: Count = 1024
    """A gradient step reads this many transitions, drawn with replacement (256 for mazes)."""
    hidden: tuple[Count, ...] = (256, 256, 256)
    """These are the widths of the hidden layers of every network."""
    learning_rate: Positive = 1e-3
    """This is Adam's step size."""
    normalise_obs: bool = False
    """Observations are standardised with the data set's mean and standard deviation, in evaluation too."""
    alpha: Nonnegative = 1.0
    """The value's weight in the actor's loss, over the mean size of the values; 0 is cloning."""
    actor_penalty: Nonnegative = 0.01
    """b1 weighs the squared distance of the actor's action from the data's."""
    critic_penalty: Nonnegative = 0.01
    """b2 weighs that distance in the target."""


class ReBRAC(OfflineAgent):
    """ReBRAC; see the module's docstring."""

    name = "rebrac"
    paper = "Tarasov, Kurenkov, Nikulin, Kolesnikov 2023, arXiv 2305.09836"
    Config = ReBRACConfig
    reads = (*OfflineAgent.reads, "next_action", "has_next")

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "source": "data set with the actions that followed",
            "targets": "TD3's less a penalty on the next action's distance from the data",
            "phases": "critic; actor with the penalty",
        }

    def make_networks(self) -> OfflinePolicy:
        return self.networks(critics=2, layer_norm=True)

    def columns(self, data: Dataset, policy: OfflinePolicy) -> dict[str, Array]:
        found = super().columns(data, policy)
        # of actions in [-1, 1], as the actor's are
        following, there = replace(data, action=found["action"]).next_action()
        return found | {"next_action": following, "has_next": there}

    def parts(self, policy: OfflinePolicy) -> Parts:
        updaters: dict[str, Updater] = {
            "policy": self.updater(policy, "actor"), "critic": self.updater(policy, "critic"),
        }  # fmt: skip
        return ReBRACCycle(self.config, updaters), updaters


class ReBRACCycle(TD3BCCycle):
    """TD3+BC's with both penalties."""

    def __init__(self, config: ReBRACConfig, updaters: dict[str, Updater]) -> None:
        Cycle.__init__(self)
        self.config: ReBRACConfig = config
        delay = config.policy_delay
        self.averages = (Polyak("target", config.polyak, ("actor.", "critic."), every=delay),)
        losses = (term("actor_loss", _least_value(config.alpha), "mean_q"),
                  term("bc_loss", _penalty(config.actor_penalty), "mean"))  # fmt: skip
        self._phases = (
            Phase("critic", (term("critic_loss", critic_error, "q"),), Batching(), updaters["critic"]),
            Phase("actor", losses, Batching(), updaters["policy"], every=delay),
        )

    def targets(self, draw: Data, ctx: Context) -> Data:
        c, target = self.config, cast(OfflinePolicy, ctx.bank.policy("target"))
        features = target.features(draw["next_obs"][0])
        noise = (c.target_noise * draw["noise"][0]).clamp(-c.noise_clip, c.noise_clip)
        action = (target.mean(features) + noise).clamp(-1.0, 1.0)
        away = (action - draw["next_action"][0]).square().sum(-1) * draw["has_next"][0]
        following = target.critic(features, action).amin(0) - c.critic_penalty * away
        return draw.derive(target=draw["reward"] + draw.discount(c.gamma) * following)


def _least_value(alpha: float) -> object:
    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        q = outputs["mean_q"].amin(-1)
        return -scale(q, alpha) * q

    return loss


def _penalty(weight: float) -> object:
    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        return weight * (outputs["mean"] - batch["action"]).square().sum(-1)

    return loss
