"""HDPO: gradients of the unrolled simulator against hand-computed and finite differences, learning, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import agents.hdpo
from agents.hdpo import HDPO, HDPOConfig, published_rate
from ccrl.data import Batching
from ccrl.estimators.terms import surrogate
from ccrl.experiment.callbacks import CheckpointCallback, EvalCallback, FunctionCallback
from ccrl.inventory.base_stock import BaseStockPolicy
from ccrl.inventory.functional_env import State
from ccrl.inventory.pathwise import Unrolled, average_cost, cost_term, scenario_data
from ccrl.updaters import ModuleUpdater
from envs.inventory import InventoryEnv, make_task, simulate
from envs.inventory.oracle import backlog_optimum

SMALL = {"n_train": 12, "n_dev": 6, "batch_size": 5, "dev_every": 2}


def simulator(task: str = "one_store_lost", periods: int | None = None, **options: Any) -> InventoryEnv:
    return InventoryEnv(make_task(task, **options), periods=periods)


def observed(env: InventoryEnv, count: int = 1, dtype: torch.dtype = torch.float64) -> tuple[State, State]:
    scenarios = env.sample(count, torch.Generator().manual_seed(3), dtype=dtype)
    return scenarios, env.observe(env.initial(scenarios))


def cost_of(unrolled: Unrolled, scenarios: State) -> Tensor:
    return unrolled(scenario_data(unrolled.env, scenarios), frozenset({"cost"}))["cost"]


# -- recorded demand, and NumPy ----------------------------------------------------------------------------------------


def test_recorded_demand_is_evaluated_on_weeks_that_training_never_saw() -> None:
    agent = HDPO(
        simulator("one_store_real_data", count=5),
        HDPOConfig(policy="data_driven", **SMALL | {"n_train": 5, "n_dev": 5}),
    )
    result = agent.evaluate(None, episodes=9, seed=0)
    assert len(result.returns) == 5  # all series that there are
    assert set(result.lengths) == {37}  # periods of the split "test"
    mean, error = agent.cost("test")
    env = agent.simulator.split("test")
    found = average_cost(Unrolled(env, agent.ctx.bank.policy("best")), env.sample(5, torch.Generator()))
    assert mean == pytest.approx(float(found.mean()))
    assert error == pytest.approx(float(found.std()) / 5**0.5)
    assert agent.cost("test", count=2)[0] == pytest.approx(float(found[:2].mean()))


@pytest.mark.parametrize(("task", "policy"), [("one_store_lost", "vanilla"), ("serial_system", "gnn")])
def test_predict_takes_what_observe_tells_in_numpy(task: str, policy: str) -> None:
    agent = HDPO(simulator(task), HDPOConfig(policy=policy, **SMALL))
    _, obs = observed(agent.simulator, 3, torch.float32)
    batch = {k: v.numpy() for k, v in obs.items()}
    orders, state = agent.predict(batch)
    assert state is None
    assert orders.shape == (3, len(agent.simulator.network.edges))
    assert orders == pytest.approx(agent.act(obs).numpy())
    one, _ = agent.predict({k: v[1] for k, v in batch.items()})
    assert one == pytest.approx(orders[1], rel=1e-5)
    with pytest.raises(ValueError, match="expected a dict with the keys"):
        agent.predict({"inventory": batch["inventory"]})


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lost", "total", "slope"), [(False, 27.5, -8.0), (True, 19.5, -9.0)])
def test_the_gradient_of_a_base_stock_level_by_hand(lost: bool, total: float, slope: float) -> None:
    name = "one_store_lost" if lost else "one_store_backlogged"
    env = simulator(name, periods=3, lead_time=1, underage=9.0)
    policy = BaseStockPolicy(env.network, observed(env)[1]).double()
    with torch.no_grad():
        policy.u.copy_(torch.tensor([6.0]).double().expm1().log() - 10.0)  # softplus(u + 10) = 6
    scenarios = {
        "inventory": torch.full((1, 1, 1), 2.0, dtype=torch.float64),
        "demand": torch.tensor([[[3.0], [5.0], [0.5]]], dtype=torch.float64),
    }
    cost = cost_of(Unrolled(env, policy), scenarios).sum()
    (grad,) = torch.autograd.grad(cost, policy.u)
    assert float(cost.detach()) == pytest.approx(total)
    level_per_u = float(torch.sigmoid(policy.u.detach() + 10.0))
    assert float(grad) == pytest.approx(slope * level_per_u)


CASES = [
    ("one_store_lost", {}, "vanilla"),
    ("one_store_backlogged", {}, "capped_base_stock"),
    ("serial_system", {}, "vanilla"),
    ("serial_system", {}, "echelon_stock"),
    ("serial_system", {}, "gnn"),
    ("transshipment_backlogged", {}, "gnn"),
    ("one_warehouse_lost_demand", {"stores": 3}, "symmetry_aware"),
    ("many_warehouses_lost_demand", {}, "gnn"),
    ("one_store_real_data", {"count": 4}, "data_driven"),
    ("one_store_real_data", {"count": 4}, "transformed_nv"),
    ("many_warehouses_real_data", {"count": 4}, "data_driven"),
]


@pytest.mark.parametrize(("task", "options", "name"), CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_gradients_against_finite_differences(task: str, options: dict[str, Any], name: str) -> None:
    """Along one random direction, over a whole horizon, in float64: any detach, in-place write or wrong subgradient
    between two periods shows."""
    torch.manual_seed(0)
    env = simulator(task, periods=None if "real" in task else 9, **options)
    scenarios, like = observed(env, 3)
    policy = agents.hdpo._POLICIES[name][0](env.network, like).double()
    params = [p for p in policy.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) / p.numel() ** 0.5 for p in params]
    unrolled = Unrolled(env, policy)
    total = cost_of(unrolled, scenarios).sum()
    grads = torch.autograd.grad(total, params)
    slope = sum((g * d).sum() for g, d in zip(grads, directions))

    def at(step: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(params, directions):
                p.add_(d, alpha=step)
            cost = cost_of(unrolled, scenarios).sum()
            for p, d in zip(params, directions):
                p.sub_(d, alpha=step)
        return cost

    step = 1e-7  # short: a kink of max or min in between would spoil the comparison
    torch.testing.assert_close(slope.detach(), (at(step) - at(-step)) / (2 * step), rtol=1e-4, atol=1e-3)
    assert float(slope.detach().abs()) > 1e-2


def test_the_loss_is_the_mean_over_scenarios_periods_and_stores_also_in_microbatches() -> None:
    env = simulator("one_warehouse_lost_demand", stores=3)
    scenarios, like = observed(env, 7, torch.float32)
    torch.manual_seed(0)
    unrolled = Unrolled(env, agents.hdpo.GNNPolicy(env.network, like))
    terms = (cost_term(3),)
    (batch,) = scenario_data(env, scenarios).epoch(Batching("sequence", "full"), None)
    loss, stats = surrogate(terms, unrolled(batch, frozenset({"cost"})), batch)
    expected = cost_of(unrolled, scenarios).sum() / (7 * 50 * 3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats["cost"], expected.detach())
    updater = ModuleUpdater(unrolled, lambda p: torch.optim.SGD(p, lr=0.1))
    whole = updater.gradient(terms, batch).mean.clone()
    batch.microbatch = 3
    torch.testing.assert_close(updater.gradient(terms, batch).mean, whole, rtol=1e-4, atol=1e-4)


def test_padding_of_the_last_minibatch_does_not_count() -> None:
    env = simulator()
    scenarios, like = observed(env, 5, torch.float32)
    unrolled = Unrolled(env, agents.hdpo.VanillaPolicy(env.network, like))
    batches = scenario_data(env, scenarios).epoch(Batching("sequence", 3), torch.Generator().manual_seed(0))
    losses = [surrogate((cost_term(1),), unrolled(b, frozenset({"cost"})), b)[0] for b in batches]
    assert [b.shape for b in batches] == [(50, 3), (50, 3)]
    torch.testing.assert_close((3 * losses[0] + 2 * losses[1]) / 5, cost_of(unrolled, scenarios).mean())


def test_the_metric_leaves_the_warm_up_out_and_rounds_orders() -> None:
    env = simulator(lead_time=2)
    scenarios, like = observed(env, 5, torch.float32)
    policy = BaseStockPolicy(env.network, like)
    unrolled = Unrolled(env, policy)
    cost = cost_of(unrolled, scenarios).detach().double()
    torch.testing.assert_close(average_cost(unrolled, scenarios), cost[30:].mean(0))
    torch.testing.assert_close(average_cost(unrolled, scenarios, chunk=2), cost[30:].mean(0))
    scenarios["inventory"] = scenarios["inventory"].round()
    whole = 20 * average_cost(unrolled, scenarios, whole_units=True)
    torch.testing.assert_close(whole, whole.round())


def test_just_in_time_costs_nothing_once_its_orders_arrive() -> None:
    for task in ("one_store_lost", "one_warehouse_lost_demand"):
        env = simulator(task)
        scenarios, like = observed(env, 4)
        scenarios["inventory"] = torch.zeros_like(scenarios["inventory"])
        policy = agents.hdpo.JustInTimePolicy(env.network, like).double()
        cost = cost_of(Unrolled(env, policy), scenarios)
        arrive, end = policy.foresight, 50 - policy.foresight  # nothing is known beyond the horizon
        assert float(cost[arrive:end].abs().max()) < 1e-9
        assert float(cost[0].min()) > 0


# -- the agent ---------------------------------------------------------------------------------------------------------


def make(policy: str = "vanilla", task: str = "one_store_lost", seed: int = 0, **settings: Any) -> HDPO:
    options = {"count": 16} if "real" in task else {}
    return HDPO(simulator(task, **options), HDPOConfig(policy=policy, **(SMALL | settings)), seed=seed)


def parameters(agent: HDPO) -> list[Tensor]:
    return [p.detach().clone() for p in agent.policy.parameters()]


def test_the_clock_counts_scenario_periods() -> None:
    agent = make()
    assert agent.samples_per_iteration == 12 * 50
    before = torch.random.get_rng_state()
    assert agent.learn(until=601) is agent
    assert (agent.num_timesteps, agent.iteration, agent.n_updates) == (1200, 2, 6)
    agent.learn(until=1800)
    assert agent.num_timesteps == 1800
    assert torch.equal(before, torch.random.get_rng_state())


def test_learning_finds_the_base_stock_level_of_a_backlogged_store() -> None:
    task = make_task("one_store_backlogged", lead_time=1, underage=4.0)
    agent = HDPO(
        InventoryEnv(task), HDPOConfig(policy="base_stock", n_train=256, n_dev=256, batch_size=64, dev_every=1)
    )
    agent.learn(until=12 * agent.samples_per_iteration)
    optimum = backlog_optimum(1, 4.0)
    assert float(agent.ctx.bank.policy("best").levels[0]) == pytest.approx(optimum.level, abs=0.15)
    mean, error = agent.cost("dev", 2000)
    assert mean == pytest.approx(optimum.cost, abs=0.01 * optimum.cost + 3 * error)


def test_a_network_learns_and_the_seed_decides_everything() -> None:
    settings = {"n_train": 128, "batch_size": 32, "learning_rate": 1e-2, "dev_every": 9}
    one, two, other = (make(seed=s, **settings) for s in (0, 0, 1))
    start = one.cost("dev", 100)[0]
    for agent, epochs in ((one, 9), (two, 9), (other, 1)):
        agent.learn(until=epochs * agent.samples_per_iteration)
    assert one.cost("dev", 100)[0] < 0.6 * start
    assert all(torch.equal(a, b) for a, b in zip(parameters(one), parameters(two)))
    assert not torch.equal(parameters(one)[0], parameters(other)[0])
    assert not torch.equal(one.data["demand"], other.data["demand"])
    assert not torch.equal(one.data["demand"][:6, :50], one.dev["demand"][:, :50])


RESUMED = [
    ("vanilla", "one_store_lost"),
    ("gnn", "transshipment_backlogged"),
    ("transformed_nv", "one_store_real_data"),
]


@pytest.mark.parametrize(("policy", "task"), RESUMED)
def test_a_loaded_agent_goes_on_bit_for_bit(tmp_path: Path, policy: str, task: str) -> None:
    settings = {"forecaster_steps": 20, "n_train": 6, "n_dev": 2, "batch_size": 4, "dev_every": 4}
    whole, half = (make(policy, task, **settings) for _ in range(2))
    whole.learn(until=4 * whole.samples_per_iteration)
    half.learn(until=2 * half.samples_per_iteration)
    half.save(tmp_path / "half.pt")
    torch.manual_seed(99)
    loaded = HDPO.load(tmp_path / "half.pt", env=half.simulator)
    assert loaded.num_timesteps == half.num_timesteps
    loaded.learn(until=4 * loaded.samples_per_iteration)
    mine, theirs = (agent.state_dict()["learner"] for agent in (loaded, whole))
    assert (loaded.iteration, loaded.n_updates) == (whole.iteration, whole.n_updates)
    assert mine["collector"] == theirs["collector"]
    assert mine["best"] == theirs["best"]
    assert mine["episodes"] == theirs["episodes"]
    for tree in ("policy", "estimator"):
        assert all(torch.equal(mine[tree][k], theirs[tree][k]) for k in theirs[tree])
    assert all(torch.equal(mine["bank"]["best"][k], v) for k, v in theirs["bank"]["best"].items())
    moments = [s["updaters/policy"]["optimiser"]["state"] for s in (mine, theirs)]
    assert all(torch.equal(moments[0][i][k], moments[1][i][k]) for i in moments[1] for k in moments[1][i])


def test_the_best_parameters_act_and_training_ends_without_progress(tmp_path: Path) -> None:
    agent = make(dev_every=1, patience=3, learning_rate=1e-2)
    seen: list[list[Tensor]] = [parameters(agent)]
    agent.learn(until=4 * agent.samples_per_iteration, callback=lambda a: seen.append(parameters(a)))
    best = [p.clone() for p in agent.ctx.bank.policy("best").parameters()]
    assert agent.best_iteration > 0
    assert all(torch.equal(a, b) for a, b in zip(best, seen[agent.best_iteration]))
    agent.policy.net[-1].bias.data.fill_(30.0)  # far too large orders: no later score is better
    agent.learn(until=100 * agent.samples_per_iteration)
    assert agent.finished
    assert agent.iteration == agent.best_iteration + 3
    kept = list(agent.ctx.bank.policy("best").parameters())
    assert all(torch.equal(a, b) for a, b in zip(best, kept))
    _, obs = observed(agent.simulator, 4, torch.float32)
    torch.testing.assert_close(agent.act(obs), agent.ctx.bank.policy("best")(obs))
    assert not torch.equal(agent.act(obs), agent.policy(obs))
    agent.save(tmp_path / "end.pt")
    done = HDPO.load(tmp_path / "end.pt", env=agent.simulator)
    assert done.learn(until=10**6).iteration == agent.iteration


def test_what_has_nothing_to_train_is_only_scored() -> None:
    agent = make("just_in_time")
    agent.learn(until=10**9)
    assert (agent.iteration, agent.n_updates) == (1, 0)
    assert agent.scalars["dev/cost"] < 1.0
    assert agent.ep_rew_mean is None


def test_returns_are_those_of_the_batched_environment() -> None:
    agent = make("gnn", "one_warehouse_lost_demand")
    found = agent.evaluate(None, 5, seed=4)
    trace = simulate(agent.simulator, agent.ctx.bank.policy("best"), agent.scenarios("train", 5, 10**6 + 4))
    torch.testing.assert_close(torch.from_numpy(found.returns), -trace.cost.sum(0).double() / 5, rtol=1e-5, atol=1e-3)
    assert found.lengths.tolist() == [50] * 5


def test_callbacks(tmp_path: Path) -> None:
    agent, seen = make(), list[dict[str, Any]]()
    look = FunctionCallback(lambda a: seen.append(dict(a.scalars)))
    evaluation = EvalCallback(None, tmp_path, every=agent.samples_per_iteration, episodes=3)  # type: ignore[arg-type]
    agent.learn(
        until=3 * agent.samples_per_iteration,
        callback=[look, evaluation, CheckpointCallback(tmp_path / "c", every=10**9)],
    )
    assert len(seen) == 3
    assert seen[-1]["rollout/ep_rew_mean"] == pytest.approx(-50 * float(seen[-1]["train/cost"]))
    assert {"dev/cost", "dev/best_cost", "train/grad_norm", "train/learning_rate", "time/fps"} <= seen[-1].keys()
    assert (tmp_path / "best.pt").is_file()
    assert agent.last_checkpoint is not None
    assert evaluation.best > -1e9


def test_a_bad_loss_stops_training_and_leaves_the_parameters() -> None:
    agent = make()
    agent.data["demand"][3] = float("nan")
    before = parameters(agent)
    with pytest.raises(FloatingPointError, match="not finite"):
        agent.learn(until=1)
    assert not agent.healthy
    assert all(bool(p.isfinite().all()) for p in parameters(agent))
    assert len(before) == len(parameters(agent))


def test_compiling_says_what_it_costs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    monkeypatch.setattr(agents.hdpo, "can_compile", lambda: (True, ""))
    plain = make().learn(until=600)
    for mode, text in (("period", "half a minute"), ("horizon", "minutes")):
        agent = make(compile=mode)
        agent.learn(until=600)
        assert text in capsys.readouterr().out
        for a, b in zip(parameters(plain), parameters(agent)):
            torch.testing.assert_close(a, b)
    monkeypatch.setattr(agents.hdpo, "can_compile", lambda: (False, "no C++ compiler"))
    make(compile="horizon").learn(until=600)
    assert "no C++ compiler" in capsys.readouterr().out


def test_published_rates() -> None:
    nets = {t: make_task(t).network for t in ("one_store_lost", "serial_system", "transshipment_backlogged")}
    rates = [published_rate("vanilla", net) for net in nets.values()]
    assert rates == [3e-3, 1e-2, 1e-4]
    assert published_rate("vanilla", make_task("one_warehouse_lost_demand").network) == 3e-4
    assert published_rate("gnn", nets["serial_system"]) == 1e-3
    assert make("gnn", "transshipment_backlogged").updaters["policy"].max_grad_norm == 1.0
    assert make().updaters["policy"].max_grad_norm is None


def test_the_step_size_falls_linearly_to_zero() -> None:
    agent, rates = make("base_stock", anneal_lr=True, learning_rate=0.4), list[float]()
    agent.learn(until=4 * agent.samples_per_iteration, callback=lambda a: rates.append(float(a.updaters["policy"].lr)))
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    agent = make("base_stock", learning_rate=0.4)
    agent.learn(until=2 * agent.samples_per_iteration)
    assert float(agent.updaters["policy"].lr) == 0.4


def test_bad_input_is_refused_at_construction(tmp_path: Path) -> None:
    for bad, message in (
        ({"policy": "mlp"}, "policy: expected one of"),
        ({"n_train": 0}, "n_train: expected >= 1"),
        ({"compile": "yes"}, "compile: expected one of .off"),
        ({"policy": "gnn", "hidden": (8,)}, "hidden: expected None with policy 'gnn'.* vanilla, data_driven"),
        ({"rounds": 2}, "rounds: expected None with policy 'vanilla', got 2; it is a setting of gnn"),
        ({"compile": "horizon", "microbatch": 4}, "microbatch: expected None"),
    ):
        with pytest.raises(ValueError, match=message):
            HDPOConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected an id with options, or a FunctionalEnv"):
        HDPO(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no functional environment"):
        HDPO("CartPole-v1")
    with pytest.raises(TypeError, match="expected HDPOConfig"):
        HDPO(simulator(), {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"FunctionalEnv\.observe"):
        make().act(torch.zeros(2, 4))
    make().save(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"expected an environment with the spaces.*Network"):
        HDPO.load(tmp_path / "a.pt", env=simulator("serial_system"))
    with pytest.raises(ValueError, match="pass env="):
        HDPO.load(tmp_path / "a.pt")


def test_what_acts_orders_whole_units() -> None:
    config = HDPOConfig(policy="base_stock", whole_units=True, **SMALL)
    agent = HDPO(simulator(), config)
    obs = observed(agent.simulator, 5, torch.float32)[1]
    orders = agent.act(obs)
    assert torch.equal(orders, orders.round())
    assert not torch.equal(orders, agent.ctx.bank.policy("best")(obs)), "the policy itself asks for parts of units"
