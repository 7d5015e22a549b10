"""Rivals: single diffused transitions (SynthER), and an ensemble of one-step models that the policy acts in (MOPO)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agents.offline.pgd.guidance import Actor
from ccrl.policies.encoders import ACTIVATIONS

__all__ = ["TransitionCodec", "WorldModel"]


class WorldModel(nn.Module):
    """``n`` Gaussian perceptrons of ``(next_obs - obs, reward)`` given standardised ``(obs, action)``, one batched
    product per layer; the ``elites`` of the least error on held-out rows are rolled out.

    Log-variances lie softly between learned bounds. Rows it makes are never terminal: tasks whose states end an episode
    need ``terminal``.
    """

    statistics: Tensor
    elites: Tensor

    def __init__(
        self, observations: int, actions: int, *, width: int = 200, layers: int = 4, n: int = 7, elites: int = 5
    ) -> None:
        super().__init__()
        if not 1 <= elites <= n:
            raise ValueError(f"WorldModel: expected 1 <= elites <= n, got {elites} and {n}")
        self.sizes = observations, actions
        outputs = observations + 1
        widths = [observations + actions, *[width] * layers, 2 * outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(widths):
            self.weights.append(torch.randn(n, fan_in, fan_out) / (2.0 * fan_in**0.5))
            self.biases.append(torch.zeros(n, 1, fan_out))
        self.lowest = nn.Parameter(torch.full((outputs,), -10.0))
        self.highest = nn.Parameter(torch.full((outputs,), 0.5))
        self.act = ACTIVATIONS["silu"]()
        self.register_buffer("elites", torch.arange(elites))
        channels = widths[0] + outputs
        self.register_buffer("statistics", torch.stack([torch.zeros(channels), torch.ones(channels)]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance ``[n, B, S + 1]`` of standardised targets, of inputs ``[B, S + A]`` or one per
        member, ``[n, B, S + A]``."""
        x = x if x.dim() == 3 else x.expand(len(self.weights[0]), *x.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x, weight)
            x = self.act(x) if i < len(self.weights) - 1 else x
        mean, log = x.chunk(2, -1)
        log = self.highest - nn.functional.softplus(self.highest - log)
        return mean, self.lowest + nn.functional.softplus(log - self.lowest)

    def fit(
        self, rows: Mapping[str, Tensor], steps: int, generator: torch.Generator, batch: int = 256, rate: float = 1e-3
    ) -> Tensor:
        """Train on columns ``obs, action, reward, next_obs``, a fifth of them held out; their errors ``[n]``."""
        change = rows["next_obs"] - rows["obs"]
        data = torch.cat([rows["obs"], rows["action"], change, rows["reward"].unsqueeze(-1)], -1)
        std = data.std(0, correction=0)
        self.statistics.copy_(torch.stack([data.mean(0), torch.where(std > 0, std, 1.0)]))
        data = (data - self.statistics[0]) / self.statistics[1]
        data = data[torch.randperm(len(data), generator=generator, device=data.device)]
        held, data = data[: len(data) // 5], data[len(data) // 5 :]
        inputs = sum(self.sizes)
        optimiser = torch.optim.AdamW(self.parameters(), rate, weight_decay=2.5e-5)
        members = len(self.weights[0])
        for _ in range(steps):
            # each member sees its own draw
            index = torch.randint(len(data), (members, batch), generator=generator, device=data.device)
            x = data[index]
            mean, log = self(x[..., :inputs])
            loss = ((mean - x[..., inputs:]).square() * (-log).exp() + log).mean((1, 2)).sum()
            loss = loss + 0.01 * (self.highest - self.lowest).sum()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        with torch.no_grad():
            errors: Tensor = (self(held[:, :inputs])[0] - held[:, inputs:]).square().mean((1, 2))
            self.elites.copy_(errors.argsort()[: len(self.elites)])
        return errors

    @torch.no_grad()
    def rollout(
        self,
        obs: Tensor,
        actor: Actor,
        length: int,
        generator: torch.Generator,
        penalty: float = 0.0,
        terminal: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Rows of ``length`` steps of the policy from ``obs [B, S]``, each step by a random elite.

        :param penalty: the reward falls by this times the largest standard deviation (its norm) among the elites.
        :param terminal: whether a state ``[B, S]`` ends the episode.
        """
        parts: list[dict[str, Tensor]] = []
        inputs, of = sum(self.sizes), self.sizes[0]
        for _ in range(length):
            mean, std = actor(obs)
            noise = torch.randn(mean.shape, generator=generator, device=obs.device)
            action = (mean + std * noise).clamp(-1.0, 1.0)
            x = (torch.cat([obs, action], -1) - self.statistics[0, :inputs]) / self.statistics[1, :inputs]
            means, logs = (y[self.elites] for y in self(x))
            who = torch.randint(len(self.elites), (len(obs),), generator=generator, device=obs.device)
            row = torch.arange(len(obs), device=obs.device)
            spread = (0.5 * logs).exp()
            draw = torch.randn(means.shape[1:], generator=generator, device=obs.device)
            change = means[who, row] + spread[who, row] * draw
            change = self.statistics[0, inputs:] + self.statistics[1, inputs:] * change
            following = obs + change[:, :of]
            uncertain = (spread * self.statistics[1, inputs:]).norm(dim=-1).amax(0)
            ended = terminal(following) if terminal else torch.zeros(len(obs), dtype=torch.bool, device=obs.device)
            parts.append({
                "obs": obs, "action": action, "reward": change[:, of] - penalty * uncertain, "next_obs": following,
                "terminated": ended,
            })  # fmt: skip
            obs = following[~ended]
            if not len(obs):
                break
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


@dataclass(frozen=True)
class TransitionCodec:
    """Single transitions as SynthER diffuses them (Lu et al. 2023): ``[obs, action, reward, next_obs, done]``, no
    ``arctanh``, every channel but ``done`` standardised; done above 0.5."""

    mean: Tensor
    std: Tensor
    observations: int
    actions: int

    @classmethod
    def of(cls, rows: Mapping[str, Tensor]) -> TransitionCodec:
        """Statistics of columns ``[M, ...]``."""
        x = _transition(rows).double()
        std = x.std(0, correction=0)
        mean, std = x.mean(0).float(), torch.where(std > 0, std, 1.0).float()
        mean[-1], std[-1] = 0.0, 1.0
        return cls(mean, std, rows["obs"].shape[-1], rows["action"].shape[-1])

    def encode(self, rows: Mapping[str, Tensor]) -> Tensor:
        """``[M, D]``."""
        return (_transition(rows) - self.mean) / self.std

    def decode(self, x: Tensor) -> dict[str, Tensor]:
        """Columns from ``[M, D]``; rows with a number that is not finite are dropped."""
        raw = x[x.isfinite().all(1)] * self.std + self.mean
        n, a = self.observations, self.actions
        obs, action, reward, following, done = raw.split([n, a, 1, n, 1], -1)
        return {
            "obs": obs, "action": action.clamp(-1.0, 1.0), "reward": reward[:, 0], "next_obs": following,
            "terminated": done[:, 0] > 0.5,
        }  # fmt: skip


def _transition(rows: Mapping[str, Tensor]) -> Tensor:
    reward, done = (rows[k].unsqueeze(-1) for k in ("reward", "terminated"))
    parts = [rows["obs"], rows["action"], reward, rows["next_obs"], done]
    return torch.cat([p.float() for p in parts], -1)
