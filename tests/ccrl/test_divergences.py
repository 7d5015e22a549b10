"""Divergences from a reference: numbers by hand, the bound, gradients, and the stage for sequences."""

from __future__ import annotations

import math

import pytest
import torch

from ccrl.data import Data
from ccrl.estimators import aggregates
from ccrl.estimators.divergences import (
    ChiSquarePenalty,
    action_chi_square,
    action_divergence,
    chi_square,
    occupancy_penalty,
    reference_product,
    sequence_chi_square,
    sequence_divergences,
    trimmed_mean,
)
from ccrl.estimators.stages import GroupBaseline
from ccrl.estimators.terms import LogRatio, Term, surrogate
from ccrl.policies.distributions import CATEGORICAL, GAUSSIAN, FactoredCategorical

MU, REF = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
# ten samples of the policy in exact proportion
SAMPLES = torch.log(MU / REF).repeat_interleave(torch.tensor([6, 3, 1]))


def test_divergences_and_penalties_by_hand():
    # w = (3, 1, .2): E_mu (w - 1) = .6 * 2 - .1 * .8 = 1.12;  KL = .6 log 3 - .1 log 5 = .498224
    assert float(chi_square(SAMPLES)) == pytest.approx(1.12)
    assert float(SAMPLES.mean()) == pytest.approx(0.498224, abs=1e-6)
    shown = [0, 6, 9]
    assert occupancy_penalty(SAMPLES, kind="chi2")[shown].tolist() == pytest.approx([2.0, 0.0, -0.8])
    assert occupancy_penalty(SAMPLES)[shown].tolist() == pytest.approx([1.889822, 0.0, -0.755929], abs=1e-6)
    assert occupancy_penalty(SAMPLES, kind="kl")[0] == pytest.approx(math.log(3.0))


def test_the_penalty_is_the_derivative_up_to_a_constant():
    mu = MU.clone().requires_grad_(True)
    root = ((mu / REF - 1.0).square() * REF).sum().sqrt()
    (gradient,) = torch.autograd.grad(root, mu)
    # d sqrt(chi^2) / d mu = (w - 1) / sqrt(chi^2); with the constraint sum mu = 1 the paper writes w / sqrt(chi^2)
    assert torch.allclose(gradient, occupancy_penalty(SAMPLES)[[0, 6, 9]], atol=1e-6)
    paper = (MU / REF) / math.sqrt(1.12)
    assert paper.tolist() == pytest.approx([2.834734, 0.944911, 0.188982], abs=1e-6)
    assert torch.allclose(paper - gradient, torch.full((3,), 1.0 / math.sqrt(1.12), dtype=torch.float64))


def test_the_bound_and_its_equality_case():
    ref, true, proxy = torch.full((4,), 0.25), torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, 0, 0, -1])
    mu = torch.tensor([0.4, 0.1, 0.4, 0.1])

    def sides(mu, ref, true, proxy):
        """The left and the right side of theorem 5.1, r, sigma_proxy and chi^2."""
        z = [x - (ref * x).sum() for x in (true, proxy)]
        sigma = [(ref * x.square()).sum().sqrt() for x in z]
        r = (ref * z[0] * z[1]).sum() / (sigma[0] * sigma[1])
        chi2 = (ref * (mu / ref - 1.0).square()).sum()
        left = (mu * z[0]).sum() / sigma[0]
        right = ((mu * z[1]).sum() / sigma[1] - ((1.0 - r**2).clamp_min(0.0) * chi2).sqrt()) / r
        return left, right, r, sigma[1], chi2

    left, right, r, sigma, chi2 = sides(mu, ref, true, proxy)
    assert (float(r), float(sigma), float(chi2)) == pytest.approx((0.7071068, 0.7071068, 0.36), abs=1e-6)
    assert float(sigma * (1.0 - r**2).sqrt()) == pytest.approx(0.5, abs=1e-6)
    assert float(left) == pytest.approx(0.0, abs=1e-6)
    assert float(right) == pytest.approx(0.0, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    tried = 0
    for _ in range(300):
        weights = torch.rand(2, 5, generator=generator, dtype=torch.float64) + 0.01
        mu, ref = weights / weights.sum(1, keepdim=True)
        true, proxy = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        left, right, r, *_ = sides(mu, ref, true, proxy)
        if r > 0.05:
            tried += 1
            assert float(left - right) > -1e-9
    assert tried > 100


@pytest.mark.parametrize(
    ("c", "expected", "value"),
    [
        (1.2, (0.25, 0.25, 0.25, 0.25), 0.0),
        (0.9, (0.4522, 0.3096, 0.2383, 0.0), 0.16453),
        (0.5, (0.6887, 0.2623, 0.0491, 0.0), 0.94247),
        (0.0, (1.0, 0.0, 0.0, 0.0), 3.0),
    ],
)
def test_the_weight_decides_how_far_a_proxy_is_followed(c, expected, value):
    """One state, R = (3, 1, 0, -4), uniform reference, sigma 2.549510: from c = 1 on the reference is best."""
    reward, ref = torch.tensor([3.0, 1.0, 0.0, -4.0], dtype=torch.float64), torch.full((4,), 0.25, dtype=torch.float64)
    sigma = (ref * reward.square()).sum().sqrt()
    assert float(sigma) == pytest.approx(2.549510, abs=1e-6)

    def objective(mu):
        return (mu * reward).sum() - c * sigma * ((mu / ref - 1.0).square() * ref).sum().sqrt()

    mu = torch.tensor(expected, dtype=torch.float64)
    assert float(objective(mu)) == pytest.approx(value, abs=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        other = torch.rand(4, generator=generator, dtype=torch.float64).log().neg()
        step = 0.1 * torch.rand((), generator=generator, dtype=torch.float64)
        assert float(objective((1 - step) * mu + step * other / other.sum())) <= value + 2e-4


def test_trimming():
    x = torch.cat([torch.ones(198), torch.tensor([1e6, -1e3])])
    assert float(trimmed_mean(x)) == 1.0, "1 % of 200 values at either end"
    assert float(trimmed_mean(torch.tensor([1.0, 5.0]))) == 3.0, "few values: the plain mean, not an empty one"
    assert float(trimmed_mean(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([1.0, 0.0, 1.0]))) == 5.0


def test_penalties_are_finite_whatever_the_discriminator_says():
    d = torch.tensor([1e4, 0.0, -1e4])
    for kind in ("sqrt_chi2", "chi2", "kl"):
        assert bool(occupancy_penalty(d, kind=kind).isfinite().all())
    below = torch.tensor([-1.0, -0.5])  # an estimate of chi^2 below 0
    assert torch.equal(occupancy_penalty(below), torch.expm1(below))
    assert not occupancy_penalty(torch.zeros(3)).any(), "equal policies cost nothing"


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [(0.5, 1.0, 0.2840254), (0.0, 0.8, 0.0718662), (0.3, 1.2, 0.3077420), (0.0, 1.5, math.inf)],
)
def test_gaussian_chi_square(mean, std, expected):
    new = {"mean": torch.tensor([mean]).double(), "log_std": torch.tensor([std]).double().log()}
    old = {"mean": torch.zeros(1).double(), "log_std": torch.zeros(1).double()}
    assert float(action_chi_square(GAUSSIAN, new, old)) == pytest.approx(expected, abs=1e-6)


def test_action_divergences_and_their_gradients():
    logits = torch.log(MU).clone().requires_grad_(True)
    evaluation, batch = {"logits": logits}, Data({"ref_logits": torch.log(REF), "valid": torch.ones(1)})
    level, none = LogRatio(logits, logits, logits), torch.zeros(())
    found = {
        kind: action_divergence(CATEGORICAL, kind)(level, none, evaluation, batch)
        for kind in ("kl", "chi2", "sqrt_chi2")
    }
    assert float(found["chi2"].detach()) == pytest.approx(1.12)
    assert float(found["sqrt_chi2"].detach()) == pytest.approx(1.058301, abs=1e-6)
    assert float(found["kl"].detach()) == pytest.approx(0.498224, abs=1e-6)
    # d chi^2 / d logit_i = 2 p_i (w_i - sum p w) = 2 (.6 (3 - 2.12), .3 (1 - 2.12), .1 (.2 - 2.12))
    (gradient,) = torch.autograd.grad(found["chi2"], logits)
    assert gradient.tolist() == pytest.approx([1.056, -0.672, -0.384])
    # an infinite chi^2 becomes the KL, with a finite gradient
    wide = torch.tensor([0.5]).requires_grad_(True)
    evaluation = {"mean": torch.zeros(1), "log_std": wide}
    batch = Data({"ref_mean": torch.zeros(1), "ref_log_std": torch.zeros(1), "valid": torch.ones(1)})
    value = action_divergence(GAUSSIAN, "chi2")(level, none, evaluation, batch)
    assert float(value.detach()) == pytest.approx(0.5 * (math.exp(1.0) - 1.0) - 0.5)
    assert bool(torch.autograd.grad(value, wide)[0].isfinite().all())
    with pytest.raises(ValueError, match="use kl"):
        action_divergence(FactoredCategorical((2, 2)), "chi2")


def test_an_action_chi_square_that_overflows_becomes_the_kl():
    """Of unit Gaussians 10 apart chi^2 = e^100 - 1 is no float32, of 8 apart the square of e^64 - 1 is none; the KLs
    are 50 and 32. Its gradient was NaN, and training ended."""
    none = torch.zeros(1)
    level = LogRatio(none, none, none)
    for away, kl in ((10.0, 50.0), (8.0, 32.0)):
        mean = torch.tensor([away], requires_grad=True)
        batch = Data({"ref_mean": torch.zeros(1), "ref_log_std": torch.zeros(1)})
        value = action_divergence(GAUSSIAN, "chi2")(level, none, {"mean": mean, "log_std": torch.zeros(1)}, batch)
        assert float(value.detach()) == pytest.approx(kl)
        assert torch.autograd.grad(value, mean)[0].tolist() == pytest.approx([away])
    logits, batch = torch.tensor([0.0, -120.0], requires_grad=True), Data({"ref_logits": torch.tensor([-120.0, 0.0])})
    value = action_divergence(CATEGORICAL, "sqrt_chi2")(level, none, {"logits": logits}, batch)
    assert float(value.detach()) == pytest.approx(math.sqrt(120.0))
    assert bool(torch.autograd.grad(value, logits)[0].isfinite().all())


def test_sequence_estimates_by_hand():
    found = sequence_divergences(torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64))
    assert float(found["chi2"]) == pytest.approx(0.1701679, abs=1e-6)
    assert float(found["kl"]) == pytest.approx(0.0850840, abs=1e-6)
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    exact = (p * (p / q + q / p - 2.0)).sum()
    assert float(exact) == pytest.approx(0.563333, abs=1e-6), "chi^2(p || q)"
    far = sequence_divergences(torch.tensor([30.0]))
    assert float(far["chi2"]) == pytest.approx(math.exp(10.0) * 21.0 - 2.0, rel=1e-5), "a line beyond 10"


@pytest.mark.parametrize("kind", ["chi2", "sqrt_chi2"])
def test_the_gradient_of_the_sequence_term_is_the_estimators(kind):
    """In expectation over the policy's samples: one-step sequences in exact proportion (5, 3, 2 of 10)."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    logits = p.log().requires_grad_(True)
    index = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    log_prob = logits.log_softmax(0)[index].unsqueeze(0)
    batch = Data(
        {"ref_log_prob": q.log()[index].unsqueeze(0), "valid": torch.ones(1, 10).double(),
         "n_sequences": torch.tensor(10.0).double()}
    )  # fmt: skip
    term = Term("chi2", sequence_chi_square(kind), aggregates.sequence_mean, reference_product, advantage=None)
    total, _ = surrogate((term,), {"log_prob": log_prob}, batch)
    (gradient,) = torch.autograd.grad(total, logits)
    # of chi^2 alone it would be (.936667, -.578, -.358667): the estimator's is half of that and that of KL(q || p)
    expected = torch.tensor([0.768333, -0.489, -0.279333]).double()
    if kind == "chi2":
        assert float(total.detach()) == pytest.approx(0.563333, abs=1e-6)
        assert gradient.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    else:
        root = math.sqrt(0.5633333)
        assert float(total.detach()) == pytest.approx(root, abs=1e-6)
        assert gradient.tolist() == pytest.approx((expected / (2.0 * root)).tolist(), abs=1e-6)


def test_the_stage_for_any_recipe():
    log_prob = torch.tensor([[0.3, -0.5, 0.0], [0.2, 7.0, 0.0]])
    data = Data(
        {"log_prob": log_prob, "ref_log_prob": torch.zeros(2, 3), "valid": torch.tensor([[1.0, 1, 1], [1, 0, 1]]),
         "episode_reward": torch.tensor([1.0, 1.0, 1.0]), "group": torch.zeros(3, dtype=torch.int64)},
        sequence=frozenset({"episode_reward", "group"}),
    )  # fmt: skip
    d = torch.tensor([0.5, -0.5, 0.0])  # of whole sequences, padding left out
    excess = torch.expm1(d)
    found = ChiSquarePenalty(0.1)(data)["shaped_episode_reward"]
    assert torch.allclose(found, 1.0 - 0.1 * excess / excess.mean().sqrt())
    assert torch.equal(ChiSquarePenalty(0.0)(data)["shaped_episode_reward"], data["episode_reward"])
    advantage = GroupBaseline(reward="shaped_episode_reward")(ChiSquarePenalty(0.1)(data))["advantage"]
    assert bool((advantage[0].argsort() == torch.tensor([0, 2, 1])).all()), "the likelier under pi, the less"
    with pytest.raises(ValueError, match="coef"):
        ChiSquarePenalty(-1.0)
