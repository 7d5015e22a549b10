"""D3S: Dynamic Dual-Level Down-Sampling (Wang et al. 2025, "Learning More with Less", arXiv 2509.22115).

    A_i      = (R_i - mean_g) / (std_g + eps), over all rollouts of the prompt, never normalised again
    S_query  = argmax Var(A_S), |S| = N_s        of every prompt's rollouts
    S_batch  = argmax Var(A_S), |S| = N          of the union of all S_query, N = batch_share * prompts * N_s
    tokens   = the share K of S_batch's tokens with the largest |A_i| H_it, H the entropy of the policy that sampled
    (N_s, K) = (1 - p) (N_init, K_init) + p (N_final, K_final), p the share of training that is over
    loss     = -min(rho A, clip(rho) A), mean over the tokens that are kept

A subset of largest variance is some of the largest and some of the smallest values; the split is found by trying all.

Dropped rollouts leave the batch, so that no forward pass is spent on them; dropped tokens stay in the context with
``valid = 0`` and count nowhere. Selection depends on the rewards: the gradient no longer estimates the policy gradient
without bias. Reads ``episode_reward``, ``group``, ``valid``, ``log_prob`` (and ``entropy``, evaluated where nobody
stored it):
episodes of control tasks with discrete actions do as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data, Field
from ccrl.estimators import ratios
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.groups import Groups
from ccrl.estimators.outcomes import SequenceAdvantage
from ccrl.estimators.recipe import MethodConfig, Recipe
from ccrl.estimators.stages import with_episode_reward
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.settings import Above, Count
from ccrl.updaters import Stats

__all__ = ["D3S", "D3SConfig", "D3SRecipe", "keep_rollouts", "keep_tokens", "most_varied"]


Share = Annotated[float, Above(0.0, 1.0)]


@dataclass(frozen=True)
class D3SConfig(MethodConfig):
    """The paper's four schedule constants are not known: these defaults fit its "less than 20% of the tokens"."""

    group_size: Count = 16
    """A prompt has this many completions."""
    rollouts_init: Share = 0.25
    """N_init: this share of a prompt's rollouts is kept at the start; at least two rollouts are."""
    rollouts_final: Share = 0.5
    """N_final: this share is kept at the end; the share of the start is no schedule (D2S)."""
    batch_share: Share = 0.5
    """N: the selection across prompts keeps this share of these; 1 makes no such selection."""
    tokens_init: Share = 0.2
    """K_init: this share of their tokens is kept at the start."""
    tokens_final: Share = 1.0
    """K_final: this share is kept at the end; both 1 select no tokens (D1S)."""
    token_pool: Literal["batch", "response"] = "batch"
    """Tokens are ranked together that are left in the batch, or in each response."""
    base: Literal["grpo", "gspo"] = "grpo"
    """The ratio is the token's (grpo), or the whole completion's on every kept token (gspo; give it GSPO's clip range,
    3e-4 and 4e-4)."""

    def rollouts(self, progress: float) -> int:
        """``N_s``: rollouts kept per prompt."""
        share = (1.0 - progress) * self.rollouts_init + progress * self.rollouts_final
        return min(max(half_up(share * self.group_size), 2), self.group_size)

    def tokens(self, progress: float) -> float:
        """``K``: share of the tokens kept."""
        return (1.0 - progress) * self.tokens_init + progress * self.tokens_final


def half_up(x: float) -> int:
    """The nearest integer, of two the larger: Python's ``round`` would keep 2 of 2.5 and 4 of 3.5."""
    return math.floor(x + 0.5 + 1e-9)  # with slack: 0.29 * 50 is 14.499999999999998


# -- rollouts -------------------------------------------------------------------------------------------------------


def most_varied(x: Tensor, n: int, count: Tensor | None = None) -> Tensor:
    """``[Q, W]`` bool: in each row of ``x`` the ``n`` entries whose population variance is largest.

    Of splits that are equal up to rounding the one with the most large values; of equal values the first ones count as
    larger.

    :param count: ``[Q]``: only the first so many entries of a row exist; None: all. A row of fewer than ``n`` is kept
        whole.
    """
    rows, width = x.shape
    count = torch.full((rows,), width, device=x.device) if count is None else count
    size = count.clamp_max(n).unsqueeze(1)
    place = torch.arange(width, device=x.device).expand(rows, -1)
    exists = place < count.unsqueeze(1)
    # rounded: equal rewards of two groups differ in the last bits of their z-scores, which must not decide
    ranked = torch.where(exists, (x.double() * 1e5).round(), -torch.inf)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    value = torch.where(exists, x.double().gather(1, order), 0.0)
    large = torch.arange(min(n, width) + 1, device=x.device).expand(rows, -1)
    small_from = (count.unsqueeze(1) - size + large).clamp_max(width)

    def taken(values: Tensor) -> Tensor:  # [Q, n + 1]: sum of the `large` first and the `size - large` last
        sums = F.pad(values.cumsum(1), (1, 0))
        return sums[:, : large.shape[1]] + sums[:, -1:] - sums.gather(1, small_from)

    variance = taken(value.square()) / size - (taken(value) / size).square()
    variance = torch.where(large <= size, variance, -torch.inf)
    best = variance.amax(1, keepdim=True)
    split = torch.where(variance >= best - 1e-9 * (1.0 + best), large, 0).amax(1, keepdim=True)
    chosen = exists & ((place < split) | (place >= count.unsqueeze(1) - size + split))
    return torch.zeros_like(exists).scatter(1, order, chosen)


def keep_rollouts(advantage: Tensor, group: Tensor, per_group: int, share: float) -> Tensor:
    """Columns to keep, sorted, int64, from the advantages ``[N]`` of the groups ``[N]``: ``per_group`` of every group,
    then ``share`` of all these."""
    groups = Groups(group)
    count = groups.count.long()
    columns = groups.index.argsort(stable=True)
    row = groups.index[columns]
    place = torch.arange(len(columns), device=columns.device) - (count.cumsum(0) - count)[row]
    table = advantage.new_zeros(len(count), int(count.max()))
    table[row, place] = advantage[columns]
    inside = columns[most_varied(table, per_group, count)[row, place]].sort().values
    total = min(max(half_up(share * len(inside)), 2), len(inside))
    return inside[most_varied(advantage[inside].unsqueeze(0), total)[0]]


# -- tokens ---------------------------------------------------------------------------------------------------------


def keep_tokens(advantage: Tensor, entropy: Tensor, valid: Tensor, share: float, pool: str = "batch") -> Tensor:
    """``[T, N]``, 1 on the kept tokens: ``ceil(share * tokens)`` of those with the largest ``|A| H``, earlier sequences
    and tokens first where these are equal. All arguments ``[T, N]``."""
    inside = (valid > 0).t()
    key = torch.where(inside, (advantage.abs() * entropy).t(), -torch.inf)
    key, inside = (key, inside) if pool == "response" else (key.reshape(1, -1), inside.reshape(1, -1))
    # with slack: 0.2 * 15 is 3.0000000000000004
    wanted = (share * inside.sum(1, keepdim=True).double() - 1e-9).ceil()
    order = key.argsort(dim=1, descending=True, stable=True)
    chosen = (torch.arange(key.shape[1], device=key.device) < wanted).expand_as(key)
    return torch.zeros_like(inside).scatter(1, order, chosen).view(valid.shape[::-1]).t().to(valid.dtype)


def response_ratio(outputs: Outputs, batch: Data) -> LogRatio:
    """GSPO's ratio of the whole completion (column ``response``), on its kept tokens and with their gradient."""
    log_prob, response = outputs["log_prob"], batch["response"]
    change = torch.where(response > 0, log_prob.detach() - batch["log_prob"], 0.0)
    mean = change.sum(0, keepdim=True) / response.sum(0, keepdim=True).clamp_min(1.0)
    return LogRatio(log_prob, log_prob.detach() - mean, batch["valid"])


# -- recipe ---------------------------------------------------------------------------------------------------------


def _replaced(data: Data, columns: Mapping[str, Tensor]) -> Data:
    """Other facts than the rollout's: what is not ``valid`` here is seen by no count and no term."""
    return Data({**data, **columns}, raw=data.raw, sequence=data.sequence, scalars=data.scalars)


class D3SRecipe(Recipe):
    """GRPO's or GSPO's loss on the rollouts and tokens that are left."""

    fields = (Field("entropy"),)

    def stages(self) -> tuple[Stage, ...]:
        return (*super().stages(), SequenceAdvantage())

    def terms(self) -> tuple[Term, ...]:
        ratio = ratios.token if self.config.base == "grpo" else response_ratio
        return (self.policy_term(self.loss(), ratio), *self.penalties())

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        """``sampled``: all rollouts with their advantages; ``on``: what is left, ``response`` ``[T, N]`` its ``valid``
        before tokens were dropped. The reference evaluates no more than that."""
        c, progress = self.config, float(ctx.progress)
        data = with_episode_reward(have["on"])
        for stage in self._prepared:
            data = stage(data)
        kept = keep_rollouts(data["sequence_advantage"], data["group"], c.rollouts(progress), c.batch_share)
        left = self.with_entropy(data.take(kept))
        valid, entropy = left["valid"], left["entropy"]
        if bool(((entropy < -1e-3) & (valid > 0)).any()):
            raise ValueError(
                "D3S ranks tokens by their entropy: expected none below 0 (discrete actions), got "
                f"{float(entropy[valid > 0].min()):.3g}"
            )
        tokens = keep_tokens(left["advantage"], entropy, valid, c.tokens(progress), c.token_pool)
        left = _replaced(left.derive(response=valid), {"valid": tokens})
        return have | {"sampled": data, "on": self.start(left, ctx)}

    def idle(self, data: Data, ctx: Context) -> bool:
        return not bool(data["advantage"].any())

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """What was kept, and of how many prompts: the selection across prompts prefers lone successes and failures."""
        sampled, left = data["sampled"], data["on"]
        prompts = Groups(left["group"]).count
        before, after = sampled["sequence_advantage"], left["sequence_advantage"]
        stats |= {
            "rollout_share": torch.tensor(left.shape[1] / sampled.shape[1]),
            "token_share": left["valid"].sum() / sampled["valid"].sum(),
            "prompt_share": torch.tensor(len(prompts) / len(Groups(sampled["group"]).count)),
            "largest_prompt_share": prompts.max() / left.shape[1],
            "useful_sampled": (before != 0).float().mean(),
            "useful_kept": (after != 0).float().mean(),
            "advantage_variance_sampled": before.var(correction=0),
            "advantage_variance_kept": after.var(correction=0),
            "skipped": torch.tensor(float(self.idle(left, ctx))),
        }


D3S = LLMMethod(
    "d3s",
    "Wang et al. 2025, arXiv 2509.22115",
    D3SConfig,
    D3SRecipe,
    {
        "data": "rollouts of most varied advantage, tokens of largest |A| H",
        "advantage": "group z-score",
        "ratio": "token or sequence",
        "loss": "clip",
        "aggregate": "mean of kept tokens",
    },
)
"""Dynamic Dual-Level Down-Sampling (Wang et al. 2025): the rollouts of most varied advantages, the tokens of
largest advantage times entropy, more of both as training goes on."""
