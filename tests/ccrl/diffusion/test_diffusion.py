"""Diffusion against closed forms in float64: coefficients, levels, samplers, scores, and a score that is learned."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from ccrl.diffusion import (
    Churn,
    Denoiser,
    FourierFeatures,
    ResidualMLP,
    ScoreMLP,
    ScoreModel,
    UNet1d,
    denoising_loss,
    dsm_optimum,
    gaussian_denoiser,
    gaussian_score,
    geometric_levels,
    karras_levels,
    lognormal_levels,
    mixture_score,
    sample,
    score_matching_loss,
)

F64 = torch.float64


def unit(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser of N(0, 1)."""
    return x / (1.0 + sigma * sigma)


def test_preconditioning() -> None:
    """sigma = .5: total 1.25; skip 1 / 1.25, out .5 / sqrt 1.25, in 1 / sqrt 1.25, ln(.5) / 4, weight 1.25 / .25."""
    denoiser = Denoiser(nn.Identity())
    sigma = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    found = torch.stack([*denoiser.coefficients(sigma), denoiser.weight(sigma)], -1)
    expected = torch.tensor([
        [0.8, 0.4472136, 0.8944272, -0.1732868, 5.0], [0.5, 0.7071068, 0.7071068, 0.0, 2.0],
        [0.2, 0.8944272, 0.4472136, 0.1732868, 1.25],
    ], dtype=F64)  # fmt: skip
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


def test_a_denoiser_is_what_its_coefficients_say_and_its_score_is_tweedies() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            return 0.5 * x + level.view(-1, 1)

    denoiser, x = Denoiser(Half()), torch.tensor([[2.0], [-1.0]], dtype=F64)
    # sigma 1: .5 * 2 + .7071068 * (.5 * .7071068 * 2 + 0) = 1.5; sigma .5: -.8 + .4472136 (.5 * -.8944272 - .1732868)
    found = denoiser(x, torch.tensor([1.0, 0.5], dtype=F64))
    torch.testing.assert_close(found, torch.tensor([[1.5], [-0.8 - 0.2 - 0.4472136 * 0.1732868]], dtype=F64), atol=1e-7,
                               rtol=0)  # fmt: skip
    score = denoiser.score(x, torch.tensor(0.5, dtype=F64))
    torch.testing.assert_close(score, (denoiser(x, torch.tensor(0.5, dtype=F64)) - x) / 0.25)
    with pytest.raises(ValueError, match="sigma_data"):
        Denoiser(nn.Identity(), 0.0)


def test_the_loss_weighs_the_networks_error_alike_at_every_level() -> None:
    """A network whose error is 1 in every entry has the loss 1, whatever the level: w c_out^2 = 1."""

    class OffByOne(nn.Module):
        clean: Tensor

        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            sigma = (4.0 * level).exp().view(-1, 1, 1)
            noisy = x * (sigma.square() + 1.0).sqrt()
            target = (self.clean - noisy / (sigma.square() + 1.0)) * (sigma.square() + 1.0).sqrt() / sigma
            return target + 1.0

    net, g = OffByOne(), torch.Generator().manual_seed(0)
    net.clean = torch.randn(6, 3, 2, generator=g, dtype=F64)
    noise, sigma = torch.randn(6, 3, 2, generator=g, dtype=F64), torch.tensor([0.01, 0.1, 0.5, 1, 5, 80.0]).double()
    assert float(denoising_loss(Denoiser(net), net.clean, noise, sigma)) == pytest.approx(1.0)


def test_levels() -> None:
    assert karras_levels(5) == pytest.approx([80, 17.527832, 2.515219, 0.169753, 0.002, 0], abs=1e-6)
    fine = karras_levels(256)
    assert (fine[1], fine[128], fine[254]) == pytest.approx((78.302851, 2.471412, 0.00220287), abs=1e-6)
    churn = Churn()
    on = [i for i, s in enumerate(fine) if churn.gamma(s, 256) > 0]
    assert on == list(range(22, 213))
    assert churn.gamma(fine[100], 256) == 0.3125
    assert churn.gamma(1.0, 128) == pytest.approx(math.sqrt(2) - 1)
    assert geometric_levels(3, 0.25, 1.0) == pytest.approx([1.0, 0.5, 0.25])
    drawn = lognormal_levels(20_000, torch.Generator().manual_seed(0)).log()
    assert float(drawn.mean()) == pytest.approx(-1.2, abs=0.05)
    assert float(drawn.std()) == pytest.approx(1.2, abs=0.05)
    for bad in ((1, 0.1, 1.0), (4, 0.0, 1.0), (4, 2.0, 1.0)):
        with pytest.raises(ValueError, match="expected n >= 2"):
            karras_levels(*bad)


def test_heun_converges_with_second_order_and_euler_with_first() -> None:
    """From 80 the flow of N(0, 1) ends at 80 / sqrt(1 + 80^2) = 0.99992188."""
    start, exact = torch.tensor([[80.0]], dtype=F64), 80 / math.sqrt(6401)
    found = {n: float(sample(unit, start, karras_levels(n))) for n in (16, 64, 256)}
    assert list(found.values()) == pytest.approx([1.0583486, 1.0029208, 1.0000989], abs=1e-6)
    fine = [float(sample(unit, start, karras_levels(n))) - exact for n in (256, 512)]
    assert 3.5 < fine[0] / fine[1] < 4.5
    coarse = [float(sample(unit, start, karras_levels(n), solver="euler")) - exact for n in (256, 512)]
    assert 1.8 < coarse[0] / coarse[1] < 2.2


def test_samples_have_the_right_spread() -> None:
    """Standard deviations of 20,000 samples (their own error .005), with churn and with the predictor that starts
    before it."""
    g = torch.Generator().manual_seed(0)
    start = 80.0 * torch.randn(20_000, 1, generator=g)

    def spread(n: int, **options: object) -> float:
        x = sample(unit, start, karras_levels(n), generator=g, **options)  # type: ignore[arg-type]
        assert abs(float(x.mean())) < 0.03
        return float(x.std())

    for n, plain, churned, quirk in (
        (16, 1.055, 1.132, 2.09), (32, 1.010, 1.046, 1.34), (64, 1.000, 1.023, None), (256, 0.997, 1.010, None),
    ):  # fmt: skip
        assert spread(n) == pytest.approx(plain, abs=0.02)
        assert spread(n, churn=Churn()) == pytest.approx(churned, abs=0.02)
        if quirk is not None:
            assert spread(n, churn=Churn(), predict_from="unchurned") == pytest.approx(quirk, abs=0.03)
    # ancestral: x' = x (k + (1 - k) / (1 + s^2)) + sqrt(s'^2 - k s'^2) eps with k = (s' / s)^2
    variance, levels = 6400.0, karras_levels(64)
    for s, t in itertools.pairwise(levels):
        k = (t / s) ** 2
        variance = variance * (k + (1 - k) / (1 + s * s)) ** 2 + t * t * (1 - k)
    assert spread(64, solver="ddim", eta=1.0) == pytest.approx(math.sqrt(variance), abs=0.02)


def test_ddim_without_noise_is_euler() -> None:
    start, levels = torch.linspace(-80, 80, 7, dtype=F64).unsqueeze(1), karras_levels(12)
    ddim = sample(unit, start, levels, solver="ddim")
    torch.testing.assert_close(ddim, sample(unit, start, levels, solver="euler"))


def test_ancestral_steps_are_exact_for_one_point() -> None:
    """Data at the point 3: D = 3 whatever x is, so an ancestral step to level s leaves N(3, s^2)."""
    g = torch.Generator().manual_seed(0)
    start = 3.0 + 2.0 * torch.randn(40_000, 1, generator=g, dtype=F64)
    x = sample(lambda x, s: torch.full_like(x, 3.0), start, [2.0, 1.0, 0.5], solver="ddim", eta=1.0, generator=g)
    assert float(x.mean()) == pytest.approx(3.0, abs=0.01)
    assert float(x.std()) == pytest.approx(0.5, abs=0.01)


def test_a_correlated_gaussian_is_sampled() -> None:
    mean, cov = torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=F64)
    start = 80.0 * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = sample(lambda x, s: gaussian_denoiser(x, mean, cov, s), start, karras_levels(64))
    torch.testing.assert_close(x.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), cov, atol=0.05, rtol=0)


def test_guides_are_called_before_every_step_and_a_guide_that_does_nothing_changes_nothing() -> None:
    seen: list[tuple[int, float]] = []

    def watch(x: Tensor, i: int, sigma: float, denoise: object) -> Tensor:
        seen.append((i, sigma))
        return x

    start, levels = torch.full((3, 1), 80.0), karras_levels(8)
    runs = [
        sample(unit, start, levels, churn=Churn(), guide=guide, generator=torch.Generator().manual_seed(1))
        for guide in (None, watch)
    ]
    assert torch.equal(*runs)
    assert seen == list(enumerate(levels[:-1]))


def test_settings_that_would_do_nothing_are_refused() -> None:
    x = torch.zeros(1, 1)
    for levels, options, message in (
        ([1.0], {}, "at least two levels"),
        ([1.0, 2.0], {}, "fall"),
        ([math.nan, 0.0], {}, "fall"),
        ([1.0, 0.0], {"solver": "ddim", "churn": Churn()}, "adds noise by eta"),
        ([1.0, 0.0], {"eta": 0.5}, "setting of 'ddim'"),
        ([1.0, 0.0], {"solver": "ddim", "eta": 2.0}, r"eta in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(unit, x, levels, **options)  # type: ignore[arg-type]


# -- scores -----------------------------------------------------------------------------------------------------------


def test_gaussian_scores_by_hand() -> None:
    one = torch.tensor([[1.1]], dtype=F64)
    # -(1.1 - .5) / (.04 + .09); x + .09 * that
    args = (one, torch.tensor([0.5], dtype=F64), torch.tensor([[0.04]], dtype=F64), 0.3)
    assert float(gaussian_score(*args)) == pytest.approx(-4.6153846)
    assert float(gaussian_denoiser(*args)) == pytest.approx(0.6846154)
    cov = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=F64)
    found = gaussian_score(torch.tensor([[1.0, -0.5]], dtype=F64), torch.zeros(2, dtype=F64), cov, 0.5)
    # inverse of [[1.25, .8], [.8, 1.25]] is [[1.25, -.8], [-.8, 1.25]] / .9225
    torch.testing.assert_close(found, torch.tensor([[-1.78861789, 1.54471545]], dtype=F64))


def test_the_score_of_two_modes() -> None:
    weights, variances = torch.full((2,), 0.5, dtype=F64), torch.full((2,), 0.04, dtype=F64)
    means = torch.tensor([[1.0], [-1.0]], dtype=F64)
    score, share = mixture_score(torch.tensor([[0.3]], dtype=F64), weights, means, variances, 0.2)
    assert float(share[0, 0]) == pytest.approx(0.99944722, abs=1e-8)
    assert float(score) == pytest.approx(8.7361805, abs=1e-6)
    x = torch.tensor([[0.3]], dtype=F64, requires_grad=True)
    log = (0.5 * torch.exp(-0.5 * (x - 1) ** 2 / 0.08) + 0.5 * torch.exp(-0.5 * (x + 1) ** 2 / 0.08)).log()
    (grad,) = torch.autograd.grad(log.sum(), x)
    torch.testing.assert_close(score, grad)


def test_the_exact_score_has_the_least_loss() -> None:
    """3.87825 for eigenvalues 2, 1, .5, .2, .1 and ten levels from 1 to 0.05, and the loss of the exact score is it."""
    eigenvalues, levels = (2.0, 1.0, 0.5, 0.2, 0.1), geometric_levels(10)
    optimum = dsm_optimum(eigenvalues, levels)
    assert optimum == pytest.approx(3.87825, abs=1e-5)

    class Exact(nn.Module):
        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            sigma = level.exp().unsqueeze(-1)
            return -sigma * x / (torch.tensor(eigenvalues, dtype=F64) + sigma.square())

    g = torch.Generator().manual_seed(0)
    clean = torch.randn(40_000, 5, generator=g, dtype=F64) * torch.tensor(eigenvalues, dtype=F64).sqrt()
    noise = torch.randn(clean.shape, generator=g, dtype=F64)
    sigma = torch.tensor(levels, dtype=F64)[torch.randint(10, (40_000,), generator=g)]
    assert float(score_matching_loss(ScoreModel(Exact()), clean, noise, sigma)) == pytest.approx(optimum, abs=0.05)


def test_a_learned_score_is_near_the_exact_one() -> None:
    """A smaller and shorter run than that of the study (2 x 128, 4,000 steps: loss 3.89, error .057)."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    spread, levels = torch.tensor([2.0, 1, 0.5, 0.2, 0.1]).sqrt(), torch.tensor(geometric_levels(10))
    model = ScoreModel(ScoreMLP(5, (64, 64)))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3, fused=True)
    losses = []
    for step in range(1500):
        clean, noise = torch.randn(256, 5, generator=g) * spread, torch.randn(256, 5, generator=g)
        loss = score_matching_loss(model, clean, noise, levels[torch.randint(10, (256,), generator=g)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / 1500)
        losses.append(loss.detach())
    assert abs(float(torch.stack(losses[-200:]).mean()) - 3.87825) < 0.12
    x = torch.randn(2000, 5, generator=g) * (spread.square() + 0.25).sqrt()
    exact = gaussian_score(x, torch.zeros(5), torch.diag(spread.square()), 0.5)
    with torch.no_grad():
        error = (model(x, torch.tensor(0.5)) - exact).norm() / exact.norm()
    assert float(error) < 0.12


@pytest.mark.parametrize("steps", [1, 7, 16])
def test_networks_keep_shapes_and_read_the_level(steps: int) -> None:
    torch.manual_seed(0)
    nets = {(4, 3): ScoreMLP(3, (8,)), (5, 3): ResidualMLP(3, 16, 2, 8), (2, steps, 3): UNet1d(3, 16, 2)}
    for shape, net in nets.items():
        x = torch.randn(shape)
        low, high = (net(x, torch.full(shape[:1], level)) for level in (-0.5, 0.7))
        assert low.shape == x.shape
        assert not torch.allclose(low, high)
        low.sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_bad_networks() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        UNet1d(3, 12)
    assert FourierFeatures(4).state_dict()["frequencies"].shape == (4,), "drawn frequencies belong to the checkpoint"
