"""IQL: Implicit Q-Learning (Kostrikov, Nair, Levine 2021, arXiv 2110.06169).

    u      = min_i Q_t,i(s, a) - V(s)
    value  = mean | tau - 1[u < 0] | u^2                         (eq. 5: a tau-expectile over the data's actions)
    critic = sum_i mean (Q_i(s, a) - (r + gamma alive V(s')))^2 / n          (eq. 6; V before its update)
    actor  = - mean min(exp(beta u), 100) log pi(a | s)          (eq. 7; u before the value's update)

No action outside the data is evaluated. The actor's step size falls to 0 along a cosine. Slots: source = the data set;
targets = V(s') and the advantage; phases = value, critic, actor. The clock counts updates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from agents.offline.base import OfflineAgent, Parts, RewardConfig
from agents.offline.bc import term
from agents.offline.policy import OfflinePolicy
from ccrl.data import Batching, Data
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.terms import LogRatio, Outputs
from ccrl.learn import Cycle, Polyak
from ccrl.settings import Nonnegative, Positive, Range
from ccrl.updaters import Updater

__all__ = ["IQL", "IQLConfig", "IQLCycle", "expectile_loss", "weights"]


@dataclass(frozen=True)
class IQLConfig(RewardConfig):
    """Published for MuJoCo; antmaze and sparse mazes take expectile .9 and beta 10."""

    expectile: Annotated[float, Range(0.0, 1.0, above=True, below=True)] = 0.7
    """The value is this expectile of the action values of the data; 0.5 is their mean, larger ones near the best."""
    beta: Nonnegative = 3.0
    """Actions are weighted by the exponential of this number times their advantage; 0 clones."""
    max_weight: Positive = 100.0
    """Weights are cut off here."""
    deterministic: bool = False
    """The actor is fitted by the weighted squared error; else by weighted likelihood with a standard deviation."""
    anneal_actor: bool = True
    """The actor's step size falls to 0 along a cosine over the training."""


class IQL(OfflineAgent):
    """IQL; see the module's docstring."""

    name = "iql"
    paper = "Kostrikov, Nair, Levine 2021, arXiv 2110.06169"
    Config = IQLConfig

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "source": "data set",
            "targets": "value of the successor; advantage under the target critics",
            "phases": "value (expectile); critic; actor (advantage-weighted)",
        }

    def make_networks(self) -> OfflinePolicy:
        return self.networks(stochastic=not self.config.deterministic, critics=2, value=True)

    def parts(self, policy: OfflinePolicy) -> Parts:
        updaters: dict[str, Updater] = {
            "policy": self.updater(policy, "actor"), "value": self.updater(policy, "value"),
            "critic": self.updater(policy, "critic"),
        }  # fmt: skip
        return IQLCycle(self.config, updaters), updaters


class IQLCycle(Cycle):
    """Value, critic, actor; the target critics move after every step."""

    one_graph = True

    def __init__(self, config: IQLConfig, updaters: dict[str, Updater]) -> None:
        super().__init__()
        self.config = config
        self.averages = (Polyak("target", config.polyak, ("critic",)),)
        self._actor = updaters["policy"]
        self._rate = float(self._actor.lr)
        actor = (
            term("actor_loss", _weighted_error, "mean")
            if config.deterministic
            else term("actor_loss", _weighted_nll, "log_prob")
        )
        self._phases = tuple(
            Phase(name, (loss,), Batching(), updaters["policy" if name == "actor" else name])
            for name, loss in (
                ("value", term("value_loss", _value_loss(config.expectile), "value")),
                ("critic", term("critic_loss", _critic_error, "q")),
                ("actor", actor),
            )
        )

    def targets(self, draw: Data, ctx: Context) -> Data:
        c, policy, target = self.config, ctx.policy, ctx.bank.policy("target")
        features, following = (policy.features(draw[k][0]) for k in ("obs", "next_obs"))  # type: ignore[operator]
        best = target.critic(features, draw["action"][0]).amin(0)  # type: ignore[operator]
        value = policy.value(features).squeeze(-1)  # type: ignore[operator]
        after = policy.value(following).squeeze(-1)  # type: ignore[operator]
        weight = weights(best - value, c.beta, c.max_weight)
        target_q = draw["reward"] + draw.discount(c.gamma) * after
        return draw.derive(best=best.unsqueeze(0), weight=weight.unsqueeze(0), target=target_q)

    def phases(self) -> tuple[Phase, ...]:
        return self._phases

    def after_iteration(self, ctx: Context) -> None:
        if self.config.anneal_actor:
            done = (ctx.progress + ctx.share).clamp(0.0, 1.0)
            self._actor.lr.copy_(self._rate * 0.5 * (1.0 + torch.cos(math.pi * done)))


def expectile_loss(u: Tensor, expectile: float) -> Tensor:
    """``| tau - 1[u < 0] | u^2`` per element: its minimum over a constant is the tau-expectile."""
    square = u.square()
    return torch.where(u < 0.0, (1.0 - expectile) * square, expectile * square)


def weights(advantage: Tensor, beta: float, most: float) -> Tensor:
    """``min(exp(beta A), most)``; the exponent is cut off first, so that nothing overflows."""
    return (beta * advantage).clamp_max(math.log(most)).exp()


def _value_loss(expectile: float) -> object:
    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        return expectile_loss(batch["best"] - outputs["value"], expectile)

    return loss


def _critic_error(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    return (outputs["q"] - batch["target"].unsqueeze(-1)).square().mean(-1)


def _weighted_nll(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    return -batch["weight"] * outputs["log_prob"]


def _weighted_error(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    return batch["weight"] * (outputs["mean"] - batch["action"]).square().sum(-1)
