"""Action spaces: entropies whose gradient is the entropy's, factored actions, bounds in the Box's own type."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import distributions as D

from ccrl.adapters.spaces import action_array
from ccrl.policies import CATEGORICAL, GAUSSIAN, SQUASHED, FactoredCategorical, LinearGaussianPolicy, MLPPolicy
from ccrl.policies.actions import ActionSpec, RandomActor

BOX2 = gym.spaces.Box(-1, 1, (2,))


# -- squashed Gaussians ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "log_std", "tolerance"), [(0.0, -2.0, 1e-6), (1.5, 0.0, 1e-6), (0.5, 0.69, 1e-4)])
def test_squashed_entropy_and_its_gradient_are_those_of_the_density(
    mean: float, log_std: float, tolerance: float
) -> None:
    # by brute force: H = -int p log p over the actions a = tanh(u), on a fine grid of u
    m, s = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (mean, log_std))
    u = torch.linspace(-12, 12, 40_001, dtype=torch.float64).unsqueeze(-1)
    log_prob = SQUASHED.log_prob({"mean": m.expand(40_001, 1), "log_std": s.expand(40_001, 1)}, u)
    # da = (1 - tanh(u)^2) du
    step = 24 / 40_000 * (1 - u.tanh().square()).squeeze(-1)
    expected = -(log_prob.exp() * log_prob * step).sum()
    got = SQUASHED.entropy({"mean": m.unsqueeze(0), "log_std": s.unsqueeze(0)}, torch.zeros(1, 1))[0]
    assert float(got.detach()) == pytest.approx(float(expected.detach()), abs=tolerance)
    for a, b in zip(torch.autograd.grad(got, (m, s)), torch.autograd.grad(expected, (m, s))):
        assert float(a) == pytest.approx(float(b), abs=10 * tolerance)


def test_an_entropy_bonus_widens_a_narrow_squashed_policy() -> None:
    # at log_std = -2 the slope of tanh is nearly 1: dH/dlog_std is that of the Gaussian, 1, less
    # 2 E[u tanh u] = 2 E[u^2 - u^4/3 ...] = 2 (.018316 - .000335 + ...) = .036
    log_std = torch.tensor([[-2.0]], requires_grad=True)
    params = {"mean": torch.zeros(1, 1), "log_std": log_std}
    (slope,) = torch.autograd.grad(SQUASHED.entropy(params, torch.full((1, 1), 0.1)).sum(), log_std)
    assert float(slope) == pytest.approx(1 - 0.036, abs=1e-3)


@pytest.mark.parametrize("distribution", [GAUSSIAN, SQUASHED])
def test_reparameterised_samples_carry_both_gradients(distribution: type[GAUSSIAN]) -> None:
    torch.manual_seed(0)
    mean, log_std = (torch.randn(7, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    noise = torch.randn(7, 2, dtype=torch.float64)
    params = {"mean": mean, "log_std": log_std}
    action, log_prob = distribution.rsample(params, noise)
    torch.testing.assert_close(action, distribution.sample(params, noise))
    torch.testing.assert_close(log_prob, distribution.log_prob(params, action))
    base = D.Normal(mean, log_std.exp())
    theirs = D.TransformedDistribution(base, [D.TanhTransform()]) if distribution is SQUASHED else base
    u = mean + log_std.exp() * noise
    expected = theirs.log_prob(u.tanh() if distribution is SQUASHED else u).sum(-1)
    wanted = torch.autograd.grad((3 * expected + u.sum(-1)).sum(), (mean, log_std))
    got = torch.autograd.grad((3 * log_prob + action.sum(-1)).sum(), (mean, log_std))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# -- factored categorical --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 2, 4)])
def test_factored_categorical_is_a_product(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    factored = FactoredCategorical(sizes)
    new, old = ({"logits": torch.randn(5, sum(sizes), dtype=torch.float64, requires_grad=True)} for _ in range(2))
    noise = torch.rand(5, 3)
    action = factored.sample(new, noise)
    assert action.shape == (5, 3)
    split = [[p["logits"].split(sizes, -1)[i] for p in (new, old)] for i in range(3)]
    theirs = [tuple(D.Categorical(logits=x) for x in pair) for pair in split]
    for i, (logits, _) in enumerate(split):
        assert action[:, i].tolist() == CATEGORICAL.sample({"logits": logits}, noise[:, i]).tolist()
        assert factored.mode(new)[:, i].tolist() == logits.argmax(-1).tolist()
    log_prob = sum(p.log_prob(action[:, i]) for i, (p, _) in enumerate(theirs))
    torch.testing.assert_close(factored.log_prob(new, action), log_prob)
    torch.testing.assert_close(factored.entropy(new, action), sum(p.entropy() for p, _ in theirs))
    torch.testing.assert_close(factored.kl(new, old), sum(D.kl_divergence(p, q) for p, q in theirs))
    total = factored.log_prob(new, action) + factored.entropy(new, action) + factored.kl(new, old)
    (gradient,) = torch.autograd.grad(total.sum(), new["logits"])
    assert bool(gradient.isfinite().all()), "padding leaks into the gradient"


def test_factored_sampling_never_leaves_a_factor() -> None:
    factored = FactoredCategorical((2, 5))
    noise = torch.full((1, 2), 1.0)  # as after rounding of the last cumulative sum
    assert factored.sample({"logits": torch.zeros(1, 7)}, noise).tolist() == [[1, 4]]


def test_action_specs() -> None:
    spec = ActionSpec.of(gym.spaces.MultiDiscrete([3, 2]))
    assert (spec.shape, spec.size, spec.distribution.sizes) == ((2,), 5, (3, 2))
    spec = ActionSpec.of(gym.spaces.MultiBinary(4))
    assert (spec.shape, spec.size, spec.distribution.sizes) == ((4,), 8, (2, 2, 2, 2))
    for space in (
        gym.spaces.MultiDiscrete([[2, 2]]),
        gym.spaces.MultiDiscrete([2, 2], start=[0, 1]),
        gym.spaces.MultiBinary([2, 2]),
        gym.spaces.Box(-1, 1, (2, 2)),
        gym.spaces.Box(0, 5, (2,), dtype=np.int64),
    ):
        with pytest.raises(ValueError, match="action space: expected"):
            ActionSpec.of(space)
    huge = gym.spaces.Box(-3e38, 3e38, (1,))  # its width is infinite in float32
    with pytest.raises(ValueError, match="finite action bounds"):
        ActionSpec.of(huge, squash=True)


# -- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("squash", [False, True])
def test_saturated_actions_stay_inside_random_boxes(dtype: type, squash: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        low = rng.normal(0, 3, 4).astype(dtype)
        space = gym.spaces.Box(low, (low + rng.uniform(0.01, 5, 4)).astype(dtype), dtype=dtype)
        policy = MLPPolicy(BOX2, space, squash=squash, hidden=(1,), heads={})
        for end in (-20.0, 20.0):
            executed = policy.to_env(torch.full((1, 4), end))
            assert space.contains(executed[0].numpy())
            assert space.contains(action_array(executed, space, 1, where="test")[0])


def test_a_bound_of_float64_is_not_rounded() -> None:
    # 0.3 in float32 is 0.300000012, outside
    space = gym.spaces.Box(np.array([-0.4]), np.array([0.3]), dtype=np.float64)
    assert LinearGaussianPolicy(BOX2, space).to_env(torch.tensor([[9.0]])).item() == 0.3
    assert action_array(torch.tensor([[0.3]]), space, 1, where="test").item() == 0.3


def test_integers_reach_the_environment_as_the_space_has_them() -> None:
    binary = gym.spaces.MultiBinary(2)
    array = action_array(torch.tensor([[1, 0]]), binary, 1, where="test")
    assert binary.contains(array[0])
    with pytest.raises(ValueError, match="integer actions of shape"):
        action_array(torch.zeros(1, 2), binary, 1, where="test")


# -- random actions --------------------------------------------------------------------------------------------------


def draw(space: gym.Space, n: int = 4000, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored and executed actions."""
    policy = MLPPolicy(BOX2, space, hidden=(1,), heads={}, **options)
    actor = RandomActor(space, policy)
    noise = actor.draw_noise(n, torch.Generator().manual_seed(0), torch.device("cpu"))
    action = actor.act(torch.zeros(n, 2), noise)["action"]
    return action, actor.to_env(action)


@pytest.mark.parametrize("squash", [False, True])
def test_random_actions_are_uniform_in_the_box(squash: bool) -> None:
    space = gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 1]))
    stored, executed = draw(space, squash=squash)
    assert bool(stored.isfinite().all())
    unit = (executed - torch.tensor(space.low)) / torch.tensor(space.high - space.low)
    # quartiles of 4,000 uniform numbers: standard error .0068
    quartiles = torch.quantile(unit, torch.tensor([0.25, 0.5, 0.75]), dim=0)
    torch.testing.assert_close(quartiles, torch.tensor([[0.25], [0.5], [0.75]]).expand(3, 2), rtol=0, atol=0.03)
    policy = MLPPolicy(BOX2, space, squash=squash, hidden=(1,), heads={})
    torch.testing.assert_close(policy.to_env(stored), executed)


def test_random_actions_of_unbounded_and_discrete_spaces() -> None:
    space = gym.spaces.Box(np.float32([-np.inf, 1, -np.inf]), np.float32([np.inf, np.inf, 2]))
    action = draw(space)[1]
    # standard normal; 1 + exponential, mean 2; 2 - exponential, mean 1
    assert action.mean(0).tolist() == pytest.approx([0, 2, 1], abs=0.08)
    assert action.std(0).tolist() == pytest.approx([1, 1, 1], abs=0.1)
    assert bool((action[:, 1] >= 1).all())
    assert bool((action[:, 2] <= 2).all())
    counts = draw(gym.spaces.Discrete(4))[0].bincount(minlength=4) / 4000
    assert counts.tolist() == pytest.approx([0.25] * 4, abs=0.03)
    factors = draw(gym.spaces.MultiDiscrete([2, 3]))[0]
    assert (factors[:, 0].bincount() / 4000).tolist() == pytest.approx([1 / 2] * 2, abs=0.03)
    assert (factors[:, 1].bincount() / 4000).tolist() == pytest.approx([1 / 3] * 3, abs=0.03)


def test_state_dependent_deviations() -> None:
    torch.manual_seed(0)
    policy = MLPPolicy(BOX2, BOX2, hidden=(8,), heads={}, state_dependent_std=True, log_std_init=-1.0)
    params = policy.params(torch.randn(50, 2))
    assert params["log_std"].shape == params["mean"].shape == (50, 2)
    assert params["log_std"].mean().item() == pytest.approx(-1.0, abs=0.02)
    assert params["log_std"].std(0).min().item() > 1e-4
    assert not hasattr(policy.actor, "log_std")
    with torch.no_grad():
        policy.actor.net[-1].bias.fill_(1e6)
    assert policy.params(torch.zeros(1, 2))["log_std"].tolist() == [[2.0, 2.0]]
    assert math.isfinite(policy.distribution.log_prob(policy.params(torch.zeros(1, 2)), torch.zeros(1, 2)).item())
    with pytest.raises(ValueError, match="state_dependent_std"):
        MLPPolicy(BOX2, gym.spaces.Discrete(2), state_dependent_std=True)
