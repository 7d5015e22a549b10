"""SAC against a whole step computed by hand, its targets, its settings, and compiled steps against eager ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents import DQN, SAC, TD3, CrossQ, OffPolicyMDPO, get_agent
from agents.sac import SACConfig, SACCycle
from ccrl.bank import Bank
from ccrl.data import Data
from ccrl.estimators.base import Context
from ccrl.policies import ActorQ, MLPPolicy
from ccrl.policies.distributions import SQUASHED
from ccrl.testing import ClockEnv, Episode
from ccrl.testing.agent_contract import SpacesEnv
from ccrl.updaters import ModuleUpdater

F64 = torch.float64
BOX = spaces.Box(-1, 1, (2,), np.float32)


class Linear(nn.Module):
    """``u = w s + e^c eps``, ``Q_i = p_i s + q_i a``."""

    n_out = 1
    distribution = SQUASHED

    def __init__(self) -> None:
        super().__init__()
        numbers = {"w": [0.3], "c": [-0.5], "p": [1.0, 0.8], "q": [-0.5, 0.4]}
        for name, value in numbers.items():
            setattr(
                self, f"{'actor' if name in 'wc' else 'critic'}_{name}", nn.Parameter(torch.tensor(value, dtype=F64))
            )
        self.log_alpha = nn.Parameter(torch.tensor([math.log(0.2)], dtype=F64))

    @property
    def alpha(self) -> Tensor:
        return self.log_alpha.detach().exp().squeeze(0)

    def draw(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.actor_w * obs
        return SQUASHED.rsample({"mean": mean, "log_std": self.actor_c.expand_as(mean)}, noise)  # type: ignore[attr-defined, no-any-return]

    def q(self, obs: Tensor, action: Tensor) -> Tensor:
        return self._q(obs, action.tanh())

    def _q(self, obs: Tensor, a: Tensor) -> Tensor:
        return (self.critic_p * obs + self.critic_q * a).t()

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        obs = batch["obs"][0]
        u, log_prob = self.draw(obs, batch["noise"][0])
        found = {"q": self._q(obs, batch["action"][0]), "new_q": self.q(obs, u)}
        out = {k: v.t().unsqueeze(0) for k, v in found.items()}
        return out | {"new_log_prob": log_prob.unsqueeze(0), "log_alpha": self.log_alpha.expand(1, len(obs))}


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64).reshape(1, -1, 1)


def test_a_whole_step() -> None:
    """Two transitions, SGD of .1, in float64: targets, critics, actor with the moved critics, temperature, average."""
    policy = Linear()
    groups = {"actor": "actor_", "critic": "critic_", "alpha": "log_alpha"}
    updaters: Any = {
        name: ModuleUpdater(policy, lambda p: torch.optim.SGD(p, lr=0.1), prefixes=[prefix])
        for name, prefix in groups.items()
    }
    cycle = SACCycle(SACConfig(), policy, updaters)  # type: ignore[arg-type]
    cycle.averages = (cycle.averages[0].__class__("target", 0.005, ("critic_",)),)
    ctx = Context(torch.Generator(), Bank(policy), lambda *args: None)  # type: ignore[arg-type, return-value]
    cycle.start(ctx.bank)
    flags = {"terminated": [False, True], "truncated": [False, False]}
    data = Data(
        {
            "obs": column(1, -2), "action": column(0.5, -0.3), "reward": column(1, 0).squeeze(-1),
            "next_obs": column(0.5, 1.5), "alive": column(1, 0).squeeze(-1), "valid": column(1, 1).squeeze(-1),
            "noise": column(0.4, -1.1), "next_noise": column(-0.7, 0.9), "n_valid": torch.tensor(2.0, dtype=F64),
            **{k: torch.tensor([v]) for k, v in flags.items()},
        },
        scalars=frozenset({"n_valid"}),
    )  # fmt: skip
    batch, stats = cycle.run(*cycle.due(), data, ctx)
    assert batch["target"][0].tolist() == pytest.approx([1.406639, 0.0], abs=1e-6)
    assert float(stats["critic_loss"]) == pytest.approx(1.744357, abs=1e-6)
    assert policy.critic_p.tolist() == pytest.approx([0.847832, 0.648332], abs=1e-6)
    assert policy.critic_q.tolist() == pytest.approx([-0.511334, 0.384366], abs=1e-6)
    assert float(stats["actor_loss"]) == pytest.approx(0.520786, abs=1e-6), ".600234 would be with the old critics"
    assert float(policy.actor_w.detach()) == pytest.approx(0.226209, abs=1e-6)
    assert float(policy.actor_c.detach()) == pytest.approx(-0.501959, abs=1e-6)
    assert float(policy.alpha) == pytest.approx(0.181501, abs=1e-6)
    assert ctx.bank.policy("target").critic_p.tolist() == pytest.approx([0.999239, 0.799242], abs=1e-6)


class _Fixed(nn.Module):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = torch.tensor(alpha, dtype=F64)

    def draw(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return obs, torch.tensor([-1.2, 0.7, 2.0], dtype=F64)

    def q(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.tensor([[5.0, 3.0, -1.0], [4.0, 6.0, 0.5]], dtype=F64)


@pytest.mark.parametrize(("alpha", "expected"), [(0.2, [5.1976, -0.5, 0.614]), (0.0, [4.96, -0.5, 1.01])])
def test_targets(alpha: float, expected: list[float]) -> None:
    # y = r + .99 (1 - d) (min Q - alpha log pi): 1 + .99 (4 + .24) = 5.1976; terminated: -.5; 2 + .99 (-1 - .4) = .614
    agent = SAC(SpacesEnv(BOX, BOX), num_envs=2, hidden=(4,))
    fixed = _Fixed(alpha)
    ctx = Context(torch.Generator(), Bank(fixed), lambda *args: None)  # type: ignore[arg-type, return-value]
    ctx.bank.refresh("target")
    zeros = torch.zeros(1, 3, 1, dtype=F64)
    columns = {
        "reward": column(1, -0.5, 2).squeeze(-1), "alive": column(1, 0, 1).squeeze(-1), "next_obs": zeros,
        "truncated": torch.tensor([[False, False, True]]), "next_noise": zeros, "valid": column(1, 1, 1).squeeze(-1),
    }  # fmt: skip
    found = agent.learner.cycle.targets(Data(columns), ctx)  # type: ignore[attr-defined]
    assert found["target"][0].tolist() == pytest.approx(expected)


def test_the_ring_keeps_true_successors_and_only_terminations_end_the_value() -> None:
    env = ClockEnv([[Episode(0, 3)], [Episode(100, 2, "truncate")]], action_space=BOX)
    agent = SAC(env, num_envs=2, learning_starts=1_000, hidden=(4,), rounds=12, buffer_size=24)
    agent.learn(24)
    columns = agent.learner.ring.state_dict()["rows"]  # type: ignore[attr-defined]
    obs, following = columns["obs"][:, 0], columns["next_obs"][:, 0]
    assert torch.equal(following, obs + 1), "a reset observation became a successor"
    assert torch.equal(columns["alive"], (obs != 2).float()), "a time limit is not a termination"
    assert agent.n_updates == 0, "learning has not started"
    seen = columns["action"].tanh()
    assert float(seen.abs().max()) > 0.5, "actions of the warm-up are uniform"


@pytest.mark.parametrize("case", ["image", "groups"])
@pytest.mark.parametrize("cls", [SAC, TD3, CrossQ, OffPolicyMDPO])
def test_images_and_privileged_critics(cls: Any, case: str) -> None:
    image = spaces.Box(0, 255, (3, 12, 12), np.uint8)
    space: Any = spaces.Dict({"policy": BOX, "critic": spaces.Box(-1, 1, (5,), np.float32)})
    space = spaces.Dict({"image": image, "speed": BOX}) if case == "image" else space
    env = SpacesEnv(space, BOX)
    if case == "image":
        env.reset = lambda seed=None, mask=None: {  # type: ignore[method-assign]
            "image": torch.zeros(2, 3, 12, 12, dtype=torch.uint8), "speed": torch.zeros(2, 2)
        }  # fmt: skip
    agent = cls(
        env, num_envs=2, learning_starts=2, hidden=(4,), critic_hidden=(4,), batch_size=4, buffer_size=50, rounds=4
    )
    agent.learn(8)
    assert agent.n_updates > 0
    policy = agent.policy
    if case == "groups":
        first = (policy.actor.net.layers if cls is CrossQ else policy.actor.net)[0]
        assert first.weight.shape[1] == 2, "the actor sees the privileged group"
        assert policy.critic.net.weights[0].shape[1] == 5 + 2
    else:
        assert agent.learner.ring.state_dict()["rows"]["obs"]["image"].dtype == torch.uint8  # type: ignore[attr-defined]
        assert policy.actor.encoders["image"] is not policy.critic.encoders["image"]


def test_wrong_action_spaces_are_refused() -> None:
    flat = spaces.Box(np.array([0, 1], np.float32), np.array([1, 1], np.float32))
    for actions in (spaces.Discrete(2), spaces.Box(-np.inf, np.inf, (2,)), flat):
        with pytest.raises(ValueError, match=r"action space: expected .*, got"):
            SAC(SpacesEnv(BOX, actions), num_envs=2)
    with pytest.raises(ValueError, match="target_entropy: the temperature is fixed"):
        SAC(SpacesEnv(BOX, BOX), num_envs=2, alpha_learning_rate=None, target_entropy=-3.0)
    with pytest.raises(ValueError, match="tau"):
        SAC(SpacesEnv(BOX, BOX), num_envs=2, tau=0.0)


def test_a_refusal_names_agents_that_do_take_the_actions() -> None:
    for name, env in (("sac", "CartPole-v1"), ("qr_dqn", "Pendulum-v1")):
        with pytest.raises(ValueError, match="action space: expected") as refusal:
            get_agent(name)(env, compile="off")
        others = str(refusal.value).rpartition(": ")[2].split(", ")
        assert {"ppo", "mdpo"} < set(others)
        assert not {name, "hdpo", "bc", "grpo"} & set(others)
        for other in others:
            get_agent(other)(env)


def test_a_memory_on_the_disk_is_announced_and_trains_as_one_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"num_envs": 2, "learning_starts": 4, "hidden": (4,), "batch_size": 4, "rounds": 4, "compile": "off"}
    plain, mapped = (SAC("Pendulum-v1", buffer_size=9_999, buffer_folder=f, **small) for f in (None, tmp_path / "map"))
    # 10,000 slots with the spare one: 3 + 1 + 1 + 3 + 1 float32 and two flags are 38 bytes
    for agent, where in ((plain, "memory"), (mapped, tmp_path / "map")):
        agent.learn(8)
        assert f"[ccrl] replay: 9,999 transitions, {380_000 / 2**20:,.0f} MiB in {where}\n" in capsys.readouterr().out
    mapped.save(tmp_path / "a.pt")
    again = SAC.load(tmp_path / "a.pt")
    for agent in (plain, mapped, again):
        agent.learn(8)
        assert agent.num_timesteps == 16
    for x, y, z in zip(*(a.policy.parameters() for a in (plain, mapped, again))):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


def test_a_memory_smaller_than_one_collection_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer_size: expected at least the 16 rows of one collection, got 8"):
        SAC("Pendulum-v1", num_envs=2, n_steps=8, buffer_size=8, hidden=(4,), compile="off")
    # a row may end in any of the 3 steps that it spans
    with pytest.raises(ValueError, match="buffer_size: expected at least the 6 rows of one collection, got 5"):
        SAC("Pendulum-v1", num_envs=2, n_step_returns=3, buffer_size=5, hidden=(4,), compile="off")


@pytest.mark.parametrize(
    ("agent", "given", "wanted"),
    [(SAC, MLPPolicy, "ActorQ"), (TD3, ActorQ, "DeterministicActorQ"), (CrossQ, ActorQ, "CrossQPolicy"),
     (OffPolicyMDPO, ActorQ, "OffPolicyMDPOPolicy"), (DQN, MLPPolicy, "QuantilePolicy")],
)  # fmt: skip
def test_policies_without_the_networks_that_are_trained_are_refused(agent: Any, given: Any, wanted: str) -> None:
    env = SpacesEnv(BOX, spaces.Discrete(2) if agent is DQN else BOX)
    with pytest.raises(
        ValueError, match=rf"policy: {agent.name} trains the networks of {wanted}.* got {given.__name__}"
    ):
        agent(env, num_envs=2, policy=given)
