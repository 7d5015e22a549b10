"""How often a policy visits what a reference visits, by a discriminator between samples of the two; for any recipe.

Laidlaw, Singhal, Dragan 2025 (arXiv 2403.03185); docs/orpo.md. An estimator makes an :class:`OccupancyRatio`, calls its
``fit`` in its own ``fit``, and puts it and ``divergences.OccupancyPenalty`` before its advantages.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.data import Batching, Data
from ccrl.estimators import aggregates
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.policies.encoders import OneHotFactors
from ccrl.policies.observations import observation_sizes, observation_spaces
from ccrl.updaters import FlatUpdater, Stats

__all__ = ["DISCRIMINATOR", "Discriminator", "OccupancyRatio", "class_loss"]


def class_loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """``softplus(-d)`` of the policy's samples, ``softplus(d)`` of the reference's (column ``side`` +-1)."""
    return F.softplus(-batch["side"] * outputs["logit"])


DISCRIMINATOR = (
    Term("discriminator_loss", class_loss, aggregates.mean, want=frozenset({"logit"}), advantage=None, weight="weight"),
)


class Discriminator(nn.Module):
    """Logits ``d(s, a)`` of the policy against the reference: a perceptron on features ``[..., k]``."""

    def __init__(self, width: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.LeakyReLU()]
            width = size
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))
        # 0 everywhere before the first step: no penalty
        nn.init.zeros_(self.net[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.net[-1].bias)  # type: ignore[arg-type]

    def logits(self, features: Tensor) -> Tensor:
        """``[...]``."""
        logits: Tensor = self.net(features).squeeze(-1)
        return logits

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        return {"logit": self.logits(batch["features"])}


class OccupancyRatio(nn.Module):
    """A stage: ``log_occupancy_ratio`` ``[T, N]``, ``d = log mu_pi / mu_ref`` at the policy's own samples.

    Register :attr:`updater` with the agent's updaters, which save the discriminator.

    Args:
        spaces: of observations and actions.
        reference: a rollout of the reference policy, kept (its features) for every later fit.
        hidden: widths of the discriminator's layers.
        lr: Adam's step size.
        eps: Adam's.
        epochs: passes over both samples per fit.
        batch_size: steps in a minibatch.
        action: the discriminator sees the action; otherwise it compares occupancy measures of states.
    """

    reference_features: Tensor

    def __init__(
        self,
        spaces: tuple[Any, Any],
        reference: Data,
        *,
        hidden: tuple[int, ...] = (256, 256),
        lr: float = 1e-3,
        eps: float = 1e-5,
        epochs: int = 4,
        batch_size: int = 256,
        action: bool = True,
    ) -> None:
        super().__init__()
        self.spaces, self.action, self.epochs, self.batching = spaces, action, epochs, Batching(size=batch_size)
        features = self.features(reference["obs"], reference["action"]).flatten(0, 1)
        self.register_buffer("reference_features", features[reference["valid"].flatten() > 0].clone())
        # in a tuple: the updater saves its parameters
        self._discriminator = (Discriminator(features.shape[1], hidden).to(features.device),)
        self.updater = FlatUpdater(self._discriminator[0], lr=lr, eps=eps)

    def features(self, obs: Tree, action: Tensor) -> Tensor:
        """``[T, N, k]``: observations, flat and one-hot, and the action."""
        spaces = observation_spaces(self.spaces[0])
        lead = action.shape[:2]
        parts = [_flat(obs[key] if isinstance(obs, dict) else obs, space, lead) for key, space in spaces.items()]
        if self.action:
            parts.append(_flat(action, self.spaces[1], lead))
        return torch.cat(parts, -1)

    def fit(self, data: Data, generator: torch.Generator) -> Stats:
        """Train the discriminator on the policy's rollout and the reference's; ``discriminator_loss``."""
        mine = self.features(data["obs"], data["action"]).flatten(0, 1)
        both = torch.cat([mine, self.reference_features])
        valid = torch.cat([data["valid"].flatten(), torch.ones(len(self.reference_features), device=both.device)])
        side = torch.cat([torch.ones(len(mine)), -torch.ones(len(self.reference_features))]).to(both)
        # every class counts the same, whatever its size
        counts = torch.where(side > 0, valid[: len(mine)].sum(), valid[len(mine) :].sum())
        weight = valid.sum() / counts
        columns = {"features": both, "side": side, "weight": weight, "valid": valid}
        rows = Data({name: x.unsqueeze(0) for name, x in columns.items()})
        stats: Stats = {}
        for _ in range(self.epochs):
            stats = self.updater.run(DISCRIMINATOR, rows.epoch(self.batching, generator))
        return {"discriminator_loss": stats["discriminator_loss"]}

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state.get(f"{prefix}reference_features")
        if saved is not None and saved.shape[1:] == self.reference_features.shape[1:]:
            # of as many valid steps as the reference had then: played again it may meet other ends of episodes
            self.reference_features = saved.to(self.reference_features, copy=True)
        super()._load_from_state_dict(state, prefix, *rest)

    @torch.no_grad()
    def forward(self, data: Data) -> Data:
        d = self._discriminator[0].logits(self.features(data["obs"], data["action"]))
        return data.derive(log_occupancy_ratio=d)


def _flat(x: Tensor, space: gym.Space[Any], lead: torch.Size) -> Tensor:
    if isinstance(space, gym.spaces.MultiDiscrete):
        encoder = OneHotFactors(space)
        found: Tensor = encoder(x.reshape(-1, len(encoder.sizes)))
        return found.float().reshape(*lead, encoder.width)
    size = observation_sizes(space)
    if size < 0:
        return F.one_hot(x.long(), -size).float()
    return x.reshape(*lead, size).float()
