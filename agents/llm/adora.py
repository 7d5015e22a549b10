"""ADORA: Advantage Dynamics via Online Rollout Adaptation (Ren et al. 2026, arXiv 2602.10019).

A prompt is temporarily advantageous where its current rollouts say that exploring it pays: its longest success is
longer than its failures are on average, and it is not solved too often. Its whole group is weighted:

    LA(i)  = max length of right completions > mean length of wrong ones below the cap      length advantage
    DA(i)  = share of right completions <= tau                                              difficulty advantage
    w(i)   = advantaged_weight where LA and DA, else other_weight
    A'_ij  = w(i) A_ij                                                                      A: group z-score
    loss   = GRPO's clipped loss of A', k3 KL

Amplification (stronger models) is 2 and 1 on both criteria; attenuation (weaker models) is 1 and 0.1 on the length
alone. Slots: stage = a weight per group; no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.groups import Groups
from ccrl.estimators.recipe import MethodConfig, Recipe
from ccrl.settings import ConfigError, Count, Finite, Natural, Nonnegative, Unit
from ccrl.updaters import Stats

__all__ = ["ADORA", "ADORAConfig", "ADORARecipe", "Utility", "advantaged"]

Criterion = Literal["both", "either", "length", "difficulty"]


@dataclass(frozen=True)
class ADORAConfig(MethodConfig):
    """The paper's amplification, for stronger models."""

    search: ClassVar[dict[str, Any]] = {"tau": {"choice": [0.3, 0.5, 0.7]}}
    group_size: Count = 5
    """A group has this many completions, or episodes from one start."""
    criterion: Criterion = "both"
    """A prompt is advantageous by length and difficulty (both), by one of them (either), by the length of its
    completions alone, or by its difficulty alone."""
    advantaged_weight: Nonnegative = 2.0
    """The advantages of advantageous prompts are multiplied by this."""
    other_weight: Nonnegative = 1.0
    """The advantages of the other prompts are multiplied by this."""
    tau: Unit = 0.5
    """A prompt is difficult enough up to this share of right completions."""
    correct_above: Finite = 0.5
    """Completions with a larger reward are right."""
    failure_cap: Natural = 0
    """Wrong completions of at least this many tokens do not count in the mean length of the wrong ones; 0 takes the
    length cap of completions."""
    kl_coef: Nonnegative = 0.001
    """KL(policy || reference) is added to the loss with this weight; 0 keeps no reference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.other_weight > self.advantaged_weight:
            raise ConfigError(
                f"other_weight: expected at most advantaged_weight = {self.advantaged_weight} (advantageous prompts "
                f"are the ones to learn more from), got {self.other_weight}"
            )


def advantaged(
    right: Tensor, length: Tensor, group: Tensor, *, criterion: Criterion = "both", tau: float = 0.5, cap: float
) -> tuple[Tensor, Tensor]:
    """``[N]`` bool each: whether a completion's prompt is advantageous, and whether that could be said.

    By length nothing is said of a group without a right completion, or without a wrong one below the cap.

    :param right: ``[N]`` bool. :param length: ``[N]`` in tokens. :param group: ``[N]`` labels.
    :param cap: wrong completions count below this length.
    """
    groups, length = Groups(group), length.double()
    failed = ~right & (length < cap)
    count, failures = groups.sum(right), groups.sum(failed)
    longest = torch.full_like(groups.count, -torch.inf)
    longest = longest.scatter_reduce(0, groups.index, torch.where(right, length, -torch.inf), "amax")
    long = longest > groups.sum(length * failed) / failures.clamp_min(1.0)
    # of counts, with slack: 3 of 5 must equal a tau of 0.6
    hard = count <= tau * groups.count + 1e-9
    known = torch.ones_like(long) if criterion == "difficulty" else (count > 0) & (failures > 0)
    found = {"both": long & hard, "either": long | hard, "length": long, "difficulty": hard}[criterion]
    return (found & known)[groups.index], known[groups.index]


@dataclass(frozen=True)
class Utility:
    """``utility_weight``, ``advantaged`` ``[N]``, and ``advantage`` ``[T, N]`` multiplied by the weight. A prompt of
    which the criterion says nothing keeps its advantages."""

    config: ADORAConfig
    max_length: int

    def __call__(self, data: Data) -> Data:
        c = self.config
        found, known = advantaged(
            data["episode_reward"] > c.correct_above, data["valid"].sum(0), data["group"],
            criterion=c.criterion, tau=c.tau, cap=c.failure_cap or self.max_length,
        )  # fmt: skip
        one = torch.ones_like(data["episode_reward"])
        weight = torch.where(found, c.advantaged_weight * one, c.other_weight * one)
        weight = torch.where(known, weight, one)
        return data.derive(advantage=weight * data["advantage"]).derive_sequence(
            utility_weight=weight, advantaged=found
        )


class ADORARecipe(Recipe):
    """GRPO's advantages, weighted last: a whitening after it would undo the weights."""

    def stages(self) -> tuple[Stage, ...]:
        return (*super().stages(), Utility(self.config, self.parts.max_length))

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """``advantaged_share``: share of the completions whose prompt was advantageous."""
        stats["advantaged_share"] = data["on"]["advantaged"].to(data["on"]["valid"].dtype).mean()


ADORA = LLMMethod(
    "adora",
    "Ren et al. 2026, arXiv 2602.10019",
    ADORAConfig,
    ADORARecipe,
    {
        "advantage": "group z-score x weight of the prompt by lengths and success",
        "ratio": "token",
        "loss": "clip",
        "aggregate": "token mean",
    },
)
"""Advantage Dynamics via Online Rollout Adaptation: prompts that exploration profits from count more."""
