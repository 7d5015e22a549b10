"""A flow as a policy: a velocity network, of which samplers make Gaussian transitions, one per denoising step.

Rows of a rollout are denoising steps: ``obs`` is x_t, ``action`` the next state. ``evaluate`` computes, ``[T', B,
...]``: ``velocity`` ``[.., D]`` at ``obs`` and ``time``; ``mean`` ``[.., D]`` of the transition, by ``mean_step`` with
the factors that the sampler used (columns ``mean_x``, ``mean_v``); ``log_prob`` of ``action`` under it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ccrl.data import Data, Unit
from ccrl.diffusion.flow import Schedule, gaussian_log_prob, mean_step
from ccrl.diffusion.networks import VelocityMLP
from ccrl.estimators.terms import Outputs

__all__ = ["OUTPUTS", "FlowPolicy", "Reduce"]

OUTPUTS = frozenset({"velocity", "mean", "log_prob"})
Reduce = Literal["mean", "sum"]


class FlowPolicy(nn.Module):
    """``net(x [..., D], time [...], condition [..., C]) -> [..., D]`` with classifier-free guidance.

    :param base: a known velocity that the network is added to, ``(x, time, condition) -> [..., D]``; None: none.
    :param guidance: ``v(null) + guidance (v(c) - v(null))`` (Ho and Salimans 2022), in sampling and scoring alike; 1
        evaluates the network once. The null condition is all zeros.
    :param reduce: of log-probabilities over dimensions: their mean, as image code has it, or the sum.
    """

    unit: Unit = "sequence"
    compiles = True

    def __init__(
        self, net: nn.Module, *, base: nn.Module | None = None, guidance: float = 1.0, reduce: Reduce = "mean"
    ) -> None:
        super().__init__()
        self.net, self.base, self.guidance, self.reduce = net, base, guidance, reduce

    def outputs(self) -> frozenset[str]:
        return OUTPUTS

    def velocity(self, x: Tensor, time: Tensor, condition: Tensor, guidance: float | None = None) -> Tensor:
        """``[..., D]`` at ``x`` ``[..., D]``; ``time`` ``[...]`` and ``condition`` ``[..., C]`` may be broadcast.

        :param guidance: None: the policy's own.
        """
        scale = self.guidance if guidance is None else guidance
        found = self._plain(x, time, condition)
        if scale == 1.0:
            return found
        free = self._plain(x, time, torch.zeros_like(condition))
        return free + scale * (found - free)

    def _plain(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        found: Tensor = self.net(x, time, condition)
        return found if self.base is None else found + self.base(x, time, condition)

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        """``want`` of ``OUTPUTS`` ``[T', B, ...]``."""
        time = batch["time"]
        if time.stride(-1) == 0:  # one time for all columns, as collectors store it: its features are computed once
            time = time[:, :1]
        out = {"velocity": self.velocity(batch["obs"], time, batch["condition"])}
        if want & {"mean", "log_prob"}:
            out["mean"] = mean_step(batch["obs"], out["velocity"], batch["mean_x"], batch["mean_v"])
            if "mean_past" in batch:  # what a solver of second order adds for the step before
                out["mean"] = out["mean"] + batch["mean_past"]
        if "log_prob" in want:
            out["log_prob"] = gaussian_log_prob(batch["action"], out["mean"], batch["std"], self.reduce)
        return {name: out[name] for name in want}

    @torch.no_grad()
    def rollout(
        self, start: Tensor, condition: Tensor, schedule: Schedule, noise: Tensor | None, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """From noise to data: states ``[T + 1, N, D]`` and the means ``[T, N, D]`` of the transitions.

        :param start: ``[N, D]`` standard normal numbers.
        :param noise: ``[T, N, D]`` standard normal numbers, not read where a transition has no deviation; None: every
            state is its mean.
        :param past: ``[T, N, D]``, filled with what a solver of second order adds to each mean for the step before.
        """
        steps = schedule.to(start.device, start.dtype)
        states = start.new_empty(len(steps) + 1, *start.shape)
        means = states[1:] if noise is None else torch.empty_like(states[1:])
        states[0] = start
        rows, targets, drawn = states.unbind(), means.unbind(), None
        if noise is not None:
            drawn = (noise * steps.std.view(-1, 1, 1)).unbind()
        by_x, by_v = (factor.view(-1, 1).unbind() for factor in (steps.x, steps.v))
        velocity = self._stepper(steps.time, condition)
        before: Tensor | None = None
        for i, (x, mean) in enumerate(zip(rows, targets)):
            v = velocity(x, i)
            mean_step(x, v, by_x[i], by_v[i], out=mean)
            if steps.past is not None:
                added = torch.zeros_like(x) if before is None else steps.past[i] * before
                mean.add_(added)
                if past is not None:
                    past[i] = added
                before = x - steps.time[i] * v
            if drawn is not None:
                torch.add(mean, drawn[i], out=rows[i + 1])
        return states, means

    def _stepper(self, time: Tensor, condition: Tensor) -> Callable[[Tensor, int], Tensor]:
        """``(x [N, D], step) -> velocity [N, D]``; what does not depend on ``x`` is computed once for all steps."""
        if self.base is not None or self.guidance != 1.0 or not isinstance(self.net, VelocityMLP):
            return lambda x, i: self.velocity(x, time[i].view(1), condition)
        return self.net.steps(time, condition)
