"""DQN and QR-DQN: targets by hand, exploration, images, copies of the target network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from agents import DQN, QRDQN
from ccrl.data import Data
from ccrl.testing import ClockEnv, Episode
from ccrl.testing.tasks import PixelTask

SMALL: dict[str, Any] = {
    "num_envs": 2, "hidden": (4,), "learning_starts": 2, "batch_size": 4, "rounds": 2, "buffer_size": 50,
}  # fmt: skip


def make(cls: type[Any] = DQN, **options: Any) -> Any:
    return cls(ClockEnv([[Episode(0, 3)], [Episode(5, 4, "truncate")]]), **SMALL | options)


def batch(alive: tuple[float, ...] = (1.0, 0.0)) -> Data:
    column = torch.tensor([alive])
    return Data({
        "obs": torch.zeros(1, 2, 1), "next_obs": torch.zeros(1, 2, 1), "reward": torch.tensor([[1.0, 2.0]]),
        "alive": column, "truncated": torch.zeros(1, 2, dtype=torch.bool), "valid": torch.ones(1, 2),
    })  # fmt: skip


@pytest.mark.parametrize(("double", "expected"), [(False, 1 + 0.9 * 7.0), (True, 1 + 0.9 * 3.0)])
def test_targets_of_the_target_network_with_its_action_or_the_live_ones(double: bool, expected: float) -> None:
    agent = make(double=double, gamma=0.9)
    agent.policy.quantiles = lambda obs: torch.tensor([[[5.0], [4.0]]]).expand(2, 2, 1)
    agent.ctx.bank.policy("target").quantiles = lambda obs: torch.tensor([[[3.0], [7.0]]]).expand(2, 2, 1)
    found: Tensor = agent.learner.cycle.targets(batch(), agent.ctx)["target"]
    assert found.shape == (1, 2, 1)
    assert found[0, :, 0].tolist() == pytest.approx([expected, 2.0]), "a terminated row has no value after it"


def test_quantile_targets_are_those_of_the_action_with_the_best_mean() -> None:
    agent = make(QRDQN, n_quantiles=3, gamma=0.5)
    values = torch.tensor([[[9.0, -9.0, -9.0], [1.0, 2.0, 3.0]]]).expand(2, 2, 3)  # means -3 and 2
    agent.ctx.bank.policy("target").quantiles = lambda obs: values
    found = agent.learner.cycle.targets(batch(), agent.ctx)["target"]
    assert found[0, 0].tolist() == [1.5, 2.0, 2.5]


def test_exploration_falls_and_the_target_network_is_a_copy() -> None:
    agent = make(exploration_end=0.2, exploration_fraction=0.5, target_every=2, rounds=1, n_steps=1)
    assert float(agent.policy.epsilon) == 1.0
    target, seen = agent.ctx.bank.policy("target"), []
    start = target.actor.net[-1].bias.clone()
    agent.learn(
        20, callback=lambda a: seen.append((float(a.policy.epsilon), torch.equal(target.actor.net[-1].bias, start)))
    )
    # 20 steps, half of them exploring: after 2 of 10 steps 1 - .2 * .8
    assert [e for e, _ in seen[:6]] == pytest.approx([0.84, 0.68, 0.52, 0.36, 0.2, 0.2])
    assert [same for _, same in seen[:3]] == [True, False, False], "copied at the second gradient step"
    assert torch.equal(target.actor.net[-1].bias, agent.policy.actor.net[-1].bias)


def test_images_reach_a_convolution_as_pixels() -> None:
    agent = QRDQN(PixelTask(2), n_quantiles=2, **SMALL)
    agent.learn(16)
    assert agent.n_updates > 0
    assert agent.learner.ring.state_dict()["rows"]["obs"].dtype == torch.uint8  # type: ignore[attr-defined]
    assert any(isinstance(m, torch.nn.Conv2d) for m in agent.policy.modules())


def test_continuous_actions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected Discrete actions, got Box.*agents that take it: .*\bsac\b"):
        DQN("Pendulum-v1", **SMALL)
