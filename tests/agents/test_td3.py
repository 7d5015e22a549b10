"""TD3's smoothed targets and delayed steps; CrossQ's joint pass, its modes, and compiled steps against eager ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from agents import TD3, CrossQ
from ccrl.data import Data
from ccrl.testing.agent_contract import SpacesEnv

F64 = torch.float64
BOX = spaces.Box(-1, 1, (2,), np.float32)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_targets(scale: float) -> None:
    agent = TD3(SpacesEnv(BOX, spaces.Box(-scale, scale, (2,), np.float32)), num_envs=2, hidden=(4,))
    target = agent.ctx.bank.policy("target").double()
    mean = torch.tensor([[0.9, -0.4], [0.1, -0.95]], dtype=F64)
    seen: list[Tensor] = []

    def q(obs: Tensor, action: Tensor) -> Tensor:
        seen.append(action)
        return torch.stack([action[:, 0] - action[:, 1], 2 * action[:, 0] + 0.5 * action[:, 1]])

    target.params = lambda obs: {"mean": scale * mean}  # type: ignore[assignment]
    target.q = q  # type: ignore[assignment]
    one = torch.ones(1, 2, dtype=F64)
    noise = torch.tensor([[[3.1, -0.8], [-1, -2]]], dtype=F64)
    flags = torch.zeros(1, 2, dtype=torch.bool)
    columns = {"next_obs": torch.zeros(1, 2, 2), "next_noise": noise, "alive": one, "valid": one, "truncated": flags}
    columns["reward"] = torch.tensor([[1.0, 0.5]], dtype=F64)
    found = agent.learner.cycle.targets(Data(columns), agent.ctx)["target"]  # type: ignore[attr-defined]
    # noise .2 (3.1, -.8) = (.62, -.16) -> clipped (.5, -.16); .9 + .5 -> 1, -.4 - .16 = -.56; units: half the range
    expected = [[1, -0.56], [-0.1, -1]] if scale == 1.0 else [[2, -1.12], [-0.2, -2]]
    assert seen[0].tolist() == [pytest.approx(row) for row in expected]
    if scale == 1.0:  # 1 + .99 min(1.56, 1.72) = 2.5444; .5 + .99 min(.9, -.7) = -.193
        assert found[0].tolist() == pytest.approx([2.5444, -0.193])


def test_actor_and_targets_wait_for_every_second_step() -> None:
    agent = TD3(SpacesEnv(BOX, BOX), num_envs=2, hidden=(4,), learning_starts=2, batch_size=4, rounds=1)
    before = {k: v.clone() for k, v in agent.policy.state_dict().items()}
    target = {k: v.clone() for k, v in agent.ctx.bank.policy("target").state_dict().items()}

    def moved(module: Any, old: dict[str, Tensor], prefix: str) -> bool:
        return any(not torch.equal(v, old[k]) for k, v in module.state_dict().items() if k.startswith(prefix))

    agent.learn(2)
    assert moved(agent.policy, before, "critic.")
    assert not moved(agent.policy, before, "actor.")
    assert not moved(agent.ctx.bank.policy("target"), target, "")
    agent.learn(2)
    assert moved(agent.policy, before, "actor.")
    assert moved(agent.ctx.bank.policy("target"), target, "critic.")
    assert moved(agent.ctx.bank.policy("target"), target, "actor.")
    assert agent.n_updates == 3


def test_logged_means_are_over_the_steps_that_have_the_statistic() -> None:
    agent = TD3(SpacesEnv(BOX, BOX), num_envs=2, hidden=(4,), learning_starts=2, batch_size=4, rounds=5, updates=1)
    rows: list[dict[str, Tensor]] = []
    step = agent.learner.cycle.step  # type: ignore[attr-defined]

    def kept(*args: Any) -> Any:
        found = step(*args)
        rows.append(found[0])
        return found

    agent.learner.cycle.step = kept  # type: ignore[attr-defined]
    agent.learn(10)
    for name, count in (("critic_loss", 5), ("actor_loss", 2)):  # the actor's at the second and the fourth step
        values = [float(row[name]) for row in rows if name in row]
        assert len(values) == count
        assert float(agent.scalars[f"train/{name}"]) == pytest.approx(sum(values) / count, rel=1e-5)


def test_actions_are_within_the_bounds_and_noisy_only_in_training() -> None:
    space = spaces.Box(np.array([-1, 0], np.float32), np.array([1, 4], np.float32))
    agent = TD3(SpacesEnv(BOX, space), num_envs=2, hidden=(4,), exploration_noise=3.0)
    agent.policy.requires_grad_(False)
    obs = torch.randn(200, 2)
    action = agent.policy.act(obs, torch.randn(200, 2))["action"]
    assert all(space.contains(a) for a in action.numpy())
    assert (action[:, 1] == 4).any()
    greedy = agent.policy.act(obs, None)["action"]
    seen = agent.policy.critic_action(greedy)
    torch.testing.assert_close(seen, agent.policy.actor.net(obs).tanh(), atol=1e-5, rtol=0)


def test_crossq_has_no_targets_and_moves_statistics_where_it_trains() -> None:
    agent = CrossQ(
        SpacesEnv(BOX, BOX), num_envs=2, hidden=(4,), critic_hidden=(4,), learning_starts=2, batch_size=4, rounds=6
    )
    agent.learn(12)
    assert list(agent.ctx.bank.names()) == []
    counts = {k: int(b) for k, b in agent.policy.named_buffers() if k.endswith("count") and "norms" in k}
    assert {v for k, v in counts.items() if k.startswith("critic.")} == {6}, "one joint pass per gradient step"
    assert {v for k, v in counts.items() if k.startswith("actor.")} == {2}, "every third step"
    with pytest.raises(ValueError, match="no target networks"):
        CrossQ(SpacesEnv(BOX, BOX), num_envs=2, tau=0.5)


def test_crossq_reads_both_halves_in_one_pass() -> None:
    agent = CrossQ(SpacesEnv(BOX, BOX), num_envs=2, hidden=(4,), critic_hidden=(4,))
    columns = {k: torch.randn(1, 3, 2) for k in ("obs", "next_obs", "action", "next_action")}
    batch = Data(columns | {"valid": torch.ones(1, 3)})
    out = agent.policy.evaluate(batch, frozenset({"q", "next_q"}))
    moved = Data({k: v + (5.0 if k == "next_obs" else 0.0) for k, v in columns.items()} | {"valid": torch.ones(1, 3)})
    assert not torch.equal(agent.policy.evaluate(moved, frozenset({"q", "next_q"}))["q"], out["q"])
    assert out["next_q"].shape == (1, 3, 2)


@pytest.mark.parametrize("cls", [TD3, CrossQ])
def test_compiled_steps_are_the_eager_ones(cls: Any) -> None:
    from ccrl.updaters import can_compile

    if not can_compile()[0]:
        pytest.skip("no C++ compiler")

    def train(compile: str) -> Any:
        wide = {"critic_hidden": (8,), "warm_up": 5, "actor_every": 1} if cls is CrossQ else {}
        agent = cls(
            "Pendulum-v1", hidden=(8,), learning_starts=5, batch_size=8, rounds=20, compile=compile, buffer_size=100,
            **wide,
        )  # fmt: skip
        return agent.learn(20)

    eager, compiled = train("off"), train("on")
    assert compiled.learner.cycle.compiled
    versions = [lambda a: a.policy, *([lambda a: a.ctx.bank.policy("target")] if cls is TD3 else [])]
    # a normalisation takes away what is added before it: such a bias (and the running mean, which follows it) has no
    # gradient but rounding, of which Adam makes whole steps
    idle = ("biases.0", "layers.0.bias", "norms.1.mean") if cls is CrossQ else ()
    for version in versions:
        for name, value in version(eager).state_dict().items():
            if name.endswith(idle):
                continue
            torch.testing.assert_close(version(compiled).state_dict()[name], value, rtol=1e-4, atol=1e-4, msg=name)
    assert eager.scalars.keys() == compiled.scalars.keys()
