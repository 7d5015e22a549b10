"""From noise to data through falling levels: Euler, Heun, DDIM, with churn and a guide."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ccrl.diffusion.levels import Churn

__all__ = ["Denoise", "Guide", "Solver", "sample"]

Denoise = Callable[[Tensor, Tensor], Tensor]
"""``(x [B, ...], sigma 0-d) -> clean [B, ...]``."""

Guide = Callable[[Tensor, int, float, Denoise], Tensor]
"""``(x, step, sigma, denoise) -> x`` moved, before the step; it draws nothing."""

Solver = Literal["euler", "heun", "ddim"]


@torch.no_grad()
def sample(
    denoise: Denoise,
    start: Tensor,
    levels: Sequence[float],
    *,
    solver: Solver = "heun",
    churn: Churn | None = None,
    eta: float = 0.0,
    guide: Guide | None = None,
    generator: torch.Generator | None = None,
    predict_from: Literal["churned", "unchurned"] = "churned",
) -> Tensor:
    """Samples ``[B, ...]`` from ``start``, noise at ``levels[0]`` (that times standard normal numbers).

    ``euler`` and ``heun`` follow the probability-flow equation ``dx / dsigma = (x - D) / sigma`` (Karras et al. 2022,
    algorithms 1 and 2), Heun without its second evaluation in a step that ends at 0. ``ddim`` (Song et al. 2021) keeps
    the predicted noise and adds ``eta`` times the ancestral share of new noise; with ``eta = 0`` it is Euler's step.

    :param levels: falling, ``[N + 1]``, the last one where to stop (0: clean data).
    :param churn: None adds no noise. DDIM has ``eta`` in its place.
    :param guide: moves the sample before every step, for conditions and policies.
    :param generator: of the noise that is added; no random number is drawn without churn and ``eta``.
    :param predict_from: ``unchurned`` starts the predicted step at the sample before churn, as some published code
        does: with churn it inflates the variance.
    :raises ValueError: levels that do not fall, or settings that the solver does not read.
    """
    n = len(levels) - 1
    if n < 1 or any(not (math.isfinite(a) and a > b >= 0.0) for a, b in itertools.pairwise(levels)):
        raise ValueError(f"sample: expected at least two levels that fall to >= 0, got {list(levels)}")
    if solver == "ddim" and churn is not None:
        raise ValueError("sample: expected churn=None with solver 'ddim', which adds noise by eta")
    if solver != "ddim" and eta != 0.0:
        raise ValueError(f"sample: expected eta=0 with solver {solver!r}, got {eta}; it is a setting of 'ddim'")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"sample: expected eta in [0, 1], got {eta}")
    x = start
    for i in range(n):
        sigma, following = float(levels[i]), float(levels[i + 1])
        if guide is not None:
            x = guide(x, i, sigma, denoise)
        if solver == "ddim":
            x = _ddim(denoise, x, sigma, following, eta, generator)
            continue
        gamma = 0.0 if churn is None else churn.gamma(sigma, n)
        risen, churned = sigma * (1.0 + gamma), x
        if gamma > 0.0:
            assert churn is not None
            added = math.sqrt(risen**2 - sigma**2) * churn.noise
            churned = x + added * _noise_like(x, generator)
        slope = (churned - denoise(churned, x.new_tensor(risen))) / risen
        predicted = (churned if predict_from == "churned" else x) + (following - risen) * slope
        if solver == "heun" and following > 0.0:
            second = (predicted - denoise(predicted, x.new_tensor(following))) / following
            predicted = churned + (following - risen) * 0.5 * (slope + second)
        x = predicted
    return x


def _ddim(
    denoise: Denoise, x: Tensor, sigma: float, following: float, eta: float, generator: torch.Generator | None
) -> Tensor:
    clean = denoise(x, x.new_tensor(sigma))
    fresh = eta * following * math.sqrt(1.0 - (following / sigma) ** 2)
    kept = math.sqrt(following**2 - fresh**2) / sigma
    x = clean + kept * (x - clean)
    return x + fresh * _noise_like(x, generator) if fresh > 0.0 else x


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
