"""BC, TD3+BC, IQL and ReBRAC: losses by hand, their limits, one seed one run, resume, refused data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.offline.bc import BC
from agents.offline.iql import IQL, expectile_loss, weights
from agents.offline.rebrac import ReBRAC
from agents.offline.td3_bc import TD3BC, TD3BCConfig, scale
from ccrl.data import Batching, Data
from ccrl.offline import DataError, Dataset, from_arrays
from ccrl.policies import TwinQ
from ccrl.policies.q import Ensemble
from ccrl.seeding import named_generator

SMALL = {"hidden": (16, 16), "batch_size": 32, "updates": 5, "compile": "off"}
AGENTS = [BC, TD3BC, IQL, ReBRAC]
each = pytest.mark.parametrize("cls", AGENTS, ids=lambda c: c.name)


def parameters(agent: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


# -- losses by hand ---------------------------------------------------------------------------------------------------


def test_expectiles() -> None:
    """u = (2, -1, .5): tau .7 gives (.7 * 4 + .3 * 1 + .7 * .25) / 3, tau .9 (3.6 + .1 + .225) / 3."""
    u = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    assert float(expectile_loss(u, 0.7).mean()) == pytest.approx(1.0916667, abs=1e-7)
    assert float(expectile_loss(u, 0.9).mean()) == pytest.approx(1.3083333, abs=1e-7)
    data = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    for tau, least in ((0.7, 31 / 13), (0.5, 5 / 3)):
        # the derivative of the loss by the constant is 0 at the expectile
        at = torch.tensor(least, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(expectile_loss(data - at, tau).mean(), at)
        assert float(grad) == pytest.approx(0.0, abs=1e-12)


def test_weights_and_scale() -> None:
    found = weights(torch.tensor([-1.0, 0.0, 0.5, 2.0]), 3.0, 100.0)
    torch.testing.assert_close(found, torch.tensor([0.04978707, 1.0, 4.48168907, 100.0]))
    assert weights(torch.tensor([1e9]), 3.0, 100.0).item() == pytest.approx(100.0)
    # mean |Q| = 20, 2.5 / 20
    assert float(scale(torch.tensor([10.0, -30.0, 20.0]), 2.5)) == pytest.approx(0.125)
    assert float(scale(torch.zeros(3), 2.5)) < float("inf")


def batch_of(data: Dataset, agent: Any) -> Data:
    return agent.rows(data, agent.policy).sample(Batching(size=64), torch.Generator().manual_seed(1))


def test_targets_bootstrap_at_time_outs_alone(line_env: Any, line_data: Dataset) -> None:
    agent = TD3BC(line_env, data=line_data, target_noise=0.0, gamma=0.9, **SMALL)
    batch = agent.learner.cycle.noise(batch_of(line_data, agent), agent.ctx)
    with torch.no_grad():
        found = agent.learner.cycle.targets(batch, agent.ctx)["target"]
        target = agent.ctx.bank.policy("target")
        features = target.features(batch["next_obs"][0])
        q = target.critic(features, target.mean(features)).amin(0)
    expected = batch["reward"][0] + torch.where(batch["terminated"][0], 0.0, 0.9 * q)
    torch.testing.assert_close(found[0], expected)
    assert bool(batch["terminated"].any())
    assert bool(batch["truncated"].any())


def test_target_noise_is_clipped(line_env: Any, line_data: Dataset) -> None:
    agent = TD3BC(line_env, data=line_data, target_noise=100.0, noise_clip=0.25, **SMALL)
    batch = agent.learner.cycle.noise(batch_of(line_data, agent), agent.ctx)
    seen: list[Tensor] = []
    target = agent.ctx.bank.policy("target")
    target.critic.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        agent.learner.cycle.targets(batch, agent.ctx)
        mean = target.mean(target.features(batch["next_obs"][0]))
    away = (seen[0] - mean).abs()
    assert float(away.max()) <= 0.25 + 1e-6
    assert float(away.median()) > 0.2


def test_rebrac_penalises_in_the_target_only_where_an_action_followed(line_env: Any, line_data: Dataset) -> None:
    options = {"target_noise": 0.0, "gamma": 0.9, **SMALL}
    plain = ReBRAC(line_env, data=line_data, critic_penalty=0.0, **options)
    penal = ReBRAC(line_env, data=line_data, critic_penalty=2.0, **options)
    batch = plain.learner.cycle.noise(batch_of(line_data, plain), plain.ctx)
    with torch.no_grad():
        a, b = (agent.learner.cycle.targets(batch, agent.ctx)["target"] for agent in (plain, penal))
        target = plain.ctx.bank.policy("target")
        mean = target.mean(target.features(batch["next_obs"][0]))
    away = (mean - batch["next_action"][0]).square().sum(-1) * batch["has_next"][0]
    torch.testing.assert_close((a - b)[0], 0.9 * batch["alive"][0] * 2.0 * away)
    ends = batch["truncated"][0]
    assert bool(ends.any())
    assert (a - b)[0][ends].eq(0).all()


def test_actions_are_learnt_in_units_of_the_box(line_env: Any, line_data: Dataset) -> None:
    agent = BC(line_env, data=line_data, **SMALL)
    draw = batch_of(line_data, agent)
    assert float(draw["action"].abs().max()) <= 1.0
    torch.testing.assert_close(agent.policy.to_env(torch.tensor([[0.25], [9.0]])), torch.tensor([[0.5], [2.0]]))
    features = agent.policy.features(torch.as_tensor(line_data.obs))
    torch.testing.assert_close(features.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(2), atol=5e-3, rtol=0)


# -- limits -----------------------------------------------------------------------------------------------------------


def test_td3_bc_without_value_is_bc(line_env: Any, line_data: Dataset) -> None:
    """alpha = 0 and an actor that moves at every step: the actor's parameters are BC's, bit for bit."""
    cloning = BC(line_env, data=line_data, **SMALL).learn(20)
    other = TD3BC(line_env, data=line_data, alpha=0.0, policy_delay=1, target_noise=0.0, **SMALL)
    with torch.no_grad():
        other.updaters["policy"].flat.copy_(BC(line_env, data=line_data, **SMALL).updaters["policy"].flat)
    draws = _Replayed(other, line_data)
    other.learner.source = draws
    other.learn(20)
    torch.testing.assert_close(other.updaters["policy"].flat, cloning.updaters["policy"].flat, rtol=0, atol=0)


class _Replayed:
    """Draws of another generator, so that noise drawn in between does not move them."""

    def __init__(self, like: Any, data: Dataset) -> None:
        self._ring = like.source
        self._generator = named_generator(like.seed, "learner")

    def sample(self, spec: Batching, generator: Any) -> Data:
        return self._ring.sample(spec, self._generator)


def test_iql_without_weights_is_maximum_likelihood(line_env: Any, line_data: Dataset) -> None:
    """beta = 0: whatever the critics say, the actor is the stochastic clone."""
    options = SMALL | {"stochastic": True}
    cloning = BC(line_env, data=line_data, **options)
    iql = IQL(line_env, data=line_data, beta=0.0, anneal_actor=False, **SMALL)
    with torch.no_grad():
        iql.updaters["policy"].flat.copy_(cloning.updaters["policy"].flat)
    cloning.learn(20)
    iql.learn(20)
    torch.testing.assert_close(iql.updaters["policy"].flat, cloning.updaters["policy"].flat, rtol=0, atol=0)


def test_iql_at_the_median_expectile_values_the_datas_own_actions(line_env: Any, line_data: Dataset) -> None:
    """tau = .5 and gamma = 0: V is the regression of the reward on the state. Rewards depend on the action alone, so V
    is their mean; at tau = .95 it is nearer to the best, 0."""
    mean = float(line_data.reward.mean())
    found = []
    for tau in (0.5, 0.95):
        options = SMALL | {"learning_rate": 1e-2, "polyak": 0.2, "batch_size": 256}  # of 32 rows the value swings by .1
        agent = IQL(line_env, data=line_data, expectile=tau, gamma=0.0, **options)
        agent.learn(250)
        with torch.no_grad():
            features = agent.policy.features(torch.as_tensor(line_data.obs))
            found.append(float(agent.policy.value(features).mean()))
    assert found[0] == pytest.approx(mean, abs=0.1)
    assert found[1] > mean + 0.2


def test_td3_bc_prefers_what_pays(line_env: Any, line_data: Dataset) -> None:
    """The data's mean action is .5; the reward is best at 1."""
    options = SMALL | {"learning_rate": 3e-3}
    obs = line_data.obs
    cloned = BC(line_env, data=line_data, **options).learn(300).predict(obs, deterministic=True)[0].mean()
    bettered = (
        TD3BC(line_env, data=line_data, gamma=0.0, alpha=0.5, **options)
        .learn(600)
        .predict(obs, deterministic=True)[0]
        .mean()
    )
    assert cloned == pytest.approx(0.5, abs=0.1)
    assert 0.65 < bettered < 1.2


def test_the_best_episodes_alone_are_cloned(line_env: Any, line_data: Dataset) -> None:
    agent = BC(line_env, data=line_data, best=0.25, **SMALL)
    assert len(agent.source) == 100
    assert float(agent.rows(line_data, agent.policy).rows()["reward"].mean()) > float(line_data.reward.mean())


def test_batches_are_whole_rows_of_the_ring(line_env: Any, line_data: Dataset) -> None:
    """Drawn together or one by one, columns of a row stay together; every row comes up."""
    agent = ReBRAC(line_env, data=line_data, **SMALL)
    ring, packed = agent.rows(line_data, agent.policy).rows(), agent.source
    index = torch.randint(400, (70 * 32,), generator=torch.Generator().manual_seed(5))
    batches = list(packed.batches(Batching(size=32), 70, torch.Generator().manual_seed(5)))
    assert len(batches) == 70  # more than are drawn at a time
    for name in agent.reads:
        found = torch.cat([b[name][0] for b in batches])
        torch.testing.assert_close(found, ring[name].float()[index], rtol=0, atol=0)
    assert batches[0]["reward"].shape == (1, 32)
    assert float(batches[0]["n_valid"]) == 32
    with pytest.raises(ValueError, match="size=B"):
        packed.sample(Batching(size="full"), None)


# -- agents -----------------------------------------------------------------------------------------------------------


@each
def test_one_seed_is_one_run_and_resumes(cls: Any, line_env: Any, line_data: Dataset, tmp_path: Path) -> None:
    def make(seed: int = 0) -> Any:
        return cls(line_env, data=line_data, seed=seed, **SMALL)

    agent = make()
    assert agent.learner.clock_unit == "updates"
    agent.learn(until=20, callback=lambda a: a.save(tmp_path / "a.pt") if a.num_timesteps == 10 else None)
    assert agent.num_timesteps == 20
    assert not torch.equal(parameters(agent), parameters(make())), "nothing was learnt"
    assert torch.equal(parameters(agent), parameters(make().learn(20)))
    assert not torch.equal(parameters(agent), parameters(make(1).learn(20)))
    loaded = cls.load(tmp_path / "a.pt", env=line_env, data=line_data)
    assert loaded.num_timesteps == 10
    assert torch.equal(parameters(loaded.learn(until=20)), parameters(agent))
    assert loaded.learner.state.names()[0] == "policy"


@each
def test_a_loaded_agent_acts_without_its_data(cls: Any, line_env: Any, line_data: Dataset, tmp_path: Path) -> None:
    agent = cls(line_env, data=line_data, **SMALL).learn(10)
    agent.save(tmp_path / "a.pt")
    loaded = cls.load(tmp_path / "a.pt", env=line_env)
    expected, found = (a.predict(line_data.obs[:5], deterministic=True)[0] for a in (agent, loaded))
    np.testing.assert_array_equal(expected, found)
    assert line_env.single_action_space.contains(found[0])
    with pytest.raises(DataError, match="to learn on, found none"):
        loaded.learn(10)


def test_a_loaded_agent_says_why_it_has_no_data(line_env: Any, line_data: Dataset, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **line_data.columns())
    BC(line_env, dataset=str(tmp_path / "data.npz"), **SMALL).save(tmp_path / "a.pt")
    (tmp_path / "data.npz").write_bytes(b"damaged")
    loaded = BC.load(tmp_path / "a.pt", env=line_env)
    with pytest.raises(DataError, match=r"found none \(.*data\.npz: expected an \.npz archive"):
        loaded.learn(5)


@each
def test_every_loss_reaches_its_parameters_and_no_others(cls: Any, line_env: Any, line_data: Dataset) -> None:
    agent = cls(line_env, data=line_data, **SMALL)
    cycle = agent.learner.cycle
    with torch.no_grad():
        batch = cycle.targets(cycle.noise(batch_of(line_data, agent), agent.ctx), agent.ctx)
    for phase in cycle.phases():
        before = {k: p.detach().clone() for k, p in agent.policy.named_parameters()}
        phase.updater.step(phase.terms, batch)
        moved = {k.split(".")[0] for k, p in agent.policy.named_parameters() if not torch.equal(p, before[k])}
        assert moved == {phase.name}, f"{phase.name} moved {moved}"


@pytest.mark.parametrize("cls", [TD3BC, IQL, ReBRAC], ids=lambda c: c.name)
def test_the_one_graph_step_is_the_eager_one(
    cls: Any, line_env: Any, line_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pure function that is compiled, run as it is: compiling takes a minute and is tested with the cycles."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr("ccrl.learn.base.can_compile", lambda: (True, "not compiled: a test"))
    found = []
    for mode in ("off", "on"):
        agent = cls(line_env, data=line_data, **SMALL | {"compile": mode, "updates": 4})
        agent.learn(8)
        assert agent.learner.cycle.compiled == (mode == "on")
        found.append(parameters(agent))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_the_actors_step_size_falls_along_a_cosine(line_env: Any, line_data: Dataset) -> None:
    agent = IQL(line_env, data=line_data, **SMALL)
    rates: list[float] = []
    agent.learn(20, callback=lambda a: rates.append(float(a.updaters["policy"].lr)))
    # after 1/4, 1/2, 3/4 and all: (1 + cos(pi x)) / 2
    assert rates == pytest.approx([3e-4 * x for x in (0.85355339, 0.5, 0.14644661, 0.0)], abs=1e-9)


def test_rewards_are_scaled_by_the_range_of_true_episodes(line_env: Any, line_data: Dataset) -> None:
    returns = line_data.returns()
    agent = TD3BC(line_env, data=line_data, reward="range", **SMALL)
    draw = batch_of(line_data, agent)["reward"]
    raw = batch_of(line_data, TD3BC(line_env, data=line_data, **SMALL))["reward"]
    torch.testing.assert_close(draw, raw * (1000.0 / (returns.max() - returns.min())), rtol=1e-5, atol=1e-5)
    less = batch_of(line_data, TD3BC(line_env, data=line_data, reward="minus_one", **SMALL))["reward"]
    torch.testing.assert_close(less, raw - 1.0)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_wrong_data_are_refused(line_env: Any, line_data: Dataset) -> None:
    with pytest.raises(DataError, match="expected a data set, got none"):
        BC(line_env)
    with pytest.raises(DataError, match="expected minari:ID"):
        BC(line_env, dataset="hopper")
    columns = line_data.columns()
    wide = from_arrays(columns | {"obs": np.zeros((400, 5)), "next_obs": np.zeros((400, 5))}, "wide")
    with pytest.raises(DataError, match="expected observations and actions of 2 and"):
        BC(line_env, data=wide)
    outside = from_arrays(columns | {"action": columns["action"] + 7.0}, "outside")
    with pytest.raises(DataError, match=r"row 0, column 'action': expected numbers in Box"):
        BC(line_env, data=outside)
    same = from_arrays(columns | {"reward": np.zeros(400)}, "same")
    with pytest.raises(DataError, match="different returns"):
        TD3BC(line_env, data=same, reward="range")


def test_wrong_spaces_are_refused(line_data: Dataset) -> None:
    import gymnasium

    from ccrl.testing.agent_contract import SpacesEnv

    box = gymnasium.spaces.Box(-1, 1, (2,))
    for obs, action in ((box, gymnasium.spaces.Discrete(2)), (box, gymnasium.spaces.Box(-np.inf, np.inf, (1,))),
                        (box, gymnasium.spaces.Box(np.float32([-2, 1]), np.float32([2, 1]))),
                        (gymnasium.spaces.Discrete(3), box)):  # fmt: skip
        env = SpacesEnv(obs, action)
        env.num_envs = 1
        with pytest.raises(ValueError, match="space: expected"):
            BC(env, data=line_data)


def test_dict_observations_of_goal_tasks_are_put_side_by_side(line_data: Dataset) -> None:
    import gymnasium

    from ccrl.testing.agent_contract import SpacesEnv

    box = gymnasium.spaces.Box(-9, 9, (1,))
    goals = gymnasium.spaces.Dict({"achieved_goal": box, "desired_goal": box, "observation": box})
    env = SpacesEnv(goals, gymnasium.spaces.Box(-2, 2, (1,)))
    env.num_envs = 1
    agent = BC(env, data=line_data, **SMALL).learn(5)
    obs = {
        k: np.full((3, 1), v, np.float32) for k, v in (("achieved_goal", 7), ("desired_goal", 2), ("observation", 1))
    }
    action, _ = agent.predict(obs, deterministic=True)
    flat = agent.policy.mean(agent.policy.features(torch.tensor([[1.0, 2.0]])))
    np.testing.assert_allclose(action[0], (2.0 * flat[0]).detach().numpy(), rtol=1e-5)


def test_further_columns_of_the_data_are_no_hindrance(line_env: Any, line_data: Dataset) -> None:
    noted = from_arrays(line_data.columns() | {"note": np.zeros(len(line_data))})
    plain, found = (ReBRAC(line_env, data=data, **SMALL).source.table for data in (line_data, noted))
    assert torch.equal(plain, found)


def test_a_policy_and_a_device_that_would_be_passed_over_are_refused(line_env: Any, line_data: Dataset) -> None:
    with pytest.raises(ValueError, match="policy: td3_bc makes its networks itself"):
        TD3BC(line_env, data=line_data, policy=torch.nn.Linear(2, 1), **SMALL)
    line_env.device = torch.device("meta")
    with pytest.raises(ValueError, match="device: the environment is on meta, the agent on cpu"):
        TD3BC(line_env, data=line_data, **SMALL)


def test_settings_that_do_not_fit_are_named() -> None:
    for wrong in ({"target_noise": 0.0, "noise_clip": 0.3}, {"polyak": 1.5}):
        with pytest.raises(ValueError, match=f"^{list(wrong)[-1]}: "):
            TD3BCConfig(**wrong)  # type: ignore[arg-type]


def test_critics_with_layer_norm() -> None:
    q = TwinQ(2, 1, net=Ensemble(2, 3, (4,), layer_norm=True))
    assert "net.layer_norms.0" in dict(q.named_parameters())
    x, a = torch.randn(5, 2), torch.randn(5, 1)
    found = q(x, a)
    h = torch.relu(torch.cat([x, a], -1) @ q.net.weights[0][1] + q.net.biases[0][1])
    normed = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found[1], (normed * q.net.last_weight[1]).sum(-1) + q.net.last_bias[1])
    torch.testing.assert_close(q(x, a, 1)[0], found[0])
