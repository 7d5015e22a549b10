"""Made-up retail sales with a known law: intermittent and fast movers, seasons, a December peak, planned promotions.

A benchmark for planning methods, not recorded sales. Everything is decided by ``seed`` alone. Per product ``i``, store
``k`` and week ``t``::

    rate   = level_i share_k (1 + a_i sin(2 pi (t / 52.18 + phase_i))) (1 + peak_i near_Christmas_t) trend_i^t
    rate   = rate (1 + lift_i promotion_{i,t})            lift between 0.5 and 2.5, one week in ten, planned
    units  = Poisson(rate gamma_t)                        gamma: mean 1, standard deviation 0.4 (over-dispersion)
    units  = 0 in a share of the weeks where the product is intermittent (two in five products, level below 2)
"""

from __future__ import annotations

import datetime

import numpy as np
import torch

from ccrl.settings import Count, Natural, checked
from envs.inventory.demand import Recorded, days_from_christmas

__all__ = ["retail_sales"]

_FIRST = datetime.date(2022, 1, 3)
"""A Monday."""


@checked
def retail_sales(products: Count = 40, weeks: Count = 156, stores: Count = 1, seed: Natural = 0) -> Recorded:
    """Weekly sales of ``products`` products in ``stores`` stores, with the promotions that were planned.

    Returns:
        Series ``[products, weeks, stores]`` of whole units with one feature, ``promotion`` (0 or 1, the same in all
        stores), and names ``P01``, ``S1``.
    """
    rng = np.random.default_rng(seed)
    week = np.arange(weeks)
    christmas = days_from_christmas(_FIRST, weeks).numpy()

    def one(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (products, 1, 1))

    slow = (rng.random((products, 1, 1)) < 0.4).astype(float)
    level = np.where(slow > 0, np.exp(one(np.log(0.4), np.log(2.0))), np.exp(one(np.log(3.0), np.log(30.0))))
    share = rng.gamma(8.0, 1 / 8.0, (products, 1, stores))
    season = 1.0 + one(0.0, 0.5) * np.sin(2 * np.pi * (week[None, :, None] / 52.18 + one(0.0, 1.0)))
    peak = 1.0 + one(0.0, 1.5) * np.exp(-0.5 * ((christmas + 10.0) / 10.0) ** 2)[None, :, None]
    trend = one(0.8, 1.3) ** (week[None, :, None] / weeks)
    promotion = (rng.random((products, weeks, 1)) < 0.1).astype(float)
    lift = 1.0 + one(0.5, 2.5) * promotion
    rate = level * share * season * peak * trend * lift
    noise = rng.gamma(6.25, 1 / 6.25, rate.shape)
    empty = rng.random(rate.shape) < slow * one(0.2, 0.5)
    units = rng.poisson(rate * noise) * ~empty
    features = torch.from_numpy(np.repeat(promotion[..., None], stores, 2).astype(np.float32))
    return Recorded(
        torch.from_numpy(units.astype(np.float32)),
        f"made-up retail sales ({products} products, {weeks} weeks, {stores} stores, seed {seed})",
        _FIRST,
        products=tuple(f"P{i + 1:02d}" for i in range(products)),
        locations=tuple(f"S{k + 1}" for k in range(stores)),
        features=features,
        feature_names=("promotion",),
    )
