"""Flow PPO: chains of denoising steps as actions, their ratios, the clone before, the contract of agents."""

from functools import partial

import gymnasium
import numpy as np
import pytest
import torch

import envs  # noqa: F401  (registers ids)
from agents import FlowPPO
from agents.flow.flow_ppo import FlowPPOConfig, transitions
from ccrl.collect import Request
from ccrl.data import Batching
from ccrl.estimators import aggregates, ratios
from ccrl.estimators.terms import Term
from ccrl.offline import from_arrays
from ccrl.policies import MLPPolicy
from ccrl.policies.flow_actor import FlowActor
from ccrl.testing import AgentContract

SMALL = {"num_envs": 2, "n_steps": 15, "hidden": (8,), "critic_hidden": (8,), "batch_size": 8, "n_epochs": 2,
         "denoising_steps": 3, "critic_warmup": 1, "compile": "off"}  # fmt: skip
SPACES = gymnasium.spaces.Box(-1, 1, (3,)), gymnasium.spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 4.0]))


class TestContract(AgentContract):
    agent = FlowPPO
    config = FlowPPOConfig(**SMALL)
    env_id = "Pendulum-v1"
    single_env = partial(gymnasium.make, "Pendulum-v1")


def made(**settings):
    return FlowPPO("Pendulum-v1", seed=0, **(SMALL | settings))


class TestActor:
    def test_actions_and_bounds(self):
        policy = FlowActor(*SPACES, steps=4)
        out = policy.act(torch.zeros(5, 3), policy.draw_noise(5, None, torch.device("cpu")))
        assert out["chain"].shape == (5, 5, 2)
        assert torch.equal(out["chain"][:, -1], out["action"])
        ends = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [9.0, -9.0]])
        expected = torch.tensor([[-1.0, 0.0], [1.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
        torch.testing.assert_close(policy.to_env(ends), expected)
        torch.testing.assert_close(policy.unit_action(expected[:3]), ends[:3])
        with pytest.raises(ValueError, match="noise in every step"):
            FlowActor(*SPACES, solver="ddim", noise=1.0)

    def test_scores_of_what_was_done(self):
        """At unchanged parameters every transition has the log-probability that was stored: all ratios are 1."""
        agent = made()
        data = agent.collector.collect(Request(steps=15), agent.policy)
        data = agent.estimator.prepare({"on": data}, agent.ctx)["on"]
        (batch,) = data.epoch(Batching(size="full"), None)
        out = agent.policy.evaluate(batch, frozenset({"step_log_prob", "log_prob"}))
        level = transitions(out, batch)
        assert level.log_prob.shape == (3, 30)
        torch.testing.assert_close(level.ratio, torch.ones(3, 30), rtol=0, atol=1e-4)
        torch.testing.assert_close(out["log_prob"], batch["log_prob"], rtol=0, atol=1e-3)

    def test_on_policy_gradient_is_that_of_whole_chains(self):
        """Without a discount over denoising: the mean over K transitions is 1 / K of the chain's policy gradient."""
        agent = made(denoising_discount=1.0, clip_range=0.5)
        data = agent.collector.collect(Request(steps=15), agent.policy)
        data = agent.estimator.prepare({"on": data}, agent.ctx)["on"]
        (batch,) = data.epoch(Batching(size="full"), None)
        phase = agent.estimator.phases()[0]
        found = phase.updater.gradient(phase.terms, batch).mean.clone()
        spread = batch["advantage"] - batch["advantage"].mean()
        batch = batch.derive(spread=spread / (batch["advantage"].std() + 1e-8))
        chain = Term("chain", lambda level, a, out, b: -a * level.ratio, aggregates.mean, ratios.plain,
                     advantage="spread")  # fmt: skip
        expected = phase.updater.gradient((chain,), batch).mean / 3.0
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


class TestTraining:
    def test_the_critic_learns_alone_first(self):
        agent = made(critic_warmup=1)
        actor = [p.detach().clone() for p in agent.policy.actor.parameters()]
        critic = [p.detach().clone() for p in agent.policy.critic.parameters()]
        agent.learn(30)
        assert all(torch.equal(p, q) for p, q in zip(actor, agent.policy.actor.parameters()))
        assert not all(torch.equal(p, q) for p, q in zip(critic, agent.policy.critic.parameters()))
        agent.learn(30)
        assert not all(torch.equal(p, q) for p, q in zip(actor, agent.policy.actor.parameters()))

    def test_a_clone_has_both_actions_of_the_data(self, tmp_path):
        """Two actions in every state, -1 and 1.5 of [-2, 2]: samples are near one or the other, and the mean of the
        data, 0.25, is rare. Cloning happens once, from a file too."""
        rng = np.random.default_rng(0)
        rows = 512
        obs = rng.uniform(-1, 1, (rows, 3)).astype(np.float32)
        action = np.where(rng.random((rows, 1)) < 0.5, -1.0, 1.5).astype(np.float32)
        columns = {"obs": obs, "next_obs": obs, "action": action, "reward": obs[:, 0], "terminated": obs[:, 0] > 2}
        np.savez(tmp_path / "a.npz", **columns)
        agent = made(hidden=(64, 64), clone_from=str(tmp_path / "a.npz"), clone_steps=1000, clone_batch=128,
                     clone_learning_rate=4e-3,
                     denoising_steps=8, noise_level=0.3)  # fmt: skip
        agent.learn(30)
        torch.manual_seed(0)
        found = torch.as_tensor(agent.predict(obs[:256])[0]).squeeze(1)
        near = ((found + 1.0).abs() < 0.5) | ((found - 1.5).abs() < 0.5)
        assert near.float().mean() > 0.8
        assert 0.25 < (found > 0.25).float().mean() < 0.75
        before = [p.detach().clone() for p in agent.policy.actor.parameters()]
        agent.before_learning()
        assert all(torch.equal(p, q) for p, q in zip(before, agent.policy.actor.parameters()))
        assert bool(agent.policy.fixed), "the data's statistics stay"

    def test_data_of_other_shapes_are_refused(self):
        obs = np.zeros((8, 5), np.float32)
        data = from_arrays({"obs": obs, "next_obs": obs, "action": obs[:, :1], "reward": obs[:, 0],
                            "terminated": obs[:, 0] > 0})  # fmt: skip
        with pytest.raises(ValueError, match=r"shapes \(3,\) and \(1,\)"):
            made().clone(data)


def test_settings_that_train_nothing_are_refused():
    for settings in ({"batch_size": 1}, {"batch_size": 29}):  # 30 steps: the last minibatch has one
        with pytest.raises(ValueError, match="at least 2 steps to standardise"):
            made(**settings)
    with pytest.raises(ValueError, match="vf_coef: expected > 0"):
        made(vf_coef=0.0)
    with pytest.raises(ValueError, match="clip_norm: it clips what is normalised"):
        made(normalise_obs=False, clip_norm=1.0)


def test_clip_norm_clips_observations_and_the_callers_policy_acts():
    class Mine(FlowActor):
        pass

    agent = FlowPPO("Pendulum-v1", clip_norm=0.5, policy=Mine, **SMALL)
    assert type(agent.policy) is Mine
    assert agent.policy.features(torch.full((1, 3), 9.0), "actor").tolist() == [[0.5, 0.5, 0.5]]
    with pytest.raises(ValueError, match="policy: expected a FlowActor"):
        FlowPPO("Pendulum-v1", policy=MLPPolicy, **SMALL)
