"""What agents, collectors and updaters ask of a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ccrl.batched_env import Tree
from ccrl.data import Data, Field, Unit

__all__ = ["Policy"]


@runtime_checkable
class Policy(Protocol):
    """An ``nn.Module`` with these members is a policy; no inheritance needed.

    Shapes: ``N`` environments or rows of a step, ``[T', B]`` a minibatch. A policy without a memory has
    ``unit = "transition"``, returns None from ``initial_state`` and ignores ``state`` and ``first``. One with a memory
    has ``unit = "sequence"``, returns ``state`` from ``act`` and declares the field ``policy_state`` per sequence; its
    minibatches are whole columns with the columns ``policy_state`` ``[B, S]`` and ``first`` ``[T, B]``.
    """

    unit: Unit

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Noise for ``n`` actions ``[n, *noise_shape]``; nothing random happens anywhere else."""
        ...

    def initial_state(self, n: int) -> Tensor | None:
        """The state ``[n, S]`` before an episode, zeros."""
        ...

    def act(
        self, obs: Tree, noise: Tensor | None, state: Tensor | None = None, first: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``action`` ``[N, ...]`` as stored, what ``behaviour_fields`` store of the step (without ``old_``), and the
        next ``state``. ``noise=None`` is the mode; ``first`` ``[N]`` bool marks rows that begin an episode."""
        ...

    def to_env(self, action: Tensor) -> Tensor:
        """The action that the environment executes."""
        ...

    def behaviour_fields(self) -> tuple[Field, ...]:
        """Raw columns of the behaviour policy; ``log_prob`` is filled by ``behaviour``, once per rollout."""
        ...

    def behaviour(self, columns: Mapping[str, Tensor], action: Tensor) -> dict[str, Tensor]:
        """Columns ``[T, N]`` that follow from the stored ones."""
        ...

    def evaluate(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        """What ``want`` names of ``outputs()``, each ``[T', B, ...]``."""
        ...

    def values(self, obs: Tree, head: str = "value") -> Tensor:
        """One critic head ``[B]`` (policies with a critic and without a memory)."""
        ...

    def state_values(self, data: Data, head: str = "value") -> tuple[Tensor, Tensor]:
        """A critic head at every row of a whole rollout and at its true successor, both ``[T, N]``."""
        ...

    def outputs(self) -> frozenset[str]:
        """Names that ``evaluate`` can compute."""
        ...

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        """``evaluate``, under the name that ``torch.func.functional_call`` uses."""
        ...
