"""BC: behavioural cloning, also of the best episodes alone (Chen et al. 2021, "10% BC").

    loss = mean || pi(s) - a ||^2          deterministic: pi = tanh(net), actions in [-1, 1]
         = - mean log N(a; pi(s), sigma)   stochastic

Slots: source = the data set; phases = one regression. The clock counts updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from agents.offline.base import OfflineAgent, OfflineConfig, Parts
from agents.offline.policy import OfflinePolicy
from ccrl.data import Batching, Data
from ccrl.estimators import aggregates
from ccrl.estimators.base import Phase
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.learn import Cycle
from ccrl.offline import Dataset
from ccrl.replay import ReplayBuffer
from ccrl.settings import Above
from ccrl.updaters import Updater

__all__ = ["BC", "BCConfig", "action_error", "term"]


@dataclass(frozen=True)
class BCConfig(OfflineConfig):
    """Plain cloning of the whole data set."""

    stochastic: bool = False
    """The actor has a standard deviation of its own and is fitted by maximum likelihood; else by squared error."""
    best: Annotated[float, Above(0.0, 1.0)] = 1.0
    """This share of the episodes, those with the highest discounted (0.99) returns, is cloned."""


class BC(OfflineAgent):
    """Behavioural cloning; see the module's docstring."""

    name = "bc"
    paper = "Behavioural cloning; of the best episodes: Chen et al. 2021, arXiv 2106.01345"
    Config = BCConfig
    reads = ("obs", "action")

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"source": "data set", "phases": "regression of actions"}

    def make_networks(self) -> OfflinePolicy:
        return self.networks(stochastic=self.config.stochastic)

    def rows(self, data: Dataset, policy: OfflinePolicy) -> ReplayBuffer:
        return super().rows(data if self.config.best == 1.0 else data.best(self.config.best), policy)

    def parts(self, policy: OfflinePolicy) -> Parts:
        updaters: dict[str, Updater] = {"policy": self.updater(policy, "actor")}
        loss = term("nll", _nll, "log_prob") if self.config.stochastic else term("bc_loss", action_error, "mean")
        return Cloning(updaters["policy"], loss), updaters


class Cloning(Cycle):
    """One regression."""

    def __init__(self, updater: Updater, loss: Term) -> None:
        super().__init__()
        self._phases = (Phase("actor", (loss,), Batching(), updater),)

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


def term(name: str, loss: object, *want: str) -> Term:
    """A mean over the batch of a loss on these forward outputs."""
    return Term(name, loss, aggregates.mean, want=frozenset(want), advantage=None)  # type: ignore[arg-type]


def action_error(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """Squared error of the actor's mean, averaged over action dimensions, ``[1, B]``."""
    return (outputs["mean"] - batch["action"]).square().mean(-1)


def _nll(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    return -outputs["log_prob"]
