"""Observations, rewards and ends of one task, computed into fixed memory.

The tensors of a :class:`State` are views of the simulator's memory that stay where they are, so views of their parts
and scratch arrays are made once, and a step is a handful of NumPy calls on them: for 16 copies making a view costs more
than the arithmetic, and a call of NumPy a third of one of torch. Numbers are those of the task's methods to the last
bit: NumPy does what IEEE arithmetic determines, torch's own kernels (``out=``) the rest: sums, roots of sums, sines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Arrays", "Write", "bonus", "bound", "clip", "sum_of_squares"]

Write = Callable[[], Any]
Array = np.ndarray[Any, Any]


class Arrays(NamedTuple):
    """What a step writes."""

    obs: Array
    """``[N, k]`` float32 or float64."""
    reward: Array
    """``[N]``, likewise."""
    terminated: Array
    """``[N]`` bool."""


def bound(methods: Any, *, allowed: frozenset[str] = frozenset({"reset"})) -> bool:
    """Whether ``methods.in_place`` still says what the object's other methods say: no subclass of the class that wrote
    it, nor the object itself, has replaced one of them (``allowed`` apart)."""
    derived = []
    for cls in type(methods).__mro__:
        if "in_place" in vars(cls):
            break
        derived.append(cls)
    replaced = {name for cls in derived for name, value in vars(cls).items() if _is_method(name, value)}
    replaced |= {name for name, value in vars(methods).items() if callable(value)}
    return not (replaced - allowed)


def _is_method(name: str, value: Any) -> bool:
    return not name.startswith("__") and (callable(value) or isinstance(value, staticmethod | classmethod | property))


def sum_of_squares(x: Tensor) -> tuple[Array, Write]:
    """``[N]`` sums over the rows of ``x [N, k]``, and what brings them up to date: in torch's order of summation."""
    square, total, source = torch.empty(x.shape, dtype=x.dtype), torch.empty(len(x), dtype=x.dtype), x.numpy()
    squared = square.numpy()

    def update() -> None:
        np.multiply(source, source, out=squared)
        torch.sum(square, 1, out=total)

    return total.numpy(), update


def clip(x: Array, bounds: tuple[float, float], out: Array) -> None:
    """``x`` clipped to ``bounds``; ``np.clip`` takes longer to look at its arguments than this to clip."""
    np.maximum(x, bounds[0], out=out)
    np.minimum(out, bounds[1], out=out)


def bonus(reward: float) -> float:
    """``reward * healthy`` of a bool tensor, where it is set: torch rounds it to its default type."""
    return float(reward * torch.ones((), dtype=torch.bool))
