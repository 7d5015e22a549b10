"""PPO against Stable-Baselines3 on one identical minibatch: losses, diagnostics, gradient, Adam's step."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from agents import PPO
from agents.ppo import PPOConfig, PPOEstimator
from ccrl.data import Batching
from ccrl.estimators.base import run_phases
from ccrl.testing import ClockEnv, Episode, prepare_rollout
from ccrl.updaters import ModuleUpdater

LAYERS = {
    "actor.net.0": "mlp_extractor.policy_net.0", "actor.net.2": "mlp_extractor.policy_net.2",
    "actor.net.4": "action_net", "critic.trunk.0": "mlp_extractor.value_net.0",
    "critic.trunk.2": "mlp_extractor.value_net.2", "critic.value.0": "value_net",
}  # fmt: skip


def _theirs(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    return "log_std" if name == "actor.log_std" else f"{LAYERS[layer]}.{kind}"


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize(("max_grad_norm", "clip_range"), [(0.5, 0.2), (1e6, 0.1)])
def test_one_update_equals_sb3s(env: str, max_grad_norm: float, clip_range: float) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    logger = pytest.importorskip("stable_baselines3.common.logger")
    steps, copies = 24, 2
    config = PPOConfig(num_envs=copies, n_steps=steps, batch_size=steps * copies, n_epochs=1, ent_coef=0.01,
                       learning_rate=1e-2, max_grad_norm=max_grad_norm, clip_range=clip_range,
                       compile="off")  # fmt: skip
    ours = PPO(env, config, seed=0)
    data = prepare_rollout(ours)
    generator = torch.Generator().manual_seed(2)
    flat = ours.updaters["policy"].flat
    flat.add_(
        (0.15 if env == "CartPole-v1" else 0.03) * torch.randn(flat.shape, generator=generator)
    )  # ratios away from 1, some of them clipped

    theirs = sb3.PPO("MlpPolicy", env, n_steps=steps * copies, batch_size=steps * copies, n_epochs=1, ent_coef=0.01,
                     learning_rate=1e-2, max_grad_norm=max_grad_norm, clip_range=clip_range, device="cpu",
                     seed=0)  # fmt: skip
    theirs.set_logger(logger.Logger(None, []))
    named = dict(theirs.policy.named_parameters())
    with torch.no_grad():
        for name, value in ours.policy.named_parameters():
            named[_theirs(name)].copy_(value)
    buffer = theirs.rollout_buffer
    for column in ("obs", "action", "log_prob", "value", "advantage", "return"):
        target = getattr(buffer, {"obs": "observations"}.get(column, column + "s"))
        target[:] = data[column].reshape(target.shape).numpy()
    buffer.full = True
    theirs._current_progress_remaining = 1.0
    theirs.train()
    logged: dict[str, Any] = theirs.logger.name_to_value

    (phase,) = ours.estimator.phases()
    before = phase.updater.measure(phase.terms, data.whole(phase.batching))
    assert 0.02 < before["clip_fraction"] < 0.98
    stats, _ = run_phases(ours.estimator, {"on": data}, ours.ctx)
    for key in ("policy_gradient_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction", "loss"):
        # SB3 logs both before the step, we after it
        found = before[key] if key in before else stats[key]
        np.testing.assert_allclose(float(found), logged[f"train/{key}"], rtol=1e-5, atol=1e-5, err_msg=key)
    with torch.no_grad():
        actions = data["action"].flatten(0, 1)
        _, log_prob, _ = theirs.policy.evaluate_actions(data["obs"].flatten(0, 1), actions)
        rho = (log_prob - data["log_prob"].flatten()).exp()
        after = {"approx_kl": rho - 1.0 - rho.log(), "clip_fraction": ((rho - 1.0).abs() > clip_range).float()}
    for key, value in after.items():
        assert abs(float(value.mean()) - float(before[key])) > 1e-4
        np.testing.assert_allclose(float(stats[key]), float(value.mean()), rtol=1e-4, atol=1e-6, err_msg=key)
    for name, value in ours.policy.named_parameters():
        torch.testing.assert_close(value.detach(), named[_theirs(name)].detach(), rtol=1e-5, atol=1e-5, msg=name)
    # the first step of Adam hardly sees the size of a gradient, its moments do: 0.1 times the clipped one
    updater = ours.updaters["policy"]
    moments = torch.cat([theirs.policy.optimizer.state[named[_theirs(n)]]["exp_avg"].flatten() for n in updater.names])
    assert moments.abs().max() > 1e-3
    torch.testing.assert_close(updater.exp_avg, moments, rtol=1e-5, atol=1e-6)


def test_an_update_ends_at_the_target_kl() -> None:
    def updates(target: float | None) -> int:
        config = PPOConfig(
            num_envs=2, n_steps=32, batch_size=16, n_epochs=5, learning_rate=1e-2, target_kl=target, compile="off"
        )
        agent = PPO("CartPole-v1", config)
        agent.learn(until=1)
        return int(agent.updaters["policy"].t)

    assert updates(None) == 20
    assert updates(1e9) == 20
    assert 1 < updates(1e-3) < 20


def test_the_limit_is_one_and_a_half_times_the_target() -> None:
    agent = PPO("CartPole-v1", PPOConfig(num_envs=2, n_steps=8, target_kl=0.02, compile="off"))
    stop = agent.estimator.phases()[0].stop
    assert stop is not None
    assert [stop({"approx_kl": torch.tensor(kl)}, agent.ctx) for kl in (0.021, 0.0299, 0.0301)] == [False, False, True]


@pytest.mark.parametrize("mode", ["minibatch", "batch", "none"])
def test_where_advantages_are_standardised(mode: str) -> None:
    """The gradient at the old policy shows which advantages the loss used; "batch" and "minibatch" differ on a part."""
    config = PPOConfig(num_envs=2, n_steps=24, normalise_advantage=mode, compile="off")
    agent = PPO("Pendulum-v1", config)
    data = prepare_rollout(agent)
    raw = data["return"] - data["value"]
    whole = (raw - raw.mean()) / (raw.std() + 1e-8)  # unbiased, as SB3's
    torch.testing.assert_close(data["advantage"], whole if mode == "batch" else raw, rtol=1e-4, atol=1e-5)
    phase = agent.estimator.phases()[0]
    batch = data.epoch(Batching(size=16), torch.Generator().manual_seed(0))[0]
    used = batch["return"] - batch["value"]
    if mode == "minibatch":
        used = (used - used.mean()) / (used.std() + 1e-8)
    elif mode == "batch":
        used = (used - raw.mean()) / (raw.std() + 1e-8)
    got = phase.updater.gradient(phase.terms[:1], batch).mean
    log_prob = agent.policy.evaluate(batch, frozenset({"log_prob"}))["log_prob"]
    parameters = list(agent.policy.actor.parameters())
    expected = torch.autograd.grad(-(used * log_prob).mean(), parameters)
    torch.testing.assert_close(
        got[: sum(p.numel() for p in parameters)], torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-5
    )


def test_value_clipping_reaches_the_loss() -> None:
    """The larger of both errors (CleanRL's; SB3 takes the clipped one alone)."""
    agent = PPO("Pendulum-v1", PPOConfig(num_envs=2, n_steps=24, clip_range_vf=0.05, compile="off"))
    data = prepare_rollout(agent)
    with torch.no_grad():
        agent.policy.critic.get_parameter("value.0.bias").sub_(0.3)  # towards the returns, which are negative
    batch = data.epoch(Batching(size="full"), None)[0]
    phase = agent.estimator.phases()[0]
    got = phase.updater.gradient(phase.terms, batch).stats["value_loss"]
    old, target = batch["value"], batch["return"]
    plain, clipped = (old - 0.3 - target).square(), (old - 0.05 - target).square()
    assert float(clipped.mean()) > float(plain.mean()) + 0.1
    torch.testing.assert_close(got, torch.maximum(plain, clipped).mean(), rtol=1e-4, atol=1e-4)


def test_learning_rate_falls_linearly() -> None:
    config = PPOConfig(num_envs=2, n_steps=8, n_epochs=1, learning_rate=1e-3, anneal_lr=True, compile="off")
    seen: list[float] = []
    agent = PPO("CartPole-v1", config)
    agent.learn(until=4 * 16, callback=lambda a: seen.append(float(a.scalars["train/learning_rate"])))
    assert seen == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_recomputed_advantages_follow_the_critic() -> None:
    def advantages(recompute: bool) -> list[torch.Tensor]:
        config = PPOConfig(num_envs=2, n_steps=16, batch_size=32, n_epochs=3, learning_rate=1e-2,
                           recompute_advantages=recompute, compile="off")  # fmt: skip
        agent = PPO(ClockEnv([[Episode(0, 5)], [Episode(3, 4, "truncate")]]), config)
        seen: list[torch.Tensor] = []
        original = agent.updaters["policy"].run

        def run(terms: Any, batches: Any) -> Any:
            seen.append(batches[0]["advantage"].sort().values.clone())
            return original(terms, batches)

        agent.updaters["policy"].run = run  # type: ignore[method-assign]
        agent.learn(until=1)
        return seen

    fixed, moving = advantages(False), advantages(True)
    assert torch.equal(fixed[0], fixed[2])
    assert torch.equal(fixed[0], moving[0])
    assert not torch.allclose(moving[0], moving[1], atol=1e-3)
    assert not torch.allclose(moving[1], moving[2], atol=1e-3)


def test_any_updater_trains_it() -> None:
    """Adam of torch on the module's own parameters: the same run up to rounding, and it resumes."""

    class Plain(PPO):
        name = "plain_ppo"

        def build(self) -> Any:
            c, policy = self.config, self.make_policy({"value": ()})
            adam = partial(torch.optim.Adam, lr=c.learning_rate, eps=c.adam_eps)
            updaters: dict[str, Any] = {"both": ModuleUpdater(policy, adam, max_grad_norm=c.max_grad_norm)}
            return self.rollouts(policy, PPOEstimator(c, policy, {"policy": updaters["both"]}), updaters)

    config = PPOConfig(num_envs=2, n_steps=16, hidden=(8,), batch_size=8, n_epochs=2, compile="off", anneal_lr=True)
    ours, theirs = PPO("CartPole-v1", config, seed=3), Plain("CartPole-v1", config, seed=3)
    ours.learn(96)
    theirs.learn(96)
    for name, value in ours.policy.named_parameters():
        torch.testing.assert_close(theirs.policy.get_parameter(name), value, rtol=1e-4, atol=1e-6, msg=name)
    again = Plain("CartPole-v1", config, seed=4)
    again.load_state_dict(theirs.state_dict())
    for a, b in zip(again.policy.parameters(), theirs.policy.parameters()):
        assert torch.equal(a, b)
