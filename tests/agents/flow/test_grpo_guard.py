"""GRPO-Guard: normalised ratios, weights of steps, and what they are equal to."""

import math

import pytest
import torch

from agents.flow.flow_grpo import FlowGRPO
from agents.flow.grpo_guard import GRPOGuard, ratio_norm, step_weight
from ccrl.collect import Request
from ccrl.data import Data
from ccrl.diffusion import flow_grid, gaussian_log_prob, make_schedule
from ccrl.estimators.recipe import Parts
from ccrl.estimators.terms import surrogate
from ccrl.settings import ConfigError


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def batch_of(z, std, dt, advantage, old_mean=None, **columns):
    """One step [1, B] whose next state is ``old_mean + std z``."""
    old = torch.zeros_like(z) if old_mean is None else old_mean
    rows = {
        "action": old + std * z, "old_mean": old, "advantage": advantage, "valid": torch.ones_like(advantage),
        "std": torch.full_like(advantage, std), "sigma": torch.full_like(advantage, std / math.sqrt(-dt)),
        "dt": torch.full_like(advantage, dt), "mean_v": torch.full_like(advantage, dt),
    } | columns  # fmt: skip
    rows = {name: value.unsqueeze(0) for name, value in rows.items()}
    rows["log_prob"] = gaussian_log_prob(rows["action"], rows["old_mean"], rows["std"])
    data = Data(rows)
    return data.derive(step_weight=step_weight(data, "dt")).with_scalars(
        n_valid=double(len(advantage)), n_sequences=double(len(advantage))
    )


def outputs_of(mean, batch):
    return {"mean": mean, "log_prob": gaussian_log_prob(batch["action"], mean, batch["std"])}


def terms_of(method, **settings):
    config = method.Settings(**settings)
    return method.Recipe(config, Parts(None, None, Request(counts=torch.ones(1)), 1)).terms()


def loss_and_slope(method, batch, mean, **settings):
    mean = mean.clone().unsqueeze(0).requires_grad_()
    loss, _ = surrogate(terms_of(method, **settings), outputs_of(mean, batch), batch)
    return loss.detach(), torch.autograd.grad(loss, mean)[0].squeeze(0)


Z = double([[1.0, -0.5, 0.25, 2.0], [-1.0, 0.5, 0.0, 0.3]])
MOVED = double([[0.02, -0.01, 0.03, 0.0], [0.01, 0.02, -0.02, 0.04]])


class TestByHand:
    def test_loss_and_gradient(self):
        """D = 4, dt = -.1, sigma = .5: s = .5 sqrt(.1) = .158114. Row 1: z dmu = .02 + .005 + .0075 = .0325 over 4 is
        .008125; row 2: -.01 + .01 + 0 + .012 = .012 over 4 is .003. With A = [1.5, -.7] and eps = 1e-3 the first is
        clipped at 1.001 and the second is not: -(1.5 * 1.001 - .7 exp(.003)) / 2 / .1 = -3.996984."""
        std, advantage = 0.5 * math.sqrt(0.1), double([1.5, -0.7])
        batch = batch_of(Z, std, -0.1, advantage)
        level = ratio_norm(outputs_of(MOVED.unsqueeze(0), batch), batch)
        torch.testing.assert_close(level.log_ratio[0], double([0.008125, 0.003]), rtol=0, atol=1e-12)
        torch.testing.assert_close(level.ratio[0], double([1.008158, 1.003005]), rtol=0, atol=1e-6)
        raw = outputs_of(MOVED.unsqueeze(0), batch)["log_prob"] - batch["log_prob"]
        torch.testing.assert_close(raw[0], double([0.044387, 0.006474]), rtol=0, atol=1e-6)
        bias = MOVED.square().mean(1) / (2.0 * std * std)
        torch.testing.assert_close(bias, double([0.007, 0.0125]))
        loss, slope = loss_and_slope(GRPOGuard, batch, MOVED, clip_low=1e-3, clip_high=1e-3)
        assert float(loss) == pytest.approx(-3.996984, abs=1e-6)
        expected = double([[0.0] * 4, [-0.877629, 0.438814, 0.0, 0.263289]])
        torch.testing.assert_close(slope, expected, rtol=0, atol=1e-6)

    def test_on_policy_gradient(self):
        """dmu = 0: the ratio is 1 and the slope -A z / (D B |dt|)."""
        advantage = double([1.5, -0.7])
        batch = batch_of(Z, 0.3, -0.05, advantage)
        _, slope = loss_and_slope(GRPOGuard, batch, torch.zeros_like(Z))
        torch.testing.assert_close(slope, -advantage.unsqueeze(1) * Z / (4 * 2 * 0.05))

    def test_gradient_of_the_velocity_is_the_same_at_every_time(self):
        """mean = x + k dt v + ..: the slope by v is A z k / (D B), k = 1 + a^2 / 2 for t < 1, whatever the step."""
        s = make_schedule(flow_grid(10, 3.0), "flow_sde", 0.7)
        for i in range(1, 10):
            std, dt = float(s.std[i]), float(s.dt[i])
            batch = batch_of(Z, std, dt, double([1.5, -0.7]))
            _, slope = loss_and_slope(GRPOGuard, batch, torch.zeros_like(Z))
            by_velocity = slope * float(s.v[i])
            torch.testing.assert_close(by_velocity, double([1.5, -0.7]).unsqueeze(1) * Z * 1.245 / 8)

    def test_without_clipping_it_is_reinforce_with_weighted_steps(self):
        batch = batch_of(Z, 0.3, -0.05, double([1.5, -0.7]))
        wide = {"clip_low": 1.0, "clip_high": math.inf}
        _, slope = loss_and_slope(GRPOGuard, batch, torch.zeros_like(Z), **wide)
        _, raw = loss_and_slope(FlowGRPO, batch, torch.zeros_like(Z), **wide)
        torch.testing.assert_close(slope, raw * 0.3 / 0.05)  # the log-ratio times s, over |dt|


class TestIdentities:
    def test_normalised_is_centred_and_rescaled(self):
        generator = torch.Generator().manual_seed(0)
        for std in (1e-3, 0.2, 5.0):
            z, moved, old = torch.randn(3, 6, 16, generator=generator, dtype=torch.float64)
            batch = batch_of(z, std, -0.1, torch.ones(6).double(), old)
            new = outputs_of((old + 0.1 * moved).unsqueeze(0), batch)
            raw = new["log_prob"] - batch["log_prob"]
            bias = (0.1 * moved).square().mean(-1) / (2.0 * std * std)
            found = ratio_norm(new, batch).log_ratio
            torch.testing.assert_close(found, (z * 0.1 * moved).mean(-1).unsqueeze(0), rtol=0, atol=1e-12)
            torch.testing.assert_close((raw + bias) * std, found, rtol=1e-6, atol=1e-9)

    def test_means_and_deviations(self):
        """D = 16, dmu = .05 everywhere: E l = -.00125 / s^2, E e^l = exp(-.00125 / s^2 + .04 / (512 s^2))."""
        generator = torch.Generator().manual_seed(1)
        z = torch.randn(400_000, 16, generator=generator, dtype=torch.float64)
        moved = torch.full_like(z, 0.05)
        for std, mean, ratio in ((0.05, -0.5, 0.625784), (0.2, -0.03125, 0.971128)):
            batch = batch_of(z, std, -0.1, torch.ones(len(z)).double())
            new = outputs_of(moved.unsqueeze(0), batch)
            raw = new["log_prob"] - batch["log_prob"]
            q, length = 0.0025, 16 * 0.0025
            assert math.exp(-q / (2 * std**2) + length / (2 * 256 * std**2)) == pytest.approx(ratio, abs=1e-6)
            assert float(raw.mean()) == pytest.approx(mean, abs=0.002)
            assert float(raw.exp().mean()) == pytest.approx(ratio, abs=0.002)
            normed = ratio_norm(new, batch).log_ratio
            assert float(normed.mean()) == pytest.approx(0.0, abs=1e-4)
            assert float(normed.std()) == pytest.approx(0.0125, abs=1e-4)  # sqrt(16) .05 / 16

    def test_unit_deviation_and_no_bias_is_flow_grpo_over_dt(self):
        """s = 1: the two differ by the bias alone, which vanishes on policy."""
        batch = batch_of(Z, 1.0, -0.25, double([1.5, -0.7]))
        guard, slope = loss_and_slope(GRPOGuard, batch, torch.zeros_like(Z), clip_low=0.1, clip_high=0.1)
        raw, plain = loss_and_slope(FlowGRPO, batch, torch.zeros_like(Z), clip_low=0.1, clip_high=0.1)
        assert float(guard) == pytest.approx(float(raw) / 0.25)
        torch.testing.assert_close(slope, plain / 0.25)


class TestOptions:
    def test_steps_can_be_weighted_in_four_ways(self):
        batch = batch_of(Z, 0.3, -0.05, double([1.5, -0.7]), mean_v=double([-0.06, -0.06]))  # beta = 1.2
        found = {kind: float(step_weight(batch, kind)[0, 0]) for kind in ("none", "dt", "beta_dt", "dt_over_beta")}
        assert found == pytest.approx({"none": 1.0, "dt": 20.0, "beta_dt": 24.0, "dt_over_beta": 20.0 / 1.2})

    def test_without_normalisation_it_is_flow_grpo_with_weights(self):
        batch = batch_of(Z, 0.3, -0.05, double([1.5, -0.7]))
        same = {"clip_low": 0.1, "clip_high": 0.1}
        _, guard = loss_and_slope(GRPOGuard, batch, MOVED, normalise=False, **same)
        _, plain = loss_and_slope(FlowGRPO, batch, MOVED, **same)
        torch.testing.assert_close(guard, plain / 0.05)

    def test_reference(self):
        """mean over dimensions of (mu - ref)^2 / (2 sigma^2), sigma = s / sqrt(-dt); sbar divides by s."""
        reference = torch.zeros_like(Z)
        batch = batch_of(Z, 0.3, -0.05, torch.zeros(2).double(), ref_mean=reference)
        squared = MOVED.square().mean(1).mean()
        for divisor, scale in (("sigma", 0.09 / 0.05), ("sbar", 0.09)):
            loss, _ = loss_and_slope(GRPOGuard, batch, MOVED, kl_coef=0.5, kl_divisor=divisor)
            assert float(loss) == pytest.approx(0.5 * float(squared) / (2.0 * scale))

    def test_a_step_without_noise_has_no_gradient(self):
        batch = batch_of(Z, 0.0, -0.05, double([1.5, -0.7]))
        _, slope = loss_and_slope(GRPOGuard, batch, MOVED)
        assert not slope.any()

    @pytest.mark.parametrize("method", [FlowGRPO, GRPOGuard])
    def test_coupled_methods_need_a_density(self, method):
        with pytest.raises(ConfigError, match="log-probabilities"):
            method("ring2d", sampler="ode", noise_level=0.0)
        for sampler in ("cps", "ddim"):  # whose last step has no noise
            with pytest.raises(ConfigError, match="last step"):
                method("ring2d", sampler=sampler, trained_steps=14)
