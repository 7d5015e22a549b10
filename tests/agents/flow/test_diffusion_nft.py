"""DiffusionNFT: two velocities, their errors, and where the loss is least."""

import pytest
import torch

from agents.flow.diffusion_nft import DiffusionNFT
from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators.recipe import Parts
from ccrl.estimators.terms import surrogate

SMALL = {"n_prompts": 4, "group_size": 6, "steps": 5, "hidden": (8, 8), "n_times": 2, "compile": "off"}


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def loss_of(velocity, old, target, advantage, time=0.5, **settings):
    rows = {"old_velocity": old, "target": target, "advantage": advantage, "valid": torch.ones_like(advantage),
            "time": torch.full_like(advantage, time)}  # fmt: skip
    batch = Data({k: v.unsqueeze(0) for k, v in rows.items()}).with_scalars(n_valid=double(float(len(advantage))))
    config = DiffusionNFT.Settings(kl_coef=0.0, **settings)
    recipe = DiffusionNFT.Recipe(config, Parts(None, None, Request(counts=torch.ones(1)), 1))
    return surrogate(recipe.terms(), {"velocity": velocity.unsqueeze(0)}, batch)[0]


class TestByHand:
    def test_velocities_and_errors(self):
        """v = 2, old 1, target 0, beta = .5: v+ = 1.5, v- = .5. A = .6: r = .8, (.8 * 2.25 + .2 * .25) / .5 = 3.7."""
        v, old, target = double([[2.0]]), double([[1.0]]), double([[0.0]])
        found = loss_of(v, old, target, double([0.6]), beta=0.5, self_normalise=False)
        assert float(found) == pytest.approx(3.7)
        # of the clean sample: errors t off, over their size: .5 * 1.5 and .5 * .5, so (.8 * .75 + .2 * .25) / .5 = 1.3
        found = loss_of(v, old, target, double([0.6]), beta=0.5, self_normalise=True)
        assert float(found) == pytest.approx(1.3)

    def test_a_neutral_sample_pulls_to_the_old_velocity(self):
        """A = 0: the two errors are symmetric in v - v_old, whatever the target."""
        old, target = double([[1.0, -1.0]]), double([[3.0, 0.5]])
        v = old.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(v, old, target, double([0.0]), self_normalise=False), v)
        torch.testing.assert_close(slope, torch.zeros_like(slope))

    def test_the_minimum(self):
        """Samples with targets u_i and r_i at one state: the slope at v_old is -2 sum (2 r - 1) (u - v_old) / n, and
        the
        loss is least at v_old + mean (2 r - 1)(u - v_old) / beta."""
        old, target = double([[0.5]]).expand(3, 1), double([[1.0], [2.0], [-1.0]])
        advantage, beta = double([0.8, -0.4, 0.1]), 0.7
        v = double([[0.5]]).requires_grad_()
        optimum = 0.5 + float((advantage * (target - old).squeeze(1)).mean()) / beta
        best = torch.full((1, 1), optimum, dtype=torch.float64, requires_grad=True)
        found = [
            torch.autograd.grad(loss_of(x.expand(3, 1), old, target, advantage, beta=beta, self_normalise=False), x)[0]
            for x in (v, best)
        ]
        assert found[0].item() == pytest.approx(-2.0 * float((advantage * (target - old).squeeze(1)).mean()))
        assert found[1].item() == pytest.approx(0.0, abs=1e-12)


def test_the_averaged_policy_generates():
    """d = .001 k: the old policy follows, and samples are its own."""
    agent = DiffusionNFT("ring2d", seed=0, **SMALL)
    agent.learn(agent.samples_per_iteration)
    assert agent.estimator.plan({}, {}, agent.ctx)[0].params == "old"
    first = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(agent.samples_per_iteration)
    for p, q, live in zip(first, agent.ctx.bank.policy("old").parameters(), agent.policy.parameters()):
        torch.testing.assert_close(q, 0.001 * p + 0.999 * live.detach(), rtol=1e-5, atol=1e-7)
