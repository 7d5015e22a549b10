"""CrossQ: SAC without target networks (Bhatt et al. 2024, arXiv 1902.05605), batch renormalisation in all networks.

The critics are evaluated ONCE per step, in training mode, on both halves together, so that batch statistics mix them:

    [q; q'] = Q([(s, a); (s', a')]),    a' ~ pi(.|s') with running statistics, no gradient
    y       = r + gamma (1 - d) (min_i q'_i - alpha log pi(a'|s')),  stopped;    loss 0.5 sum_i mean (q_i - y)^2
    actor     mean [alpha log pi - min_i Q_i(s, a_theta)] at every third step: actor in training mode, critics not
    alpha     as SAC's, after the actor

The second half has gradients through the batch statistics. Published critics are 2,048 wide. See docs/crossq.md.

Slots: data = replay ring; target = soft minimum of the joint forward pass; loss = squared TD, alpha log pi - min Q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from agents.off_policy import OffPolicyAgent, discount, mean_term, rows
from agents.sac import SACConfig, SACCycle
from ccrl.data import Data, tree_map
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.terms import LogRatio, Outputs
from ccrl.learn import Learner
from ccrl.policies import ActorQ, TwinQ
from ccrl.policies.batch_renorm import RenormEnsemble, RenormMLP
from ccrl.settings import Count, Natural, Positive, Range, Unit
from ccrl.updaters import Updater

__all__ = ["CrossQ", "CrossQConfig", "CrossQPolicy"]


@dataclass(frozen=True)
class CrossQConfig(SACConfig):
    """The paper's runs; narrower critics (512, 512) are what a few cores can train."""

    search: ClassVar[dict[str, Any]] = {"tau": None}  # it has no target networks
    learning_starts: Natural = 5_000
    """Actions are uniform and nothing is learnt before this many environment steps."""
    learning_rate: Positive = 1e-3
    """This is Adam's step size, of the actor and of the critics unless they have their own."""
    alpha_learning_rate: Positive | None = 1e-3
    """This is Adam's step size for the temperature's logarithm; None keeps the temperature fixed."""
    adam_beta1: Annotated[float, Range(0, 1, below=True)] = 0.5
    """Adam's first moment of actor and critics decays by this factor."""
    critic_hidden: tuple[Count, ...] | None = (2048, 2048)
    """These are the widths of the critics' hidden layers; None makes them the actor's."""
    actor_every: Count = 3
    """The actor and the temperature are updated at every so many gradient steps of the critics."""
    warm_up: Natural = 100_000
    """A normalisation layer is plain batch normalisation for its first so many training batches."""
    tau: Unit = 1.0
    """There are no target networks: expected to stay 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau != 1.0:
            raise ValueError(f"tau: CrossQ has no target networks; expected the default 1.0, got {self.tau!r}")


class CrossQPolicy(ActorQ):
    """``ActorQ`` with batch renormalisation; ``next_q`` ``[T', B, n]`` comes with ``q``, of one joint forward pass."""

    own = ActorQ.own | {"next_q"}

    def __init__(self, *spaces: Any, warm_up: int = 100_000, **settings: Any) -> None:
        self._warm_up = warm_up
        super().__init__(*spaces, **settings)
        hidden, activation = settings.get("hidden", (64, 64)), settings.get("activation", "relu")
        self.actor.net = RenormMLP([self._width("actor"), *hidden, self._outputs], activation, warm_up)  # type: ignore[assignment]

    def _make_critic(
        self,
        width: int,
        hidden: Sequence[int],
        activation: str,
        heads: Mapping[str, Sequence[int]],
        gains: Callable[[int, float], list[float] | None],
    ) -> nn.Module:
        net = RenormEnsemble(self.n_critics, width + self.n_out, hidden, activation, self._warm_up)
        return TwinQ(width, self.n_out, net=net)

    def _trained_params(self, latent: Tensor) -> dict[str, Tensor]:
        return self._named_params(self.actor.net(latent, training=True))

    def evaluate(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        rest = want - {"q", "next_q"} if "next_q" in want else want
        out = super().evaluate(batch, rest) if rest else {}
        if rest != want:
            features = [self.features(tree_map(lambda x: x[0], batch[k]), "critic") for k in ("obs", "next_obs")]
            action = torch.cat([batch["action"][0], batch["next_action"][0]])
            joint = self.critic(torch.cat(features), self.critic_action(action), training=True)
            q, following = joint.t().unsqueeze(0).chunk(2, 1)
            out |= {"q": q, "next_q": following}
        return out


def joint_td(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """``0.5 sum_i (q_i - y)^2`` with the target of the same forward pass, stopped."""
    factor = batch["factor"]
    soft = outputs["next_q"].detach().amin(-1) - batch["alpha"] * batch["next_log_prob"]
    target = batch["reward"] + (factor * soft).masked_fill(factor == 0, 0.0)
    return 0.5 * (outputs["q"] - target.unsqueeze(-1)).square().sum(-1)


class CrossQCycle(SACCycle):
    """SAC's, with another critic loss and no averages."""

    def __init__(self, config: CrossQConfig, policy: ActorQ, updaters: dict[str, Updater]) -> None:
        super().__init__(config, policy, updaters)
        critic, *others = self._phases
        term = mean_term("critic_loss", joint_td, "q", "next_q")
        self._phases, self.averages = (Phase("critic", (term,), critic.batching, critic.updater), *others), ()

    def targets(self, draw: Data, ctx: Context) -> Data:
        policy = cast(ActorQ, ctx.policy)
        action, log_prob = policy.draw(rows(draw["next_obs"]), draw["next_noise"][0])
        found = {"next_action": action, "next_log_prob": log_prob}
        draw = draw.derive(factor=discount(draw, self.config), **{k: v.unsqueeze(0) for k, v in found.items()})
        return draw.with_scalars(alpha=policy.alpha)


class CrossQ(OffPolicyAgent):
    """Soft Actor-Critic with batch renormalisation in place of target networks."""

    name = "crossq"
    actions = "continuous"
    paper = "Bhatt et al. 2024, arXiv 1902.05605"
    Config = CrossQConfig

    def build(self) -> Learner:
        c: CrossQConfig = self.config
        policy = self.make_policy({"q": ()}, default=CrossQPolicy, warm_up=c.warm_up)
        policy.log_alpha.data.fill_(math.log(c.alpha))
        betas, rate = (c.adam_beta1, 0.999), c.critic_learning_rate or c.learning_rate
        updaters: dict[str, Updater] = {
            "actor": self.updater(policy, "actor.", betas=betas),
            "critic": self.updater(policy, "critic.", lr=rate, betas=betas),
        }
        if c.alpha_learning_rate is not None:
            updaters["alpha"] = self.updater(policy, "log_alpha", lr=c.alpha_learning_rate)
        return self.replay(policy, CrossQCycle(c, policy, updaters), updaters)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"data": "replay ring", "target": "joint forward pass", "loss": "squared TD; alpha log pi - min Q"}
