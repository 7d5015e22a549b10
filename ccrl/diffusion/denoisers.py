"""What is learned: a denoiser (EDM) or a score, one divided by the other's noise; and their losses."""

from __future__ import annotations

import math

from torch import Tensor, nn

__all__ = ["Denoiser", "ScoreModel", "denoising_loss", "score_matching_loss"]


class Denoiser(nn.Module):
    """``D(x, sigma) = c_skip x + c_out net(c_in x, c_noise)`` (Karras et al. 2022, eq. 7 and table 1).

    ``x [B, ...]`` is clean data of standard deviation ``sigma_data`` plus noise; ``sigma`` is 0-d or ``[B]``.

    :param net: ``(x [B, ...], c_noise [B]) -> [B, ...]``.
    """

    def __init__(self, net: nn.Module, sigma_data: float = 1.0) -> None:
        super().__init__()
        if not 0.0 < sigma_data < math.inf:
            raise ValueError(f"Denoiser: expected sigma_data > 0, got {sigma_data}")
        self.net, self.sigma_data = net, sigma_data

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``c_skip, c_out, c_in, c_noise`` at the levels ``sigma``."""
        data = self.sigma_data
        total = sigma.square() + data * data
        return data * data / total, sigma * data / total.sqrt(), total.rsqrt(), sigma.log() / 4.0

    def weight(self, sigma: Tensor) -> Tensor:
        """Of the squared error at a level: the network's own error then weighs 1 at every level."""
        return (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.expand(x.shape[0]).to(x)
        skip, out, inside, noise = self.coefficients(sigma)
        found: Tensor = _rows(skip, x) * x + _rows(out, x) * self.net(_rows(inside, x) * x, noise)
        return found

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``grad log p(x; sigma) = (D(x, sigma) - x) / sigma^2`` (their eq. 3)."""
        found: Tensor = (self(x, sigma) - x) / _rows(sigma.expand(x.shape[0]).to(x), x).square()
        return found


def denoising_loss(denoiser: Denoiser, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """``mean w(sigma) (D(x + sigma noise, sigma) - x)^2`` over everything, 0-d; one level ``sigma [B]`` per sample."""
    found = denoiser(clean + _rows(sigma, clean) * noise, sigma)
    loss: Tensor = (_rows(denoiser.weight(sigma), clean) * (found - clean).square()).mean()
    return loss


class ScoreModel(nn.Module):
    """``s(x, sigma) = net(x, log sigma) / sigma``, an estimate of ``grad log p(x; sigma)`` (Song and Ermon 2019).

    :param net: ``(x [B, D], log sigma [B]) -> [B, D]``; its output is of order 1 at every level.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.expand(x.shape[0]).to(x)
        found: Tensor = self.net(x, sigma.log()) / _rows(sigma, x)
        return found


def score_matching_loss(model: ScoreModel, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Denoising score matching (Vincent 2011) weighted by ``sigma^2``: ``E ||sigma s(x + sigma noise, sigma) +
    noise||^2``, 0-d: the sum over dimensions, the mean over samples."""
    column = _rows(sigma, clean)
    loss: Tensor = (column * model(clean + column * noise, sigma) + noise).square().flatten(1).sum(1).mean()
    return loss


def _rows(value: Tensor, like: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1, ...]``."""
    return value.reshape(-1, *[1] * (like.dim() - 1))
