"""MDPO off policy (Tomar, Shani, Efroni, Ghavamzadeh 2020, arXiv 2005.09814, section 5), KL and Tsallis.

States come from a replay memory; pi_k is a copy of the actor, taken every ``m`` gradient steps. In the MDP with
entropy coefficient lambda, c = 1 / t_k constant, a ~ pi_theta reparameterised (gradients flow through a):

    L_pi = mean [c log_q pi(a|s) + q (lambda - c) log_q pi_k(a|s) - Q_1(s, a)] + 1e-3 mean (mu^2 + log sigma^2)
    y    = r + gamma (1 - d) V-(s'),                                       L_Q = 0.5 sum_i mean (Q_i - y)^2
    v    = min_i Q_i(s, a) - lambda log pi(a|s),  stopped,                 L_V = 0.5 mean (V(s) - v)^2

q = 1: KL, log_q is the logarithm; q in (1, 2]: Tsallis, log_q x = (x^{q-1} - 1) / (q - 1). For q = 1
and c = lambda the actor's loss is SAC's, whatever pi_k. The exact step is pi ~ pi_k^{1 - lambda t} exp(t Q).

Slots: data = replay ring; target = state value; loss = reference-weighted log pi - Q1; reference = m steps old self.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from agents.off_policy import ActorCriticReplayConfig, OffPolicyAgent, discount, mean_term, rows
from ccrl.batched_env import Tree
from ccrl.data import Batching, Data
from ccrl.estimators import q_losses
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.terms import LogRatio, Outputs
from ccrl.learn import Cycle, Learner, Polyak
from ccrl.policies import SQUASHED, ActorQ
from ccrl.policies.encoders import mlp
from ccrl.settings import Count, Nonnegative, Positive, Range, Unit
from ccrl.updaters import Updater

__all__ = ["OffPolicyMDPO", "OffPolicyMDPOConfig", "OffPolicyMDPOPolicy"]


@dataclass(frozen=True)
class OffPolicyMDPOConfig(ActorCriticReplayConfig):
    """The paper's off-policy runs."""

    coefficient: Positive = 1.0
    """c = 1 / t_k: the mirror step's divergence has this weight."""
    entropy: Nonnegative = 0.2
    """Lambda: the entropy of the soft MDP has this weight, which stays fixed."""
    tsallis: Annotated[float, Range(1.0, 2.0)] = 1.0
    """q of the divergence: 1 is the KL divergence, up to 2 are Tsallis ones (the paper tunes it per task)."""
    reference_every: Count = 1_000
    """m: the reference policy is copied from the actor at every so many gradient steps."""
    critic: Literal["q1", "min"] = "q1"
    """The actor's loss reads the first critic (the paper) or the smaller of both (as SAC)."""
    state_value: bool = True
    """Targets are of a state-value network and its average (the paper); otherwise of averaged critics (as SAC)."""
    regulariser: Nonnegative = 1e-3
    """Squared means and squared log standard deviations of the actor are penalised with this weight."""
    tau: Unit = 0.005
    """After a gradient step the target networks move by this share towards the networks."""


class OffPolicyMDPOPolicy(ActorQ):
    """``ActorQ`` with a state value ``v`` ``[T', B]`` on the critic's features."""

    own = ActorQ.own | {"v"}

    def __init__(self, *spaces: Any, **settings: Any) -> None:
        super().__init__(*spaces, **settings)
        hidden: Sequence[int] | None = settings.get("critic_hidden")
        hidden = settings.get("hidden", (64, 64)) if hidden is None else hidden
        self.value = mlp([self._width("critic"), *hidden, 1], settings.get("activation", "relu"))

    def v(self, obs: Tree) -> Tensor:
        """``[B]``."""
        value: Tensor = self.value(self.features(obs, "critic")).squeeze(-1)
        return value

    def evaluate(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        out = super().evaluate(batch, want - {"v"}) if want - {"v"} else {}
        return out | ({"v": self.v(rows(batch["obs"])).unsqueeze(0)} if "v" in want else {})


def squared_value(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """``0.5 (V(s) - v)^2``."""
    return 0.5 * (outputs["v"] - batch["state_value"]).square()


def spread(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """``mean_d (mu^2 + log sigma^2)`` of the squashed Gaussian's parameters."""
    return (outputs["new_mean"].square() + outputs["new_log_std"].square()).mean(-1)


class OffPolicyMDPOCycle(Cycle):
    """Actor, critics, state value; averages of the targets, copies of the reference."""

    one_graph = True

    def __init__(self, config: OffPolicyMDPOConfig, updaters: dict[str, Updater]) -> None:
        super().__init__()
        c, whole = config, Batching(size=config.batch_size)
        self.config = c
        self.averages = (
            Polyak("target", c.tau, ("critic.", "value.", "norm.")),
            Polyak("old", 1.0, ("actor.", "norm."), every=c.reference_every),
        )
        loss = q_losses.mirror_descent_actor(SQUASHED, c.coefficient, c.entropy, c.tsallis, c.critic)
        want = ("new_q1" if c.critic == "q1" else "new_q", "new_log_prob", "new_action")
        actor = [mean_term("actor_loss", loss, *want, stats=q_losses.mean_log_prob)]
        if c.regulariser:
            actor += [mean_term("spread", spread, "new_mean", "new_log_std", coef=c.regulariser)]
        critic = mean_term("critic_loss", q_losses.squared_td, "q")
        phases = [Phase("actor", tuple(actor), whole, updaters["actor"])]
        phases += [Phase("critic", (critic,), whole, updaters["critic"])]
        if c.state_value:
            phases += [Phase("value", (mean_term("value_loss", squared_value, "v"),), whole, updaters["value"])]
        self._phases = tuple(phases)

    def noise(self, draw: Data, ctx: Context) -> Data:
        n = draw.shape[1]
        both = ctx.policy.draw_noise(2 * n, ctx.generator, draw["valid"].device)  # type: ignore[operator]
        return draw.derive(noise=both[:n].unsqueeze(0), next_noise=both[n:].unsqueeze(0))

    def targets(self, draw: Data, ctx: Context) -> Data:
        c, policy, target = self.config, ctx.policy, ctx.bank.policy("target")
        old = ctx.bank.policy("old").params(rows(draw["obs"]))  # type: ignore[operator]
        draw = draw.derive(**{f"old_{k}": v.unsqueeze(0) for k, v in old.items()})
        if c.state_value:
            draw = draw.derive(state_value=self._soft(policy, policy, draw, "").unsqueeze(0))
            following = target.v(rows(draw["next_obs"]))  # type: ignore[operator]
        else:
            following = self._soft(policy, target, draw, "next_")
        factor = discount(draw, c)
        return draw.derive(target=draw["reward"] + (factor * following).masked_fill(factor == 0, 0.0))

    def _soft(self, policy: Any, critic: Any, draw: Data, where: str) -> Tensor:
        """``min_i Q_i(s, a) - lambda log pi(a|s)`` ``[B]`` at a sample."""
        obs = rows(draw[f"{where}obs"])
        action, log_prob = policy.draw(obs, draw[f"{where}noise"][0])
        value: Tensor = critic.q(obs, action).amin(0) - self.config.entropy * log_prob
        return value

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


class OffPolicyMDPO(OffPolicyAgent):
    """Mirror Descent Policy Optimization, off policy."""

    name = "mdpo_off_policy"
    actions = "continuous"
    paper = "Tomar et al. 2020, arXiv 2005.09814"
    Config = OffPolicyMDPOConfig

    def build(self) -> Learner:
        c: OffPolicyMDPOConfig = self.config
        policy = self.make_policy({"q": ()}, default=OffPolicyMDPOPolicy if c.state_value else ActorQ)
        names = ("actor", "critic", "value") if c.state_value else ("actor", "critic")
        updaters: dict[str, Updater] = {name: self.updater(policy, f"{name}.") for name in names}
        return self.replay(policy, OffPolicyMDPOCycle(c, updaters), updaters)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"data": "replay ring", "reference": "m steps old self", "loss": "c log pi + (lambda - c) log pi_k - Q1"}
