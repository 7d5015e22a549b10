"""Replay with stocks drawn anew, targets, and losses of laws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.detan.config import DetaNConfig
from agents.detan.policy import StockPolicy
from agents.off_policy import mean_term
from ccrl.data import Batching, Data, tree_map
from ccrl.estimators import q_losses
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.terms import LogRatio, Outputs
from ccrl.learn import Cycle, Polyak
from ccrl.replay import ReplayBuffer
from ccrl.updaters import FlatUpdater
from ccrl.wrappers.stock import STOCK, relabel_stock

__all__ = ["DetaNCycle", "StockReplay", "energy_loss"]


class StockReplay(ReplayBuffer):
    """A ring whose draws are seen with other stocks: what is kept is what happened.

    :param low: the drawn stocks' range, ``[]`` or ``[m]``.
    :param share: of rows that get a new stock.
    :param rewards: key of the successor's observation that holds the reward vector; None: ``reward`` is the reward.
    """

    def __init__(
        self, *args: Any, low: Tensor, high: Tensor, gamma: float, share: float, rewards: str | None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.low, self.high = low.to(self.device), high.to(self.device)
        self.gamma, self.share, self.rewards = gamma, share, rewards

    def sample(self, spec: Batching, generator: torch.Generator | None, *args: Any, **options: Any) -> Data:
        """As the ring's, with stocks drawn anew and their successors ``(c + R) / gamma``."""
        data = super().sample(spec, generator, *args, **options)
        obs, after = dict(data["obs"]), dict(data["next_obs"])
        kept = obs[STOCK].double()
        draw = torch.rand(kept.shape, generator=generator, dtype=torch.float64, device=self.device)
        which = torch.rand(data.shape, generator=generator, device=self.device) < self.share
        which = which.view(*data.shape, *[1] * (kept.dim() - 2))
        obs[STOCK] = torch.where(which, self.low + (self.high - self.low) * draw, kept)
        reward = data["reward"] if self.rewards is None else after[self.rewards]
        after[STOCK] = relabel_stock(reward, obs[STOCK], self.gamma)
        return data.derive(obs=obs, next_obs=after, vector_reward=reward.to(self.low.dtype))


class DetaNCycle(Cycle):
    """Targets from the target network, then one step on the loss."""

    one_graph = True

    def __init__(self, config: DetaNConfig, policy: StockPolicy, updater: FlatUpdater) -> None:
        super().__init__()
        self.averages = (Polyak("target", tau=1.0, every=config.target_every),)
        self._config = config
        loss = q_losses.quantile_loss(config.kappa) if not policy.objective.dims else energy_loss
        term = mean_term("distribution_loss", loss, "quantiles")
        self._phases = (Phase("critic", (term,), Batching(size=config.batch_size), updater),)

    def targets(self, draw: Data, ctx: Context) -> Data:
        target: Any = ctx.bank.policy("target")
        after = tree_map(lambda x: x.flatten(0, 1), draw["next_obs"])
        theta = target.quantiles(after)
        best = target.utilities(after, theta).argmax(-1)
        chosen = theta[torch.arange(len(theta), device=theta.device), best]  # [B, N] or [B, N, m]
        chosen = chosen.reshape(*draw.shape, *chosen.shape[1:])
        lead = (*draw.shape, *[1] * (chosen.dim() - 2))
        discount = draw.discount(self._config.gamma, self._config.time_limit).view(lead)
        reward = draw["vector_reward"].to(chosen.dtype).unsqueeze(2)
        # a masked successor may be anything
        later = torch.where(discount > 0, chosen, torch.zeros_like(chosen))
        return draw.derive(target=reward + discount * later)

    def phases(self) -> tuple[Phase, ...]:
        return self._phases

    def after_iteration(self, ctx: Context) -> None:
        c = self._config
        done = (ctx.progress / max(c.exploration_fraction, 1e-9)).clamp(0.0, 1.0)
        policy: Any = ctx.policy
        policy.epsilon.copy_(c.exploration_start + (c.exploration_end - c.exploration_start) * done)


def _taken(outputs: Outputs, batch: Data) -> Tensor:
    """Particles of the actions that were taken, ``[T', B, N, m]``."""
    theta = outputs["quantiles"]
    index = batch["action"].view(*batch.shape, *[1] * (theta.dim() - 2))
    return theta.gather(2, index.expand(*batch.shape, 1, *theta.shape[3:])).squeeze(2)


def energy_loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """The energy distance of particles, up to a constant: ``mean ||theta_i - y_j|| - mean ||theta_i - theta_k|| / 2``;
    smallest where both laws are equal (Szekely and Rizzo 2013)."""
    theta, y = _taken(outputs, batch), batch["target"]

    def spread(a: Tensor, b: Tensor) -> Tensor:
        # the gradient of a norm at 0 is NaN
        return ((a.unsqueeze(3) - b.unsqueeze(2)).square().sum(-1) + 1e-12).sqrt().mean((-1, -2))

    return spread(theta, y) - 0.5 * spread(theta, theta)
