"""What is optimised of the return's distribution: an expected utility of stock plus return, and a search over c_0.

Every objective here has one form. With the stock ``c_0`` at an episode's start and the return ``G``,

    maximise over policies, and over c_0 where it is searched:   E f(c_0 + G) - offset(c_0)

``offset(c_0) = c_0`` where it is searched (optimised certainty equivalents), 0 where the objective fixes ``c_0``.
Avila Pires et al. 2025, arXiv 2501.13028; CVaR: Rockafellar and Uryasev 2000; certainty equivalents: Ben-Tal and
Teboulle 2007. docs/distributional.md derives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = [
    "OCE", "CVaR", "Custom", "Entropic", "Expected", "Homeostasis", "MeanCVaR", "Objective", "OptimisticTail",
    "SoftConstraints", "TargetReturn", "outer_search",
]  # fmt: skip


@dataclass(frozen=True)
class Objective:
    """Base class: a utility ``f``, and where ``c_0`` comes from.

    ``dims`` is the length of the vectors that ``f`` takes along the last axis; 0: it takes numbers.
    """

    dims: ClassVar[int] = 0
    searched: ClassVar[bool] = False
    """Whether ``c_0`` is found by the outer search; otherwise ``start`` has it."""

    @property
    def degree(self) -> float | None:
        """``d`` where ``f(a x) = a^d f(x)`` for every ``a > 0``: what a discount below 1 needs. None: no such d."""
        return 1.0

    @property
    def start(self) -> float | tuple[float, ...]:
        """The fixed ``c_0``."""
        raise ValueError(f"{type(self).__name__} has no fixed c_0: it is the result of outer_search")

    def utility(self, x: Tensor) -> Tensor:
        """``f``: ``[...]`` (``[..., dims]`` of vectors) to ``[...]``."""
        raise NotImplementedError

    def from_start(self, start: Tensor, expected_utility: Tensor) -> Tensor:
        """The objective of episodes from ``start``, of ``E f(c_0 + G)``."""
        return expected_utility - start if self.searched else expected_utility

    def best_start(self, atoms: Tensor, weights: Tensor) -> Tensor:
        """The best ``c_0`` for ONE law of the return, atoms ``[K]`` with ``weights`` ``[K]``; ties: the largest."""
        if not self.searched:
            return torch.as_tensor(self.start, dtype=atoms.dtype, device=atoms.device)
        # f is concave with its only kink at 0: the concave function of c_0 has its kinks where c_0 + atom = 0
        starts = -torch.unique(atoms)  # type: ignore[no-untyped-call]
        inner = (weights * self.utility(starts[:, None] + atoms)).sum(-1)
        return outer_search(self, starts, inner)[0]

    def value(self, atoms: Tensor, weights: Tensor) -> Tensor:
        """The objective of one law of the return, atoms ``[K]`` (``[K, dims]``) with ``weights`` ``[K]``."""
        start = self.best_start(atoms, weights)
        return self.from_start(start, (weights * self.utility(start + atoms)).sum(-1))

    def check_discount(self, gamma: float) -> None:
        """:raises ValueError: a discount for which the greedy step would not optimise this objective."""
        if not 0.0 < gamma <= 1.0:
            raise ValueError(f"gamma: expected a number in (0, 1], got {gamma}")
        if gamma < 1.0 and self.degree is None:
            raise ValueError(
                f"{type(self).__name__}: expected gamma = 1, got {gamma}; its utility is not homogeneous, so what is "
                "best for c_t + G_t is not best for c_0 + G_0 = gamma^t (c_t + G_t)"
            )


def outer_search(objective: Objective, starts: Tensor, expected_utility: Tensor) -> tuple[Tensor, Tensor]:
    """``(c_0*, value)``: the best of ``starts`` ``[C]``, given ``E f(c_0 + G)`` ``[C]`` of the policy from each.

    Ties within 1e-12 go to the largest ``c_0``. Of estimated utilities the maximum is optimistic: report the value of
    the start found from other episodes than those it was found with.
    """
    value = objective.from_start(starts, expected_utility)
    top = value >= value.max() - 1e-12
    best = torch.where(top, starts, torch.full_like(starts, -math.inf)).argmax()
    return starts[best], value[best]


@dataclass(frozen=True)
class Expected(Objective):
    """The mean: ``f(x) = x``, ``c_0 = 0``. The greedy action does not depend on the stock."""

    @property
    def start(self) -> float:
        return 0.0

    def utility(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class OCE(Objective):
    """Optimised certainty equivalent ``max_{c_0} E f(c_0 + G) - c_0`` of a concave ``f`` that is piecewise linear with
    its kink at 0, ``f(0) = 0`` and slopes ``below >= 1 >= above`` there.

    :raises ValueError: slopes for which the maximum does not exist or the functional is no certainty equivalent.
    """

    below: float = 1.0
    above: float = 0.0
    searched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        low, high = _number("above", self.above), _number("below", self.below)
        if not (0.0 <= low <= 1.0 <= high < math.inf):
            raise ValueError(f"{type(self).__name__}: expected slopes 0 <= above <= 1 <= below, got {low} and {high}")

    def utility(self, x: Tensor) -> Tensor:
        return self.below * x.clamp_max(0.0) + self.above * x.clamp_min(0.0)


@dataclass(frozen=True)
class CVaR(OCE):
    """The mean of the worst ``tau`` of returns: ``f(x) = min(x, 0) / tau``. Minus ``c_0*`` is a tau-quantile.

    The policy of a given ``c_0`` does not depend on ``tau``: one solution over all ``c_0`` serves every level.

    :raises ValueError: a level outside (0, 1].
    """

    tau: float = 0.1

    def __init__(self, tau: float) -> None:
        level = _level(tau)
        object.__setattr__(self, "tau", level)
        super().__init__(below=1.0 / level, above=0.0)


@dataclass(frozen=True)
class MeanCVaR(OCE):
    """``weight * mean + (1 - weight) * CVaR_tau``: slopes ``(1 - weight) / tau + weight`` and ``weight``.

    :raises ValueError: a weight outside [0, 1] or a level outside (0, 1].
    """

    weight: float = 0.5
    tau: float = 0.1

    def __init__(self, weight: float, tau: float) -> None:
        level, share = _level(tau), _number("weight", weight)
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"weight: expected a number in [0, 1], got {weight}")
        object.__setattr__(self, "weight", share)
        object.__setattr__(self, "tau", level)
        super().__init__(below=(1.0 - share) / level + share, above=share)


@dataclass(frozen=True)
class Entropic(Objective):
    """The entropic certainty equivalent ``-log E exp(-rate G) / rate``: ``f(x) = (1 - exp(-rate x)) / rate``. Without a
    discount only: its utility is not homogeneous.

    :raises ValueError: a rate that is not positive.
    """

    rate: float = 1.0
    searched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < _number("rate", self.rate) < math.inf:
            raise ValueError(f"rate: expected a positive number, got {self.rate}")

    @property
    def degree(self) -> None:
        return None

    def utility(self, x: Tensor) -> Tensor:
        return -torch.expm1(-self.rate * x) / self.rate

    def best_start(self, atoms: Tensor, weights: Tensor) -> Tensor:
        # stationary point of -c - exp(-rate c) E exp(-rate G) / rate
        return torch.logsumexp(weights.log() - self.rate * atoms, -1) / self.rate


@dataclass(frozen=True)
class TargetReturn(Objective):
    """Generate a desired return: ``f(x) = -|x|``, ``c_0 = -target``.

    :raises ValueError: a target that is not finite.
    """

    target: float = 0.0

    def __post_init__(self) -> None:
        _finite("target", self.target)

    @property
    def start(self) -> float:
        return -self.target

    def utility(self, x: Tensor) -> Tensor:
        return -x.abs()


@dataclass(frozen=True)
class OptimisticTail(Objective):
    """The mean gain beyond a threshold: ``f(x) = max(x, 0)``, ``c_0 = -threshold``. The threshold is an input: of a
    convex utility the search over ``c_0`` is a minimisation, which does not commute with the policy's maximisation.

    :raises ValueError: a threshold that is not finite.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        _finite("threshold", self.threshold)

    @property
    def start(self) -> float:
        return -self.threshold

    def utility(self, x: Tensor) -> Tensor:
        return x.clamp_min(0.0)


@dataclass(frozen=True)
class Homeostasis(Objective):
    """Keep variables at their set-points: ``f(x) = -||x||_2``, the stock is the deviation, ``c_0`` the first one.

    :raises ValueError: no variable, or a deviation that is not finite.
    """

    deviation: tuple[float, ...] = (0.0,)

    def __init__(self, deviation: Sequence[float]) -> None:
        object.__setattr__(self, "deviation", _numbers("deviation", deviation))
        object.__setattr__(self, "dims", len(self.deviation))
        if not self.deviation:
            raise ValueError("deviation: expected one number per variable, got none")
        _finite("deviation", *self.deviation)

    @property
    def start(self) -> tuple[float, ...]:
        return self.deviation

    def utility(self, x: Tensor) -> Tensor:
        return -(x * x).sum(-1).sqrt()


@dataclass(frozen=True)
class SoftConstraints(Objective):
    """Returns ``G_i >= bounds[i]``: ``f(x) = sum_i min(x_i, 0)``, ``c_0 = -bounds``. With ``trade_off``, coordinate 0
    is a reward without a bound: ``f(x) = x_0 + trade_off * sum_{i >= 1} min(x_i, 0)``, ``c_0 = (0, -bounds)``.

    :raises ValueError: no bound, one that is not finite, or a trade-off that is not positive.
    """

    bounds: tuple[float, ...] = (0.0,)
    trade_off: float | None = None

    def __init__(self, bounds: Sequence[float], trade_off: float | None = None) -> None:
        object.__setattr__(self, "bounds", _numbers("bounds", bounds))
        object.__setattr__(self, "trade_off", None if trade_off is None else _number("trade_off", trade_off))
        object.__setattr__(self, "dims", len(self.bounds) + (trade_off is not None))
        if not self.bounds or (trade_off is not None and not 0.0 < trade_off < math.inf):
            raise ValueError(f"expected one bound or more and trade_off > 0, got {self.bounds} and {trade_off}")
        _finite("bounds", *self.bounds)

    @property
    def start(self) -> tuple[float, ...]:
        below = tuple(-b for b in self.bounds)
        return below if self.trade_off is None else (0.0, *below)

    def utility(self, x: Tensor) -> Tensor:
        if self.trade_off is None:
            return x.clamp_max(0.0).sum(-1)
        return x[..., 0] + self.trade_off * x[..., 1:].clamp_max(0.0).sum(-1)


@dataclass(frozen=True)
class Custom(Objective):
    """A utility of your own with a fixed ``c_0``. ``homogeneous`` is its degree, None where it has none."""

    f: Callable[[Tensor], Tensor] = torch.tanh
    at: float = 0.0
    homogeneous: float | None = None

    @property
    def degree(self) -> float | None:
        return self.homogeneous

    @property
    def start(self) -> float:
        return self.at

    def utility(self, x: Tensor) -> Tensor:
        return self.f(x)


def _number(name: str, value: float) -> float:
    """:raises TypeError: for what is no number, as a list of one."""
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name}: expected a number, got {value!r}")


def _numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """:raises TypeError: for what is no list of numbers, as a number alone."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name}: expected a list of numbers, got {values!r}")
    return tuple(_number(name, value) for value in values)


def _finite(name: str, *values: float) -> None:
    if not all(math.isfinite(_number(name, value)) for value in values):
        raise ValueError(f"{name}: expected finite numbers, got {list(values)}")


def _level(tau: float) -> float:
    if not 0.0 < (level := _number("tau", tau)) <= 1.0:
        raise ValueError(f"tau: expected a level in (0, 1], got {tau}")
    return level
