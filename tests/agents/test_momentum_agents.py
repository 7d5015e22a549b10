"""N-PG-IGT and HARPG as agents: limits, invariance, where they sample, exact resume, the contract."""

from __future__ import annotations

import math
from functools import partial

import gymnasium
import pytest
import torch

from agents.harpg import HARPG, HARPGConfig, HARPGEstimator
from agents.npg_igt import NPGIGT, NPGIGTConfig, NPGIGTEstimator
from ccrl.data import Data
from ccrl.estimators.scores import Scores
from ccrl.estimators.trajectory import LinearBaseline, TrajectoryEstimator
from ccrl.policies import GibbsPolicy, OneHot
from ccrl.testing import AgentContract
from envs.classic import RandomMDP

F64 = torch.float64


def close(got, expected, atol=5e-7):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


# -- agents on a tabular task: limits, invariance, resume -------------------------------------------------------------


def on_tabular(cls):
    """The agent with a softmax table instead of a perceptron."""

    class Tabular(cls):
        def make_policy(self, heads):
            env = self.env
            return GibbsPolicy(env.single_observation_space, env.single_action_space, features=OneHot(5)).double()

    return Tabular


METHODS = [(NPGIGT, NPGIGTConfig, v) for v in NPGIGTEstimator.rules] + [
    (HARPG, HARPGConfig, v) for v in HARPGEstimator.rules
]
IDS = [v for *_, v in METHODS]
STEPS = 15


def make(cls, config, variant, seed=0, env_kwargs=None, **options):
    settings = {"num_envs": 2, "n_steps": STEPS, "gamma": 0.9, "learning_rate": 0.5} | options
    return on_tabular(cls)("ccrl/RandomMDP-v0", config(variant=variant, **settings), seed=seed, env_kwargs=env_kwargs)


def train(agent, iterations):
    until = agent.iteration + iterations
    agent.learn(until=10**9, callback=lambda a: a.iteration < until)
    return agent.updaters["policy"].flat.clone()


@pytest.mark.parametrize("agent", [NPGIGT, HARPG])
def test_no_compiler_is_announced_for_explicit_steps(agent, capsys):
    """However many steps: a direction has no surrogate to compile."""
    made = agent("ccrl/RandomMDP-v0", num_envs=2, n_steps=STEPS)
    made.learner.begin(0, 10**9)
    assert made.learner.compile == "auto"
    assert not made.updaters["policy"].compile
    assert capsys.readouterr().out == ""


def rewards(monkeypatch, change):
    """Every RandomMDP built from here on has changed rewards."""
    plain = RandomMDP.reward
    monkeypatch.setattr(RandomMDP, "reward", lambda self, s, a, e: change(plain(self, s, a, e)))


@pytest.mark.parametrize(("cls", "config", "variant"), METHODS, ids=IDS)
def test_no_rewards_no_move(cls, config, variant, monkeypatch):
    rewards(monkeypatch, lambda r: 0.0 * r)
    agent = make(cls, config, variant)
    before = agent.updaters["policy"].flat.clone()
    assert torch.equal(train(agent, 3), before)
    assert not agent.estimator.d.any()


@pytest.mark.parametrize(
    ("cls", "config", "variant"), [METHODS[0], METHODS[len(NPGIGTEstimator.rules)]], ids=["npg_igt", "nharpg"]
)
def test_without_momentum_both_are_normalised_gradient(cls, config, variant, monkeypatch):
    agent = make(cls, config, variant)
    monkeypatch.setattr(type(agent.estimator), "eta", lambda self, k: torch.ones_like(k))
    gradients, gradient = [], agent.estimator.gradient
    agent.estimator.gradient = lambda *args: gradients.append(gradient(*args)) or gradients[-1]
    for k in range(3):
        before = agent.updaters["policy"].flat.clone()
        after, g = train(agent, 1), gradients[-1].mean
        close(after, before + 0.5 * 2 / (k + 2) * g / g.norm(), 1e-12)


@pytest.mark.parametrize(("cls", "config", "variant"), METHODS, ids=IDS)
def test_a_bandit(cls, config, variant):
    """H = 1: a full turn on the best arm."""
    step = 1.0 if cls.Direction.rules[variant].normalised else 8.0
    agent = make(cls, config, variant, num_envs=64, n_steps=1, learning_rate=step, env_kwargs={"horizon": 1})
    start = agent.env.exact_return(agent.policy)
    train(agent, 30)
    assert agent.env.exact_return(agent.policy) > start + 0.05
    assert agent.num_timesteps == 64 * (30 + 29 * (cls is HARPG and variant != "storm"))


@pytest.mark.parametrize("variant", ["npg_igt", "nmpg", "nharpg", "pg"])
def test_scaled_rewards(variant, monkeypatch):
    """Normalised methods do not see the scale (a power of two: to the last bit); plain gradient does."""
    cls, config = (HARPG, HARPGConfig) if variant == "nharpg" else (NPGIGT, NPGIGTConfig)
    plain = train(make(cls, config, variant), 4)
    rewards(monkeypatch, lambda r: 8.0 * r)
    scaled = train(make(cls, config, variant), 4)
    assert torch.allclose(plain, scaled, rtol=0, atol=1e-12) == (variant != "pg")


# -- one iteration by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["nharpg", "storm"])
def test_the_third_direction_of_harpg_by_hand(variant):
    """Hessian products at the point of the line and along the whole move; importance weights for STORM."""
    agent = make(HARPG, HARPGConfig, variant)
    train(agent, 2)
    theta, prev, d = (x.clone() for x in (agent.updaters["policy"].flat, agent.estimator.prev, agent.estimator.d))
    seen, points, step = {}, {}, agent.learner.direction.step
    plan = agent.estimator.plan
    agent.estimator.plan = lambda at, have, ctx: (
        points.update({k: v.clone() for k, v in at.items()}) or plan(at, have, ctx)
    )

    def watched(now, gradient, have, ctx):
        seen.update(have, g=gradient("on").mean)
        return step(now, gradient, have, ctx)

    agent.learner.direction.step = watched
    after = train(agent, 1)
    g = seen["g"]
    if variant == "storm":
        eta = (2 / 4) ** (2 / 3)
        at_theta, at_prev = (Scores(agent.policy, x, seen["on"], "trajectory").log_prob(x) for x in (theta, prev))
        weight = (at_prev - at_theta).exp()
        old = Scores(agent.policy, prev, seen["on"]).vjp(seen["on"]["psi"] * weight / 2)
        expected = g + (1 - eta) * (d - old)
        close(after, theta + 0.5 * (2 / 4) ** (1 / 3) * expected, 1e-10)
    else:
        eta = 2 / 4
        product = Scores(agent.policy, points["line"], seen["line"], "trajectory")
        expected = (1 - eta) * (d + product.hvp(seen["line"]["psi"], theta - prev)) + eta * g
        close(after, theta + 0.5 * 2 / 4 * expected / expected.norm(), 1e-10)
    close(agent.estimator.d, expected, 1e-10)


def test_schedules_of_every_rule():
    """The schedules of docs/npg_igt.md and docs/harpg.md at t = 2, where c = 1/2: exponents of step and weight."""
    expected = {
        "npg_igt": (1, 4 / 5), "nmpg": (1, 2 / 3), "normalised": (1, None), "pg": (2 / 3, None),
        "nharpg": (1, 1), "harpg": (1 / 2, 1), "storm": (1 / 3, 2 / 3),
    }  # fmt: skip
    k = torch.tensor(2.0, dtype=F64)
    for cls, config, variant in METHODS:
        step, eta = expected[variant]
        momentum = {} if eta is None else {"momentum": 0.9}
        rule = cls.Direction(config(variant=variant, learning_rate=3.0, **momentum), torch.zeros(1))
        assert rule.step_size(k).item() == pytest.approx(3.0 * 0.5**step), variant
        assert rule.eta(k).item() == pytest.approx(1.0 if eta is None else 0.9 * 0.5**eta), variant


def test_the_settings_reach_the_estimates():
    agent = make(NPGIGT, NPGIGTConfig, "nmpg", discount_from_start=False, min_steps=7)
    assert (agent.estimator.discount_from_start, agent.estimator.min_steps, agent.estimator.gamma) == (False, 7, 0.9)
    train(agent, 3)
    assert float(agent.scalars["train/learning_rate"]) == pytest.approx(0.5 * 2 / 4)  # gamma_t of the last iteration


def test_defaults_are_those_of_the_released_code():
    """Step size, momentum and networks of its examples (docs/npg_igt.md)."""
    for c in (NPGIGTConfig(), HARPGConfig()):
        assert (c.gamma, c.learning_rate, c.momentum, c.baseline, c.hidden) == (0.99, 0.1, 1.0, "none", (32, 32))
    assert (NPGIGTConfig().variant, NPGIGTConfig().lookahead_eta, HARPGConfig().variant) == (
        "npg_igt", "current", "nharpg",
    )  # fmt: skip


# -- the machinery ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "config", "variant"), METHODS, ids=IDS)
def test_resume_is_exact(cls, config, variant, tmp_path):
    """d, the previous parameters, the schedule and every random number: six iterations are three and three."""
    straight = make(cls, config, variant)
    expected = train(straight, 6)
    first = make(cls, config, variant)
    train(first, 3)
    first.save(tmp_path / "a.pt")
    torch.manual_seed(99)
    second = on_tabular(cls).load(tmp_path / "a.pt")
    assert torch.equal(train(second, 3), expected)
    assert torch.equal(second.estimator.d, straight.estimator.d)
    assert second.num_timesteps == straight.num_timesteps


def test_the_look_ahead_samples_and_the_last_iterate_acts():
    """Episodes come from theta~ = theta + (1 - eta) / eta (theta - theta_prev); the policy itself stays at theta."""
    agent = make(NPGIGT, NPGIGTConfig, "npg_igt")
    train(agent, 2)
    theta, prev = agent.updaters["policy"].flat.clone(), agent.estimator.prev.clone()
    sampled = []
    collect = agent.collector.collect
    agent.collector.collect = lambda request, policy: (
        sampled.append((request.params.clone(), policy.theta.detach().flatten().clone())),
        collect(request, policy),
    )[1]
    train(agent, 1)
    eta = (2 / 4) ** 0.8
    close(sampled[0][0], theta + (1 - eta) / eta * (theta - prev), 1e-14)
    close(sampled[0][1], sampled[0][0], 0)
    close(agent.estimator.prev, theta, 0)


def test_the_line_point_lies_on_the_last_move():
    agent = make(HARPG, HARPGConfig, "nharpg")
    train(agent, 2)
    theta, prev = agent.updaters["policy"].flat.clone(), agent.estimator.prev.clone()
    points = agent.learner.direction.points(agent.updaters["policy"].flat, agent.ctx)
    share = (points["line"] - prev) / (theta - prev)
    moved = (theta - prev).abs() > 1e-6
    assert 0 < share[moved][0] < 1
    close(share[moved], share[moved][0].expand(int(moved.sum())), 1e-6)


def test_estimates_grow_to_min_steps():
    agent = make(NPGIGT, NPGIGTConfig, "nmpg", min_steps=3 * 2 * STEPS - 1)
    train(agent, 1)
    assert agent.num_timesteps == 3 * 2 * STEPS
    other = make(HARPG, HARPGConfig, "nharpg")
    assert other.samples_per_iteration == 2 * 2 * STEPS
    train(other, 2)
    # all of training's episodes are logged: of every round, and from both points of the second iteration
    assert (len(agent.learner.episodes), len(other.learner.episodes)) == (6, 2 + 4)


def test_linear_baseline_is_a_regression_on_the_iterations_before():
    """Exact on targets in its span; the rollouts it is fitted to do not see it."""
    baseline = LinearBaseline(lambda x: x, 1, ridge=1e-12)
    obs, t = torch.rand(6, 4, 1, dtype=F64), torch.arange(6).unsqueeze(-1).expand(6, 4)
    valid = torch.ones(6, 4)
    valid[4:, 0] = 0
    data = Data({"obs": obs, "t": t, "valid": valid, "reward": torch.ones(6, 4), "carry": valid})
    target = 3 * obs.squeeze(-1) ** 2 - obs.squeeze(-1) + 0.5 * t / 100 + 2
    assert not baseline(data).any()
    padding = torch.where(valid > 0, obs.squeeze(-1), torch.nan).unsqueeze(-1)
    baseline.fit(Data({**data, "obs": padding}), torch.where(valid > 0, target, torch.nan))
    close(baseline(data)[valid > 0], target[valid > 0], 1e-4)

    baseline.fit(data, target)
    estimator = TrajectoryEstimator(episodes=4, horizon=6, gamma=0.9, baseline=baseline)
    to_go = torch.tensor([sum(0.9**i for i in range(6 - s)) for s in range(6)], dtype=F64)
    psi = estimator.weigh(Data({**data, "valid": torch.ones(6, 4), "carry": (t < 5).double()}))["psi"]
    close(psi, 0.9**t * (to_go[:, None] - baseline(data)).to(psi), 1e-5)

    agent = NPGIGT("CartPole-v1", NPGIGTConfig(num_envs=4, n_steps=30, baseline="linear"))
    agent.learn(until=1)
    coef = agent.estimator.baseline.coef
    assert coef.any()
    assert agent.estimator.state_dict()["baseline.coef"].equal(coef)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "igt"}, "variant"), ({"lookahead_eta": "next"}, "lookahead_eta"),
        ({"learning_rate": 0.0}, "learning_rate"), ({"momentum": 1.5}, "momentum"), ({"gae_lambda": 0.5}, "gae_lambda"),
        ({"normalise_obs": True}, "normalise_obs"), ({"activation": "relu"}, "smooth"),
        ({"baseline": "mlp"}, "baseline"), ({"min_steps": -1}, "min_steps"),
        ({"compile": "on"}, "compile"), ({"momentum": 0.5, "variant": "pg"}, "momentum"),
        ({"lookahead_eta": "previous", "variant": "nmpg"}, "lookahead_eta"),
        ({"learning_rate": math.nan}, "learning_rate"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NPGIGTConfig(**options)


def test_registered():
    from agents import get_agent

    assert get_agent("npg_igt") is NPGIGT
    assert get_agent("harpg") is HARPG


# episodes of 3 steps: the shorter script of the contract's clock ends there, the longer one is cut by the horizon
EPISODIC = {"num_envs": 2, "n_steps": 3, "hidden": (4,)}


class TestNPGIGT(AgentContract):
    agent = NPGIGT
    config = NPGIGTConfig(baseline="linear", **EPISODIC)
    env_id = "CartPole-v1"
    single_env = partial(gymnasium.make, "CartPole-v1")


class TestSTORM(AgentContract):
    """The variant of HARPG with one rollout per iteration: the contract counts on iterations of one length."""

    agent = HARPG
    config = HARPGConfig(variant="storm", **EPISODIC)
    env_id = "Pendulum-v1"
    single_env = partial(gymnasium.make, "Pendulum-v1")
