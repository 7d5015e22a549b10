"""DCPO: Distribution-Centric Policy Optimization (Li et al. 2026, arXiv 2601.12730).

Entropy is held at a target by a REINFORCE term on correct samples that is importance-weighted toward a hotter (or
colder) version of the policy; sampling stays on-policy. Not "Dynamic Clipping Policy Optimization", also called DCPO.

    T_c   = 1.2 if H <= H_0 else 0.8                    H: entropy of the last update, H_0: its target
    rho_t = pi_old^{T_c}(o_t) / pi_old(o_t)             no gradient
    x     = min(|H_0 - H|, 0.1) / p,  alpha = x / (1 + x),  p: fraction of correct completions
    A'_t  = (1 - alpha) A_i + alpha c_i rho_t           c_i: whether completion i is correct
    loss  = GRPO's clipped loss of A' (dual clip at 3 where A' < 0), token mean

Why it controls entropy: for one softmax ``E_pi[rho grad log pi] = pi^{T_c} - pi`` in the logits, a pull toward the
tempered policy. Slots: stage = entropy control of the advantage; loss = dual clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.recipe import MethodConfig, Parts, Recipe
from ccrl.estimators.terms import Loss, Term
from ccrl.settings import Above, Finite, Nonnegative, Range
from ccrl.updaters import Stats

__all__ = ["DCPO", "DCPOConfig", "DCPORecipe", "control_weight", "tempered_log_prob"]


@dataclass(frozen=True)
class DCPOConfig(MethodConfig):
    """The released settings. Equal temperatures of 1 are the ablation without importance weights."""

    entropy_target: Nonnegative = 0.5
    """H_0: the entropy is steered to this many nats per token."""
    hot: Annotated[float, Range(1.0)] = 1.2
    """T_c where the entropy is at most its target, in units of the sampling temperature."""
    cold: Annotated[float, Above(0.0, 1.0)] = 0.8
    """T_c where the entropy is above its target, in units of the sampling temperature."""
    gap_cap: Nonnegative = 0.1
    """An entropy error counts up to this many nats."""
    correct_above: Finite = 0.05
    """Completions with a larger reward are correct."""
    dual_clip: Annotated[float, Above(1.0)] = 3.0
    """Where the advantage is negative, the loss is at most this many times its size."""


def control_weight(entropy: Tensor, target: float, correct: Tensor, cap: float) -> Tensor:
    """``alpha`` (0-d) from the entropy (0-d) and the fraction of correct completions (0-d). None correct: 0, there is
    nothing to reinforce (the quotient would be NaN)."""
    x = (target - entropy).abs().clamp_max(cap) / correct
    return torch.where(correct > 0, x / (1.0 + x), torch.zeros_like(x))


@torch.no_grad()
def tempered_log_prob(policy: Any, data: Data, temperature: float, columns: int | None) -> Tensor:
    """``[T, N]``: log-probability of the tokens at ``temperature`` times the sampling temperature, evaluated for at
    most ``columns`` completions at a time."""
    found = [policy.log_prob(piece, temperature * policy.temperature) for piece in data.microbatches(columns)]
    return torch.cat(found, 1)


class DCPORecipe(Recipe):
    """The advantage is mixed before the update, the entropy measured in it.

    Needs a token policy: the distribution of a control policy has no temperature.
    """

    entropy: Tensor

    def __init__(self, config: Any, parts: Parts) -> None:
        if not hasattr(parts.policy, "temperature"):
            raise ValueError("dcpo compares the policy at two temperatures: expected a token policy, got one without a "
                             "temperature")  # fmt: skip
        super().__init__(config, parts)
        # 0 as released: the first update raises the entropy by all that the cap allows
        self.register_buffer("entropy", torch.zeros(()))

    def stages(self) -> tuple[Stage, ...]:
        return (*super().stages(), self.control)

    def control(self, data: Data) -> Data:
        """``rho`` ``[T, N]``; ``advantage`` mixed with it."""
        c = self.config
        temperature = c.hot if bool(self.entropy <= c.entropy_target) else c.cold
        valid = data["valid"]
        log_prob = tempered_log_prob(self.parts.policy, data, temperature, c.microbatch or None)
        # log-probabilities of padding may be anything, also infinite
        rho = torch.where(valid > 0, log_prob - data["log_prob"], torch.zeros_like(valid)).exp()
        counted = (valid.sum(0) > 0).to(valid.dtype)
        correct = (data["episode_reward"] > c.correct_above).to(valid.dtype) * counted
        alpha = control_weight(self.entropy, c.entropy_target, correct.sum() / counted.sum(), c.gap_cap)
        mixed = (1.0 - alpha) * data["advantage"] + alpha * correct * rho
        return data.derive(rho=rho, advantage=mixed * (valid > 0))

    def loss(self) -> Loss:
        c = self.config
        return losses.clip(c.clip_low, c.clip_high, c.dual_clip)

    def terms(self) -> tuple[Term, ...]:
        # of no weight: the estimate of H is the update's own mean of -log pi, over tokens whatever the loss averages
        entropy = Term(
            "sampled_entropy", losses.neg_log_prob, aggregates.mean, ratios.token, advantage=None, coef=0.0
        )  # fmt: skip
        return (*super().terms(), entropy)

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        self.entropy.copy_(stats["sampled_entropy"])


DCPO = LLMMethod(
    "dcpo",
    "Li et al. 2026, arXiv 2601.12730",
    DCPOConfig,
    DCPORecipe,
    {
        "advantage": "group z-score + correct samples weighted toward another temperature",
        "ratio": "token",
        "loss": "dual clip",
        "aggregate": "token mean",
    },
    {"weight_decay": 1e-2},
)
"""Distribution-Centric Policy Optimization."""
