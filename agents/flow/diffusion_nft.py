"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): reinforcement by matching a positive and a negative velocity.

    r    = 1/2 + clip((R - group mean) / std, -5, 5) / 10                        the optimality of a sample, in [0, 1]
    v+   = (1 - beta) v_old + beta v,     v- = (1 + beta) v_old - beta v
    loss = mean r ||v+ - u||^2 / beta + (1 - r) ||v- - u||^2 / beta,   u = e - x_0
    v_old <- d v_old + (1 - d) v,  d = min(0.001 iterations, 0.5);  v_old generates the samples

At its optimum v = v_old + (2 / beta) (posterior mean of r - its marginal) times the guidance direction: the loss needs
neither a likelihood nor a stochastic sampler. Released code measures errors of the predicted clean sample, divided by
their own detached mean size (``self_normalise``); the two differ by a weight per row.

Slots: source = clean samples of the averaged policy; advantage = optimality; loss = two matching errors. Decoupled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from agents.flow.agent import FlowMethod
from agents.flow.awm import velocity_distance
from agents.flow.matching import MatchingRecipe, Times
from agents.flow.parts import ClippedAdvantage, FlowConfig
from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators import aggregates
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.settings import Count, Nonnegative, Positive
from ccrl.updaters import Stats

__all__ = ["DiffusionNFT", "DiffusionNFTConfig", "DiffusionNFTRecipe"]


@dataclass(frozen=True)
class DiffusionNFTConfig(FlowConfig):
    """Numbers of the released code."""

    unread = (*FlowConfig.unread, "clip_low", "clip_high")

    beta: Positive = 1.0
    """The policy's share in the positive velocity; small numbers take long steps."""
    self_normalise: bool = True
    """Errors are those of the predicted clean sample over their own mean size, as in released code; if false they are
    squared errors of velocities, as in the paper."""
    n_times: Count = 6
    """Every sample is noised at this many times."""
    times: Times = "grid"
    """Times are those of the sampler's own steps but the first and the last (grid), uniform, or logit-normal."""
    kl_coef: Nonnegative = 1e-4
    """The squared distance to the first policy's velocity is added to the loss with this weight."""
    advantage_std: Literal["group", "batch"] = "batch"
    """Advantages are divided by the standard deviation of the group's rewards, or of all rewards of the rollout."""


class DiffusionNFTRecipe(MatchingRecipe):
    """Two matching errors, weighted by the sample's optimality."""

    @property
    def velocities(self) -> tuple[str, ...]:
        return ("old", "ref") if self.config.kl_coef else ("old",)

    @property
    def versions(self) -> tuple[str, ...]:
        return self.velocities

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        return [] if have else [replace(self.parts.request, params="old")]

    def stages(self) -> tuple[Stage, ...]:
        c = self.config
        return (ClippedAdvantage(c.advantage_std, c.max_advantage, c.max_advantage),)

    def terms(self) -> tuple[Term, ...]:
        c, velocity = self.config, frozenset({"velocity"})
        found = [Term("policy_gradient_loss", self.contrast, aggregates.mean, want=velocity)]
        if c.kl_coef:
            loss = velocity_distance("ref_velocity", "uniform")
            found.append(Term("kl", loss, aggregates.mean, want=velocity, advantage=None, coef=c.kl_coef))
        return tuple(found)

    def contrast(self, ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        """Per row; ``advantage`` is in [-1, 1]."""
        beta, optimality = self.config.beta, 0.5 + 0.5 * advantage
        moved = beta * (outputs["velocity"] - batch["old_velocity"])
        good, bad = (self.error(batch["old_velocity"] + sign * moved, batch) for sign in (1.0, -1.0))
        found: Tensor = (optimality * good + (1.0 - optimality) * bad) / beta
        return found

    def error(self, velocity: Tensor, batch: Data) -> Tensor:
        """Of the velocity, or of the clean sample ``x_t - t v`` over its mean size."""
        off = velocity - batch["target"]
        if not self.config.self_normalise:
            return off.square().mean(-1)
        off = batch["time"].unsqueeze(-1) * off
        size = off.detach().abs().mean(-1).clamp_min(1e-5)
        return off.square().mean(-1) / size

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        ctx.bank.refresh("old", mix=1.0 - (0.001 * ctx.k).clamp_max(0.5))


DiffusionNFT = FlowMethod(
    "diffusion_nft",
    "Zheng et al. 2025, arXiv 2509.16117",
    DiffusionNFTConfig,
    DiffusionNFTRecipe,
    {
        "source": "clean samples of the averaged policy, any sampler",
        "advantage": "optimality in [0, 1]",
        "loss": "matching errors of a positive and a negative velocity",
    },
)
"""Reinforcement on the forward process (Zheng et al. 2025)."""
