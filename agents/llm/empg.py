"""EMPG: Entropy-Modulated Policy Gradients (Wang et al. 2025, arXiv 2509.09265).

The size of a softmax policy's gradient follows its entropy: ``E |grad_z log pi|^2 = 1 - sum_v pi_v^2``. So every step's
advantage is rescaled by a falling function of the step's entropy, and clear steps ahead are rewarded:

    H_it  = mean entropy of the tokens of step t of trajectory i, under the policy that sampled them
    Hn    = (H - min H) / (max H - min H + eps)                     over all steps of the batch
    g     = exp(-k Hn) / mean exp(-k Hn),    f = exp(-k' Hn)
    A_it  = A_i g(H_it) + zeta f(H_i,t+1)                           no bonus for a trajectory's last step
    A     = A_it - mean over steps                                  every step counts once, however long
    loss  = -min(rho A, clip(rho) A)

A step is what the agent writes between two replies of its environment (``step="turn"``; a single-turn answer is one
step), and can be cut further at a delimiter token, or be a single token: an environment step of control episodes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data, Field
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.recipe import Aggregation, MethodConfig, Recipe
from ccrl.estimators.steps import find_steps
from ccrl.settings import Nonnegative, Range

__all__ = ["EMPG", "EMPGConfig", "EMPGRecipe", "ModulateSteps", "modulate"]

EPS = 1e-8


@dataclass(frozen=True)
class EMPGConfig(MethodConfig):
    """The authors' pseudocode on top of GRPO."""

    scale: Nonnegative = 1.0
    """k: a step's entropy scales its advantage this strongly; 0 scales none."""
    clarity: Nonnegative = 1.0
    """k': the bonus falls this strongly with the entropy of the step ahead."""
    zeta: Nonnegative = 0.1
    """The bonus for a clear step ahead has this weight."""
    step: Literal["turn", "delimiter", "token"] = "turn"
    """A step is the tokens between two replies (turn), these cut after every delimiter token, or each token."""
    delimiter: Annotated[int, Range(-1)] = -1
    """This token ends a step with step="delimiter"; -1 is none."""
    aggregate: Aggregation = "sequence_mean_token_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.step == "delimiter") != (self.delimiter >= 0):
            raise ValueError(
                "delimiter: expected a token (>= 0) with step='delimiter' and -1 without, got "
                f"{self.delimiter} with step={self.step!r}"
            )


def modulate(
    advantage: Tensor, entropy: Tensor, last: Tensor, *, scale: float = 1.0, clarity: float = 1.0, zeta: float = 0.1
) -> tuple[Tensor, Tensor]:
    """The centred advantages and the factors ``g`` of ``S >= 1`` steps, from their trajectories' ``advantage``, their
    ``entropy`` and whether each is the ``last`` of its trajectory, all ``[S]``."""
    low, high = entropy.min(), entropy.max()
    normed = (entropy - low) / (high - low + EPS)
    weight = torch.exp(-scale * normed)
    factor = weight / (weight.mean() + EPS)
    ahead = torch.exp(-clarity * normed).roll(-1)
    modulated = advantage * factor + torch.where(last, torch.zeros_like(ahead), zeta * ahead)
    return modulated - modulated.mean(), factor


@dataclass(frozen=True)
class ModulateSteps:
    """A new ``advantage``, and ``step_scale`` (the factors g) ``[T, N]``, from ``advantage`` and ``entropy`` over the
    whole rollout; one without any step is returned as it is."""

    config: EMPGConfig

    def __call__(self, data: Data) -> Data:
        c, valid, advantage = self.config, data["valid"], data["advantage"]
        if c.step == "delimiter" and "action" not in data:
            raise ValueError(f"step='delimiter' looks for token {c.delimiter}; expected a column of tokens 'action'")
        steps = find_steps(valid, data["action"] if c.step == "delimiter" else None, c.step, c.delimiter)
        if len(steps.tokens) == 0:
            return data
        if len(steps.tokens) == 1:
            warnings.warn("EMPG: the batch has one step, and centring makes its advantage 0", stacklevel=2)
        found, factor = modulate(
            steps.mean(advantage, valid), steps.mean(data["entropy"].to(advantage.dtype), valid), steps.last,
            scale=c.scale, clarity=c.clarity, zeta=c.zeta,
        )  # fmt: skip
        return data.derive(advantage=steps.spread(found, valid), step_scale=steps.spread(factor, valid))


class EMPGRecipe(Recipe):
    """GRPO's advantages, modulated step by step."""

    fields = (Field("entropy"),)

    def start(self, data: Data, ctx: Context) -> Data:
        return self.with_entropy(super().start(data, ctx))

    def stages(self) -> tuple[Stage, ...]:
        return (*super().stages(), ModulateSteps(self.config))


EMPG = LLMMethod(
    "empg",
    "Wang et al. 2025, arXiv 2509.09265",
    EMPGConfig,
    EMPGRecipe,
    {
        "advantage": "group z-score x step entropy + clarity ahead, centred",
        "ratio": "token",
        "loss": "clip",
        "aggregate": "sequence means",
    },
)
"""Entropy-Modulated Policy Gradients: confident steps get larger updates, clear steps ahead a bonus."""
