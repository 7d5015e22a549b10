"""Stages on the rewards of whole sequences: what is rewarded beside the task, and who is compared with whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ccrl.data import Data, masked
from ccrl.estimators.stages import GroupBaseline

__all__ = ["KLPenalty", "OverlongPenalty", "SequenceAdvantage", "SequenceWhiten", "informative", "kl_tokens"]


def kl_tokens(data: Data) -> Tensor:
    """``log_prob - ref_log_prob`` ``[T, N]`` of the sampled tokens, 0 where not valid: k1 of KL(behaviour || ref)."""
    return masked(data["log_prob"] - data["ref_log_prob"], data["valid"])


@dataclass(frozen=True)
class KLPenalty:
    """``shaped_episode_reward`` ``[N]``: the reward minus ``coef`` times the sequence's k1.

    k1 belongs here and nowhere else: as a loss its expected gradient is 0.
    """

    coef: float
    reward: str = "episode_reward"

    def __call__(self, data: Data) -> Data:
        return data.derive_sequence(shaped_episode_reward=data[self.reward] - self.coef * kl_tokens(data).sum(0))


@dataclass(frozen=True)
class OverlongPenalty:
    """``shaped_episode_reward`` ``[N]``: the reward minus a ramp over the last ``buffer`` tokens before ``limit``
    (DAPO, eq. 13). A length is that of the whole completion, replies included, as the limit is.

    ``floor``: -1 beyond the limit, as in the paper; without it the ramp goes on (verl).
    """

    limit: int
    buffer: int
    floor: bool = True
    reward: str = "episode_reward"

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.limit:
            raise ValueError(f"OverlongPenalty: expected 0 < buffer <= limit, got {self.buffer}, {self.limit}")

    def __call__(self, data: Data) -> Data:
        length = data["length"] if "length" in data else (data["valid"] > 0).sum(0)
        return data.derive_sequence(shaped_episode_reward=data[self.reward] + self.penalty(length))

    def penalty(self, length: Tensor) -> Tensor:
        """``[N]`` of lengths ``[N]`` in tokens."""
        ramp = (self.limit - self.buffer - length) / self.buffer
        return ramp.clamp(-1.0 if self.floor else None, 0.0)


@dataclass(frozen=True)
class SequenceAdvantage:
    """``sequence_advantage`` ``[N]``: the mean of ``advantage`` ``[T, N]`` over a sequence's valid steps, for losses
    with one ratio per sequence."""

    def __call__(self, data: Data) -> Data:
        valid = data["valid"]
        total = masked(data["advantage"], valid).sum(0)
        return data.derive_sequence(sequence_advantage=total / valid.sum(0).clamp_min(1.0))


@dataclass(frozen=True)
class SequenceWhiten:
    """``advantage`` ``[T, N]``: a group baseline's, standardised over the sequences of the rollout (TRL's
    ``normalize_advantages``: sample deviation plus ``eps``). Equal advantages stay what they are: zeros."""

    baseline: GroupBaseline
    eps: float = 1e-4

    def __call__(self, data: Data) -> Data:
        advantage = self.baseline.advantages(data[self.baseline.reward], data["group"])
        some = (advantage != advantage[0]).any()
        centred = advantage - advantage.mean()
        white = torch.where(some, centred / (advantage.std() + self.eps), torch.zeros_like(advantage))
        return data.derive(advantage=white.expand(data.shape) * data["valid"])


def informative(data: Data) -> Tensor:
    """``[N]`` bool: whether the sequence's group has outcomes that differ (column ``reward_components``, first
    component; else
    ``episode_reward``). The others have no advantage (DAPO: groups of accuracy 0 or 1)."""
    outcome = data["reward_components"][:, 0] if "reward_components" in data else data["episode_reward"]
    _, index = torch.unique(data["group"], return_inverse=True)
    empty = torch.zeros(int(index.max()) + 1, dtype=outcome.dtype, device=outcome.device)
    lowest, highest = (empty.scatter_reduce(0, index, outcome, how, include_self=False) for how in ("amin", "amax"))
    return (lowest < highest)[index]
