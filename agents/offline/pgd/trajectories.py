"""Trajectories as what a denoiser sees: rows ``[obs, arctanh(action), reward, done]``, every channel standardised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ccrl.diffusion import Denoiser, denoising_loss, lognormal_levels

__all__ = ["BOUND", "Codec", "fit_denoiser"]

BOUND = 0.999
"""Actions in [-1, 1] are clipped to it before ``arctanh``."""


@dataclass(frozen=True)
class Codec:
    """Between rows of a data set and channels of a denoiser: ``D = S + A + 2``.

    :param mean: ``[D]``. :param std: ``[D]``, 1 where a channel is constant; of a constant ``done`` 0, so that
        whatever is generated there decodes to that constant.
    """

    mean: Tensor
    std: Tensor
    observations: int
    actions: int

    @classmethod
    def of(cls, rows: Mapping[str, Tensor]) -> Codec:
        """Statistics of columns ``obs [M, S], action [M, A]`` (in [-1, 1]), ``reward [M], terminated [M]``."""
        x = _channels(rows).double()
        std = x.std(0, correction=0)
        constant = std[-1] == 0.0
        mean, std = x.mean(0).float(), torch.where(std > 0, std, 1.0).float()
        std[-1] = torch.where(constant, 0.0, std[-1])
        return cls(mean, std, rows["obs"].shape[-1], rows["action"].shape[-1])

    @property
    def action_slice(self) -> slice:
        """Channels of the action."""
        return slice(self.observations, self.observations + self.actions)

    def encode(self, rows: Mapping[str, Tensor]) -> Tensor:
        """``[..., D]`` from columns ``[..., ...]``."""
        return (_channels(rows) - self.mean) / torch.where(self.std > 0, self.std, 1.0)

    def observation(self, x: Tensor) -> Tensor:
        """Raw observations ``[..., S]``."""
        return x[..., : self.observations] * self.std[: self.observations] + self.mean[: self.observations]

    def action(self, x: Tensor) -> Tensor:
        """Actions in [-1, 1], ``[..., A]``."""
        s = self.action_slice
        return (x[..., s] * self.std[s] + self.mean[s]).tanh()

    def decode(self, x: Tensor) -> dict[str, Tensor]:
        """Transitions from windows ``[B, T, D]``: ``B (T - 1)`` rows, the successor of each is the next row. A window
        with a number that is not finite is dropped; rows after a terminal are none."""
        x = x[x.flatten(1).isfinite().all(1)]
        tail = x[..., -2:] * self.std[-2:] + self.mean[-2:]
        done = tail[..., 1] > 0.5
        obs = self.observation(x)
        over = done.cumsum(1) - done.long() > 0
        kept = ~over[:, :-1]
        return {
            "obs": obs[:, :-1][kept], "next_obs": obs[:, 1:][kept], "action": self.action(x)[:, :-1][kept],
            "reward": tail[:, :-1, 0][kept], "terminated": done[:, :-1][kept],
        }  # fmt: skip


def _channels(rows: Mapping[str, Tensor]) -> Tensor:
    action = rows["action"].clamp(-BOUND, BOUND).atanh()
    parts = [rows["obs"], action, rows["reward"].unsqueeze(-1), rows["terminated"].unsqueeze(-1)]
    return torch.cat([p.float() for p in parts], -1)


def fit_denoiser(
    denoiser: Denoiser,
    average: Denoiser,
    draw: object,
    steps: int,
    *,
    learning_rate: float,
    decay: float,
    generator: torch.Generator,
) -> float:
    """Train ``denoiser`` for ``steps`` on what ``draw()`` gives ``[B, ...]``; ``average`` becomes the exponential mean
    of its parameters, moved at every tenth step. The step size rises over a tenth of them and falls along a cosine.

    :return: the mean loss of the last tenth. :raises FloatingPointError: it is not finite.
    """
    optimiser = torch.optim.Adam(denoiser.parameters(), learning_rate)
    warm = max(1, steps // 10)

    def rate(step: int) -> float:
        if step < warm:
            return 0.1 + 0.9 * step / warm
        return 0.5 * float(1.0 + torch.cos(torch.tensor(torch.pi * (step - warm) / max(1, steps - warm), device="cpu")))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    losses: list[Tensor] = []
    for step in range(steps):
        clean: Tensor = draw()  # type: ignore[operator]
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        sigma = lognormal_levels(len(clean), generator, clean.device)
        loss = denoising_loss(denoiser, clean, noise, sigma)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if step % 10 == 9 or step == steps - 1:
            with torch.no_grad():
                # early averages would hold the initial parameters
                share = max(1.0 - decay, 10.0 / (step + 10.0))
                torch._foreach_lerp_(list(average.parameters()), list(denoiser.parameters()), share)
        if step >= steps - warm:
            losses.append(loss.detach())
    found = float(torch.stack(losses).mean())
    if not torch.isfinite(torch.tensor(found)):
        raise FloatingPointError(f"the denoiser's loss is {found}; lower denoiser_learning_rate")
    return found
