"""A finite decision process with finitely many outcomes per action: what the exact computations take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["FiniteMDP", "Outcome"]

Outcome = tuple[float, Any, int | None]
"""``(probability, reward, next state)``; a reward of several numbers is a tuple, next state None ends the episode."""


@dataclass(frozen=True)
class FiniteMDP:
    """``S`` states, ``A`` actions, at most ``O`` outcomes of each.

    :param probability: ``[S, A, O]``, 0 where there are fewer outcomes.
    :param reward: ``[S, A, O]``, or ``[S, A, O, m]`` of vectors.
    :param successor: ``[S, A, O]`` int64.
    :param ends: ``[S, A, O]`` bool: the outcome ends the episode.
    :raises ValueError: shapes that differ, probabilities that are negative or do not sum to 1, successors that are no
        states, rewards that are not finite.
    """

    probability: Tensor
    reward: Tensor
    successor: Tensor
    ends: Tensor

    def __post_init__(self) -> None:
        shape = self.probability.shape
        if len(shape) != 3 or any(x.shape[:3] != shape for x in (self.reward, self.successor, self.ends)):
            shapes = [tuple(x.shape) for x in (self.probability, self.reward, self.successor, self.ends)]
            raise ValueError(f"FiniteMDP: expected four tables [S, A, O], got {shapes}")
        sums = (self.probability.sum(-1) - 1.0).abs()
        if not bool((sums <= 1e-9).all() & (self.probability >= 0.0).all()):  # also of NaN
            raise ValueError("FiniteMDP: expected probabilities >= 0 that sum to 1 in every state and action")
        if bool((self.successor < 0).any() | (self.successor >= shape[0]).any()):
            raise ValueError(
                f"FiniteMDP: expected successors in 0 ... {shape[0] - 1}, got {int(self.successor.min())} to "
                f"{int(self.successor.max())}; an outcome that ends the episode has the successor None"
            )
        if not bool(self.reward.isfinite().all()):
            raise ValueError("FiniteMDP: expected finite rewards, got NaN or inf")

    @classmethod
    def of(cls, table: Sequence[Sequence[Sequence[Outcome]]]) -> FiniteMDP:
        """From lists: ``table[state][action]`` are the outcomes.

        :raises ValueError: no state, other actions in some state, an action without outcomes.
        """
        if not table or not table[0] or any(len(row) != len(table[0]) or not all(row) for row in table):
            raise ValueError(
                "FiniteMDP.of: expected a state or more, the same actions in all, and an outcome or more of each, got "
                f"{[[len(outcomes) for outcomes in row] for row in table]} outcomes"
            )
        actions, most = len(table[0]), max(len(outcomes) for row in table for outcomes in row)
        first = table[0][0][0][1]
        tail = (len(first),) if isinstance(first, Sequence) else ()
        lead = (len(table), actions, most)
        probability, reward = torch.zeros(lead, dtype=torch.float64), torch.zeros((*lead, *tail), dtype=torch.float64)
        successor, ends = torch.zeros(lead, dtype=torch.int64), torch.zeros(lead, dtype=torch.bool)
        for s, row in enumerate(table):
            for a, outcomes in enumerate(row):
                for o, (p, r, after) in enumerate(outcomes):
                    probability[s, a, o] = p
                    reward[s, a, o] = torch.as_tensor(r, dtype=torch.float64)
                    successor[s, a, o], ends[s, a, o] = (0, True) if after is None else (after, False)
        return cls(probability, reward, successor, ends)

    @property
    def states(self) -> int:
        return self.probability.shape[0]

    @property
    def actions(self) -> int:
        return self.probability.shape[1]

    @property
    def dims(self) -> int:
        """Length of a reward; 0: it is a number."""
        return self.reward.shape[-1] if self.reward.dim() == 4 else 0

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FiniteMDP:
        """On another device; probabilities and rewards in ``dtype``."""
        dtype = self.probability.dtype if dtype is None else dtype
        return FiniteMDP(
            self.probability.to(device, dtype), self.reward.to(device, dtype), self.successor.to(device),
            self.ends.to(device),
        )  # fmt: skip

    def outcomes(self, state: int, action: int) -> list[Outcome]:
        """Those with a positive probability."""
        rows = zip(*(x[state, action].tolist() for x in (self.probability, self.reward, self.successor, self.ends)))
        return [
            (p, tuple(r) if isinstance(r, list) else r, None if end else int(after))
            for p, r, after, end in rows
            if p > 0
        ]

    def timed(self, horizon: int) -> FiniteMDP:
        """The same process for ``horizon`` steps, with the step in the state: state ``t * S + s``; the last step ends
        the episode. :raises ValueError: less than one step."""
        if horizon < 1:
            raise ValueError(f"horizon: expected >= 1, got {horizon}")
        table = [
            [
                [(p, r, None if after is None or t + 1 == horizon else (t + 1) * self.states + after)
                 for p, r, after in self.outcomes(s, a)]
                for a in range(self.actions)
            ]
            for t in range(horizon)
            for s in range(self.states)
        ]  # fmt: skip
        return FiniteMDP.of(table).to(self.probability.device)

    def summary(self) -> Mapping[str, int]:
        """Sizes, for messages."""
        return {"states": self.states, "actions": self.actions, "outcomes": self.probability.shape[2]}
