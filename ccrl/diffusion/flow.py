"""Flow matching: straight lines from noise to data, their velocity, and the transitions that samplers make of it.

    x_t = (1 - t) x_0 + t e,   e ~ N(0, I),   velocity u = e - x_0,   t = 1 is noise, t = 0 data

    x_0 = x_t - t u,   e = x_t + (1 - t) u,   score = -(x_t + (1 - t) u) / t

Every sampler here is a Gaussian transition whose mean is linear in the state and the velocity, so ONE function,
:func:`mean_step`, serves the sampler, the loss and teachers: two of them would not agree to the last digit, and a
student that equals its teacher would not stand still.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "STOCHASTIC", "FlowSolver", "Schedule", "flow_grid", "flow_point", "gaussian_log_prob", "make_schedule",
    "matching_error", "mean_step", "shift_time",
]  # fmt: skip

FlowSolver = Literal["flow_sde", "dance_sde", "cps", "ddim", "ode", "dpm2"]
"""flow_sde: Flow-GRPO (Liu et al. 2025); dance_sde: DanceGRPO (Xue et al. 2025); cps: coefficient-preserving sampling
(Wang and Yu 2025); ddim: stochastic DDIM (Song et al. 2021) on straight lines; ode: Euler, no noise; dpm2: second
order, no noise, DPM-Solver++ 2M (Lu et al. 2022)."""

STOCHASTIC = ("flow_sde", "dance_sde", "cps", "ddim")
"""Solvers whose transitions have a density."""


@dataclass(frozen=True)
class Schedule:
    """``T`` transitions from noise to data as columns ``[T]``, float64 on the CPU."""

    time: Tensor
    """Where a transition starts; falls from 1."""
    next_time: Tensor
    x: Tensor
    """Factor of the state in the mean."""
    v: Tensor
    """Factor of the velocity in the mean."""
    std: Tensor
    """Standard deviation of the transition, 0 where it is deterministic."""
    sigma: Tensor
    """The noise level that released code divides by: sigma_t of flow_sde, for the others the deviation itself."""
    past: Tensor | None = None
    """Factor of the clean sample that was predicted a step before (dpm2); None: the mean does not depend on it."""

    @property
    def dt(self) -> Tensor:
        """``next_time - time``, negative."""
        return self.next_time - self.time

    def __len__(self) -> int:
        return int(self.time.shape[0])

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Schedule:
        """The same in another type."""
        columns = (self.time, self.next_time, self.x, self.v, self.std, self.sigma)
        past = None if self.past is None else self.past.to(device, dtype)
        return replace(Schedule(*(column.to(device, dtype) for column in columns)), past=past)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """``shift t / (1 + (shift - 1) t)``: more of the steps near the noise; ``shift = 1`` changes nothing."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def flow_grid(steps: int, shift: float = 1.0) -> list[float]:
    """``steps + 1`` times from 1 to 0, equal steps before the shift.

    :raises ValueError: fewer than one step, or a shift that is not positive.
    """
    if steps < 1 or not 0.0 < shift < math.inf:
        raise ValueError(f"flow_grid: expected steps >= 1 and shift > 0, got {steps} and {shift}")
    even = [1.0 - i / steps for i in range(steps + 1)]
    return [shift * t / (1.0 + (shift - 1.0) * t) for t in even]


def make_schedule(grid: Sequence[float], solver: FlowSolver, noise: float = 0.0) -> Schedule:
    """The transitions between the times of ``grid``.

    With ``a = noise``, ``dt = t' - t < 0`` and the predictions ``x_0 = x - t v``, ``e = x + (1 - t) v``:

    * flow_sde: ``sigma = a sqrt(t / (1 - t))`` (at t = 1 the next time stands in the denominator), drift
      ``v + sigma^2 / (2 t) e``, deviation ``sigma sqrt(-dt)``;
    * dance_sde: the same with ``sigma = a``;
    * cps: ``(1 - t') x_0 + sqrt(t'^2 - s^2) e``, deviation ``s = t' sin(a pi / 2)``;
    * ddim: ``(1 - t') x_0 + sqrt(t'^2 - s^2) e``, ``s = a (t' / t) sqrt(t^2 - ((1 - t) / (1 - t'))^2 t'^2)``;
    * ode: ``x + v dt``;
    * dpm2: ``x + v dt + (1 - t' / t) w (x_0 - x_0 of the step before)``, ``w = h / (2 h of the step before)`` with
      ``h = log((1 - t') / t') - log((1 - t) / t)``, 0 in the first, the last, and the step after one that starts at 1.

    :param grid: falling times from at most 1 to at least 0.
    :raises ValueError: a grid that does not fall, noise without a stochastic solver or the other way round, more noise
        than a solver has room for (cps and ddim: 1), or a first step of flow_sde that ends at 0.
    """
    times = torch.tensor(list(grid), dtype=torch.float64, device="cpu")
    if len(times) < 2 or bool((times[1:] >= times[:-1]).any()) or times[0] > 1.0 or times[-1] < 0.0:
        raise ValueError(f"make_schedule: expected at least two falling times in [0, 1], got {list(grid)}")
    if (solver not in STOCHASTIC) != (noise == 0.0) or not 0.0 <= noise < math.inf:
        raise ValueError(
            f"make_schedule: expected noise 0 with 'ode' and 'dpm2' and noise > 0 with {', '.join(STOCHASTIC)}, got "
            f"{noise} with {solver!r}"
        )
    t, after = times[:-1], times[1:]
    dt = after - t
    if solver == "ode":
        zero = torch.zeros_like(t)
        return Schedule(t, after, torch.ones_like(t), dt, zero, zero)
    if solver == "dpm2":
        weight, zero = _extrapolation(times), torch.zeros_like(t)
        share = -dt / t
        return Schedule(t, after, 1.0 + share * weight, dt * (1.0 + weight), zero, zero, -share * weight)
    if solver in ("flow_sde", "dance_sde"):
        below = torch.where(t >= 1.0, after, t)
        if solver == "flow_sde" and bool((below <= 0.0).any()):
            raise ValueError("make_schedule: flow_sde needs a step that starts at 1 to end above 0; take more steps")
        sigma = noise * (t / (1.0 - below)).sqrt() if solver == "flow_sde" else torch.full_like(t, noise)
        pull = sigma.square() / (2.0 * t) * dt
        std = sigma * (-dt).sqrt()
        return Schedule(t, after, 1.0 + pull, dt + pull * (1.0 - t), std, sigma if solver == "flow_sde" else std)
    if noise > 1.0:
        raise ValueError(f"make_schedule: expected noise <= 1 with {solver!r}, got {noise}")
    if solver == "cps":
        std = after * math.sin(0.5 * math.pi * noise)
    else:
        kept = (1.0 - t) / (1.0 - after) * after
        std = noise * after / t * (t.square() - kept.square()).clamp_min(0.0).sqrt()
    rest = (after.square() - std.square()).clamp_min(0.0).sqrt()
    return Schedule(t, after, 1.0 - after + rest, rest * (1.0 - t) - (1.0 - after) * t, std, std)


def _extrapolation(times: Tensor) -> Tensor:
    """``w`` of dpm2 ``[T]``."""
    level = ((1.0 - times) / times).log()  # of the signal: minus infinity at noise, infinity at data
    step = level.diff()
    weight = torch.zeros_like(step)
    weight[1:] = step[1:] / (2.0 * step[:-1])
    return torch.where(weight.isfinite(), weight, torch.zeros_like(weight))


def mean_step(x: Tensor, velocity: Tensor, x_factor: Tensor, v_factor: Tensor, out: Tensor | None = None) -> Tensor:
    """The mean ``[..., D]`` of a transition from ``x`` ``[..., D]``; the factors ``[...]`` are a schedule's.

    :param out: where it is written, without gradient; None: a new tensor.
    """
    return torch.mul(x_factor.unsqueeze(-1), x, out=out).add_(v_factor.unsqueeze(-1) * velocity)


def gaussian_log_prob(value: Tensor, mean: Tensor, std: Tensor, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
    """``[...]`` of values ``[..., D]`` under ``N(mean, std^2 I)`` with ``std`` ``[...]``: the sum over dimensions, or
    as
    image code has it their mean. 0 where ``std`` is 0: there is no density."""
    noisy = std > 0.0
    safe = torch.where(noisy, std, torch.ones_like(std)).unsqueeze(-1)
    element = -0.5 * ((value - mean) / safe).square() - safe.log() - 0.5 * math.log(2.0 * math.pi)
    found = element.mean(-1) if reduce == "mean" else element.sum(-1)
    return torch.where(noisy, found, torch.zeros_like(found))


def flow_point(clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """``x_t`` and the velocity's target ``e - x_0``, both ``[..., D]``, at ``time`` ``[...]``."""
    t = time.unsqueeze(-1)
    return (1.0 - t) * clean + t * noise, noise - clean


def matching_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over dimensions, ``[...]``."""
    return (velocity - target).square().mean(-1)
