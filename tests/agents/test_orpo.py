"""ORPO: the contract, its discriminator, and what its weight does."""

from __future__ import annotations

from functools import partial

import gymnasium
import pytest
import torch

import envs
from agents.a2c import A2C, A2CConfig, A2CEstimator
from agents.orpo import ORPO, ORPOConfig
from agents.ppo import PPO
from ccrl.collect import Collector, Request
from ccrl.data import Data
from ccrl.estimators.divergences import OccupancyPenalty, occupancy_penalty
from ccrl.estimators.stages import Gae
from ccrl.occupancy import DISCRIMINATOR, Discriminator, OccupancyRatio
from ccrl.testing import AgentContract, prepare_rollout
from ccrl.updaters import FlatUpdater

SMALL = {
    "num_envs": 2, "n_steps": 15, "hidden": (8,), "compile": "off", "batch_size": 8, "n_epochs": 2,
    "reference_steps": 20, "discriminator_hidden": (8,), "discriminator_epochs": 1,
}  # fmt: skip


class TestORPO(AgentContract):
    agent = ORPO
    config = ORPOConfig(regulariser="action_kl", **{k: v for k, v in SMALL.items() if k[0] != "d"})
    env_id = "Pendulum-v1"
    single_env = partial(gymnasium.make, "Pendulum-v1")

    def make_clock(self, **options):
        """Its rewards do not vary, so that no weight can be in their units: stopping early, which needs none."""
        return super().make_clock(**options)

    def make_agent(self, env=None, seed=0):
        if env is None or isinstance(env, str):
            return super().make_agent(env, seed)
        config = ORPOConfig(coef=0.0, stop_at=1e9, normalise_obs=False, **SMALL)
        return self.agent(env, config, seed=seed)

    def test_an_environment_object_must_be_given_again(self, tmp_path):
        agent = self.make_agent(self.make_clock())
        agent.learn(until=agent.samples_per_iteration)
        agent.save(tmp_path / "a.pt")
        with pytest.raises(ValueError, match="pass env="):
            ORPO.load(tmp_path / "a.pt")
        loaded = ORPO.load(tmp_path / "a.pt", env=self.make_clock())
        assert torch.equal(loaded.updaters["policy"].flat, agent.updaters["policy"].flat)


class TestORPOOccupancy(TestORPO):
    config = ORPOConfig(**SMALL)


def make(seed: int = 0, reference=None, **settings) -> ORPO:
    options = {"num_envs": 4, "n_steps": 50, "hidden": (), "reference_steps": 100, "n_epochs": 2} | settings
    return ORPO("ccrl/Tomato-v0", seed=seed, reference=reference, compile="off", **options)


def test_without_a_weight_it_is_ppo_bit_for_bit():
    orpo = make(coef=0.0)
    ppo = PPO("ccrl/Tomato-v0", seed=0, num_envs=4, n_steps=50, hidden=(), n_epochs=2, compile="off")
    for agent in (orpo, ppo):
        agent.learn(2 * agent.samples_per_iteration)
    assert torch.equal(orpo.updaters["policy"].flat, ppo.updaters["policy"].flat)


def test_the_discriminator_finds_the_log_ratio():
    """Optimal logits log(mu / ref) = (1.098612, 0, -1.609438), loss 1.136093, whatever the sizes of the classes."""
    mu, ref = torch.tensor([6, 3, 1]), torch.tensor([20, 30, 50])
    states = torch.cat([torch.arange(3).repeat_interleave(mu), torch.arange(3).repeat_interleave(ref)])
    side = torch.cat([torch.ones(10), -torch.ones(100)])
    weight = torch.where(side > 0, 110 / 10, 110 / 100)
    eye = torch.nn.functional.one_hot(states, 3).float()
    columns = {"features": eye, "side": side, "weight": weight, "valid": torch.ones(110)}
    batch = Data({k: v.unsqueeze(0) for k, v in columns.items()} | {"n_valid": torch.tensor(110.0)},
                 scalars=frozenset({"n_valid"}))  # fmt: skip
    torch.manual_seed(0)
    net = Discriminator(3, ())
    updater = FlatUpdater(net, lr=0.05)
    for _ in range(600):
        stats = updater.step(DISCRIMINATOR, batch)
    assert float(stats["discriminator_loss"]) == pytest.approx(1.136093, abs=1e-5)
    assert net.logits(torch.eye(3)).tolist() == pytest.approx([1.098612, 0.0, -1.609438], abs=5e-3)


def test_the_penalty_enters_before_advantages():
    agent = make()
    agent.learn(agent.samples_per_iteration)
    data = prepare_rollout(agent)
    d = data["log_occupancy_ratio"]
    expected = data["reward"] - agent.estimator.lam * occupancy_penalty(d)
    assert torch.allclose(data["shaped_reward"], expected)
    assert float(agent.estimator.lam) == pytest.approx(0.5 * float(agent.estimator.sigma), rel=1e-6)
    delta = data["shaped_reward"][-1] + data.discount(0.99)[-1] * data["next_value"][-1] - data["value"][-1]
    assert torch.allclose(data["advantage"][-1], delta, atol=1e-6)
    assert {"train/occupancy_chi2", "train/occupancy_kl", "train/penalty", "rollout/true_return"} <= set(agent.scalars)


class NearA2C(A2C):
    """A2C whose reward is penalised for leaving what the policy visits at the start: two stages and a fit."""

    name = "near-a2c"
    weight = 0.0

    class Estimator(A2CEstimator):
        def __init__(self, config, policy, updaters, ratio, penalty):
            super().__init__(config, policy, updaters)
            self.ratio, self.penalty, updaters["discriminator"] = ratio, penalty, ratio.updater
            self._gae = Gae(config.gamma, config.gae_lambda, config.time_limit, reward="shaped_reward")

        def fit(self, have, ctx):
            return self.ratio.fit(have["on"], ctx.generator)

        def advantages(self, data):
            return super().advantages(self.penalty(self.ratio(data)))

    def build(self):
        policy = self.make_policy({"value": ()})
        updaters = {"policy": FlatUpdater(policy, lr=self.config.learning_rate)}
        rows = Collector(self.env, seed=1).collect(Request(steps=100), policy)
        spaces = self.env.single_observation_space, self.env.single_action_space
        ratio = OccupancyRatio(spaces, rows, hidden=(16,))
        estimator = self.Estimator(self.config, policy, updaters, ratio, OccupancyPenalty(self.weight))
        return self.rollouts(policy, estimator, updaters)


def test_the_penalty_is_a_column_for_any_recipe():
    moved = {}
    for weight in (0.0, 3.0):
        NearA2C.weight = weight
        config = A2CConfig(num_envs=4, n_steps=50, hidden=(), learning_rate=3e-2, compile="off")
        agent = NearA2C("ccrl/Tomato-v0", config, seed=0)
        states = torch.arange(352)
        start = agent.policy.params(states)["logits"].detach().log_softmax(1)
        agent.learn(10 * agent.samples_per_iteration)
        now = agent.policy.params(states)["logits"].detach().log_softmax(1)
        moved[weight] = float((now.exp() * (now - start)).sum(1).mean())
        assert "train/discriminator_loss" in agent.scalars
    assert moved[3.0] < 0.8 * moved[0.0]
    with pytest.raises(ValueError, match="coef >= 0"):
        OccupancyPenalty(-1.0)


def test_equal_policies_cost_nothing_at_first():
    data = prepare_rollout(make(discriminator_lr=1e-12))
    assert torch.allclose(data["shaped_reward"], data["reward"], atol=1e-6)


def test_rewards_in_other_units_are_penalised_in_them():
    """R' of k R is k R': the weight follows the deviation under the reference; a constant changes nothing."""

    class Scaled:
        def __init__(self, scale, shift):
            self.env, self.scale, self.shift = envs.make("ccrl/Tomato-v0", 4), scale, shift

        def __getattr__(self, name):
            return getattr(self.__dict__["env"], name)

        def step(self, action):
            result = self.env.step(action)
            return result._replace(reward=self.scale * result.reward + self.shift)

    found = []
    for scale, shift in ((1.0, 0.0), (4.0, 1.0)):
        agent = ORPO(Scaled(scale, shift), num_envs=4, n_steps=50, hidden=(), reference_steps=100, compile="off")
        found.append((prepare_rollout(agent)["shaped_reward"] - shift) / scale)
    assert torch.allclose(*found, atol=1e-6)


def test_the_theory_gives_the_weight():
    assert ORPOConfig(correlation=0.6).weight == pytest.approx(0.8)
    assert make(correlation=1.0).estimator.penalised is False, "a perfect proxy may be optimised"


@pytest.mark.parametrize("regulariser", ["chi2", "kl", "action_kl", "action_chi2", "action_sqrt_chi2"])
def test_the_rivals_keep_the_policy_near_the_reference(regulariser):
    distance = {}
    for coef in (0.0, 50.0):
        small = {} if regulariser.startswith("action") else {"discriminator_hidden": (16,)}
        agent = make(regulariser=regulariser, coef=coef, learning_rate=3e-2, **small)
        agent.learn(6 * agent.samples_per_iteration)
        ref = agent.ctx.bank.policy("ref")
        states = torch.arange(352)
        new, old = agent.policy.params(states), ref.params(states)
        distance[coef] = float(agent.policy.distribution.kl(new, old).mean().detach())
    assert distance[50.0] < distance[0.0]


def test_stopping_early():
    agent = make(coef=0.0, stop_at=1e-3, learning_rate=0.1)
    agent.learn(20 * agent.samples_per_iteration)
    assert 1 <= agent.iteration < 20
    assert agent.finished


def test_the_reference_is_anothers_policy(tmp_path):
    teacher = PPO("ccrl/Tomato-v0", seed=5, num_envs=4, n_steps=50, hidden=(), compile="off")
    teacher.learn(teacher.samples_per_iteration)
    teacher.save(tmp_path / "teacher.pt")
    states = torch.arange(352)
    wanted = teacher.policy.params(states)["logits"]
    for agent in (make(reference=teacher.policy), make(reference=None, **{})):
        same = torch.equal(agent.ctx.bank.policy("ref").params(states)["logits"], wanted)
        assert same == (agent._reference is not None)
    from_file = ORPO(
        "ccrl/Tomato-v0", num_envs=4, n_steps=50, hidden=(), reference_steps=10, compile="off",
        config=ORPOConfig(reference=str(tmp_path / "teacher.pt"), start_at_reference=False),
    )  # fmt: skip
    assert torch.equal(from_file.ctx.bank.policy("ref").params(states)["logits"], wanted)
    assert not torch.equal(from_file.policy.params(states)["logits"], wanted)
    with pytest.raises(ValueError, match="reference: expected activation='relu' as here, got 'tanh'"):
        make(config=ORPOConfig(reference=str(tmp_path / "teacher.pt")), activation="relu")
    from_file.save(tmp_path / "own.pt")
    (tmp_path / "teacher.pt").unlink()
    loaded = ORPO.load(tmp_path / "own.pt")
    assert torch.equal(loaded.ctx.bank.policy("ref").params(states)["logits"], wanted), "it is in the checkpoint"
    assert torch.equal(loaded.estimator.sigma, from_file.estimator.sigma)
    with pytest.raises(ValueError, match="this agent's networks"):
        make(reference=teacher.policy, hidden=(8,))


def test_the_help_says_which_orpo_it_is():
    words = "Occupancy-regularised policy optimisation, arXiv 2403.03185; not odds-ratio preference optimisation"
    for text in (ORPO.__doc__, ORPOConfig.__doc__):
        assert text.startswith(words)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regulariser": "tv"}, "regulariser"),
        ({"coef": -1.0}, "coef"),
        ({"normalise_reward": True}, "normalise_reward"),
        ({"recurrent": "gru"}, "recurrent"),
        ({"correlation": 0.5, "coef": 0.1}, "correlation"),
        ({"correlation": 1.5}, "correlation"),
        ({"regulariser": "action_kl", "warm_up": 3}, "warm_up"),
        ({"regulariser": "action_kl", "max_penalty": 1.0, "stop_at": 1.0}, "max_penalty"),
        ({"regulariser": "action_kl", "discriminator_lr": 1.0}, "discriminator_lr"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_constant_reward_has_no_unit():
    class Constant:
        def __init__(self):
            self.env = envs.make("ccrl/Tomato-v0", 4)

        def __getattr__(self, name):
            return getattr(self.__dict__["env"], name)

        def step(self, action):
            result = self.env.step(action)
            return result._replace(reward=torch.ones_like(result.reward))

    small = {"num_envs": 4, "n_steps": 4, "batch_size": 8, "hidden": (), "reference_steps": 5, "compile": "off"}
    with pytest.raises(ValueError, match="varies under the reference"):
        ORPO(Constant(), **small).learn(1)
    # a divergence of actions is not in units of the reward
    assert ORPO(Constant(), regulariser="action_kl", **small).learn(1).iteration == 1


def test_the_discriminator_sees_every_factor():
    """MultiDiscrete observations and actions, one-hot; and another number of the reference's valid steps is loaded."""
    space = gymnasium.spaces.MultiDiscrete([2, 3])
    one = {"obs": torch.tensor([[[1, 2]]]), "action": torch.tensor([[[0, 1]]]), "valid": torch.ones(1, 1)}
    ratio = OccupancyRatio((space, space), Data(one), hidden=(4,))
    assert ratio.reference_features.tolist() == [[0, 1, 0, 0, 1, 1, 0, 0, 1, 0]]
    two = {name: x.repeat(2, 1, *[1] * (x.dim() - 2)) for name, x in one.items()}
    ratio.load_state_dict(OccupancyRatio((space, space), Data(two), hidden=(4,)).state_dict())
    assert ratio.reference_features.shape == (2, 10)
