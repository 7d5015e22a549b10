"""PPO as it is trained on robots: step sizes that follow the KL, numbers of minibatches, deviations as they are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from agents import PPO
from agents.ppo import PPOConfig
from ccrl.experiment.config import from_dict, load_yaml
from ccrl.settings import ConfigError
from ccrl.testing import prepare_rollout
from ccrl.updaters import AdaptiveRate, GradientEstimate

TINY = {"num_envs": 4, "n_steps": 8, "hidden": (8,), "n_minibatches": 2, "n_epochs": 2}


def test_the_rule_by_hand():
    """Desired 0.01: above 0.02 slower, below 0.005 faster, 0 and what is between as it was."""
    lr = torch.tensor(1e-3, dtype=torch.float64)
    rule = AdaptiveRate(lr, 0.01)

    def after(kl):
        rule(GradientEstimate(torch.zeros(1), {"kl": torch.tensor(kl)}))
        return float(lr)

    assert after(0.0) == 1e-3
    assert after(0.01) == 1e-3
    assert after(0.021) == pytest.approx(1e-3 / 1.5)
    assert after(0.019) == pytest.approx(1e-3 / 1.5)
    assert after(0.004) == pytest.approx(1e-3)
    for _ in range(30):
        after(0.001)
    assert float(lr) == 1e-2  # 1e-3 * 1.5^30 without the bound
    for _ in range(60):
        after(1.0)
    assert float(lr) == 1e-5


def test_the_kl_is_of_the_acting_policy_from_the_new_one():
    """Mean moved by 0.3, deviation from 1 to 0.8: KL(N(0, 1) || N(0.3, 0.64)) = log 0.8 + (1 + 0.09) / 1.28 - 0.5
    = -0.2231436 + 0.8515625 - 0.5 = 0.1284189 (the other direction has 0.0881436)."""
    agent = PPO("Pendulum-v1", desired_kl=0.01, normalise_advantage="none", seed=0, **TINY)
    data = prepare_rollout(agent)
    with torch.no_grad():
        agent.policy.actor.net[-1].bias += 0.3
        agent.policy.actor.log_std += math.log(0.8)
    (phase,) = agent.estimator.phases()
    stats = phase.updater.measure(phase.terms, data.whole(phase.batching))
    assert float(stats["kl"]) == pytest.approx(0.1284189, rel=1e-5)


def test_every_step_has_the_step_size_of_its_own_minibatch():
    """The rule speaks before the step: Adam's first step is as long as the step size, here divided by 1.5."""
    agent = PPO("Pendulum-v1", desired_kl=1e-6, learning_rate=3e-3, normalise_advantage="none", adam_eps=1e-12, seed=0,
                **TINY)  # fmt: skip
    data = prepare_rollout(agent)
    with torch.no_grad():
        agent.policy.actor.log_std += 0.1  # a KL far above what is desired
    (phase,) = agent.estimator.phases()
    before = agent.updaters["policy"].flat.clone()
    phase.updater.step(phase.terms, data.whole(phase.batching))
    moved = (agent.updaters["policy"].flat - before).abs().max()
    assert float(moved) == pytest.approx(2e-3, rel=1e-4)


def test_the_step_size_is_logged_and_resumed(tmp_path):
    agent = PPO("Pendulum-v1", desired_kl=0.01, learning_rate=1e-4, seed=0, **TINY)
    agent.learn(96)
    rate = float(agent.scalars["train/learning_rate"])
    assert rate > 1e-4  # steps this small stay far below the desired KL
    assert not agent.updaters["policy"].compile
    agent.save(tmp_path / "a.pt")
    again = PPO.load(tmp_path / "a.pt")
    assert float(again.updaters["policy"].lr) == rate
    for each in (agent, again):
        each.learn(64)
    assert torch.equal(agent.updaters["policy"].flat, again.updaters["policy"].flat)


def test_minibatches_by_number():
    agent = PPO("Pendulum-v1", seed=0, **(TINY | {"n_minibatches": 4}))
    (phase,) = agent.estimator.phases()
    assert phase.batching.size == 8
    agent.learn(32)
    assert agent.n_updates == 8
    recurrent = PPO("Pendulum-v1", recurrent="gru", seed=0, **(TINY | {"n_minibatches": 4}))
    (phase,) = recurrent.estimator.phases()
    assert (phase.batching.unit, phase.batching.size) == ("sequence", 1)


@pytest.mark.parametrize(("settings", "message"), [
    ({"n_minibatches": 4, "batch_size": 32}, "batch_size: n_minibatches says"),
    ({"num_envs": 4, "n_steps": 8, "n_minibatches": 5}, r"a divisor of num_envs \* n_steps = 32, got 5"),
    ({"num_envs": 4, "n_steps": 8, "n_minibatches": 8, "recurrent": "gru"}, "whole columns"),
    ({"desired_kl": 0.01, "anneal_lr": True}, "anneal_lr=True"),
    ({"desired_kl": 0.01, "compile": "on"}, "uncompiled"),
    ({"desired_kl": 0.01, "learning_rate": 1e-6}, "learning_rate: .* between 1e-5 and 1e-2, got 1e-06"),
    ({"num_envs": 4, "n_steps": 8, "n_minibatches": 32}, "minibatches of 1"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)
    with pytest.raises(ConfigError, match="desired_kl"):
        PPOConfig(desired_kl=0.0)


def test_deviations_as_parameters_of_their_own():
    """The same densities as with logarithms, another gradient: d/d std = d/d log std / std. Past 0 it is its absolute
    value."""
    log, raw = (
        PPO("Pendulum-v1", std_parameter=kind, log_std_init=math.log(0.5), seed=0, **TINY) for kind in ("log", "raw")
    )
    obs = torch.tensor([[1.0, 0.0, 0.5]])
    assert raw.policy.actor.std.tolist() == [0.5]
    for name, value in log.policy.params(obs).items():
        torch.testing.assert_close(raw.policy.params(obs)[name], value)
    for agent in (log, raw):
        agent.policy.params(obs)["log_std"].sum().backward()
    assert raw.policy.actor.std.grad.tolist() == [2.0]  # 1 / 0.5
    assert log.policy.actor.log_std.grad.tolist() == [1.0]
    with torch.no_grad():
        raw.policy.actor.std.fill_(-0.25)
    torch.testing.assert_close(raw.policy.params(obs)["log_std"], torch.tensor([[math.log(0.25)]]))
    raw.learn(32)
    assert float(raw.scalars["train/std"]) == pytest.approx(0.25, rel=0.05)


def test_deviations_that_are_no_parameters_cannot_be_raw():
    for settings in ({"state_dependent_std": True}, {}):
        env = "Pendulum-v1" if settings else "CartPole-v1"
        with pytest.raises(ValueError, match="std_parameter='raw'"):
            PPO(env, std_parameter="raw", **settings, **TINY)


FOLDER = Path(__file__).parents[2] / "agents" / "settings" / "ppo"
ROBOTS = [path for path in sorted(FOLDER.glob("*.yaml")) if path.stem.startswith(("isaac-", "mjlab-"))]


@pytest.mark.parametrize("path", ROBOTS, ids=lambda path: path.stem)
def test_settings_of_robot_tasks_are_valid_and_whole_iterations(path):
    values = load_yaml(path)
    config = from_dict(PPOConfig, values["agent"])
    assert (config.desired_kl, config.n_minibatches, config.minibatch) == (0.01, 4, 1024 * config.n_steps)
    assert values["total_timesteps"] % (config.num_envs * config.n_steps) == 0
    assert values["env"].partition(":")[2].lower() == path.stem
