"""TD3+BC: a minimalist approach to offline RL (Fujimoto and Gu 2021, arXiv 2106.06860).

    a'     = clip(pi_t(s') + clip(0.2 n, -0.5, 0.5), -1, 1)
    y      = r + gamma alive min_i Q_t,i(s', a')
    critic = sum_i mean (Q_i(s, a) - y)^2
    actor  = - lam mean Q_1(s, pi(s)) + mean (pi(s) - a)^2,     lam = alpha / mean |Q_1(s, pi(s))| (no gradient)

The actor and the targets move every second step. Slots: source = the data set; targets = twin minimum with smoothed
target actions; phases = critic, actor. The clock counts updates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.offline.base import OfflineAgent, Parts, RewardConfig
from agents.offline.bc import action_error, term
from agents.offline.policy import OfflinePolicy
from agents.on_policy import check_unused
from ccrl.data import Batching, Data
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.terms import LogRatio, Outputs
from ccrl.learn import Cycle, Polyak
from ccrl.settings import Count, Nonnegative
from ccrl.updaters import Updater

__all__ = ["TD3BC", "TD3BCConfig", "TD3BCCycle", "scale", "scaled_value_loss"]


@dataclass(frozen=True)
class TD3BCConfig(RewardConfig):
    """The published settings."""

    alpha: Nonnegative = 2.5
    """The value's weight next to the squared error of the actions; 0 is cloning."""
    target_noise: Nonnegative = 0.2
    """Target actions, in [-1, 1], get normal noise of this standard deviation."""
    noise_clip: Nonnegative = 0.5
    """That noise is clipped to plus or minus this number."""
    policy_delay: Count = 2
    """The actor and the target networks move at every this many gradient steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_noise == 0.0:
            check_unused(self, "target actions have no noise", "noise_clip")


class TD3BC(OfflineAgent):
    """TD3+BC; see the module's docstring."""

    name = "td3_bc"
    paper = "Fujimoto, Gu 2021, arXiv 2106.06860"
    Config = TD3BCConfig

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "source": "data set",
            "targets": "minimum of two target critics at smoothed target actions",
            "phases": "critic; actor with squared error to the data's action",
        }

    def make_networks(self) -> OfflinePolicy:
        return self.networks(critics=2)

    def parts(self, policy: OfflinePolicy) -> Parts:
        updaters: dict[str, Updater] = {
            "policy": self.updater(policy, "actor"), "critic": self.updater(policy, "critic"),
        }  # fmt: skip
        return TD3BCCycle(self.config, updaters), updaters


class TD3BCCycle(Cycle):
    """Critic, actor, targets."""

    one_graph = True

    def __init__(self, config: TD3BCConfig, updaters: dict[str, Updater]) -> None:
        super().__init__()
        self.config = config
        delay = config.policy_delay
        self.averages = (Polyak("target", config.polyak, ("actor.", "critic."), every=delay),)
        losses = (term("actor_loss", scaled_value_loss(config.alpha), "mean_q1"), term("bc_loss", action_error, "mean"))
        self._phases = (
            Phase("critic", (term("critic_loss", critic_error, "q"),), Batching(), updaters["critic"]),
            Phase("actor", losses, Batching(), updaters["policy"], every=delay),
        )

    def noise(self, batch: Data, ctx: Context) -> Data:
        draw = torch.randn(batch["action"].shape, generator=ctx.generator, device=batch["action"].device)
        return batch.derive(noise=draw)

    def targets(self, draw: Data, ctx: Context) -> Data:
        c = self.config
        target = ctx.bank.policy("target")
        features = target.features(draw["next_obs"][0])  # type: ignore[operator]
        noise = (c.target_noise * draw["noise"][0]).clamp(-c.noise_clip, c.noise_clip)
        action = (target.mean(features) + noise).clamp(-1.0, 1.0)  # type: ignore[operator]
        following = target.critic(features, action).amin(0)  # type: ignore[operator]
        return draw.derive(target=draw["reward"] + draw.discount(c.gamma) * following)

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


def critic_error(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """Squared errors to the column ``target``, summed over the critics, ``[1, B]``."""
    return (outputs["q"] - batch["target"].unsqueeze(-1)).square().sum(-1)


def scale(q: Tensor, alpha: float) -> Tensor:
    """``alpha / mean |q|``, 0-d and without gradient: the value's weight, whatever the size of returns."""
    return alpha / q.detach().abs().mean().clamp_min(1e-7)


def scaled_value_loss(alpha: float) -> object:
    """``- lam Q_1(s, pi(s))``, ``[1, B]``."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        q = outputs["mean_q1"]
        return -scale(q, alpha) * q

    return loss
