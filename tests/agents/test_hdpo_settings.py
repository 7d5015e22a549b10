"""Every setting of HDPO reaches what it names; scores, costs and evaluations by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import agents.hdpo
from agents.a2c import A2C
from agents.hdpo import HDPO, HDPOConfig, published_rate
from ccrl.inventory.base_stock import CappedBaseStockPolicy
from ccrl.inventory.functional_env import State
from ccrl.inventory.pathwise import Unrolled, average_cost
from ccrl.native import compiler
from envs.inventory import InventoryEnv, make_task, simulate

SMALL = {"n_train": 12, "n_dev": 6, "batch_size": 5, "dev_every": 2}


def make(policy: str = "vanilla", task: str = "one_store_lost", **settings: Any) -> HDPO:
    options = {"count": 16} if "real" in task else {}
    return HDPO(InventoryEnv(make_task(task, **options)), HDPOConfig(policy=policy, **(SMALL | settings)))


def test_defaults_are_the_published_ones() -> None:
    """Those of the published code (docs/hdpo.md), with a quarter of the traces and batches of 512."""
    c = HDPOConfig()
    assert (c.policy, c.n_train, c.batch_size, c.dev_every, c.patience) == ("vanilla", 8192, 512, 10, 500)
    assert (c.learning_rate, c.max_grad_norm, c.anneal_lr, c.whole_units) == (None, None, False, False)
    rates = {
        "data_driven": 3e-3, "gnn": 1e-3, "symmetry_aware": 1e-3, "base_stock": 0.5, "capped_base_stock": 1.0,
        "echelon_stock": 0.5, "quantile_nv": 3e-2, "transformed_nv": 3e-2, "fixed_quantile": 3e-2, "returns_nv": 3e-2,
    }  # fmt: skip
    network = make_task("one_store_lost").network
    assert {name: published_rate(name, network) for name in rates} == rates


def test_settings_reach_the_policy_and_its_updates() -> None:
    agent = make("gnn", "one_warehouse_lost_demand", rounds=2, max_grad_norm=3.0, microbatch=2)
    assert agent.policy.net.rounds == 2
    assert agent.updaters["policy"].max_grad_norm == 3.0
    (phase,) = agent.estimator.phases()
    assert (phase.batching.size, phase.batching.microbatch) == (5, 2)
    assert make(hidden=(7,)).policy.net[0].out_features == 7
    assert float(make(learning_rate=0.25).updaters["policy"].lr) == 0.25


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler on PATH")
def test_the_kernel_trains_as_the_eager_update_does(capsys: pytest.CaptureFixture[str]) -> None:
    plain, fast = make().learn(until=1200), make(compile="kernel").learn(until=1200)
    assert "the whole horizon is one kernel" in capsys.readouterr().out
    for a, b in zip(plain.policy.parameters(), fast.policy.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="kernel': expected stores alone"):
        make(task="serial_system", compile="kernel").build()


def test_the_forecaster_learns_once_for_the_steps_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(
        agents.hdpo, "fit_forecaster", lambda net, windows, count, generator: steps.append(count) or torch.zeros(())
    )
    agent = make("transformed_nv", "one_store_real_data", forecaster_steps=7, batch_size=12)
    agent.learn(until=2 * agent.samples_per_iteration)
    assert steps == [7]


@pytest.mark.parametrize("whole_units", [False, True])
def test_scores_costs_and_returns_are_those_of_the_best_policy_in_the_units_asked_for(whole_units: bool) -> None:
    agent = make("base_stock", whole_units=whole_units, dev_every=1)
    agent.learn(until=agent.samples_per_iteration)
    score = agent.best_cost
    agent.policy.u.data.fill_(90.0)  # the last parameters are not the best ones
    best = agent.ctx.bank.policy("best")

    def order(obs: State) -> Tensor:
        orders: Tensor = best(obs)
        return orders.round() if whole_units else orders

    def trace(split: Any, scenarios: State) -> Tensor:
        return simulate(agent.simulator.split(split), order, scenarios).cost.double()

    assert score == pytest.approx(float(trace("dev", agent.dev)[60:].mean()))
    costs = trace("dev", agent.scenarios("dev", 3, 10**6 + 65))[60:].mean(0)
    mean, error = agent.cost("dev", 3)
    assert mean == pytest.approx(float(costs.mean()))
    assert error == pytest.approx(float(costs.std()) / 3**0.5)
    found = agent.evaluate(None, 4, seed=1)
    returns = -trace("train", agent.scenarios("train", 4, 10**6 + 1)).sum(0)
    torch.testing.assert_close(torch.from_numpy(found.returns), returns)


def test_an_equal_score_is_no_better_one() -> None:
    agent = make("base_stock", dev_every=1, patience=3, learning_rate=1e-30)
    agent.learn(until=10**9)
    assert (agent.best_iteration, agent.iteration) == (1, 4)


def test_patience_waits_for_a_score() -> None:
    agent = make("base_stock", dev_every=5, patience=2, learning_rate=1e-30)
    agent.learn(until=10**9)
    assert (agent.best_iteration, agent.iteration) == (1, 5), "scored after the first epoch and every fifth"


def test_the_last_score_is_saved(tmp_path: Path) -> None:
    agent = make("base_stock", dev_every=3)
    agent.learn(until=2 * agent.samples_per_iteration)
    agent.save(tmp_path / "a.pt")
    loaded = HDPO.load(tmp_path / "a.pt", env=agent.simulator)
    for each in (agent, loaded):
        each.learn(
            until=3 * agent.samples_per_iteration, callback=lambda a: False
        )  # one epoch, which is not scored again before epoch 3
    assert loaded.scalars["dev/cost"] == agent.scalars["dev/cost"] != float("inf")


def test_rounded_orders_never_exceed_the_stock() -> None:
    """0.6 each of a stock of 2: rounding alone would ship 3."""
    env = InventoryEnv(make_task("one_warehouse_lost_demand", stores=3), periods=2, ignore=0)
    scenarios, seen = env.sample(4, torch.Generator().manual_seed(0)), []
    scenarios["inventory"][:, 0] = 0.0
    scenarios["inventory"][:, 0, 0] = 2.0
    step = env.step
    env.step = lambda state, action, demand: seen.append(action) or step(state, action, demand)  # type: ignore[method-assign]
    unrolled = Unrolled(env, lambda obs: torch.tensor([[0.6, 0.6, 0.6, 1.4]]).expand(4, 4))
    found = average_cost(unrolled, scenarios, whole_units=True)
    torch.testing.assert_close(seen[0], torch.tensor([[2 / 3, 2 / 3, 2 / 3, 1.0]]).expand(4, 4))
    assert found.dtype == torch.float64


def test_only_training_runs_the_compiled_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations have other batch sizes, each of which would compile once more."""
    calls: list[bool] = []
    monkeypatch.setattr(torch, "compile", lambda fn, **_: lambda *args: calls.append(True) or fn(*args))
    env = InventoryEnv(make_task("one_store_lost"), periods=3, ignore=0)
    scenarios = env.sample(2, torch.Generator().manual_seed(0))
    unrolled = Unrolled(env, lambda obs: obs["inventory"][:, :, 0], compile_period=True)
    batch = agents.hdpo.scenario_data(env, scenarios)
    unrolled(batch, frozenset({"cost"}))
    assert len(calls) == 3
    with torch.no_grad():
        unrolled(batch, frozenset({"cost"}))
    assert len(calls) == 3


def test_the_keyword_policy_is_the_setting() -> None:
    env = InventoryEnv(make_task("one_store_lost"))
    small = {"n_train": 4, "n_dev": 4, "batch_size": 4}
    agent = HDPO(env, policy="capped_base_stock", **small)
    assert agent.config.policy == "capped_base_stock"
    assert isinstance(agent.policy, CappedBaseStockPolicy)
    with pytest.raises(TypeError, match=r"policy: expected the name of one, vanilla, .*got Linear"):
        HDPO(env, policy=torch.nn.Linear(1, 1), **small)
    with pytest.raises(TypeError, match="a2c has no setting 'policy'"):
        A2C("CartPole-v1", policy="planner")
