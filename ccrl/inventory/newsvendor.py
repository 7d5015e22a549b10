"""Generalised newsvendors: a forecaster of quantiles of lead-time demand, and what to do with them.

An order placed now serves demand from its lead time ``L`` on, so what counts is demand over ``L + 1`` periods. The
policies order up to a quantile of it: ``max(quantile(u) - position, 0)``.

Source: HDPO, arXiv 2306.11246, baselines on real data. Its code does not train the forecaster; ours minimises the
pinball loss.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.inventory.base_stock import _Levels
from ccrl.inventory.functional_env import FunctionalEnv, Network, State
from ccrl.policies.encoders import mlp

__all__ = ["NewsvendorPolicy", "QuantileForecaster", "Rule", "Windows", "demand_windows", "fit_forecaster"]

Rule = Literal["quantile_nv", "transformed_nv", "fixed_quantile", "returns_nv"]

_QUANTILES = 19
"""0.05 to 0.95."""


class QuantileForecaster(nn.Module):
    """Past demand and the calendar -> quantiles 0.05, 0.10 ... 0.95 of demand over ``L + 1`` periods, per lead time.

    :param history: periods of past demand in the input.
    :param leads: the lead times ``L``, consecutive and ascending.
    """

    levels: Tensor

    def __init__(self, history: int, leads: tuple[int, ...]) -> None:
        super().__init__()
        self.leads = leads
        self.register_buffer("levels", torch.arange(1, _QUANTILES + 1) / (_QUANTILES + 1), persistent=False)
        self.net = mlp([history + 1, 128, 128, _QUANTILES * len(leads)], "elu")

    def forward(self, past: Tensor, days: Tensor) -> Tensor:
        """``[..., len(leads), 19]`` from ``[..., history]`` and ``[..., 1]``, not negative."""
        out = self.net(torch.cat([past, days.to(past.dtype)], -1))
        return F.relu(out.unflatten(-1, (len(self.leads), _QUANTILES)))

    def pinball(self, past: Tensor, days: Tensor, total: Tensor) -> Tensor:
        """The loss that quantiles minimise; ``total`` ``[..., len(leads)]`` is demand over ``L + 1`` periods."""
        out = self.net(torch.cat([past, days.to(past.dtype)], -1)).unflatten(-1, (len(self.leads), _QUANTILES))
        error = total.unsqueeze(-1) - out  # before the clip: clipped outputs would never learn to leave 0
        return torch.maximum(self.levels * error, (self.levels - 1.0) * error).mean()


class Windows(NamedTuple):
    """What a forecaster learns from, ``R`` rows."""

    past: Tensor
    """``[R, history]``."""
    days: Tensor
    """``[R, 1]`` days from Christmas."""
    total: Tensor
    """``[R, len(leads)]``: demand over ``L + 1`` periods from the present one on."""


@torch.no_grad()
def demand_windows(env: FunctionalEnv, scenarios: State, leads: tuple[int, ...]) -> Windows:
    """Every window of the scenarios, store by store, that ends within the horizon.

    :raises ValueError: if the horizon is shorter than the longest window.
    """
    state, demand = env.initial(scenarios), env.noise(scenarios)
    steps = len(demand) - max(leads)
    if steps < 1:
        raise ValueError(f"leads: expected windows within {len(demand)} periods, got lead times {leads}")
    nothing = demand.new_zeros(demand.shape[1], len(env.network.edges))
    past, days, total = [], [], []
    for t in range(steps):
        obs = env.observe(state)
        past.append(obs["past_demand"].flatten(0, 1))
        days.append(obs["days_from_christmas"].repeat_interleave(demand.shape[2], 0))
        total.append(torch.stack([demand[t : t + lead + 1].sum(0).flatten() for lead in leads], -1))
        state, _ = env.step(state, nothing, demand[t])
    return Windows(torch.cat(past), torch.cat(days).to(demand.dtype), torch.cat(total))


def fit_forecaster(
    forecaster: QuantileForecaster,
    windows: Windows,
    steps: int,
    generator: torch.Generator,
    *,
    lr: float = 3e-3,
    batch: int = 1024,
) -> Tensor:
    """Minimise the pinball loss over random rows (Adam, step size falling linearly); its last value. The parameters end
    as constants."""
    forecaster.requires_grad_(True)
    optimiser = torch.optim.Adam(forecaster.parameters(), lr=lr)
    loss = windows.total.new_zeros(())
    for step in range(steps):
        rows = torch.randint(len(windows.total), (batch,), generator=generator, device=windows.total.device)
        loss = forecaster.pinball(*(column[rows] for column in windows))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.param_groups[0]["lr"] = lr * (1.0 - step / steps)
        optimiser.step()
    forecaster.requires_grad_(False)
    return loss.detach()


def interpolate(quantiles: Tensor, u: Tensor) -> Tensor:
    """The quantile ``u`` ``[...]`` in [0, 1] from those at 0.05 ... 0.95 ``[..., 19]``: linear, with the last slopes
    continued to 0 and 1."""
    first = 2.0 * quantiles[..., :1] - quantiles[..., 1:2]
    last = 2.0 * quantiles[..., -1:] - quantiles[..., -2:-1]
    knots = torch.cat([first, quantiles, last], -1)
    place = u * (_QUANTILES + 1)
    left = place.detach().floor().clamp(0, _QUANTILES).long().unsqueeze(-1)
    low, high = knots.gather(-1, left).squeeze(-1), knots.gather(-1, left + 1).squeeze(-1)
    return low + (place - left.squeeze(-1)) * (high - low)


class NewsvendorPolicy(_Levels):
    """Order up to a quantile of demand over the lead time and one period.

    * ``quantile_nv``: the newsvendor's ``u = p / (p + h)``, nothing to train.
    * ``transformed_nv``: ``u`` is a learnt function of it (a perceptron of 32, 32).
    * ``fixed_quantile``: one learnt ``u`` for all.
    * ``returns_nv``: ``quantile_nv`` that may send stock back (negative orders); inadmissible, for comparison.

    ``forecaster`` is trained beforehand (:func:`fit_forecaster`); the parameters that require gradients are those of
    ``u``.

    :raises ValueError: for an unknown rule or an environment that shows no past demand.
    """

    reads = ("past_demand", "days_from_christmas", "underage", "holding", "lead_time")

    def __init__(self, network: Network, like: State, rule: Rule) -> None:
        super().__init__(network, like)
        if rule not in get_args(Rule):
            raise ValueError(f"rule: expected one of {get_args(Rule)}, got {rule!r}")
        self.rule = rule
        leads = tuple(range(1, max(network.lead_times) + 1))  # scenarios may have any of them
        self.forecaster = QuantileForecaster(like["past_demand"].shape[2], leads).requires_grad_(False)
        if rule == "transformed_nv":
            self.transform = mlp([1, 32, 32, 1], "elu")
        if rule == "fixed_quantile":
            self.logit = nn.Parameter(torch.zeros(()))

    def forward(self, obs: State) -> Tensor:
        past = obs["past_demand"]
        days = obs["days_from_christmas"].unsqueeze(1).expand(-1, past.shape[1], -1)
        quantiles: Tensor = self.forecaster(past, days)
        lead = obs["lead_time"].to(torch.int64) - self.forecaster.leads[0]
        index = lead[..., None, None].expand(*lead.shape, 1, quantiles.shape[-1])
        level = interpolate(quantiles.gather(2, index).squeeze(2), self._quantile(obs))
        order = level - self.position(obs)
        return order if self.rule == "returns_nv" else F.relu(order)

    def _quantile(self, obs: State) -> Tensor:
        price, holding = obs["underage"], obs["holding"][:, -self.network.stores :]
        critical = price / (price + holding)
        if self.rule == "transformed_nv":
            learnt: Tensor = self.transform(critical.unsqueeze(-1)).squeeze(-1).sigmoid()
            return learnt
        if self.rule == "fixed_quantile":
            return self.logit.sigmoid().expand_as(critical)
        return critical
