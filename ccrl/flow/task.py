"""What a flow agent needs of a generation task: data under conditions, rewards of samples, and how good samples are.

Tasks live outside this package and are looked up in ``ccrl.registry.flow_tasks`` when an agent is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from ccrl import registry

__all__ = ["Conditions", "ExactTask", "FlowTask", "resolve_flow_task"]


@dataclass(frozen=True)
class Conditions:
    """``Q`` conditions to generate samples of."""

    label: Tensor
    """``[Q]`` int64: which condition, from 0 to ``task.conditions - 1``."""

    def __len__(self) -> int:
        return int(self.label.shape[0])

    def to(self, device: torch.device | str) -> Conditions:
        """The same on ``device``."""
        return Conditions(self.label.to(device))


@runtime_checkable
class FlowTask(Protocol):
    """Samples ``[N, size]`` under one of ``conditions`` conditions. A label of -1 means no condition: all data,
    whatever
    theirs, as classifier-free guidance needs."""

    name: str
    size: int
    """Numbers of a sample."""
    conditions: int
    components: tuple[str, ...]
    """Names of the reward's components; the reward is their sum."""

    def data(self, label: Tensor, generator: Generator | None) -> Tensor:
        """One training sample per label ``[N]``, ``[N, size]``."""
        ...

    def score(self, sample: Tensor, label: Tensor) -> Tensor:
        """Components ``[N, C]`` of the reward of samples ``[N, size]``, labels ``[N]``."""
        ...

    def measure(self, sample: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Numbers ``[N]`` that are watched and never trained on: ``gold`` (what the reward stands for) and
        ``distance`` (to the data), at least."""
        ...


@runtime_checkable
class ExactTask(Protocol):
    """A task whose density and velocity are known."""

    def velocity(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """``E[e - x_0 | x_t = x]`` ``[N, size]`` at ``time`` ``[N]``."""
        ...

    def log_density(self, sample: Tensor, label: Tensor) -> Tensor:
        """``[N]``, of the data."""
        ...


def resolve_flow_task(task: Any, **options: Any) -> FlowTask:
    """A task from one (returned as it is) or from a name of ``ccrl.registry.flow_tasks``, called with ``options``.

    :raises TypeError: if ``task`` is neither a name nor has the members of the protocol.
    :raises ValueError: an unknown name.
    """
    if isinstance(task, str):
        task = registry.flow_tasks.get(task)(**options)
    if not isinstance(task, FlowTask):
        members = ("name", "size", "conditions", "components", "data", "score", "measure")
        missing = [name for name in members if not hasattr(task, name)]
        raise TypeError(f"task: expected a name or a FlowTask, got {type(task).__name__} without {missing}")
    return task
