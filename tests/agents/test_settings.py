"""Settings of the on-policy agents: each reaches what it sets, and the defaults are the papers'."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import agents
from agents import BPO, MDPO, PPO, get_agent, get_method
from agents.bpo import BPOConfig
from agents.mdpo import MDPOConfig
from agents.ppo import PPOConfig
from ccrl.policies import SQUASHED
from ccrl.testing import ClockEnv, Episode, prepare_rollout

AGENTS = pytest.mark.parametrize("cls", [PPO, MDPO, BPO])


def make(cls: type[Any], env: Any = "Pendulum-v1", **options: Any) -> Any:
    return cls(env, cls.Config(**({"num_envs": 2, "n_steps": 8, "hidden": (8,), "compile": "off"} | options)))


# -- defaults ---------------------------------------------------------------------------------------------------------


def defaults(config: type[Any], names: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(config(), name) for name in names}


def test_ppo_has_sb3s_defaults() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    theirs = {k: p.default for k, p in inspect.signature(sb3.PPO.__init__).parameters.items()}
    same = ("learning_rate", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range", "clip_range_vf", "ent_coef",
            "vf_coef", "max_grad_norm", "target_kl")  # fmt: skip
    assert defaults(PPOConfig, dict.fromkeys(same)) == {name: theirs[name] for name in same}
    c = PPOConfig()
    assert c.num_envs * c.n_steps == theirs["n_steps"]
    assert (c.normalise_advantage, c.hidden, c.activation, c.adam_eps) == ("minibatch", (64, 64), "tanh", 1e-5)


def test_mdpo_has_the_papers_defaults() -> None:
    """Its on-policy runs in the "loaded" setting, with the released code's learning rate (docs/mdpo.md)."""
    table = {
        "hidden": (64, 64), "activation": "tanh", "orthogonal": True, "inner_steps": 10, "learning_rate": 3e-4,
        "adam_eps": 1e-5, "gamma": 0.99, "gae_lambda": 0.95, "critic_epochs": 5, "critic_batch_size": 128,
        "clip_range_vf": 0.2, "max_grad_norm": 0.5, "normalise_obs": True, "normalise_reward": True, "clip_norm": 10.0,
        "anneal_lr": False, "time_limit": "bootstrap",
    }  # fmt: skip
    assert defaults(MDPOConfig, table) == table
    assert MDPOConfig().num_envs * MDPOConfig().n_steps == 2048


def test_bpo_has_the_papers_defaults() -> None:
    """The released sweep's common MuJoCo settings; bounds, environments and steps are Hopper's, batch and step size
    Ant's."""
    table = {
        "hidden": (256, 256), "median_hidden": (256, 256), "activation": "relu", "orthogonal": True,
        "log_std_init": 0.0,
        "normalise_obs": False, "normalise_reward": False, "gae_lambda": 0.95, "gamma": 0.99, "temperature": 1e-3,
        "vf_coef": 0.5, "u_coef": 0.5, "ent_coef": 0.0, "max_grad_norm": 1.0, "median_temperature": None,
        "use_median": True, "advantage": "online", "recompute_returns": False, "anneal_eps": False, "anneal_lr": False,
        "num_envs": 4, "n_steps": 512, "batch_size": 256, "n_epochs": 10, "learning_rate": 1e-4, "eps_low": 0.25,
        "eps_high": 0.25,
    }  # fmt: skip
    assert defaults(BPOConfig, table) == table


# -- networks and optimisers ------------------------------------------------------------------------------------------


@AGENTS
def test_settings_reach_the_networks(cls: type[Any]) -> None:
    agent = make(
        cls, hidden=(7, 5), activation="elu", log_std_init=-1.5, squash=True, normalise_obs=True, clip_norm=3.0
    )
    for net in (agent.policy.actor.net, agent.policy.critic.trunk):
        assert [m.out_features for m in net if isinstance(m, nn.Linear)][:2] == [7, 5]
        assert {type(m) for m in net} == {nn.Linear, nn.ELU}
    assert agent.policy.actor.log_std.tolist() == [-1.5]
    assert agent.policy.distribution is SQUASHED
    assert agent.policy.norm["obs"].clip == 3.0


@AGENTS
def test_orthogonal_initialisation_can_be_left_out(cls: type[Any]) -> None:
    """PyTorch's own: biases are not zero, the last layer of the actor not small."""
    last = [make(cls, orthogonal=on).policy.actor.net[-1] for on in (True, False)]
    assert last[0].bias.eq(0).all()
    assert last[0].weight.abs().max() <= 0.01
    assert last[1].bias.ne(0).any()
    assert last[1].weight.abs().max() > 0.1


@AGENTS
def test_settings_reach_the_optimisers(cls: type[Any]) -> None:
    agent = make(cls, learning_rate=7e-4, adam_eps=1e-3, max_grad_norm=0.123)
    for updater in agent.updaters.values():
        assert (float(updater.lr), updater.eps, updater.max_grad_norm) == (7e-4, 1e-3, 0.123)


@AGENTS
@pytest.mark.parametrize("anneal", [False, True])
def test_every_learning_rate_falls_or_none(cls: type[Any], anneal: bool) -> None:
    agent = make(cls, "CartPole-v1", learning_rate=1e-3, anneal_lr=anneal)
    seen: list[list[float]] = []
    agent.learn(until=4 * 16, callback=lambda a: seen.append([float(u.lr) for u in a.updaters.values()]))
    expected = [1e-3, 7.5e-4, 5e-4, 2.5e-4] if anneal else [1e-3] * 4
    assert seen == [pytest.approx([rate] * len(agent.updaters)) for rate in expected]
    agent.learner.iterate()  # past the plan: no negative rate
    assert all(float(u.lr) == (0.0 if anneal else 1e-3) for u in agent.updaters.values())


# -- from rewards to advantages ---------------------------------------------------------------------------------------


def clock() -> ClockEnv:
    return ClockEnv([[Episode(0, 3)], [Episode(10, 2, "truncate")]], reward=2.0)


def raw_options(cls: type[Any]) -> dict[str, Any]:
    return {"normalise_obs": False, "normalise_reward": False} | ({"normalise_advantage": "none"} if cls is PPO else {})


@AGENTS
@pytest.mark.parametrize("time_limit", ["bootstrap", "terminal"])
def test_gamma_lambda_and_time_limits(cls: type[Any], time_limit: str) -> None:
    agent = make(cls, clock(), n_steps=6, gamma=0.9, gae_lambda=0.5, time_limit=time_limit, **raw_options(cls))
    data = prepare_rollout(agent)
    returns, value, after = ([float(x) for x in data[k][:2, 1]] for k in ("return", "value", "next_value"))
    last = 2.0 + (0.9 * after[1] if time_limit == "bootstrap" else 0.0) - value[1]
    first = 2.0 + 0.9 * after[0] - value[0] + 0.45 * last
    assert returns == pytest.approx([first + value[0], last + value[1]], abs=1e-5)


@AGENTS
def test_scaled_rewards_reach_the_returns(cls: type[Any]) -> None:
    """gamma 0 makes the return the reward itself: constant rewards of 2 have no spread, so all are clipped."""
    agent = make(cls, clock(), gamma=0.0, clip_norm=3.0, **raw_options(cls) | {"normalise_reward": True})
    data = prepare_rollout(agent)
    assert data["return"].allclose(torch.tensor(3.0), atol=1e-5)
    assert data["reward"].eq(2.0).all(), "the facts stay"
    assert agent.estimator.reward_norm.gamma == 0.0
    off = prepare_rollout(make(cls, clock(), gamma=0.0, **raw_options(cls)))
    assert off["return"].allclose(torch.tensor(2.0), atol=1e-5)


ONE_ROW = [
    # one step, alone or in each minibatch
    (PPO, {"num_envs": 1, "n_steps": 1}, "normalise_advantage='minibatch': .* got a rollout of 1"),
    (PPO, {"num_envs": 2, "n_steps": 16, "batch_size": 1}, "got minibatches of 1"),
    # 33 = 2 * 16 + 1: the last minibatch of every epoch
    (PPO, {"num_envs": 3, "n_steps": 11, "batch_size": 16}, r"a last minibatch of 1 \(3 \* 11 = 33 steps .* of 16\)"),
    (PPO, {"num_envs": 1, "n_steps": 1, "normalise_advantage": "batch"}, "normalise_advantage='batch'"),
    (PPO, {"num_envs": 3, "n_steps": 1, "batch_size": 2, "recurrent": "gru"}, "a last minibatch of 1"),
    (MDPO, {"num_envs": 1, "n_steps": 1}, "MDPO: expected at least 2 steps"),
    (BPO, {"num_envs": 1, "n_steps": 1, "advantage": "stored"}, "advantage='stored': expected at least 2 steps"),
]


@pytest.mark.parametrize(("cls", "options", "message"), ONE_ROW)
def test_one_row_has_no_standardised_advantage(cls: type[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls.Config(**options)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (PPO, {"num_envs": 3, "n_steps": 11, "batch_size": 31}),  # 33 = 31 + 2
        (PPO, {"num_envs": 3, "n_steps": 11, "batch_size": 64}),
        (PPO, {"num_envs": 2, "n_steps": 16, "batch_size": 1, "normalise_advantage": "batch"}),
        (PPO, {"num_envs": 1, "n_steps": 1, "normalise_advantage": "none"}),
        (PPO, {"num_envs": 3, "n_steps": 11, "batch_size": 16, "recurrent": "gru"}),  # 2 columns, then 1: 11 steps
        (BPO, {"num_envs": 1, "n_steps": 1}),
    ],
)
def test_sizes_that_learn_are_accepted(cls: type[Any], options: dict[str, Any]) -> None:
    agent = make(cls, **options)
    before = torch.cat([p.detach().flatten().clone() for p in agent.policy.actor.parameters()])
    agent.learn(agent.samples_per_iteration)
    assert not torch.equal(torch.cat([p.detach().flatten() for p in agent.policy.actor.parameters()]), before)


@pytest.mark.parametrize("name", ["ppo", "sac", "dqn", "grouped"])
def test_a_clip_of_nothing_is_refused(name: str) -> None:
    """``clip_norm`` clips what normalisers give, and there is none."""
    config = get_agent(name).Config
    with pytest.raises(ValueError, match=r"clip_norm: it clips .*; expected the default 10.0, got 5.0"):
        config(clip_norm=5.0)
    assert config(clip_norm=5.0, normalise_obs=True).clip_norm == 5.0


def test_what_users_of_other_libraries_write() -> None:
    with pytest.raises(TypeError, match="got str; the environment comes first, a policy is the keyword policy"):
        PPO("MlpPolicy", "CartPole-v1")
    assert agents.GRPO is get_method("grpo")
    with pytest.raises(ValueError, match="got Batching without name, Config, learn"):
        get_agent("ccrl.data:Batching")
    with pytest.raises(TypeError, match="Nameless: expected a class attribute `name`, and build to return a learner"):
        type("Nameless", (PPO,), {"build": lambda self: None})("CartPole-v1")
    with pytest.raises(TypeError, match=r"env_kwargs\['reward'\]: .* write 'module:function'"):
        agents.GRPO("jsonl", env_kwargs={"path": "x.jsonl", "reward": len})
