"""BPO: Bounded Policy Optimization (Ao et al. 2026, Bounded Ratio Reinforcement Learning, arXiv 2604.18578).

The surrogate with hard ratio bounds has a closed-form optimum: ratio 1 + eps above the median action value, 1 - eps
below. BPO regresses the ratio onto it with an advantage-weighted L1 loss and learns the median with a second head:

    rho* = c_l + (c_h - c_l) sigmoid((R - U(s)) / lambda),   c_l = 1 - eps_low, c_h = 1 + eps_high
    L_pi = mean |(rho - rho*) w|,   w = R - V(s)  (current critic)  or the stored advantage
    L_V = mean (V - R)^2,           L_U = mean[ softplus(x) - x/2 ],  x = R - U
    L = L_pi + vf_coef L_V + u_coef L_U - ent_coef mean H

No clipping, no advantage normalisation: the gradient-norm clip does the scaling. Slots: heads = median; loss = bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from agents.base import Agent
from agents.on_policy import VALUE, ActorCriticConfig, OnPolicyEstimator, Updaters, check_standardised, cut
from ccrl.data import Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.stages import standardise
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.learn import Learner
from ccrl.policies import MLPPolicy
from ccrl.settings import Above, Activation, Count, Finite, Nonnegative, Positive
from ccrl.updaters import FlatUpdater

__all__ = ["BPO", "BPOConfig"]


@dataclass(frozen=True)
class BPOConfig(ActorCriticConfig):
    """The released code's variant for MuJoCo (github.com/bounded-ratio-rl/bounded_ratio_rl, Stable-Baselines3 half)."""

    search: ClassVar[dict[str, Any]] = {
        "eps_low": {"choice": [0.1, 0.2, 0.25, 0.3]},
        "eps_high": {"choice": [0.1, 0.2, 0.25, 0.3]},
    }
    num_envs: Count = 4
    """The number of parallel environments."""
    n_steps: Count = 512
    """Every iteration takes this many steps in each environment."""
    hidden: tuple[Count, ...] = (256, 256)
    """These are the widths of the hidden layers of the actor and of the critic."""
    activation: Activation = "relu"
    """This function follows every hidden layer."""
    median_hidden: tuple[Count, ...] = (256, 256)
    """These are the widths of the hidden layers of the median head, which sits on the critic's last latent."""
    learning_rate: Positive = 1e-4
    """This is Adam's step size."""
    anneal_lr: bool = False
    """The learning rate falls linearly to 0 over training."""
    batch_size: Count = 256
    """A minibatch has this many environment steps."""
    n_epochs: Count = 10
    """The update passes this many times over each rollout."""
    eps_low: Annotated[float, Above(0, 1)] = 0.25
    """The ratio is bounded below by 1 - eps_low."""
    eps_high: Positive = 0.25
    """The ratio is bounded above by 1 + eps_high."""
    anneal_eps: bool = False
    """Both bounds shrink linearly to 0 over training."""
    temperature: Positive = 1e-3
    """lambda: the ratio target has this temperature, in units of return."""
    use_median: bool = True
    """The threshold is the median head; without it, the value head (the paper's ablation)."""
    median_temperature: Positive | None = None
    """The median's loss has this temperature; None is 1, as released. Equal to `temperature` is the consistent
    choice."""
    advantage: Literal["online", "stored"] = "online"
    """Weights are the return minus the critic being trained (online), or the standardised GAE (stored, as in
    rsl_rl)."""
    recompute_returns: bool = False
    """Values and returns are computed anew before every epoch but the first (rsl_rl)."""
    ent_coef: Finite = 0.0
    """The entropy of the policy is added to the objective with this weight."""
    vf_coef: Nonnegative = 0.5
    """The value loss is added with this weight."""
    u_coef: Nonnegative = 0.5
    """The median loss is added with this weight."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantage == "stored":
            check_standardised(self, "advantage='stored'")


class BPOEstimator(OnPolicyEstimator):
    """Bounded-ratio, value and median terms in one phase."""

    eps_low: Tensor
    eps_high: Tensor

    def __init__(self, config: BPOConfig, policy: MLPPolicy, updaters: Updaters) -> None:
        super().__init__(config, policy)
        c = config
        device = next(policy.parameters()).device
        self.register_buffer("eps_low", torch.tensor(c.eps_low, device=device))
        self.register_buffer("eps_high", torch.tensor(c.eps_high, device=device))
        threshold = "median" if c.use_median else "value"
        loss = losses.bounded_ratio(
            self.eps_low, self.eps_high, c.temperature, threshold=threshold,
            weight="weight" if c.advantage == "stored" else None,
        )  # fmt: skip
        wants = frozenset({"log_prob", "value", threshold})
        stats = partial(_bound_stats, self.eps_low, self.eps_high, self._targets(threshold, c.temperature))
        plain: dict[str, Any] = {"aggregate": aggregates.mean, "advantage": None}
        terms = [
            Term("policy_gradient_loss", loss, aggregates.mean, ratios.token, wants, advantage=None, stats=stats),
            Term("value_loss", losses.value_loss(), want=VALUE, coef=c.vf_coef, **plain),
            Term("entropy_loss", losses.neg_entropy, want=frozenset({"entropy"}), coef=c.ent_coef, **plain),
        ]
        if c.use_median:
            # kappa = (1 - c_l) / (c_h - c_l): the level at which the target ratios average to 1
            kappa = c.eps_low / (c.eps_low + c.eps_high)
            median = losses.median_loss(kappa=kappa, temperature=c.median_temperature or 1.0)
            terms.append(Term("median_loss", median, want=frozenset({"median"}), coef=c.u_coef, **plain))
        before = (lambda data, ctx: self.advantages(data)) if c.recompute_returns else None
        batching = cut(policy, c.n_steps, c.batch_size, c.n_epochs)
        self._phases = (Phase("policy", tuple(terms), batching, updaters["policy"], before),)

    def _targets(self, threshold: str, temperature: float) -> Callable[[Outputs, Data], Tensor]:
        return lambda outputs, batch: losses.bounded_target(
            batch["return"] - outputs[threshold], self.eps_low, self.eps_high, temperature
        )

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        if self.config.anneal_eps:
            # not quite to 0: bounds of zero width are a target of 1 for every ratio
            left = (1.0 - ctx.progress).clamp_min(1e-3)
            self.eps_low.copy_(self.config.eps_low * left)
            self.eps_high.copy_(self.config.eps_high * left)
        return super().prepare(have, ctx)

    def advantages(self, data: Data) -> Data:
        data = super().advantages(data)
        if self.config.advantage == "stored":
            data = data.derive(weight=standardise(data["advantage"], data["valid"]))
        return data

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


def _bound_stats(
    low: Tensor,
    high: Tensor,
    targets: Callable[[Outputs, Data], Tensor],
    ratio: LogRatio,
    advantage: Tensor,
    outputs: Outputs,
    batch: Data,
) -> dict[str, Tensor]:
    stats = losses.ratio_stats(low, high)(ratio, advantage, outputs, batch)
    return {**stats, "target_gap": (ratio.ratio - targets(outputs, batch)).abs()}


class BPO(Agent):
    """Bounded Policy Optimization."""

    name = "bpo"
    paper = "Ao et al. 2026, arXiv 2604.18578"
    Config = BPOConfig

    def build(self) -> Learner:
        c: BPOConfig = self.config
        heads: dict[str, Sequence[int]] = {"value": ()}
        if c.use_median:
            heads["median"] = c.median_hidden
        policy = self.make_policy(heads)
        updaters: Updaters = {
            "policy": FlatUpdater(policy, lr=c.learning_rate, max_grad_norm=c.max_grad_norm, eps=c.adam_eps)
        }
        return self.rollouts(policy, BPOEstimator(c, policy, updaters), updaters)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "prepare": "values, GAE",
            "ratio": "token",
            "loss": "|rho - rho*| |w| + value + median",
            "aggregate": "minibatch mean",
            "heads": "median",
        }
