"""Any recipe of the suite inside verl: its loss as a policy loss, its stages as an advantage estimator.

    register("bnpo", BNPO.Recipe, BNPO.Config(), max_length=1024, group_size=8)

in a module that verl's workers import, then ``algorithm.adv_estimator=bnpo`` and
``actor_rollout_ref.actor.policy_loss.loss_mode=bnpo``. verl's tensors are ``(bs, T)``, the suite's ``[T, N]``.
Signatures are those of verl 0.9; nothing of verl is imported before ``register`` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ccrl.data import Data
from ccrl.estimators.base import Estimator
from ccrl.estimators.outcomes import SequenceAdvantage
from ccrl.estimators.terms import Outputs, surrogate
from ccrl.llm.hosted import INSTEAD, Host, HostedRecipe, build_hosted, episode_masks
from ccrl.packages import require

__all__ = ["VerlAdvantage", "VerlLoss", "bridge", "register"]

GIVEN = frozenset(
    {"valid", "present", "reward", "carry", "episode_reward", "reward_components", "group", "length", "demonstration"}
)
AT_LOSS = frozenset({"valid", "log_prob", "advantage", "sequence_advantage", "n_valid", "n_sequences"})
"""Columns of a minibatch: verl hands advantages on, and nothing else that the stages made."""


class _NoPolicy(nn.Module):
    """verl computes advantages where no model is."""

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        raise ValueError("its stages evaluate the policy")


@dataclass(frozen=True, eq=False)
class VerlLoss:
    """``fn(old_log_prob, log_prob, advantages, response_mask, ...) -> (loss, metrics)``; tensors ``(bs, T)``.

    The recipe decides the aggregation, ``loss_agg_mode`` is not read. Its means are over the whole optimiser batch
    where ``config.global_batch_info`` has the counts (``batch_num_tokens``, ``global_batch_size``, ``dp_size``), else
    over this call's.
    """

    hosted: HostedRecipe

    def __call__(
        self, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
        loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        valid = response_mask.t().to(log_prob.dtype)
        columns = {"valid": valid, "log_prob": old_log_prob.t(), "advantage": advantages.t() * valid}
        data = SequenceAdvantage()(Data(columns))
        terms = self.hosted.terms
        if rollout_is_weights is not None:
            if rollout_is_weights.shape != log_prob.shape or any(term.weight is not None for term in terms):
                raise ValueError("rollout_is_weights: expected weights of tokens and a recipe whose terms have none")
            data = data.derive(rollout_is=rollout_is_weights.t())
            terms = tuple(replace(term, weight="rollout_is") for term in terms)
        counts = _counts(valid, getattr(config, "global_batch_info", None))
        batch = Data(dict(data) | counts, sequence=data.sequence, scalars=frozenset(counts))
        loss, stats = surrogate(terms, {"log_prob": log_prob.t()}, batch)
        return loss, {f"actor/{name}": value.item() for name, value in stats.items()}


@dataclass(frozen=True, eq=False)
class VerlAdvantage:
    """``fn(token_level_rewards, response_mask, index=uids, ...) -> (advantages, returns)``, both ``(bs, T)`` (returns
    are the advantages: there is no critic).

    Whole-batch statistics are over the batch of one call. ``index``: equal for completions of one prompt.
    """

    hosted: HostedRecipe

    def __call__(
        self, token_level_rewards: Tensor, response_mask: Tensor, config: Any = None,
        index: np.ndarray[Any, Any] | Sequence[Any] | None = None, **_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if index is None:
            raise ValueError("index: expected the prompts' uids (bs,), got None: completions are compared in groups")
        valid = response_mask.t().to(token_level_rewards.dtype)
        reward = torch.where(valid > 0, token_level_rewards.t(), torch.zeros_like(valid))
        total = reward.sum(0)
        group = torch.as_tensor(np.unique(np.asarray(index), return_inverse=True)[1].reshape(-1))
        carry = episode_masks(valid)[1]
        columns: dict[str, Tensor] = {
            "valid": valid, "present": valid, "reward": reward, "carry": carry, "episode_reward": total,
            "reward_components": total.unsqueeze(1), "group": group.to(valid.device),
            "length": valid.sum(0).long(), "demonstration": torch.zeros_like(total),
        }  # fmt: skip
        data = Data(
            columns, sequence=frozenset({"episode_reward", "reward_components", "group", "length", "demonstration"})
        )
        on = self.hosted.prepare(data, 0.0, 1.0)["on"]
        if "advantage" in on:
            advantage = on["advantage"]
        else:
            advantage = on["sequence_advantage"].expand(on.shape)
        found = (advantage * valid).t().contiguous()
        return found, found


def bridge(
    recipe: Callable[[Any, Any], Estimator], config: Any, *, max_length: int, group_size: int
) -> tuple[VerlLoss, VerlAdvantage]:
    """The two functions for ``recipe(config, parts)``.

    :param max_length: longest completion. :param group_size: completions per prompt (verl's ``rollout.n``).
    :raises ValueError: if the recipe needs what verl's signatures do not carry: a reference or entropies in the loss
        (they are verl's own ``use_kl_loss`` and ``entropy_coeff``), columns beside the advantage at the loss, state.
    """
    host = Host(
        "verl",
        max_length,
        group_size,
        ("reward",),
        GIVEN,
        frozenset(),
        frozenset({"log_prob"}),
        temperatures=False,
        reference=False,
    )
    hosted = build_hosted(recipe, config, host, _NoPolicy())
    name = getattr(recipe, "__name__", repr(recipe))
    unknown = hosted.columns - AT_LOSS
    if unknown:
        raise ValueError(
            f"{name} does not fit into verl: its loss reads the columns {sorted(unknown)}, and verl hands on "
            f"{sorted(AT_LOSS)}; {INSTEAD}"
        )
    if hosted.estimator.state_dict() or hosted.estimator.per_minibatch:
        raise ValueError(
            f"{name} does not fit into verl: it learns between updates, and verl's functions have no state; {INSTEAD}"
        )
    return VerlLoss(hosted), VerlAdvantage(hosted)


def register(
    name: str, recipe: Callable[[Any, Any], Estimator], config: Any, *, max_length: int, group_size: int
) -> None:
    """Make ``recipe`` verl's policy loss and advantage estimator ``name``.

    :raises ImportError: without verl, naming what to install.
    :raises ValueError: as ``bridge``.
    """
    loss, advantage = bridge(recipe, config, max_length=max_length, group_size=group_size)
    core = require("verl.trainer.ppo.core_algos", "verl")

    # functions, not objects: verl looks at their names
    def policy_loss(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
        loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        return loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)

    def advantage_estimator(
        token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return advantage(token_level_rewards, response_mask, config, index, **options)

    core.register_policy_loss(name)(policy_loss)
    core.register_adv_est(name)(advantage_estimator)


def _counts(valid: Tensor, info: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """``n_valid``, ``n_sequences`` of the whole optimiser batch, per data-parallel rank (verl averages over ranks)."""
    known = {key: value for key, value in dict(info or {}).items() if value is not None}
    ranks = float(known.get("dp_size", 1))
    if ranks > 1 and not {"batch_num_tokens", "global_batch_size"} <= known.keys():
        raise ValueError(f"config.global_batch_info: expected batch_num_tokens and global_batch_size with dp_size = "
                         f"{ranks:g}, got {sorted(known)}")  # fmt: skip
    tokens = torch.as_tensor(known.get("batch_num_tokens", valid.sum()), dtype=valid.dtype, device=valid.device)
    sequences = torch.as_tensor(known.get("global_batch_size", valid.shape[1]), dtype=valid.dtype, device=valid.device)
    return {"n_valid": tokens / ranks, "n_sequences": sequences / ranks}
