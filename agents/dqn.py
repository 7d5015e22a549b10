"""DQN (Mnih et al. 2015) and QR-DQN (Dabney et al. 2018, arXiv 1710.10044) on the replay learner.

    DQN      y = r + gamma (1 - d) max_a Q-(s', a),  with ``double`` Q-(s', argmax_a Q(s', a));
             loss Huber(y - Q(s, a))
    QR-DQN   theta_i(s, a), i = 1..N, are quantiles of the return at tau_i = (i - .5) / N; a* maximises the mean of the
             target's quantiles at s';   y_j = r + gamma (1 - d) theta-_j(s', a*);
             loss sum_i mean_j |tau_i - 1{u_ij < 0}| Huber(u_ij),   u_ij = y_j - theta_i(s, a)

DQN is the case N = 1 with the loss doubled. Actions are epsilon-greedy; the target network is a copy. docs/dqn.md.

Slots: data = replay ring; target = max of the target network; loss = (quantile) Huber.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from agents.off_policy import OffPolicyAgent, OffPolicyConfig, discount, mean_term, rows
from ccrl.data import Batching, Data
from ccrl.estimators import q_losses
from ccrl.estimators.base import Context, Phase
from ccrl.learn import Cycle, Learner, Polyak
from ccrl.policies import QuantilePolicy
from ccrl.settings import Count, Natural, Nonnegative, Positive, Unit
from ccrl.updaters import FlatUpdater, Updater

__all__ = ["DQN", "QRDQN", "DQNConfig", "QRDQNConfig", "QuantileCycle"]


@dataclass(frozen=True)
class DQNConfig(OffPolicyConfig):
    """Small networks on vectors of numbers."""

    search: ClassVar[dict[str, Any]] = {
        "target_every": {"choice": [250, 1_000, 4_000]},
        "exploration_fraction": {"choice": [0.1, 0.2, 0.5]},
        "max_grad_norm": {"choice": [0.5, 1.0, 10.0]},
    }
    learning_starts: Natural = 1_000
    """Actions are uniform and nothing is learnt before this many environment steps."""
    batch_size: Count = 64
    """A gradient step reads this many transitions, drawn with replacement."""
    max_grad_norm: Positive = 10.0
    """Gradients are scaled down to this norm."""
    kappa: Nonnegative = 1.0
    """The loss is quadratic within this distance and linear beyond it; 0 is the absolute error."""
    double: bool = False
    """The live network chooses the action that the target network values (van Hasselt et al. 2016)."""
    target_every: Count = 1_000
    """The target network is copied at every so many gradient steps."""
    exploration_start: Unit = 1.0
    """The probability of a uniform action starts at this value."""
    exploration_end: Unit = 0.05
    """The probability of a uniform action falls to this value."""
    exploration_fraction: Unit = 0.1
    """The fall takes this share of the training."""


@dataclass(frozen=True)
class QRDQNConfig(DQNConfig):
    """As DQN."""

    n_quantiles: Count = 50
    """The distribution of the return has this many quantiles per action."""


class QuantileCycle(Cycle):
    """One phase; the target network is a copy."""

    one_graph = True

    def __init__(self, config: DQNConfig, updater: Updater) -> None:
        super().__init__()
        self.config, self.averages = config, (Polyak("target", 1.0, every=config.target_every),)
        term = mean_term("quantile_loss", q_losses.quantile_loss(config.kappa), "quantiles")
        self._phases = (Phase("critic", (term,), Batching(size=config.batch_size), updater),)

    def targets(self, draw: Data, ctx: Context) -> Data:
        following: Any = rows(draw["next_obs"])
        values = ctx.bank.policy("target").quantiles(following)  # type: ignore[operator]
        chooser = ctx.policy.quantiles(following) if self.config.double else values  # type: ignore[operator]
        best = chooser.mean(-1).argmax(-1)[:, None, None].expand(-1, 1, values.shape[-1])
        chosen, factor = values.gather(1, best).squeeze(1), discount(draw, self.config)[0].unsqueeze(-1)
        y = draw["reward"][0].unsqueeze(-1) + (factor * chosen).masked_fill(factor == 0, 0.0)
        return draw.derive(target=y.unsqueeze(0))

    def phases(self) -> tuple[Phase, ...]:
        return self._phases

    def after_iteration(self, ctx: Context) -> None:
        c = self.config
        done = (ctx.progress / max(c.exploration_fraction, 1e-9)).clamp(0.0, 1.0)
        epsilon = c.exploration_start + (c.exploration_end - c.exploration_start) * done
        ctx.policy.epsilon.copy_(epsilon)  # type: ignore[operator, union-attr]


class DQN(OffPolicyAgent):
    """Deep Q-network."""

    name = "dqn"
    example_env = "CartPole-v1"
    """What the command line offers: an id that this agent accepts."""
    actions = "discrete"
    paper = "Mnih et al. 2015, doi 10.1038/nature14236"
    Config: ClassVar[type[Any]] = DQNConfig

    def build(self) -> Learner:
        c: DQNConfig = self.config
        policy = self.make_policy({}, default=QuantilePolicy, n_quantiles=getattr(c, "n_quantiles", 1))
        policy.epsilon.fill_(c.exploration_start)
        updater = FlatUpdater(policy, lr=c.learning_rate, max_grad_norm=c.max_grad_norm, eps=c.adam_eps)
        return self.replay(policy, QuantileCycle(c, updater), {"critic": updater})

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"data": "replay ring", "target": "max of the target network", "loss": "(quantile) Huber"}


class QRDQN(DQN):
    """Quantile-regression DQN."""

    name = "qr_dqn"
    paper = "Dabney et al. 2018, arXiv 1710.10044"
    Config = QRDQNConfig
