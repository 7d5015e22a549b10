"""Gibbs and linear Gaussian policies: hand-computed scores, spaces, ranges."""

from __future__ import annotations

import math

import pytest
import torch
from gymnasium import spaces

from ccrl.data import Data
from ccrl.estimators.scores import Scores
from ccrl.policies import GibbsPolicy, LinearGaussianPolicy, MLPPolicy, OneHot, RBFGrid

LINE = spaces.Box(-math.inf, math.inf, (1,))


def rows(obs: torch.Tensor, action: torch.Tensor) -> Data:
    return Data({"obs": obs, "action": action, "valid": torch.ones(obs.shape[:2])})


def scores(policy: torch.nn.Module, data: Data) -> torch.Tensor:
    theta = torch.cat([p.detach().double().flatten() for p in policy.parameters()])
    return Scores(policy, theta, data).dense().T


def test_gaussian_scores() -> None:
    """Gain: (a - K x) x / s^2; s: ((a - K x)^2 - s^2) / s^3."""
    policy = LinearGaussianPolicy(LINE, LINE, gain=-0.5, std=2.0)
    got = scores(policy, rows(torch.tensor([[[2.0], [3.0]]]), torch.tensor([[[1.0], [-4.5]]])))
    expected = [[2.0 * 2.0 / 4.0, (4.0 - 4.0) / 8.0], [-3.0 * 3.0 / 4.0, (9.0 - 4.0) / 8.0]]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_bandit_scores() -> None:
    """A constant observation makes the gain a mean: (a, a^2 - 1) at (0, 1)."""
    policy = LinearGaussianPolicy(LINE, LINE)
    got = scores(policy, rows(torch.ones(1, 3, 1), torch.tensor([[[-1.0], [0.5], [2.0]]])))
    torch.testing.assert_close(got.T, torch.tensor([[-1, 0.5, 2], [0, -0.75, 3]], dtype=torch.float64))


def test_ranges_of_the_lqr() -> None:
    """lam = -1.999 + 1.998 / (1 + e^k1), sig = .001 + 1 / (1 + e^k2)."""
    policy = LinearGaussianPolicy(LINE, LINE, gain=-0.2, std=0.7, gain_range=(-1.999, -0.001), std_range=(0.001, 1.001))
    k1, k2 = policy.gain.item(), policy.std.item()
    assert -1.999 + 1.998 / (1 + math.exp(k1)) == pytest.approx(-0.2, abs=1e-6)
    assert 0.001 + 1 / (1 + math.exp(k2)) == pytest.approx(0.7, abs=1e-6)
    params = policy.params(torch.tensor([[2.0]]))
    assert params["mean"].item() == pytest.approx(-0.4, abs=1e-6)
    assert params["log_std"].item() == pytest.approx(math.log(0.7), abs=1e-6)
    with pytest.raises(ValueError, match="inside its range"):
        LinearGaussianPolicy(LINE, LINE, gain=0.5, gain_range=(-1.999, -0.001))


def test_a_fixed_deviation_is_no_parameter() -> None:
    policy = LinearGaussianPolicy(LINE, LINE, std=0.5, fixed_std=True)
    assert [name for name, _ in policy.named_parameters()] == ["gain"]
    assert policy.act(torch.ones(1, 1), torch.ones(1, 1))["action"].item() == 0.5


def test_actions_are_clipped_for_the_environment_only() -> None:
    policy = LinearGaussianPolicy(LINE, spaces.Box(-1.0, 1.0, (1,)), gain=3.0)
    action = policy.act(torch.ones(1, 1), None)["action"]
    assert action.item() == 3.0
    assert policy.to_env(action).item() == 1.0
    assert policy.to_env(-action).item() == -1.0
    assert policy.to_env(0.1 * action).item() == pytest.approx(0.3)


def test_the_mean_is_the_gain_times_the_observation() -> None:
    """More observations than actions: rows of the gain are actions."""
    policy = LinearGaussianPolicy(spaces.Box(-1, 1, (3,)), spaces.Box(-9, 9, (2,)))
    policy.gain.data = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    torch.testing.assert_close(policy.params(torch.tensor([[1.0, 10.0, 100.0]]))["mean"], torch.tensor([[321.0, 40.0]]))


def test_a_state_index_is_rounded() -> None:
    """A division in float32 may leave 1.9999999 of a 2."""
    assert OneHot(4)(torch.tensor([[1.9999999], [0.0]])).tolist() == [[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]


def test_noise_is_what_the_distribution_reads() -> None:
    """Uniform numbers choose among actions, normal ones move a mean."""
    gibbs = GibbsPolicy(spaces.Box(-1, 1, (2,)), spaces.Discrete(3))
    uniform = gibbs.draw_noise(2000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert (uniform.shape, bool(((uniform >= 0) & (uniform < 1)).all())) == ((2000,), True)
    linear = LinearGaussianPolicy(LINE, LINE)
    normal = linear.draw_noise(2000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert normal.shape == (2000, 1)
    assert float(normal.min()) < -2.0


def test_evaluated_parameters_carry_gradients() -> None:
    """Natural steps differentiate the KL through them."""
    policy = LinearGaussianPolicy(LINE, LINE, gain=0.5)
    data = rows(torch.tensor([[[2.0], [3.0]]]), torch.zeros(1, 2, 1))
    out = policy.evaluate(data, frozenset({"dist"}))
    (grad,) = torch.autograd.grad(out["mean"].sum(), policy.gain)
    assert grad.item() == 5.0


def test_tabular_scores() -> None:
    """Indicator of the state times (indicator of the action minus its probability)."""
    policy = GibbsPolicy(spaces.Box(0, 1, (1,)), spaces.Discrete(2), features=OneHot(2))
    policy.theta.data = torch.tensor([[0.0, 1.0], [math.log(3.0), 1.0]])  # [action, state]: state 0 has (1/4, 3/4)
    got = scores(policy, rows(torch.tensor([[[0.0], [1.0]]]), torch.tensor([[1, 0]])))
    expected = [[-0.25, 0.0, 0.25, 0.0], [0.0, 0.5, 0.0, -0.5]]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)


def test_pinned_policies_are_logistic() -> None:
    policy = GibbsPolicy(spaces.Box(0, 2, (1,)), spaces.Discrete(2), features=OneHot(3), pinned=True)
    policy.theta.data = torch.tensor([[0.0, 2.0, -1.0]])
    probability = policy.params(torch.tensor([[0.0], [1.0], [2.0]]))["logits"].softmax(-1)[:, 0]
    torch.testing.assert_close(probability, torch.sigmoid(torch.tensor([0.0, 2.0, -1.0])))


def test_grid_of_radial_basis_functions() -> None:
    """4 x 4 centres at (i - 1/2) / 4 of the scaled box; the nearest one of a corner is (1/8, 1/8)."""
    grid = RBFGrid([-1.2, -0.07], [0.5, 0.07])
    assert grid.width == 16
    got = grid(torch.tensor([[-1.2, -0.07], [-1.2 + 1.7 * 0.375, 0.07 * 0.75]]))
    assert got[0, 0].item() == pytest.approx(math.exp(-(2 * 0.125**2) / (2 * 0.325**2)), rel=1e-5)
    assert got[1, 7].item() == pytest.approx(1.0, abs=1e-6)  # centre (3/8, 7/8)
    with pytest.raises(ValueError, match="finite low < high"):
        RBFGrid([0.0], [math.inf])


@pytest.mark.parametrize(
    "policy",
    [
        GibbsPolicy(spaces.Box(0, 4, (1,)), spaces.Discrete(3), features=OneHot(5)),
        GibbsPolicy(spaces.Box(-1, 1, (2,)), spaces.Discrete(3), features=RBFGrid([-1, -1], [1, 1])),
        GibbsPolicy(spaces.Box(-1, 1, (2,)), spaces.Discrete(3)),
        LinearGaussianPolicy(spaces.Box(-1, 1, (2,)), spaces.Box(-2, 2, (2,))),
    ],
)
def test_the_protocol_of_the_perceptron_policy(policy) -> None:
    """Same methods, and the log-probability recomputed is the one stored."""
    for name in ("draw_noise", "act", "behaviour_fields", "behaviour", "to_env", "evaluate", "outputs", "forward"):
        assert callable(getattr(policy, name))
        assert hasattr(MLPPolicy, name)
    width = 1 if isinstance(policy, GibbsPolicy) and isinstance(policy.features, OneHot) else 2
    obs = torch.rand(4, 3, width)
    for p in policy.parameters():
        p.data.add_(torch.rand_like(p))
    noise = policy.draw_noise(12, torch.Generator().manual_seed(0), torch.device("cpu"))
    with torch.no_grad():
        out = policy.act(obs.flatten(0, 1), noise)
        columns = {f"old_{k}": v.reshape(4, 3, -1) for k, v in out.items() if k != "action"}
        assert {f.name for f in policy.behaviour_fields()} == {"log_prob", *columns}
        action = out["action"].reshape(4, 3, *policy.action_shape)
        stored = policy.behaviour(columns, action)["log_prob"]
        evaluation = policy(rows(obs, action), policy.outputs())
    torch.testing.assert_close(evaluation["log_prob"], stored)
    assert evaluation["entropy"].shape == (4, 3)


def test_wrong_spaces_are_refused() -> None:
    box = spaces.Box(-1, 1, (2,))
    with pytest.raises(ValueError, match="expected Discrete"):
        GibbsPolicy(box, box)
    with pytest.raises(ValueError, match="observation space: expected a Box"):
        GibbsPolicy(spaces.Discrete(3), spaces.Discrete(2))
    with pytest.raises(ValueError, match="action space: expected a Box"):
        LinearGaussianPolicy(box, spaces.Discrete(2))
    with pytest.raises(ValueError, match="dict"):
        GibbsPolicy(box, spaces.Discrete(2)).act({"a": torch.zeros(1, 2)}, None)
