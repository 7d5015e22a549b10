"""Action values: the batched product against single networks, quantiles, epsilon-greedy actions."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch

from ccrl.data import Data
from ccrl.policies import QuantilePolicy, TwinQ

BOX3 = gym.spaces.Box(-1, 1, (3,))


def test_twin_critics_are_two_separate_networks() -> None:
    torch.manual_seed(0)
    q = TwinQ(3, 2, hidden=(8, 4), activation="tanh")
    obs, action = torch.randn(5, 3), torch.randn(5, 2)
    out = q(obs, action)
    assert out.shape == (2, 5)
    x = torch.cat([obs, action], -1)
    for i in range(2):
        h = x
        for weight, bias in zip(q.net.weights, q.net.biases):
            h = torch.tanh(h @ weight[i] + bias[i])
        torch.testing.assert_close(out[i], (h @ q.net.last_weight[i].T).squeeze(-1) + q.net.last_bias[i])
    (grad,) = torch.autograd.grad(q(obs, action)[0].sum(), q.net.weights[0])
    assert float(grad[1].abs().sum()) == 0.0, "one critic's loss moves the other"
    assert not torch.equal(q.net.weights[0][0], q.net.weights[0][1]), "twins start equal"
    # nn.Linear's bound for 5 inputs: 1 / sqrt 5 = .447
    assert 0.3 < float(q.net.weights[0].detach().abs().max()) <= 5**-0.5


def test_wrong_sizes_are_refused() -> None:
    for options in ({"n": 0}, {"hidden": (0,)}, {"activation": "sine"}):
        with pytest.raises(ValueError, match="expected n >= 1"):
            TwinQ(3, 2, **options)
    with pytest.raises(ValueError, match="expected Discrete actions"):
        QuantilePolicy(BOX3, BOX3)


def test_quantile_policy_is_greedy_on_the_mean_and_explores_by_noise() -> None:
    policy = QuantilePolicy(BOX3, gym.spaces.Discrete(3), hidden=(), n_quantiles=2)
    with torch.no_grad():
        policy.actor.net[0].weight.zero_()
        # means of the quantiles: action 0: 1, action 1: 1.5, action 2: 0; the largest quantile is action 0's
        policy.actor.net[0].bias.copy_(torch.tensor([-3.0, 5.0, 1.0, 2.0, 0.0, 0.0]))
    policy.epsilon.fill_(0.1)
    obs = torch.zeros(3, 3)
    assert policy.act(obs, None)["action"].tolist() == [1, 1, 1]
    noise = torch.tensor([[0.5, 0.9], [0.05, 0.9], [0.05, 0.1]])
    assert policy.act(obs, noise)["action"].tolist() == [1, 2, 0]
    batch = Data({"obs": obs.unsqueeze(0), "valid": torch.ones(1, 3)})
    out = policy.evaluate(batch, frozenset({"quantiles"}))["quantiles"]
    assert out.shape == (1, 3, 3, 2)
    assert out[0, 0].tolist() == [[-3, 5], [1, 2], [0, 0]]
    other = QuantilePolicy(BOX3, gym.spaces.Discrete(3), hidden=(), n_quantiles=2)
    other.load_state_dict(policy.state_dict())
    assert float(other.epsilon) == pytest.approx(0.1), "exploration belongs to the checkpoint"
