"""AWM: surrogate log-likelihoods, advantages, ratios, references, and the variance of its gradient's target."""

import pytest
import torch

from agents.flow.agent import matching_term
from agents.flow.awm import AWM, surrogate_log_likelihood, velocity_distance
from agents.flow.matching import draw_times
from agents.flow.parts import ClippedAdvantage
from ccrl.data import Data
from ccrl.estimators.terms import no_ratio, surrogate

SMALL = {"n_prompts": 4, "group_size": 6, "steps": 5, "hidden": (8, 8), "n_times": 2, "compile": "off"}


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def prepared(agent, **settings):
    """The rows of the agent's next iteration, and its phase."""
    agent.before_learning()
    have = {}
    while requests := agent.estimator.plan({}, have, agent.ctx):
        for request in requests:
            have[request.tag] = agent.collector.collect(request, agent.ctx.bank.policy(request.params))
    return agent.estimator.prepare(have, agent.ctx)["on"], agent.estimator.phases()[0]


class TestSurrogate:
    def test_ghuber(self):
        """-(m^a - (1e-10)^a) t / a with a = 1/4, t = .6: m = .5 gives 2.4 (.840896 - .003162), slope -t m^(a - 1)."""
        for m, value, slope in ((0.5, -2.010562, -1.009076), (2.0, -2.846508, -0.356762)):
            error = double(m).requires_grad_()
            found = surrogate_log_likelihood(error, double(0.6), "ghuber")
            assert found.item() == pytest.approx(value, abs=1e-6)
            assert torch.autograd.grad(found, error)[0].item() == pytest.approx(slope, abs=1e-6)

    def test_the_others(self):
        found = {
            kind: float(surrogate_log_likelihood(double(2.0), double(0.5), kind)) for kind in ("uniform", "t", "t2")
        }
        assert found == {"uniform": -2.0, "t": -1.0, "t2": -0.5}
        huber = surrogate_log_likelihood(double(4.0), double(0.5), "huber")
        assert float(huber) == pytest.approx(-0.5 * (2.0 - 1e-5))


class TestAdvantages:
    def test_by_hand(self):
        """Deviations from the groups' means 1/3 and 2/3 over the population deviation .5 of all six, plus 1e-4."""
        rewards, group = double([0, 0, 1, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
        found = ClippedAdvantage("batch", 5.0).advantages(rewards, group)
        expected = double([-0.666533, -0.666533, 1.333067, 0.666533, 0.666533, -1.333067])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        scaled = ClippedAdvantage("batch", 5.0, 5.0).advantages(rewards, group)
        torch.testing.assert_close(scaled, expected / 5.0, rtol=0, atol=1e-6)

    def test_group_deviation_limit_and_equal_rewards(self):
        group = torch.tensor([0, 0, 1, 1])
        found = ClippedAdvantage("group", 0.5).advantages(double([0.0, 2.0, 0.1, 0.1]), group)
        torch.testing.assert_close(found, double([-0.5, 0.5, 0.0, 0.0]), rtol=0, atol=0)


class TestTimes:
    def test_grid_is_stratified_without_the_first_and_the_last(self):
        generator = torch.Generator().manual_seed(0)
        grid = 1.0 - torch.arange(1, 13) / 14.0  # 90 % of 14 steps: 12.6
        for _ in range(20):
            times = draw_times("grid", 6, generator, "cpu", steps=14)
            place = (times.unsqueeze(1) - grid).abs().argmin(1)
            torch.testing.assert_close(times, grid[place])
            assert (place // 2).tolist() == list(range(6))

    def test_all_kinds_stay_inside(self):
        for kind in ("uniform", "logit_normal"):
            times = draw_times(kind, 400, torch.Generator().manual_seed(0), "cpu", shift=3.0)
            assert float(times.min()) > 0.0099
            assert float(times.max()) < 1.0
        assert float(draw_times("uniform", 1001, None, "cpu", shift=3.0).median()) == pytest.approx(0.75, abs=0.01)


class TestLoss:
    def test_positive_advantages_are_pretraining_on_the_samples(self):
        """A = 1 for all, no references, weight 1: the gradient of flow matching on what was generated."""
        agent = AWM("ring2d", kl_coef=0.0, ema_coef=0.0, weighting="uniform", sampler="ode", noise_level=0.0, **SMALL)
        rows, phase = prepared(agent)
        rows = rows.derive(advantage=torch.ones_like(rows["advantage"]))
        batch = rows.epoch(phase.batching, None)[0]
        found = phase.updater.gradient(phase.terms, batch).mean.clone()
        expected = phase.updater.gradient((matching_term(),), batch).mean
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)

    def test_gradient_by_finite_differences_and_sign(self):
        torch.manual_seed(0)
        agent = AWM("ring2d", kl_coef=0.0, ema_coef=0.0, n_epochs=2, sampler="ode", noise_level=0.0, **SMALL)
        agent.policy.double()
        agent.before_learning()
        x, target = torch.randn(2, 3, 4, 2, dtype=torch.float64)
        weight = torch.randn(2, 2, dtype=torch.float64)
        time, advantage = torch.rand(2, 3, 4, dtype=torch.float64)

        def loss_at(w, sign):
            velocity = x @ w.T
            rows = {"target": target, "time": time, "valid": torch.ones_like(time), "advantage": sign * advantage}
            rows["old_surrogate"] = agent.estimator.surrogate({"velocity": x @ weight.T}, rows)
            batch = Data(rows).with_scalars(n_valid=double(12.0), n_sequences=double(4.0))
            return surrogate(agent.estimator.phases()[0].terms, {"velocity": velocity}, batch)[0]

        live = weight.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss_at(live, 1.0), live)
        (other,) = torch.autograd.grad(loss_at(live, -1.0), live)
        torch.testing.assert_close(other, -slope)
        for i in range(2):
            for j in range(2):
                step = torch.zeros_like(weight)
                step[i, j] = 1e-6
                # not at the weights that sampled: there the clip at ratio 0 .. 2 has no kink either
                measured = (loss_at(weight + step, 1.0) - loss_at(weight - step, 1.0)) / 2e-6
                assert float(measured) == pytest.approx(float(slope[i, j]), rel=1e-6, abs=1e-8)

    def test_a_second_pass_compares_the_same_pairs(self):
        agent = AWM("ring2d", n_epochs=2, **SMALL)
        rows, phase = prepared(agent)
        batch = rows.epoch(phase.batching, None)[0]
        outputs = agent.policy(batch, frozenset({"velocity"}))
        ratio = agent.estimator.likelihood_ratio(outputs, batch).ratio
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-12)
        again = agent.estimator.rows(rows.derive(advantage=rows["advantage"]), agent.ctx.generator)
        moved = Data({**dict(batch), "obs": again["obs"], "target": again["target"]}, sequence=batch.sequence)
        outputs = agent.policy(moved, frozenset({"velocity"}))
        other = agent.estimator.likelihood_ratio(outputs, moved).ratio
        assert float((other - 1.0).detach().abs().max()) > 1e-2, (
            "with other noise the ratio is not 1 for the same policy"
        )

    def test_one_step_needs_no_old_surrogate(self):
        """The first pass of two has the gradient of the only pass of one, which computes no old surrogate."""
        found = []
        for epochs in (1, 2):
            rows, phase = prepared(AWM("ring2d", seed=2, n_epochs=epochs, **SMALL))
            assert ("old_surrogate" in rows) == (epochs == 2)
            batch = rows.epoch(phase.batching, None)[0]
            found.append(phase.updater.gradient(phase.terms, batch).mean.clone())
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)

    def test_one_ratio_per_sample(self):
        agent = AWM("ring2d", ratio="sum_first", n_epochs=2, **SMALL)
        rows, phase = prepared(agent)
        batch = rows.epoch(phase.batching, None)[0]
        level = agent.estimator.likelihood_ratio(agent.policy(batch, frozenset({"velocity"})), batch)
        assert level.log_prob.shape == (1, 24)
        agent.learn(agent.samples_per_iteration)

    def test_one_ratio_per_sample_weighs_as_one_per_time(self):
        """At ratio 1 both gradients are the mean over samples and times of A grad l; elsewhere they differ."""
        found, moved = [], []
        for kind in ("exp_first", "sum_first"):
            agent = AWM("ring2d", ratio=kind, seed=2, kl_coef=0.0, ema_coef=0.0, **SMALL | {"n_epochs": 2})
            rows, phase = prepared(agent)
            batch = rows.epoch(phase.batching, None)[0]
            found.append(phase.updater.gradient(phase.terms, batch).mean.clone())
            with torch.no_grad():
                for parameter in agent.policy.parameters():
                    parameter += 0.05
            moved.append(phase.updater.gradient(phase.terms, batch).mean.clone())
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-8)
        assert float((moved[0] - moved[1]).abs().max()) > 1e-6

    def test_distances_to_velocities(self):
        """Mean of squares .5; elbo at t = .5: over 2 * .49 * .5 / .5 = .98."""
        batch = Data({"v": double([[[1.0, 0.0]]]), "time": double([[0.5]]), "valid": double([[1.0]])})
        outputs = {"velocity": double([[[0.0, 0.0]]])}
        for kind, value in (("uniform", 0.5), ("elbo", 0.5 / 0.98)):
            found = velocity_distance("v", kind)(no_ratio(batch["valid"]), batch["valid"], outputs, batch)
            assert float(found) == pytest.approx(value)

    def test_the_average_follows_slowly(self):
        """d = .001 k: after the first iteration the average is the policy, after the second 1 part in 1000 behind."""
        agent = AWM("ring2d", **SMALL)
        agent.learn(agent.samples_per_iteration)
        first = [p.detach().clone() for p in agent.policy.parameters()]
        for p, q in zip(first, agent.ctx.bank.policy("ema").parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
        agent.learn(agent.samples_per_iteration)
        for p, q, live in zip(first, agent.ctx.bank.policy("ema").parameters(), agent.policy.parameters()):
            torch.testing.assert_close(q, 0.001 * p + 0.999 * live.detach(), rtol=1e-5, atol=1e-7)

    def test_it_needs_no_log_probability(self):
        agent = AWM("ring2d", sampler="ode", noise_level=0.0, **SMALL)
        rows, _ = prepared(agent)
        assert not {"log_prob", "old_mean", "std"} & set(rows)


def test_a_sampler_of_one_step_has_no_times_to_train_at():
    one = {"n_prompts": 2, "group_size": 2, "hidden": (8,), "steps": 1, "sampler": "ode", "noise_level": 0.0}
    with pytest.raises(ValueError, match="times: expected 'uniform' or 'logit_normal' with steps=1"):
        AWM("ring2d", **one)
    AWM("ring2d", times="uniform", **one)


def test_a_policy_that_would_not_be_trained_is_refused():
    with pytest.raises(TypeError, match=r"policy: expected None, got .*override make_model"):
        AWM("ring2d", policy=torch.nn.Identity())
