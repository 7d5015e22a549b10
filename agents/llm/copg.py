"""CoPG: contrastive policy gradient. Flet-Berliac et al. 2024, "Contrastive Policy Gradient: Aligning LLMs on
sequence-level scores in a supervised-friendly fashion", EMNLP, arXiv 2406.19185.

The optimum of ``J = E_pi[R - beta log(pi / ref)]`` is ``pi* = ref exp(R / beta) / Z``. With the regularised reward
``R_beta(y) = R(y) - beta log(pi(y) / ref(y))``, constant over ``y`` exactly at ``pi*``, pairs of completions of one
prompt, drawn from anything, give

    gradient   E[ (R_beta(y) - R_beta(y')) (grad log pi(y) - grad log pi(y')) ]

with no importance weights: ``pi*`` is its zero whatever policies the pair came from, where a baseline-free policy
gradient needs its own samples. On policy it is ``2 grad J``. Three losses have this gradient:

    square            1/(2 beta) E[ (R_beta(y) - R_beta(y'))^2 ]
    bilinear         -E[ (R_{beta/2}(y) - R_{beta/2}(y')) (log pi/ref(y) - log pi/ref(y')) ]
    policy_gradient  -E[ sg(R_beta(y) - R_beta(y')) (log pi(y) - log pi(y')) ]

Over all pairs of ``k`` completions a mean of products of differences is twice the sample covariance, so no pair is
formed: the square form is the within-prompt variance of ``R_beta`` over ``beta``, the last one RLOO on ``R_beta``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.collect import Request
from ccrl.data import Data, masked_sum
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.groups import Groups
from ccrl.estimators.recipe import MethodConfig, Parts, Recipe
from ccrl.estimators.rollouts import concatenate
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.settings import Count, Positive

__all__ = [
    "CoPG",
    "CoPGConfig",
    "CoPGRecipe",
    "DropSingles",
    "Form",
    "Pairs",
    "contrast",
    "prompt_mean",
    "sequence_sum",
]

Form = Literal["square", "bilinear", "policy_gradient"]


@dataclass(frozen=True)
class CoPGConfig(MethodConfig):
    """The paper's settings for language models are unknown; these are for small ones."""

    unread: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high")
    group_size: Count = 4
    """Every behaviour policy gives this many completions to a prompt."""
    beta: Positive = 0.5
    """KL(pi || ref) has this weight in the objective."""
    form: Form = "square"
    """The loss has one of three values with one gradient: square, bilinear, or policy_gradient."""
    behaviours: tuple[str, ...] = ("live",)
    """These versions of the policy sample, each group_size completions per prompt: live (on policy), ref (off policy,
    from the first iteration on), or any version put into the agent's bank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.behaviours:
            raise ValueError("behaviours: expected at least one version of the policy, got none")
        if self.kl_coef:
            raise ValueError(f"kl_coef: expected 0 (beta weighs the KL to the reference), got {self.kl_coef}")
        together = self.group_size * len(self.behaviours)
        if together < 2:
            raise ValueError("group_size: expected at least two completions per prompt (there is no pair else), got 1")
        if self.microbatch % together:
            raise ValueError(f"microbatch: expected a multiple of the {together} completions per prompt (pairs must "
                             f"not be split), got {self.microbatch}")  # fmt: skip


# -- the loss -------------------------------------------------------------------------------------------------------


class Pairs:
    """Who is compared with whom: columns that are ``present`` ``[B]`` and have one label ``group`` ``[B]``.

    As a matrix ``[B, B]``: a micro-batch holds whatever labels of the batch, and there are few sequences in it.
    """

    def __init__(self, group: Tensor, present: Tensor) -> None:
        present = present > 0
        self._together = ((group.unsqueeze(1) == group) & present.unsqueeze(1) & present).to(torch.float32)
        self.count = self._together.sum(1)
        """``[B]``: members of one's group, oneself included."""
        self.paired = self.count > 1
        """``[B]``: those with somebody to be compared with."""
        self.degrees = (self.count - 1.0).clamp_min(1.0)
        """``[B]``: the others, at least 1."""

    def centre(self, x: Tensor) -> Tensor:
        """``x`` minus its group's mean, 0 outside the pairs, and exactly 0 where all of a group are equal: the rounding
        of their mean would be a whole step of Adam's."""
        highest = torch.where(self._together > 0, x.detach(), -torch.inf).amax(1)
        x = torch.where(self.paired, x - torch.where(self.paired, highest, 0.0), 0.0)
        mean = self._together.to(x.dtype) @ x / self.count.clamp_min(1.0).to(x.dtype)
        return torch.where(self.paired, x - mean, 0.0)


@dataclass(frozen=True)
class DropSingles:
    """Leave out columns whose prompt has no second one: they have no pair, and prompts with pairs are counted."""

    def __call__(self, data: Data) -> Data:
        groups = Groups(data["group"])
        paired = (groups.count[groups.index] > 1).nonzero().squeeze(-1)
        return data.take(paired) if 0 < len(paired) < len(groups.index) else data


def contrast(
    log_prob: Tensor,
    log_ref: Tensor,
    reward: Tensor,
    group: Tensor,
    present: Tensor,
    beta: float,
    form: Form = "square",
) -> Tensor:
    """``[B]``: summed over a group, the loss's mean over its (unordered) pairs.

    :param log_prob, log_ref: of whole completions ``[B]`` (sums over tokens: means would move the optimum).
    :param group: labels ``[B]``; groups of one contribute nothing.
    :param present: ``[B]``, 0 on padding.
    """
    pairs, log_ratio = Pairs(group, present), log_prob - log_ref
    if form == "square":
        return pairs.centre(reward - beta * log_ratio).square() / pairs.degrees / beta
    if form == "bilinear":
        # half of beta: the product rule doubles it
        return -2.0 * pairs.centre(reward - 0.5 * beta * log_ratio) * pairs.centre(log_ratio) / pairs.degrees
    return -2.0 * pairs.centre(reward - beta * log_ratio).detach() * pairs.centre(log_prob) / pairs.degrees


def sequence_sum(outputs: Outputs, batch: Data) -> LogRatio:
    """Whole completions against the reference ``[1, B]``, sums over tokens."""
    valid = batch["valid"]
    present = (valid.sum(0, keepdim=True) > 0).to(valid.dtype)
    return LogRatio(masked_sum(outputs["log_prob"], valid), masked_sum(batch["ref_log_prob"], valid), present)


def prompt_mean(valid: Tensor, batch: Data) -> Tensor:
    """Sum over a prompt's completions, mean over prompts."""
    return valid / batch["n_groups"]


# -- the method -----------------------------------------------------------------------------------------------------


class CoPGRecipe(Recipe):
    """The advantage column is the reward itself: what is compared depends on the policy and lives in the loss."""

    config: CoPGConfig
    unit = "group"

    def __init__(self, config: Any, parts: Parts) -> None:
        super().__init__(config, parts)
        if len(config.behaviours) > 1 and parts.request.counts is None:
            # episodes of another rollout begin elsewhere: labels would be equal and the starts not
            raise ValueError("behaviours: expected one on control tasks, where a second rollout has other starts and "
                             f"makes no pairs with the first, got {config.behaviours}")  # fmt: skip

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        """``group_size`` completions of every behaviour policy, to the same prompts."""
        if have:
            return []
        request = self.parts.request
        first, *others = self.config.behaviours
        return [
            replace(request, params=first),
            *(replace(request, tag=f"on/{i}", params=name, source="on") for i, name in enumerate(others, 2)),
        ]

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        joined = have["on"] if len(have) == 1 else concatenate(list(have.values()), same_prompts=True)
        return have | super().prepare({"on": joined}, ctx)

    def stages(self) -> tuple[Stage, ...]:
        return (DropSingles(),)

    def terms(self) -> tuple[Term, ...]:
        loss = Term(
            "contrastive_loss",
            self.contrastive,
            prompt_mean,
            sequence_sum,
            advantage="episode_reward",
            stats=self.stats,
        )
        return (loss, *self.penalties())

    def contrastive(self, ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        """``[1, B]``."""
        c = self.config
        return contrast(
            ratio.log_prob[0], ratio.log_ref[0], advantage, batch["group"], ratio.valid[0], c.beta, c.form
        ).unsqueeze(0)

    def stats(self, ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> dict[str, Tensor]:
        """Means over prompts: regularised reward, its variance inside a prompt (0 at the optimum), log-ratio to the
        reference (their KL, on policy)."""
        pairs = Pairs(batch["group"], ratio.valid[0])
        members = pairs.count.clamp_min(1.0)
        regularised = advantage - self.config.beta * ratio.log_ratio[0]
        found = {
            "regularised_reward": regularised / members,
            "regularised_variance": pairs.centre(regularised).square() / pairs.degrees,
            "reference_log_ratio": ratio.log_ratio[0] / members,
        }
        return {name: value.unsqueeze(0) for name, value in found.items()}

    @property
    def wants_reference(self) -> bool:
        return True


CoPG = LLMMethod(
    "copg",
    "Flet-Berliac et al. 2024, arXiv 2406.19185",
    CoPGConfig,
    CoPGRecipe,
    {
        "plan": "any behaviour policies",
        "advantage": "reward minus beta log-ratio, against the others'",
        "ratio": "sequence to reference",
        "loss": "square of differences",
        "aggregate": "mean over pairs",
    },
)
"""Off-policy alignment on rewards: contrasts between completions of one prompt."""
