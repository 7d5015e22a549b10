"""Decoupled methods: rows are pairs (time, noise) on the finished samples, whatever sampler made them."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from agents.flow.parts import FlowRecipe, Needs
from ccrl.data import Data
from ccrl.diffusion.flow import flow_point, shift_time
from ccrl.estimators.base import Context
from ccrl.estimators.recipe import Parts
from ccrl.estimators.stages import with_episode_reward
from ccrl.settings import ConfigError

__all__ = ["MatchingRecipe", "Times", "draw_times"]

Times = Literal["grid", "uniform", "logit_normal"]


def draw_times(
    kind: Times, k: int, generator: torch.Generator | None, device: torch.device | str, *, steps: int = 14,
    shift: float = 1.0, share: float = 0.9,
) -> Tensor:  # fmt: skip
    """``k`` times ``[k]`` at least 0.01, one in each of ``k`` equal parts of their range.

    * grid: of the sampler's own times without the first (pure noise) and the last ``1 - share`` of them;
    * uniform: of (0, 1), then shifted; * logit_normal: the sigmoid of normal quantiles, then shifted.
    """
    place = (torch.arange(k, device=device) + torch.rand(k, generator=generator, device=device)) / k
    if kind == "grid":
        count = max(1, math.floor(share * steps))
        found = shift_time(1.0 - ((place * count).floor().clamp_max(count - 1) + 1.0) / steps, shift)
    elif kind == "uniform":
        found = shift_time(place, shift)
    else:
        found = shift_time(torch.special.ndtri(place.clamp(1e-4, 1.0 - 1e-4)).sigmoid(), shift)
    return found.clamp_min(0.01)


class MatchingRecipe(FlowRecipe):
    """``K`` rows per sample: one time for all samples of a row, noise for each. Drawn once per iteration and stored, so
    that every pass compares the same pairs.

    Columns of the rows: ``obs`` (x_t), ``target`` (e - x_0), ``time``, ``advantage``, and the velocities of the
    versions in ``velocities``, ``<version>_velocity``.
    """

    needs: ClassVar[Needs] = "clean"

    def __init__(self, config: Any, parts: Parts) -> None:
        super().__init__(config, parts)
        if config.times == "grid" and getattr(config, "steps", 2) < 2:
            raise ConfigError(f"times: expected 'uniform' or 'logit_normal' with steps={config.steps} (a sampler's "
                              "times without the first are none), got 'grid'")  # fmt: skip

    @property
    def velocities(self) -> tuple[str, ...]:
        """Versions of the policy whose velocities the loss reads."""
        return ()

    def start(self, data: Data, ctx: Context) -> Data:
        return with_episode_reward(data)

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        found = super().prepare(have, ctx)
        rows = self.rows(found["on"], ctx.generator)
        for version in self.velocities:
            rows = rows.derive(**{f"{version}_velocity": self.evaluated(ctx, version, rows, "velocity")})
        return found | {"on": self.finish(rows, ctx)}

    def finish(self, rows: Data, ctx: Context) -> Data:
        """Further columns of the rows."""
        return rows

    def times(self, generator: torch.Generator, device: torch.device) -> Tensor:
        """Those of an iteration's rows ``[K]``."""
        c = self.config
        return draw_times(c.times, c.n_times, generator, device, steps=c.steps, shift=c.time_shift)

    def rows(self, data: Data, generator: torch.Generator) -> Data:
        """The pairs of an iteration ``[K, N]``."""
        c, clean = self.config, data["clean"]
        time = self.times(generator, clean.device)
        noise = torch.randn(c.n_times, *clean.shape, generator=generator, device=clean.device)
        t = time.to(clean.dtype).view(-1, 1).expand(-1, clean.shape[0])
        x, target = flow_point(clean, noise.to(clean.dtype), t)
        ones = torch.ones_like(t)
        steps = {"obs": x, "target": target, "time": t, "valid": ones, "present": ones}
        sequence = {name: data[name] for name in data.sequence}
        advantage = data["advantage"][:1].expand(c.n_times, -1)
        rows = Data(steps | sequence, sequence=frozenset(sequence))
        return rows.derive(advantage=advantage)
