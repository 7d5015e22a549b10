"""HPT: hybrid post-training. Lv et al. 2025, "Towards a Unified View of Large Language Model Post-Training",
arXiv 2509.04419.

Imitation and reinforcement ascend one objective, ``J = E_pi[r] - mu KL(pi_beta || pi)``, whose gradient has one form:

    grad = M * (1 / pi_ref) * A * grad pi_theta         (``ccrl.estimators.modulations``)

| part | M | pi_ref | A |
|---|---|---|---|
| on-policy (GRPO family) | 1 or clip | behaviour policy | R - mean over the question's samples |
| demonstration, imitated (SFT) | 1 | pi_theta | 1 |
| demonstration, reinforced (LUFFY, SRFT) | f' or 1 | 1 | z-score over samples and demonstration |

HPT chooses per question, by the share ``P`` of its samples that the verifier accepts:

    L = alpha L_RL + beta L_SFT,        (alpha, beta) = (0, 1) if P <= gate, else (1, 0)

Questions that are imitated lose all their samples, the others their demonstration: both before the forward pass. With
``gate=1`` everything is imitated (SFT), with ``gate=-1`` nothing (Dr.GRPO); SFT -> GRPO is the latter after
``warm_start_steps``. ``mixture`` has the compared methods and the variants of the released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.collect import Request
from ccrl.data import Data, masked_mean
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.groups import Groups
from ccrl.estimators.modulations import modulated, shaping
from ccrl.estimators.recipe import MethodConfig, Recipe
from ccrl.estimators.rollouts import concatenate
from ccrl.estimators.stages import GroupBaseline
from ccrl.estimators.terms import Aggregate, LogRatio, Loss, Outputs, Term
from ccrl.settings import Finite, Nonnegative, Positive, Range, Unit
from ccrl.updaters import Stats

__all__ = ["HPT", "HPTConfig", "HPTRecipe", "Mix", "self_rewarded", "sequence_entropy", "uncertainty_weighted"]

Mixture = Literal["switch", "switch_off", "soft", "fixed", "luffy", "srft"]
SOFT = ((0.0, 1.0, 1.0), (0.0, 1.0, 1.0), (0.125, 1.0, 0.5), (0.25, 1.0, 0.25), (0.5, 1.0, 0.125), (1.0, 1.0, 0.0))
"""Released "soft" gate by number solved of 8: weights of on-policy, reinforced and imitated parts; from 5 on the last
row. The row of 0 is not in the sources: taken to be that of 1."""


@dataclass(frozen=True)
class HPTConfig(MethodConfig):
    """The released runs: advantages without deviation, no clip, a gradient whose norm exceeds 80 is skipped. Norms of
    other models and batches are of another size: watch ``train/skipped_updates``."""

    mixture: Mixture = "switch"
    """A question's samples and demonstration are mixed by switch (HPT), switch_off (gated questions reinforce the
    demonstration), soft (the released table), fixed (shares of rl_share), luffy (both reinforced), or srft (imitation
    and reinforcement weighted by entropy)."""
    gate: Annotated[float, Range(-1.0, 1.0)] = 0.0
    """Questions with at most this share of right samples are imitated: 0 for Qwen, 2/8 for Llama; 1 imitates all, -1
    none."""
    rl_share: Unit = 0.5
    """With mixture fixed, every question has rl_share L_RL + (1 - rl_share) L_SFT."""
    rl_norm: Literal["len_const", "token_mean", "seq_mean"] = "len_const"
    """Reinforcement is divided by the length cap alone (len_const: released; its weight beside imitation grows with
    the batch), by its tokens (token_mean), or by its sequences' tokens and sequences (seq_mean)."""
    sft_coef: Nonnegative = 1.0
    """Imitation, a mean over the demonstrations' tokens, has this weight; 0.3 for the 1.5B model."""
    std: bool = False
    """On-policy advantages are divided by the question's deviation (the paper's table; the released runs do not)."""
    clip: bool = False
    """The token ratio is clipped with clip_low and clip_high (the paper's table; the released runs do not)."""
    shape: Positive = 0.1
    """This is LUFFY's gamma in f(u) = u / (u + gamma)."""
    entropy_coef: Finite = 0.001
    """The entropy bonus, of demonstrations too (released), has this weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clip and (self.clip_low, self.clip_high) != (0.2, 0.2):
            raise ValueError(f"clip_low, clip_high: expected 0.2 and 0.2 with clip=False (nothing is clipped), got "
                             f"{self.clip_low} and {self.clip_high}")  # fmt: skip
        if self.kl_coef:
            raise ValueError(f"kl_coef: expected 0 (the method has no reference policy), got {self.kl_coef}")

    @property
    def imitates(self) -> bool:
        """Whether demonstrations are asked for."""
        return self.gate >= 0.0 or self.mixture not in ("switch", "switch_off")

    def coefficients(self, solved: Tensor, n: Tensor) -> Tensor:
        """``[Q, 3]``: weights of the on-policy, the reinforced and the imitated part of questions that were solved in
        ``solved`` of ``n`` samples (both ``[Q]``)."""
        if self.mixture == "soft":
            return solved.new_tensor(SOFT)[(8 * solved / n + 1e-6).long().clamp_max(len(SOFT) - 1)]
        if self.mixture in ("switch", "switch_off"):
            # of counts, with slack: 2 of 8 must equal a gate of 2/8 in any floating type
            gated = (solved <= self.gate * n + 1e-6).to(solved.dtype)
            parts = [1.0 - gated, gated, torch.zeros_like(gated)]
            return torch.stack(parts if self.mixture == "switch_off" else [parts[0], parts[2], parts[1]], 1)
        rows = {"fixed": (self.rl_share, 0.0, 1.0 - self.rl_share), "luffy": (1.0, 1.0, 0.0), "srft": (1.0, 1.0, 1.0)}
        return solved.new_tensor(rows[self.mixture]).expand(len(solved), 3)


# -- the gate -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """From samples and demonstrations of the same questions to the rows that are trained on.

    Weights ``[N]``: ``on_weight`` and ``off_weight`` (reinforced), ``sft_weight``; ``advantage`` ``[T, N]``,
    ``verified`` ``[N]``. The weights carry their part's share of the rollout's rows or tokens, so that an aggregate
    over all rows is a mean over the part. A question without a demonstration keeps its samples.
    """

    config: HPTConfig

    def __call__(self, data: Data) -> Data:
        c, reward, group, valid = self.config, data["episode_reward"], data["group"], data["valid"]
        shown = data["demonstration"] > 0 if "demonstration" in data else torch.zeros_like(reward, dtype=torch.bool)
        right = (data["reward_components"][:, 0] if "reward_components" in data else reward) >= 1.0
        groups, on, off = Groups(group), ~shown, shown & (valid.sum(0) > 0)
        n, solved = groups.sum(on), groups.sum(on & right)
        weight = c.coefficients(solved, n)
        weight = torch.where(groups.sum(off).unsqueeze(1) > 0, weight, weight.new_tensor((1.0, 0.0, 0.0)))
        weight = weight[groups.index].to(reward.dtype)
        advantage = self.advantages(reward, group, on, off)
        rows = {"on_weight": weight[:, 0] * on, "off_weight": weight[:, 1] * off, "sft_weight": weight[:, 2] * off}
        data = data.derive_sequence(**rows, verified=right).derive(advantage=advantage * (valid > 0))
        data = data.take(torch.stack(list(rows.values())).any(0).nonzero().squeeze(-1))
        reinforced = (data["on_weight"] > 0) | (data["off_weight"] > 0)
        scale = self.scale(data["valid"], reinforced, sequences=c.rl_norm == "seq_mean")
        scale = torch.ones_like(scale) if c.rl_norm == "len_const" else scale
        imitated = self.scale(data["valid"], data["sft_weight"] > 0)
        return data.derive_sequence(
            on_weight=data["on_weight"] * scale, off_weight=data["off_weight"] * scale,
            sft_weight=data["sft_weight"] * imitated,
        )  # fmt: skip

    def advantages(self, reward: Tensor, group: Tensor, on: Tensor, off: Tensor) -> Tensor:
        """``[N]``: of samples against samples (with luffy against the demonstration too), of demonstrations against
        both; 0 on empty demonstrations."""
        union, result = on | off, torch.zeros_like(reward)
        among_all = GroupBaseline(scale="std").advantages(reward[union], group[union])
        result[union] = among_all
        if self.config.mixture != "luffy":
            alone = GroupBaseline(scale="std" if self.config.std else None, single="keep")
            result[on] = alone.advantages(reward[on], group[on])
        return result

    @staticmethod
    def scale(valid: Tensor, part: Tensor, sequences: bool = False) -> Tensor:
        """All rows (or tokens) over those of a part; 0 for an empty part, which would else be a mean of nothing."""
        size = torch.ones_like(valid[0]) if sequences else valid.sum(0)
        inside = torch.where(part, size, 0.0).sum()
        return torch.where(inside > 0, size.sum() / inside.clamp_min(1.0), 0.0)


# -- SRFT -----------------------------------------------------------------------------------------------------------


def sequence_entropy(outputs: Outputs, batch: Data) -> Tensor:
    """``[1, B]``: every sequence's mean entropy per token under the policy, detached."""
    return masked_mean(outputs["entropy"].detach(), batch["valid"])


def uncertainty_weighted(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """Imitation: ``-0.5 exp(-H) log pi``: less of it where the policy is uncertain of the demonstration."""
    return -0.5 * (-sequence_entropy(outputs, batch)).exp() * ratio.log_prob


def self_rewarded(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """Samples: ``-w ratio`` with ``w = 0.1 exp(H)`` where right, ``-1`` where wrong."""
    weight = torch.where(batch["verified"], 0.1 * sequence_entropy(outputs, batch).exp(), -1.0)
    return -weight * ratio.ratio


# -- the method -----------------------------------------------------------------------------------------------------


class HPTRecipe(Recipe):
    """Needs demonstrations, hence tokens; with ``mixture="switch", gate=-1`` it asks for none."""

    config: HPTConfig

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        """Samples, then one demonstration of each of their questions."""
        if not have:
            return [self.parts.request]
        if "demo" in have or not self.config.imitates:
            return []
        assert self.parts.request.counts is not None, "demonstrations belong to prompts"
        counts = torch.ones_like(self.parts.request.counts)
        return [Request(tag="demo", source="on", counts=counts, demonstrations=True)]

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        joined = concatenate([have["on"], have["demo"]], same_prompts=True) if "demo" in have else have["on"]
        return super().prepare(have | {"on": joined}, ctx) | {"sampled": have["on"]}

    def stages(self) -> tuple[Stage, ...]:
        return (Mix(self.config),)

    def norm(self) -> Aggregate:
        """Of the reinforced parts."""
        if self.config.rl_norm == "len_const":
            return aggregates.fixed(self.parts.max_length)
        return aggregates.mean if self.config.rl_norm == "token_mean" else aggregates.sequence_mean_token_mean

    def loss(self) -> Loss:
        c = self.config
        return losses.clip(c.clip_low, c.clip_high) if c.clip else losses.weighted_ratio

    def terms(self) -> tuple[Term, ...]:
        c, srft = self.config, self.config.mixture == "srft"
        wants = frozenset({"log_prob", "entropy"}) if srft else frozenset({"log_prob"})
        loss, ratio = (self_rewarded, ratios.plain) if srft else (self.loss(), ratios.token)
        # without the usual statistics of the ratio: means over all rows, they would be those of demonstrations too
        found = [Term("policy_gradient_loss", loss, self.norm(), ratio, wants, weight="on_weight")]
        if c.mixture in ("switch_off", "soft", "luffy", "srft"):
            # a demonstration's log_prob column is 0: the denominator 1 of the table
            loss = losses.weighted_ratio if srft else modulated(shaping(c.shape))
            found.append(Term("off_policy_loss", loss, self.norm(), ratios.token, weight="off_weight"))
        if c.imitates and c.mixture not in ("switch_off", "luffy"):
            found.append(Term(
                "sft_loss", uncertainty_weighted if srft else losses.neg_log_prob, aggregates.mean, ratios.plain, wants,
                advantage=None, weight="sft_weight", coef=c.sft_coef,
            ))  # fmt: skip
        return (*found, *self.penalties())

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """``sft_share``: share of the questions that were imitated."""
        questions = torch.unique(data["sampled"]["group"]).numel()
        stats["sft_share"] = (data["on"]["sft_weight"] > 0).sum() / questions


HPT = LLMMethod(
    "hpt",
    "Lv et al. 2025, arXiv 2509.04419",
    HPTConfig,
    HPTRecipe,
    {
        "plan": "samples, then demonstrations",
        "select": "per question by its success rate",
        "advantage": "group mean",
        "ratio": "token",
        "loss": "ratio + NLL of demonstrations",
    },
    {"skip_grad_norm": 80.0, "max_grad_norm": 1.0},
)
"""Per question: reinforcement where samples succeed, imitation where they do not."""
