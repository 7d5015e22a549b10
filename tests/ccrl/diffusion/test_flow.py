"""Flow matching: times, transitions of every sampler, exact velocities, log-probabilities."""

import math

import pytest
import torch

from ccrl.diffusion import (
    STOCHASTIC,
    VelocityMLP,
    flow_grid,
    flow_point,
    gaussian_denoiser,
    gaussian_log_prob,
    make_schedule,
    matching_error,
    mean_step,
    mixture_log_density,
    mixture_velocity,
    shift_time,
)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


class TestTimes:
    def test_shift(self):
        # 3 * 0.5 / (1 + 2 * 0.5) = 0.75,  3 * 0.1 / (1 + 2 * 0.1) = 0.25
        torch.testing.assert_close(shift_time(double([0.5, 0.1, 1.0, 0.0]), 3.0), double([0.75, 0.25, 1.0, 0.0]))

    def test_grid_falls_from_noise_to_data(self):
        assert flow_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
        for wrong in ((0, 1.0), (4, 0.0), (4, math.inf)):
            with pytest.raises(ValueError, match="flow_grid"):
                flow_grid(*wrong)


class TestTransitions:
    def test_one_step_of_the_sde(self):
        # a = .7, t = .6 -> .5: sigma = .7 sqrt(1.5) = .8573214, deviation sigma sqrt(.1) = .2711088, and the mean is
        # x (1 - sigma^2 .1 / 1.2) - .1 v (1 + sigma^2 .4 / 1.2) with x = [.5, -1]
        s = make_schedule([0.6, 0.5], "flow_sde", 0.7)
        assert float(s.sigma) == pytest.approx(0.8573214, abs=1e-7)
        assert float(s.std) == pytest.approx(0.2711088, abs=1e-7)
        x = double([[0.5, -1.0]])
        for v, mean in (([[1.0, 0.2]], [[0.344875, -0.963650]]), ([[0.6, -0.1]], [[0.394675, -0.926300]])):
            torch.testing.assert_close(mean_step(x, double(v), s.x, s.v), double(mean), rtol=0, atol=1e-6)

    def test_gradient_scales_by_step(self):
        """Ten steps with shift 3 and a = .7: raw |dt| k / s, without s, and k alone."""
        s = make_schedule(flow_grid(10, 3.0), "flow_sde", 0.7)
        k, width = s.v / s.dt, -s.dt
        # sigma^2 (1 - t) / (2 t) = a^2 / 2 for t < 1, and 0 at t = 1
        torch.testing.assert_close(k, double([1.0] + [1.245] * 9))
        raw, normed = width * k / s.std, width * k
        assert [round(float(r), 4) for r in (raw[0], raw[-1], raw.max() / raw.min())] == [0.0510, 1.5403, 30.1896]
        assert [float(normed[0]), float(normed[-1])] == pytest.approx([0.0357, 0.3113], abs=6e-5)
        assert float(normed.max() / normed.min()) == pytest.approx(8.7, abs=0.05)

    @pytest.mark.parametrize(
        ("steps", "noise", "variance"),
        [(10, 0.7, 0.9312867), (50, 0.7, 1.0025259), (200, 0.7, 1.0086233), (400, 0.7, 1.0076480),
         (2000, 0.7, 1.0043691), (10, 0.0, 0.7726136), (200, 0.0, 0.9872282)],
    )  # fmt: skip
    def test_marginal_variance_of_normal_data(self, steps, noise, variance):
        """The exact velocity of N(0, 1) is (2 t - 1) x / ((1 - t)^2 + t^2); variances follow without sampling."""
        s = make_schedule(flow_grid(steps), "flow_sde" if noise else "ode", noise)
        slope = (2.0 * s.time - 1.0) / ((1.0 - s.time) ** 2 + s.time**2)
        found = 1.0
        for factor, std in zip((s.x + s.v * slope).tolist(), s.std.tolist()):
            found = factor * factor * found + std * std
        assert found == pytest.approx(variance, abs=1e-7)

    def test_dpm2_has_the_smaller_error(self):
        """The flow of N(0, 1) data ends where it began. Euler's error halves with twice the steps, dpm2's falls to a
        third (a quarter but for the ends, whose steps are of first order). By hand for 4 steps: the second has w = 0
        (the first began at 1), the third w = ln 3 / (2 ln 3) = 1 / 2 and the share 1 - t' / t = 1 / 2,
        the last is Euler's."""
        s = make_schedule(flow_grid(4), "dpm2")
        torch.testing.assert_close(s.past, torch.tensor([0.0, 0.0, -0.25, 0.0]).double())
        torch.testing.assert_close(s.x, torch.tensor([1.0, 1.0, 1.25, 1.0]).double())
        torch.testing.assert_close(s.v, -0.25 * torch.tensor([1.0, 1.0, 1.5, 1.0]).double())
        errors = []
        for steps in (20, 40):
            s = make_schedule(flow_grid(steps), "dpm2")
            x, clean = 1.0, 0.0
            for t, a, b, past in torch.stack([s.time, s.x, s.v, s.past], 1).tolist():
                v = (2.0 * t - 1.0) / ((1.0 - t) ** 2 + t**2) * x
                x, clean = a * x + b * v + past * clean, x - t * v
            errors.append(abs(x - 1.0))
        assert errors[1] < 0.001
        assert errors[0] / errors[1] > 2.8

    @pytest.mark.parametrize("solver", STOCHASTIC)
    def test_without_noise_every_solver_is_euler(self, solver):
        euler = make_schedule(flow_grid(7), "ode")
        found = make_schedule(flow_grid(7), solver, 1e-7)
        torch.testing.assert_close(found.x, euler.x, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.v, euler.v, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("solver", ["cps", "ddim"])
    def test_coefficients_of_data_and_noise_are_kept(self, solver):
        """With the true noise e = 1, data 1: mean = (1 - t') + r with r^2 + std^2 = t'^2."""
        s = make_schedule(flow_grid(6), solver, 0.8)
        x, v = flow_point(torch.ones(6, 1).double(), torch.ones(6, 1).double() * 3.0, s.time)
        mean = mean_step(x, v, s.x, s.v).squeeze(1)
        kept = (mean - (1.0 - s.next_time)) / 3.0
        torch.testing.assert_close(kept.square() + s.std.square(), s.next_time.square(), rtol=0, atol=1e-12)
        assert float(s.std[-1]) == 0.0

    def test_ddim_with_full_noise_is_the_posterior(self):
        """With noise 1 the deviation is that of x_{t'} given x_t and the data, by Bayes' rule of two Gaussians."""
        t, after = 0.6, 0.4
        ratio = (1.0 - t) / (1.0 - after)
        gap = t * t - ratio * ratio * after * after
        s = make_schedule([t, after], "ddim", 1.0)
        assert float(s.std) ** 2 == pytest.approx(1.0 / (1.0 / after**2 + ratio**2 / gap), rel=1e-12)

    def test_dance_has_constant_noise(self):
        s = make_schedule([0.5, 0.4], "dance_sde", 0.3)
        # 1 + .09 / (2 * .5) * (-.1), -.1 (1 + .09 * .5), .3 sqrt(.1)
        torch.testing.assert_close(
            torch.cat([s.x, s.v, s.std]), double([0.991, -0.1045, 0.3 * math.sqrt(0.1)]), rtol=0, atol=1e-12
        )

    def test_weights_of_the_distillation_loss(self):
        """((1 + sigma^2 (1 - t) / (2 t)) dt)^2 / (2 sbar^2) on 100 steps, a = .7."""
        s = make_schedule(flow_grid(100), "flow_sde", 0.7)
        weight = s.v.square() / (2.0 * s.std.square())
        found = [float(weight[round(100 * (1 - t))]) for t in (0.9, 0.5, 0.1, 0.02)]
        assert found == pytest.approx([0.0017573980, 0.0158165816, 0.1423492347, 0.7750125], rel=1e-7)

    def test_bad_schedules_are_refused(self):
        for grid, solver, noise in (
            ([0.5], "ode", 0.0), ([0.0, 1.0], "ode", 0.0), ([1.0, 0.0], "flow_sde", 0.7), ([1.0, 0.5], "ode", 0.1),
            ([1.0, 0.5], "cps", 0.0), ([1.0, 0.5], "cps", 1.5), ([1.0, 0.5], "flow_sde", math.nan),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="make_schedule"):
                make_schedule(grid, solver, noise)


class TestLogProb:
    def test_mean_and_sum(self):
        value, mean, std = double([[1.0, 0.0]]), double([[0.0, 0.0]]), double([0.5])
        # -(1 / .5)^2 / 2 = -2 for the first; both: - log .5 - log sqrt(2 pi)
        constant = -math.log(0.5) - 0.5 * math.log(2.0 * math.pi)
        assert float(gaussian_log_prob(value, mean, std, "sum")) == pytest.approx(-2.0 + 2.0 * constant)
        assert float(gaussian_log_prob(value, mean, std)) == pytest.approx(-1.0 + constant)

    def test_no_noise_no_density(self):
        mean = torch.zeros(1, 2, requires_grad=True)
        found = gaussian_log_prob(torch.ones(1, 2), mean, torch.zeros(1))
        found.sum().backward()
        assert float(found.detach()) == 0.0
        assert not mean.grad.any()


class TestExactVelocity:
    def test_one_gaussian(self):
        """v = e - x_0 by Tweedie: x_t / (1 - t) is the data blurred by t / (1 - t)."""
        mean, variance, t = double([0.5, -1.0]), 0.3, 0.4
        x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        clean = gaussian_denoiser(x / (1 - t), mean, variance * torch.eye(2).double(), t / (1 - t))
        found = mixture_velocity(x, torch.full((5,), t).double(), double([0.0]), mean.view(1, 2), double([variance]))
        torch.testing.assert_close(found, (x - clean) / t)

    def test_it_is_the_least_squares_velocity(self):
        """No constant or linear correction of it lowers the matching error on mixture data."""
        generator = torch.Generator().manual_seed(1)
        weights, means, variances = double([0.3, 0.7]), double([[1.0, 0.0], [-1.0, 2.0]]), double([0.04, 0.25])
        chosen = torch.multinomial(weights, 40_000, replacement=True, generator=generator)
        noise = torch.randn(2, 40_000, 2, generator=generator, dtype=torch.float64)
        clean = means[chosen] + variances[chosen].sqrt().unsqueeze(1) * noise[0]
        time = torch.full((40_000,), 0.6, dtype=torch.float64)
        x, target = flow_point(clean, noise[1], time)
        left = target - mixture_velocity(x, time, weights.log(), means, variances)
        features = torch.cat([x, torch.ones(len(x), 1)], 1)
        assert float((features.T @ left / len(x)).abs().max()) < 0.02  # five standard errors
        assert float(matching_error(target, target - left).mean()) > 0.1

    def test_label_without_components_and_density(self):
        logs = torch.stack([double([0.0, -math.inf]), double([-math.inf, 0.0])])
        means, variances = double([[0.0], [3.0]]), double([1.0, 1.0])
        x = double([[0.0], [3.0]])
        expected = torch.full((2,), -0.5 * math.log(2.0 * math.pi), dtype=torch.float64)
        torch.testing.assert_close(mixture_log_density(x, logs, means, variances), expected)
        at_noise = mixture_velocity(x, torch.ones(2).double(), logs, means, variances)
        torch.testing.assert_close(at_noise, x - means)  # e - E x_0 at t = 1

    def test_variance_of_the_noisy_target(self):
        """Matching against a noisy state x_s (s < t) in place of the data: Var = a^2 Var(x_s | x_t) / b^4 for N(0, 1)
        data at t = 1/2, a = (1 - t) / (1 - s), b^2 = t^2 - s^2 a^2; it diverges as the step shrinks."""
        t, found = 0.5, []
        for s in (0.0, 0.1, 0.25, 0.4, 0.45, 0.49):
            a = (1 - t) / (1 - s)
            b2 = t * t - s * s * a * a
            prior = (1 - s) ** 2 + s * s
            posterior = prior * b2 / (prior * a * a + b2)
            found.append(a * a * posterior / b2**2)
        assert found == pytest.approx([2.0, 2.05, 2.5, 5.2, 10.1, 50.02], abs=0.05)

    def test_noisy_target_by_sampling(self):
        """s = .4: variance 5.2 and the slope of the true score, -1 / Var(x_t) = -2."""
        generator = torch.Generator().manual_seed(2)
        x0, e, n = torch.randn(3, 400_000, generator=generator, dtype=torch.float64)
        t, s = 0.5, 0.4
        a = (1 - t) / (1 - s)
        b = math.sqrt(t * t - s * s * a * a)
        xs = (1 - s) * x0 + s * e
        xt = a * xs + b * n
        target = -(xt - a * xs) / b**2
        slope = float((xt * target).mean() / xt.square().mean())
        assert slope == pytest.approx(-2.0, abs=0.03)
        assert float((target - slope * xt).var()) == pytest.approx(5.2, abs=0.05)


def test_network_takes_shared_times_and_conditions():
    torch.manual_seed(0)
    net = VelocityMLP(2, 3, (8, 8)).double()
    x, time, condition = (torch.rand(*shape, dtype=torch.float64) for shape in ((4, 5, 2), (4, 1), (5, 3)))
    whole = net(x, time.expand(4, 5), condition.expand(4, 5, 3))
    torch.testing.assert_close(net(x, time, condition), whole)
    assert not VelocityMLP(2, 3, (8,), zero=True)(torch.ones(1, 2), torch.ones(1), torch.ones(1, 3)).any()
