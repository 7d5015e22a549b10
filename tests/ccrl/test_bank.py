"""Parameter versions."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from torch import nn

from ccrl.bank import Bank
from ccrl.policies import MLPPolicy
from ccrl.updaters import FlatUpdater


def linear(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def set_(module: nn.Module, value: float) -> None:
    for p in module.parameters():
        nn.init.constant_(p, value)


def weight(module: nn.Module) -> float:
    return float(next(module.parameters()).detach())


def test_versions_are_frozen_copies() -> None:
    bank = Bank(linear(1.0))
    bank.refresh("old")
    set_(bank.live, 2.0)
    assert (weight(bank.policy("old")), weight(bank.policy())) == (1.0, 2.0)
    assert bank.policy("live") is bank.live
    assert not any(p.requires_grad for p in bank.policy("old").parameters())
    assert all(p.requires_grad for p in bank.live.parameters())
    bank.refresh("older", source="old")
    assert weight(bank.policy("older")) == 1.0
    assert list(bank.names()) == ["old", "older"]


def test_versions_are_in_evaluation_mode_and_hold_no_gradients() -> None:
    """Dropout in a reference policy would make every log-ratio noise."""
    live = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    live(torch.ones(1, 2)).sum().backward()
    bank = Bank(live)
    bank.refresh("ref")
    assert not any(m.training for m in bank.policy("ref").modules())
    assert all(p.grad is None for p in bank.policy("ref").parameters())
    assert live.training
    assert live[0].weight.grad is not None


@pytest.mark.parametrize("mix", [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)])
def test_polyak_mixing(mix: float | torch.Tensor) -> None:
    bank = Bank(linear(0.0))
    bank.refresh("target", mix=mix)  # created: a copy
    kept = bank.policy("target")
    set_(bank.live, 8.0)
    bank.refresh("target", mix=mix)
    assert weight(kept) == 2.0, "mixed in place"
    bank.refresh("target", mix=mix)
    assert weight(kept) == 3.5
    bank.refresh("target")
    assert weight(kept) == 8.0


def test_buffers_follow() -> None:
    policy = MLPPolicy(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), normalise_obs=True)
    bank = Bank(policy)
    bank.refresh("old")
    policy.update_normaliser(torch.full((3, 1, 2), 5.0), torch.ones(3, 1))
    obs = torch.zeros(1, 2)
    assert bank.policy("old").features(obs, "actor").tolist() == [[0, 0]]  # type: ignore[operator]
    bank.refresh("old", mix=0.1)
    assert float(bank.policy("old").get_buffer("norm.obs.count")) == 3.0
    theta = torch.zeros(sum(p.numel() for p in policy.parameters()))
    for count in (3.0, 6.0):  # a module at a vector too, and at every call
        assert float(bank.policy(theta).get_buffer("norm.obs.count")) == count
        policy.update_normaliser(torch.full((3, 1, 2), 5.0), torch.ones(3, 1))


def test_versions_do_not_share_memory_with_a_flat_updater() -> None:
    policy = MLPPolicy(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), hidden=(3,))
    updater, bank = FlatUpdater(policy, lr=0.1), Bank(policy)
    bank.refresh("old")
    before = [p.clone() for p in bank.policy("old").parameters()]
    with torch.no_grad():
        updater.flat.add_(1.0)
    for p, q, live in zip(bank.policy("old").parameters(), before, policy.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
        assert not torch.equal(p, live)


def test_a_flat_vector_is_a_version_and_stays_untouched() -> None:
    policy = MLPPolicy(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), hidden=(3,))
    bank = Bank(policy)
    size = sum(p.numel() for p in policy.parameters())
    theta = torch.arange(float(size))
    module = bank.policy(theta)
    flat = torch.cat([p.reshape(-1) for p in module.parameters()])
    assert flat.tolist() == theta.tolist()
    bank.policy(torch.zeros(size))  # the next vector
    assert theta.tolist() == list(range(size)), "the caller's vector was overwritten"
    assert list(bank.names()) == []
    assert bank.state_dict() == {}
    with pytest.raises(ValueError, match=rf"{size} parameters, got shape \(3,\)"):
        bank.policy(torch.zeros(3))


def test_state_round_trip() -> None:
    bank = Bank(linear(1.0))
    bank.refresh("ref")
    set_(bank.live, 2.0)
    bank.refresh("old")
    other = Bank(linear(9.0))
    other.load_state_dict(bank.state_dict())
    assert {n: weight(other.policy(n)) for n in other.names()} == {"ref": 1.0, "old": 2.0}
    assert weight(other.live) == 9.0


def test_bad_names() -> None:
    bank = Bank(linear(1.0))
    with pytest.raises(KeyError, match=r"no version 'old'; there are \['live'\]"):
        bank.policy("old")
    with pytest.raises(ValueError, match="live"):
        bank.refresh("live")
